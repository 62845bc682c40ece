"""Models that are solved and not trained, by the exact fits of scbmlp.exact, nested and moments."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from scbmlp import exact, moments, nested
from scbmlp.baselines import class_counts, linear_baseline
from scbmlp.checks import nearest, whole_number
from scbmlp.datasets import ExpressionDataset, check_dataset, held
from scbmlp.display import watched
from scbmlp.models import Config, ScBMLPClassifier, ScBMLPRegressor, Statistics, statistics
from scbmlp.training import kind_of

# Weight decay, dropout rate and weight decay of the linear part that `tune` tries, from strong to weak.
SETTINGS = [(3e-2, 0.4, 0.03), (1e-2, 0.4, 0.1), (3e-3, 0.2, 0.1)]


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

    Products are of principal components or of genes. Linear weights of genes, of components and of products are each
    penalised by their own. Validation cells choose space, rank and penalties, for every target by itself. Returned is
    the simplest form that is behind the best by no more than the standard error of their difference. The forms are
    linear in genes, linear in genes and components, products of components, and products of genes.

    More than 5,000 training cells, in memory or on disk, are solved from sums over cells (:mod:`scbmlp.moments`). Only
    products of components are tried then, and there is no rival. A dask client that is active shares the sums out.

    Parameters
    ----------
    ModelClass
        ``ScBMLPClassifier`` or ``ScBMLPRegressor``.
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
    options
        Handed to `ModelClass`, such as ``loss_fn``; solved is the squared error, whatever it is.

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
    >>> solved.trials.loc[solved.trials["chosen"] > 0, "form"].tolist()
    ['products of components']
    """
    for name, dataset in {"train": train, "val": val}.items():
        if dataset is not None:
            check_dataset(dataset, name)
    n_outputs = len(train.output_names)
    size = {"d_input": len(train.gene_names), "d_output": n_outputs}
    cfg = Config(**size, d_hidden=1, linear=True, device=device, class_weight=class_weight)
    ModelClass(cfg, **options).check(train, names=False)
    if train.y.ndim == 1 and len(train.y.unique()) < 2:
        raise ValueError("train has cells of 1 class alone; add cells of other classes.")
    large = len(train) > moments.LARGE
    names = ["linear in genes", *(name for name, *_ in nested.FORMS), *(() if large else nested.SPACES.values())]
    if form is not None and form not in names:
        raise ValueError(f"form={form!r} is unknown; choose one of {', '.join(names)}, or None{nearest(form, names)}.")
    groups = _groups(groups, val)
    kind = kind_of(device)
    how = {"must": form, "groups": groups, "class_weight": class_weight, "device": kind}
    if large:
        (trials, known, groups), rivals = moments.search(train, val, **how), []
    else:
        trials, rival = nested.search(held(train), None if val is None else held(val), **how, progress=progress)
        known, rivals = None, [rival]
    _, behind, error = nested.choose([*trials, *rivals], groups)
    best, _, _ = nested.choose(trials, groups)
    if form is not None:
        best = np.full_like(best, names.index(form))
    mixtures, ratios = zip(*((trials[i].mixtures[k], trials[i].ratios[k]) for k, i in enumerate(best)), strict=True)
    counts = None if class_weight is None else exact.counts_of(train, train, class_weight)
    if large and known is None:  # cells that chose are in no sums yet
        known = moments.Moments(train, counts, device=kind)
    road = partial(moments.solution, train, known=known) if large else partial(exact.solution, held(train))
    found = road(mixtures, ratios, counts=counts, device=kind)
    model = _solved(ModelClass, cfg, found, train, known if counts is None else None, **options)
    model.recipe = list(zip(mixtures, ratios, strict=True))
    rows = []
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
    model
        What :func:`solve` returned.
    train
        Its training cells.
    n_replicas
        Number of models, two at least.
    resample
        Draw as many cells as there are, with replacement, or halves; every two halves in a row share no cell.
    seed
        Of the draw.
    progress
        Show how many are done and the time left, in a terminal or a notebook.

    Returns
    -------
    The models. Their ``statistics`` are of all training cells, so that they can be compared.

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
    large, rng, found = len(train) > moments.LARGE, np.random.default_rng(seed), []
    train = train if large else held(train)
    order = np.arange(len(train))
    mixtures, ratios = zip(*model.recipe, strict=True)
    for i in tqdm(range(n_replicas), "replicas", delay=2, disable=not (progress and watched())):
        if resample == "bootstrap":
            drawn = np.bincount(rng.integers(len(train), size=len(train)), minlength=len(train))
        else:
            order = rng.permutation(len(train)) if i % 2 == 0 else order[::-1]
            drawn = np.bincount(order[: len(train) // 2], minlength=len(train))
        rows = np.flatnonzero(drawn)
        part, counts = moments.part_of(train, rows), drawn[rows].astype(float)
        if model.cfg.class_weight is not None:
            of_class = class_counts(model.cfg.class_weight, part.y.numpy(), model.cfg.d_output, counts)
            counts *= of_class[part.y.numpy()]
        road = moments.solution if large else exact.solution
        own = road(part, mixtures, ratios, counts=counts, device=kind_of(model.cfg.device))
        found.append(_solved(type(model), model.cfg, own, train, **model._options()))
        found[-1].recipe = model.recipe
    return found


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
    model.gene_names, model.output_names, model.layer = train.gene_names, train.output_names, train.layer
    with torch.no_grad():
        model.center.copy_(torch.as_tensor(found.mean))
        model.direct.weight.copy_(torch.as_tensor(found.direct))
        model.branches.weight.copy_(torch.as_tensor(np.vstack([found.hidden, found.hidden])))
        model.project.weight.copy_(torch.as_tensor(found.power))
        model.project.bias.copy_(torch.as_tensor(found.constant))
        if cfg.class_weight is not None:
            of_class = class_counts(cfg.class_weight, train.y.numpy(), cfg.d_output)
            model.class_weight.copy_(torch.as_tensor(of_class))
    model.eval()
    weight = model.branches.weight.detach().numpy()
    model.statistics = statistics(model, train) if known is None else Statistics(*known.statistics(weight))
    return model


def tune(
    ModelClass: type[ScBMLPClassifier | ScBMLPRegressor],
    train: ExpressionDataset,
    val: ExpressionDataset,
    *,
    groups: Any = None,
    trained: bool = False,
    d_hidden: int = 128,
    n_epochs: int | None = None,
    batch_size: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
    device: str = "auto",
    class_weight: Literal["balanced"] | None = None,
    progress: bool = True,
    **options: Any,
) -> ScBMLPClassifier | ScBMLPRegressor:
    """Solve the second-order model, and if asked train networks beside it; return the best on validation cells.

    If `trained`, the linear and the plain form of the network are fitted with three penalties each. Returned is the
    simplest that is behind the best by no more than the standard error of their difference. The solved model is
    simplest, then the linear form. Scores on the validation cells flatter, so keep test cells apart. Where cells come
    in donors, validate on whole ones and pass `groups`: no standard error over cells holds noise from donor to donor.

    Parameters
    ----------
    ModelClass, train, val, class_weight, device, progress
        As in :func:`solve`.
    groups
        Donor or batch of every validation cell, two at least; models are then compared donor by donor.
    trained
        Whether to train networks, too.
    d_hidden, n_epochs, batch_size, lr, seed
        As in :class:`Config`, for the networks; if None there are 40 epochs, or up to 200 for 1,500 steps.
    options
        Handed to `ModelClass`, such as ``loss_fn="huber"``.

    Returns
    -------
    The fitted model. Its ``trials`` are those of :func:`solve`, and a row for each setting of a network.

    Examples
    --------
    >>> tuned = models.tune(ScBMLPClassifier, train, validation)
    >>> tuned.trials.loc[tuned.trials["chosen"] > 0, "form"].tolist()
    ['products of components']
    """
    for name, dataset in {"train": train, "val": val}.items():
        check_dataset(dataset, name)
    solved = solve(
        ModelClass, train, val, groups=groups, class_weight=class_weight, device=device, progress=progress, **options
    )
    if not trained:
        return solved
    if n_epochs is None:
        n_epochs = int(np.clip(np.ceil(1500 * batch_size / len(train)), 40, 200))
    baseline = linear_baseline(train, val, class_weight=class_weight)
    size = {"d_input": len(train.gene_names), "d_hidden": d_hidden, "d_output": len(train.output_names)}
    shared = {"n_epochs": n_epochs, "batch_size": batch_size, "lr": lr, "seed": seed, "device": device}
    shared |= {"class_weight": class_weight, "patience": n_epochs}  # none stops before the end, each keeps its best
    models = []
    settings = [(linear, *one) for linear in (True, False) for one in SETTINGS]
    for linear, a, b, c in tqdm(settings, "tune", delay=2, disable=not (progress and watched())):
        cfg = Config(**size, **shared, linear=linear, weight_decay=a, dropout_rate=b, weight_decay_linear=c)
        models.append(ModelClass(cfg, **options))
        models[-1].fit(train, val, baseline=baseline, enable_progress_bar=False)
    losses = [model._cell_losses(model.outputs(val), val.y.numpy())[:, None] for model in (solved, *models)]
    compared = [nested.Trial("", (), (), one) for one in losses]
    (best,), behind, error = nested.choose(compared, _groups(groups, val))
    rows = pd.DataFrame({"form": [f"network, {'linear' if model.cfg.linear else 'plain'} form" for model in models]})
    rows["weight_decay"] = [model.cfg.weight_decay for model in models]
    rows["val_loss"] = [one.loss for one in compared[1:]]
    rows = rows.assign(behind=behind[1:, 0], standard_error=error[1:, 0], chosen=0)
    trials = pd.concat([solved.trials, rows], ignore_index=True)
    if best > 0:
        trials["chosen"] = 0
        trials.loc[len(solved.trials) + best - 1, "chosen"] = len(train.output_names)
    model = [solved, *models][best]
    model.trials = trials
    return model
