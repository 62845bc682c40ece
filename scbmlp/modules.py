"""Gene modules: the eigenvectors of an interaction matrix, in the units of the genes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.linalg import subspace_angles
from scipy.optimize import linear_sum_assignment

from scbmlp.checks import plain_names, whole_number
from scbmlp.datasets import ExpressionDataset, cell_names, check_dataset, match_genes, product
from scbmlp.display import as_html, listed
from scbmlp.interactions import Model, Output, decompose, direction, interaction_matrices
from scbmlp.models import Config, Statistics, fit_permuted, statistics
from scbmlp.storage import read_file, write_file


@dataclass(frozen=True)
class GeneModules:
    """Modules of one output, strongest first.

    Parameters
    ----------
    eigenvalues
        Strength of every module (comp); positive ones push the output up, negative ones down.
    loadings
        Part of every gene in every module (gene x comp): eigenvectors, unit columns, or in metric ``covariance`` the
        gene's correlation with the score. A module has two poles, genes of positive and of negative loading; the sign
        is such that the cells that the output is about score high.
    weights
        What turns log-expression, less `origin`, into scores (gene x comp).
    origin
        The training mean for a model with a linear part, whose modules hold interactions alone, else 0 (gene).
    unit
        Standard deviation of every gene, or 1 in metric ``identity`` (gene), log-expression.
    output
        What the modules are modules of.
    layer
        Layer of AnnData that the model was trained on, and scores are read from; None for ``X``.
    trust
        What speaks for each module, as :func:`scbmlp.evidence.trust` has found it; None before.
    metric
        Units that the eigenvectors were taken in, as in :func:`gene_modules`.
    """

    eigenvalues: pd.Series
    loadings: pd.DataFrame
    weights: pd.DataFrame
    origin: pd.Series
    unit: pd.Series
    output: Any
    layer: str | None = None
    trust: pd.DataFrame | None = None
    metric: str | None = None

    def _known(self) -> dict[str, str]:
        rows = {"Output": str(self.output), "Modules": f"{len(self.eigenvalues):,} of {len(self.loadings):,} genes"}
        rows |= {} if self.metric is None else {"Metric": self.metric}
        return rows if self.trust is None else rows | {"Trusted": f"{int(self.trust['trusted'].sum()):,}"}

    def __repr__(self) -> str:
        rows = self._known() | {"Eigenvalues": listed(f"{value:.3g}" for value in self.eigenvalues)}
        return "GeneModules: " + "; ".join(f"{name.lower()} {value}" for name, value in rows.items())

    def _repr_html_(self) -> str:
        shown = self.eigenvalues.index[:10]
        poles = {
            f"genes, {pole}": [", ".join(map(str, self.top_genes(name, 6, pole=pole).index)) for name in shown]
            for pole in "+-"
        }
        table = pd.DataFrame({"eigenvalue": self.eigenvalues[shown], **poles}, shown)
        if self.trust is not None:
            table["trusted"] = np.where(self.trust["trusted"].reindex(shown, fill_value=False), "yes", "no")
        return as_html(self._known(), "GeneModules", table)

    def scores(self, x: AnnData | ExpressionDataset | Any, *, layer: str | None = None) -> pd.DataFrame:
        """Return the module scores v'(x - origin) of cells (cell x comp).

        Parameters
        ----------
        x
            AnnData, a DataFrame, a dataset or the path of a file, whose genes are matched by name, or a matrix with
            the modules' genes in order.
        layer
            Layer of AnnData to read; that of the training cells if None.

        Raises
        ------
        KeyError
            Genes of the modules are missing, or the layer is.
        ValueError
            A gene comes twice, or values are not finite.

        Examples
        --------
        >>> scores = on.scores(adata)[["module_1", "module_2"]]
        >>> scores.groupby(labels, observed=True).var().round(1)
               module_1  module_2
        label
        off         0.5       9.6
        on         10.2       0.6
        """
        index, x = cell_names(x), match_genes(x, self.weights.index, layer or self.layer)
        weights = self.weights.to_numpy()
        # The origin is taken off the scores, not the cells, so that sparse cells stay sparse.
        return pd.DataFrame(product(x, weights) - self.origin.to_numpy() @ weights, index, self.weights.columns)

    def contributions(self, x: AnnData | ExpressionDataset | Any, *, layer: str | None = None) -> pd.DataFrame:
        """Return what each module adds to the output of cells, eigenvalue times squared score (cell x comp).

        All modules together add up to the output, or to its quadratic part where the model has biases or a linear part.

        Parameters
        ----------
        x, layer
            Cells, as in :meth:`scores`.

        Examples
        --------
        >>> added = on.contributions(adata)["module_1"]
        >>> added.groupby(labels, observed=True).mean().round(2)
        label
        off    0.04
        on     0.76
        Name: module_1, dtype: float64
        """
        return self.scores(x, layer=layer) ** 2 * self.eigenvalues

    def top_genes(self, module: int | str = 0, n: int = 20, *, pole: Literal["+", "-", "both"] = "+") -> pd.Series:
        """Return the loadings of the `n` strongest genes of a module.

        Parameters
        ----------
        module
            Rank or name of the module.
        n
            Most genes to return; a pole of a small panel may have fewer.
        pole
            Genes of positive loading, of negative loading, or the strongest whatever their sign.

        Raises
        ------
        KeyError
            There is no such module.
        ValueError
            `pole` is unknown.

        Examples
        --------
        >>> on.top_genes(n=3).round(2)
        Sim0017    0.27
        Sim0037    0.25
        Sim0020    0.24
        Name: module_1, dtype: float64
        >>> set(on.top_genes(n=10, pole="-").index) == set(programs["program_04"])
        True
        """
        loading = self.loadings[self._name(module)]
        keys = {"+": loading, "-": -loading, "both": loading.abs()}
        if pole not in keys:
            raise ValueError(f"pole={pole!r} is unknown; choose '+', '-' or 'both'.")
        n = whole_number(n, "n")
        key = keys[pole][keys[pole] > 0]  # a gene of loading 0 is in neither pole
        return loading.loc[key.sort_values(ascending=False, kind="stable").index[:n]]

    def factors(self, first: int | str = 0, second: int | str | None = None) -> pd.DataFrame:
        """Return what turns two modules of opposite sign into the two factors whose product they are (comp x 2).

        ``scores(x) @ factors()`` are the scores of the factors: their product is what the two modules contribute.
        ``loadings @ factors()`` are their genes.

        Parameters
        ----------
        first, second
            Rank or name of the modules, one with a positive and one with a negative eigenvalue. Without `second`, the
            strongest module whose sign is not that of `first`.

        Raises
        ------
        ValueError
            Both eigenvalues have the same sign.
        KeyError
            There is no such module.

        Examples
        --------
        >>> genes = on.loadings @ on.factors()
        >>> set(genes["plus"].nlargest(10).index) == set(programs["program_03"])
        True
        >>> set(genes["minus"].nsmallest(10).index) == set(programs["program_04"])
        True
        """
        first = self._name(first)
        if second is None:
            # If there is none, the next one is named in the error.
            opposite = self.eigenvalues * self.eigenvalues[first] < 0
            second = opposite.idxmax() if opposite.any() else min(1, len(opposite) - 1)
        pair = self.eigenvalues[[first, self._name(second)]].sort_values(ascending=False)
        if pair.prod() >= 0:
            raise ValueError(
                f"{' and '.join(pair.index)} have eigenvalues {pair.iloc[0]:.3g} and {pair.iloc[1]:.3g}; a product "
                f"needs one positive and one negative, see eigenvalues, or take more modules."
            )
        mix = pd.DataFrame(0.0, self.eigenvalues.index, ["plus", "minus"])
        mix.loc[pair.index] = np.sqrt(pair.abs().to_numpy())[:, None] * [[1, 1], [1, -1]]
        return mix

    def factor_along(
        self,
        x: AnnData | ExpressionDataset | Any,
        values: Any,
        first: int | str = 0,
        second: int | str = 1,
    ) -> pd.Series:
        """Return what turns the scores of two modules into one score, the one that follows given values (comp).

        Of two modules of opposite sign it is one of their two :meth:`factors`, of two of the same sign one of the
        modules, whichever correlates more with `values`, turned so that it rises with them. ``scores(x) @ factor`` is
        its score, ``loadings @ factor`` are its genes.

        Parameters
        ----------
        x
            Cells, as in :meth:`scores`.
        values
            What to follow (cell), such as the target along the direction of the modules.
        first, second
            Rank or name of the modules.

        Returns
        -------
        Weight of every module. ``attrs["correlation"]`` says how well the score follows `values`.

        Raises
        ------
        KeyError
            There is no such module.
        ValueError
            `values` are not one a cell, or constant.

        Examples
        --------
        >>> factor = on.factor_along(adata, adata.obsm["programs"]["program_03"])
        >>> round(factor.attrs["correlation"], 2)
        0.93
        """
        names, values = [self._name(first), self._name(second)], np.asarray(values, dtype=np.float64).ravel()
        if self.eigenvalues[names].prod() < 0:
            mix = self.factors(first, second)
        else:
            mix = pd.DataFrame(np.eye(len(self.eigenvalues)), self.eigenvalues.index, self.eigenvalues.index)[names]
        scores = self.scores(x) @ mix
        if len(values) != len(scores) or not np.isfinite(values).all() or np.ptp(values) == 0:
            span = f" from {values.min():.3g} to {values.max():.3g}" if len(values) else ""
            raise ValueError(
                f"values has {len(values)} numbers{span} for {len(scores)} cells; one finite number a cell is needed, "
                f"and not the same in all."
            )
        r = scores.corrwith(pd.Series(values, scores.index))
        best = r.abs().idxmax()
        factor = (mix[best] * np.sign(r[best])).rename("factor")
        factor.attrs["correlation"] = float(abs(r[best]))
        return factor

    def _name(self, module: int | str) -> str:
        names = list(self.loadings.columns)
        if module not in names and module not in range(len(names)):
            raise KeyError(f"module={module!r} is unknown; there are {len(names)}, {names[0]!r} to {names[-1]!r}.")
        return module if module in names else names[module]

    def to_adata(self, adata: AnnData, *, key: str | None = None, layer: str | None = None) -> None:
        """Write the modules into AnnData, where scanpy finds them.

        ``varm[key]`` has the loadings, NaN for genes the model did not see; ``obsm[f"X_{key}"]`` the scores, ready
        for ``scanpy.pl.embedding``; ``uns[key]`` the eigenvalues, the output and, where it is known, the trust table.

        Parameters
        ----------
        adata
            Cells with all genes of the modules; it is changed. If it is backed, its file is not.
        key
            Where to write; ``modules_<output>`` if None.
        layer
            Layer of `adata` to read; that of the training cells if None.

        Raises
        ------
        KeyError, ValueError
            As for :meth:`scores`; nothing is written then.

        Examples
        --------
        >>> on.to_adata(adata)
        >>> adata.varm["modules_on"].shape, adata.obsm["X_modules_on"].shape
        ((40, 4), (1000, 4))
        """
        if not isinstance(adata, AnnData):
            raise ValueError(
                f"adata is of type {type(adata).__name__}; modules are written to AnnData: open a file by "
                f"anndata.read_h5ad(path, backed='r')."
            )
        key = (key or f"modules_{self.output}").replace("/", "_")  # a slash would open a folder in an h5ad file
        scores = self.scores(adata, layer=layer).to_numpy()
        at = self.loadings.index.get_indexer(plain_names(adata.var_names, "genes", unique=False))
        loadings = np.where((at >= 0)[:, None], self.loadings.to_numpy()[at], np.nan)
        adata.obsm[f"X_{key}"], adata.varm[key] = scores, loadings
        adata.uns[key] = {"eigenvalues": self.eigenvalues.to_numpy(), "output": str(self.output)}
        if self.trust is not None:
            adata.uns[key]["trust"] = self.trust.copy()

    def save(self, path: str | Path) -> None:
        """Write the modules to one file, so that they score other cells where there is no model.

        The file is of the format of a model's: numbers and text alone, with a checksum, whole or not there at all.

        Parameters
        ----------
        path
            File to write.

        Raises
        ------
        ValueError
            A name is neither text nor a number, which a file could not hold.

        Examples
        --------
        >>> on.save("on.safetensors")
        >>> again = modules.GeneModules.load("on.safetensors")
        >>> bool(np.allclose(again.scores(adata), on.scores(adata)))
        True
        """
        genes, trust, mix = self.weights.index, self.trust, isinstance(self.output, Mapping)
        known = {
            "class": type(self).__name__,
            "genes": None if isinstance(genes, pd.RangeIndex) else plain_names(genes, "genes").tolist(),
            "modules": self.eigenvalues.index.tolist(),
            # Pairs, for a key of JSON would become text.
            "output": [list(pair) for pair in self.output.items()] if mix else self.output,
            "layer": self.layer,
            "metric": self.metric,
            "trust": None if trust is None else {name: column.tolist() for name, column in trust.items()},
        }
        parts = ("eigenvalues", "loadings", "weights", "origin", "unit")
        tensors = {name: torch.tensor(getattr(self, name).to_numpy(np.float64)) for name in parts}
        write_file(Path(path), known, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read modules that :meth:`save` wrote.

        Parameters
        ----------
        path
            File to read; no code is run from it.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            The file holds a model, or nothing of scbmlp, is damaged, or was written by a later version.

        Examples
        --------
        >>> on.save("on.safetensors")
        >>> modules.GeneModules.load("on.safetensors").output
        'on'
        """
        known, tensors = read_file(Path(path), cls.__name__, "modules")
        try:
            part = {name: tensor.numpy() for name, tensor in tensors.items()}
            names, genes = pd.Index(known["modules"]), known["genes"]
            genes = pd.RangeIndex(len(part["unit"])) if genes is None else plain_names(genes, "genes")
            output = known["output"]
            return cls(
                pd.Series(part["eigenvalues"], names),
                pd.DataFrame(part["loadings"], genes, names),
                pd.DataFrame(part["weights"], genes, names),
                pd.Series(part["origin"], genes),
                pd.Series(part["unit"], genes),
                dict(map(tuple, output)) if isinstance(output, list) else output,
                known["layer"],
                None if known["trust"] is None else pd.DataFrame(known["trust"], names),
                known["metric"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            name = Path(path).name
            raise ValueError(f"{name} is damaged ({error}); save the modules again, or take another copy.") from error


def gene_modules(
    model: Model,
    output: Output,
    n_modules: int | None = 10,
    metric: Literal["sd", "identity", "covariance"] = "sd",
    *,
    dataset: ExpressionDataset | None = None,
) -> GeneModules:
    """Take the leading eigenvectors of an interaction matrix as gene modules.

    Eigenvectors depend on the units of the genes: S Q S = V Lambda V' is solved, where S holds the unit of each gene.
    In raw units, barely expressed genes whose weights were hardly trained can lead. In metric ``covariance``, S is
    the root of the genes' covariance: scores are uncorrelated over the training cells, with variance 1.

    Parameters
    ----------
    model
        A fitted classifier or regressor.
    output
        As in :func:`scbmlp.interactions.direction`.
    n_modules
        Number of modules; all that can be non-zero if None.
    metric
        Genes in units of their standard deviation over the training cells, in log-expression as it is, or in units in
        which the data have no correlations.
    dataset
        Cells that give the units, and the sign of each module, instead of the training cells, whose statistics a
        fitted model keeps.

    Raises
    ------
    ValueError
        `metric` is unknown, there are fewer than `n_modules` modules, `dataset` does not fit the model, or the model
        has no statistics.

    Examples
    --------
    >>> on = modules.gene_modules(model, "on", n_modules=4)
    >>> on.eigenvalues.round(3).tolist()
    [0.075, -0.045, -0.009, 0.007]
    >>> set(on.top_genes(n=10).index) == set(programs["program_03"])
    True
    """
    return _modules(model, [output], n_modules, metric, dataset)[0]


def all_gene_modules(
    model: Model,
    outputs: Iterable[str | int] | None = None,
    n_modules: int | None = 10,
    metric: Literal["sd", "identity", "covariance"] = "sd",
    *,
    dataset: ExpressionDataset | None = None,
) -> dict[str | int, GeneModules]:
    """Take the gene modules of several outputs, with one decomposition of the genes for all.

    Parameters
    ----------
    outputs
        Names or positions of outputs; every output of the model if None.
    model, n_modules, metric, dataset
        As in :func:`gene_modules`.

    Returns
    -------
    The modules of each output, by `outputs`.

    Raises
    ------
    KeyError
        An output is unknown.
    ValueError
        As in :func:`gene_modules`.

    Examples
    --------
    >>> each = modules.all_gene_modules(model, n_modules=4)
    >>> {name: found.eigenvalues.round(3).tolist() for name, found in each.items()}
    {'off': [-0.075, 0.045, 0.009, -0.007], 'on': [0.075, -0.045, -0.009, 0.007]}
    """
    outputs = list(model.output_names if outputs is None else outputs)
    return dict(zip(outputs, _modules(model, outputs, n_modules, metric, dataset), strict=True))


def _modules(
    model: Model, outputs: list[Output], n_modules: int | None, metric: str, dataset: ExpressionDataset | None = None
) -> list[GeneModules]:
    if metric not in ("sd", "identity", "covariance"):
        raise ValueError(f"metric={metric!r} is unknown; choose 'sd', 'identity' or 'covariance'.")
    known = model.statistics if dataset is None else statistics(model, dataset)
    if known is None:
        raise ValueError(
            "the model has no statistics of its training cells, since it was not fitted or was saved by an earlier "
            "version of scbmlp; pass dataset= with the training cells."
        )
    unit = np.ones(len(model.gene_names)) if metric == "identity" else known.sd
    matrices = interaction_matrices(model, outputs, scale=unit if metric == "sd" else None)
    if metric == "covariance":
        basis = matrices[0].basis
        white = _whitened(basis, known.covariance)
    found = []
    for output, matrix in zip(outputs, matrices, strict=True):
        if metric == "covariance":
            values, in_basis = _uncorrelated(matrix.core, *white, n_modules)
            parts = values, basis @ in_basis, known.covariance @ in_basis
        else:
            values, vectors = matrix.eigh(n_modules)
            parts = values, _over(vectors, unit), vectors * unit[:, None]
        found.append(_signed(model, output, known, unit, *parts, metric))
    return found


def _over(columns: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Divide every gene by its unit; a gene that never varied has neither unit nor loading."""
    return np.divide(columns, unit[:, None], out=np.zeros_like(columns), where=unit[:, None] > 0)


def _signed(
    model: Model,
    output: Output,
    known: Statistics,
    unit: np.ndarray,
    values: np.ndarray,
    weights: np.ndarray,
    with_genes: np.ndarray,
    metric: str,
) -> GeneModules:
    """Return modules whose scores are high in the cells that the output is about, those of a high target.

    From eigenvalues (comp), what makes scores of cells, and what loadings are in units of the genes (each gene x comp).
    """
    sign = np.where((known.target @ direction(model, output)) @ weights < 0, -1.0, 1.0)
    names, genes = pd.Index([f"module_{i}" for i in range(1, len(values) + 1)]), model.gene_names
    # A number stands for the output at that place, which has a name.
    named = isinstance(output, int) and output not in model.output_names
    return GeneModules(
        pd.Series(values, names),
        pd.DataFrame(_over(with_genes, unit) * sign, genes, names),
        pd.DataFrame(weights * sign, genes, names),
        pd.Series(model.origin, genes),
        pd.Series(unit, genes),
        model.output_names[output] if named else output,
        model.layer,
        metric=metric,
    )


def _whitened(basis: np.ndarray, with_genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the axes in the basis B (2 hid x comp) along which the data vary, and by how much (comp).

    From B (gene x 2 hid) and Cov B: B' Cov B is the covariance of the hidden pre-activations, so all of it happens in
    2 hid dimensions.
    """
    hidden = basis.T @ with_genes
    variance, axes = np.linalg.eigh((hidden + hidden.T) / 2)
    kept = variance > 1e-10 * variance.max()
    return axes[:, kept], np.sqrt(variance[kept])


def _uncorrelated(
    core: np.ndarray, axes: np.ndarray, root: np.ndarray, n_modules: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues (comp) and score weights in the basis (2 hid x comp), in the metric of the covariance."""
    values, vectors = np.linalg.eigh(root[:, None] * (axes.T @ core @ axes) * root)
    if n_modules is not None and not (isinstance(n_modules, int | np.integer) and 1 <= n_modules <= len(values)):
        raise ValueError(f"n_modules={n_modules!r} were asked for; there are {len(values)} uncorrelated modules.")
    order = np.argsort(-np.abs(values), kind="stable")[:n_modules]
    return values[order], axes / root @ vectors[:, order]


def agreement(fits: Sequence[pd.DataFrame]) -> pd.Series:
    """Return how well modules come back from fit to fit: mean absolute cosine with the closest of each (comp).

    Closest, and not of the same rank: two modules of nearly equal strength swap their order from fit to fit.

    Parameters
    ----------
    fits
        For each fit the loadings of a few modules, or of factors made of them (gene x comp), genes in one order.

    Raises
    ------
    ValueError
        There are fewer than two fits, or their genes differ.

    Examples
    --------
    >>> fits = [modules.gene_modules(one, "on", 2).loadings for one in replicas]
    >>> modules.agreement(fits).round(2)
    module_1    0.92
    module_2    0.91
    Name: agreement, dtype: float64
    """
    if len(fits) < 2:
        raise ValueError(
            f"fits has {len(fits)} table of loadings; two or more are needed to compare: refit with seeds."
        )
    if not all(table.index.equals(fits[0].index) for table in fits):
        raise ValueError("fits have different genes, or in another order; fit all models on the same genes.")
    unit = [table.to_numpy() / np.linalg.norm(table.to_numpy(), axis=0) for table in fits]
    closest = [np.abs(a.T @ b).max(axis=1) for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j]
    return pd.Series(np.mean(closest, axis=0), fits[0].columns, name="agreement")


def consensus(models: Sequence[Model], output: Output, n_modules: int = 10) -> GeneModules:
    """Return the modules of the mean of several models, in metric ``covariance``.

    The mean function of replicas has the mean of their interaction matrices. Its modules need no matching: what one
    seed makes up is averaged out, and modules that turn among each other, since their eigenvalues are close, add up.
    Each model enters with its leading modules, three times as many as are asked for and 20 at least.

    Parameters
    ----------
    models
        Models of the same training cells, such as :func:`scbmlp.models.fit_replicas` returns.
    output
        As in :func:`scbmlp.interactions.direction`.
    n_modules
        Number of modules.

    Raises
    ------
    ValueError
        There are fewer than two models, or their genes, outputs or training cells differ.
    KeyError
        The output is unknown.

    Examples
    --------
    >>> modules.consensus(replicas, "on", n_modules=2).eigenvalues.round(3).tolist()
    [0.295, -0.22]
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
    """Say how well modules come back from model to model.

    Each model's modules are matched, one to one, by the correlation of their scores. A module's stability in a model is
    the absolute correlation with its match; or, where the model has several modules whose eigenvalues are within a
    tenth of each other, that with the best mix of them, since such modules turn among each other by a breath.

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
    A row a module: its ``eigenvalue``, the mean ``stability`` over pairs of models, or over the models if `modules` are
    given, and ``low`` and ``high``, between which nine of ten are.

    Raises
    ------
    ValueError
        As for :func:`consensus`, and if `modules` come without `dataset`.
    KeyError
        The output is unknown.

    Examples
    --------
    >>> modules.stability(replicas, "on", n_modules=2).round(1)
              eigenvalue  stability  low  high
    module_1         0.3        1.0  1.0   1.0
    module_2        -0.2        1.0  1.0   1.0
    """
    if (modules is None) != (dataset is None):
        raise ValueError("stability takes modules= and dataset= together: cells to correlate their scores over.")
    if modules is not None:
        n_modules = len(modules.eigenvalues)
    found = _of_each(models, output, n_modules)
    if modules is None:
        modules = _mean_modules(models, found, output, n_modules)
        matched = [linear_sum_assignment(-np.abs(_correlations(modules, one)))[1] for one in found]
        both = permutations(range(len(found)), 2)
        pairs = [_comes_back(_correlations(found[i], found[j])[matched[i]], found[j], matched[j]) for i, j in both]
    else:
        scores, pairs = modules.scores(dataset), []
        for one in found:
            r = correlate(scores, one.scores(dataset))
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
        raise ValueError(f"models has {len(models)}; two or more are needed to compare: scbmlp.models.fit_replicas.")
    first = models[0]
    for name in ("gene_names", "output_names"):
        if not all(getattr(model, name).equals(getattr(first, name)) for model in models):
            raise ValueError(f"models have different {name}, or in another order; fit all on the same data.")
    if None not in [model.statistics for model in models]:  # else gene_modules says what to do
        if not all(np.allclose(model.statistics.mean, first.statistics.mean) for model in models):
            raise ValueError(
                "models were trained on different cells; fit replicas of one training set, or resample it."
            )
    most = [min(max(3 * n_modules, 20), 2 * model.cfg.d_hidden, model.cfg.d_input) for model in models]
    found = []
    for model, n in zip(models, most, strict=True):
        modules = gene_modules(model, output, None, "covariance")
        kept = modules.eigenvalues.index[:n]
        found.append(
            replace(
                modules,
                eigenvalues=modules.eigenvalues[kept],
                loadings=modules.loadings[kept],
                weights=modules.weights[kept],
            )
        )
    return found


def _correlations(a: GeneModules, b: GeneModules) -> np.ndarray:
    """Return the correlations of scores over the training cells, in which both have variance 1 (comp x comp)."""
    return a.weights.to_numpy().T @ (b.unit.to_numpy()[:, None] * b.loadings.to_numpy())


def _mean_modules(models: Sequence[Model], found: list[GeneModules], output: Output, n_modules: int) -> GeneModules:
    basis = np.hstack([modules.weights for modules in found])
    core = np.diag(np.concatenate([modules.eigenvalues for modules in found])) / len(found)
    unit = found[0].unit.to_numpy()
    covariance = unit[:, None] * np.hstack([modules.loadings for modules in found])
    values, in_basis = _uncorrelated(core, *_whitened(basis, covariance), n_modules)
    known, weights = models[0].statistics, basis @ in_basis
    return _signed(models[0], output, known, unit, values, weights, covariance @ in_basis, "covariance")


def correlate(a: Any, b: Any) -> np.ndarray:
    """Return the correlations of the columns of two tables, 0 where one of the two is the same in all cells.

    Parameters
    ----------
    a, b
        Tables of the same cells (cell x comp).
    """
    a, b = (np.asarray(part, dtype=np.float64) for part in (a, b))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    scale = np.outer(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=0))
    return np.divide(a.T @ b, scale, out=np.zeros_like(scale), where=scale > 0)


def principal_angles(a: GeneModules, b: GeneModules, dataset: ExpressionDataset) -> np.ndarray:
    """Return the angles between what two sets of modules span, as functions of cells.

    The cosine of the first is the largest correlation that mixes of the scores of either set can have, that of the next
    the largest of what is left, and so on :cite:p:`knyazev2002`. Modules that turn among each other do not change them.

    Parameters
    ----------
    a, b
        Modules of the same genes.
    dataset
        Cells over which scores are correlated.

    Returns
    -------
    Angles in degrees, rising (comp of the smaller set).

    Raises
    ------
    KeyError
        `dataset` lacks genes of the modules.

    Examples
    --------
    >>> a, b = (modules.gene_modules(one, "on", 2) for one in replicas[:2])
    >>> modules.principal_angles(a, b, train).round(1)
    array([5.9, 8.1])
    """
    scores = (np.asarray(one.scores(dataset), dtype=np.float64) for one in (a, b))
    return np.degrees(subspace_angles(*(part - part.mean(axis=0) for part in scores)))[::-1]


def follows_target(modules: GeneModules, model: Model, dataset: ExpressionDataset) -> np.ndarray:
    """Return how well what each module adds to its output follows the target over cells, by correlation (comp).

    Parameters
    ----------
    modules
        Modules of one output of the model.
    model
        The model, whose outputs the cells' targets are.
    dataset
        Cells with their targets.

    Raises
    ------
    ValueError
        The target is the same in all cells.
    """
    target = dataset.y.numpy()
    target = (np.eye(model.cfg.d_output)[target] if target.ndim == 1 else target) @ direction(model, modules.output)
    if np.ptp(target) == 0:
        raise ValueError(f"dataset has the same target of {modules.output!r} in every cell; take more cells.")
    return correlate(modules.contributions(dataset), target[:, None])[:, 0]


def permutation_null(
    ModelClass: type[Model],
    cfg: Config,
    train: ExpressionDataset,
    val: ExpressionDataset,
    output: Output | list[Output],
    n_permutations: int = 20,
    strata: Any = None,
    *,
    n_modules: int = 5,
    metric: Literal["sd", "identity", "covariance"] = "covariance",
    n_jobs: int | None = None,
    progress: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """Compare the modules of a fit with those of fits on targets dealt out to the wrong cells.

    An eigenvalue says little here: a fit to noise has large ones. So a module is judged on cells that its weights were
    not fitted to, by the correlation of what it adds to the output with the target; of each null fit the best of its
    modules counts. The same procedure makes all fits, so p-values are uniform where targets have nothing to do with
    expression. They say that a module is about the target, and not that it holds an interaction.

    Parameters
    ----------
    ModelClass, cfg, train, val, n_permutations, strata, n_jobs, progress, options
        As in :func:`scbmlp.models.fit_permuted`.
    output
        As in :func:`scbmlp.interactions.direction`; or a list, all read from the same fits.
    n_modules, metric
        As in :func:`gene_modules`; the leading modules of a null fit are the competitors.

    Returns
    -------
    A row a module, ``(output, module)`` for a list of outputs: ``eigenvalue``, ``r`` (the correlation), ``null`` (what
    nine of ten null fits stay below) and ``p``, at least 1 / (n_permutations + 1), for any of the modules to be as good
    by chance. ``attrs["null"]`` has the best ``r`` of every null fit, by output.

    Raises
    ------
    ValueError
        As for :func:`scbmlp.models.fit_permuted`, and if there are no validation cells or the target is constant.
    KeyError
        The output is unknown.

    Examples
    --------
    >>> table = modules.permutation_null(
    ...     ScBMLPClassifier, cfg, train, validation, "on", 9
    ... )
    >>> table.head(2).round(2)
              eigenvalue     r  null    p
    module_1        0.40  0.84  0.14  0.1
    module_2       -0.24  0.78  0.14  0.1
    """
    check_dataset(val, "val")
    outputs = output if isinstance(output, list) else [output]
    n_modules = whole_number(n_modules, "n_modules")
    models, vals = fit_permuted(
        ModelClass, cfg, train, val, n_permutations, strata, n_jobs=n_jobs, progress=progress, **options
    )
    tables, null = {}, {}
    fits = [
        [
            (modules, follows_target(modules, model, own))
            for modules in _modules(model, outputs, n_modules, metric, None)
        ]
        for model, own in zip(models, vals, strict=True)
    ]
    for name, *found in zip(outputs, *fits, strict=True):
        key, (modules, r) = str(name), found[0]
        null[key] = np.array([other.max() for _, other in found[1:]])
        p = (1 + (null[key] >= r[:, None]).sum(axis=1)) / (1 + len(null[key]))
        columns = {"eigenvalue": modules.eigenvalues, "r": r, "null": np.quantile(null[key], 0.9), "p": p}
        tables[key] = pd.DataFrame(columns)
    table = pd.concat(tables, names=["output", "module"]) if outputs is output else tables[str(output)]
    table.attrs["null"] = {key: best.tolist() for key, best in null.items()}
    return table


def truncation_curve(
    model: Model, modules: Mapping[str, GeneModules], dataset: ExpressionDataset, ks: Iterable[int] | None = None
) -> pd.DataFrame:
    """Return the score that the model keeps with the `k` strongest modules of every output.

    What biases and a direct linear part add to the outputs is always kept.

    Parameters
    ----------
    model
        A fitted classifier or regressor.
    modules
        Modules of every output, by name: ``all_gene_modules(model, n_modules=None, dataset=train)``.
    dataset
        Cells to score on, with their targets.
    ks
        Numbers of modules to keep; 0, 1, 2, 4, 8 and so on if None.

    Returns
    -------
    A row a ``k``: ``score`` over all outputs, and a column for the recall or R2 of each output.

    Raises
    ------
    ValueError
        `dataset` does not fit the model.
    KeyError
        Modules of an output are missing.

    Examples
    --------
    >>> each = modules.all_gene_modules(model, n_modules=None)
    >>> modules.truncation_curve(model, each, test, ks=[0, 1, 2]).round(2)
       score   off    on
    k
    0   0.46  0.64  0.28
    1   0.75  0.51  1.00
    2   1.00  1.00  1.00
    """
    model.check(dataset)
    missing = [str(name) for name in model.output_names if name not in modules]
    if missing:
        raise KeyError(f"modules has none for the outputs {', '.join(missing)}; all outputs are needed for a score.")
    most = min(len(modules[name].eigenvalues) for name in model.output_names)
    ks = [0, *(2**i for i in range(most.bit_length()))] if ks is None else list(ks)
    # Around the origin, the constant and the linear part are what the model has beside its interaction matrices.
    constant, linear, _ = decompose(model, dataset, model.origin)
    kept = np.empty((len(ks), *linear.shape))
    for i, name in enumerate(model.output_names):
        contributions = modules[name].contributions(dataset).to_numpy()
        for row, k in enumerate(ks):
            kept[row, :, i] = (constant + linear) @ direction(model, name) + contributions[:, :k].sum(axis=1)
    target = dataset.y.numpy()
    rows = [[model._measure(y, target), *model._measure_each(y, target)] for y in kept]
    return pd.DataFrame(rows, pd.Index(ks, name="k"), ["score", *model.output_names])
