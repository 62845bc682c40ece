"""What products are worth: the audit of a model, and nested exact models with and without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse, stats
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import SplineTransformer
from tqdm.auto import tqdm

from scbmlp import datasets, exact, nested
from scbmlp.baselines import Axes, accuracy, additive_features, ridge
from scbmlp.checks import nearest, whole_number
from scbmlp.datasets import ExpressionDataset, match_genes, product
from scbmlp.display import watched
from scbmlp.interactions import Model, decompose, direction, interaction_matrices
from scbmlp.stores import BLOCK_CELLS

RIVAL_CELLS = 3000  # that a rival without products is fitted to at most, drawn where there are more


def gain(
    train: ExpressionDataset,
    *others: ExpressionDataset,
    groups: Any = None,
    n_folds: int = 3,
    n_permutations: int = 0,
    counts: Any = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Say whether products of expression pay on these cells, without any model: nested convex fits, cross-fitted.

    The best model without products has blocks of genes, components, presence 1[x > 0], squares x^2, and depth (the
    total and the number of genes, and either times the components); the other has products of components on top. Some
    cells of each fold choose blocks and penalties, both are fitted to all cells but the fold, and scored on the fold.

    Parameters
    ----------
    train, others
        Data sets with the same genes and outputs. All their cells are taken together.
    groups
        Donor or batch of every cell, of all data sets in order. Whole groups are then left out.
    n_folds, progress
        Number of folds, and whether to show how many are done.
    n_permutations
        How often to permute the targets, with blocks and penalties as chosen: is the gain calibrated?
    counts
        Raw counts (cell x gene) of all cells in order, to also take the gain at one depth: is it technical?

    Returns
    -------
    A row an output; one for all classes together, ``all``. ``attrs["blocks"]`` has what every fold chose,
    ``attrs["permuted"]`` the gains of permutations by output, and ``attrs["downsampled"]`` the row of each output at
    one depth, without the tenth of cells of fewest counts.

    - ``without``, ``with``: R2 of either model; for classes log-loss in nats a cell, and accuracies.
    - ``gain``: how much better the latter is; 0 where products paid in no fold.
    - ``standard_error``: of the gain, paired over cells or groups. ``p``: of no gain, one-sided, by t.
    - ``gain_curved``: the gain after both went through a curve of one number, so that a link is no gain.

    Examples
    --------
    >>> table = interactions.gain(train, validation, test)
    >>> table.loc["all", ["without", "with", "gain"]].round(1).tolist()
    [0.4, 0.0, 0.4]
    """
    whole = _whole((train, *others), groups is not None or counts is not None)
    y, classes = exact.targets_of(whole, len(whole.output_names)), whole.y.ndim == 1
    n_folds = whole_number(n_folds, "n_folds", 2)
    if groups is not None:
        groups = pd.factorize(np.asarray(groups), sort=True)[0]
        n_groups = len(set(groups) - {-1})
        if len(groups) != len(whole) or n_groups < 2 or -1 in groups:
            what = f"groups has {len(groups)} labels of {n_groups} groups for {len(whole)} cells"
            raise ValueError(f"{what}; pass one a cell, none missing, of two groups or more.")
        n_folds = min(n_folds, n_groups)
    if (few := len(whole) < 10 * n_folds) or (y.std(dim=0) == 0).all():
        what = f"there are {len(whole)} cells, {'too few' if few else 'all with the same target'} for n_folds={n_folds}"
        raise ValueError(f"{what}; pass more data sets, or other cells.")
    fold, names = nested.fold_of(whole, n_folds, groups), ["all"] if classes else list(whole.output_names)
    orders = whole_number(n_permutations, "n_permutations", 0)
    orders = [np.random.default_rng(i).permutation(len(whole)) for i in range(orders)]
    outputs, permuted, chosen = np.empty((4, *y.shape)), np.empty((2, len(orders), *y.shape)), []
    for i in tqdm(range(n_folds), "gain", delay=2, disable=not (progress and watched())):
        there = fold == i
        best, outputs[:, there], permuted[:, :, there] = _of_fold(whole, there, groups, orders)
        for name, mixture, ratio in zip(names, best.mixtures, best.ratios, strict=True):
            chosen.append({"fold": i, "output": name, "rank": mixture.rank, "penalty": ratio, **dict(mixture.weights)})
    losses = _losses(outputs, y.numpy(), classes)
    better, means = losses[0] - losses[1], losses.mean(axis=1)
    error, freedom = _standard_error(better, groups)
    paid = (better != 0).any(axis=0)
    table = pd.DataFrame(index=pd.Index(names, name="output"))
    table["without"], table["with"] = means[:2] if classes else 1 - means[:2]
    table["gain"], table["standard_error"] = better.mean(axis=0), error
    table["p"] = np.where(paid, stats.t.sf(table["gain"] / np.where(error > 0, error, 1), freedom), 1.0)
    table["gain_curved"] = np.where(paid, means[2] - means[3], 0.0)
    if classes:
        for name, found in zip(("without", "with"), outputs[:2], strict=True):
            table[f"accuracy_{name}"] = accuracy(found, whole.y.numpy())
    table.attrs["blocks"] = chosen
    if orders:
        of_each = [_losses(permuted[:, k], y[order].numpy(), classes) for k, order in enumerate(orders)]
        gains = -np.diff(of_each, axis=1).mean(axis=(1, 2))
        table.attrs["permuted"] = dict(zip(names, gains.T.tolist(), strict=True))
    if counts is not None:
        part, rows = _one_depth(whole, counts)
        again = gain(part, groups=None if groups is None else groups[rows], n_folds=n_folds, progress=progress)
        table.attrs["downsampled"] = again.to_dict("index")
    return table


def _losses(outputs: np.ndarray, y: np.ndarray, classes: bool) -> np.ndarray:
    """Return the loss of every cell (trial x cell x out): in nats, one column, or in units of the target's variance."""
    if classes:
        return -(log_softmax(outputs, axis=2) * y).sum(axis=2, keepdims=True)
    variance = y.var(axis=0)
    return (outputs - y) ** 2 / np.where(variance > 0, variance, np.nan)


def _standard_error(better: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, int]:
    """Return the standard error of a mean over cells (out), whose groups stand together, and degrees of freedom."""
    left = better - better.mean(axis=0)
    if groups is not None:
        left = np.stack([left[groups == group].sum(axis=0) for group in np.unique(groups)])
    n = len(left)
    return np.sqrt(n / (n - 1) * (left**2).sum(axis=0)) / len(better), n - 1


def _whole(given: Sequence[ExpressionDataset], labelled: bool) -> ExpressionDataset:
    """Return the cells of several data sets as one; all of them where they are `labelled` by groups."""
    parts, first = [], given[0]
    for i, one in enumerate(given):
        datasets.check_dataset(one, f"data set {i}")
        parts.append(part := datasets.held(one))
        if list(part.output_names) != list(first.output_names) or part.y.ndim != first.y.ndim:
            raise ValueError(f"data set {i} has other outputs than the first; pass parts of one AnnData.")
        if len(part) < len(one) and labelled:
            raise ValueError(f"data set {i} is stored, and too large to hold; pass load() of fewer cells.")
    return nested.pooled(parts)


def _of_fold(
    whole: ExpressionDataset, there: np.ndarray, groups: np.ndarray | None, orders: list[np.ndarray]
) -> tuple[nested.Trial, np.ndarray, np.ndarray]:
    """Return the trial with products that all cells but a fold choose, and outputs of the fold's cells.

    They are of the trial without and the one with products, then of both through curves (4 x cell x out), and of both
    after each permutation of the targets (2 x permutation x cell x out).
    """
    rest, classes = whole.load(~there), whole.y.ndim == 1
    own = None if groups is None or len(set(groups[~there])) < 2 else groups[~there]
    inner = nested.fold_of(rest, 4 if own is None else min(4, len(set(own))), own)
    fit, val = rest.load(inner != 0), rest.load(inner == 0)
    trials = nested.compared(fit, val)
    seen = _both(*nested.kernels_of(fit, val.x), trials, classes)
    kernels, y = nested.kernels_of(rest, whole.x[there])
    outputs = _both(kernels, y, trials, classes)
    curved = [_through_curves(of_val, val.y.numpy(), one) for of_val, one in zip(seen, outputs, strict=True)]
    y, permuted = exact.targets_of(whole, len(whole.output_names)).to(y), np.empty((2, len(orders), *outputs[0].shape))
    at_once = 1 if classes else max(len(orders), 1)  # targets are solved together
    for first in range(0, len(orders), at_once):
        part = slice(first, first + at_once)
        n = len(orders[part])
        again = [replace(one, mixtures=one.mixtures * n, ratios=one.ratios * n) for one in trials]
        found = _both(kernels, torch.cat([y[order][~there] for order in orders[part]], dim=1), again, classes)
        permuted[:, part] = np.stack(np.split(found, n, axis=2), axis=1)
    return trials[1], np.stack([*outputs, *curved]), permuted


def _both(kernels: exact.Kernels, y: torch.Tensor, trials: Sequence[nested.Trial], classes: bool) -> np.ndarray:
    """Return the outputs of two trials (trial x cell x out), the same where they chose the same."""
    pairs = [zip(one.mixtures, one.ratios, strict=True) for one in trials]
    differ = [first != second for first, second in zip(*pairs, strict=True)]
    outputs = [nested.predicted(kernels, y, trials[0].mixtures, trials[0].ratios, classes)[0]] * 2
    if any(differ):
        products = nested.predicted(kernels, y, trials[1].mixtures, trials[1].ratios, classes)[0]
        outputs[1] = np.where(differ, products, outputs[0])
    return np.stack(outputs)


def _one_depth(dataset: ExpressionDataset, counts: Any) -> tuple[ExpressionDataset, np.ndarray]:
    """Return cells whose counts are drawn to one depth, log-normalised, and which cells have as many."""
    counts = sparse.csr_matrix(counts)
    if counts.shape != dataset.x.shape or (counts.data < 0).any() or (counts.data % 1).any():
        raise ValueError(
            f"counts has shape {counts.shape}, and the data sets have {dataset.x.shape} (cell x gene); pass raw "
            f"counts, whole numbers, of the same cells and genes in order."
        )
    import scanpy  # it takes a second

    totals = np.asarray(counts.sum(axis=1)).ravel()
    depth = int(np.quantile(totals, 0.1))
    rows = np.flatnonzero(totals >= max(depth, 1))
    few = AnnData(counts[rows].astype(np.float64))
    scanpy.pp.downsample_counts(few, counts_per_cell=depth, random_state=0)
    part = dataset.load(rows)
    part.x = (sparse.csr_matrix(few.X) * (np.median(totals) / depth)).log1p().astype(np.float32)
    return part, rows


def audit(
    model: Model,
    dataset: ExpressionDataset,
    reference: np.ndarray | str | None = None,
    *,
    train: ExpressionDataset | None = None,
    validation: ExpressionDataset | None = None,
) -> pd.DataFrame:
    """Say how much of each output is quadratic, how much of that is interaction, and whether it pays.

    Quadratic is a word about the formula: it depends on the reference cell, and a curve of a single gene is quadratic
    too. Interaction is what no sum of functions of single genes can do; such sums are fitted as 1, x, x^2 and 1[x > 0]
    of every gene.

    Parameters
    ----------
    model, dataset
        A fitted classifier or regressor, and cells with their targets, best ones that no other argument has.
    reference
        Reference cell (gene), or the name of a class for the mean of its cells; the mean of `dataset` if None.
    train, validation
        Cells that fit additive models, and cells that choose penalties and fit curves; without, gains are NaN.

    Returns
    -------
    A row an output; ``attrs`` has scores, gains and the rank over all, for classes also ``gain_log_loss`` in nats.

    - ``linear``, ``quadratic``: each part's share of the output's variance; ``covariance``: twice theirs as a share.
    - ``self``, ``pair``: the shares of Q_ii d_i^2, summed over genes, and of the rest of the quadratic part.
    - ``interaction``: share of variance that the best additive predictor of the *output* leaves, at most, whatever the
      reference; ``interaction_curved``: the same after it passes through a curve, a link of a sum.
    - ``gain``: score less that of the best model of the *target* without products, ``score_additive``, which is fitted
      to at most 3,000 cells, on blocks that `validation` chooses.
    - ``gain_curved``: the same after both pass through curves fitted on `validation`. Only a positive one supports
      interactions in the data. It is as noisy as a difference of two scores: look at several splits, or take
      :func:`gain`.
    - ``score``: recall of the class, or R2 of the target; ``score_linear`` and ``score_quadratic`` without the other
      part. Both parts were trained together: neither loss proves need.
    - ``rank_99``: number of modules, in metric ``identity``, from which on 99% of the score are kept.

    Examples
    --------
    >>> table = interactions.audit(model, test, train=train, validation=validation)
    >>> table.loc["on", ["linear", "quadratic", "gain"]].round(2).tolist()
    [0.04, 0.97, 0.52]
    """
    model.check(dataset)
    if (train is None) != (validation is None):
        alone = "validation" if train is None else "train"
        raise ValueError(f"audit has {alone} alone; interaction and gain need train= and validation=: pass both.")
    x, target = match_genes(dataset, model.gene_names), dataset.y.numpy()
    reference = _reference(model, x, target, reference)
    constant, linear, quadratic = decompose(model, x, reference)
    directions = np.stack([direction(model, name) for name in model.output_names])
    axis, curve, alone = linear @ directions.T, quadratic @ directions.T, _self_terms(model, x, reference)
    total = (axis + curve).var(axis=0)
    total = np.where(total > 0, total, np.nan)  # the same output in every cell has no variance to share out
    table = pd.DataFrame(index=pd.Index(model.output_names, name="output"))
    table["linear"], table["quadratic"] = axis.var(axis=0) / total, curve.var(axis=0) / total
    table["covariance"] = 1 - table["linear"] - table["quadratic"]
    table["interaction"] = table["interaction_curved"] = np.nan
    table["self"], table["pair"] = alone.var(axis=0) / total, (curve - alone).var(axis=0) / total
    outputs = {"score_linear": constant + linear, "score_quadratic": constant + quadratic}
    outputs["score"] = outputs["score_linear"] + quadratic
    paired = None
    if train is not None:
        model.check(train)
        model.check(validation)
        train, validation = datasets.held(train), datasets.held(validation)
        shares, paired = _interaction(model, train, validation, x, directions)
        table["interaction"], table["interaction_curved"] = shares
        outputs |= _beside_rival(model, train, validation, x, outputs["score"])
    scores = {name: _scores(model, found, target) for name, found in outputs.items()}
    unknown = np.full(len(table) + 1, np.nan)
    scores.setdefault("score_additive", unknown)
    scores["gain"] = scores["score"] - scores["score_additive"]
    scores["gain_curved"] = scores.get("curved", unknown) - scores.get("additive_curved", unknown)
    if paired is not None:  # curves differ by chance: without products there is nothing to gain
        scores["gain_curved"][~np.append(paired, paired.any())] = 0.0
    for name in ("gain", "gain_curved", "score", "score_additive", "score_linear", "score_quadratic"):
        table[name], table.attrs[name] = scores[name][:-1], float(scores[name][-1])
    if target.ndim == 1 and paired is not None:
        options = {"labels": range(len(table)), "sample_weight": model._counts(target)}
        losses = {name: log_loss(target, softmax(found, axis=1), **options) for name, found in outputs.items()}
        table.attrs["gain_log_loss"] = losses["score_additive"] - losses["score"]

    *ranks, table.attrs["rank_99"] = _ranks(model, x, target, 0.99 * scores["score"])
    table["rank_99"] = pd.array(ranks, dtype="Int64")
    return table


def _reference(model: Model, x: Any, target: np.ndarray, reference: Any) -> np.ndarray:
    """Return the reference cell (gene): as given, the mean of a class, or of all cells."""
    if reference is None:
        reference = datasets.mean(x)
    elif np.ndim(reference) == 0:
        names = list(model.output_names)
        if target.ndim > 1 or reference not in names:
            there = ", ".join(map(repr, names))
            raise KeyError(f"reference={reference!r} is not a class; they are {there}{nearest(reference, names)}.")
        cells = np.flatnonzero(target == model.output_names.get_loc(reference))
        if not len(cells):
            raise ValueError(f"reference={reference!r}: dataset has no cell of that class; pass its mean expression.")
        reference = datasets.mean(datasets.take(x, cells))
    return datasets.gene_vector(reference, model.gene_names, "reference")


def _scores(model: Model, outputs: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the score of every output, and the score over all (out + 1)."""
    return np.append(model._measure_each(outputs, target), model._measure(outputs, target))


def _ranks(model: Model, x: Any, target: np.ndarray, needed: np.ndarray) -> list[int | None]:
    """Return the number of modules from which on each score is kept, for it may come and go; None without a score."""
    # Outputs that are all 0 are no prediction, though they put every cell into the first class.
    kept = [_scores(model, y, target) if y.any() else np.full(len(needed), -np.inf) for y in _truncated(model, x)]
    lost = ~(np.stack(kept) >= needed)
    last = [int(np.flatnonzero(column).max(initial=-1)) for column in lost.T]
    return [None if np.isnan(least) else i + 1 for i, least in zip(last, needed, strict=True)]


def _self_terms(model: Model, x: Any, reference: np.ndarray) -> np.ndarray:
    """Return the sum over genes of Q_ii d_i^2 of every direction (cell x out), without making cells dense."""
    own = np.stack([matrix._diagonal() for matrix in interaction_matrices(model)], axis=1)
    parts = []
    for _, block in datasets.blocks(x, BLOCK_CELLS):
        square = block.multiply(block) if sparse.issparse(block) else np.square(block, dtype=np.float64)
        parts.append(np.asarray(square @ own - 2 * (block @ (reference[:, None] * own))))
    return np.vstack(parts) + reference**2 @ own


def _interaction(
    model: Model, train: ExpressionDataset, validation: ExpressionDataset, x: Any, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the share that an additive predictor leaves, itself and curved (2 x out), and which outputs have pairs."""
    cells = [match_genes(train, model.gene_names), match_genes(validation, model.gene_names), x]
    center, pairs, whole = datasets.mean(cells[0]), [], []
    for part in cells:  # linear part and Q_ii d_i^2 are additive as they are: only the pairs need a predictor
        parts = decompose(model, part, center)
        pairs.append(parts.quadratic @ directions.T - _self_terms(model, part, center))
        whole.append(sum(parts) @ directions.T)
    paired, total = np.ptp(pairs[0], axis=0) > 0, whole[2].var(axis=0)
    shares = np.full((2, len(total)), np.nan)
    shares[:, ~paired & (total > 0)] = 0.0
    if (varied := paired & (total > 0)).any():
        features = [additive_features(part) for part in cells[:2]]
        fitted = ridge(Axes(features[0]), pairs[0][:, varied], features[1], pairs[1][:, varied])
        blocks = (block for _, block in datasets.blocks(x, BLOCK_CELLS))  # features take thrice the memory of cells
        found = fitted.outputs(features[1]), np.vstack([fitted.outputs(additive_features(block)) for block in blocks])
        left = [part[:, varied] - one for part, one in zip(pairs[1:], found, strict=True)]
        seen, there = (part[:, varied] for part in whole[1:])
        curved = _through_curves(seen - left[0], seen, there - left[1])
        shares[:, varied] = [one.var(axis=0) / total[varied] for one in (left[1], there - curved)]
    return shares, pairs[0].std(axis=0) > 1e-6 * whole[0].std(axis=0)


def _beside_rival(
    model: Model, train: ExpressionDataset, validation: ExpressionDataset, x: Any, outputs: np.ndarray
) -> dict[str, np.ndarray]:
    """Return outputs of the best model without products, and through curves its own and the model's (cell x out)."""
    genes, kind, classes, few = model.gene_names, model.cfg.class_weight, train.y.ndim == 1, []
    for part in (train, validation):
        few.append(part.load(datasets.some(len(part), RIVAL_CELLS)))
        few[-1].x, few[-1].gene_names = match_genes(few[-1], genes), genes
    trial, found = nested.without_products(*few, kind), []
    for i, (_, block) in enumerate(datasets.blocks(x, RIVAL_CELLS)):
        cells = (block,) if i else (match_genes(validation, genes), block)
        kernels, y = nested.kernels_of(few[0], *cells, class_weight=kind)
        forms = [nested.predicted(kernels, y, trial.mixtures, trial.ratios, classes)]
        if not classes:
            linked = [np.empty(one.shape) for one in forms[0]]  # indices fitted together with their links
            for mixture, ratio, here in exact.alike(trial.mixtures, trial.ratios, y.shape[1]):
                for index, one in zip(linked, nested.linked(kernels, y.numpy()[:, here], mixture, ratio), strict=True):
                    index[:, here] = one
            forms.append(linked)
        found += zip(*forms, strict=True)
    seen, found = found[0], [np.vstack(form) for form in zip(*found[1:], strict=True)]
    y, counts = validation.y.numpy(), model._counts(validation.y.numpy())
    curved = _through_curves(seen[0], y, found[0], counts)
    if not classes:  # index and link fitted together, where that is better on validation cells
        error = [np.square(_through_curves(one, y, one, counts) - y).mean(axis=0) for one in seen]
        curved = np.where(error[1] < error[0], _through_curves(seen[1], y, found[1], counts), curved)
    of_model = _through_curves(model.outputs(validation).astype(np.float64), y, outputs, counts)
    return {"score_additive": found[0], "additive_curved": curved, "curved": of_model}


def _through_curves(
    seen: np.ndarray, target: np.ndarray, outputs: np.ndarray, counts: np.ndarray | None = None
) -> np.ndarray:
    """Return outputs (cell x out), each through a spline fitted on other cells that count so often, to their target."""
    curved, classes = np.empty_like(outputs, dtype=np.float64), target.ndim == 1
    if classes:  # of a class: its logit less the mean of all, since a softmax is blind to that
        seen, outputs = (y - y.mean(axis=1, keepdims=True) for y in (seen, outputs))
    for i in range(outputs.shape[1]):
        about = (target == i).astype(int) if classes else target[:, i]
        if np.ptp(about) == 0 or np.ptp(seen[:, i]) == 0:  # a class without a validation cell, or nothing to bend
            curved[:, i] = np.log(1e-6) if classes else about.mean()
            continue
        knots = np.unique(np.quantile(seen[:, i], np.linspace(0, 1, 8)))[:, None]
        line = LogisticRegression(C=10) if classes else Ridge(0.01)
        curve = Pipeline([("spline", SplineTransformer(knots=knots)), ("line", line)])
        curve.fit(seen[:, [i]], about, line__sample_weight=counts)
        there = outputs[:, [i]]
        curved[:, i] = curve.predict_log_proba(there)[:, 1] if classes else curve.predict(there)
    return curved


def _truncated(model: Model, x: Any) -> Iterator[np.ndarray]:
    """Yield the outputs (cell x out) with no module of each output, with one, with two, and so on."""
    constant, linear, _ = decompose(model, x, model.origin)
    matrices = interaction_matrices(model)
    thin = {matrix._thin: matrix._thin()[0] for matrix in matrices}  # outputs may have hidden units of their own
    scores = {key: product(x, u) - model.origin @ u for key, u in thin.items()}
    modules = [(scores[matrix._thin], *matrix._thin_eigh()) for matrix in matrices]
    outputs = (constant + linear) @ np.stack([direction(model, name) for name in model.output_names]).T
    yield outputs
    for k in range(max(len(values) for _, values, _ in modules)):
        outputs = outputs.copy()
        for i, (own, values, vectors) in enumerate(modules):
            if k < len(values):
                outputs[:, i] += values[k] * (own @ vectors[:, k]) ** 2
        yield outputs
