"""The equations of the solved model that the page of the method has, by dense algebra on explicit features."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from scbmlp import models, simulate
from scbmlp.datasets import ExpressionDataset, get_classification_datasets, get_regression_datasets
from scbmlp.exact import Mixture, solution
from scbmlp.interactions import interaction_matrix
from scbmlp.solving import _completed, _solved

MIXTURE = Mixture((("genes", 1.0), ("components", 2.0), ("products", 0.5)), rank=4)
RATIO = 1e-2


@pytest.fixture(scope="module")
def cells():
    """Cells of three gene programs, and the state of two of them."""
    adata = simulate.planted_interactions(n_cells=160, n_genes=12, n_programs=3, genes_per_program=4)
    adata.obsm["state"] = adata.uns["truth"]["state"][:, :2].astype(float)
    return adata


def features(x, rank):
    """Every block, centred and in units of its mean squared norm, times the root of its weight."""
    d = x - x.mean(axis=0)
    u = d @ np.linalg.svd(d, full_matrices=False)[2][:rank].T
    found = []
    for block, (_, weight) in zip((d, u, np.einsum("ci,cj->cij", u, u).reshape(len(u), -1)), MIXTURE[0], strict=True):
        block = block - block.mean(axis=0)
        found.append(block * np.sqrt(weight / (block**2).sum(axis=1).mean()))
    return np.hstack(found)


def outputs_of(found, d):
    """Outputs of a solution, for cells less the training mean."""
    return found.constant + d @ found.direct.T + (d @ found.hidden.T) ** 2 @ found.power.T


def test_targets_are_ridge_regression_on_explicit_features(cells):
    """eq-solved, eq-kernels, eq-ridge: c + W d + products of components, and its matrix by eq-back."""
    train, *_ = get_regression_datasets(cells, "state")
    x, y = train.x.astype(float), train.y.numpy().astype(float)
    found = solution(train, [MIXTURE] * 2, [RATIO] * 2)
    phi = features(x, MIXTURE.rank)
    weights = np.linalg.solve(phi.T @ phi + len(x) * RATIO * np.eye(phi.shape[1]), phi.T @ (y - y.mean(axis=0)))
    d = x - found.mean
    np.testing.assert_allclose(outputs_of(found, d), y.mean(axis=0) + phi @ weights, atol=1e-8)
    # The products alone make up Q, in components.
    axes = np.linalg.svd(d, full_matrices=False)[2][:4]
    u = d @ axes.T
    products = np.einsum("ci,cj->cij", u, u).reshape(len(u), -1)
    products = products - products.mean(axis=0)
    core = (weights[-16:] * np.sqrt(0.5 / (products**2).sum(axis=1).mean())).T.reshape(2, 4, 4)
    model = _solved(models.ScBMLPRegressor, models.Config(12, 1, 2, linear=True), found, train)  # as solve makes it
    for k in range(2):
        expected = axes.T @ core[k] @ axes
        q = interaction_matrix(model, k).to_dense()
        np.testing.assert_allclose(q, expected, atol=1e-5 * np.abs(expected).max())


def test_classes_are_logistic_regression_on_explicit_features(cells):
    """The least of the sum of log-losses plus n rho / 2 times the squared weights: its slope is 0."""
    train, *_ = get_classification_datasets(cells, "label")
    x, y = train.x.astype(float), np.eye(2)[train.y.numpy()]
    found = solution(train, [MIXTURE], [RATIO])
    phi, outputs = features(x, MIXTURE.rank), outputs_of(found, x - found.mean)
    left = y - softmax(outputs, axis=1)
    # The weights follow from their own slope: phi' left = n rho w.
    weights = phi.T @ left / (len(x) * RATIO)
    centred = outputs - outputs.mean(axis=0)
    np.testing.assert_allclose(phi @ weights, centred, atol=1e-2 * np.abs(centred).max())
    assert np.abs(left.sum(axis=0)).max() < 1e-3 and -log_softmax(outputs, axis=1)[y > 0].mean() < np.log(2)


# ------------------------------------------------------------------------------------------------- measured pairs


def measured(n_genes=14, noise=0.01, seed=0):
    """All pairs of genes, whose values are sums and an interaction of rank two; and this interaction."""
    rng = np.random.default_rng(seed)
    alone, groups = rng.normal(size=n_genes), rng.normal(size=(n_genes, 2))
    together = groups * [1.0, -0.7] @ groups.T
    a, b = np.triu_indices(n_genes, 1)
    x = np.zeros((len(a), n_genes), np.float32)
    x[np.arange(len(a)), a] = x[np.arange(len(a)), b] = 1
    y = 0.3 + alone[a] + alone[b] + together[a, b] + noise * rng.normal(size=len(a))
    return ExpressionDataset(x, y, [f"gene{i}" for i in range(n_genes)], ["fitness"]), y, (a, b)


def test_pairs_that_were_not_measured_are_predicted_beyond_a_sum():
    pairs, y, _ = measured(30)
    out = np.random.default_rng(1).random(len(y)) < 0.1
    model = models.solve_pairs(models.ScBMLPRegressor, pairs.load(~out))
    design = np.column_stack([pairs.x, np.ones(len(y))])
    alone = design @ np.linalg.lstsq(design[~out], y[~out], rcond=None)[0]
    left = [np.mean((one[out] - y[out]) ** 2) for one in (model.outputs(pairs)[:, 0], alone)]
    assert left[0] < 0.05 * left[1]
    assert model.trials["chosen"].sum() == 1 and model.trials["rank"].iloc[0] <= 2


def test_what_a_pair_adds_is_twice_its_entry_of_the_matrix_and_the_order_of_pairs_is_nothing():
    pairs, y, (a, b) = measured()
    model = models.solve_pairs(models.ScBMLPRegressor, pairs, n_folds=3)
    q, weights = interaction_matrix(model, 0).to_dense(), model.direct.weight.detach().numpy()[0].astype(float)
    single = weights + q.diagonal()
    constant = model.project.bias.detach().numpy()
    expected = constant + single[a] + single[b] + 2 * q[a, b]
    np.testing.assert_allclose(model.outputs(pairs)[:, 0], expected, atol=1e-4)
    order = np.random.default_rng(0).permutation(len(y))
    again = models.solve_pairs(models.ScBMLPRegressor, pairs.load(order), n_folds=3)
    np.testing.assert_allclose(again.outputs(pairs), model.outputs(pairs), atol=1e-4)


def test_eigenvalues_of_a_solution_are_shrunken_as_promised():
    """What the sum and Q leave, zero where nothing was measured, has to give Q again."""
    _, y, (a, b) = measured(noise=0.3)
    for share, constant, w, q in _completed(np.column_stack([a, b]), y, 14):  # noqa: B007
        left = np.zeros((14, 14))
        left[a, b] = left[b, a] = y - constant - w[a] - w[b] - q[a, b]
        values, vectors = np.linalg.eigh(q + left)
        kept = np.abs(np.einsum("gi,gh,hi->i", vectors, q, vectors))
        first = kept > 1e-3
        lost = (np.abs(values) - kept)[first] ** 2 * np.abs(values)[first]
        threshold = lost ** (1 / 3)  # of t (t / e)^(1/2)
        assert np.ptp(threshold) < 0.02 * threshold.mean() and (np.abs(values)[~first] < 1.02 * threshold.mean()).all()
    assert share == pytest.approx(0.06)


def test_cells_are_no_measured_pairs():
    with pytest.raises(ValueError, match="1 for two genes"):
        models.solve_pairs(models.ScBMLPRegressor, ExpressionDataset(np.eye(3), np.ones(3), list("abc"), ["y"]))
