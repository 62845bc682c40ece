import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.stats import norm, spearmanr

from scbmlp.datasets import ExpressionDataset
from scbmlp.knockoffs import _leading, _q_values, knockoffs, pair_discoveries
from scbmlp.models import ScBMLPClassifier, ScBMLPRegressor


def dataset(x, y=None):
    """Cells with one target, 0 unless given."""
    x = x if sparse.issparse(x) else np.asarray(x, np.float32)
    y = np.zeros((x.shape[0], 1)) if y is None else np.asarray(y).reshape(len(y), -1)
    return ExpressionDataset(x, y, pd.Index([f"g{i}" for i in range(x.shape[1])]), pd.Index(["y"]))


def normal_cells(rng, n, sigma):
    """Cells of normal genes with this covariance."""
    return rng.multivariate_normal(np.zeros(len(sigma)), sigma, n, method="cholesky")


def blocks(n_blocks, size, r):
    """Correlations of blocks of genes."""
    return np.kron(np.eye(n_blocks), np.full((size, size), r)) + (1 - r) * np.eye(n_blocks * size)


def planted(seed, n_pairs=4, n=2000, gene=30, noise=0.5):
    """Correlated genes with zeros; additive and curved effects, and products of genes far apart."""
    rng = np.random.default_rng(seed)
    x = np.maximum(normal_cells(rng, n, blocks(gene // 5, 5, 0.4)) + 0.5, 0)
    u = (x - x.mean(axis=0)) / x.std(axis=0)
    pairs = rng.permutation(gene)[: 2 * n_pairs].reshape(-1, 2)
    single = rng.permutation(gene)[:6]
    y = 0.4 * u[:, single[:3]].sum(axis=1) + 0.2 * (u[:, single[3:]] ** 2).sum(axis=1)
    y = y + (u[:, pairs[:, 0]] * u[:, pairs[:, 1]]).sum(axis=1) * 0.6 + noise * rng.normal(size=n)
    cells = int(0.8 * n)
    truth = {frozenset(f"g{i}" for i in pair) for pair in pairs}
    return dataset(x[:cells], y[:cells]), dataset(x[cells:], y[cells:]), truth


@pytest.mark.parametrize("kind", ["gaussian", "permuted"])
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_every_knockoff_has_the_values_of_its_gene_in_every_data_set(kind, form):
    rng = np.random.default_rng(0)
    x = np.round(np.maximum(normal_cells(rng, 300, blocks(4, 3, 0.5)), 0) * 3).astype(np.float32)
    train, test = dataset(form(x[:200])), dataset(form(x[200:]))
    kept = [one.x.copy() for one in (train, test)]
    one, again, other = (knockoffs(train, test, kind=kind, random_state=seed)[1].x for seed in (1, 1, 2))
    assert (one != again).sum() == 0 < (one != other).sum()
    for one, before, both in zip((train, test), kept, knockoffs(train, test, kind=kind), strict=True):
        assert sparse.issparse(both.x) == sparse.issparse(one.x)
        old, new, given = (m.toarray() if sparse.issparse(m) else m for m in (one.x, both.x, before))
        np.testing.assert_array_equal(old, given)
        np.testing.assert_array_equal(new[:, :12], old)
        np.testing.assert_array_equal(np.sort(new[:, 12:], axis=0), np.sort(old, axis=0))
        assert (new[:, 12:] != old).any(axis=0).all()
        assert list(both.gene_names) == [*one.gene_names, *(f"g{i} (knock-off)" for i in range(12))]
        assert both.output_names.equals(one.output_names) and (both.indices == one.indices).all()
        np.testing.assert_array_equal(both.y, one.y)


def test_covariance_of_genes_and_knockoffs_is_that_of_the_theory():
    """Genes of one factor each five, of known law: cov(x, x~) = Sigma - diag(s), s = min(1, 2 (1 - loading^2))."""
    rng = np.random.default_rng(1)
    loading = np.tile([0.9, 0.8, 0.7, 0.6, 0.5], 4)
    factor = rng.normal(size=(20_000, 4)).repeat(5, axis=1)
    x = loading * factor + np.sqrt(1 - loading**2) * rng.normal(size=factor.shape)
    same = np.equal.outer(np.arange(20) // 5, np.arange(20) // 5)
    sigma = np.where(same, np.outer(loading, loading), 0)
    np.fill_diagonal(sigma, 1)
    s = np.minimum(1, 2 * (1 - loading**2))
    (both,) = knockoffs(dataset(x))
    found = np.corrcoef(both.x, rowvar=False)
    between = sigma - np.diag(s)
    np.testing.assert_allclose(found, np.block([[sigma, between], [between, sigma]]), atol=0.04)


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_knockoffs_of_genes_with_many_zeros_keep_their_correlations(share):
    rng = np.random.default_rng(2)
    x = np.maximum(normal_cells(rng, 6000, blocks(4, 5, 0.5)) - norm.ppf(share), 0)
    (both,) = knockoffs(dataset(x))
    rho = spearmanr(both.x).statistic
    off = ~np.eye(20, dtype=bool)
    np.testing.assert_allclose(rho[:20, 20:][off], rho[:20, :20][off], atol=0.06)
    assert abs((rho[:20, 20:] - rho[:20, :20])[blocks(4, 5, 0.5) == 0.5].mean()) < 0.01


def test_swapping_a_gene_with_its_knockoff_changes_nothing_in_distribution():
    """Third and fourth moments too, of normal genes; of a target made of others, which the gene only goes along with"""
    rng = np.random.default_rng(3)
    x = normal_cells(rng, 20_000, blocks(2, 4, 0.5))
    y = x[:, 1] * x[:, 5] + x[:, 2]
    (both,) = knockoffs(dataset(x, y))
    z = both.x.astype(np.float64)
    for function in (
        lambda gene: gene * y,
        lambda gene: gene * z[:, 5] * y,
        lambda gene: gene**2 * z[:, 1] ** 2,
        lambda gene: 1.0 * (gene > 1) * (z[:, 1] > 1),
    ):
        one, other = function(z[:, 0]), function(z[:, 8])
        assert abs((one - other).mean()) < 4 * (one - other).std() / np.sqrt(len(z))


def test_permuted_knockoffs_have_no_correlation():
    (both,) = knockoffs(dataset(normal_cells(np.random.default_rng(4), 5000, blocks(2, 4, 0.5))), kind="permuted")
    assert np.abs(np.corrcoef(both.x, rowvar=False)[:8, 8:]).max() < 0.06


def test_flat_genes_and_more_genes_than_cells_are_no_obstacle():
    x = np.maximum(np.random.default_rng(6).normal(size=(40, 60)), 0)
    x[:, :3] = 0, 1, 2
    x[:, 4] = x[:, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = knockoffs(dataset(x), dataset(x[:1]))
    assert (both[0].x[:, 60:63] == [0, 1, 2]).all() and (both[1].x[:, 60:] == both[1].x[:, :60]).all()


def test_q_values_are_those_of_a_count():
    decoy = np.random.default_rng(7).random(60) < np.linspace(0, 1, 60)
    q = _q_values(decoy)
    rates = [min(1, (1 + decoy[:n].sum()) / max((~decoy[:n]).sum(), 1)) for n in range(1, 61)]
    np.testing.assert_array_equal(q, [min(rates[place:]) for place in range(60)])


def test_a_pair_is_left_out_next_to_a_stronger_one_of_genes_that_go_along_with_its_own():
    rng = np.random.default_rng(8)
    x = normal_cells(rng, 4000, blocks(3, 2, 0.6)).astype(np.float32)
    x[:, 1] *= -1
    pairs = [(0, 2), (0, 4), (1, 3), (3, 0), (5, 1), (1, 2), (2, 4), (2, 5)]
    for form, clump, kept in ((np.asarray, 0.4, [0, 1, 6]), (sparse.csr_matrix, 0.9, range(8))):
        found = _leading(*np.transpose(pairs), form(x), clump)
        assert list(np.flatnonzero(found)) == list(kept)


def test_planted_pairs_are_found_and_false_ones_are_rare():
    shares, power = [], []
    for seed in range(2):
        train, val, truth = planted(seed, n=1000)
        kept = train.x.copy(), train.y.clone()
        table = pair_discoveries(ScBMLPRegressor, train, val, "y", n=400)
        assert (train.x == kept[0]).all() and (train.y == kept[1]).all()
        assert list(table) == ["gene_a", "gene_b", "interaction", "strength", "contrast", "q"]
        assert table["q"].is_monotonic_increasing and table["contrast"].is_monotonic_decreasing
        assert set(table["gene_a"]) | set(table["gene_b"]) <= set(train.gene_names)
        found = [frozenset(pair) for pair in table.loc[table["q"] <= 0.25, ["gene_a", "gene_b"]].to_numpy()]
        shares.append(np.mean([pair not in truth for pair in found]) if found else 0)
        power.append(np.mean([pair in found for pair in truth]))
    assert np.mean(shares) <= 0.25 and np.mean(power) > 0.5
    again = pair_discoveries(ScBMLPRegressor, train, val, "y", n=400)
    pd.testing.assert_frame_equal(table, again, check_exact=True)


def test_nothing_is_found_where_no_pair_is():
    for seed in range(2):
        train, val, _ = planted(seed, n_pairs=0, n=800)
        table = pair_discoveries(ScBMLPRegressor, train, val, "y", n=400)
        assert (table["q"] > 0.2).all()


def test_classes_and_genes_that_nobody_named():
    train, val, truth = planted(0, noise=0, n=1600)
    sets = [
        ExpressionDataset(one.x, (one.y[:, 0] > 1).long().numpy(), pd.RangeIndex(30), pd.Index(["low", "high"]))
        for one in (train, val)
    ]
    table = pair_discoveries(ScBMLPClassifier, *sets, "high", n=300)
    best = [frozenset(f"g{i}" for i in pair) for pair in table[["gene_a", "gene_b"]].to_numpy()[:4]]
    assert len(table) <= 300 and len(set(best) & truth) >= 2


def test_errors_say_what_is_wrong_and_what_to_do():
    train, val, _ = planted(0, n=50)
    other = ExpressionDataset(train.x[:, ::-1], train.y.numpy(), train.gene_names[::-1], train.output_names)
    names = pd.Index(["a", "a (knock-off)"])
    twice = ExpressionDataset(np.ones((5, 2)), np.zeros((5, 1)), names, train.output_names)
    cases = [
        (lambda: knockoffs(train, kind="sdp"), "kind='sdp' is unknown"),
        (lambda: knockoffs(train, max_gb=1e-9), "max_gb=1e-09; keep the most variable genes, or allow more"),
        (lambda: knockoffs(train, other), r"others\[0\] does not have the genes of train"),
        (lambda: knockoffs(dataset(train.x[:2])), "train has 2 cells; correlations need at least 3"),
        (lambda: knockoffs(twice), r"train has genes that are knock-offs already, such as 'a \(knock-off\)'"),
        (lambda: pair_discoveries(ScBMLPClassifier, train, val, "y"), "the data have continuous targets, ScBMLPClass"),
        (lambda: pair_discoveries(ScBMLPRegressor, train, None, "y"), "val is of type NoneType"),
        (lambda: pair_discoveries(ScBMLPRegressor, train, val, "y", clump=0), "clump=0 is no correlation"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(KeyError, match="output='z' is unknown"):
        pair_discoveries(ScBMLPRegressor, train, val, "z")
