"""What a model without interactions reaches: tuned linear models, and sums of functions of single genes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss, r2_score

from scbmlp.datasets import ExpressionDataset, match_genes

MOST = 6000  # cells, where features are more than that too: an eigendecomposition of this size takes half a minute
LEADING = 100  # principal axes that the quick logistic regression keeps
RIDGE = np.logspace(-8, 3, 23)  # penalties, in units of the mean eigenvalue of the cells' scatter
LOGISTIC = np.logspace(-2.5, 0.5, 7)


@dataclass(frozen=True)
class LinearModel:
    """Outputs that are a weighted sum of features and a constant.

    Parameters
    ----------
    weight
        Weight of every feature (out x gene).
    constant
        Outputs of a cell whose features are all 0 (out).
    penalty
        Penalty that validation cells chose, for each output of a regression (out) and for all classes alike: the
        weight of the squared weights beside the sum over the training cells of squared error, or of log-loss.
    """

    weight: np.ndarray
    constant: np.ndarray
    penalty: np.ndarray

    def outputs(self, x: ExpressionDataset | Any) -> np.ndarray:
        """Return the outputs of cells (cell x out): predictions, or the logits of classes.

        Parameters
        ----------
        x
            A dataset or a matrix with the features in order (cell x gene).
        """
        return np.asarray(getattr(x, "x", x) @ self.weight.T) + self.constant

    def score(self, dataset: ExpressionDataset) -> float:
        """Return the accuracy of classes, or R2 averaged over targets.

        Parameters
        ----------
        dataset
            Cells with their targets.
        """
        outputs, target = self.outputs(dataset), dataset.y.numpy()
        return accuracy_score(target, outputs.argmax(axis=1)) if target.ndim == 1 else r2_score(target, outputs)


def linear_baseline(train: ExpressionDataset, val: ExpressionDataset, *, exact: bool = True) -> LinearModel:
    """Fit ridge regression, or multinomial logistic regression for classes, with the penalty best on validation cells.

    Whatever a bilinear model claims, it claims against this. Ridge regression is exact for all penalties after one
    eigendecomposition, in the smaller of cells and genes; so is logistic regression, whose optimum turns with the axes.

    Parameters
    ----------
    train, val
        Cells to fit, and cells that choose the penalty: for each target by its squared error, for classes by log-loss.
    exact
        Whether logistic regression sees all principal axes, or the 100 leading ones: a few times quicker, and within
        a hundredth of the accuracy on the data that we know.

    Raises
    ------
    ValueError
        There is one class, or a target is constant.
    """
    target = train.y.numpy()
    axes, x_val = Axes(train.x), match_genes(val, train.gene_names)
    if target.ndim == 1:
        return logistic(axes, target, x_val, val.y.numpy(), len(train.output_names), None if exact else LEADING)
    return ridge(axes, target, x_val, val.y.numpy())


def additive_features(x: Any) -> Any:
    """Return x, x^2 and 1[x > 0] of every gene: weighted sums of them are sums of functions of single genes.

    Parameters
    ----------
    x
        Expression, sparse or dense (cell x gene).

    Returns
    -------
    Features (cell x 3 gene), sparse where `x` is.
    """
    if sparse.issparse(x):
        x = sparse.csr_matrix(x)
        return sparse.hstack([x, x.multiply(x), (x > 0).astype(x.dtype)], format="csr")
    x = np.asarray(x)
    return np.hstack([x, x**2, (x > 0).astype(x.dtype)])


class Axes:
    """Principal axes of training cells, on which any penalty of a linear model is cheap.

    They are eigenvectors of the products of cells or of features, whichever are fewer. If both are more than ``MOST``,
    that many cells are drawn.

    Parameters
    ----------
    x
        Training cells, sparse or dense (cell x gene).
    """

    def __init__(self, x: Any) -> None:
        self.rows = np.arange(x.shape[0])
        if min(x.shape) > MOST:
            self.rows = np.sort(np.random.default_rng(0).choice(x.shape[0], MOST, replace=False))
            x = x[self.rows]
        self.x, self.mean = x, np.asarray(x.mean(axis=0), dtype=np.float64).ravel()
        self.dual = x.shape[0] <= x.shape[1]
        values, vectors = np.linalg.eigh(_between_cells(x, x, self.mean) if self.dual else _scatter(x, self.mean))
        kept = values > max(values[-1], 0) * 1e-12
        self.strength, vectors = values[kept], vectors[:, kept]  # squared singular values, rising
        root = np.sqrt(self.strength)
        # A score is the product of a cell with all training cells, or with all features, times this.
        self._turn = vectors / root if self.dual else vectors
        self.scores = vectors * root if self.dual else self.project(x)

    def project(self, x: Any) -> np.ndarray:
        """Return the scores of cells (cell x comp)."""
        if self.dual:
            return _between_cells(x, self.x, self.mean) @ self._turn
        return x @ self._turn - self.mean @ self._turn

    def weights(self, coefficients: np.ndarray) -> np.ndarray:
        """Turn coefficients of the scores (comp x out) into weights of the features (gene x out)."""
        turned = self._turn @ coefficients
        return self.x.T @ turned - np.outer(self.mean, turned.sum(axis=0)) if self.dual else turned

    def model(self, coefficients: np.ndarray, constant: np.ndarray, penalty: np.ndarray) -> LinearModel:
        """Return the model of the features that has these coefficients of the scores."""
        weight = self.weights(coefficients).T
        return LinearModel(weight, constant - weight @ self.mean, penalty)


def ridge(axes: Axes, y: np.ndarray, x_val: Any, y_val: np.ndarray) -> LinearModel:
    """Fit ridge regression with the penalty of each target (cell x out) that does best on validation cells.

    Raises
    ------
    ValueError
        A target is constant.
    """
    y = y[axes.rows].astype(np.float64)
    constant = np.flatnonzero(np.ptp(y, axis=0) == 0)
    if len(constant):
        raise ValueError(
            f"train has the same value in every cell for target {constant[0]} (the first is 0): there is no linear "
            f"baseline of a constant; drop the target."
        )
    mean, products, val = y.mean(axis=0), axes.scores.T @ (y - y.mean(axis=0)), axes.project(x_val)
    unit = axes.strength.mean()
    best, error = np.zeros_like(products), np.full(y.shape[1], np.inf)
    penalty = np.zeros(y.shape[1])
    for strength in RIDGE * unit:
        coefficients = products / (axes.strength + strength)[:, None]
        here = ((val @ coefficients + mean - y_val) ** 2).mean(axis=0)
        better = here < error
        best[:, better], error[better], penalty[better] = coefficients[:, better], here[better], strength
    return axes.model(best, mean, penalty)


def logistic(
    axes: Axes, y: np.ndarray, x_val: Any, y_val: np.ndarray, n_classes: int, n_axes: int | None = None
) -> LinearModel:
    """Fit multinomial logistic regression to class codes (cell), with the penalty that does best on validation cells.

    Raises
    ------
    ValueError
        There are cells of one class alone.
    """
    y = y[axes.rows]
    classes = np.unique(y)
    if len(classes) < 2:
        raise ValueError(f"train has cells of {len(classes)} class: there is nothing to tell apart; add other classes.")
    leading = slice(-n_axes if n_axes else None, None)
    scores, val = axes.scores[:, leading], axes.project(x_val)[:, leading]
    fit = LogisticRegression(warm_start=True, max_iter=300, tol=1e-3)
    best, error = None, np.inf
    for strength in axes.strength.mean() * LOGISTIC[::-1]:
        fit.set_params(C=1 / strength).fit(scores, y)
        # Two classes have one row of coefficients, the difference; classes without a training cell have none.
        rows = np.vstack([-fit.coef_, fit.coef_]) / 2 if len(classes) == 2 else fit.coef_
        at_mean = np.append(-fit.intercept_, fit.intercept_) / 2 if len(classes) == 2 else fit.intercept_
        coefficients, constant = np.zeros((len(axes.strength), n_classes)), np.full(n_classes, at_mean.min() - 10.0)
        coefficients[leading, classes], constant[classes] = rows.T, at_mean
        shares = softmax(val @ coefficients[leading] + constant, axis=1)
        here = log_loss(y_val, shares, labels=range(n_classes))
        if here < error:
            best, error = (coefficients, constant, np.float64(strength)), here
    return axes.model(*best)


def _between_cells(a: Any, b: Any, mean: np.ndarray, size: int = 2000) -> np.ndarray:
    """Return the products of the cells of `a` and `b`, less `mean`, summed over blocks of features."""
    same = a is b
    a, b = (x.tocsc() if sparse.issparse(x) else x for x in (a, b))
    products = np.zeros((a.shape[0], b.shape[0]))
    for start in range(0, len(mean), size):
        part = slice(start, start + size)
        first = _dense(a[:, part]) - mean[part]
        products += first @ (first if same else _dense(b[:, part]) - mean[part]).T
    return products


def _scatter(x: Any, mean: np.ndarray, size: int = 2000) -> np.ndarray:
    """Return the products of features, less their means, summed over blocks of cells."""
    products = np.zeros((len(mean),) * 2)
    for start in range(0, x.shape[0], size):
        block = _dense(x[start : start + size]) - mean
        products += block.T @ block
    return products


def _dense(x: Any) -> np.ndarray:
    """Return a block in float64: penalties go down to next to nothing, where rounding would look like a direction."""
    return np.asarray(x.toarray() if sparse.issparse(x) else x, dtype=np.float64)
