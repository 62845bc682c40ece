"""What an independent check found, measured on what stands: python benchmarks/faults.py, some minutes.

Each line is a figure that was wrong once. The number is that of the finding. Pairs
of genes have a benchmark of their own: python benchmarks/pairs.py 20 real "real, more noise".
"""

import warnings

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.special import softmax
from scipy.stats import kstest

from scbmlp import exact, nested, sources
from scbmlp.baselines import linear_baseline
from scbmlp.datasets import ExpressionDataset, get_classification_datasets
from scbmlp.effects import additivity
from scbmlp.interactions import audit
from scbmlp.models import ScBMLPClassifier, ScBMLPRegressor, solve, solve_replicas
from scbmlp.modules import permutation_null, stability

QUIET = {"progress": False}


def cells(target, seed, sizes=(300, 150, 150), n_genes=30):
    """Return data sets whose targets or classes are a function of skewed genes, independent of each other."""
    rng, parts = np.random.default_rng(seed), []
    weight = rng.normal(size=n_genes) / 8
    for n in sizes:
        x = rng.gamma(1.0, size=(n, n_genes)).astype(np.float32)
        y = target(x @ weight, rng)
        outputs = pd.Index(["y"] if y.ndim == 2 else ["off", "on"])
        parts.append(ExpressionDataset(x, y, pd.RangeIndex(n_genes), outputs))
    return parts


def noisy(link, noise):
    def target(index, rng):
        y = link(index)
        return (y + noise * y.std() * rng.normal(size=len(y)))[:, None].astype(np.float32)

    return target


def curved_gains():
    """1. What an additive target gains through curves: 0 is right."""
    for name, link, noise in (("linear", np.asarray, 0.3), ("exponential", np.exp, 0.1)):
        found = []
        for seed in range(4):
            train, val, test = cells(noisy(link, noise), seed)
            table = audit(solve(ScBMLPRegressor, train, val, **QUIET), test, train=train, validation=val)
            found.append(table["gain_curved"].item())
        yield f"1 gain through curves of a target that is {name} in the genes", found


def p_values():
    """4. p of the leading module, where nothing is and products are forced upon the model: uniform is right."""
    found, empty = [], 0
    for seed in range(40):
        train, val, _ = cells(lambda index, rng: rng.normal(size=(len(index), 1)).astype(np.float32), seed)
        if seed < 10:
            empty += solve(ScBMLPRegressor, train, val, **QUIET).recipe[0][0].weight("products") == 0
        model = solve(ScBMLPRegressor, train, val, form="products of components", **QUIET)
        found.append(permutation_null(model, train, val, "y", 99, n_modules=1, **QUIET)["p"].min())
    yield "4 p without signal: mean, share of 1, p of uniformity", [
        np.mean(found), np.mean(np.array(found) == 1), kstest(found, "uniform").pvalue
    ]  # fmt: skip
    yield "4 share of such sets in which solve has no products, and so no modules", [empty / 10]


def easy_classes():
    """5. Validation loss of classes that are easy, beside that of the best of a far wider grid: equal is right."""
    for seed in range(3):
        train, val, _ = cells(lambda index, rng: (index > np.median(index)).astype(int), seed, (500, 200, 50))
        model = linear_baseline(train, val)
        found = loss(model.outputs(val), val.y.numpy())
        kernels, y = nested.kernels_of(train, val.x)
        best = min(
            loss(nested.predicted(kernels, y, [exact.Mixture()], [10.0**power], True)[0], val.y.numpy())
            for power in np.arange(-9, 1, 0.5)
        )
        yield "5 validation loss: the baseline's, the best of a wide grid", [found, best]


def loss(outputs, y):
    return -np.log(softmax(outputs.astype(float), axis=1)[np.arange(len(y)), y]).mean()


def slopes():
    """6. The slope of a double that does nothing along singles that do nothing: none is right."""
    rng, parts = np.random.default_rng(0), ["control", "D", "E", "D+E"]
    given = np.repeat(parts, 200)
    adata = AnnData(np.zeros((800, 1), np.float32), obs=pd.DataFrame({"given": given}, map(str, range(800))))
    with warnings.catch_warnings(action="ignore"):
        table = additivity(rng.normal(size=(800, 60)), adata, "given", "control", n_splits=20)
    yield "6 slope and ceiling of a double that does nothing", [table["slope"].item(), table["ceiling"].item()]


def steadiness():
    """8. Worst and mean stability of a class's leading module: its logit less the plain mean, less that by shares."""
    train, val, _ = get_classification_datasets(sources.pancreas(), "clusters")
    model = solve(ScBMLPClassifier, train, val, form="products of components", **QUIET)
    halves = solve_replicas(model, train, 6, "half", **QUIET)
    names = train.output_names
    plain = [stability(halves, name, n_modules=1)["stability"].iloc[0] for name in names]
    shares = dict(zip(names, np.bincount(train.y) / len(train), strict=True))
    mixes = [{other: (other == name) - share for other, share in shares.items()} for name in names]
    shared = [stability(halves, mix, n_modules=1)["stability"].iloc[0] for mix in mixes]
    for name, found in (("plain mean", plain), ("mean by shares", shared)):
        yield f"8 stability of a class's leading module, its logit less the {name}: worst, mean", [
            np.min(found), np.mean(found)
        ]  # fmt: skip


def batches():
    """4. Sets in which a module has p of at most 0.05, where batches alone are alike: 0.05 of them is right."""
    found = {"without strata": [], "with strata": []}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x = rng.gamma(1.0, size=(600, 30)).astype(np.float32)
        batch = ((x[:, 0] > 0.7) ^ (x[:, 1] > 0.7)).astype(int)
        y = (4 * batch + rng.normal(size=600))[:, None].astype(np.float32)
        part = np.split(rng.permutation(600), [400])
        train, val = (
            ExpressionDataset(x[rows], y[rows], pd.RangeIndex(30), pd.Index(["y"]), indices=rows) for rows in part
        )
        model = solve(ScBMLPRegressor, train, val, form="products of components", **QUIET)
        for name, strata in zip(found, (None, batch), strict=True):
            table = permutation_null(model, train, val, "y", 99, strata, n_modules=1, **QUIET)
            found[name].append(table["p"].min() <= 0.05)
    for name, each in found.items():
        yield (
            f"4 share of sets with a module where batches differ in products and nothing else, {name}",
            [np.mean(each)],
        )


if __name__ == "__main__":
    for part in (curved_gains, p_values, batches, easy_classes, slopes, steadiness):
        for line, figures in part():
            print(f"{line}: {' '.join(f'{figure:.4f}' for figure in figures)}", flush=True)
