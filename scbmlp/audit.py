"""What products are worth: the audit of a model, and nested exact models with and without them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

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

from scbmlp import exact, nested
from scbmlp.baselines import Axes, LinearModel, accuracy, additive_features, ridge
from scbmlp.checks import check_class_weight, nearest, whole_number
from scbmlp.datasets import (
    ExpressionDataset,
    blocks,
    check_dataset,
    dense_tensor,
    gene_vector,
    held,
    match_genes,
    mean,
    some,
    take,
)
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
    class_weight: Literal["balanced"] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Say whether products of expression pay on these cells, without any model: nested convex fits, cross-fitted.

    Compared are the best model without products and the best with products of principal components on top. Blocks of
    the former are genes, components, presence 1[x > 0], squares x^2, and depth: total and number of genes, and either
    times the components. In each fold some of the cells choose blocks, weights and penalties; both models are fitted
    to all but the fold, and scored on the fold.

    Parameters
    ----------
    train, others
        Data sets with the same genes and outputs. All their cells are taken together.
    groups
        Donor or batch of every cell, of all data sets in order. Whole groups are then left out.
    n_folds
        Number of folds.
    n_permutations
        How often to deal out the targets anew, with blocks and penalties as chosen.
    counts
        Raw counts (cell x gene) of all cells in order. The gain is then also taken of cells with counts drawn to one
        depth, without the tenth of the cells that have the least: is the gain technical?
    class_weight
        As in :class:`scbmlp.models.Config`.
    progress
        Show how many folds are done, in a terminal or a notebook.

    Returns
    -------
    A row an output; one for all classes together, ``all``.

    - ``without``, ``with``: R2 of either model; for classes log-loss in nats a cell.
    - ``gain``: how much better the latter is; 0 where products paid in no fold.
    - ``standard_error``: of the gain, paired over cells, or over groups. ``p``: of no gain, one-sided, by t; 1
      where the gain is 0.
    - ``gain_curved``: the gain after both went through a curve of one number, so that a link counts as no gain.
    - ``accuracy_without``, ``accuracy_with``: for classes.

    ``attrs["blocks"]`` has what every fold chose, ``attrs["permuted"]`` the gains of every permutation, by output,
    and ``attrs["downsampled"]`` the row of every output at one depth.

    Raises
    ------
    ValueError
        Data sets have other outputs, `groups` or `counts` do not fit the cells, or there are too few to leave some out.

    Examples
    --------
    >>> table = interactions.gain(train, validation, test)
    >>> table[["without", "with", "gain"]].round(1)
            without  with  gain
    output
    all         0.4   0.0   0.4
    """
    parts = []
    for i, given in enumerate((train, *others)):
        check_dataset(given, f"data set {i}")
        parts.append(part := held(given))
        if list(part.output_names) != list(train.output_names) or part.y.ndim != train.y.ndim:
            raise ValueError(f"data set {i} has other outputs than the first; pass parts of one AnnData.")
        if len(part) < len(given) and (groups is not None or counts is not None):
            raise ValueError(f"data set {i} is stored, and too large to hold; pass load() of fewer cells.")
    check_class_weight(class_weight, classes=train.y.ndim == 1)
    whole, classes = nested.pooled(parts), train.y.ndim == 1
    n_folds = whole_number(n_folds, "n_folds", 2)
    n_permutations = whole_number(n_permutations, "n_permutations", 0)
    if groups is not None:
        groups = pd.factorize(np.asarray(groups), sort=True)[0]
        n_groups = len(set(groups) - {-1})
        if len(groups) != len(whole) or n_groups < 2 or -1 in groups:
            raise ValueError(
                f"groups has {len(groups)} labels of {n_groups} groups for {len(whole)} cells; pass one a cell, none "
                f"missing, of two groups or more, or leave groups out."
            )
        n_folds = min(n_folds, n_groups)
    y = exact.targets_of(whole, len(whole.output_names))
    if len(whole) < 10 * n_folds or (y.std(dim=0) == 0).all():
        raise ValueError(
            f"there are {len(whole)} cells, {'all with the same target' if len(whole) >= 10 * n_folds else 'too few'} "
            f"for n_folds={n_folds}; pass more data sets, or other cells."
        )
    fold, rng = nested.fold_of(whole, n_folds, groups), np.random.default_rng(0)
    orders = [rng.permutation(len(whole)) for _ in range(n_permutations)]
    outputs = np.empty((4, *y.shape))  # without and with products, and both through curves
    dealt = np.empty((2, n_permutations, *y.shape))
    chosen, weight, names = [], np.ones(len(whole)), ["all"] if classes else list(whole.output_names)
    for i in tqdm(range(n_folds), "gain", delay=2, disable=not (progress and watched())):
        rest, there = whole.load(fold != i), fold == i
        weight[there] = exact.counts_of(whole.load(there), rest, class_weight)
        own = None if groups is None or len(set(groups[~there])) < 2 else groups[~there]
        inner = nested.fold_of(rest, 4 if own is None else min(4, len(set(own))), own)
        fit, val = rest.load(inner != 0), rest.load(inner == 0)
        trials = nested.compared(fit, val, class_weight)
        for name, mixture, ratio in zip(names, trials[1].mixtures, trials[1].ratios, strict=True):
            one = {"fold": i, "output": name, "rank": mixture.rank, "penalty": ratio}
            chosen.append(one | dict(mixture.weights))
        of_val = exact.counts_of(val, fit, class_weight)
        seen = _both(nested.kernels_of(fit, val.x, class_weight=class_weight), trials, classes)
        known = nested.kernels_of(rest, whole.x[there], class_weight=class_weight)
        outputs[:2, there] = _both(known, trials, classes)
        for k in range(2):
            outputs[2 + k, there] = _through_curves(seen[k], val.y.numpy(), outputs[k, there], of_val)
        kernels, many = known[0], 1 if classes else max(n_permutations, 1)
        for first in range(0, n_permutations, many):  # targets are solved all at once
            dealt_y = [y[order][~there] for order in orders[first : first + many]]
            if class_weight is not None:
                by_class = exact.counts_of(whole, rest, class_weight)[orders[first]]
                kernels.counts = torch.as_tensor(by_class[~there])
            again = [nested.Trial("", one.mixtures * many, one.ratios * many, one.losses) for one in trials]
            found = _both((kernels, torch.cat(dealt_y, dim=1)), again, classes)
            dealt[:, first : first + many, there] = found.reshape(2, there.sum(), many, -1).transpose(0, 2, 1, 3)
    losses = _losses(outputs, y.numpy(), weight, classes)
    better = losses[0] - losses[1]
    error, freedom = _standard_error(better, groups)
    means, paid = losses.mean(axis=1), (better != 0).any(axis=0)
    table = pd.DataFrame(index=pd.Index(names, name="output"))
    table["without"], table["with"] = means[:2] if classes else 1 - means[:2]
    table["gain"], table["standard_error"] = better.mean(axis=0), error
    table["p"] = np.where(paid, stats.t.sf(table["gain"] / np.where(error > 0, error, 1), freedom), 1.0)
    table["gain_curved"] = np.where(paid, means[2] - means[3], 0.0)
    if classes:
        for k, name in enumerate(("without", "with")):
            table[f"accuracy_{name}"] = accuracy(outputs[k], whole.y.numpy(), class_weight)
    table.attrs["blocks"] = chosen
    if n_permutations:
        permuted = [_losses(dealt[:, k], y[order].numpy(), weight[order], classes) for k, order in enumerate(orders)]
        gains = np.array([(one[0] - one[1]).mean(axis=0) for one in permuted])
        table.attrs["permuted"] = dict(zip(names, gains.T.tolist(), strict=True))
    if counts is not None:
        few, rows = _one_depth(whole, counts)
        again = gain(few, groups=None if groups is None else groups[rows], n_folds=n_folds, class_weight=class_weight)
        table.attrs["downsampled"] = again.to_dict("index")
    return table


def _both(known: tuple[exact.Kernels, torch.Tensor], trials: Any, classes: bool) -> np.ndarray:
    """Return the outputs of two trials (trial x cell x out), the same where they chose the same."""
    kernels, y = known
    first, second = ([*zip(one.mixtures, one.ratios, strict=True)] for one in trials)
    found = [nested.predicted(kernels, y, trials[0].mixtures, trials[0].ratios, classes)[0]] * 2
    differ = [i for i, (one, other) in enumerate(zip(first, second, strict=True)) if one != other]
    if differ:
        mixtures, ratios = zip(*(second[i] for i in differ), strict=True)
        columns, found[1] = slice(None) if classes else differ, found[0].copy()
        found[1][:, columns] = nested.predicted(kernels, y[:, columns], mixtures, ratios, classes)[0]
    return np.stack(found)


def _losses(outputs: np.ndarray, y: np.ndarray, weight: np.ndarray, classes: bool) -> np.ndarray:
    """Return the loss of every cell (trial x cell x out): in nats, one column, or in units of the target's variance."""
    if classes:
        return -(log_softmax(outputs, axis=2) * y).sum(axis=2, keepdims=True) * (weight / weight.mean())[:, None]
    return (outputs - y) ** 2 / np.where(y.var(axis=0) > 0, y.var(axis=0), np.nan)


def _standard_error(better: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, int]:
    """Return the standard error of a mean over cells (out), whose groups stand together, and degrees of freedom."""
    left = better - better.mean(axis=0)
    if groups is not None:
        left = np.stack([left[groups == group].sum(axis=0) for group in np.unique(groups)])
    n = len(left)
    return np.sqrt(n / (n - 1) * (left**2).sum(axis=0)) / len(better), n - 1


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
    few.X = sparse.csr_matrix(few.X) * (np.median(totals) / depth)
    part = dataset.load(rows)
    part.x = few.X.log1p().astype(np.float32)
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
    too. Interaction is what no sum of functions of single genes can do. Such sums stand here as the weighted sums of 1,
    x, x^2 and 1[x > 0] of every gene, fitted on `train` with an L2 penalty that `validation` chooses.

    Parameters
    ----------
    model
        A fitted classifier or regressor.
    dataset
        Cells with their targets, best ones that neither `train` nor `validation` has.
    reference
        Expression of the reference cell (gene), a Series matched by name, or the name of a class for the mean of its
        cells in `dataset`; the mean of `dataset` if None.
    train, validation
        Cells that additive models are fitted on, and cells that choose their penalty and fit the curves; of stored
        cells as many are drawn as 256 MB hold, and of any 3,000 for the rival of ``gain``. Without both,
        ``interaction``, ``gain`` and what goes with them are NaN.

    Returns
    -------
    A row an output.

    - ``linear``, ``quadratic``: each part's share of the output's variance over cells; ``covariance``: twice their
      covariance as a share; the three add up to 1.
    - ``self``, ``pair``: the shares of Q_ii d_i^2, summed over genes, and of the rest of the quadratic part.
    - ``interaction``: share of the output's variance that the best additive predictor of the *output* leaves, which is
      its linear part, Q_ii d_i^2, and what is fitted to the pairs. At most: more training cells can only lower it. It
      does not depend on `reference`. It says what the model does, not whether the data ask for it.
    - ``interaction_curved``: the same after the additive predictor passes through one curve, fitted on `validation`:
      what neither a sum of single-gene functions nor a link of one can do.
    - ``gain``: score less that of the best model of the *target* without products: of genes, of components, presence
      1[x > 0], squares x^2, and depth, which may multiply components. `validation` chooses which of these. It says
      whether what the model does pays. A sum of functions of genes through one curve, a link, gains as well.
    - ``gain_curved``: the same after either model's outputs pass through curves of one number each, fitted on
      `validation`, so that a link is not taken for an interaction; where it is better there, the rival of a target is
      fitted together with its link. It is 0 where the model has no pairs. Only a positive one supports interactions
      in the data, and it is as noisy as a difference of two scores: look at several splits, or take :func:`gain`.
    - ``score``: recall of the class, or R2 of the target; ``score_additive`` that of the rival;
      ``score_linear`` and ``score_quadratic`` what is left without the quadratic or the linear part, which were trained
      together: neither loss proves need.
    - ``rank_99``: number of modules, in metric ``identity``, from which on 99% of the score are kept.

    ``attrs`` has scores, gains and the rank over all outputs, for classes also ``gain_log_loss`` and
    ``gain_log_loss_curved``, in nats a cell. For a model with ``class_weight`` they are of balanced accuracy and
    of weighted cells, as noisy as the few cells of the rarest class, and what is fitted to the target counts cells
    as the model does. Shares of variance, and what is fitted to the outputs for them, are of all cells alike.

    Raises
    ------
    ValueError
        `dataset` or `reference` does not fit the model, or one of `train` and `validation` is given alone.
    KeyError
        `reference` is not a class.

    Examples
    --------
    >>> table = interactions.audit(model, test, train=train, validation=validation)
    >>> table[["linear", "quadratic", "score", "score_additive", "gain"]].round(2)
            linear  quadratic  score  score_additive  gain
    output
    off       0.04       0.97    1.0            0.45  0.55
    on        0.04       0.97    1.0            0.48  0.52
    """
    model.check(dataset)
    if (train is None) != (validation is None):
        raise ValueError(
            f"audit has {'validation' if train is None else 'train'} alone; interaction and gain need train= to fit "
            f"additive models and validation= to choose their penalty: pass both, or neither to go without."
        )
    x, target = match_genes(dataset, model.gene_names), dataset.y.numpy()
    if reference is None or np.ndim(reference) == 0:
        if reference is not None and (target.ndim > 1 or reference not in model.output_names):
            names = list(model.output_names)
            raise KeyError(
                f"reference={reference!r} is not a class; they are {', '.join(map(repr, names))}"
                f"{nearest(reference, names)}."
            )
        chosen = slice(None) if reference is None else np.flatnonzero(target == model.output_names.get_loc(reference))
        if not isinstance(chosen, slice) and not len(chosen):
            raise ValueError(f"reference={reference!r}: dataset has no cell of that class; pass its mean expression.")
        reference = mean(take(x, chosen))
    reference = gene_vector(reference, model.gene_names, "reference")
    constant, linear, quadratic = decompose(model, x, reference)
    directions = np.stack([direction(model, name) for name in model.output_names])
    one, two, alone = linear @ directions.T, quadratic @ directions.T, _self_terms(model, x, reference)
    total = (one + two).var(axis=0)
    # An output that is the same in every cell has no variance to share out.
    total = np.where(total > 0, total, np.nan)
    table = pd.DataFrame(
        {"linear": one.var(axis=0) / total, "quadratic": two.var(axis=0) / total},
        index=pd.Index(model.output_names, name="output"),
    )
    table["covariance"] = 1 - table["linear"] - table["quadratic"]
    outputs = {"score": constant + linear + quadratic}
    beside = _additive(model, train, validation, x, target, outputs["score"]) if train is not None else {}
    for name in ("interaction", "interaction_curved"):
        table[name] = beside.get(name, np.nan)
    table["self"], table["pair"] = alone.var(axis=0) / total, (two - alone).var(axis=0) / total
    outputs |= {"score_linear": constant + linear, "score_quadratic": constant + quadratic}
    outputs |= {f"score_{name}": beside[name] for name in ("additive", "curved", "additive_curved") if name in beside}
    scores = {name: np.append(model._measure_each(y, target), model._measure(y, target)) for name, y in outputs.items()}
    unknown = np.full(len(table) + 1, np.nan)
    scores["gain"] = scores["score"] - scores.get("score_additive", unknown)
    scores["gain_curved"] = scores.pop("score_curved", unknown) - scores.pop("score_additive_curved", unknown)
    if beside:  # curves differ by chance: without products there is nothing to gain
        scores["gain_curved"][~np.append(beside["pairs"], beside["pairs"].any())] = 0.0
    scores.setdefault("score_additive", unknown)
    for name in ("gain", "gain_curved", "score", "score_additive", "score_linear", "score_quadratic"):
        table[name], table.attrs[name] = scores[name][:-1], float(scores[name][-1])
    if target.ndim == 1 and beside:
        options = {"labels": range(len(table)), "sample_weight": model._counts(target)}
        losses = {name: log_loss(target, softmax(outputs[name], axis=1), **options)
                  for name in ("score", "score_additive", "score_curved", "score_additive_curved")}  # fmt: skip
        table.attrs["gain_log_loss"] = losses["score_additive"] - losses["score"]
        curved = losses["score_additive_curved"] - losses["score_curved"]
        table.attrs["gain_log_loss_curved"] = curved if beside["pairs"].any() else 0.0
    needed = 0.99 * np.append(table["score"], table.attrs["score"])
    kept = np.array(
        [
            # Outputs that are all 0 are no prediction, though they put every cell into the first class.
            [*model._measure_each(y, target), model._measure(y, target)] if y.any() else needed - np.inf
            for y in _truncated(model, x)
        ]
    )
    # The number from which on the score is kept, for it may come and go; no score, no rank.
    ranks = [
        None if np.isnan(least) else int(np.flatnonzero(~(column >= least)).max(initial=-1)) + 1
        for column, least in zip(kept.T, needed, strict=True)
    ]
    table["rank_99"] = pd.array(ranks[:-1], dtype="Int64")
    table.attrs["rank_99"] = ranks[-1]
    return table


def _self_terms(model: Model, x: Any, reference: np.ndarray) -> np.ndarray:
    """Return the sum over genes of Q_ii d_i^2 of every direction (cell x out), without making cells dense."""
    own = np.stack([matrix.diagonal() for matrix in interaction_matrices(model)], axis=1)
    m, parts = np.ravel(reference).astype(np.float64), []
    for _, block in blocks(x, BLOCK_CELLS):
        square = block.multiply(block) if sparse.issparse(block) else np.square(block, dtype=np.float64)
        parts.append(np.asarray(square @ own - 2 * (block @ (m[:, None] * own))))
    return np.vstack(parts) + m**2 @ own


def _pairs(model: Model, cells: Any, reference: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the part of pairs of different genes, and the whole, of every direction (each cell x out)."""
    x = match_genes(cells, model.gene_names)
    parts = decompose(model, x, reference)
    return parts.quadratic @ directions.T - _self_terms(model, x, reference), sum(parts) @ directions.T


def _additive(
    model: Model,
    train: ExpressionDataset,
    validation: ExpressionDataset,
    x: Any,
    target: np.ndarray,
    outputs: np.ndarray,
) -> dict[str, np.ndarray]:
    """Return what additive models leave of the outputs (out), and what a rival makes of the target (cell x out).

    ``interaction`` and ``interaction_curved``; then ``additive``, the outputs of the best model without products,
    ``additive_curved``, the same through its curves, and ``curved``, the model's own outputs through theirs; and which
    outputs have ``pairs`` at all (out).
    """
    for dataset in (train, validation):
        model.check(dataset)
    train, validation = held(train), held(validation)
    features, watched = (additive_features(match_genes(cells, model.gene_names)) for cells in (train, validation))
    axes, directions = Axes(features), np.stack([direction(model, name) for name in model.output_names])
    result = {name: np.full(len(directions), np.nan) for name in ("interaction", "interaction_curved")}
    # Around any cell the linear part and the Q_ii d_i^2 are additive as they are; only the pairs need a predictor.
    # Around the training mean, so that the answer does not depend on a reference.
    center = mean(match_genes(train, model.gene_names))
    of_pairs, whole = zip(*(_pairs(model, cells, center, directions) for cells in (train, validation, x)), strict=True)
    total = whole[2].var(axis=0)
    if len(varied := np.flatnonzero((np.ptp(of_pairs[0], axis=0) > 0) & (total > 0))):
        predictor = ridge(axes, of_pairs[0][:, varied], watched, of_pairs[1][:, varied])
        predicted = predictor.outputs(watched), _of_additive(predictor, x)
        left = [part[:, varied] - one for part, one in zip(of_pairs[1:], predicted, strict=True)]
        additive = [part[:, varied] - rest for part, rest in zip(whole[1:], left, strict=True)]
        curved = _through_curves(additive[0], whole[1][:, varied], additive[1])
        result["interaction"][varied] = left[1].var(axis=0) / total[varied]
        result["interaction_curved"][varied] = (whole[2][:, varied] - curved).var(axis=0) / total[varied]
    for name in ("interaction", "interaction_curved"):  # a model without pairs has no interactions
        result[name][(np.ptp(of_pairs[0], axis=0) == 0) & (total > 0)] = 0.0
    counts, y_seen = model._counts(validation.y.numpy()), validation.y.numpy()
    own = model.outputs(validation).astype(np.float64)
    seen, linked_seen, result["additive"], linked = _rival(model, train, validation, x)
    result["curved"] = _through_curves(own, y_seen, outputs, counts)
    result["additive_curved"] = _through_curves(seen, y_seen, result["additive"], counts)
    if linked is not None:  # index and link fitted together, where that is better on validation cells
        fitted = [_through_curves(one, y_seen, one, counts) for one in (seen, linked_seen)]
        error = [np.square(one - y_seen).mean(axis=0) for one in fitted]
        again = _through_curves(linked_seen, y_seen, linked, counts)
        result["additive_curved"] = np.where(error[1] < error[0], again, result["additive_curved"])
    result["pairs"] = of_pairs[0].std(axis=0) > 1e-6 * whole[0].std(axis=0)
    return result


def _rival(
    model: Model, train: ExpressionDataset, validation: ExpressionDataset, x: Any
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray | None]:
    """Return outputs of the best model without products, and of targets an index fitted with its link.

    For validation cells either, and then for others either (each cell x out).
    """
    kind, classes, few = model.cfg.class_weight, train.y.ndim == 1, []
    for part in (train, validation):
        few.append(part.load(some(len(part), RIVAL_CELLS)))
        few[-1].x, few[-1].gene_names = match_genes(few[-1], model.gene_names), model.gene_names
    trial = nested.without_products(*few, kind)
    genes, found = model.gene_names, []
    for i, (_, block) in enumerate(blocks(x, RIVAL_CELLS)):
        others = (match_genes(validation, genes), block) if i == 0 else (block,)
        kernels, y = nested.kernels_of(few[0], *others, class_weight=kind)
        parts = nested.predicted(kernels, y, trial.mixtures, trial.ratios, classes)
        indices = [None if classes else np.empty(part.shape) for part in parts]
        pairs = [] if classes else [*zip(trial.mixtures, trial.ratios, strict=True)]
        for pair in dict.fromkeys(pairs):
            here = [k for k, own in enumerate(pairs) if own == pair]
            for index, one in zip(indices, nested.linked(kernels, y[:, here].numpy(), *pair), strict=True):
                index[:, here] = one
        found += [*zip(parts, indices, strict=True)]
    outputs, indices = zip(*found[1:], strict=True)
    return *found[0], np.vstack(outputs), None if classes else np.vstack(indices)


def _of_additive(model: LinearModel, x: Any) -> np.ndarray:
    """Return the outputs (cell x out) of a model of additive features, which take three times the memory of cells."""
    return np.vstack([model.outputs(additive_features(block)) for _, block in blocks(x, BLOCK_CELLS)])


def _through_curves(
    seen: np.ndarray, target: np.ndarray, outputs: np.ndarray, counts: np.ndarray | None = None
) -> np.ndarray:
    """Return outputs (cell x out), each through a curve of that one number, fitted on other cells, counted so often.

    A curve is a spline that follows the target, or for classes the log-probability of the class.
    """
    curved = np.empty_like(outputs, dtype=np.float64)
    if target.ndim == 1:  # of a class: its logit less the mean of all, since a softmax is blind to that
        seen, outputs = (y - y.mean(axis=1, keepdims=True) for y in (seen, outputs))
    for i in range(outputs.shape[1]):
        about = (target == i).astype(int) if target.ndim == 1 else target[:, i]
        if np.ptp(about) == 0 or np.ptp(seen[:, i]) == 0:  # a class without a validation cell, or nothing to bend
            curved[:, i] = np.log(1e-6) if target.ndim == 1 else about.mean()
            continue
        line = LogisticRegression(C=10) if target.ndim == 1 else Ridge(0.01)
        knots = np.unique(np.quantile(seen[:, i], np.linspace(0, 1, 8)))[:, None]
        curve = Pipeline([("spline", SplineTransformer(knots=knots)), ("line", line)])
        curve.fit(seen[:, [i]], about, line__sample_weight=counts)
        predict = curve.predict if target.ndim == 2 else lambda y, curve=curve: curve.predict_log_proba(y)[:, 1]
        curved[:, i] = predict(outputs[:, [i]])
    return curved


def _truncated(model: Model, x: Any, *, batch_size: int = 1024) -> Iterator[np.ndarray]:
    """Yield the outputs (cell x out) with no module of each output, with one, with two, and so on."""
    constant, linear, _ = decompose(model, x, model.origin)
    matrices = interaction_matrices(model)
    thin = {}  # of a solved model, outputs may have hidden units of their own
    for matrix in matrices:
        if matrix._thin not in thin:
            u, _ = matrix._thin()
            parts = [(dense_tensor(block).numpy() - model.origin) @ u for _, block in blocks(x, batch_size)]
            thin[matrix._thin] = np.vstack(parts)
    pairs = [(thin[matrix._thin], *matrix._thin_eigh()) for matrix in matrices]
    outputs = (constant + linear) @ np.stack([direction(model, name) for name in model.output_names]).T
    yield outputs
    for k in range(max(len(values) for _, values, _ in pairs)):
        outputs = outputs.copy()
        for i, (own, values, vectors) in enumerate(pairs):
            if k < len(values):
                outputs[:, i] += values[k] * (own @ vectors[:, k]) ** 2
        yield outputs
