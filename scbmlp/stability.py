"""Would a module come back? Replicas, consensus, and permuted targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse.linalg import LinearOperator, eigsh
from tqdm.auto import tqdm

from scbmlp.checks import whole_number
from scbmlp.datasets import ExpressionDataset, check_dataset, held, match_genes
from scbmlp.display import watched
from scbmlp.exact import Kernels, Mixture, targets_of
from scbmlp.interactions import Model, Output, direction
from scbmlp.modules import GeneModules, Metric, _check_metric, _signed, _uncorrelated, _whitened, gene_modules

DENSE = 400  # components up to which matrices are formed
System = tuple[torch.Tensor, np.ndarray, torch.Tensor]  # its factor, a target (cell), and W (cell x comp)


def agreement(fits: Sequence[pd.DataFrame]) -> pd.Series:
    """Return how well loadings (gene x comp) come back in `fits`: mean absolute cosine with the closest of each (comp).

    >>> fits = [modules.gene_modules(one, "on", 2).loadings for one in replicas]
    >>> modules.agreement(fits).round(2).to_dict()
    {'module_1': 0.99, 'module_2': 0.99}
    """
    if len(fits) < 2:
        raise ValueError(f"fits has {len(fits)} table of loadings; two or more are needed: refit with seeds.")
    if not all(table.index.equals(fits[0].index) for table in fits):
        raise ValueError("fits have different genes, or in another order; fit all models on the same genes.")
    unit = [table.to_numpy() / np.linalg.norm(table.to_numpy(), axis=0) for table in fits]
    closest = [np.abs(a.T @ b).max(axis=1) for a, b in permutations(unit, 2)]
    return pd.Series(np.mean(closest, axis=0), fits[0].columns, name="agreement")


def consensus(models: Sequence[Model], output: Output, n_modules: int = 10) -> GeneModules:
    """Return the modules of the mean of several models, in metric ``covariance``, without what one draw of cells adds.

    Models are of the same training cells, such as :func:`scbmlp.models.solve_replicas` returns. Three times `n_modules`
    or 20 of each enter the mean.

    >>> found = modules.consensus(replicas, "on", n_modules=2)
    >>> found.eigenvalues.abs().round(1).tolist()
    [2.8, 2.8]
    """
    return _mean_modules(models, _of_each(models, output, n_modules), output, n_modules)


def stability(
    models: Sequence[Model],
    output: Output,
    n_modules: int = 5,
    *,
    modules: GeneModules | None = None,
    dataset: ExpressionDataset | None = None,
) -> pd.DataFrame:
    """Say how well modules come back from model to model, by the absolute correlation of scores.

    Modules are matched one to one, and of those whose eigenvalues are within a tenth of each other the best mix counts.
    The table has the mean ``stability``, and between ``low`` and ``high`` nine of ten pairs of models, or models.

    Parameters
    ----------
    models, output, n_modules
        As in :func:`consensus`, whose modules are looked for in each ordered pair of models, over the training cells.
    modules, dataset
        Modules to look for in every model instead, and cells to correlate their scores over.

    Examples
    --------
    >>> modules.stability(replicas, "on", n_modules=2)["stability"].round(1).tolist()
    [1.0, 1.0]
    """
    if (modules is None) != (dataset is None):
        raise ValueError("stability takes modules= and dataset= together: cells to correlate their scores over.")
    if modules is not None:
        n_modules = len(modules.eigenvalues)
    found, pairs = _of_each(models, output, n_modules), []
    if modules is None:
        modules = _mean_modules(models, found, output, n_modules)
        matched = [linear_sum_assignment(-np.abs(_correlations(modules, one)))[1] for one in found]
        for i, j in permutations(range(len(found)), 2):
            pairs.append(_comes_back(_correlations(found[i], found[j])[matched[i]], found[j], matched[j]))
    else:
        scores = modules.scores(dataset)
        for one in found:
            r = _correlated(scores, one.scores(dataset))
            pairs.append(np.minimum(_comes_back(r, one, linear_sum_assignment(-np.abs(r))[1]), 1.0))
    low, high = np.quantile(pairs, [0.05, 0.95], axis=0)
    columns = {"eigenvalue": modules.eigenvalues, "stability": np.mean(pairs, axis=0), "low": low, "high": high}
    return pd.DataFrame(columns, modules.eigenvalues.index)


def _comes_back(r: np.ndarray, other: GeneModules, partner: np.ndarray) -> np.ndarray:
    """Return the correlation (comp) with the partner, or with the best mix of modules about as strong as it."""
    values = other.eigenvalues.to_numpy()
    strength = values[partner][:, None]
    return np.sqrt((r**2 * (np.abs(values - strength) <= 0.1 * np.abs(strength))).sum(axis=1))


def _of_each(models: Sequence[Model], output: Output, n_modules: int) -> list[GeneModules]:
    """Return the leading modules of every model in metric ``covariance``."""
    n_modules, models = whole_number(n_modules, "n_modules"), list(models)
    if len(models) < 2:
        raise ValueError(f"models has {len(models)}; two or more are needed to compare: scbmlp.models.solve_replicas.")
    first = models[0]
    for name in ("gene_names", "output_names"):
        if not all(getattr(model, name).equals(getattr(first, name)) for model in models):
            raise ValueError(f"models have different {name}, or in another order; fit all on the same data.")
    known = [model.statistics for model in models]  # without them, gene_modules says what to do
    if None not in known and not all(np.allclose(one.mean, known[0].mean) for one in known):
        raise ValueError("models were trained on different cells; fit replicas of one training set, or resample it.")
    found = []
    for model in models:
        modules = gene_modules(model, output, None, "covariance")
        kept = modules.eigenvalues.index[: max(3 * n_modules, 20)]
        parts = {name: getattr(modules, name)[kept] for name in ("eigenvalues", "loadings", "weights")}
        found.append(replace(modules, **parts))
    return found


def _correlations(a: GeneModules, b: GeneModules) -> np.ndarray:
    """Return the correlations of scores over the training cells, in which both have variance 1 (comp x comp)."""
    return a.weights.to_numpy().T @ (b.unit.to_numpy()[:, None] * b.loadings.to_numpy())


def _mean_modules(models: Sequence[Model], found: list[GeneModules], output: Output, n_modules: int) -> GeneModules:
    """Return the modules of the mean of the matrices that have these modules."""
    basis = np.hstack([modules.weights for modules in found])
    core = np.diag(np.concatenate([modules.eigenvalues for modules in found])) / len(found)
    unit = found[0].unit.to_numpy()
    covariance = unit[:, None] * np.hstack([modules.loadings for modules in found])
    values, in_basis = _uncorrelated(core, *_whitened(basis.T @ covariance), n_modules)
    parts = values, basis @ in_basis, covariance @ in_basis
    return _signed(models[0], output, models[0].statistics, unit, parts, "covariance")


def follows_target(modules: GeneModules, model: Model, dataset: ExpressionDataset) -> np.ndarray:
    """Return how well what each module adds to its output follows the target over cells, by correlation (comp)."""
    target = _target(modules, model, dataset)
    if np.ptp(target) == 0:
        raise ValueError(f"dataset has the same target of {modules.output!r} in every cell; take more cells.")
    return _correlated(modules.contributions(dataset), target[:, None])[:, 0]


def _target(modules: GeneModules, model: Model, dataset: ExpressionDataset) -> np.ndarray:
    """Return the target of an output, or of a mix of outputs (cell)."""
    target = dataset.y.numpy()
    return (np.eye(model.cfg.d_output)[target] if target.ndim == 1 else target) @ direction(model, modules.output)


def follows_in_groups(
    modules: GeneModules, model: Model, datasets: Sequence[ExpressionDataset], groups: Any
) -> pd.DataFrame:
    """Return the same in each group of the cells (comp x group), by the label of every cell of the whole AnnData.

    NaN stands where all cells of a group have one target.
    """
    found = {}
    for dataset in datasets:
        own = np.asarray(groups)[dataset.indices]
        for group in dict.fromkeys(own):
            part = dataset.load(own == group)
            varies = np.ptp(_target(modules, model, part)) > 0
            found[group] = follows_target(modules, model, part) if varies else np.nan
    return pd.DataFrame(found, modules.eigenvalues.index)


def _correlated(a: Any, b: Any) -> np.ndarray:
    """Return the correlations of the columns of two tables, 0 where one of the two is the same in all cells."""
    a, b = (part - part.mean(axis=0) for part in (np.asarray(one, dtype=np.float64) for one in (a, b)))
    scale = np.outer(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=0))
    return np.divide(a.T @ b, scale, out=np.zeros_like(scale), where=scale > 0)


def permutation_null(
    model: Model,
    train: ExpressionDataset,
    val: ExpressionDataset,
    output: Output | list[Output],
    n_permutations: int = 999,
    strata: Any = None,
    *,
    n_modules: int = 5,
    metric: Metric = "covariance",
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Compare the modules of a solved model with those solved for targets that are dealt out to the wrong cells.

    A module is judged on `val`, by the correlation ``r`` of what it adds to the output with the target. ``p`` is for
    any module to be as good by chance: each permutation counts with its best one, whose ``r`` is in ``attrs["null"]``;
    nine of ten stay below ``null``. A small p says that a module is about the target, not that it is an interaction.
    Classes are solved as 0 and 1 by least squares, with the penalty over the curvature of the log-loss.

    Parameters
    ----------
    model, train, val
        What :func:`scbmlp.models.solve` returned, its training cells, and cells that no weight was fitted to.
    output, n_modules, metric
        As in :func:`gene_modules`; or a list of outputs. One without products has no modules.
    n_permutations, seed, progress
        Number of permutations, their seed, and whether a bar shows how many are done.
    strata
        Label of every cell of the whole AnnData, such as ``adata.obs["donor"]``; targets stay within a stratum.

    Examples
    --------
    >>> table = modules.permutation_null(solved, train, validation, "on", 99)
    >>> float(table["p"].min())
    0.01
    """
    _check_metric(metric)
    n_modules, n_permutations = whole_number(n_modules, "n_modules"), whole_number(n_permutations, "n_permutations")
    check_dataset(train, "train")
    check_dataset(val, "val")
    if model.recipe is None:
        raise ValueError("the model was trained, not solved, and has no mixture: pass one of scbmlp.models.solve.")
    model.check(train)
    model.check(val)
    train, val = held(train), held(val)
    rng, tables, null = np.random.default_rng(seed), {}, {}
    orders = [_orders(one, name, strata, n_permutations, rng) for name, one in (("train", train), ("val", val))]
    outputs, prepare = output if isinstance(output, list) else [output], _preparer(model, train, val, metric)
    for name in outputs:
        values, r = _read(*prepare(name), n_modules, *orders, progress)
        best, key = r[1:].max(axis=1, initial=-1), str(name)
        null[key] = best.tolist() if len(values) else []
        columns = {"eigenvalue": values, "r": r[0], "null": np.quantile(best, 0.9), "p": p_values(r[0], best)}
        tables[key] = pd.DataFrame(columns, [f"module_{i}" for i in range(1, len(values) + 1)])
    table = pd.concat(tables, names=["output", "module"]) if outputs is output else tables[str(output)]
    table.attrs |= {"null": null, "metric": metric}
    return table


def p_values(r: Any, best: Any) -> np.ndarray:
    """Return the share of fits that are at least as good as each module (comp), its own among them."""
    return (1 + (np.asarray(best) >= np.asarray(r)[:, None]).sum(axis=1)) / (1 + len(best))


def _preparer(model: Model, train: ExpressionDataset, val: ExpressionDataset, metric: str) -> Callable[[Output], Any]:
    """Return what gives the systems of an output, scores of validation cells on their axes, and targets of these."""
    kernels = Kernels(train.x, match_genes(val, train.gene_names))
    y, y_val = (targets_of(one, len(train.output_names)).numpy() for one in (train, val))
    mean, d = y.mean(axis=0), kernels.d
    recipe = model.recipe * (len(mean) // len(model.recipe))
    if train.y.ndim == 1:
        curvature = float((mean * (1 - mean)).mean())
        recipe = [(mixture, ratio / curvature) for mixture, ratio in recipe]

    @lru_cache(1)  # outputs of one mixture share a factor, which is as large as all pairs of cells
    def factor(mixture: Mixture, ratio: float) -> torch.Tensor:
        system = kernels.mixed(mixture)[0].clone()
        system.diagonal().add_(ratio * len(system))
        return torch.linalg.cholesky(system)

    def basis_of(mixture: Mixture) -> torch.Tensor:
        if mixture.space == "components":
            return kernels.axes(mixture.rank)
        return torch.diag(1 / (kernels.sd if mixture.space == "sd" else torch.ones_like(kernels.sd)))

    def prepare(output: Output) -> tuple[list[System], np.ndarray, np.ndarray]:
        mix = direction(model, output)
        target = y_val @ mix
        if np.ptp(target) == 0:
            raise ValueError(f"val has the same target of {output!r} in every cell; take more cells.")
        parts: dict[tuple[Mixture, float], np.ndarray] = {}  # targets that are solved together
        for i in np.flatnonzero(mix):
            if recipe[i][0].weight("products"):
                parts[recipe[i]] = parts.get(recipe[i], 0) + (y[:, i] - mean[i]) * mix[i]
        parts = {pair: one for pair, one in parts.items() if np.ptp(one) > 0}
        if not parts:
            return [], np.empty((len(y_val), 0)), target
        # Q = B C B' with C = (D B)' diag(a) D B. In the metric M, with B'MB = A R^2 A', it has the eigenvalues of
        # W' diag(a) W, W = D B A R, and D B A / R turns eigenvectors into scores.
        basis = [basis_of(mixture) for mixture, _ in parts]
        whole = torch.cat(basis, dim=1)
        if metric == "covariance":
            half = d[0] @ whole / len(d[0]) ** 0.5
        else:
            half = whole if metric == "identity" else whole * kernels.sd[:, None]
        axes, root = map(torch.as_tensor, _whitened((half.T @ half).numpy()))
        systems, turns = [], axes.split([one.shape[1] for one in basis])
        for ((mixture, ratio), one), own, turn in zip(parts.items(), basis, turns, strict=True):
            scale = mixture.weight("products") / kernels.block("products", mixture.rank, mixture.space)[1]
            systems.append((factor(mixture, ratio), one * scale, d[0] @ own @ turn * root))
        return systems, (d[1] @ whole @ axes / root).numpy(), target

    return prepare


def _read(
    systems: list[System], seen: np.ndarray, target: np.ndarray, n: int, orders: Any, orders_val: Any, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues for the first order of the cells (comp), and correlations for each (order x comp)."""
    if not systems:  # products do not pay
        return np.zeros(0), np.zeros((len(orders), 0))
    each = [(torch.cholesky_solve(torch.as_tensor(y[orders].T), factor).T.contiguous(), w) for factor, y, w in systems]
    eigenvalues, found = [], []
    with tqdm(total=len(orders), desc="permutations", delay=2, disable=not (progress and watched())) as bar:
        for first in range(0, len(orders), 50):  # some at once: quicker, and little memory
            some = slice(first, first + 50)
            values, vectors = _leading([(a[some], w) for a, w in each], min(n, seen.shape[1]))
            kept = zip((seen @ vectors) ** 2, target[orders_val[some]], strict=True)
            r = np.stack([_correlated(squares, own[:, None])[:, 0] for squares, own in kept])
            eigenvalues.append(values)
            found.append(np.sign(values) * r)
            bar.update(len(r))
    return eigenvalues[0][0], np.concatenate(found)


def _leading(each: list[tuple[torch.Tensor, torch.Tensor]], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `n` leading eigenvalues (order x comp), and vectors, of sums of W' diag(a) W, for each row of `a`."""
    size = each[0][1].shape[1]
    if size <= DENSE:
        rows = [sum((a * w[:, i]) @ w for a, w in each) for i in range(size)]
        values, vectors = np.linalg.eigh(torch.stack(rows, dim=1).numpy())
    else:
        found = [_lanczos([(a[k].numpy(), w.numpy()) for a, w in each], size, n) for k in range(len(each[0][0]))]
        values, vectors = map(np.stack, zip(*found, strict=True))
    rank = np.argsort(-np.abs(values), axis=1, kind="stable")[:, :n]
    return np.take_along_axis(values, rank, 1), np.take_along_axis(vectors, rank[:, None], 2)


def _lanczos(each: list[tuple[np.ndarray, np.ndarray]], size: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the same of one order, where a matrix would be large."""
    times = LinearOperator((size, size), lambda v: sum(w.T @ (a * (w @ v.ravel())) for a, w in each), dtype=float)
    return eigsh(times, n, v0=np.random.default_rng(0).standard_normal(size), tol=1e-5)


def _orders(dataset: ExpressionDataset, name: str, strata: Any, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return orders of the cells, the first as they are, `n` others within strata (order x cell)."""
    codes, order = np.zeros(len(dataset), int), np.tile(np.arange(len(dataset)), (n + 1, 1))
    if strata is not None:
        if len(strata) <= dataset.indices.max(initial=-1):
            last = f"the last cell of {name} is cell {dataset.indices.max()}"
            raise ValueError(f"strata has {len(strata)} labels, {last}; pass one label for every cell of the AnnData.")
        codes = pd.factorize(np.asarray(strata)[dataset.indices])[0]
        if -1 in codes:
            raise ValueError(f"strata has no label for {np.sum(codes == -1)} cells of {name}; drop or label them.")
        if alone := np.count_nonzero(np.bincount(codes) == 1):
            raise ValueError(f"strata has {alone} labels with a single cell in {name}; merge labels, or drop cells.")
    for rows in pd.Series(order[0]).groupby(codes).indices.values():
        order[1:, rows] = rng.permuted(order[1:, rows], axis=1)
    return order
