"""Where the cells come from: a local file, the public download, or a simulation, and which it was."""

from __future__ import annotations

import difflib
import hashlib
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import platformdirs
from anndata import AnnData
from anndata.io import read_elem, sparse_dataset
from scipy import sparse

from scbmlp import simulate
from scbmlp.checks import as_numbers, data_file, numeric_matrix
from scbmlp.display import as_html

KINDS = ("local", "download", "simulated")
# What pertpy.data downloads, without its second copy of each file.
PERTPY = "https://scverse-exampledata.s3.eu-west-1.amazonaws.com/pertpy"
SCIPLEX3_URL = f"{PERTPY}/srivatsan_2020_sciplex3.h5ad"
NORMAN_URL = f"{PERTPY}/norman_2019.h5ad"
ZHAO_URL = f"{PERTPY}/zhaoSims2021.h5ad"
CONDITION = ["cell_line", "perturbation", "dose_value"]
PACKAGES = ("scbmlp", "torch", "lightning", "anndata", "scanpy", "gseapy", "scikit-learn", "scipy", "numpy", "pandas")
BEGAN = time.perf_counter()
BLOCK = 4096  # cells of a file that are in memory beside the chosen ones


def pancreas() -> AnnData:
    """Return cells of the developing mouse pancreas at E15.5 :cite:p:`bastidasponce2019`, counts in ``X``.

    Tried in this order: ``pancreas.h5ad`` in the folder ``$SCBMLP_DATA_DIR``; scvelo's public download
    :cite:p:`bergen2020scvelo`, kept in the user's cache; simulated cells, with a warning. The environment variable
    ``SCBMLP_DATA_SOURCE`` (``local``, ``download``, ``simulated``) forces one. ``adata.uns["scbmlp_source"]`` says
    which it was, and :func:`data_card` shows it.

    Returns
    -------
    Cells with ``obs["clusters"]``; 3,696 in the real data.

    Raises
    ------
    ValueError
        ``SCBMLP_DATA_SOURCE`` is unknown, or the file holds counts neither in ``X`` nor in the layer ``counts``.
    OSError
        A file cannot be read (it names the file to delete), or the forced source has none.

    Examples
    --------
    >>> cells = sources.pancreas()
    >>> list(cells.obs["clusters"].cat.categories[:3])
    ['Ductal', 'Ngn3 low EP', 'Ngn3 high EP']
    """
    return _counts(_first_of("pancreas", _download_pancreas, simulate.pancreas))


def _counts(adata: AnnData) -> AnnData:
    """Return the cells with counts in ``X``, from the layer of that name if somebody saved them after preprocessing."""
    if np.any(_stored(adata.X) % 1):
        counts = adata.layers.get("counts")
        if counts is None or np.any(_stored(counts) % 1):
            raise ValueError(
                f"{adata.uns['scbmlp_source']['name']}.h5ad has no counts: X holds fractions or scaled values, and so "
                f"does layers['counts'], if it is there; put raw counts into either."
            )
        adata.X = counts.copy()
    return adata


def _download_pancreas(path: Path) -> None:
    with warnings.catch_warnings():  # scvelo silences the whole session when it is imported
        import scanpy
        import scvelo

        with scanpy.settings.verbosity.override("error"):  # a failure is told once, by the caller
            scvelo.datasets.pancreas(file_path=path)


def sciplex3(
    *,
    cell_lines: str | Sequence[str] | None = None,
    compounds: str | Sequence[str] | None = None,
    doses: float | Sequence[float] | None = None,
    min_counts: int = 0,
    max_cells: int | None = None,
    random_state: int = 0,
) -> AnnData:
    """Return the chemical screen sci-Plex3 :cite:p:`srivatsan2020`, or a part of it, counts in ``X``.

    Tried in the order of :func:`pancreas`: ``sciplex3.h5ad``; the public download, 2.5 GB, harmonised by scPerturb
    :cite:p:`peidli2024`; simulated cells. A file is read in blocks of cells: memory holds the part asked for, twice for
    a moment (8 GB is all of it). Left out are cells without a label, the 72-hour arm (one line) and the mouse genes.

    Parameters
    ----------
    cell_lines, compounds, doses
        What to keep, as in ``obs``; by default all. Vehicle (``control``, dose 0) of these lines always stays.
    min_counts, max_cells
        Fewest counts of a cell; most cells of one line, compound and dose, drawn at random, vehicle excepted.
    random_state
        Seed of the draw.

    Returns
    -------
    Cells in the file's order, with ``cell_line``, ``perturbation``, ``dose_value`` (nM), ``replicate``, ``ncounts``
    and, where the file has them, ``pathway``, ``target`` and ``plate`` in ``obs``. There are 60,000 simulated cells,
    so that a part of them is worth having.

    Raises
    ------
    KeyError
        The file lacks one of the first five columns.
    ValueError
        An argument names what the screen does not have or leaves no cell, or the file does not hold counts.
    OSError
        As for :func:`pancreas`.

    Examples
    --------
    >>> part = sources.sciplex3(cell_lines="K562", compounds="Hesperadin")
    >>> sorted(part.obs["perturbation"].unique())
    ['Hesperadin', 'control']
    """
    _check_max_cells(max_cells)
    adata = _first_of(
        "sciplex3",
        lambda path: _download(path, SCIPLEX3_URL),
        lambda: simulate.sciplex3(n_cells=60_000),
        _open_without_matrices,
    )
    obs = _clean_labels(adata.obs)
    vehicle = obs["perturbation"] == "control"
    keep = obs["ncounts"] >= min_counts
    wanted = {"cell_lines": cell_lines, "compounds": compounds, "doses": doses}
    for column, (argument, values) in zip(CONDITION, wanted.items(), strict=True):
        if values is not None:
            if not len(np.atleast_1d(values)):
                raise ValueError(f"{argument} is empty; name one at least, or pass None for all.")
            for value in set(np.atleast_1d(values).tolist()).difference(obs[column]):
                near = difflib.get_close_matches(str(value), obs[column].astype(str).unique(), n=4, cutoff=0)
                raise ValueError(f"{argument} has {value!r}, the screen does not; nearest to it: {', '.join(near)}.")
            keep &= obs[column].isin(np.atleast_1d(values)) | (vehicle & (column != "cell_line"))
    if max_cells:
        turn = obs[keep].sample(frac=1, random_state=random_state).groupby(CONDITION, observed=True).cumcount()
        keep &= vehicle | (turn.reindex(obs.index) < max_cells)
    if not keep.any():
        raise ValueError(f"no cell is left with cell_lines={cell_lines}, min_counts={min_counts}; ask for more.")
    return _rows(adata, obs[keep])


def dexamethasone() -> AnnData:
    """Return A549 cells after 0, 1 and 3 hours of dexamethasone, a glucocorticoid :cite:p:`cao2018`.

    From ``a549_dexamethasone.h5ad`` in the folder ``$SCBMLP_DATA_DIR`` alone. No simulation stands in for it, and
    pertpy downloads no such data (``srivatsan_2020_sciplex2`` is another experiment, of doses after 24 hours).

    Returns
    -------
    Cells with ``obs["dex_hours"]``, the categories ``0``, ``1`` and ``3`` (``.astype(float)`` for a graded target);
    2,641 cells, 1,185 genes. ``X`` is log-normalised already, and there are no counts.

    Raises
    ------
    ValueError
        ``SCBMLP_DATA_SOURCE`` is unknown.
    OSError
        The file is not there (:class:`FileNotFoundError`), or not wanted since ``SCBMLP_DATA_SOURCE`` forces another
        source; or it cannot be read.

    Examples
    --------
    >>> cells = sources.dexamethasone()
    >>> list(cells.obs["dex_hours"].cat.categories)
    ['0', '1', '3']
    """
    return _first_of("a549_dexamethasone")


def norman(*, max_cells: int | None = 100, random_state: int = 0) -> AnnData:
    """Return K562 cells in which CRISPR activates a gene, two genes or none :cite:p:`norman2019`, log-normalised.

    Tried in this order: ``norman.h5ad`` in the folder ``$SCBMLP_DATA_DIR``; the public download that is pertpy's
    ``norman_2019`` :cite:p:`heumos2024pertpy`, about 110,000 cells. No simulation stands in for them.

    Parameters
    ----------
    max_cells
        Most cells of one perturbation, control included, drawn at random; None keeps all, which takes several GB of
        the download. Only the cells kept are read.
    random_state
        Seed of the draw.

    Returns
    -------
    Cells in the file's order with ``obs["perturbation"]``: ``control``, the activated gene, or two joined by ``+``, in
    the file's order of the two. ``X`` is log-normalised, 10,000 counts a cell. What else the file has stays, but for
    the download's columns of single guides.

    Raises
    ------
    KeyError
        The file has no column of perturbations.
    ValueError
        `max_cells` is too small, or ``SCBMLP_DATA_SOURCE`` is unknown.
    OSError
        There is neither file nor download (:class:`FileNotFoundError`), or not in the source that
        ``SCBMLP_DATA_SOURCE`` forces; or the file cannot be read.

    Examples
    --------
    >>> cells = sources.norman(max_cells=20)
    >>> int(cells.obs["perturbation"].value_counts().max())
    20
    """
    _check_max_cells(max_cells)
    adata = _first_of("norman", lambda path: _download(path, NORMAN_URL), read=_open)
    perturbation = _labels(adata, "perturbation", "perturbation_name")
    keep = perturbation.notna()
    if max_cells:
        turn = perturbation.sample(frac=1, random_state=random_state).groupby(perturbation).cumcount()
        keep &= turn.reindex(keep.index) < max_cells
    part = _part(adata, keep, perturbation=perturbation)
    part.obs = part.obs.loc[:, ~part.obs.columns.str.startswith("guide_")]
    if not np.any(_stored(part.X) % 1):
        import scanpy

        scanpy.pp.normalize_total(part, target_sum=1e4)
        scanpy.pp.log1p(part)
    return part


def glioblastoma() -> AnnData:
    """Return glioblastoma slices, with and without panobinostat, an HDAC inhibitor :cite:p:`zhao2021`, counts in ``X``.

    Tried in this order: ``glioblastoma_panobinostat.h5ad`` in the folder ``$SCBMLP_DATA_DIR``; the public download that
    is pertpy's ``zhao_2021``, 0.6 GB, harmonised by scPerturb :cite:p:`peidli2024`. Of that, the patients stay of whom
    cells with and without panobinostat are known; what it calls control may be vehicle or untreated. No simulation
    stands in for them.

    Returns
    -------
    Cells with ``condition`` (``ctrl``, ``panobinostat``) and ``patient_id`` in ``obs``.

    Raises
    ------
    KeyError
        The file has no such columns.
    ValueError
        ``SCBMLP_DATA_SOURCE`` is unknown, or the file holds no counts.
    OSError
        There is neither file nor download (:class:`FileNotFoundError`), or not in the source that
        ``SCBMLP_DATA_SOURCE`` forces; or the file cannot be read.

    Examples
    --------
    >>> cells = sources.glioblastoma()
    >>> list(cells.obs["condition"].cat.categories)
    ['ctrl', 'panobinostat']
    """
    adata = _first_of("glioblastoma_panobinostat", lambda path: _download(path, ZHAO_URL), read=_open)
    condition = _labels(adata, "condition", "perturbation").replace("control", "ctrl")
    patient = _labels(adata, "patient_id", "sample").str.split("-").str[0]  # a sample may be named patient-slice
    keep = condition.isin(["ctrl", "panobinostat"])
    keep &= condition[keep].groupby(patient).nunique().eq(2).reindex(patient, fill_value=False).to_numpy()
    return _counts(_part(adata, keep, condition=condition, patient_id=patient))


def _labels(adata: AnnData, *columns: str) -> pd.Series:
    """Return the first of the columns that the cells have, without their names, which may come twice."""
    for column in columns:
        if column in adata.obs:
            return adata.obs[column].astype(object).reset_index(drop=True)
    file = f"{adata.uns['scbmlp_source']['name']}.h5ad"
    raise KeyError(f"{file} has no {' or '.join(columns)} in obs, only {', '.join(adata.obs)}; rename its columns.")


def _part(adata: AnnData, keep: pd.Series, **labels: pd.Series) -> AnnData:
    """Copy the cells to keep into memory, add labels, and let the file go."""
    with _reading(Path(adata.filename)):
        part = adata[keep.to_numpy()].to_memory()
        numeric_matrix(part.X, "X")
    adata.file.close()
    for column, values in labels.items():
        part.obs[column] = pd.Categorical(values[keep])
    return part


def _stored(x: np.ndarray | sparse.spmatrix) -> np.ndarray:
    return x.data if sparse.issparse(x) else x


def _check_max_cells(max_cells: int | None) -> None:
    if max_cells is not None and max_cells < 1:
        raise ValueError(f"max_cells={max_cells} is too small; pass 1 or more, or None to keep all cells.")


def _download(path: Path, url: str) -> None:
    import scanpy

    with scanpy.settings.verbosity.override("error"):  # a failure is told once, by the caller
        scanpy.read(path, backed="r", backup_url=url).file.close()  # opening finds a file cut short


def _clean_labels(obs: pd.DataFrame) -> pd.DataFrame:
    columns = [*CONDITION, "pathway", "target", "replicate", "plate", "ncounts"]
    if missing := [column for column in columns if column not in {*obs, "pathway", "target", "plate"}]:
        raise KeyError(f"sciplex3.h5ad has no {', '.join(missing)} in obs, only {', '.join(obs)}; rename its columns.")
    labels = obs[[column for column in columns if column in obs]].reset_index(drop=True)
    given, control = labels["dose_value"], labels["perturbation"] == "control"
    dose = as_numbers(given, unit="nM")
    unread = given.notna() & dose.isna() & ~control & ~given.astype(str).isin(["", "nan", "None", "NaN"])
    if unread.any():
        some = ", ".join(map(repr, given[unread].unique().tolist()[:5]))
        raise ValueError(
            f"sciplex3.h5ad has doses that are no numbers of nM in {unread.sum()} cells, such as {some}; write numbers."
        )
    labels["dose_value"] = dose.mask(control, 0.0)
    known = labels[CONDITION].notna().all(axis=1)
    if "time" not in obs:
        return labels[known]
    hours = as_numbers(obs["time"].reset_index(drop=True), unit="h")
    if not (hours == 24).any():
        raise ValueError(
            f"sciplex3.h5ad has no cell of 24 hours in obs['time'], which holds "
            f"{', '.join(map(repr, obs['time'].unique().tolist()[:5]))}; write hours as numbers, or drop the column."
        )
    return labels[known & (hours == 24)]


@contextmanager
def _counts_in(path: Path) -> Iterator[Any]:
    """Open the counts of a file, in their layer or in X, to be read in slices."""
    with _reading(path):
        file = h5py.File(path)
        counts = file["layers/counts" if "layers/counts" in file else "X"]
        counts = sparse_dataset(counts) if isinstance(counts, h5py.Group) else counts
    with file:
        yield counts


def _rows(adata: AnnData, obs: pd.DataFrame) -> AnnData:
    """Copy the cells whose row numbers index `obs` into memory, block by block."""
    path = adata.uns.pop("path", None)
    file = nullcontext(adata.layers.get("counts", adata.X)) if path is None else _counts_in(Path(path))
    ids = adata.var.get("ensembl_id", pd.Series("", adata.var_names))
    human = np.flatnonzero(~ids.astype(str).str.startswith("ENSMUSG"))
    blocks = []
    with file as counts:
        for start, rows in obs.groupby(obs.index // BLOCK * BLOCK).indices.items():
            with _reading(Path(path or "sciplex3.h5ad")):
                block = numeric_matrix(counts[start : start + BLOCK], "a block of cells", np.float32)
            block = sparse.csr_matrix(block)[obs.index[rows] - start][:, human]
            if np.any(block.data % 1):
                raise ValueError("sciplex3.h5ad has fractions in X, and no layer 'counts'; store raw counts in either.")
            blocks.append(block)
    obs = obs.set_index(adata.obs_names[obs.index])
    for column in obs.columns.drop(["dose_value", "ncounts"]):
        obs[column] = obs[column].astype("category").cat.remove_unused_categories()
    return AnnData(sparse.vstack(blocks, format="csr"), obs=obs, var=adata.var.iloc[human], uns=adata.uns)


def _first_of(
    name: str,
    download: Callable[[Path], None] | None = None,
    simulation: Callable[[], AnnData] | None = None,
    read: Callable[[Path], AnnData] = anndata.read_h5ad,
) -> AnnData:
    """Return the data set from the first source that has it, or from the one that the environment forces."""
    forced = os.environ.get("SCBMLP_DATA_SOURCE") or None
    if forced not in (None, *KINDS):
        raise ValueError(f"SCBMLP_DATA_SOURCE={forced!r} is unknown; set it to {', '.join(KINDS)}, or unset it.")
    local = data_file(f"{name}.h5ad")
    remedy = f"set SCBMLP_DATA_DIR to the folder that holds {name}.h5ad"
    if forced == "local" and not (local and local.is_file()):
        raise FileNotFoundError(
            f"SCBMLP_DATA_SOURCE=local, but {local or f'$SCBMLP_DATA_DIR/{name}.h5ad'} is not there; {remedy}, or "
            f"unset SCBMLP_DATA_SOURCE."
        )
    missing = {"download": download is None, "simulated": simulation is None}
    if missing.get(forced):
        what = "no public download has" if forced == "download" else "no simulation stands in for"
        raise FileNotFoundError(
            f"SCBMLP_DATA_SOURCE={forced}, but {what} {name}; unset SCBMLP_DATA_SOURCE, and {remedy}."
        )
    if forced in (None, "local") and local and local.is_file():
        return _read(name, "local", local, read)
    reason = "no public download"
    if forced in (None, "download") and download:
        cached = Path(platformdirs.user_cache_dir("scbmlp"), f"{name}.h5ad")
        try:
            if not cached.is_file():
                _fetch(cached, download)
        except OSError as error:
            if forced:
                raise OSError(
                    f"the download of {name} failed ({error}); try again, or put {name}.h5ad into a folder and set "
                    f"SCBMLP_DATA_DIR to it."
                ) from error
            reason = f"no download ({error})"
        else:
            return _read(name, "download", cached, read)
    if not simulation:
        raise FileNotFoundError(
            f"there is no {name}.h5ad in $SCBMLP_DATA_DIR, {reason}, and no simulation stands in for it; {remedy}."
        )
    if not forced:
        warnings.warn(f"no {name}.h5ad in $SCBMLP_DATA_DIR and {reason}: these are SIMULATED cells.", stacklevel=3)
    return simulation()


def _fetch(cached: Path, download: Callable[[Path], None]) -> None:
    """Download under another name first, so that an interrupted download is never taken for the data."""
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_name(f"{cached.stem}-{os.getpid()}-partial.h5ad")  # one for each process that downloads now
    try:
        download(partial)
        partial.replace(cached)
    except Exception as error:  # no network, no scvelo, or a file cut short: each library has its own words
        raise OSError(str(error)) from error
    finally:
        partial.unlink(missing_ok=True)


def _open(path: Path) -> AnnData:
    return anndata.read_h5ad(path, backed="r")


def _open_without_matrices(path: Path) -> AnnData:
    """Read all of a file but its matrices; anndata would read its layers whole. ``uns["path"]`` says where they are."""
    with h5py.File(path) as file:
        adata = AnnData(**{name: read_elem(file[name]) for name in ("obs", "var", "uns") if name in file})
    adata.uns["path"] = str(path)
    return adata


@contextmanager
def _reading(path: Path, remedy: str = "replace it with a whole copy") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # h5py and anndata raise many kinds for a damaged file
        raise OSError(f"{path} cannot be read ({error}); {remedy}.") from error


def _read(name: str, kind: str, path: Path, read: Callable[[Path], AnnData]) -> AnnData:
    with _reading(path, "delete it and try again" if kind == "download" else "replace it with a whole copy"):
        adata = read(path)
        if not (adata.isbacked or "path" in adata.uns):
            numeric_matrix(adata.X, "X")
    adata.var_names_make_unique()
    if adata.uns.get("scbmlp_source", {}).get("kind") == "simulated":
        return adata  # somebody saved simulated cells under this name
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    adata.uns["scbmlp_source"] = {"name": name, "kind": kind, "file": path.name, "sha256": digest}
    return adata


@dataclass(frozen=True)
class DataCard:
    """What a page says of its cells, first of all whether they are simulated, or of its run; ``rows`` by name."""

    simulated: bool
    rows: pd.Series

    def __repr__(self) -> str:
        lines = [f"{key}: {value}" for key, value in self.rows.items()]
        return "\n".join(["SIMULATED CELLS", *lines] if self.simulated else lines)

    def _repr_html_(self) -> str:
        banner = (
            '<div role="alert" style="border:3px solid #b00020;background:#fdecee;color:#7a0016;padding:.8em 1em;'
            'margin-bottom:1em;font-size:1.1em"><strong>SIMULATED CELLS.</strong> None of these cells is real: '
            "expression, labels and gene programs were drawn from a model with a known truth. What the page says of "
            "them holds for that model alone.</div>"
        )
        return (banner if self.simulated else "") + as_html(self.rows)


def _spread(values: np.ndarray) -> str:
    median, low, high = np.quantile(np.asarray(values), [0.5, 0.05, 0.95])
    return f"median {median:,.0f}, 5% to 95% {low:,.0f} to {high:,.0f}"


def data_card(adata: AnnData) -> DataCard:
    """Describe a data set of this module: source, checksum, size, sparsity and labels.

    The total of a cell is shown for counts alone. Of other expression, log-normalised say, totals mean nothing: the
    highest value is shown, and the number of genes detected in a cell.

    Parameters
    ----------
    adata
        Cells from this module, from ``simulate`` or from a report.

    Raises
    ------
    KeyError
        `adata` does not say where it is from.

    Examples
    --------
    >>> sources.data_card(adata)
    SIMULATED CELLS
    Data set: planted_interactions
    Source: simulation, seed 0
    Cells x genes: 1,000 x 40
    ...
    """
    if "scbmlp_source" not in adata.uns:
        raise KeyError("adata.uns has no 'scbmlp_source'; a data card is for cells from scbmlp.sources or simulate.")
    source = adata.uns["scbmlp_source"]
    simulated = source["kind"] == "simulated"
    stored = _stored(adata.X)
    origin = {"local": "real cells, local file", "download": "real cells, public download", "given": "cells as given,"}
    rows = {
        "Data set": source["name"],
        "Source": f"simulation, seed {source['seed']}" if simulated else f"{origin[source['kind']]} {source['file']}",
        "Cells x genes": f"{adata.n_obs:,} x {adata.n_vars:,}",
        "Zeros": f"{1 - np.count_nonzero(stored) / adata.n_obs / adata.n_vars:.0%} of the entries",
    }
    if np.any(stored % 1):
        rows["Values"] = f"not counts: fractions up to {stored.max():.2g}, as log-normalised expression has"
        rows["Genes a cell"] = _spread((adata.X != 0).sum(axis=1))
    else:
        rows["Total a cell"] = _spread(adata.X.sum(axis=1))
    for key in adata.obs.select_dtypes("category"):
        sizes = adata.obs[key].value_counts()
        rows[f"Labels: {key}"] = ", ".join(f"{label} {size:,}" for label, size in sizes[sizes > 0].head(12).items())
    rows["SHA-256"] = source.get("sha256") or hashlib.sha256(np.ascontiguousarray(stored).tobytes()).hexdigest()
    return DataCard(simulated, pd.Series(rows))


def run_card(adata: AnnData | None = None) -> DataCard:
    """Return what the run of a page took, and the versions it ran with.

    Parameters
    ----------
    adata
        Cells of the page, for their number.

    Returns
    -------
    A row each for the size of the data, the time since scbmlp was imported, the most memory that the process held (not
    on Windows, which does not say), the interpreter and the packages.

    Examples
    --------
    >>> sources.run_card(adata).rows["Data"]
    '1,000 cells x 40 genes'
    """
    rows = {} if adata is None else {"Data": f"{adata.n_obs:,} cells x {adata.n_vars:,} genes"}
    rows["Run time"] = f"{time.perf_counter() - BEGAN:.0f} s"
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        rows["Peak memory"] = f"{unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9:.1f} GB"
    rows["Python"] = f"{platform.python_version()} on {platform.system()}, {os.cpu_count()} processors"
    rows["Packages"] = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return DataCard(False, pd.Series(rows))
