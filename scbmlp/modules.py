"""Gene modules: the eigenvectors of an interaction matrix, in the units of the genes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scbmlp.checks import plain_names, whole_number
from scbmlp.datasets import ExpressionDataset, cell_names, match_genes, product
from scbmlp.display import as_html, listed
from scbmlp.interactions import Model, Output, decompose, direction, interaction_matrices
from scbmlp.models import Statistics, statistics
from scbmlp.storage import read_file, write_file
from scbmlp.stores import Scaling

__all__ = [
    "GeneModules", "agreement", "all_gene_modules", "consensus", "gene_modules", "permutation_null",
    "stability", "truncation_curve",
]  # fmt: skip

Metric = Literal["sd", "identity", "covariance"]


@dataclass(frozen=True)
class GeneModules:
    """Modules of one output, strongest first, each with genes of positive and of negative loading as its two poles.

    Parameters
    ----------
    eigenvalues, loadings
        Strength (comp), positive where a module pushes the output up, and eigenvectors (gene x comp); in metric
        ``covariance`` loadings are the correlations of the genes with the scores.
    weights, origin, unit
        Log-expression less `origin` (gene) times `weights` (gene x comp) are scores; `unit` is that of genes (gene).
    output, layer, metric, scaling
        What the modules are of, where the cells were read (None for ``X``), the metric of :func:`gene_modules`, and
        what counts go through.
    trust
        What speaks for each module, as from :func:`scbmlp.evidence.trust`; None before.
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
    scaling: Scaling | None = None

    def _known(self) -> dict[str, str]:
        """Return what a reader sees first."""
        rows = {"Output": str(self.output), "Modules": f"{len(self.eigenvalues):,} of {len(self.loadings):,} genes"}
        rows |= {"Metric": self.metric} if self.metric else {}
        return rows if self.trust is None else rows | {"Trusted": f"{int(self.trust['trusted'].sum()):,}"}

    def __repr__(self) -> str:
        rows = self._known() | {"Eigenvalues": listed(f"{value:.3g}" for value in self.eigenvalues)}
        return "GeneModules: " + "; ".join(f"{name.lower()} {value}" for name, value in rows.items())

    def _repr_html_(self) -> str:
        table = self.eigenvalues.iloc[:10].to_frame("eigenvalue")
        for pole in "+-":
            table[f"genes, {pole}"] = [listed(self.top_genes(name, 6, pole=pole).index, 6) for name in table.index]
        if self.trust is not None:
            table["trusted"] = np.where(self.trust["trusted"].reindex(table.index, fill_value=False), "yes", "no")
        return as_html(self._known(), "GeneModules", table)

    def _name(self, module: int | str) -> str:
        """Return the name of a module, given by name or rank."""
        names = list(self.loadings.columns)
        if module not in names and module not in range(len(names)):
            known = f", {names[0]!r} to {names[-1]!r}" if names else ": the model has no products for this output"
            raise KeyError(f"module={module!r} is unknown; there are {len(names)}{known}.")
        return module if module in names else names[module]

    def scores(self, x: AnnData | ExpressionDataset | Any, *, layer: str | None = None) -> pd.DataFrame:
        """Return the scores of cells (cell x comp), as in ``model.outputs``; those that the output is about score high.

        >>> scores = on.scores(adata)["module_1"]
        >>> scores.groupby(labels, observed=True).var().round(1).to_dict()
        {'off': 10.3, 'on': 0.5}
        """
        index, x = cell_names(x), match_genes(x, self.weights.index, layer or self.layer, self.scaling)
        weights = self.weights.to_numpy()
        # The origin is taken off the scores, not the cells, so that sparse cells stay sparse.
        return pd.DataFrame(product(x, weights) - self.origin.to_numpy() @ weights, index, self.weights.columns)

    def contributions(self, x: AnnData | ExpressionDataset | Any, *, layer: str | None = None) -> pd.DataFrame:
        """Return what each module adds to the output of cells (cell x comp): its eigenvalue times squared score.

        >>> added = on.contributions(adata)["module_1"]
        >>> added.groupby(labels, observed=True).mean().round(2).to_dict()
        {'off': -5.89, 'on': -0.3}
        """
        return self.scores(x, layer=layer) ** 2 * self.eigenvalues

    def top_genes(self, module: int | str = 0, n: int = 20, *, pole: Literal["+", "-", "both"] = "+") -> pd.Series:
        """Return the loadings of the strongest genes of a module, given by rank or name.

        Parameters
        ----------
        n, pole
            Most genes to return, of positive or negative loading, or the strongest of both; a pole may have fewer.

        Examples
        --------
        >>> on.top_genes(n=3).round(2).to_dict()
        {'Sim0017': 0.28, 'Sim0030': 0.26, 'Sim0009': 0.25}
        """
        loading = self.loadings[self._name(module)]
        keys = {"+": loading, "-": -loading, "both": loading.abs()}
        if pole not in keys:
            raise ValueError(f"pole={pole!r} is unknown; choose '+', '-' or 'both'.")
        n = whole_number(n, "n")
        key = keys[pole][keys[pole] > 0]  # a gene of loading 0 is in neither pole
        return loading.loc[key.sort_values(ascending=False, kind="stable").index[:n]]

    def factors(self, first: int | str = 0, second: int | str | None = None) -> pd.DataFrame:
        """Return what turns scores, or loadings, into two factors (comp x 2), whose product two modules contribute.

        The modules, by rank or name, have opposite signs; without `second`, it is the strongest of the other sign.

        >>> genes = on.loadings @ on.factors()
        >>> set(genes["plus"].nlargest(10).index) == set(programs["program_03"])
        True
        """
        first = self._name(first)
        if second is None:
            # If there is none, the next one is named in the error.
            opposite = self.eigenvalues * self.eigenvalues[first] < 0
            second = opposite.idxmax() if opposite.any() else min(1, len(opposite) - 1)
        pair = self.eigenvalues[[first, self._name(second)]].sort_values(ascending=False)
        if pair.prod() >= 0:
            names, values = " and ".join(pair.index), " and ".join(f"{value:.3g}" for value in pair)
            raise ValueError(f"{names} have eigenvalues {values}; a product needs one positive and one negative.")
        mix = pd.DataFrame(0.0, self.eigenvalues.index, ["plus", "minus"])
        mix.loc[pair.index] = np.sqrt(pair.abs().to_numpy())[:, None] * [[1, 1], [1, -1]]
        return mix

    def to_adata(self, adata: AnnData, *, key: str | None = None, layer: str | None = None) -> None:
        """Write loadings into ``varm[key]``, scores into ``obsm[f"X_{key}"]``, and the rest into ``uns[key]``.

        Cells are as in :meth:`scores`; `key` is ``modules_<output>`` if it is None.

        >>> on.to_adata(adata)
        >>> adata.varm["modules_on"].shape, adata.obsm["X_modules_on"].shape
        ((40, 4), (1000, 4))
        """
        if not isinstance(adata, AnnData):
            kind = type(adata).__name__
            raise ValueError(f"adata is of type {kind}; AnnData is needed: anndata.read_h5ad(path, backed='r').")
        if key is None:
            # A slash would open a folder in an h5ad file; without it two outputs may meet in one key.
            key = base = f"modules_{self.output}".replace("/", "_")
            others = (f"{base}_{i}" for i in count(2))
            while adata.uns.get(key, {}).get("output", str(self.output)) != str(self.output):
                key = next(others)
        key = key.replace("/", "_")
        scores = self.scores(adata, layer=layer).to_numpy()
        at = self.loadings.index.get_indexer(plain_names(adata.var_names, "genes", unique=False))
        loadings = np.where((at >= 0)[:, None], self.loadings.to_numpy()[at], np.nan)
        adata.obsm[f"X_{key}"], adata.varm[key] = scores, loadings
        adata.uns[key] = {"eigenvalues": self.eigenvalues.to_numpy(), "output": str(self.output)}
        if self.trust is not None:
            adata.uns[key]["trust"] = self.trust.copy()

    def save(self, path: str | Path) -> None:
        """Write the modules to one file of numbers and text, so that they score other cells without the model.

        >>> on.save("on.safetensors")
        """
        genes = self.weights.index
        known = {
            "class": type(self).__name__,
            "genes": None if isinstance(genes, pd.RangeIndex) else plain_names(genes, "genes").tolist(),
            "modules": self.eigenvalues.index.tolist(),
            # Pairs, for a key of JSON would become text.
            "output": [*map(list, self.output.items())] if isinstance(self.output, Mapping) else self.output,
            "layer": self.layer,
            "metric": self.metric,
            "scaling": self.scaling,
            "trust": None if self.trust is None else self.trust.to_dict("list"),
        }
        parts = ("eigenvalues", "loadings", "weights", "origin", "unit")
        write_file(Path(path), known, {name: torch.tensor(getattr(self, name).to_numpy(np.float64)) for name in parts})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read modules that :meth:`save` wrote; no code is run from the file.

        >>> on.save("on.safetensors")
        >>> again = modules.GeneModules.load("on.safetensors")
        >>> bool(np.allclose(again.scores(adata), on.scores(adata)))
        True
        """
        known, tensors = read_file(Path(path), cls.__name__, "modules")
        try:
            names, genes, output, trust = (known[key] for key in ("modules", "genes", "output", "trust"))
            genes = pd.RangeIndex(len(tensors["unit"])) if genes is None else plain_names(genes, "genes")
            part = {name: tensor.numpy() for name, tensor in tensors.items()}
            return cls(
                pd.Series(part["eigenvalues"], names),
                *(pd.DataFrame(part[name], genes, names) for name in ("loadings", "weights")),
                *(pd.Series(part[name], genes) for name in ("origin", "unit")),
                output=dict(map(tuple, output)) if isinstance(output, list) else output,
                layer=known["layer"],
                trust=None if trust is None else pd.DataFrame(trust, names),
                metric=known["metric"],
                scaling=known["scaling"] and Scaling(*known["scaling"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            name = Path(path).name
            raise ValueError(f"{name} is damaged ({error}); save the modules again, or take another copy.") from error


def gene_modules(
    model: Model,
    output: Output,
    n_modules: int | None = 10,
    metric: Metric = "sd",
    *,
    dataset: ExpressionDataset | None = None,
) -> GeneModules:
    """Take the leading eigenvectors of S Q S, where S holds the unit of each gene, as gene modules.

    Parameters
    ----------
    model, output
        As in :func:`scbmlp.interactions.direction`.
    n_modules
        Number of modules; all that can be non-zero if None.
    metric
        Unit of genes: their standard deviation; log-expression as it is, by which barely expressed genes can lead; or
        the root of their covariance, by which scores are uncorrelated over the training cells, with variance 1.
    dataset
        Cells that give the units and the signs; the training cells, whose statistics the model keeps, if None.

    Examples
    --------
    >>> on = modules.gene_modules(model, "on", n_modules=4)
    >>> on.eigenvalues.round(3).tolist()
    [0.075, -0.045, -0.009, 0.007]
    """
    return _modules(model, [output], n_modules, metric, dataset)[0]


def all_gene_modules(
    model: Model,
    outputs: Iterable[str | int] | None = None,
    n_modules: int | None = 10,
    metric: Metric = "sd",
    *,
    dataset: ExpressionDataset | None = None,
) -> dict[str | int, GeneModules]:
    """Take the modules of several outputs, all if None, as in :func:`gene_modules`, with one decomposition for all.

    >>> each = modules.all_gene_modules(model, n_modules=2)
    >>> {name: found.eigenvalues.round(3).tolist() for name, found in each.items()}
    {'off': [-0.075, 0.045], 'on': [0.075, -0.045]}
    """
    outputs = list(model.output_names if outputs is None else outputs)
    return dict(zip(outputs, _modules(model, outputs, n_modules, metric, dataset), strict=True))


def _check_metric(metric: Any) -> None:
    """Raise an error for a metric that modules are not taken in."""
    if metric not in ("sd", "identity", "covariance"):
        raise ValueError(f"metric={metric!r} is unknown; choose 'sd', 'identity' or 'covariance'.")


def _modules(
    model: Model, outputs: list[Output], n_modules: int | None, metric: str, dataset: ExpressionDataset | None
) -> list[GeneModules]:
    """Return the modules of every output."""
    _check_metric(metric)
    known = model.statistics if dataset is None else statistics(model, dataset)
    if known is None:
        raise ValueError("the model was not fitted, and has no statistics of training cells; pass dataset= with them.")
    unit, found = np.ones(len(model.gene_names)) if metric == "identity" else known.sd, []
    matrices = interaction_matrices(model, outputs, scale=unit if metric == "sd" else None)
    for output, matrix in zip(outputs, matrices, strict=True):
        n = n_modules if matrix.basis.shape[1] else None  # no products, no modules
        if metric == "covariance":
            covariance = known.covariance[:, matrix._columns]
            values, in_basis = _uncorrelated(matrix.core, *_whitened(matrix.basis.T @ covariance), n)
            parts = values, matrix.basis @ in_basis, covariance @ in_basis
        else:
            values, vectors = matrix.eigh(n)
            parts = values, _over(vectors, unit), vectors * unit[:, None]
        found.append(_signed(model, output, known, unit, parts, metric))
    return found


def _over(columns: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Divide every gene by its unit; a gene that never varied has neither unit nor loading."""
    return np.divide(columns, unit[:, None], out=np.zeros_like(columns), where=unit[:, None] > 0)


def _signed(
    model: Model, output: Output, known: Statistics, unit: np.ndarray, parts: tuple[np.ndarray, ...], metric: str
) -> GeneModules:
    """Return modules that score high where the target is, from eigenvalues, weights, and loadings times units."""
    values, weights, with_genes = parts
    sign = np.where((known.target @ direction(model, output)) @ weights < 0, -1.0, 1.0)
    names, genes = pd.Index([f"module_{i}" for i in range(1, len(values) + 1)]), model.gene_names
    loadings, weights = (pd.DataFrame(one * sign, genes, names) for one in (_over(with_genes, unit), weights))
    origin, unit = (pd.Series(one, genes) for one in (model.origin, unit))
    if isinstance(output, int) and output not in model.output_names:  # the output at that place, which has a name
        output = model.output_names[output]
    how = {"layer": model.layer, "metric": metric, "scaling": model.scaling}
    return GeneModules(pd.Series(values, names), loadings, weights, origin, unit, output, **how)


def _whitened(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the axes along which a basis varies (basis x comp), and by how much (comp), from its covariance."""
    variance, axes = np.linalg.eigh((covariance + covariance.T) / 2)
    kept = variance > 1e-10 * variance.max(initial=0)
    return axes[:, kept], np.sqrt(variance[kept])


def _uncorrelated(
    core: np.ndarray, axes: np.ndarray, root: np.ndarray, n_modules: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues (comp) and weights of uncorrelated scores (basis x comp), from what ``_whitened`` returns."""
    values, vectors = np.linalg.eigh(root[:, None] * (axes.T @ core @ axes) * root)
    n_modules = n_modules if n_modules is None else whole_number(n_modules, "n_modules", 1, len(values))
    order = np.argsort(-np.abs(values), kind="stable")[:n_modules]
    return values[order], axes / root @ vectors[:, order]


def truncation_curve(
    model: Model, modules: Mapping[str, GeneModules], dataset: ExpressionDataset, ks: Iterable[int] | None = None
) -> pd.DataFrame:
    """Return the score that the model keeps with the `k` strongest modules of every output, beside its linear part.

    Parameters
    ----------
    model, dataset
        A fitted classifier or regressor, and cells to score on, with their targets.
    modules
        Modules of every output, by name: ``all_gene_modules(model, n_modules=None, dataset=train)``.
    ks
        Numbers of modules to keep; 0, 1, 2, 4, 8 and so on if None.

    Examples
    --------
    >>> each = modules.all_gene_modules(model, n_modules=None)
    >>> modules.truncation_curve(model, each, test, [0, 2])["score"].round(2).tolist()
    [0.46, 1.0]
    """
    model.check(dataset)
    if missing := [str(name) for name in model.output_names if name not in modules]:
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


def __getattr__(name: str) -> Any:
    """Offer the public functions of :mod:`scbmlp.stability` here too; nothing here needs them."""
    if name in __all__:
        return getattr(import_module("scbmlp.stability"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
