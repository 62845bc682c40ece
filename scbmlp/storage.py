"""Files of models and modules: numbers and text with a checksum, whole or not there at all; and what h5ad can hold."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import lightning
import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from anndata.io import read_elem, write_elem
from anndata.utils import make_index_unique
from safetensors import safe_open
from safetensors.torch import save_file
from scipy import sparse
from torch import Tensor

import scbmlp

FORMAT = 3


def write_file(path: Path, known: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write what is known of an object, its ``class`` in it, and tensors to one file, whole or not at all."""
    versions = {module.__name__: module.__version__ for module in (scbmlp, torch, np, lightning)}
    known = {"format": FORMAT, **known, "versions": versions}
    stored = {"scbmlp": json.dumps(known, default=lambda value: value.item())}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    stored["sha256"] = _digest(stored["scbmlp"], tensors)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, stored)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """Return a checksum of all that a file holds."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def read_file(path: Path, kind: str, what: str = "model") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a file says of an object of class `kind`, here called `what`, and its tensors; no code is run."""
    path.stat()  # that there is no file is said in Python's words
    try:
        with safe_open(path, "pt") as file:
            stored = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        known = json.loads(stored["scbmlp"])
        of_class, version, written = known["class"], known["format"], known["versions"]["scbmlp"]
        if stored["sha256"] != _digest(stored["scbmlp"], tensors):
            raise ValueError("another checksum")
    except Exception as error:  # safetensors has an error of its own, made in Rust
        raise ValueError(
            f"{path.name} is damaged: save the {what} again, or take another copy. If it never was an scbmlp {what}, "
            f"give a file that save has written."
        ) from error
    if version != FORMAT:
        raise ValueError(
            f"{path.name} was written by scbmlp {written}, in format {version}; this version reads format {FORMAT}: "
            f"take that version, or fit and save the {what} anew."
        )
    if of_class != kind:
        raise ValueError(f"{path.name} holds {of_class}, not {kind}; load it by {of_class}.load.")
    return known, tensors


def writable(adata: AnnData) -> tuple[AnnData, list[str]]:
    """Return cells as an h5ad file can hold them, and what was renamed, made text or left out, in sentences."""
    said = defaultdict(list)
    with h5py.File("trial", "w", driver="core", backing_store=False) as file, warnings.catch_warnings(action="ignore"):
        parts = {where: _table(getattr(adata, where), where, file, said) for where in ("obs", "var")}
        for where in ("uns", "obsm", "varm", "obsp", "varp", "layers"):
            parts[where] = _held(getattr(adata, where).items(), where, file, said, parts.get(where[:3]))
        if adata.raw is not None:
            var = _table(adata.raw.var, "raw.var", file, said)
            varm = _held(adata.raw.varm.items(), "raw.varm", file, said, var)
            parts["raw"] = {"X": adata.raw.X, "var": var, "varm": varm}
    if not said:
        return adata, []
    said.pop("", None)  # what reads the same
    most = 6
    words = [
        f"{what}, since an h5ad file cannot hold it as it is: {', '.join(names[:most])}"
        f"{f' and {len(names) - most} more' if len(names) > most else ''}."
        for what, names in said.items()
    ]
    return AnnData(adata.X, **parts), words


def _text(name: Any) -> str:
    """Return a name as text that a file can hold."""
    return str(name).encode("utf-8", "replace").decode().replace("\0", "")


def _table(
    table: pd.DataFrame, where: str, file: h5py.File, said: dict[str, list[str]], index: pd.Index | None = None
) -> pd.DataFrame:
    """Return a table as a file can hold it; genes get names of their own."""
    if index is None:
        index = pd.Index([_text(name) for name in table.index], dtype=object)
        if where in ("var", "raw.var") and not index.is_unique:
            said["Renamed"].append(f"{index.duplicated().sum()} genes of `{where}` whose name comes twice")
            index = make_index_unique(index)
        if table.index.dtype != object or not index.equals(table.index):
            said[""].append(where)
    columns = [(name, table.iloc[:, i].set_axis(index)) for i, name in enumerate(table.columns)]
    found = pd.DataFrame(_held(columns, where, file, said), index)
    name = table.index.name
    if name is not None and (not isinstance(name, str) or "/" in name or name in found):
        name = said[""].append(where)
    return found.rename_axis(index=name)


def _held(
    items: Iterable[tuple[Any, Any]], where: str, file: h5py.File, said: dict[str, list[str]], rows: Any = None
) -> dict[str, Any]:
    """Return what a group of a file can hold of named values, the columns of a table among them."""
    items, found = list(items), {}
    names = {name for name, _ in items}
    for name, value in items:
        key, column = _text(name), isinstance(value, pd.Series)
        shown = f"{where}[{name!r:.50}]".replace("`", "'")
        if "/" in key and not (column and names.isdisjoint(map(str, PurePosixPath(key).parents))):
            key = key.replace("/", "_")  # a slash opens a group
        if not key.strip(".") or (column and key == "_index"):
            key = f"{key}_"
        if key != name or key in found:
            taken = {*found, *names}
            key = next(one for one in (key, *(f"{key}_{i}" for i in range(2, len(taken) + 3))) if one not in taken)
            said["Renamed"].append(f"`{shown}`")
        if isinstance(value, pd.DataFrame):
            found[key] = _table(value, shown, file, said, None if rows is None else rows.index)
        elif isinstance(value, Mapping):
            found[key] = _held(value.items(), shown, file, said)
        elif not isinstance(getattr(value, "dtype", None), pd.StringDtype) and _fits(value, file):
            found[key] = value
        elif column:
            text = value.astype(object).map(_text, na_action="ignore").where(value.notna(), None)
            said["" if isinstance(value.dtype, pd.StringDtype) else "Made text"].append(f"`{shown}`")
            found[key] = text
        else:
            said["Left out"].append(f"`{shown}`")
    return found


def _fits(value: Any, file: h5py.File) -> bool:
    """Return whether a value can be written to a file and read again, numbers without a trial."""
    if isinstance(value, np.ndarray) or sparse.issparse(value):
        if value.dtype.kind in "biuf":
            return True
    elif isinstance(value, pd.Series):  # as anndata does, text that comes twice and text with gaps
        value = pd.Categorical(value) if pd.api.types.infer_dtype(value) == "string" else value.values
    with suppress(Exception):
        write_elem(file, "trial", value)
        read_elem(file["trial"])
        return True
    return False
