"""Are the solved models those of dense algebra on explicit features, and of scikit-learn?"""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression, Ridge

from scbmlp.datasets import ExpressionDataset
from scbmlp.exact import Kernels, Mixture, ridge, softmax, solution, targets_of

RANK = 4
EVERY = Mixture().plus("components", 3.0, rank=RANK).plus("products", 0.5)


def cells(n=60, n_genes=9, n_outputs=2, classes=False, seed=0):
    rng = np.random.default_rng(seed)
    x = (rng.gamma(1.0, 1.0, (n, n_genes)) * (rng.random((n, n_genes)) < 0.7)).astype(np.float32)
    x[:, 3] = 1.5  # a gene that does not vary
    y = rng.integers(n_outputs, size=n) if classes else rng.normal(size=(n, n_outputs)) + x[:, :1] * x[:, 1:2]
    genes = pd.Index([f"gene {i}" for i in range(n_genes)])
    return ExpressionDataset(x, y, genes, pd.Index([f"out {i}" for i in range(n_outputs)]))


def outputs_of(found, x):
    d = x.astype(float) - found.mean
    return found.constant + d @ found.direct.T + (d @ found.hidden.T) ** 2 @ found.power.T


def features(x, other, block, counts, space="components"):
    """The features of a block, explicitly, centred and scaled as the kernels promise."""
    share, parts = counts / counts.sum(), [np.asarray(part, float) for part in (x, other)]
    d = [part - share @ parts[0] for part in parts]
    covariance = (d[0] * share[:, None]).T @ d[0]
    z = [part @ np.linalg.eigh(covariance)[1][:, ::-1][:, :RANK] for part in d]
    if block == "products":
        sd = np.sqrt(np.diag(covariance))
        base = {"components": z, "genes": d, "sd": [part / np.where(sd > 1e-6, sd, 1) for part in d]}[space]
        i, j = np.triu_indices(base[0].shape[1])
        found = [part[:, i] * part[:, j] * np.where(i == j, 1, np.sqrt(2)) for part in base]
    elif block == "depth":
        raw = [np.stack([part.sum(axis=1), (part > 0).sum(axis=1)], axis=1) for part in parts]
        center = share @ raw[0]
        raw = [(part - center) / np.sqrt(share @ (raw[0] - center) ** 2) for part in raw]
        unit = np.sqrt((share @ z[0] ** 2).sum())
        found = [np.hstack([a, a**2, b * a[:, :1] / unit, b * a[:, 1:] / unit]) for a, b in zip(raw, z, strict=True)]
    else:
        found = {"genes": d, "components": z, "presence": [part > 0 for part in parts],
                 "squares": [part**2 for part in parts]}[block]  # fmt: skip
    found = [part - share @ found[0] for part in found]
    return [part / np.sqrt(share @ (found[0] ** 2).sum(axis=1)) for part in found]


def together(x, other, mixture, counts):
    """The features of a mixture, whose products are those of its kernels."""
    parts = [
        [np.sqrt(weight) * part for part in features(x, other, name, counts, mixture.space)]
        for name, weight in mixture.weights
    ]
    return [np.hstack(part) for part in zip(*parts, strict=True)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("block", "space"),
    [(name, "components") for name in ("genes", "components", "products", "presence", "squares", "depth")]
    + [("products", "genes"), ("products", "sd")],
)
def test_kernels_are_the_products_of_explicit_features(block, space, weighted):
    """eq-kernels."""
    x, other = cells().x, cells(20, seed=1).x
    counts = np.random.default_rng(2).integers(1, 4, len(x)).astype(float) if weighted else np.ones(len(x))
    kernels = Kernels(sparse.csr_matrix(x), other, counts=counts if weighted else None)
    (found, seen), scale = kernels.block(block, RANK, space)
    own, of_other = features(x, other, block, counts, space)
    np.testing.assert_allclose(found, own @ own.T, atol=1e-8)
    np.testing.assert_allclose(seen, of_other @ own.T, atol=1e-8)
    assert scale > 0 and len(kernels) == len(x)


def test_ridge_is_that_of_scikit_learn():
    """eq-ridge."""
    data, other = cells(), cells(20, seed=1)
    counts = np.random.default_rng(2).integers(0, 4, len(data)).astype(float)
    kernels = Kernels(data.x, other.x, counts=counts)
    products, seen = kernels.mixed(EVERY)
    fit = ridge(products, data.y.double(), 0.01, kernels.counts)
    x, x_other = together(data.x, other.x, EVERY, counts)
    expected = Ridge(0.01 * counts.sum()).fit(x, data.y, counts).predict(x_other)
    np.testing.assert_allclose(fit.outputs(seen), expected, atol=1e-6)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_softmax_is_the_logistic_regression_of_scikit_learn(n_classes):
    """By products of cells, by features, from another start, and from a fit of a third of the cells."""
    data, other = cells(n_outputs=n_classes, classes=True), cells(20, seed=1)
    counts = np.random.default_rng(2).integers(1, 4, len(data)).astype(float)
    kernels, ratio = Kernels(data.x, other.x, counts=counts), 0.01
    (products, seen), y = kernels.mixed(EVERY), targets_of(data, n_classes)
    x, x_other = (torch.as_tensor(one) for one in together(data.x, other.x, EVERY, counts))
    # Of two classes scikit-learn penalises the difference of the weights, which is twice either.
    penalty = ratio * counts.sum() / (2 if n_classes == 2 else 1)
    line = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000).fit(x, data.y, counts)
    start = softmax(products, y, 0.1, kernels.counts)
    few = x[::3], y[::3], kernels.counts[::3]
    for fit, cells_ in (
        (softmax(products, y, ratio, kernels.counts, tol=1e-14), seen),
        (softmax(products, y, ratio, kernels.counts, tol=1e-14, start=start), seen),
        (softmax(None, y, ratio, kernels.counts, features=x, tol=1e-14), x_other),
        (softmax(None, y, ratio, kernels.counts, features=x, few=few, tol=1e-14), x_other),
    ):
        np.testing.assert_allclose(fit.outputs(cells_).softmax(dim=1), line.predict_proba(x_other), atol=1e-5)


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("space", ["components", "genes", "sd"])
@pytest.mark.parametrize("n", [12, 60])  # of few cells Q is a sum over them, else one over eigenvectors
def test_a_solution_has_the_outputs_of_its_fit(classes, space, n):
    """eq-solved, eq-back."""
    data, other = cells(n, n_outputs=3, classes=classes), cells(20, seed=1)
    mixture = EVERY._replace(space=space)
    found = solution(data, [mixture], [0.05]) if classes else solution(data, [mixture] * 3, [0.05] * 3)
    kernels = Kernels(data.x, other.x)
    products, seen = kernels.mixed(mixture)
    fit = (softmax if classes else ridge)(products, targets_of(data, 3), 0.05, kernels.counts)
    np.testing.assert_allclose(outputs_of(found, other.x), fit.outputs(seen), atol=1e-6)


def test_outputs_may_have_a_mixture_each():
    data, other = cells(), cells(20, seed=1)
    linear, ratios = Mixture(), [0.01, 0.3]
    both = solution(data, [linear, EVERY], ratios)
    for i, mixture in enumerate((linear, EVERY)):
        one = ExpressionDataset(data.x, data.y[:, [i]], data.gene_names, ["out"])
        alone = outputs_of(solution(one, [mixture], [ratios[i]]), other.x)
        np.testing.assert_allclose(outputs_of(both, other.x)[:, i], alone[:, 0], atol=1e-7)
    nothing = solution(data, [linear] * 2, ratios)
    assert nothing.hidden.shape == (1, 9) and not nothing.power.any()


@pytest.mark.parametrize("classes", [False, True])
def test_a_cell_that_counts_twice_is_two_cells_in_any_order(classes):
    data = cells(n_outputs=2, classes=classes)
    counts = np.random.default_rng(2).integers(0, 3, len(data))
    rows = np.random.default_rng(3).permutation(np.repeat(np.arange(len(data)), counts))
    mixtures, ratios = ([EVERY], [0.05]) if classes else ([EVERY] * 2, [0.05, 0.1])
    weighted = solution(data, mixtures, ratios, counts=counts.astype(float))
    repeated = solution(data.load(rows), mixtures, ratios)
    for name in ("mean", "constant", "direct"):
        np.testing.assert_allclose(getattr(weighted, name), getattr(repeated, name), atol=1e-4)
    np.testing.assert_allclose(outputs_of(weighted, data.x), outputs_of(repeated, data.x), atol=1e-4)
