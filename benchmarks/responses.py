"""The whole way of the perturbation chapter on 30,000 cells x 5,000 genes: python benchmarks/responses.py.

Prints the seconds of every step, beside ridge regression of the same responses, and the peak memory of the process.
"""

import resource
import time

import numpy as np
import scanpy as sc
from sklearn.linear_model import LinearRegression, Ridge

from scbmlp import simulate
from scbmlp.datasets import get_regression_datasets
from scbmlp.enrichment import enrich
from scbmlp.interactions import audit
from scbmlp.models import Config, ScBMLPRegressor
from scbmlp.modules import gene_modules
from scbmlp.targets import dose_coordinates, perturbation_response


def main():
    """Print how long each step took, and the memory."""
    start = begin = time.perf_counter()

    def lap(step):
        nonlocal start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
        print(f"{step:42} {time.perf_counter() - start:6.1f} s   peak so far {peak:.2f} GB", flush=True)
        start = time.perf_counter()

    adata = simulate.sciplex3(n_cells=30_000, n_genes=5000)
    truth = adata.uns["truth"]
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    lap("simulation, normalisation")
    strata = ["cell_line", "plate", "replicate"]
    perturbation_response(adata, "perturbation", "control", 15, strata=strata)
    lap("responses")
    mechanism = dict(zip(truth["compounds"]["name"], truth["compounds"]["mechanism"], strict=True))
    adata.obs["mechanism"] = [mechanism.get(name, "vehicle") for name in adata.obs["perturbation"]]
    dose_coordinates(adata, "mechanism", "dose_value", "vehicle")
    train, validation, test = get_regression_datasets(adata, "X_pert")
    model = ScBMLPRegressor(Config(5000, 64, 15, n_epochs=20, batch_size=128, dropout_rate=0.2, weight_decay=3e-3))
    model.fit(train, validation, enable_progress_bar=False)
    lap("training")
    ridge = Ridge(300).fit(train.x, train.y.numpy())
    lap("ridge regression")
    print(f"R2 bilinear {model.score(test):.3f}, ridge {ridge.score(test.x, test.y.numpy()):.3f}")
    table = audit(model, test)
    lap(f"audit: quadratic share at most {table['quadratic'].max():.3f}")
    doses = adata.obsm["X_dose"].iloc[train.indices]
    directions = LinearRegression().fit(doses.to_numpy(), train.y.numpy()).coef_.T
    modules = {
        name: gene_modules(model, dict(zip(model.output_names, mix, strict=True)), 2, "covariance", dataset=train)
        for name, mix in zip(doses.columns, directions / np.linalg.norm(directions, axis=1)[:, None], strict=True)
        if name in truth["responding_lines"]
    }
    lap(f"modules of {len(modules)} directions")
    enriched = enrich(modules, truth["programs"])
    lap(f"enrichment: {(enriched['q'] < 0.05).sum()} of {len(enriched)} tests significant")
    print(f"whole way {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
