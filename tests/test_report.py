"""Does one command make a page of anybody's cells, and refuse those that do not fit before it trains anything?"""

import base64
import gzip
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.io
from anndata import AnnData
from anndata.tests.helpers import assert_adata_equal
from scipy import sparse

import scbmlp
from scbmlp import preparing
from scbmlp import report as reporting
from scbmlp.report import FILES, main, prepare, report, template
from scbmlp.storage import writable

nbformat = pytest.importorskip("nbformat", reason="it comes with the report extra")
pytest.importorskip("nbconvert", reason="it comes with the report extra")
BeautifulSoup = pytest.importorskip("bs4").BeautifulSoup
SPEC = importlib.util.spec_from_file_location("fuzz", Path(__file__).parent.parent / "benchmarks" / "fuzz.py")
fuzz = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz)
N, G = 240, 40
HERE = os.environ | {"PYTHONPATH": str(Path(scbmlp.__file__).parent.parent)}


def own_cells():
    """Three classes, two of them by the exclusive-or of two programs; a drug; numbers in obsm; colours of scanpy's."""
    rng, label = np.random.default_rng(0), np.arange(N) % 3
    first = rng.integers(0, 2, N)
    on = np.stack([first, first ^ (label == 1), label == 0], axis=1).repeat(10, axis=1)
    rate = np.exp(0.3 + rng.normal(0, 0.3, G))[None] * np.exp(1.5 * np.pad(on, ((0, 0), (0, G - 30))))
    x = np.log1p(rng.poisson(rate) / 1.7)
    obs = pd.DataFrame({"type": pd.Categorical(np.array(["a/b", "<b>", "c"])[label])}, [f"cell {i}" for i in range(N)])
    obs["drug"] = pd.Categorical(np.array(["vehicle", "one", "two"])[rng.integers(0, 3, N)])
    adata = AnnData(sparse.csr_matrix(x, dtype=np.float32), obs, pd.DataFrame(index=[f"gene{i}" for i in range(G)]))
    adata.obsm["numbers"] = np.column_stack([x[:, 0] * x[:, 1], x[:, 2]]).astype(np.float32)
    adata.uns["type_colors"] = ["#111111", "#222222", "#333333"]
    return adata


def scaled(adata):
    """What scanpy's tutorials leave behind: scaled values of some genes, log-normalised ones of all in raw."""
    adata.raw = adata.copy()
    adata = adata[:, : G - 5].copy()
    adata.X = adata.X.toarray()
    sc.pp.scale(adata)
    return adata


def shortened(source, **step):
    """The template cut down to its parameters and one more cell."""
    notebook = nbformat.reads(template(), as_version=4)
    last = nbformat.v4.new_code_cell(source, metadata={"scbmlp": step})
    notebook.cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])] + [last]
    return nbformat.writes(notebook)


@pytest.fixture
def never_trains(monkeypatch):
    def run(*arguments):
        raise AssertionError("the notebook was run")

    monkeypatch.setattr(reporting, "_run", run)


def test_report_of_a_file_with_scaled_cells_and_log_normalised_raw(tmp_path, capsys):
    path, out, sets = tmp_path / "own.h5ad", tmp_path / "new" / "report", tmp_path / "sets.gmt"
    scaled(own_cells()).write_h5ad(path)
    sets.write_text("first\t\t" + "\t".join(f"GENE{i}" for i in range(12)) + "\n")
    page = report(path, out, class_key="type", gene_sets=sets, progress=False)
    assert page == out / "report.html" and sorted(os.listdir(out)) == sorted(FILES)
    assert os.listdir(out.parent) == ["report"]  # nothing beside it

    html = page.read_text("utf-8")
    assert "<title>own.h5ad: type</title>" in html and "is scaled" not in html
    assert re.search(r"holds negative values .* <code>raw</code> has log-normalised values", html)
    assert "scbmlp report own.h5ad --class-key type --gene-sets sets.gmt --seed 0" in html
    assert str(tmp_path) not in html
    # Nothing comes from elsewhere, and no class can write into the page.
    assert not re.search(r"""(src|href)=["'](?!data:|#)|<script|@import|url\((?!data:)""", html)
    assert "&lt;b&gt;" in html and ">b<" not in html and "<b></th>" not in html and "<b></td>" not in html
    assert html.count("<img ") >= 2 and 'alt=""' not in html and "Warning" not in html
    assert html.index("The answer</h2>") < html.index("The cells</h2>") and html.count("The answer</h2>") == 1
    table = re.search(r'download="trials.csv" href="data:text/csv;base64,([^"]+)"', html)[1]
    assert b"linear in genes" in base64.b64decode(table)

    notebook = nbformat.read(out / "report.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs and not [output for output in outputs if output.output_type in ("stream", "error")]
    assert not any("widget" in kind for output in outputs for kind in output.get("data", {}))

    adata = anndata.read_h5ad(out / "cells.h5ad")
    assert adata.shape == (N, G - 5) and adata.X.min() >= 0
    assert {"modules_a_b", "modules_<b>", "modules_c"} <= set(adata.varm)
    assert adata.uns["modules_c"]["trust"].shape[0] == 3 and adata.obsm["X_modules_c"].shape == (N, 3)
    assert adata.varm["linear_axes"].shape == (G - 5, 3) and list(adata.uns["linear_axes"]) == ["<b>", "a/b", "c"]

    before = page.read_bytes()
    assert main(["report", str(path), "--class-key", "type", "--out", str(out)]) == 2
    assert f"has {', '.join(FILES)} already; name another folder" in capsys.readouterr().err
    assert page.read_bytes() == before


CLASSES = {"class_key": "type"}
OPTIONS = {
    "no target": ({}, ValueError, "0 are named; name one"),
    "two targets": (CLASSES | {"target_key": "numbers"}, ValueError, "2 are named; name one"),
    "no such column": ({"class_key": "typ"}, KeyError, r"class_key='typ' is not a column.*did you mean type\?"),
    "no such numbers": ({"target_key": "number"}, KeyError, "target_key='number' is not in adata.obsm"),
    "no control": ({"perturbation_key": "drug"}, ValueError, "control=None go together"),
    "another control": ({"perturbation_key": "drug", "control": "DMSO"}, KeyError, "control='DMSO' is no label"),
    "no such layer": (CLASSES | {"layer": "log"}, KeyError, "layer='log' is not in adata.layers"),
    "no such sets": (CLASSES | {"gene_sets": "none.gmt"}, ValueError, "neither a GMT file that can be read"),
    "half a gene": (CLASSES | {"n_genes": 0.5}, ValueError, "n_genes=0.5: a whole number of at least 2"),
    "negative seed": (CLASSES | {"seed": -1}, ValueError, "seed=-1: a whole number of at least 0"),
}
RARE = ["rare"] * 3 + ["b"] * (N - 3)
CHANGED = {
    "no logarithm": (lambda a: setattr(a, "X", 90.5 * a.X), r"holds values up to \d+, too large for logarithms"),
    "scaled, no raw": (lambda a: setattr(a, "X", a.X.toarray() - 1), r"negative values .*; log-normalised values are"),
    "a small class": (lambda a: a.obs.__setitem__("type", RARE), "class 'rare' has 3 cells"),
    "nothing": (lambda a: setattr(a, "X", a.X * 0), "is 0 everywhere"),
    "a NaN": (lambda a: a.X.data.__setitem__(0, np.nan), "holds NaN or infinite values in 1 of 240 cells"),
}
BAD = {name: (lambda a: None, *case) for name, case in OPTIONS.items()}
BAD["counts"] = (
    lambda a: setattr(a, "X", a.X.rint()), CLASSES | {"no_normalize": True}, ValueError,
    r"holds only whole numbers, like raw counts; .*normalize_total",
)  # fmt: skip
BAD |= {name: (change, CLASSES, ValueError, match) for name, (change, match) in CHANGED.items()}


@pytest.mark.parametrize(("change", "options", "error", "match"), BAD.values(), ids=BAD)
def test_options_and_cells_that_do_not_fit_are_refused_before_training(
    change, options, error, match, tmp_path, never_trains
):
    adata = own_cells()
    change(adata)
    with pytest.raises(error, match=match):
        report(adata, tmp_path / "report", **options)
    assert not os.listdir(tmp_path)


def test_remedy_names_where_log_normalised_values_are():
    adata = own_cells()
    adata.layers["logs"], adata.X = adata.X.copy(), adata.X.rint()
    with pytest.raises(ValueError, match=r"name a layer that has them: 'logs'"):
        prepare(adata, class_key="type", no_normalize=True)
    np.testing.assert_array_equal(
        prepare(adata, class_key="type", layer="logs").train.x.toarray(),
        prepare(own_cells(), class_key="type").train.x.toarray(),
    )
    counts = own_cells()
    counts.raw, counts.X = counts.copy(), counts.X.rint()
    with pytest.raises(ValueError, match=r"adata\.raw has them: adata\.raw\.to_adata\(\)"):
        prepare(counts, class_key="type", no_normalize=True)


@pytest.mark.parametrize("layer", [None, "counts"])
def test_counts_become_logarithms_and_the_page_says_so(layer):
    adata = own_cells()
    adata.layers["counts"] = adata.X.rint()
    if layer is None:
        adata.X = adata.layers["counts"].copy()
    known = AnnData(adata.layers["counts"].copy())
    sc.pp.normalize_total(known, target_sum=1e4)
    sc.pp.log1p(known)
    before = adata.copy()
    found = prepare(adata, class_key="type", layer=layer)
    assert_adata_equal(adata, before)
    np.testing.assert_allclose(found.train.x.toarray(), known.X.toarray()[found.train.indices], rtol=1e-5)
    assert f"`{layer or 'X'}` has counts. They were scaled to 10,000 a cell" in found.notes[0]
    kept = found.adata.X if layer is None else found.adata.layers[layer]
    np.testing.assert_allclose(kept.toarray(), known.X.toarray(), rtol=1e-5)


def test_scaled_counts_become_logarithms_and_half_logged_cells_are_refused():
    adata = own_cells()
    counts = (6 * adata.X).rint()
    adata.X = counts * 0.5
    found = prepare(adata, class_key="type")
    known = AnnData(counts.copy())
    sc.pp.normalize_total(known, target_sum=1e4)
    sc.pp.log1p(known)
    np.testing.assert_allclose(found.train.x.toarray(), known.X.toarray()[found.train.indices], rtol=1e-4)
    assert "`X` has scaled counts. They were scaled to 10,000 a cell" in found.notes[0]
    with pytest.raises(ValueError, match="holds counts that were scaled and not logged; log-normalised"):
        prepare(adata, class_key="type", no_normalize=True)
    adata.X = sparse.vstack([known.X[:120], counts[120:] * 0.5]).tocsr()
    with pytest.raises(ValueError, match=r"multiples of one number, like counts, in \d+% of its cells"):
        prepare(adata, class_key="type")


def test_gene_sets_of_other_genes_or_in_two_files_are_refused(tmp_path):
    sets = tmp_path / "sets.gmt"
    sets.write_text("strange\t\tENSG1\tENSG2\tENSG3\tENSG4\tENSG5\n")
    with pytest.raises(ValueError, match="none of 1 gene sets has 5 to 500 of the 40 genes, such as gene0"):
        prepare(own_cells(), class_key="type", gene_sets=sets)
    with pytest.raises(ValueError, match="gene_sets has 'strange' in two files"):
        prepare(own_cells(), class_key="type", gene_sets=[sets, sets])


def test_scaled_cells_are_read_from_raw_and_left_as_they_are():
    adata = scaled(own_cells())
    before = adata.copy()
    cells = prepare(adata, class_key="type")
    assert_adata_equal(adata, before)
    x = own_cells().X[cells.test.indices, : G - 5]
    np.testing.assert_array_equal(cells.test.x.toarray(), x.toarray())
    assert list(cells.test.gene_names) == list(adata.var_names) and "type" in cells.adata.obs
    assert len(cells.notes) == 1 and "scaled expression" in cells.notes[0]
    assert prepare(own_cells(), class_key="type").notes == []


def test_targets_are_permuted_within_a_batch_and_a_confounded_one_is_said():
    cells = own_cells()
    assert prepare(cells, class_key="type").strata is None
    cells.obs["batch_id"] = np.arange(cells.n_obs) % 2
    found = prepare(cells, class_key="type")
    assert found.strata.equals(cells.obs["batch_id"].astype(str)) and "within each `batch_id`" in " ".join(found.notes)
    assert "confounded" not in " ".join(found.notes)
    cells.obs["batch_id"] = "plate " + cells.obs["type"].astype(str)
    assert "tells the class of 100% of the cells" in " ".join(prepare(cells, class_key="type").notes)
    cells.obs["batch_id"] = ["one", *["two"] * (cells.n_obs - 1)]  # in one part alone
    assert prepare(cells, class_key="type").strata is None


def test_whole_groups_are_in_one_part_and_classes_of_one_group_are_left_out():
    cells = own_cells()
    cells.obs["donor"] = [f"d{i}" for i in np.random.default_rng(0).integers(0, 6, cells.n_obs)]
    cells.obs["type"] = cells.obs["type"].cat.add_categories("rare")
    cells.obs.iloc[(cells.obs["donor"] == "d1").to_numpy().nonzero()[0][:9], 0] = "rare"
    found = prepare(cells, class_key="type", group_key="donor")
    groups = [set(found.strata.iloc[part.indices]) for part in found.parts]
    assert set.union(*groups) == set(cells.obs["donor"]) and sum(map(len, groups)) == 6 and min(map(len, groups)) > 0
    assert found.grouped and len(found.adata) == cells.n_obs - 9 and "rare" not in found.train.output_names
    assert "left out: rare." in " ".join(found.notes) and "in one part alone" in " ".join(found.notes)
    assert "scbmlp_part" not in found.adata.obs
    numbers = prepare(cells, target_key="numbers", group_key="donor")
    assert [len(part) for part in numbers.parts] == [
        sum(numbers.strata.isin(set(numbers.strata.iloc[part.indices]))) for part in numbers.parts
    ]
    cells.obs["donor"] = np.where(np.arange(cells.n_obs) % 2, "a", "b")
    with pytest.raises(ValueError, match="group_key='donor' has 2 groups; three are needed"):
        prepare(cells, class_key="type", group_key="donor")
    with pytest.raises(ValueError, match="not with a perturbation_key"):
        prepare(cells, perturbation_key="drug", control="vehicle", group_key="donor")
    with pytest.raises(KeyError, match="group_key='lane'"):
        prepare(cells, class_key="type", group_key="lane")


def test_most_variable_genes_are_taken_of_many_or_on_demand(monkeypatch):
    cells = prepare(own_cells(), class_key="type", n_genes=10)
    expected = sc.pp.highly_variable_genes(own_cells(), n_top_genes=10, inplace=False)["highly_variable"]
    assert list(cells.train.gene_names) == list(own_cells().var_names[expected]) and cells.adata.n_vars == G
    assert "Of 40 genes the model sees the 10 most variable" in cells.notes[0]
    monkeypatch.setattr(preparing, "MOST_GENES", 30)
    monkeypatch.setattr(preparing, "N_GENES", 20)
    assert len(prepare(own_cells(), class_key="type").train.gene_names) == 20
    assert len(prepare(own_cells(), class_key="type", n_genes=50).train.gene_names) == G


def test_targets_are_numbers_of_obsm_or_responses_on_components_of_training_cells():
    numbers = prepare(own_cells(), target_key="numbers", seed=3)
    assert numbers.labels is None and numbers.train.y.shape == (168, 2)
    other = own_cells()
    cells = prepare(other, perturbation_key="drug", control="vehicle")
    assert len(cells.train.output_names) == 2 and cells.labels == "drug" and "response" not in other.obsm
    # Treated cells that the model does not learn from have no part in the components.
    test = cells.test.indices[(other.obs["drug"] != "vehicle").to_numpy()[cells.test.indices]]
    louder = np.ones(N)
    louder[test] = 1.5
    other.X = sparse.csr_matrix(other.X.multiply(louder[:, None]), dtype=np.float32)
    again = prepare(other, perturbation_key="drug", control="vehicle")
    np.testing.assert_array_equal(cells.train.y, again.train.y)
    assert not np.allclose(cells.test.y, again.test.y)


def test_folder_that_cannot_be_made_is_refused_before_training(tmp_path, never_trains):
    (tmp_path / "file").write_text("no folder")
    for out in ("file", "file/report"):
        with pytest.raises(ValueError, match="cannot be written to .* name another folder"):
            report(own_cells(), tmp_path / out, class_key="type")
    with pytest.raises(TypeError, match="cells is of type DataFrame; pass AnnData, or the path of an h5ad file"):
        prepare(own_cells().to_df(), class_key="type")


def test_nothing_is_left_of_a_report_that_fails(tmp_path, monkeypatch):
    def half(folder, *arguments):
        (folder / "report.partial").write_text("half")
        raise RuntimeError("the report stopped at 'tuning': MemoryError")

    monkeypatch.setattr(reporting, "_run", half)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("the last one")
    with pytest.raises(RuntimeError, match="stopped at 'tuning'"):
        report(own_cells(), tmp_path / "report", class_key="type", force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["report", "report.html"]
    assert (tmp_path / "report" / "report.html").read_text() == "the last one"


def test_tables_that_no_h5ad_file_holds_are_mended_and_said(tmp_path, monkeypatch):
    adata = own_cells()
    names = [f"gene{min(i, G - 2)}" for i in range(G)]
    adata.var_names = names
    adata.obs["nullable"] = pd.array(adata.obs_names, dtype="string")
    adata.obs["mixed"], adata.obs["_index"], adata.obs[3] = [1, "a", None] * 80, 1, 2.5
    adata.obs["day"] = pd.date_range("2020", periods=N)
    adata.uns |= {"set": {1}, "nested": {1: 2, "a/b": 3}, "type_colors": ["nan"] * 3}
    adata.obsm["X/pca"] = pd.DataFrame({"mixed": [1, "a"] * 120}, adata.obs_names)
    before, given = adata.copy(), []
    monkeypatch.setattr(
        reporting,
        "_run",
        lambda folder, parameters, *rest: given.append(prepare(parameters["path"], class_key="type")) or 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        report(adata, tmp_path / "report", class_key="type")
    assert not os.listdir(tmp_path) and adata.obs.equals(before.obs) and list(adata.var_names) == names
    assert adata.uns.keys() == before.uns.keys()
    kept, text = given[0].adata, " ".join(given[0].notes)
    assert kept.obs["nullable"].tolist() == list(adata.obs_names) and kept.obs["_index_"].eq(1).all()
    assert kept.obs["mixed"].astype(object).where(kept.obs["mixed"].notna(), None).tolist() == ["1", "a", None] * 80
    assert kept.obs["3"].eq(2.5).all() and kept.obs["day"].iloc[1] == "2020-01-02 00:00:00"
    assert kept.uns["nested"] == {"1": 2, "a_b": 3} and "set" not in kept.uns and set(kept.obsm) == {"numbers", "X_pca"}
    assert kept.var_names.is_unique and len(given[0].train.gene_names) == G
    for words in ("Made text", "`obs['mixed']`", "Left out", "`uns['set']`", "Renamed", "1 genes of `var`"):
        assert words in text


def test_cells_are_not_touched_where_a_file_holds_them_as_they_are():
    adata = own_cells()
    assert writable(adata) == (adata, [])


@pytest.mark.parametrize("force", [False, True])
def test_what_is_complete_is_kept_when_a_later_step_fails(force, tmp_path, monkeypatch, capsys):
    step = {"step": "late", "share": 1}
    later = shortened("open(f'{folder}/model.safetensors', 'w').close()\n1 / 0", **step)
    monkeypatch.setattr(reporting, "template", lambda: later)
    out = tmp_path / "report"
    if force:
        out.mkdir()
        (out / "report.html").write_text("the last one")
    own_cells().write_h5ad(tmp_path / "own.h5ad")
    words = ["report", str(tmp_path / "own.h5ad"), "--class-key", "type", "--out", str(out), *["--force"] * force]
    kept = out / "stopped" if force else out
    assert main(words) == 2
    assert f"division by zero; kept in {str(kept)!r}: model.safetensors" in capsys.readouterr().err
    assert (
        os.listdir(kept) == ["model.safetensors"]
        if not force
        else sorted(os.listdir(out)) == ["report.html", "stopped"]
    )


def test_page_and_notebook_come_though_the_cells_cannot_be_written(tmp_path, monkeypatch):
    last = shortened("raise OSError('disk full')", step="writing", share=1)
    monkeypatch.setattr(reporting, "template", lambda: last)
    with pytest.raises(
        RuntimeError, match=r"stopped at 'writing': OSError: disk full; kept in .*: report.html, report.ipynb$"
    ):
        report(own_cells(), tmp_path / "report", class_key="type", progress=False)
    page = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert "<code>cells.h5ad</code> could not be written (OSError: disk full)" in page and "Traceback (most" not in page


def test_an_error_that_nobody_expected_is_a_sentence_or_a_traceback_if_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(reporting, "report", lambda *rest, **options: 1 / 0)
    assert main(["report", "own.h5ad", "--class-key", "type"]) == 2
    assert capsys.readouterr().err == (
        "scbmlp report: ZeroDivisionError: division by zero; run it again with --debug to see where\n"
    )
    with pytest.raises(ZeroDivisionError):
        main(["report", "own.h5ad", "--class-key", "type", "--debug"])


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("1 / 0", "stopped at 'the step': ZeroDivisionError: division by zero"),
        ("import os\nos._exit(1)", "stopped at 'the step': its process ended, perhaps for want of memory"),
    ],
)
def test_a_step_that_fails_or_ends_the_kernel_is_named(source, match, tmp_path, monkeypatch):
    shorter = shortened(source, step="the step", share=1)
    monkeypatch.setattr(reporting, "template", lambda: shorter)
    with pytest.raises(RuntimeError, match=match):
        report(own_cells(), tmp_path / "report", class_key="type", progress=False)
    assert not os.listdir(tmp_path)


def test_ctrl_c_leaves_nothing_and_says_so(tmp_path):
    own_cells().write_h5ad(tmp_path / "own.h5ad")
    waiting = shortened("import time\nopen('begun', 'w').close()\ntime.sleep(600)")
    words = ["report", str(tmp_path / "own.h5ad"), "--class-key", "type", "--out", str(tmp_path / "out" / "report")]
    program = (
        f"import sys\nfrom scbmlp import report\nreport.template = lambda: {waiting!r}\nsys.exit(report.main({words}))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], env=HERE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if list(tmp_path.glob("out/report/.report-*/begun")) or process.poll() is not None:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and process.stderr.read() == "scbmlp report: interrupted, and nothing was written\n"
    assert not os.listdir(tmp_path / "out")


def test_commands_say_what_is_wrong_in_a_line(tmp_path, capsys, never_trains):
    (tmp_path / "text.h5ad").write_text("no cells")
    own_cells().write_h5ad(tmp_path / "own.h5ad")
    for name, key, words in (
        ("none.h5ad", "type", "there is no such file"),
        ("text.h5ad", "type", "scbmlp report: cells='text.h5ad' is no h5ad file that can be read"),
        ("own.h5ad", "typ", "class_key='typ' is not a column"),
    ):
        assert main(["report", str(tmp_path / name), "--class-key", key]) == 2
        assert words in capsys.readouterr().err
    assert main(["report", str(tmp_path / "own.h5ad")]) == 2 and "no key is named" in capsys.readouterr().err


def test_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "scbmlp", "report", "--help"], env=HERE, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--class-key" in done.stdout


def test_template_has_the_parameters_of_a_report(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(reporting, "_run", lambda folder, parameters, *rest: given.update(parameters) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report(own_cells(), tmp_path / "report", class_key="type")
    cells = [cell for cell in nbformat.reads(template(), as_version=4).cells if cell.cell_type == "code"]
    (parameters,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert re.findall(r"^(\w+) =", parameters.source, flags=re.M) == list(given)


def test_page_folds_code_and_leaves_out_what_is_of_the_book(tmp_path):
    image = {"image/png": "AAAA", "text/plain": "<Figure>"}
    cells = [
        nbformat.v4.new_markdown_cell("only in the book", metadata={"tags": ["book-only"]}),
        nbformat.v4.new_code_cell(
            "draw()",
            execution_count=1,
            outputs=[
                nbformat.v4.new_output("display_data", image),
                nbformat.v4.new_output("stream", name="stderr", text="log"),
            ],
            metadata={"mystnb": {"figure": {"caption": "What is drawn."}, "image": {"alt": 'a "line"'}}},
        ),
    ]  # fmt: skip
    html = reporting._page(nbformat.v4.new_notebook(cells=cells, metadata={"title": "<own>"}))
    assert "only in the book" not in html and "log" not in re.sub(r"<style>.*?</style>", "", html, flags=re.S)
    assert "<title>&lt;own&gt;</title>" in html and re.search(r'<details class="code">(?!.*open)', html)
    (image,) = BeautifulSoup(html, "html.parser").find_all("img")
    assert image["src"] == "data:image/png;base64,AAAA" and image["alt"] == 'a "line"'
    assert re.search(r"<figcaption>\s*<p>What is drawn\.</p>\s*</figcaption>", html)


def test_small_classes_and_cells_without_a_label_are_left_out_and_said():
    adata = scbmlp.simulate.planted_interactions(n_cells=300, n_genes=40, n_programs=4, genes_per_program=10)
    labels = adata.obs["label"].astype(object)
    labels.iloc[:10], labels.iloc[10:13] = None, "rare"
    adata.obs["label"] = labels
    with pytest.raises(ValueError, match="--min-cells"):
        prepare(adata, class_key="label")
    found = prepare(adata, class_key="label", min_cells=4)
    assert list(found.train.output_names) == ["off", "on"] and found.adata.n_obs == 287
    assert "10 of 300 cells have no label in `label`" in found.notes[0] and found.notes[1].endswith(": `rare`.")


@pytest.mark.parametrize("seed", [3, 137, 201, 1005, 8])  # four of them once failed
def test_random_files_end_with_a_page_or_a_sentence(seed, tmp_path):
    words = fuzz.random_file(seed, tmp_path / "cells.h5ad")
    wrong, said = fuzz.ends(tmp_path / "cells.h5ad", words, tmp_path / "out", whole=False)
    assert (wrong, said) == ("", "")


def ten_x(adata, path):
    """Write counts as 10x's h5 file has them, with an antibody as the last feature."""
    x = sparse.csc_matrix(adata.X.T.astype(np.int32))
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = adata.obs_names.to_numpy(bytes)
        group["data"], group["indices"], group["indptr"], group["shape"] = x.data, x.indices, x.indptr, x.shape
        features = group.create_group("features")
        features["id"] = [f"ENSG{i:011d}".encode() for i in range(x.shape[0])]
        features["name"], features["_all_tag_keys"] = adata.var_names.to_numpy(bytes), [b"genome"]
        features["feature_type"] = [b"Gene Expression"] * (x.shape[0] - 1) + [b"Antibody Capture"]
        features["genome"] = [b"GRCh38"] * x.shape[0]


def folder(adata, path):
    """Write counts as a folder of 10x's matrices."""
    path.mkdir()
    scipy.io.mmwrite(path / "matrix.mtx", sparse.coo_matrix(adata.X.T))
    features = [f"ENSG{i:011d}\t{name}\tGene Expression" for i, name in enumerate(adata.var_names)]
    for name, lines in {"features.tsv": features, "barcodes.tsv": adata.obs_names, "matrix.mtx": None}.items():
        text = (path / name).read_bytes() if lines is None else "\n".join([*lines, ""]).encode()
        (path / f"{name}.gz").write_bytes(gzip.compress(text))


WRITERS = {
    "cells.h5": ten_x,
    "cells": folder,
    "cells.zarr": lambda adata, path: adata.write_zarr(path),
    "cells.loom": lambda adata, path: adata.write_loom(path),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.filterwarnings("ignore")
def test_cells_of_other_kinds_of_files_are_those_of_h5ad(name, tmp_path):
    adata = own_cells()
    adata.X, adata.var["gene_name"] = adata.X.expm1().rint(), adata.var_names
    del adata.obsm, adata.uns
    WRITERS[name](adata, tmp_path / name)
    found = preparing.opened(tmp_path / name)
    np.testing.assert_array_equal(found.X.toarray(), adata.X.toarray())
    found.obs["type"] = adata.obs["type"].to_numpy()
    kept = list(prepare(found, class_key="type").train.gene_names)
    assert kept == list(adata.var_names[: G - (name == "cells.h5")])  # an antibody is no gene


@pytest.mark.parametrize(
    ("name", "way"),
    {
        "a.rds": "as h5ad in R", "a.csv": "make an h5ad file", "a.mtx.gz": "give the folder", "a.h5mu": "one modality",
        "a.zarr.zip": "unzip it", "a.h5ad": "take a whole copy", "b.h5ad": "the file is empty",
    }.items(),
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_a_way_on(name, way, tmp_path):
    (tmp_path / name).write_bytes(b"" if name.startswith("b") else b"something")
    with pytest.raises(ValueError, match=rf"cells='{name}' is no .* that can be read: .*{way}"):
        preparing.opened(tmp_path / name)
