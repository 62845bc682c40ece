"""What nbval cannot see: that there is something to compare, and that comparing it has teeth."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = {path.stem: nbformat.read(path, as_version=4) for path in sorted((ROOT / "chapters").glob("*.ipynb"))}
PAGES = "\n".join(path.read_text() for path in ROOT.glob("*.md"))
CHECKED = "nbval-check-output"
TAGS = {CHECKED, "hide-cell", "hide-input", "remove-cell", "readme-figure", "parameters"}


@pytest.fixture(params=CHAPTERS)
def name(request):
    return request.param


def cells(name, kind="code"):
    return [cell for cell in CHAPTERS[name].cells if cell.cell_type == kind]


def tags(cell):
    return set(cell.metadata.get("tags", []))


def test_chapters_of_the_book_are_the_notebooks_there_are():
    listed = re.findall(r"file: chapters/(\w+)", (ROOT / "_toc.yml").read_text())
    assert sorted(listed) == list(CHAPTERS)
    shipped = ROOT / "scbmlp" / "templates" / "your_cells.ipynb"
    assert (ROOT / "chapters" / "your_cells.ipynb").resolve() == shipped


def test_only_checked_cells_have_outputs_and_those_are_text(name):
    checked = [cell for cell in cells(name) if CHECKED in tags(cell)]
    assert checked
    # nbval compares nothing, and passes, where there is no execution count.
    assert all(cell.outputs and cell.execution_count for cell in checked)
    assert not any(cell.outputs or cell.execution_count for cell in cells(name) if CHECKED not in tags(cell))
    for output in (output for cell in checked for output in cell.outputs):
        assert output.output_type != "error"
        assert not any(kind.startswith("image/") for kind in output.get("data", {}))


def test_tags_are_known(name):
    assert set().union(*map(tags, cells(name))) <= TAGS


def test_figures_have_captions_and_alternative_text(name):
    figures = [cell for cell in cells(name) if re.search(r"subplots?(_mosaic)?\(", cell.source)]
    assert figures
    for cell in figures:
        if "glue(" not in cell.source:  # else shown elsewhere, with a caption and :alt: there
            assert cell.metadata["mystnb"]["figure"]["caption"]
            assert cell.metadata["mystnb"]["image"]["alt"]
    for cell in CHAPTERS[name].cells:
        assert cell.source.count("{glue:figure}") == cell.source.count(":alt:")


def test_labels_are_unique_over_the_book():
    text = PAGES + "".join(map(nbformat.writes, CHAPTERS.values()))
    labels = re.findall(r"\$\$ \((eq-[\w-]+)\)", text) + re.findall(r'"name": "(fig-[\w-]+)"', text)
    assert len(labels) > 20 and len(labels) == len(set(labels))


def test_no_number_in_prose_is_typed(name):
    typed = re.compile(r"(?<![\w{`$.\\=-])(0\.\d{2,}|\d{1,3}(\.\d+)?\s?%)")
    lines = [line for cell in cells(name, "markdown") for line in cell.source.split("\n")]
    assert [line for line in lines if typed.search(line)] == []


def glued_in(code):
    """Return the names that code glues as keywords, and those in the strings of the older way."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    calls = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "glue"]
    names = [keyword.arg for call in calls for keyword in call.keywords if keyword.arg]
    named = [call.args[0].value for call in calls if call.args and isinstance(call.args[0], ast.Constant)]
    return {*names, *" ".join(named).split()}


def test_glued_names_in_prose_are_glued_by_the_code(name):
    code, prose = ("\n".join(cell.source for cell in cells(name, kind)) for kind in ("code", "markdown"))
    glued = glued_in(code)
    used = set(re.findall(r"\{glue:text\}`(\w+)`", prose))
    used |= set(re.findall(rf"chapters/{name}\.ipynb::(\w+)", PAGES))
    used |= set(re.findall(rf"\{{glue\}} (\w+)\n:doc: chapters/{name}\.ipynb\n", PAGES))
    # A page that is also run outside of the book prints its sentences.
    assert used == glued and (used or "Markdown(" in code)


def run_nbval(notebook, path):
    nbformat.write(notebook, path)
    options = ["--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider", "-q"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, path], cwd=path.parent, capture_output=True, text=True
    )


def test_nbval_fails_on_a_changed_number(tmp_path):
    cell = nbformat.v4.new_code_cell("print(12)", execution_count=1, metadata={"tags": [CHECKED]})
    cell.outputs = [nbformat.v4.new_output("stream", text="12\n")]
    page = nbformat.v4.new_notebook(cells=[cell], metadata=CHAPTERS[min(CHAPTERS)].metadata)
    assert run_nbval(page, tmp_path / "as_stored.ipynb").returncode == 0
    cell.outputs[0].text = "13\n"
    result = run_nbval(page, tmp_path / "changed.ipynb")
    assert result.returncode == 1
    assert "1 failed" in result.stdout and "mismatch" in result.stdout
