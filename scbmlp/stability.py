"""Would a module come back? Replicas, consensus, and permuted targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.linalg import subspace_angles
from scipy.optimize import linear_sum_assignment
from scipy.sparse.linalg import LinearOperator, eigsh
from tqdm.auto import tqdm

from scbmlp.checks import whole_number
from scbmlp.datasets import ExpressionDataset, check_dataset, held, match_genes
from scbmlp.display import watched
from scbmlp.exact import Kernels, Mixture, targets_of
from scbmlp.interactions import Model, Output, direction
from scbmlp.modules import GeneModules, Metric, _check_metric, _signed, _uncorrelated, _whitened, gene_modules

CHUNK = 50  # permutations at a time
# Components up to which all products of two are taken through a system once, and up to which matrices are formed.
PAIRED, DENSE = 128, 400
System = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # its factor, a target (cell), and W (cell x comp)


def agreement(fits: Sequence[pd.DataFrame]) -> pd.Series:
    """Return how well modules come back from fit to fit: mean absolute cosine with the closest of each (comp).

    The closest need not have the same rank: two modules of nearly equal strength swap their order from fit to fit.

    Parameters
    ----------
    fits
        Loadings of a few modules, or of their factors, for each fit (gene x comp), genes in one order.

    Examples
    --------
    >>> fits = [modules.gene_modules(one, "on", 2).loadings for one in replicas]
    >>> modules.agreement(fits).round(2).to_dict()
    {'module_1': 0.99, 'module_2': 0.99}
    """
    if len(fits) < 2:
        raise ValueError(
            f"fits has {len(fits)} table of loadings; two or more are needed to compare: refit with seeds."
        )
    if not all(table.index.equals(fits[0].index) for table in fits):
        raise ValueError("fits have different genes, or in another order; fit all models on the same genes.")
    unit = [table.to_numpy() / np.linalg.norm(table.to_numpy(), axis=0) for table in fits]
    closest = [np.abs(a.T @ b).max(axis=1) for a, b in permutations(unit, 2)]
    return pd.Series(np.mean(closest, axis=0), fits[0].columns, name="agreement")


def consensus(models: Sequence[Model], output: Output, n_modules: int = 10) -> GeneModules:
    """Return the modules of the mean of several models, in metric ``covariance``.

    They need no matching. The mean takes out what one draw of cells makes up. Modules of close eigenvalues turn among
    each other, and add up in the mean. Each model enters with its leading modules, three times `n_modules` or 20.

    Parameters
    ----------
    models
        Models of the same training cells, such as :func:`scbmlp.models.solve_replicas` returns.
    output
        As in :func:`scbmlp.interactions.direction`.
    n_modules
        Number of modules.

    Examples
    --------
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

    Modules are matched one to one. Modules of one model whose eigenvalues are within a tenth of each other turn among
    each other; there the best mix of them counts.

    Parameters
    ----------
    models, output
        As in :func:`consensus`.
    n_modules
        Number of modules of the consensus to look for, in each ordered pair of models, over the training cells.
    modules
        Modules to look for in every model, instead of those of the consensus.
    dataset
        Cells to correlate scores over; needed with `modules`.

    Returns
    -------
    A row a module: its ``eigenvalue``, the mean ``stability`` over pairs of models, or over models if `modules` are
    given, and ``low`` and ``high``, between which nine of ten are.

    Examples
    --------
    >>> modules.stability(replicas, "on", n_modules=2)["stability"].round(1).tolist()
    [1.0, 1.0]
    """
    if (modules is None) != (dataset is None):
        raise ValueError("stability takes modules= and dataset= together: cells to correlate their scores over.")
    if modules is not None:
        n_modules = len(modules.eigenvalues)
    found = _of_each(models, output, n_modules)
    if modules is None:
        modules = _mean_modules(models, found, output, n_modules)
        matched = [_partners(_correlations(modules, one)) for one in found]
        both = permutations(range(len(found)), 2)
        pairs = [_comes_back(_correlations(found[i], found[j])[matched[i]], found[j], matched[j]) for i, j in both]
    else:
        scores, pairs = modules.scores(dataset), []
        for one in found:
            r = correlate(scores, one.scores(dataset))
            pairs.append(np.minimum(_comes_back(r, one, _partners(r)), 1.0))
    low, high = np.quantile(pairs, [0.05, 0.95], axis=0)
    columns = {"eigenvalue": modules.eigenvalues, "stability": np.mean(pairs, axis=0), "low": low, "high": high}
    return pd.DataFrame(columns, modules.eigenvalues.index)


def _partners(r: np.ndarray) -> np.ndarray:
    """Return which module is matched with each (comp), from correlations."""
    return linear_sum_assignment(-np.abs(r))[1]


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
    if None not in [model.statistics for model in models]:  # else gene_modules says what to do
        if not all(np.allclose(model.statistics.mean, first.statistics.mean) for model in models):
            raise ValueError(
                "models were trained on different cells; fit replicas of one training set, or resample it."
            )
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


def correlate(a: Any, b: Any) -> np.ndarray:
    """Return the correlations of the columns of two tables, 0 where one of the two is the same in all cells."""
    a, b = (np.asarray(part, dtype=np.float64) for part in (a, b))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    scale = np.outer(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=0))
    return np.divide(a.T @ b, scale, out=np.zeros_like(scale), where=scale > 0)


def principal_angles(a: GeneModules, b: GeneModules, dataset: ExpressionDataset) -> np.ndarray:
    """Return the angles between what two sets of modules span, in degrees, rising (comp of the smaller set).

    The cosine of the first is the largest correlation that mixes of the scores of either set can have
    :cite:p:`knyazev2002`. Modules that turn among each other do not change the angles.

    Parameters
    ----------
    a, b
        Modules of the same genes.
    dataset
        Cells over which scores are correlated.

    Examples
    --------
    >>> a, b = (modules.gene_modules(one, "on", 2) for one in replicas[:2])
    >>> modules.principal_angles(a, b, train).round(1)
    array([2.7, 3.5])
    """
    scores = (np.asarray(one.scores(dataset), dtype=np.float64) for one in (a, b))
    return np.degrees(subspace_angles(*(part - part.mean(axis=0) for part in scores)))[::-1]


def follows_target(modules: GeneModules, model: Model, dataset: ExpressionDataset) -> np.ndarray:
    """Return how well what each module adds to its output follows the target over cells, by correlation (comp)."""
    target = dataset.y.numpy()
    target = (np.eye(model.cfg.d_output)[target] if target.ndim == 1 else target) @ direction(model, modules.output)
    if np.ptp(target) == 0:
        raise ValueError(f"dataset has the same target of {modules.output!r} in every cell; take more cells.")
    return correlate(modules.contributions(dataset), target[:, None])[:, 0]


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

    A fit to noise has large eigenvalues too. So a module is judged on `val`, by the correlation ``r`` of what it adds
    to the output with the target; each permutation counts with its best module. Mixture and penalty stay those of the
    model. An output without products has no modules, so that without signal p is at most uniform. A small p says that
    a module is about the target, and not that it holds an interaction.

    For classes, the model and its permutations are a surrogate with the same mixture: least squares of the classes as
    0 and 1. Every cell counts once. The penalty is that of the model over the curvature of the log-loss.

    Parameters
    ----------
    model
        What :func:`scbmlp.models.solve` returned.
    train, val
        Its training cells, and cells that no weight was fitted to. The targets of both are permuted.
    output
        As in :func:`scbmlp.interactions.direction`; or a list of them.
    n_permutations, seed, progress
        Number of permutations, their seed, and whether a bar shows how many are done.
    strata
        Label of every cell of the whole AnnData, such as ``adata.obs["donor"]``; targets stay within a stratum.
    n_modules, metric
        As in :func:`gene_modules`; the leading modules of a permutation are the competitors.

    Returns
    -------
    A row a module, ``(output, module)`` for a list of outputs: ``eigenvalue``, ``r``, ``null`` (what nine of ten
    permutations stay below) and ``p`` of at least 1 / (n_permutations + 1), for any module to be as good by chance.
    ``attrs["null"]`` has the best ``r`` of every permutation, by output.

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
        raise ValueError(
            "the model was trained, not solved: it has no mixture to solve again; pass one of scbmlp.models.solve."
        )
    rng, orders = np.random.default_rng(seed), []
    for name, dataset in {"train": train, "val": val}.items():
        model.check(dataset)
        stratum, order = _strata(strata, dataset, name), np.tile(np.arange(len(dataset)), (n_permutations + 1, 1))
        for rows in pd.Series(order[0]).groupby(stratum).indices.values():
            order[1:, rows] = rng.permuted(order[1:, rows], axis=1)
        orders.append(order)
    outputs, tables, null = output if isinstance(output, list) else [output], {}, {}
    again = _Again(model, train, val, metric)
    size = len(outputs) * (n_permutations + 1)
    with tqdm(total=size, desc="permutations", unit="fit", delay=2, disable=not (progress and watched())) as bar:
        for name in outputs:
            values, r = again.read(name, n_modules, *orders, bar.update)
            best, key = r[1:].max(axis=1, initial=-1), str(name)
            null[key] = best.tolist() if len(values) else []
            p = (1 + (best >= r[0][:, None]).sum(axis=1)) / (1 + len(best))
            columns = {"eigenvalue": values, "r": r[0], "null": np.quantile(best, 0.9), "p": p}
            tables[key] = pd.DataFrame(columns, [f"module_{i}" for i in range(1, len(values) + 1)])
    table = pd.concat(tables, names=["output", "module"]) if outputs is output else tables[str(output)]
    table.attrs |= {"null": null, "metric": metric}
    return table


class _Again:
    """A solved model, solved again for permuted targets: one factor of the system of a mixture serves all of them."""

    def __init__(self, model: Model, train: ExpressionDataset, val: ExpressionDataset, metric: str) -> None:
        self.model, self.metric = model, metric
        self.kernels = Kernels(held(train).x, match_genes(held(val), train.gene_names))
        self.y, self.y_val = (targets_of(one, len(train.output_names)).numpy() for one in (train, val))
        self.recipe, shares = model.recipe * (len(self.y[0]) // len(model.recipe)), self.y.mean(axis=0)
        if train.y.ndim == 1:
            curvature = float((shares * (1 - shares)).mean())
            self.recipe = [(mixture, ratio / curvature) for mixture, ratio in self.recipe]
        self._factor: tuple[Any, torch.Tensor] | None = None

    def _basis(self, mixture: Mixture) -> torch.Tensor:
        """Return what of the genes products are of (gene x comp)."""
        if mixture.space == "components":
            return self.kernels.axes(mixture.rank)
        unit = self.kernels.sd if mixture.space == "sd" else torch.ones_like(self.kernels.sd)
        return torch.diag(1 / unit)

    def _system(self, pair: tuple[Mixture, float], target: np.ndarray, w: torch.Tensor) -> System:
        """Return the system of a mixture and a penalty."""
        (mixture, ratio), kernels = pair, self.kernels
        if self._factor is None or self._factor[0] != pair:
            self._factor = None  # one at a time: a factor is as large as all pairs of cells
            system = kernels.mixed(mixture)[0].clone()
            system.diagonal().add_(ratio * len(system))
            self._factor = pair, torch.linalg.cholesky(system)
        scale = mixture.weight("products") / kernels.block("products", mixture.rank, mixture.space)[1]
        return self._factor[1], torch.as_tensor(target) * scale, w

    def read(
        self, output: Output, n_modules: int, order: np.ndarray, order_val: np.ndarray, done: Callable[[int], Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return eigenvalues for the first order of the cells (comp), and correlations for each (order x comp)."""
        mix = direction(self.model, output)
        target, y = self.y_val @ mix, self.y - self.y.mean(axis=0)
        if np.ptp(target) == 0:
            raise ValueError(f"val has the same target of {output!r} in every cell; take more cells.")
        parts: dict[tuple[Mixture, float], np.ndarray] = {}  # targets that are solved together
        for i in np.flatnonzero(mix):
            if self.recipe[i][0].weight("products"):
                parts[self.recipe[i]] = parts.get(self.recipe[i], 0) + y[:, i] * mix[i]
        parts = {pair: one for pair, one in parts.items() if np.ptp(one) > 0}
        if not parts:
            done(len(order))
            return np.zeros(0), np.zeros((len(order), 0))
        # Q = B C B' with C = (D B)' diag(a) D B. In the metric M, with B'MB = A R^2 A', it has the eigenvalues of
        # W' diag(a) W, W = D B A R, and D B A / R turns eigenvectors into scores.
        basis = [self._basis(mixture) for mixture, _ in parts]
        whole, d = torch.cat(basis, dim=1), self.kernels.d
        if self.metric == "covariance":
            half = d[0] @ whole / len(d[0]) ** 0.5
        else:
            half = whole if self.metric == "identity" else whole * self.kernels.sd[:, None]
        axes, root = map(torch.as_tensor, _whitened((half.T @ half).numpy()))
        seen, systems = (d[1] @ whole @ axes / root).numpy(), []
        for part, one, own in zip(parts.items(), basis, axes.split([one.shape[1] for one in basis]), strict=True):
            systems.append(self._system(*part, d[0] @ one @ own * root))
        eigen = _eigen(systems, min(n_modules, len(root)))
        found, first, centred = [], None, target - target.mean()
        for start in range(0, len(order), CHUNK):
            rows = slice(start, start + CHUNK)
            values, vectors = eigen(order[rows])
            added = (seen @ vectors) ** 2
            added -= added.mean(axis=1, keepdims=True)
            along = np.einsum("bvc,bv->bc", added, centred[order_val[rows]])
            scale = np.linalg.norm(added, axis=1) * np.linalg.norm(centred)
            found.append(np.sign(values) * np.divide(along, scale, out=np.zeros_like(along), where=scale > 0))
            first = values[0] if first is None else first
            done(len(values))
        return first, np.vstack(found)


def _eigen(systems: list[System], n: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return what gives leading eigenvalues and vectors for targets in other orders (order x cell).

    They are those of W' diag(a) W, added up over systems; a is what a system makes of its target.
    """
    size = systems[0][2].shape[1]
    i, j = np.triu_indices(size)
    # Of every pair of components what the system makes of it, so that a target is one product.
    paired = systems if size <= PAIRED else []
    through = [torch.cholesky_solve(w[:, i] * w[:, j], factor).numpy() for factor, _, w in paired]

    def matrices(order: np.ndarray) -> Any:
        if paired:
            found = np.empty((len(order), size, size))
            flat = sum(y.numpy()[order] @ part for (_, y, _), part in zip(paired, through, strict=True))
            found[:, i, j] = found[:, j, i] = flat
            return found
        cells = [(torch.cholesky_solve(y[order].T, factor).numpy().T, w.numpy()) for factor, y, w in systems]
        each = [[(a[row], w) for a, w in cells] for row in range(len(order))]
        if size <= DENSE:
            return np.stack([sum(w.T @ (a[:, None] * w) for a, w in one) for one in each])

        def times(v: np.ndarray, one: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
            return sum(w.T @ (a * (w @ v.ravel())) for a, w in one)

        return [LinearOperator((size, size), partial(times, one=one), dtype=float) for one in each]

    def leading(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = matrices(order)
        if isinstance(found, np.ndarray):
            values, vectors = np.linalg.eigh(found)
        else:
            start = np.random.default_rng(0).standard_normal(size)
            values, vectors = map(np.stack, zip(*(eigsh(one, n, v0=start, tol=1e-5) for one in found), strict=True))
        rank = np.argsort(-np.abs(values), axis=1, kind="stable")[:, :n]
        return np.take_along_axis(values, rank, 1), np.take_along_axis(vectors, rank[:, None], 2)

    return leading


def _strata(strata: Any, dataset: ExpressionDataset, name: str) -> np.ndarray:
    """Return the code of every cell's stratum."""
    if strata is None:
        return np.zeros(len(dataset), int)
    if len(strata) <= dataset.indices.max(initial=-1):
        raise ValueError(
            f"strata has {len(strata)} labels, the last cell of {name} is cell {dataset.indices.max()}; pass one label "
            f'for every cell of the AnnData that the sets were cut from, such as adata.obs["donor"].'
        )
    codes = pd.factorize(np.asarray(strata)[dataset.indices])[0]
    if -1 in codes:
        raise ValueError(f"strata has no label for {np.sum(codes == -1)} cells of {name}; drop them, or label them.")
    if alone := np.count_nonzero(np.bincount(codes) == 1):
        raise ValueError(
            f"strata has {alone} labels with a single cell in {name}, whose target cannot be permuted; merge them "
            f"with others, or drop these cells."
        )
    return codes
