"""From AnnData to train, validation and test sets, sparse all the way to the batch."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch.utils.data import Dataset


class ExpressionDataset(Dataset):
    """Cells with one target each, and the names of their genes and outputs.

    Indexing with an integer, a slice or a list of integers returns dense ``(x, y)`` tensors of those cells alone;
    the matrix itself keeps its format.

    Parameters
    ----------
    x
        Expression, log-normalised, cell x gene.
    y
        Class codes (cell) or continuous targets (cell x out).
    gene_names
        Names of the columns of `x` (gene).
    output_names
        Names of the classes, or of the columns of `y` (out).
    indices
        Row of each cell in the AnnData it came from (cell), so that ``adata[dataset.indices]`` gives the cells back.
    """

    def __init__(
        self,
        x: sparse.csr_matrix | np.ndarray,
        y: np.ndarray,
        gene_names: pd.Index,
        output_names: pd.Index,
        indices: np.ndarray | None = None,
    ) -> None:
        self.x = x
        self.y = torch.as_tensor(y)
        self.gene_names = pd.Index(gene_names)
        self.output_names = pd.Index(output_names)
        self.indices = np.arange(len(self)) if indices is None else indices

    def __len__(self) -> int:
        return self.x.shape[0]

    def __getitem__(self, index: int | slice | list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        if np.isscalar(index):
            x, y = self[[index]]
            return x[0], y[0]
        return dense_tensor(self.x[index]), self.y[index]

    def __repr__(self) -> str:
        return f"ExpressionDataset: {len(self)} cells x {len(self.gene_names)} genes, {len(self.output_names)} outputs"


def dense_tensor(x: sparse.spmatrix | np.ndarray | torch.Tensor) -> torch.Tensor:
    """Turn a few rows of any matrix format into a dense float32 tensor of the same shape."""
    if sparse.issparse(x):
        x = x.toarray()
    return torch.as_tensor(x, dtype=torch.float32)


def standard_deviation(x: sparse.csr_matrix | np.ndarray) -> np.ndarray:
    """Return the standard deviation of every column (gene); the mean where a column is constant, so 0 if it is 0."""
    scaler = StandardScaler(with_mean=False).fit(x)
    return np.where(scaler.var_ > 0, np.sqrt(scaler.var_), scaler.mean_)


def match_genes(x: AnnData | ExpressionDataset | Any, gene_names: pd.Index) -> Any:
    """Return the expression in `x` with exactly these genes, in this order.

    Parameters
    ----------
    x
        AnnData or a dataset, whose genes are matched by name, or a dense or sparse matrix with the genes in order.
    gene_names
        Names of the genes wanted (gene); a RangeIndex stands for genes that nobody named.

    Returns
    -------
    A matrix, cell x gene.

    Raises
    ------
    KeyError
        AnnData or a dataset lacks some of the genes.
    ValueError
        A matrix does not have that many columns, or AnnData is backed by a file.
    """
    if isinstance(x, AnnData):
        _check_in_memory(x)
        names, x = x.var_names, x.X
    else:
        names, x = getattr(x, "gene_names", None), getattr(x, "x", x)
    x = x.tocsr() if sparse.issparse(x) else x
    if names is not None and not isinstance(gene_names, pd.RangeIndex) and not names.equals(gene_names):
        missing = gene_names.difference(names)
        if len(missing):
            raise KeyError(
                f"x lacks {len(missing)} of the {len(gene_names)} genes needed, such as "
                f"{', '.join(map(str, missing[:5]))}; use data with all of them."
            )
        x = x[:, names.get_indexer(gene_names)]
    if x.ndim != 2 or x.shape[1] != len(gene_names):
        raise ValueError(f"x has shape {tuple(x.shape)}; (cell, gene) with {len(gene_names)} genes is needed.")
    return x


def get_classification_datasets(
    adata: AnnData,
    class_key: str,
    train_split: float = 0.7,
    val_split: float = 0.15,
    random_state: int = 0,
    *,
    layer: str | None = None,
    split_key: str | None = None,
) -> tuple[ExpressionDataset, ExpressionDataset, ExpressionDataset]:
    """Split cells into train, validation and test sets with every class in each, in equal proportion.

    Parameters
    ----------
    adata
        Cells with log-normalised expression.
    class_key
        Column of ``adata.obs`` with the class of every cell.
    train_split, val_split
        Fractions of the cells for training and validation; the rest is the test set.
    random_state
        Seed of the split.
    layer
        Layer of `adata` to read instead of ``adata.X``.
    split_key
        Column of ``adata.obs`` with ``train``, ``val`` and ``test``, to hold out whole batches or compounds; cells
        with another label are in no set. Then the fractions and the seed do not count.

    Returns
    -------
    Train, validation and test set; ``y`` holds codes into ``output_names``, the classes in their categorical order.

    Raises
    ------
    KeyError
        `class_key`, `layer` or `split_key` is not in `adata`.
    ValueError
        Labels are missing, a class is too small to be in all three sets, the fractions leave a set empty, or the
        expression is not finite and non-negative.
    """
    labels = obs_labels(adata, class_key, "class_key").astype("category").cat.remove_unused_categories()
    _check_fractions(train_split, val_split)
    needed = int(np.ceil(1 / min(train_split, val_split, 1 - train_split - val_split) - 1e-9))
    sizes = labels.value_counts()
    if sizes.min() < needed:
        raise ValueError(
            f"class_key={class_key!r}: class {sizes.idxmin()!r} has {sizes.min()} cells, but {needed} are needed for "
            f"one in every set at train_split={train_split}, val_split={val_split}; merge the class with another, "
            f"drop it, or make the smallest set larger."
        )
    return _split(
        adata,
        labels.cat.codes.to_numpy(np.int64),
        labels.cat.categories,
        (train_split, val_split, random_state, split_key),
        layer,
    )


def get_regression_datasets(
    adata: AnnData,
    target_key: str,
    train_split: float = 0.7,
    val_split: float = 0.15,
    random_state: int = 0,
    *,
    layer: str | None = None,
    split_key: str | None = None,
) -> tuple[ExpressionDataset, ExpressionDataset, ExpressionDataset]:
    """Split cells at random into train, validation and test sets with continuous targets.

    Parameters
    ----------
    adata
        Cells with log-normalised expression.
    target_key
        Key of ``adata.obsm`` with the targets (cell x out), an array or a DataFrame whose columns name the outputs.
    train_split, val_split
        Fractions of the cells for training and validation; the rest is the test set.
    random_state
        Seed of the split.
    layer
        Layer of `adata` to read instead of ``adata.X``.
    split_key
        Column of ``adata.obs`` with ``train``, ``val`` and ``test``, to hold out whole batches or compounds; cells
        with another label are in no set. Then the fractions and the seed do not count.

    Returns
    -------
    Train, validation and test set; outputs of an array are named ``<target_key>_0``, ``<target_key>_1``, ...

    Raises
    ------
    KeyError
        `target_key`, `layer` or `split_key` is not in `adata`.
    ValueError
        The targets are not a finite cell x out table or one of them is constant, the fractions leave a set empty, or
        the expression is not finite and non-negative.
    """
    if target_key not in adata.obsm:
        raise KeyError(f"target_key={target_key!r} is not in adata.obsm; there are: {', '.join(adata.obsm) or 'none'}.")
    target = adata.obsm[target_key]
    y = np.asarray(target, dtype=np.float32)
    if y.ndim != 2:
        raise ValueError(f"adata.obsm[{target_key!r}] has shape {y.shape}; two axes (cell, out) are needed.")
    if not np.isfinite(y).all():
        bad = (~np.isfinite(y).all(axis=1)).sum()
        raise ValueError(f"adata.obsm[{target_key!r}] is NaN or infinite in {bad} cells; drop those cells first.")
    names = target.columns if isinstance(target, pd.DataFrame) else [f"{target_key}_{i}" for i in range(y.shape[1])]
    constant = [str(name) for name, column in zip(names, y.T, strict=True) if np.ptp(column) == 0]
    if constant or not len(names):
        raise ValueError(
            f"adata.obsm[{target_key!r}] is the same in every cell for {', '.join(constant) or 'want of a column'}: "
            f"there is nothing to learn; drop such columns."
        )
    _check_fractions(train_split, val_split)
    return _split(adata, y, names, (train_split, val_split, random_state, split_key), layer)


def obs_column(adata: AnnData, key: str, argument: str) -> pd.Series:
    """Return a column of ``adata.obs``.

    Parameters
    ----------
    adata
        Cells.
    key
        Column of ``obs``.
    argument
        What the caller named it by, for the message.

    Raises
    ------
    KeyError
        There is no such column.
    """
    if key not in adata.obs:
        raise KeyError(f"{argument}={key!r} is not a column of adata.obs; there are: {', '.join(adata.obs)}.")
    return adata.obs[key]


def obs_labels(adata: AnnData, key: str, argument: str) -> pd.Series:
    """Return a column of ``adata.obs`` with a label for every cell.

    Parameters
    ----------
    adata
        Cells.
    key
        Column of ``obs``.
    argument
        What the caller named it by, for the message.

    Raises
    ------
    KeyError
        There is no such column.
    ValueError
        A cell has no label.
    """
    labels = obs_column(adata, key, argument)
    if labels.isna().any():
        raise ValueError(
            f"{argument}={key!r} has no label for {labels.isna().sum()} of {len(labels)} cells; "
            f"keep the labelled ones: adata = adata[adata.obs[{key!r}].notna()].copy()"
        )
    return labels


def _check_fractions(train_split: float, val_split: float) -> None:
    if not (train_split > 0 and val_split > 0 and train_split + val_split < 1):
        raise ValueError(
            f"train_split={train_split} and val_split={val_split} must be positive and add up to less than 1, "
            f"so that a test set is left; the default is 0.7 and 0.15."
        )


def _split(adata, y, output_names, how, layer):
    """Cut the checked expression and `y` into three sets; integer targets are stratified."""
    x = _expression(adata, layer)
    train_split, val_split, random_state, split_key = how

    def cut(cells, fraction):
        strata = y[cells] if y.ndim == 1 else None
        size = round(fraction * adata.n_obs)
        return train_test_split(cells, train_size=size, stratify=strata, random_state=random_state)

    if split_key is None:
        train, rest = cut(np.arange(adata.n_obs), train_split)
        val, test = cut(rest, val_split)
    else:
        part = obs_column(adata, split_key, "split_key")
        train, val, test = (np.flatnonzero(part == name) for name in ("train", "val", "test"))
        if not (len(train) and len(val) and len(test)):
            raise ValueError(
                f"split_key={split_key!r} has {len(train)} cells of 'train', {len(val)} of 'val' and {len(test)} of "
                f"'test'; label at least one cell for each."
            )
    return tuple(
        ExpressionDataset(x[i], y[i], adata.var_names, output_names, i) for i in map(np.sort, (train, val, test))
    )


def _check_in_memory(adata: AnnData) -> None:
    if adata.isbacked:
        raise ValueError("adata is backed by a file; take the cells to work on into memory: adata.to_memory().")


def _expression(adata: AnnData, layer: str | None) -> sparse.csr_matrix | np.ndarray:
    """Return the expression as float32, rows first, after checking that it is log-normalised expression."""
    if layer is not None and layer not in adata.layers:
        raise KeyError(f"layer={layer!r} is not in adata.layers; there are: {', '.join(adata.layers) or 'none'}.")
    _check_in_memory(adata)
    if not adata.var_names.is_unique:
        raise ValueError("adata.var_names are not unique; call adata.var_names_make_unique() first.")
    x = adata.X if layer is None else adata.layers[layer]
    where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    x = sparse.csr_matrix(x, dtype=np.float32) if sparse.issparse(x) else np.asarray(x, dtype=np.float32)
    values = x.data if sparse.issparse(x) else x
    if not np.isfinite(values).all():
        raise ValueError(f"{where} holds NaN or infinite values; drop those cells or genes, or set them to 0.")
    if values.size and values.min() < 0:
        raise ValueError(
            f"{where} holds negative values (minimum {values.min():.3g}); expression must not be scaled or centred: "
            f"pass log-normalised values, scanpy.pp.normalize_total then scanpy.pp.log1p."
        )
    if values.size and values.max() > 1 and np.array_equal(values, np.round(values)):
        warnings.warn(
            f"{where} holds only whole numbers, like raw counts; log-normalise first: "
            f"scanpy.pp.normalize_total(adata); scanpy.pp.log1p(adata).",
            UserWarning,
            stacklevel=4,
        )
    return x
