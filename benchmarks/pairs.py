"""Pairs of genes with a false discovery rate, on planted data sets: is the rate kept, and what is found.

python benchmarks/pairs.py [n_datasets] [case ...]; cases are the keys of CASES, all if none is named. Each writes its
rows to benchmarks/results/pairs.json, which the chapter on planted truth draws. "real" has cells of the pancreas.
"""

import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import scanpy as sc
from keep import keep
from sklearn.metrics import average_precision_score

from scbmlp import simulate, sources
from scbmlp.datasets import ExpressionDataset, get_classification_datasets
from scbmlp.interactions import interaction_matrix
from scbmlp.knockoffs import pair_discoveries
from scbmlp.models import ScBMLPClassifier, ScBMLPRegressor, solve

RESULTS = Path(__file__).with_name("results") / "pairs.json"
N_CELLS, N_GENES, N_PAIRS = 3000, 150, 12
# Name: which genes are in pairs, how expression comes about, knock-offs, other arguments.
CASES = {
    "apart": ("apart", "lognormal", "gaussian", {}),
    "apart, permuted": ("apart", "lognormal", "permuted", {}),
    "apart, not clumped": ("apart", "lognormal", "gaussian", {"clump": 1}),
    "apart, counts": ("apart", "counts", "gaussian", {}),
    "apart, permuted, not clumped": ("apart", "lognormal", "permuted", {"clump": 1}),
    "apart, independent genes, permuted": ("apart", "independent", "permuted", {}),
    "hubs": ("hubs", "lognormal", "gaussian", {}),
    "real": ("apart", "real", "gaussian", {}),
    "real, more noise": ("apart", "real", "gaussian", {}),
    "none": ("none", "lognormal", "gaussian", {}),
    "programs": ("programs", "", "gaussian", {}),
}
CURVES = (np.square, np.abs, lambda u: u > 0.5, np.exp)


def unit(v: np.ndarray) -> np.ndarray:
    return (v - v.mean(axis=0)) / v.std(axis=0)


def planted(seed: int, design: str, law: str, noise: float = 0.2) -> tuple[ExpressionDataset, ExpressionDataset, set]:
    """Return train and validation cells, and the pairs whose products are in the target.

    Genes come in programs of ten, correlated in the logarithm of their rates (r = 0.5). Seen is log1p of the rate, less
    what drops out, or of Poisson counts. Of the target's variance half is products, 0.15 each are linear and curved
    effects of single genes, most of them in pairs too; noise comes on top. "apart": each gene is in one pair; "hubs":
    all pairs are among twelve genes. Law "real": cells of the pancreas, and genes seen in a tenth of them at least.
    """
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((N_CELLS, N_GENES))
    if law != "independent":
        z = np.sqrt(0.5) * (z + rng.standard_normal((N_CELLS, N_GENES // 10)).repeat(10, axis=1))
    rate = np.exp(rng.normal(0.5, 0.8, N_GENES) + 0.8 * z)
    if law == "real":
        x = pancreas()[:, rng.choice(pancreas().shape[1], N_GENES, replace=False)]
    elif law == "counts":
        x = np.log1p(rng.poisson(rate * rng.lognormal(0, 0.2, (N_CELLS, 1))))
    else:
        x = np.log1p(np.where(rng.random(rate.shape) < np.exp(-2 * rate), 0, rate))
    u, genes, pairs = unit(x), rng.permutation(N_GENES), []
    if design == "apart":
        pairs = genes[: 2 * N_PAIRS].reshape(-1, 2)
    elif design == "hubs":
        every = np.stack(np.triu_indices(12, 1), axis=1)
        pairs = genes[every[rng.choice(len(every), N_PAIRS, replace=False)]]
    single = np.append(genes[:10], genes[2 * N_PAIRS : 2 * N_PAIRS + 10])
    sign = rng.choice([-1, 1], 3 * N_GENES)
    curved = sum(sign[i] * unit(CURVES[i % 4](u[:, gene])) for i, gene in enumerate(single[:14]))
    y = np.sqrt(0.15) * (unit(u[:, single] @ sign[-len(single) :]) + unit(curved))
    if len(pairs):
        y = y + np.sqrt(0.5) * unit(unit(u[:, pairs[:, 0]] * u[:, pairs[:, 1]]) @ sign[N_GENES : N_GENES + N_PAIRS])
    y = y + np.sqrt(noise) * rng.standard_normal(len(x))
    names, cut = pd.Index([f"G{i:03d}" for i in range(N_GENES)]), int(0.8 * len(x))
    parts = [
        ExpressionDataset(x[cells], y[cells, None], names, pd.Index(["y"])) for cells in (slice(cut), slice(cut, None))
    ]
    return *parts, {frozenset(names[pair]) for pair in pairs}


@cache
def pancreas() -> np.ndarray:
    """Return log-expression of the pancreas, cells in random order, genes that a tenth of the cells have."""
    adata = sources.pancreas()
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    x = adata.X.toarray()[np.random.default_rng(0).permutation(adata.n_obs)]
    return x[:, (x > 0).mean(axis=0) > 0.1]


def programs(seed: int) -> tuple[ExpressionDataset, ExpressionDataset, set]:
    """Return cells whose label is the exclusive-or of two programs of 25 genes, and all pairs across the two."""
    adata = simulate.planted_interactions(seed, n_genes=N_GENES, n_programs=5)
    one, two = (adata.uns["truth"]["programs"][name] for name in adata.uns["truth"]["pair"])
    train, val, _ = get_classification_datasets(adata, "label", 0.8, 0.15)
    return train, val, {frozenset((a, b)) for a in one for b in two}


def discovered(case: str, seed: int) -> list[dict]:
    """Return what is found in one data set at two levels of the false discovery rate, and how much of it is false."""
    design, law, kind, options = CASES[case]
    noise = 0.8 if "more noise" in case else 0.2
    train, val, truth = programs(seed) if design == "programs" else planted(seed, design, law, noise)
    ModelClass = ScBMLPClassifier if design == "programs" else ScBMLPRegressor
    table = pair_discoveries(
        ModelClass, train, val, train.output_names[-1], kind=kind, n=1000, random_state=seed, **options
    )
    solved = solve(ModelClass, train, val, progress=False)
    # How well the solved model ranks all pairs, without knock-offs.
    every = interaction_matrix(solved, train.output_names[-1]).top_pairs(N_GENES**2, dataset=train)
    planted_here = [frozenset(pair) in truth for pair in every[["gene_a", "gene_b"]].to_numpy()]
    auprc = average_precision_score(planted_here, every["strength"]) if truth else np.nan
    true = np.array([frozenset(pair) in truth for pair in table[["gene_a", "gene_b"]].to_numpy()], dtype=bool)
    rows = []
    for level in (0.1, 0.2):
        found = table["q"].to_numpy() <= level
        row = {
            "case": case,
            "seed": seed,
            "level": level,
            "found": int(found.sum()),
            "false": int((found & ~true).sum()),
        }
        rows.append(row | {"planted": len(truth), "auprc": auprc})
    return rows


def main(n: int, cases: list[str]) -> None:
    """Print one line a case and level, and put every data set into the file."""
    for case in cases:
        start, rows = time.perf_counter(), []
        for seed in range(n):
            rows += discovered(case, seed)
        table = pd.DataFrame(rows)
        table["fdp"] = table["false"] / table["found"].clip(lower=1)
        table["power"] = (table["found"] - table["false"]) / table["planted"].clip(lower=1)
        for level, part in table.groupby("level"):
            mean, error = part.mean(numeric_only=True), 1.96 * part["fdp"].std() / np.sqrt(n)
            print(f"{case}, at {level}: FDR {mean['fdp']:.3f} +- {error:.3f}, power {mean['power']:.3f}, "
                  f"{mean['found']:.1f} found, {mean['false']:.1f} false, "
                  f"AUPRC {mean['auprc']:.3f}, {n} data sets", flush=True)  # fmt: skip
        seconds = time.perf_counter() - start
        print(f"  {seconds / n:.1f} s a data set", flush=True)
        keep(
            RESULTS, case, f'python benchmarks/pairs.py {n} "{case}"', rows, seconds, ["numpy", "scikit-learn", "torch"]
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, sys.argv[2:] or list(CASES))
