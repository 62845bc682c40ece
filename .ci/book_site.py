"""A Sphinx extension of this book: what its pages lack, what they can do without, and the book as PDF."""

import html
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import book_browser
from docutils import nodes
from PIL import Image
from sphinx.util.inspect import signature, stringify_signature

# Pages without a text of their own.
LISTS = {"genindex": "All names", "py-modindex": "All modules", "search": "Search in the pages"}
DARK = '(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")'


def setup(app):
    app.connect("config-inited", set_buttons)
    app.connect("doctree-resolved", explain_terms)
    app.connect("autodoc-process-signature", show_own_arguments)
    app.connect("html-page-context", mend_head, priority=900)
    app.connect("build-finished", mend_site, priority=900)  # the theme writes a style sheet in the end
    return {"parallel_read_safe": True}


def set_buttons(app, config):
    """Lead to a public repository if `_config.yml` names one, else nowhere."""
    public = bool(config.html_theme_options.get("repository_url"))
    config.html_theme_options |= {"use_repository_button": public, "use_issues_button": public}
    if not public:
        config.html_theme_options.pop("launch_buttons", None)


def explain_terms(app, doctree, docname):
    """Show the first sentence of the glossary where a pointer rests on one of its words."""
    items = app.env.get_doctree("glossary").findall(nodes.definition_list_item)
    meanings = {item[0]["ids"][0]: item for item in items}
    for link in doctree.findall(nodes.reference):
        anchor = link.get("refuri", "").partition("#")[2]
        if docname != "glossary" and anchor in meanings:
            term, meaning = meanings[anchor]
            link["reftitle"] = f"{term.astext()}: {meaning.astext().partition('. ')[0].rstrip('.')}."


def show_own_arguments(app, what, name, obj, options, arguments, returned):
    """Show what a class takes where a base of another library takes anything."""
    if what == "class" and arguments == "(*args, **kwargs)":
        own = signature(obj.__init__, bound_method=True)
        arguments = stringify_signature(own, show_return_annotation=False, unqualified_typehints=True)
    return arguments, returned


def mend_head(app, pagename, templatename, context, doctree):
    """Describe the page to search engines, let no script hold up its text, and lead to the PDF."""
    if pagename == app.config.root_doc:
        context["docstitle"] = None  # its title is that of the book
    paragraphs = doctree.findall(nodes.paragraph) if doctree else []
    first = next((each.astext() for each in paragraphs if isinstance(each.parent, nodes.section)), "")
    text = first or f"{LISTS.get(pagename, context.get('title'))} of the book: {app.config.html_title}"
    text = html.escape(textwrap.shorten(text, 160, placeholder=" ..."))
    context["metatags"] = f'{context.get("metatags", "")}\n<meta name="description" content="{text}"/>'
    # Jupyter Book adds thebe twice to every page, which is an error, for a button that is off.
    context["script_files"] = [script for script in context["script_files"] if "thebe" not in str(script).lower()]
    for script in context["script_files"]:
        # A script in the page sets options of the one that is left out here.
        if script.filename and "documentation_options" not in script.filename:
            script.attributes["defer"] = "defer"
    if book_browser.CHROMIUM:
        button = {"type": "link", "icon": "fas fa-book", "tooltip": "The whole book as PDF", "label": "pdf-button"}
        context["header_buttons"].insert(0, button | {"url": context["pathto"](book_browser.NAME, 1)})


def mend_site(app, exception):
    """Make pages lighter, keep room for their figures, and let the browser, if there is one, do its part."""
    if exception or app.builder.format != "html":
        return
    site = Path(app.outdir)
    sizes = lighter_images(site / "_images")
    for page in site.rglob("*.html"):
        page.write_text(mended(page.read_text(), sizes))
    if book_browser.CHROMIUM:
        # By itself: Playwright wants no event loop beside its own, and notebooks leave one behind.
        subprocess.run([sys.executable, book_browser.__file__, site], check=True)


def lighter_images(folder):
    """Turn PNG into WebP, lossless and at a third of the size, and return the width and height of each image."""
    sizes = {}
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            sizes[path.name] = image.size
            image.save(path.with_suffix(".webp"), lossless=True, method=3, quality=60)
        path.unlink()
    for path in folder.glob("*.svg"):
        points = re.findall(r'\b(?:width|height)="([\d.]+)pt"', path.read_text())
        sizes[path.name] = [float(each) * 4 / 3 for each in points]
    return sizes


def mended(text, sizes):
    """Return a page whose figures have their room, and are read when a reader comes near them."""

    def sized(match):
        size = ' width="{:.0f}" height="{:.0f}"'.format(*sizes[match[1]]) if match[1] in sizes else ""
        return f'{match[0]}{size} loading="lazy"'

    text = re.sub(r'<img\b[^>]*\bsrc="[^"]*\b_images/([^"/]+)"', sized, text)
    text = re.sub(r'(\b_images/[^"/]+)\.png"', r'\1.webp"', text)
    # Draws the icons anew, which a font has drawn: half of the weight of a page.
    text = re.sub(r'<script defer src="[^"]*/fontawesome\.js[^"]*"></script>', "", text)
    text = re.sub(r'<script (src="[^"]*(?:searchtools|language_data|searchindex)\.js)', r"<script defer \1", text)
    # Else the theme knows only after it has painted whether the reader likes it dark, and all moves.
    text = text.replace('getItem("theme") || "auto"', f'getItem("theme") || {DARK}')
    return text.replace("\N{WHITE HEAVY CHECK MARK}", "\N{CHECK MARK}")  # fonts have it, and so has the PDF
