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

from scbmlp import checks, stores
from scbmlp.checks import expression, numeric_matrix, plain_names, warn
from scbmlp.stores import Scaling, StoredMatrix

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
            checks.check_finite(self.x, "x")
        self.gene_names = plain_names(gene_names, "genes")
        self.output_names = plain_names(output_names, "outputs")
        self.y = torch.as_tensor(_targets(np.asarray(y), len(self.output_names)))
        self.indices = np.arange(len(self)) if indices is None else np.asarray(indices)
        self.scaling = self.x.scaling if self.stored else scaling
        self.layer, self.num_workers = layer, checks.whole_number(num_workers, "num_workers", 0)
        if self.x.shape[1] != len(self.gene_names):
            raise ValueError(f"x has {self.x.shape[1]} columns, gene_names has {len(self.gene_names)}; name every one.")
        if not len(self) == len(self.y) == len(self.indices):
            sizes = f"x has {len(self)} cells, y has {len(self.y)}, indices has {len(self.indices)}"
            raise ValueError(f"{sizes}; one a cell is needed.")

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
        cells = slice(None) if cells is None else cells
        part = copy(self)
        part.x, part.y, part.indices = self.x[cells], self.y[cells], self.indices[cells]
        return part

    def __repr__(self) -> str:
        n_cells, n_genes = self.x.shape
        kind = "on disk" if self.stored else "sparse" if sparse.issparse(self.x) else "dense"
        return f"ExpressionDataset: {n_cells} cells x {n_genes} genes, {len(self.output_names)} outputs, {kind}"


def _targets(y: np.ndarray, n_outputs: int) -> np.ndarray:
    """Return class codes, if these are whole numbers of one axis, or targets (cell x out), checked."""
    if y.ndim == 1 and y.dtype.kind in "biu":
        if len(y) and not 0 <= y.min() <= y.max() < n_outputs:
            given = f"y has class codes from {y.min()} to {y.max()}, and 0 to {n_outputs - 1} are allowed"
            raise ValueError(f"{given}: encode the classes anew, or pass float numbers for a regression.")
        return y.astype(np.int64)
    y = numeric_matrix(y[:, None] if y.ndim == 1 else y, "y", np.float32)
    checks.check_finite(y, "y", "drop those cells")
    if y.shape[1] != n_outputs:
        given = f"y has {y.shape[1]} columns, output_names has {n_outputs}"
        raise ValueError(f"{given}; name every one, or give classes whole numbers.")
    return y


def check_dataset(dataset: Any, argument: str = "dataset") -> None:
    """Raise an error for anything but a data set."""
    if not isinstance(dataset, ExpressionDataset):
        needed = "an ExpressionDataset is needed, from get_classification_datasets or get_regression_datasets"
        raise ValueError(f"{argument} is of type {type(dataset).__name__}; {needed} of scbmlp.datasets.")


def dense_tensor(x: sparse.spmatrix | np.ndarray | torch.Tensor) -> torch.Tensor:
    """Turn a few rows of any matrix format into a dense float32 tensor of the same shape."""
    return torch.as_tensor(x.toarray() if sparse.issparse(x) else x, dtype=torch.float32)


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
        most = f"dataset.load(range({min(len(x), x.holds())}))"
        raise ValueError(f"{what} needs all cells in memory, and {x.where} is read from disk; take some: {most}.")


def cell_names(x: Any) -> pd.Index | None:
    """Return the names of cells, where they have any."""
    if isinstance(x, str | Path):
        return stores.annotations(x).obs_names
    return x.obs_names if isinstance(x, AnnData) else x.index if isinstance(x, pd.DataFrame) else None


def standard_deviation(x: Matrix) -> np.ndarray:
    """Return the standard deviation of every column (gene); the mean where a column is constant."""
    if isinstance(x, StoredMatrix):
        center, variance = x.moments()
        # Sums over blocks leave a rounding error of a constant.
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
    if isinstance(x, pd.Series):
        raise ValueError(f"x is a Series of {len(x)} values; pass one cell as a table, x.to_frame().T.")
    if hasattr(x, "obs"):
        checks.check_cells(x)
    where, adata, names = "x", None, getattr(x, "gene_names", getattr(x, "columns", None))
    if isinstance(x, AnnData | str | Path):
        adata, stored = stores.open_cells(x, layer)
        names = adata.var_names
        x, where = expression(adata, layer) if stored is None else (stored, stored.where)
        x = stores.scaled_alike(x, scaling, where)
        if stored is not None:
            checks.check_scale(*checks.scale_of(x[:1000]), f"the first block of {where}")
    elif isinstance(x, ExpressionDataset):
        x = x.x
    if names is not None and not isinstance(gene_names, pd.RangeIndex):
        names = plain_names(names, "genes", unique=False)
        if not names.equals(gene_names):
            at = _find(names, gene_names)
            x = x.iloc[:, at] if isinstance(x, pd.DataFrame) else x[:, at]
    if not isinstance(x, StoredMatrix):  # of which each block is checked as it is read
        x = numeric_matrix(x, where)
    if x.shape[1] != len(gene_names):
        raise ValueError(f"{where} has shape {tuple(x.shape)}; (cell, gene) with {len(gene_names)} genes is needed.")
    if isinstance(x, StoredMatrix):
        return x
    if adata is None:
        checks.check_finite(x, where)
    else:
        checks.check_log_normalised(x, where, adata)
    return x


def _find(names: pd.Index, wanted: pd.Index) -> np.ndarray:
    """Return the position of each gene that is wanted."""
    missing = wanted.difference(names, sort=False)
    if len(missing):
        lower = set(names.astype(str).str.lower())
        turned = [name for name in missing if str(name).lower() in lower]
        hint = f" ({len(turned)} are there in another case, such as {turned[0]})" if turned else ""
        lacking = f"{len(missing)} of the {len(wanted)} genes needed, such as {', '.join(map(str, missing[:5]))}"
        raise KeyError(f"x lacks {lacking}{hint}; use data with all of them.")
    twice = names[names.duplicated()].intersection(wanted)
    if len(twice):
        some = f"{len(twice)} of the genes needed more than once, such as {', '.join(map(str, twice[:5]))}"
        raise ValueError(f"x has {some}; keep one column of each, or call adata.var_names_make_unique().")
    return names.get_indexer_for(wanted)


def gene_vector(values: Any, gene_names: pd.Index, what: str) -> np.ndarray:
    """Return one number a gene (gene); a Series is matched by name, anything else by order."""
    if isinstance(values, pd.Series) and not isinstance(gene_names, pd.RangeIndex):
        values = values.to_numpy()[_find(plain_names(values.index, "genes", unique=False), gene_names)]
    values = np.asarray(values.toarray() if sparse.issparse(values) else values, dtype=np.float64).ravel()
    if values.shape != (len(gene_names),) or not np.isfinite(values).all():
        given = f"{what} has {len(values)} values, {(~np.isfinite(values)).sum()} of them NaN or infinite"
        raise ValueError(f"{given}; one for each of the model's {len(gene_names)} genes is needed.")
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
    train_split, val_split, random_state
        Fractions of the cells for training and validation, the rest is the test set; seed of the split.
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

    Examples
    --------
    >>> train, validation, test = datasets.get_classification_datasets(adata, "label")
    >>> train
    ExpressionDataset: 700 cells x 40 genes, 2 outputs, dense
    >>> list(train.output_names)
    ['off', 'on']
    """
    checks.check_cells(adata)
    adata, stored = stores.open_cells(adata, layer)
    labels = checks.obs_labels(adata, class_key, "class_key").astype("category").cat.remove_unused_categories()
    codes, classes = labels.cat.codes.to_numpy(np.int64), labels.cat.categories
    if len(classes) < 2:
        only = f"class {classes[0]!r}" if len(classes) else "class of no cell"
        raise ValueError(f"class_key={class_key!r} has the {only} alone, and nothing to tell it from; add others.")
    for name in (name for name in classes if str(name).strip().lower() in checks.MISSING):
        n_such = f"{(labels == name).sum()} cells of the label {str(name)!r}"
        remedy = f"leave them out: adata[adata.obs[{class_key!r}] != {name!r}]"
        warn(f"class_key={class_key!r} has {n_such}, a class that looks like a missing label; {remedy}.")
    rows = _rows(adata, labels, train_split, val_split, random_state, split_key)
    x, how = _checked(adata, stored, layer, normalize_total, log1p, num_workers)
    sets = tuple(ExpressionDataset(take(x, i), codes[i], adata.var_names, classes, i, **how) for i in rows)
    for name, one in zip(SETS, sets, strict=True):
        lacking = [str(classes[code]) for code in np.setdiff1d(codes, one.y.numpy())]
        if lacking:
            what = "cannot be learnt" if name == "train" else f"does not count in what is said of {name} cells"
            found = f"no {name} cell of the class {', '.join(lacking[:5])}, which {what}"
            warn(f"split_key={split_key!r} has {found}; drop its cells, or label some of them {name!r}.")
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

    Examples
    --------
    >>> train, validation, test = datasets.get_regression_datasets(adata, "programs")
    >>> list(train.output_names[:2])
    ['program_01', 'program_02']
    """
    checks.check_cells(adata)
    adata, stored = stores.open_cells(adata, layer)
    if not isinstance(target_key, str) or target_key not in adata.obsm:
        hint = "."
        if isinstance(target_key, str) and target_key in adata.obs:
            hint = f". It is a column of obs: adata.obsm[{target_key!r}] = adata.obs[[{target_key!r}]]."
        there = ", ".join(adata.obsm) or "none"
        raise KeyError(f"target_key={target_key!r} is not in adata.obsm; there are: {there}{hint}")
    target, where = adata.obsm[target_key], f"adata.obsm[{target_key!r}]"
    if isinstance(target, pd.DataFrame):
        names = plain_names(target.columns, where)
        # Numbers that a pipeline made categorical are numbers all the same.
        numeric = [pd.api.types.is_numeric_dtype(getattr(kind, "categories", kind)) for kind in target.dtypes]
        target = target.astype(dict.fromkeys(target.columns[numeric], float))
    else:
        target = np.asarray(target)[:, None] if np.ndim(target) == 1 else target
        names = pd.Index([f"{target_key}_{i}" for i in range(target.shape[1])])
    y = dense_tensor(numeric_matrix(target, where, np.float32)).numpy()
    checks.check_finite(y, where, "drop those cells")
    constant = [str(name) for name, column in zip(names, y.T, strict=True) if len(y) == 0 or np.ptp(column) == 0]
    if constant or not len(names):
        what = ", ".join(constant) or "want of a column"
        raise ValueError(f"{where} is the same in every cell for {what}: drop what there is nothing to learn of.")
    rows = _rows(adata, None, train_split, val_split, random_state, split_key)
    x, how = _checked(adata, stored, layer, normalize_total, log1p, num_workers)
    return tuple(ExpressionDataset(take(x, i), y[i], adata.var_names, names, i, **how) for i in rows)


def _rows(
    adata: AnnData, labels: pd.Series | None, train_split: float, val_split: float, random_state: int, split_key: Any
) -> list[np.ndarray]:
    """Return the rows of the three sets, with every label in equal proportion if labels are given."""
    if split_key is not None:
        part = checks.obs_column(adata, split_key, "split_key").astype(str)  # a missing label is no label
        rows = [np.flatnonzero(part == name) for name in SETS]
        if not all(map(len, rows)):
            found = ", ".join(f"{len(own)} cells of {name!r}" for name, own in zip(SETS, rows, strict=True))
            raise ValueError(f"split_key={split_key!r} has {found}; label at least one cell for each.")
        return rows
    split = f"train_split={train_split!r}, val_split={val_split!r}"
    numbers = isinstance(train_split, Real) and isinstance(val_split, Real)
    if not (numbers and train_split > 0 and val_split > 0 and train_split + val_split < 1):
        raise ValueError(f"{split}: positive fractions are needed that leave some for the test set; 0.7, 0.15 do.")
    n_train, n_val = round(train_split * adata.n_obs), round(val_split * adata.n_obs)
    needed = int(np.ceil(1 / min(train_split, val_split, 1 - train_split - val_split) - 1e-9))
    sizes = pd.Series([adata.n_obs]) if labels is None else labels.value_counts()
    if sizes.min() < needed or n_train + n_val >= adata.n_obs:
        whose = "adata" if labels is None else f"class_key={labels.name!r}: class {sizes.idxmin()!r}"
        remedy = "merge the class with another, drop it, or make the smallest set larger"
        raise ValueError(f"{whose} has {sizes.min()} cells, but {needed} are needed for sets of {split}; {remedy}.")
    seed = checks.whole_number(random_state, "random_state", 0, 2**32 - 1)
    parts, rest = [], np.arange(adata.n_obs)
    for size in (n_train, n_val):
        codes = None if labels is None else labels.cat.codes.iloc[rest]
        part, rest = train_test_split(rest, train_size=size, stratify=codes, random_state=seed)
        parts.append(part)
    return [np.sort(part) for part in (*parts, rest)]


def _checked(
    adata: AnnData, x: StoredMatrix | None, layer: str | None, normalize_total: Any, log1p: Any, num_workers: Any
) -> tuple[Matrix, dict[str, Any]]:
    """Return expression of which every value is checked, normalised as asked for, and what it came from."""
    if not adata.var_names.is_unique:
        raise ValueError("adata.var_names are not unique; call adata.var_names_make_unique() first.")
    how = {"layer": layer, "num_workers": num_workers}
    if x is not None:
        x, scale = x.scaled(normalize_total, log1p), x.scale()
        if x.scaling is None:
            checks.check_scale(*scale, x.where)
        return x, how
    x, where = expression(adata, layer, np.float32)
    scaling = stores.scaling_of(normalize_total, log1p, map(stores.row_totals, [x]), x.shape[1], where)
    checks.check_log_normalised(x, where, adata, counts=scaling is not None)
    return stores.normalised(x, *scaling[:2]) if scaling else x, how | {"scaling": scaling}
