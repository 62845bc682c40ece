"""The exact second-order model, y = c + w'd + d'Qd: nested convex fits, solved and not trained."""

from __future__ import annotations

from collections.abc import Sequence
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
        Pairs of the name of a block and its weight. ``genes``, ``components`` and ``products`` make up the second-order
        model; ``presence``, ``squares`` and ``depth`` are those of rivals without products.
    rank
        Number of leading principal components that ``components``, ``products`` and ``depth`` are of.
    space
        What products are of: ``"components"``, ``"genes"``, or ``"sd"`` for genes in units of their standard deviation.

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
        """Return the weight of a block, 0 if it is not in the mixture."""
        return dict(self.weights).get(block, 0.0)


class Kernels:
    """Products of cells in the features of every block, less the training mean, in units of their mean squared norm.

    A block is known by these products alone, so that its number of features does not matter: products of components,
    or of genes, are squares of products of cells.

    Parameters
    ----------
    x
        Training cells (cell x gene).
    others
        Cells to predict, such as validation cells (each cell x gene).
    counts
        How often each training cell counts (cell); once if None.
    device, dtype
        Where products are taken, and how precisely.

    Examples
    --------
    >>> kernels = exact.Kernels(train.x, test.x)
    >>> [tuple(part.shape) for part in kernels.mixed(exact.Mixture())]
    [(700, 700), (150, 700)]
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
        cells = [dense_tensor(part).double() for part in (x, *others)]
        self.counts = torch.ones(len(cells[0]), dtype=torch.float64) if counts is None else torch.as_tensor(counts)
        share = self.counts / self.counts.sum()
        self.mean = share @ cells[0]
        self._cells = cells
        self.d = [part - self.mean for part in cells]
        self.share = share
        self._known: dict[str, tuple[list[Tensor], float]] = {}
        self._leading: dict[str, list[Tensor]] = {}
        self._axes: Tensor | None = None
        self._sought = 0  # axes, of which fewer may be there
        self._mixed: tuple[Mixture, list[Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.d[0])

    def axes(self, rank: int) -> Tensor:
        """Return the leading principal axes (gene x comp), fewer where there are fewer."""
        size = min(self.d[0].shape)
        if self._axes is None or (self._axes.shape[1] < rank and self._sought < min(rank, size)):
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

    def _features(self, block: str, rank: int, space: str) -> tuple[list[Tensor], bool]:
        """Return features whose products, squared if so said, are those of the block."""
        if block == "genes":
            return self.d, False
        if block == "presence":
            return [(part > 0).double() for part in self._cells], False
        if block == "squares":
            return [part**2 for part in self._cells], False
        if block == "components":
            return self.scores(rank), False
        if block == "products" and space != "components":
            return ([part / self.sd for part in self.d] if space == "sd" else self.d), True
        if block == "products":
            return self.scores(rank), True
        depth = [torch.stack([part.sum(dim=1), (part > 0).sum(dim=1)], dim=1) for part in self._cells]
        mean = self.share @ depth[0]
        sd = (self.share @ (depth[0] - mean) ** 2).sqrt()
        depth = [(part - mean) / torch.where(sd > 0, sd, 1) for part in depth]
        scores = self.scores(rank)
        unit = (self.share @ scores[0] ** 2).sum().sqrt()
        # Depth and number of genes, their squares, and either times the components.
        each = zip(depth, scores, strict=True)
        return [torch.cat([a, a**2, *(b * c[:, None] / unit for c in a.T)], dim=1) for a, b in each], False

    @property
    def sd(self) -> Tensor:
        """Standard deviation of every gene (gene), 1 where a gene does not vary."""
        sd = (self.share @ self.d[0] ** 2).sqrt()
        return torch.where(sd > 1e-6 * self.mean.abs(), sd, 1)  # what rounding leaves of a constant is no unit

    def block(self, name: str, rank: int, space: str) -> tuple[list[Tensor], float]:
        """Return the products of all cells with the training cells, and the scale that was taken off."""
        key = name if name in ("genes", "presence", "squares") else f"{name} {rank if space == 'components' else space}"
        known = self._known.pop(key, None)
        if known is None:
            features, squared = self._features(name, rank, space)
            features = [part.to(**self.to) for part in features]
            share = self.share.to(**self.to)
            found = [part @ features[0].T for part in features]
            found = [part**2 for part in found] if squared else found
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
            i, j = np.triu_indices(self.scores(mixture.rank)[0].shape[1])
            twice = torch.as_tensor(np.where(i == j, 1.0, 2**0.5))
            features = [part[:, i] * part[:, j] * twice for part in self.scores(mixture.rank)]
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
        if self._mixed is None or self._mixed[0] != mixture:  # the last one is kept for the next penalty
            self._mixed = None
            blocks = [(self.block(name, *mixture[1:])[0], weight) for name, weight in mixture.weights if weight]
            found = []
            for i in range(len(self.d)):
                whole = blocks[0][0][i] * blocks[0][1]
                for parts, weight in blocks[1:]:
                    whole.add_(parts[i], alpha=weight)
                found.append(whole)
            self._mixed = mixture, found
        return self._mixed[1]


class Fit(NamedTuple):
    """Outputs that are ``constant`` (out) + the products with the training cells times ``cells`` (cell x out)."""

    cells: Tensor
    constant: Tensor

    def outputs(self, products: Tensor) -> Tensor:
        """Return the outputs of cells (cell x out) by their products with the training cells."""
        return products @ self.cells + self.constant


def ridge(products: Tensor, y: Tensor, ratio: float, counts: Tensor) -> Fit:
    """Solve ridge regression on the products of the training cells with each other, for all targets (cell x out).

    Least is the sum over cells of ``counts`` times the squared error, plus the penalty: ``ratio`` times the sum of
    ``counts`` times the squared norm of the weights of the features.

    Examples
    --------
    >>> kernels = exact.Kernels(train.x)
    >>> fit = exact.ridge(
    ...     kernels.mixed(exact.Mixture())[0], state, 1e-3, kernels.counts
    ... )
    >>> tuple(fit.cells.shape)
    (700, 4)
    """
    counts = counts.to(y)
    root, mean = counts.sqrt()[:, None], counts @ y / counts.sum()
    system = products * root * root.T
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
    tol: float = 1e-10,
) -> Fit:
    """Solve multinomial logistic regression on the products of the training cells, or on features of theirs.

    The curvature of the log-loss is at most one half :cite:p:`bohning1992`, and a tenth is nearer to it where classes
    are told well. So one inverse serves all steps of a quasi-Newton method, L-BFGS, in the space of functions. It ends
    where a step would gain less than `tol` a cell.
    With `features` the result has weights of features in place of cells; `gram` are their products summed over cells,
    if known.

    Examples
    --------
    >>> kernels = exact.Kernels(train.x)
    >>> products = kernels.mixed(exact.Mixture())[0]
    >>> fit = exact.softmax(
    ...     products, torch.eye(2).double()[train.y], 1e-3, kernels.counts
    ... )
    >>> bool(fit.cells.sum(dim=0).abs().max() < 1e-3)
    True
    """
    dual, weight = features is None, counts.to(y)[:, None]
    n, penalty = float(counts.sum()), ratio * float(counts.sum())
    if gram is None:
        gram = products if dual else features.T @ (features * weight)
    bound = gram * CURVATURE
    raised = penalty + torch.finfo(bound.dtype).eps * float(bound.diagonal().sum())  # above what rounding leaves
    bound.diagonal().add_(raised)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(bound)).to(y)
    if start is None:
        start = Fit(y.new_zeros(len(bound), y.shape[1]), torch.log((weight * y).sum(dim=0).clamp_min(1e-3) / n))
    at, constant = start
    out = (products if dual else features) @ at

    def value(at: Tensor, out: Tensor, constant: Tensor) -> float:
        fitted = (weight * y * torch.log_softmax(out + constant, dim=1)).sum()
        return float(penalty / 2 * (at * (out if dual else at)).sum() - fitted)

    def slope(at: Tensor, out: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
        left = weight * (torch.softmax(out + constant, dim=1) - y)
        return (left if dual else features.T @ left) + penalty * at, left.sum(dim=0)

    # Of cells, the slope is products @ slopes[0]: an inner product takes a step by what it does to the outputs.
    here, slopes = value(at, out, constant), slope(at, out, constant)
    steps: list[tuple[Tensor, ...]] = []
    for _ in range(2000):
        turn, turn_c = slopes
        shares = []
        for _, _, own, d_c, d_slope, d_slope_c, scale in reversed(steps):
            shares.append(scale * ((own * turn).sum() + d_c @ turn_c))
            turn, turn_c = turn - shares[-1] * d_slope, turn_c - shares[-1] * d_slope_c
        step, step_c = inverse @ turn, turn_c / (n * CURVATURE)
        step_out = (turn - raised * step) / CURVATURE if dual else features @ step  # products @ step, without a product
        for (d_at, d_out, _, d_c, d_slope, d_slope_c, scale), share in zip(steps, reversed(shares), strict=True):
            more = share - scale * ((d_slope * (step_out if dual else step)).sum() + d_slope_c @ step_c)
            step, step_out, step_c = step + more * d_at, step_out + more * d_out, step_c + more * d_c
        gain = float(((step_out if dual else step) * slopes[0]).sum() + step_c @ slopes[1])
        if not gain > tol * n:
            break
        size = 1.0
        while size > 1e-4:
            new = at - size * step, out - size * step_out, constant - size * step_c
            there = value(*new)
            if there <= here - 1e-4 * size * gain:
                break
            size /= 2
        else:  # no step is better within rounding
            break
        after = slope(*new)
        d_at, d_out, d_c = new[0] - at, new[1] - out, new[2] - constant
        own, d_slope, d_slope_c = d_out if dual else d_at, after[0] - slopes[0], after[1] - slopes[1]
        curvature = float((own * d_slope).sum() + d_c @ d_slope_c)
        if curvature > 0:
            steps = [*steps[-5:], (d_at, d_out, own, d_c, d_slope, d_slope_c, 1 / curvature)]
        (at, out, constant), slopes, here = new, after, there
    return Fit(at, constant)


def counts_of(dataset: ExpressionDataset, train: ExpressionDataset, class_weight: str | None) -> np.ndarray:
    """Return how often each cell counts, by the classes of the training cells (cell)."""
    of_class = class_counts(class_weight, train.y.numpy(), len(train.output_names))
    return np.ones(len(dataset)) if of_class is None else of_class[dataset.y.numpy()]


def targets_of(dataset: ExpressionDataset, n_outputs: int) -> Tensor:
    """Return targets, or classes as 0 and 1, in double precision (cell x out)."""
    y = dataset.y
    return torch.eye(n_outputs, dtype=torch.float64)[y] if y.ndim == 1 else y.double()


class Solution(NamedTuple):
    """A second-order model around the mean cell: constant + direct d + power (hidden d)^2.

    Parameters
    ----------
    mean
        Mean training cell (gene).
    constant
        Outputs there (out).
    direct
        Linear weights (out x gene).
    hidden
        What is squared (hid x gene).
    power
        What each square adds to the outputs (out x hid).
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
) -> Solution:
    """Solve a model whose mixture and penalty are known, one for every output or one for all classes.

    Parameters
    ----------
    train
        Cells to fit, with their targets.
    mixtures, ratios
        Mixture and penalty of each output; one alone for classes.
    counts
        How often each cell counts (cell); once if None.
    device
        Where to solve.

    Examples
    --------
    >>> mixture = exact.Mixture().plus("products", 1.0)
    >>> found = exact.solution(train, [mixture], [1e-3])
    >>> found.direct.shape, found.hidden.shape
    ((2, 40), (60, 40))
    """
    kernels = Kernels(train.x, counts=counts, device=device)
    y = targets_of(train, len(train.output_names))
    classes, n_outputs, n_genes = train.y.ndim == 1, y.shape[1], len(train.gene_names)
    constant, direct = np.zeros(n_outputs), np.zeros((n_outputs, n_genes))
    parts: list[tuple[list[int], np.ndarray, np.ndarray]] = []
    for mixture, ratio in dict.fromkeys(zip(mixtures, ratios, strict=True)):
        here = [i for i, pair in enumerate(zip(mixtures, ratios, strict=True)) if pair == (mixture, ratio)]
        here = list(range(n_outputs)) if classes else here
        products = kernels.mixed(mixture)[0]
        known = y[:, here].to(products)
        fit = (softmax if classes else ridge)(products, known, ratio, kernels.counts)
        # Features are less their mean, and so are the weights of the cells.
        cells = fit.cells.double().cpu()
        cells = cells - kernels.share[:, None] * cells.sum(dim=0)
        constant[here] = fit.constant.cpu()
        for name, weight in mixture.weights:
            if not weight:
                continue
            cells_of = cells * (weight / kernels.block(name, mixture.rank, mixture.space)[1])
            if name == "genes":
                direct[here] += (kernels.d[0].T @ cells_of).T.numpy()
            elif name == "components":
                scores = kernels.scores(mixture.rank)[0]
                direct[here] += (kernels.axes(mixture.rank) @ (scores.T @ cells_of)).T.numpy()
            else:
                units, factors, means = _squares(kernels, mixture, cells_of)
                constant[here] -= means
                parts.append((here, units, factors))
    return Solution(kernels.mean.numpy(), constant, direct, *together(n_outputs, n_genes, parts))


def together(n_outputs: int, n_genes: int, parts: Sequence[tuple[Any, np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Return hidden units (hid x gene) and their power (out x hid) of parts: some outputs, their units and power."""
    if not parts:  # no product pays: one hidden unit that adds nothing
        return [np.zeros((1, n_genes)), np.zeros((n_outputs, 1))]
    power = [np.zeros((n_outputs, len(units))) for _, units, _ in parts]
    for whole, (here, _, own) in zip(power, parts, strict=True):
        whole[here] = own
    return [np.vstack([units for _, units, _ in parts]), np.hstack(power)]


def _squares(kernels: Kernels, mixture: Mixture, cells: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return hidden units (hid x gene), what they add to outputs (out x hid), and what that is in the mean (out)."""
    features = kernels._features("products", mixture.rank, mixture.space)[0][0]
    if mixture.space == "components":
        back = kernels.axes(mixture.rank).T
    else:
        back = torch.diag(1 / kernels.sd) if mixture.space == "sd" else torch.eye(features.shape[1]).double()
    n_outputs, (n_cells, n_features) = cells.shape[1], features.shape
    second = features.T @ (features * kernels.share[:, None])
    if n_features * n_outputs > n_cells:  # fewer training cells than eigenvectors: Q is a sum over the cells
        means = torch.einsum("ci,ij,cj,co->o", features, second, features, cells)
        return (features @ back).numpy(), cells.T.numpy(), means.numpy()
    units, powers, means = [], [], []
    for i in range(n_outputs):
        matrix = features.T @ (features * cells[:, [i]])
        means.append(float((matrix * second).sum()))
        values, vectors = torch.linalg.eigh(matrix)
        units.append((vectors.T @ back).numpy())
        powers.append(values[None].numpy())
    return np.vstack(units), block_diag(*powers), np.array(means)
