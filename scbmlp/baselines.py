"""What a model without interactions reaches: tuned linear models, and sums of functions of single genes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss, r2_score, recall_score
from threadpoolctl import threadpool_limits

from scbmlp.checks import check_class_weight, warn
from scbmlp.datasets import ExpressionDataset, check_dataset, dense_tensor, held, match_genes, product, some
from scbmlp.stores import Scaling

MOST = 8000  # cells, where features are more than that too
LARGE = 3000  # cells and features from which on few penalties are tried
# Penalties, in units of the mean eigenvalue of the cells' scatter; more are tried while the best is an end.
RIDGE, QUICK_RIDGE = np.logspace(-8, 3, 23), np.logspace(-1.5, 1, 5)
LOGISTIC, QUICK_LOGISTIC = np.logspace(-2.5, 0.5, 7), np.logspace(-2, 0, 3)
BEYOND = 1e4  # how far beyond an end


@dataclass(frozen=True)
class LinearModel:
    """Outputs that are a weighted sum of features and a constant.

    Parameters
    ----------
    weight, constant, penalty
        Weight of every feature (out x gene), outputs where all are 0 (out), and penalty (out), or one of all classes.
    gene_names, layer, scaling, class_weight
        Of the training cells: names of genes, if any, layer of AnnData, what counts go through, and how classes count.
    """

    weight: np.ndarray
    constant: np.ndarray
    penalty: np.ndarray
    gene_names: pd.Index | None = None
    layer: str | None = None
    scaling: Scaling | None = None
    class_weight: Literal["balanced"] | None = None

    def outputs(self, x: AnnData | ExpressionDataset | Any, *, layer: str | None = None) -> np.ndarray:
        """Return the outputs of cells (cell x out): predictions, or the logits of classes.

        Parameters
        ----------
        x, layer
            Cells with genes by name, or a matrix (cell x gene); layer to read, that of the training cells if None.

        Examples
        --------
        >>> linear = baselines.linear_baseline(train, validation)
        >>> linear.outputs(adata).shape
        (1000, 2)
        """
        names = pd.RangeIndex(self.weight.shape[1]) if self.gene_names is None else self.gene_names
        return product(match_genes(x, names, layer or self.layer, self.scaling), self.weight.T) + self.constant

    def score(self, dataset: ExpressionDataset) -> float:
        """Return the accuracy of classes, their mean recall if they were balanced, or R2 averaged over targets.

        Examples
        --------
        >>> linear = baselines.linear_baseline(*graded[:2])
        >>> round(float(linear.score(graded[2])), 2)
        0.9
        """
        outputs, target = self.outputs(dataset), dataset.y.numpy()
        return accuracy(outputs, target, self.class_weight) if target.ndim == 1 else r2_score(target, outputs)


def accuracy(outputs: np.ndarray, target: np.ndarray, class_weight: Literal["balanced"] | None = None) -> float:
    """Return the share of cells in their class; balanced, the mean of the classes' shares, of those that have cells."""
    predicted = outputs.argmax(axis=1)
    if class_weight is None:
        return accuracy_score(target, predicted)
    return recall_score(target, predicted, labels=np.unique(target), average="macro")


def class_counts(
    class_weight: Literal["balanced"] | None, y: np.ndarray, n_classes: int, own: np.ndarray | None = None
) -> np.ndarray:
    """Return how often a cell of each class counts (out), by codes of cells and how often each counts itself (cell)."""
    if class_weight is None:
        return np.ones(n_classes)
    sizes = np.bincount(y, own, n_classes)
    return np.divide(sizes.sum(), np.count_nonzero(sizes) * sizes, out=np.ones(n_classes), where=sizes > 0)


def linear_baseline(
    train: ExpressionDataset,
    val: ExpressionDataset,
    *,
    exact: bool = True,
    class_weight: Literal["balanced"] | None = None,
) -> LinearModel:
    """Fit ridge regression, or multinomial logistic regression for classes, with the penalty best on validation cells.

    Each target has its own penalty, all classes share one. Compare every bilinear model with this.

    Parameters
    ----------
    train, val
        Cells to fit, and cells that choose the penalty. Of stored cells, as many are drawn as 256 MB hold.
    exact
        Whether to try a fine grid of penalties; else a coarse one, a few times quicker.
    class_weight
        As in :class:`scbmlp.models.Config`; that of the model to compare with.

    Examples
    --------
    >>> linear = baselines.linear_baseline(train, validation)
    >>> f"linear {linear.score(test):.2f}, bilinear {model.score(test):.2f}"
    'linear 0.47, bilinear 1.00'
    """
    for name, dataset in {"train": train, "val": val}.items():
        check_dataset(dataset, name)
    check_class_weight(class_weight, classes=train.y.ndim == 1)
    fitted, val = held(train), held(val)
    x, y, x_val, y_val = fitted.x, fitted.y.numpy(), match_genes(val, train.gene_names), val.y.numpy()
    if y.ndim == 2:
        model = ridge(Axes(x), y, x_val, y_val, exact=exact)
    else:
        counts = class_counts(class_weight, train.y.numpy(), len(train.output_names))
        model = _logistic(x, y, x_val, y_val, counts, exact)
    return replace(
        model, gene_names=train.gene_names, layer=train.layer, scaling=train.scaling, class_weight=class_weight
    )


def additive_features(x: Any) -> Any:
    """Return x, x^2 and 1[x > 0] of every gene (cell x 3 gene): their weighted sums are functions of single genes."""
    if sparse.issparse(x):
        x = sparse.csr_matrix(x)
        return sparse.hstack([x, x.multiply(x), (x > 0).astype(x.dtype)], format="csr")
    x = np.asarray(x)
    return np.hstack([x, x**2, (x > 0).astype(x.dtype)])


class Axes:
    """Products of training cells less their mean, or of features if fewer; if both are many, of ``MOST`` cells."""

    def __init__(self, x: Any) -> None:
        self.rows = some(x.shape[0], MOST if min(x.shape) > MOST else x.shape[0])
        self.x = x if len(self.rows) == x.shape[0] else x[self.rows]
        self.mean = np.asarray(self.x.mean(axis=0), dtype=np.float64).ravel()
        self.dual = self.x.shape[0] <= self.x.shape[1]
        self.products = _products(self.x, self.x, self.mean, self.dual)
        self.unit = np.trace(self.products) / len(self.products)  # the mean eigenvalue

    @cached_property
    def turn(self) -> np.ndarray:
        """Return what turns products with cells, or features, into scores on principal axes (cell or gene x comp)."""
        values, vectors = np.linalg.eigh(self.products)
        kept = values > max(values[-1], 0) * 1e-12
        return vectors[:, kept] / np.sqrt(values[kept]) if self.dual else vectors[:, kept]

    def scores(self, x: Any) -> np.ndarray:
        """Return the scores of cells on principal axes (cell x comp)."""
        if self.dual:
            return (self.products if x is self.x else _products(x, self.x, self.mean, True)) @ self.turn
        return x @ self.turn - self.mean @ self.turn

    def model(self, turned: np.ndarray, constant: np.ndarray, penalty: np.ndarray) -> LinearModel:
        """Return the model that has these weights of products with the training cells, or of features (x out)."""
        weight = self.x.T @ turned - np.outer(self.mean, turned.sum(axis=0)) if self.dual else turned
        return LinearModel(weight.T, constant - weight.T @ self.mean, penalty)


def _products(a: Any, b: Any, mean: np.ndarray, dual: bool) -> np.ndarray:
    """Return products of the cells of `a` and `b`, or of the features of one, less `mean`, summed over blocks."""
    pair = [a] if a is b else [a, b]
    if dual:
        pair = [x.tocsc() if sparse.issparse(x) else x for x in pair]
    found = 0.0
    for start in range(0, a.shape[dual], 1000):
        part = slice(start, start + 1000)
        each = [x[:, part] if dual else x[part] for x in pair]
        # In float64: penalties go down to next to nothing, where rounding would look like a direction.
        each = [np.asarray(x.toarray() if sparse.issparse(x) else x, np.float64) for x in each]
        each = [x - (mean[part] if dual else mean) for x in each]
        found += each[0] @ each[-1].T if dual else each[0].T @ each[-1]
    return found


def ridge(axes: Axes, y: np.ndarray, x_val: Any, y_val: np.ndarray, *, exact: bool = True) -> LinearModel:
    """Fit ridge regression with the penalty of each target (cell x out) that does best on validation cells."""
    y = y[axes.rows].astype(np.float64)
    constant = np.flatnonzero(np.ptp(y, axis=0) == 0)
    if len(constant):
        raise ValueError(
            f"train has the same value in every cell for target {constant[0]} (counted from 0): there is no linear "
            f"baseline of a constant; drop the target, or fit with baseline=False."
        )
    mean = y.mean(axis=0)
    right = y - mean if axes.dual else axes.x.T @ (y - mean)

    def fit(penalty: float) -> tuple[LinearModel, np.ndarray]:
        system = axes.products.copy()
        system[np.diag_indices_from(system)] += penalty
        try:
            turned = cho_solve(cho_factor(system, overwrite_a=True), right)
        except LinAlgError:  # far beyond the grid: next to no penalty, and features that are copies of each other
            turned = np.full_like(right, np.nan)
        model = axes.model(turned, mean, np.full(len(mean), penalty))
        return model, ((x_val @ model.weight.T + model.constant - y_val) ** 2).mean(axis=0)

    fine = exact and len(axes.products) <= LARGE
    return _best(fit, axes.unit * (RIDGE if fine else QUICK_RIDGE))


def _logistic(x: Any, y: np.ndarray, x_val: Any, y_val: np.ndarray, counts: np.ndarray, exact: bool) -> LinearModel:
    """Fit multinomial logistic regression with the penalty best on validation cells, by each class's counts (out)."""
    if exact := exact and min(x.shape) <= LARGE:
        axes = Axes(x)  # on them the optimum is what it is on the features
        x, x_val, unit = axes.scores(x), axes.scores(x_val), axes.unit
    else:  # a few penalties on the features themselves, of as many cells as 400 MB hold
        rows, rows_val = (some(len(codes), int(1e8) // x.shape[1]) for codes in (y, y_val))
        x, x_val = dense_tensor(x[rows]).numpy(), dense_tensor(x_val[rows_val]).numpy()
        y, y_val, mean = y[rows], y_val[rows_val], x.mean(axis=0)
        x -= mean  # in place: a copy of either is as large as all else together
        x_val -= mean
        unit = np.square(x, dtype=np.float64).sum() / min(x.shape)
    classes, n_classes = np.unique(y), len(counts)
    if len(classes) < 2:
        raise ValueError(
            "train has cells of 1 class alone: there is no linear baseline where nothing can be told "
            "apart; add cells of other classes, or fit with baseline=False."
        )
    solver = LogisticRegression(warm_start=True, max_iter=1000, tol=5e-4 if exact else 1e-3)

    def fit(penalty: float) -> tuple[LinearModel, np.ndarray]:
        # Many small products: threads would wait for each other, on a busy machine for most of the time.
        with threadpool_limits(1):
            solver.set_params(C=1 / penalty).fit(x, y, counts[y])
        found, at_mean = solver.coef_, solver.intercept_
        if len(classes) == 2:  # one row of weights, the difference
            found, at_mean = np.vstack([-found, found]) / 2, np.append(-at_mean, at_mean) / 2
        # Classes without a training cell have no weights, and are never predicted.
        weight, constant = np.zeros((n_classes, x.shape[1])), np.full(n_classes, at_mean.min() - 10.0)
        weight[classes], constant[classes] = found, at_mean
        shares = softmax(x_val @ weight.T + constant, axis=1)
        loss = log_loss(y_val, shares, labels=range(n_classes), sample_weight=counts[y_val])
        return LinearModel(weight, constant, np.full(n_classes, penalty)), np.full(n_classes, loss)

    best = _best(fit, unit * (LOGISTIC if exact else QUICK_LOGISTIC))
    if exact:
        return axes.model(axes.turn @ best.weight.T, best.constant, best.penalty[0])
    return LinearModel(best.weight, best.constant - best.weight @ mean, best.penalty[0])


def _best(fit: Callable[[float], tuple[LinearModel, np.ndarray]], penalties: np.ndarray) -> LinearModel:
    """Return for each output the model of least loss (out), among the models that `fit` makes by their penalty."""
    known: dict[float, np.ndarray] = {}
    best, least = None, np.inf

    def attempt(penalty: float) -> None:
        nonlocal best, least
        model, known[penalty] = fit(penalty)
        best, better = best or model, known[penalty] < least
        for own, new in ((best.weight, model.weight), (best.constant, model.constant), (best.penalty, model.penalty)):
            own[better] = new[better]
        least = np.fmin(known[penalty], least)

    for penalty in np.sort(penalties)[::-1]:
        attempt(penalty)
    # More beyond an end that is ahead of the next to it, by a thousandth and by a share of the largest loss.
    ends, nothing = sorted(known), 1e-5 * np.max([*known.values()], axis=0)
    for end, beside, limit in ((ends[0], ends[1], ends[0] / BEYOND), (ends[-1], ends[-2], ends[-1] * BEYOND)):
        while (known[beside] - known[end] > np.maximum(1e-3 * known[beside], nothing)).any():
            beyond = end * end / beside
            if (beyond < limit) if end < beside else (beyond > limit):
                warn(
                    f"the best penalty of the linear baseline is the last of those tried, {end:.1e}: the baseline may "
                    f"be too weak; look at the scale of genes and targets."
                )
                break
            end, beside = beyond, end
            attempt(end)
    return best
