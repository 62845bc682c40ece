"""The explorer as its readers meet it: by keyboard, by a link, on a phone, in the dark, in print, without a script."""

import re

import pytest

from scbmlp.enrichment import enrich
from scbmlp.explorer import explorer
from scbmlp.modules import gene_modules
from scbmlp.plotting import NEGATIVE, POSITIVE
from tests.test_explorer import HOSTILE, hostile
from tests.test_site import CHROMIUM, PHONE, opened, serious

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed; on Debian: apt-get install chromium")
VIEW = "#explorer:output=Beta&module=2&gene=Ins1"


@pytest.fixture(scope="module")
def modules(classifier, sets):
    return {name: gene_modules(classifier, name, 3) for name in sets[2].output_names}


@pytest.fixture(scope="module")
def url(cells, modules, sets, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "modules.html"
    programs = {name: list(genes) for name, genes in cells.uns["truth"]["programs"].items()}
    explorer(modules, sets[2], enriched=enrich(modules, programs)).save(path)
    return path.as_uri()


@pytest.fixture
def visit(browser):
    """Open pages that have to do without problems."""
    pages = []

    def open_page(url):
        page = opened(browser, url)
        page.on("dialog", lambda dialog: page.problems.append(dialog.message))
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        assert page.problems == []
        page.close()


@pytest.fixture
def page(visit, url):
    return visit(url)


def address(page):
    return page.evaluate("location.href")  # page.url lags behind


def number(text):
    return float(text.replace("−", "-"))


def select(page, name):
    return page.get_by_role("combobox", name=name, exact=True)


def rows(page, table):
    """Texts of a table, a list a row; of the first cell the words alone."""
    texts = "all => all.map(row => [...row.cells].map(cell => (cell.querySelector('.words') ?? cell).textContent))"
    return page.locator(f"{table} tbody tr").evaluate_all(texts)


def genes(page, pole):
    return [name for name, _ in rows(page, f".genes.{pole}")]


def shows(page, modules, output, module):
    """Say whether all of the page is about one module of one output."""
    one, sign = modules[output], {"positive": "+", "negative": "-"}
    words = f"{output}, module {module} pushes {output} {'up' if one.eigenvalues.iloc[module - 1] > 0 else 'down'}"
    chosen = [select(page, name).locator("option:checked").inner_text() for name in ("Output", "Module")]
    assert page.locator(".headline").inner_text().startswith(words)
    assert chosen[0] == output and chosen[1].startswith(f"{module}, ")
    for pole in sign:
        assert genes(page, pole) == list(one.top_genes(module - 1, 20, pole=sign[pole]).index)
    return True


def test_a_keyboard_is_enough(page, modules):
    first, second = list(modules)[:2]
    assert shows(page, modules, first, 1)
    before = rows(page, ".scores"), rows(page, ".sets")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    assert shows(page, modules, second, 1) and before != (rows(page, ".scores"), rows(page, ".sets"))
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    assert shows(page, modules, second, 2)
    page.keyboard.press("Tab")
    page.keyboard.type("ins1")
    places = rows(page, ".found")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    output, module = places[0][0].split(", module ")
    assert shows(page, modules, output, int(module)) and "Ins1" in page.locator("mark").all_inner_texts()
    # The button is drawn anew, and the keyboard is not lost with it.
    assert page.evaluate("document.activeElement.className") == "headline"


def test_a_gene_is_found_in_every_module_that_has_it(page, modules):
    page.get_by_label("Find a gene").fill(" INS1 ")
    expected = {}
    for output, one in modules.items():
        for k, name in enumerate(one.loadings):
            loading = one.loadings[name]
            place = {"positive": (loading > loading["Ins1"]).sum(), "negative": (loading < loading["Ins1"]).sum()}
            for pole, rank in place.items():
                if rank < 20:
                    expected[f"{output}, module {k + 1}"] = [pole, str(rank + 1), loading["Ins1"]]
    found = {name: values for name, *values in rows(page, ".found")}
    assert len(expected) > 1 and found.keys() == expected.keys()
    for name, (pole, rank, loading) in expected.items():
        assert found[name][:2] == [pole, rank]
        assert number(found[name][2]) == pytest.approx(loading, abs=0.006)
    assert page.locator(".answer").inner_text() == f"Ins1: in {len(expected)} modules."
    page.get_by_label("Find a gene").fill("nothing")
    assert "nothing is not among" in page.locator(".answer").inner_text() and not page.locator(".found").is_visible()
    page.get_by_label("Find a gene").fill("in")
    page.get_by_role("button", name="Ins1", exact=True).click()
    assert rows(page, ".found")[0][0] in expected


def test_the_table_of_all_modules_leads_to_each(page, modules):
    page.locator("summary").click()
    for output, module in (("Beta", 3), ("Ductal", 2)):
        sign = "up" if modules[output].eigenvalues.iloc[module - 1] > 0 else "down"
        page.get_by_role("button", name=f"{output}, {module}, pushes {sign}", exact=True).click()
        assert shows(page, modules, output, module) and "output=" + output in address(page)


def test_the_address_carries_the_view(page, visit, url, modules):
    assert address(page) == url
    select(page, "Output").select_option(label="Beta")
    select(page, "Module").select_option(index=1)
    page.get_by_label("Find a gene").fill("ins1")
    assert address(page) == url + VIEW and page.get_by_role("link").get_attribute("href") == VIEW
    other = visit(url + VIEW)
    assert shows(other, modules, "Beta", 2) and other.get_by_label("Find a gene").input_value() == "Ins1"
    for table in (".found", ".scores", ".sets"):
        assert rows(other, table) == rows(page, table)
    other.evaluate("location.hash = '#explorer:output=Ngn3+low+EP&module=3'")
    other.wait_for_function("document.querySelector('.headline').textContent.startsWith('Ngn3 low EP, module 3')")
    other.evaluate("location.hash = '#somewhere'")  # of the page, and none of ours
    other.wait_for_timeout(50)
    assert shows(other, modules, "Ngn3 low EP", 3) and address(other).endswith("#somewhere")
    for wrong in ("output=Gamma&module=2", "output=Beta&module=9", "output=Beta&module=x", ""):
        other.evaluate("hash => location.hash = hash", f"#explorer:{wrong}")
        output = "Beta" if "Beta" in wrong else next(iter(modules))
        other.wait_for_function(f"document.querySelector('.headline').textContent.startsWith('{output}, module')")
        assert shows(other, modules, output, 2 if "Gamma" in wrong else 1)


def test_numbers_stand_beside_every_picture(page, modules, sets):
    scores = modules["Beta"].scores(sets[2])["module_1"]
    own = scores[(sets[2].output_names.to_numpy()[sets[2].y] == "Alpha")]
    select(page, "Output").select_option(label="Beta")
    (row,) = [row for row in rows(page, ".scores") if row[0].startswith("Alpha")]
    assert row[0] == f"Alpha {len(own)}"
    assert [number(text) for text in row[1:]] == pytest.approx([own.mean(), *own.quantile([0.25, 0.5, 0.75])], abs=0.06)
    size = "all => all.map(bar => parseFloat(getComputedStyle(bar, '::before').width))"
    widths = page.locator(".genes.positive .bar").evaluate_all(size)
    loadings = modules["Beta"].top_genes(0, 20)
    assert [width / widths[0] for width in widths] == pytest.approx(list(loadings / loadings.iloc[0]), abs=0.02)
    lines = set()
    for output, one in modules.items():
        select(page, "Output").select_option(label=output)
        scores = one.scores(sets[2]).groupby(sets[2].y.numpy()).quantile([0.05, 0.95])
        for k, name in enumerate(scores):
            select(page, "Module").select_option(index=k)
            low, high = scores[name].min(), scores[name].max()
            lines.add((page.locator(".zero").count(), low <= 0, high >= 0))
    assert lines == {(0, False, True), (8, True, True), (0, True, False)}
    select(page, "Output").select_option(label="Beta")
    left = "all => all.map(e => e.getBoundingClientRect()).map(r => (r.left + r.right) / 2)"
    means = [number(text[1]) for text in rows(page, ".scores")]
    centres = page.locator(".scores .mean").evaluate_all(left)
    assert sorted(range(8), key=means.__getitem__) == sorted(range(8), key=centres.__getitem__)


def luminance(color):
    """Relative luminance, of WCAG 2, of a colour as a browser computes it: rgb(0 to 255), or color(srgb 0 to 1)."""
    values = [float(value) for value in re.findall(r"[\d.]+", color)[:3]]
    values = [value / 255 for value in values] if color.startswith("rgb") else values
    parts = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nobody_is_kept_out(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto(page.url + VIEW)
    page.locator("summary").click()
    ground = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (ground < 0.5) == (scheme == "dark")
    for pole, color in (("positive", POSITIVE), ("negative", NEGATIVE)):
        style = "bar => getComputedStyle(bar, '::before').backgroundColor"
        shown = page.locator(f".{pole} .bar").first.evaluate(style)
        light, dark = sorted([ground, luminance(shown)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3, shown
        assert scheme == "dark" or shown == "rgb" + str(tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)))
    assert serious(page) == []
    assert page.get_by_role("status").count() == 2
    assert all(select(page, name).is_visible() for name in ("Output", "Module"))


def test_a_phone_does_not_scroll_sideways(page):
    page.set_viewport_size(PHONE)
    page.goto(page.url + VIEW)
    page.locator("summary").click()
    right = "all => Math.max(...all.map(each => each.getBoundingClientRect().right))"
    assert page.locator("section *").evaluate_all(right) <= 390
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_without_a_script_there_is_a_table_of_all_modules(browser, url, modules):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(url)
    table = page.locator("table:visible")
    assert table.count() == 1 and page.locator("select:visible, input:visible, button:visible").count() == 0
    assert table.locator("tbody tr").count() == 8 * 4
    assert ", ".join(modules["Beta"].top_genes(0, 8).index) in table.inner_text()
    context.close()


def test_print_has_the_table_of_all_modules(page):
    assert not page.locator(".modules").is_visible()
    page.evaluate("window.addEventListener('beforeprint', () => window.open_ = document.querySelector('.all').open)")
    page.pdf()
    assert page.evaluate("window.open_") is True and not page.locator(".modules").is_visible()
    page.emulate_media(media="print")
    assert not select(page, "Output").is_visible() and page.locator(".scores").is_visible()


def test_several_of_one_page_keep_apart(visit, modules, sets, tmp_path):
    one, two = explorer(modules, sets[2]), explorer(modules, sets[2], name="other")
    path = tmp_path / "page.html"
    path.write_text(f"<!DOCTYPE html>{one._repr_html_()}{two._repr_html_()}{one._repr_html_()}<p id=end>", "utf-8")
    page = visit(path.as_uri())
    ids = "all => all.map(each => each.id)"
    assert page.locator("section").evaluate_all(ids) == ["explorer", "other", "explorer-2"]
    assert page.locator("[id]").count() == 3 * 2 + 1  # and a list of genes each
    page.locator("#explorer-2 [name=output]").select_option(label="Beta")
    assert address(page).endswith("#explorer-2:output=Beta&module=1")
    for _ in range(2):
        shown = [text.split(",")[0] for text in page.locator(".headline").all_inner_texts()]
        assert shown == ["Ductal", "Ductal", "Beta"]
        page.reload()


def test_names_that_look_like_markup_are_shown_as_they_are(visit, tmp_path):
    hostile().save(tmp_path / "page.html")
    page = visit((tmp_path / "page.html").as_uri())
    assert {*genes(page, "positive"), *genes(page, "negative")} == {*HOSTILE}
    assert select(page, "Output").locator("option").all_inner_texts() == [HOSTILE[0], HOSTILE[3]]
    select(page, "Output").select_option(label=HOSTILE[3])
    page.get_by_label("Find a gene").fill(HOSTILE[5])
    page.reload()
    assert page.locator(".headline").inner_text().startswith(f"{HOSTILE[3]}, module 1")
    assert page.locator(".answer").inner_text() == f"{HOSTILE[5]}: in 4 modules."
    assert page.locator("img, b").count() == 0
