"""Do the figures show the numbers of their tables, on the axes given, and change nothing else?"""

import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib.colors import is_color_like, to_hex, to_rgb
from matplotlib.figure import Figure

from scbmlp import plotting

LOADINGS = pd.Series(np.random.default_rng(0).permutation(np.linspace(-1, 1, 30)), [f"Gene{i}" for i in range(30)])
COUNTS = pd.DataFrame([[5, 0, 1], [2, 7, 0], [0, 3, 11]], list("abc"), list("abc"))
EIGENVALUES = pd.Series([2.0, -1.5, 1.0, -0.2])
LABELS = pd.Series(np.repeat(["Alpha", "Beta"], [40, 60]))
SCORES = pd.Series(np.random.default_rng(1).normal(size=100) + 2 * (LABELS == "Beta"))
COLORS = {"Alpha": "#117733", "Beta": "#332288", "No cells": "#88ccee"}
SHARES = pd.DataFrame(
    {"linear": [0.9, 0.5, 0.99], "quadratic": [0.05, 0.4, 0.001], "interaction": [0.01, 0.04, 1e-4]}, list("abc")
)
POINTS = np.random.default_rng(2).normal(size=(100, 2))
BETWEEN = pd.DataFrame([[0.5, -2.0], [1.0, 0.0], [0.1, 0.2]], list("abc"), list("xy"))
MISSING = pd.DataFrame({"one": [0.1, 0.5, np.nan], "other": [0.3, 0.2, 0.4]}, list("abc"))
CURVES = pd.DataFrame(
    {"effect": [0.1, 1.0, 0.2, 2.0], "error": [0.1, 0.2, 0.1, 0.3]},
    pd.MultiIndex.from_product([["drug", "other"], [10.0, 1000.0]]),
)
GROUPS = {"acts": [3.0, -4.0], "silent": np.array([0.5, -0.2, 1.0])}


@pytest.fixture
def ax():
    """Axes that are drawn on; nothing else changes."""
    style, figures = dict(matplotlib.rcParams), plt.get_fignums()
    yield (ax := Figure(layout="constrained").add_subplot())
    ax.figure.canvas.draw()
    assert ax.has_data() and dict(matplotlib.rcParams) == style and plt.get_fignums() == figures


def names(axis):
    """Names along an axis, by position."""
    return dict(zip(axis.get_ticklocs(), (label.get_text() for label in axis.get_ticklabels()), strict=True))


def colors_of(*artists):
    return [to_hex(color) for artist in artists for color in np.atleast_2d(artist.get_facecolor())]


def signed(values):
    return [(plotting.POSITIVE if value > 0 else plotting.NEGATIVE).lower() for value in values]


def test_names_with_dollar_signs_are_drawn_as_they_are(ax):
    names = ["drug_$5_$x_y_z$", "a$b_c_d$", "B"]
    plotting.loadings(pd.Series([1.0, -1.0, 0.5], names), ax=ax)
    ax.figure.canvas.draw()
    shown = {label.get_text() for label in ax.get_yticklabels()}
    assert shown == {name.replace("$", r"\$") for name in names}


@pytest.mark.parametrize("n", [1, 9, 10, 25])
def test_every_category_has_a_colour_of_its_own(n):
    categories = [f"class {i}" for i in range(n)]
    palette = plotting.palette(iter(categories))
    assert list(palette) == categories and all(is_color_like(color) for color in palette.values())
    assert len({to_rgb(color) for color in palette.values()}) == n


def test_confusion_annotates_counts_and_shades_shares_of_the_true_class(ax):
    plotting.confusion(COUNTS, ax=ax)
    assert [text.get_text() for text in ax.texts] == [str(count) for count in COUNTS.to_numpy().ravel()]
    shares = COUNTS.to_numpy() / COUNTS.to_numpy().sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.ravel(ax.collections[0].get_array()), shares.ravel())
    assert list(names(ax.xaxis).values()) == list(names(ax.yaxis).values()) == list("abc")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted", "true")


def test_spectrum_has_a_bar_an_eigenvalue_coloured_by_sign(ax):
    plotting.spectrum(EIGENVALUES, ax=ax)
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in ax.patches]
    np.testing.assert_allclose(bars, np.c_[[1, 2, 3, 4], EIGENVALUES])
    assert colors_of(*ax.patches) == signed(EIGENVALUES)


@pytest.mark.parametrize("n", [1, 15, 20])
def test_loadings_shows_the_strongest_genes_of_both_poles_each_once(ax, n):
    plotting.loadings(LOADINGS, n, ax=ax)
    ordered = LOADINGS.sort_values()
    shown = pd.concat([ordered[:n], ordered[n:][-n:]])
    labels = names(ax.yaxis)
    assert [(labels[round(bar.get_y() + 0.4)], bar.get_width()) for bar in ax.patches] == list(shown.items())
    assert colors_of(*ax.patches) == signed(shown)


def test_score_histogram_has_a_row_a_class_of_one_height_from_the_top(ax):
    plotting.score_histogram(SCORES, LABELS, COLORS, ax=ax)
    assert names(ax.yaxis) == {0: "Alpha", -1: "Beta", -2: "No cells"}
    assert colors_of(*ax.patches) == [*COLORS.values()]
    for row, (name, patch) in enumerate(zip(COLORS, ax.patches, strict=True)):
        tops, edges, base = patch.get_data()
        assert base == -row and (edges[0], edges[-1]) == (SCORES.min(), SCORES.max())
        expected, _ = np.histogram(SCORES[LABELS == name], edges)
        np.testing.assert_allclose((tops - base) * max(expected.max(), 1), 0.9 * expected, atol=1e-12)


@pytest.mark.parametrize(
    ("draw", "given", "shown"),
    [
        (plotting.dots, MISSING, MISSING),
        (plotting.shares, SHARES, SHARES.rename(columns={"interaction": "interaction, at most"})),
        (plotting.shares, SHARES.assign(interaction=np.nan), SHARES[["linear", "quadratic"]]),
    ],
)
def test_every_column_has_its_marker_on_the_line_of_each_row(ax, draw, given, shown):
    draw(given, ax=ax)
    lines, *points = ax.collections
    assert [artist.get_label() for artist in points] == list(shown)
    for artist, column in zip(points, shown, strict=True):
        x, y = np.ma.filled(artist.get_offsets(), np.nan).T
        np.testing.assert_allclose(x, shown[column])
        np.testing.assert_allclose(y[~np.isnan(x)], np.flatnonzero(shown[column].notna()))
    assert names(ax.yaxis) == {0: "a", 1: "b", 2: "c"} and ax.yaxis_inverted()  # the first row is on top
    ends = [shown.loc["b"].min(), shown.loc["b"].max()]
    np.testing.assert_allclose(lines.get_segments()[1], np.c_[ends, [1, 1]])
    assert len({colors_of(artist)[0] for artist in points}) == shown.shape[1]
    assert (ax.get_xscale() == "log") == (draw is plotting.shares)


def test_embedding_draws_every_cell_in_the_colour_of_its_label(ax):
    plotting.embedding(POINTS, LABELS, COLORS, ax=ax)
    for cells, entry, (name, color) in zip(ax.collections[::2], ax.collections[1::2], COLORS.items(), strict=True):
        np.testing.assert_allclose(cells.get_offsets(), POINTS[LABELS == name])
        assert entry.get_label() == name and len(entry.get_offsets()) == 0
        assert {*colors_of(cells, entry)} == {color}


def test_dose_response_has_error_bars_of_95_percent(ax):
    plotting.dose_response(CURVES, ax=ax)
    assert ax.get_xscale() == "log"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["drug", "other"]
    for name, (line, _, (bars,)) in zip(["drug", "other"], ax.containers, strict=True):
        np.testing.assert_allclose(line.get_xydata(), np.c_[[10, 1000], CURVES.loc[name, "effect"]])
        lengths = [np.ptp(segment[:, 1]) for segment in bars.get_segments()]
        np.testing.assert_allclose(lengths, 2 * 1.96 * CURVES.loc[name, "error"])


def test_heatmaps_are_shaded_around_zero_and_leave_missing_numbers_out(ax):
    mesh = plotting.interactions(BETWEEN, ax=ax).collections[0]
    np.testing.assert_allclose(np.ravel(mesh.get_array()), BETWEEN.to_numpy().ravel())
    red, blue = mesh.cmap(1.0), mesh.cmap(0.0)
    assert red[0] > red[2] and blue[2] > blue[0] and mesh.get_clim() == (-2, 2)
    assert list(names(ax.yaxis).values()) == list("abc") and list(names(ax.xaxis).values()) == list("xy")
    ax = plotting.heatmap(BETWEEN.mask(BETWEEN == 1.0).replace(0.0, -0.01), ax=Figure().add_subplot())
    assert ax.collections[0].get_clim() == (-2, 2)
    assert [text.get_text() for text in ax.texts] == ["0.5", "-2.0", "0.0", "0.1", "0.2"]  # and no "-0.0"
    assert plotting.heatmap(BETWEEN, 5, ax=Figure().add_subplot()).collections[0].get_clim() == (-5, 5)


def test_strip_puts_every_value_on_the_line_of_its_group_and_colours_those_outside_the_band(ax):
    plotting.strip(GROUPS, 2.0, ax=ax)
    expected = zip(ax.collections[:2], GROUPS.values(), (plotting.POSITIVE, plotting.NEUTRAL), strict=True)
    for row, (artist, values, color) in enumerate(expected):
        np.testing.assert_allclose(artist.get_offsets()[:, 0], values)
        assert np.abs(artist.get_offsets()[:, 1] - row).max() <= 0.2
        assert {*colors_of(artist)} == {color.lower()}
    box = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    assert (box.x0, box.x1) == pytest.approx((-2, 2)) and list(names(ax.yaxis).values()) == list(GROUPS)


def test_modules_that_are_not_trusted_are_grey_and_names_are_text():
    columns = {"eigenvalue": [0.5, -0.1], "stability": [0.9, 0.3], "low": [0.8, 0.1], "gain_curved": [0.01, 0.01]}
    table = pd.DataFrame(columns | {"trusted": [True, False]}, ["module_1", "<b>"])
    html = plotting.trust(table).to_html()
    grey = re.findall(r"#T_trust_row(\d)_col\d", html.split("<table")[0])
    assert set(grey) == {"1"} and len(grey) == 3, html
    assert "gain curved" in html and "-0.100" in html and "low" not in html.split("<table")[1]
    assert "&lt;b&gt;" in html and "<b>" not in html


OWN = ["#000000", "#111111", "#222222", "#333333"]


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (None, plotting.MUTED),
        (np.array(OWN), OWN),
        (np.array([[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1.0], [1, 1, 1, 1]]), ("#000000", "#0000ff", "#00ff00")),
        (OWN[:1], plotting.MUTED),  # of other categories
        (dict.fromkeys("abcd", "red"), plotting.MUTED),
    ],
)
def test_colours_of_a_column_are_those_that_the_cells_have(kept, expected):
    obs = pd.DataFrame({"kind": pd.Categorical(list("abca"), categories=list("abcd"))}, list("1234"))
    adata = AnnData(np.ones((4, 2)), obs, uns={} if kept is None else {"kind_colors": kept})
    assert plotting.category_colors(adata, "kind") == dict(zip("abc", expected, strict=False))
