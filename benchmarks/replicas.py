"""Many models at once: time beside single fits, and how well modules of halves of the replicas agree.

python benchmarks/replicas.py [n_replicas]; real cells where SCBMLP_DATA_DIR has them.
"""

import sys
import time

import numpy as np
import scanpy as sc

from scbmlp import sources
from scbmlp.datasets import get_classification_datasets
from scbmlp.interactions import similarity
from scbmlp.models import Config, ScBMLPClassifier, fit_replicas
from scbmlp.modules import consensus, gene_modules, stability


def leading(a, b) -> float:
    """Return the correlation of the scores of two leading modules over the training cells."""
    r = a.weights.to_numpy().T @ (b.unit.to_numpy()[:, None] * b.loadings.to_numpy())
    return float(abs(r[0]).max())


def main(n: int) -> None:
    """Print one line a measurement."""
    adata = sources.pancreas()
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=2000, subset=True)
    train, val, test = get_classification_datasets(adata, "clusters")
    print(f"{adata.uns['scbmlp_source']['kind']} cells, {len(train)} x {adata.n_vars}, {n} replicas")
    cfg = Config(adata.n_vars, 128, 8, n_epochs=30, batch_size=64, dropout_rate=0.4, weight_decay=1e-2, device="cpu")
    start = time.perf_counter()
    single = ScBMLPClassifier(cfg)
    single.fit(train, val, baseline=False, enable_progress_bar=False)
    alone = time.perf_counter() - start
    for resample in (None, "bootstrap"):
        start = time.perf_counter()
        models = fit_replicas(ScBMLPClassifier, cfg, train, val, n, resample, progress=False)
        together = time.perf_counter() - start
        print(f"resample={resample}: {together:.0f} s at once, {n} x {alone:.1f} s one by one, "
              f"ratio {n * alone / together:.1f}; accuracy {np.mean([m.score(test) for m in models]):.3f}, "
              f"single {single.score(test):.3f}")  # fmt: skip
        halves = models[: n // 2], models[n // 2 :]
        for name in train.output_names:
            fits = [gene_modules(model, name, 5, "covariance") for model in models]
            pairs = np.mean([leading(a, b) for a in fits for b in fits if a is not b])
            of_halves = leading(*(consensus(half, name, 5) for half in halves))
            alike = np.mean([similarity(a, b, name) for a in models[:6] for b in models[:6] if a is not b])
            table = stability(models, name, 3)
            print(f"  {name}: leading module of single fits {pairs:.3f}, of consensus halves {of_halves:.3f}; "
                  f"similarity {alike:.3f}; stability {', '.join(f'{s:.2f}' for s in table['stability'])}")  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
