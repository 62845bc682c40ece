"""Where the cells come from: a local file, the public download, or a simulation, and which it was."""

from __future__ import annotations

import hashlib
import html
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import platformdirs
from anndata import AnnData
from scipy import sparse

from scbmlp import simulate

KINDS = ("local", "download", "simulated")


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
        ``SCBMLP_DATA_SOURCE`` is unknown.
    FileNotFoundError
        ``SCBMLP_DATA_SOURCE=local``, and the file is not there.
    OSError
        A file cannot be read (it names the file to delete), or a forced download failed.
    """
    return _first_of("pancreas", _download_pancreas, simulate.pancreas)


def _download_pancreas(path: Path) -> None:
    with warnings.catch_warnings():  # scvelo silences the whole session when it is imported
        import scvelo

        scvelo.datasets.pancreas(file_path=path)


def _first_of(name: str, download: Callable[[Path], None], simulation: Callable[[], AnnData]) -> AnnData:
    """Return the data set from the first source that has it, or from the one that the environment forces."""
    forced = os.environ.get("SCBMLP_DATA_SOURCE") or None
    if forced not in (None, *KINDS):
        raise ValueError(f"SCBMLP_DATA_SOURCE={forced!r} is unknown; set it to {', '.join(KINDS)}, or unset it.")
    folder = os.environ.get("SCBMLP_DATA_DIR")
    local = Path(folder, f"{name}.h5ad") if folder else None
    if forced == "local" and not (local and local.is_file()):
        raise FileNotFoundError(
            f"SCBMLP_DATA_SOURCE=local, but {local or f'$SCBMLP_DATA_DIR/{name}.h5ad'} is not there; set "
            f"SCBMLP_DATA_DIR to the folder that holds {name}.h5ad, or unset SCBMLP_DATA_SOURCE."
        )
    if forced in (None, "local") and local and local.is_file():
        return _read(name, "local", local)
    if forced in (None, "download"):
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
            warnings.warn(
                f"no {name}.h5ad in $SCBMLP_DATA_DIR and no download ({error}): these are SIMULATED cells.",
                UserWarning,
                stacklevel=3,
            )
        else:
            return _read(name, "download", cached)
    return simulation()


def _fetch(cached: Path, download: Callable[[Path], None]) -> None:
    """Download under another name first, so that an interrupted download is never taken for the data."""
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_suffix(".partial.h5ad")
    try:
        download(partial)
        partial.replace(cached)
    except Exception as error:  # no network, no scvelo, or a file cut short: each library has its own words
        raise OSError(str(error)) from error
    finally:
        partial.unlink(missing_ok=True)


def _read(name: str, kind: str, path: Path) -> AnnData:
    try:
        adata = anndata.read_h5ad(path)
    except Exception as error:  # h5py and anndata raise many kinds for a file cut short
        remedy = "delete it and try again" if kind == "download" else "replace it with a whole copy"
        raise OSError(f"{path} cannot be read ({error}); {remedy}.") from error
    adata.var_names_make_unique()
    if adata.uns.get("scbmlp_source", {}).get("kind") == "simulated":
        return adata  # somebody saved simulated cells under this name
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    adata.uns["scbmlp_source"] = {"name": name, "kind": kind, "file": path.name, "sha256": digest}
    return adata


@dataclass(frozen=True)
class DataCard:
    """What a page must say of its cells before it says anything else.

    Parameters
    ----------
    simulated
        Whether the cells are simulated.
    rows
        What is known of them.
    """

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
        cells = "".join(
            f'<tr><th style="text-align:left;vertical-align:top">{html.escape(str(key))}</th>'
            f'<td style="text-align:left;overflow-wrap:anywhere">{html.escape(str(value))}</td></tr>'
            for key, value in self.rows.items()
        )
        return (banner if self.simulated else "") + f"<table><tbody>{cells}</tbody></table>"


def data_card(adata: AnnData) -> DataCard:
    """Describe a data set of this module: source, checksum, size, sparsity and labels.

    Parameters
    ----------
    adata
        Cells from this module or from ``simulate``.

    Raises
    ------
    KeyError
        `adata` does not say where it is from.
    """
    if "scbmlp_source" not in adata.uns:
        raise KeyError("adata.uns has no 'scbmlp_source'; a data card is for cells from scbmlp.sources or simulate.")
    source = adata.uns["scbmlp_source"]
    simulated = source["kind"] == "simulated"
    stored = adata.X.data if sparse.issparse(adata.X) else adata.X
    depth = np.asarray(adata.X.sum(axis=1)).ravel()
    rows = {
        "Data set": source["name"],
        "Source": {
            "local": f"real cells, local file {source.get('file')}",
            "download": f"real cells, public download {source.get('file')}",
            "simulated": f"simulation, seed {source.get('seed')}",
        }[source["kind"]],
        "Cells x genes": f"{adata.n_obs:,} x {adata.n_vars:,}",
        "Zeros": f"{1 - np.count_nonzero(stored) / adata.n_obs / adata.n_vars:.0%} of the entries",
        "Total a cell": f"median {np.median(depth):,.0f}, 5% to 95% {np.quantile(depth, 0.05):,.0f} to "
        f"{np.quantile(depth, 0.95):,.0f}",
    }
    for key in adata.obs.select_dtypes("category"):
        sizes = adata.obs[key].value_counts()
        rows[f"Labels: {key}"] = ", ".join(f"{label} {size:,}" for label, size in sizes[sizes > 0].head(12).items())
    rows["SHA-256"] = source.get("sha256") or hashlib.sha256(np.ascontiguousarray(stored).tobytes()).hexdigest()
    return DataCard(simulated, pd.Series(rows))
