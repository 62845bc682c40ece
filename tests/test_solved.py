"""Are interactions of measured pairs solved as promised?"""

import numpy as np
import pytest

from scbmlp import models
from scbmlp.datasets import ExpressionDataset
from scbmlp.interactions import interaction_matrix
from scbmlp.solving import _completed


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
    q = interaction_matrix(model, 0).to_dense()
    single = model.direct.weight.detach().numpy()[0].astype(float) + q.diagonal()
    expected = model.project.bias.item() + single[a] + single[b] + 2 * q[a, b]
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
