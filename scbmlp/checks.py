"""Checks of what users pass: matrices, names, columns of obs and masks."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

REMEDY = "pass log-normalised values, scanpy.pp.normalize_total then scanpy.pp.log1p"
LARGEST = 20  # a natural logarithm of more counts than a cell has
MANY = 0.1  # a share of cells with multiples of one number, as counts are, that is no chance
Matrix: TypeAlias = sparse.csr_matrix | np.ndarray
MISSING = {"", "na", "n/a", "nan", "none", "null", "<na>"}  # words for a missing label, in any case


def numeric_matrix(x: Any, where: str, dtype: Any = None) -> Matrix:
    """Return a matrix of numbers, rows first: sparse ones as CSR with every entry once, lazy ones computed."""
    if x is None:
        raise ValueError(f"{where} is None; put log-normalised expression there, or name a layer that has it.")
    for step in ("compute", "to_memory", "detach", "cpu"):  # of dask, of anndata's matrices on disk, and two of torch
        x = getattr(x, step)() if hasattr(x, step) else x
    if isinstance(x, pd.DataFrame):
        mixed = [str(name) for name, kind in x.dtypes.items() if getattr(kind, "kind", "O") not in "biuf"]
        if mixed:
            raise ValueError(f"{where} has columns that are no numbers: {', '.join(mixed[:5])}; leave them out.")
        x = x.to_numpy(np.float64, na_value=np.nan)
    if isinstance(x, np.ma.MaskedArray):
        x = x.astype(np.float64).filled(np.nan)
    if not sparse.issparse(x):
        x = np.asarray(x)
    if x.dtype.kind == "O" and all(isinstance(value, Real) for value in x.ravel()):
        x = x.astype(np.float64)
    if x.dtype.kind not in "biuf":
        raise ValueError(f"{where} holds values of type {x.dtype}; real numbers are needed: convert it to float32.")
    if x.ndim != 2:
        raise ValueError(f"{where} has shape {tuple(x.shape)}; two axes are needed, cells in rows.")
    dtype = dtype or (np.float64 if x.dtype == np.float64 else np.float32)
    if not sparse.issparse(x):
        return np.asarray(x, dtype=dtype)
    if hasattr(x, "check_format"):
        try:
            x.check_format(full_check=True)  # an index out of range would end the whole process
        except ValueError as error:
            raise ValueError(f"{where} is no valid sparse matrix ({error}); read it or build it anew.") from error
    x = sparse.csr_matrix(x, dtype=dtype)
    if not x.has_canonical_format:
        x = x.copy()  # the caller's stays as it is
        x.sum_duplicates()
    return x


def entries(x: Matrix) -> np.ndarray:
    """Return the values that a matrix holds, those of a sparse one without its zeros."""
    return x.data if sparse.issparse(x) else x


def check_finite(x: Matrix, where: str, remedy: str = "drop those cells or genes, or set them to 0") -> None:
    """Raise an error if a matrix (cell x gene) has values that are NaN or infinite."""
    bad = ~np.isfinite(entries(x))
    if bad.any():
        rows = np.searchsorted(x.indptr, np.flatnonzero(bad), "right") if sparse.issparse(x) else bad.nonzero()[0]
        n_bad = len(np.unique(rows))
        raise ValueError(f"{where} holds NaN or infinite values in {n_bad} of {x.shape[0]} cells; {remedy}.")


def expression(adata: AnnData, layer: str | None, dtype: Any = None) -> tuple[Matrix, str]:
    """Return ``adata.X`` or a layer (cell x gene), and its name for messages."""
    if adata.isbacked:
        raise ValueError("adata is backed by a file, and all cells are needed at once here: adata.to_memory().")
    if layer is None:
        return numeric_matrix(adata.X, "adata.X", dtype), "adata.X"
    if layer not in adata.layers:
        there = ", ".join(adata.layers) or "none"
        raise KeyError(f"layer={layer!r} is not in adata.layers; there are: {there}. Put the model's values there.")
    where = f"adata.layers[{layer!r}]"
    return numeric_matrix(adata.layers[layer], where, dtype), where


def warn(message: str) -> None:
    """Warn at the line that called this package, however deep in it the reason is."""
    frame, level, here = sys._getframe(1), 2, str(Path(__file__).parent)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def check_log_normalised(x: Matrix, where: str, adata: AnnData, *, counts: bool = False) -> None:
    """Raise an error for negative, NaN or infinite values; warn if no logarithm was taken, unless counts are meant."""
    check_finite(x, where)
    check_not_negative(x, where, REMEDY if adata.raw is None else "adata.raw may have them: adata.raw.to_adata()")
    if not counts:
        check_scale(*scale_of(x), where)


def check_not_negative(x: Matrix, where: str, remedy: str = REMEDY) -> None:
    """Raise an error if expression is negative."""
    least = entries(x).min(initial=0)
    if least < 0:
        scaled = f"negative values (minimum {least:.3g}), as scaled expression does"
        raise ValueError(f"{where} holds {scaled}; take it before it is scaled or centred: {remedy}.")


def scale_of(x: Matrix) -> tuple[float, bool, float]:
    """Return the largest value (cell x gene), whether all are whole, and the share of 100 cells of scaled counts."""
    values = entries(x)
    seen = []
    for i in np.unique(np.linspace(0, max(x.shape[0] - 1, 0), 100, dtype=int))[: x.shape[0]]:
        steps = np.unique(entries(x[[i]]).astype(np.float64))
        steps = steps[steps > 0]
        if len(steps) >= 4 and steps[-1] < 1e4 * steps[0]:  # of fewer, or of wider, any may be multiples
            ratio = steps / steps[0] * np.arange(1, 7)[:, None]  # the least count is 1, 2, ... or 6
            seen.append((np.abs(ratio - ratio.round()) < 1e-6 * ratio).all(axis=1).any())
    share = float(np.mean(seen)) if len(seen) >= 10 else 0.0
    return float(values.max(initial=0)), np.array_equal(values, np.round(values)), share


def check_scale(most: float, whole: bool, share: float, where: str) -> None:
    """Warn of expression without its logarithm: whole numbers, multiples of one, or values no logarithm reaches."""
    if whole and most > 1:
        warn(f"{where} holds only whole numbers, like raw counts; {REMEDY}.")
    elif most > LARGEST:
        warn(f"{where} holds values up to {most:,.0f}, too large for logarithms, like scaled counts; {REMEDY}.")
    elif share > MANY and not whole:
        warn(f"{where} holds multiples of one number, as counts without logarithm, in {share:.0%} of cells; {REMEDY}.")


def check_cells(cells: Any) -> None:
    """Raise an error for what is neither AnnData in memory or backed, nor a path."""
    if isinstance(cells, str | Path) or (isinstance(cells, AnnData) and isinstance(cells.obs, pd.DataFrame)):
        return
    kind = type(cells).__name__
    hint = {
        "MuData": "pass one modality, such as mdata['rna']",
        "AnnCollection": "take its cells into memory: collection[:].to_adata()",
        "AnnData": "it was read lazily: take it into memory, adata.to_memory()",
        "list": "join its parts: anndata.concat",
        "tuple": "join its parts: anndata.concat",
    }.get(kind, "make one: anndata.AnnData(X, obs=labels)")
    needed = "AnnData, or the path of an .h5ad file or zarr store, is needed"
    raise ValueError(f"adata is of type {kind}; {needed}: {hint}.")


def plain_names(names: Iterable[Any], what: str, *, unique: bool = True) -> pd.Index:
    """Return names as plain text, or all as plain numbers or booleans; a RangeIndex stands for no names."""
    if isinstance(names, pd.RangeIndex):
        return names
    found = list(names)
    if any(pd.api.types.is_scalar(name) and pd.isna(name) for name in found):
        raise ValueError(f"{what} have no name in {sum(map(pd.isna, found))} of {len(found)}; name them all.")
    kinds = ((bool, bool | np.bool_), (int, Integral), (float, Real))
    plain = next((kind for kind, known in kinds if all(isinstance(name, known) for name in found)), str)
    plain = str if plain is int and any(abs(name) >= 2**63 for name in found) else plain
    index = pd.Index([plain(name) for name in found], dtype=object if plain is str else plain)
    if unique and not index.is_unique:
        twice = ", ".join(map(str, index[index.duplicated()].unique()[:5]))
        raise ValueError(f"{what} have names that come twice: {twice}; give each a name of its own.")
    return index


def whole_number(value: Any, name: str, least: int = 1, most: float = np.inf, *, config: bool = False) -> int:
    """Return a whole number in its range."""
    number = isinstance(value, Real) and not isinstance(value, bool | np.bool_)
    if not (number and least <= value <= most and value == int(value)):
        upto = "" if most == np.inf else f" and at most {int(most)}"
        given = f"Config({name}={value!r})" if config else f"{name}={value!r}"
        raise ValueError(f"{given}: a whole number of at least {least}{upto} is needed.")
    return int(value)


def check_class_weight(value: Any, *, classes: bool = True, config: bool = False) -> None:
    """Raise an error unless it is None, or "balanced" for targets that are classes."""
    given = f"Config(class_weight={value!r})" if config else f"class_weight={value!r}"
    if value is not None and not (isinstance(value, str) and value == "balanced"):
        raise ValueError(f"{given}: 'balanced' is known, or None, by which every cell counts alike.")
    if value is not None and not classes:
        raise ValueError(f"{given}: continuous targets have no classes to balance; leave it out, or fit a classifier.")


def by_cell(values: Any, adata: AnnData, what: str) -> pd.DataFrame:
    """Return a table with a row for every cell of `adata`, by name where rows have names, by order otherwise."""
    table = values if isinstance(values, pd.DataFrame | pd.Series) else numeric_matrix(values, what)
    table = pd.DataFrame(table.toarray() if sparse.issparse(table) else table)
    if len(table) != adata.n_obs:
        raise ValueError(f"{what} has {len(table)} rows for {adata.n_obs} cells; pass one for each cell of adata.")
    table = table.set_axis(adata.obs_names) if isinstance(table.index, pd.RangeIndex) else of_cells(table, adata, what)
    check_finite(numeric_matrix(table, what), what, "drop those cells")
    return table


def of_cells(table: Any, adata: AnnData, what: str) -> Any:
    """Return the rows of a Series or DataFrame in the order of the cells, whose names it has."""
    if table.index.equals(adata.obs_names):
        return table
    if not (table.index.is_unique and set(table.index) == set(adata.obs_names)):
        raise ValueError(f"{what} has rows of other cells than adata; pass those of adata, by name or as an array.")
    return table.loc[adata.obs_names]


def nearest(name: Any, names: Iterable[Any]) -> str:
    """Return the end of a message: the names that a mistyped one may have meant."""
    lower = {str(candidate).lower(): str(candidate) for candidate in names}
    matches = [lower[match] for match in get_close_matches(str(name).lower(), lower, n=3)]
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def matched(sets: Mapping[str, Iterable[str]], genes: Iterable[str]) -> dict[str, set[str]]:
    """Return what each set has of genes: those of its very names, or in any case where one gene alone has the name."""
    exact, same = set(genes), {}
    for gene in exact:
        same.setdefault(gene.upper(), []).append(gene)
    alone = {name: found[0] for name, found in same.items() if len(found) == 1}
    found = {term: {gene if gene in exact else alone.get(gene.upper()) for gene in of} for term, of in sets.items()}
    return {term: members - {None} for term, members in found.items()}


def by_case_alone(genes: Iterable[Any]) -> str:
    """Return how many genes differ from another by case alone, in words, or nothing."""
    genes = set(map(str, genes))
    n_same = len(genes) - len({gene.upper() for gene in genes})
    words = f"{n_same} genes differ from another by case alone; gene sets match those by their exact names."
    return words if n_same else ""


def obs_column(adata: AnnData, key: str, argument: str) -> pd.Series:
    """Return a column of ``adata.obs``, by position, since cell names may come twice."""
    if not isinstance(key, str) or key not in adata.obs:
        there = f"{', '.join(map(str, adata.obs))}{nearest(key, adata.obs)}"
        raise KeyError(f"{argument}={key!r} is not a column of adata.obs; there are: {there}.")
    column = adata.obs[key]
    if column.ndim == 2:
        n_same = column.shape[1]
        raise ValueError(f"{argument}={key!r}: adata.obs has {n_same} columns of that name; rename all but one.")
    return column.reset_index(drop=True)


def obs_labels(adata: AnnData, key: str, argument: str) -> pd.Series:
    """Return a column of ``adata.obs`` with a label for every cell, by position."""
    labels = obs_column(adata, key, argument)
    if labels.isna().any():
        lacking = f"{argument}={key!r} has no label for {labels.isna().sum()} of {len(labels)} cells"
        raise ValueError(f"{lacking}; keep the labelled ones: adata = adata[adata.obs[{key!r}].notna()].copy()")
    return labels


def control_labels(adata: AnnData, key: str, control: Any) -> tuple[pd.Series, str]:
    """Return the perturbation of every cell as text, and the text of the label for control cells."""
    labels = obs_labels(adata, key, "perturbation_key")
    same = (labels.astype(object) == control).to_numpy(bool)
    labels = labels.astype(str)
    found = labels[same].iloc[0] if same.any() else str(control)
    known = sorted(set(labels))
    if found not in known:
        there = f"{', '.join(known[:20])}{nearest(control, known)}"
        raise KeyError(f"control={control!r} is no label of obs[{key!r}]; there are: {there}.")
    return labels, found


def strata_of(adata: AnnData, strata: str | Sequence[str] | None) -> tuple[pd.Series, list[str]]:
    """Return the stratum of every cell, labels joined by a comma, and the names of the columns."""
    names = [strata] if isinstance(strata, str) else list(strata or [])
    columns = [obs_labels(adata, name, "strata").astype(str) for name in names]
    if not columns:
        return pd.Series("all", pd.RangeIndex(adata.n_obs)), names
    return pd.concat(columns, axis=1).agg(", ".join, axis=1), names


def check_key(key: Any) -> None:
    """Raise an error for a name that no AnnData file can hold: a slash in it would open a folder."""
    if not isinstance(key, str) or not key or "/" in key:
        raise ValueError(f"key_added={key!r}: text without a slash is needed, or the file could not be read again.")


def as_mask(values: Any, what: str) -> np.ndarray:
    """Return booleans from booleans, 0 and 1, or the words True and False, as files have them."""
    known = {True: True, False: False, "True": True, "False": False, "true": True, "false": False}
    values = pd.Series(np.asarray(values, dtype=object)).map(known)
    if values.isna().any():
        n_other = values.isna().sum()
        raise ValueError(f"{what} is neither true nor false in {n_other} of {len(values)}; make it boolean.")
    return values.to_numpy(bool)


def positions(cells: Any, adata: AnnData) -> np.ndarray:
    """Return the positions of cells, rising, each once, from a mask, positions or a slice; all if None."""
    n = adata.n_obs
    if cells is None or isinstance(cells, slice):
        return np.arange(n)[cells or slice(None)]
    values = np.asarray(cells)
    kind = pd.api.types.infer_dtype(values.ravel(), skipna=False) if values.size else "integer"
    if values.ndim != 1 or kind not in ("boolean", "integer"):
        given = f"cells has values of type {kind} and shape {values.shape}"
        raise ValueError(f"{given}; pass a boolean mask over the {n} cells, or their positions.")
    if kind == "boolean":
        if len(values) != n:
            raise ValueError(f"cells is a mask of {len(values)} values for {n} cells; pass one for each.")
        named = isinstance(cells, pd.Series) and not isinstance(cells.index, pd.RangeIndex)
        found = np.flatnonzero(of_cells(cells, adata, "cells") if named else values)
    elif len(values) == n > 2 and set(values.tolist()) == {0, 1}:
        raise ValueError("cells holds 0 and 1 for every cell, like a mask, but as numbers; pass cells.astype(bool).")
    else:
        outside = values[(values < 0) | (values >= n)]
        if len(outside):
            raise ValueError(f"cells has {len(outside)} positions outside 0 to {n - 1}, such as {outside[0]}.")
        found = np.unique(values).astype(np.int64)
    if not len(found):
        raise ValueError(f"cells names none of the {n} cells; name at least one.")
    return found


def as_numbers(values: pd.Series, *, unit: str = "") -> pd.Series:
    """Return numbers from text with thousands commas or one unit, such as ``nM``; NaN where there is none."""
    text = values.astype(str).str.strip()
    if unit:
        text = text.str.replace(rf"\s*{re.escape(unit)}$", "", regex=True)
    grouped = text.str.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?")
    return pd.to_numeric(text.where(~grouped, text.str.replace(",", "")), errors="coerce")


def data_file(*parts: str) -> Path | None:
    """Return a path in the folder that ``SCBMLP_DATA_DIR`` names, or None if it is not set."""
    folder = os.environ.get("SCBMLP_DATA_DIR")
    return Path(folder).expanduser().joinpath(*parts) if folder else None


@contextmanager
def reading(path: Any, remedy: str) -> Iterator[None]:
    """Name the file in what goes wrong: h5py, zarr and anndata raise many kinds of errors for a damaged one."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{path} cannot be read ({error}); {remedy}.") from error
