"""Are the baselines the best of their kind, found by another way, in either shape of the data?"""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, r2_score
from sklearn.utils.class_weight import compute_class_weight

from scbmlp import baselines
from scbmlp.baselines import Axes, additive_features, class_counts, linear_baseline, logistic, ridge
from scbmlp.datasets import ExpressionDataset

SHAPES = {"more cells": (120, 15), "more genes": (60, 90)}


def cells(n_cells, n_genes, *, classes=0, seed=0, noise=0.5):
    """Train and validation cells, sparse, with two linear targets or classes that are the largest of linear scores."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(n_genes, max(classes, 2)))
    names = [f"out {i}" for i in range(weight.shape[1])]

    def draw(n):
        x = (rng.gamma(1.0, size=(n, n_genes)) * (rng.random((n, n_genes)) < 0.6)).astype(np.float32)
        y = x @ weight + noise * rng.normal(size=(n, weight.shape[1]))
        y = y.argmax(axis=1) if classes else y.astype(np.float32)
        return ExpressionDataset(sparse.csr_matrix(x), y, pd.RangeIndex(n_genes), pd.Index(names))

    return draw(n_cells), draw(40)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_ridge_is_sklearns_with_the_penalty_that_validation_cells_choose(shape, exact):
    train, val = cells(*shape)
    model = linear_baseline(train, val, exact=exact)
    x, y, y_val = train.x.toarray().astype(np.float64), train.y.numpy(), val.y.numpy()
    d = x - x.mean(axis=0)
    grid = baselines.RIDGE if exact else baselines.QUICK_RIDGE
    steps = np.arange(-8, len(grid) + 8)  # it grows while the best is an end
    grid = grid[0] * (grid[1] / grid[0]) ** steps * np.square(d).sum() / min(shape)
    for i in range(2):
        fits = [Ridge(penalty, solver="svd").fit(x, y[:, i]) for penalty in grid]
        errors = [np.square(fit.predict(val.x.toarray()) - y_val[:, i]).mean() for fit in fits]
        at = np.abs(np.log(grid / model.penalty[i])).argmin()
        assert model.penalty[i] == pytest.approx(grid[at]) and errors[at] < 1.002 * min(errors)
        np.testing.assert_allclose(model.weight[i], fits[at].coef_, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.outputs(val)[:, i], fits[at].predict(val.x.toarray()), rtol=1e-4, atol=1e-4)
    assert model.score(val) == pytest.approx(r2_score(y_val, model.outputs(val)))


@pytest.mark.parametrize("class_weight", [None, "balanced"])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logistic_regression_is_sklearns_on_the_genes_themselves(shape, n_classes, exact, class_weight):
    train, val = cells(*shape, classes=n_classes)
    if class_weight:  # all cells of the last class but five become cells of the first
        y = train.y.numpy().copy()
        y[np.flatnonzero(y == n_classes - 1)[5:]] = 0
        train = ExpressionDataset(train.x, y, train.gene_names, train.output_names)
    model = linear_baseline(train, val, exact=exact, class_weight=class_weight)
    x, y = train.x.toarray().astype(np.float64), train.y.numpy()
    options = {"max_iter": 10_000, "class_weight": class_weight}
    fit = LogisticRegression(C=1 / model.penalty, tol=1e-8, **options).fit(x, y)
    shares = np.exp(log_softmax(model.outputs(val), axis=1))
    np.testing.assert_allclose(shares, fit.predict_proba(val.x.toarray()), atol=0.03 if exact else 0.2)
    score = balanced_accuracy_score if class_weight else accuracy_score
    assert model.score(val) == pytest.approx(score(val.y.numpy(), model.outputs(val).argmax(axis=1)))
    # No penalty of the grid has a smaller log-loss on the validation cells, weighted as the training cells are.
    weight = compute_class_weight(class_weight, classes=np.arange(n_classes), y=y)[val.y]
    unit = np.square(x - x.mean(axis=0)).sum() / min(shape)
    others = [
        LogisticRegression(C=1 / (unit * penalty), **options).fit(x, y).predict_proba(val.x.toarray())
        for penalty in (baselines.LOGISTIC if exact else baselines.QUICK_LOGISTIC)
    ]
    least = min(log_loss(val.y, other, sample_weight=weight) for other in others)
    assert log_loss(val.y, shares, sample_weight=weight) <= least + (3e-3 if exact else 1e-2)


@pytest.mark.parametrize("exact", [True, False])
def test_classes_of_one_size_are_fitted_to_the_bit_as_without_balance(exact):
    train, val = cells(300, 10, classes=3)
    even = np.concatenate([np.flatnonzero(train.y == i)[:50] for i in range(3)])
    train = ExpressionDataset(train.x[even], train.y[even], train.gene_names, train.output_names)
    plain, balanced = (linear_baseline(train, val, exact=exact, class_weight=kind) for kind in (None, "balanced"))
    assert plain.penalty == balanced.penalty
    np.testing.assert_array_equal(plain.weight, balanced.weight)
    np.testing.assert_array_equal(plain.constant, balanced.constant)


def test_weighted_validation_cells_choose_the_penalty():
    sets = []
    for part, n_rare in zip(cells(120, 40, classes=3, seed=1, noise=3), (8, 4), strict=True):
        y = part.y.numpy().copy()
        y[np.flatnonzero(y == 2)[n_rare:]] = 0
        sets.append(ExpressionDataset(part.x, y, part.gene_names, part.output_names))
    x, x_val = (part.x.toarray().astype(np.float64) for part in sets)
    y, y_val = (part.y.numpy() for part in sets)
    grid = baselines.LOGISTIC * np.square(x - x.mean(axis=0)).sum() / 40
    fits = [LogisticRegression(C=1 / one, max_iter=10_000, class_weight="balanced").fit(x, y) for one in grid]
    weight = compute_class_weight("balanced", classes=np.arange(3), y=y)[y_val]
    weighted, plain = (
        np.argmin([log_loss(y_val, fit.predict_proba(x_val), sample_weight=own) for fit in fits])
        for own in (weight, None)
    )
    assert linear_baseline(*sets, class_weight="balanced").penalty == pytest.approx(grid[weighted])
    assert weighted != plain


def test_classes_count_by_the_cells_that_are_drawn():
    y, own = np.array([0, 0, 0, 2, 2, 3]), np.array([1.0, 0, 2, 1, 0, 0])
    weight = compute_class_weight("balanced", classes=np.array([0, 2]), y=np.array([0, 0, 0, 2]))
    np.testing.assert_allclose(class_counts("balanced", y, 4, own), [weight[0], 1, weight[1], 1])
    assert class_counts(None, y, 4) is None


def test_a_class_without_a_training_cell_is_never_predicted():
    train, val = cells(80, 10, classes=2)
    names = pd.Index(["out 0", "absent", "out 1"])
    train, val = (ExpressionDataset(part.x, 2 * part.y.numpy(), part.gene_names, names) for part in (train, val))
    for exact in (True, False):
        model = linear_baseline(train, val, exact=exact)
        assert set(model.outputs(val).argmax(axis=1)) == {0, 2} and model.score(val) > 0.8


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_axes_are_the_singular_vectors_of_the_centred_cells(shape):
    x = cells(*shape)[0].x
    axes = Axes(x)
    d = x.toarray().astype(np.float64) - x.toarray().mean(axis=0)
    values = np.linalg.svd(d, compute_uv=False) ** 2
    values = values[values > 1e-9]
    np.testing.assert_allclose(axes.strength[::-1], values, rtol=1e-5)
    np.testing.assert_allclose(axes.scores.T @ axes.scores, np.diag(axes.strength), atol=1e-4)
    np.testing.assert_allclose(axes.project(x), axes.scores, atol=1e-4)
    np.testing.assert_allclose(axes.scores @ axes.scores.T, d @ d.T, atol=1e-3)


def test_more_cells_and_genes_than_fit_are_drawn(monkeypatch):
    train, val = cells(60, 90)
    monkeypatch.setattr(baselines, "MOST", 30)
    axes = Axes(train.x)
    assert len(axes.rows) == 30 and axes.products.shape == (30, 30)
    model = ridge(axes, train.y.numpy(), val.x, val.y.numpy())
    alone = Axes(train.x[axes.rows])
    np.testing.assert_allclose(
        model.weight, ridge(alone, train.y.numpy()[axes.rows], val.x, val.y.numpy()).weight, rtol=1e-6
    )


@pytest.mark.parametrize("n_classes", [0, 3])
def test_large_data_take_the_quick_way(monkeypatch, n_classes):
    train, val = cells(60, 90, classes=n_classes)
    quick = linear_baseline(train, val, exact=False)
    monkeypatch.setattr(baselines, "LARGE", 30)
    np.testing.assert_array_equal(linear_baseline(train, val).weight, quick.weight)


@pytest.mark.parametrize("make", [sparse.csr_matrix, sparse.csr_array, sparse.csc_matrix, np.asarray])
def test_additive_features_are_sums_of_functions_of_single_genes(make):
    """eq-additive."""
    x = np.random.default_rng(0).poisson(0.7, (20, 5)).astype(np.float32)
    features = additive_features(make(x))
    assert sparse.issparse(features) == sparse.issparse(make(x))
    dense = features.toarray() if sparse.issparse(features) else features
    np.testing.assert_array_equal(dense, np.hstack([x, x**2, x > 0]))
    assert features.dtype == np.float32


@pytest.mark.parametrize("exact", [True, False])
def test_what_cannot_be_fitted_is_refused(exact):
    train, val = cells(40, 10)
    y = train.y.numpy().copy()
    y[:, 1] = 3
    with pytest.raises(ValueError, match=r"same value in every cell for target 1 .*drop the target.*baseline=False"):
        linear_baseline(ExpressionDataset(train.x, y, train.gene_names, train.output_names), val, exact=exact)
    one = ExpressionDataset(train.x, np.zeros(40, np.int64), train.gene_names, train.output_names)
    with pytest.raises(ValueError, match=r"cells of 1 class alone.*add cells of other classes.*baseline=False"):
        linear_baseline(one, one, exact=exact)


def test_logistic_regression_on_axes_of_additive_features_sees_curves():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 4)).astype(np.float32)
    y = (np.abs(x[:, 0]) > 0.7).astype(np.int64)
    features = additive_features(x)
    axes = Axes(features[:300])
    model = logistic(axes, y[:300], features[300:350], y[300:350], 2)
    assert accuracy_score(y[350:], model.outputs(features[350:]).argmax(axis=1)) > 0.95
    linear = linear_baseline(*(ExpressionDataset(x[i], y[i], pd.RangeIndex(4), pd.Index(["a", "b"]))
                               for i in (slice(300), slice(300, 350))))  # fmt: skip
    assert accuracy_score(y[350:], linear.outputs(x[350:]).argmax(axis=1)) < 0.75


def test_genes_are_matched_by_name():
    train, val = cells(60, 20)
    names = pd.Index([f"gene {i}" for i in range(20)])
    train, val = (ExpressionDataset(part.x, part.y, names, part.output_names) for part in (train, val))
    model, order = linear_baseline(train, val), np.random.default_rng(0).permutation(20)
    expected = model.outputs(val.x)
    np.testing.assert_allclose(expected, val.x.toarray() @ model.weight.T + model.constant, rtol=1e-5)
    turned = ExpressionDataset(val.x[:, order], val.y, names[order], val.output_names)
    for same in (turned, AnnData(turned.x, var=pd.DataFrame(index=turned.gene_names))):
        np.testing.assert_allclose(model.outputs(same), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(KeyError, match="lacks 1 of the 20 genes"):
        model.outputs(ExpressionDataset(val.x[:, 1:], val.y, names[1:], val.output_names))
    with pytest.raises(ValueError, match="19.* 20 genes"):
        model.outputs(val.x[:, 1:])


@pytest.mark.parametrize("exact", [True, False])
def test_the_grid_grows_where_classes_are_easy(exact):
    """Classes that are far apart want next to no penalty: the best of the grid is its end."""
    rng, y = np.random.default_rng(0), np.arange(200) % 2
    x = np.abs(rng.normal(size=(200, 10))) + 6.0 * y[:, None] * np.eye(10)[0]
    train, val = (ExpressionDataset(x[part], y[part], range(10), "ab") for part in (slice(150), slice(150, None)))
    model = linear_baseline(train, val, exact=exact)
    x = train.x.astype(np.float64)
    unit, grid = np.square(x - x.mean(axis=0)).sum() / 10, baselines.LOGISTIC if exact else baselines.QUICK_LOGISTIC
    assert model.penalty < 0.99 * unit * grid[0]
    end = LogisticRegression(C=1 / (unit * grid[0]), max_iter=10_000).fit(x, train.y)
    losses = log_loss(val.y, end.predict_proba(val.x)), log_loss(val.y, softmax(model.outputs(val), axis=1))
    assert losses[1] < losses[0] / 1.5


def test_a_penalty_at_the_limit_is_said(monkeypatch):
    monkeypatch.setattr(baselines, "BEYOND", 5.0)
    train, val = cells(150, 10, classes=2, noise=0.0)
    with pytest.warns(UserWarning, match="best penalty of the linear baseline is the last of those tried"):
        linear_baseline(train, val, exact=False)
