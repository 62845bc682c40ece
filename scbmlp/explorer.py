"""All modules in one table that a browser searches, sorts and opens, without a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader

from scbmlp.checks import plain_names
from scbmlp.datasets import ExpressionDataset, check_dataset
from scbmlp.modules import GeneModules
from scbmlp.plotting import NEGATIVE, POSITIVE

N_GENES, N_SETS, SIGNIFICANT = 20, 10, 0.05  # genes of a pole, gene sets of a module, and their q
EVIDENCE = {"stability": "stability", "p": "p", "gain_curved": "gain over single genes"}  # of the trust table

templates = Environment(loader=PackageLoader("scbmlp"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
templates.filters["number"] = lambda value: f"{value:.3g}".replace("-", "\N{MINUS SIGN}")
templates.globals |= {"positive": POSITIVE, "negative": NEGATIVE}


@dataclass(frozen=True)
class Explorer:
    """A table of modules, a dictionary each in `rows`, shown by a notebook as the last value of a cell."""

    rows: list[dict[str, Any]]

    def __repr__(self) -> str:
        return f"Explorer: {len(self.rows):,} modules of {len({row['output'] for row in self.rows}):,} outputs"

    def _repr_html_(self) -> str:
        return self._render(page=False)

    def save(self, path: str | Path) -> None:
        """Write an HTML file, which a browser opens from disk.

        >>> explorer.explorer(on, test).save("modules.html")
        """
        Path(path).write_text(self._render(page=True), "utf-8")

    def _render(self, page: bool) -> str:
        return templates.get_template("explorer.html.j2").render(rows=self.rows, page=page)


def explorer(
    modules: GeneModules | Mapping[str, GeneModules],
    dataset: ExpressionDataset,
    *,
    enriched: pd.DataFrame | None = None,
) -> Explorer:
    """Make a table to look through modules with: genes, gene sets, mean scores of classes, and trust if known.

    Parameters
    ----------
    modules, dataset
        Modules of one output, or of several by name, and cells to score, whose classes' mean scores are shown.
    enriched
        Result of :func:`scbmlp.enrichment.enrich` for the modules; up to 10 sets with q below 0.05 are shown.

    Examples
    --------
    >>> explorer.explorer(on, test)
    Explorer: 4 modules of 1 outputs
    """
    several = modules if isinstance(modules, Mapping) else {getattr(modules, "output", None): modules}
    if not several or not all(isinstance(one, GeneModules) for one in several.values()):
        kinds = ", ".join(type(one).__name__ for one in several.values()) or "nothing"
        raise ValueError(f"modules holds {kinds}; pass GeneModules of one output, or a dictionary of several by name.")
    check_dataset(dataset)
    names, rows = plain_names(map(str, several), "modules"), []
    sets = None if enriched is None else _sets(enriched, list(names))
    classes = pd.Categorical.from_codes(dataset.y.numpy(), dataset.output_names) if dataset.y.ndim == 1 else None
    for output, one in zip(names, several.values(), strict=True):
        scores = one.scores(dataset).reset_index(drop=True)
        means = None if classes is None else scores.groupby(classes, observed=True).mean()
        for number, (module, eigenvalue) in enumerate(one.eigenvalues.items(), 1):
            trust = {} if one.trust is None else one.trust.loc[module].dropna()
            rows.append({
                "output": output, "module": number, "eigenvalue": float(eigenvalue),
                "largest": float(one.loadings[module].abs().max()),
                "poles": [one.top_genes(module, N_GENES, pole=pole).to_dict() for pole in "+-"],
                "sets": None if sets is None else sets.get((output, str(module)), []),
                "means": None if means is None else means[module].to_dict(),
                "trusted": bool(trust["trusted"]) if "trusted" in trust else None,
                "evidence": {label: float(trust[name]) for name, label in EVIDENCE.items() if name in trust},
            })  # fmt: skip
    return Explorer(rows)


def _sets(enriched: pd.DataFrame, outputs: list[str]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the significant gene sets by output and module."""
    columns = ["output", "module", "pole", "term", "overlap", "size", "q", "genes"]
    missing = [name for name in columns if name not in enriched]
    if missing:
        raise KeyError(f"enriched lacks the columns {', '.join(missing)}; pass what scbmlp.enrichment.enrich returned.")
    table = enriched[columns].astype({"output": str, "module": str})
    if not table["output"].isin(outputs).any():
        there = ", ".join(table["output"].unique()[:5])
        raise ValueError(f"enriched is of {there}, which modules do not have; pass what enrich returned for these.")
    table = table[table["q"] < SIGNIFICANT].sort_values("q", kind="stable")
    return {key: rows.head(N_SETS).to_dict("records") for key, rows in table.groupby(["output", "module"])}
