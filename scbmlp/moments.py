"""The second-order model of many cells, from sums over cells: blocks, processes and machines add up their parts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from torch import Tensor

from scbmlp.datasets import ExpressionDataset, Matrix, blocks, dense_tensor, match_genes, some, take
from scbmlp.exact import Mixture, counts_of, products_of, softmax, squares_of, targets_of
from scbmlp.nested import FORMS, SMALL, Search, Trial

LARGE = 5_000  # training cells from which on sums are taken, and no products of cells
MOST_GENES = 10_000  # whose covariance fits into memory, and its eigenvectors into minutes
SPAN, BLOCK, PANEL = 2**16, 4096, 512  # cells of a task, cells of a block, genes of a part of the covariance
CHOOSING = 5_000, 20_000  # validation cells, and training cells of classes, that a search makes do with
RANKS = 50, 30  # leading components whose products can be in a mixture, of cells in memory and stored
SCORE_BYTES = 2**29  # of the component scores that classes of stored cells are solved from
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-7}  # of classes, in nats a cell
SINGLE = 10**12  # cells x genes x genes from which on products are in single precision, and their sums in double


class Moments:
    """Sums over training cells, of genes and of products of leading components, from which the model is solved.

    ``joblib.parallel_config``, or an active dask client, sends tasks of 65,536 cells to other processes or machines.
    """

    def __init__(
        self, train: ExpressionDataset, counts: np.ndarray | None = None, device: str | torch.device = "cpu"
    ) -> None:
        x, y = train.x, targets_of(train, len(train.output_names)).numpy()
        n_cells, n_genes = x.shape
        if n_genes > MOST_GENES:
            raise ValueError(
                f"train has {n_genes:,} genes in {n_cells:,} cells; with more than {LARGE:,} cells at most "
                f"{MOST_GENES:,} genes are solved: choose the most variable ones before the data sets are cut, such as "
                f"by scanpy.pp.highly_variable_genes."
            )
        dtype = torch.float32 if n_cells * n_genes**2 > SINGLE else torch.float64
        self.to = {"device": device, "dtype": dtype}
        self.counts = np.ones(n_cells) if counts is None else np.asarray(counts, float)
        self.n = self.counts.sum()
        self.target = torch.as_tensor(self.counts @ y / self.n)
        y = y - self.target.numpy()
        self.variance = torch.as_tensor(self.counts @ y**2 / self.n)
        shift = dense_tensor(x[: min(n_cells, 1024)]).double().mean(dim=0).numpy()  # near the mean, against rounding
        first, second, cross = self._summed(_genes, x, y, shift)
        self.mean, self.cross = torch.as_tensor(shift) + first, cross  # of genes, and of genes with targets
        second.addr_(first, first, alpha=-1)
        self.sd = second.diagonal().clamp_min(0).sqrt()
        values, axes = (one.double() for one in torch.linalg.eigh(second.to(**self.to), UPLO="U"))
        del second
        kept = int((values > max(values[-1], 0) * (1e-10 if dtype == torch.float64 else 1e-7)).sum())
        first = len(values) - kept
        self.values, self.axes = values[first:].flip(0).cpu(), axes[:, first:].flip(1).cpu()
        self.rank = min(RANKS[train.stored], kept)
        most = SCORE_BYTES // (4 * n_cells) if train.stored else kept
        self.held = min(max(most, self.rank), kept)  # components that classes are linear in
        expected = products_of(torch.diag(self.values[: self.rank].sqrt())).sum(dim=0)
        arguments = self.mean.numpy(), self.axes[:, : self.rank].numpy(), expected.numpy()
        left, mixed, self.products, cross = self._summed(_second, x, y, *arguments)
        self.expected = expected + left  # mean of every product
        self.products.addr_(left, left, alpha=-1)
        self.mixed = self.axes.T @ mixed  # of components and products
        self.targets = self.axes.T @ self.cross, cross

    def _summed(self, task: Callable, x: Matrix, y: np.ndarray, *arguments: Any) -> list[Tensor]:
        """Return means over cells of what a task sums up, in tasks that joblib or dask hands out."""
        spans = [slice(start, start + SPAN) for start in range(0, len(y), SPAN)]
        each = ((task, take(x, one), y[one], self.counts[one], self.to, *arguments) for one in spans)
        parts = _handed_out(each)  # in the order of the cells
        found = next(parts)
        for part in parts:
            for total, own in zip(found, part, strict=True):
                total += own
        return [torch.as_tensor(total).div_(self.n) for total in found]

    def prior(self, mixture: Mixture) -> tuple[Tensor, float, int]:
        """Return prior variances of the weights of components (comp) and of products, and how many products count."""
        rank = min(mixture.rank, len(self.values))
        foreign = [name for name, weight in mixture.weights if weight and name not in ("genes", *(f[1] for f in FORMS))]
        if foreign or (mixture.weight("products") and (rank > self.rank or mixture.space != "components")):
            raise ValueError(
                f"mixture={mixture} is not solved with more than {LARGE:,} cells: genes, components, and products of "
                f"up to {self.rank} components are; solve it of fewer cells."
            )
        size = rank * (rank + 1) // 2 if mixture.weight("products") else 0
        linear = torch.full_like(self.values, mixture.weight("genes") / (float(self.values.sum()) or 1.0))
        linear[:rank] += mixture.weight("components") / (float(self.values[:rank].sum()) or 1.0)
        scale = float(self.products.diagonal()[:size].sum()) or 1.0
        return linear, mixture.weight("products") / scale, size

    def ridge(self, mixture: Mixture, ratio: float) -> tuple[Tensor, Tensor]:
        """Return the weights of components (comp x out) and of products (product x out) of all targets."""
        linear, square, size = self.prior(mixture)
        shrunk = (linear / (self.values * linear + ratio))[:, None]  # components are uncorrelated
        mixed, (of_linear, of_products) = self.mixed[:, :size], self.targets
        system = (self.products[:size, :size] - mixed.T @ (mixed * shrunk)) * square
        system.diagonal().add_(ratio)
        known = (of_products[:size] - mixed.T @ (of_linear * shrunk)) * square
        found = torch.cholesky_solve(known, torch.linalg.cholesky(system)) if size else known
        return (of_linear - mixed @ found) * shrunk, found

    def features(self, mixture: Mixture, scores: Tensor) -> _Features:
        """Return the features of a mixture, by the scores of cells on components."""
        linear, square, size = self.prior(mixture)
        scale = torch.cat([linear[: scores.shape[1]], torch.full((size,), square, dtype=torch.float64)]).sqrt()
        return _Features(scores, scale, self.expected[:size])

    def gram(self, features: _Features) -> Tensor:
        """Return the products of features with each other, summed over training cells (feature x feature)."""
        n, size = features.scores.shape[1], len(features.expected)
        mixed, products = self.mixed[:n, :size], self.products[:size, :size]
        found = torch.cat([torch.diag(self.values[:n]), mixed], dim=1), torch.cat([mixed.T, products], dim=1)
        return torch.cat(found) * features.scale * features.scale[:, None] * self.n

    def statistics(self, hidden: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return mean and standard deviation of genes, their covariance with hidden units, and with targets."""
        sd = torch.where(self.sd > 1e-7 * self.mean.abs(), self.sd, self.mean)
        weight = self.axes.T @ torch.as_tensor(hidden.T).double()
        covariance = self.axes @ (self.values[:, None] * weight)
        return tuple(part.numpy() for part in (self.mean, sd, covariance, self.cross))

    def scores(self, x: Matrix, n_components: int) -> Tensor:
        """Return the scores of cells on the leading components (cell x comp), as precise as sums are."""
        axes, mean = (part.to(**self.to) for part in (self.axes[:, :n_components], self.mean))
        return torch.cat([((dense_tensor(block).to(**self.to) - mean) @ axes).cpu() for _, block in blocks(x, BLOCK)])

    def solved(self, train: ExpressionDataset, mixture: Mixture, ratio: float, here: list[int]) -> tuple[Any, ...]:
        """Return constant (out), direct (out x gene), hidden (hid x gene) and power (out x hid) of some outputs.

        Classes of stored cells are linear in as many leading components as 512 MB hold.
        """
        if train.y.ndim == 1:
            features = self.features(mixture, self.scores(train.x, self.held))
            y, counts = targets_of(train, len(self.target)).to(features.scores), torch.as_tensor(self.counts)
            how = {"tol": TOLERANCE[self.to["dtype"]]}
            if len(y) > CHOOSING[1]:  # a part of the cells says where to start, and how to step
                rows = some(len(y), CHOOSING[1])
                few = _Features(features.scores[rows], features.scale, features.expected)
                how["few"] = torch.cat([block for _, block in few.blocks()]), y[rows], counts[rows]
            fit = softmax(None, y, ratio, counts, features=features, gram=self.gram(features), **how)
            linear, products = (fit.cells.double() * features.scale[:, None]).tensor_split([self.held])
            constant = fit.constant.double()
        else:
            linear, products = (part[:, here] for part in self.ridge(mixture, ratio))
            constant = self.target[here]
        size, rank = len(products), int((2 * len(products)) ** 0.5)
        constant = (constant - products.T @ self.expected[:size]).numpy()
        direct = (self.axes[:, : len(linear)] @ linear).T.numpy()
        if not size:
            return constant, direct, np.zeros((0, len(self.mean))), np.zeros((len(constant), 0))
        j, i = torch.tril_indices(rank, rank)
        matrices = torch.zeros(len(constant), rank, rank, dtype=torch.float64)
        matrices[:, i, j] = matrices[:, j, i] = torch.where(i == j, products.T, products.T / 2**0.5)
        return constant, direct, *squares_of(matrices, self.axes[:, :rank].T)


def _handed_out(each: Iterable[tuple[Any, ...]]) -> Iterator[list[np.ndarray]]:
    """Yield what functions return for their arguments, in order: by a dask client if one is active, else by joblib."""
    try:
        client = sys.modules["distributed"].get_client()
    except (KeyError, ValueError):  # not in use
        return Parallel(return_as="generator", max_nbytes=None)(delayed(one[0])(*one[1:]) for one in each)
    futures = [client.submit(*one, pure=False) for one in each]
    return (future.result() for future in futures)


def _blocks(x: Matrix, y: np.ndarray, counts: np.ndarray, to: dict, center: np.ndarray) -> Iterator[tuple[Tensor, ...]]:
    """Yield blocks of cells less a center, the same times how often they count, and targets."""
    center, y, alike = torch.as_tensor(center).to(**to), torch.as_tensor(y).to(**to), (counts == 1).all()
    counts = torch.as_tensor(counts).to(**to)[:, None]
    for rows, block in blocks(x, BLOCK):
        d = dense_tensor(block).to(**to) - center
        yield d, d if alike else d * counts[rows], y[rows], counts[rows]


def _genes(x: Matrix, y: np.ndarray, counts: np.ndarray, to: dict, shift: np.ndarray) -> list[np.ndarray]:
    """Sum up genes (gene), their products (gene x gene, above the diagonal), and theirs with targets (gene x out)."""
    n_genes = len(shift)
    first, second, cross = np.zeros(n_genes), np.zeros((n_genes, n_genes)), np.zeros((n_genes, y.shape[1]))
    for d, weighted, known, _ in _blocks(x, y, counts, to, shift):
        first += weighted.sum(dim=0, dtype=torch.float64).cpu().numpy()
        cross += (weighted.T @ known).cpu().numpy()
        for start in range(0, n_genes, PANEL):
            part = d[:, start : start + PANEL].T @ weighted[:, start:]
            second[start : start + PANEL, start:] += part.cpu().numpy()
    return [first, second, cross]


def _second(
    x: Matrix, y: np.ndarray, counts: np.ndarray, to: dict, mean: np.ndarray, axes: np.ndarray, expected: np.ndarray
) -> list[np.ndarray]:
    """Sum up products of components, and theirs with genes, with each other and with targets."""
    axes, expected = torch.as_tensor(axes).to(**to), torch.as_tensor(expected).to(**to)
    size = len(expected)
    found = [np.zeros(shape) for shape in ((size,), (len(mean), size), (size, size), (size, y.shape[1]))]
    for d, weighted, known, often in _blocks(x, y, counts, to, mean):
        products = products_of(d @ axes) - expected
        own = products * often
        parts = own.sum(dim=0, dtype=torch.float64), weighted.T @ products, own.T @ products, own.T @ known
        for total, part in zip(found, parts, strict=True):
            total += part.cpu().numpy()
    return found


class _Features:
    """Scores of cells and products of some of them, scaled (cell x feature), made a block at a time."""

    def __init__(self, scores: Tensor, scale: Tensor, expected: Tensor, turned: bool = False) -> None:
        self.scores, self.scale, self.expected, self.turned = scores, scale, expected, turned
        self.rank = int((2 * len(expected)) ** 0.5)

    @property
    def T(self) -> _Features:
        return _Features(self.scores, self.scale, self.expected, True)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows and their features."""
        scale, expected = self.scale.to(self.scores), self.expected.to(self.scores)
        for start in range(0, len(self.scores), BLOCK):
            own = self.scores[start : start + BLOCK]
            products = products_of(own[:, : self.rank]) - expected
            yield slice(start, start + len(own)), torch.cat([own, products], dim=1) * scale

    def __matmul__(self, other: Tensor) -> Tensor:
        if not len(self.expected):  # no copies
            scale = self.scale.to(self.scores)[:, None]
            return scale * (self.scores.T @ other) if self.turned else self.scores @ (scale * other)
        if self.turned:
            return sum(features.T @ other[rows] for rows, features in self.blocks())
        return torch.cat([features @ other for _, features in self.blocks()])


class SumSearch(Search):
    """Models compared on validation cells, which are in memory, by sums over the training cells."""

    def __init__(
        self, known: Moments, train: ExpressionDataset, val: ExpressionDataset, class_weight: str | None
    ) -> None:
        self.known, self.n_outputs, self.classes, self._last = known, len(train.output_names), train.y.ndim == 1, [None]
        y, x, of_val = None, match_genes(val, train.gene_names), torch.ones(len(val), 1)
        if self.classes:  # those of a part of the training cells choose
            rows = some(len(train), CHOOSING[1])
            y, self.counts = targets_of(train, self.n_outputs)[rows], torch.as_tensor(known.counts[rows])
            self.scores = [known.scores(one, known.held).float() for one in (take(train.x, rows), x)]
            of_val = torch.as_tensor(counts_of(val, train, class_weight))[:, None]
            self._scale = torch.empty(0)
        else:
            scores = known.scores(x, len(known.values)).double()
            self.scores = [scores, products_of(scores[:, : known.rank]) - known.expected]
        self.folds = [(self, y, targets_of(val, self.n_outputs), known.variance.clamp_min(1e-30), of_val)]

    def _start(self, scale: Tensor) -> None:
        """Turn the last fit to features of another scale, and to more of them."""
        before, self._scale, fit = self._scale, scale, self._last[0]
        more = 0 if fit is None else len(scale) - len(before)
        if fit is not None and more >= 0:
            cells = fit.cells * (before / scale[: len(before)])[:, None].to(fit.cells)
            self._last = [fit._replace(cells=torch.cat([cells, cells.new_zeros(more, cells.shape[1])]))]

    def leading_features(self, mixture: Mixture) -> list[Tensor]:
        """Return the features of the cells that a search among models of classes makes do with."""
        each = [self.known.features(mixture, scores).blocks() for scores in self.scores]
        return [torch.cat([features for _, features in one]) for one in each]

    def losses(self, mixture: Mixture, ratio: float) -> np.ndarray:
        """Return the loss on every validation cell (cell x out, or one column for classes)."""
        if mixture.rank > max(self.known.rank, Mixture().rank):
            return np.full((len(self.folds[0][2]), 1 if self.classes else self.n_outputs), np.inf)
        return super().losses(mixture, ratio)

    def _outputs(self, i: int, known: Any, y: Tensor | None, mixture: Mixture, ratio: float) -> Tensor:
        if self.classes:
            self._start(self.known.features(mixture, self.scores[0]).scale)
            return super()._outputs(i, known, y, mixture, ratio)
        linear, products = self.known.ridge(mixture, ratio)
        return self.scores[0] @ linear + self.scores[1][:, : len(products)] @ products + self.known.target


def part_of(dataset: ExpressionDataset, rows: np.ndarray) -> ExpressionDataset:
    """Return some of the cells; stored ones stay on disk."""
    part = copy(dataset)
    part.x, part.y, part.indices = take(dataset.x, rows), dataset.y[rows], dataset.indices[rows]
    return part


def search(
    train: ExpressionDataset,
    val: ExpressionDataset | None,
    *,
    must: str | None = None,
    groups: np.ndarray | None = None,
    class_weight: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[list[Trial], Moments | None, np.ndarray | None]:
    """Return the best models of each form, as ``nested.search`` does, the sums, and the groups of cells that chose.

    Of few validation cells, a tenth of the training cells at most choose: they are in no sums, and none are returned.
    """
    few, fitted = val is None or (len(val) < SMALL and groups is None), train
    if few:
        rows = some(len(train), min(len(train) // 10, CHOOSING[0]))
        val, fitted = train.load(rows), part_of(train, np.setdiff1d(np.arange(len(train)), rows))
    else:
        rows = some(len(val), CHOOSING[0])
        val, groups = val.load(rows), None if groups is None else groups[rows]
    known = Moments(fitted, counts_of(fitted, train, class_weight), device=device)
    trials = SumSearch(known, fitted, val, class_weight).nested(FORMS, must)
    if train.y.ndim == 1 and known.held < len(known.values):
        trials = [replace(one, form=f"{one.form}, by {known.held} leading components") for one in trials]
    return trials, None if few else known, groups
