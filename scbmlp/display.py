"""How objects show themselves on a page: a heading, what is known of them, and a small table."""

from __future__ import annotations

import base64
import html
import io
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd


def watched() -> bool:
    """Say whether somebody sees a progress bar: in a terminal or a live notebook, but not while a page is built."""
    return sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ  # of a notebook that a Jupyter server has open


def listed(names: Iterable[Any], n: int = 5) -> str:
    """Return the first `n` names, and how many more there are."""
    names = list(map(str, names))
    return ", ".join(names[:n]) + (f" and {len(names) - n:,} more" if len(names) > n else "")


def glue(**values: Any) -> None:
    """Keep values and figures by the names by which the text of a page shows them."""
    from myst_nb import glue as keep

    for name, value in values.items():
        keep(name, value, display=False)


def as_html(rows: Mapping[str, Any], title: str = "", table: pd.DataFrame | None = None) -> str:
    """Return an object as HTML: a heading, values by name, and a table below; every text is escaped."""
    heading = f"<strong>{html.escape(title)}</strong>" if title else ""
    cells = "".join(
        f'<tr><th style="text-align:left;vertical-align:top">{html.escape(str(key))}</th>'
        f'<td style="text-align:left;overflow-wrap:anywhere">{html.escape(str(value))}</td></tr>'
        for key, value in rows.items()
    )
    below = "" if table is None else table.to_html(border=0, justify="left", float_format="{:.3g}".format)
    return f"{heading}<table><tbody>{cells}</tbody></table>{below}"


@dataclass(frozen=True)
class Picture:
    """A figure of matplotlib that carries its description to every page that shows it."""

    figure: Any
    alt: str

    def _repr_html_(self) -> str:
        png = io.BytesIO()
        self.figure.savefig(png, dpi=2 * self.figure.dpi, metadata={"Software": None})
        data, width = base64.b64encode(png.getvalue()).decode(), round(self.figure.get_figwidth() * self.figure.dpi)
        return f'<img src="data:image/png;base64,{data}" alt="{html.escape(self.alt)}" width="{width}">'
