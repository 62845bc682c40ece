"""A report on cells of your own: one page, one notebook and the cells with their modules, by one command."""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from anndata.utils import make_index_unique
from scipy import sparse
from tqdm import tqdm

from scbmlp.checks import LARGEST, REMEDY, check_finite, control_labels, entries, expression, scale_of, whole_number
from scbmlp.datasets import ExpressionDataset, get_classification_datasets, get_regression_datasets
from scbmlp.enrichment import read_gene_sets
from scbmlp.sources import DataCard, data_card
from scbmlp.stores import normalised
from scbmlp.targets import perturbation_response

MOST_GENES = 5000  # of a file with more, the N_GENES most variable are taken
N_GENES = 2000
TEMPLATES = Path(__file__).with_name("templates")
FILES = ("report.html", "report.ipynb", "cells.h5ad", "model.safetensors")
READERS: dict[str, Callable[[Path], AnnData]] = {
    ".h5ad": anndata.read_h5ad,
    ".zarr": anndata.io.read_zarr,
    ".loom": anndata.io.read_loom,
    ".h5": partial(sc.read_10x_h5, gex_only=False),
    "": partial(sc.read_10x_mtx, gex_only=False),
}
SYMBOLS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "gene_short_name")  # columns of var
IDS = r"(ENS[A-Z]*G\d{11}|WBGene\d{8}|FBgn\d{7})(\.\d+)?"
HIDDEN = ["remove-cell", "book-only", "parameters"]  # the command says the last, without paths


@dataclass(frozen=True)
class Cells:
    """Cells that a report can be made of, checked and split.

    Parameters
    ----------
    adata
        The cells with all their genes, log-normalised; modules are written to it.
    train, val, test
        The cells that the model sees, with its genes.
    target
        What the model learns, in words.
    labels
        Column of ``adata.obs`` to draw the cells by; None for targets of ``obsm``.
    notes
        What was decided about the data, in sentences.
    card, gene_sets
        Card of the data; gene sets by name, if any were given.
    """

    adata: AnnData
    train: ExpressionDataset
    val: ExpressionDataset
    test: ExpressionDataset
    target: str
    labels: str | None
    notes: list[str]
    card: DataCard
    gene_sets: dict[str, list[str]]


def prepare(
    cells: AnnData | str | Path | None,
    *,
    class_key: str | None = None,
    target_key: str | None = None,
    perturbation_key: str | None = None,
    control: Any = None,
    gene_sets: str | Path | Sequence[str | Path] | None = None,
    layer: str | None = None,
    n_genes: int | None = None,
    min_cells: int | None = None,
    no_normalize: bool = False,
    seed: int = 0,
) -> Cells:
    """Check the cells of a report and split them; where ``X`` is scaled, ``raw`` is read, of the genes of ``X``.

    Parameters
    ----------
    cells
        Path of an h5ad file, or AnnData, which is not changed; None for ``scanpy.datasets.pbmc68k_reduced()``.
    class_key
        Column of ``obs`` with classes to tell apart.
    target_key
        Key of ``obsm`` with numbers to predict.
    perturbation_key, control
        Column of ``obs`` with perturbations and its label for control cells; the response is predicted.
    gene_sets
        Path of a GMT file, or several.
    layer
        Layer to read instead of ``X``.
    n_genes
        Most variable genes to take; if None all, or 2,000 of more than 5,000.
    min_cells
        Fewest cells of a class; smaller classes are left out, as are cells without a label.
    no_normalize
        Refuse counts, which are else scaled to 10,000 a cell, and log1p is taken.
    seed
        Seed of the split.

    Examples
    --------
    >>> cells = report.prepare(adata, class_key="label")
    >>> cells.target, len(cells.train)
    ('the 2 classes of `label`', 700)
    """
    n_named = sum(name is not None for name in (class_key, target_key, perturbation_key))
    if n_named != 1:
        raise ValueError(
            f"class_key={class_key!r}, target_key={target_key!r}, perturbation_key={perturbation_key!r}: "
            f"{n_named} are named; name one, what the model is to learn."
        )
    if (control is None) != (perturbation_key is None):
        raise ValueError(
            f"perturbation_key={perturbation_key!r} and control={control!r} go together; name both or neither."
        )
    seed, notes = whole_number(seed, "seed", 0, 2**32 - 1), []
    adata, source = _read(cells)
    adata = _with_symbols(adata, notes)
    if class_key in adata.obs:
        adata = _labelled(adata, class_key, whole_number(min_cells or 0, "min_cells", 0), notes)
    adata, x = _log_normalised(adata, layer, notes, no_normalize)
    names = adata.var_names
    kept = _most_variable(x, names, n_genes, notes)
    sets = _gene_sets(gene_sets, names[kept], notes)
    where = {"X": x[:, kept]} if layer is None else {"layers": {layer: x[:, kept]}}
    seen = AnnData(**where, obs=adata.obs, var=pd.DataFrame(index=names[kept]), obsm=dict(adata.obsm))
    if class_key is not None:
        try:
            split = get_classification_datasets(seen, class_key, random_state=seed, layer=layer)
        except ValueError as error:
            raise ValueError(f"{error} Small classes are left out by min_cells (--min-cells).") from None
        target = f"the {len(split[0].output_names)} classes of `{class_key}`"
    elif target_key is not None:
        split = get_regression_datasets(seen, target_key, random_state=seed, layer=layer)
        target = f"the {len(split[0].output_names)} targets of `{target_key}`"
    else:
        split = _responses(seen, perturbation_key, control, layer, seed)
        target = f"{len(split[0].output_names)} components of the response to `{perturbation_key}`"
    labels = class_key or perturbation_key
    shown = AnnData(x[:, kept], obs=adata.obs[[labels]].astype("category") if labels else None, uns=source)
    return Cells(adata, *split, target, labels, notes, data_card(shown), sets)


def _read(cells: AnnData | str | Path | None) -> tuple[AnnData, dict[str, Any]]:
    """Return the cells, and what a data card says of their source."""
    known = {"name": "your cells", "kind": "given", "file": "AnnData in memory"}
    if cells is None:
        known["file"] = "pbmc68k_reduced, which comes with scanpy"
        cells = sc.datasets.pbmc68k_reduced()
    elif isinstance(cells, str | Path):
        path = Path(cells).expanduser()
        cells, known["file"] = _opened(path), path.name
        if path.is_file():
            with path.open("rb") as file:
                known["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    elif not isinstance(cells, AnnData):
        raise TypeError(f"cells is of type {type(cells).__name__}; pass AnnData, or the path of an h5ad file.")
    before = cells.uns.get("scbmlp_source", {})
    # Simulated cells stay simulated, whatever file they went through.
    return cells, {"scbmlp_source": dict(before) if before.get("kind") == "simulated" else known}


def _opened(path: Path) -> AnnData:
    """Return the cells of a file of any kind, by its suffix, or of a folder of 10x's matrices."""
    path = path.expanduser()
    if not path.exists():
        raise FileNotFoundError(f"cells={str(path)!r}: there is no such file; give the path of an h5ad file.")
    kind = path.suffix.lower() if path.suffix.lower() in READERS else "" if path.is_dir() else ".h5ad"
    try:
        with warnings.catch_warnings(action="ignore"):  # that names come twice is mended or said elsewhere
            return READERS[kind](path)
    except Exception as error:  # h5py, anndata and scanpy raise many kinds
        words = f"is no {kind[1:]} file that can be read" if kind else "is no folder of 10x's matrices"
        raise ValueError(f"cells={path.name!r} {words} ({error}).") from error


def _with_symbols(adata: AnnData, notes: list[str]) -> AnnData:
    """Return the genes alone, by symbols where ids of Ensembl are the names, each by a name of its own."""
    kinds = adata.var.get("feature_types", pd.Series(dtype=object))
    if (genes := kinds == "Gene Expression").any() and not genes.all():
        left_out = ", ".join(f"{n:,} of {kind}" for kind, n in kinds[~genes].value_counts().items() if n)
        notes.append(f"Features other than gene expression are left out: {left_out}.")
        adata = adata[:, genes.to_numpy()].copy()
    names = adata.var_names.astype(str)
    if (ids := names.str.fullmatch(IDS)).mean() > 0.5:
        cut, column = (
            names.str.replace(r"\.\d+$", "", regex=True),
            next((one for one in SYMBOLS if one in adata.var), None),
        )
        known = (
            pd.Index([""] * len(cut))
            if column is None
            else pd.Index(adata.var[column].astype(object).fillna("").astype(str))
        )
        names = pd.Index(np.where(ids & (known != ""), known, np.where(ids, cut, names)), dtype=object)
        if column is not None:
            notes.append(f"Genes have ids as names; they are called by their symbols, from `var[{column!r}]`.")
        elif not names.equals(adata.var_names):
            notes.append("The versions of Ensembl's ids were cut.")
    if twice := int(names.duplicated().sum()):
        names = make_index_unique(names)
        notes.append(f"{twice:,} genes have the name of another; a number was put behind it.")
    if names.equals(adata.var_names):
        return adata
    adata = adata.copy()
    if adata.raw is not None:
        adata.raw = _with_symbols(adata.raw.to_adata(), [])
    adata.var_names = names
    return adata


def _labelled(adata: AnnData, key: str, least: int, notes: list[str]) -> AnnData:
    """Return the cells that have a label, of classes of so many cells at least."""
    labels = adata.obs[key]
    sizes = labels.value_counts()
    small = sizes.index[(sizes > 0) & (sizes < least)]
    kept = (labels.notna() & ~labels.isin(small)).to_numpy()
    if lacking := int(labels.isna().sum()):
        notes.append(f"{lacking:,} of {len(labels):,} cells have no label in `{key}`, and are left out.")
    if len(small):
        names = ", ".join(f"`{name}`" for name in small)
        notes.append(f"Classes of fewer than {least} cells are left out (`--min-cells`): {names}.")
    return adata if kept.all() else adata[kept].copy()


def _fault(x: sparse.csr_matrix | np.ndarray) -> str:
    """Return why values are not those of log-normalised expression, or nothing."""
    values = entries(x)
    if not values.any():
        return "is 0 everywhere"
    if values.min() < 0:
        return f"holds negative values (minimum {values.min():.3g}), as scaled expression does"
    most, whole = scale_of(x)
    if whole:
        return "holds only whole numbers, like raw counts"
    return f"holds values up to {most:.3g}, too large for logarithms" if most > LARGEST else ""


def _log_normalised(adata: AnnData, layer: str | None, notes: list[str], as_it_is: bool) -> tuple[AnnData, Any]:
    """Return the cells with the expression to use: that asked for, of counts the logarithm, or ``raw`` of scaled."""
    x, where = expression(adata, layer)
    check_finite(x, where)
    fault = _fault(x)
    if not fault:
        return adata, x
    if "whole numbers" in fault and not as_it_is:
        notes.append(f"`{layer or 'X'}` has counts. They were scaled to 10,000 a cell, and log1p was taken.")
        adata, x = adata.copy(), normalised(sparse.csr_matrix(x, dtype=np.float32), 1e4, log1p=True)
        if layer is None:
            adata.X = x
        else:
            adata.layers[layer] = x
        return adata, x
    raw = None if adata.raw is None else adata.raw.to_adata()
    raw_fits = raw is not None and not _fault(expression(raw, None)[0])
    if layer is None and raw_fits and "negative" in fault:
        genes = adata.var_names
        if genes.isin(raw.var_names).all() and raw.var_names.is_unique:
            raw = raw[:, genes].copy()
        notes.append(f"`X` {fault}. `raw` has log-normalised values of the same cells, and the report reads those.")
        return raw, expression(raw, None)[0]
    fitting = [name for name in adata.layers if name != layer and not _fault(expression(adata, name)[0])]
    remedy = f"name a layer that has them: {', '.join(map(repr, fitting))}" if fitting else REMEDY
    remedy = "adata.raw has them: adata.raw.to_adata()" if raw_fits else remedy
    raise ValueError(f"{where} {fault}; log-normalised values are needed: {remedy}.")


def _most_variable(x: Any, names: pd.Index, n_genes: int | None, notes: list[str]) -> np.ndarray:
    """Return which genes the model sees, as a mask (gene)."""
    if n_genes is not None:
        most = whole_number(n_genes, "n_genes", 2)
    else:
        most = N_GENES if len(names) > MOST_GENES else len(names)
    if most >= len(names):
        return np.ones(len(names), bool)
    table = sc.pp.highly_variable_genes(AnnData(x), n_top_genes=most, inplace=False)
    notes.append(f"Of {len(names):,} genes the model sees the {most:,} most variable (`--n-genes`).")
    return table["highly_variable"].to_numpy()


def _paths(paths: Any) -> list[Path]:
    """Return no path, one or several as a list."""
    return [Path(path) for path in ([] if paths is None else [paths] if isinstance(paths, str | Path) else paths)]


def _gene_sets(paths: Any, names: pd.Index, notes: list[str]) -> dict[str, list[str]]:
    """Return the gene sets of all files; some must be of the genes of the model."""
    sets: dict[str, list[str]] = {}
    for path in _paths(paths):
        found = read_gene_sets(path)
        if twice := sets.keys() & found.keys():
            raise ValueError(f"gene_sets has {min(twice)!r} in two files; leave one of them out.")
        sets |= found
    if not _paths(paths):
        return sets
    genes = {str(name).upper() for name in names}
    members = [{gene.upper() for gene in one} for one in sets.values()]
    if not any(5 <= len(genes & one) <= 500 for one in members):
        raise ValueError(
            f"none of {len(sets)} gene sets has 5 to 500 of the {len(genes)} genes, such as {', '.join(names[:3])}; "
            f"give gene sets of the same organism and kind of name."
        )
    known = set().union(*members)
    notes.append(f"Of {len(known):,} genes in the gene sets, {len(known & genes):,} match one of the model's.")
    return sets


def _responses(seen: AnnData, key: str, control: Any, layer: str | None, seed: int) -> tuple[ExpressionDataset, ...]:
    """Split the cells, each perturbation in equal proportion, with responses on components of the training cells."""
    labels, control = control_labels(seen, key, control)
    seen.obs[key] = labels.to_numpy()
    try:
        parts = get_classification_datasets(seen, key, random_state=seed, layer=layer)
    except ValueError as error:  # its words are about classes
        raise ValueError(str(error).replace("class_key", "perturbation_key")) from None
    part = np.empty(seen.n_obs, dtype=object)
    for name, one in zip(("train", "val", "test"), parts, strict=True):
        part[one.indices] = name
    seen.obs["part"] = part
    n = min(5, labels.nunique() - 1)
    try:
        perturbation_response(seen, key, control, n, "response", cells=part == "train", layer=layer, random_state=seed)
    except ModuleNotFoundError as error:
        raise _not_installed(f"perturbation_key={key!r}", error.name, "book") from error
    return get_regression_datasets(seen, "response", layer=layer, split_key="part")


def _not_installed(what: str, name: str | None, extra: str) -> ModuleNotFoundError:
    words = f"{what} takes {name}, which is not installed: pip install 'scbmlp[{extra}]'."
    return ModuleNotFoundError(words, name=name)


def report(
    cells: AnnData | str | Path,
    out: str | Path = "report",
    *,
    class_key: str | None = None,
    target_key: str | None = None,
    perturbation_key: str | None = None,
    control: Any = None,
    gene_sets: str | Path | Sequence[str | Path] | None = None,
    layer: str | None = None,
    n_genes: int | None = None,
    min_cells: int | None = None,
    no_normalize: bool = False,
    seed: int = 0,
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Make the book's chapter on your own cells of cells of yours, checked before, and return the path of its page.

    Parameters
    ----------
    cells
        Path of an h5ad file, or AnnData, which is not changed.
    out
        Folder to write the page to, its notebook, and ``cells.h5ad``, the cells with their modules.
    class_key, target_key, perturbation_key, control, gene_sets, layer, n_genes, min_cells, no_normalize
        As in :func:`prepare`; one of the three keys is needed.
    seed
        Seed of the split and of all fits.
    force
        Whether a report that is in the folder may be replaced.
    progress
        Show the step and the time left, in a terminal.

    Raises
    ------
    RuntimeError
        A step of the notebook failed.

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
        raise _not_installed("a report", error.name, "report") from error
    options = {
        "class_key": class_key,
        "target_key": target_key,
        "perturbation_key": perturbation_key,
        "control": control if control is None else str(control),
        "gene_sets": [str(path.expanduser().resolve()) for path in _paths(gene_sets)] or None,
        "layer": layer,
        "n_genes": n_genes,
        "min_cells": min_cells,
        "no_normalize": no_normalize or None,
        "seed": seed,
    }
    adata = prepare(cells, **options).adata
    in_memory = isinstance(cells, AnnData)
    name = "AnnData in memory" if in_memory else Path(cells).name
    with _workshop(out) as folder:
        path = folder / "in_memory.h5ad" if in_memory else Path(cells).expanduser().resolve()
        try:  # now, and not after all fits
            (cells if in_memory else adata).write_h5ad(path if in_memory else folder / "cells.h5ad")
        except Exception as error:  # h5py and anndata raise many kinds
            raise ValueError(f"cells={name!r} cannot be written as h5ad; mend what is named: {error}") from error
        del adata  # the notebook reads it again
        parameters = {"path": str(path), **options, "folder": str(folder), "command": _command(name, options)}
        _run(folder, parameters, f"{name}: {class_key or target_key or perturbation_key}", progress)
        for file in FILES:
            (folder / file).replace(out / file)
    return out / FILES[0]


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
    step = "start"
    with tqdm(total=sum(shares), desc=step, bar_format=layout, disable=None if progress else True) as bar:

        def begun(cell: Any, cell_index: int) -> None:
            nonlocal step
            step = known[cell_index].get("step", step)
            bar.set_description_str(step)

        client = NotebookClient(
            notebook,
            # Without the user's kernels there is one, the Python that runs this.
            AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[])),
            extra_arguments=["--log-level=ERROR"],
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
            raise RuntimeError(f"the report stopped at {step!r}: {reason}") from None
        except AssertionError:
            # nbclient takes Ctrl-C for itself: it ends the kernel, and then asserts that there is one to end.
            raise KeyboardInterrupt from None
    # A figure that fails while it is drawn is no error of its cell.
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if output.output_type == "error":
            raise RuntimeError(f"a figure of the report cannot be drawn: {output.ename}: {output.evalue}")
    nbformat.write(notebook, folder / "report.ipynb")
    (folder / "report.html").write_text(_page(notebook), "utf-8")


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

    The exit status is 0, 2 where the data do not fit, or 130 after Ctrl-C.

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
    one.add_argument("--seed", type=int, default=0, help="seed of the split and of all fits")
    one.add_argument("--out", default="report", help="folder to write (report)")
    one.add_argument("--force", action="store_true", help="replace a report that is there")
    one.set_defaults(run=report)
    for name in ("look", "annotate"):  # modules that need this one
        import_module(f"scbmlp.{name}").command(commands)
    given = vars(parser.parse_args(arguments))
    command, run, path = given.pop("command"), given.pop("run"), given.pop("cells")
    keys = [given.get(f"{kind}_key") for kind in ("class", "target", "perturbation")]
    try:
        if command == "report" and keys == [None] * 3:
            print(import_module("scbmlp.look").as_text(path))
            print("scbmlp report: no key is named; see above what could be one", file=sys.stderr)
            return 2
        made = run(path, **given)
    except (ValueError, KeyError, OSError, ModuleNotFoundError, RuntimeError) as error:
        words = error.args[0] if isinstance(error, KeyError) else error  # str() of a KeyError is quoted
        print(f"scbmlp {command}: {words}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"scbmlp {command}: interrupted, and nothing was written", file=sys.stderr)
        return 130
    print(made)
    return 0
