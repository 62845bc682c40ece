"""From AnnData or a file to train, validation and test sets, sparse all the way to the batch."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from numbers import Real
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch.utils.data import Dataset

from scbmlp.checks import (
    MISSING,
    check_cells,
    check_finite,
    check_log_normalised,
    check_scale,
    expression,
    numeric_matrix,
    obs_column,
    obs_labels,
    plain_names,
    scale_of,
    warn,
    whole_number,
)
from scbmlp.display import as_html, listed
from scbmlp.stores import (
    Scaling,
    StoredMatrix,
    annotations,
    check_normalisation,
    median_total,
    normalised,
    open_cells,
    row_totals,
    scaled_alike,
)

Matrix: TypeAlias = sparse.csr_matrix | np.ndarray | StoredMatrix
SETS = ("train", "val", "test")


class ExpressionDataset(Dataset):
    """Cells with one target each, and the names of their genes and outputs.

    Indexing with an integer, a slice or a list of integers returns dense ``(x, y)`` tensors of those cells alone.

    Parameters
    ----------
    x
        Log-normalised expression (cell x gene); a sparse matrix stays sparse, a stored one stays on disk.
    y
        Class codes, whole numbers (cell), or continuous targets (cell x out); one output may be flat.
    gene_names, output_names
        Names of the columns of `x` (gene), and of the classes or the columns of `y` (out).
    indices
        Row of each cell in its AnnData (cell), so that ``adata[dataset.indices]`` gives the cells back.
    layer
        Layer that `x` came from, None for ``X``; a model trained on it reads the same layer again.
    num_workers
        Processes that read stored cells ahead while a model trains.
    scaling
        What the counts went through, None if `x` came as it is; a model scales counts that it predicts alike.

    Examples
    --------
    >>> x, y = np.eye(3), np.array([0, 1, 1])
    >>> datasets.ExpressionDataset(x, y, ["Ins1", "Gcg", "Sst"], ["Alpha", "Beta"])
    ExpressionDataset: 3 cells x 3 genes, 2 outputs, dense
    >>> x, y = train[:5]
    >>> tuple(x.shape), y.tolist()
    ((5, 40), [1, 1, 0, 1, 0])
    """

    def __init__(
        self,
        x: Matrix,
        y: np.ndarray,
        gene_names: pd.Index,
        output_names: pd.Index,
        indices: np.ndarray | None = None,
        layer: str | None = None,
        num_workers: int = 0,
        scaling: Scaling | None = None,
    ) -> None:
        self.x = x if isinstance(x, StoredMatrix) else numeric_matrix(x, "x", np.float32)
        if not self.stored:  # else each block is checked as it is read
            check_finite(self.x, "x")
        self.gene_names = plain_names(gene_names, "genes")
        self.output_names = plain_names(output_names, "outputs")
        n_outputs, y = len(self.output_names), np.asarray(y)
        if y.ndim == 1 and y.dtype.kind in "biu":
            if len(y) and not 0 <= y.min() <= y.max() < n_outputs:
                raise ValueError(
                    f"y has class codes from {y.min()} to {y.max()}; there are {n_outputs} outputs, so 0 to "
                    f"{n_outputs - 1} are allowed: encode the classes anew, or pass float numbers for a regression."
                )
            y = y.astype(np.int64)
        else:
            y = numeric_matrix(y[:, None] if y.ndim == 1 else y, "y", np.float32)
            check_finite(y, "y", "drop those cells")
            if y.shape[1] != n_outputs:
                raise ValueError(
                    f"y has {y.shape[1]} columns, output_names has {n_outputs}; name every one, or give classes whole "
                    f"numbers."
                )
        self.y = torch.as_tensor(y)
        self.indices = np.arange(len(self)) if indices is None else np.asarray(indices)
        self.scaling = self.x.scaling if self.stored else scaling
        self.layer, self.num_workers = layer, whole_number(num_workers, "num_workers", 0)
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

    @property
    def stored(self) -> bool:
        """Whether the expression is on disk."""
        return isinstance(self.x, StoredMatrix)

    def load(self, cells: Any = None) -> Self:
        """Return a data set in memory.

        Parameters
        ----------
        cells
            Positions of the cells to take, a slice or a mask; all if None.

        Examples
        --------
        >>> adata.write_h5ad("cells.h5ad")
        >>> train, _, _ = datasets.get_classification_datasets("cells.h5ad", "label")
        >>> train.stored, train.load(range(100))
        (True, ExpressionDataset: 100 cells x 40 genes, 2 outputs, dense)
        """
        cells, part = slice(None) if cells is None else cells, copy(self)
        part.x, part.y, part.indices = self.x[cells], self.y[cells], self.indices[cells]
        return part

    @property
    def _format(self) -> str:
        return "on disk" if self.stored else "sparse" if sparse.issparse(self.x) else "dense"

    def __repr__(self) -> str:
        n_cells, n_genes = self.x.shape
        return f"ExpressionDataset: {n_cells} cells x {n_genes} genes, {len(self.output_names)} outputs, {self._format}"

    def _repr_html_(self) -> str:
        kind = "classes" if self.y.ndim == 1 else "targets"
        rows = {
            "Cells x genes": f"{len(self):,} x {len(self.gene_names):,}",
            "Outputs": f"{len(self.output_names):,} {kind}: {listed(self.output_names)}",
            "Expression": f"{self._format}, from {'X' if self.layer is None else f'layer {self.layer!r}'}",
        }
        return as_html(rows, "ExpressionDataset")


def check_dataset(dataset: Any, argument: str = "dataset") -> None:
    """Raise an error for anything but a data set."""
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


def blocks(x: Matrix, size: int = 1024) -> Iterator[tuple[slice, sparse.csr_matrix | np.ndarray]]:
    """Yield cells in memory, a block at a time, and where they are."""
    if isinstance(x, StoredMatrix):
        yield from x.blocks(size)
        return
    for start in range(0, x.shape[0], size):
        block = x[start : start + size]
        yield slice(start, start + block.shape[0]), block


def product(x: Matrix, weights: np.ndarray) -> np.ndarray:
    """Return x @ weights (cell x comp), of stored cells block by block."""
    if not isinstance(x, StoredMatrix):
        return np.asarray(x @ weights)
    found = np.empty((len(x), weights.shape[1]), np.result_type(x.dtype, weights.dtype))
    for part, block in x.blocks():
        found[part] = block @ weights
    return found


def mean(x: Matrix) -> np.ndarray:
    """Return the mean of every column (gene), in float64."""
    return x.moments()[0] if isinstance(x, StoredMatrix) else np.asarray(x.mean(axis=0, dtype=np.float64)).ravel()


def held(dataset: ExpressionDataset) -> ExpressionDataset:
    """Return a data set in memory: of stored cells, a random part that fits into 256 MB."""
    return dataset.load(some(len(dataset), dataset.x.holds())) if dataset.stored else dataset


def some(n: int, most: int) -> np.ndarray:
    """Return the rows of at most so many cells, drawn at random with a fixed seed, rising."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(0).choice(n, most, replace=False))


def take(x: Matrix, rows: np.ndarray) -> Matrix:
    """Return some of the cells; stored ones stay on disk."""
    return x.take(rows) if isinstance(x, StoredMatrix) else x[rows]


def check_in_memory(x: ExpressionDataset | Matrix, what: str) -> None:
    """Raise an error for stored cells, in a method that needs all cells at once."""
    x = x.x if isinstance(x, ExpressionDataset) else x
    if isinstance(x, StoredMatrix):
        raise ValueError(
            f"{what} needs all cells in memory, and {x.where} is read from disk; take as many as fit: "
            f"dataset.load(range({min(len(x), x.holds())}))."
        )


def cell_names(x: Any) -> pd.Index | None:
    """Return the names of cells, where they have any."""
    if isinstance(x, str | Path):
        return annotations(x).obs_names
    return x.obs_names if isinstance(x, AnnData) else x.index if isinstance(x, pd.DataFrame) else None


def standard_deviation(x: Matrix) -> np.ndarray:
    """Return the standard deviation of every column (gene); the mean where a column is constant."""
    if isinstance(x, StoredMatrix):
        center, variance = x.moments()
        # Sums of squares leave a rounding error of a constant.
        return np.where(variance > (1e-7 * center) ** 2, np.sqrt(variance), center)
    scaler = StandardScaler(with_mean=False).fit(x)
    return np.where(scaler.var_ > 0, np.sqrt(scaler.var_), scaler.mean_)


def match_genes(
    x: AnnData | ExpressionDataset | str | Path | Any,
    gene_names: pd.Index,
    layer: str | None = None,
    scaling: Scaling | None = None,
) -> Matrix:
    """Return expression with exactly these genes, in this order, by name where `x` has names; counts scaled alike."""
    names, where, adata = getattr(x, "gene_names", None), "x", None
    if hasattr(x, "obs"):
        check_cells(x)
    if isinstance(x, AnnData | str | Path):
        adata, stored = open_cells(x, layer)
        names = adata.var_names
        x, where = expression(adata, layer) if stored is None else (stored, stored.where)
        if stored is None:
            check_finite(x, where)
        x = scaled_alike(x, scaling, where)
        if stored is not None:
            check_scale(*scale_of(x[:1000]), f"the first block of {where}")
    elif isinstance(x, ExpressionDataset):
        x = x.x
    elif isinstance(x, pd.DataFrame):
        names = x.columns
    elif isinstance(x, pd.Series):
        raise ValueError(f"x is a Series of {len(x)} values; pass one cell as a table, x.to_frame().T.")
    if names is not None and not isinstance(gene_names, pd.RangeIndex):
        names = plain_names(names, "genes", unique=False)
        if not names.equals(gene_names):
            at = _find(names, gene_names)
            x = x.iloc[:, at] if isinstance(x, pd.DataFrame) else x[:, at]
    stored = isinstance(x, StoredMatrix)  # of which each block is checked as it is read
    x = x if stored else numeric_matrix(x, where)
    if x.shape[1] != len(gene_names):
        where = x.where if stored else where
        raise ValueError(f"{where} has shape {tuple(x.shape)}; (cell, gene) with {len(gene_names)} genes is needed.")
    if adata is None and not stored:
        check_finite(x, where)
    elif not stored:
        check_log_normalised(x, where, adata)
    return x


def _find(names: pd.Index, wanted: pd.Index) -> np.ndarray:
    """Return the position of each gene that is wanted."""
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
    return names.get_indexer_for(wanted)


def gene_vector(values: Any, gene_names: pd.Index, what: str) -> np.ndarray:
    """Return one number a gene (gene); a Series is matched by name, anything else by order."""
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
    adata: AnnData | str | Path,
    class_key: str,
    train_split: float = 0.7,
    val_split: float = 0.15,
    random_state: int = 0,
    *,
    layer: str | None = None,
    split_key: str | None = None,
    normalize_total: bool | float = False,
    log1p: bool = False,
    num_workers: int = 0,
) -> tuple[ExpressionDataset, ExpressionDataset, ExpressionDataset]:
    """Split cells into train, validation and test sets, with every class in each in equal proportion.

    Parameters
    ----------
    adata
        Cells with log-normalised expression. That of a path (``.h5ad`` or zarr) or a backed AnnData stays on disk.
    class_key
        Column of ``obs`` with the class of every cell; ``y`` holds codes, in the order of the categories.
    train_split, val_split
        Fractions of the cells for training and validation; the rest is the test set.
    random_state
        Seed of the split.
    layer
        Layer to read instead of ``X``.
    split_key
        Column of ``obs`` with ``train``, ``val`` and ``test``, in place of the fractions; other cells are in no set.
    normalize_total
        Total to scale every cell to, over all genes, those too that a backed view lacks; True for the median total.
    log1p
        Take log(1 + x) after that, as scanpy does; `adata` stays as it is.
    num_workers
        Processes that read stored cells ahead, up to 256 MB each; two or more change the order of the cells.

    Raises
    ------
    ValueError
        A class is too small to be in every set, or the expression has values that are negative, NaN or infinite.

    Examples
    --------
    >>> train, validation, test = datasets.get_classification_datasets(adata, "label")
    >>> train
    ExpressionDataset: 700 cells x 40 genes, 2 outputs, dense
    >>> list(train.output_names)
    ['off', 'on']
    """
    check_cells(adata)
    adata, stored = open_cells(adata, layer)
    labels = obs_labels(adata, class_key, "class_key").astype("category").cat.remove_unused_categories()
    codes, classes = labels.cat.codes.to_numpy(np.int64), labels.cat.categories
    if len(classes) < 2:
        raise ValueError(
            f"class_key={class_key!r} has the class {', '.join(map(repr, classes)) or 'of no cell'} alone, and nothing "
            f"to tell it from; add cells of other classes, or name another column."
        )
    for name in (name for name in classes if str(name).strip().lower() in MISSING):
        warn(
            f"class_key={class_key!r} has {(labels == name).sum()} cells of the label {str(name)!r}. It looks like a "
            f"missing label, and is taken for a class; leave them out: adata[adata.obs[{class_key!r}] != {name!r}]."
        )
    rows = _rows(adata, labels, train_split, val_split, random_state, split_key)
    x, scaling = _checked(adata, stored, layer, normalize_total, log1p)
    genes = adata.var_names
    sets = tuple(ExpressionDataset(take(x, i), codes[i], genes, classes, i, layer, num_workers, scaling) for i in rows)
    for name, one in zip(SETS, sets, strict=True):
        lacking = [str(classes[code]) for code in np.setdiff1d(codes, one.y.numpy())]
        if lacking:
            what = "cannot be learnt" if name == "train" else f"does not count in what is said of {name} cells"
            warn(
                f"split_key={split_key!r} has no {name} cell of the class {', '.join(lacking[:5])}, which {what}; drop "
                f"its cells, or label some of them {name!r}."
            )
    return sets


def get_regression_datasets(
    adata: AnnData | str | Path,
    target_key: str,
    train_split: float = 0.7,
    val_split: float = 0.15,
    random_state: int = 0,
    *,
    layer: str | None = None,
    split_key: str | None = None,
    normalize_total: bool | float = False,
    log1p: bool = False,
    num_workers: int = 0,
) -> tuple[ExpressionDataset, ExpressionDataset, ExpressionDataset]:
    """Split cells at random into train, validation and test sets with continuous targets.

    Parameters
    ----------
    target_key
        Key of ``obsm`` with targets (cell x out): a table, or an array, whose outputs are ``<target_key>_0`` and so on.
    adata, train_split, val_split, random_state, layer, split_key, normalize_total, log1p, num_workers
        As in :func:`get_classification_datasets`.

    Raises
    ------
    ValueError
        A target is constant or not finite, or the expression has values that are negative, NaN or infinite.

    Examples
    --------
    >>> train, validation, test = datasets.get_regression_datasets(adata, "programs")
    >>> list(train.output_names[:2])
    ['program_01', 'program_02']
    """
    check_cells(adata)
    adata, stored = open_cells(adata, layer)
    if not isinstance(target_key, str) or target_key not in adata.obsm:
        hint = ""
        if isinstance(target_key, str) and target_key in adata.obs:
            hint = (
                f" It is a column of obs: adata.obsm[{target_key!r}] = adata.obs[[{target_key!r}]] makes it a target."
            )
        there = ", ".join(adata.obsm) or "none"
        raise KeyError(f"target_key={target_key!r} is not in adata.obsm; there are: {there}.{hint}")
    target, where, names = adata.obsm[target_key], f"adata.obsm[{target_key!r}]", None
    if isinstance(target, pd.DataFrame):
        names = plain_names(target.columns, where)
        # Numbers that a pipeline made categorical are numbers all the same.
        numeric = [pd.api.types.is_numeric_dtype(getattr(kind, "categories", kind)) for kind in target.dtypes]
        target = target.astype(dict.fromkeys(target.columns[numeric], float))
    elif np.ndim(target) == 1:
        target = np.asarray(target)[:, None]
    y = numeric_matrix(target, where, np.float32)
    y = y.toarray() if sparse.issparse(y) else y
    check_finite(y, where, "drop those cells")
    names = plain_names([f"{target_key}_{i}" for i in range(y.shape[1])], where) if names is None else names
    constant = [str(name) for name, column in zip(names, y.T, strict=True) if len(y) == 0 or np.ptp(column) == 0]
    if constant or not len(names):
        raise ValueError(
            f"{where} is the same in every cell for {', '.join(constant) or 'want of a column'}: there is nothing to "
            f"learn; drop such columns."
        )
    rows = _rows(adata, None, train_split, val_split, random_state, split_key)
    x, scaling = _checked(adata, stored, layer, normalize_total, log1p)
    genes = adata.var_names
    return tuple(ExpressionDataset(take(x, i), y[i], genes, names, i, layer, num_workers, scaling) for i in rows)


def _rows(
    adata: AnnData, labels: pd.Series | None, train_split: float, val_split: float, random_state: int, split_key: Any
) -> list[np.ndarray]:
    """Return the rows of the three sets, with every label in equal proportion if labels are given."""
    if split_key is not None:
        part = obs_column(adata, split_key, "split_key").astype(str)  # a missing label is no label
        rows = [np.flatnonzero(part == name) for name in SETS]
        if not all(map(len, rows)):
            raise ValueError(
                f"split_key={split_key!r} has {len(rows[0])} cells of 'train', {len(rows[1])} of 'val' and "
                f"{len(rows[2])} of 'test'; label at least one cell for each."
            )
        return rows
    numbers = isinstance(train_split, Real) and isinstance(val_split, Real)
    if not (numbers and train_split > 0 and val_split > 0 and train_split + val_split < 1):
        raise ValueError(
            f"train_split={train_split!r} and val_split={val_split!r} must be positive and add up to less than 1, so "
            f"that a test set is left; the default is 0.7 and 0.15."
        )
    if labels is not None:
        sizes = labels.value_counts()
        needed = int(np.ceil(1 / min(train_split, val_split, 1 - train_split - val_split) - 1e-9))
        if sizes.min() < needed:
            raise ValueError(
                f"class_key={labels.name!r}: class {sizes.idxmin()!r} has {sizes.min()} cells, but {needed} are needed "
                f"for one in every set at train_split={train_split}, val_split={val_split}; merge the class with "
                f"another, drop it, or make the smallest set larger."
            )
    n_train, n_val = round(train_split * adata.n_obs), round(val_split * adata.n_obs)
    if min(n_train, n_val, adata.n_obs - n_train - n_val) < 1:
        raise ValueError(
            f"train_split={train_split}, val_split={val_split} leave a set of {adata.n_obs} cells empty; take more "
            f"cells, or other fractions."
        )
    seed, parts, rest = whole_number(random_state, "random_state", 0, 2**32 - 1), [], np.arange(adata.n_obs)
    for size in (n_train, n_val):
        codes = None if labels is None else labels.cat.codes.iloc[rest]
        part, rest = train_test_split(rest, train_size=size, stratify=codes, random_state=seed)
        parts.append(part)
    return [np.sort(part) for part in (*parts, rest)]


def _checked(
    adata: AnnData, x: StoredMatrix | None, layer: str | None, normalize_total: bool | float, log1p: bool
) -> tuple[Matrix, Scaling | None]:
    """Return expression of which every value is checked, normalised as asked for, and what it went through."""
    if not adata.var_names.is_unique:
        raise ValueError("adata.var_names are not unique; call adata.var_names_make_unique() first.")
    check_normalisation(normalize_total, log1p)
    if isinstance(normalize_total, np.bool_):
        normalize_total = bool(normalize_total)
    counts = bool(normalize_total or log1p)
    if x is not None:
        # The median of totals walks all cells, so that they are checked there.
        if normalize_total is not True:
            _, *scale = x.totals()
            if not counts:
                check_scale(*scale, x.where)
        x = x.scaled(normalize_total, log1p)
        return x, x.scaling
    x, where = expression(adata, layer, np.float32)
    check_log_normalised(x, where, adata, counts=counts)
    target = median_total(row_totals(x), where) if normalize_total is True else normalize_total or None
    return normalised(x, target, log1p), Scaling(target, bool(log1p), x.shape[1]) if counts else None
