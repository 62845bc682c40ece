"""Many models at once: time beside single fits, and how well modules of halves of the replicas agree.

python benchmarks/replicas.py [n_replicas]; real cells where SCBMLP_DATA_DIR has them. Cell types from other seeds and
from resampled cells, then the ten frequencies from other seeds.
"""

import sys
import time
from dataclasses import replace
from itertools import combinations

import numpy as np
import scanpy as sc

from scbmlp import sources
from scbmlp.datasets import get_classification_datasets, get_regression_datasets
from scbmlp.interactions import similarity
from scbmlp.models import Config, ScBMLPClassifier, ScBMLPRegressor, fit_replicas
from scbmlp.modules import consensus, gene_modules, principal_angles, stability
from scbmlp.targets import laplacian_frequencies


def leading(a, b) -> float:
    """Return the correlation of the scores of two leading modules over the training cells."""
    r = a.weights.to_numpy().T @ (b.unit.to_numpy()[:, None] * b.loadings.to_numpy())
    return float(abs(r[0]).max())


def report(models, train) -> None:
    """Print how well single fits, and halves of them, agree on every output."""
    halves = models[::2], models[1::2]
    for name in train.output_names:
        fits = [gene_modules(model, name, 5, "covariance") for model in models]
        pairs = np.mean([leading(a, b) for a in fits for b in fits if a is not b])
        both = [consensus(half, name, 5) for half in halves]
        alike = np.mean([similarity(a, b, name, dataset=train) for a, b in combinations(models[:6], 2)])
        planes = [gene_modules(model, name, 2, "covariance") for model in models[:6]]
        angle = np.mean([principal_angles(a, b, train)[-1] for a, b in combinations(planes, 2)])
        angle_halves = principal_angles(*(consensus(half, name, 2) for half in halves), train)[-1]
        table = stability(models, name, 3)
        print(f"  {name}: leading module of single fits {pairs:.3f}, of consensus halves {leading(*both):.3f}; "
              f"similarity {alike:.3f}; largest angle of planes {angle:.0f} degrees, of halves {angle_halves:.0f}; "
              f"stability {', '.join(f'{s:.2f}' for s in table['stability'])}", flush=True)  # fmt: skip


def fits(ModelClass, cfg, sets, n, resample=None) -> None:
    """Fit replicas beside a single model, and print a line on time and scores."""
    train, val, test = sets
    start = time.perf_counter()
    single = ModelClass(cfg)
    single.fit(train, val, baseline=False, enable_progress_bar=False)
    alone = time.perf_counter() - start
    start = time.perf_counter()
    models = fit_replicas(ModelClass, cfg, train, val, n, resample, progress=False)
    together = time.perf_counter() - start
    print(f"{ModelClass.__name__}, resample={resample}: {together:.0f} s at once, {n} x {alone:.1f} s one by one, "
          f"ratio {n * alone / together:.1f}; {single.metric} {np.mean([m.score(test) for m in models]):.3f}, "
          f"single {single.score(test):.3f}", flush=True)  # fmt: skip
    report(models, train)


def main(n: int) -> None:
    """Print one line a measurement."""
    adata = sources.pancreas()
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=2000, subset=True)
    laplacian_frequencies(adata, n_frequencies=10)
    sets = get_classification_datasets(adata, "clusters")
    print(f"{adata.uns['scbmlp_source']['kind']} cells, {len(sets[0])} x {adata.n_vars}, {n} replicas")
    cfg = Config(adata.n_vars, 128, 8, n_epochs=30, batch_size=64, dropout_rate=0.4, weight_decay=1e-2, device="cpu")
    for resample in (None, "bootstrap"):
        fits(ScBMLPClassifier, cfg, sets, n, resample)
    cfg = replace(cfg, d_output=10, n_epochs=60, dropout_rate=0.2, weight_decay=3e-3)
    fits(ScBMLPRegressor, cfg, get_regression_datasets(adata, "X_freq"), n)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
