"""Are the three sets what they claim, do they stay sparse, and is unusable input refused with advice?"""

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
    """The cells with two continuous targets, in a table and in an array."""
    adata = cells.copy()
    table = pd.DataFrame({"up": np.arange(400.0), "down": -np.arange(400.0)}, index=adata.obs_names)
    adata.obsm["table"], adata.obsm["array"] = table, table.to_numpy()
    return adata


def changed(cells, where, value):
    """A copy of the cells with one change."""
    adata = cells.copy()
    if where == "X":
        adata.X.data[0] = value
    elif where == "var_names":
        adata.var_names = [value, value, *adata.var_names[2:]]
    elif where == "label":
        adata.obs.loc[adata.obs_names[:3], "clusters"] = value
    elif where == "class size":
        adata = adata[(adata.obs["clusters"] != value) | (adata.obs["clusters"] == value).cumsum().le(2)].copy()
    else:
        adata.obsm[where] = value
    return adata


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_every_cell_is_in_one_of_three_sets_of_70_15_15_percent(targets, kind):
    sets = (
        get_classification_datasets(targets, "clusters")
        if kind == "classification"
        else get_regression_datasets(targets, "table")
    )
    np.testing.assert_allclose([len(part) for part in sets], [280, 60, 60], atol=1)
    np.testing.assert_array_equal(np.sort(np.concatenate([part.indices for part in sets])), np.arange(400))
    for part in sets:
        np.testing.assert_array_equal(dense(part.x), dense(targets[part.indices].X))
        expected = targets.obs["clusters"].cat.codes if kind == "classification" else targets.obsm["array"]
        np.testing.assert_array_equal(part.y, np.asarray(expected)[part.indices])
        assert (
            repr(part) == f"ExpressionDataset: {len(part)} cells x 300 genes, {len(part.output_names)} outputs, sparse"
        )


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(7, 60), min_size=2, max_size=12),
    fractions=st.sampled_from([(0.7, 0.15), (0.7, 0.15), (0.6, 0.2), (0.5, 0.25)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_class_is_in_every_set_in_equal_proportion(sizes, fractions, seed):
    labels = np.repeat([f"class {i}" for i in range(len(sizes))], sizes)
    obs = pd.DataFrame({"label": labels}, index=[f"cell {i}" for i in range(len(labels))])
    sets = get_classification_datasets(AnnData(np.zeros((len(labels), 1)), obs=obs), "label", *fractions, seed)
    for part, fraction in zip(sets, (*fractions, 1 - sum(fractions)), strict=True):
        counts = pd.Series(part.output_names[part.y]).value_counts().reindex(part.output_names, fill_value=0)
        assert counts.min() >= 1
        expected = fraction * pd.Series(labels).value_counts()
        assert (counts - expected).abs().max() <= 2


def test_the_seed_decides_the_split(cells, sets):
    again, other = (get_classification_datasets(cells, "clusters", random_state=seed) for seed in (0, 1))
    for part, same, different in zip(sets, again, other, strict=True):
        np.testing.assert_array_equal(part.indices, same.indices)
        assert not np.array_equal(part.indices, different.indices)


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csr_array, sparse.csc_matrix, np.array], ids=str)
def test_any_format_gives_the_same_cells_and_sparse_stays_csr(cells, sets, kind):
    adata = AnnData(kind(dense(cells.X)), obs=cells.obs, var=cells.var)
    for part, expected in zip(get_classification_datasets(adata, "clusters"), sets, strict=True):
        assert sparse.issparse(part.x) == (kind is not np.array) and getattr(part.x, "format", "csr") == "csr"
        assert part.x.dtype == np.float32
        np.testing.assert_array_equal(dense(part.x), dense(expected.x))


def test_splitting_and_indexing_make_only_the_cells_asked_for_dense(cells, rows_made_dense):
    train, *_ = get_classification_datasets(cells, "clusters")
    assert rows_made_dense == []
    train[list(range(32))]
    assert rows_made_dense == [32]


def test_layer_is_read_instead_of_x(cells):
    adata = AnnData(obs=cells.obs, var=cells.var, layers={"log": cells.X})
    train, *_ = get_classification_datasets(adata, "clusters", layer="log")
    np.testing.assert_array_equal(dense(train.x), dense(cells.X[train.indices]))


@pytest.mark.parametrize("index", [0, -1, np.int64(7), slice(3, 9), slice(None, None, 50), [5, 2, 2], []], ids=repr)
def test_indexing_gives_dense_tensors_of_those_cells(sets, index):
    x, y = sets[0][index]
    np.testing.assert_array_equal(x.numpy(), dense(sets[0].x)[index])
    np.testing.assert_array_equal(y.numpy(), sets[0].y.numpy()[index])
    assert x.dtype == torch.float32 and y.dtype == torch.int64


def test_iterating_ends_after_the_last_cell(sets):
    assert sum(1 for _ in sets[2]) == len(sets[2])


def test_classes_keep_their_categorical_order_and_unused_ones_are_dropped(cells):
    adata = cells[cells.obs["clusters"] != "Alpha"].copy()
    adata.obs["clusters"] = pd.Categorical(
        adata.obs["clusters"], ["Unused", *reversed(cells.obs["clusters"].cat.categories)]
    )
    train, *_ = get_classification_datasets(adata, "clusters")
    assert list(train.output_names) == [c for c in reversed(cells.obs["clusters"].cat.categories) if c != "Alpha"]
    np.testing.assert_array_equal(train.output_names[train.y], adata.obs["clusters"].iloc[train.indices])


@pytest.mark.parametrize(
    ("change", "arguments", "error", "match"),
    [
        (None, {"class_key": "celltype"}, KeyError, "'celltype'.*there are: clusters, clusters_coarse"),
        (("label", np.nan), {}, ValueError, r"no label for 3 of 400 cells.*\.notna\(\)"),
        (("class size", "Delta"), {}, ValueError, "class 'Delta' has 2 cells, but 7 are needed"),
        (None, {"train_split": 0.9, "val_split": 0.1}, ValueError, "train_split=0.9 and val_split=0.1 must"),
        (None, {"train_split": 0.0}, ValueError, "train_split=0.0 .* must be positive"),
        (None, {"val_split": -0.1}, ValueError, "val_split=-0.1 must be positive"),
        (None, {"layer": "spliced"}, KeyError, "layer='spliced'.*there are: none"),
        (("X", np.nan), {}, ValueError, "adata.X holds NaN or infinite values"),
        (("X", np.inf), {}, ValueError, "adata.X holds NaN or infinite values"),
        (("X", -0.5), {}, ValueError, r"negative values \(minimum -0.5\).*log1p"),
        (("var_names", "Ins1"), {}, ValueError, r"not unique; call adata.var_names_make_unique\(\)"),
    ],
)
def test_unusable_cells_are_refused_with_advice(cells, change, arguments, error, match):
    adata = changed(cells, *change) if change else cells
    with pytest.raises(error, match=match):
        get_classification_datasets(adata, **({"class_key": "clusters"} | arguments))


@pytest.mark.parametrize("regression", [False, True])
def test_split_key_holds_out_the_cells_it_names(cells, targets, regression):
    part = np.take(["train", "val", "test", "none"], np.arange(400) % 7 % 4)
    adata = targets.copy()
    adata.obs["part"] = part
    make = (
        (lambda **k: get_regression_datasets(adata, "array", **k))
        if regression
        else (lambda **k: get_classification_datasets(adata, "clusters", **k))
    )
    for name, dataset in zip(("train", "val", "test"), make(split_key="part"), strict=True):
        np.testing.assert_array_equal(dataset.indices, np.flatnonzero(part == name))
    with pytest.raises(KeyError, match="split_key='fold' is not a column"):
        make(split_key="fold")
    adata.obs["part"] = np.where(part == "val", "train", part)
    with pytest.raises(ValueError, match="split_key='part' has 229 cells of 'train', 0 of 'val' and 114 of 'test'"):
        make(split_key="part")


def test_raw_counts_warn_at_the_caller_and_log_normalised_cells_do_not(cells):
    counts = cells.copy()
    counts.X = counts.X.ceil()
    with pytest.warns(UserWarning, match=r"adata\.X holds only whole numbers.*log1p") as record:
        get_classification_datasets(counts, "clusters")
    assert [warning.filename for warning in record] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_classification_datasets(cells, "clusters")


@pytest.mark.parametrize(("key", "names"), [("table", ["up", "down"]), ("array", ["array_0", "array_1"])])
def test_targets_are_named_after_their_columns_or_their_key(targets, key, names):
    for part in get_regression_datasets(targets, key):
        assert list(part.output_names) == names and part.y.dtype == torch.float32
        np.testing.assert_array_equal(part.y[:, 0], part.indices)


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (None, KeyError, r"'target' is not in adata\.obsm; there are: none"),
        (
            np.r_[[np.nan], np.zeros(399)][:, None],
            ValueError,
            r"holds NaN or infinite values in 1 of 400 cells; drop those cells\.",
        ),
        (
            np.r_[[np.inf] * 2, np.zeros(398)][:, None],
            ValueError,
            r"infinite values in 2 of 400 cells; drop those cells\.",
        ),
        (np.zeros((400, 2, 2)), ValueError, r"has shape \(400, 2, 2\); two axes are needed"),
        (np.c_[np.arange(400), np.ones(400)], ValueError, "the same in every cell for target_1: .* drop such columns"),
        (np.zeros((400, 0)), ValueError, "the same in every cell for want of a column"),
    ],
)
def test_unusable_targets_are_refused_with_advice(cells, value, error, match):
    adata = cells if value is None else changed(cells, "target", value)
    with pytest.raises(error, match=match):
        get_regression_datasets(adata, "target")


def test_one_dimensional_target_is_one_output(cells):
    train, *_ = get_regression_datasets(changed(cells, "target", np.arange(400.0)), "target")
    assert list(train.output_names) == ["target_0"]
    np.testing.assert_array_equal(train.y, train.indices[:, None])


@settings(max_examples=25)
@given(order=st.permutations(range(6)), n_wanted=st.integers(1, 6), named=st.booleans())
def test_genes_are_matched_by_name_whatever_their_order(order, n_wanted, named):
    x, genes = np.arange(18.0).reshape(3, 6) / 4, pd.Index(list("abcdef"))
    wanted = genes[list(order)][:n_wanted]
    source = AnnData(x, var=pd.DataFrame(index=genes)) if named else ExpressionDataset(x, np.zeros(3), genes, ["out"])
    expected = pd.DataFrame(x, columns=genes)[list(wanted)].to_numpy()
    np.testing.assert_array_equal(match_genes(source, wanted), expected)


def test_lacking_genes_are_named_and_a_wrong_number_of_columns_is_refused(cells):
    wanted = cells.var_names.append(pd.Index(["Absent1", "Absent2"]))
    with pytest.raises(KeyError, match="lacks 2 of the 302 genes needed, such as Absent1, Absent2"):
        match_genes(cells, wanted)
    with pytest.raises(ValueError, match=r"shape \(400, 300\).* with 302 genes"):
        match_genes(cells.X, wanted)
    with pytest.raises(ValueError, match=r"shape \(300,\); two axes are needed, cells in rows"):
        match_genes(np.zeros(300), cells.var_names)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(8, 40), min_size=2, max_size=5),
    train_split=st.floats(0.3, 0.7),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_split_is_of_all_cells_each_once_with_every_class_in_proportion(sizes, train_split, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat([f"type {i}" for i in range(len(sizes))], sizes))
    adata = AnnData(np.ones((len(labels), 2)) / 2, obs=pd.DataFrame({"type": labels}, map(str, range(len(labels)))))
    parts = get_classification_datasets(adata, "type", train_split, 0.15, seed)
    assert sorted(np.concatenate([part.indices for part in parts])) == list(range(len(labels)))
    for part, share in zip(parts, (train_split, 0.15, 0.85 - train_split), strict=True):
        np.testing.assert_array_equal(part.output_names[part.y], labels[part.indices])
        assert (np.abs(np.bincount(part.y, minlength=len(sizes)) - share * np.array(sizes)) < 3).all()
    again = get_classification_datasets(adata, "type", train_split, 0.15, seed)
    assert all((a.indices == b.indices).all() for a, b in zip(parts, again, strict=True))


def test_data_sets_print_themselves_as_a_table():
    names = pd.Index(["<b>", "b"])
    part = ExpressionDataset(np.ones((4, 3)), np.array([0, 1, 0, 1]), pd.RangeIndex(3), names, layer="<logs>")
    html = part._repr_html_()
    assert repr(part).endswith("4 cells x 3 genes, 2 outputs, dense") and "2 classes: &lt;b&gt;, b" in html
    assert "dense, from layer &#x27;&lt;logs&gt;&#x27;" in html and "<b>" not in html
    many = ExpressionDataset(np.ones((4, 3)), np.ones((4, 9)), pd.RangeIndex(3), pd.RangeIndex(9))
    assert "9 targets: 0, 1, 2, 3, 4 and 4 more" in many._repr_html_() and "from X" in many._repr_html_()
