"""One style sheet for the pages of a site, of what they use, with a font of the icons that they show.

The theme brings all of Bootstrap and two thousand icons, and on a phone nothing is painted before they are there.
"""

import hashlib
import re
from io import BytesIO
from posixpath import dirname, join, normpath

import tinycss2
from fontTools import subset, ttLib

SHEET = re.compile(r'\s*<link (?=[^>]*rel="stylesheet")[^>]*href="[^"]*?_static/([^"?]+)[^>]*>')
LINK = re.compile(r"""url\((["']?)(?!["']?data:)([^"')?#]+)\1\)""")
FONT = re.compile(r"url\(([^)]*)\.woff2\) format\(.woff2.\),url\(\1\.ttf\) format\(.truetype.\)")
WORD = re.compile(r"[\w-]+")
MADE = ("bs-", "kind-", "mjx-")  # names that scripts, and MathJax after this, put together out of parts


def gather(site):
    """Link every page of a site to one sheet, in place of those it links to."""
    pages = {path: path.read_text() for path in site.rglob("*.html") if "_static" not in path.parts}
    static = site / "_static"
    scripts = [path.read_text() for path in static.rglob("*.js") if "mathjax" not in path.parts]
    words = set(WORD.findall(" ".join([*pages.values(), *scripts])))
    written = {}
    for path, text in pages.items():
        files = tuple(SHEET.findall(text))
        if files not in written:
            written[files] = write(static, "".join(used(read(static, file), words) for file in files))
        first, up = SHEET.search(text).start(), "../" * (len(path.relative_to(site).parts) - 1)
        link = f'\n<link rel="stylesheet" href="{up}_static/{written[files]}" />'
        path.write_text(text[:first] + link + SHEET.sub("", text[first:]))


def read(static, file):
    """Return a sheet with those that it imports, and its links as seen from the folder of all."""
    text = LINK.sub(lambda match: f"url({beside(file, match[2])})", (static / file).read_text())
    return re.sub(r'@import "([^"]+)";', lambda match: read(static, beside(file, match[1])), text)


def beside(file, link):
    return normpath(join(dirname(file), link))


def used(text, words):
    """Return what of a sheet may be about a page with these words: a rule with a name that is not among them is not."""
    return "".join(kept(tinycss2.parse_stylesheet(text, True, True), words))


def kept(rules, words):
    for rule in rules:
        if rule.type == "qualified-rule":
            wanted = [one for one in selectors(rule.prelude) if names(one) <= words]
            if wanted:
                text = ",".join(tinycss2.serialize(one).strip() for one in wanted)
                yield f"{text}{{{tinycss2.serialize(rule.content).strip()}}}\n"
        elif rule.type == "at-rule" and rule.lower_at_keyword in {"media", "supports", "layer"} and rule.content:
            inner = "".join(kept(tinycss2.parse_rule_list(rule.content, True, True), words))
            if inner:
                yield f"@{rule.at_keyword}{tinycss2.serialize(rule.prelude)}{{{inner}}}\n"
        elif rule.type == "at-rule":
            yield rule.serialize() + "\n"
        elif rule.type == "error":
            raise ValueError(f"a style sheet cannot be read: {rule.message}")


def selectors(prelude):
    """Return the selectors of a rule, each a list of tokens."""
    found = [[]]
    for token in prelude:
        if token.type == "literal" and token.value == ",":
            found.append([])
        else:
            found[-1].append(token)
    return found


def names(selector):
    """Return the tags, classes and ids that an element must have, but for what is in brackets, and states."""
    found, before = set(), None
    for token in selector:
        if token.type == "hash" or (token.type == "ident" and before != ":"):
            found.add(token.value)
        before = token.value if token.type == "literal" else None
    return {name for name in found if not name.startswith(MADE)}


def write(static, style):
    """Write a sheet, and the fonts of its icons, and return its name."""
    icons = {ord(sign) for sign in style if "\ue000" <= sign <= "\uf8ff"}

    def smaller(match):
        font = ttLib.TTFont(static / f"{match[1]}.ttf")
        only = subset.Subsetter(subset.Options(layout_features=[], notdef_outline=True))
        only.populate(unicodes=icons)
        only.subset(font)
        font.flavor, data = "woff", BytesIO()
        font.save(data)
        name = f"{hashlib.sha256(data.getvalue()).hexdigest()[:12]}.woff"
        (static / name).write_bytes(data.getvalue())
        return f"url({name}) format('woff')"

    style = '@charset "utf-8";\n' + FONT.sub(smaller, style)
    name = f"book-{hashlib.sha256(style.encode()).hexdigest()[:12]}.css"
    (static / name).write_text(style)
    return name
