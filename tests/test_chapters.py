"""What nbval cannot see: that there is something to compare, and that comparing it has teeth."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
CHECKED = "nbval-check-output"
TAGS = {CHECKED, "hide-cell", "hide-input", "remove-cell", "readme-figure", "parameters"}


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem)
def chapter(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(chapter):
    return [cell for cell in chapter.cells if cell.cell_type == "code"]


def tags(cell):
    return set(cell.metadata.get("tags", []))


def test_chapters_of_the_book_are_the_notebooks_there_are():
    listed = re.findall(r"file: (chapters/\w+)", (ROOT / "_toc.yml").read_text())
    assert sorted(listed) == [f"chapters/{path.stem}" for path in CHAPTERS]


def test_page_on_own_cells_is_the_one_that_the_package_ships():
    assert (ROOT / "chapters" / "your_cells.ipynb").resolve() == ROOT / "scbmlp" / "templates" / "your_cells.ipynb"


def test_checked_cells_have_outputs_and_no_other_cell_has(chapter):
    checked = [cell for cell in code_cells(chapter) if CHECKED in tags(cell)]
    assert checked
    # nbval compares nothing, and passes, where there is no execution count.
    assert all(cell.outputs and cell.execution_count for cell in checked)
    assert not any(cell.outputs or cell.execution_count for cell in code_cells(chapter) if CHECKED not in tags(cell))


def test_stored_outputs_are_text_without_errors(chapter):
    for output in (output for cell in code_cells(chapter) for output in cell.outputs):
        assert output.output_type != "error"
        assert not any(kind.startswith("image/") for kind in output.get("data", {}))


def test_tags_are_known(chapter):
    assert set().union(*map(tags, code_cells(chapter))) <= TAGS


def test_figures_have_captions_and_alternative_text(chapter):
    figures = [cell for cell in code_cells(chapter) if re.search(r"subplots?(_mosaic)?\(", cell.source)]
    assert figures
    for cell in figures:
        if "glue(" in cell.source:  # shown elsewhere, with a caption and :alt: there
            continue
        assert cell.metadata["mystnb"]["figure"]["caption"]
        assert cell.metadata["mystnb"]["image"]["alt"]
    for cell in chapter.cells:
        assert cell.source.count("{glue:figure}") == cell.source.count(":alt:")


def test_labels_are_unique_over_the_book():
    text = "".join(path.read_text() for path in [*CHAPTERS, *ROOT.glob("*.md")])
    labels = re.findall(r"\$\$ \((eq-[\w-]+)\)", text) + re.findall(r'"name": "(fig-[\w-]+)"', text)
    assert len(labels) > 20 and len(labels) == len(set(labels))


def test_no_number_in_prose_is_typed(chapter):
    prose = [cell.source for cell in chapter.cells if cell.cell_type == "markdown"]
    typed = re.compile(r"(?<![\w{`$.\\=-])(0\.\d{2,}|\d{1,3}(\.\d+)?\s?%)")
    assert [line for text in prose for line in text.split("\n") if typed.search(line)] == []


def test_glued_names_in_prose_are_glued_by_the_code(chapter, request):
    code = "\n".join(cell.source for cell in code_cells(chapter))
    glued = set(" ".join(re.findall(r'glue\(\s*"([\w ]+)"', code)).split())
    prose = "\n".join(cell.source for cell in chapter.cells if cell.cell_type == "markdown")
    used = set(re.findall(r"\{glue:text\}`(\w+)`", prose))
    page = request.node.callspec.params["chapter"].name
    others = "".join(path.read_text() for path in ROOT.glob("*.md"))
    used |= set(re.findall(rf"chapters/{page}::(\w+)", others))
    used |= set(re.findall(rf"\{{glue\}} (\w+)\n:doc: chapters/{page}\n", others))
    # A page that is also run outside of the book prints its sentences.
    assert used == glued and (used or "Markdown(" in code)


def run_nbval(notebook, path):
    nbformat.write(notebook, path)
    options = ["--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider", "-q"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, path], cwd=path.parent, capture_output=True, text=True
    )


def test_nbval_fails_on_a_changed_number(tmp_path, monkeypatch):
    monkeypatch.setenv("SCBMLP_DATA_SOURCE", "simulated")
    chapter = nbformat.read(CHAPTERS[0], as_version=4)
    first = next(i for i, cell in enumerate(chapter.cells) if CHECKED in tags(cell))
    chapter.cells = chapter.cells[: first + 1]
    assert run_nbval(chapter, tmp_path / "as_stored.ipynb").returncode == 0

    changed = copy.deepcopy(chapter)
    stored = changed.cells[first].outputs[0]
    digit = re.search(r"\d", stored.text)
    stored.text = stored.text[: digit.start()] + str((int(digit[0]) + 1) % 10) + stored.text[digit.end() :]
    result = run_nbval(changed, tmp_path / "changed.ipynb")
    assert result.returncode == 1
    assert "1 failed" in result.stdout and "mismatch" in result.stdout
