"""Do nested models choose what was planted, and say whether products pay?"""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.model_selection import cross_val_predict

from scbmlp import audit, exact, nested, simulate
from scbmlp.datasets import ExpressionDataset, get_classification_datasets
from scbmlp.interactions import gain
from scbmlp.nested import RATIOS, Search, Trial, choose, folds_of, search


def products_of_genes(n_cells=360, n_genes=15, seed=0, share=0.5):
    """Cells with one target that is linear, and one that is a product of two sums of genes as well."""
    rng = np.random.default_rng(seed)
    x = rng.gamma(2.0, size=(n_cells, n_genes)).astype(np.float32)
    x[:, :5] *= 1 + rng.gamma(2.0, size=(n_cells, 1))
    x[:, 5:10] *= 1 + rng.gamma(2.0, size=(n_cells, 1))
    d = (x - x.mean(axis=0)) / x.std()
    linear, pairs = d[:, :10] @ rng.normal(size=10), d[:, :5].sum(axis=1) * d[:, 5:10].sum(axis=1)
    y = np.stack([linear / linear.std(), (1 - share) * linear / linear.std() + share * pairs / pairs.std()], axis=1)
    y += 0.3 * rng.normal(size=y.shape)
    return ExpressionDataset(x, y.astype(np.float32), pd.RangeIndex(n_genes), pd.Index(["linear", "pairs"]))


def as_classes(data):
    """Whether the second target is above its mean."""
    return ExpressionDataset(data.x, (data.y[:, 1] > 0).long().numpy(), data.gene_names, ["low", "high"])


def test_products_pay_where_they_were_planted_and_nowhere_else_in_any_order_of_the_cells():
    data, order = products_of_genes(), np.random.default_rng(0).permutation(360)
    table = gain(data.load(slice(200)), data.load(slice(200, None)), n_permutations=5, progress=False)
    pd.testing.assert_frame_equal(gain(data.load(order), progress=False), table, rtol=1e-4)
    permuted = table.attrs["permuted"]["pairs"]
    assert len(permuted) == 5 and max(permuted) < table.loc["pairs", "gain"] and np.mean(permuted) < 0
    linear, pairs = table.loc["linear"], table.loc["pairs"]
    assert pairs["gain"] > 0.1 and pairs["gain_curved"] > 0.05 and pairs["p"] < 1e-3 and linear["gain"] < 0.01
    np.testing.assert_allclose(table["gain"], table["with"] - table["without"])
    # R2 of an oracle that knows the features.
    d = data.x.astype(np.float64) - data.x.mean(axis=0)
    known = np.column_stack([d, d[:, :5].sum(axis=1) * d[:, 5:10].sum(axis=1)])
    oracle = r2_score(data.y[:, 1], cross_val_predict(LinearRegression(), known, data.y[:, 1], cv=3))
    assert oracle - 0.1 < pairs["with"] < oracle + 0.02


def test_whole_groups_are_left_out_and_stand_together():
    data, groups = products_of_genes(240), np.repeat(list("abcdef"), 40)
    folds = nested.fold_of(data, 3, groups)
    assert all(len(set(folds[groups == name])) == 1 for name in "abcdef") and np.bincount(folds).tolist() == [80] * 3
    better = np.random.default_rng(0).normal(size=(240, 1))
    (error, freedom), (alone, _) = (audit._standard_error(better, one) for one in (groups, None))
    means = better[:, 0].reshape(6, 40).mean(axis=1)
    assert error[0] == pytest.approx(means.std(ddof=1) / np.sqrt(6)) and freedom == 5
    assert alone[0] == pytest.approx(better.std(ddof=1) / np.sqrt(240))
    assert gain(data, groups=groups, progress=False).loc["pairs", "gain"] > 0.1


def test_classes_gain_in_nats():
    table = gain(as_classes(products_of_genes(300, share=1.0)), n_permutations=2, progress=False)
    row = table.loc["all"]
    assert table.index.tolist() == ["all"] and row["gain"] > 0.05 and row["p"] < 0.01
    assert row["accuracy_with"] > row["accuracy_without"] + 0.05
    assert row["gain"] == pytest.approx(row["without"] - row["with"]) and len(table.attrs["permuted"]["all"]) == 2


def test_gain_of_no_signal_is_seldom_significant():
    """At most uniform: of 40 data sets whose targets were dealt out, few have a small p."""
    data, rng = products_of_genes(90, n_genes=10), np.random.default_rng(1)
    y = np.stack([rng.permutation(data.y[:, 1].numpy()) for _ in range(40)], axis=1)
    many = ExpressionDataset(data.x, y, data.gene_names, pd.RangeIndex(40))
    p = gain(many, progress=False)["p"]
    for level in (0.05, 0.2, 0.5):
        assert (p <= level).sum() <= stats.binom.ppf(0.999, 40, level), (level, np.sort(p))


def test_a_gain_that_depth_makes_is_gone_at_one_depth():
    """The target is the share of one gene, known but for what few counts leave; depth alone makes it a product."""
    rng = np.random.default_rng(0)
    depth = rng.integers(300, 1500, 240)
    shares = rng.dirichlet(np.full(12, 3.0), 240)
    counts = np.stack([rng.multinomial(*pair) for pair in zip(depth, shares, strict=True)])
    x = np.log1p(counts / depth[:, None] * 900).astype(np.float32)
    data = ExpressionDataset(x, shares[:, :1].astype(np.float32), pd.RangeIndex(12), pd.Index(["share"]))
    table = gain(data, counts=counts, progress=False)
    few = table.attrs["downsampled"]["share"]
    assert set(few) == set(table.columns) and 0 < few["without"] < table.loc["share", "without"]
    part, rows = audit._one_depth(data, counts)
    assert len(part) == len(rows) >= 215
    drawn = np.expm1(part.x.toarray().astype(np.float64))
    np.testing.assert_allclose(drawn.sum(axis=1), np.median(depth), rtol=1e-4)
    with pytest.raises(ValueError, match=r"counts has shape \(240, 11\).*\(240, 12\)"):
        gain(data, counts=counts[:, 1:])


def test_what_gain_refuses():
    data = products_of_genes(60)
    other = ExpressionDataset(data.x, data.y, data.gene_names, pd.Index(["a", "b"]))
    for sets, options, message in (
        ([data, other], {}, "data set 1 has other outputs"),
        ([data], {"groups": ["a"] * 60}, "60 labels of 1 groups for 60 cells"),
        ([data.load(slice(20))], {}, "20 cells, too few for n_folds=3"),
    ):
        with pytest.raises(ValueError, match=message):
            gain(*sets, **options)


def test_penalties_grow_until_the_best_lies_within():
    data = products_of_genes(200)
    compared = Search([(data.load(slice(120)), data.load(slice(120, None)))])
    trial = compared.path("linear", exact.Mixture(), start=1e3)
    losses = np.stack([compared.losses(exact.Mixture(), ratio).mean(axis=0) for ratio in np.geomspace(*RATIOS, 23)])
    np.testing.assert_allclose(trial.losses.mean(axis=0), losses.min(axis=0), rtol=0.01)
    for k, ratio in enumerate(trial.ratios):
        np.testing.assert_array_equal(compared.losses(exact.Mixture(), ratio)[:, k], trial.losses[:, k])


def test_the_simplest_within_a_standard_error_is_chosen():
    """eq-choice."""
    rng = np.random.default_rng(0)
    base = rng.exponential(size=(100, 3))
    better = base - [0.0, 0.01, 0.5] + 0.2 * rng.normal(size=(100, 3))
    trials = [Trial(name, (exact.Mixture(),) * 3, (1.0,) * 3, losses) for name, losses in (("a", base), ("b", better))]
    best, behind, error = choose(trials)
    difference = base - better
    expected = difference.mean(axis=0) > difference.std(axis=0, ddof=1) / 10
    assert best.tolist() == expected.astype(int).tolist() and best[2] == 1
    np.testing.assert_allclose(behind[0][expected], difference.mean(axis=0)[expected])
    np.testing.assert_allclose(error[0][expected], difference.std(axis=0, ddof=1)[expected] / 10)
    of_donors, _, wide = choose(trials, np.repeat([0, 1], 50))  # two donors say less than a hundred cells
    assert of_donors[2] == 1 and wide.shape == (2, 3)


def test_a_search_finds_the_form_that_made_the_target():
    data = products_of_genes(600)
    trials, rival = search(data.load(slice(300)), data.load(slice(300, None)))
    best, behind, _ = choose(trials)
    assert best[0] <= 1 < best[1] and behind[0, 1] > 0.1  # a linear target takes no products, the other does
    assert trials[2].mixtures[1].weight("products") > 0 and rival.losses[:, 1].mean() > trials[2].losses[:, 1].mean()
    # A search that starts at the strong penalty of the linear model sees a plateau, and not the valley beyond it.
    adata = simulate.planted_interactions(0, 400, 400, 8, noise=1.5)
    train, validation, _ = get_classification_datasets(adata, "label", train_split=0.8, val_split=0.15)
    trials, _ = search(train, validation)
    assert trials[2].loss < 0.6 < 0.69 < trials[0].loss


def test_folds_have_every_class_and_do_not_depend_on_the_order():
    classes, order = as_classes(products_of_genes(100)), np.random.default_rng(0).permutation(100)
    folds, again = folds_of(classes.load(slice(60)), classes.load(slice(60, None))), folds_of(classes.load(order), None)
    for (train, val), (other, other_val) in zip(folds, again, strict=True):
        assert len(train) + len(val) == 100 and set(val.y.tolist()) == {0, 1}
        for one, same in ((train, other), (val, other_val)):
            np.testing.assert_array_equal(np.sort(one.x[:, 0]), np.sort(same.x[:, 0]))
