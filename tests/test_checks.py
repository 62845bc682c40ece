"""A table of bad inputs: each is refused by this package, in words that name the argument, and changes nothing."""

import functools
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData, read_h5ad
from anndata.io import write_elem
from anndata.tests.helpers import assert_adata_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import sparse

import scbmlp
from scbmlp import interactions, sources
from scbmlp.baselines import linear_baseline
from scbmlp.checks import as_mask, as_numbers, check_scale, numeric_matrix, plain_names, positions, scale_of
from scbmlp.datasets import ExpressionDataset, get_classification_datasets, get_regression_datasets, match_genes
from scbmlp.effects import additivity, mean_effects, response_directions
from scbmlp.enrichment import enrich, read_gene_sets
from scbmlp.evidence import random_directions, trust, without_pairs
from scbmlp.explorer import explorer
from scbmlp.knockoffs import knockoffs
from scbmlp.models import Config, ScBMLPClassifier, ScBMLPRegressor, solve
from scbmlp.modules import agreement, gene_modules, permutation_null, truncation_curve
from scbmlp.report import prepare
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


def cut(a, class_key="type", *fractions, **options):
    return get_classification_datasets(a, class_key, *fractions, **options)


@functools.cache
def world():
    """Data sets, models and modules, none of them to be changed, made once for all that import the fixture."""
    adata = small_cells()
    made = {"sets": cut(adata), "graded": get_regression_datasets(adata, "target")}
    trained = {"classifier": made["sets"], "regressor": made["graded"], "layered": cut(adata, layer="log")}
    for name, (train, *_) in trained.items():
        kind = ScBMLPRegressor if name == "regressor" else ScBMLPClassifier
        made[name] = kind(Config(G, 4, len(train.output_names), n_epochs=1 + (name != "layered"), device="cpu"))
        made[name].fit(train, **QUIET)
    for name, key in {"numbered": "number", "lettered": "text"}.items():  # of which the names alone are asked
        train, *_ = cut(adata, key)
        made[name] = ScBMLPClassifier(Config(G, 4, len(train.output_names), device="cpu"))
        made[name].gene_names, made[name].output_names = train.gene_names, train.output_names
    made["solved"] = solve(ScBMLPClassifier, *made["sets"][:2], device="cpu", progress=False)
    made["baseline"] = linear_baseline(*made["sets"][:2])
    made["modules"] = gene_modules(made["classifier"], "T0", 3)
    return made


@pytest.fixture(scope="session")
def fitted(tmp_path_factory):
    def disk(cells):
        path = tmp_path_factory.mktemp("disk") / "cells.h5ad"
        cells.write_h5ad(path)
        return path

    return SimpleNamespace(**world(), disk=disk)


def put(adata, place, value):
    """Set an attribute of AnnData, such as "X", or a key of one, such as "obs type"."""
    where, *key = place.split()
    if key:
        getattr(adata, where)[key[0]] = value
    else:
        setattr(adata, where, value)
    return adata


def twice(adata):
    with warnings.catch_warnings(action="ignore"):
        return put(adata, "var_names", [adata.var_names[0], *adata.var_names[:-1]])


def spoiled(adata, value):
    x = adata.X.toarray()
    x[3, 2] = value
    return put(adata, "X", x)


def scored(a, target):
    return get_regression_datasets(put(a, "obsm t", target), "t")


def own(x=None, y=None, genes="xyz", outputs="ab"):
    x = np.ones((4, 3), np.float32) if x is None else x
    return ExpressionDataset(x, np.arange(4) % 2 if y is None else y, list(genes), list(outputs))


def respond(a, **arguments):
    return perturbation_response(a, **({"perturbation_key": "drug", "control": "DMSO", "n_components": 1} | arguments))


def doses(a, column="dose", **arguments):
    return dose_coordinates(a, "drug", column, "DMSO", **arguments)


def graded_sets(a, **arguments):
    return get_regression_datasets(a, **({"target_key": "target"} | arguments))


def fit(a, w, **arguments):
    return ScBMLPClassifier(Config(G, 2, 3, n_epochs=1, device="cpu")).fit(*w.sets[:2], **(QUIET | arguments))


def config(**fields):
    return Config(**({"d_input": 4, "d_hidden": 2, "d_output": 2} | fields))


# What is called with a bad value of an argument, the error, and such values: the message says `argument=value`.
VALUES = [
    (lambda a, w, **bad: cut(a, **bad), ValueError, {
        "normalize_total": [0], "train_split": ["0.7", 0.9], "val_split": [-0.1],
        "random_state": ["a"],
    }),
    (lambda a, w, **bad: cut(a, **bad), KeyError, {"class_key": [None], "layer": ["counts"]}),
    (lambda a, w, **bad: cut(w.disk(a), **bad), KeyError, {"layer": ["raw"]}),
    (lambda a, w, **bad: graded_sets(a, **bad), ValueError, {"log1p": [2]}),
    (lambda a, w, **bad: graded_sets(a, **bad), KeyError, {"target_key": ["X_freq"]}),
    (lambda a, w, **bad: respond(a, **bad), ValueError, {"n_components": [1.5], "strata": ["holes", ["line", "drug"]]}),
    (lambda a, w, **bad: respond(a, perturbation_key="number", **bad), KeyError, {"control": [0]}),
    (lambda a, w, **bad: respond(a, control="r", **bad), ValueError, {"perturbation_key": ["holes"]}),
    (lambda a, w, **bad: prepare(a, **bad), ValueError, {"perturbation_key": ["drug"]}),
    (lambda a, w, **bad: laplacian_frequencies(a, 2, **bad), ValueError, {"key_added": ["X/f"]}),
    (lambda a, w, **bad: laplacian_frequencies(a, 2, **bad), KeyError, {"neighbors_key": ["neighbors"]}),
    (lambda a, w, **bad: laplacian_frequencies(put(a, "uns neighbors", {}), 2, **bad), KeyError, {"neighbors_key": ["neighbors"]}),
    (lambda a, w, **bad: doses(a, **bad), ValueError, {"key_added": [None]}),
    (lambda a, w, **bad: gene_modules(w.classifier, **bad), KeyError, {"output": [3]}),
    (lambda a, w, **bad: interactions.direction(w.numbered, **bad), KeyError, {"output": [0]}),
    (lambda a, w, **bad: gene_modules(w.classifier, 0, **bad), ValueError, {"metric": ["pca"]}),
    (lambda a, w, **bad: gene_modules(w.classifier, 0, metric="covariance", **bad), ValueError, {"n_modules": [0]}),
    (lambda a, w, **bad: interactions.direction(w.classifier, **bad), KeyError, {"output": [True, {}]}),
    (lambda a, w, **bad: interactions.direction(w.classifier, **bad), ValueError, {"output": [{"T0": np.nan}]}),
    (lambda a, w, **bad: interactions.audit(w.classifier, w.sets[2], **bad), KeyError, {"reference": ["t1"]}),
    (lambda a, w, **bad: interactions.audit(w.numbered, cut(a, "number")[2], **bad), KeyError, {"reference": ["3"]}),
    (lambda a, w, **bad: enrich(w.modules, {"s": ["G1"]}, **bad), ValueError, {"n_top": [0]}),
    (lambda a, w, **bad: without_pairs(w.sets[2], **bad), ValueError, {"n_groups": [999]}),
    (lambda a, w, **bad: permutation_null(w.solved, *w.sets[:2], "T0", 1, **bad), ValueError, {"n_modules": [0]}),
    (fit, ValueError, {"precision": ["bf16-true"], "devices": [2], "max_epochs": [3]}),
    (lambda a, w, **bad: linear_baseline(*w.graded[:2], **bad), ValueError, {"class_weight": ["balanced"]}),
    (lambda a, w, **bad: ScBMLPRegressor(config(), **bad), ValueError, {"loss_fn": ["log"]}),
]  # fmt: skip
FIELDS = {
    "d_hidden": ["8", True], "seed": [-1], "lr": [np.nan], "dropout_rate": [1], "weight_decay_linear": [-1],
    "bias": ["no"], "device": ["gpu"], "class_weight": [{"T0": 2}],
}  # fmt: skip

# Other cases: what is done with AnnData and with what is fitted, the error, and what its message says.
BAD = {
    # matrices
    "no matrix": (lambda a, w: cut(put(a, "X", None)), ValueError, "adata.X is"),
    "scaled, with raw": (lambda a, w: cut(spoiled(put(a, "raw", a), -1)), ValueError, "adata.raw.to_adata()"),
    "text": (lambda a, w: w.classifier.predict(a.X.toarray().astype(str)), ValueError, "x holds values of"),
    "one cell as a vector": (lambda a, w: w.classifier.predict(np.zeros(G)), ValueError, "x has shape (20,)"),
    "one cell as a Series": (lambda a, w: w.classifier.predict(a.to_df().iloc[0]), ValueError, "x is a Series"),
    "another number of genes": (lambda a, w: w.classifier.predict(a.X[:, 1:]), ValueError, "x has shape (120"),
    "a column of labels": (lambda a, w: w.classifier.predict(a.to_df().assign(G3="x")), ValueError, "x has columns that"),
    "no layer of the model": (lambda a, w: w.layered.predict(AnnData(a.X, var=a.var)), KeyError, "layer='log'"),
    # on disk
    "no file": (lambda a, w: cut("nowhere.h5ad"), FileNotFoundError, "nowhere.h5ad does not exist"),
    "no file of expression": (lambda a, w: cut(__file__), OSError, "test_checks.py cannot be read"),
    "no X in a file": (lambda a, w: cut(w.disk(AnnData(obs=a.obs, var=a.var, layers=a.layers))), KeyError, "its layers are: log"),
    "by genes in a file": (lambda a, w: cut(w.disk(put(a, "X", a.X.tocsc()))), ValueError, "adata.X.tocsr()"),
    "scaled in a file to normalise": (lambda a, w: cut(w.disk(spoiled(a, -1)), normalize_total=1e4), ValueError, "negative values"),
    "scaled to normalise": (lambda a, w: cut(spoiled(a, -1), log1p=True), ValueError, "adata.X holds"),
    "backed in frequencies": (lambda a, w: laplacian_frequencies(read_h5ad(w.disk(a), backed="r"), 2), ValueError, "adata.to_memory()"),
    "backed to deal out": (lambda a, w: without_pairs(cut(w.disk(a))[0]), ValueError, "dataset.load("),
    "modules into a path": (lambda a, w: w.modules.to_adata(w.disk(a)), ValueError, "adata is"),
    # names
    "genes twice at training": (lambda a, w: cut(twice(a)), ValueError, "adata.var_names are"),
    "genes twice at prediction": (lambda a, w: w.classifier.predict(AnnData(np.ones((2, 21)), var=pd.DataFrame(index=[*a.var_names, "G3"]))), ValueError, "x has 1 of"),
    "a gene is lacking": (lambda a, w: w.classifier.predict(a[:, 1:].copy()), KeyError, "x lacks 1 of"),
    "another case": (lambda a, w: w.classifier.predict(put(a, "var_names", [f"g{i}" for i in range(G)])), KeyError, "20 are there in another case, such as G0"),
    "labels by position": (lambda a, w: w.classifier.predict(pd.DataFrame(a.X.toarray())), KeyError, "x lacks 20 of"),
    "output unknown": (lambda a, w: interactions.interaction_matrix(w.classifier, "t1"), KeyError, "output='t1' is unknown; the outputs are T0, T1, T2; did you mean T1"),
    "output a number or a name": (lambda a, w: interactions.direction(w.lettered, 2), KeyError, "output=2 may be the output named '2', or the one at that place, which is '10'"),
    "outputs twice": (lambda a, w: own(outputs=["a", "a"]), ValueError, "outputs have"),
    "targets twice": (lambda a, w: scored(a, pd.DataFrame(np.random.rand(N, 2), a.obs_names, ["u", "u"])), ValueError, "adata.obsm['t'] have"),
    "genes without a name": (lambda a, w: own(genes=["x", None, "z"]), ValueError, "genes have"),
    "too few gene names": (lambda a, w: own(genes=["x", "y"]), ValueError, "x has 3 columns"),
    "reference of other genes": (lambda a, w: interactions.linear_axis(w.classifier, 0, pd.Series(1.0, list("xyz"))), KeyError, "x lacks 20 of"),
    "reference too short": (lambda a, w: interactions.decompose(w.classifier, a, np.zeros(3)), ValueError, "reference has"),
    "reference with NaN": (lambda a, w: interactions.linear_axis(w.classifier, 0, np.full(G, np.nan)), ValueError, "reference has"),
    "gene unknown": (lambda a, w: interactions.interaction_matrix(w.classifier, 0).between(["G1"], ["g2"]), KeyError, "not the model's: g2; did you mean G2"),
    "one gene for a list": (lambda a, w: interactions.interaction_matrix(w.classifier, 0).between("G1", ["G2"]), ValueError, "genes 'G1'"),
    # columns
    "no column": (lambda a, w: cut(a, "typ"), KeyError, "did you mean type"),
    "columns of one name": (lambda a, w: cut(put(a, "obs", pd.concat([a.obs, a.obs[["type"]]], axis=1))), ValueError, "class_key='type': adata.obs has 2 columns"),
    "labels missing": (lambda a, w: cut(a, "holes"), ValueError, "class_key='holes' has no label for 14 of 120 cells"),
    "MuData": (lambda a, w: cut(SimpleNamespace(obs=a.obs, mod={})), ValueError, "adata is of type SimpleNamespace"),
    "AnnData's cousin at prediction": (lambda a, w: w.classifier.predict(SimpleNamespace(obs=a.obs)), ValueError, "adata is of type"),
    "a target in obs": (lambda a, w: get_regression_datasets(put(a, "obs time", 1.0), "time"), KeyError, "It is a column of obs"),
    "one class": (lambda a, w: cut(put(a, "obs type", "T0")), ValueError, "class_key='type' has the class 'T0' alone"),
    "a class of one cell": (lambda a, w: cut(put(a, "obs type", ["rare", *["T"] * 119])), ValueError, "class 'rare' has 1 cells, but 7 are needed"),
    "no cells": (lambda a, w: cut(a[:0].copy()), ValueError, "class_key='type'"),
    "target of labels": (lambda a, w: scored(a, pd.DataFrame({"u": ["x", "y"] * 60}, a.obs_names)), ValueError, "adata.obsm['t'] has"),
    "target with NaN": (lambda a, w: scored(a, np.r_[np.nan, np.arange(119.0)][:, None]), ValueError, "adata.obsm['t'] holds"),
    "target constant": (lambda a, w: scored(a, np.ones((N, 1))), ValueError, "adata.obsm['t'] is"),
    "target of three axes": (lambda a, w: scored(a, np.zeros((N, 2, 2))), ValueError, "adata.obsm['t'] has shape (120, 2, 2)"),
    "target without columns": (lambda a, w: scored(a, np.zeros((N, 0))), ValueError, "adata.obsm['t'] is the same"),
    "control unknown": (lambda a, w: respond(a, control="dmso"), KeyError, "did you mean DMSO"),
    "dose with a unit": (lambda a, w: doses(put(a, "obs dose", ["0", "10 uM", "100", "1000"] * 30)), ValueError, "'10 uM' in 30 treated cells"),
    "dose negative": (lambda a, w: doses(put(a, "obs dose", [0, -1, np.inf, np.nan] * 30)), ValueError, "-1.0, inf, nan in 90 treated cells"),
    "dose 0": (lambda a, w: doses(put(a, "obs dose", 0)), ValueError, "obs['dose'] is"),
    "mask of 0 and 1": (lambda a, w: respond(a, cells=a.obs["number"] // 3), ValueError, "cells.astype(bool)"),
    "mask too short": (lambda a, w: respond(a, cells=[True, False]), ValueError, "cells is a mask"),
    "mask with missing values": (lambda a, w: respond(a, cells=pd.array([True, pd.NA] * 60, dtype="boolean")), ValueError, "cells has values of"),
    "mask of other cells": (lambda a, w: respond(a, cells=pd.Series(True, [f"d{i}" for i in range(N)])), ValueError, "cells has rows of"),
    "mask of nothing": (lambda a, w: respond(a, cells=np.zeros(N, bool)), ValueError, "cells names none of"),
    "cells by name": (lambda a, w: respond(a, cells=["c1", "c2"]), ValueError, "cells has values of"),
    "cells out of range": (lambda a, w: mean_effects(np.ones((N, 1)), a, "drug", "DMSO", cells=[3, N]), ValueError, "cells has 1 positions"),
    "report on nothing": (lambda a, w: prepare(a), ValueError, "class_key=None, target_key=None, perturbation_key=None"),
    "report on counts": (lambda a, w: prepare(put(a, "X", np.round(9 * a.X)), class_key="type", no_normalize=True), ValueError, "layer that has them: 'log'"),
    "highly variable of words": (lambda a, w: respond(put(a, "var highly_variable", ["yes", "no"] * 10)), ValueError, "adata.var['highly_variable'] is neither true nor false in 20 of 20"),
    "highly variable nowhere": (lambda a, w: respond(put(a, "var highly_variable", [False] * G)), ValueError, "adata.var['highly_variable'] marks no gene"),
    # statistics
    "sets of nothing known": (lambda a, w: enrich(w.modules, {"fly": ["vg", "ap"]}, min_size=1), ValueError, "none of 1 gene sets"),
    "set of one name": (lambda a, w: read_gene_sets({"islet": "INS"}), ValueError, "gene_sets has"),
    "set twice": (lambda a, w: read_gene_sets({"islet": ["INS"], "islet ": ["GCG"]}), ValueError, "gene_sets has"),
    "sets of no kind": (lambda a, w: read_gene_sets(None), ValueError, "gene_sets is"),
    "background of one name": (lambda a, w: enrich(w.modules, {"s": ["G1"]}, "G1"), ValueError, "background is"),
    "no modules": (lambda a, w: enrich({}, {"s": ["G1"]}), ValueError, "modules is"),
    "too many modules": (lambda a, w: gene_modules(w.classifier, 0, 9), ValueError, "k=9"),
    "statistics of no fit": (lambda a, w: gene_modules(ScBMLPClassifier(config()), 0), ValueError, "pass dataset="),
    "one fit to compare": (lambda a, w: agreement([w.modules.loadings]), ValueError, "fits has"),
    "fits of other genes": (lambda a, w: agreement([w.modules.loadings, w.modules.loadings.iloc[::-1]]), ValueError, "fits have"),
    "scores of few cells": (lambda a, w: mean_effects(np.ones((3, 1)), a, "drug", "DMSO"), ValueError, "scores has"),
    "scores of others": (lambda a, w: mean_effects(pd.Series(1.0, [f"d{i}" for i in range(N)]), a, "drug", "DMSO"), ValueError, "scores has"),
    "scores with NaN": (lambda a, w: mean_effects(np.full((N, 1), np.nan), a, "drug", "DMSO"), ValueError, "scores holds"),
    "no double": (lambda a, w: additivity(a.X, a, "line", "a"), ValueError, "obs['line']"),
    "no embedding": (lambda a, w: response_directions(a), KeyError, "'X_pert' is not in adata.obsm"),
    "modules of too few outputs": (lambda a, w: truncation_curve(w.classifier, {"T0": w.modules}, w.sets[2]), KeyError, "modules has"),
    # splits
    "sets too small": (lambda a, w: get_regression_datasets(a[:3].copy(), "target"), ValueError, "train_split=0.7"),
    "split without test cells": (lambda a, w: cut(put(a, "obs part", a.obs["part"].replace("test", "held out")), split_key="part"), ValueError, "split_key='part'"),
    "classes for a regressor": (lambda a, w: ScBMLPRegressor(Config(G, 2, 3)).fit(w.sets[0]), ValueError, "get_regression_datasets"),
    "targets for a classifier": (lambda a, w: ScBMLPClassifier(Config(G, 2, 2)).fit(w.graded[0]), ValueError, "get_classification_datasets"),
    "AnnData to fit": (lambda a, w: ScBMLPClassifier(Config(G, 2, 3)).fit(a), ValueError, "dataset is"),
    "codes without a class": (lambda a, w: own(y=[0, 1, 2, 1]), ValueError, "y has class codes"),
    "codes of fractions": (lambda a, w: own(y=[0.0, 1.0, 0.0, 1.0]), ValueError, "y has 1 columns"),
    "targets of few": (lambda a, w: own(y=[0, 1]), ValueError, "x has 4 cells"),
    "own cells with NaN": (lambda a, w: own(x=np.full((4, 3), np.nan)), ValueError, "x holds NaN or"),
    # evidence
    "one replica": (lambda a, w: trust(w.modules, [w.classifier], w.sets[1]), ValueError, "models has"),
    "replicas of other outputs": (lambda a, w: trust(w.modules, [w.classifier, w.lettered], w.sets[1]), ValueError, "models have"),
    "directions of other genes": (lambda a, w: random_directions(w.modules, own()), KeyError, "x lacks 20 of"),
    "strata of few": (lambda a, w: permutation_null(w.solved, *w.sets[:2], "T0", 1, ["a"]), ValueError, "strata has"),
    "stratum of one cell": (lambda a, w: permutation_null(w.solved, *w.sets[:2], "T0", 1, np.arange(N)), ValueError, "strata has 84 labels with a single cell"),
    "null of a network": (lambda a, w: permutation_null(w.classifier, *w.sets[:2], "T0", 1), ValueError, "trained, not solved"),
    "donors of few cells": (lambda a, w: interactions.group_means(w.classifier, "T0", a, ["d"], np.zeros(G)), ValueError, "groups has"),
    "halves of no counts": (lambda a, w: noise_ceiling(a, lambda half: half.X), ValueError, "layer="),
    "knock-offs of AnnData": (lambda a, w: knockoffs(a), ValueError, "train is"),
    # explorer
    "nothing to explore": (lambda a, w: explorer({}, w.sets[2]), ValueError, "modules holds nothing"),
    "a model to explore": (lambda a, w: explorer({"T0": w.classifier}, w.sets[2]), ValueError, "modules holds"),
    "AnnData to explore": (lambda a, w: explorer(w.modules, a), ValueError, "dataset is"),
    "outputs to explore twice": (lambda a, w: explorer({1: w.modules, "1": w.modules}, w.sets[2]), ValueError, "modules have"),
    "sets without poles to explore": (lambda a, w: explorer(w.modules, w.sets[2], enriched=enrich(w.modules, {"s": [f"G{i}" for i in range(9)]}).drop(columns="pole")), KeyError, "enriched lacks"),
    "sets of others to explore": (lambda a, w: explorer(w.modules, w.sets[2], enriched=enrich({"T9": w.modules}, {"s": [f"G{i}" for i in range(9)]})), ValueError, "enriched is"),
    # training
    "no argument": (lambda a, w: fit(a, w, calbacks=[]), ValueError, "did you mean callbacks"),
    "classes of a regressor balanced": (lambda a, w: ScBMLPRegressor(config(class_weight="balanced")), ValueError, "Config(class_weight='balanced')"),
    "data of another size": (lambda a, w: ScBMLPClassifier(Config(9, 2, 3)).fit(w.sets[0]), ValueError, "Config(d_input=9)"),
    "data card of others": (lambda a, w: sources.data_card(a), KeyError, "scbmlp_source"),
}  # fmt: skip
BAD |= {
    f"{name}={value!r} {i}": (functools.partial(call, **{name: value}), error, f"{name}={value!r}")
    for i, (call, error, bad) in enumerate(VALUES)
    for name, values in bad.items()
    for value in values
}


@pytest.mark.parametrize(("call", "error", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_words_that_help_and_changes_nothing(fitted, call, error, said):
    adata, fresh = small_cells(), small_cells()
    with pytest.raises(error) as info, warnings.catch_warnings(action="ignore"):
        call(adata, fitted)
    assert said in info.value.args[0] and len(info.value.args[0]) > 30
    assert str(info.traceback[-1].path).startswith(PACKAGE), "a library was the first to complain"
    # Columns and matrices that the case did not spoil itself are what they were.
    assert set(fresh.obsm) <= set(adata.obsm) <= {"target", "t"} and not adata.varm and set(adata.uns) <= {"neighbors"}
    np.testing.assert_array_equal(adata.layers["log"].toarray(), fresh.layers["log"].toarray()[: adata.n_obs])


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in FIELDS.items() for value in values])
def test_a_bad_field_of_a_configuration_is_named(name, value):
    with pytest.raises(ValueError, match=re.escape(f"Config({name}={value!r})")):
        config(**{name: value})


READERS = {
    "classification": lambda a, w: cut(a),
    "regression": lambda a, w: graded_sets(a, normalize_total=1e4),
    "predict": lambda a, w: w.classifier.predict(a),
    "outputs": lambda a, w: w.regressor.outputs(a)[:],
    "scores": lambda a, w: w.modules.scores(a),
    "contributions": lambda a, w: w.modules.contributions(a),
    "decompose": lambda a, w: interactions.decompose(w.classifier, a, np.zeros(G)),
    "quadratic form": lambda a, w: interactions.interaction_matrix(w.classifier, 0).quadratic_form(a),
    "baseline": lambda a, w: w.baseline.outputs(a),
    "to_adata": lambda a, w: w.modules.to_adata(a),
    "frequencies": lambda a, w: laplacian_frequencies(a, 2),
    "responses": lambda a, w: respond(a),
}
IN_MEMORY = ("to_adata", "frequencies", "responses")


@pytest.mark.parametrize("name", READERS)
def test_values_that_are_no_expression_are_refused_wherever_they_are_read(fitted, name):
    wrong = {
        np.nan: "NaN or infinite values in 1 of 120",
        np.inf: "NaN or infinite",
        -1: r"negative values \(minimum -1",
    }
    for value, said in wrong.items():
        adata = spoiled(small_cells(), value)
        forms = [] if name in IN_MEMORY else [fitted.disk(adata)]
        if np.isnan(value) and name not in ("classification", "regression", *IN_MEMORY):
            forms += [adata.X, adata.to_df()]
        for cells in (adata, *forms):
            with pytest.raises(ValueError, match=said):
                READERS[name](cells, fitted)


# ------------------------------------------------------------------------------- what works, as the plain input does


def repeated(x):
    """Every entry as two halves."""
    whole = sparse.csr_matrix(x)
    halves = np.repeat(whole.data / 2, 2), np.repeat(whole.indices, 2), 2 * whole.indptr
    return sparse.csr_matrix(halves, shape=x.shape)


def table(x):
    return pd.DataFrame(x, columns=[f"G{i}" for i in range(G)])


MATRICES = {
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "csr array": sparse.csr_array,
    "csc array": sparse.csc_array,
    "repeated entries": repeated,
    "unsorted": lambda x: sparse.csr_matrix(x)[:, ::-1][:, ::-1],
    "float64": lambda x: x.astype(np.float64),
    "fortran": np.asfortranarray,
    "objects": lambda x: x.astype(object),
    "masked": np.ma.masked_array,
    "matrix": lambda x: sparse.csr_matrix(x).todense(),
}
NOT_IN_ANNDATA = {
    "coo": sparse.coo_matrix,
    "tensor": torch.as_tensor,
    "numbers of pandas": lambda x: table(x).astype("Float64"),
    "columns in another order": lambda x: table(x).iloc[:, ::-1],
    "lazy": lambda x: SimpleNamespace(compute=lambda: x),
}


@pytest.mark.parametrize("name", MATRICES | NOT_IN_ANNDATA)
def test_every_format_gives_what_the_dense_matrix_gives(fitted, name):
    adata = small_cells()
    dense = adata.X.toarray()
    x = (MATRICES | NOT_IN_ANNDATA)[name](dense)
    before = x.copy() if sparse.issparse(x) else x
    for function in (fitted.classifier.outputs, fitted.modules.scores, fitted.modules.contributions,
                     interactions.interaction_matrix(fitted.classifier, "T0").quadratic_form,
                     lambda x: sum(interactions.decompose(fitted.classifier, x, np.ones(G))), fitted.baseline.outputs):  # fmt: skip
        np.testing.assert_allclose(function(x), function(dense), rtol=2e-5, atol=1e-6)
    if sparse.issparse(x):
        assert (abs(x - before)).sum() == 0 and x.nnz == before.nnz
    if name in MATRICES:
        adata = AnnData(x if sparse.issparse(x) else np.asarray(x, np.float64), obs=adata.obs, var=adata.var)
        for got, expected in zip(cut(adata), fitted.sets, strict=True):
            np.testing.assert_allclose(got[:][0], expected[:][0], rtol=1e-6)


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
    train, _, test = cut(adata)
    model = ScBMLPClassifier(fitted.classifier.cfg)
    model.fit(train, **QUIET)
    model.save(tmp_path / "model.pt")
    loaded = ScBMLPClassifier.load(tmp_path / "model.pt")
    assert loaded.output_names.equals(model.output_names) and loaded.output_names.equals(train.output_names)
    np.testing.assert_array_equal(loaded.predict(adata), model.predict(adata))
    assert loaded.score(test) == model.score(test)
    # Labels are told apart as in the plain column, whatever they are called.
    np.testing.assert_allclose(model.outputs(adata), fitted.classifier.outputs(adata), rtol=1e-5, atol=1e-6)
    for output in model.output_names:
        gene_modules(loaded, output, 2).to_adata(adata)
    adata.obs = adata.obs.drop(columns="type")  # anndata writes no intervals
    adata.write_h5ad(tmp_path / "cells.h5ad")


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.float32, np.float64])
def test_configurations_of_a_numpy_grid_are_plain(kind, tmp_path):
    numbers = {"d_input": 4, "d_hidden": 2, "d_output": 2, "n_epochs": 1, "seed": 3, "lr": 1.0}
    cfg = Config(**{name: kind(number) for name, number in numbers.items()}, linear=np.bool_(True))
    plain = Config(**numbers, linear=True)
    assert cfg == plain and all(type(value) is type(getattr(plain, name)) for name, value in vars(cfg).items())
    ScBMLPClassifier(cfg).save(tmp_path / "model.pt")
    assert ScBMLPClassifier.load(tmp_path / "model.pt").cfg == plain


@pytest.mark.parametrize("control", [False, "False", 0, "0", np.int64(0), 0.0])
def test_control_may_be_named_as_text_or_as_what_it_is(control):
    adata, odd = small_cells(), np.arange(N) % 2
    adata.obs["treated"] = odd == 1 if str(control) == "False" else odd
    adata.obs["told"] = np.array(["no", "yes"])[odd]
    respond(adata, perturbation_key="treated", control=control)
    respond(adata, perturbation_key="told", control="no", key_added="X_told")
    np.testing.assert_allclose(adata.obsm["X_pert"], adata.obsm["X_told"])


def test_names_of_cells_may_come_twice():
    plain, doubled = small_cells(), small_cells()
    with warnings.catch_warnings(action="ignore"):
        doubled.obs_names = [f"c{i % 60}" for i in range(N)]
        for adata in (plain, doubled):
            respond(adata, strata="line", cells=np.arange(100))
            doses(adata)
    for key in ("X_pert", "X_dose"):
        np.testing.assert_array_equal(doubled.obsm[key], plain.obsm[key])


def test_a_model_reads_the_layer_that_it_was_trained_on(fitted, tmp_path):
    adata, log = small_cells(), small_cells().X
    adata.X = adata.X.copy() * 40
    fitted.layered.save(tmp_path / "model.pt")
    for model in (fitted.layered, ScBMLPClassifier.load(tmp_path / "model.pt")):
        modules = gene_modules(model, "T0", 2)
        modules.to_adata(adata)
        np.testing.assert_array_equal(adata.obsm["X_modules_T0"], modules.scores(log))
        for function in (
            model.outputs,
            modules.scores,
            lambda x, model=model: interactions.decompose(model, x, np.ones(G)).linear,
        ):
            np.testing.assert_array_equal(function(adata), function(log))
        assert not np.allclose(model.outputs(adata.X), model.outputs(log))


@pytest.mark.parametrize("name", ["classification", "predict", "responses"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x.ceil(), "only whole numbers, like raw counts"),
        (lambda x: x * (30.5 / x.max()), "values up to 30, too large for logarithms"),
    ],
)
def test_expression_without_its_logarithm_is_warned_of_where_it_is_read(fitted, name, change, match):
    adata = small_cells()
    adata.X = change(adata.X)
    with pytest.warns(UserWarning, match=match) as record:
        READERS[name](adata, fitted)
    assert record[0].filename == __file__
    if name != "responses":
        with pytest.warns(UserWarning, match=match):
            READERS[name](fitted.disk(adata), fitted)


@pytest.mark.parametrize("target", [1, 50, 1e4, 1e6])
@pytest.mark.parametrize("layout", [np.asarray, sparse.csr_matrix])
def test_scaled_counts_are_told_from_their_logarithms(target, layout):
    counts = np.random.default_rng(0).poisson(np.linspace(0.2, 8, 60), (300, 60)).astype(np.float32)
    scaled = counts / counts.sum(1, keepdims=True) * np.float32(target)
    logs = np.log1p(scaled)
    half = np.where(np.arange(300)[:, None] % 2, logs, scaled)
    shares = [scale_of(layout(x))[2] for x in (scaled, 0.5 * counts, logs, np.log2(1 + scaled), half)]
    assert shares[:4] == [1, 1, 0, 0] and 0.4 < shares[4] < 0.6
    if target < 1e4:
        with pytest.warns(UserWarning, match="multiples of one number, as counts without logarithm, in 100% of cells"):
            check_scale(*scale_of(layout(scaled)), "X")


def labelled(word):
    adata = small_cells()
    return put(adata, "obs type", adata.obs["type"].astype(str).where(np.arange(N) % 5 > 0, word))


def without_training_cells():
    adata = small_cells()
    adata.obs.loc[(adata.obs["type"] == "T2") & (adata.obs["part"] == "train"), "part"] = "val"
    return adata


WARNED = {
    **{word: (lambda word=word: cut(labelled(word)), f"class_key='type' has 24 cells of the label '{word}'")
       for word in ("nan", "", "<NA>")},
    "split": (lambda: cut(without_training_cells(), split_key="part"), "split_key='part' has no train cell of .* T2"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "match"), WARNED.values(), ids=WARNED)
def test_classes_that_are_none_or_cannot_be_learnt_are_warned_of(call, match):
    with pytest.warns(UserWarning, match=match):
        call()


def test_a_file_of_mudata_is_refused_in_words(tmp_path):
    with h5py.File(tmp_path / "cite.h5mu", "w") as file:
        file.create_group("mod")
        write_elem(file, "obs", small_cells().obs[["type"]])
    with pytest.raises(ValueError, match="cite.h5mu holds MuData; AnnData is needed"):
        cut(tmp_path / "cite.h5mu")


def test_fractions_do_not_count_beside_a_split_and_missing_labels_are_in_no_set():
    adata = small_cells()
    adata.obs["type"] = ["rare", *adata.obs["type"].astype(str)[1:]]
    adata.obs["part"] = pd.array([None if i == 5 else part for i, part in enumerate(adata.obs["part"])], dtype="string")
    with warnings.catch_warnings(action="ignore"):
        sets = cut(adata, "type", 5.0, -1.0, split_key="part")
    assert 5 not in np.concatenate([part.indices for part in sets]) and sum(map(len, sets)) == N - 1


def test_each_output_is_held_against_the_genes_of_its_own_model(fitted):
    modules, genes = fitted.modules, [f"G{i}" for i in range(12)]
    narrow = type(modules)(modules.eigenvalues, modules.loadings.loc[genes], modules.weights.loc[genes],
                           modules.origin[genes], modules.unit[genes], "narrow")  # fmt: skip
    sets = {"set": [f"G{i}" for i in range(4, 16)]}
    both, alone = enrich({"wide": modules, "narrow": narrow}, sets), enrich(narrow, sets)
    columns = ["output", "module", "pole", "size", "overlap", "p"]
    pd.testing.assert_frame_equal(both[both["output"] == "narrow"][columns].reset_index(drop=True), alone[columns])
    assert set(both.loc[both["output"] == "wide", "size"]) == {12} and set(alone["size"]) == {8}


def test_poles_hold_genes_of_their_sign_however_small_the_panel(fitted):
    for module, loading in fitted.modules.loadings.items():
        up, down = (fitted.modules.top_genes(module, 50, pole=pole) for pole in "+-")
        assert (up > 0).all() and (down < 0).all() and len(up) + len(down) == (loading != 0).sum()


def test_gmt_names_are_stripped_and_no_set_is_dropped(tmp_path):
    path, large = tmp_path / "sets.gmt", "\t".join(f"G{i}" for i in range(3000))
    path.write_text(f"islet \tnote\t INS \tGCG\t\tINS\nlarge\t\t{large}\nempty\t\n\n")
    sets = read_gene_sets(path)
    assert sets["islet"] == ["INS", "GCG"] and len(sets["large"]) == 3000 and sets["empty"] == []
    path.write_text("islet\t\tINS\nislet\t\tGCG\n")
    with pytest.raises(ValueError, match="gene_sets has 'islet' twice"):
        read_gene_sets(path)


# --------------------------------------------------------------------------------------------------- the decisions


@settings(max_examples=40)
@given(x=arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.floats(-9, 9, width=32)),
       seed=st.integers(0, 99))  # fmt: skip
def test_a_matrix_is_the_sum_of_its_entries(x, seed):
    rng = np.random.default_rng(seed)
    rows, columns = np.sort(rng.integers(x.shape[0], size=20)), rng.integers(x.shape[1], size=20)
    values, expected = rng.normal(size=20), np.zeros(x.shape)
    indptr = np.searchsorted(rows, np.arange(x.shape[0] + 1))
    matrix = sparse.csr_matrix((values, columns, indptr), shape=x.shape)
    np.add.at(expected, (rows, columns), values)
    np.testing.assert_allclose(numeric_matrix(matrix, "x").toarray(), expected, atol=1e-12)
    assert matrix.nnz == 20  # the caller's is as it was
    np.testing.assert_array_equal(numeric_matrix(x, "x"), x)


@settings(max_examples=40)
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
    shuffled, nullable = mask.sample(frac=1, random_state=0), mask.astype("boolean")
    for cells in (mask, shuffled, nullable, mask.to_numpy(), [2, 0, 1, 1], slice(3)):
        assert positions(cells, adata).tolist() == [0, 1, 2]
    assert len(positions(None, adata)) == N


def test_numbers_of_text():
    text = pd.Series(["1,000", "10 nM", "1e3", "-2.5", "1,0", "ten", "", None, 7, "1,234,567.5", "10 uM"])
    expected = [1000, 10, 1000, -2.5, np.nan, np.nan, np.nan, np.nan, 7, 1234567.5, np.nan]
    np.testing.assert_array_equal(as_numbers(text, unit="nM"), expected)


# ------------------------------------------------------------------------------------------- the caller's data


# What is written to AnnData, and where; without a place, nothing is. test_targets asks it of frequencies.
CALLS = {
    "classification": (lambda a, w: cut(a, split_key="part"), {}),
    "regression": (lambda a, w: graded_sets(a), {}),
    "match": (lambda a, w: match_genes(a, a.var_names[::-1]), {}),
    "outputs": (lambda a, w: w.classifier.outputs(a), {}),
    "predict": (lambda a, w: w.classifier.predict_proba(a[:, ::-1]), {}),
    "scores": (lambda a, w: w.modules.contributions(a), {}),
    "decompose": (lambda a, w: interactions.decompose(w.classifier, a, np.ones(G)), {}),
    "effects": (lambda a, w: mean_effects(a.obsm["target"], a, "drug", "DMSO", strata="line"), {}),
    "control": (lambda a, w: mean_effects(a.obsm["target"], a, "drug", "DMSO"), {}),
    "additivity": (lambda a, w: additivity(a.X, a, "drug", "DMSO", n_splits=2), {}),
    "pairs": (lambda a, w: interactions.interaction_matrix(w.classifier, "T0").top_pairs(3, dataset=cut(a)[0]), {}),
    "responses": (lambda a, w: respond(a, strata="line"), {"obsm": "X_pert", "varm": "X_pert", "uns": "X_pert"}),
    "doses": (lambda a, w: doses(a), {"obsm": "X_dose"}),
    "modules": (lambda a, w: w.modules.to_adata(a), {"obsm": "X_modules_T0", "varm": "modules_T0", "uns": "modules_T0"}),
}  # fmt: skip


@pytest.mark.parametrize(("call", "written"), CALLS.values(), ids=CALLS)
def test_what_was_announced_is_written_to_the_callers_anndata_and_nothing_else(fitted, call, written):
    adata = small_cells()
    call(adata, fitted)
    for where, key in written.items():
        del getattr(adata, where)[key]
    assert_adata_equal(adata, small_cells())
