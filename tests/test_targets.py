"""Frequencies against closed forms and dense algebra, responses against their definition."""

import subprocess
import sys
import tracemalloc
import warnings

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from hypothesis import given, settings
from scipy import linalg, sparse

from scbmlp.datasets import get_regression_datasets
from scbmlp.targets import dose_coordinates, laplacian_frequencies, noise_ceiling, perturbation_response


def graph(weights, adata=None):
    """Cells with a graph where scanpy would have put it."""
    adata = AnnData(np.zeros((len(weights), 1), np.float32)) if adata is None else adata
    adata.obsp["connectivities"] = sparse.csr_matrix(weights, dtype=np.float32)
    adata.uns["neighbors"] = {"connectivities_key": "connectivities"}
    return adata


def path(n, *without):
    """Weights of a chain of cells, without some of its edges."""
    weights = np.diag(np.ones(n - 1), 1) + np.diag(np.ones(n - 1), -1)
    for edge in without:
        weights[edge] = weights[edge[::-1]] = 0
    return weights


@given(st.integers(8, 30), st.integers(0, 10**6), st.booleans())
@settings(max_examples=20)
def test_any_connected_graph_agrees_with_dense_algebra(n, seed, normalized):
    rng = np.random.default_rng(seed)
    weights = rng.random((n, n)) * (rng.random((n, n)) < 0.3) + path(n)  # not symmetric: it is made so
    adata = graph(weights)
    laplacian_frequencies(adata, 3, neighbors_key="neighbors", normalized=normalized)
    symmetric = adata.obsp["connectivities"].toarray().astype(float)
    symmetric = (symmetric + symmetric.T) / 2
    degree = np.diag(symmetric.sum(axis=1))
    expected = linalg.eigh(degree - symmetric, degree if normalized else None, eigvals_only=True)[1:4]
    values, frequencies = adata.uns["X_freq"]["eigenvalues"], adata.obsm["X_freq"]
    np.testing.assert_allclose(values, expected, atol=1e-8)
    mass = degree if normalized else np.eye(n)
    np.testing.assert_allclose((degree - symmetric) @ frequencies, mass @ frequencies * values, atol=1e-6)
    np.testing.assert_allclose(frequencies.std(axis=0), 1)
    np.testing.assert_allclose(mass.sum(axis=0) @ frequencies / mass.sum(), 0, atol=1e-6)
    assert ((frequencies**3).sum(axis=0) >= -1e-9).all()


def test_order_and_storage_of_the_cells_change_nothing(cells):
    order = np.random.default_rng(1).permutation(cells.n_obs)
    dense = AnnData(cells.X.toarray(), obs=cells.obs, var=cells.var)
    few = np.arange(cells.n_obs) % 4 > 0
    one, two, three = cells.copy(), cells[order].copy(), dense
    for adata, chosen in ((one, few), (two, few[order]), (three, few)):
        laplacian_frequencies(adata, 4, cells=chosen)
    np.testing.assert_allclose(two.obsm["X_freq"], one.obsm["X_freq"][order], atol=1e-4)
    np.testing.assert_allclose(three.obsm["X_freq"], one.obsm["X_freq"], atol=1e-3)


def test_own_graph_is_scanpys_and_what_it_was_made_with_is_recorded(cells):
    own, given_graph = cells.copy(), cells.copy()
    laplacian_frequencies(own, 4, "X_scales", n_neighbors=12)
    sc.pp.pca(given_graph, n_comps=30, random_state=0)
    sc.pp.neighbors(given_graph, n_neighbors=12, key_added="mine")
    laplacian_frequencies(given_graph, 4, neighbors_key="mine")
    np.testing.assert_allclose(own.obsm["X_scales"], given_graph.obsm["X_freq"], atol=1e-6)
    for key, added in {"obsm": {"X_scales"}, "uns": {"X_scales"}, "obsp": set(), "varm": set()}.items():
        assert set(getattr(own, key)) == set(getattr(cells, key)) | added
    made = [(known["n_neighbors"], known["n_pcs"]) for known in (own.uns["X_scales"], given_graph.uns["X_freq"])]
    assert made == [(12, 30), (12, None)]
    laplacian_frequencies(few := cells[:, :12].copy(), 2)
    assert few.uns["X_freq"]["n_pcs"] == 11


@pytest.mark.parametrize("normalized", [False, True])
def test_cells_outside_the_graph_get_the_row_of_the_eigenvectors_equation(normalized):
    """eq-extension: by their own expression and the graph's cells, not by each other."""
    adata = AnnData(np.random.default_rng(0).random((80, 6)).astype(np.float32))
    inside, outside = np.arange(60), np.arange(60, 80)
    chosen = np.arange(80) < 60 if normalized else inside
    laplacian_frequencies(adata, 4, cells=chosen, n_neighbors=9, normalized=normalized)
    alone = adata[inside].copy()
    laplacian_frequencies(alone, 4, n_neighbors=9, normalized=normalized)
    np.testing.assert_allclose(adata.obsm["X_freq"][inside], alone.obsm["X_freq"], atol=1e-6)
    sc.pp.pca(alone, n_comps=5, random_state=0)
    sc.pp.neighbors(alone, n_neighbors=9, random_state=0)
    degree = 1 if normalized else alone.obsp["connectivities"].sum() / 60
    values = adata.uns["X_freq"]["eigenvalues"]
    assert (values / degree > 0.1).all()  # far from smooth, so that the eigenvalue matters
    projected = (adata.X[outside] - alone.X.mean(axis=0)) @ alone.varm["PCs"]
    for cell, result in zip(projected, adata.obsm["X_freq"][outside], strict=True):
        near = np.argsort(np.linalg.norm(alone.obsm["X_pca"] - cell, axis=1))[:9]
        # f = sum of a_j f_j / (d - eigenvalue), with weights a_j = d / 9
        expected = (degree / 9 * adata.obsm["X_freq"][near]).sum(axis=0) / (degree - values)
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("adata", "arguments", "error", "said"),
    [
        (graph(path(40)), {"n_frequencies": 0}, ValueError, "n_frequencies=0"),
        (graph(path(40)), {"n_frequencies": 39}, ValueError, "n_frequencies=39: .* at most 38"),
        (graph(path(20, (6, 7), (7, 8))), {}, ValueError, r"3 parts of 12, 7, 1 cells.*n_neighbors.*smallest has 7\)"),
        (graph(path(20, (16, 17))), {}, ValueError, r"2 parts of 17, 3 cells.*\(the smallest has 17, 18, 19\)"),
        (graph(path(20)), {"neighbors_key": "mine"}, KeyError, "neighbors_key='mine' .*scanpy.pp.neighbors"),
        (graph(path(20)), {"cells": np.arange(10)}, ValueError, "cells cannot be given with neighbors_key"),
        (AnnData(np.random.default_rng(0).random((100, 20)) + np.repeat([0, 15], 50)[:, None]),
         {"neighbors_key": None, "n_neighbors": 10}, ValueError, "2 parts of 50, 50 cells"),
    ],
)  # fmt: skip
def test_graphs_without_such_frequencies_are_refused(adata, arguments, error, said):
    with pytest.raises(error, match=said):
        laplacian_frequencies(adata, **{"n_frequencies": 3, "neighbors_key": "neighbors"} | arguments)
    assert "X_freq" not in adata.obsm and "X_freq" not in adata.uns


# ------------------------------------------------------------------------------------------------ perturbations


def test_response_is_the_difference_to_vehicle_of_the_stratum(treated):
    """eq-signature, eq-components."""
    adata = treated[np.arange(treated.n_obs) % 12 != 1].copy()  # fewer active cells than others
    perturbation_response(adata, "drug", "control", 3, strata="line")
    # The definition: cell minus the mean of the control cells of its line.
    x, lines, control = adata.X.toarray(), adata.obs["line"].to_numpy(), (adata.obs["drug"] == "control").to_numpy()
    signature = x - np.stack([x[control & (lines == line)].mean(axis=0) for line in lines])
    loadings, embedding = adata.varm["X_pert"], adata.obsm["X_pert"]
    np.testing.assert_allclose(embedding, signature @ loadings, atol=1e-4)
    groups = adata.obs[["drug", "line"]].agg("".join, axis=1).to_numpy()
    means = np.stack([signature[groups == g].mean(axis=0) * np.sqrt(np.sum(groups == g)) for g in np.unique(groups)])
    values, vectors = np.linalg.eigh(means.T @ means)
    np.testing.assert_allclose(np.abs(vectors[:, ::-1][:, :3].T @ loadings), np.eye(3), atol=1e-3)
    np.testing.assert_allclose(adata.uns["X_pert"]["variance_ratio"], values[::-1][:3] / values.sum(), rtol=1e-3)
    # Vehicle is the origin; what a drug raises is positive, and what it lowers negative.
    first = pd.Series(embedding[:, 0]).groupby(adata.obs["drug"].to_numpy()).mean()
    response = loadings[:, 0] * np.sign(first["active"])
    assert response[0] > 0.8 and response[1] < -0.35
    assert abs(first["active"]) > 1 and abs(first["control"]) < 1e-5 and abs(first["inert"]) < 0.2


def test_memory_holds_the_signatures_of_one_stratum():
    rng = np.random.default_rng(0)
    n, genes = 2000, 2000
    obs = pd.DataFrame({"drug": rng.choice(["control", "a", "b"], n), "well": np.arange(n) % 20})
    x = sparse.random(n, genes, 0.02, format="csr", dtype=np.float32, random_state=0)
    adata = AnnData(x, obs=obs.set_index(obs.index.astype(str)))
    tracemalloc.start()
    perturbation_response(adata, "drug", "control", 2, strata="well")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.6 * 4 * n * genes, peak


def test_components_do_not_know_cells_left_out_and_genes_not_marked(treated):
    adata, changed = treated.copy(), treated.copy()
    inside = np.arange(adata.n_obs) % 6 != 1  # leaves out half of the active ones
    x = changed.X.toarray()
    x[~inside, 7] = 9
    changed.X = sparse.csr_matrix(x)
    for cells in (adata, changed):
        cells.var["highly_variable"] = np.arange(12) != 11
        perturbation_response(cells, "drug", "control", 2, strata="line", cells=inside)
    np.testing.assert_allclose(changed.varm["X_pert"], adata.varm["X_pert"], atol=1e-5)
    assert (adata.varm["X_pert"][11] == 0).all()
    assert not np.allclose(changed.obsm["X_pert"], adata.obsm["X_pert"])


def test_targets_are_the_same_for_dense_cells_survive_a_file_and_can_be_learnt(treated, tmp_path):
    adata = treated.copy()
    dense = AnnData(treated.X.toarray(), obs=treated.obs)
    for cells in (adata, dense):
        perturbation_response(cells, "drug", "control", 2, strata=["line"])
    np.testing.assert_allclose(dense.obsm["X_pert"], adata.obsm["X_pert"], atol=1e-4)
    assert (adata.X != treated.X).nnz == 0 and set(adata.layers) == set()
    laplacian_frequencies(graph(path(adata.n_obs), adata), 2, neighbors_key="neighbors")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    stored = sc.read_h5ad(tmp_path / "cells.h5ad")
    assert list(stored.uns["X_pert"]["strata"]) == ["line"]
    np.testing.assert_array_equal(stored.uns["X_freq"]["eigenvalues"], adata.uns["X_freq"]["eigenvalues"])
    for key in ("X_pert", "X_freq"):
        np.testing.assert_array_equal(stored.obsm[key], adata.obsm[key])
        assert list(get_regression_datasets(stored, key)[0].output_names) == [f"{key}_0", f"{key}_1"]


STATE = """
import random, warnings
import matplotlib, numpy, scanpy, torch
from scbmlp import simulate
from scbmlp.targets import laplacian_frequencies, perturbation_response
adata = simulate.sciplex3(n_cells=1500, n_genes=200)
scanpy.pp.normalize_total(adata)
scanpy.pp.log1p(adata)
def state():
    return {"numpy": repr(numpy.random.get_state()), "random": random.getstate(), "warnings": list(warnings.filters),
            "torch": torch.get_rng_state().tolist(), "style": dict(matplotlib.rcParams)}
before = state()
perturbation_response(adata, "perturbation", "control", 2, strata="cell_line", min_cells=1)
laplacian_frequencies(adata[adata.obs["cell_line"] == "K562"].copy(), 2)
after = state()
print(*(key for key in before if before[key] != after[key]))
"""


def test_nothing_global_changes():
    result = subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", STATE], capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == ("", 0), result.stderr


def test_the_difference_is_that_of_pertpy(treated):
    """Whose sign is the other one."""
    adata = treated.copy()
    perturbation_response(adata, "drug", "control", 6, strata="line")
    other = AnnData(treated.X.toarray(), obs=treated.obs)
    with warnings.catch_warnings(action="ignore"):
        from pertpy.tools import Mixscape
    options = {"ref_selection_mode": "split_by", "split_by": "line"}
    Mixscape().perturbation_signature(other, "drug", "control", **options)
    np.testing.assert_array_equal(-other.layers["X_pert"] @ adata.varm["X_pert"], adata.obsm["X_pert"])


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"perturbation_key": "compound"}, KeyError, "perturbation_key='compound' .*; there are: drug"),
        ({"strata": "plate"}, KeyError, "strata='plate'"),
        ({"strata": ["line", "drug"]}, ValueError, r"strata=.* min_cells=5 cells of 'control' .*\(a, active: 0; a, i"),
        ({"min_cells": 200}, ValueError, r"min_cells=200 cells of .*active \(120\)"),
        ({"n_components": 7}, ValueError, "n_components=7: .* at most 6"),
    ],
)
def test_unusable_screens_are_refused_with_advice(treated, arguments, error, said):
    adata = treated.copy()
    arguments = {"perturbation_key": "drug", "control": "control", "n_components": 2, "strata": "line"} | arguments
    with pytest.raises(error, match=said):
        perturbation_response(adata, **arguments)
    assert "X_pert" not in adata.obsm and "X_pert" not in adata.varm


def test_dose_coordinates_are_log_doses_in_the_column_of_the_compound(treated):
    adata = treated.copy()
    dose_coordinates(adata, "drug", "dose", "control")
    table = adata.obsm["X_dose"]
    assert list(table.columns) == ["active", "inert"]
    drug = adata.obs["drug"]
    assert (table[drug == "control"] == 0).all(axis=None)
    assert (table.loc[drug == "active", "active"] == 1).all() and (table.loc[drug == "active", "inert"] == 0).all()
    np.testing.assert_allclose(table.loc[drug == "inert", "inert"], np.log(11) / np.log(101), rtol=1e-6)
    assert list(get_regression_datasets(adata, "X_dose")[0].output_names) == ["active", "inert"]


def test_noise_ceiling_is_the_share_of_the_target_that_is_no_noise():
    """eq-halves: rates are known, and so is the R2 of the noiseless target, without any halves."""
    rng = np.random.default_rng(0)
    rate = rng.gamma(4, 1, (3000, 3))
    counts = AnnData(sparse.csr_matrix(rng.poisson(rate * [8, 1, 0.1]).astype(np.float32)))
    before = counts.X.copy()
    table = noise_ceiling(counts, lambda half: half.X.toarray())
    x = counts.X.toarray()
    known = [np.corrcoef(rate[:, i], x[:, i])[0, 1] ** 2 for i in range(3)]
    np.testing.assert_allclose(table["ceiling"], known, atol=0.04)
    assert (counts.X != before).nnz == 0
    # Outputs that swap places and signs from half to half are the same outputs.
    turns = iter(([0, 1, 2], [2, 0, 1], [1, 2, 0]))
    swapped = noise_ceiling(counts, lambda half: half.X.toarray()[:, (at := next(turns))] * (-1) ** at[0])
    np.testing.assert_allclose(swapped, table, atol=1e-8)
    # Halves that have nothing in common have a ceiling near 0, whatever is computed.
    noise = noise_ceiling(counts, lambda half: rng.standard_normal((half.n_obs, 2)))
    assert noise["ceiling"].max() < 0.1


def test_noise_ceiling_refuses_what_is_no_target():
    logged = AnnData(np.log1p(np.arange(12, dtype=np.float32).reshape(4, 3)))
    logged.layers["counts"] = np.ones((4, 3), np.float32)
    with pytest.raises(ValueError, match=r"compute returned shape \(4,\) for 4 cells; \(cell x out\) is needed"):
        noise_ceiling(logged, lambda half: half.X.toarray().sum(axis=1), layer="counts")
