"""From AnnData to train, validation and test sets, sparse all the way to the batch."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch.utils.data import Dataset

from scbmlp.checks import (
    check_finite,
    check_log_normalised,
    expression,
    numeric_matrix,
    obs_column,
    obs_labels,
    plain_names,
    warn,
    whole_number,
)
from scbmlp.display import as_html, listed


class ExpressionDataset(Dataset):
    """Cells with one target each, and the names of their genes and outputs.

    Indexing with an integer, a slice or a list of integers returns dense ``(x, y)`` tensors of those cells alone;
    the matrix itself keeps its format.

    Parameters
    ----------
    x
        Expression, log-normalised, cell x gene.
    y
        Class codes, whole numbers (cell), or continuous targets (cell x out; one output may be flat).
    gene_names
        Names of the columns of `x` (gene).
    output_names
        Names of the classes, or of the columns of `y` (out).
    indices
        Row of each cell in the AnnData it came from (cell), so that ``adata[dataset.indices]`` gives the cells back.
    layer
        Layer of the AnnData that `x` came from, None for ``X``; a model trained on it reads the same layer again.

    Raises
    ------
    ValueError
        A matrix is not one of finite numbers, sizes differ, a name is missing or comes twice, or a class code has no
        class.
    """

    def __init__(
        self,
        x: sparse.csr_matrix | np.ndarray,
        y: np.ndarray,
        gene_names: pd.Index,
        output_names: pd.Index,
        indices: np.ndarray | None = None,
        layer: str | None = None,
    ) -> None:
        self.x = numeric_matrix(x, "x", np.float32)
        check_finite(self.x, "x")
        self.gene_names = plain_names(gene_names, "genes")
        self.output_names = plain_names(output_names, "outputs")
        self.y = torch.as_tensor(_targets(y, len(self.output_names)))
        self.indices = np.arange(len(self)) if indices is None else np.asarray(indices)
        self.layer = layer
        if self.x.shape[1] != len(self.gene_names):
            raise ValueError(f"x has {self.x.shape[1]} columns, gene_names has {len(self.gene_names)}; name every one.")
        if not len(self) == len(self.y) == len(self.indices):
            raise ValueError(
                f"x has {len(self)} cells, y has {len(self.y)}, indices has {len(self.indices)}; one a cell is needed."
            )

    def __len__(self) -> int:
        return self.x.shape[0]

    def __getitem__(self, index: int | slice | list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        if np.isscalar(index):
            x, y = self[[index]]
            return x[0], y[0]
        return dense_tensor(self.x[index]), self.y[index]

    def __repr__(self) -> str:
        size = f"{len(self)} cells x {len(self.gene_names)} genes"
        return f"ExpressionDataset: {size}, {len(self.output_names)} outputs, {self._format}"

    def _repr_html_(self) -> str:
        kind = "classes" if self.y.ndim == 1 else "targets"
        rows = {
            "Cells x genes": f"{len(self):,} x {len(self.gene_names):,}",
            "Outputs": f"{len(self.output_names):,} {kind}: {listed(self.output_names)}",
            "Expression": f"{self._format}, from {'X' if self.layer is None else f'layer {self.layer!r}'}",
        }
        return as_html(rows, "ExpressionDataset")

    @property
    def _format(self) -> str:
        return "sparse" if sparse.issparse(self.x) else "dense"


def _targets(y: Any, n_outputs: int) -> np.ndarray:
    """Return class codes as int64 (cell), or continuous targets as float32 (cell x out)."""
    y = np.asarray(y)
    if y.ndim == 1 and y.dtype.kind in "biu":
        if len(y) and not 0 <= y.min() <= y.max() < n_outputs:
            raise ValueError(
                f"y has class codes from {y.min()} to {y.max()}; there are {n_outputs} outputs, so 0 to "
                f"{n_outputs - 1} are allowed: encode the classes anew, or pass float numbers for a regression."
            )
        return y.astype(np.int64)
    y = numeric_matrix(y[:, None] if y.ndim == 1 else y, "y", np.float32)
    check_finite(y, "y", "drop those cells")
    if y.shape[1] != n_outputs:
        raise ValueError(
            f"y has {y.shape[1]} columns, output_names has {n_outputs}; name every one, and encode classes as "
            f"whole numbers."
        )
    return y


def check_dataset(dataset: Any, argument: str = "dataset") -> None:
    """Raise an error for anything but a data set, such as the AnnData that it is to be cut from.

    Parameters
    ----------
    dataset
        What was given.
    argument
        What the caller named it by, for the message.

    Raises
    ------
    ValueError
        It is no data set.
    """
    if not isinstance(dataset, ExpressionDataset):
        raise ValueError(
            f"{argument} is of type {type(dataset).__name__}; an ExpressionDataset is needed, cells with targets: "
            f"cut it by get_classification_datasets or get_regression_datasets of scbmlp.datasets."
        )


def dense_tensor(x: sparse.spmatrix | np.ndarray | torch.Tensor) -> torch.Tensor:
    """Turn a few rows of any matrix format into a dense float32 tensor of the same shape."""
    if sparse.issparse(x):
        x = x.toarray()
    return torch.as_tensor(x, dtype=torch.float32)


def standard_deviation(x: sparse.csr_matrix | np.ndarray) -> np.ndarray:
    """Return the standard deviation of every column (gene); the mean where a column is constant, so 0 if it is 0."""
    scaler = StandardScaler(with_mean=False).fit(x)
    return np.where(scaler.var_ > 0, np.sqrt(scaler.var_), scaler.mean_)


def match_genes(
    x: AnnData | ExpressionDataset | Any, gene_names: pd.Index, layer: str | None = None
) -> sparse.csr_matrix | np.ndarray:
    """Return the expression in `x` with exactly these genes, in this order.

    Parameters
    ----------
    x
        AnnData, a DataFrame or a dataset, whose genes are matched by name, or a dense, sparse or dask matrix with the
        genes in order.
    gene_names
        Names of the genes wanted (gene); a RangeIndex stands for genes that nobody named.
    layer
        Layer of AnnData to read instead of ``X``.

    Returns
    -------
    A matrix, cell x gene.

    Raises
    ------
    KeyError
        Genes are missing, or the layer is.
    ValueError
        A gene that is needed comes twice, values are not finite, AnnData has negative ones or is backed by a file, or
        a matrix does not have that many columns.
    """
    names, adata, where = None, x if isinstance(x, AnnData) else None, "x"
    if adata is not None:
        names = adata.var_names
        x, where = expression(adata, layer)
    elif isinstance(x, pd.DataFrame):
        names = x.columns
    elif isinstance(x, ExpressionDataset):
        names, x = x.gene_names, x.x
    elif isinstance(x, pd.Series):
        raise ValueError(f"x is a Series of {len(x)} values; pass one cell as a table, x.to_frame().T.")
    if names is not None and not isinstance(gene_names, pd.RangeIndex):
        names = plain_names(names, "genes", unique=False)
        if not names.equals(gene_names):
            at = _find(names, gene_names)
            x = x.iloc[:, at] if isinstance(x, pd.DataFrame) else x[:, at]
    x = numeric_matrix(x, where)
    if x.shape[1] != len(gene_names):
        raise ValueError(f"{where} has shape {tuple(x.shape)}; (cell, gene) with {len(gene_names)} genes is needed.")
    if adata is None:
        check_finite(x, where)
    else:
        check_log_normalised(x, where, adata)
    return x


def _find(names: pd.Index, wanted: pd.Index) -> np.ndarray:
    """Return where each gene is among others."""
    missing = wanted.difference(names, sort=False)
    if len(missing):
        lower = set(names.astype(str).str.lower())
        turned = [name for name in missing if str(name).lower() in lower]
        hint = f" ({len(turned)} are there in another case, such as {turned[0]})" if turned else ""
        raise KeyError(
            f"x lacks {len(missing)} of the {len(wanted)} genes needed, such as "
            f"{', '.join(map(str, missing[:5]))}{hint}; use data with all of them."
        )
    twice = names[names.duplicated()].intersection(wanted)
    if len(twice):
        raise ValueError(
            f"x has {len(twice)} of the genes needed more than once, such as {', '.join(map(str, twice[:5]))}; keep "
            f"one column of each, or give them names of their own: adata.var_names_make_unique()."
        )
    return pd.Series(np.arange(len(names)), names)[wanted].to_numpy()


def gene_vector(values: Any, gene_names: pd.Index, what: str) -> np.ndarray:
    """Return one number a gene, a Series matched by name and anything else by order.

    Parameters
    ----------
    values
        Numbers (gene).
    gene_names
        Names of the genes, in the order wanted.
    what
        What the numbers are, for the message.

    Raises
    ------
    KeyError
        A Series lacks genes.
    ValueError
        It is not one finite number a gene.
    """
    if isinstance(values, pd.Series) and not isinstance(gene_names, pd.RangeIndex):
        values = values.to_numpy()[_find(plain_names(values.index, "genes", unique=False), gene_names)]
    values = np.asarray(values.toarray() if sparse.issparse(values) else values, dtype=np.float64).ravel()
    if values.shape != (len(gene_names),) or not np.isfinite(values).all():
        raise ValueError(
            f"{what} has {len(values)} values, {(~np.isfinite(values)).sum()} of them NaN or infinite; one for each of "
            f"the model's {len(gene_names)} genes is needed."
        )
    return values


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
        with another label or none are in no set. Then the fractions and the seed do not count.

    Returns
    -------
    Train, validation and test set; ``y`` holds codes into ``output_names``, the classes in their categorical order.

    Raises
    ------
    KeyError
        `class_key`, `layer` or `split_key` is not in `adata`.
    ValueError
        Labels are missing, there is one class, a class is too small to be in all three sets, the fractions leave a set
        empty, or the expression is not finite and non-negative.
    """
    labels = obs_labels(adata, class_key, "class_key").astype("category").cat.remove_unused_categories()
    sizes = labels.value_counts()
    if len(sizes) < 2:
        raise ValueError(
            f"class_key={class_key!r} has the class {', '.join(map(repr, sizes.index)) or 'of no cell'} alone, and "
            f"nothing to tell it from; add cells of other classes, or name another column."
        )
    if split_key is None:
        _check_fractions(train_split, val_split)
        needed = int(np.ceil(1 / min(train_split, val_split, 1 - train_split - val_split) - 1e-9))
        if sizes.min() < needed:
            raise ValueError(
                f"class_key={class_key!r}: class {sizes.idxmin()!r} has {sizes.min()} cells, but {needed} are needed "
                f"for one in every set at train_split={train_split}, val_split={val_split}; merge the class with "
                f"another, drop it, or make the smallest set larger."
            )
    codes, classes = labels.cat.codes.to_numpy(np.int64), labels.cat.categories
    sets = _split(adata, codes, classes, (train_split, val_split, random_state, split_key), layer)
    for name, one in zip(("train", "val", "test"), sets, strict=True):
        lacking = [str(classes[code]) for code in np.setdiff1d(codes, one.y.numpy())]
        if lacking:
            what = "cannot be learnt" if name == "train" else f"does not count in what is said of {name} cells"
            warn(
                f"split_key={split_key!r} has no {name} cell of the class {', '.join(lacking[:5])}, which {what}; drop "
                f"its cells, or label some of them {name!r}."
            )
    return sets


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
        with another label or none are in no set. Then the fractions and the seed do not count.

    Returns
    -------
    Train, validation and test set; outputs of an array are named ``<target_key>_0``, ``<target_key>_1``, ...

    Raises
    ------
    KeyError
        `target_key`, `layer` or `split_key` is not in `adata`.
    ValueError
        The targets are not a finite cell x out table or one of them is constant or named twice, the fractions leave a
        set empty, or the expression is not finite and non-negative.
    """
    if not isinstance(target_key, str) or target_key not in adata.obsm:
        raise KeyError(f"target_key={target_key!r} is not in adata.obsm; there are: {', '.join(adata.obsm) or 'none'}.")
    target, where = adata.obsm[target_key], f"adata.obsm[{target_key!r}]"
    names = None
    if isinstance(target, pd.DataFrame):
        names = plain_names(target.columns, where)
        # Numbers that a pipeline made categorical are numbers all the same.
        numeric = [pd.api.types.is_numeric_dtype(getattr(kind, "categories", kind)) for kind in target.dtypes]
        target = target.astype({name: float for name, yes in zip(target.columns, numeric, strict=True) if yes})
    if np.ndim(target) == 1 and not isinstance(target, pd.DataFrame):
        target = np.asarray(target)[:, None]
    y = numeric_matrix(target, where, np.float32)
    y = y.toarray() if sparse.issparse(y) else y
    check_finite(y, where, "drop those cells")
    names = plain_names([f"{target_key}_{i}" for i in range(y.shape[1])], where) if names is None else names
    constant = [str(name) for name, column in zip(names, y.T, strict=True) if len(y) == 0 or np.ptp(column) == 0]
    if constant or not len(names):
        raise ValueError(
            f"adata.obsm[{target_key!r}] is the same in every cell for {', '.join(constant) or 'want of a column'}: "
            f"there is nothing to learn; drop such columns."
        )
    if split_key is None:
        _check_fractions(train_split, val_split)
    return _split(adata, y, names, (train_split, val_split, random_state, split_key), layer)


def _check_fractions(train_split: float, val_split: float) -> None:
    numbers = isinstance(train_split, Real) and isinstance(val_split, Real)
    if not (numbers and train_split > 0 and val_split > 0 and train_split + val_split < 1):
        raise ValueError(
            f"train_split={train_split!r} and val_split={val_split!r} must be positive and add up to less than 1, "
            f"so that a test set is left; the default is 0.7 and 0.15."
        )


def _split(adata, y, output_names, how, layer):
    """Cut the checked expression and `y` into three sets; integer targets are stratified."""
    x, where = expression(adata, layer, np.float32)
    if not adata.var_names.is_unique:
        raise ValueError("adata.var_names are not unique; call adata.var_names_make_unique() first.")
    check_log_normalised(x, where, adata)
    train_split, val_split, random_state, split_key = how

    def cut(cells, fraction):
        strata = y[cells] if y.ndim == 1 else None
        size = round(fraction * adata.n_obs)
        return train_test_split(cells, train_size=size, stratify=strata, random_state=random_state)

    if split_key is None:
        sizes = round(train_split * adata.n_obs), round(val_split * adata.n_obs)
        if min(*sizes, adata.n_obs - sum(sizes)) < 1:
            raise ValueError(
                f"train_split={train_split}, val_split={val_split} leave a set of {adata.n_obs} cells empty; take more "
                f"cells, or other fractions."
            )
        whole_number(random_state, "random_state", 0, 2**32 - 1)
        train, rest = cut(np.arange(adata.n_obs), train_split)
        val, test = cut(rest, val_split)
    else:
        part = obs_column(adata, split_key, "split_key").astype(str)  # a missing label is no label
        train, val, test = (np.flatnonzero(part == name) for name in ("train", "val", "test"))
        if not (len(train) and len(val) and len(test)):
            raise ValueError(
                f"split_key={split_key!r} has {len(train)} cells of 'train', {len(val)} of 'val' and {len(test)} of "
                f"'test'; label at least one cell for each."
            )
    return tuple(
        ExpressionDataset(x[i], y[i], adata.var_names, output_names, i, layer) for i in map(np.sort, (train, val, test))
    )
