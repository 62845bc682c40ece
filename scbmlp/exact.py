"""The exact second-order model, y = c + w'd + d'Qd: nested convex fits, solved and not trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import block_diag, eigh
from torch import Tensor

from scbmlp.baselines import class_counts
from scbmlp.datasets import ExpressionDataset, Matrix, dense_tensor

CURVATURE = 0.1  # of the log-loss, where a fit starts to learn it
KEPT = 8  # blocks, whose products take much memory
FEATURES = 250  # of each block, that a search among models of classes makes do with


class Mixture(NamedTuple):
    """How much each block of features counts in a model.

    Parameters
    ----------
    weights
        Weights of ``genes``, ``components``, ``products``, and of a rival's ``presence``, ``squares``, ``depth``.
    rank, space
        Number of leading principal components; and what products are of: ``"components"``, ``"genes"``, or ``"sd"``,
        genes in units of their standard deviation.

    Examples
    --------
    >>> exact.Mixture().plus("products", 0.5).weights
    (('genes', 1.0), ('products', 0.5))
    """

    weights: tuple[tuple[str, float], ...] = (("genes", 1.0),)
    rank: int = 30
    space: str = "components"

    def plus(self, block: str, weight: float, **changes: Any) -> Mixture:
        """Return the mixture with another weight of one block."""
        weights = tuple(dict(self.weights, **{block: weight}).items())
        return self._replace(weights=weights, **changes)

    def weight(self, block: str) -> float:
        """Return the weight of a block, 0 without it."""
        return dict(self.weights).get(block, 0.0)


class Kernels:
    """Products of cells in the features of every block, less the training mean, in units of their mean squared norm.

    `counts` is how often each training cell counts (cell); products with training cells are of these and of others.
    """

    def __init__(
        self,
        x: Matrix,
        *others: Matrix,
        counts: np.ndarray | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.to = {"device": device, "dtype": dtype}
        self._cells = [dense_tensor(part).double() for part in (x, *others)]
        self.counts = torch.as_tensor(np.ones(x.shape[0]) if counts is None else counts)
        self.share = self.counts / self.counts.sum()
        self.mean = self.share @ self._cells[0]
        self.d = [part - self.mean for part in self._cells]
        self._known: dict[str, tuple[list[Tensor], float]] = {}
        self._leading: dict[str, list[Tensor]] = {}
        self._axes, self._sought = torch.empty(x.shape[1], 0), 0  # fewer may be there than were sought
        self._mixed: tuple[Mixture | None, list[Tensor]] = None, []

    def __len__(self) -> int:
        return len(self.d[0])

    def axes(self, rank: int) -> Tensor:
        """Return the leading principal axes (gene x comp), fewer where there are fewer."""
        size = min(self.d[0].shape)
        if self._axes.shape[1] < rank and self._sought < min(rank, size):
            self._sought = min(max(rank, 100), size)
            d = (self.d[0] * self.share.sqrt()[:, None]).numpy()
            dual = d.shape[0] < d.shape[1]
            small = d @ d.T if dual else d.T @ d
            values, vectors = eigh(small, subset_by_index=[size - self._sought, size - 1], check_finite=False)
            kept = values > max(values[-1], 0) * 1e-10
            values, vectors = values[kept][::-1], vectors[:, kept][:, ::-1]
            self._axes = torch.as_tensor(d.T @ (vectors / np.sqrt(values)) if dual else vectors.copy())
        return self._axes[:, :rank]

    def scores(self, rank: int) -> list[Tensor]:
        """Return the scores of the training cells, and of the others, on the leading axes (each cell x comp)."""
        return [part @ self.axes(rank) for part in self.d]

    def factors(self, block: str, rank: int, space: str) -> list[Tensor]:
        """Return the features of a block, of products what is multiplied (each cell x feature)."""
        kind = space if block == "products" else block
        if kind == "genes":
            return self.d
        if kind == "sd":
            return [part / self.sd for part in self.d]
        if kind == "components":
            return self.scores(rank)
        if kind == "presence":
            return [(part > 0).double() for part in self._cells]
        if kind == "squares":
            return [part**2 for part in self._cells]
        # Depth and number of genes, their squares, and either times the components.
        depth = [torch.stack([part.sum(dim=1), (part > 0).sum(dim=1)], dim=1) for part in self._cells]
        mean = self.share @ depth[0]
        sd = (self.share @ (depth[0] - mean) ** 2).sqrt()
        depth = [(part - mean) / torch.where(sd > 0, sd, 1) for part in depth]
        scores = self.scores(rank)
        unit = (self.share @ scores[0] ** 2).sum().sqrt()
        each = zip(depth, scores, strict=True)
        return [torch.cat([a, a**2, *(b * c[:, None] / unit for c in a.T)], dim=1) for a, b in each]

    def back(self, rank: int, space: str) -> Tensor:
        """Return what turns factors of products to genes (factor x gene)."""
        if space == "components":
            return self.axes(rank).T
        return torch.diag(1 / self.sd if space == "sd" else torch.ones_like(self.sd))

    @cached_property
    def sd(self) -> Tensor:
        """Standard deviation of every gene (gene), 1 where a gene does not vary."""
        sd = (self.share @ self.d[0] ** 2).sqrt()
        return torch.where(sd > 1e-6 * self.mean.abs(), sd, 1)  # what rounding leaves of a constant is no unit

    def block(self, name: str, rank: int, space: str) -> tuple[list[Tensor], float]:
        """Return the products of all cells with the training cells, and the scale that was taken off."""
        key = name if name in ("genes", "presence", "squares") else f"{name} {rank if space == 'components' else space}"
        known = self._known.pop(key, None)
        if known is None:
            features = [part.to(**self.to) for part in self.factors(name, rank, space)]
            share = self.share.to(**self.to)
            found = [part @ features[0].T for part in features]
            found = [part**2 for part in found] if name == "products" else found
            mean = found[0] @ share
            found = [part - (part @ share)[:, None] - mean + share @ mean for part in found]
            scale = float(share @ found[0].diagonal()) or 1.0
            known = [part / scale for part in found], scale
        self._known[key] = known  # at the end: what was not used for longest goes first
        if len(self._known) > KEPT:
            del self._known[next(iter(self._known))]
        return known

    def leading_features(self, mixture: Mixture) -> list[Tensor]:
        """Return the leading features of every block of a mixture (each cell x feature), for a search among many."""
        found = []
        for name, weight in mixture.weights:
            key = name if name == "genes" else f"{name} {mixture.rank} {mixture.space}"
            if key not in self._leading:
                self._leading[key] = self._principal(name, mixture)
            found.append([part * weight**0.5 for part in self._leading[key]])
        return [torch.cat(parts, dim=1) for parts in zip(*found, strict=True)]

    def _principal(self, name: str, mixture: Mixture) -> list[Tensor]:
        """Return the leading principal components of one block (each cell x comp)."""
        if name in ("genes", "components"):
            scores = self.scores(2 * FEATURES if name == "genes" else mixture.rank)
            unit = (self.share @ (self.d if name == "genes" else scores)[0] ** 2).sum().sqrt()
            return [(part / unit).to(**self.to) for part in scores]
        if name == "products" and mixture.space == "components" and mixture.rank**2 < len(self):
            features = [products_of(part) for part in self.scores(mixture.rank)]
            features = [part - self.share @ features[0] for part in features]
            root = self.share.sqrt()[:, None]
            values, vectors = eigh(((features[0] * root).T @ (features[0] * root)).numpy(), check_finite=False)
            turn = torch.as_tensor(vectors[:, -FEATURES:].copy()) / values.sum() ** 0.5
            return [(part @ turn).to(**self.to) for part in features]
        products, _ = self.block(name, mixture.rank, mixture.space)
        size, root = len(self), self.counts.sqrt().to(products[0])
        system = (products[0] * root * root[:, None]).cpu().numpy()
        values, vectors = eigh(system, subset_by_index=[max(size - FEATURES, 0), size - 1], check_finite=False)
        kept = values > max(values[-1], 0) * 1e-6
        turn = torch.as_tensor(vectors[:, kept] / np.sqrt(values[kept])).to(root) * root[:, None]
        return [part @ turn for part in products]

    def mixed(self, mixture: Mixture) -> list[Tensor]:
        """Return the products of all cells with the training cells (each cell x cell) in a mixture of blocks."""
        if self._mixed[0] != mixture:  # the last one is kept for the next penalty
            self._mixed = None, []
            blocks = [(self.block(name, *mixture[1:])[0], weight) for name, weight in mixture.weights if weight]
            found = [part * blocks[0][1] for part in blocks[0][0]]
            for parts, weight in blocks[1:]:
                for whole, part in zip(found, parts, strict=True):
                    whole.add_(part, alpha=weight)
            self._mixed = mixture, found
        return self._mixed[1]

    def solved(self, train: ExpressionDataset, mixture: Mixture, ratio: float, here: list[int]) -> tuple[Any, ...]:
        """Return constant (out), direct (out x gene), hidden (hid x gene) and power (out x hid) of some outputs."""
        products = self.mixed(mixture)[0]
        y = targets_of(train, len(train.output_names))[:, here].to(products)
        fit = (softmax if train.y.ndim == 1 else ridge)(products, y, ratio, self.counts)
        # Features are less their mean, and so are the weights of the cells.
        cells = fit.cells.double().cpu()
        cells = cells - self.share[:, None] * cells.sum(dim=0)
        constant, direct = fit.constant.cpu().numpy(), torch.zeros(len(here), len(self.mean), dtype=torch.float64)
        hidden, power = np.zeros((0, len(self.mean))), np.zeros((len(here), 0))
        for name, weight in mixture.weights:
            if not weight:
                continue
            cells_of = cells * (weight / self.block(name, mixture.rank, mixture.space)[1])
            if name == "genes":
                direct += (self.d[0].T @ cells_of).T
            elif name == "components":
                direct += (self.axes(mixture.rank) @ (self.scores(mixture.rank)[0].T @ cells_of)).T
            else:
                hidden, power, means = self._squares(mixture, cells_of)
                constant = constant - means
        return constant, direct.numpy(), hidden, power

    def _squares(self, mixture: Mixture, cells: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return hidden units (hid x gene), what they add to outputs (out x hid), and that in the mean (out)."""
        features, back = self.factors("products", *mixture[1:])[0], self.back(*mixture[1:])
        second = features.T @ (features * self.share[:, None])
        means = (((features @ second) * features).sum(dim=1) @ cells).numpy()
        if features.shape[1] * cells.shape[1] > len(features):  # fewer cells than eigenvectors: Q sums over cells
            return (features @ back).numpy(), cells.T.numpy(), means
        return *squares_of([features.T @ (features * own[:, None]) for own in cells.T], back), means


def products_of(scores: Tensor) -> Tensor:
    """Return products of scores (cell x product), so that those of fewer components come first."""
    j, i = torch.tril_indices(scores.shape[1], scores.shape[1])
    return scores[:, i] * scores[:, j] * torch.where(i == j, 1.0, torch.tensor(2.0).double().sqrt()).to(scores)


class Fit(NamedTuple):
    """Outputs that are ``constant`` (out) + products with the training cells @ ``cells`` (cell x out)."""

    cells: Tensor
    constant: Tensor

    def outputs(self, products: Tensor) -> Tensor:
        """Return the outputs of cells (cell x out) by their products with the training cells."""
        return products @ self.cells + self.constant


def ridge(products: Tensor, y: Tensor, ratio: float, counts: Tensor) -> Fit:
    """Solve ridge regression on products of the training cells; the penalty is `ratio` times the sum of `counts`."""
    counts = counts.to(y)
    root, mean = counts.sqrt()[:, None], counts @ y / counts.sum()
    system = products.clone() if (counts == 1).all() else products * root * root.T
    system.diagonal().add_(ratio * counts.sum())
    factor = torch.linalg.cholesky(system)
    return Fit(torch.cholesky_solve((y - mean) * root, factor) * root, mean)


def softmax(
    products: Tensor | None,
    y: Tensor,
    ratio: float,
    counts: Tensor,
    *,
    features: Tensor | None = None,
    gram: Tensor | None = None,
    start: Fit | None = None,
    few: tuple[Tensor, Tensor, Tensor] | None = None,
    tol: float = 1e-10,
) -> Fit:
    """Solve multinomial logistic regression by L-BFGS and a bound of the curvature :cite:p:`bohning1992`.

    The fit has weights of the training cells by `products`, or of `features`. A step gains `tol` nats a cell at least.
    Features, classes and counts of a `few` cells, which are fitted first, say where to start and what the curvature is.
    """
    if few is not None:
        start = softmax(None, few[1], ratio, few[2], features=few[0], tol=tol)
    dual, weight = features is None, counts.to(y)[:, None]
    n, penalty = float(counts.sum()), ratio * float(counts.sum())
    if gram is None:
        gram = products if dual else features.T @ (features * weight)
    # One inverse serves all steps. The curvature is at most a half; a tenth is nearer where classes are told well.
    bound = gram * CURVATURE
    raised = penalty + torch.finfo(bound.dtype).eps * float(bound.diagonal().sum())  # above what rounding leaves
    bound.diagonal().add_(raised)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(bound)).to(y)
    size, newton = len(bound), None
    if few is not None:
        newton = _newton(few[0], few[2].to(y) * (n / float(few[2].sum())), start, penalty, inverse)
    if start is None:
        start = Fit(y.new_zeros(size, y.shape[1]), torch.log((weight * y).sum(dim=0).clamp_min(1e-3) / n))
    # A point is weights, constant and outputs. Of cells, a slope is products @ slope: outputs take its inner products.
    point = torch.cat([start.cells, start.constant[None], (products if dual else features) @ start.cells])

    def value(point: Tensor) -> float:
        at, constant, out = point.split([size, 1, len(y)])
        fitted = (weight * y * torch.log_softmax(out + constant, dim=1)).sum()
        return float(penalty / 2 * (at * (out if dual else at)).sum() - fitted)

    def slope(point: Tensor) -> Tensor:
        at, constant, out = point.split([size, 1, len(y)])
        left = weight * (torch.softmax(out + constant, dim=1) - y)
        of_at, of_constant = (left if dual else features.T @ left) + penalty * at, left.sum(dim=0, keepdim=True)
        return torch.cat([of_constant, of_at] if dual else [of_at, of_constant])

    def bounded(turn: Tensor) -> Tensor:
        if newton:
            step = newton(turn)
            return torch.cat([step, features @ step[:-1]])
        of_at, of_constant = (turn[1:], turn[:1]) if dual else (turn[:-1], turn[-1:])
        step = inverse @ of_at
        out = (of_at - raised * step) / CURVATURE if dual else features @ step  # products @ step, without a product
        return torch.cat([step, of_constant / (n * CURVATURE), out])

    own, kept = slice(size, None) if dual else slice(size + 1), 1 if newton else 5
    point = _minimum(point, value, slope, bounded, own, tol * n, kept)
    return Fit(point[:size], point[size])


def _newton(features: Tensor, counts: Tensor, fit: Fit, penalty: float, inverse: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what takes a slope to a step, by conjugate gradients and the curvature of some cells at a fit."""
    share, counts = torch.softmax(fit.outputs(features), dim=1), counts[:, None]

    def curved(step: Tensor) -> Tensor:
        out = features @ step[:-1] + step[-1:]
        left = counts * share * (out - (share * out).sum(dim=1, keepdim=True))
        return torch.cat([features.T @ left + penalty * step[:-1], left.sum(dim=0, keepdim=True)])

    def near(turn: Tensor) -> Tensor:
        return torch.cat([inverse @ turn[:-1], turn[-1:] / (counts.sum() * CURVATURE)])

    def newton(turn: Tensor) -> Tensor:
        step, left = torch.zeros_like(turn), turn
        way = close = near(left)
        norm = first = float((left * close).sum())
        for _ in range(200):
            bend = curved(way)
            length = norm / float((way * bend).sum())
            step, left = step + length * way, left - length * bend
            close = near(left)
            before, norm = norm, float((left * close).sum())
            if norm < 1e-4 * first:
                break
            way = close + norm / before * way
        return step

    return newton


def _minimum(
    point: Tensor,
    value: Callable[[Tensor], float],
    slope: Callable[[Tensor], Tensor],
    bounded: Callable[[Tensor], Tensor],
    own: slice,
    least: float,
    kept: int,
) -> Tensor:
    """Walk by L-BFGS until a step gains too little: `bounded` is its first guess, slopes are multiplied with `own`."""
    here, turn = value(point), slope(point)
    known: list[tuple[Tensor, Tensor, float]] = []  # changes of points and slopes
    for _ in range(2000):
        left, shares = turn, []
        for change, bend, scale in reversed(known):
            shares.append(scale * (change[own] * left).sum())
            left = left - shares[-1] * bend
        step = bounded(left)
        for (change, bend, scale), share in zip(known, reversed(shares), strict=True):
            step = step + (share - scale * (bend * step[own]).sum()) * change
        gain, length = float((step[own] * turn).sum()), 1.0
        if not gain > least:
            break
        while not (there := value(new := point - length * step)) <= here - 1e-4 * length * gain:
            length /= 2
            if length <= 1e-4:  # no step is better within rounding
                return point
        change, bend = new - point, (after := slope(new)) - turn
        curvature = float((change[own] * bend).sum())
        if curvature > 0:
            known = [*known[-kept:], (change, bend, 1 / curvature)]
        point, turn, here = new, after, there
    return point


def counts_of(dataset: ExpressionDataset, train: ExpressionDataset, class_weight: str | None) -> np.ndarray:
    """Return how often each cell counts, by the classes of the training cells (cell)."""
    if train.y.ndim == 2:
        return np.ones(len(dataset))
    return class_counts(class_weight, train.y.numpy(), len(train.output_names))[dataset.y.numpy()]


def targets_of(dataset: ExpressionDataset, n_outputs: int) -> Tensor:
    """Return targets, or classes as 0 and 1, in double precision (cell x out)."""
    y = dataset.y
    return torch.eye(n_outputs, dtype=torch.float64)[y] if y.ndim == 1 else y.double()


class Solution(NamedTuple):
    """A second-order model of d, a cell less the mean cell: constant + direct d + power (hidden d)^2.

    Parameters
    ----------
    mean, constant, direct
        Mean training cell (gene), the outputs there (out), and linear weights (out x gene).
    hidden, power
        What is squared (hid x gene), and what each square adds to the outputs (out x hid).
    """

    mean: np.ndarray
    constant: np.ndarray
    direct: np.ndarray
    hidden: np.ndarray
    power: np.ndarray


def solution(
    train: ExpressionDataset,
    mixtures: Sequence[Mixture],
    ratios: Sequence[float],
    *,
    counts: np.ndarray | None = None,
    device: str | torch.device = "cpu",
    known: Any = None,
) -> Solution:
    """Solve a model whose mixture and penalty are known, one for every output or one for all classes.

    Parameters
    ----------
    train, counts, device
        Cells to fit, with their targets; how often each counts (cell), once if None; and where to solve.
    mixtures, ratios
        Mixture and penalty of each output; one alone for classes.
    known
        Sums over the cells, ``moments.Moments``, to solve from; products of cells are taken if None.

    Examples
    --------
    >>> mixture = exact.Mixture().plus("products", 1.0)
    >>> found = exact.solution(train, [mixture], [1e-3])
    >>> found.direct.shape, found.hidden.shape
    ((2, 40), (60, 40))
    """
    known = Kernels(train.x, counts=counts, device=device) if known is None else known
    n_outputs, n_genes = len(train.output_names), len(known.mean)
    constant, direct = np.zeros(n_outputs), np.zeros((n_outputs, n_genes))
    hidden, power = [], []
    for mixture, ratio, here in alike(mixtures, ratios, n_outputs):
        constant[here], direct[here], units, own = known.solved(train, mixture, ratio, here)
        if len(units):
            hidden.append(units)
            power.append(np.zeros((n_outputs, len(units))))
            power[-1][here] = own
    if not hidden:  # no product pays: one hidden unit that adds nothing
        hidden, power = [np.zeros((1, n_genes))], [np.zeros((n_outputs, 1))]
    return Solution(known.mean.numpy(), constant, direct, np.vstack(hidden), np.hstack(power))


def alike(
    mixtures: Sequence[Mixture], ratios: Sequence[float], n_outputs: int
) -> Iterator[tuple[Mixture, float, list[int]]]:
    """Yield each mixture and penalty, and the outputs that have them: all outputs, if there is one pair."""
    pairs = list(zip(mixtures, ratios, strict=True))
    for pair in dict.fromkeys(pairs):
        here = [i for i, own in enumerate(pairs) if own == pair]
        yield *pair, here if len(pairs) > 1 else list(range(n_outputs))


def squares_of(matrices: Iterable[Tensor], back: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvectors of each output's matrix, turned back to genes (hid x gene), and their power (out x hid)."""
    values, vectors = zip(*map(torch.linalg.eigh, matrices), strict=True)
    return np.vstack([(each.T @ back).numpy() for each in vectors]), block_diag(*(each.numpy() for each in values))
