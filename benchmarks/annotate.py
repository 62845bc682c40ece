"""Labels of cells of a batch that is left out: python benchmarks/annotate.py [n_batches].

Needs SCBMLP_DATA_DIR with worm_embryo.h5ad. Each batch in turn is left out, of the others 15% of the cells choose and
calibrate. Beside it is logistic regression on 100 principal components, its penalty chosen by the same cells, and both
see the 2,000 genes that vary most in the other batches. Accuracy, and F1 averaged over the classes that the batch has,
are of labels without threshold. Then come the calibration error in that batch before and after, the share of its cells
kept, and how often a class that was left out is called unassigned, where 95% of seen cells are kept.
"""

import os
import sys
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scanpy as sc
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss

from scbmlp.annotate import UNASSIGNED, annotate, calibrate, calibration_error
from scbmlp.datasets import get_classification_datasets
from scbmlp.models import ScBMLPClassifier, solve

KEY, BATCH = "cell_type", "batch"


def rival(train, validation, new):
    """Return probabilities of logistic regression on 100 components (cell x out)."""
    turn = PCA(100, random_state=0).fit(np.asarray(train.x.todense()))
    x, chosen, cells = (turn.transform(np.asarray(part.todense())) for part in (train.x, validation.x, new))
    fits = [LogisticRegression(C=c, max_iter=2000).fit(x, train.y) for c in (0.001, 0.01, 0.1, 1, 10)]
    return min(fits, key=lambda fit: log_loss(validation.y, fit.predict_proba(chosen))).predict_proba(cells)


def of_batch(adata, batch):
    """Return what is measured on one batch, by models of all others."""
    start, new = time.perf_counter(), adata[adata.obs[BATCH] == batch].copy()
    others = adata[adata.obs[BATCH] != batch].copy()
    sizes = others.obs[KEY].value_counts()
    others = others[others.obs[KEY].isin(sizes.index[sizes >= 20])].copy()
    sc.pp.highly_variable_genes(others, n_top_genes=2000, subset=True)
    train, validation, _ = get_classification_datasets(others, KEY, 0.8, 0.15)
    model = solve(ScBMLPClassifier, train, validation, progress=False)
    model.calibration = calibrate(model, train, validation)
    names = model.output_names
    new = new[new.obs[KEY].isin(names)].copy()
    y, codes = new.obs[KEY].astype(str).to_numpy(), names.get_indexer(new.obs[KEY].astype(str))
    logits, other = model.outputs(new).astype(float), rival(train, validation, new[:, train.gene_names].X)
    row, there = {"batch": batch, "cells": len(y)}, np.unique(y)
    for who, outputs in (("solved", logits), ("rival", other)):
        found = names.to_numpy()[outputs.argmax(axis=1)]
        row[f"accuracy, {who}"] = (found == y).mean()
        row[f"F1, {who}"] = f1_score(y, found, labels=there, average="macro")
    known = model.calibration
    row["error before"] = calibration_error(softmax(logits, axis=1), codes)
    row["error after"] = calibration_error(softmax(logits / known["temperature"], axis=1), codes)
    labels = annotate(new, model).obs["scbmlp_label"]
    kept = (labels != UNASSIGNED).to_numpy()
    row |= {"kept": kept.mean(), "accuracy, kept": (labels.to_numpy() == y)[kept].mean()}
    return row | {"unseen unassigned": np.mean([*known["unseen"].values()]), "seconds": time.perf_counter() - start}


def main():
    warnings.simplefilter("ignore")
    adata = anndata.read_h5ad(Path(os.environ.get("SCBMLP_DATA_DIR", ".")) / "worm_embryo.h5ad")
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    batches = adata.obs[BATCH].value_counts().index[: int(sys.argv[1]) if len(sys.argv) > 1 else None]
    rows = []
    for batch in batches:
        rows.append(of_batch(adata, batch))
        print(pd.Series(rows[-1]).to_string(float_format="{:.3f}".format), "\n", flush=True)
    table = pd.DataFrame(rows).set_index("batch")
    print(table.mean().to_string(float_format="{:.3f}".format))
    print(table.mul(table["cells"], axis=0).sum().div(table["cells"].sum()).to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
