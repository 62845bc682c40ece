"""Time and memory beside what else there is, in one run: python benchmarks/scale.py [part ...].

Parts are step, epoch, spectra, quickstart, growth and processes, all if none is named; ``stored.py`` has the cells on
disk. Competitors take turns within a part and medians are kept, since machines are noisy: what counts
are the ratios. Memory is that of a process of its own. Each part writes its rows to benchmarks/results/scale.json,
which the page on scale draws.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import time
import warnings
from multiprocessing import get_context
from pathlib import Path

import lightning
import numpy as np
import pandas as pd
import torch
from keep import keep, peak_memory
from scipy import sparse
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from scbmlp.baselines import linear_baseline
from scbmlp.datasets import ExpressionDataset
from scbmlp.interactions import audit
from scbmlp.models import Config, ScBMLPClassifier, solve, statistics
from scbmlp.modules import all_gene_modules

PARTS = ["step", "epoch", "spectra", "quickstart", "growth", "processes"]
RESULTS = Path(__file__).with_name("results") / "scale.json"
ROUNDS, BATCH, HID, CLASSES = 5, 64, 128, 8
USUAL = {"genes": 2000, "cells": 2000}
QUIET = {"enable_progress_bar": False, "baseline": False}


def cells(n: int, n_genes: int, density: float = 0.1, n_classes: int = CLASSES, seed: int = 0) -> ExpressionDataset:
    """Return simulated log-expression, sparse, with a tenth of the genes about the class."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, n_classes, n)
    x = sparse.random(n, n_genes, density, format="csr", dtype=np.float32, random_state=seed)
    x.data = np.log1p(1 + 5 * x.data)
    marker = rng.integers(0, n_classes, n_genes)
    x.data *= 1 + (marker[x.indices] == np.repeat(y, np.diff(x.indptr))) * (x.indices % 10 == 0)
    return ExpressionDataset(x, y, pd.Index([f"g{i}" for i in range(n_genes)]), pd.Index(range(n_classes)).astype(str))


def halves(data: ExpressionDataset, n: int) -> list[ExpressionDataset]:
    """Return the first `n` cells, and the others."""
    return [
        ExpressionDataset(data.x[part], data.y[part], data.gene_names, data.output_names)
        for part in (slice(n), slice(n, None))
    ]


def clock() -> tuple[list[float], lightning.Callback]:
    """Return a list, and the callback that puts the seconds of every epoch there, without what is before and after."""
    times, callback = [], lightning.Callback()
    callback.on_train_epoch_start = lambda *_: times.append(time.perf_counter())
    callback.on_train_epoch_end = lambda *_: times.append(time.perf_counter() - times.pop())
    return times, callback


def ours(
    train: ExpressionDataset, epochs: int = 2, hid: int = HID, batch: int = BATCH, callbacks: tuple = (), **options
) -> float:
    """Return the seconds of an epoch of this package, the quickest of a few."""
    seconds, callback = clock()
    cfg = Config(train.x.shape[1], hid, len(train.output_names), n_epochs=epochs, batch_size=batch, lr=1e-4)
    ScBMLPClassifier(cfg).fit(train, callbacks=[callback, *callbacks], **QUIET, **options)
    return min(seconds)


class Product(nn.Module):
    """Two separate maps of the cells, multiplied."""

    def __init__(self, n_genes: int, hid: int) -> None:
        super().__init__()
        self.left, self.right = (nn.Linear(n_genes, hid, bias=False) for _ in "lr")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the products (cell x hid)."""
        return self.left(x) * self.right(x)


def bilinear(n_genes: int, hid: int, out: int) -> nn.Module:
    """Return the model of the plain recipe."""
    return nn.Sequential(Product(n_genes, hid), nn.Linear(hid, out, bias=False))


def relu(n_genes: int, hid: int, out: int) -> nn.Module:
    """Return a network of the usual kind with as many weights."""
    return nn.Sequential(nn.Linear(n_genes, 2 * hid), nn.ReLU(), nn.Linear(2 * hid, out))


def loop(net: nn.Module, x, y, one_by_one: bool, fused: bool, batch: int = BATCH) -> float:
    """Return the seconds of an epoch of a torch loop over dense cells, fetched one by one or cut out as a batch."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, weight_decay=1e-4, fused=fused or None)
    start = time.perf_counter()
    order = torch.randperm(len(y))
    batches = ((x[rows], y[rows]) for rows in order.split(batch))
    for part, target in DataLoader(TensorDataset(x, y), batch, shuffle=True) if one_by_one else batches:
        loss = cross_entropy(net(part), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def floor(n_genes: int, steps: int) -> float:
    """Return the seconds of as many times two products of dense cells and the optimiser's step, and nothing else."""
    x, slope = torch.rand(BATCH, n_genes), torch.rand(BATCH, 2 * HID)
    weight = nn.Parameter(torch.rand(2 * HID, n_genes))
    weight.grad = torch.rand_like(weight)
    optimizer = torch.optim.Adam([weight], lr=1e-4, weight_decay=1e-4, fused=True)
    with torch.no_grad():
        start = time.perf_counter()
        for _ in range(steps):
            x @ weight.T
            torch.mm(slope.T, x, out=weight.grad)
            optimizer.step()
    return time.perf_counter() - start


def turns(work: dict, rounds: int = ROUNDS, warm: int = 1) -> dict[str, float]:
    """Return the median seconds of each, after a round that does not count; they take turns."""
    seconds = {name: [] for name in work}
    for _ in range(warm + rounds):
        for name, one in work.items():
            seconds[name].append(one())
    return {name: float(np.median(values[warm:])) for name, values in seconds.items()}


def clocked(one) -> float:
    """Return the seconds of a piece of work."""
    start = time.perf_counter()
    one()
    return time.perf_counter() - start


def part_step():
    """Run a step by genes and density, beside its floor, bare loops, the plain recipe and a network with ReLU."""
    for n_genes, density in ((1000, 0.1), (2000, 0.1), (5000, 0.1), (10_000, 0.1), (10_000, 0.05), (10_000, 0.3)):
        train = cells(20 * BATCH, n_genes, density)
        x, y = train[:]
        nets = {name: kind(n_genes, HID, CLASSES) for name, kind in {"bilinear": bilinear, "relu": relu}.items()}
        work = {
            "here": lambda train=train: ours(train),
            "floor, dense": lambda n_genes=n_genes: floor(n_genes, 20),
            "bare loop": lambda x=x, y=y, net=nets["bilinear"]: loop(net, x, y, False, True),
            "ReLU network": lambda x=x, y=y, net=nets["relu"]: loop(net, x, y, False, True),
            "plain recipe": lambda x=x, y=y, net=nets["bilinear"]: loop(net, x, y, True, False),
        }
        for name, seconds in turns(work).items():
            yield {"genes": n_genes, "density": density, "what": name, "ms": 1e3 * seconds / 20}


def part_epoch():
    """Run whole fits of 10,000 genes beside the plain recipe."""
    train, test = halves(cells(2560, 10_000), 1920)
    x, y = train[:]
    epochs, accuracy = 10, {}

    def fit():
        model = ScBMLPClassifier(Config(10_000, HID, CLASSES, n_epochs=epochs, batch_size=BATCH, lr=1e-4))
        model.fit(train, **QUIET)
        accuracy["here"] = model.score(test)

    def recipe():
        net = bilinear(10_000, HID, CLASSES)
        for _ in range(epochs):
            loop(net, x, y, True, False)
        with torch.no_grad():
            accuracy["plain recipe"] = float((net(test[:][0]).argmax(dim=1) == test.y).float().mean())

    for name, took in turns({"here": lambda: clocked(fit), "plain recipe": lambda: clocked(recipe)}, 3).items():
        yield {"what": name, "seconds": took / epochs, "accuracy": accuracy[name]}


def child(code: str, *arguments: str, threads: int | None = None) -> tuple[float, float]:
    """Return the seconds and the peak memory in GB that a process of its own prints."""
    environment = dict(os.environ)
    if threads:
        environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
    command = [sys.executable, "-W", "ignore", __file__, "--child", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, memory = done.stdout.split()[-2:]
    return float(seconds), float(memory)


def child_spectra(kind: str, genes: str) -> float:
    """Return the seconds of the leading modules of 8 classes, at once or one by one, or of their dense eigenpairs."""
    n_genes = int(genes)
    model = ScBMLPClassifier(Config(n_genes, HID, CLASSES))
    if kind != "dense":
        model.statistics = statistics(model, cells(BATCH, n_genes))
    start = time.perf_counter()
    if kind != "dense":
        names = list(model.output_names)
        for part in [names] if kind == "here" else [[name] for name in names]:
            all_gene_modules(model, part, 20)
        return time.perf_counter() - start
    with torch.no_grad():
        q = torch.einsum("h,hi,hj->ij", model.w_p[0], model.w_l, model.w_r)
        torch.linalg.eigh((q + q.T) / 2)
    return CLASSES * (time.perf_counter() - start)


def part_spectra():
    """Run modules of 8 outputs by genes, in a process of its own; the dense way is timed on one output."""
    ways = {"here": (1000, 2000, 4000, 10_000, 30_000), "one by one": (10_000,), "dense": (1000, 2000, 4000, 10_000)}
    for kind, sizes in ways.items():
        for n_genes in sizes:
            seconds, memory = child("spectra", kind, str(n_genes))
            yield {"what": kind, "genes": n_genes, "seconds": seconds, "memory": memory}


def child_quickstart(kind: str) -> float:
    """Return the seconds of 100 epochs and the modules of 8 classes at 10,000 genes; a part is timed and multiplied."""
    train = cells(2560, 10_000)
    start = time.perf_counter()
    if kind == "here":
        model = ScBMLPClassifier(Config(10_000, HID, CLASSES, n_epochs=100, batch_size=BATCH, lr=1e-4))
        model.fit(train, **QUIET)
        all_gene_modules(model, n_modules=5)
        return time.perf_counter() - start
    x, y = train[:]
    return 100 * loop(bilinear(10_000, HID, CLASSES), x, y, True, False) + child_spectra("dense", "10000")


def part_quickstart():
    """Run the README's Quick start both ways, each in a process of its own."""
    for kind in ("here", "plain recipe"):
        seconds, memory = child("quickstart", kind)
        yield {"what": kind, "seconds": seconds, "memory": memory}


# By whether it is handed a fitted model beside the cells.
WITH_MODEL = {
    "an epoch": lambda train, val, model: ours(train, 1, model.cfg.d_hidden),
    "modules of all outputs": lambda train, val, model: all_gene_modules(model, n_modules=5),
    "audit": lambda train, val, model: audit(model, val, train=train, validation=val),
}
WITHOUT_MODEL = {
    "solve": lambda train, val: solve(ScBMLPClassifier, train, val, progress=False),
    "linear baseline": linear_baseline,
}


def apart(name: str, *files: Path) -> tuple[float, float]:
    """Return the seconds of a piece of work, and the GB that it and what it is handed add to the process of this."""
    before = peak_memory()
    handed, seconds = [part for file in files for part in pickle.loads(file.read_bytes())], []
    with warnings.catch_warnings(action="ignore"):
        # What is quick is run once more, since the first time it waits for threads and libraries.
        while not seconds or (len(seconds) < 2 and seconds[0] < 2):
            start = time.perf_counter()
            found = (WITH_MODEL | WITHOUT_MODEL)[name](*handed)
            # An epoch tells its seconds, without what comes before and after it.
            seconds.append(found if isinstance(found, float) else time.perf_counter() - start)
    return min(seconds), peak_memory() - before


def part_growth():
    """Run everything by the number of genes and of cells, one at a time, each in a new process."""
    axes = {"genes": (1000, 2000, 4000), "cells": (1000, 2000, 4000, 8000)}
    processes = get_context("forkserver")
    # Imported once, and there in every process.
    processes.set_forkserver_preload(["scbmlp.audit", "scbmlp.modules", "scbmlp.solving"])
    with tempfile.TemporaryDirectory() as folder, processes.Pool(1, maxtasksperchild=1) as pool:
        sets, fitted = Path(folder, "sets"), Path(folder, "fitted")
        for axis, value in ((axis, value) for axis, values in axes.items() for value in values):
            size = USUAL | {axis: value}
            data = cells(size["cells"] + 500, size["genes"])
            train, val = halves(data, size["cells"])
            model = ScBMLPClassifier(Config(size["genes"], HID, CLASSES, n_epochs=1, batch_size=BATCH))
            model.fit(train, **QUIET)
            sets.write_bytes(pickle.dumps((train, val)))
            fitted.write_bytes(pickle.dumps((model,)))
            for work, files in ((WITH_MODEL, (sets, fitted)), (WITHOUT_MODEL, (sets,))):
                for name in work:
                    seconds, memory = pool.apply(apart, (name, *files))
                    yield {"axis": axis, "value": value, "what": name, "seconds": seconds, "memory": memory}


def child_processes(batch: str, devices: str, folder: str | None = None) -> float:
    """Return the seconds of an epoch; each process that takes part writes them and its memory to a folder, too."""
    several = {"devices": int(devices), "strategy": "ddp"} if devices != "1" else {}
    seconds = ours(cells(8192, 5000), 3, batch=int(batch), **several)
    if folder:
        Path(folder, os.environ["RANK"]).write_text(f"{seconds} {peak_memory()}")
    return seconds


def part_processes():
    """Run one process of one thread, and two of one thread each, by batch size."""
    for batch in (64, 256, 1024):
        alone = child("processes", str(batch), "1", threads=1)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        folder = tempfile.mkdtemp()
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [sys.executable, "-W", "ignore", *launcher, __file__, "--child", "processes", str(batch), "2", folder]
        subprocess.run(command, env=environment, capture_output=True, check=True)
        together = map(float, Path(folder, "0").read_text().split())
        for n, (seconds, memory) in ((1, alone), (2, together)):
            yield {"batch": batch, "processes": n, "seconds": seconds, "memory": memory}


def main(parts: list[str]) -> None:
    """Run parts, and put each into the file."""
    for part in parts:
        start, rows = time.perf_counter(), []
        for row in globals()[f"part_{part}"]():
            rows.append(row)
            print(f"{part} {time.perf_counter() - start:5.0f} s", row, flush=True)
        tools = ["torch", "lightning", "numpy", "scipy", "scikit-learn"]
        keep(RESULTS, part, f"python benchmarks/scale.py {part}", rows, time.perf_counter() - start, tools)


if __name__ == "__main__":
    with warnings.catch_warnings(action="ignore"):
        if sys.argv[1:2] == ["--child"]:
            took = globals()[f"child_{sys.argv[2]}"](*sys.argv[3:])
            print(took, peak_memory(), flush=True)
        else:
            main(sys.argv[1:] or PARTS)
