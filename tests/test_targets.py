"""Frequencies against closed forms, dense algebra and cells on a known curve."""

import hypothesis.strategies as st
import numpy as np
import pytest
import scanpy as sc
from anndata import AnnData
from hypothesis import given, settings
from scipy import linalg, sparse

from scbmlp.datasets import get_regression_datasets
from scbmlp.targets import laplacian_frequencies


def graph(weights):
    """Cells with a graph where scanpy would have put it."""
    adata = AnnData(np.zeros((len(weights), 1), np.float32))
    adata.obsp["connectivities"] = sparse.csr_matrix(weights, dtype=np.float32)
    adata.uns["neighbors"] = {"connectivities_key": "connectivities"}
    return adata


def path(n):
    return np.diag(np.ones(n - 1), 1) + np.diag(np.ones(n - 1), -1)


def curve(n, seed=0):
    """Cells along an open curve in 20 genes, and where each of them is on it."""
    rng = np.random.default_rng(seed)
    at = np.sort(rng.random(n))
    bases = np.cos(np.pi * np.outer(at, np.arange(1, 5)))
    return AnnData((bases @ rng.normal(size=(4, 20)) + 10).astype(np.float32)), at


def test_path_graph_has_its_cosines():
    n, k = 40, np.arange(1, 6)
    adata = graph(path(n))
    laplacian_frequencies(adata, 5, neighbors_key="neighbors")
    expected = np.sqrt(2) * np.cos(np.pi * np.outer(np.arange(n) + 0.5, k) / n)
    np.testing.assert_allclose(adata.uns["X_freq"]["eigenvalues"], 2 - 2 * np.cos(np.pi * k / n), atol=1e-10)
    np.testing.assert_allclose(np.abs(adata.obsm["X_freq"]), np.abs(expected), atol=1e-6)
    assert np.abs(np.diag(adata.obsm["X_freq"].T @ expected)) == pytest.approx(n)


@given(st.integers(8, 30), st.integers(0, 10**6), st.booleans())
@settings(max_examples=30, deadline=None)
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
    np.testing.assert_allclose(mass.sum(axis=0) @ frequencies, 0, atol=1e-6)
    assert ((frequencies**3).sum(axis=0) >= -1e-9).all()


def test_order_of_the_cells_changes_nothing(cells):
    one, order = cells.copy(), np.random.default_rng(1).permutation(cells.n_obs)
    two = cells[order].copy()
    for adata in (one, two):
        laplacian_frequencies(adata, 4)
    np.testing.assert_allclose(two.obsm["X_freq"], one.obsm["X_freq"][order], atol=1e-4)


def test_own_graph_is_scanpys_and_nothing_else_is_written(cells):
    own, given_graph = cells.copy(), cells.copy()
    before = own.copy()
    laplacian_frequencies(own, 4, "X_scales", n_pcs=10, n_neighbors=12)
    sc.pp.pca(given_graph, n_comps=10, random_state=0)
    sc.pp.neighbors(given_graph, n_neighbors=12, key_added="mine")
    laplacian_frequencies(given_graph, 4, neighbors_key="mine")
    np.testing.assert_allclose(own.obsm["X_scales"], given_graph.obsm["X_freq"], atol=1e-6)
    assert set(own.obsm) == set(before.obsm) | {"X_scales"} and set(own.uns) == set(before.uns) | {"X_scales"}
    assert set(own.obsp) == set(before.obsp) and set(own.varm) == set(before.varm)
    assert (own.X != before.X).nnz == 0


def test_frequencies_survive_a_file_and_become_targets(cells, tmp_path):
    adata = cells.copy()
    laplacian_frequencies(adata, 3)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    stored = sc.read_h5ad(tmp_path / "cells.h5ad")
    np.testing.assert_array_equal(stored.obsm["X_freq"], adata.obsm["X_freq"])
    np.testing.assert_array_equal(stored.uns["X_freq"]["eigenvalues"], adata.uns["X_freq"]["eigenvalues"])
    train, _, _ = get_regression_datasets(stored, "X_freq")
    assert list(train.output_names) == ["X_freq_0", "X_freq_1", "X_freq_2"]


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("as_mask", [False, True])
def test_cells_outside_the_graph_get_its_extension(normalized, as_mask):
    """eq-extension, on cells whose place between the others is known."""
    adata, at = curve(600)
    inside = np.random.default_rng(1).random(600) < 0.7
    chosen = inside if as_mask else np.flatnonzero(inside)
    laplacian_frequencies(adata, 3, cells=chosen, n_pcs=4, normalized=normalized)
    frequencies = adata.obsm["X_freq"]
    alone = adata[inside].copy()
    laplacian_frequencies(alone, 3, n_pcs=4, normalized=normalized)
    np.testing.assert_allclose(frequencies[inside], alone.obsm["X_freq"], atol=1e-6)
    for values in frequencies.T:  # cells outside lie on the curve that the cells inside draw
        expected = np.interp(at[~inside], at[inside], values[inside])
        assert np.corrcoef(expected, values[~inside])[0, 1] > 0.999
        assert values[~inside].std() == pytest.approx(expected.std(), rel=0.02)


def test_extension_does_not_know_the_other_cells():
    adata, _ = curve(300)
    inside = np.arange(300) % 3 > 0
    changed = adata.copy()
    changed.X[np.flatnonzero(~inside)[5:]] += 3
    for cells in (adata, changed):
        laplacian_frequencies(cells, 3, cells=inside, n_pcs=4)
    kept = np.r_[np.flatnonzero(inside), np.flatnonzero(~inside)[:5]]
    np.testing.assert_allclose(changed.obsm["X_freq"][kept], adata.obsm["X_freq"][kept], atol=1e-6)


def test_sparse_and_dense_cells_give_the_same(cells):
    dense = AnnData(cells.X.toarray(), obs=cells.obs, var=cells.var)
    few = np.arange(cells.n_obs) % 4 > 0
    results = []
    for adata in (cells.copy(), dense):
        laplacian_frequencies(adata, 3, cells=few)
        results.append(adata.obsm["X_freq"])
    np.testing.assert_allclose(*results, atol=1e-3)


@pytest.mark.parametrize("n", [0, 39, 100])
def test_more_frequencies_than_cells_is_an_error(n):
    with pytest.raises(ValueError, match=f"n_frequencies={n} .* 1 to 38"):
        laplacian_frequencies(graph(path(40)), n, neighbors_key="neighbors")


def test_isolated_cells_are_an_error_that_names_them():
    weights = path(20)
    weights[7, :] = weights[:, 7] = 0
    adata = graph(weights)
    with pytest.raises(ValueError, match=r"1 of 20 cells .* no neighbour \(7\); drop them, or raise n_neighbors"):
        laplacian_frequencies(adata, 3, neighbors_key="neighbors")
    assert "X_freq" not in adata.obsm and "X_freq" not in adata.uns


def test_graph_in_parts_is_an_error_that_names_the_smallest():
    weights = path(20)
    weights[16, 17] = weights[17, 16] = 0
    with pytest.raises(ValueError, match=r"2 parts of 17, 3 cells.*n_neighbors.*\(the smallest has 17, 18, 19\)"):
        laplacian_frequencies(graph(weights), 3, neighbors_key="neighbors")


def test_far_groups_of_cells_are_an_error_too():
    adata, _ = curve(100)
    adata.X[50:] += 1000
    with pytest.raises(ValueError, match="2 parts of 50, 50 cells"):
        laplacian_frequencies(adata, 3, n_neighbors=10)


def test_graph_that_is_not_there_is_an_error(cells):
    with pytest.raises(KeyError, match=r"neighbors_key='mine' .*scanpy.pp.neighbors"):
        laplacian_frequencies(cells.copy(), neighbors_key="mine")


def test_graph_of_all_cells_and_a_choice_of_cells_is_an_error():
    with pytest.raises(ValueError, match="cells cannot be given with neighbors_key"):
        laplacian_frequencies(graph(path(20)), 3, neighbors_key="neighbors", cells=np.arange(10))
