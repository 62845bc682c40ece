"""Where the cells come from: a local file, the public download, or a simulation, and which it was.

A data set ``name`` is looked for as ``name.h5ad`` in the folder ``$SCBMLP_DATA_DIR``, then as a download that the
user's cache keeps, and then, for two of them, as simulated cells, with a warning. The environment variable
``SCBMLP_DATA_SOURCE`` (``local``, ``download``, ``simulated``) forces one. ``uns["scbmlp_source"]`` says which it was.
A file that is missing or cannot be read is an :class:`OSError`, which names the file and the next step.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import platformdirs
from anndata import AnnData
from anndata.io import read_elem
from scipy import sparse

from scbmlp import simulate
from scbmlp.checks import as_numbers, data_file, entries, numeric_matrix, reading, warn, whole_number
from scbmlp.display import as_html
from scbmlp.stores import StoredMatrix, normalised

KINDS = ("local", "download", "simulated")
# What scvelo.datasets and pertpy.data download, without their second copy of each file.
PANCREAS_URL = "https://github.com/theislab/scvelo_notebooks/raw/master/data/Pancreas/endocrinogenesis_day15.h5ad"
PERTPY = "https://scverse-exampledata.s3.eu-west-1.amazonaws.com/pertpy"
SCIPLEX3_URL = f"{PERTPY}/srivatsan_2020_sciplex3.h5ad"
NORMAN_URL = f"{PERTPY}/norman_2019.h5ad"
ZHAO_URL = f"{PERTPY}/zhaoSims2021.h5ad"
CONDITION = ["cell_line", "perturbation", "dose_value"]
PACKAGES = ("scbmlp", "torch", "lightning", "anndata", "scanpy", "gseapy", "scikit-learn", "scipy", "numpy", "pandas")
BEGAN = time.perf_counter()
BLOCK = 4096  # cells of a file that are in memory beside the chosen ones
ORIGIN = {"local": "real cells, local file", "download": "real cells, public download", "given": "cells as given,"}
BANNER = (
    '<div role="alert" style="border:3px solid #b00020;background:#fdecee;color:#7a0016;padding:.8em 1em;'
    'margin-bottom:1em;font-size:1.1em"><strong>SIMULATED CELLS.</strong> None of these cells is real: expression, '
    "labels and gene programs were drawn from a model with a known truth. What the page says of them holds for that "
    "model alone.</div>"
)


def pancreas() -> AnnData:
    """Return 3,696 cells of the mouse pancreas at E15.5 :cite:p:`bastidasponce2019`, counts in ``X``.

    ``obs["clusters"]`` has their types. The download is scvelo's :cite:p:`bergen2020scvelo`.

    Examples
    --------
    >>> cells = sources.pancreas()
    >>> list(cells.obs["clusters"].cat.categories[:3])
    ['Ductal', 'Ngn3 low EP', 'Ngn3 high EP']
    """
    adata = _first_of("pancreas", _download_pancreas, simulate.pancreas)
    adata.X = adata.layers.get("counts", adata.X).copy()
    return _checked_counts(adata)


def sciplex3(
    *, compounds: str | Sequence[str] | None = None, min_counts: int = 0, max_cells: int | None = None
) -> AnnData:
    """Return the chemical screen sci-Plex3 :cite:p:`srivatsan2020`, or a part of it, counts in ``X``.

    The download of 2.5 GB is from scPerturb :cite:p:`peidli2024`. Memory holds the part asked for, twice for a moment
    (8 GB is all of it). Cells without a label, the 72-hour arm and the mouse genes are left out. ``obs`` has
    ``cell_line``, ``perturbation``, ``dose_value`` (nM), ``replicate``, ``ncounts`` and, where the file has them,
    ``pathway``, ``target`` and ``plate``.

    Parameters
    ----------
    compounds
        What to keep, all by default. Vehicle (``control``, dose 0) always stays.
    min_counts
        Fewest counts of a cell.
    max_cells
        Most cells of one line, compound and dose, drawn at random; vehicle stays.

    Examples
    --------
    >>> part = sources.sciplex3(compounds="Hesperadin")
    >>> sorted(part.obs["perturbation"].unique())
    ['Hesperadin', 'control']
    """
    max_cells = _most(max_cells)
    # So many cells are simulated that a part of them is worth having.
    simulation = partial(simulate.sciplex3, n_cells=60_000)
    adata = _first_of("sciplex3", partial(_download, url=SCIPLEX3_URL), simulation, whole=False)
    obs = _clean_labels(adata.obs)
    given = obs["perturbation"]
    wanted = given.unique().tolist() if compounds is None else np.atleast_1d(compounds).tolist()
    for name in set(wanted).difference(given):
        near = difflib.get_close_matches(str(name), given.unique(), n=4, cutoff=0)
        raise ValueError(f"compounds has {name!r}, the screen does not; nearest to it: {', '.join(near)}.")
    vehicle = given == "control"
    obs = obs[(given.isin(wanted) | vehicle) & (obs["ncounts"] >= min_counts)]
    obs = obs[vehicle[obs.index] | _drawn(obs[CONDITION], max_cells)]
    if not wanted or obs.empty:
        raise ValueError(f"no cell is left with compounds={compounds}, min_counts={min_counts}; ask for more.")
    ids = adata.var.get("ensembl_id", pd.Series("", adata.var_names))
    return _checked_counts(_part(adata, obs, "counts", ~ids.astype(str).str.startswith("ENSMUSG").to_numpy()))


def dexamethasone() -> AnnData:
    """Return 2,641 A549 cells after 0, 1 and 3 hours of dexamethasone, a glucocorticoid :cite:p:`cao2018`.

    The file is ``a549_dexamethasone.h5ad``; there is no download (pertpy's ``srivatsan_2020_sciplex2`` is another
    experiment). ``X`` is log-normalised, without counts. ``obs["dex_hours"]`` has categories.

    Examples
    --------
    >>> cells = sources.dexamethasone()
    >>> list(cells.obs["dex_hours"].cat.categories)
    ['0', '1', '3']
    """
    return _first_of("a549_dexamethasone")


def norman(*, max_cells: int | None = 100) -> AnnData:
    """Return K562 cells in which CRISPR activates a gene, two genes or none :cite:p:`norman2019`, log-normalised.

    ``obs["perturbation"]`` has ``control``, a gene, or two joined by ``+``. The download is pertpy's ``norman_2019``
    :cite:p:`heumos2024pertpy`, about 110,000 cells. No simulation stands in.

    Parameters
    ----------
    max_cells
        Most cells of one perturbation, control included, drawn at random; None keeps all, which takes several GB.

    Examples
    --------
    >>> cells = sources.norman(max_cells=20)
    >>> int(cells.obs["perturbation"].value_counts().max())
    20
    """
    max_cells = _most(max_cells)
    adata = _first_of("norman", partial(_download, url=NORMAN_URL), whole=False)
    labels = _labels(adata, "perturbation", "perturbation_name")
    drawn = _drawn(labels.to_frame(), max_cells)
    obs = adata.obs.loc[:, ~adata.obs.columns.str.startswith("guide_")].reset_index(drop=True)
    part = _part(adata, obs.assign(perturbation=labels)[labels.notna() & drawn])
    if not np.any(part.X.data % 1):
        part.X = normalised(part.X, 1e4, True)
    return part


def glioblastoma() -> AnnData:
    """Return glioblastoma slices, with and without panobinostat, an HDAC inhibitor :cite:p:`zhao2021`, counts in ``X``.

    The file is ``glioblastoma_panobinostat.h5ad``; the download of 0.6 GB is from scPerturb :cite:p:`peidli2024`. Its
    control may be vehicle or untreated. Only patients with both conditions stay. No simulation stands in.
    ``obs`` has ``condition`` (``ctrl``, ``panobinostat``) and ``patient_id``.

    Examples
    --------
    >>> cells = sources.glioblastoma()
    >>> list(cells.obs["condition"].cat.categories)
    ['ctrl', 'panobinostat']
    """
    adata = _first_of("glioblastoma_panobinostat", partial(_download, url=ZHAO_URL), whole=False)
    condition = _labels(adata, "condition", "perturbation").replace("control", "ctrl")
    patient = _labels(adata, "patient_id", "sample").str.split("-").str[0]  # a sample may be named patient-slice
    obs = adata.obs.reset_index(drop=True).assign(condition=condition, patient_id=patient)
    obs = obs[condition.isin(["ctrl", "panobinostat"])]
    both = obs.groupby("patient_id")["condition"].transform("nunique") == 2
    return _checked_counts(_part(adata, obs[both], "counts"))


def _checked_counts(adata: AnnData) -> AnnData:
    """Return the cells, if they have counts; somebody may have saved them after preprocessing."""
    if np.any(entries(adata.X) % 1):
        file = f"{adata.uns['scbmlp_source']['name']}.h5ad"
        raise ValueError(f"{file} has no counts: X or layers['counts'] holds fractions; put raw counts into either.")
    return adata


def _most(max_cells: int | None) -> float:
    """Return the most cells of a kind, and raise an error before anything is downloaded."""
    return np.inf if max_cells is None else whole_number(max_cells, "max_cells")


def _drawn(labels: pd.DataFrame, max_cells: float) -> pd.Series:
    """Return which cells stay if each combination of labels keeps `max_cells` of its cells, drawn at random."""
    turn = labels.sample(frac=1, random_state=0).groupby([*labels], observed=True).cumcount()
    return turn.reindex(labels.index) < max_cells


def _labels(adata: AnnData, *columns: str) -> pd.Series:
    """Return the first of the columns that the cells have, without their names, which may come twice."""
    for column in columns:
        if column in adata.obs:
            return adata.obs[column].astype(object).reset_index(drop=True)
    file = f"{adata.uns['scbmlp_source']['name']}.h5ad"
    raise KeyError(f"{file} has no {' or '.join(columns)} in obs, only {', '.join(adata.obs)}; rename its columns.")


def _clean_labels(obs: pd.DataFrame) -> pd.DataFrame:
    """Return the labels of the screen's cells of 24 hours that have them all, by row number, doses as numbers."""
    columns = [*CONDITION, "pathway", "target", "replicate", "plate", "ncounts"]
    if missing := [column for column in columns if column not in {*obs, "pathway", "target", "plate"}]:
        raise KeyError(f"sciplex3.h5ad has no {', '.join(missing)} in obs, only {', '.join(obs)}; rename its columns.")
    obs = obs.reset_index(drop=True)
    given = obs["dose_value"]
    control = obs["perturbation"] == "control"
    dose = as_numbers(given, unit="nM").mask(control, 0.0)
    unread = given[dose.isna() & ~given.astype(str).isin(["", "nan", "None", "NaN", "<NA>"])]
    if len(unread):
        some = f"{len(unread)} cells, such as {', '.join(map(repr, unread.unique().tolist()[:5]))}"
        raise ValueError(f"sciplex3.h5ad has doses that are no numbers of nM in {some}; write numbers.")
    obs["dose_value"] = dose
    known = obs[CONDITION].notna().all(axis=1)
    if "time" in obs:
        day = as_numbers(obs["time"], unit="h") == 24
        if not day.any():
            some = f"obs['time'], which holds {', '.join(map(repr, obs['time'].unique().tolist()[:5]))}"
            raise ValueError(f"sciplex3.h5ad has no cell of 24 hours in {some}; write hours as numbers, or drop it.")
        known &= day
    return obs.loc[known, [column for column in columns if column in obs]]


def _part(adata: AnnData, obs: pd.DataFrame, layer: str | None = None, genes: Any = slice(None)) -> AnnData:
    """Return the cells whose row numbers index `obs`, read block by block from a layer, or from X without it."""
    x, rows = adata.X, obs.index.to_numpy()
    if path := adata.uns.pop("path", None):
        with h5py.File(path) as file:
            x = StoredMatrix(path, layer if f"layers/{layer}" in file else None)
    parts = np.split(rows, np.flatnonzero(np.diff(rows // BLOCK)) + 1)
    blocks = [sparse.csr_matrix(x[part])[:, genes] for part in parts]
    obs = obs.set_index(adata.obs_names[rows])
    for column in obs.select_dtypes(["category", "object"]):
        obs[column] = obs[column].astype("category").cat.remove_unused_categories()
    return AnnData(sparse.vstack(blocks, format="csr"), obs=obs, var=adata.var.loc[genes], uns=adata.uns)


def _read(name: str, kind: str, path: Path, whole: bool) -> AnnData:
    """Read a file, or all of it but its matrices, and note its source, unless its cells were simulated before."""
    with reading(path, "delete it and try again" if kind == "download" else "replace it with a whole copy"):
        if whole:
            adata = anndata.read_h5ad(path)
            numeric_matrix(adata.X, "X")
        else:
            with h5py.File(path) as file:
                adata = AnnData(**{part: read_elem(file[part]) for part in ("obs", "var", "uns") if part in file})
            adata.uns["path"] = str(path)
    adata.var_names_make_unique()
    if adata.uns.get("scbmlp_source", {}).get("kind") != "simulated":
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        adata.uns["scbmlp_source"] = {"name": name, "kind": kind, "file": path.name, "sha256": digest}
    return adata


def _first_of(
    name: str,
    download: Callable[[Path], None] | None = None,
    simulation: Callable[[], AnnData] | None = None,
    *,
    whole: bool = True,
) -> AnnData:
    """Return the data set from the first source that has it, or from the one that the environment forces."""
    forced = os.environ.get("SCBMLP_DATA_SOURCE") or None
    if forced not in (None, *KINDS):
        raise ValueError(f"SCBMLP_DATA_SOURCE={forced!r} is unknown; set it to {', '.join(KINDS)}, or unset it.")
    file, lacking = f"{name}.h5ad", []
    remedy = f"set SCBMLP_DATA_DIR to the folder that holds {file}"
    for kind in [forced] if forced else KINDS:
        if kind == "local":
            path = data_file(file)
            if path and path.is_file():
                return _read(name, kind, path, whole)
            lacking.append(f"{path or f'$SCBMLP_DATA_DIR/{file}'} is not there")
        elif kind == "download" and download:
            try:
                return _read(name, kind, _fetched(file, download), whole)
            except ConnectionError as error:
                lacking.append(f"its download failed ({error})")
                if forced:
                    raise OSError(f"{name}: {lacking[0]}; try again, or {remedy}.") from error
        elif kind == "simulated" and simulation:
            if not forced:
                warn(f"{', '.join(lacking)}: these are SIMULATED cells.")
            return simulation()
        else:
            lacking.append(f"no {'public download' if kind == 'download' else 'simulation'} has {name}")
    but = f"SCBMLP_DATA_SOURCE={forced}, but " if forced else ""
    remedy += ", and unset SCBMLP_DATA_SOURCE" if forced else ""
    raise FileNotFoundError(f"{but}{', '.join(lacking)}; {remedy}.")


def _fetched(file: str, download: Callable[[Path], None]) -> Path:
    """Return a download that the cache keeps; one under way has a name of its own, and is never taken for the data."""
    cached = Path(platformdirs.user_cache_dir("scbmlp"), file)
    if cached.is_file():
        return cached
    part = cached.with_name(f"{cached.stem}-{os.getpid()}-partial.h5ad")  # one for each process that downloads now
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        download(part)
        return part.replace(cached)
    except Exception as error:  # no network, or a file cut short: each library has its own words
        raise ConnectionError(str(error)) from error
    finally:
        part.unlink(missing_ok=True)


def _download(path: Path, url: str) -> None:
    """Download a file and open it, which finds one cut short."""
    import scanpy

    with scanpy.settings.verbosity.override("error"):  # a failure is told once, by the caller
        scanpy.read(path, backed="r", backup_url=url).file.close()


def _download_pancreas(path: Path) -> None:
    _download(path, PANCREAS_URL)


@dataclass(frozen=True)
class DataCard:
    """What a page says of its cells, first of all whether they are simulated, or of its run; ``rows`` by name."""

    simulated: bool
    rows: pd.Series

    def __repr__(self) -> str:
        lines = [f"{key}: {value}" for key, value in self.rows.items()]
        return "\n".join(["SIMULATED CELLS", *lines] if self.simulated else lines)

    def _repr_html_(self) -> str:
        return (BANNER if self.simulated else "") + as_html(self.rows)


def _spread(values: np.ndarray) -> str:
    """Return the median of a number of every cell, and where most of them lie."""
    median, low, high = np.quantile(np.asarray(values), [0.5, 0.05, 0.95])
    return f"median {median:,.0f}, 5% to 95% {low:,.0f} to {high:,.0f}"


def data_card(adata: AnnData) -> DataCard:
    """Describe a data set: where it is from, checksum, size, sparsity and labels.

    Counts are shown by the total of a cell, other expression by the highest value and the genes detected in a cell.

    Parameters
    ----------
    adata
        Cells of this module, of ``simulate`` or of a report.

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
    source, stored = adata.uns["scbmlp_source"], entries(adata.X)
    simulated = source["kind"] == "simulated"
    rows = {
        "Data set": source["name"],
        "Source": f"simulation, seed {source['seed']}" if simulated else f"{ORIGIN[source['kind']]} {source['file']}",
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
    """Return what the run of a page took: the time since scbmlp was imported, the most memory, and the versions.

    Parameters
    ----------
    adata
        Cells of the page, for their number.

    Examples
    --------
    >>> sources.run_card(adata).rows["Data"]
    '1,000 cells x 40 genes'
    """
    rows = {} if adata is None else {"Data": f"{adata.n_obs:,} cells x {adata.n_vars:,} genes"}
    rows["Run time"] = f"{time.perf_counter() - BEGAN:.0f} s"
    if sys.platform != "win32":  # which does not say
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes
        rows["Peak memory"] = f"{unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9:.1f} GB"
    rows["Python"] = f"{platform.python_version()} on {platform.system()}, {os.cpu_count()} processors"
    rows["Packages"] = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return DataCard(False, pd.Series(rows))
