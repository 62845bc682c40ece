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
from scipy.linalg import solve
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss, r2_score, recall_score
from threadpoolctl import threadpool_limits

from scbmlp.checks import check_class_weight, warn
from scbmlp.datasets import ExpressionDataset, check_dataset, dense_tensor, held, match_genes, product, some

MOST = 8000  # cells, where features are more than that too
LARGE = 3000  # cells and features from which on a Cholesky decomposition a penalty is quicker than all eigenvectors
# Penalties, in units of the mean eigenvalue of the cells' scatter; more are tried while the best is an end.
RIDGE, QUICK_RIDGE = np.logspace(-8, 3, 23), np.logspace(-1.5, 1, 5)
LOGISTIC, QUICK_LOGISTIC = np.logspace(-2.5, 0.5, 7), np.logspace(-2, 0, 3)
BEYOND = 1e4  # how far beyond an end


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
    gene_names
        Names of the features, where they are genes: AnnData, DataFrames and datasets are matched by name.
    layer
        Layer of AnnData that it was fitted on, and reads again; None for ``X``.
    class_weight
        How classes were weighted, and are in the score.
    """

    weight: np.ndarray
    constant: np.ndarray
    penalty: np.ndarray
    gene_names: pd.Index | None = None
    layer: str | None = None
    class_weight: Literal["balanced"] | None = None

    def outputs(self, x: AnnData | ExpressionDataset | Any, *, layer: str | None = None) -> np.ndarray:
        """Return the outputs of cells (cell x out): predictions, or the logits of classes.

        Parameters
        ----------
        x
            AnnData, a DataFrame or a dataset, whose genes are matched by name, or a matrix with the features in order
            (cell x gene).
        layer
            Layer of AnnData to read; that of the training cells if None.

        Raises
        ------
        KeyError
            AnnData or a dataset lacks some of the genes.
        ValueError
            The number of features is another.

        Examples
        --------
        >>> linear = baselines.linear_baseline(train, validation)
        >>> linear.outputs(adata).shape
        (1000, 2)
        """
        names = pd.RangeIndex(self.weight.shape[1]) if self.gene_names is None else self.gene_names
        return product(match_genes(x, names, layer or self.layer), self.weight.T) + self.constant

    def score(self, dataset: ExpressionDataset) -> float:
        """Return the accuracy of classes, their mean recall if they were balanced, or R2 averaged over targets.

        Parameters
        ----------
        dataset
            Cells with their targets.

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
) -> np.ndarray | None:
    """Return how often a cell of each class counts (out), once where none is known; None if all count alike.

    `y` are the class codes of the training cells, `own` how often each of them counts by itself (both cell).
    """
    if class_weight is None:
        return None
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

    Whatever a bilinear model claims, it claims against this. Penalties are a grid around the mean eigenvalue of the
    cells' scatter, which grows while the best is an end of it; validation cells choose one for each target by squared
    error, or one for all classes by log-loss.

    Parameters
    ----------
    train, val
        Cells to fit, and cells that choose the penalty. Of stored cells as many are drawn as 256 MB hold.
    exact
        Whether to try a fine grid on principal axes, where a penalty is cheap once they are known; else a coarse one,
        a few times quicker.
    class_weight
        As in :class:`scbmlp.models.Config`, for training and validation cells; that of the model to compare with.

    Raises
    ------
    ValueError
        There is one class, a target is constant, or `class_weight` is unknown, or given where there are no classes.

    Examples
    --------
    >>> linear = baselines.linear_baseline(train, validation)
    >>> f"linear {linear.score(test):.2f}, bilinear {model.score(test):.2f}"
    'linear 0.47, bilinear 1.00'
    """
    for name, dataset in {"train": train, "val": val}.items():
        check_dataset(dataset, name)
    check_class_weight(class_weight, classes=train.y.ndim == 1)
    counts = class_counts(class_weight, train.y.numpy(), len(train.output_names))
    model = _linear(held(train), held(val), exact, counts)
    return replace(model, gene_names=train.gene_names, layer=train.layer, class_weight=class_weight)


def _linear(train: ExpressionDataset, val: ExpressionDataset, exact: bool, counts: np.ndarray | None) -> LinearModel:
    x, x_val = train.x, match_genes(val, train.gene_names)
    y, y_val = train.y.numpy(), val.y.numpy()
    if y.ndim == 2:
        return ridge(Axes(x), y, x_val, y_val, exact=exact)
    n_classes = len(train.output_names)
    if exact:
        return logistic(Axes(x), y, x_val, y_val, n_classes, counts=counts)
    return _quick_logistic(x, y, x_val, y_val, n_classes, counts)


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
    that many cells are drawn. ``large`` says that eigenvectors would take long: then a few penalties are tried without.

    Parameters
    ----------
    x
        Training cells, sparse or dense (cell x gene).
    """

    def __init__(self, x: Any) -> None:
        self.rows = some(x.shape[0], MOST if min(x.shape) > MOST else x.shape[0])
        self.x = x if len(self.rows) == x.shape[0] else x[self.rows]
        self.mean = np.asarray(self.x.mean(axis=0), dtype=np.float64).ravel()
        self.dual = self.x.shape[0] <= self.x.shape[1]
        self.products = _between_cells(self.x, self.x, self.mean) if self.dual else _scatter(self.x, self.mean)
        self.large = len(self.products) > LARGE
        self._projected: tuple[Any, np.ndarray] | None = None
        self.unit = np.trace(self.products) / len(self.products)  # the mean eigenvalue, in which penalties are told

    @cached_property
    def _eigen(self) -> tuple[np.ndarray, np.ndarray]:
        """Return squared singular values (comp), rising, and what turns products with cells or features into scores."""
        values, vectors = np.linalg.eigh(self.products)
        kept = values > max(values[-1], 0) * 1e-12
        values, vectors = values[kept], vectors[:, kept]
        return values, vectors / np.sqrt(values) if self.dual else vectors

    @property
    def strength(self) -> np.ndarray:
        """Squared singular values of the training cells (comp), rising."""
        return self._eigen[0]

    @cached_property
    def scores(self) -> np.ndarray:
        """Scores of the training cells (cell x comp)."""
        return self.products @ self._eigen[1] if self.dual else self.project(self.x)

    def project(self, x: Any) -> np.ndarray:
        """Return the scores of cells (cell x comp)."""
        if self._projected is None or self._projected[0] is not x:  # the same cells come for several targets
            turn = self._eigen[1]
            scores = _between_cells(x, self.x, self.mean) @ turn if self.dual else x @ turn - self.mean @ turn
            self._projected = x, scores
        return self._projected[1]

    def model(self, coefficients: np.ndarray, constant: np.ndarray, penalty: np.ndarray) -> LinearModel:
        """Return the model of the features that has these coefficients of the scores (comp x out)."""
        return self.unturned(self._eigen[1] @ coefficients, constant, penalty)

    def unturned(self, turned: np.ndarray, constant: np.ndarray, penalty: np.ndarray) -> LinearModel:
        """Return the model of the features from weights of the training cells, or of the features if not dual."""
        weight = self.x.T @ turned - np.outer(self.mean, turned.sum(axis=0)) if self.dual else turned
        return LinearModel(weight.T, constant - weight.T @ self.mean, penalty)


def ridge(axes: Axes, y: np.ndarray, x_val: Any, y_val: np.ndarray, *, exact: bool = True) -> LinearModel:
    """Fit ridge regression with the penalty of each target (cell x out) that does best on validation cells.

    Parameters
    ----------
    axes
        Axes of the training cells.
    y
        Targets of the training cells (cell x out).
    x_val, y_val
        Features (cell x gene) and targets (cell x out) of the validation cells.
    exact
        Whether to try a fine grid, where `axes` are not large; else a coarse one.

    Raises
    ------
    ValueError
        A target is constant.
    """
    mean, centred = _centred(axes, y)
    exact = exact and not axes.large
    if exact:
        products, at_val = axes.scores.T @ centred, axes.project(x_val)
    else:
        right = centred if axes.dual else axes.x.T @ centred

    def fit(penalty: float) -> tuple[np.ndarray, np.ndarray]:
        if exact:
            found = products / (axes.strength + penalty)[:, None]
            return found, at_val @ found + mean
        system = axes.products.copy()
        system[np.diag_indices_from(system)] += penalty
        found = solve(system, right, assume_a="pos", overwrite_a=True)
        return found, axes.unturned(found, mean, penalty).outputs(x_val)

    best = _best(fit, axes.unit * (RIDGE if exact else QUICK_RIDGE), mean, y_val)
    return axes.model(*best) if exact else axes.unturned(*best)


def _centred(axes: Axes, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y = y[axes.rows].astype(np.float64)
    constant = np.flatnonzero(np.ptp(y, axis=0) == 0)
    if len(constant):
        raise ValueError(
            f"train has the same value in every cell for target {constant[0]} (counted from 0): there is no linear "
            f"baseline of a constant; drop the target, or fit with baseline=False."
        )
    return y.mean(axis=0), y - y.mean(axis=0)


def _best(
    fit: Callable[[float], tuple[np.ndarray, np.ndarray]], penalties: np.ndarray, mean: np.ndarray, y_val: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the coefficients (comp x out), the mean and the penalty (out) of least squared error for each target."""
    best, error, chosen = None, np.full(y_val.shape[1], np.inf), np.zeros(y_val.shape[1])

    def loss(penalty: float) -> np.ndarray:
        nonlocal best, error, chosen
        found, predicted = fit(penalty)
        here = ((predicted - y_val) ** 2).mean(axis=0)
        better = here < error
        best = found if best is None else np.where(better, found, best)
        error, chosen = np.minimum(here, error), np.where(better, penalty, chosen)
        return here

    _try_penalties(loss, penalties)
    return best, mean, chosen


def _try_penalties(loss: Callable[[float], np.ndarray], penalties: np.ndarray) -> None:
    """Try penalties from the largest on, and more beyond an end that is ahead of the next to it for any output (out).

    An end that is ahead by less than a thousandth, or by next to nothing of the largest loss, is level.
    """
    known = {penalty: np.atleast_1d(loss(penalty)) for penalty in np.sort(penalties)[::-1]}
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
            known[end] = np.atleast_1d(loss(end))


def logistic(
    axes: Axes,
    y: np.ndarray,
    x_val: Any,
    y_val: np.ndarray,
    n_classes: int,
    *,
    counts: np.ndarray | None = None,
) -> LinearModel:
    """Fit multinomial logistic regression to class codes (cell), with the penalty that does best on validation cells.

    Parameters
    ----------
    axes
        Axes of the training cells; on them the optimum is what it is on the features.
    y
        Class codes of the training cells (cell).
    x_val, y_val
        Features (cell x gene) and class codes (cell) of the validation cells.
    n_classes
        Number of classes, those without a training cell included.
    counts
        How often a cell of each class counts, in training and validation (out); all alike if None.

    Raises
    ------
    ValueError
        There are cells of one class alone.
    """
    y = y[axes.rows]
    if axes.large:
        return _quick_logistic(axes.x, y, x_val, y_val, n_classes, counts)
    found = _logistic(axes.scores, y, axes.project(x_val), y_val, n_classes, axes.unit * LOGISTIC, 5e-4, counts)
    return axes.model(*found)


def _quick_logistic(
    x: Any, y: np.ndarray, x_val: Any, y_val: np.ndarray, n_classes: int, counts: np.ndarray | None
) -> LinearModel:
    """Do as :func:`logistic` for a few penalties on the features themselves, of as many cells as 400 MB hold."""
    rows, rows_val = (some(len(cells), int(1e8) // x.shape[1]) for cells in (y, y_val))
    dense, dense_val = dense_tensor(x[rows]).numpy(), dense_tensor(x_val[rows_val]).numpy()
    mean = dense.mean(axis=0)
    dense -= mean  # in place: a copy of either is as large as all else together
    dense_val -= mean
    unit = np.square(dense, dtype=np.float64).sum() / min(dense.shape)
    weights, constant, penalty = _logistic(
        dense, y[rows], dense_val, y_val[rows_val], n_classes, unit * QUICK_LOGISTIC, 1e-3, counts
    )
    return LinearModel(weights.T, constant - weights.T @ mean, penalty)


def _logistic(
    x: np.ndarray,
    y: np.ndarray,
    x_val: np.ndarray,
    y_val: np.ndarray,
    n_classes: int,
    penalties: np.ndarray,
    tol: float,
    counts: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.float64]:
    """Return the weights of centred features (feature x out), the constant (out) and the penalty."""
    classes = np.unique(y)
    if len(classes) < 2:
        raise ValueError(
            f"train has cells of {len(classes)} class alone: there is no linear baseline where nothing can be told "
            f"apart; add cells of other classes, or fit with baseline=False."
        )
    fit = LogisticRegression(warm_start=True, max_iter=1000, tol=tol)
    best, error = None, np.inf
    own, own_val = (None if counts is None else counts[codes] for codes in (y, y_val))

    def loss(penalty: float) -> float:
        nonlocal best, error
        # Many small products: threads would wait for each other, on a busy machine for most of the time.
        with threadpool_limits(1):
            fit.set_params(C=1 / penalty).fit(x, y, own)
        # Two classes have one row of weights, the difference; classes without a training cell have none.
        rows = np.vstack([-fit.coef_, fit.coef_]) / 2 if len(classes) == 2 else fit.coef_
        at_mean = np.append(-fit.intercept_, fit.intercept_) / 2 if len(classes) == 2 else fit.intercept_
        weights, constant = np.zeros((x.shape[1], n_classes)), np.full(n_classes, at_mean.min() - 10.0)
        weights[:, classes], constant[classes] = rows.T, at_mean
        shares = softmax(x_val @ weights + constant, axis=1)
        here = log_loss(y_val, shares, labels=range(n_classes), sample_weight=own_val)
        if here < error:
            best, error = (weights, constant, np.float64(penalty)), here
        return here

    _try_penalties(loss, penalties)
    return best


def _between_cells(a: Any, b: Any, mean: np.ndarray, size: int = 1000) -> np.ndarray:
    """Return the products of the cells of `a` and `b`, less `mean`, summed over blocks of features."""
    same = a is b
    a, b = (x.tocsc() if sparse.issparse(x) else x for x in (a, b))
    products = np.zeros((a.shape[0], b.shape[0]))
    for start in range(0, len(mean), size):
        part = slice(start, start + size)
        first = _dense(a[:, part]) - mean[part]
        products += first @ (first if same else _dense(b[:, part]) - mean[part]).T
    return products


def _scatter(x: Any, mean: np.ndarray, size: int = 1000) -> np.ndarray:
    """Return the products of features, less their means, summed over blocks of cells."""
    products = np.zeros((len(mean),) * 2)
    for start in range(0, x.shape[0], size):
        block = _dense(x[start : start + size]) - mean
        products += block.T @ block
    return products


def _dense(x: Any) -> np.ndarray:
    """Return a block in float64: penalties go down to next to nothing, where rounding would look like a direction."""
    return np.asarray(x.toarray() if sparse.issparse(x) else x, dtype=np.float64)
