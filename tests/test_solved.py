"""The equations of the solved model that the page of the method has, by dense algebra on explicit features."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from scbmlp import models, simulate
from scbmlp.datasets import get_classification_datasets, get_regression_datasets
from scbmlp.exact import Mixture, solution
from scbmlp.interactions import interaction_matrix
from scbmlp.solving import _solved

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
