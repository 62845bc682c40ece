"""Are the cells those that were asked for, is it said where they are from, and are simulated ones never mistaken?"""

import hashlib
import os
import shutil
import sys
import time
import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from scbmlp import simulate, sources

REAL = Path(os.environ.get("SCBMLP_DATA_DIR") or "../shared/data").resolve()
# Data sets that no simulation stands in for, the column that says what they are about, and where they are downloaded.
REAL_ONLY = {
    "a549_dexamethasone": (sources.dexamethasone, "dex_hours", None),
    "norman": (sources.norman, "perturbation", "NORMAN_URL"),
    "glioblastoma_panobinostat": (sources.glioblastoma, "condition", "ZHAO_URL"),
}
needs_real = pytest.mark.skipif(
    not all((REAL / f"{name}.h5ad").is_file() for name in REAL_ONLY),
    reason="the real cells are in $SCBMLP_DATA_DIR or ../shared/data",
)


def saved(adata, path):
    """Save cells in a file that says nothing of their source, as one from elsewhere would."""
    adata = adata.copy()
    adata.uns.clear()
    adata.write_h5ad(path)
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def small():
    return simulate.pancreas(seed=1, n_cells=80, n_genes=250)


@pytest.fixture(scope="module")
def screen():
    return simulate.sciplex3(seed=2, n_cells=4000, n_genes=300)


@pytest.fixture(scope="module")
def h5ad(small, tmp_path_factory):
    return saved(small, tmp_path_factory.mktemp("elsewhere") / "cells.h5ad")


@pytest.fixture(scope="module")
def store(screen, tmp_path_factory):
    """A file like the public one: int64 counts, more columns, cells without a label, a 72-hour arm, mouse genes."""
    adata = screen.copy()
    adata.X = adata.X.astype(np.int64)
    adata.var["ensembl_id"] = np.where(np.arange(adata.n_vars) % 3, "ENSG00000000", "ENSMUSG00000000")
    adata.obs["time"], adata.obs["pathway_level_1"], adata.obs["well"] = 24.0, adata.obs["pathway"], "A1"
    adata.obs.iloc[-300:, adata.obs.columns.get_loc("time")] = 72.0
    unlabelled = ["perturbation", "cell_line", "dose_value", "replicate", "plate", "time"]
    adata.obs.iloc[::29, [adata.obs.columns.get_loc(column) for column in unlabelled]] = np.nan
    return saved(adata, tmp_path_factory.mktemp("screen") / "sciplex3.h5ad")


@pytest.fixture
def expected(store):
    """What is to come of the store, cell by cell."""
    adata = anndata.read_h5ad(store)
    keep = [isinstance(cell.perturbation, str) and cell.time == 24 for cell in adata.obs.itertuples()]
    adata = adata[keep, ~adata.var["ensembl_id"].str.contains("MUS")].copy()
    adata.obs.loc[adata.obs["perturbation"] == "control", "dose_value"] = 0
    return adata


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCBMLP_DATA_DIR", "~/my data")
    (tmp_path / "my data").mkdir()
    return tmp_path / "my data"


@pytest.fixture
def local(folder, h5ad):
    return Path(shutil.copy(h5ad, folder / "pancreas.h5ad"))


@pytest.fixture
def local_screen(folder, store):
    return Path(shutil.copy(store, folder / "sciplex3.h5ad"))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "home" / "cache"


def cut_off(error):
    """Return a download that ends half-way."""

    def download(path):
        path.write_bytes(b"half a file")
        raise error

    return download


@pytest.fixture
def download(monkeypatch, h5ad):
    """Stand in for the network."""
    replacement = Mock(side_effect=lambda path: shutil.copy(h5ad, path))
    monkeypatch.setattr(sources, "_download_pancreas", replacement)
    return replacement


@pytest.fixture
def force(monkeypatch):
    return lambda kind: monkeypatch.setenv("SCBMLP_DATA_SOURCE", kind or "")


@pytest.fixture(autouse=True)
def closed_world(monkeypatch, cache, small, screen, download):
    monkeypatch.delenv("SCBMLP_DATA_DIR", raising=False)
    monkeypatch.delenv("SCBMLP_DATA_SOURCE", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *args, **kwargs: str(cache))
    monkeypatch.setattr(simulate, "pancreas", small.copy)
    monkeypatch.setattr(simulate, "sciplex3", lambda n_cells: screen.copy())
    for url in ("SCIPLEX3_URL", "NORMAN_URL", "ZHAO_URL"):
        monkeypatch.setattr(sources, url, "file:///nowhere/cells.h5ad")


# ----------------------------------------------------------------------------------------- which source, and when


@pytest.mark.parametrize(
    ("forced", "kind"), [(None, "local"), ("local", "local"), ("download", "download"), ("simulated", "simulated")]
)
def test_local_file_comes_first_unless_another_source_is_forced(
    local, cache, download, small, force, recwarn, forced, kind
):
    force(forced)
    for _ in range(2):
        adata = sources.pancreas()
        np.testing.assert_array_equal(adata.X.toarray(), small.X.toarray())
    origin = {"seed": 1} if kind == "simulated" else {"file": "pancreas.h5ad", "sha256": sha256(local)}
    assert adata.uns["scbmlp_source"] == {"name": "pancreas", "kind": kind} | origin
    assert download.call_count == (kind == "download") and not recwarn.list


def test_download_comes_second_and_once(cache, download, monkeypatch):
    monkeypatch.setenv("SCBMLP_DATA_DIR", "")  # as if unset
    for _ in range(2):
        assert sources.pancreas().uns["scbmlp_source"]["kind"] == "download"
    assert download.call_count == 1 and [path.name for path in cache.iterdir()] == ["pancreas.h5ad"]


def test_simulation_comes_last_with_a_warning_at_the_caller(cache, download):
    download.side_effect = cut_off(ConnectionError("no network"))
    with pytest.warns(UserWarning, match=r"pancreas.h5ad is not .*\(no network\): these are SIMULATED") as record:
        adata = sources.pancreas()
    assert [warning.filename for warning in record] == [__file__]
    assert adata.uns["scbmlp_source"] == {"name": "pancreas", "kind": "simulated", "seed": 1}
    assert list(cache.iterdir()) == []


def test_a_forced_source_that_has_nothing_is_an_error(local, cache, download, force):
    force("local")
    local.unlink()
    with pytest.raises(FileNotFoundError, match=rf"SCBMLP_DATA_SOURCE=local, but {local} .*; set SCBMLP_DATA_DIR"):
        sources.pancreas()
    assert download.call_count == 0
    force("download")
    download.side_effect = cut_off(ConnectionError("no network"))
    with pytest.raises(OSError, match=r"^pancreas: .* \(no network\); try again, or set SCBMLP_DATA_DIR"):
        sources.pancreas()
    download.side_effect = cut_off(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        sources.pancreas()
    assert list(cache.iterdir()) == []
    force("web")
    with pytest.raises(ValueError, match="SCBMLP_DATA_SOURCE='web' is unknown; set it to local, download, simulated"):
        sources.pancreas()


def test_two_downloads_at_once_do_not_share_a_file(cache, h5ad, monkeypatch):
    seen = []

    def first(path):
        seen.append(path)
        if len(seen) == 1:  # another process asks for the same while this one downloads
            monkeypatch.setattr(os, "getpid", lambda: -1)
            assert sources.pancreas().n_obs == 80
        assert not path.exists()
        shutil.copy(h5ad, path)

    monkeypatch.setattr(sources, "_download_pancreas", first)
    assert sources.pancreas().n_obs == 80
    assert len(set(seen)) == 2 and [path.name for path in cache.iterdir()] == ["pancreas.h5ad"]


# ------------------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("read", [sources.pancreas, sources.sciplex3])
def test_damaged_files_are_an_error_that_names_them(folder, cache, small, screen, force, read):
    force("local")
    path = saved(small if read is sources.pancreas else screen[:300], folder / f"{read.__name__}.h5ad")
    whole = path.read_bytes()
    for cut in [*np.random.default_rng(0).integers(0, len(whole) - 1, 6), len(whole) - 1000]:
        path.write_bytes(whole[:cut])
        with pytest.raises(OSError, match=rf"{path.name} cannot be read .*; replace it with a whole copy"):
            read()
    path.write_bytes(whole)
    with h5py.File(path, "r+") as file:
        file["X/indices"][7] = 10**8  # would end the process
    with pytest.raises(OSError, match="no valid sparse matrix .* whole"):
        read()
    force("download")
    cache.mkdir(parents=True)
    (cache / path.name).write_bytes(whole[:5000])
    with pytest.raises(OSError, match=f"{cache / path.name} cannot be read .*delete it and try again"):
        read()


def test_download_of_the_screen_is_whole_or_nothing(cache, store, tmp_path, force, monkeypatch):
    short = tmp_path / "short.h5ad"
    short.write_bytes(store.read_bytes()[:-1000])
    force("download")
    for url, message in {"file:///nowhere/sciplex3.h5ad": "nowhere", short.as_uri(): "truncated"}.items():
        monkeypatch.setattr(sources, "SCIPLEX3_URL", url)
        with pytest.raises(OSError, match=f"^sciplex3: its download failed .*{message}.*; try again"):
            sources.sciplex3()
        assert list(cache.iterdir()) == []
    monkeypatch.setattr(sources, "SCIPLEX3_URL", store.as_uri())
    assert sources.sciplex3(compounds="AR-42").uns["scbmlp_source"]["kind"] == "download"
    assert [path.name for path in cache.iterdir()] == ["sciplex3.h5ad"]


@pytest.mark.parametrize("name", ["pancreas", "sciplex3", "glioblastoma_panobinostat"])
def test_counts_come_from_a_layer_of_that_name_or_from_X_or_not_at_all(folder, h5ad, screen, name):
    def read(adata):
        saved(adata, folder / f"{name}.h5ad")
        return getattr(sources, name.split("_")[0])().X.toarray()

    adata = screen if name == "sciplex3" else stand_in(name, h5ad)
    normalised = AnnData(adata.X * 0.3, adata.obs, adata.var, layers={"counts": adata.X})
    np.testing.assert_array_equal(read(normalised), read(adata))
    del normalised.layers["counts"]
    with pytest.raises(ValueError, match=f"{name}.h5ad has no counts: .*; put raw counts into"):
        read(normalised)


# -------------------------------------------------------------------------------------------------------- cards


def test_card_of_simulated_cells_says_so_before_anything_else_even_from_a_file(folder, small):
    small.write_h5ad(folder / "pancreas.h5ad")
    for adata in (small, sources.pancreas()):
        card = sources.data_card(adata)
        assert card.simulated and repr(card).startswith("SIMULATED CELLS\n")
        assert card._repr_html_().startswith('<div role="alert"') and "SIMULATED CELLS" in card._repr_html_()
        assert card.rows["Source"] == "simulation, seed 1"
        assert card.rows["SHA-256"] == hashlib.sha256(small.X.data.tobytes()).hexdigest()


def test_card_of_real_cells_has_no_banner_and_its_numbers_are_right(local, small):
    card, counts = sources.data_card(sources.pancreas()), small.X.toarray()
    rows = card.rows
    assert not card.simulated and card._repr_html_().startswith("<table>")
    assert rows["Source"] == "real cells, local file pancreas.h5ad" and rows["Cells x genes"] == "80 x 250"
    assert rows["Zeros"] == f"{(counts == 0).mean():.0%} of the entries" and rows["SHA-256"] == sha256(local)
    depth = counts.sum(axis=1)
    assert f"median {np.median(depth):,.0f}, 5% to 95% {np.quantile(depth, 0.05):,.0f}" in rows["Total a cell"]
    sizes = small.obs["clusters"].value_counts()
    assert sorted(rows["Labels: clusters"].split(", ")) == sorted(f"{name} {size}" for name, size in sizes.items())
    for shown in (repr(card), card._repr_html_()):
        assert "simula" not in shown.lower()
        assert all(key in shown and value in shown for key, value in rows.items())
    # The same for dense cells; of log-normalised ones there is no total.
    x = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    for form in (np.asarray, sparse.csr_matrix):
        same, logged = (sources.data_card(AnnData(form(one), obs=small.obs, uns=small.uns)).rows for one in (counts, x))
        shared = ["Cells x genes", "Zeros", "Total a cell", "Labels: clusters"]
        assert same[shared].equals(rows[shared]) and "Values" not in same and "Total a cell" not in logged
        assert logged["Values"] == f"not counts: fractions up to {x.max():.2g}, as log-normalised expression has"
        assert logged["Genes a cell"].startswith(f"median {np.median((x > 0).sum(axis=1)):,.0f}, 5% to 95%")


def test_card_counts_stored_zeros_as_zeros_escapes_labels_and_needs_a_source():
    adata = AnnData(sparse.csr_matrix(([0.0, 1.0], ([0, 1], [0, 0])), (2, 1)))
    with pytest.raises(KeyError, match="has no 'scbmlp_source'"):
        sources.data_card(adata)
    adata.obs["<i>kind</i>"] = pd.Categorical(["<b>T cell</b>", "A & B"])
    adata.uns["scbmlp_source"] = {"name": "<u>", "kind": "local", "file": "a.h5ad", "sha256": "0"}
    page = sources.data_card(adata)._repr_html_()
    assert not any(tag in page for tag in ("<i>", "<b>", "<u>"))
    assert "&lt;b&gt;T cell&lt;/b&gt; 1" in page and "A &amp; B 1" in page and "50% of the entries" in page


def test_run_card_says_what_a_page_took():
    before = sources.run_card().rows
    held = np.ones(50_000_000)  # 0.4 GB
    rows = sources.run_card(AnnData(np.zeros((3, 2), "f4"))).rows
    assert "Data" not in before and rows["Data"] == "3 cells x 2 genes"
    assert float(rows["Peak memory"].split()[0]) >= held.nbytes / 1e9
    assert 0 <= int(rows["Run time"].split()[0]) <= time.perf_counter() - sources.BEGAN + 1
    assert f"numpy {np.__version__}" in rows["Packages"] and f"pandas {pd.__version__}" in rows["Packages"]
    assert rows["Python"].startswith(".".join(map(str, sys.version_info[:3])))


# ------------------------------------------------------------------------------------------------------ the screen


def test_screen_comes_clean(local_screen, expected):
    adata = sources.sciplex3()
    assert list(adata.obs_names) == list(expected.obs_names) and list(adata.var_names) == list(expected.var_names)
    np.testing.assert_array_equal(adata.X.toarray(), expected.X.toarray())
    assert sparse.isspmatrix_csr(adata.X) and adata.X.dtype == np.float32
    columns = ["cell_line", "perturbation", "dose_value", "pathway", "target", "replicate", "plate", "ncounts"]
    assert list(adata.obs) == columns and adata.obs["dose_value"].dtype == float and adata.obs.notna().all(axis=None)
    for column in columns:
        assert list(adata.obs[column]) == list(expected.obs[column])
        if adata.obs[column].dtype == "category":
            assert set(adata.obs[column].cat.categories) == set(expected.obs[column])
    source = {"name": "sciplex3", "kind": "local", "file": "sciplex3.h5ad", "sha256": sha256(local_screen)}
    assert adata.uns["scbmlp_source"] == source
    assert sources.data_card(adata).rows["Source"] == "real cells, local file sciplex3.h5ad"


def test_simulated_screen_comes_last_as_clean_as_a_real_one_and_with_its_truth(screen):
    with pytest.warns(UserWarning, match="sciplex3.h5ad is not there, .*: these are SIMULATED cells") as record:
        adata = sources.sciplex3(compounds="AR-42")
    assert [warning.filename for warning in record] == [__file__]
    assert sources.data_card(adata).simulated and "truth" in adata.uns
    assert (adata.obs.loc[adata.obs["perturbation"] == "control", "dose_value"] == 0).all()
    assert "Vehicle" not in adata.obs["perturbation"].cat.categories
    assert list(adata.obs_names) == list(screen.obs_names[screen.obs["perturbation"].isin(["AR-42", "control"])])


@pytest.mark.parametrize("kind", ["local", "simulated"])
@pytest.mark.parametrize(
    "wanted",
    [
        {"compounds": ["AR-42", "Trichostatin A (TSA)"]},
        {"compounds": "Ruxolitinib (INCB018424)", "min_counts": 200},
        {"max_cells": 2},
    ],
)
def test_part_of_the_screen_is_what_was_asked_for(local_screen, expected, screen, force, kind, wanted):
    force(kind)
    whole = expected if kind == "local" else screen
    obs, by = whole.obs, ["cell_line", "perturbation", "dose_value"]
    vehicle = obs["perturbation"] == "control"
    keep = obs["ncounts"] >= wanted.get("min_counts", 0)
    keep &= vehicle | obs["perturbation"].isin(np.atleast_1d(wanted.get("compounds", obs["perturbation"])))
    adata, again = (sources.sciplex3(**wanted) for _ in range(2))
    assert list(again.obs_names) == list(adata.obs_names) and 0 < adata.n_obs < whole.n_obs
    if "max_cells" in wanted:
        full = obs[~vehicle].groupby(by, observed=True).size()
        sizes = adata.obs[adata.obs["perturbation"] != "control"].groupby(by, observed=True).size()
        assert sizes.to_dict() == full.clip(upper=2).to_dict()
        keep = (vehicle | obs.index.isin(adata.obs_names)) & (full > 2).any()
    assert list(adata.obs_names) == list(whole.obs_names[keep])
    np.testing.assert_array_equal(adata.X.toarray(), whole[keep].X.toarray())


@pytest.mark.parametrize("layer", [None, "counts"])
def test_a_part_of_the_screen_takes_a_part_of_the_memory(local_screen, monkeypatch, layer):
    adata = anndata.read_h5ad(local_screen)
    adata.X = sparse.csr_matrix(np.ones(adata.shape, np.int64))
    if layer:
        adata.layers[layer], adata.X = adata.X, sparse.csr_matrix(adata.X, dtype=np.float32).log1p()
    adata.write_h5ad(local_screen)
    most = 16 * adata.n_obs * adata.n_vars
    monkeypatch.setattr(sources, "BLOCK", 256)
    del adata
    tracemalloc.start()
    part = sources.sciplex3(compounds="AR-42")
    _, used = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < most / 3 and not np.any(part.X.data % 1)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"compounds": "Trametinib"}, r"compounds has 'Trametinib', .* nearest to it: .*Trametinib \(GSK1120212\)"),
        ({"compounds": []}, r"compounds=\[\]"),
        ({"min_counts": 10**9}, "min_counts=1000000000; ask for more"),
        ({"max_cells": 0}, "max_cells=0: a whole number of at least 1"),
    ],
)
def test_part_that_is_not_there_is_an_error_that_says_what_is(local_screen, wanted, message):
    with pytest.raises(ValueError, match=message):
        sources.sciplex3(**wanted)


def test_columns_may_be_missing_if_nothing_depends_on_them(local_screen, expected, h5ad):
    whole = anndata.read_h5ad(local_screen)
    whole.obs = whole.obs.drop(columns=["plate", "pathway"])
    whole.write_h5ad(local_screen)
    adata = sources.sciplex3()
    assert not {"plate", "pathway"} & set(adata.obs) and list(adata.obs["target"]) == list(expected.obs["target"])
    whole.obs = whole.obs.drop(columns=["dose_value", "replicate"])
    whole.write_h5ad(local_screen)
    with pytest.raises(KeyError, match="has no dose_value, replicate in obs, only perturbation, .*; rename its col"):
        sources.sciplex3()
    for name in ("norman", "glioblastoma_panobinostat"):
        shutil.copy(h5ad, local_screen.with_stem(name))
        with pytest.raises(KeyError, match=f"{name}.h5ad has no .*perturbation.* in obs, only clusters, clusters_coa"):
            REAL_ONLY[name][0]()


def screen_file(folder, **columns):
    """Save a small screen of one compound at four doses, with columns as a file may have them."""
    n = 240
    x = sparse.csr_matrix(np.random.default_rng(0).poisson(1, (n, 8)).astype(np.float32))
    drug = np.array(["control", "AR-42"])[np.arange(n) % 2]
    dose = np.where(drug == "control", 0, 10 ** (1 + np.arange(n) // 2 % 4))
    obs = {"cell_line": "A549", "perturbation": drug, "dose_value": dose, "replicate": "rep1", "ncounts": 9}
    obs |= {name: [text.format(value) for value in dose] for name, text in columns.items()}
    var = pd.DataFrame({"ensembl_id": ["ENSG1"] * 6 + ["ENSMUSG1", None]}, [f"G{i}" for i in range(8)])
    AnnData(x, obs=pd.DataFrame(obs, map(str, range(n))), var=var).write_h5ad(folder / "sciplex3.h5ad")


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({}, None),
        ({"dose_value": "{:,}"}, None),
        ({"dose_value": "{} nM", "time": "24"}, None),
        ({"time": "24 h"}, None),
        ({"dose_value": "{} uM"}, "no numbers of nM in 120 cells, such as '10 uM'"),
        ({"dose_value": "high"}, "no numbers of nM in 120 cells, such as 'high'; write numbers"),
        ({"time": "one day"}, "no cell of 24 hours .* holds 'one day'; write hours"),
    ],
)
def test_doses_and_hours_are_read_from_text_and_no_cell_is_dropped_in_silence(folder, columns, error):
    screen_file(folder, **columns)
    if error:
        with pytest.raises(ValueError, match=error):
            sources.sciplex3()
    else:
        part = sources.sciplex3(compounds="AR-42")
        assert part.obs["dose_value"].value_counts().to_dict() == {0: 120, 10: 30, 100: 30, 1000: 30, 10000: 30}
        assert list(part.var_names) == [
            "G0",
            "G1",
            "G2",
            "G3",
            "G4",
            "G5",
            "G7",
        ]  # one is of a mouse, one without an id


# ------------------------------------------------------------------------------- data that no simulation stands in for


def stand_in(name, h5ad):
    """Return cells like those of the local file."""
    adata = anndata.read_h5ad(h5ad)
    if name == "norman":
        adata.X = adata.X.log1p()
        adata.obs["perturbation"] = pd.Categorical(np.resize(["control", "KLF1", "SET+KLF1"], adata.n_obs))
    elif name == "glioblastoma_panobinostat":
        adata.obs["condition"] = pd.Categorical(np.resize(["ctrl", "panobinostat"], adata.n_obs))
        adata.obs["patient_id"] = pd.Categorical(np.resize(["PW030", "PW030", "PW032", "PW032"], adata.n_obs))
    else:
        adata.obs["dex_hours"] = pd.Categorical(np.resize(["0", "1", "3"], adata.n_obs))
    return adata


@pytest.fixture
def public_norman(small, tmp_path, monkeypatch):
    """As pertpy's: log-normalised with counts in a layer, a column a guide, 150 cells of one label."""
    x, names = sparse.vstack([small.X] * 5, format="csr"), [f"cell{i}" for i in range(400)]
    adata = AnnData(x.log1p(), obs=pd.DataFrame(index=names), layers={"counts": x})
    adata.obs[["guide_KLF1", "guide_ids", "gemgroup"]] = 1, "KLF1", 1
    labels = np.repeat(["control", "KLF1", "KLF1+MAP2K6", None], [150, 100, 120, 30]).astype(object)
    adata.obs["perturbation_name"] = pd.Categorical(np.random.default_rng(0).permutation(labels))
    monkeypatch.setattr(sources, "NORMAN_URL", saved(adata, tmp_path / "public.h5ad").as_uri())
    return adata


@pytest.fixture
def public_tumours(small, tmp_path, monkeypatch):
    """As scPerturb's: other drugs, a patient without panobinostat, one without control, barcodes that come twice."""
    adata = small.copy()
    adata.obs = pd.DataFrame(index=np.resize(adata.obs_names[:60], adata.n_obs))
    adata.obs["sample"] = pd.Categorical(np.resize(["PW030-701", "PW030-704", "PW032", "PW029", "PW053"], adata.n_obs))
    drugs = np.resize(["control", "panobinostat", "etoposide", "control", "panobinostat", "control", "control"], 80)
    drugs[adata.obs["sample"] == "PW029"] = "control"
    drugs[adata.obs["sample"] == "PW053"] = "panobinostat"
    adata.obs["perturbation"] = pd.Categorical(drugs)
    monkeypatch.setattr(sources, "ZHAO_URL", saved(adata, tmp_path / "public.h5ad").as_uri())
    return adata


@pytest.mark.parametrize("name", REAL_ONLY)
def test_real_cells_come_from_their_local_file_or_the_source_that_is_forced_or_not_at_all(folder, h5ad, force, name):
    load, column, url = REAL_ONLY[name]
    path, expected = folder / f"{name}.h5ad", stand_in(name, h5ad)
    why = r"its download failed \(.*nowhere.*\)" if url else f"no public download has {name}"
    remedy = f"set SCBMLP_DATA_DIR to the folder that holds {name}.h5ad"
    with pytest.raises(FileNotFoundError, match=rf"{name}.h5ad is not .*, {why}, no simulation has {name}; {remedy}"):
        load()
    expected.write_h5ad(path)
    adata = load()
    assert not adata.isbacked and list(adata.obs_names) == list(expected.obs_names)
    np.testing.assert_array_equal(adata.X.toarray(), expected.X.toarray())
    assert list(adata.obs[column]) == list(expected.obs[column]) and adata.obs[column].dtype == "category"
    assert set(adata.obs) == set(expected.obs)
    source = {"name": name, "kind": "local", "file": f"{name}.h5ad", "sha256": sha256(path)}
    assert adata.uns["scbmlp_source"] == source
    card = sources.data_card(adata)
    assert not card.simulated and ("Total a cell" in card.rows) == (name != "norman")
    force("simulated")
    with pytest.raises(FileNotFoundError, match=f"=simulated, but no simulation has {name}; .* and unset"):
        load()
    force("download")
    message = f"{name}: its download failed .*; try again" if url else f"=download, but no public download has {name}; "
    with pytest.raises(OSError, match=message):
        load()
    path.write_bytes(h5ad.read_bytes()[:1000])
    force(None)
    with pytest.raises(OSError, match="cannot be read .*a whole copy"):
        load()


def test_downloaded_activations_have_the_columns_of_the_local_file_and_are_thinned_at_random(public_norman, cache):
    adata, *few = (sources.norman(max_cells=most) for most in (None, 40, 40))
    known = public_norman[public_norman.obs["perturbation_name"].notna()]
    assert list(adata.obs_names) == list(known.obs_names)
    assert list(adata.obs["perturbation"]) == list(known.obs["perturbation_name"])
    assert set(adata.obs["perturbation"].cat.categories) == {"control", "KLF1", "KLF1+MAP2K6"}
    assert not adata.obs.columns.str.startswith("guide").any()
    np.testing.assert_array_equal(adata.X.toarray(), known.X.toarray())
    assert adata.uns["scbmlp_source"]["kind"] == "download"
    assert [path.name for path in cache.iterdir()] == ["norman.h5ad"]
    assert "Values" in sources.data_card(adata).rows
    few, again = few
    assert few.obs["perturbation"].value_counts().to_dict() == {"control": 40, "KLF1": 40, "KLF1+MAP2K6": 40}
    assert list(again.obs_names) == list(few.obs_names) == list(adata.obs_names[adata.obs_names.isin(few.obs_names)])
    np.testing.assert_array_equal(few.X.toarray(), public_norman[few.obs_names].X.toarray())


def test_activations_stored_as_counts_are_normalised(folder, h5ad):
    adata = stand_in("norman", h5ad)
    adata.X = anndata.read_h5ad(h5ad).X
    adata.write_h5ad(folder / "norman.h5ad")
    np.testing.assert_allclose(np.expm1(sources.norman().X.toarray()).sum(axis=1), 1e4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_downloaded_tumours_have_the_columns_of_the_local_file(public_tumours, cache):
    adata = sources.glioblastoma()
    obs = public_tumours.obs
    patient, drug = obs["sample"].str[:5].to_numpy(), obs["perturbation"].to_numpy()
    keep = np.isin(patient, ["PW030", "PW032"]) & (drug != "etoposide")
    assert list(adata.obs["patient_id"]) == list(patient[keep])
    assert list(adata.obs["condition"]) == list(np.where(drug == "control", "ctrl", drug)[keep])
    assert set(adata.obs["condition"].cat.categories) == {"ctrl", "panobinostat"}
    assert set(adata.obs["patient_id"].cat.categories) == {"PW030", "PW032"}
    np.testing.assert_array_equal(adata.X.toarray(), public_tumours.X[keep].toarray())
    assert adata.uns["scbmlp_source"]["kind"] == "download" and "Total a cell" in sources.data_card(adata).rows
    assert [path.name for path in cache.iterdir()] == ["glioblastoma_panobinostat.h5ad"]


@needs_real
def test_real_files_are_what_the_docstrings_say(monkeypatch):
    monkeypatch.setenv("SCBMLP_DATA_DIR", str(REAL))
    hours = sources.dexamethasone()
    assert hours.shape == (2641, 1185) and list(hours.obs["dex_hours"].cat.categories) == ["0", "1", "3"]
    activated = sources.norman()
    labels = activated.obs["perturbation"]
    assert activated.shape == (3375, 250) and labels.value_counts().max() == 100 and "control" in set(labels)
    pairs = [label.split("+") for label in labels.cat.categories if "+" in label]
    assert len(pairs) == 15 and sum({*pair} <= set(labels) for pair in pairs) == 5
    recovered = anndata.read_h5ad(REAL / "norman.h5ad")[activated.obs_names].layers["counts_recovered"].toarray()
    counts = np.expm1(activated.X.toarray()) * activated.obs["ncounts"].to_numpy()[:, None] / 1e4
    np.testing.assert_allclose(counts, recovered, rtol=0.04, atol=0.5)
    tumours = sources.glioblastoma()
    assert tumours.shape == (5000, 300) and tumours.obs["patient_id"].nunique() == 5
    assert (tumours.obs.groupby("patient_id", observed=True)["condition"].value_counts() == 500).all()
    for adata, counted in ((hours, False), (activated, False), (tumours, True)):
        assert ("Total a cell" in sources.data_card(adata).rows) == counted
