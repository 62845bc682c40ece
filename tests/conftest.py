import shutil
import socket

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from hypothesis import settings
from scipy import sparse

from scbmlp import simulate
from scbmlp.datasets import get_classification_datasets
from scbmlp.models import Config, ScBMLPClassifier

# On a machine that others use, how long an example takes says nothing.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
# Threads that wait for each other on a busy machine make small fits many times slower.
torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Without the book extra its tests are left out, and the report says why."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if error.name in ("pertpy", "scvelo"):
            pytest.skip(f"{error.name} comes with the book extra")
        raise


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """What needs the network would pass here and fail elsewhere; downloads have stand-ins of their own."""

    def refuse(self, address, *args):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1"):
            raise OSError(f"{address} was asked for: tests run without a network")
        return connect(self, address, *args)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def cells():
    """Simulated cells, 10,000 counts each, log1p, sparse; copy before changing anything."""
    adata = simulate.pancreas(seed=0, n_cells=400, n_genes=300)
    adata.X = sparse.csr_matrix(adata.X.multiply(1e4 / adata.X.sum(axis=1))).log1p().astype(np.float32)
    return adata


@pytest.fixture(scope="session")
def sets(cells):
    """Train, validation and test set of `cells`; not to be changed."""
    return get_classification_datasets(cells, "clusters")


@pytest.fixture(scope="session")
def planted():
    """Cells whose label, and one of whose targets, is an interaction: neither gene alone says anything of it."""
    x = np.random.default_rng(0).uniform(0, 2, (1000, 8)).astype(np.float32)
    product = (x[:, 0] - 1) * (x[:, 1] - 1)
    obs = pd.DataFrame({"label": np.where(product > 0, "same", "different")}, index=[f"cell {i}" for i in range(1000)])
    targets = pd.DataFrame({"product": 5 * product, "difference": x[:, 2] - x[:, 3]}, index=obs.index)
    return AnnData(x, obs=obs, obsm={"target": targets})


@pytest.fixture(scope="session")
def treated():
    """Two lines, far apart; a drug raises gene 0 and lowers gene 1, another does nothing; copy before changing it."""
    drugs = pd.DataFrame({"drug": ["control", "active", "inert"], "dose": [np.nan, 100, 10]})
    obs = pd.concat([drugs] * 120, ignore_index=True).assign(line=np.repeat(["a", "b"], 180))
    x = np.random.default_rng(0).uniform(1, 2, (360, 12))
    x[180:, 5] += 3
    x[obs["drug"] == "active", :2] += [1, -0.5]
    return AnnData(sparse.csr_matrix(x, dtype=np.float32), obs=obs.rename(index="cell{}".format))


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium; no other browser is downloaded."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        yield browser
        browser.close()


@pytest.fixture
def rows_made_dense(monkeypatch):
    """How many rows each conversion from sparse to dense had, from here to the end of the test."""
    seen = []
    for kind in (sparse.csr_matrix, sparse.csr_array, sparse.csc_matrix, sparse.csc_array):

        def counted(self, *args, _toarray=kind.toarray, **kwargs):
            seen.append(self.shape[0])
            return _toarray(self, *args, **kwargs)

        monkeypatch.setattr(kind, "toarray", counted)
    return seen


@pytest.fixture(scope="session")
def classifier(sets):
    """A small model that tells the cells, not to be changed."""
    model = ScBMLPClassifier(Config(d_input=300, d_hidden=8, d_output=8, n_epochs=10, device="cpu"))
    model.fit(sets[0], sets[1], enable_progress_bar=False)
    return model
