"""Are the baselines the best of their kind, found by another way, in either shape of the data?"""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, r2_score
from sklearn.utils.class_weight import compute_class_weight

from scbmlp import baselines
from scbmlp.baselines import Axes, additive_features, class_counts, linear_baseline, ridge
from scbmlp.datasets import ExpressionDataset

SHAPES = {"more cells": (120, 15), "more genes": (60, 90)}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
either_way = pytest.mark.parametrize("exact", [True, False])


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


def changed(part, **other):
    """The same cells with other targets or names."""
    own = {"x": part.x, "y": part.y.numpy(), "gene_names": part.gene_names, "output_names": part.output_names}
    return ExpressionDataset(**(own | other))


def rare(part, n):
    """All cells of the last class but a few become cells of the first."""
    y = part.y.numpy().copy()
    y[np.flatnonzero(y == y.max())[n:]] = 0
    return changed(part, y=y)


def unit_of(x):
    return np.square(x - x.mean(axis=0)).sum() / min(x.shape)


@either_way
@each_shape
def test_ridge_is_sklearns_with_the_penalty_that_validation_cells_choose(shape, exact):
    train, val = cells(*shape)
    model = linear_baseline(train, val, exact=exact)
    x, x_val = (part.x.toarray().astype(np.float64) for part in (train, val))
    y, y_val = train.y.numpy(), val.y.numpy()
    grid = baselines.RIDGE if exact else baselines.QUICK_RIDGE
    steps = np.arange(-8, len(grid) + 8)  # it grows while the best is an end
    grid = grid[0] * (grid[1] / grid[0]) ** steps * unit_of(x)
    for i in range(2):
        fits = [Ridge(penalty, solver="svd").fit(x, y[:, i]) for penalty in grid]
        errors = [np.square(fit.predict(x_val) - y_val[:, i]).mean() for fit in fits]
        at = np.abs(np.log(grid / model.penalty[i])).argmin()
        assert model.penalty[i] == pytest.approx(grid[at]) and errors[at] < 1.002 * min(errors)
        np.testing.assert_allclose(model.weight[i], fits[at].coef_, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.outputs(val)[:, i], fits[at].predict(x_val), rtol=1e-4, atol=1e-4)
    assert model.score(val) == pytest.approx(r2_score(y_val, model.outputs(val)))


@pytest.mark.parametrize(("class_weight", "n_classes"), [(None, 2), (None, 3), ("balanced", 2), ("balanced", 3)])
@either_way
@each_shape
def test_logistic_regression_is_sklearns_on_the_genes_themselves(shape, exact, class_weight, n_classes):
    train, val = cells(*shape, classes=n_classes)
    train = rare(train, 5) if class_weight else train
    model = linear_baseline(train, val, exact=exact, class_weight=class_weight)
    x, x_val = (part.x.toarray().astype(np.float64) for part in (train, val))
    y, options = train.y.numpy(), {"max_iter": 10_000, "class_weight": class_weight}
    fit = LogisticRegression(C=1 / model.penalty, tol=1e-8, **options).fit(x, y)
    shares = softmax(model.outputs(val), axis=1)
    np.testing.assert_allclose(shares, fit.predict_proba(x_val), atol=0.03 if exact else 0.2)
    score = balanced_accuracy_score if class_weight else accuracy_score
    assert model.score(val) == pytest.approx(score(val.y.numpy(), model.outputs(val).argmax(axis=1)))
    # No penalty of the grid has a smaller log-loss on the validation cells, weighted as the training cells are.
    weight = compute_class_weight(class_weight, classes=np.arange(n_classes), y=y)[val.y]
    grid = unit_of(x) * (baselines.LOGISTIC if exact else baselines.QUICK_LOGISTIC)
    others = [LogisticRegression(C=1 / penalty, **options).fit(x, y).predict_proba(x_val) for penalty in grid]
    least = min(log_loss(val.y, other, sample_weight=weight) for other in others)
    assert log_loss(val.y, shares, sample_weight=weight) <= least + (3e-3 if exact else 1e-2)


def test_classes_count_by_the_cells_that_are_drawn():
    y, own = np.array([0, 0, 0, 2, 2, 3]), np.array([1.0, 0, 2, 1, 0, 0])
    weight = compute_class_weight("balanced", classes=np.array([0, 2]), y=np.array([0, 0, 0, 2]))
    np.testing.assert_allclose(class_counts("balanced", y, 4, own), [weight[0], 1, weight[1], 1])
    np.testing.assert_array_equal(class_counts(None, y, 4), 1)


@either_way
def test_a_class_without_a_training_cell_is_never_predicted(exact):
    names = pd.Index(["out 0", "absent", "out 1"])
    train, val = (changed(one, y=2 * one.y.numpy(), output_names=names) for one in cells(80, 10, classes=2))
    model = linear_baseline(train, val, exact=exact)
    assert set(model.outputs(val).argmax(axis=1)) == {0, 2} and model.score(val) > 0.8


def test_more_cells_and_genes_than_fit_are_drawn(monkeypatch):
    train, val = cells(60, 90)
    monkeypatch.setattr(baselines, "MOST", 30)
    axes = Axes(train.x)
    assert len(axes.rows) == 30 and axes.products.shape == (30, 30)
    y = train.y.numpy()
    drawn, alone = ridge(axes, y, val.x, val.y.numpy()), Axes(train.x[axes.rows])
    np.testing.assert_allclose(drawn.weight, ridge(alone, y[axes.rows], val.x, val.y.numpy()).weight, rtol=1e-6)


@pytest.mark.parametrize("n_classes", [0, 3])
def test_large_data_take_the_quick_way(monkeypatch, n_classes):
    sets = cells(60, 90, classes=n_classes)
    quick = linear_baseline(*sets, exact=False)
    monkeypatch.setattr(baselines, "LARGE", 30)
    np.testing.assert_array_equal(linear_baseline(*sets).weight, quick.weight)


@pytest.mark.parametrize("make", [sparse.csr_matrix, sparse.csr_array, sparse.csc_matrix, np.asarray])
def test_additive_features_are_sums_of_functions_of_single_genes(make):
    """eq-additive."""
    x = np.random.default_rng(0).poisson(0.7, (20, 5)).astype(np.float32)
    features = additive_features(make(x))
    assert sparse.issparse(features) == sparse.issparse(make(x)) and features.dtype == np.float32
    dense = features.toarray() if sparse.issparse(features) else features
    np.testing.assert_array_equal(dense, np.hstack([x, x**2, x > 0]))


@either_way
def test_what_cannot_be_fitted_is_refused(exact):
    train, val = cells(40, 10)
    constant = changed(train, y=np.stack([train.y[:, 0], np.full(40, 3.0)], axis=1))
    with pytest.raises(ValueError, match=r"same value in every cell for target 1 .*drop the target.*baseline=False"):
        linear_baseline(constant, val, exact=exact)
    one = changed(train, y=np.zeros(40, np.int64))
    with pytest.raises(ValueError, match=r"cells of 1 class alone.*add cells of other classes.*baseline=False"):
        linear_baseline(one, one, exact=exact)


@pytest.mark.parametrize("shape", [(80, 10), (30, 40)])
def test_copies_of_genes_and_targets_without_noise_do_no_harm(shape):
    """Penalties then go down to where rounding rules."""
    one = cells(*shape, noise=0)
    many = [changed(each, x=sparse.hstack([each.x] * 3, "csr"), gene_names=range(3 * shape[1])) for each in one]
    np.testing.assert_allclose(*(linear_baseline(*both).score(both[1]) for both in (many, one)), atol=0.02)


def test_genes_are_matched_by_name():
    names = pd.Index([f"gene {i}" for i in range(20)])
    train, val = (changed(part, gene_names=names) for part in cells(60, 20))
    model, order = linear_baseline(train, val), np.random.default_rng(0).permutation(20)
    expected = model.outputs(val.x)
    np.testing.assert_allclose(expected, val.x.toarray() @ model.weight.T + model.constant, rtol=1e-5)
    turned = changed(val, x=val.x[:, order], gene_names=names[order])
    for same in (turned, AnnData(turned.x, var=pd.DataFrame(index=turned.gene_names))):
        np.testing.assert_allclose(model.outputs(same), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="19.* 20 genes"):
        model.outputs(val.x[:, 1:])


@either_way
def test_the_grid_grows_where_classes_are_easy(exact):
    """Classes that are far apart want next to no penalty: the best of the grid is its end."""
    rng, y = np.random.default_rng(0), np.arange(200) % 2
    x = np.abs(rng.normal(size=(200, 10))) + 6.0 * y[:, None] * np.eye(10)[0]
    train, val = (ExpressionDataset(x[part], y[part], range(10), "ab") for part in (slice(150), slice(150, None)))
    model, x = linear_baseline(train, val, exact=exact), train.x.astype(np.float64)
    least = unit_of(x) * (baselines.LOGISTIC if exact else baselines.QUICK_LOGISTIC)[0]
    assert model.penalty < 0.99 * least
    end = LogisticRegression(C=1 / least, max_iter=10_000).fit(x, train.y)
    losses = log_loss(val.y, end.predict_proba(val.x)), log_loss(val.y, softmax(model.outputs(val), axis=1))
    assert losses[1] < losses[0] / 1.5


def test_a_penalty_at_the_limit_is_said(monkeypatch):
    monkeypatch.setattr(baselines, "BEYOND", 5.0)
    train, val = cells(150, 10, classes=2, noise=0.0)
    with pytest.warns(UserWarning, match="best penalty of the linear baseline is the last of those tried"):
        linear_baseline(train, val, exact=False)
