"""Is a file read as the same cells in memory, by everything that walks cells, and does it say when it cannot be?"""

import os
import pickle
import shutil
import signal
import tracemalloc
import warnings
from pathlib import Path

import anndata
import h5py
import lightning
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from anndata import AnnData
from anndata.io import sparse_dataset
from scipy import sparse

from scbmlp import datasets, stores, training
from scbmlp.baselines import linear_baseline
from scbmlp.datasets import ExpressionDataset, get_classification_datasets, get_regression_datasets, match_genes
from scbmlp.evidence import random_directions
from scbmlp.interactions import audit, decompose, group_means, interaction_matrix, similarity
from scbmlp.knockoffs import knockoffs
from scbmlp.models import Config, ScBMLPClassifier, ScBMLPRegressor, solve
from scbmlp.modules import gene_modules
from scbmlp.stores import StoredMatrix
from tests.test_checks import fitted, small_cells  # noqa: F401, the fixture of small models

N, G = 120, 20
QUIET = {"enable_progress_bar": False}
FORMS = ["h5ad csr", "h5ad dense", "h5ad gzip", "zarr csr", "zarr dense", "layer"]


def dense(x):
    return x.toarray() if sparse.issparse(x) else np.asarray(x)


def write(adata, folder, form):
    """Write the cells, and say where they are and in which layer."""
    adata, layer = adata.copy(), None
    if "dense" in form:
        adata.X = adata.X.toarray()
    if form == "layer":
        adata.layers["kept"], layer = adata.X, "kept"
        del adata.X
    path = folder / ("cells.zarr" if "zarr" in form else "cells.h5ad")
    with warnings.catch_warnings(action="ignore"):  # of a later version of the format
        if "zarr" in form:
            adata.write_zarr(path)
        else:
            adata.write_h5ad(path, compression="gzip" if "gzip" in form else None)
    return path, layer


@pytest.fixture
def counts():
    """Cells with counts, one of them empty, whose classes come one after the other."""
    adata = small_cells()
    adata = adata[adata.obs["type"].argsort(kind="stable")].copy()
    adata.X = adata.X.expm1().multiply(3).ceil().tocsr().astype(np.float32)
    adata.X = sparse.csr_matrix(adata.X.toarray() * (np.arange(N) != 7)[:, None])
    del adata.layers["log"]
    return adata


@pytest.fixture
def log_file(tmp_path):
    adata = small_cells()
    adata.write_h5ad(tmp_path / "log.h5ad")
    return tmp_path / "log.h5ad"


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_those_of_the_matrix_in_the_order_asked_for(tmp_path, form, monkeypatch):
    adata = small_cells()
    path, layer = write(adata, tmp_path, form)
    x, expected = StoredMatrix(path, layer), adata.X.toarray()
    assert x.shape == (N, G) and len(x) == N and x.dtype == np.float32 and str(path) in repr(x)
    rng = np.random.default_rng(0)
    chosen = [slice(None), slice(3, 90, 7), slice(None, None, -1), [5, 2, 2, 110], [], rng.permutation(N)[:50],
              rng.random(N) < 0.3, slice(4, 5), np.arange(0, N, 60), np.r_[0:3, 40:60:3, 119]]  # fmt: skip
    for gap, size in ((stores.GAP, stores.BLOCK_BYTES), (1, 2**10), (5, 2**10), (500, 2**10)):
        monkeypatch.setattr(stores, "GAP", gap)
        monkeypatch.setattr(stores, "BLOCK_BYTES", size)
        for rows in chosen:
            block = x[rows]
            assert sparse.issparse(block) == ("dense" not in form) and block.dtype == np.float32
            np.testing.assert_array_equal(dense(block), expected[rows])
            np.testing.assert_array_equal(dense(x[:, [3, 0, 7]][rows]), expected[rows][:, [3, 0, 7]])
    rows = rng.permutation(N)[:40]
    part = x[rows, ::-2][:, [1, 0]].take(slice(10, None))
    assert isinstance(part, StoredMatrix) and list(part.gene_names) == [f"G{G - 3}", f"G{G - 1}"]
    np.testing.assert_array_equal(dense(part[:]), expected[rows[10:]][:, [G - 3, G - 1]])
    for size in (1, 7, 1000):
        whole = np.empty((N, G))
        for at, block in x.blocks(size):
            assert block.shape[0] <= size
            whole[at] = dense(block)
        np.testing.assert_array_equal(whole, expected)


@pytest.mark.parametrize(
    ("form", "total"),
    [("h5ad dense", 1e4), ("zarr csr", 500), ("layer", 1e4), ("zarr dense", 1e4), ("layer", None)],
)
def test_normalisation_is_that_of_scanpy(counts, tmp_path, form, total):
    path, layer = write(counts, tmp_path, form)
    expected = counts.copy()
    if total:
        sc.pp.normalize_total(expected, target_sum=total)
    sc.pp.log1p(expected)
    expected = expected.X.toarray()
    stored = StoredMatrix(path, layer).scaled(total, log1p=True)
    np.testing.assert_allclose(dense(stored[:]), expected, rtol=1e-6)
    np.testing.assert_allclose(dense(stored[:, [4, 2]][[9, 1]]), expected[[9, 1]][:, [4, 2]], rtol=1e-6)
    for start in range(0, N - 9, 3):  # the same to the bit in whatever block it is read
        np.testing.assert_array_equal(dense(stored[start : start + 9]), dense(stored[:])[start : start + 9])
    before = counts.X.copy()
    for source, where in ((path, layer), (counts, None)):
        for part in get_classification_datasets(source, "type", layer=where, normalize_total=total, log1p=True):
            np.testing.assert_allclose(dense(part.x[:]), expected[part.indices], rtol=1e-6)
    assert (counts.X != before).nnz == 0


@pytest.mark.parametrize("form", ["h5ad csr", "zarr dense", "layer"])
@pytest.mark.parametrize(
    ("cut", "key"), [(get_classification_datasets, "type"), (get_regression_datasets, "target")], ids=["y", "targets"]
)
def test_sets_of_a_file_are_those_of_the_cells_in_memory(tmp_path, form, cut, key):
    adata = small_cells()
    path, layer = write(adata, tmp_path, form)
    for expected, part in zip(cut(adata, key), cut(path, key, layer=layer), strict=True):
        assert part.stored and not expected.stored and part.layer == layer
        np.testing.assert_array_equal(part.indices, expected.indices)
        np.testing.assert_array_equal(part.y, expected.y)
        assert part.gene_names.equals(expected.gene_names) and part.output_names.equals(expected.output_names)
        for index in (0, [4, 1], slice(2, 9)):
            for got, wanted in zip(part[index], expected[index], strict=True):
                assert torch.equal(got, wanted)
        loaded = part.load([3, 1])
        assert not loaded.stored and len(loaded) == 2 and part.stored
        assert torch.equal(loaded[:][0], expected[[3, 1]][0])


def test_every_way_to_name_a_file_gives_the_same_cells(log_file):
    adata = small_cells()
    expected = dense(get_classification_datasets(adata, "type")[0].x)
    backed = anndata.read_h5ad(log_file, backed="r")
    closed = anndata.read_h5ad(log_file, backed="r")
    closed.file.close()
    lazy = AnnData(sparse_dataset(h5py.File(log_file)["X"]), obs=adata.obs, var=adata.var)
    for source in (log_file, str(log_file), backed, closed, lazy):
        train, *_ = get_classification_datasets(source, "type")
        assert train.stored == (source is not lazy)
        np.testing.assert_array_equal(dense(train.x[:]), expected)
    backed.obs["other"] = adata.obs["type"].to_numpy()[::-1]  # a column that the file has not
    assert get_classification_datasets(backed, "other")[0].stored
    view = backed[20:80, ["G3", "G1", "G7"]]
    train, *_ = get_classification_datasets(view, "type", split_key="part")
    np.testing.assert_array_equal(dense(train.x[:]), dense(adata[20:80, ["G3", "G1", "G7"]].X[train.indices]))
    backed.file.close()


@pytest.mark.parametrize("form", ["zarr dense", "layer"])
def test_whatever_walks_cells_gives_the_same_of_a_file(fitted, tmp_path, form):  # noqa: F811
    adata = small_cells()
    path, layer = write(adata, tmp_path, form)
    memory, disk = get_classification_datasets(adata, "type"), get_classification_datasets(path, "type", layer=layer)
    model, modules, matrix = fitted.classifier, fitted.modules, interaction_matrix(fitted.classifier, "T0")
    where = {"layer": layer} if layer else {}

    def same(function):
        got, expected = (np.asarray(function(sets), float) for sets in (disk, memory))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)

    for function in (model.outputs, modules.scores, modules.contributions):
        np.testing.assert_allclose(function(path, **where), function(adata), rtol=1e-5, atol=1e-6)
    assert list(modules.scores(path, **where).index) == list(adata.obs_names)
    np.testing.assert_array_equal(model.predict(StoredMatrix(path, layer)), model.predict(adata))
    same(lambda sets: model.score(sets[2]))
    same(lambda sets: datasets.standard_deviation(sets[0].x))
    same(lambda sets: gene_modules(model, "T1", 4, dataset=sets[0]).loadings)
    same(lambda sets: matrix.quadratic_form(sets[0]))
    same(lambda sets: matrix.top_pairs(5, dataset=sets[0])["strength"])
    same(lambda sets: sum(decompose(model, sets[0], np.ones(G))))
    same(lambda sets: group_means(model, "T0", sets[0], np.arange(len(sets[0])) % 3, np.ones(G)))
    same(lambda sets: audit(model, sets[2], "T1", train=sets[0], validation=sets[1]))
    same(lambda sets: similarity(model, model, "T0", dataset=sets[0]))
    same(lambda sets: random_directions(modules, sets[0]).loadings)
    same(lambda sets: linear_baseline(*sets[:2]).outputs(sets[2]))
    disk, memory = (get_regression_datasets(cells, "target", **which) for cells, which in ((path, where), (adata, {})))
    same(lambda sets: audit(fitted.regressor, sets[2], train=sets[0], validation=sets[1]))


def test_a_backed_adata_gets_modules_and_keeps_its_matrix_on_disk(fitted, log_file):  # noqa: F811
    adata, backed = small_cells(), anndata.read_h5ad(log_file, backed="r")
    for cells in (adata, backed):
        fitted.modules.to_adata(cells)
    np.testing.assert_allclose(backed.obsm["X_modules_T0"], adata.obsm["X_modules_T0"], rtol=1e-5, atol=1e-6)
    assert backed.isbacked
    backed.file.close()


# -------------------------------------------------------------------------------------------------------- training


def config(*, n_outputs=3, n_epochs=2, batch_size=16, dropout_rate=0.2, **fields):
    return Config(G, 4, n_outputs, n_epochs=n_epochs, batch_size=batch_size, lr=0.01, dropout_rate=dropout_rate,
                  linear=True, device="cpu", **fields)  # fmt: skip


def same_weights(a, b, **tolerance):
    for name, value in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], value, **tolerance)


@pytest.fixture
def small_runs(monkeypatch):
    """Several fetches an epoch, of several runs each."""
    monkeypatch.setattr(training, "RUN", 4)
    monkeypatch.setattr(training, "MIXED_CELLS", 32)


def batches(dataset, epochs, seed=0):
    loaded = training.loader(dataset, 16, torch.Generator().manual_seed(seed))
    return [[x for x, *_ in loaded] for _ in range(epochs)]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_epoch_has_each_cell_once_in_an_order_that_the_seed_decides(log_file, small_runs, workers):
    train, *_ = get_classification_datasets(log_file, "type")
    train.num_workers = workers
    (first, second), (again,), (other,) = batches(train, 2), batches(train, 1), batches(train, 1, seed=1)
    expected = train[:][0]
    for epoch in (first, second, other):
        assert [len(x) for x in epoch] == [len(x) for x in first]
        np.testing.assert_array_equal(np.sort(torch.cat(epoch), axis=0), np.sort(expected, axis=0))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for one in (torch.cat(second), torch.cat(other), expected):
        assert not torch.equal(torch.cat(first), one)
    if workers == 1:
        unaided, *_ = get_classification_datasets(log_file, "type")
        assert torch.equal(torch.cat(first), torch.cat(batches(unaided, 1)[0]))
        assert torch.equal(torch.cat([x for x, _ in training.loader(unaided, 16)]), expected)


class _StopAt(lightning.Callback):
    def on_train_epoch_end(self, trainer, module):
        trainer.should_stop = trainer.current_epoch == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fit_is_repeatable_and_goes_on_from_a_checkpoint(log_file, tmp_path, small_runs, workers):
    train, val, _ = get_classification_datasets(log_file, "type")
    train.num_workers = val.num_workers = workers
    whole, again, stopped, resumed = (ScBMLPClassifier(config(n_epochs=3)) for _ in range(4))
    history = whole.fit(train, val, **QUIET)
    pd.testing.assert_frame_equal(again.fit(train, val, **QUIET), history)
    same_weights(again, whole, rtol=0, atol=0)
    stopped.fit(train, val, default_root_dir=tmp_path, callbacks=[_StopAt()], **QUIET)
    assert len(stopped.history) == 2
    pd.testing.assert_frame_equal(
        resumed.fit(train, val, default_root_dir=tmp_path, ckpt_path="last", **QUIET), history
    )
    same_weights(resumed, whole, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["classes", "balanced classes", "targets"])
def test_one_batch_of_all_cells_is_learnt_as_in_memory(tmp_path, kind):
    """The order within a batch is all that differs, so that weights and statistics are the same but for rounding."""
    adata, weight = small_cells(), "balanced" if kind == "balanced classes" else None
    adata.obs["kind"] = np.where(np.arange(N) % 9 == 0, "rare", "common")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    cfg = config(n_outputs=2, batch_size=N, dropout_rate=0.0, class_weight=weight)
    memory, disk = ((ScBMLPRegressor if kind == "targets" else ScBMLPClassifier)(cfg) for _ in range(2))
    cut, key = (get_regression_datasets, "target") if kind == "targets" else (get_classification_datasets, "kind")
    memory.fit(*cut(adata, key)[:2], **QUIET)
    disk.fit(*cut(tmp_path / "cells.h5ad", key)[:2], **QUIET)
    same_weights(disk, memory, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(disk.history, memory.history, rtol=1e-4)
    for got, expected in zip(disk.statistics, memory.statistics, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)
    if weight:
        assert torch.equal(disk.class_weight, memory.class_weight) and np.ptp(memory.class_weight.numpy()) > 1


def test_classes_one_after_the_other_are_learnt_as_if_shuffled(tmp_path, monkeypatch):
    """4,000 cells sorted by class, mixed 512 at a time in runs of 16: eight classes are in every batch."""
    monkeypatch.setattr(training, "RUN", 16)
    monkeypatch.setattr(training, "MIXED_CELLS", 512)
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(8), 500)
    x = np.maximum(rng.normal(rng.normal(0, 0.5, (8, 30))[label], 1), 0).astype(np.float32)
    part = np.random.default_rng(1).choice(["train", "val", "test"], 4000, p=[0.5, 0.1, 0.4])
    obs = pd.DataFrame({"label": [f"L{i}" for i in label], "part": part}, [f"c{i}" for i in range(4000)])
    adata = AnnData(sparse.csr_matrix(x), obs=obs)
    adata.write_h5ad(tmp_path / "sorted.h5ad")
    scores = []
    for source in (adata, tmp_path / "sorted.h5ad"):
        train, _, test = get_classification_datasets(source, "label", split_key="part")
        model = ScBMLPClassifier(Config(30, 8, 8, n_epochs=4, batch_size=64, lr=0.01, device="cpu"))
        model.fit(train, baseline=False, **QUIET)
        scores.append(model.score(test))
    noise = np.sqrt(2 * 0.25 / 1600)  # of the difference of two scores on as many cells, at most
    assert scores[0] > 0.3 and abs(scores[1] - scores[0]) < 2 * noise


def test_no_more_cells_are_in_memory_than_a_few_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "BLOCK_CELLS", 256)
    monkeypatch.setattr(stores, "BLOCK_BYTES", 2**20)
    monkeypatch.setattr(StoredMatrix.holds, "__defaults__", (2**20,))
    monkeypatch.setattr(training, "MIXED_CELLS", 256)
    rng, n, genes = np.random.default_rng(0), 20000, 600  # 48 MB
    x = rng.uniform(0.5, 2, (n, genes)).astype(np.float32)
    obs = pd.DataFrame({"label": np.where(x[:, 0] > 1, "high", "low")}, [f"c{i}" for i in range(n)])
    AnnData(x, obs=obs).write_h5ad(tmp_path / "cells.h5ad")
    largest, read = [], StoredMatrix._read
    monkeypatch.setattr(StoredMatrix, "_read", lambda self, rows: largest.append(len(rows)) or read(self, rows))
    model = ScBMLPClassifier(Config(genes, 2, 2, n_epochs=1, batch_size=64, linear=True, device="cpu"))
    model.fit(*get_classification_datasets(AnnData(x[:200], obs=obs[:200]), "label")[:2], baseline=False, **QUIET)
    del x  # and what a first fit imports is not counted
    tracemalloc.start()
    train, val, _ = get_classification_datasets(tmp_path / "cells.h5ad", "label", normalize_total=1e4, log1p=True)
    model.fit(train, val, baseline=False, **QUIET)
    model.score(train), audit(model, train), gene_modules(model, "high", 2, dataset=train).scores(train)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert max(largest) <= 1024 and sum(largest) > 4 * n  # validation has batches of 1,024
    assert peak < 0.4 * 4 * n * genes


def test_validation_cells_are_read_once_where_memory_holds_them(log_file, monkeypatch):
    train, val, _ = get_classification_datasets(log_file, "type")
    taken, read, histories = [], StoredMatrix._read, {}
    monkeypatch.setattr(StoredMatrix, "_read", lambda self, rows: taken.extend(rows) or read(self, rows))
    for size, times in {2**28: 1, 64: 2}.items():
        monkeypatch.setattr(StoredMatrix.holds, "__defaults__", (size,))
        taken.clear()
        model = ScBMLPClassifier(config())
        histories[size] = model.fit(train, val, baseline=False, **QUIET)
        assert np.isin(taken, val.indices).sum() == times * len(val)
    pd.testing.assert_frame_equal(*histories.values())


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("form", ["h5ad csr", "zarr csr", "zarr dense"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, form):
    path, _ = write(small_cells(), tmp_path, form)
    train, *_ = get_classification_datasets(path, "type")
    train[[0]]
    (tmp_path / "new").mkdir()
    other, _ = write(small_cells()[::-1].copy(), tmp_path / "new", form)
    if path.is_dir():
        shutil.rmtree(path)
    other.rename(path)
    for call in (lambda: train[[0]], lambda: ScBMLPClassifier(config()).fit(train, baseline=False, **QUIET)):
        with pytest.raises(OSError, match=r"cells\.\w+ has changed since it was opened.*cut the data sets anew"):
            call()


def test_a_process_that_dies_is_told_of_and_nothing_hangs(log_file, monkeypatch, small_runs):
    train, val, _ = get_classification_datasets(log_file, "type")
    train.num_workers = 1
    parent, load = os.getpid(), ExpressionDataset.load

    def die(self, cells=None):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(self, cells)

    monkeypatch.setattr(ExpressionDataset, "load", die)
    with pytest.raises(RuntimeError, match=r"a process that reads cells ahead has died .*num_workers=0"):
        ScBMLPClassifier(config()).fit(train, val, baseline=False, **QUIET)


def test_a_file_is_opened_when_it_is_read_anew_after_a_pickle_and_named_if_it_is_damaged(log_file):
    def handles():
        return sum(Path(f"/proc/self/fd/{fd}").resolve() == log_file for fd in os.listdir("/proc/self/fd"))

    stores.annotations(log_file)
    x = StoredMatrix(log_file)
    if Path("/proc/self/fd").exists():
        assert handles() == 0
    expected, copied = dense(x[:5]), pickle.loads(pickle.dumps(x))
    assert x._opened and not copied._opened
    np.testing.assert_array_equal(dense(copied[:5]), expected)
    log_file.with_stem("short").write_bytes(log_file.read_bytes()[:5000])
    with pytest.raises(OSError, match="short.h5ad cannot be read .*pass a whole .h5ad file or zarr store"):
        get_classification_datasets(log_file.with_stem("short"), "type")


def test_counts_of_a_file_are_warned_of(counts, tmp_path):
    path, _ = write(counts, tmp_path, "h5ad csr")
    with pytest.warns(UserWarning, match=r"X of .*cells.h5ad holds only whole numbers, like raw counts") as record:
        train, *_ = get_classification_datasets(path, "type")
    assert record[0].filename == __file__
    with pytest.warns(UserWarning, match="holds only whole numbers"):
        match_genes(path, train.gene_names)
    with warnings.catch_warnings(action="error"):
        get_classification_datasets(path, "type", normalize_total=1e4, log1p=True)
        get_classification_datasets(counts, "type", normalize_total=1e4, log1p=True)
        match_genes(StoredMatrix(path).scaled(1e4, log1p=True), train.gene_names)


def test_what_needs_all_cells_at_once_says_how_many_fit(log_file):
    train, *_ = get_classification_datasets(log_file, "type")
    with pytest.raises(ValueError, match=r"needs all cells in memory, and X of .*dataset\.load\(range\(84\)\)"):
        knockoffs(train)
    assert knockoffs(train.load(), kind="permuted")[0].x.shape == (84, 2 * G)


def test_more_processes_than_blocks_are_refused(log_file, monkeypatch):
    train, *_ = get_classification_datasets(log_file, "type")
    monkeypatch.setattr(training, "rank_of", lambda: (0, 5))
    loaded = training.loader(train, 16, torch.Generator())
    with pytest.raises(ValueError, match="blocks of 64, fewer than the 5 processes; start fewer"):
        len(loaded)
    monkeypatch.setattr(training, "RUN", 4)
    shares = []
    for rank in range(5):
        monkeypatch.setattr(training, "rank_of", lambda rank=rank: (rank, 5))
        loaded.dataset.share_out()
        shares.append(loaded.dataset.own)
    np.testing.assert_array_equal(np.sort(np.concatenate(shares)), np.arange(len(train)))


@pytest.mark.parametrize(("form", "total"), [("h5ad csr", 1e4), ("zarr dense", None), ("memory", 1e4)])
def test_a_model_scales_counts_as_those_of_training(counts, tmp_path, form, total):
    path, _ = (None, None) if form == "memory" else write(counts, tmp_path, form)
    how = {"normalize_total": total, "log1p": True}
    train, val, test = get_classification_datasets(path or counts, "type", **how)
    model = solve(ScBMLPClassifier, train, val, progress=False)
    baseline = linear_baseline(train, val)
    expected = model.outputs(test)
    model.save(tmp_path / "model.safetensors")
    model = ScBMLPClassifier.load(tmp_path / "model.safetensors")
    assert model.scaling == train.scaling and model.scaling.log1p and bool(model.scaling.target_sum) == bool(total)
    mixed = counts[test.indices].copy()[:, ::-1].copy()
    mixed.write_h5ad(tmp_path / "mixed.h5ad")
    for cells in (mixed, tmp_path / "mixed.h5ad"):
        with warnings.catch_warnings(action="error"):
            np.testing.assert_allclose(model.outputs(cells), expected, atol=2e-5)
            np.testing.assert_allclose(baseline.outputs(cells), baseline.outputs(test), atol=2e-5)
            parts = decompose(model, cells, reference=model.origin)
        np.testing.assert_allclose(sum(parts), expected, atol=1e-4)
    logged = AnnData(test.load().x, var=pd.DataFrame(index=train.gene_names))  # no counts any more
    with warnings.catch_warnings(action="error"):
        np.testing.assert_allclose(model.outputs(logged), expected, atol=2e-5)


def test_other_scalings_and_totals_of_few_genes_are_warned_of(counts):
    train, val, test = get_classification_datasets(counts, "type", normalize_total=1e4, log1p=True)
    model = solve(ScBMLPClassifier, train, val, progress=False)
    other = get_classification_datasets(counts, "type", normalize_total=1e3, log1p=True)[2]
    with pytest.warns(UserWarning, match=r"normalize_total=1,000, log1p.*normalize_total=10,000, log1p.*cut them with"):
        model.score(other)
    model.scaling = model.scaling._replace(n_genes=2 * G)
    with pytest.warns(UserWarning, match="has counts of 20 genes, and those of training were scaled to a total of 40"):
        model.outputs(counts)
