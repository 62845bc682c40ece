"""A Sphinx extension of this book: what its pages would have and should not, what they lack, and the book as PDF."""

import html
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import book_browser
import book_styles
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
    app.connect("html-page-context", link_pdf, priority=900)
    app.connect("build-finished", mend_pages)
    app.connect("build-finished", gather_styles, priority=800)  # the theme writes one of them in the end
    app.connect("build-finished", browse, priority=900)
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
        _, _, anchor = link.get("refuri", "").partition("#")
        if docname != "glossary" and anchor in meanings:
            term, meaning = meanings[anchor]
            link["reftitle"] = f"{term.astext()}: {meaning.astext().partition('. ')[0].rstrip('.')}."


def mend_head(app, pagename, templatename, context, doctree):
    """Describe the page to search engines, and let no script hold up its text."""
    if pagename == app.config.root_doc:
        context["docstitle"] = None  # its title is that of the book
    paragraphs = doctree.findall(nodes.paragraph) if doctree else []
    first = next((each.astext() for each in paragraphs if isinstance(each.parent, nodes.section)), "")
    text = first or f"{LISTS.get(pagename, context.get('title'))} of the book: {app.config.html_title}"
    text = html.escape(textwrap.shorten(text, 160, placeholder=" ..."))
    context["metatags"] = f'{context.get("metatags", "")}\n<meta name="description" content="{text}"/>'
    # Jupyter Book adds thebe twice to every page, which is an error, for a button that is off.
    context["script_files"] = [script for script in context["script_files"] if "thebe" not in tag(script)]
    for script in context["script_files"]:
        # A script in the page sets options of the one that is left out here, which becomes a part of the page.
        if getattr(script, "filename", None) and "documentation_options" not in script.filename:
            script.attributes["defer"] = "defer"


def tag(script):
    return f"{getattr(script, 'filename', script)} {getattr(script, 'attributes', {}).get('body')}".lower()


def show_own_arguments(app, what, name, obj, options, arguments, returned):
    """Show what a class takes where a base of another library takes anything."""
    if what == "class" and arguments == "(*args, **kwargs)":
        own = signature(obj.__init__, bound_method=True)
        arguments = stringify_signature(own, show_return_annotation=False, unqualified_typehints=True)
    return arguments, returned


def link_pdf(app, pagename, templatename, context, doctree):
    """Lead to the PDF from every page, if there is what it takes to print one."""
    if book_browser.CHROMIUM:
        button = {"type": "link", "icon": "fas fa-book", "tooltip": "The whole book as PDF", "label": "pdf-button"}
        context["header_buttons"].insert(0, button | {"url": context["pathto"](book_browser.NAME, 1)})


def mend_pages(app, exception):
    """Make pages lighter, and keep room for each figure, which is read when a reader comes near it."""
    if exception or app.builder.format != "html":
        return
    site, sizes = Path(app.outdir), {}
    for path in site.glob("_images/*"):
        if path.suffix == ".png":  # lossless, at a third of the size
            with Image.open(path) as image:
                sizes[path.name] = image.size
                image.save(path.with_suffix(".webp"), lossless=True, method=3, quality=60)
            path.unlink()
        elif path.suffix == ".svg":
            points = re.findall(r'\b(?:width|height)="([\d.]+)pt"', path.read_text())
            sizes[path.name] = [float(each) * 4 / 3 for each in points]

    def sized(match):
        size = ' width="{:.0f}" height="{:.0f}"'.format(*sizes[match[1]]) if match[1] in sizes else ""
        return f'{match[0]}{size} loading="lazy"'

    options = (site / "_static" / "documentation_options.js").read_text()
    for page in site.rglob("*.html"):
        text = page.read_text()
        text = re.sub(r'(<script) src="[^"]*documentation_options[^"]*">', lambda found: f"{found[1]}>{options}", text)
        text = re.sub(r'<img\b[^>]*\bsrc="[^"]*\b_images/([^"/]+)"', sized, text)
        text = re.sub(r'(\b_images/[^"/]+)\.png"', r'\1.webp"', text)
        # Draws the icons anew, which a font has drawn: half of the weight of a page.
        text = re.sub(r'<script defer src="[^"]*/fontawesome\.js[^"]*"></script>', "", text)
        text = re.sub(r'<script (src="[^"]*(?:searchtools|language_data|searchindex)\.js)', r"<script defer \1", text)
        # Else the theme knows only after it has painted whether the reader likes it dark, and all moves.
        text = text.replace('getItem("theme") || "auto"', f'getItem("theme") || {DARK}')
        text = text.replace("\N{WHITE HEAVY CHECK MARK}", "\N{CHECK MARK}")  # fonts have it, and so has the PDF
        page.write_text(text)


def gather_styles(app, exception):
    """Link every page to one style sheet."""
    if not exception and app.builder.format == "html":
        book_styles.gather(Path(app.outdir))


def browse(app, exception):
    """Set the equations and print the book, if there is a browser."""
    if not exception and app.builder.format == "html" and book_browser.CHROMIUM:
        # By itself: Playwright wants no event loop beside its own, and notebooks leave one behind.
        subprocess.run([sys.executable, book_browser.__file__, app.outdir], check=True)
