"""Expression that stays on disk: a matrix of an ``.h5ad`` file or a zarr store, read a few cells at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import h5py
import numpy as np
import pandas as pd
import torch
import zarr
from anndata import AnnData
from anndata.abc import CSCDataset, CSRDataset
from anndata.io import read_elem, sparse_dataset
from scipy import sparse
from sklearn.preprocessing import StandardScaler

from scbmlp.checks import MANY, check_finite, check_not_negative, entries, numeric_matrix, reading, scale_of, warn

# Up to so many cells between two that are wanted, to read and drop them is up to 50 times quicker than a jump.
GAP = 32
BLOCK_BYTES, BLOCK_CELLS = 2**26, 8192  # read at a time where all cells are walked
FEWER = 0.8  # share of the genes of training, below which totals are others
HELD_BYTES = 2**28  # of stored cells that a method holds, where it needs them at once
WHOLE = "pass a whole .h5ad file or zarr store, not zipped, that nobody has open for writing"
Block: TypeAlias = sparse.csr_matrix | np.ndarray


class Scaling(NamedTuple):
    """What counts went through: each cell scaled to a total of so many genes, if to any, then log1p, if asked for.

    Examples
    --------
    >>> stores.Scaling(1e4, True, n_genes=2000)
    Scaling(target_sum=10000.0, log1p=True, n_genes=2000)
    """

    target_sum: float | None
    log1p: bool
    n_genes: int

    def __str__(self) -> str:
        total = f"normalize_total={self.target_sum:,.6g}" if self.target_sum else "no normalize_total"
        return f"{total}, {'log1p' if self.log1p else 'no log1p'}"


class StoredMatrix:
    """Cells x genes of a file, read when they are asked for, as CSR or dense numpy in float32.

    ``x[rows]`` is in memory, in the order asked for. ``x[rows, columns]`` and ``x.take(rows)`` stay on disk, as does
    ``x.scaled(1e4, log1p=True)``, whose counts are scaled as they are read, over *all* genes of the file.
    ``x.blocks()`` walks all cells. The matrix can be pickled.

    Parameters
    ----------
    path
        An ``.h5ad`` file, or the folder of a zarr store: dense, or sparse by cells (CSR).
    layer
        Layer to read instead of ``X``.
    normalize_total, log1p
        As in :func:`scbmlp.datasets.get_classification_datasets`.

    Raises
    ------
    OSError
        The file cannot be read, or has changed since it was opened.
    ValueError
        The matrix is sparse by genes (CSC), or a block that is read is negative, NaN or infinite somewhere.

    Examples
    --------
    >>> adata.write_h5ad("cells.h5ad")
    >>> x = stores.StoredMatrix("cells.h5ad")
    >>> x.shape, x[:3].shape, list(x[:, :2].gene_names)
    ((1000, 40), (3, 40), ['Sim0001', 'Sim0002'])
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self, path: str | Path, layer: str | None = None, *, normalize_total: bool | float = False, log1p: bool = False
    ) -> None:
        self.path = Path(path).absolute()
        self.where = f"{'X' if layer is None else f'layers[{layer!r}]'} of {self.path}"  # its name in messages
        self._key = "X" if layer is None else f"layers/{layer}"
        with open_store(self.path) as file:
            if "mod" in file and "X" not in file:
                raise ValueError(f"{self.path} holds MuData; AnnData is needed: mdata['rna'].write_h5ad(...).")
            if self._key not in file:
                what = "the file has no X" if layer is None else f"layer={layer!r} is not in the file"
                there = ", ".join(file.get("layers", ())) or "none"
                raise KeyError(f"{what} {self.path}; its layers are: {there}. Name one of them.")
            with reading(self.path, WHOLE):
                matrix = file[self._key]
                matrix = sparse_dataset(matrix) if isinstance(matrix, h5py.Group | zarr.Group) else matrix
            if isinstance(matrix, CSCDataset):
                remedy = "adata.X = adata.X.tocsr(), then adata.write_h5ad(...)"
                raise ValueError(f"{self.where} is sparse by genes (CSC), and cells are read: write it anew, {remedy}.")
            self._in_file = n_cells, n_genes = tuple(matrix.shape)
            self._sparse = isinstance(matrix, CSRDataset)
            self._cell_bytes = 4 * n_genes  # in memory, as a cell is read
            if self._sparse:
                self._cell_bytes = 8 * matrix.group["data"].shape[0] / max(n_cells, 1)
            self.gene_names = read_elem(file["var"]).index if "var" in file else pd.RangeIndex(n_genes)
        self.scaling: Scaling | None = None
        self._place = self.path / self._key if self.path.is_dir() else self.path
        self._state = _state(self._place)
        self._opened: dict[str, Any] = {}
        self._moments: tuple[np.ndarray, np.ndarray] | None = None
        self._rows = np.arange(n_cells)
        self._columns = np.arange(n_genes)
        self.scaling = self.scaled(normalize_total, log1p).scaling

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of genes."""
        return len(self._rows), len(self._columns)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"StoredMatrix: {self.shape[0]} cells x {self.shape[1]} genes, {self.where}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}

    def _like(self, **changes: Any) -> StoredMatrix:
        """Return a matrix of the same file; both read through one handle."""
        other = copy(self)
        other.__dict__.update(changes, _opened=self._opened, _moments=None)
        return other

    def scaled(self, normalize_total: bool | float, log1p: bool) -> StoredMatrix:
        """Return the same cells, scaled as they are read."""
        whole = self._like(scaling=None, _columns=np.arange(self._in_file[1]))
        totals = (row_totals(block) for _, block in whole.blocks(BLOCK_CELLS))
        return self._like(scaling=scaling_of(normalize_total, log1p, totals, self._in_file[1], self.where))

    def take(self, rows: Any) -> StoredMatrix:
        """Return some of the cells by positions, a slice or a mask (cell); they stay on disk."""
        return self._like(_rows=self._rows[rows])

    def __getitem__(self, index: Any) -> Block | StoredMatrix:
        if isinstance(index, tuple):
            rows, columns = index
            return self._like(
                _rows=self._rows[rows], _columns=self._columns[columns], gene_names=self.gene_names[columns]
            )
        wanted, back = np.unique(np.atleast_1d(self._rows[index]), return_inverse=True)
        block = self._read(wanted)
        if self.scaling:
            block = normalised(block, *self.scaling[:2])
        if not np.array_equal(self._columns, np.arange(block.shape[1])):
            block = block[:, self._columns]
        return block if np.array_equal(back, np.arange(len(wanted))) else block[back]

    def _read(self, rows: np.ndarray) -> Block:
        """Check and return rows of the file, which rise, with all genes and before they are scaled."""
        if _state(self._place) != self._state:
            raise OSError(f"{self.path} has changed since it was opened; leave it alone, and cut the data sets anew.")
        # What is read at once, wanted or not, is no more than a block.
        apart = (np.diff(rows) > GAP) | (np.diff(rows // max(self.holds(BLOCK_BYTES), 1)) > 0)
        parts, where = [], f"a block of {self.where}"
        with reading(self.path, WHOLE):
            for run in np.split(rows, np.flatnonzero(apart) + 1):
                first, last = (run[0], run[-1] + 1) if len(run) else (0, 0)
                part = self._span(first, last)
                parts.append(part if len(run) == last - first else part[run - first])
            block = parts[0]
            if len(parts) > 1:
                block = sparse.vstack(parts, format="csr") if self._sparse else np.concatenate(parts)
            block = numeric_matrix(block, where, np.float32)
        check_finite(block, where)
        check_not_negative(block, where)
        return block

    def _span(self, first: int, last: int) -> Block:
        """Return the rows of the file between two; anndata's reader of a sparse one takes milliseconds for each."""
        if self._opened.get("process") != os.getpid():  # a handle of another process must not be read from
            element = open_store(self.path).__enter__()[self._key]  # it stays open
            arrays = [element["data"], element["indices"], element["indptr"][:]] if self._sparse else [element]
            self._opened.update(process=os.getpid(), arrays=arrays)
        if not self._sparse:
            return self._opened["arrays"][0][first:last]
        data, indices, indptr = self._opened["arrays"]
        at = slice(indptr[first], indptr[last])
        within = indptr[first : last + 1] - indptr[first]
        return sparse.csr_matrix((data[at], indices[at], within), shape=(last - first, self._in_file[1]))

    def blocks(self, size: int = 1024) -> Iterator[tuple[slice, Block]]:
        """Yield the place of a block of `size` cells at most, and the block itself, in memory."""
        most = max(1, min(self.holds(BLOCK_BYTES), BLOCK_CELLS))
        size = min(size, most)
        at_once = most // size * size  # small blocks are cut out of one that is read
        for start in range(0, len(self), at_once):
            block = self[start : start + at_once]
            for first in range(0, block.shape[0], size):
                part = block[first : first + size]
                yield slice(start + first, start + first + part.shape[0]), part

    def holds(self, size: int = HELD_BYTES) -> int:
        """Return how many cells fit into that many bytes."""
        return int(size // max(self._cell_bytes, 1))

    def scale(self) -> tuple[float, bool, float]:
        """Check every cell, and return the file's largest value and its scale, as scale_of has them."""
        found = [(0.0, True, 0.0)]
        for _, block in self._like(scaling=None, _columns=np.arange(self._in_file[1])).blocks(BLOCK_CELLS):
            found.append(scale_of(block))
        most, whole, share = zip(*found, strict=True)
        return max(most), all(whole), max(share)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and variance of every gene (gene), from one walk over the cells, and keep them."""
        if self._moments is None:
            scaler = StandardScaler(with_mean=False)
            for _, block in self.blocks(BLOCK_CELLS):
                scaler.partial_fit(block.astype(np.float64))
            self._moments = scaler.mean_, scaler.var_
        return self._moments


def row_totals(x: Block) -> np.ndarray:
    """Return the total of every cell (cell)."""
    return np.asarray(x.sum(axis=1, dtype=np.float64)).ravel()


def scaling_of(
    normalize_total: Any, log1p: Any, totals: Iterable[np.ndarray], n_genes: int, where: str
) -> Scaling | None:
    """Return the scaling that is asked for, None for none; the totals of cells are walked for their median alone."""
    normalize_total = False if normalize_total is None else normalize_total
    switch = isinstance(normalize_total, bool | np.bool_)
    if not switch and not (isinstance(normalize_total, Real) and 0 < normalize_total < np.inf):
        raise ValueError(
            f"normalize_total={normalize_total!r}: False, True for the median total, or a positive total is needed."
        )
    if not isinstance(log1p, bool | np.bool_):
        raise ValueError(f"log1p={log1p!r}: True or False is needed; the logarithm is the natural one.")
    if not (normalize_total or log1p):
        return None
    target = float(normalize_total) or None
    if switch and normalize_total:
        found = np.concatenate([np.empty(0), *totals])
        if not found.any():
            raise ValueError(f"{where} has no counts in any of {len(found)} cells; read a layer that has some.")
        target = float(np.median(found[found > 0]))
    return Scaling(target, bool(log1p), n_genes)


def scaled_alike(x: Block | StoredMatrix, scaling: Scaling | None, where: str) -> Block | StoredMatrix:
    """Return counts scaled as those of training were; what is no counts any more stays as it is."""
    stored = isinstance(x, StoredMatrix)
    if scaling is None or (stored and x.scaling):
        return x
    most, whole, share = scale_of(x[:1000] if stored else x)
    if not (whole and most > 1) and share <= MANY:
        return x
    n_genes = x._in_file[1] if stored else x.shape[1]
    if scaling.target_sum and n_genes < FEWER * scaling.n_genes:
        warn(
            f"{where} has counts of {n_genes:,} genes, and those of training were scaled to a total of "
            f"{scaling.n_genes:,} genes; pass all genes, or values that are scaled and logged ({scaling})."
        )
    return x._like(scaling=scaling) if stored else normalised(x, *scaling[:2])


def normalised(x: Block, target_sum: float | None, log1p: bool) -> Block:
    """Return cells scaled to a total, then log(1 + x) of them, as scanpy does; `x` stays as it is."""
    if target_sum is None and not log1p:
        return x
    values = entries(x)
    if target_sum is not None:
        totals = row_totals(x)
        scale = np.divide(target_sum, totals, out=np.ones_like(totals), where=totals > 0)
        scale = np.repeat(scale, np.diff(x.indptr)) if sparse.issparse(x) else scale[:, None]
        values = (values * scale).astype(np.float32)
    if log1p:
        values = np.array(values, np.float32)
        torch.from_numpy(values).log1p_()  # vectorised, which numpy's is not
    return sparse.csr_matrix((values, x.indices, x.indptr), shape=x.shape) if sparse.issparse(x) else values


def open_cells(cells: str | Path | AnnData, layer: str | None) -> tuple[AnnData, StoredMatrix | None]:
    """Return the annotations of cells and genes, and their expression if it is in a file, where it stays."""
    if isinstance(cells, str | Path):
        return annotations(cells), StoredMatrix(cells, layer)
    if not cells.isbacked:
        return cells, None
    matrix = StoredMatrix(cells.filename, layer)
    if not cells.is_view:
        return cells, matrix
    known = annotations(matrix.path, ["obs", "var"])
    rows = known.obs_names.get_indexer_for(cells.obs_names)
    columns = known.var_names.get_indexer_for(cells.var_names)
    if (len(rows), len(columns)) != cells.shape or min(rows.min(), columns.min()) < 0:
        view = f"adata is a view of {matrix.path}, in which names of cells or genes are lacking or come twice"
        raise ValueError(f"{view}; give each a name of its own there, or pass the file and label cells for split_key.")
    return cells, matrix[rows, columns]


def annotations(path: str | Path, parts: Sequence[str] = ("obs", "var", "obsm")) -> AnnData:
    """Return ``obs``, ``var`` and ``obsm`` of a file, without its matrices."""
    with open_store(Path(path)) as file, reading(path, WHOLE):
        return AnnData(**{part: read_elem(file[part]) for part in parts if part in file})


def open_store(path: Path) -> AbstractContextManager[Any]:
    """Open an ``.h5ad`` file or a zarr store for reading, for as long as a block lasts."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; pass the path of an .h5ad file or of a zarr store.")
    with reading(path, WHOLE):
        return nullcontext(zarr.open_group(str(path), mode="r")) if path.is_dir() else h5py.File(path, "r")


def _state(place: Path) -> tuple[int, int] | None:
    """Return size and time of change of a file or folder, None if it is gone."""
    if not place.exists():
        return None
    about = place.stat()
    return about.st_size, about.st_mtime_ns
