"""A look at a file of cells before a report: what is in it, and which command fits."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pandas as pd
from anndata import AnnData

from scbmlp.checks import check_cells, numeric_matrix
from scbmlp.preparing import GROUPS, IDS, SYMBOLS, fault_of, opened

LEVELS, LEAST = 60, 10  # most classes, and the cells of a class that can be split
CELLS = 2000  # that the kind of values is judged by
CONTROLS = {"control", "ctrl", "dmso", "vehicle", "non-targeting", "nt", "untreated", "unstimulated", "mock"}
CLASSES = r"(?i)(cell.?type|^type|cluster|label|annotation|louvain|leiden)"
SPECIES = {"ENSG0": "human", "ENSMUSG0": "mouse", "ENSRNOG0": "rat", "ENSDARG0": "zebrafish"}
SPECIES |= {"WBGene": "worm", "FBgn": "fly"}


def look(cells: AnnData | str | Path) -> pd.DataFrame:
    """Say what a file of cells has: expression, names of genes, and columns that a model could learn or be split by.

    Parameters
    ----------
    cells
        AnnData, which is not changed, or the path of a file as in :func:`scbmlp.report.prepare`.

    Returns
    -------
    A row a finding: what it ``is``, its ``name``, what was ``found``; for columns of ``obs`` their ``levels``, and the
    cells of the ``smallest``. ``attrs["command"]`` has the command to make a report.

    Examples
    --------
    >>> table = look.look(adata)
    >>> table.loc[table["is"] == "classes", ["name", "levels"]].values.tolist()
    [['label', 2]]
    >>> table.attrs["command"]
    'scbmlp report cells.h5ad --class-key label'
    """
    check_cells(cells)
    path = "cells.h5ad" if isinstance(cells, AnnData) else str(cells)
    adata = cells if isinstance(cells, AnnData) else opened(Path(cells))
    matrices = {"X": adata.X, **{f"layer {name}": x for name, x in adata.layers.items()}}
    matrices |= {} if adata.raw is None else {"raw": adata.raw.X}
    kinds = {name: _kind(x) for name, x in matrices.items() if x is not None}
    shapes = {
        name: f"{kind}, {matrices[name].shape[0]:,} x {matrices[name].shape[1]:,}" for name, kind in kinds.items()
    }
    rows = [("expression", name, words, None, None) for name, words in shapes.items()]
    rows += [("genes", *row, None, None) for row in _genes(adata.var)]
    columns = [(kind, name, *rest) for name in adata.obs for kind, *rest in _column(adata.obs, name)]
    rows += sorted(columns, key=lambda row: row[0])
    table = pd.DataFrame(rows, columns=["is", "name", "found", "levels", "smallest"])
    table = table.astype({"levels": "Int64", "smallest": "Int64"})
    table.attrs["command"] = _command(path, adata.obs, kinds, columns)
    return table


def _kind(x: Any) -> str:
    """Return what kind of expression a matrix has, by its first cells."""
    x = numeric_matrix(x[:CELLS], "expression")
    fault = fault_of(x)
    if not fault:
        return "log-normalised"
    if "negative" in fault:
        return "scaled"
    return "counts" if "whole" in fault else f"other: {fault}"


def _genes(var: pd.DataFrame) -> list[tuple[str, str]]:
    """Return what is known of genes: their names, columns with symbols, kinds of features, and the species, a guess."""
    names = var.index.astype(str)
    ids = names.str.fullmatch(IDS).mean() > 0.5
    rows = [("names", f"{'ids' if ids else 'symbols'}, such as {', '.join(names[:3])}")]
    symbols = [name for name in SYMBOLS if name in var]
    rows += [(f"var[{name!r}]", f"symbols, such as {', '.join(map(str, var[name].iloc[:3]))}") for name in symbols]
    if "feature_types" in var:
        sizes = var["feature_types"].value_counts()
        rows.append(("feature_types", ", ".join(f"{n:,} {kind}" for kind, n in sizes.items() if n)))
    share = {species: names.str.startswith(start).mean() for start, species in SPECIES.items()}
    share["human"] += names.str.fullmatch(r"[A-Z][A-Z0-9.-]+").mean() * (not ids)
    share["mouse or rat"] = names.str.fullmatch(r"[A-Z][a-z][a-z0-9.-]*").mean()
    best = max(share, key=share.get)
    return [*rows, ("species, a guess", best if share[best] > 0.6 else "unknown")]


def _column(obs: pd.DataFrame, name: Any) -> list[tuple[str, str, int, int]]:
    """Return what a column of obs could be, its labels, their number, and the smallest; nothing if none."""
    column = obs[name]
    if column.ndim > 1 or column.dtype.kind in "fcmM":
        return []
    sizes = column.astype(object).value_counts()
    if not 2 <= len(sizes) < max(len(column) / 2, 3):
        return []
    labels = sizes.index.astype(str)
    found = f"such as {', '.join(labels[:3])}", len(sizes), int(sizes.min())
    if labels.str.lower().isin(CONTROLS).any():
        return [("perturbations", *found)]
    if re.search(GROUPS, str(name)):
        return [("donors or batches", *found)]
    return [("classes", *found)] if len(sizes) <= LEVELS else []


def _command(path: str, obs: pd.DataFrame, kinds: dict[str, str], columns: list[tuple[Any, ...]]) -> str:
    """Return the command that fits best: classes by a name that says so, else perturbations, else any classes."""
    words, of = ["scbmlp", "report", path], {kind: [row for row in columns if row[0] == kind] for kind, *_ in columns}
    classes, drugs = of.get("classes", []), of.get("perturbations", [])
    named = [row for row in classes if re.search(CLASSES, str(row[1]))] or (classes if not drugs else [])
    if drugs and not named:
        labels = obs[drugs[0][1]].astype(str)
        words += [
            "--perturbation-key",
            str(drugs[0][1]),
            "--control",
            labels[labels.str.lower().isin(CONTROLS)].iloc[0],
        ]
    else:
        words += ["--class-key", str(named[0][1]) if named else "COLUMN"]
        words += ["--min-cells", str(LEAST)] if named and named[0][-1] < LEAST else []
    fitting = [name.removeprefix("layer ") for name, kind in kinds.items() if kind in ("log-normalised", "counts")]
    if fitting and kinds.get("X") not in ("log-normalised", "counts") and "raw" not in fitting:
        words += ["--layer", fitting[0]]
    return shlex.join(words)


def as_text(cells: str) -> str:
    """Return the table and the command, as the command line prints them."""
    table = look(cells)
    return f"{table.astype(object).fillna('').to_string(index=False)}\n\n{table.attrs['command']}"


def command(commands: Any) -> None:
    """Add ``scbmlp look`` to the command line."""
    words = "say what a file of cells has, and which command fits"
    one = commands.add_parser("look", help=words, description=words)
    one.add_argument("cells", help="a file of cells")
    one.set_defaults(run=as_text)
