"""Is what objects show of themselves short, and is every text of it text?"""

import base64
import html
import io
import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.figure import Figure

from scbmlp.display import Picture, as_html, listed, watched


def test_of_many_names_a_few_are_shown():
    assert listed("abc") == "a, b, c" and listed(range(5)) == "0, 1, 2, 3, 4"
    assert listed(range(2006)) == "0, 1, 2, 3, 4 and 2,001 more" and listed([]) == ""


def test_every_text_is_escaped():
    table = pd.DataFrame({"<column>": ["<cell>", 1 / 3]}, ["<row>", "b"])
    page = as_html({"<name>": "<value>", "n": 3}, "<title>", table)
    for text in ("column", "cell", "row", "name", "value", "title"):
        assert f"&lt;{text}&gt;" in page and f"<{text}>" not in page
    assert ">0.333<" in page and "<strong>" not in as_html({"n": 3})


@pytest.mark.parametrize(("terminal", "session", "expected"), [(0, 0, False), (1, 0, True), (0, 1, True)])
def test_a_page_that_is_built_is_not_watched(monkeypatch, terminal, session, expected):
    monkeypatch.setattr("sys.stderr.isatty", lambda: bool(terminal), raising=False)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    if session:
        monkeypatch.setenv("JPY_SESSION_NAME", "own.ipynb")
    assert watched() is expected


def test_picture_brings_its_description_and_is_sharp():
    figure = Figure(figsize=(2, 1), dpi=50)
    page = Picture(figure, 'a "b" <c>')._repr_html_()
    data, alt, width = re.fullmatch('<img src="data:image/png;base64,(.*)" alt="(.*)" width="(.*)">', page).groups()
    assert html.unescape(alt) == 'a "b" <c>' and "<c>" not in alt and width == "100"
    assert plt.imread(io.BytesIO(base64.b64decode(data))).shape[:2] == (100, 200)
