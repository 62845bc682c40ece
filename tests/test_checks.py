"""A table of bad inputs: each is refused by this package, in words that help, or works as the plain input does.

A message has four parts: the argument, the value that it got, what is allowed, and the next step. None changes the
caller's data, and no library is the first to complain.
"""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData, read_h5ad
from anndata.tests.helpers import assert_adata_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import sparse

import scbmlp
from scbmlp import sources
from scbmlp.baselines import linear_baseline
from scbmlp.checks import as_mask, as_numbers, numeric_matrix, plain_names, positions
from scbmlp.datasets import (
    ExpressionDataset,
    get_classification_datasets,
    get_regression_datasets,
    match_genes,
)
from scbmlp.effects import additivity, against_control, mean_effects, response_directions
from scbmlp.enrichment import enrich, gsea, read_gene_sets
from scbmlp.evidence import ablation, random_directions, trust, without_pairs
from scbmlp.explorer import explorer
from scbmlp.interactions import (
    attributions,
    audit,
    decompose,
    direction,
    group_means,
    interaction_matrix,
    linear_axis,
    pair_effects,
)
from scbmlp.knockoffs import knockoffs
from scbmlp.models import Config, ScBMLPClassifier, ScBMLPRegressor, solve, tune
from scbmlp.modules import agreement, gene_modules, permutation_null, truncation_curve
from scbmlp.plotting import category_colors
from scbmlp.report import prepare
from scbmlp.stores import StoredMatrix
from scbmlp.targets import dose_coordinates, laplacian_frequencies, noise_ceiling, perturbation_response

PACKAGE = str(Path(scbmlp.__file__).parent)
N, G = 120, 20
QUIET = {"enable_progress_bar": False, "baseline": False}


def small_cells():
    rng, label = np.random.default_rng(0), np.arange(N) % 3
    x = np.log1p(rng.poisson(np.exp(rng.normal(0.3, 0.8, (3, G)))[label]) / 1.7)
    obs = pd.DataFrame(
        {
            "type": pd.Categorical([f"T{i}" for i in label]),
            "number": label + 1,
            "text": [str(i) for i in np.arange(N) % 12],
            "drug": np.array(["DMSO", "A", "B", "A+B"])[np.arange(N) % 4],
            "line": np.array(["a", "b"])[np.arange(N) // 60],
            "dose": np.tile([0, 10, 100, 1000], N // 4),
            "part": np.array(["train", "train", "train", "val", "test"])[np.arange(N) // 3 % 5],
            "holes": [None if i % 9 == 0 else "r" for i in range(N)],
        },
        [f"c{i}" for i in range(N)],
    )
    adata = AnnData(
        sparse.csr_matrix(x.astype(np.float32)), obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(G)])
    )
    adata.obsm["target"] = pd.DataFrame({"up": x[:, 0] * x[:, 1], "down": -x[:, 2]}, adata.obs_names)
    adata.layers["log"] = adata.X.copy()
    return adata


@pytest.fixture(scope="session")
def fitted(tmp_path_factory):
    """Cells, data sets, models and modules, none of them to be changed."""
    adata = small_cells()
    sets, graded = get_classification_datasets(adata, "type"), get_regression_datasets(adata, "target")
    numbered, lettered = (get_classification_datasets(adata, key) for key in ("number", "text"))
    world = {"sets": sets, "graded": graded}
    for name, kind, (train, *_) in (
        ("classifier", ScBMLPClassifier, sets), ("regressor", ScBMLPRegressor, graded),
        ("numbered", ScBMLPClassifier, numbered), ("lettered", ScBMLPClassifier, lettered),
    ):  # fmt: skip
        model = kind(Config(G, 4, len(train.output_names), n_epochs=2, device="cpu"))
        model.fit(train, **QUIET)
        world[name] = model
    layered, *_ = get_classification_datasets(adata, "type", layer="log")
    world["layered"] = ScBMLPClassifier(Config(G, 4, 3, n_epochs=1, device="cpu"))
    world["layered"].fit(layered, **QUIET)
    world["solved"] = solve(ScBMLPClassifier, *sets[:2], device="cpu", progress=False)
    world["modules"] = gene_modules(world["classifier"], "T0", 3)

    def disk(cells):
        path = tmp_path_factory.mktemp("disk") / "cells.h5ad"
        cells.write_h5ad(path)
        return path

    world["disk"] = disk
    return SimpleNamespace(**world)


def change(adata, **columns):
    for name, values in columns.items():
        adata.obs[name] = values
    return adata


def x_of(adata, x):
    adata.X = x
    return adata


def twice(adata, what):
    names = getattr(adata, what).to_numpy().copy()
    names[1] = names[0]
    with warnings.catch_warnings(action="ignore"):
        setattr(adata, what, names)
    return adata


def spoiled(adata, value):
    x = adata.X.toarray()
    x[3, 2] = value
    return x_of(adata, x)


def scaled(adata, raw=False):
    if raw:
        adata.raw = adata
    return x_of(adata, (adata.X.toarray() - 1).astype(np.float32))


def fit(w, **arguments):
    return ScBMLPClassifier(Config(G, 2, 3, n_epochs=1, device="cpu")).fit(*w.sets[:2], **(QUIET | arguments))


def config(**fields):
    return Config(**({"d_input": 4, "d_hidden": 2, "d_output": 2} | fields))


def own(w, x=None, y=None, genes=None, outputs=("a", "b"), **arguments):
    x = np.ones((4, 3), np.float32) if x is None else x
    return ExpressionDataset(x, np.arange(4) % 2 if y is None else y, list("xyz") if genes is None else genes,
                             list(outputs), **arguments)  # fmt: skip


def respond(a, **arguments):
    return perturbation_response(a, **({"perturbation_key": "drug", "control": "DMSO", "n_components": 1} | arguments))


def renamed(a, names):
    a.var_names = names
    return a


# what is done (of AnnData and of what is fitted), the error, and what its message has
BAD = {
    # ------------------------------------------------------------------------------------------------- matrices
    "no matrix": (lambda a, w: get_classification_datasets(x_of(a, None), "type"), ValueError, r"adata\.X is None; put"),
    "no matrix at prediction": (lambda a, w: w.classifier.predict(x_of(a, None)), ValueError, r"adata\.X is None"),
    "NaN at training": (lambda a, w: get_classification_datasets(spoiled(a, np.nan), "type"), ValueError, "NaN or infinite values in 1 of 120 cells; drop"),
    "infinite at training": (lambda a, w: get_regression_datasets(spoiled(a, np.inf), "target"), ValueError, "infinite values in 1 of 120"),
    "NaN at prediction": (lambda a, w: w.classifier.predict(spoiled(a, np.nan)), ValueError, "infinite values in 1 of 120"),
    "NaN in a matrix": (lambda a, w: w.classifier.predict_proba(spoiled(a, np.nan).X), ValueError, "x holds NaN or infinite"),
    "NaN in a table": (lambda a, w: w.regressor.predict(spoiled(a, np.nan).to_df()), ValueError, "x holds NaN or infinite"),
    "NaN in scores": (lambda a, w: w.modules.scores(spoiled(a, np.nan)), ValueError, "infinite values in 1 of 120"),
    "NaN in contributions": (lambda a, w: w.modules.contributions(spoiled(a, np.nan)), ValueError, "infinite values"),
    "NaN into AnnData": (lambda a, w: w.modules.to_adata(spoiled(a, np.nan)), ValueError, "infinite values in 1 of 120"),
    "NaN in a decomposition": (lambda a, w: decompose(w.classifier, spoiled(a, np.nan), np.zeros(G)), ValueError, "infinite values"),
    "NaN in a quadratic form": (lambda a, w: interaction_matrix(w.classifier, 0).quadratic_form(spoiled(a, np.nan).X), ValueError, "infinite values"),
    "NaN in frequencies": (lambda a, w: laplacian_frequencies(spoiled(a, np.nan), 2), ValueError, r"adata\.X holds NaN"),
    "NaN in responses": (lambda a, w: respond(spoiled(a, np.nan)), ValueError, r"adata\.X holds NaN"),
    "NaN in a baseline": (lambda a, w: linear_baseline(*w.sets[:2]).outputs(spoiled(a, np.nan)), ValueError, "infinite"),
    "too large for float32": (lambda a, w: get_classification_datasets(x_of(a, a.X.toarray().astype(float) * 1e300), "type"), ValueError, "NaN or infinite"),
    "scaled": (lambda a, w: get_classification_datasets(scaled(a), "type"), ValueError, r"negative values \(minimum -1\), .*normalize_total"),
    "scaled, with raw": (lambda a, w: get_classification_datasets(scaled(a, raw=True), "type"), ValueError, r"adata\.raw\.to_adata\(\)"),
    "scaled at prediction": (lambda a, w: w.classifier.predict(scaled(a, raw=True)), ValueError, r"adata\.raw\.to_adata\(\)"),
    "scaled in responses": (lambda a, w: respond(scaled(a)), ValueError, "negative values"),
    "scaled in frequencies": (lambda a, w: laplacian_frequencies(scaled(a), 2), ValueError, "negative values"),
    "complex": (lambda a, w: w.classifier.predict(a.X.toarray().astype(complex)), ValueError, "values of type complex128; real numbers"),
    "text": (lambda a, w: w.classifier.predict(a.X.toarray().astype(str)), ValueError, "values of type <U.*; real numbers are needed"),
    "objects": (lambda a, w: w.classifier.predict(np.array([["a"] * G], dtype=object)), ValueError, "values of type object"),
    "one cell as a vector": (lambda a, w: w.classifier.predict(np.zeros(G)), ValueError, r"shape \(20,\); two axes are needed"),
    "one cell as a Series": (lambda a, w: w.classifier.predict(a.to_df().iloc[0]), ValueError, r"a Series of 20 values; .*to_frame\(\)\.T"),
    "another number of genes": (lambda a, w: w.classifier.predict(a.X[:, 1:]), ValueError, r"shape \(120, 19\).* with 20 genes"),
    "a column of labels": (lambda a, w: w.classifier.predict(a.to_df().assign(G3="x")), ValueError, "columns that are no numbers, such as G3"),
    "no layer": (lambda a, w: get_classification_datasets(a, "type", layer="counts"), KeyError, r"layer='counts' is not in adata\.layers; there are: log"),
    "no layer of the model": (lambda a, w: w.layered.predict(AnnData(a.X, var=a.var)), KeyError, r"layer='log' is not .*trained on"),
    "no layer at prediction": (lambda a, w: w.classifier.outputs(a, layer="raw"), KeyError, "layer='raw' is not"),
    "no layer in scores": (lambda a, w: w.modules.scores(a, layer="raw"), KeyError, "layer='raw' is not"),
    "no layer in responses": (lambda a, w: respond(a, layer="raw"), KeyError, "layer='raw' is not"),
    "no layer in frequencies": (lambda a, w: laplacian_frequencies(a, 2, layer="raw"), KeyError, "layer='raw' is not"),
    # --------------------------------------------------------------------------------------------------- on disk
    "no file": (lambda a, w: get_classification_datasets("nowhere.h5ad", "type"), FileNotFoundError, r"nowhere\.h5ad does not exist; pass the path"),
    "no file at prediction": (lambda a, w: w.classifier.predict(Path("nowhere.zarr")), FileNotFoundError, r"nowhere\.zarr does not exist"),
    "no file of expression": (lambda a, w: get_classification_datasets(__file__, "type"), OSError, r"test_checks\.py cannot be read .*pass an \.h5ad file"),
    "no column in a file": (lambda a, w: get_classification_datasets(w.disk(a), "typ"), KeyError, r"class_key='typ' is not a column of adata\.obs; .*did you mean type"),
    "no target in a file": (lambda a, w: get_regression_datasets(w.disk(a), "X_freq"), KeyError, r"target_key='X_freq' is not in adata\.obsm; there are: target"),
    "no layer in a file": (lambda a, w: get_classification_datasets(w.disk(a), "type", layer="raw"), KeyError, "layer='raw' is not in the file .*its layers are: log"),
    "no X in a file": (lambda a, w: get_classification_datasets(w.disk(AnnData(obs=a.obs, var=a.var, layers=a.layers)), "type"), KeyError, "the file has no X .*its layers are: log"),
    "by genes in a file": (lambda a, w: get_classification_datasets(w.disk(x_of(a, a.X.tocsc())), "type"), ValueError, r"sparse by genes \(CSC\), .*adata\.X\.tocsr\(\)"),
    "NaN in a file": (lambda a, w: get_classification_datasets(w.disk(spoiled(a, np.nan)), "type"), ValueError, "a block of X of .*infinite values in 1 of 120 cells; drop"),
    "NaN in a file at prediction": (lambda a, w: w.classifier.predict(w.disk(spoiled(a, np.nan))), ValueError, "infinite values in 1 of 120"),
    "scaled in a file": (lambda a, w: get_classification_datasets(w.disk(scaled(a)), "type"), ValueError, r"negative values \(minimum -1\), .*normalize_total"),
    "scaled in a file to normalise": (lambda a, w: get_classification_datasets(w.disk(scaled(a)), "type", normalize_total=True), ValueError, "negative values"),
    "scaled to normalise": (lambda a, w: get_classification_datasets(scaled(a), "type", log1p=True), ValueError, "negative values"),
    "a gene is lacking in a file": (lambda a, w: w.classifier.predict(w.disk(a[:, 1:].copy())), KeyError, "lacks 1 of the 20 genes needed, such as G0"),
    "genes twice in a file": (lambda a, w: get_classification_datasets(w.disk(twice(a, "var_names")), "type"), ValueError, r"not unique; call adata\.var_names_make_unique"),
    "file of no counts": (lambda a, w: get_classification_datasets(w.disk(x_of(a, a.X * 0)), "type", normalize_total=True), ValueError, "no counts in any of 120 cells"),
    "total of nothing": (lambda a, w: get_classification_datasets(a, "type", normalize_total=0), ValueError, "normalize_total=0: False, True for the median"),
    "total of text": (lambda a, w: StoredMatrix(w.disk(a), normalize_total="median"), ValueError, "normalize_total='median': False, True"),
    "logarithm of a base": (lambda a, w: get_regression_datasets(a, "target", log1p=2), ValueError, "log1p=2: True or False is needed; the"),
    "half a worker": (lambda a, w: get_classification_datasets(a, "type", num_workers=0.5), ValueError, "num_workers=0.5: a whole number of at least 0"),
    "backed in frequencies": (lambda a, w: laplacian_frequencies(read_h5ad(w.disk(a), backed="r"), 2), ValueError, r"backed by a file, and all of its cells are needed.*adata\.to_memory\(\)"),
    "backed to deal out": (lambda a, w: without_pairs(get_classification_datasets(w.disk(a), "type")[0]), ValueError, r"needs all cells in memory.*dataset\.load\("),
    "backed knock-offs": (lambda a, w: knockoffs(get_classification_datasets(w.disk(a), "type")[0]), ValueError, r"knockoffs needs all cells in memory"),
    "backed attributions": (lambda a, w: attributions(w.classifier, "T0", w.disk(a), np.zeros(G)), ValueError, "a table of cells x genes needs all cells in memory"),
    "modules into a path": (lambda a, w: w.modules.to_adata(w.disk(a)), ValueError, "adata is of type PosixPath; modules are written to AnnData"),
    # ---------------------------------------------------------------------------------------------------- names
    "genes twice at training": (lambda a, w: get_classification_datasets(twice(a, "var_names"), "type"), ValueError, r"not unique; call adata\.var_names_make_unique\(\)"),
    "genes twice at prediction": (lambda a, w: w.classifier.predict(AnnData(np.ones((2, 21)), var=pd.DataFrame(index=[*a.var_names, "G3"]))), ValueError, "needed more than once, such as G3; keep one"),
    "genes twice in scores": (lambda a, w: w.modules.scores(pd.DataFrame(np.ones((2, 21)), columns=[*a.var_names, "G3"])), ValueError, "more than once, such as G3"),
    "a gene is lacking": (lambda a, w: w.classifier.predict(a[:, 1:].copy()), KeyError, "lacks 1 of the 20 genes needed, such as G0; use data with all"),
    "a gene is lacking in a table": (lambda a, w: w.modules.scores(a.to_df().iloc[:, 1:]), KeyError, "lacks 1 of the 20 genes"),
    "another case": (lambda a, w: w.classifier.predict(renamed(a, [f"g{i}" for i in range(G)])), KeyError, r"20 are there in another case, such as G0"),
    "labels by position": (lambda a, w: w.classifier.predict(pd.DataFrame(a.X.toarray())), KeyError, "lacks 20 of the 20 genes"),
    "output unknown": (lambda a, w: interaction_matrix(w.classifier, "t1"), KeyError, "output='t1' is unknown; the outputs are T0, T1, T2; did you mean T1"),
    "output out of range": (lambda a, w: gene_modules(w.classifier, 3), KeyError, "output=3 is unknown"),
    "output a number that is no name": (lambda a, w: gene_modules(w.numbered, 0), KeyError, "output=0 is unknown; the outputs are 1, 2, 3"),
    "output a number or a name": (lambda a, w: gene_modules(w.lettered, 2), KeyError, "may be the output named '2', or the one at that place, which is '10'; pass the name"),
    "output yes or no": (lambda a, w: direction(w.classifier, True), KeyError, "output=True is unknown"),
    "output weights of text": (lambda a, w: direction(w.classifier, {"T0": "1"}), ValueError, "weight of 'T0' is '1'; a finite number"),
    "output weights not finite": (lambda a, w: direction(w.classifier, {"T0": np.nan}), ValueError, "weight of 'T0' is nan; a finite"),
    "output empty": (lambda a, w: direction(w.classifier, {}), KeyError, r"output=\{\} names nothing; the outputs are"),
    "outputs twice": (lambda a, w: own(w, outputs=["a", "a"]), ValueError, "outputs have names that come twice: a; give each"),
    "targets twice": (lambda a, w: get_regression_datasets(with_target(a, pd.DataFrame(np.random.rand(N, 2), a.obs_names, ["u", "u"])), "t"), ValueError, "come twice: u"),
    "genes without a name": (lambda a, w: own(w, genes=["x", None, "z"]), ValueError, "genes have no name in 1 of 3; name them"),
    "too few gene names": (lambda a, w: own(w, genes=["x", "y"]), ValueError, "x has 3 columns, gene_names has 2; name every one"),
    "reference is no class": (lambda a, w: audit(w.classifier, w.sets[2], "t1"), KeyError, "reference='t1' is not a class; they are 'T0'.*did you mean T1"),
    "reference is text of a number": (lambda a, w: audit(w.numbered, get_classification_datasets(a, "number")[2], "3"), KeyError, "reference='3' is not a class; they are 1, 2, 3"),
    "reference of a regressor": (lambda a, w: audit(w.regressor, w.graded[2], "up"), KeyError, "reference='up' is not a class"),
    "reference of other genes": (lambda a, w: linear_axis(w.classifier, 0, pd.Series(1.0, list("xyz"))), KeyError, "lacks 20 of the 20 genes"),
    "reference too short": (lambda a, w: decompose(w.classifier, a, np.zeros(3)), ValueError, "reference has 3 values, .* 20 genes is needed"),
    "reference with NaN": (lambda a, w: linear_axis(w.classifier, 0, np.full(G, np.nan)), ValueError, "reference has 20 values, 20 of them NaN"),
    "unit too short": (lambda a, w: interaction_matrix(w.classifier, 0).scaled(np.ones(3)), ValueError, "scale has 3 values"),
    "gene unknown": (lambda a, w: interaction_matrix(w.classifier, 0).between(["G1"], ["g2"]), KeyError, "1 of 1 genes are not the model's: g2; did you mean G2"),
    "one gene for a list": (lambda a, w: interaction_matrix(w.classifier, 0).between("G1", ["G2"]), ValueError, "'G1' is one name; pass a list"),
    "module unknown": (lambda a, w: w.modules.top_genes("module_9"), KeyError, "module='module_9' is unknown; there are 3"),
    "module out of range": (lambda a, w: w.modules.top_genes(3), KeyError, "module=3 is unknown; there are 3"),
    "pole unknown": (lambda a, w: w.modules.top_genes(0, pole="up"), ValueError, r"pole='up' is unknown; choose '\+', '-' or 'both'"),
    # --------------------------------------------------------------------------------------------------- columns
    "no column": (lambda a, w: get_classification_datasets(a, "typ"), KeyError, r"class_key='typ' is not a column of adata\.obs; there are: type.*did you mean type"),
    "column of no name": (lambda a, w: get_classification_datasets(a, None), KeyError, "class_key=None is not a column"),
    "column a list": (lambda a, w: get_classification_datasets(a, ["type"]), KeyError, r"class_key=\['type'\] is not a column"),
    "columns of one name": (lambda a, w: get_classification_datasets(two_columns(a), "type"), ValueError, "2 columns of that name; rename all but one"),
    "labels missing": (lambda a, w: get_classification_datasets(a, "holes"), ValueError, r"has no label for 14 of 120 cells; keep the labelled ones"),
    "nullable labels missing": (lambda a, w: get_classification_datasets(change(a, type=pd.array([True, pd.NA, False] * 40, dtype="boolean")), "type"), ValueError, "no label for 40 of 120 cells"),
    "one class": (lambda a, w: get_classification_datasets(change(a, type="T0"), "type"), ValueError, "has the class 'T0' alone, and nothing to tell it from; add"),
    "a class of one cell": (lambda a, w: get_classification_datasets(change(a, type=["rare", *["T"] * 119]), "type"), ValueError, "class 'rare' has 1 cells, but 7 are needed .*; merge"),
    "no cells": (lambda a, w: get_classification_datasets(a[:0].copy(), "type"), ValueError, "nothing to tell it from"),
    "no target": (lambda a, w: get_regression_datasets(a, "X_freq"), KeyError, r"target_key='X_freq' is not in adata\.obsm; there are: target"),
    "target of labels": (lambda a, w: get_regression_datasets(with_target(a, pd.DataFrame({"u": ["x", "y"] * 60}, a.obs_names)), "t"), ValueError, "columns that are no numbers, such as u"),
    "target with NaN": (lambda a, w: get_regression_datasets(with_target(a, np.r_[np.nan, np.arange(119.0)][:, None]), "t"), ValueError, r"NaN or infinite values in 1 of 120 cells; drop those cells\."),
    "target constant": (lambda a, w: get_regression_datasets(with_target(a, np.ones((N, 1))), "t"), ValueError, "same in every cell for t_0: .* drop such columns"),
    "target without cells": (lambda a, w: get_regression_datasets(a[:0].copy(), "target"), ValueError, "nothing to learn"),
    "control unknown": (lambda a, w: respond(a, control="dmso"), KeyError, "control='dmso' is no label .* there are: A, A.B, B, DMSO; did you mean DMSO"),
    "control of another type": (lambda a, w: respond(a, perturbation_key="number", control=0), KeyError, "control=0 is no label .* there are: 1, 2, 3"),
    "perturbation missing": (lambda a, w: respond(a, perturbation_key="holes", control="r"), ValueError, "perturbation_key='holes' has no label for 14"),
    "stratum missing": (lambda a, w: respond(a, strata="holes"), ValueError, "strata='holes' has no label for 14 of 120"),
    "stratum missing in effects": (lambda a, w: against_control(np.ones((N, 1)), a, "drug", "DMSO", strata="holes"), ValueError, "strata='holes' has no label for 14"),
    "stratum without control": (lambda a, w: respond(a, strata=["line", "drug"]), ValueError, r"fewer than min_cells=5 cells of 'DMSO' .*; drop the cells"),
    "stratum is no column": (lambda a, w: respond(a, strata="plate"), KeyError, "strata='plate' is not a column"),
    "dose of text": (lambda a, w: dose_coordinates(change(a, dose=["0", "ten", "100", "1000"] * 30), "drug", "dose", "DMSO"), ValueError, "'ten' in 30 treated cells; numbers of at least 0"),
    "dose with a unit": (lambda a, w: dose_coordinates(change(a, dose=["0", "10 uM", "100", "1000"] * 30), "drug", "dose", "DMSO"), ValueError, "'10 uM' in 30 treated cells"),
    "dose missing": (lambda a, w: dose_coordinates(change(a, dose=[0, np.nan, 1, 2] * 30), "drug", "dose", "DMSO"), ValueError, "nan in 30 treated cells"),
    "dose negative": (lambda a, w: dose_coordinates(change(a, dose=[0, -1, 1, 2] * 30), "drug", "dose", "DMSO"), ValueError, "-1 in 30 treated cells"),
    "dose 0": (lambda a, w: dose_coordinates(change(a, dose=0), "drug", "dose", "DMSO"), ValueError, "0 in every treated cell; name the column"),
    "mask of 0 and 1": (lambda a, w: respond(a, cells=a.obs["number"] // 3), ValueError, r"holds 0 and 1 for every cell, like a mask, .*astype\(bool\)"),
    "mask of 0 and 1 in frequencies": (lambda a, w: laplacian_frequencies(a, 2, cells=np.arange(N) % 2), ValueError, "holds 0 and 1"),
    "mask too short": (lambda a, w: respond(a, cells=[True, False]), ValueError, "a mask of 2 values for 120 cells"),
    "mask with missing values": (lambda a, w: respond(a, cells=pd.array([True, pd.NA] * 60, dtype="boolean")), ValueError, "values of type NAType, bool .*pass a boolean mask"),
    "mask of other cells": (lambda a, w: respond(a, cells=pd.Series(True, [f"d{i}" for i in range(N)])), ValueError, "cells has rows of other cells than adata"),
    "mask of nothing": (lambda a, w: respond(a, cells=np.zeros(N, bool)), ValueError, "names none of the 120 cells"),
    "cells by name": (lambda a, w: respond(a, cells=["c1", "c2"]), ValueError, "values of type str .*their positions"),
    "cells out of range": (lambda a, w: mean_effects(np.ones((N, 1)), a, "drug", "DMSO", cells=[3, N]), ValueError, "1 positions outside 0 to 119, such as 120"),
    "cells negative": (lambda a, w: laplacian_frequencies(a, 2, cells=[-1, 3, 4, 5, 6]), ValueError, "1 positions outside 0 to 119, such as -1"),
    "cells of fractions": (lambda a, w: respond(a, cells=[0.5, 1.0]), ValueError, "values of type float"),
    "report on nothing": (lambda a, w: prepare(a), ValueError, "class_key=None, target_key=None, perturbation_key=None: 0 are named; name one"),
    "report on a column that is not there": (lambda a, w: prepare(a, class_key="typ"), KeyError, "class_key='typ' is not a column .*did you mean type"),
    "report on counts": (lambda a, w: prepare(x_of(a, np.round(9 * a.X)), class_key="type"), ValueError, "adata.X holds only whole numbers, like raw counts; .*name a layer that has them: 'log'"),
    "report without a control": (lambda a, w: prepare(a, perturbation_key="drug"), ValueError, "perturbation_key='drug' and control=None go together; name both"),
    "report on another control": (lambda a, w: prepare(a, perturbation_key="drug", control="dmso"), KeyError, "control='dmso' is no label .*did you mean DMSO"),
    "report on half a gene": (lambda a, w: prepare(a, class_key="type", n_genes=0.5), ValueError, "n_genes=0.5: a whole number of at least 2"),
    "colours of no column": (lambda a, w: category_colors(a, "typ"), KeyError, "key='typ' is not a column .*did you mean type"),
    "slash in a key": (lambda a, w: laplacian_frequencies(a, 2, "X/f"), ValueError, "key_added='X/f': text without a slash"),
    "slash in the key of responses": (lambda a, w: respond(a, key_added="X/p"), ValueError, "key_added='X/p': text without"),
    "no key": (lambda a, w: dose_coordinates(a, "drug", "dose", "DMSO", None), ValueError, "key_added=None: text without"),
    "highly variable of words": (lambda a, w: respond(with_hvg(a, ["yes", "no"] * 10)), ValueError, r"adata\.var\['highly_variable'\] is neither true nor false in 20 of 20; make it boolean"),
    "highly variable with holes": (lambda a, w: laplacian_frequencies(with_hvg(a, [True, None] * 10), 2), ValueError, "neither true nor false in 10 of 20"),
    "highly variable nowhere": (lambda a, w: respond(with_hvg(a, [False] * G)), ValueError, "marks no gene; mark some, or delete"),
    # ------------------------------------------------------------------------------------------------ statistics
    "sets of nothing known": (lambda a, w: enrich(w.modules, {"fly": ["vg", "ap"]}, min_size=1), ValueError, "none of 1 gene sets has 1 to 500 of the 20 background genes; check"),
    "set of one name": (lambda a, w: read_gene_sets({"islet": "INS"}), ValueError, "gene_sets has 'INS' for 'islet'; a list of genes"),
    "set twice": (lambda a, w: read_gene_sets({"islet": ["INS"], "islet ": ["GCG"]}), ValueError, "has 'islet' twice; merge the two"),
    "sets of no kind": (lambda a, w: read_gene_sets(None), ValueError, "gene_sets is of type NoneType; pass a path"),
    "background of one name": (lambda a, w: enrich(w.modules, {"s": ["G1"]}, "G1"), ValueError, "background is one name, 'G1'; pass a list"),
    "no modules": (lambda a, w: enrich({}, {"s": ["G1"]}), ValueError, "modules is empty; pass"),
    "no top genes": (lambda a, w: enrich(w.modules, {"s": ["G1"]}, n_top=0), ValueError, "n_top=0: a whole number of at least 1"),
    "modules of another metric": (lambda a, w: gene_modules(w.classifier, 0, metric="pca"), ValueError, "metric='pca' is unknown; choose"),
    "too many modules": (lambda a, w: gene_modules(w.classifier, 0, 9), ValueError, "k=9 eigenpairs were asked for; 1 to 8"),
    "half a module": (lambda a, w: gene_modules(w.classifier, 0, 2.5), ValueError, "k=2.5 eigenpairs"),
    "no modules of covariance": (lambda a, w: gene_modules(w.classifier, 0, 0, "covariance"), ValueError, "n_modules=0 were asked for"),
    "statistics of no fit": (lambda a, w: gene_modules(ScBMLPClassifier(config()), 0), ValueError, "has no statistics of its training cells, .*pass dataset="),
    "no pairs": (lambda a, w: interaction_matrix(w.classifier, 0).top_pairs(0), ValueError, "n=0: a whole number of at least 1"),
    "one fit to compare": (lambda a, w: agreement([w.modules.loadings]), ValueError, "fits has 1 table of loadings; two or more"),
    "fits of other genes": (lambda a, w: agreement([w.modules.loadings, w.modules.loadings.iloc[::-1]]), ValueError, "different genes, or in another order"),
    "factor of NaN": (lambda a, w: w.modules.factor_along(a, np.full(N, np.nan)), ValueError, "one finite number a cell is needed"),
    "factor of few": (lambda a, w: w.modules.factor_along(a, [1.0, 2.0]), ValueError, "values has 2 numbers from 1 to 2 for 120 cells"),
    "scores of few cells": (lambda a, w: against_control(np.ones((3, 1)), a, "drug", "DMSO"), ValueError, "scores has 3 rows for 120 cells"),
    "scores of others": (lambda a, w: against_control(pd.Series(1.0, [f"d{i}" for i in range(N)]), a, "drug", "DMSO"), ValueError, "scores has rows of other cells"),
    "scores with NaN": (lambda a, w: mean_effects(np.full((N, 1), np.nan), a, "drug", "DMSO"), ValueError, "scores holds NaN or infinite values in 120"),
    "values with NaN": (lambda a, w: additivity(np.full((N, 1), np.nan), a, "drug", "DMSO"), ValueError, "values holds NaN"),
    "no double": (lambda a, w: additivity(a.X, a, "line", "a"), ValueError, r"no label of obs\['line'\] is two others joined by '\+'"),
    "no embedding": (lambda a, w: response_directions(a), KeyError, r"'X_pert' is not in adata\.obsm; there are: target"),
    "modules of too few outputs": (lambda a, w: truncation_curve(w.classifier, {"T0": w.modules}, w.sets[2]), KeyError, "modules has none for the outputs T1, T2"),
    "no components": (lambda a, w: respond(a, n_components=0), ValueError, "n_components=0 were asked for; .* 1 to"),
    "half a component": (lambda a, w: respond(a, n_components=1.5), ValueError, "n_components=1.5 were asked for"),
    "half a frequency": (lambda a, w: laplacian_frequencies(a, 1.5), ValueError, "n_frequencies=1.5 were asked for"),
    "no graph": (lambda a, w: laplacian_frequencies(a, 2, neighbors_key="neighbors"), KeyError, "neighbors_key='neighbors' is not in adata.uns"),
    "graph without weights": (lambda a, w: laplacian_frequencies(with_uns(a), 2, neighbors_key="neighbors"), KeyError, "names 'connectivities', which is not in adata.obsp"),
    # ---------------------------------------------------------------------------------------------------- splits
    "fractions of text": (lambda a, w: get_classification_datasets(a, "type", "0.7"), ValueError, "train_split='0.7' .*add up to less than 1"),
    "fractions of all": (lambda a, w: get_classification_datasets(a, "type", 0.9, 0.1), ValueError, "train_split=0.9 and val_split=0.1 must"),
    "sets too small": (lambda a, w: get_regression_datasets(a[:3].copy(), "target"), ValueError, "leave a set of 3 cells empty; take more"),
    "seed of text": (lambda a, w: get_classification_datasets(a, "type", random_state="a"), ValueError, "random_state='a': a whole number of at least 0"),
    "split without test cells": (lambda a, w: get_classification_datasets(change(a, part=a.obs["part"].replace("test", "held out")), "type", split_key="part"), ValueError, "and 0 of 'test'; label at least one"),
    "split is no column": (lambda a, w: get_classification_datasets(a, "type", split_key="fold"), KeyError, "split_key='fold' is not a column"),
    "classes for a regressor": (lambda a, w: ScBMLPRegressor(Config(G, 2, 3)).fit(w.sets[0]), ValueError, "have class codes, ScBMLPRegressor takes continuous targets; cut them by .*get_regression_datasets"),
    "targets for a classifier": (lambda a, w: ScBMLPClassifier(Config(G, 2, 2)).fit(w.graded[0]), ValueError, "have continuous targets, ScBMLPClassifier takes class codes; cut"),
    "other kind in score": (lambda a, w: w.classifier.score(w.graded[2]), ValueError, "have continuous targets"),
    "other kind in audit": (lambda a, w: audit(w.regressor, w.sets[2]), ValueError, "have class codes"),
    "AnnData to fit": (lambda a, w: ScBMLPClassifier(Config(G, 2, 3)).fit(a), ValueError, "of type AnnData; an ExpressionDataset is needed, .*cut it by"),
    "AnnData to tune": (lambda a, w: tune(ScBMLPClassifier, a, a, progress=False), ValueError, "train is of type AnnData"),
    "AnnData for a baseline": (lambda a, w: linear_baseline(a, a), ValueError, "train is of type AnnData"),
    "AnnData to audit": (lambda a, w: audit(w.classifier, a), ValueError, "of type AnnData"),
    "codes without a class": (lambda a, w: own(w, y=[0, 1, 2, 1]), ValueError, "class codes from 0 to 2; there are 2 outputs, so 0 to 1 are allowed"),
    "codes negative": (lambda a, w: own(w, y=np.array([0, 1, -1, 1], np.int8)), ValueError, "class codes from -1 to 1"),
    "codes of fractions": (lambda a, w: own(w, y=[0.0, 1.0, 0.0, 1.0]), ValueError, "y has 1 columns, output_names has 2; .*whole numbers"),
    "codes of text": (lambda a, w: own(w, y=["a", "b", "a", "b"]), ValueError, "y holds values of type"),
    "targets of few": (lambda a, w: own(w, y=[0, 1]), ValueError, "x has 4 cells, y has 2"),
    "indices of few": (lambda a, w: own(w, indices=[0, 1]), ValueError, "indices has 2"),
    "own targets with NaN": (lambda a, w: own(w, y=np.full((4, 2), np.nan)), ValueError, "y holds NaN"),
    "own cells with NaN": (lambda a, w: own(w, x=np.full((4, 3), np.nan)), ValueError, "x holds NaN"),
    # -------------------------------------------------------------------------------------------------- evidence
    "AnnData to ablate on": (lambda a, w: ablation(w.classifier, w.modules, a), ValueError, "of type AnnData"),
    "modules of another model": (lambda a, w: ablation(w.regressor, w.modules, w.graded[2]), KeyError, "modules.output='T0' is not one output of the model; they are up, down"),
    "AnnData to deal out": (lambda a, w: without_pairs(a), ValueError, "of type AnnData"),
    "more groups than cells": (lambda a, w: without_pairs(w.sets[2], n_groups=999), ValueError, "n_groups=999"),
    "one replica": (lambda a, w: trust(w.modules, [w.classifier], w.sets[1]), ValueError, "models has 1; two or more .*solve_replicas"),
    "replicas of other outputs": (lambda a, w: trust(w.modules, [w.classifier, w.lettered], w.sets[1]), ValueError, "models have different output_names"),
    "directions of other genes": (lambda a, w: random_directions(w.modules, own(w)), KeyError, "lacks 20 of the 20 genes"),
    "strata of few": (lambda a, w: permutation_null(w.solved, *w.sets[:2], "T0", 1, ["a"]), ValueError, "strata has 1 labels, the last cell of train is cell"),
    "stratum of one cell": (lambda a, w: permutation_null(w.solved, *w.sets[:2], "T0", 1, np.arange(N)), ValueError, "labels with a single cell in train, .*merge them"),
    "null of a network": (lambda a, w: permutation_null(w.classifier, *w.sets[:2], "T0", 1), ValueError, "trained, not solved"),
    "no permutation": (lambda a, w: permutation_null(w.solved, *w.sets[:2], "T0", 0), ValueError, "n_permutations=0: a whole number"),
    "half a permutation": (lambda a, w: permutation_null(w.solved, *w.sets[:2], "T0", 1.5), ValueError, "n_permutations=1.5"),
    "no module of a null": (lambda a, w: permutation_null(w.solved, *w.sets[:2], "T0", 1, n_modules=0), ValueError, "n_modules=0"),
    "null without validation": (lambda a, w: permutation_null(w.solved, w.sets[0], None, "T0"), ValueError, "val is of type NoneType"),
    "pair of one gene": (lambda a, w: pair_effects(w.classifier, "T0", a, [("G1", "G1")], np.zeros(G)), ValueError, "pairs has 'G1' with itself; name two"),
    "pair of an unknown gene": (lambda a, w: pair_effects(w.classifier, "T0", a, [("G1", "G99")], np.zeros(G)), KeyError, "not the model's: G99"),
    "attributions around few genes": (lambda a, w: attributions(w.classifier, "T0", a, np.zeros(3)), ValueError, "reference has"),
    "attributions of no output": (lambda a, w: attributions(w.classifier, "T9", a, np.zeros(G)), KeyError, "output='T9' is unknown"),
    "donors of few cells": (lambda a, w: group_means(w.classifier, "T0", a, ["d"], np.zeros(G)), ValueError, r"groups has shape \(1,\) for 120 cells; pass one"),
    "halves of no counts": (lambda a, w: noise_ceiling(a, lambda half: half.X), ValueError, "no counts.*pass layer="),
    "permutations of no ranks": (lambda a, w: gsea(w.modules, {"s": list(a.var_names)}, n_permutations=0), ValueError, "n_permutations=0"),
    "no set to rank": (lambda a, w: gsea(w.modules, {"s": ["x"]}), ValueError, "none of 1 gene sets has 5 to 500"),
    "knock-offs of AnnData": (lambda a, w: knockoffs(a), ValueError, "train is of type AnnData"),
    # -------------------------------------------------------------------------------------------------- explorer
    "nothing to explore": (lambda a, w: explorer({}, w.sets[2]), ValueError, "modules is empty; pass GeneModules"),
    "a model to explore": (lambda a, w: explorer({"T0": w.classifier}, w.sets[2]), ValueError, "modules holds ScBMLPClassifier; pass GeneModules"),
    "outputs to explore twice": (lambda a, w: explorer({1: w.modules, "1": w.modules}, w.sets[2]), ValueError, "modules have names that come twice: 1"),
    "groups of nothing": (lambda a, w: explorer(w.modules, a), ValueError, "groups=None: cells of type AnnData have no classes; name a column"),
    "groups of targets": (lambda a, w: explorer(w.modules, w.graded[2]), ValueError, "groups=None: .*have no classes"),
    "groups of a data set by name": (lambda a, w: explorer(w.modules, w.sets[2], "type"), ValueError, "groups='type': cells of type ExpressionDataset have no obs; pass a label"),
    "groups of no column": (lambda a, w: explorer(w.modules, a, "typ"), KeyError, "groups='typ' is not a column .*did you mean type"),
    "groups of few": (lambda a, w: explorer(w.modules, a, ["x"]), ValueError, r"groups has shape \(1,\) for 120 cells; pass one"),
    "groups of other cells": (lambda a, w: explorer(w.modules, a, pd.Series("x", [f"d{i}" for i in range(N)])), ValueError, "groups has rows of other cells"),
    "groups without a label": (lambda a, w: explorer(w.modules, a, [None] * N), ValueError, "groups has no label for any of 120 cells; label some"),
    "explored genes of none": (lambda a, w: explorer(w.modules, w.sets[2], n_genes=0), ValueError, "n_genes=0: a whole number of at least 1"),
    "explorer of two words": (lambda a, w: explorer(w.modules, w.sets[2], name="my modules"), ValueError, "name='my modules' is to be in an address; take a letter"),
    "sets by rank to explore": (lambda a, w: explorer(w.modules, w.sets[2], enriched=gsea(w.modules, {"s": [f"G{i}" for i in range(9)]}, n_permutations=9)), KeyError, "enriched lacks the columns pole, overlap; pass what"),
    "sets of others to explore": (lambda a, w: explorer(w.modules, w.sets[2], enriched=enrich({"T9": w.modules}, {"s": [f"G{i}" for i in range(9)]})), ValueError, "enriched is of the outputs T9, none of which is in modules: T0; pass"),
    # -------------------------------------------------------------------------------------------------- training
    "precision of 16 bits": (lambda a, w: fit(w, precision="bf16-true"), ValueError, "precision='bf16-true': .*choose one of 32-true"),
    "precision of 64 bits": (lambda a, w: fit(w, precision=64), ValueError, "precision=64: "),
    "two devices": (lambda a, w: fit(w, devices=2), ValueError, "devices=2: several processes need strategy='ddp'"),
    "all devices": (lambda a, w: fit(w, devices="auto"), ValueError, "devices='auto': several processes need strategy='ddp'"),
    "two machines": (lambda a, w: fit(w, num_nodes=2), ValueError, "num_nodes=2: several processes need strategy='ddp'"),
    "epochs of the trainer": (lambda a, w: fit(w, max_epochs=3), ValueError, r"max_epochs=3: leave it out, .*Config\(n_epochs=\.\.\.\)"),
    "accelerator of the trainer": (lambda a, w: fit(w, accelerator="gpu"), ValueError, r"accelerator='gpu': .*Config\(device=\.\.\.\)"),
    "no argument": (lambda a, w: fit(w, calbacks=[]), ValueError, r"calbacks=\[\] is no argument of fit or of lightning.Trainer; did you mean callbacks"),
    "hidden units of none": (lambda a, w: config(d_hidden=0), ValueError, r"Config\(d_hidden=0\): a whole number of at least 1"),
    "hidden units of text": (lambda a, w: config(d_hidden="8"), ValueError, r"Config\(d_hidden='8'\): a whole number"),
    "hidden units yes or no": (lambda a, w: config(d_hidden=True), ValueError, r"Config\(d_hidden=True\)"),
    "half an epoch": (lambda a, w: config(n_epochs=0.5), ValueError, r"Config\(n_epochs=0.5\)"),
    "seed negative": (lambda a, w: config(seed=-1), ValueError, r"Config\(seed=-1\): a whole number of at least 0"),
    "rate of NaN": (lambda a, w: config(lr=np.nan), ValueError, r"Config\(lr=nan\): a number is needed, positive"),
    "rate of 0": (lambda a, w: config(lr=0), ValueError, r"Config\(lr=0\): a number is needed, positive"),
    "dropout of all": (lambda a, w: config(dropout_rate=1), ValueError, r"dropout_rate=1\): .*below 1"),
    "penalty negative": (lambda a, w: config(weight_decay_linear=-1), ValueError, r"weight_decay_linear=-1\): .*at least 0"),
    "bias of text": (lambda a, w: config(bias="no"), ValueError, r"Config\(bias='no'\): True or False"),
    "device unknown": (lambda a, w: config(device="gpu"), ValueError, r"Config\(device='gpu'\): 'auto', 'cpu'"),
    "classes weighted one by one": (lambda a, w: config(class_weight={"T0": 2}), ValueError, r"Config\(class_weight=\{'T0': 2\}\): 'balanced' is known, or None"),
    "classes of a regressor balanced": (lambda a, w: ScBMLPRegressor(config(class_weight="balanced")), ValueError, r"Config\(class_weight='balanced'\): continuous targets have no classes to balance; leave it out"),
    "classes of a baseline weighted": (lambda a, w: linear_baseline(*w.sets[:2], class_weight="even"), ValueError, "class_weight='even': 'balanced' is known, or None"),
    "targets of a baseline balanced": (lambda a, w: linear_baseline(*w.graded[:2], class_weight="balanced"), ValueError, "class_weight='balanced': continuous targets have no classes"),
    "targets balanced by tune": (lambda a, w: tune(ScBMLPRegressor, *w.graded[:2], class_weight="balanced"), ValueError, r"Config\(class_weight='balanced'\): continuous targets have no classes"),
    "loss unknown": (lambda a, w: ScBMLPRegressor(config(), "log"), ValueError, "loss_fn='log' is unknown; choose one of"),
    "patience without validation": (lambda a, w: ScBMLPClassifier(Config(G, 2, 3, patience=2)).fit(w.sets[0]), ValueError, r"patience=2\) needs validation cells"),
    "data of another size": (lambda a, w: ScBMLPClassifier(Config(9, 2, 3)).fit(w.sets[0]), ValueError, r"Config\(d_input=9\) does not match the data, which have 20 genes"),
    "batch of none": (lambda a, w: w.classifier.outputs(a, batch_size=0), ValueError, "batch_size=0: a whole number"),
    "data card of others": (lambda a, w: sources.data_card(a), KeyError, "has no 'scbmlp_source'; a data card is for"),
}  # fmt: skip


def with_target(a, table):
    a.obsm["t"] = table
    return a


def two_columns(a):
    a.obs = pd.concat([a.obs, a.obs[["type"]]], axis=1)
    return a


def with_hvg(a, values):
    a.var["highly_variable"] = values
    return a


def with_uns(a):
    a.uns["neighbors"] = {}
    return a


@pytest.mark.parametrize(("call", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_words_that_help_and_changes_nothing(fitted, call, error, match):
    adata = small_cells()
    with pytest.raises(error, match=match) as info, warnings.catch_warnings(action="ignore"):
        call(adata, fitted)
    assert str(info.traceback[-1].path).startswith(PACKAGE), "a library was the first to complain"
    assert len(str(info.value)) > 40 or isinstance(info.value, KeyError)
    # Columns and matrices that the case did not spoil itself are what they were.
    fresh = small_cells()
    assert set(fresh.obsm) <= set(adata.obsm) <= {"target", "t"} and not adata.varm and set(adata.uns) <= {"neighbors"}
    np.testing.assert_array_equal(adata.layers["log"].toarray(), fresh.layers["log"].toarray()[: adata.n_obs])


def test_the_table_is_long():
    assert len(BAD) >= 120


# ------------------------------------------------------------------------------- what works, as the plain input does


def repeated(x):
    """Every entry as two halves."""
    coo = sparse.coo_matrix(x)
    order = np.argsort(np.tile(coo.row, 2), kind="stable")
    indptr = np.r_[0, 2 * np.cumsum(np.bincount(coo.row, minlength=x.shape[0]))]
    return sparse.csr_matrix((np.tile(coo.data / 2, 2)[order], np.tile(coo.col, 2)[order], indptr), shape=x.shape)


MATRICES = {
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "coo": sparse.coo_matrix,
    "csr array": sparse.csr_array,
    "csc array": sparse.csc_array,
    "repeated entries": repeated,
    "unsorted": lambda x: sparse.csr_matrix(x)[:, ::-1][:, ::-1],
    "float64": lambda x: x.astype(np.float64),
    "fortran": np.asfortranarray,
    "objects": lambda x: x.astype(object),
    "tensor": torch.as_tensor,
    "masked": np.ma.masked_array,
    "matrix": lambda x: sparse.csr_matrix(x).todense(),
    "numbers of pandas": lambda x: pd.DataFrame(x, columns=[f"G{i}" for i in range(G)]).astype("Float64"),
    "columns in another order": lambda x: pd.DataFrame(x, columns=[f"G{i}" for i in range(G)]).iloc[:, ::-1],
    "lazy": lambda x: SimpleNamespace(compute=lambda: x),
}


@pytest.mark.parametrize("name", MATRICES)
def test_every_format_gives_what_the_dense_matrix_gives(fitted, name):
    dense = small_cells().X.toarray()
    x = MATRICES[name](dense)
    before = x.copy() if hasattr(x, "copy") else x
    for function in (fitted.classifier.outputs, fitted.modules.scores, fitted.modules.contributions,
                     interaction_matrix(fitted.classifier, "T0").quadratic_form,
                     lambda x: sum(decompose(fitted.classifier, x, np.ones(G))),
                     linear_baseline(*fitted.sets[:2]).outputs):  # fmt: skip
        np.testing.assert_allclose(function(x), function(dense), rtol=2e-5, atol=1e-6)
    if sparse.issparse(x):
        assert (abs(x - before)).sum() == 0 and x.nnz == before.nnz
    if name not in ("coo", "lazy", "tensor", "numbers of pandas", "columns in another order"):  # AnnData takes these
        adata = AnnData(
            x if sparse.issparse(x) else np.asarray(x, np.float64), obs=small_cells().obs, var=small_cells().var
        )
        for got, expected in zip(get_classification_datasets(adata, "type"), fitted.sets, strict=True):
            got, expected = (part.x.toarray() if sparse.issparse(part.x) else part.x for part in (got, expected))
            np.testing.assert_allclose(got, expected, rtol=1e-6)


COLUMNS = {
    "numpy strings": lambda values: [np.str_(value) for value in values],
    "nullable strings": lambda values: pd.array(values, dtype="string"),
    "objects": lambda values: np.array(values, dtype=object),
    "categories with one to spare": lambda values: pd.Categorical(values, ["spare", "T0", "T1", "T2"]),
    "integers": lambda values: [int(value[1]) for value in values],
    "nullable integers": lambda values: pd.array([int(value[1]) for value in values], dtype="Int64"),
    "floats": lambda values: [float(value[1]) / 2 for value in values],
    "intervals": lambda values: pd.cut([float(value[1]) for value in values], 3),
    "slashes": lambda values: [f"{value}/x" for value in values],
}


@pytest.mark.parametrize("name", COLUMNS)
def test_labels_of_every_type_are_learnt_saved_and_read_again(fitted, name, tmp_path):
    adata = small_cells()
    adata.obs["type"] = COLUMNS[name]([str(value) for value in adata.obs["type"]])
    sets = get_classification_datasets(adata, "type")
    model = ScBMLPClassifier(fitted.classifier.cfg)
    model.fit(sets[0], **QUIET)
    model.save(tmp_path / "model.pt")
    loaded = ScBMLPClassifier.load(tmp_path / "model.pt")
    assert loaded.output_names.equals(model.output_names) and loaded.output_names.equals(sets[0].output_names)
    np.testing.assert_array_equal(loaded.predict(adata), model.predict(adata))
    assert loaded.score(sets[2]) == model.score(sets[2])
    # Labels are told apart as in the plain column, whatever they are called.
    np.testing.assert_allclose(model.outputs(adata), fitted.classifier.outputs(adata), rtol=1e-5, atol=1e-6)
    for output in model.output_names:
        gene_modules(loaded, output, 2).to_adata(adata)
    adata.obs = adata.obs.drop(columns="type")  # anndata writes no intervals
    adata.write_h5ad(tmp_path / "cells.h5ad")


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.float32, np.float64])
def test_configurations_of_a_numpy_grid_are_plain(kind, tmp_path):
    cfg = Config(
        kind(4), kind(2), kind(2), n_epochs=kind(1), seed=kind(3), patience=kind(2), lr=kind(1), linear=np.bool_(True)
    )
    plain = Config(4, 2, 2, n_epochs=1, seed=3, patience=2, lr=1.0, linear=True)
    assert cfg == plain and all(type(value) is type(getattr(plain, name)) for name, value in vars(cfg).items())
    ScBMLPClassifier(cfg).save(tmp_path / "model.pt")
    assert ScBMLPClassifier.load(tmp_path / "model.pt").cfg == plain


@pytest.mark.parametrize("control", [False, "False", 0, "0", np.int64(0), 0.0])
def test_control_may_be_named_as_text_or_as_what_it_is(control):
    adata = small_cells()
    adata.obs["treated"] = np.arange(N) % 2 == 1 if str(control) == "False" else np.arange(N) % 2
    respond(adata, perturbation_key="treated", control=control)
    expected = small_cells()
    expected.obs["treated"] = np.array(["no", "yes"])[np.arange(N) % 2]
    respond(expected, perturbation_key="treated", control="no")
    np.testing.assert_allclose(adata.obsm["X_pert"], expected.obsm["X_pert"])


def test_names_of_cells_may_come_twice():
    plain, doubled = small_cells(), small_cells()
    with warnings.catch_warnings(action="ignore"):
        doubled.obs_names = [f"c{i % 60}" for i in range(N)]
    for adata in (plain, doubled):
        with warnings.catch_warnings(action="ignore"):
            respond(adata, strata="line", cells=np.arange(100))
            dose_coordinates(adata, "drug", "dose", "DMSO")
    np.testing.assert_array_equal(doubled.obsm["X_pert"], plain.obsm["X_pert"])
    np.testing.assert_array_equal(doubled.obsm["X_dose"], plain.obsm["X_dose"])


def test_a_model_reads_the_layer_that_it_was_trained_on(fitted, tmp_path):
    adata = small_cells()
    expected = fitted.layered.outputs(adata.layers["log"])
    adata.X = adata.X.copy() * 40
    fitted.layered.save(tmp_path / "model.pt")
    for model in (fitted.layered, ScBMLPClassifier.load(tmp_path / "model.pt")):
        np.testing.assert_array_equal(model.outputs(adata), expected)
        modules = gene_modules(model, "T0", 2)
        np.testing.assert_array_equal(modules.scores(adata), modules.scores(adata.layers["log"]))
        modules.to_adata(adata)
        np.testing.assert_array_equal(adata.obsm["X_modules_T0"], modules.scores(adata.layers["log"]))
        assert not np.allclose(model.outputs(adata.X), expected)
    np.testing.assert_array_equal(decompose(fitted.layered, adata, np.ones(G)).linear,
                                  decompose(fitted.layered, adata.layers["log"], np.ones(G)).linear)  # fmt: skip


def test_counts_are_warned_of_at_training_and_at_prediction(fitted):
    adata = small_cells()
    adata.X = adata.X.ceil()
    for call in (lambda: get_classification_datasets(adata, "type"), lambda: fitted.classifier.predict(adata),
                 lambda: respond(adata)):  # fmt: skip
        with pytest.warns(UserWarning, match="only whole numbers, like raw counts") as record:
            call()
        assert record[0].filename == __file__


def test_a_class_that_a_set_lacks_is_warned_of():
    adata = small_cells()
    adata.obs.loc[(adata.obs["type"] == "T2") & (adata.obs["part"] == "train"), "part"] = "val"
    with pytest.warns(UserWarning, match="split_key='part' has no train cell of the class T2, which cannot be learnt"):
        get_classification_datasets(adata, "type", split_key="part")


def test_fractions_do_not_count_beside_a_split_and_missing_labels_are_in_no_set():
    adata = small_cells()
    adata.obs["type"] = ["rare", *adata.obs["type"].astype(str)[1:]]
    adata.obs["part"] = pd.array([None if i == 5 else part for i, part in enumerate(adata.obs["part"])], dtype="string")
    with warnings.catch_warnings(action="ignore"):
        sets = get_classification_datasets(adata, "type", 5.0, -1.0, split_key="part")
    assert 5 not in np.concatenate([part.indices for part in sets]) and sum(map(len, sets)) == N - 1


def test_genes_that_differ_by_case_alone_are_one_symbol(fitted):
    modules = fitted.modules
    genes = pd.Index(["Abc", "ABC", *modules.loadings.index[2:]])
    changed = type(modules)(modules.eigenvalues, modules.loadings.set_axis(genes), modules.weights.set_axis(genes),
                            modules.origin, modules.unit, "T0")  # fmt: skip
    with pytest.warns(UserWarning, match="1 genes of T0 differ from another by case alone"):
        table = enrich(changed, {"set": ["abc", *genes[2:7]]}, min_size=1)
    assert set(table["size"]) == {6} and table.attrs["n_unmatched"] == G - 1 - 6


def test_each_output_is_held_against_the_genes_of_its_own_model(fitted):
    modules, genes = fitted.modules, [f"G{i}" for i in range(12)]
    narrow = type(modules)(modules.eigenvalues, modules.loadings.loc[genes], modules.weights.loc[genes],
                           modules.origin[genes], modules.unit[genes], "narrow")  # fmt: skip
    sets = {"set": [f"G{i}" for i in range(4, 16)]}
    both, alone = enrich({"wide": modules, "narrow": narrow}, sets), enrich(narrow, sets)
    columns = ["output", "module", "pole", "size", "overlap", "p"]
    of_narrow = both[both["output"] == "narrow"][columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(of_narrow, alone[columns])
    assert set(both.loc[both["output"] == "wide", "size"]) == {12} and set(alone["size"]) == {8}


def test_poles_hold_genes_of_their_sign_however_small_the_panel(fitted):
    for module, loading in fitted.modules.loadings.items():
        up, down = (fitted.modules.top_genes(module, 50, pole=pole) for pole in "+-")
        assert (up > 0).all() and (down < 0).all() and len(up) + len(down) == (loading != 0).sum()


def test_gmt_names_are_stripped_and_no_set_is_dropped(tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_text(
        "islet \tnote\t INS \tGCG\t\tINS\nlarge\t\t" + "\t".join(f"G{i}" for i in range(3000)) + "\nempty\t\n\n"
    )
    sets = read_gene_sets(path)
    assert sets["islet"] == ["INS", "GCG"] and len(sets["large"]) == 3000 and sets["empty"] == []
    path.write_text("islet\t\tINS\nislet\t\tGCG\n")
    with pytest.raises(ValueError, match="gene_sets has 'islet' twice"):
        read_gene_sets(path)


# --------------------------------------------------------------------------------------------------- the decisions


@settings(max_examples=60)
@given(x=arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.floats(-9, 9, width=32)),
       seed=st.integers(0, 99))  # fmt: skip
def test_a_matrix_is_the_sum_of_its_entries(x, seed):
    rng = np.random.default_rng(seed)
    rows, columns = rng.integers(x.shape[0], size=20), rng.integers(x.shape[1], size=20)
    order, values = np.argsort(rows, kind="stable"), rng.normal(size=20)
    indptr = np.r_[0, np.cumsum(np.bincount(rows, minlength=x.shape[0]))]
    matrix = sparse.csr_matrix((values[order], columns[order], indptr), shape=x.shape)
    expected = np.zeros(x.shape)
    np.add.at(expected, (rows, columns), values)
    np.testing.assert_allclose(numeric_matrix(matrix, "x").toarray(), expected, atol=1e-12)
    assert matrix.nnz == 20  # the caller's is as it was
    np.testing.assert_array_equal(numeric_matrix(x, "x"), x)


@given(st.lists(st.integers() | st.text() | st.floats(allow_nan=False) | st.booleans(), min_size=1))
def test_plain_names_are_of_one_type_and_stay_what_they_are(names):
    found = plain_names(names, "names", unique=False)
    assert len({type(name) for name in found.tolist()}) == 1 and len(found) == len(names)
    assert plain_names(found, "names", unique=False).equals(found)
    assert plain_names(json.loads(json.dumps(found.tolist())), "names", unique=False).equals(found)


@pytest.mark.parametrize("values", [[True, False, True], [1, 0, 1], [1.0, 0.0, 1.0], ["True", "False", "true"],
                                    pd.array([True, False, True], dtype="boolean"), np.array([1, 0, 1], bool)])  # fmt: skip
def test_masks_in_every_guise(values):
    assert as_mask(values, "mask").tolist() == [True, False, True]


def test_positions_are_rising_and_come_once():
    adata = small_cells()
    mask = pd.Series(np.arange(N) < 3, adata.obs_names)
    for cells in (
        mask,
        mask.sample(frac=1, random_state=0),
        mask.to_numpy(),
        [2, 0, 1, 1],
        slice(3),
        mask.astype("boolean"),
    ):
        assert positions(cells, adata).tolist() == [0, 1, 2]
    assert len(positions(None, adata)) == N


def test_numbers_of_text():
    text = pd.Series(["1,000", "10 nM", "1e3", "-2.5", "1,0", "ten", "", None, 7, "1,234,567.5", "10 uM"])
    expected = [1000, 10, 1000, -2.5, np.nan, np.nan, np.nan, np.nan, 7, 1234567.5, np.nan]
    np.testing.assert_array_equal(as_numbers(text, unit="nM"), expected)


# ------------------------------------------------------------------------------------------- the caller's data


PUBLIC = {
    "classification": lambda a, w: get_classification_datasets(a, "type", split_key="part"),
    "regression": lambda a, w: get_regression_datasets(a, "target"),
    "match": lambda a, w: match_genes(a, a.var_names[::-1]),
    "outputs": lambda a, w: w.classifier.outputs(a),
    "predict": lambda a, w: w.classifier.predict_proba(a[:, ::-1]),
    "scores": lambda a, w: w.modules.contributions(a),
    "factor": lambda a, w: w.modules.factor_along(a, a.obsm["target"]["up"]),
    "decompose": lambda a, w: decompose(w.classifier, a, np.ones(G)),
    "effects": lambda a, w: mean_effects(a.obsm["target"], a, "drug", "DMSO", strata="line"),
    "explorer": lambda a, w: explorer(w.modules, a, "holes"),
    "control": lambda a, w: against_control(a.obsm["target"], a, "drug", "DMSO"),
    "additivity": lambda a, w: additivity(a.X, a, "drug", "DMSO", n_splits=2),
    "pairs": lambda a, w: interaction_matrix(w.classifier, "T0").top_pairs(3, dataset=get_classification_datasets(a, "type")[0]),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_the_callers_anndata_is_untouched(fitted, name):
    adata = small_cells()
    PUBLIC[name](adata, fitted)
    assert_adata_equal(adata, small_cells())


WRITERS = {
    "frequencies": (lambda a, w: laplacian_frequencies(a, 2), {"obsm": "X_freq", "uns": "X_freq"}),
    "responses": (lambda a, w: respond(a, strata="line"), {"obsm": "X_pert", "varm": "X_pert", "uns": "X_pert"}),
    "doses": (lambda a, w: dose_coordinates(a, "drug", "dose", "DMSO"), {"obsm": "X_dose"}),
    "modules": (
        lambda a, w: w.modules.to_adata(a),
        {"obsm": "X_modules_T0", "varm": "modules_T0", "uns": "modules_T0"},
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_is_what_was_announced_and_nothing_else(fitted, name):
    call, announced = WRITERS[name]
    adata = small_cells()
    call(adata, fitted)
    for where, key in announced.items():
        del getattr(adata, where)[key]
    assert_adata_equal(adata, small_cells())
