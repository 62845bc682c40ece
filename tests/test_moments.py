"""Is the model from sums over cells the one from products of cells, whatever the blocks, and wherever they are?"""

import os
import signal

import joblib
import numpy as np
import pytest
from anndata import AnnData

from scbmlp import exact, moments
from scbmlp.datasets import ExpressionDataset
from scbmlp.models import ScBMLPClassifier, ScBMLPRegressor, solve, solve_replicas, statistics
from scbmlp.stores import StoredMatrix

N, G = 500, 30
COUNTS = np.random.default_rng(1).integers(1, 4, N).astype(float)
PRODUCTS = exact.Mixture((("genes", 1.0), ("components", 5.0), ("products", 2.0)), rank=8)
LINEAR = exact.Mixture((("genes", 1.0), ("components", 3.0)), rank=5)
TARGETS, CLASSES = ([PRODUCTS, LINEAR], [1e-3, 1e-2]), ([PRODUCTS], [1e-3])


@pytest.fixture(scope="module")
def x():
    """Genes that hang together, some of them zero."""
    rng = np.random.default_rng(0)
    programs = rng.standard_normal((N, 4)) @ rng.standard_normal((4, G))
    return np.log1p(rng.poisson(np.exp(0.5 * programs))).astype(np.float32)


def dataset(x, classes=False):
    """Targets, or classes, of products of genes."""
    d = x.astype(float) - np.asarray(x).mean(axis=0)
    y = np.stack([d[:, 0] * d[:, 1] + d[:, 2], d[:, 3] + d[:, 4] ** 2], axis=1)
    genes = [f"gene {i}" for i in range(x.shape[1])]
    if classes:
        return ExpressionDataset(x, np.digitize(y[:, 0], [-0.5, 0.5]), genes, ["low", "middle", "high"])
    return ExpressionDataset(x, y, genes, ["first", "second"])


def stored(data, folder):
    """The same cells on disk."""
    AnnData(data.x).write_h5ad(folder / "cells.h5ad")
    return ExpressionDataset(StoredMatrix(folder / "cells.h5ad"), data.y.numpy(), data.gene_names, data.output_names)


def solved(data, mixtures, ratios, counts=None):
    """The solution from sums."""
    return exact.solution(data, mixtures, ratios, known=moments.Moments(data, counts))


def outputs(found, x):
    d = x - found.mean
    return found.constant + d @ found.direct.T + (d @ found.hidden.T) ** 2 @ found.power.T


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("counts", [None, COUNTS])
def test_solutions_are_those_of_products_of_cells(x, counts, classes, monkeypatch):
    """Both end where a step gains next to nothing, here far below what is compared; and near it in single precision."""
    solve_ = exact.softmax
    for module in (exact, moments):
        monkeypatch.setattr(module, "softmax", lambda *a, **k: solve_(*a, **k | {"tol": 1e-13}))
    data, recipe = dataset(x, classes), CLASSES if classes else TARGETS
    there, here = exact.solution(data, *recipe, counts=counts), solved(data, *recipe, counts)
    np.testing.assert_allclose(outputs(here, x), outputs(there, x), atol=1e-4 if classes else 1e-6)
    if not classes:
        np.testing.assert_allclose(here.direct, there.direct, atol=1e-6)
        monkeypatch.setattr(moments, "SINGLE", 0)
        single = solved(data, *recipe, counts)
        np.testing.assert_allclose(outputs(single, x), outputs(there, x), atol=1e-3)


def test_a_constant_gene_and_copies_do_no_harm(x):
    same = np.hstack([x, x[:, :3], np.ones((N, 1), np.float32)])
    there, here = (one(dataset(same), [PRODUCTS] * 2, [1e-3] * 2) for one in (exact.solution, solved))
    np.testing.assert_allclose(outputs(here, same), outputs(there, same), atol=1e-6)


@pytest.mark.parametrize("classes", [False, True])
def test_blocks_order_and_place_change_nothing(x, classes, monkeypatch, tmp_path):
    data = dataset(x, classes)
    recipe = ([PRODUCTS], [1e-2]) if classes else TARGETS
    known = outputs(solved(data, *recipe), x)
    turned = data.load(np.random.default_rng(0).permutation(N))
    np.testing.assert_allclose(outputs(solved(turned, *recipe), x), known, atol=1e-6)
    for name, size in {"BLOCK": 37, "SPAN": 101, "PANEL": 7}.items():
        monkeypatch.setattr(moments, name, size)
    np.testing.assert_allclose(outputs(solved(data, *recipe), x), known, atol=1e-6)
    there = solved(stored(data, tmp_path), *recipe)
    np.testing.assert_allclose(outputs(there, x), known, atol=1e-3 if classes else 1e-6)


def test_processes_and_a_cluster_are_one_process(x, tmp_path, monkeypatch):
    """Of the cluster's two workers one dies meanwhile: what it had is done again."""
    data = stored(dataset(x), tmp_path)
    monkeypatch.setattr(moments, "SPAN", 120)
    known = outputs(solved(data, *TARGETS), x)
    with joblib.parallel_config("loky", n_jobs=2):
        np.testing.assert_allclose(outputs(solved(data, *TARGETS), x), known, atol=1e-6)
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        pids = client.run(os.getpid)
        np.testing.assert_allclose(outputs(solved(data, *TARGETS), x), known, atol=1e-6)
        os.kill(next(iter(pids.values())), signal.SIGKILL)
        np.testing.assert_allclose(outputs(solved(data, *TARGETS), x), known, atol=1e-6)


def test_solve_takes_sums_of_many_cells(x, tmp_path, monkeypatch):
    """From disk as in memory, with the statistics that a walk over the cells finds."""
    data = dataset(x)
    train, val = data.load(slice(0, 350)), data.load(slice(350, None))
    how = {"val": val, "groups": np.arange(150) % 30, "device": "cpu"}
    few = solve(ScBMLPRegressor, train, **how)
    monkeypatch.setattr(moments, "LARGE", 300)
    models = [solve(ScBMLPRegressor, one, **how) for one in (train, stored(train, tmp_path))]
    for model in models:
        assert model.trials["form"].tolist() == few.trials["form"].tolist()[:3]
        np.testing.assert_allclose(model.trials["val_loss"], few.trials["val_loss"][:3], rtol=1e-3)
        assert model.score(val) > 0.8
        for here, there in zip(model.statistics, statistics(model, train), strict=True):
            np.testing.assert_allclose(here, there, atol=1e-4)
    half, _ = solve_replicas(models[1], stored(train, tmp_path), 2, "half", progress=False)
    assert half.recipe == models[1].recipe and half.score(val) > 0.7


def test_solve_takes_sums_of_many_cells_of_classes(x, monkeypatch):
    data = dataset(x, classes=True)
    monkeypatch.setattr(moments, "LARGE", 300)
    model = solve(ScBMLPClassifier, data.load(slice(0, 400)), device="cpu", class_weight="balanced")
    assert model.trials["chosen"].sum() == 1 and model.score(data.load(slice(400, None))) > 0.7


def test_classes_on_disk_are_linear_in_what_memory_holds(x, tmp_path, monkeypatch):
    """Then the trials say so, and the linear part is of those components alone."""
    monkeypatch.setattr(moments, "LARGE", 300)
    monkeypatch.setattr(moments, "SCORE_BYTES", 4 * 400 * 12)
    noise = np.random.default_rng(2).uniform(0, 0.5, (N, 15)).astype(np.float32)
    data = dataset(np.hstack([x, noise]), classes=True)
    train = stored(data.load(slice(0, 400)), tmp_path)
    monkeypatch.setattr(moments, "RANKS", (8, 8))
    known = moments.Moments(train)
    assert known.held == 12
    found = exact.solution(train, [PRODUCTS], [1e-2], known=known)
    assert np.linalg.matrix_rank(np.vstack([found.direct, known.axes[:, :12].T]), tol=1e-6) == 12
    monkeypatch.setattr(moments, "RANKS", (50, 30))
    trials, _, _ = moments.search(train, data.load(slice(400, None)), groups=np.arange(100) % 20)
    assert trials[0].form == "linear in genes, by 30 leading components" and trials[-1].loss < trials[0].loss


def test_too_many_genes_and_products_that_are_in_no_sum_are_refused(x, monkeypatch):
    monkeypatch.setattr(moments, "RANKS", (10, 10))
    known = moments.Moments(dataset(x))
    for changes in ({"rank": 25}, {"space": "sd"}):
        with pytest.raises(ValueError, match="is not solved with more than 5,000 cells.*up to 10 components"):
            known.ridge(PRODUCTS._replace(**changes), 1e-2)
    monkeypatch.setattr(moments, "MOST_GENES", 20)
    with pytest.raises(ValueError, match="train has 30 genes in 500 cells.*at most 20 genes.*highly_variable_genes"):
        moments.Moments(dataset(x))
