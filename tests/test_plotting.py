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

GENES = [f"Gene{i}" for i in range(30)]
LOADINGS = pd.Series(np.random.default_rng(0).permutation(np.linspace(-1, 1, 30)), GENES)
HISTORY = pd.DataFrame(
    {"train_loss": [3.0, 2, 1], "val_loss": [4.0, 3, 2], "train_accuracy": [0.2, 0.5, 0.6]},
    index=pd.RangeIndex(1, 4, name="epoch"),
)
COUNTS = pd.DataFrame([[5, 0, 1], [2, 7, 0], [0, 3, 11]], list("abc"), list("abc"))
EIGENVALUES = pd.Series([2.0, -1.5, 1.0, -0.2])
LABELS = pd.Series(np.repeat(["Alpha", "Beta"], [40, 60]))
SCORES = pd.Series(np.random.default_rng(1).normal(size=100) + 2 * (LABELS == "Beta"))
COLORS = {"Alpha": "#117733", "Beta": "#332288"}
SHARES = pd.DataFrame(
    {"linear": [0.9, 0.5, 0.99], "quadratic": [0.05, 0.4, 0.001], "interaction": [0.01, 0.04, 1e-4]}, list("abc")
)
POINTS = np.random.default_rng(2).normal(size=(100, 2))
SPLITS = {
    "one": pd.DataFrame([[0.9, 0.5], [0.7, 0.3]], columns=pd.Index(["x", "y"], name="frequency")),
    "other": pd.DataFrame([[0.2, 0.1], [0.2, 0.3]], columns=pd.Index(["x", "y"], name="frequency")),
}
BETWEEN = pd.DataFrame([[0.5, -2.0], [1.0, 0.0], [0.1, 0.2]], list("abc"), list("xy"))
ENRICHED = pd.DataFrame(
    {
        "term": [
            "insulin secretion (GO:0030073)",
            "a set whose name is far too long to be put beside a bar of the figure",
            "third",
        ],
        "pole": ["+", "-", "+"],
        "overlap": [8, 4, 1],
        "size": [12, 30, 9],
        "p": [1e-6, 1e-3, 0.5],
        "q": [3e-6, 1.5e-3, 0.5],
    }
)
MISSING = pd.DataFrame({"one": [0.1, 0.5, np.nan], "other": [0.3, 0.2, 0.4]}, list("abc"))
CURVES = pd.DataFrame(
    {"effect": [0.1, 1.0, 0.2, 2.0], "error": [0.1, 0.2, 0.1, 0.3]},
    pd.MultiIndex.from_product([["drug", "other"], [10.0, 1000.0]]),
)
GROUPS = {"acts": [3.0, -4.0], "silent": np.array([0.5, -0.2, 1.0])}
DRAW = {
    "learning_curve": lambda ax: plotting.learning_curve(HISTORY, "loss", ax=ax),
    "confusion": lambda ax: plotting.confusion(COUNTS, ax=ax),
    "spectrum": lambda ax: plotting.spectrum(EIGENVALUES, ax=ax),
    "loadings": lambda ax: plotting.loadings(LOADINGS, ax=ax),
    "score_histogram": lambda ax: plotting.score_histogram(SCORES, LABELS, COLORS, ax=ax),
    "enrichment": lambda ax: plotting.enrichment(ENRICHED, ax=ax),
    "shares": lambda ax: plotting.shares(SHARES, ax=ax),
    "embedding": lambda ax: plotting.embedding(POINTS, LABELS, COLORS, ax=ax),
    "by_output": lambda ax: plotting.by_output(SPLITS, ax=ax),
    "interactions": lambda ax: plotting.interactions(BETWEEN, ax=ax),
    "dots": lambda ax: plotting.dots(MISSING, ax=ax),
    "dose_response": lambda ax: plotting.dose_response(CURVES, ax=ax),
    "heatmap": lambda ax: plotting.heatmap(BETWEEN, ax=ax),
    "strip": lambda ax: plotting.strip(GROUPS, 2.0, ax=ax),
}
UNLABELLED = ("interactions", "embedding", "dots", "heatmap", "strip")  # the caller says what is on the axis


@pytest.fixture
def ax():
    return Figure(layout="constrained").add_subplot()


def names(axis):
    """Names along an axis, by position."""
    return dict(zip(axis.get_ticklocs(), (label.get_text() for label in axis.get_ticklabels()), strict=True))


def middles(ax):
    return [bar.get_y() + bar.get_height() / 2 for bar in ax.patches]


def colors(artists):
    return [to_hex(artist.get_facecolor()) for artist in artists]


def colors_of(artist):
    return {to_hex(color) for color in artist.get_facecolor()}


def signed(values):
    return [(plotting.POSITIVE if value > 0 else plotting.NEGATIVE).lower() for value in values]


@pytest.mark.parametrize("name", DRAW)
def test_figure_is_drawn_on_the_given_axes_alone(name, ax):
    other = ax.figure.add_subplot(3, 3, 1)
    style, figures = dict(matplotlib.rcParams), plt.get_fignums()
    assert DRAW[name](ax) is ax
    assert ax.has_data() and not other.has_data()
    assert ax.get_xlabel() or name in UNLABELLED
    ax.figure.canvas.draw()
    assert dict(matplotlib.rcParams) == style and plt.get_fignums() == figures


def test_every_public_function_of_figures_is_tested():
    public = {name for name, value in vars(plotting).items() if getattr(value, "__module__", "") == plotting.__name__}
    assert public - {"palette", "category_colors", "trust"} == set(DRAW)  # no figures, tested by themselves


@pytest.mark.parametrize("n", [1, 8, 9, 10, 25])
def test_every_category_has_a_colour_of_its_own(n):
    categories = [f"class {i}" for i in range(n)]
    palette = plotting.palette(iter(categories))
    assert list(palette) == categories and all(is_color_like(color) for color in palette.values())
    rgb = np.array([to_rgb(color) for color in palette.values()])
    distance = np.abs(rgb[:, None] - rgb).sum(axis=2) + 9 * np.eye(n)
    assert distance.min() > 0.04


def test_learning_curve_has_a_line_a_stage(ax):
    plotting.learning_curve(HISTORY, "loss", ax=ax)
    lines = {line.get_label(): line.get_xydata() for line in ax.lines}
    np.testing.assert_array_equal(lines["training"], np.c_[[1, 2, 3], [3, 2, 1]])
    np.testing.assert_array_equal(lines["validation"], np.c_[[1, 2, 3], [4, 3, 2]])


def test_learning_curve_does_without_validation(ax):
    plotting.learning_curve(HISTORY, "accuracy", ax=ax)
    assert [line.get_label() for line in ax.lines] == ["training"] and ax.get_ylabel() == "accuracy"


def test_learning_curve_has_the_linear_baseline_beside_the_epochs(ax):
    start = pd.DataFrame({"train_loss": [2.5], "val_loss": [2.6]}, index=[0])
    plotting.learning_curve(pd.concat([start, HISTORY[["train_loss", "val_loss"]]]), "loss", ax=ax)
    named = {line.get_label(): line.get_xydata() for line in ax.lines}
    np.testing.assert_array_equal(named["validation"], np.c_[[1, 2, 3], [4, 3, 2]])
    dotted = sorted(line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":")
    assert dotted == [2.5, 2.6]


def test_confusion_annotates_counts_and_shades_shares_of_the_true_class(ax):
    plotting.confusion(COUNTS, ax=ax)
    assert [text.get_text() for text in ax.texts] == [str(count) for count in COUNTS.to_numpy().ravel()]
    shares = COUNTS.to_numpy() / COUNTS.to_numpy().sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.ravel(ax.collections[0].get_array()), shares.ravel())
    assert list(names(ax.xaxis).values()) == list(names(ax.yaxis).values()) == list("abc")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted", "true")


def test_spectrum_has_a_bar_an_eigenvalue_coloured_by_sign(ax):
    plotting.spectrum(EIGENVALUES, ax=ax)
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], EIGENVALUES)
    np.testing.assert_allclose([bar.get_x() + bar.get_width() / 2 for bar in ax.patches], [1, 2, 3, 4])
    assert colors(ax.patches) == signed(EIGENVALUES)


@pytest.mark.parametrize("n", [1, 5, 15, 20])
def test_loadings_shows_the_strongest_genes_of_both_poles_each_once(ax, n):
    plotting.loadings(LOADINGS, n, ax=ax)
    ordered = LOADINGS.sort_values()
    shown = pd.concat([ordered[:n], ordered[n:][-n:]])
    labels = names(ax.yaxis)
    drawn = [(labels[round(y)], bar.get_width()) for y, bar in zip(middles(ax), ax.patches, strict=True)]
    assert drawn == list(shown.items())
    assert colors(ax.patches) == signed(shown)


def test_score_histogram_has_a_row_a_class_of_one_height_from_the_top(ax):
    plotting.score_histogram(SCORES, LABELS, COLORS | {"No cells": "#88ccee"}, ax=ax)
    assert names(ax.yaxis) == {0: "Alpha", -1: "Beta", -2: "No cells"}
    assert colors(ax.patches) == [*COLORS.values(), "#88ccee"]
    for row, (name, patch) in enumerate(zip([*COLORS, "No cells"], ax.patches, strict=True)):
        tops, edges, base = patch.get_data()
        assert base == -row and (edges[0], edges[-1]) == (SCORES.min(), SCORES.max())
        expected, _ = np.histogram(SCORES[LABELS == name], edges)
        np.testing.assert_allclose((tops - base) * max(expected.max(), 1), 0.9 * expected, atol=1e-12)


def test_enrichment_draws_the_most_significant_sets_first_from_the_top(ax):
    plotting.enrichment(ENRICHED.sample(frac=1, random_state=0), 2, ax=ax)
    ax.figure.canvas.draw()
    widths = dict(zip(middles(ax), [bar.get_width() for bar in ax.patches], strict=True))
    labels = {y: " ".join(name.split()) for y, name in names(ax.yaxis).items()}  # long ones are broken into lines
    lower, upper = sorted(widths)
    assert widths[upper] == pytest.approx(-np.log10(3e-6)) and labels[round(upper)] == "insulin secretion"
    assert widths[lower] == pytest.approx(-np.log10(1.5e-3)) and labels[round(lower)] == ENRICHED["term"][1]
    assert {round(text.xy[1]): text.get_text().strip() for text in ax.texts} == {0: "4 of 30", 1: "8 of 12"}
    assert colors(sorted(ax.patches, key=lambda bar: bar.get_y())) == signed([-1, 1])


def test_enrichment_keeps_two_rows_of_one_set_apart(ax):
    table = pd.concat([ENRICHED.iloc[:1].assign(pole=pole, overlap=overlap) for pole, overlap in (("+", 8), ("-", 2))])
    plotting.enrichment(table, ax=ax)
    np.testing.assert_allclose(sorted(middles(ax)), [0, 1], atol=1e-9)
    np.testing.assert_allclose(sorted(text.xy[1] for text in ax.texts), [0, 1])


def test_shares_puts_points_at_the_values_of_the_table(ax):
    plotting.shares(SHARES, ax=ax)
    points = {artist.get_label(): artist for artist in ax.collections}
    for label, column in {"linear": "linear", "quadratic": "quadratic", "interaction, at most": "interaction"}.items():
        np.testing.assert_allclose(points[label].get_offsets(), np.c_[SHARES[column], [0, 1, 2]])
    assert names(ax.yaxis) == {0: "a", 1: "b", 2: "c"} and ax.get_xscale() == "log"
    assert ax.yaxis_inverted()  # the first output is on top


def test_shares_without_interaction_draws_the_rest(ax):
    plotting.shares(SHARES.assign(interaction=np.nan), ax=ax)
    assert "interaction, at most" not in {artist.get_label() for artist in ax.collections}
    line = ax.collections[0].get_segments()[1]  # from the quadratic to the linear share
    np.testing.assert_allclose(line, [[0.4, 1], [0.5, 1]])


def test_embedding_draws_every_cell_in_the_colour_of_its_label(ax):
    plotting.embedding(POINTS, LABELS, COLORS, ax=ax)
    for name, color in COLORS.items():
        cells, entry = (artist for artist in ax.collections if colors_of(artist) == {color})
        np.testing.assert_allclose(cells.get_offsets(), POINTS[LABELS == name])
        assert entry.get_label() == name and len(entry.get_offsets()) == 0


def test_by_output_draws_mean_and_standard_deviation(ax):
    plotting.by_output(SPLITS, ax=ax)
    lines = {container.get_label(): container for container in ax.containers}
    for name, table in SPLITS.items():
        line, _, (bars,) = lines[name]
        np.testing.assert_allclose(line.get_xydata(), np.c_[[0, 1], table.mean()])
        np.testing.assert_allclose([np.ptp(segment[:, 1]) for segment in bars.get_segments()], 2 * table.std())
    assert list(names(ax.xaxis).values()) == ["x", "y"] and ax.get_xlabel() == "frequency"
    assert {text.get_text() for text in ax.get_legend().get_texts()} == set(SPLITS)


def test_interactions_are_shaded_around_zero(ax):
    plotting.interactions(BETWEEN, ax=ax)
    mesh = ax.collections[0]
    np.testing.assert_allclose(np.ravel(mesh.get_array()), BETWEEN.to_numpy().ravel())
    assert mesh.get_clim() == (-2, 2)
    red, blue = mesh.cmap(1.0), mesh.cmap(0.0)
    assert red[0] > red[2] and blue[2] > blue[0]
    assert list(names(ax.yaxis).values()) == list("abc") and list(names(ax.xaxis).values()) == list("xy")


def test_dots_puts_a_marker_of_each_column_on_the_line_of_its_row(ax):
    plotting.dots(MISSING, ax=ax)
    points = {artist.get_label(): artist for artist in ax.collections[1:]}
    for name, column in MISSING.items():
        x, y = np.ma.filled(points[name].get_offsets(), np.nan).T
        np.testing.assert_allclose(x, column)
        np.testing.assert_allclose(y[~np.isnan(x)], np.flatnonzero(column.notna()))
    assert names(ax.yaxis) == {0: "a", 1: "b", 2: "c"} and ax.yaxis_inverted()
    np.testing.assert_allclose(ax.collections[0].get_segments()[1], [[0.2, 1], [0.5, 1]])
    assert len({to_hex(artist.get_facecolor()[0]) for artist in points.values()}) == 2


def test_dose_response_draws_means_with_their_95_percent_interval(ax):
    plotting.dose_response(CURVES, ax=ax)
    assert ax.get_xscale() == "log"
    lines = {container.get_label(): container for container in ax.containers}
    for name in ("drug", "other"):
        line, _, (bars,) = lines[name]
        np.testing.assert_allclose(line.get_xydata(), np.c_[[10, 1000], CURVES.loc[name, "effect"]])
        ends = [segment[:, 1] for segment in bars.get_segments()]
        np.testing.assert_allclose(np.ptp(ends, axis=1), 2 * 1.96 * CURVES.loc[name, "error"])
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"drug", "other"}


def test_heatmap_is_shaded_around_zero_and_leaves_missing_numbers_out(ax):
    plotting.heatmap(BETWEEN.mask(BETWEEN == 1.0).replace(0.0, -0.01), ax=ax)
    assert ax.collections[0].get_clim() == (-2, 2)
    assert [text.get_text() for text in ax.texts] == ["0.5", "-2.0", "0.0", "0.1", "0.2"]  # and no "-0.0"
    assert plotting.heatmap(BETWEEN, 5, ax=Figure().add_subplot()).collections[0].get_clim() == (-5, 5)


def test_strip_puts_every_value_on_the_line_of_its_group_and_colours_those_outside_the_band(ax):
    plotting.strip(GROUPS, 2.0, ax=ax)
    acts, silent = ax.collections[:2]
    for row, (artist, values) in enumerate(zip((acts, silent), GROUPS.values(), strict=True)):
        np.testing.assert_allclose(artist.get_offsets()[:, 0], values)
        assert np.abs(artist.get_offsets()[:, 1] - row).max() <= 0.2
    assert colors_of(acts) == {plotting.POSITIVE.lower()} and colors_of(silent) == {plotting.NEUTRAL.lower()}
    box = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    assert (box.x0, box.x1) == pytest.approx((-2, 2)) and list(names(ax.yaxis).values()) == list(GROUPS)


def test_modules_that_are_not_trusted_are_grey():
    table = pd.DataFrame(
        {"eigenvalue": [0.5, -0.1], "stability": [0.9, 0.3], "low": [0.8, 0.1], "gain_curved": [0.01, 0.01]},
        ["module_1", "module_2"],
    )
    html = plotting.trust(table.assign(trusted=[True, False])).to_html()
    grey = re.findall(r"#T_trust_row(\d)_col\d", html.split("<table")[0])
    assert set(grey) == {"1"} and len(grey) == 3, html
    assert "gain curved" in html and "-0.100" in html and "low" not in html.split("<table")[1]


def test_colours_of_a_column_are_those_that_the_cells_have():
    obs = pd.DataFrame({"kind": pd.Categorical(list("abca"), categories=list("abcd"))}, list("1234"))
    adata = AnnData(np.ones((4, 2)), obs)
    assert plotting.category_colors(adata, "kind") == dict(zip("abc", plotting.MUTED, strict=False))
    adata.uns["kind_colors"] = np.array(["#000000", "#111111", "#222222", "#333333"])
    assert plotting.category_colors(adata, "kind") == {"a": "#000000", "b": "#111111", "c": "#222222"}
    adata.uns["kind_colors"] = ["#000000"]  # of other categories
    assert plotting.category_colors(adata, "kind")["b"] == plotting.MUTED[1]
    with pytest.raises(KeyError, match="key='kin' is not a column"):
        plotting.category_colors(adata, "kin")


def test_names_in_a_trust_table_are_text():
    table = pd.DataFrame({"eigenvalue": [1.0], "trusted": [True]}, ["<b>"])
    assert "&lt;b&gt;" in plotting.trust(table).to_html() and "<b>" not in plotting.trust(table).to_html()
