"""Expression that stays on disk: a matrix of an ``.h5ad`` file or a zarr store, read a few cells at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch
import zarr
from anndata import AnnData
from anndata.abc import CSCDataset, CSRDataset
from anndata.io import read_elem, sparse_dataset
from scipy import sparse

from scbmlp.checks import REMEDY, check_finite, check_not_negative, numeric_matrix

# Cells between two that are wanted, up to which reading and dropping them is quicker than a jump (measured: by a factor
# of up to 50 for every seventh cell of a gzip file).
GAP = 32
BLOCK_BYTES, BLOCK_CELLS = 2**26, 8192  # read at a time where all cells are walked
HELD_BYTES = 2**28  # of stored cells that a method holds, where it needs them at once and draws a part of them


class StoredMatrix:
    """Cells x genes of a file, read when they are asked for, as CSR or dense numpy in float32.

    ``x[rows]`` is in memory, in the order asked for; ``x[:, columns]`` and :meth:`take` stay on disk. The file is
    opened by its path, in each process anew, so that it goes with a pickle to the workers of a loader, and a file that
    the caller closed is read all the same.

    Parameters
    ----------
    path
        An ``.h5ad`` file, or the folder of a zarr store, as anndata writes them: dense, or sparse by cells (CSR).
    layer
        Layer to read instead of ``X``.
    normalize_total
        Scale every cell to a total of this many counts; True for the median of the totals over all cells, for which
        the file is read once, as by ``scanpy.pp.normalize_total``. The total of a cell is that over *all* genes of the
        file, whichever of them are read.
    log1p
        Take log(1 + x) of every value, after scaling.

    Attributes
    ----------
    gene_names
        Names of the columns (gene).
    shape, dtype
        Cells and genes; float32.
    target_sum
        What cells are scaled to; None if they are not.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    OSError
        It cannot be read, or has changed since it was opened.
    KeyError
        It has no such layer, or no ``X``.
    ValueError
        The matrix is sparse by genes (CSC), it is not one of real numbers, an option is not one of those above, or a
        block that is read has values that are negative, NaN or infinite.

    Examples
    --------
    >>> adata.write_h5ad("cells.h5ad")
    >>> x = stores.StoredMatrix("cells.h5ad")
    >>> x.shape, x[:3].shape, list(x[:, :2].gene_names)
    ((1000, 40), (3, 40), ['Sim0001', 'Sim0002'])
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self,
        path: str | Path,
        layer: str | None = None,
        *,
        normalize_total: bool | float = False,
        log1p: bool = False,
    ) -> None:
        check_normalisation(normalize_total, log1p)
        self.path, self.layer = Path(path).absolute(), layer
        self.target_sum, self.log1p = None, False
        self._opened: dict[str, Any] = {}
        with opened(self.path) as file:
            layers = list(file["layers"]) if "layers" in file else []
            if (layer is not None and layer not in layers) or (layer is None and "X" not in file):
                what = "the file has no X" if layer is None else f"layer={layer!r} is not in the file"
                raise KeyError(f"{what} {self.path}; its layers are: {', '.join(layers) or 'none'}. Name one of them.")
            element = file[self._key]
            kind = element.attrs.get("encoding-type", element.attrs.get("h5sparse_format", ""))
            if "csc" in str(kind):
                raise ValueError(
                    f"{self.where} is sparse by genes (CSC), and no cell of it can be read without reading all; write "
                    f"it by cells: adata.X = adata.X.tocsr(), then adata.write_h5ad(...)."
                )
            self._sparse = "csr" in str(kind)
            shape = sparse_dataset(element).shape if self._sparse else element.shape
            if len(shape) != 2:
                raise ValueError(f"{self.where} has shape {tuple(shape)}; two axes are needed, cells in rows.")
            size = 8 * element["data"].shape[0] / max(shape[0], 1) if self._sparse else 4 * shape[1]
            self.gene_names = read_elem(file["var"]).index if "var" in file else pd.RangeIndex(shape[1])
        self._state = _state(self.path, self._key)
        self._in_file, self._rows, self._columns = tuple(shape), np.arange(shape[0]), None
        self.cell_bytes, self._moments = size, None  # bytes of a cell in memory, as it is read
        self.__dict__ = self.scaled(normalize_total, log1p).__dict__

    @property
    def _key(self) -> str:
        return "X" if self.layer is None else f"layers/{self.layer}"

    @property
    def where(self) -> str:
        """What to call the matrix in a message."""
        return f"{'X' if self.layer is None else f'layers[{self.layer!r}]'} of {self.path}"

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of genes."""
        return len(self._rows), self._in_file[1] if self._columns is None else len(self._columns)

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
        """Return the same cells, scaled as they are read; True is for the median of the totals of *these* cells.

        Parameters
        ----------
        normalize_total, log1p
            As the class takes them.

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
        >>> x = stores.StoredMatrix("cells.h5ad")
        >>> x.take(labels == "on").shape
        (500, 40)
        """
        return self._like(_rows=self._rows[rows])

    def __getitem__(self, index: Any) -> sparse.csr_matrix | np.ndarray | StoredMatrix:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        if not (isinstance(columns, slice) and columns == slice(None)):
            known = np.arange(self._in_file[1]) if self._columns is None else self._columns
            names = self.gene_names[columns]
            part = self._like(_columns=known[columns], gene_names=names)
            return part if isinstance(rows, slice) and rows == slice(None) else part[rows]
        asked = np.atleast_1d(self._rows[rows])
        rising = len(asked) < 2 or (np.diff(asked) > 0).all()
        wanted, back = (asked, slice(None)) if rising else np.unique(asked, return_inverse=True)
        block = self._read(wanted)
        block = normalised(block, self.target_sum, self.log1p)
        block = block if self._columns is None else block[:, self._columns]
        return block if rising else block[back]

    def _read(self, rows: np.ndarray) -> sparse.csr_matrix | np.ndarray:
        """Return cells of the file, rising, as they are there, with all genes; and check them."""
        if not len(rows):
            empty = np.empty((0, self._in_file[1]), np.float32)
            return sparse.csr_matrix(empty) if self._sparse else empty
        if _state(self.path, self._key) != self._state:
            raise OSError(
                f"{self.path} has changed since it was opened, so that cells may be others than their targets; cut the "
                f"data sets anew, and leave the file alone while it is read."
            )
        cuts = np.flatnonzero(np.diff(rows) > GAP) + 1
        starts, stops = rows[np.r_[0, cuts]], rows[np.r_[cuts - 1, len(rows) - 1]] + 1
        if (stops - starts).sum() - len(rows) > max(self.holds(BLOCK_BYTES), 1):  # too much to drop at once
            halves = [self._read(half) for half in np.array_split(rows, 2)]
            return sparse.vstack(halves, format="csr") if self._sparse else np.concatenate(halves)
        with _reading(self.path):
            element = self._element()
            if len(starts) == 1:
                block = element[starts[0] : stops[0]]
            elif self._sparse:  # a mask is read run by run, in one call
                read = np.zeros(self._in_file[0], bool)
                for start, stop in zip(starts, stops, strict=True):
                    read[start:stop] = True
                block = element[read]
            else:
                block = np.concatenate([element[start:stop] for start, stop in zip(starts, stops, strict=True)])
        lengths = stops - starts
        if lengths.sum() > len(rows):
            run = np.searchsorted(stops, rows, "right")
            block = block[rows - starts[run] + np.r_[0, np.cumsum(lengths)[:-1]][run]]
        where = f"a block of {self.where}"
        block = numeric_matrix(block, where, np.float32)
        check_finite(block, where)
        check_not_negative(block, where, REMEDY)
        return block

    def _element(self) -> Any:
        """Return the matrix in the file, opened by this process: a handle of another must not be read from."""
        if self._opened.get("process") != os.getpid():
            file = open_store(self.path)
            element = file[self._key]
            element = sparse_dataset(element) if self._sparse else element
            self._opened.update(process=os.getpid(), file=file, element=element)
        return self._opened["element"]

    def blocks(self, size: int = 1024) -> Iterator[tuple[slice, sparse.csr_matrix | np.ndarray]]:
        """Yield where they are, and the cells themselves, a block at a time.

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
        """Return how many cells so many bytes hold.

        Parameters
        ----------
        size
            Bytes.
        """
        return int(size // max(self.cell_bytes, 1))

    def totals(self) -> tuple[np.ndarray, bool]:
        """Check every cell: return totals over all genes (cell), and whether they look like counts.

        Values are those of the file, before they are scaled.
        """
        raw, found, whole, most = self._like(target_sum=None, log1p=False, _columns=None), [], True, 0.0
        for _, block in raw.blocks(BLOCK_CELLS):
            found.append(row_totals(block))
            values = block.data if sparse.issparse(block) else block
            whole, most = whole and np.array_equal(values, np.round(values)), max(most, values.max(initial=0))
        return np.concatenate(found or [np.empty(0)]), bool(whole and most > 1)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and variance of every gene (gene), by one walk over the cells, which is kept."""
        if self._moments is None:
            first, second = np.zeros((2, self.shape[1]))
            for _, block in self.blocks(BLOCK_CELLS):
                block = block.astype(np.float64)
                first += np.asarray(block.sum(axis=0)).ravel()
                square = block.multiply(block) if sparse.issparse(block) else block**2
                second += np.asarray(square.sum(axis=0)).ravel()
            mean = first / max(len(self), 1)
            self._moments = mean, np.maximum(second / max(len(self), 1) - mean**2, 0)
        return self._moments


def check_normalisation(normalize_total: Any, log1p: Any) -> None:
    """Raise an error for options of normalisation that are none.

    Parameters
    ----------
    normalize_total, log1p
        As :class:`StoredMatrix` takes them.

    Raises
    ------
    ValueError
        They are others.
    """
    number = isinstance(normalize_total, Real) and np.isfinite(normalize_total) and normalize_total > 0
    if not (isinstance(normalize_total, bool | np.bool_) or number):
        raise ValueError(
            f"normalize_total={normalize_total!r}: False, True for the median of the cells' totals, or a positive "
            f"number of counts is needed."
        )
    if not isinstance(log1p, bool | np.bool_):
        raise ValueError(f"log1p={log1p!r}: True or False is needed; the logarithm is the natural one.")


def row_totals(x: sparse.csr_matrix | np.ndarray) -> np.ndarray:
    """Return the total of every cell (cell) of a matrix in memory."""
    return np.asarray(x.sum(axis=1, dtype=np.float64)).ravel()


def median_total(totals: np.ndarray, where: str) -> float:
    """Return the median of the cells' totals, those of empty cells left out.

    Parameters
    ----------
    totals
        Total of every cell (cell).
    where
        What the matrix is called, for the message.

    Raises
    ------
    ValueError
        All cells are empty.
    """
    if not (totals > 0).any():
        raise ValueError(f"{where} has no counts in any of {len(totals)} cells; read a layer that has some.")
    return float(np.median(totals[totals > 0]))


def normalised(
    x: sparse.csr_matrix | np.ndarray, target_sum: float | None, log1p: bool
) -> sparse.csr_matrix | np.ndarray:
    """Return cells scaled to a total and on the scale of logarithms, as scanpy does; `x` stays as it is.

    Parameters
    ----------
    x
        Counts, in memory (cell x gene).
    target_sum
        Total of every cell; None to leave totals as they are.
    log1p
        Whether to take log(1 + x).
    """
    if target_sum is not None:
        totals = row_totals(x)
        scale = np.divide(target_sum, totals, out=np.ones_like(totals), where=totals > 0)
        if sparse.issparse(x):
            scale = np.repeat(scale, np.diff(x.indptr))
            x = sparse.csr_matrix(((x.data * scale).astype(np.float32), x.indices, x.indptr), shape=x.shape)
        else:
            x = (x * scale[:, None]).astype(np.float32)
    if not log1p:
        return x
    values = np.array(x.data if sparse.issparse(x) else x, np.float32)
    torch.from_numpy(values).log1p_()  # vectorised, which numpy's is not
    return sparse.csr_matrix((values, x.indices, x.indptr), shape=x.shape) if sparse.issparse(x) else values


def is_stored(cells: Any, layer: str | None = None) -> bool:
    """Say whether expression is in a file: of a path, a backed AnnData, or one whose matrix is a backed sparse one.

    Parameters
    ----------
    cells
        What was given.
    layer
        Layer that is asked for.
    """
    if isinstance(cells, str | Path | StoredMatrix):
        return True
    if not isinstance(cells, AnnData):
        return False
    return cells.isbacked or isinstance(cells.layers.get(layer) if layer else cells.X, CSRDataset | CSCDataset)


def open_cells(cells: str | Path | AnnData, layer: str | None) -> tuple[AnnData, StoredMatrix]:
    """Return what is known of cells and genes, in memory, and their expression, which stays in the file.

    Parameters
    ----------
    cells
        A path; or AnnData for which :func:`is_stored` is true, or a view of one, matched with the file by the names of
        cells and genes.
    layer
        Layer to read instead of ``X``.

    Raises
    ------
    FileNotFoundError, OSError, KeyError
        As for :class:`StoredMatrix`.
    ValueError
        As for :class:`StoredMatrix`; or a view has names that the file has not, or has twice.
    """
    if isinstance(cells, str | Path):
        return annotations(cells), StoredMatrix(cells, layer)
    if cells.isbacked:
        matrix = StoredMatrix(cells.filename, layer)
        if not cells.is_view:
            return cells, matrix
        with opened(matrix.path) as file:
            known = {"cells": read_elem(file["obs"]).index, "genes": matrix.gene_names}
        at = {}
        for what, names in {"cells": cells.obs_names, "genes": cells.var_names}.items():
            at[what] = known[what].get_indexer(names) if known[what].is_unique else np.array([-1])
            if (at[what] < 0).any():
                raise ValueError(
                    f"adata is a view of {matrix.path}, in which names of {what} are lacking or come twice; give each "
                    f"a name of its own in the file, or label the cells to use in a column and pass it as split_key."
                )
        return cells, matrix.take(at["cells"])[:, at["genes"]]
    group = (cells.layers[layer] if layer else cells.X).group
    store = getattr(group, "file", None) or group.store
    path = getattr(store, "filename", None) or getattr(store, "root", None) or store.path
    key = group.name.strip("/")
    if key != "X" and not key.startswith("layers/"):
        raise ValueError(
            f"adata reads {key!r} of {path}, which is neither X nor a layer; write it there, or to memory."
        )
    return cells, StoredMatrix(path, None if key == "X" else key.removeprefix("layers/"))


def annotations(path: str | Path) -> AnnData:
    """Return ``obs``, ``var`` and ``obsm`` of a file, without its matrices.

    Parameters
    ----------
    path
        An ``.h5ad`` file, or the folder of a zarr store.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    OSError
        It cannot be read.
    """
    with opened(Path(path)) as file, _reading(path):
        return AnnData(**{name: read_elem(file[name]) for name in ("obs", "var", "obsm") if name in file})


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file or store for as long as the block lasts."""
    file = open_store(path)
    try:
        yield file
    finally:
        if isinstance(file, h5py.File):
            file.close()


def open_store(path: Path) -> Any:
    """Open an ``.h5ad`` file or a zarr store for reading.

    Parameters
    ----------
    path
        File or folder.

    Raises
    ------
    FileNotFoundError
        There is none.
    OSError
        It cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; pass the path of an .h5ad file or of a zarr store.")
    with _reading(path):
        return zarr.open_group(str(path), mode="r") if path.is_dir() else h5py.File(path, "r")


@contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # h5py, zarr and anndata raise many kinds
        raise OSError(
            f"{path} cannot be read ({error}); pass an .h5ad file or a zarr store that is whole, and that nobody has "
            f"open for writing."
        ) from error


def _state(path: Path, key: str) -> tuple[tuple[int, int], ...]:
    """Return size and time of change of a file, or of the metadata and folders of a matrix in a store."""
    places = [path]
    if path.is_dir():
        parts = [path / key, *(path / key / name for name in ("data", "indices", "indptr"))]
        places = [part / name for part in parts for name in (".", "c", "zarr.json", ".zarray", ".zattrs", ".zgroup")]
    found = []
    for place in places:
        try:
            about = place.stat()
        except FileNotFoundError:
            continue
        found.append((about.st_size, about.st_mtime_ns))
    return tuple(found)
