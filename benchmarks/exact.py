"""The solved model beside three others on all data at hand: python benchmarks/exact.py [n_splits] [data ...].

Needs SCBMLP_DATA_DIR for real cells. A row a data set, split and method: mean R2 of the targets, or log-loss in nats
and accuracy of classes, on test cells; seconds of processor time; memory, the largest of the process so far. Every
choice is made on validation cells. Methods are the linear baseline, the solved model, the best nested model without
products, and the network of the published recipe. Where pairs were planted, AUPRC of pairs is of the solved model.
"""

import json
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scanpy as sc
from keep import keep
from scipy.special import log_softmax
from sklearn.metrics import average_precision_score

from scbmlp import nested, simulate
from scbmlp.baselines import linear_baseline
from scbmlp.datasets import get_classification_datasets, get_regression_datasets
from scbmlp.interactions import interaction_matrix
from scbmlp.models import Config, ScBMLPClassifier, ScBMLPRegressor, solve
from scbmlp.targets import laplacian_frequencies

RESULTS = Path(__file__).with_name("results") / "exact.json"
FOLDER = Path(os.environ.get("SCBMLP_DATA_DIR", "."))


def classes(name, key, scale=True):
    def read():
        adata = anndata.read_h5ad(FOLDER / f"{name}.h5ad")
        adata = adata[adata.obs[key].notna()].copy()
        if scale:
            sc.pp.normalize_total(adata)
            sc.pp.log1p(adata)
        return adata, key

    return read


def graded(name, columns, scale=True, change=np.asarray):
    def read():
        adata, _ = classes(name, columns[0], scale)()
        adata.obsm["graded"] = adata.obs[columns].astype(float).apply(change)
        return adata, "graded"

    return read


def minutes():
    """Return the cells of embryos of one age, which was measured in minutes."""
    adata, _ = classes("worm_embryo", "time_point")()
    adata = adata[adata.obs["time_point"] != "mixed"].copy()
    adata.obsm["minutes"] = adata.obs["time_point"].str.removesuffix("_minutes").astype(float).to_frame()
    return adata, "minutes"


def frequencies():
    adata, _ = classes("pancreas", "clusters")()
    laplacian_frequencies(adata, n_frequencies=10)
    return adata, "X_freq"


def blood():
    return sc.datasets.pbmc68k_reduced().raw.to_adata(), "bulk_labels"


def mixtures():
    adata, key = graded("rna_mixtures", ["H2228_prop", "H1975_prop", "HCC827_prop"])()
    sc.pp.highly_variable_genes(adata, n_top_genes=2000, subset=True)
    return adata, key


def planted(n_genes, n_cells=3000):
    return lambda: (simulate.planted_interactions(0, n_cells, n_genes), "label")


DATA = {
    "hours of dexamethasone": graded("a549_dexamethasone", ["dex_hours"], False, np.log1p),
    "frequencies of the pancreas": frequencies,
    "pancreas types": classes("pancreas", "clusters"),
    "worm types": classes("worm_embryo", "cell_type"),
    "worm minutes": minutes,
    "pbmc68k": blood,
    "tumours, treated or not": classes("glioblastoma_panobinostat", "condition"),
    "shares of RNA": mixtures,
    "perturbed genes (Norman)": classes("norman", "perturbation", False),
    "exclusive-or, 1,200 genes": planted(1200),
    "exclusive-or, 2,000 genes": planted(2000),
}
SIMULATED = {name for name in DATA if name.startswith("exclusive-or")}


def measured(outputs, test):
    """Return R2, or log-loss and accuracy."""
    y = test.y.numpy()
    if y.ndim == 2:
        return {"R2": float(np.mean(1 - ((outputs - y) ** 2).mean(axis=0) / y.var(axis=0)))}
    losses = -log_softmax(outputs.astype(float), axis=1)[np.arange(len(y)), y]
    return {"log-loss": float(losses.mean()), "accuracy": float((outputs.argmax(axis=1) == y).mean())}


def pairs(model, adata):
    """Return the AUPRC of planted pairs, by entries of Q in units of the genes' sd."""
    truth, names = adata.uns["truth"], adata.var_names
    one, two = (np.isin(names, truth["programs"][name]) for name in truth["pair"])
    known, upper = np.outer(one, two) | np.outer(two, one), np.triu_indices(len(names), 1)
    found = np.abs(interaction_matrix(model, "on").scaled(model.statistics.sd).to_dense())
    return float(average_precision_score(known[upper], found[upper]))


def without_products(train, val, test):
    rival = nested.compared(train, val)[0]
    kernels, y = nested.kernels_of(train, test.x)
    return nested.predicted(kernels, y, rival.mixtures, rival.ratios, train.y.ndim == 1)[0]


def one(name, split):
    """Print a row a method of one split, as JSON."""
    adata, key = DATA[name]()
    of_classes = key in adata.obs
    cut, Model = (
        (get_classification_datasets, ScBMLPClassifier) if of_classes else (get_regression_datasets, ScBMLPRegressor)
    )
    train, validation, test = cut(adata, key, random_state=split)
    for method in ("linear", "solved", "without products", "network"):
        start, row = time.process_time(), {"data": name, "split": split, "method": method}
        if method == "without products":
            outputs = without_products(train, validation, test)
        elif method == "linear":
            outputs = linear_baseline(train, validation).outputs(test)
        elif method == "solved":
            model = solve(Model, train, validation, progress=False)
            outputs, trials = model.outputs(test), model.trials
            row["form"] = ", ".join(trials["form"][trials["chosen"] > 0])
            if name in SIMULATED:
                row["pairs"] = pairs(model, adata)
        else:
            how = {"n_epochs": 30, "dropout_rate": 0.4, "weight_decay": 1e-2}
            if not of_classes:
                how = {"n_epochs": 60, "dropout_rate": 0.2, "weight_decay": 3e-3}
            cfg = Config(train.x.shape[1], 128, len(train.output_names), batch_size=64, device="cpu", **how)
            network = Model(cfg)
            network.fit(train, validation, baseline=False, enable_progress_bar=False)
            outputs = network.outputs(test)
        row |= {"genes": train.x.shape[1], "cells": len(train), "seconds": time.process_time() - start}
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(row | {"GB": memory} | measured(outputs, test)), flush=True)


def main(n_splits, names):
    start, rows = time.perf_counter(), []
    for name in names:
        for split in range(n_splits):
            command = [sys.executable, "-W", "ignore", __file__, "--one", name, str(split)]
            for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
                if line.startswith("{"):
                    rows.append(json.loads(line))
                    print(pd.DataFrame(rows[-1:]).round(4).to_string(index=False, header=False), flush=True)
    table = pd.DataFrame(rows).groupby(["data", "method"], sort=False).mean(numeric_only=True).drop(columns="split")
    print(table.round(3).to_string())
    if names == list(DATA):
        keep(RESULTS, "all", "python benchmarks/exact.py", rows, time.perf_counter() - start, ["numpy", "torch"])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], int(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 3, sys.argv[2:] or list(DATA))
