"""Nested convex models compared: which blocks of features pay, at the best weight and penalty of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.preprocessing import SplineTransformer
from tqdm.auto import tqdm

from scbmlp.datasets import ExpressionDataset, Matrix, dense_tensor, match_genes
from scbmlp.display import watched
from scbmlp.exact import FEATURES, Fit, Kernels, Mixture, alike, counts_of, ridge, softmax, targets_of

TIE = 1e-5  # a share of the loss that is no difference
FLAT, WORTH = 1e-3, 5e-3  # shares that end a walk to penalties below the first, and a climb, where less is won
RATIOS = 1e-7, 1e4  # between which penalties are searched, in units of the mean squared norm of all cells
START, STEP = 1e-3, 10**0.5  # where the first search starts, and between two penalties
RANKS = (10, 20, 30, 50, 100)  # of the components that are tried, from the middle on
WEIGHTS = {"components": 5.0, "products": 1.0, "presence": 0.3, "squares": 0.3, "depth": 0.3}  # tried first


@dataclass(frozen=True)
class Trial:
    """The best models of one form: mixture and penalty of every output, one for all classes.

    The losses are of every cell that chose (cell x out): in nats, or squared error in units of the target's variance.
    """

    form: str
    mixtures: tuple[Mixture, ...]
    ratios: tuple[float, ...]
    losses: np.ndarray

    @property
    def loss(self) -> float:
        """Mean loss."""
        return float(self.losses.mean())

    def or_better(self, other: Trial) -> Trial:
        """Return for each output the better of two, this one where they are equal."""
        which = other.losses.mean(axis=0) < (1 - TIE) * self.losses.mean(axis=0)
        own, others = (zip(one.mixtures, one.ratios, strict=True) for one in (self, other))
        chosen = [b if better else a for better, a, b in zip(which, own, others, strict=True)]
        mixtures, ratios = zip(*chosen, strict=True)
        return Trial(self.form, mixtures, ratios, np.where(which, other.losses, self.losses))


Fold = tuple[ExpressionDataset, ExpressionDataset]


class Search:
    """Fits of nested models, compared on cells that they were not fitted to: for each fold those to fit, and others.

    `graded` takes squared error of the classes' indicators, which is quick.
    """

    def __init__(
        self,
        folds: Sequence[Fold],
        class_weight: str | None = None,
        device: str | torch.device = "cpu",
        *,
        graded: bool = False,
    ) -> None:
        self.classes, self.n_outputs = folds[0][0].y.ndim == 1 and not graded, len(folds[0][0].output_names)
        self.folds = []
        for train, val in folds:
            own, of_val = (counts_of(one, train, class_weight) for one in (train, val))
            x_val = match_genes(val, train.gene_names)
            kernels = Kernels(train.x, x_val, counts=own, device=device, dtype=_precision(train))
            y, y_val = (targets_of(one, self.n_outputs) for one in (train, val))
            scale = (kernels.share @ (y - kernels.share @ y) ** 2).clamp_min(1e-30)
            self.folds.append((kernels, y, y_val, scale, torch.as_tensor(of_val)[:, None]))
        self._last: list[Fit | None] = [None] * len(folds)

    def losses(self, mixture: Mixture, ratio: float) -> np.ndarray:
        """Return the loss on every cell that was left out of a fit (cell x out, or one column for classes)."""
        found = []
        for i, (kernels, y, y_val, scale, counts) in enumerate(self.folds):
            try:
                outputs = self._outputs(i, kernels, y, mixture, ratio).double().cpu()
            except torch.linalg.LinAlgError:  # next to no penalty, and cells that are copies of each other
                outputs = torch.full(y_val.shape, np.nan, dtype=torch.float64)
            if self.classes:
                loss = -(y_val * torch.log_softmax(outputs, dim=1)).sum(dim=1, keepdim=True)
            else:
                loss = (outputs - y_val) ** 2 / scale
            found.append((loss * counts).numpy())
        losses = np.vstack(found)
        return np.full_like(losses, np.inf) if np.isnan(losses).any() else losses

    def _outputs(self, i: int, known: Any, y: torch.Tensor, mixture: Mixture, ratio: float) -> torch.Tensor:
        """Return the outputs of the cells that a fold compares on (cell x out); classes start at their last fit."""
        if not self.classes:
            products, seen = known.mixed(mixture)
            return ridge(products, y.to(products), ratio, known.counts).outputs(seen)
        products = features = None
        if isinstance(known, Kernels) and len(known) <= 2 * FEATURES:  # of few cells, products are less than features
            products, seen = known.mixed(mixture)
            size = len(products)
        else:
            features, seen = known.leading_features(mixture)
            size = features.shape[1]
        start = self._last[i]
        start = start if start is not None and len(start.cells) == size else None
        fit = softmax(products, y.to(seen), ratio, known.counts, features=features, start=start, tol=2e-5)
        self._last[i] = fit
        return fit.outputs(seen)

    def path(self, form: str, mixture: Mixture, start: float = START) -> Trial:
        """Return the best penalties of a mixture, whose grid grows until the best of every output lies within."""
        known = {start: self.losses(mixture, start)}
        for step in (1 / STEP, STEP):
            ratio = start
            while True:
                others = [losses.mean(axis=0) for other, losses in known.items() if other != ratio]
                bar = np.min(others, axis=0) if others else np.inf
                at_edge = (known[ratio].mean(axis=0) <= (1 - FLAT * (ratio < START)) * bar).any()
                ratio *= step
                if not (at_edge and RATIOS[0] < ratio < RATIOS[1]):
                    break
                known[ratio] = self.losses(mixture, ratio)
        ratios = sorted(known)
        means = np.stack([known[ratio].mean(axis=0) for ratio in ratios])
        # The strongest of those that do equally well.
        best = len(ratios) - 1 - (means <= (1 + TIE) * means.min(axis=0))[::-1].argmax(axis=0)
        losses = np.stack([known[ratios[i]][:, k] for k, i in enumerate(best)], axis=1)
        return Trial(form, (mixture,) * len(best), tuple(ratios[i] for i in best), losses)

    def add(
        self,
        form: str,
        trial: Trial,
        block: str,
        *,
        beat: Trial | None = None,
        climb: bool = True,
        must: bool = False,
        **changes: Any,
    ) -> Trial:
        """Return the best of a trial and of its leading mixture with a block more, climbing over ranks and weights.

        It climbs only if the first try does `beat` a trial, by default the one before. A block that `must` be stays.
        """
        mixture, ratio = leading(trial)
        known: dict[tuple[float, int], Trial] = {}

        def at(weight: float, rank: int) -> Trial:
            if (weight, rank) not in known:
                more = mixture.plus(block, weight, rank=rank, **changes)
                if self.classes and known:  # penalties are searched at the start and at the end of a climb
                    near = next(iter(known.values())).ratios
                    known[weight, rank] = Trial(form, (more,), near, self.losses(more, *near))
                else:
                    known[weight, rank] = self.path(form, more, min(ratio, START))
            return known[weight, rank]

        here: list[Any] = [WEIGHTS[block], mixture.rank]
        grids = [[here[0] * 3.0**i for i in range(-3, 4)], RANKS]
        ranked = block in ("components", "products") and changes.get("space", "components") == "components"
        climbs = ([1, 0] if ranked else [0]) if climb else []
        if at(*here).loss >= (beat or trial).loss:
            climbs = []
            if beat is None:  # too much of it, or of no use
                here[0] = grids[0][1]
                climbs = [0] if at(*here).loss < trial.loss else []
        for which in climbs:
            grid, place = grids[which], grids[which].index(here[which])
            for direction in (1, -1):
                while 0 <= place + direction < len(grid):
                    other = [*here[:which], grid[place + direction], *here[which + 1 :]]
                    if at(*other).loss >= (1 - WORTH) * at(*here).loss:
                        break
                    here, place = other, place + direction
        best = at(*here)
        if self.classes and len(known) > 1 and best.loss < trial.loss:
            best = self.path(form, *best.mixtures, *best.ratios)
        for one in (*(() if must else (trial,)), *known.values()):
            best = best.or_better(one)
        return replace(best, form=form)

    def nested(self, forms: Sequence[tuple[str, str, dict[str, Any]]], must: str | None = None) -> list[Trial]:
        """Return the best trials of a linear model and of each form, a block on top of the one before."""
        found = [self.path("linear in genes", Mixture())]
        for form, block, changes in forms:
            found.append(self.add(form, found[-1], block, must=form == must, **changes))
        return found


def leading(trial: Trial) -> tuple[Mixture, float]:
    """Return the mixture that most outputs chose, and the middle of its penalties."""
    mixture = max(trial.mixtures, key=trial.mixtures.count)
    ratios = sorted(ratio for ratio, own in zip(trial.ratios, trial.mixtures, strict=True) if own == mixture)
    return mixture, ratios[len(ratios) // 2]


def folds_of(train: ExpressionDataset, val: ExpressionDataset | None) -> list[Fold]:
    """Return five folds of all cells, of every class in each, that do not depend on the order of the cells."""
    whole = pooled([train] if val is None else [train, val])
    fold = fold_of(whole, 5)
    return [(whole.load(fold != i), whole.load(fold == i)) for i in range(5)]


def choose(trials: Sequence[Trial], groups: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each output the first trial that is behind the best by at most a standard error, over cells or groups.

    Beside it (out), how far each trial is behind, and the standard error of that (trial x out).
    """
    losses = np.stack([trial.losses for trial in trials])
    if groups is not None:
        names = np.unique(groups)
        losses = np.stack([[one[groups == name].mean(axis=0) for name in names] for one in losses])
    means = losses.mean(axis=1)
    behind = losses - np.take_along_axis(losses, means.argmin(axis=0)[None, None], axis=0)
    error = behind.std(axis=1, ddof=1) / np.sqrt(losses.shape[1])
    return (behind.mean(axis=1) <= error).argmax(axis=0), behind.mean(axis=1), error


FORMS = (
    ("linear in genes and components", "components", {}),
    ("products of components", "products", {}),
)
SPACES = {"genes": "products of genes", "sd": "products of genes in units of their sd"}
SMALL = 300  # validation cells below which folds of all cells choose


def search(
    train: ExpressionDataset,
    val: ExpressionDataset | None,
    *,
    must: str | None = None,
    groups: np.ndarray | None = None,
    class_weight: str | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> tuple[list[Trial], Trial]:
    """Return the best models of each form, from the simplest on, and a rival whose features are no products.

    The block of the form `must` is there even if it does not help.
    """
    few = val is None or (len(val) < SMALL and groups is None)
    compared = Search(folds_of(train, val) if few else [(train, val)], class_weight, device)
    with tqdm(total=6, desc="solve", unit="form", delay=2, disable=not (progress and watched())) as bar:
        trials = compared.nested(FORMS, must)
        bar.update(3)
        components = trials[1]
        for space, name in SPACES.items():
            trials.append(compared.add(name, components, "products", beat=trials[2], must=name == must, space=space))
            bar.update()
        rival = compared.add("with presence and squares", components, "presence")
        rival = compared.add(rival.form, rival, "squares")
        bar.update()
    return trials, rival


def pooled(parts: Sequence[ExpressionDataset]) -> ExpressionDataset:
    """Return all cells of several data sets as one, with the genes of the first."""
    first = parts[0]
    if len(parts) == 1:
        return first
    x = [match_genes(part, first.gene_names) for part in parts]
    x = sparse.vstack(x, format="csr") if all(map(sparse.issparse, x)) else np.vstack([dense_tensor(one) for one in x])
    return ExpressionDataset(x, torch.cat([part.y for part in parts]).numpy(), first.gene_names, first.output_names)


def fold_of(dataset: ExpressionDataset, n_folds: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Return the fold of every cell (cell): of each class in every fold, or of whole groups; in any order the same."""
    y, fold = dataset.y.numpy(), np.empty(len(dataset), int)
    if groups is not None:
        names, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        of_group, held = np.empty(len(names), int), np.zeros(n_folds, int)
        for i in np.argsort(-sizes, kind="stable"):  # the largest first, each to the smallest fold
            of_group[i] = held.argmin()
            held[of_group[i]] += sizes[i]
        return of_group[codes]
    order = np.argsort(np.asarray(dataset.x.sum(axis=1, dtype=np.float64)).ravel(), kind="stable")
    for code in np.unique(y) if y.ndim == 1 else [None]:
        own = order if code is None else order[y[order] == code]
        fold[own] = np.arange(len(own)) % n_folds
    return fold


def without_products(train: ExpressionDataset, val: ExpressionDataset, class_weight: str | None = None) -> Trial:
    """Return the best model of genes, components, presence and squares, for an audit that has to be quick."""
    # Depth is no block: it is a sum of genes, so that its products hold some of theirs.
    blocks = [("without products", block, {"climb": False}) for block in ("components", "presence", "squares")]
    return Search([(train, val)], class_weight).nested(blocks)[-1]


def compared(train: ExpressionDataset, val: ExpressionDataset, class_weight: str | None = None) -> tuple[Trial, Trial]:
    """Return the best model without products but those of depth, and the best with products: the same if none pay.

    For classes, squared error of their indicators chooses weights, which is quick; log-loss decides which blocks stay.
    """
    search = Search([(train, val)], class_weight)
    quick = Search([(train, val)], graded=True) if search.classes else search
    blocks = {name: {"climb": not search.classes} for name in ("components", "presence", "squares", "depth")}
    blocks["components"] = {}
    found = quick.nested([("without products", name, how) for name, how in blocks.items()])
    rival, best = found[-1], quick.add("with products", found[-1], "products")
    (mixture, ratio), more = leading(rival), leading(best)[0]
    if search.classes:
        few = dict.fromkeys(leading(found[i])[0] for i in (0, 1, -1))
        rival = best = min((search.path(rival.form, one) for one in few), key=lambda one: one.loss)
        mixture, ratio = leading(rival)
        if weight := more.weight("products"):
            best = search.path("with products", mixture.plus("products", weight, rank=more.rank), ratio)
    if more.rank != mixture.rank:  # more components are no products
        rival = rival.or_better(search.path(rival.form, mixture._replace(rank=more.rank), ratio))
    return rival, replace(rival.or_better(best), form=best.form)


def kernels_of(
    train: ExpressionDataset, *others: Matrix, class_weight: str | None = None
) -> tuple[Kernels, torch.Tensor]:
    """Return the products of training cells, and of others with them, and the training cells' targets (cell x out)."""
    precision = _precision(train) if train.y.ndim == 1 else torch.float64
    kernels = Kernels(train.x, *others, counts=counts_of(train, train, class_weight), dtype=precision)
    return kernels, targets_of(train, len(train.output_names)).to(precision)


def _precision(train: ExpressionDataset) -> torch.dtype:
    """Return double precision for small sets, in which no tie is decided by rounding, else single."""
    return torch.float64 if len(train) <= 500 else torch.float32


def predicted(
    kernels: Kernels, y: torch.Tensor, mixtures: Sequence[Mixture], ratios: Sequence[float], classes: bool
) -> list[np.ndarray]:
    """Return the outputs of the other cells (each cell x out) where mixtures and penalties are known."""
    found = [np.empty((len(part), y.shape[1])) for part in kernels.d[1:]]
    for mixture, ratio, here in alike(mixtures, ratios, y.shape[1]):
        products, *others = kernels.mixed(mixture)
        how = {"tol": 1e-6} if classes else {}
        fit = (softmax if classes else ridge)(products, y[:, here], ratio, kernels.counts, **how)
        for outputs, seen in zip(found, others, strict=True):
            outputs[:, here] = fit.outputs(seen).numpy()
    return found


def linked(kernels: Kernels, y: np.ndarray, mixture: Mixture, ratio: float, n_rounds: int = 8) -> list[np.ndarray]:
    """Return indices of the other cells (each cell x out), fitted in turns with a curve of the target, as in ACE."""
    products, *others = kernels.mixed(mixture)
    n, cells = len(y), np.zeros(y.shape)
    system = products.clone()
    system.diagonal().add_(ratio * n)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system)).numpy()
    own = np.clip(1 - ratio * n * inverse.diagonal() + 1 / n, None, 0.999)  # diagonal of the hat matrix
    varied = np.flatnonzero(np.ptp(y, axis=0) > 0)
    curves = [_curve(y[:, k]) for k in varied]
    target = (y[:, varied] - y[:, varied].mean(axis=0)) / y[:, varied].std(axis=0)
    for _ in range(n_rounds):
        index = target - ratio * n * (inverse @ target)
        index = (index - own[:, None] * target) / (1 - own[:, None])  # without the cell's own target
        bent = [curve @ (fit @ index[:, k]) for k, (curve, fit) in enumerate(curves)]
        target = np.stack(bent, axis=1) if bent else target
        target = (target - target.mean(axis=0)) / np.maximum(target.std(axis=0), 1e-12)
    cells[:, varied] = inverse @ target
    return [seen.numpy() @ cells for seen in others]


def _curve(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a spline basis of one target (cell x comp), and what fits it (comp x cell)."""
    knots = np.unique(np.quantile(y, np.linspace(0, 1, 8)))[:, None]
    curve = SplineTransformer(knots=knots).fit_transform(y[:, None])
    return curve, np.linalg.solve(curve.T @ curve + 1e-3 * np.eye(curve.shape[1]), curve.T)
