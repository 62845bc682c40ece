"""What a browser does for the built site: python .ci/book_browser.py [_build/html].

Debian's chromium sets the equations, so that no reader's browser has to, and prints the site to one PDF, in the order
of _toc.yml. For that all pages become one, and links among them links inside the PDF.
"""

import io
import logging
import re
import shutil
import sys
from pathlib import Path
from posixpath import dirname, join, normpath
from urllib.parse import unquote, urldefrag, urlsplit

ROOT = Path(__file__).resolve().parent.parent
NAME = "scbmlp.pdf"
CHROMIUM = shutil.which("chromium")  # no other browser is downloaded
MATHJAX = re.compile(r"<script[^>]*>window\.MathJax[^<]*</script>|<script[^>]*/mathjax/[^>]*></script>")
# Equations as MathJax leaves them, and the style they need. Its menu goes, which would need the script; a wide equation
# scrolls, so that a keyboard must still reach it.
SET = """async () => {
  await MathJax.startup.promise;
  for (const each of document.querySelectorAll("mjx-container")) {
    each.removeAttribute("ctxtmenu_counter");
    each.classList.remove("CtxtMenu_Attached_0");
    if (!each.hasAttribute("display")) each.removeAttribute("tabindex");
  }
  return {
    set: [...document.querySelectorAll(".math")].map(each => each.innerHTML),
    style: [...document.getElementById("MJX-CHTML-styles").sheet.cssRules].map(rule => rule.cssText).join("\\n"),
  };
}"""
# Tables that are wider than the page shrink to its width, and no image is missing.
FIT = """async () => {
  await document.fonts.ready;
  const missing = [...document.images].filter(image => !image.naturalWidth).map(image => image.alt);
  if (missing.length) throw new Error(`images are missing: ${missing.join("; ")}`);
  for (const table of document.querySelectorAll("table")) {
    const room = table.parentElement.clientWidth;
    if (table.offsetWidth > room) table.style.zoom = room / table.offsetWidth;
  }
  return [...document.querySelectorAll("h1, h2, h3, h4, h5, h6, [role=heading]")].map(each => each.innerText);
}"""
PAPER = dict.fromkeys(["outline", "tagged", "print_background", "display_header_footer"], True) | {
    "format": "A4",
    "margin": dict.fromkeys(["top", "right", "bottom", "left"], "18mm"),
    "scale": 0.8,
    "header_template": "<span></span>",
    "footer_template": '<div class="pageNumber" style="font-size: 8px; text-align: center; width: 100%"></div>',
}
NOTE = "This is the whole book on paper. Code that its pages fold is left out here."


def typeset(site, browser):
    """Set the equations of all pages, and take MathJax out."""
    for path in site.rglob("*.html"):
        text = path.read_text()
        if len(MATHJAX.findall(text)) != 2:
            continue
        page = browser.new_page()
        page.goto(path.as_uri())
        found = page.evaluate(SET)
        page.close()
        # Where fonts are, as seen from this page.
        style = found["style"].replace(site.as_uri(), "/".join([".."] * (len(path.relative_to(site).parts) - 1)) or ".")
        text = MATHJAX.sub("", text).replace("</head>", f'<style class="equations">{style}</style>\n</head>', 1)
        parts = re.split(r'(<(span|div) class="math\b[^>]*>)(.*?)(?=</\2>)', text, flags=re.S)
        parts[2::4], parts[3::4] = [""] * len(found["set"]), found["set"]
        path.write_text("".join(parts))


def anchor(page, name=""):
    """Return what a place on a page is called where all pages are one."""
    return "--".join([page.replace("/", "-"), *filter(None, [unquote(name)])])


def move(article, page, pages):
    """Mend what an article names, its own places, files and links, for the one page at the root of the site."""
    names = {tag["id"]: anchor(page, tag["id"]) for tag in article.find_all(id=True)}
    for tag in article.find_all(id=True):
        tag["id"] = names[tag["id"]]
    for style in article.find_all("style"):
        style.string = re.sub(r"(?<=#)[\w-]+", lambda match: names.get(match[0], match[0]), style.text)
    for image in article.find_all(loading=True):
        del image["loading"]  # nobody comes near it
    for tag in article.find_all(src=True):
        if not urlsplit(tag["src"]).scheme:  # else it brings its data along
            tag["src"] = normpath(join(dirname(page), tag["src"]))
    for link in article.find_all("a", href=True):
        target, name = urldefrag(link["href"])
        file = normpath(join(dirname(page), unquote(target))).removesuffix(".html") if target else page
        if file in pages:
            link["href"] = "#" + anchor(file, name)
        elif not urlsplit(target).scheme:
            del link["href"]  # such as the index of names, which is not printed
    article["id"] = anchor(page)


def whole(site, pages):
    """Return one page of HTML with the articles of all."""
    import bs4

    book, *others = (bs4.BeautifulSoup((site / f"{page}.html").read_text(), "html.parser") for page in pages)
    articles = [part.article.extract() for part in (book, *others)]
    for article, page in zip(articles, pages, strict=True):
        move(article, page, pages)
    articles[0].h1.insert_after(bs4.BeautifulSoup(f"<p>{NOTE}</p>", "html.parser"))
    book.html["data-theme"] = book.html["data-mode"] = "light"
    for script in book.find_all("script"):
        script.decompose()
    for style in (style for part in others for style in part.select("head style.equations")):
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
    import yaml
    from pypdf import PdfWriter
    from pypdf.generic import NameObject, TextStringObject

    source = site / "_whole.html"
    source.write_text(whole(site, re.findall(r"\b(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text())))
    try:
        page = browser.new_page(viewport={"width": 822, "height": 1160}, color_scheme="light")
        page.emulate_media(media="print")
        page.goto(source.as_uri())
        headings = page.evaluate(FIT)
        printed = page.pdf(**PAPER)
    finally:
        source.unlink()
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it counts objects otherwise than chromium
    pdf = PdfWriter(clone_from=io.BytesIO(printed))
    # Chromium spells a heading twice, or without its blanks, where it goes on in the next line.
    for entry, heading in zip(flat(pdf.outline), headings, strict=True):
        entry.node[NameObject("/Title")] = TextStringObject(heading)
    # No dates, so that the same site is the same file.
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    pdf.metadata = {"/Title": config["title"], "/Author": config["author"]}
    pdf.write(site / NAME)
    print(f"{site / NAME}: {len(pdf.pages)} pages")


if __name__ == "__main__":
    from playwright.sync_api import sync_playwright

    site = Path(*sys.argv[1:] or [ROOT / "_build" / "html"]).resolve()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        typeset(site, browser)
        write(site, browser)
        browser.close()
