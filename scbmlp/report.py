"""A report on cells of your own: one page, one notebook and the cells with their modules, by one command."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.figure import Figure
from tqdm import tqdm

from scbmlp.plotting import category_colors, plain, score_histogram
from scbmlp.preparing import MOST_GENES, N_GENES, SAID, Cells, paths_of, prepare
from scbmlp.storage import writable

TEMPLATES = Path(__file__).with_name("templates")
FILES = ("report.html", "report.ipynb", "cells.h5ad", "model.safetensors")
HIDDEN = ["remove-cell", "book-only", "parameters"]  # the command says the last, without paths


def report(
    cells: AnnData | str | Path,
    out: str | Path = "report",
    *,
    quick: bool = False,
    force: bool = False,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Make the book's chapter on your own cells of cells of yours, checked before, and return the path of its page.

    Parameters
    ----------
    cells
        Path of an h5ad file, or AnnData, which is not changed.
    out
        Folder to write the page to, its notebook, the model, and ``cells.h5ad``, the cells with their modules.
    quick, force
        Two replicas and 99 permutations, for a first look, in place of 8 and 999; replace a report that is there.
    progress
        Show the step and the time left, in a terminal.
    options
        As :func:`prepare` takes them: one of ``class_key``, ``target_key`` and ``perturbation_key`` is needed.

    Raises
    ------
    RuntimeError
        A step of the notebook failed; what was complete by then is kept in the folder, and named.

    Examples
    --------
    >>> report.report(adata, class_key="label")  # runs a notebook # doctest: +SKIP
    """
    out = Path(out).expanduser()
    there = [name for name in FILES if (out / name).exists()]
    if there and not force:
        raise ValueError(f"out={str(out)!r} has {', '.join(there)} already; name another folder, or force=True.")
    try:
        import nbconvert  # noqa: F401
    except ModuleNotFoundError as error:
        words = f"a report takes {error.name}, which is not installed: pip install 'scbmlp[report]'."
        raise ModuleNotFoundError(words, name=error.name) from error
    known = signature(prepare).parameters
    options = {name: known[name].default for name in known if name != "cells"} | options
    options["control"] = None if options["control"] is None else str(options["control"])
    options["gene_sets"] = [str(path.expanduser().resolve()) for path in paths_of(options["gene_sets"])] or None
    options["no_normalize"] = options["no_normalize"] or None
    found = prepare(cells, **options)
    in_memory = isinstance(cells, AnnData)
    name = "AnnData in memory" if in_memory else Path(cells).name
    options["quick"] = quick or None
    with _workshop(out) as folder:
        path = folder / "in_memory.h5ad" if in_memory else Path(cells).expanduser().resolve()
        try:  # now, and not after all fits
            _rehearse(found, folder)
            if in_memory:
                cells, words = writable(cells)
                if words:
                    cells.uns[SAID] = words
                cells.write_h5ad(path)
        except Exception as error:  # h5py, anndata and matplotlib raise many kinds
            raise ValueError(f"cells={name!r} cannot be written or drawn; mend what is named: {error}") from error
        del found  # the notebook reads the cells again
        parameters = {"path": str(path), **options, "folder": str(folder), "command": _command(name, options)}
        try:
            target = options["class_key"] or options["target_key"] or options["perturbation_key"]
            _run(folder, parameters, f"{name}: {target}", progress)
        except (RuntimeError, OSError) as error:
            kept = _keep(folder, out / "stopped" if there else out)
            raise RuntimeError(f"{error}{kept and '; '}{kept}") from None
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_keep(folder, out / "stopped" if there else out)) from None
        _keep(folder, out)
    return out / FILES[0]


def _rehearse(cells: Cells, folder: Path) -> None:
    """Write the tables of cells with results of the names to come, and draw their labels, as the notebook will."""
    adata, names = cells.adata, cells.train.output_names
    trial = AnnData(obs=adata.obs, var=adata.var, uns=dict(adata.uns), obsm=dict(adata.obsm), varm=dict(adata.varm))
    trial.uns |= {f"modules_{name}".replace("/", "_"): {"output": str(name)} for name in names}
    trial.varm["linear_axes"], trial.uns["linear_axes"] = np.zeros((trial.n_vars, len(names))), [*map(str, names)]
    trial.write_h5ad(folder / "trial.h5ad")
    (folder / "trial.h5ad").unlink()
    if cells.labels:
        ax, scores = Figure(layout="constrained").subplots(), pd.Series(np.arange(adata.n_obs))
        labels = adata.obs[cells.labels].astype(str)
        ax.set_title(plain(", ".join(map(str, names))[:200]))
        score_histogram(scores, labels, category_colors(adata, cells.labels), ax=ax)
        ax.figure.savefig(io.BytesIO())


def _keep(folder: Path, out: Path) -> str:
    """Move the files that are complete to a folder, and return in words which."""
    there = [name for name in FILES if (folder / name).exists()]
    for name in there:
        out.mkdir(exist_ok=True)
        (folder / name).replace(out / name)
    return f"kept in {str(out)!r}: {', '.join(there)}" if there else ""


@contextmanager
def _workshop(out: Path) -> Iterator[Path]:
    """Give a folder in that to be written, so that renames are all that is left to do; leave none behind."""
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".report-", dir=out, ignore_cleanup_errors=True)
    except OSError as error:
        raise ValueError(f"out={str(out)!r} cannot be written to ({error}); name another folder.") from error
    try:
        with folder:
            yield Path(folder.name).resolve()
    finally:
        if new and not os.listdir(out):
            out.rmdir()


def _command(name: str, options: dict[str, Any]) -> str:
    """Return the command that makes the same report, without folders, which are nobody's business."""
    words = ["scbmlp", "report", name]
    for key, value in options.items():
        if value is not None:
            values = [Path(part).name for part in value] if key == "gene_sets" else [str(value)]
            values = [] if value is True else values
            words += [f"--{key.replace('_', '-')}", *values]
    return shlex.join(words)


def template() -> str:
    """Return the notebook that a report is made of, the book's chapter on your own cells, as JSON."""
    return (TEMPLATES / "your_cells.ipynb").read_text("utf-8")


def _run(folder: Path, parameters: dict[str, Any], title: str, progress: bool) -> None:
    """Execute the template with other parameters, and write notebook and page."""
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    notebook = nbformat.reads(template(), as_version=4)
    notebook.metadata["title"] = title
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    # What a step takes of the time, measured on 3,000 cells x 2,000 genes, so that the time left is about right.
    known = [cell.metadata.get("scbmlp", {}) for cell in notebook.cells]
    shares = [step.get("share", 0.1) for step in known]
    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left"
    step, failed = "start", ""
    with tqdm(total=sum(shares), desc=step, bar_format=layout, disable=None if progress else True) as bar:

        def begun(cell: Any, cell_index: int) -> None:
            nonlocal step
            step = known[cell_index].get("step", step)
            bar.set_description_str(step)

        client = NotebookClient(
            notebook,
            # Without the user's kernels there is one, the Python that runs this.
            AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[])),
            extra_arguments=["--log-level=CRITICAL"],
            record_timing=False,  # times of day are of no interest
            resources={"metadata": {"path": str(folder)}},
            on_cell_start=begun,
            on_cell_executed=lambda cell, cell_index, execute_reply: bar.update(shares[cell_index]),
        )
        client.owns_km = True  # so that the kernel ends with it
        try:
            # One thread: on a busy machine threads that wait for each other make small fits many times slower. And the
            # paths of this interpreter, which may have been told by hand where the package is.
            paths = os.pathsep.join(filter(None, sys.path))
            own = {"PYTHONPATH": paths, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
            client.execute(env={"OMP_NUM_THREADS": "1"} | os.environ | own)
        except (CellExecutionError, DeadKernelError) as error:
            died = "its process ended, perhaps for want of memory"
            reason = died if isinstance(error, DeadKernelError) else f"{error.ename}: {error.evalue}"
            failed = f"the report stopped at {step!r}: {reason}"
            if step != "writing":
                raise RuntimeError(failed) from None
            # The last step writes the cells, and the page does without them.
            words = {"text/markdown": f"`cells.h5ad` could not be written ({reason})."}
            notebook.cells[-1].outputs = [nbformat.v4.new_output("display_data", words)]
        except AssertionError:
            # nbclient takes Ctrl-C for itself: it ends the kernel, and then asserts that there is one to end.
            if client.kc is not None:
                raise
            raise KeyboardInterrupt from None
    # The answer is known at the end, and read first.
    notebook.cells[1:] = sorted(notebook.cells[1:], key=lambda cell: "first" not in cell.metadata.get("scbmlp", {}))
    _whole(folder / "report.ipynb", nbformat.writes(notebook))
    # A figure that fails while it is drawn is no error of its cell.
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if output.output_type == "error":
            raise RuntimeError(f"a figure of the report cannot be drawn: {output.ename}: {output.evalue}")
    _whole(folder / "report.html", _page(notebook))
    if failed:
        raise RuntimeError(failed)


def _whole(path: Path, text: str) -> None:
    """Write a file that is whole or not there."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def _page(notebook: Any) -> str:
    """Return a notebook as a page that needs nothing else, its code folded."""
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    for cell in notebook.cells:  # where the book has it, and where nbconvert looks for it
        cell.metadata["alt"] = cell.metadata.get("mystnb", {}).get("image", {}).get("alt")
    config = Config({"TagRemovePreprocessor": {"remove_cell_tags": HIDDEN}})
    options = dict.fromkeys(["exclude_anchor_links", "exclude_input_prompt", "exclude_output_prompt"], True)
    options |= {"template_name": "classic", "template_file": str(TEMPLATES / "page.html.j2")}
    return HTMLExporter(config, **options).from_notebook_node(notebook)[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, ``scbmlp report cells.h5ad --class-key louvain --out report/``.

    The exit status is 0, 2 where the data do not fit or a step failed, or 130 after Ctrl-C.

    Examples
    --------
    >>> report.main(["report", "nowhere.h5ad", "--class-key", "label"])
    2
    """
    parser = argparse.ArgumentParser(prog="scbmlp", description="Read gene programs off models of your cells.")
    commands = parser.add_subparsers(dest="command", required=True)
    words = "make a page on cells of your own, the book's chapter with them"
    one = commands.add_parser("report", help=words, description=words)
    one.add_argument(
        "cells", help="a file with log-normalised expression, or counts: h5ad, zarr, loom, 10x's h5 or folder"
    )
    target = one.add_mutually_exclusive_group()
    target.add_argument("--class-key", help="column of obs with classes to tell apart")
    target.add_argument("--target-key", help="key of obsm with numbers to predict")
    target.add_argument("--perturbation-key", help="column of obs with perturbations, whose response is predicted")
    one.add_argument("--control", help="label of unperturbed cells, with --perturbation-key")
    one.add_argument("--gene-sets", nargs="+", metavar="GMT", help="files of gene sets")
    one.add_argument("--layer", help="layer with the expression; X if not given")
    one.add_argument("--n-genes", type=int, help=f"most variable genes to take; {N_GENES} of more than {MOST_GENES}")
    one.add_argument("--min-cells", type=int, help="fewest cells of a class; smaller ones are left out")
    one.add_argument("--no-normalize", action="store_true", help="refuse counts, in place of their logarithms")
    one.add_argument("--group-key", help="column of obs with donors or batches, of which whole ones are kept out")
    one.add_argument("--condition-key", help="column of obs with two conditions of the groups, to compare scores by")
    one.add_argument("--quick", action="store_true", help="two replicas and 99 permutations, for a first look")
    one.add_argument("--seed", type=int, default=0, help="seed of the split and of all fits")
    one.add_argument("--out", default="report", help="folder to write (report)")
    one.add_argument("--force", action="store_true", help="replace a report that is there")
    one.add_argument("--debug", action="store_true", help="show where an error came from")
    one.set_defaults(run=report)
    for name in ("look", "annotate"):  # modules that need this one
        import_module(f"scbmlp.{name}").command(commands)
    given = vars(parser.parse_args(arguments))
    command, run, path = given.pop("command"), given.pop("run"), given.pop("cells")
    keys, debug = [given.get(f"{kind}_key") for kind in ("class", "target", "perturbation")], given.pop("debug", False)
    try:
        if command == "report" and keys == [None] * 3:
            print(import_module("scbmlp.look").as_text(path))
            print("scbmlp report: no key is named; see above what could be one", file=sys.stderr)
            return 2
        made = run(path, **given)
    except KeyboardInterrupt as error:
        print(f"scbmlp {command}: interrupted, {str(error) or 'and nothing was written'}", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        known = isinstance(error, ValueError | KeyError | OSError | ModuleNotFoundError | RuntimeError)
        words = error.args[0] if isinstance(error, KeyError) and error.args else error  # str() of a KeyError is quoted
        words = words if known else f"{type(error).__name__}: {words}; run it again with --debug to see where"
        print(f"scbmlp {command}: {words}", file=sys.stderr)
        return 2
    print(made)
    return 0
