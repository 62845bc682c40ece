"""Are the three sets what they claim, and do they stay sparse? Unusable input is in the table of test_checks."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scbmlp.datasets import ExpressionDataset, get_classification_datasets, get_regression_datasets, match_genes


def dense(x):
    return x.toarray() if sparse.issparse(x) else np.asarray(x)


@pytest.fixture
def targets(cells):
    """The cells with two continuous targets, in a table, in an array, and one of them alone."""
    adata = cells.copy()
    table = pd.DataFrame({"up": np.arange(400.0), "down": -np.arange(400.0)}, index=adata.obs_names)
    adata.obsm.update(table=table, array=table.to_numpy())
    adata.obsm["flat"] = np.arange(400.0)
    return adata


NAMES = {"clusters": None, "table": ["up", "down"], "array": ["array_0", "array_1"], "flat": ["flat_0"]}


@pytest.mark.parametrize("key", NAMES)
def test_every_cell_is_in_one_of_three_sets_or_in_that_which_split_key_names(targets, key):
    make = get_regression_datasets if NAMES[key] else get_classification_datasets
    sets, expected = make(targets, key), np.asarray(targets.obs["clusters"].cat.codes)
    if NAMES[key]:
        expected = targets.obsm["array"][:, : len(NAMES[key])]
    np.testing.assert_allclose([len(part) for part in sets], [280, 60, 60], atol=1)
    np.testing.assert_array_equal(np.sort(np.concatenate([part.indices for part in sets])), np.arange(400))
    for part in sets:
        np.testing.assert_array_equal(dense(part.x), dense(targets[part.indices].X))
        np.testing.assert_array_equal(part.y, expected[part.indices])
        assert part.y.dtype == (torch.float32 if NAMES[key] else torch.int64)
        assert list(part.output_names) == (NAMES[key] or list(targets.obs["clusters"].cat.categories))
        size = f"{len(part)} cells x 300 genes, {len(part.output_names)} outputs"
        assert repr(part) == f"ExpressionDataset: {size}, sparse"
    part = np.take(["train", "val", "test", "none"], np.arange(400) % 7 % 4)
    targets.obs["part"] = part
    for name, dataset in zip(("train", "val", "test"), make(targets, key, split_key="part"), strict=True):
        np.testing.assert_array_equal(dataset.indices, np.flatnonzero(part == name))


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(8, 50), min_size=2, max_size=10),
    fractions=st.tuples(st.floats(0.3, 0.7), st.sampled_from([0.15, 0.2])) | st.just((0.5, 0.25)),
    seed=st.integers(0, 2**32 - 2),
)
def test_every_split_is_of_all_cells_each_once_with_every_class_in_proportion(sizes, fractions, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat([f"type {i}" for i in range(len(sizes))], sizes))
    fractions = (*fractions, 1 - sum(fractions))
    if min(sizes) < 1 / min(fractions):
        sizes, labels = [2 * size for size in sizes], np.repeat(labels, 2)
    adata = AnnData(np.ones((len(labels), 2)) / 2, obs=pd.DataFrame({"type": labels}, map(str, range(len(labels)))))
    parts, again, other = (
        get_classification_datasets(adata, "type", *fractions[:2], one) for one in (seed, seed, seed + 1)
    )
    assert sorted(np.concatenate([part.indices for part in parts])) == list(range(len(labels)))
    assert not np.array_equal(parts[0].indices, other[0].indices)
    of_class = pd.Series(labels).value_counts()
    for part, same, share in zip(parts, again, fractions, strict=True):
        np.testing.assert_array_equal(part.output_names[part.y], labels[part.indices])
        counts = pd.Series(labels[part.indices]).value_counts().reindex(of_class.index, fill_value=0)
        assert counts.min() >= 1 and (counts - share * of_class).abs().max() < 3
        np.testing.assert_array_equal(part.indices, same.indices)


@pytest.mark.parametrize("layer", [None, "log"])
@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csr_array, sparse.csc_matrix, np.array], ids=str)
def test_any_format_gives_the_same_cells_and_sparse_stays_csr(cells, sets, kind, layer):
    x = kind(dense(cells.X))
    adata = AnnData(obs=cells.obs, var=cells.var, **({"X": x} if layer is None else {"layers": {layer: x}}))
    for part, expected in zip(get_classification_datasets(adata, "clusters", layer=layer), sets, strict=True):
        assert sparse.issparse(part.x) == (kind is not np.array) and getattr(part.x, "format", "csr") == "csr"
        assert part.x.dtype == np.float32
        np.testing.assert_array_equal(dense(part.x), dense(expected.x))


def test_log_normalised_cells_are_taken_without_a_word_and_only_those_asked_for_are_made_dense(cells, rows_made_dense):
    with warnings.catch_warnings(action="error"):
        train, *_ = get_classification_datasets(cells, "clusters")
    assert rows_made_dense == []
    train[list(range(32))]
    assert rows_made_dense == [32] and sum(1 for _ in train) == len(train)


@pytest.mark.parametrize("index", [0, -1, np.int64(7), slice(3, 9), slice(None, None, 50), [5, 2, 2], []], ids=repr)
def test_indexing_gives_dense_tensors_of_those_cells(sets, index):
    x, y = sets[0][index]
    np.testing.assert_array_equal(x.numpy(), dense(sets[0].x)[index])
    np.testing.assert_array_equal(y.numpy(), sets[0].y.numpy()[index])
    assert x.dtype == torch.float32 and y.dtype == torch.int64


def test_classes_keep_their_categorical_order_and_unused_ones_are_dropped(cells):
    adata = cells[cells.obs["clusters"] != "Alpha"].copy()
    order = list(reversed(cells.obs["clusters"].cat.categories))
    adata.obs["clusters"] = pd.Categorical(adata.obs["clusters"], ["Unused", *order])
    train, *_ = get_classification_datasets(adata, "clusters")
    assert list(train.output_names) == [name for name in order if name != "Alpha"]
    np.testing.assert_array_equal(train.output_names[train.y], adata.obs["clusters"].iloc[train.indices])


@settings(max_examples=15)
@given(order=st.permutations(range(6)), n_wanted=st.integers(1, 6), named=st.booleans())
def test_genes_are_matched_by_name_whatever_their_order(order, n_wanted, named):
    x, genes = np.arange(18.0).reshape(3, 6) / 4, pd.Index(list("abcdef"))
    wanted = genes[list(order)][:n_wanted]
    source = AnnData(x, var=pd.DataFrame(index=genes)) if named else ExpressionDataset(x, np.zeros(3), genes, ["out"])
    expected = pd.DataFrame(x, columns=genes)[list(wanted)].to_numpy()
    np.testing.assert_array_equal(match_genes(source, wanted), expected)
