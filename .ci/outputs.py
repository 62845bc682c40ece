"""Store what the checked cells of the chapters printed in the last build, which has to be of simulated cells."""

from pathlib import Path

import nbformat

for path in Path("chapters").glob("*.ipynb"):
    notebook, ran, count = nbformat.read(path, 4), nbformat.read("_build/jupyter_execute" / path, 4), 0
    for cell, new in zip(notebook.cells, ran.cells, strict=True):
        if cell.cell_type == "code":
            checked = "nbval-check-output" in cell.metadata.get("tags", [])
            count += checked
            # nbval lets a cell without a count pass unseen
            cell.outputs, cell.execution_count = (new.outputs, count) if checked else ([], None)
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
    nbformat.write(notebook, path)
