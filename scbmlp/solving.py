"""Models that are solved and not trained, by the exact fits of scbmlp.exact, nested and moments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scipy.special import log_softmax
from tqdm.auto import tqdm

from scbmlp import exact, moments, nested
from scbmlp.baselines import class_counts
from scbmlp.checks import nearest, whole_number
from scbmlp.datasets import ExpressionDataset, check_dataset, held
from scbmlp.display import watched
from scbmlp.models import Config, ScBMLPClassifier, ScBMLPRegressor, Statistics, statistics
from scbmlp.training import kind_of

DECAYS = 3e-2, 1e-2, 3e-3  # penalties of networks, the simplest model first
SHARES = np.geomspace(0.5, 0.06, 11)  # thresholds of measured pairs, as shares of the largest eigenvalue


def solve(
    ModelClass: type[ScBMLPClassifier | ScBMLPRegressor],
    train: ExpressionDataset,
    val: ExpressionDataset | None = None,
    *,
    form: str | None = None,
    groups: Any = None,
    class_weight: Literal["balanced"] | None = None,
    device: str = "auto",
    progress: bool = True,
    **options: Any,
) -> ScBMLPClassifier | ScBMLPRegressor:
    """Solve the second-order model y = c + w'd + d'Qd, with d = x - training mean, by convex fits and without a seed.

    Products are of principal components or of genes. Validation cells choose space, rank and penalties, for every
    target by itself. Returned is the simplest form that is behind the best by no more than the standard error of their
    difference. The forms are linear in genes, linear in genes and components, products of components, and products of
    genes. More than 5,000 training cells are solved from sums over cells (:mod:`scbmlp.moments`), with products of
    components alone and without a rival.

    Parameters
    ----------
    ModelClass, options
        ``ScBMLPClassifier`` or ``ScBMLPRegressor``, and what it takes; solved is the squared error whatever `loss_fn`.
    train, val
        Cells to fit, and cells that choose; below 300 of the latter, folds of all cells or a part of `train` choose.
    form
        What to return whatever is best, such as ``"products of components"``; if None, the choice is as above.
    groups
        Donor or batch of every validation cell, two at least; models are then compared donor by donor.
    class_weight, device
        As in :class:`Config`.
    progress
        Show how many forms are done and the time left, in a terminal or a notebook.

    Returns
    -------
    The model in the linear form: both branches hold the eigenvectors of the interaction matrices, P the eigenvalues.
    ``trials`` has for each form its mixture, penalty, ``val_loss``, how far it is ``behind`` the best with its
    ``standard_error``, and for how many outputs it was ``chosen``. The last row is a rival without products.

    Examples
    --------
    >>> solved = models.solve(ScBMLPClassifier, train, validation)
    >>> round(solved.score(test), 2)
    1.0
    """
    check_dataset(train, "train")
    if val is not None:
        check_dataset(val, "val")
    size = {"d_input": len(train.gene_names), "d_hidden": 1, "d_output": len(train.output_names)}
    cfg = Config(**size, linear=True, device=device, class_weight=class_weight)
    ModelClass(cfg, **options).check(train, names=False)
    if train.y.ndim == 1 and len(train.y.unique()) < 2:
        raise ValueError("train has cells of 1 class alone; add cells of other classes.")
    large = len(train) > moments.LARGE
    names = ["linear in genes", *(name for name, *_ in nested.FORMS), *(() if large else nested.SPACES.values())]
    if form is not None and form not in names:
        raise ValueError(f"form={form!r} is unknown; choose one of {', '.join(names)}, or None{nearest(form, names)}.")
    groups, kind = _groups(groups, val), kind_of(device)
    how = {"must": form, "groups": groups, "class_weight": class_weight, "device": kind}
    cells, known, rivals = train if large else held(train), None, []
    counts = exact.counts_of(cells, train, class_weight)
    if large:
        trials, known, groups = moments.search(train, val, **how)
        if known is None:  # cells that chose are in no sums yet
            known = moments.Moments(train, counts, device=kind)
    else:
        trials, *rivals = nested.search(cells, None if val is None else held(val), **how, progress=progress)
    best, _, _ = nested.choose(trials, groups)
    if form is not None:
        best = np.full_like(best, names.index(form))
    recipe = [(trials[i].mixtures[k], trials[i].ratios[k]) for k, i in enumerate(best)]
    found = exact.solution(cells, *zip(*recipe, strict=True), counts=counts, device=kind, known=known)
    model = _solved(ModelClass, cfg, found, train, known if class_weight is None else None, **options)
    model.recipe, rows = recipe, []
    _, behind, error = nested.choose([*trials, *rivals], groups)
    for i, trial in enumerate([*trials, *rivals]):
        mixture, ratio = nested.leading(trial)
        row = {"form": trial.form, "rank": mixture.rank, "components": mixture.weight("components")}
        row |= {"products": mixture.weight("products"), "penalty": ratio, "val_loss": trial.loss}
        row |= {"behind": behind[i].mean(), "standard_error": error[i].mean(), "chosen": int((best == i).sum())}
        rows.append(row)
    model.trials = pd.DataFrame(rows)
    return model


def solve_replicas(
    model: ScBMLPClassifier | ScBMLPRegressor,
    train: ExpressionDataset,
    n_replicas: int = 20,
    resample: Literal["bootstrap", "half"] = "bootstrap",
    *,
    seed: int = 0,
    progress: bool = True,
) -> list[ScBMLPClassifier | ScBMLPRegressor]:
    """Solve a model anew on resampled cells, with its mixtures and its penalties.

    Parameters
    ----------
    model, train
        What :func:`solve` returned, and its training cells, whose ``statistics`` the replicas have.
    n_replicas, seed
        Number of models, two at least, and seed of the draw.
    resample
        Draw as many cells as there are, with replacement, or halves; every two halves in a row share no cell.
    progress
        Show how many are done and the time left, in a terminal or a notebook.

    Examples
    --------
    >>> again = models.solve_replicas(solved, train, 2, "half")
    >>> [replica.score(test) > 0.9 for replica in again]
    [True, True]
    """
    n_replicas = whole_number(n_replicas, "n_replicas", 2)
    if resample not in ("bootstrap", "half"):
        raise ValueError(f"resample={resample!r} is unknown; choose 'bootstrap' or 'half'.")
    if model.recipe is None:
        raise ValueError("the model was trained, not solved: there is no mixture to solve again; pass one of solve.")
    model.check(train)
    rng, replicas = np.random.default_rng(seed), []
    train = train if len(train) > moments.LARGE else held(train)
    order = np.arange(len(train))
    for i in tqdm(range(n_replicas), "replicas", delay=2, disable=not (progress and watched())):
        if resample == "bootstrap":
            rows = rng.integers(len(train), size=len(train))
        else:
            order = rng.permutation(len(train)) if i % 2 == 0 else order[::-1]
            rows = order[: len(train) // 2]
        rows, counts = np.unique(rows, return_counts=True)
        replicas.append(solve_again(model, moments.part_of(train, rows), counts, train))
    return replicas


def solve_again(
    model: ScBMLPClassifier | ScBMLPRegressor, part: ExpressionDataset, counts: np.ndarray, train: ExpressionDataset
) -> ScBMLPClassifier | ScBMLPRegressor:
    """Solve a model on some cells, each so often (cell), by its recipe; statistics and outputs are those of `train`."""
    counts, cfg = counts.astype(float), replace(model.cfg, d_output=len(train.output_names))
    if part.y.ndim == 1:
        counts *= class_counts(cfg.class_weight, part.y.numpy(), cfg.d_output, counts)[part.y.numpy()]
    kind = kind_of(cfg.device)
    known = moments.Moments(part, counts, device=kind) if len(train) > moments.LARGE else None
    found = exact.solution(part, *zip(*model.recipe, strict=True), counts=counts, device=kind, known=known)
    again = _solved(type(model), cfg, found, train, **model._options)
    again.recipe = model.recipe
    return again


def solve_pairs(
    ModelClass: type[ScBMLPRegressor], train: ExpressionDataset, *, n_folds: int = 10, **options: Any
) -> ScBMLPRegressor:
    """Solve y = c + w_i + w_j + Q_ij for measured pairs of genes, with Q of low rank and without a seed.

    Least squares for w and shrunken eigenvalues of what is left take turns. Pairs that were not measured keep what the
    model says of them. An eigenvalue e is 0 up to a threshold t, which folds of the pairs choose. Above, it loses
    t (t / e)^(1/2). The nuclear norm :cite:p:`mazumder2010` would take t of each, which is too much of the large ones.

    Parameters
    ----------
    ModelClass, options
        ``ScBMLPRegressor``, and what is handed to it.
    train, n_folds
        A row a pair, with 1 for its two genes, 0 for all others and one target; and the number of folds.

    Returns
    -------
    The model in the linear form, so that its interaction matrix and its modules are read as those of any other.
    ``trials`` has for each t, as a share of the largest eigenvalue, the squared error in the folds and the rank.

    Examples
    --------
    >>> x = np.array(
    ...     [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]]
    ... )
    >>> y = np.array([0.9, 0.1, 0.2, -0.1, 0.0])
    >>> pairs = datasets.ExpressionDataset(x, y, ["A", "B", "C", "D"], ["fitness"])
    >>> len(models.solve_pairs(ScBMLPRegressor, pairs, n_folds=2).trials)
    11
    """
    check_dataset(train, "train")
    cells = held(train)
    x = sparse.csr_matrix(cells.x)
    if cells.y.ndim != 2 or cells.y.shape[1] > 1 or (np.diff(x.indptr) != 2).any() or (x.data != 1).any():
        raise ValueError(
            f"train has {len(cells)} rows of {len(cells.output_names)} outputs, and a row is to have 1 for two genes, "
            f"0 for all others and one target; measured pairs are needed. For cells use solve."
        )
    n_folds = whole_number(n_folds, "n_folds", 2, len(cells))
    n, pairs, y = x.shape[1], np.sort(x.indices.reshape(-1, 2), axis=1), cells.y.numpy()[:, 0].astype(np.float64)
    codes = np.unique(pairs @ [n, 1], return_inverse=True)[1]  # in any order of the rows the same
    fold = np.random.default_rng(0).permutation(codes.max() + 1)[codes] % n_folds
    trials, solutions = [], []
    parts = [_completed(pairs[fold != i], y[fold != i], n) for i in range(n_folds)]
    for (share, *found), *others in zip(_completed(pairs, y, n), *parts, strict=True):
        squares = 0.0
        for i, (_, constant, w, q) in enumerate(others):
            a, b = pairs[fold == i].T
            squares += np.sum((y[fold == i] - constant - w[a] - w[b] - q[a, b]) ** 2)
        solutions.append(found)
        rank = np.linalg.matrix_rank(found[2], 1e-9)
        trials.append({"threshold": share, "val_loss": squares / len(y), "rank": rank})
    best = int(np.argmin([trial["val_loss"] for trial in trials]))
    constant, w, q = solutions[best]
    values, vectors = np.linalg.eigh(q / 2)  # x'(Q / 2)x has Q_ij, and half of both squares, which w gives back
    kept = np.argsort(-np.abs(values), kind="stable")[: max(trials[best]["rank"], 1)]
    direct = (w - q.diagonal() / 2)[None]
    found = exact.Solution(np.zeros(n), np.array([constant]), direct, vectors[:, kept].T, values[None, kept])
    model = _solved(ModelClass, Config(n, 1, 1, linear=True, device="cpu"), found, train, **options)
    model.trials = pd.DataFrame(trials).assign(chosen=np.arange(len(trials)) == best)
    return model


def _completed(pairs: np.ndarray, y: np.ndarray, n: int) -> Iterator[tuple[float, float, np.ndarray, np.ndarray]]:
    """Yield for falling thresholds their share of the largest eigenvalue, the constant, w (gene), Q (gene x gene)."""
    (a, b), rows = pairs.T, np.arange(len(y))
    design = np.zeros((len(y), n + 1))
    design[rows, a] = design[rows, b] = design[:, n] = 1
    fit = np.linalg.solve(design.T @ design + 1e-3 * np.eye(n + 1), design.T)
    times = sparse.coo_matrix((np.ones(len(y)), (a, b)), (n, n)).toarray()
    times = np.maximum(times + times.T, 1)
    q, largest = np.zeros((n, n)), 0.0
    for share in SHARES:
        for _ in range(300):
            w = fit @ (y - q[a, b])
            left = sparse.coo_matrix((y - design @ w - q[a, b], (a, b)), (n, n)).toarray()
            values, vectors = np.linalg.eigh(q + (left + left.T) / times)
            size = np.abs(values)
            largest = largest or size.max()  # of what single genes leave
            lost = share * largest * (share * largest / np.maximum(size, 1e-300)) ** 0.5
            before, q = q, (vectors * np.sign(values) * np.maximum(size - lost, 0)) @ vectors.T
            if np.abs(q - before).max() <= 2e-5 * np.abs(y).max():
                break
        yield share, w[n], w[:n], q


def _groups(groups: Any, val: ExpressionDataset | None) -> np.ndarray | None:
    """Return the code of each validation cell's group, of two groups at least."""
    if groups is None:
        return None
    codes = pd.factorize(np.asarray(groups))[0]
    n_groups, n_cells = len(set(codes) - {-1}), 0 if val is None else len(val)
    if len(codes) != n_cells or n_groups < 2 or -1 in codes:
        raise ValueError(
            f"groups has {len(codes)} labels of {n_groups} groups, {np.sum(codes == -1)} of them missing, for "
            f'{n_cells} validation cells; pass one a cell of two groups or more, such as adata.obs["donor"].iloc['
            f"val.indices], after holding out more donors, or leave groups out."
        )
    return codes


def _solved(
    ModelClass: type[ScBMLPClassifier | ScBMLPRegressor],
    cfg: Config,
    found: exact.Solution,
    train: ExpressionDataset,
    known: moments.Moments | None = None,
    **options: Any,
) -> ScBMLPClassifier | ScBMLPRegressor:
    """Return the model that a solution is, in the linear form; its statistics are walked for, if not known."""
    model = ModelClass(replace(cfg, d_hidden=len(found.hidden)), **options)
    model._adopt(train)
    with torch.no_grad():
        model.center.copy_(torch.as_tensor(found.mean))
        model.direct.weight.copy_(torch.as_tensor(found.direct))
        model.branches.weight.copy_(torch.as_tensor(np.vstack([found.hidden, found.hidden])))
        model.project.weight.copy_(torch.as_tensor(found.power))
        model.project.bias.copy_(torch.as_tensor(found.constant))
    model.eval()
    weight = model.branches.weight.detach().numpy()
    model.statistics = statistics(model, train) if known is None else Statistics(*known.statistics(weight))
    return model


def tune(
    ModelClass: type[ScBMLPClassifier | ScBMLPRegressor],
    train: ExpressionDataset,
    val: ExpressionDataset,
    *,
    trained: bool = False,
    n_epochs: int = 40,
    config: dict[str, Any] | None = None,
    groups: Any = None,
    **options: Any,
) -> ScBMLPClassifier | ScBMLPRegressor:
    """Solve a model, and if asked train networks beside it: the simplest of those that do equally well is returned.

    The solved model is the simplest, then networks with a linear part. Each form of network is fitted with three
    penalties. A model that is behind the best by a standard error at most does equally well.

    Parameters
    ----------
    ModelClass, train, val, groups, options
        As in :func:`solve`.
    trained, n_epochs, config
        Whether to train networks, for how many epochs, and more fields of :class:`Config`, such as ``{"lr": 1e-4}``.

    Examples
    --------
    >>> tuned = models.tune(ScBMLPClassifier, train, validation)
    >>> tuned.trials.loc[tuned.trials["chosen"] > 0, "form"].tolist()
    ['products of components']
    """
    solved = solve(ModelClass, train, val, groups=groups, **options)
    if not trained:
        return solved
    found = [solved]
    how = {"d_hidden": 128, "n_epochs": n_epochs, "device": solved.cfg.device, "class_weight": solved.cfg.class_weight}
    how |= {"d_input": solved.cfg.d_input, "d_output": solved.cfg.d_output, **(config or {})}
    for linear in (True, False):
        for decay in DECAYS:
            network = ModelClass(Config(linear=linear, weight_decay=decay, **how), **solved._options)
            network.fit(train, val, enable_progress_bar=False)
            found.append(network)
    y, counts = val.y.numpy(), exact.counts_of(val, train, solved.cfg.class_weight)
    losses = [_cell_losses(model.outputs(val).astype(float), y, counts)[:, None] for model in found]
    compared = [nested.Trial("", (), (), one) for one in losses]
    (best,), behind, error = nested.choose(compared, _groups(groups, val))
    rows = [f"network, {'linear' if model.cfg.linear else 'plain'} form" for model in found[1:]]
    rows = pd.DataFrame({"form": rows, "penalty": [model.cfg.weight_decay for model in found[1:]]})
    rows["val_loss"] = [one.loss for one in compared[1:]]
    rows = rows.assign(behind=behind[1:, 0], standard_error=error[1:, 0], chosen=0)
    trials = pd.concat([solved.trials, rows], ignore_index=True)
    if best > 0:
        trials["chosen"] = 0
        trials.loc[len(solved.trials) + best - 1, "chosen"] = len(train.output_names)
    found[best].trials = trials
    return found[best]


def _cell_losses(outputs: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the loss of every cell (cell): cross-entropy, or the mean squared error in variances of targets."""
    if y.ndim == 1:
        return -log_softmax(outputs, axis=1)[np.arange(len(y)), y] * counts
    return ((outputs - y) ** 2 / y.var(axis=0)).mean(axis=1)
