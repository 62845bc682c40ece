"""The solved model beside a linear one, on real data with labels or graded targets: python benchmarks/exact.py.

Needs SCBMLP_DATA_DIR. A row a data set, split and method: mean R2 of the targets, or log-loss in nats and accuracy of
classes, on test cells; seconds of processor time, and the largest memory of the process so far. An argument is the
number of splits, else three.
"""

import os
import resource
import sys
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scanpy as sc
from scipy.special import log_softmax

from scbmlp.baselines import linear_baseline
from scbmlp.datasets import get_classification_datasets, get_regression_datasets
from scbmlp.models import ScBMLPClassifier, ScBMLPRegressor, solve
from scbmlp.targets import laplacian_frequencies


def hours(folder):
    adata = anndata.read_h5ad(folder / "a549_dexamethasone.h5ad")
    logs = np.log1p(adata.obs["dex_hours"].astype(float))
    adata.obsm["hours"] = logs.to_frame("log hours")
    return adata, "hours"


def counts(name, key):
    def read(folder):
        adata = anndata.read_h5ad(folder / f"{name}.h5ad")
        adata = adata[adata.obs[key].notna()].copy()
        sc.pp.normalize_total(adata)
        sc.pp.log1p(adata)
        return adata, key

    return read


def frequencies(folder):
    adata, _ = counts("pancreas", "clusters")(folder)
    laplacian_frequencies(adata, n_frequencies=10)
    return adata, "X_freq"


DATA = {
    "hours of dexamethasone": hours,
    "frequencies of the pancreas": frequencies,
    "pancreas types": counts("pancreas", "clusters"),
    "worm types": counts("worm_embryo", "cell_type"),
}


def measured(outputs, test):
    """Return R2, or log-loss and accuracy."""
    y = test.y.numpy()
    if y.ndim == 2:
        return {"R2": float(np.mean(1 - ((outputs - y) ** 2).mean(axis=0) / y.var(axis=0)))}
    losses = -log_softmax(outputs.astype(float), axis=1)[np.arange(len(y)), y]
    return {"log-loss": losses.mean(), "accuracy": (outputs.argmax(axis=1) == y).mean()}


def main(n_splits=3):
    warnings.simplefilter("ignore")
    folder, rows = Path(os.environ["SCBMLP_DATA_DIR"]), []
    for name, read in DATA.items():
        adata, key = read(folder)
        for split in range(n_splits):
            classes = key in adata.obs
            cut = get_classification_datasets if classes else get_regression_datasets
            train, validation, test = cut(adata, key, random_state=split)
            for method in ("linear", "solved"):
                start = time.process_time()
                if method == "linear":
                    model = linear_baseline(train, validation)
                else:
                    model = solve(ScBMLPClassifier if classes else ScBMLPRegressor, train, validation, progress=False)
                row = {"data": name, "split": split, "method": method, "seconds": time.process_time() - start}
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
                rows.append(row | {"GB": memory} | measured(model.outputs(test), test))
                if method == "solved":
                    trials = model.trials
                    rows[-1]["form"] = ", ".join(trials["form"][trials["chosen"] > 0])
                print(pd.DataFrame(rows[-1:]).round(4).to_string(index=False, header=False), flush=True)
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
