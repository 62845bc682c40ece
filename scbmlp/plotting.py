"""From computed tables to matplotlib axes, or to a styled table: nothing here fits, tests or opens a figure.

Figures are drawn on the axes given as `ax`, which the functions return.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.colors import is_color_like, to_hex
from pandas.io.formats.style import Styler

from scbmlp.checks import obs_labels

# Paul Tol's "muted" scheme :cite:p:`tol2021`: its nine hues stay apart under every common colour blindness.
MUTED = ("#332288", "#88CCEE", "#44AA99", "#117733", "#CC6677", "#DDCC77", "#882255", "#AA4499", "#999933")
# What the figures of the book have in common, for plt.rcParams.update.
STYLE = {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
POSITIVE, NEGATIVE, NEUTRAL = "#CC6677", "#332288", "#888888"
PALE = "#dddddd"
DIVERGING = sns.diverging_palette(272, 10, s=80, l=45, as_cmap=True)  # about the hues of NEGATIVE and POSITIVE


def palette(categories: Iterable[str]) -> dict[str, str]:
    """Return a colour for every category; up to nine are safe for colour-blind readers.

    >>> plotting.palette(["Alpha", "Beta"])
    {'Alpha': '#332288', 'Beta': '#88CCEE'}
    """
    names = list(categories)
    colors = MUTED if len(names) <= len(MUTED) else sns.color_palette("husl", len(names)).as_hex()
    return dict(zip(names, colors, strict=False))


def category_colors(adata: AnnData, key: str) -> dict[str, str]:
    """Return the colours of the labels that cells have: those that scanpy keeps, or those of :func:`palette`.

    >>> plotting.category_colors(adata, "label")
    {'off': '#332288', 'on': '#88CCEE'}
    """
    labels = obs_labels(adata, key, "key").astype("category")
    names, there = list(map(str, labels.cat.categories)), set(labels.astype(str))
    own = adata.uns.get(f"{key}_colors", ())
    usable = hasattr(own, "__len__") and len(own) == len(names) and all(map(is_color_like, own))
    colors = dict(zip(names, map(to_hex, own), strict=True)) if usable else palette(names)
    return {name: color for name, color in colors.items() if name in there}


def plain(name: Any) -> str:
    r"""Return a name that matplotlib shows as it is: a dollar sign starts no formula.

    >>> print(plotting.plain("T$reg$"))
    T\$reg\$
    """
    return str(name).replace("$", r"\$")


def confusion(table: pd.DataFrame, *, ax: Axes) -> Axes:
    """Draw the counts of cells by true class (rows) and predicted class, shaded by the share of the true class.

    >>> table = pd.crosstab(test.output_names[test.y], model.predict(test))
    >>> plotting.confusion(table, ax=ax)
    <Axes: xlabel='predicted', ylabel='true'>
    """
    share = table.div(table.sum(axis=1), axis=0)
    sns.heatmap(share, annot=table, fmt="d", cmap="Greys", vmin=0, vmax=1, square=True, cbar=False, ax=ax)
    ax.set(xlabel="predicted", ylabel="true")
    ax.set_xticks(ax.get_xticks(), ax.get_xticklabels(), rotation=45, ha="right")
    return ax


def spectrum(eigenvalues: pd.Series, *, ax: Axes) -> Axes:
    """Draw eigenvalues (comp), strongest first, as bars coloured by sign: those above 0 push the output up.

    >>> plotting.spectrum(on.eigenvalues, ax=ax)
    <Axes: xlabel='module', ylabel='eigenvalue'>
    """
    ax.bar(np.arange(1, len(eigenvalues) + 1), eigenvalues, color=np.where(eigenvalues > 0, POSITIVE, NEGATIVE))
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xlabel="module", ylabel="eigenvalue")
    return ax


def loadings(values: pd.Series, n: int = 10, *, ax: Axes) -> Axes:
    """Draw the `n` strongest genes of both poles of a module, from its loadings (gene).

    >>> plotting.loadings(on.loadings["module_1"], ax=ax)
    <Axes: xlabel='loading'>
    """
    ordered = values.sort_values()
    shown = pd.concat([ordered[:n], ordered[n:][-n:]])
    ax.barh([*map(plain, shown.index)], shown, color=np.where(shown > 0, POSITIVE, NEGATIVE))
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set(xlabel="loading", ylabel="", ymargin=0.01)
    ax.locator_params(axis="x", nbins=4)
    return ax


def score_histogram(scores: pd.Series, labels: pd.Series, colors: Mapping[str, str], *, ax: Axes) -> Axes:
    """Draw histograms of a module's score (cell), one class above the other as in `colors`, each of the same height.

    >>> colors = plotting.category_colors(adata, "label")
    >>> plotting.score_histogram(on.scores(adata)["module_1"], labels, colors, ax=ax)
    <Axes: xlabel='module score'>
    """
    edges = np.linspace(scores.min(), scores.max(), 61)
    for row, (name, color) in enumerate(colors.items()):
        counts, _ = np.histogram(scores[np.asarray(labels == name)], edges)
        ax.stairs(0.9 * counts / max(counts.max(), 1) - row, edges, baseline=-row, fill=True, color=color)
        ax.axhline(-row, color=color, linewidth=0.8)
    ax.set(xlabel="module score", xlim=(edges[0], edges[-1]))
    ax.set(yticks=-np.arange(len(colors)), yticklabels=map(plain, colors))
    ax.tick_params(axis="y", length=0)
    return ax


def embedding(points: np.ndarray, labels: pd.Series, colors: Mapping[str, str], *, ax: Axes) -> Axes:
    """Draw cells in two dimensions (cell x 2), coloured by label (cell), each label with an entry for a legend.

    >>> points = on.scores(adata)[["module_1", "module_2"]].to_numpy()
    >>> plotting.embedding(points, labels, {"on": "red"}, ax=ax)
    <Axes: >
    """
    for name, color in colors.items():
        ax.scatter(*points[np.asarray(labels == name)].T, s=3, color=color, rasterized=True)
        ax.scatter([], [], s=20, color=color, label=name)
    return ax


def dots(table: pd.DataFrame, *, ax: Axes) -> Axes:
    """Draw a table as points: a line a row, the first on top, a colour and marker a column; NaN is left out.

    >>> plotting.dots(regressor.evaluate(graded[2]), ax=ax)
    <Axes: >
    """
    _points(table, (POSITIVE, MUTED[2], "black", NEGATIVE, NEUTRAL), "oD|s^", (26, 26, 90, 26, 26), ax)
    ax.margins(y=0.05)
    return ax


def shares(table: pd.DataFrame, *, ax: Axes) -> Axes:
    """Draw the audit's shares of the variance of every output: linear, quadratic and, at most, interaction.

    >>> table = interactions.audit(model, test, train=train, validation=validation)
    >>> plotting.shares(table, ax=ax)
    <Axes: xlabel='share of the variance over cells'>
    """
    ends = table[["linear", "quadratic", "interaction"]].astype(float).dropna(axis=1, how="all")
    ends = ends.rename(columns={"interaction": "interaction, at most"})
    _points(ends, (NEUTRAL, NEGATIVE, POSITIVE), "osD", (None, None, None), ax)
    ax.set(xscale="log", xlabel="share of the variance over cells")
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, columnspacing=1, handletextpad=0.2)
    return ax


def dose_response(table: pd.DataFrame, *, ax: Axes) -> Axes:
    """Draw ``effect`` by compound and dose (rows) with its 95% interval, from :func:`scbmlp.effects.mean_effects`.

    >>> score, by = screen.to_df()["DHRS2"], ["perturbation", "dose_value"]
    >>> table = effects.mean_effects(score, screen, "perturbation", "control", by=by)
    >>> plotting.dose_response(table.droplevel("score").drop("control"), ax=ax)
    <Axes: xlabel='dose', ylabel='effect'>
    """
    line = {"marker": "o", "markersize": 4, "capsize": 2, "linewidth": 1.2}
    for name, color in palette(table.index.get_level_values(0).unique()).items():
        curve = table.loc[name]
        ax.errorbar(curve.index, curve["effect"], 1.96 * curve["error"], color=color, label=name, **line)
    ax.axhline(0, color="black", linewidth=0.5)
    ax.set(xscale="log", xlabel="dose", ylabel="effect")
    ax.legend(frameon=False, fontsize="x-small")
    return ax


def heatmap(table: pd.DataFrame, limit: float | None = None, fmt: str = ".1f", *, ax: Axes) -> Axes:
    """Draw a table with its numbers as `fmt` says, shaded around 0; darkest at `limit`, or its largest, of either sign.

    >>> plotting.heatmap(adata.to_df().iloc[:, :4].corr(), ax=ax)
    <Axes: >
    """
    text = {"annot": True, "fmt": f"z{fmt}", "annot_kws": {"fontsize": "small"}}  # z: no "-0.0"
    _around_zero(table, limit, ax, cmap="PuOr_r", cbar=False, **text).set(xlabel="", ylabel="")
    return ax


def interactions(table: pd.DataFrame, *, ax: Axes) -> Axes:
    """Draw ``InteractionMatrix.between`` as a heatmap, red where two genes together push the output up.

    >>> table = q.between(programs["program_03"], programs["program_04"])
    >>> plotting.interactions(table, ax=ax)
    <Axes: >
    """
    return _around_zero(table, None, ax, cmap=DIVERGING, square=True, cbar_kws={"label": "interaction", "shrink": 0.7})


def strip(groups: Mapping[str, Iterable[float]], band: float, *, ax: Axes) -> Axes:
    """Draw the values of groups as points, the first group on top, over a band of `band` to either side of 0.

    >>> plotting.strip({"HDAC": [3.0, 4.0], "silent": [0.5]}, band=2, ax=ax)
    <Axes: >
    """
    rng = np.random.default_rng(0)
    for row, values in enumerate(groups.values()):
        values = np.ravel(list(values))
        color = np.where(np.abs(values) > band, POSITIVE, NEUTRAL)
        ax.scatter(values, row + rng.uniform(-0.2, 0.2, len(values)), s=12, color=color)
    ax.axvspan(-band, band, color=PALE, zorder=0)
    ax.set(yticks=range(len(groups)), yticklabels=groups)
    ax.invert_yaxis()
    return ax


def trust(table: pd.DataFrame) -> Styler:
    """Style the ``trust`` of :class:`scbmlp.modules.GeneModules`, or several joined: untrusted modules in grey.

    >>> plotting.trust(evidence.trust(on, replicas, validation).trust)
    <pandas.io.formats.style.Styler object at 0x...>
    """
    # Darker than NEUTRAL: small text that must be read, on white and on what a dark theme puts behind a table.
    grey = np.where(table["trusted"], "", "color: #555555")
    shown = table.drop(columns=["trusted", "low"], errors="ignore").rename(columns={"terms_random": "by chance"})
    shown = shown.rename(columns=lambda name: name.replace("_", " "))
    style = shown.style.set_uuid("trust").format(precision=2).format_index(escape="html")
    style = style.format("{:.3f}", subset=shown.columns.intersection(["eigenvalue", "p", "gain curved"]))
    # Eleven columns in the width of a page.
    rules = {"th, td": "padding: 0.15em 0.4em", "th.row_heading": "white-space: nowrap"}
    style = style.set_table_styles([{"selector": at, "props": props} for at, props in rules.items()])
    return style.set_table_attributes('style="font-size: 0.72em"').apply(lambda _: grey, axis=0)


def _points(table: pd.DataFrame, colors: Iterable[str], markers: str, sizes: Iterable[float | None], ax: Axes) -> None:
    """Draw a line a row, over its range, and a point a column, each in a colour, a marker and a size."""
    y = np.arange(len(table))
    ax.hlines(y, table.min(axis=1), table.max(axis=1), color=PALE, zorder=0)
    for (name, column), color, marker, size in zip(table.items(), colors, markers, sizes, strict=False):
        ax.scatter(column, y, color=color, marker=marker, s=size, label=name)
    ax.set(yticks=y, yticklabels=map(plain, table.index))
    ax.invert_yaxis()


def _around_zero(table: pd.DataFrame, limit: float | None, ax: Axes, **options: Any) -> Axes:
    """Draw a heatmap whose shades are symmetric around 0, every row and column named."""
    limit = np.nanmax(np.abs(table.to_numpy())) if limit is None else limit
    return sns.heatmap(table, vmin=-limit, vmax=limit, xticklabels=True, yticklabels=True, ax=ax, **options)
