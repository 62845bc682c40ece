"""Cells a second of training from disk beside memory, in one run: python benchmarks/stored.py [cells] [form] [workers].

The cells are simulated counts, 5% of them not zero, written in blocks as an ``.h5ad`` file sparse by cells, in the chunks
that anndata writes by default and compressed by ``form`` (none, lzf or gzip). Training from disk includes scaling and
log1p on the fly. In memory are as many cells as 2 GB hold with ease; what counts is the ratio of cells a second, and the
peak memory of the part that is on disk, which is run in a process of its own.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from anndata.io import sparse_dataset, write_elem
from scipy import sparse

from scbmlp.datasets import get_classification_datasets
from scbmlp.models import Config, ScBMLPClassifier

GENES, SHARE, CLASSES, BATCH, HID, BLOCK, HELD = 5000, 0.05, 20, 1024, 128, 10_000, 50_000


def write(path, n_cells, form):
    """Write cells of some classes, block by block."""
    rng, per_cell = np.random.default_rng(0), int(SHARE * GENES)
    label = np.arange(n_cells) % CLASSES
    part = rng.choice(["train", "val"], n_cells, p=[0.9, 0.1])
    options = {} if form == "none" else {"dataset_kwargs": {"compression": form}}
    with h5py.File(path, "w") as file:
        names = pd.Index([f"cell {i}" for i in range(n_cells)])
        classes = pd.Categorical([f"class {i}" for i in label])
        known = AnnData(
            obs=pd.DataFrame({"class": classes, "part": part}, names),
            var=pd.DataFrame(index=[f"gene {i}" for i in range(GENES)]),
        )
        write_elem(file, "/", known)
        for start in range(0, n_cells, BLOCK):
            own = label[start : start + BLOCK]
            # Each class has genes that are on more often.
            first = (own[:, None] * 40 + rng.integers(0, 200, (len(own), per_cell // 10))) % GENES
            rest = rng.integers(0, GENES, (len(own), per_cell - first.shape[1]))
            columns, counts = np.hstack([first, rest]).ravel(), 1 + rng.poisson(1.5, len(own) * per_cell)
            rows = np.repeat(np.arange(len(own)), per_cell)
            block = sparse.csr_matrix((counts.astype(np.float32), (rows, columns)), (len(own), GENES))
            block.sum_duplicates()
            if start == 0:
                file.pop("X", None)
                write_elem(file, "X", block, **options)
            else:
                sparse_dataset(file["X"]).append(block)
        file["X"].attrs["shape"] = (n_cells, GENES)


def seconds_an_epoch(sets):
    """Seconds of the second of two epochs, in which nothing is loaded or checked for the first time."""
    train, val, _ = sets
    ends = []
    model = ScBMLPClassifier(Config(GENES, HID, CLASSES, n_epochs=2, batch_size=BATCH, lr=1e-3, device="cpu"))
    watch = type("Watch", (__import__("lightning").Callback,), {})()
    watch.on_train_epoch_start = lambda *_: ends.append(time.perf_counter())
    watch.on_validation_start = lambda *_: ends.append(time.perf_counter())
    model.fit(train, None, baseline=False, enable_progress_bar=False, callbacks=[watch])
    return time.perf_counter(), ends, model.score(val)
