"""Training and solving from disk, beside memory, in one run: python benchmarks/stored.py [cells] [form].

Simulated counts, 5% of them not zero, are written block by block as an ``.h5ad`` file sparse by cells, in the chunks
that anndata makes and compressed by ``form``: none, lzf or gzip. Training from disk scales and takes logarithms on the
fly. In memory are 50,000 of the cells at most. Each runs in a process of its own, a tenth of the cells held out for
validation; training on one thread. What counts is the ratio of cells a second, and the peak memory. ``solve`` has all
threads, and is timed as a whole, with all that it tries.
"""

import json
import subprocess
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
from keep import keep, peak_memory
from scale import RESULTS, clock
from scipy import sparse

from scbmlp.datasets import get_classification_datasets
from scbmlp.models import Config, ScBMLPClassifier, solve
from scbmlp.stores import annotations

GENES, SHARE, CLASSES, BATCH, HID, BLOCK, HELD = 5000, 0.05, 20, 1024, 128, 10_000, 50_000


def write(path, n_cells, form):
    """Write cells of some classes, block by block."""
    rng, per_cell = np.random.default_rng(0), int(SHARE * GENES)
    label = np.arange(n_cells) % CLASSES
    part = rng.choice(["train", "val", "test"], n_cells, p=[0.9, 0.09, 0.01])
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


def train(path, workers):
    """Fit two epochs, in memory if workers are None; return cells a second, seconds, score, all seconds and peak GB."""
    torch.set_num_threads(1)
    source = path
    if workers is None:
        with h5py.File(path) as file:
            known = annotations(path)[:HELD]
            source = AnnData(sparse_dataset(file["X"])[: known.n_obs], obs=known.obs, var=known.var)
    start, (times, callback) = time.perf_counter(), clock()
    options = {"normalize_total": 1e4, "log1p": True, "split_key": "part"}
    train, val, _ = get_classification_datasets(source, "class", **options)
    train.num_workers = workers or 0
    model = ScBMLPClassifier(Config(GENES, HID, CLASSES, n_epochs=2, batch_size=BATCH, lr=1e-3, device="cpu"))
    model.fit(train, val, baseline=False, enable_progress_bar=False, callbacks=[callback])
    score, seconds = model.score(val), time.perf_counter() - start
    return len(train) / times[-1], times[-1], score, seconds, peak_memory()


def solved(path):
    """Solve all cells from disk; return cells a second, seconds, score, all seconds and peak GB."""
    start = time.perf_counter()
    train, val, _ = get_classification_datasets(path, "class", normalize_total=1e4, log1p=True, split_key="part")
    begun = time.perf_counter()
    model = solve(ScBMLPClassifier, train, val, progress=False)
    seconds = time.perf_counter() - begun
    score = model.score(val)
    return len(train) / seconds, seconds, score, time.perf_counter() - start, peak_memory()


def measured(path, workers):
    """Run in a process of its own, whose memory is its own."""
    command = [sys.executable, __file__, "one", str(path), str(workers)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(n_cells, form):
    """Write the file, measure, and put the rows into the results that the page on scale draws."""
    begin, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cells.h5ad")
        write(path, n_cells, form)
        size = path.stat().st_size / 1e9
        print(f"{n_cells} cells, {form}: {size:.2f} GB in {time.perf_counter() - begin:.0f} s", flush=True)
        for name, workers in (("memory", None), ("disk", 0), ("memory", None), ("solved from disk", "solve")):
            rate, seconds, score, total, peak = measured(path, workers)
            n = min(HELD, n_cells) if workers is None else n_cells
            row = {"what": name, "cells": n, "genes": GENES, "rate": rate, "seconds": seconds, "accuracy": score}
            rows.append(row | {"total": total, "peak": peak, "form": form, "file": size})
            print(rows[-1], flush=True)
    best = pd.DataFrame(rows).sort_values("rate").drop_duplicates("what", keep="last")
    command = f"python benchmarks/stored.py {n_cells} {form}"
    tools = ["torch", "lightning", "anndata", "h5py", "scdataset"]
    keep(RESULTS, "disk", command, best.to_dict("records"), time.perf_counter() - begin, tools)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        kind = sys.argv[3]
        print(json.dumps(solved(sys.argv[2]) if kind == "solve" else train(sys.argv[2], {"0": 0}.get(kind))))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 650_000, sys.argv[2] if len(sys.argv) > 2 else "lzf")
