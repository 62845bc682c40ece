"""Gene modules: the eigenvectors of an interaction matrix, in the units of the genes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from sklearn.preprocessing import StandardScaler

from scbmlp.datasets import ExpressionDataset, match_genes
from scbmlp.interactions import Model, Output, direction, interaction_matrix


@dataclass(frozen=True)
class GeneModules:
    """Modules of one output, strongest first.

    Parameters
    ----------
    eigenvalues
        Strength of every module (comp); positive ones push the output up, negative ones down.
    loadings
        Weight of every gene in every module, gene x comp, unit columns. A module has two poles, genes of
        positive and of negative loading; the sign is such that the cells that the output is about score high.
    unit
        What a gene is measured in before it is weighted (gene), log-expression.
    output
        What the modules are modules of.
    """

    eigenvalues: pd.Series
    loadings: pd.DataFrame
    unit: pd.Series
    output: Any

    def scores(self, x: AnnData | ExpressionDataset | Any) -> pd.DataFrame:
        """Return the module scores x'v of cells (cell x comp).

        Parameters
        ----------
        x
            AnnData or a dataset, whose genes are matched by name, or a matrix with the modules' genes in order.
        """
        index = x.obs_names if isinstance(x, AnnData) else None
        x = match_genes(x, self.loadings.index)
        weights = _per_unit(self.loadings.to_numpy(), self.unit.to_numpy())
        return pd.DataFrame(x @ weights, index=index, columns=self.loadings.columns)

    def contributions(self, x: AnnData | ExpressionDataset | Any) -> pd.DataFrame:
        """Return what each module adds to the output of cells, eigenvalue times squared score (cell x comp).

        Parameters
        ----------
        x
            Cells, as in :meth:`scores`.
        """
        return self.scores(x) ** 2 * self.eigenvalues

    def top_genes(self, module: int | str = 0, n: int = 20, *, pole: Literal["+", "-", "both"] = "+") -> pd.Series:
        """Return the loadings of the `n` strongest genes of a module.

        Parameters
        ----------
        module
            Rank or name of the module.
        n
            Number of genes.
        pole
            Genes of positive loading, of negative loading, or the strongest whatever their sign.

        Raises
        ------
        KeyError
            There is no such module.
        """
        names = list(self.loadings.columns)
        if module not in names and module not in range(len(names)):
            raise KeyError(f"module={module!r} is unknown; there are {len(names)}, {names[0]!r} to {names[-1]!r}.")
        loading = self.loadings[module if module in names else names[module]]
        key = {"+": loading, "-": -loading, "both": loading.abs()}[pole]
        return loading.loc[key.sort_values(ascending=False, kind="stable").index[:n]]


def gene_modules(
    model: Model,
    output: Output,
    n_modules: int = 10,
    metric: Literal["sd", "identity"] = "sd",
    *,
    dataset: ExpressionDataset,
) -> GeneModules:
    """Take the leading eigenvectors of an interaction matrix as gene modules.

    Eigenvectors depend on the units of the genes: Q V = V Lambda is solved for S Q S, where S holds the unit of
    each gene. In raw units, barely expressed genes whose weights were hardly trained can lead.

    Parameters
    ----------
    model
        A fitted classifier or regressor.
    output
        As in :func:`scbmlp.interactions.direction`.
    n_modules
        Number of modules.
    metric
        Genes in units of their standard deviation over the cells of `dataset`, or in log-expression as it is.
    dataset
        Training cells: they give the units, and the sign of each module.

    Raises
    ------
    ValueError
        `metric` is unknown, or there are fewer than `n_modules` modules.
    """
    if metric not in ("sd", "identity"):
        raise ValueError(f"metric={metric!r} is unknown; choose 'sd' or 'identity'.")
    x, genes = match_genes(dataset, model.gene_names), model.gene_names
    unit = _standard_deviation(x) if metric == "sd" else np.ones(len(genes))
    values, vectors = interaction_matrix(model, output).scaled(unit).eigh(n_modules)
    # The cells that the output is about have a high target along its direction: they are to score high.
    y = dataset.y.numpy()
    about = (np.eye(model.cfg.d_output)[y] if y.ndim == 1 else y) @ direction(model, output)
    weights = _per_unit(vectors, unit)
    vectors = vectors * np.where((about - about.mean()) @ (x @ weights) < 0, -1.0, 1.0)
    names = pd.Index([f"module_{i}" for i in range(1, len(values) + 1)])
    return GeneModules(pd.Series(values, names), pd.DataFrame(vectors, genes, names), pd.Series(unit, genes), output)


def _per_unit(vectors: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Divide each gene's loadings by its unit; a gene that never varied has neither unit nor loading."""
    return vectors / np.where(unit > 0, unit, np.inf)[:, None]


def _standard_deviation(x: sparse.csr_matrix | np.ndarray) -> np.ndarray:
    """Return the standard deviation of every column; the mean where a column is constant, so 0 if it is 0."""
    scaler = StandardScaler(with_mean=False).fit(x)
    return np.where(scaler.var_ > 0, np.sqrt(scaler.var_), scaler.mean_)
