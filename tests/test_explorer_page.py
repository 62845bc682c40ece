"""The explorer as its readers meet it: by keyboard, by a link, on a phone, in the dark, in print, without a script."""

import re

import pytest

from scbmlp.explorer import explorer
from scbmlp.plotting import NEGATIVE, POSITIVE
from tests.test_explorer import HOSTILE, enriched, hostile, modules  # noqa: F401
from tests.test_site import CHROMIUM, PHONE, opened, serious

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed; on Debian: apt-get install chromium")


@pytest.fixture(scope="module")
def url(modules, sets, enriched, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("page") / "modules.html"
    explorer(modules, sets[2], enriched=enriched).save(path)
    return path.as_uri()


@pytest.fixture
def visit(browser):
    """Open pages that have to do without problems."""
    pages = []

    def open_page(url):
        pages.append(page := opened(browser, url))
        page.on("dialog", lambda dialog: page.problems.append(dialog.message))
        return page

    yield open_page
    for page in pages:
        assert page.problems == []
        page.close()


@pytest.fixture
def page(visit, url):
    return visit(url)


def heads(page):
    """The modules that are shown, in order."""
    return page.locator("tbody th:visible").all_inner_texts()


def details(page):
    return page.locator(".detail:visible").all_inner_texts()


def address(page):
    return page.evaluate("location.href")  # page.url lags behind


def test_a_keyboard_is_enough(page, modules):  # noqa: F811
    assert len(heads(page)) == 24 and not details(page)
    page.keyboard.press("Tab")
    page.keyboard.type("Ins1")
    found = heads(page)
    have = [{*one.top_genes(k, 20).index, *one.top_genes(k, 20, pole="-").index}
            for one in modules.values() for k in range(3)]  # fmt: skip
    assert 0 < len(found) < 24 and len(found) == sum(any("ins1" in gene.lower() for gene in genes) for genes in have)
    assert page.get_by_role("status").inner_text() == f"{len(found)} of 24 modules."
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    assert {name.split(",")[0] for name in heads(page)} <= {next(iter(modules))}
    page.keyboard.press("ArrowUp")
    for _ in range(6):  # the link, four columns that sort, the first row
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == found[0] and len(details(page)) == 1
    assert page.locator(":focus").get_attribute("aria-expanded") == "true"
    assert "ins1" in page.locator(".detail .hit").first.inner_text().lower()
    page.keyboard.press("Enter")
    assert not details(page)


def test_search_reads_gene_sets_and_outputs(page, enriched):  # noqa: F811
    hits = enriched.loc[enriched["q"] < 0.05, ["output", "module"]]
    hits = {f"{output}, {module.removeprefix('module_')}" for output, module in hits.to_numpy()}
    for typed, expected in (("  a PROGRAM of cells ", hits), ("beta, 2", {"Beta, 2"}), ("nothing", set())):
        page.get_by_role("searchbox").fill(typed)
        assert {*heads(page)} == expected


def test_columns_sort_both_ways_with_the_unknown_last(page, modules, enriched):  # noqa: F811
    given = heads(page)
    values = {f"{name}, {k}": v for name, one in modules.items() for k, v in enumerate(one.eigenvalues, 1)}
    sort = page.get_by_role("button", name="Eigenvalue")
    for order in (1, -1):
        sort.click()
        assert heads(page) == sorted(given, key=lambda name: order * values[name])
    assert page.locator("[aria-sort=descending]").inner_text() == "Eigenvalue"
    page.get_by_role("button", name="Gene set").click()
    best = enriched[enriched["q"] < 0.05].groupby(["output", "module"])["q"].min().sort_values()
    own = [f"{output}, {module.removeprefix('module_')}" for output, module in best.index]
    assert {*heads(page)[: len(own)]} == {*own} and heads(page)[0] == own[0]
    page.get_by_role("button", name="Module").click()
    assert heads(page) == given


def test_the_address_carries_the_view(page, visit, url):
    assert address(page) == url
    page.get_by_role("searchbox").fill(" s")
    page.get_by_role("combobox").select_option(label="Beta")
    for _ in range(2):
        page.get_by_role("button", name="Eigenvalue").click()
    for opener in page.locator("tbody button:visible").all()[:2]:
        opener.click()
    view = address(page).removeprefix(url)
    assert re.fullmatch(r"#explorer:find=s&output=Beta&sort=-eigenvalue&open=\d+\+\d+", view)
    assert page.get_by_role("link").get_attribute("href") == view and len(details(page)) == 2
    other = visit(url + view)
    assert heads(other) == heads(page) and details(other) == details(page)
    other.evaluate("location.hash = '#explorer:output=Ngn3+low+EP&open=99'")
    other.wait_for_function("document.querySelector('select').value === 'Ngn3 low EP'")
    assert len(heads(other)) == 3 and not details(other)
    other.evaluate("location.hash = '#somewhere'")  # of the page, and none of ours
    other.wait_for_timeout(50)
    assert len(heads(other)) == 3 and address(other).endswith("#somewhere")
    other.evaluate("location.hash = '#explorer:output=Gamma&sort=size&open=x'")
    other.wait_for_function("document.querySelector('select').value === ''")
    assert len(heads(other)) == 24


def luminance(color):
    """Relative luminance, of WCAG 2, of a colour as a browser computes it: rgb(0 to 255), or color(srgb 0 to 1)."""
    values = [float(value) for value in re.findall(r"[\d.]+", color)[:3]]
    values = [value / 255 for value in values] if color.startswith("rgb") else values
    parts = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nobody_is_kept_out(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.locator("tbody button").first.click()
    page.get_by_role("searchbox").fill("a")
    ground = luminance("rgb(255, 255, 255)" if scheme == "light" else "rgb(18, 18, 18)")
    for pole, color in (("positive", POSITIVE), ("negative", NEGATIVE)):
        style = "bar => getComputedStyle(bar, '::after').backgroundColor"
        shown = page.locator(f".{pole} li").first.evaluate(style)
        light, dark = sorted([ground, luminance(shown)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3, shown
        assert scheme == "dark" or shown == "rgb" + str(tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)))
    assert serious(page) == []


def test_a_phone_does_not_scroll_sideways(page):
    page.set_viewport_size(PHONE)
    page.locator("tbody button").first.click()
    right = "all => Math.max(...all.map(each => each.getBoundingClientRect().right))"
    assert page.locator("section *").evaluate_all(right) <= 390
    assert page.evaluate("document.documentElement.scrollWidth") == 390 and len(details(page)) == 1


def test_print_has_all_modules_and_no_controls(page):
    page.get_by_role("searchbox").fill("nothing")
    page.emulate_media(media="print")
    assert len(heads(page)) == 24 and not page.get_by_role("searchbox").is_visible()


def test_without_a_script_all_is_open(browser, url):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(url)
    assert len(heads(page)) == len(details(page)) == 24
    assert page.locator("select:visible, input:visible, button:enabled").count() == 0
    context.close()


def test_several_of_one_page_keep_apart(visit, modules, sets, tmp_path):  # noqa: F811
    html = explorer(modules, sets[2])._repr_html_()
    (tmp_path / "page.html").write_text(f"<!DOCTYPE html>{html}{html}<p id=end>", "utf-8")
    page = visit((tmp_path / "page.html").as_uri())
    page.locator("#explorer-2 select").select_option(label="Beta")
    assert address(page).endswith("#explorer-2:output=Beta")
    for _ in range(2):
        assert [page.locator(f"{one} tbody:visible").count() for one in ("#explorer", "#explorer-2")] == [24, 3]
        page.reload()


def test_names_that_look_like_markup_are_shown_as_they_are(visit, tmp_path):
    hostile().save(tmp_path / "page.html")
    page = visit((tmp_path / "page.html").as_uri())
    page.get_by_role("combobox").select_option(label=HOSTILE[0])
    page.get_by_role("searchbox").fill(HOSTILE[5])
    page.get_by_role("button", name=f"{HOSTILE[0]}, 1").click()
    page.reload()
    assert heads(page) == [f"{HOSTILE[0]}, {k}" for k in (1, 2)] and HOSTILE[6] in details(page)[0]
    assert page.locator("img, b").count() == 0
