"""Time and memory beside what else there is, in one run: python benchmarks/scale.py [part ...].

Parts are step, epoch, spectra, quickstart, growth, replicas and processes, all if none is named; ``stored.py`` has the
cells on disk. Competitors take turns within a part and medians are kept, since machines are noisy: what counts are the
ratios. Each part writes its rows to benchmarks/results/scale.json, which the page on scale draws.
"""

import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning
import numpy as np
import pandas as pd
import torch
from keep import keep, peak_memory
from scipy import sparse
from sklearn.decomposition import NMF
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from scbmlp.baselines import linear_baseline
from scbmlp.datasets import ExpressionDataset
from scbmlp.interactions import audit, interaction_matrices
from scbmlp.models import Config, ScBMLPClassifier, fit_replicas
from scbmlp.modules import gene_modules

RESULTS = Path(__file__).with_name("results") / "scale.json"
ROUNDS, BATCH, HID, CLASSES = 5, 64, 128, 8
USUAL = {"genes": 2000, "cells": 4000, "hid": 64, "outputs": 8}
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


def ours(train: ExpressionDataset, epochs: int = 2, hid: int = HID, batch: int = BATCH, **options) -> float:
    """Return the seconds of an epoch of this package, the quickest of a few."""
    seconds, callback = clock()
    cfg = Config(train.x.shape[1], hid, len(train.output_names), n_epochs=epochs, batch_size=batch, lr=1e-4)
    ScBMLPClassifier(cfg).fit(train, callbacks=[callback], **QUIET, **options)
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


def loop(net: nn.Module, x, y, one_by_one: bool, fused: bool) -> float:
    """Return the seconds of an epoch of a torch loop over dense cells, fetched one by one or cut out as a batch."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, weight_decay=1e-4, fused=fused or None)
    start = time.perf_counter()
    order = torch.randperm(len(y))
    batches = ((x[rows], y[rows]) for rows in order.split(BATCH))
    for part, target in DataLoader(TensorDataset(x, y), BATCH, shuffle=True) if one_by_one else batches:
        loss = nn.functional.cross_entropy(net(part), target)
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
    """Run whole fits of 10,000 genes beside the plain recipe, and say what bf16 costs in time and accuracy."""
    train, test = halves(cells(2560, 10_000), 1920)
    x, y = train[:]
    epochs, accuracy = 10, {}

    def fit(name, **options):
        model = ScBMLPClassifier(Config(10_000, HID, CLASSES, n_epochs=epochs, batch_size=BATCH, lr=1e-4))
        model.fit(train, **QUIET, **options)
        accuracy[name] = model.score(test)

    def recipe():
        net = bilinear(10_000, HID, CLASSES)
        for _ in range(epochs):
            loop(net, x, y, True, False)
        with torch.no_grad():
            accuracy["plain recipe"] = float((net(test[:][0]).argmax(dim=1) == test.y).float().mean())

    work = {"here": lambda: clocked(lambda: fit("here")), "plain recipe": lambda: clocked(recipe)}
    seconds = turns(work, 3)
    # Once: without instructions for bf16 it takes minutes.
    seconds["here, bf16-mixed"] = clocked(lambda: fit("here, bf16-mixed", precision="bf16-mixed"))
    for name, took in seconds.items():
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
    """Return the seconds of the interaction matrices and leading modules of 8 classes, one or the other way."""
    n_genes = int(genes)
    model = ScBMLPClassifier(Config(n_genes, HID, CLASSES))
    start = time.perf_counter()
    if kind == "here":
        for matrix in interaction_matrices(model):
            matrix.eigh(20)
        return time.perf_counter() - start
    with torch.no_grad():
        q = torch.einsum("h,hi,hj->ij", model.w_p[0], model.w_l, model.w_r)
        torch.linalg.eigh((q + q.T) / 2)
    return CLASSES * (time.perf_counter() - start)


def part_spectra():
    """Run eigenpairs of 8 outputs by genes, in a process of its own; the dense way is timed on one output."""
    for kind, sizes in {"here": (1000, 2000, 4000, 10_000, 30_000), "dense": (1000, 2000, 4000, 10_000)}.items():
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
        for name in model.output_names:
            gene_modules(model, name, 5)
        return time.perf_counter() - start
    x, y = train[:]
    return 100 * loop(bilinear(10_000, HID, CLASSES), x, y, True, False) + child_spectra("dense", "10000")


def part_quickstart():
    """Run the README's Quick start both ways, each in a process of its own."""
    for kind in ("here", "plain recipe"):
        seconds, memory = child("quickstart", kind)
        yield {"what": kind, "seconds": seconds, "memory": memory}


def part_growth():
    """Run everything by the number of genes, cells, hidden units and outputs, one at a time."""
    axes = {"genes": (500, 1000, 2000, 4000, 8000), "cells": (1000, 2000, 4000, 8000),
            "hid": (16, 32, 64, 128, 256), "outputs": (2, 4, 8, 16, 32)}  # fmt: skip
    for axis, values in axes.items():
        for value in values:
            size = USUAL | {axis: value}
            data = cells(size["cells"] + 500, size["genes"], n_classes=size["outputs"])
            train, val = halves(data, size["cells"])
            cfg = Config(size["genes"], size["hid"], size["outputs"], n_epochs=1, batch_size=BATCH)
            model = ScBMLPClassifier(cfg)
            model.fit(train, **QUIET)
            one_hot = np.eye(size["outputs"])[train.y]
            work = {
                "an epoch": lambda train=train, size=size: ours(train, 1, size["hid"]),
                "modules of all outputs": lambda model=model: clocked(
                    lambda: [gene_modules(model, name, 5) for name in model.output_names]
                ),
                "audit": lambda model=model, train=train, val=val: clocked(
                    lambda: audit(model, val, train=train, validation=val)
                ),
                "linear baseline": lambda train=train, val=val: clocked(lambda: linear_baseline(train, val)),
                "logistic regression (scikit-learn)": lambda train=train: clocked(
                    lambda: LogisticRegression(max_iter=100).fit(train.x, train.y)
                ),
                "ridge (scikit-learn)": lambda train=train, one_hot=one_hot: clocked(
                    lambda: Ridge(solver="sparse_cg").fit(train.x, one_hot)
                ),
                "NMF, one start (scikit-learn)": lambda train=train: clocked(
                    lambda: NMF(10, init="random", random_state=0, max_iter=100).fit(train.x)
                ),
            }
            for name, seconds in turns(work, 1, warm=0).items():
                yield {"axis": axis, "value": value, "what": name, "seconds": seconds}


def part_replicas():
    """Run twenty fits at once beside one, at 2,000 genes."""
    train = cells(2560, 2000, 0.4)
    cfg = Config(2000, HID, CLASSES, n_epochs=5, batch_size=BATCH, dropout_rate=0.4, weight_decay=1e-2, device="cpu")
    work = {
        "one": lambda: clocked(lambda: ScBMLPClassifier(cfg).fit(train, **QUIET)),
        "twenty at once": lambda: clocked(lambda: fit_replicas(ScBMLPClassifier, cfg, train, progress=False)),
    }
    for name, seconds in turns(work, 3).items():
        yield {"what": name, "seconds": seconds / 5}


def child_processes(batch: str, devices: str, folder: str | None = None) -> float:
    """Return the seconds of an epoch, which every process that takes part writes to a folder, too."""
    several = {"devices": int(devices), "strategy": "ddp"} if devices != "1" else {}
    seconds = ours(cells(8192, 5000), 3, batch=int(batch), **several)
    if folder:
        Path(folder, os.environ["RANK"]).write_text(str(seconds))
    return seconds


def part_processes():
    """Run one process of one thread, and two of one thread each, by batch size."""
    for batch in (64, 256, 1024):
        alone, _ = child("processes", str(batch), "1", threads=1)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        folder = tempfile.mkdtemp()
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [sys.executable, "-W", "ignore", *launcher, __file__, "--child", "processes", str(batch), "2", folder]
        subprocess.run(command, env=environment, capture_output=True, check=True)
        together = min(float(path.read_text()) for path in Path(folder).iterdir())
        for n, seconds in ((1, alone), (2, together)):
            yield {"batch": batch, "processes": n, "seconds": seconds}


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
            main(sys.argv[1:] or ["step", "epoch", "spectra", "quickstart", "growth", "replicas", "processes"])
