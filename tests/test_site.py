"""The built site as its readers meet it: from disk, without a network, on a desk, on a phone, in the dark, on paper."""

import copy
import re
import shutil
import unicodedata
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

from tests.test_project import CONFIG, ROOT, wrong_addresses

bs4 = pytest.importorskip("bs4")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
pypdf = pytest.importorskip("pypdf")

SITE = ROOT / "_build" / "html"
PAGES = sorted(path for path in SITE.rglob("*.html") if "_static" not in path.parts)
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(not PAGES, reason="there is no built site; run make book first"),
    pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed; on Debian: apt-get install chromium"),
]
DESK, PHONE = {"width": 1300, "height": 900}, {"width": 390, "height": 844}
HOME = {"file", "data", "blob"}
# Rules of axe-core whose findings are the theme's and cannot be mended by style.
ACCEPTED = {}


def opened(browser, url):
    """Open a page, and note in `problems` what a reader without a network would miss."""
    page = browser.new_page(viewport=DESK, color_scheme="light")
    page.problems, page.loaded = [], set()
    page.on("console", lambda message: message.type in {"error", "warning"} and page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("requestfinished", lambda request: page.loaded.add(urlsplit(request.url)[:3]))
    page.on("requestfailed", lambda request: page.problems.append(f"failed: {request.url}"))
    page.on(
        "request",
        lambda request: urlsplit(request.url).scheme in HOME or page.problems.append(f"outside: {request.url}"),
    )
    page.goto(url)
    page.evaluate("window.MathJax?.startup?.promise")
    # Pictures are read when a reader comes near them; all of them, here and now.
    page.evaluate("document.querySelectorAll('img').forEach(image => { image.loading = 'eager'; })")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    return page


@pytest.fixture(scope="module", params=PAGES, ids=lambda path: path.relative_to(SITE).with_suffix("").as_posix())
def page(browser, request):
    page = opened(browser, request.param.as_uri())
    yield page
    page.close()


def test_page_is_light_and_its_icons_are_of_a_font(page):
    """With all that it loads, uncompressed, and all pictures."""
    sizes = {path: Path(unquote(path)).stat().st_size for scheme, _, path in page.loaded if scheme == "file"}
    assert sum(sizes.values()) < 3e6, sorted(sizes.items(), key=lambda item: -item[1])[:5]
    assert any("fa-solid" in path for path in sizes) and not any("fontawesome.js" in path for path in sizes)


def test_equations_are_rendered(page):
    missing = "all => all.filter(math => !math.querySelector('mjx-container')).map(math => math.textContent)"
    assert page.locator(".math").evaluate_all(missing) == []
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
    # They fill the line, so that they stand in its middle, and their number at its end.
    narrow = "all => all.filter(e => e.querySelector('mjx-container').clientWidth < 0.75 * e.clientWidth).length"
    assert page.locator("div.math").evaluate_all(narrow) == 0


def test_images_are_loaded_and_described(page):
    bad = "all => all.filter(image => !image.naturalWidth || {}).map(image => image.outerHTML)"
    assert page.locator("img").evaluate_all(bad.format("false")) == []
    assert page.locator("article img").evaluate_all(bad.format("!image.alt.trim()")) == []


def test_folds_and_tabs_open(page):
    click = "all => all.forEach(each => each.click())"
    page.locator("article details:not([open]) > summary").evaluate_all(click)
    page.locator("article .toggle-hidden > .admonition-title").evaluate_all(click)
    assert page.locator("article details:not([open]), article .toggle-hidden").count() == 0
    for tab in page.locator("article .sd-tab-label").all():
        tab.click()
        assert tab.locator("+ .sd-tab-content").is_visible()


def test_phone_does_not_scroll_sideways(page):
    page.set_viewport_size(PHONE)
    width = page.evaluate("document.documentElement.scrollWidth")
    wide = "all => all.filter(e => e.getBoundingClientRect().right > 391).slice(0, 5).map(e => e.outerHTML)"
    assert width <= PHONE["width"], page.locator("article *").evaluate_all(wide)
    page.set_viewport_size(DESK)


def serious(page):
    """Findings of axe-core that keep somebody out, a line each."""
    # Without preload: reading style sheets from disk would be an error of its own.
    found = axe.Axe().run(page, options={"preload": False}).response["violations"]
    return [
        f"{rule['id']}: {node['html'][:120]} {node['any'][0]['message'] if node['any'] else ''}"
        for rule in found
        if rule["impact"] in {"serious", "critical"} and rule["id"] not in ACCEPTED
        for node in rule["nodes"]
    ]


def test_nobody_is_kept_out(page):
    assert serious(page) == []


def test_dark_theme_survives_a_reload_and_is_legible(page):
    theme = "document.documentElement.dataset.theme"
    for _ in range(3):  # automatic, light, dark
        if page.evaluate(theme) != "dark":
            mode = page.evaluate("document.documentElement.dataset.mode")
            page.locator(".theme-switch-button:visible").first.click()
            page.wait_for_function(f"document.documentElement.dataset.mode !== '{mode}'")
    page.reload()
    page.evaluate("window.MathJax?.startup?.promise")
    assert page.evaluate(theme) == "dark"
    assert serious(page) == []


def test_nothing_was_missed(page):
    assert page.problems == []


def test_equations_need_no_script(browser):
    page = browser.new_page(java_script_enabled=False)
    page.goto((SITE / "method.html").as_uri())
    assert page.locator(".math").count() == page.locator(".math > mjx-container").count() > 50
    fonts = "() => document.fonts.ready.then(fonts => [...fonts].map(font => `${font.family} ${font.status}`))"
    assert "MJXTEX-I loaded" in page.evaluate(fonts)
    page.close()


def test_citation_can_be_copied(browser):
    page = opened(browser, (SITE / "index.html").as_uri())
    assert page.locator("#how-to-cite .highlight button.copybtn").count() == 1
    page.close()


def test_search_finds_a_gene_in_its_chapter(browser):
    page = opened(browser, (SITE / "search.html").as_uri() + "?q=Neurog3")
    page.locator("#search-results a[href*='chapters/cell_type.html']").first.wait_for()
    assert page.problems == []
    page.close()


def test_modules_can_be_explored_and_the_view_sent_to_others(browser):
    page = opened(browser, (SITE / "chapters" / "cell_type.html").as_uri())
    page.locator("#explorer select").select_option(label="Beta")
    page.locator("#explorer input").fill("a")
    page.locator("#explorer tbody button:visible").first.click()
    assert page.locator("#explorer .detail:visible li").count() == 40
    view = page.evaluate("location.href")
    assert re.search(r"#explorer:find=a&output=Beta&open=\d+$", view)
    other = opened(browser, view)
    for part in ("[role=status]", "tbody:visible"):
        at = f"#explorer {part}"
        assert other.locator(at).all_inner_texts() == page.locator(at).all_inner_texts(), part
    assert page.problems == other.problems == []
    page.close()
    other.close()


@cache
def soup(path):
    """Read a page, which is not to be changed."""
    return bs4.BeautifulSoup(path.read_text(), "html.parser")


def test_memory_of_every_page_is_told_and_bounded():
    """Binder gives 2 GB. Pages stay below on one thread; another processor may need a little more."""
    (table,) = soup(SITE / "status.html").select("#memory table")
    held = [float(row.find_all("td")[-1].text.removesuffix(" GB")) for row in table.select("tbody tr")]
    assert len(held) == 7 and 0.3 < min(held) and max(held) < 2.5


def test_words_of_the_glossary_explain_themselves():
    words = soup(SITE / "chapters" / "cell_type.html").select("a[href*='glossary.html#term-']")
    assert len(words) > 8 and all(word["title"].endswith(".") for word in words)
    assert words[0]["title"].startswith("bilinear MLP: A network that multiplies two linear maps")


def test_every_internal_link_and_anchor_resolves():
    anchors = {path: {tag["id"] for tag in soup(path).find_all(id=True)} for path in PAGES}
    broken = []
    for path in PAGES:
        for tag in soup(path).find_all(["a", "img", "link", "script", "source"]):
            link = tag.get("href") or tag.get("src")
            if not link or urlsplit(link).scheme:
                continue
            target, anchor = urldefrag(link)
            file = (path.parent / unquote(urlsplit(target).path)).resolve() if target else path
            if not file.is_file() or (anchor and unquote(anchor) not in anchors.get(file, {unquote(anchor)})):
                broken.append(f"{path.relative_to(SITE)}: {link}")
    assert broken == []


def test_buttons_lead_to_the_repository_of_the_configuration():
    links = [tag["href"] for path in PAGES for tag in soup(path).select(".bd-header-article a[href^=http]")]
    assert bool(links) == bool(CONFIG["repository"]["url"])
    assert wrong_addresses("\n".join(path.read_text() for path in PAGES)) == []


def test_every_page_says_what_it_is():
    pages = [soup(path) for path in PAGES]
    assert all(page.html["lang"] == "en" for page in pages)
    titles = [page.title.text for page in pages]
    descriptions = [page.select_one("meta[name=description]")["content"] for page in pages]
    for what in (titles, descriptions):
        assert len(set(what)) == len(pages) and all(what), what


@pytest.fixture(scope="module")
def pdf():
    return pypdf.PdfReader(SITE / "scbmlp.pdf")


def flat(outline):
    return [each for item in outline for each in (flat(item) if isinstance(item, list) else [item])]


def test_pdf_is_linked_from_every_page():
    for path in PAGES:
        links = [tag["href"] for tag in soup(path).select("a[href$='scbmlp.pdf']")]
        assert [(path.parent / link).resolve() for link in links] == [SITE / "scbmlp.pdf"], path.name


def test_pdf_has_every_chapter_and_section_in_its_order(pdf):
    index = soup(SITE / "index.html")
    order = [SITE / "index.html", *(SITE / tag["href"] for tag in index.select(".bd-links a[href]"))]
    headings = [
        tag.text.removesuffix("#") for path in order for tag in soup(path).article.select("h1, h2, h3, [role=heading]")
    ]
    assert len(order) > 10
    assert [item.title for item in flat(pdf.outline)] == headings
    pages = [pdf.get_destination_page_number(item) for item in flat(pdf.outline)]
    assert pages == sorted(pages)


def words(text):
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text))


def test_pdf_has_captions_equations_and_every_tab(pdf):
    text = words("".join(page.extract_text() for page in pdf.pages))
    for path in PAGES:
        html = copy.copy(soup(path))
        for each in html.select("figcaption :is(.math, .headerlink)"):
            each.replace_with("|")
        for part in html.select("article :is(figcaption .caption-text, .sd-tab-label)"):
            assert [piece for piece in part.text.split("|") if words(piece) not in text] == []
    assert str(ROOT) not in text
    assert words("y = P((Lx + b_l) ⊙ (Rx + b_r)) + b_p") in text


def test_links_of_the_pdf_lead_to_places_in_it_or_to_the_web(pdf):
    links = [note.get_object() for page in pdf.pages for note in page.get("/Annots", [])]
    outside = [link["/A"]["/URI"] for link in links if "/A" in link]
    inside = {link["/Dest"] for link in links if "/A" not in link}
    assert [uri for uri in outside if not uri.startswith("https://")] == []
    assert len(links) > 300
    assert inside - set(pdf.named_destinations) == set()
    assert (pdf.metadata.title, pdf.metadata.author) == (CONFIG["title"], CONFIG["author"])
    written = (SITE / "scbmlp.pdf").read_bytes()
    assert b"file:" not in written and str(ROOT).encode() not in written and b"Date" not in written
