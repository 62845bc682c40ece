"""Modules to look through in a browser, one at a time: genes, scores by group of cells, gene sets, trust."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from jinja2 import Environment, PackageLoader

from scbmlp.checks import obs_column, of_cells, plain_names, whole_number
from scbmlp.datasets import ExpressionDataset
from scbmlp.modules import GeneModules
from scbmlp.plotting import NEGATIVE, POSITIVE
from scbmlp.stores import annotations

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SIGNIFICANT, MOST_SETS = 0.05, 10  # gene sets of a module that are shown: up to this q, and so many
EVIDENCE = ("trusted", "stability", "p", "gain_curved")  # of the trust table
POLES = {"positive": "+", "negative": "-"}

templates = Environment(loader=PackageLoader("scbmlp"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
# `tojson` escapes what could end a script; NaN, which JSON has not, is refused.
templates.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}


@dataclass(frozen=True)
class Explorer:
    """Modules to look through in a browser, shown by a notebook as the last value of a cell.

    The page holds all data. Without JavaScript, and in print, it is a table of all modules. What is chosen is in the
    address, as ``#<name>:output=Beta&module=1&gene=Ins1``, and such an address opens that view.

    Parameters
    ----------
    data
        What is shown, of types that JSON has.
    name
        What the address calls it by; several of one page need different ones.
    """

    data: dict[str, Any]
    name: str = "explorer"

    def __repr__(self) -> str:
        outputs, groups = self.data["outputs"], self.data["groups"]
        modules, cells = sum(len(one["modules"]) for one in outputs), sum(one["cells"] for one in groups)
        shown = f"{modules:,} modules of {len(outputs):,} outputs; {self.data['n_genes']} genes a pole"
        return f"Explorer: {shown}; {cells:,} cells in {len(groups):,} groups"

    def _repr_html_(self) -> str:
        return self._render("explorer.html.j2")

    def save(self, path: str | Path) -> None:
        """Write an HTML file, which a browser opens from disk.

        Examples
        --------
        >>> explorer.explorer(on, test, n_genes=10).save("modules.html")
        """
        Path(path).write_text(self._render("explorer_page.html.j2"), "utf-8")

    def _render(self, template: str) -> str:
        colors = {"positive": POSITIVE, "negative": NEGATIVE}
        return templates.get_template(template).render(data=self.data, name=self.name, colors=colors)


def explorer(
    modules: GeneModules | Mapping[str, GeneModules],
    cells: AnnData | ExpressionDataset | str | Path | Any,
    groups: Any = None,
    *,
    enriched: pd.DataFrame | None = None,
    n_genes: int = 20,
    name: str = "explorer",
) -> Explorer:
    """Make a figure to look through modules with: genes, scores in groups of cells, gene sets, and trust if known.

    Parameters
    ----------
    modules
        Modules of one output, or of several by name.
    cells
        Cells to score, as :meth:`scbmlp.modules.GeneModules.scores` takes them.
    groups
        Column of ``obs``, or a label for every cell (cell), None where it has none; if None, the classes of a data set.
    enriched
        Result of :func:`scbmlp.enrichment.enrich` for the modules; sets with q below 0.05 are shown.
    n_genes
        Most genes to show of each pole.
    name
        What the address of a view begins with.

    Examples
    --------
    >>> explorer.explorer(on, adata, "label", n_genes=10)
    Explorer: 4 modules of 1 outputs; 10 genes a pole; 1,000 cells in 2 groups
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w-]*", name, re.ASCII):
        raise ValueError(f"name={name!r} is to be in an address; take a letter, then letters, digits, - or _.")
    n_genes, named = whole_number(n_genes, "n_genes"), _named(modules)
    sets = None if enriched is None else _sets(enriched, list(named))
    scores = {output: one.scores(cells) for output, one in named.items()}
    labels = _labels(cells, groups, len(next(iter(scores.values()))))
    outputs = []
    for output, one in named.items():
        grouped = scores[output].reset_index(drop=True).groupby(labels, observed=True)
        mean, quantiles = grouped.mean(), grouped.quantile(list(QUANTILES))
        rows = []
        for module, eigenvalue in one.eigenvalues.items():
            poles = {pole: one.top_genes(module, n_genes, pole=sign) for pole, sign in POLES.items()}
            box = np.column_stack([mean[module], quantiles[module].unstack()])
            rows.append({
                "eigenvalue": _number(eigenvalue),
                **{pole: [[str(gene), _number(value)] for gene, value in top.items()] for pole, top in poles.items()},
                "scores": [[_number(value) for value in row] for row in box],
                "sets": None if sets is None else sets.get((output, str(module)), []),
                "trust": None if one.trust is None else _evidence(one.trust.loc[module]),
            })  # fmt: skip
        outputs.append({"name": output, "modules": rows})
    shown = [{"name": str(group), "cells": int(n_cells)} for group, n_cells in labels.value_counts().items()]
    return Explorer({"n_genes": n_genes, "groups": shown, "outputs": outputs}, name)


def _named(modules: Any) -> dict[str, GeneModules]:
    named = dict(modules) if isinstance(modules, Mapping) else {getattr(modules, "output", None): modules}
    other = [type(one).__name__ for one in named.values() if not isinstance(one, GeneModules)]
    if other or not named:
        kind = f"holds {other[0]}" if other else "is empty"
        raise ValueError(f"modules {kind}; pass GeneModules of one output, or a dictionary of several by name.")
    return dict(zip(plain_names(map(str, named), "modules"), named.values(), strict=True))


def _labels(cells: Any, groups: Any, n_cells: int) -> pd.Categorical:
    """Return the group of every cell, groups in order and none of them empty, their names as text."""
    kind = type(cells).__name__
    if groups is None:
        if not isinstance(cells, ExpressionDataset) or cells.y.ndim == 2:
            label = "name a column of obs, or pass a label for every cell"
            raise ValueError(f"groups=None: cells of type {kind} have no classes; {label}.")
        groups = pd.Categorical.from_codes(cells.y.numpy(), cells.output_names)
    elif isinstance(groups, str):
        known = annotations(cells) if isinstance(cells, str | Path) else cells
        if not isinstance(known, AnnData):
            raise ValueError(f"groups={groups!r}: cells of type {kind} have no obs; pass a label for every cell.")
        groups = obs_column(known, groups, "groups")
    if np.ndim(groups) != 1 or len(groups) != n_cells:
        raise ValueError(f"groups has shape {np.shape(groups)} for {n_cells} cells; pass one label a cell.")
    if isinstance(groups, pd.Series) and isinstance(cells, AnnData) and not isinstance(groups.index, pd.RangeIndex):
        groups = of_cells(groups, cells, "groups")
    labels = pd.Categorical(groups).remove_unused_categories()
    if not len(labels.categories):
        raise ValueError(f"groups has no label for any of {n_cells} cells; label some, or name another column.")
    return labels.rename_categories(plain_names(map(str, labels.categories), "groups"))


def _sets(enriched: pd.DataFrame, outputs: list[str]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the significant gene sets by output and module."""
    columns = ["output", "module", "pole", "term", "overlap", "size", "q", "genes"]
    missing = [name for name in columns if name not in enriched]
    if missing:
        raise KeyError(f"enriched lacks the columns {', '.join(missing)}; pass what scbmlp.enrichment.enrich returned.")
    kinds = {"output": str, "module": str, "term": str, "genes": str, "overlap": int, "size": int}
    known = enriched["output"].astype(str)
    if not known.isin(outputs).any():
        raise ValueError(
            f"enriched is of the outputs {', '.join(known.unique()[:5])}, none of which is in modules: "
            f"{', '.join(outputs[:5])}; pass what enrich returned for these modules."
        )
    table = enriched.loc[enriched["q"] < SIGNIFICANT, columns].sort_values("q", kind="stable").astype(kinds)
    table["pole"] = np.where(table["pole"] == "+", "positive", "negative")
    table["q"] = table["q"].map(_number)
    own = table.groupby(["output", "module"])
    return {key: rows.iloc[:MOST_SETS, 2:].to_dict("records") for key, rows in own}


def _evidence(row: pd.Series) -> dict[str, Any]:
    known = row.reindex(EVIDENCE).dropna()
    return {column: bool(value) if column == "trusted" else _number(value) for column, value in known.items()}


def _number(value: float) -> float:
    """Return a number of six digits. Three are shown: of fewer than six they would be rounded twice."""
    return float(f"{value:.6g}")
