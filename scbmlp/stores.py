"""Expression that stays on disk: a matrix of an ``.h5ad`` file or a zarr store, read a few cells at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

from scbmlp.checks import MANY, REMEDY, check_finite, check_not_negative, entries, numeric_matrix, scale_of, warn

# Up to so many cells between two that are wanted, to read and drop them is up to 50 times quicker than a jump.
GAP = 32
BLOCK_BYTES, BLOCK_CELLS = 2**26, 8192  # read at a time where all cells are walked
FEWER = 0.8  # share of the genes of training, below which totals are others
HELD_BYTES = 2**28  # of stored cells that a method holds, where it needs them at once
Block: TypeAlias = sparse.csr_matrix | np.ndarray


class Scaling(NamedTuple):
    """What counts went through: each cell scaled to a total of so many genes, if to any, then log1p, if that was asked.

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

    ``x[rows]`` is in memory, in the order asked for. ``x[:, columns]`` stays on disk. The matrix can be pickled.

    Parameters
    ----------
    path
        An ``.h5ad`` file, or the folder of a zarr store: dense, or sparse by cells (CSR).
    layer
        Layer to read instead of ``X``.
    normalize_total
        Total to scale every cell to, over *all* genes of the file; True for the median total.
    log1p
        Take log(1 + x) of every value, after scaling.

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
        check_normalisation(normalize_total, log1p)
        self.path, self.layer = Path(path).absolute(), layer
        self.where = f"{'X' if layer is None else f'layers[{layer!r}]'} of {self.path}"  # its name in messages
        self._key = "X" if layer is None else f"layers/{layer}"
        with open_store(self.path) as file:
            layers = list(file["layers"]) if "layers" in file else []
            if "mod" in file and "X" not in file:
                raise ValueError(
                    f"{self.path} holds MuData; AnnData is needed: write one modality, mdata['rna'].write_h5ad(...)."
                )
            if layer not in layers and (layer is not None or "X" not in file):
                what = "the file has no X" if layer is None else f"layer={layer!r} is not in the file"
                raise KeyError(f"{what} {self.path}; its layers are: {', '.join(layers) or 'none'}. Name one of them.")
            with _reading(self.path):
                matrix = _lazy(file[self._key])
            if isinstance(matrix, CSCDataset):
                raise ValueError(
                    f"{self.where} is sparse by genes (CSC), and no cell can be read alone; write it by cells: "
                    f"adata.X = adata.X.tocsr(), then adata.write_h5ad(...)."
                )
            if len(matrix.shape) != 2:
                raise ValueError(f"{self.where} has shape {tuple(matrix.shape)}; two axes are needed, cells in rows.")
            self._in_file = n_cells, n_genes = tuple(matrix.shape)
            self._sparse = isinstance(matrix, CSRDataset)
            stored = 8 * matrix.group["data"].shape[0] / max(n_cells, 1) if self._sparse else 4 * n_genes
            self.gene_names = read_elem(file["var"]).index if "var" in file else pd.RangeIndex(n_genes)
        self.cell_bytes = stored  # of a cell in memory, as it is read
        self._state, self._opened, self._moments = _state(self.path, self._key), {}, None
        self._rows, self._columns = np.arange(n_cells), None
        self.target_sum, self.log1p = None, False
        self.__dict__ = self.scaled(normalize_total, log1p).__dict__

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of genes."""
        return len(self._rows), len(self.gene_names)

    @property
    def scaling(self) -> Scaling | None:
        """What the counts go through as they are read; None for nothing."""
        asked = self.target_sum or self.log1p
        return Scaling(self.target_sum, self.log1p, self._in_file[1]) if asked else None

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"StoredMatrix: {self.shape[0]} cells x {self.shape[1]} genes, {self.where}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}

    def _like(self, **changes: Any) -> StoredMatrix:
        """Return a matrix of the same file; both read through one handle."""
        other = object.__new__(type(self))
        other.__dict__ = self.__dict__ | {"_moments": None} | changes
        return other

    def scaled(self, normalize_total: bool | float, log1p: bool) -> StoredMatrix:
        """Return the same cells, scaled as they are read.

        Parameters
        ----------
        normalize_total, log1p
            As the class takes them; the median is that of *these* cells.

        Examples
        --------
        >>> adata.write_h5ad("cells.h5ad")
        >>> x = stores.StoredMatrix("cells.h5ad").scaled(1e4, log1p=True)
        >>> np.expm1(x[:2]).sum(axis=1).round().tolist()
        [10000.0, 10000.0]
        """
        target = float(normalize_total) or None
        if normalize_total is True:
            target = median_total(self.totals()[0], self.where)
        return self._like(target_sum=target, log1p=bool(log1p))

    def take(self, rows: Any) -> StoredMatrix:
        """Return some of the cells, which stay on disk.

        Parameters
        ----------
        rows
            Positions, a slice or a mask (cell).

        Examples
        --------
        >>> adata.write_h5ad("cells.h5ad")
        >>> stores.StoredMatrix("cells.h5ad").take(labels == "on").shape
        (500, 40)
        """
        return self._like(_rows=self._rows[rows])

    def __getitem__(self, index: Any) -> Block | StoredMatrix:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        if not (isinstance(columns, slice) and columns == slice(None)):
            known = np.arange(self._in_file[1]) if self._columns is None else self._columns
            part = self._like(_columns=known[columns], gene_names=self.gene_names[columns])
            return part if isinstance(rows, slice) and rows == slice(None) else part[rows]
        asked = np.atleast_1d(self._rows[rows])
        rising = (np.diff(asked) > 0).all()
        wanted, back = (asked, slice(None)) if rising else np.unique(asked, return_inverse=True)
        block = normalised(self._read(wanted), self.target_sum, self.log1p)
        block = block if self._columns is None else block[:, self._columns]
        return block if rising else block[back]

    def _read(self, rows: np.ndarray) -> Block:
        """Check and return rows of the file, which rise, with all genes and before they are scaled."""
        runs = [run for run in np.split(rows, np.flatnonzero(np.diff(rows) > GAP) + 1) if len(run)]
        spans = [slice(run[0], run[-1] + 1) for run in runs] or [slice(0, 0)]
        read = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        if len(read) - len(rows) > max(self.holds(BLOCK_BYTES), 1):  # too much to drop at once
            halves = [self._read(half) for half in np.array_split(rows, 2)]
            return sparse.vstack(halves, format="csr") if self._sparse else np.concatenate(halves)
        if _state(self.path, self._key) != self._state:
            raise OSError(f"{self.path} has changed since it was opened; leave it alone, and cut the data sets anew.")
        with _reading(self.path):
            matrix = self._matrix()
            if len(spans) == 1:
                block = matrix[spans[0]]
            elif self._sparse:  # anndata reads a mask run by run, in one call
                block = matrix[np.bincount(read, minlength=self._in_file[0]).astype(bool)]
            else:
                block = np.concatenate([matrix[span] for span in spans])
        if len(read) > len(rows):
            block = block[np.searchsorted(read, rows)]
        where = f"a block of {self.where}"
        block = numeric_matrix(block, where, np.float32)
        check_finite(block, where)
        check_not_negative(block, where, REMEDY)
        return block

    def _matrix(self) -> Any:
        """Return the matrix in the file, opened by this process: a handle of another must not be read from."""
        if self._opened.get("process") != os.getpid():
            file = open_store(self.path).__enter__()  # it stays open
            self._opened.update(process=os.getpid(), file=file, matrix=_lazy(file[self._key]))
        return self._opened["matrix"]

    def blocks(self, size: int = 1024) -> Iterator[tuple[slice, Block]]:
        """Yield the place of a block of cells, and the block itself, in memory.

        Parameters
        ----------
        size
            Cells of a block, at most.

        Examples
        --------
        >>> adata.write_h5ad("cells.h5ad")
        >>> x = stores.StoredMatrix("cells.h5ad")
        >>> [block.shape for rows, block in x.blocks(size=400)]
        [(400, 40), (400, 40), (200, 40)]
        """
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
        return int(size // max(self.cell_bytes, 1))

    def totals(self) -> tuple[np.ndarray, float, bool, float]:
        """Check every cell, and return the file's totals (cell), largest value, and its scale as scale_of has it."""
        found, whole, most, share = [np.empty(0)], True, 0.0, 0.0
        for _, block in self._like(target_sum=None, log1p=False, _columns=None).blocks(BLOCK_CELLS):
            found.append(row_totals(block))
            own = scale_of(block)
            most, whole, share = max(most, own[0]), whole and own[1], max(share, own[2])
        return np.concatenate(found), most, whole, share

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and variance of every gene (gene), from one walk over the cells, and keep them."""
        if self._moments is None:
            first, second = np.zeros((2, self.shape[1]))
            for _, block in self.blocks(BLOCK_CELLS):
                block = block.astype(np.float64)
                square = block.multiply(block) if sparse.issparse(block) else block**2
                first += np.asarray(block.sum(axis=0)).ravel()
                second += np.asarray(square.sum(axis=0)).ravel()
            mean, square = first / max(len(self), 1), second / max(len(self), 1)
            self._moments = mean, np.maximum(square - mean**2, 0)
        return self._moments


def check_normalisation(normalize_total: Any, log1p: Any) -> None:
    """Raise an error for options of normalisation that :class:`StoredMatrix` does not take."""
    number = isinstance(normalize_total, Real) and np.isfinite(normalize_total) and normalize_total > 0
    if not (isinstance(normalize_total, bool | np.bool_) or number):
        raise ValueError(
            f"normalize_total={normalize_total!r}: False, True for the median total, or a positive total is needed."
        )
    if not isinstance(log1p, bool | np.bool_):
        raise ValueError(f"log1p={log1p!r}: True or False is needed; the logarithm is the natural one.")


def row_totals(x: Block) -> np.ndarray:
    """Return the total of every cell (cell) of a matrix in memory."""
    return np.asarray(x.sum(axis=1, dtype=np.float64)).ravel()


def median_total(totals: np.ndarray, where: str) -> float:
    """Return the median of the cells' totals, those of empty cells left out."""
    if not (totals > 0).any():
        raise ValueError(f"{where} has no counts in any of {len(totals)} cells; read a layer that has some.")
    return float(np.median(totals[totals > 0]))


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
    target, log1p = scaling[:2]
    return x._like(target_sum=target, log1p=log1p) if stored else normalised(x, target, log1p)


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
    if isinstance(cells, AnnData) and cells.isbacked:
        matrix = StoredMatrix(cells.filename, layer)
        return cells, _view(matrix, cells) if cells.is_view else matrix
    matrix = None
    if isinstance(cells, AnnData):
        matrix = cells.layers.get(layer) if layer else cells.X
    if not isinstance(matrix, CSRDataset | CSCDataset):
        return cells, None
    group, key = matrix.group, matrix.group.name.strip("/")
    h5ad = isinstance(group, h5py.Group)
    path = group.file.filename if h5ad else getattr(group.store, "root", None) or group.store.path
    if key != "X" and not key.startswith("layers/"):
        raise ValueError(
            f"adata reads {key!r} of {path}, which is neither X nor a layer; write it there, or to memory."
        )
    return cells, StoredMatrix(path, None if key == "X" else key.removeprefix("layers/"))


def _view(matrix: StoredMatrix, view: AnnData) -> StoredMatrix:
    """Return the cells and genes of a view, found by name."""
    known = annotations(matrix.path, ["obs", "var"])
    rows, columns = known.obs_names.get_indexer_for(view.obs_names), known.var_names.get_indexer_for(view.var_names)
    for what, found, n in (("cells", rows, view.n_obs), ("genes", columns, view.n_vars)):
        if len(found) != n or (found < 0).any():
            raise ValueError(
                f"adata is a view of {matrix.path}, in which names of {what} are lacking or come twice; give each a "
                f"name of its own in the file, or label the cells to use in a column and pass it as split_key."
            )
    return matrix.take(rows)[:, columns]


def annotations(path: str | Path, parts: Sequence[str] = ("obs", "var", "obsm")) -> AnnData:
    """Return ``obs``, ``var`` and ``obsm`` of a file, without its matrices."""
    with open_store(Path(path)) as file, _reading(path):
        return AnnData(**{part: read_elem(file[part]) for part in parts if part in file})


def open_store(path: Path) -> AbstractContextManager[Any]:
    """Open an ``.h5ad`` file or a zarr store for reading, for as long as a block lasts."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; pass the path of an .h5ad file or of a zarr store.")
    with _reading(path):
        return nullcontext(zarr.open_group(str(path), mode="r")) if path.is_dir() else h5py.File(path, "r")


def _lazy(element: Any) -> Any:
    """Return what reads rows of a matrix in a file."""
    return sparse_dataset(element) if isinstance(element, h5py.Group | zarr.Group) else element


@contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Name the file in what goes wrong: h5py, zarr and anndata raise many kinds of errors."""
    try:
        yield
    except Exception as error:
        raise OSError(
            f"{path} cannot be read ({error}); pass an .h5ad file or a zarr store that is whole, and that nobody has "
            f"open for writing; unzip a store that is zipped."
        ) from error


def _state(path: Path, key: str) -> tuple[tuple[int, int], ...]:
    """Return size and time of change of a file, or of the metadata and folders of a matrix in a store."""
    places = [path]
    if path.is_dir():
        parts = [path / key, *(path / key / name for name in ("data", "indices", "indptr"))]
        places = [part / name for part in parts for name in (".", "c", "zarr.json", ".zarray", ".zattrs", ".zgroup")]
    found = [place.stat() for place in places if place.exists()]
    return tuple((about.st_size, about.st_mtime_ns) for about in found)
