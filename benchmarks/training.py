"""Seconds an epoch of this package beside the plain recipe, in one run: python benchmarks/training.py.

The plain recipe makes all cells dense and feeds them one by one through a DataLoader into two separate linear maps.
The two take turns, since machines are noisy; what counts is the ratio.
"""

import resource
import statistics
import time

import scanpy as sc
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from scbmlp import simulate
from scbmlp.datasets import ExpressionDataset
from scbmlp.models import Config, ScBMLPClassifier

GENES, HID, BATCH, EPOCHS, ROUNDS = 10_000, 128, 64, 5, 3


def plain(x, y, n_classes):
    """Seconds an epoch of the plain recipe."""
    left, right = (nn.Linear(GENES, HID, bias=False) for _ in "lr")
    head = nn.Linear(HID, n_classes, bias=False)
    parameters = [*left.parameters(), *right.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, weight_decay=1e-4)
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True)
    start = time.perf_counter()
    for _ in range(EPOCHS):
        for cells, target in loader:
            loss = nn.functional.cross_entropy(head(left(cells) * right(cells)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return (time.perf_counter() - start) / EPOCHS


def ours(train):
    """Seconds an epoch of this package."""
    cfg = Config(GENES, HID, len(train.output_names), n_epochs=EPOCHS, batch_size=BATCH, lr=1e-4)
    model = ScBMLPClassifier(cfg)
    start = time.perf_counter()
    model.fit(train, enable_progress_bar=False)
    return (time.perf_counter() - start) / EPOCHS


def main():
    """Print the seconds of every round, the medians and their ratio."""
    adata = simulate.pancreas(n_genes=GENES)
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    types = adata.obs["clusters"].cat
    train = ExpressionDataset(adata.X, types.codes.to_numpy("int64"), adata.var_names, types.categories)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = {"here": [], "plain recipe": []}
    ours(train)  # first calls load libraries
    print(f"here: {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024:.0f} MB above the start")
    x, y = train[:]
    for _ in range(ROUNDS):
        seconds["plain recipe"].append(plain(x, y, len(train.output_names)))
        seconds["here"].append(ours(train))
    for name, values in seconds.items():
        print(f"{name}: {', '.join(f'{value:.2f}' for value in values)} s an epoch of {len(train)} cells")
    here, other = (statistics.median(values) for values in seconds.values())
    print(f"plain recipe / here: {other / here:.2f}")


if __name__ == "__main__":
    main()
