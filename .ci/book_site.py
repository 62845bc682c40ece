"""What the pages of this book lack, and can do without: a Sphinx extension, and what Debian's chromium does after it.

As a program, this file sets the equations of a site, so that no reader's browser has to, and prints it all to one PDF.
"""

import html
import io
import re
import shutil
import subprocess
import sys
import textwrap
from os.path import dirname, join, normpath, relpath
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import yaml
from bs4 import BeautifulSoup
from docutils import nodes
from PIL import Image
from playwright.sync_api import sync_playwright
from pypdf import PdfWriter
from pypdf.generic import NameObject, TextStringObject
from sphinx.util.inspect import signature

ROOT = Path(__file__).resolve().parent.parent
PDF = "scbmlp.pdf"
CHROMIUM = shutil.which("chromium")  # no other browser is downloaded
# Scripts that draw the icons anew, which a font has drawn, or are for a button that is off and are there twice.
NEEDLESS = r'<script[^>]*(?:src="[^"]*/(?:fontawesome|sphinx-thebe)\.js[^>]*>|>const THEBE_JS_URL[^<]*)</script>'
# A script in the page sets options of the one that waits for nothing.
SCRIPT = r'<script (?=[^>]*\bsrc="(?![^"]*documentation_options))(?![^>]*\b(?:defer|async)\b)'
MATHJAX = r"<script[^>]*>window\.MathJax[^<]*</script>|<script[^>]*/mathjax/[^>]*></script>"
MATH = r'(<(span|div) class="math\b[^>]*>).*?(?=</\2>)'
STYLE = "[...document.getElementById('MJX-CHTML-styles').sheet.cssRules].map(rule => rule.cssText).join('\\n')"
IMAGE, POINTS = r'<img\b[^>]*\bsrc="[^"]*\b_images/([^"/]+\.(?:png|svg))"', r'\b(?:width|height)="([\d.]+)pt"'
DARK = '(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")'
# Tables that are wider than the page shrink to its width, and no image is missing.
FIT = """async () => {
  for (const image of document.images) image.loading = "eager";
  await Promise.all([document.fonts.ready, ...[...document.images].map(image => image.decode())]);
  for (const table of document.querySelectorAll("table")) {
    const room = table.parentElement.clientWidth;
    if (table.offsetWidth > room) table.style.zoom = room / table.offsetWidth;
  }
  return [...document.querySelectorAll("h1, h2, h3, h4, h5, h6, [role=heading]")].map(each => each.innerText);
}"""


def setup(app):
    from scbmlp.interactions import InteractionMatrix

    # The base, of another library, takes anything.
    InteractionMatrix.__signature__ = signature(InteractionMatrix.__init__, bound_method=True)
    app.connect("doctree-resolved", explain_terms)
    app.connect("html-page-context", mend_head, priority=900)
    app.connect("build-finished", mend_site, priority=900)  # the theme writes a style sheet in the end
    return {"parallel_read_safe": True}


def explain_terms(app, doctree, docname):
    """Show the first sentence of the glossary where a pointer rests on one of its words."""
    items = app.env.get_doctree("glossary").findall(nodes.definition_list_item)
    meanings = {item[0]["ids"][0]: item for item in items}
    for link in doctree.findall(nodes.reference):
        anchor = link.get("refuri", "").partition("#")[2]
        if docname != "glossary" and anchor in meanings:
            term, meaning = meanings[anchor]
            link["reftitle"] = f"{term.astext()}: {meaning.astext().partition('. ')[0].rstrip('.')}."


def mend_head(app, pagename, templatename, context, doctree):
    """Describe the page to search engines, and lead to the PDF."""
    paragraphs = doctree.findall(nodes.paragraph) if doctree else ()
    first = next((each.astext() for each in paragraphs if isinstance(each.parent, nodes.section)), "")
    text = html.escape(textwrap.shorten(first or f"{pagename}: {app.config.html_title}", 160, placeholder=" ..."))
    context["metatags"] = f'{context.get("metatags", "")}\n<meta name="description" content="{text}"/>'
    if CHROMIUM:
        button = {"type": "link", "icon": "fas fa-book", "tooltip": "The whole book as PDF", "label": "pdf-button"}
        context["header_buttons"].insert(0, button | {"url": context["pathto"](PDF, 1)})


def mend_site(app, exception):
    """Make pages lighter, keep room for their figures, and let the browser, if there is one, do its part."""
    if exception or app.builder.format != "html":
        return
    site, sizes = Path(app.outdir), {}
    for path in (site / "_images").glob("*.png"):
        with Image.open(path) as image:
            sizes[path.name] = image.size
            image.save(path.with_suffix(".webp"), lossless=True, method=3, quality=60)  # a third of the size
        path.unlink()
    for path in (site / "_images").glob("*.svg"):
        sizes[path.name] = [round(float(each) * 4 / 3) for each in re.findall(POINTS, path.read_text())]
    for page in site.rglob("*.html"):
        page.write_text(mended(page.read_text(), sizes))
    if CHROMIUM:
        # By itself: Playwright wants no event loop beside its own, and notebooks leave one behind.
        subprocess.run([sys.executable, __file__, site], check=True)


def mended(text, sizes):
    """Return a page whose figures have their room, and are read when a reader comes near them."""
    size = '{} width="{}" height="{}" loading="lazy"'
    text = re.sub(IMAGE, lambda match: size.format(match[0], *sizes[match[1]]), text)
    text = re.sub(r'(\b_images/[^"/]+)\.png"', r'\1.webp"', text)
    text = re.sub(SCRIPT, "<script defer ", re.sub(NEEDLESS, "", text))
    # Else the theme knows only after it has painted whether the reader likes it dark, and all moves.
    text = text.replace('getItem("theme") || "auto"', f'getItem("theme") || {DARK}')
    return text.replace("\N{WHITE HEAVY CHECK MARK}", "\N{CHECK MARK}")  # fonts have it, and so has the PDF


def typeset(site, browser):
    """Set the equations of all pages, and take MathJax out."""
    for path in site.rglob("*.html"):
        text, found = re.subn(MATHJAX, "", path.read_text())
        if not found:
            continue
        page = browser.new_page()
        page.goto(path.as_uri())
        page.evaluate("MathJax.startup.promise")
        each = iter(page.locator(".math").evaluate_all("all => all.map(math => math.innerHTML)"))
        style = page.evaluate(STYLE).replace(site.as_uri(), relpath(site, path.parent))
        page.close()
        text = re.sub(MATH, lambda start, each=each: start[1] + next(each), text, flags=re.S)
        text = text.replace('CHTML" display', 'CHTML" tabindex="0" display')  # a wide one scrolls, by keyboard too
        path.write_text(text.replace("</head>", f'<style class="equations">{style}</style>\n</head>', 1))


def anchor(page, name=""):
    """Return what a place on a page is called where all pages are one."""
    return f"{page}--{unquote(name)}".replace("/", "-")


def whole(site, pages):
    """Return one page of HTML with the articles of all, and their places, files and links as seen from it."""
    soups = [BeautifulSoup((site / f"{page}.html").read_text(), "html.parser") for page in pages]
    articles = [soup.article.extract() for soup in soups]
    for article, page in zip(articles, pages, strict=True):
        for tag in article.find_all(id=True):
            tag["id"] = anchor(page, tag["id"])
        for style in article.find_all("style"):
            style.string = style.text.replace("#T_", f"#{anchor(page, 'T_')}")  # as pandas calls its tables
        for tag in article.find_all(src=True):
            tag["src"] = tag["src"].removeprefix("../")
        for link in article.find_all("a", href=True):
            target, name = urldefrag(link["href"])
            file = normpath(join(dirname(page), unquote(target))).removesuffix(".html") if target else page
            if file in pages:
                link["href"] = "#" + anchor(file, name)
            elif not urlsplit(target).scheme:
                del link["href"]  # such as the index of names, which is not printed
        article["id"] = anchor(page)
    book = soups[0]
    articles[0].h1.insert_after("This is the whole book on paper. Code that its pages fold is left out here.")
    book.html["data-theme"] = book.html["data-mode"] = "light"
    for script in book.find_all("script"):
        script.decompose()
    for style in (style for soup in soups[1:] for style in soup.select("head style.equations")):
        style.string = style.text.replace('"../_static', '"./_static')
        book.head.append(style)
    book.body.clear()
    book.body.extend(articles)
    return str(book)


def flat(outline):
    """Return the entries of an outline, in their order."""
    return [each for item in outline for each in (flat(item) if isinstance(item, list) else [item])]


def write(site, browser):
    """Print the site to its file."""
    source = site / "_whole.html"
    source.write_text(whole(site, re.findall(r"\b(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text())))
    page = browser.new_page(viewport={"width": 822, "height": 1160}, color_scheme="light")
    page.emulate_media(media="print")
    page.goto(source.as_uri())
    headings = page.evaluate(FIT)
    printed = page.pdf(
        **dict.fromkeys(["outline", "tagged", "print_background", "display_header_footer"], True),
        format="A4",
        margin=dict.fromkeys(["top", "right", "bottom", "left"], "18mm"),
        scale=0.8,
        header_template="<span></span>",
        footer_template='<div class="pageNumber" style="font-size: 8px; text-align: center; width: 100%"></div>',
    )
    source.unlink()
    pdf = PdfWriter(clone_from=io.BytesIO(printed))
    # Chromium spells a heading twice, or without its blanks, where it goes on in the next line.
    for entry, heading in zip(flat(pdf.outline), headings, strict=True):
        entry.node[NameObject("/Title")] = TextStringObject(heading)
    # No dates, so that the same site is the same file.
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    pdf.metadata = {"/Title": config["title"], "/Author": config["author"]}
    pdf.write(site / PDF)


if __name__ == "__main__":
    site = Path(sys.argv[1]).resolve()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        typeset(site, browser)
        write(site, browser)
        browser.close()
