"""Is any model below the linear baseline? Tuned linear, plain, linear form and ``tune`` on every data set at hand.

    SCBMLP_DATA_DIR=<folder> python benchmarks/baselines.py [--splits 5] [--only "dex hours" ...] [--skip tune]

Real cells of ``$SCBMLP_DATA_DIR`` and scanpy's ``pbmc68k_reduced``; nobody chose a setting for any of them here. Scores
are those of test cells, R2 averaged over targets or accuracy; differences are paired over the splits. What the folder
lacks is left out.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData

from scbmlp.baselines import linear_baseline
from scbmlp.datasets import ExpressionDataset, get_classification_datasets, get_regression_datasets
from scbmlp.models import Config, ScBMLPClassifier, ScBMLPRegressor, tune
from scbmlp.targets import laplacian_frequencies, perturbation_response

Sets = tuple[ExpressionDataset, ExpressionDataset, ExpressionDataset]
Split = Callable[[int], tuple[Sets, np.ndarray | None]]  # with the donor of every validation cell, where there are any
FOLDER = Path(os.environ.get("SCBMLP_DATA_DIR") or ".")


def read(name: str, *, normalise: bool) -> AnnData:
    adata = anndata.read_h5ad(FOLDER / f"{name}.h5ad")
    if normalise:
        sc.pp.normalize_total(adata)
        sc.pp.log1p(adata)
    return adata


def classes(adata: AnnData, key: str) -> Split:
    return lambda seed: (get_classification_datasets(adata, key, random_state=seed), None)


def targets(adata: AnnData, key: str) -> Split:
    return lambda seed: (get_regression_datasets(adata, key, random_state=seed), None)


def cell_types() -> Split:
    return classes(read("pancreas", normalise=True), "clusters")


def frequencies() -> Split:
    adata = read("pancreas", normalise=True)
    laplacian_frequencies(adata)
    return targets(adata, "X_freq")


def tumours() -> Split:
    adata = read("glioblastoma_panobinostat", normalise=True)
    patient = adata.obs["patient_id"].astype("category").cat.codes.to_numpy()

    def leave_out(seed: int) -> tuple[Sets, np.ndarray]:
        # A patient to test on, the next two to validate on: what is chosen must hold in patients that were not seen.
        n = patient.max() + 1
        after = (patient - seed) % n
        split = np.select([after == 0, after < 3], ["test", "val"], "train")
        adata.obs["split"] = split
        sets = get_classification_datasets(adata, "condition", split_key="split")
        return sets, patient[sets[1].indices]

    return leave_out


def dexamethasone() -> AnnData:
    adata = read("a549_dexamethasone", normalise=False)
    hours = adata.obs["dex_hours"].astype(float).to_numpy()
    adata.obsm["hours"] = np.log1p(hours)[:, None]
    adata.obs["treated"] = pd.Categorical(np.where(hours > 0, "dexamethasone", "vehicle"))
    return adata


def response() -> Split:
    adata = dexamethasone()
    perturbation_response(adata, "treated", "vehicle", 1)
    return targets(adata, "X_pert")


def knock_outs() -> Split:
    adata = read("papalexi", normalise=True)
    return classes(adata[adata.obs["grna_top_frac"] > 0.8].copy(), "target")


def bone_marrow() -> Split:
    adata = sc.datasets.pbmc68k_reduced()
    whole = adata.raw.to_adata()
    sizes = whole.obs["bulk_labels"].value_counts()
    return classes(whole[whole.obs["bulk_labels"].isin(sizes.index[sizes >= 7])].copy(), "bulk_labels")


TASKS = {
    "cell types": cell_types,
    "frequencies": frequencies,
    "panobinostat, a patient left out": tumours,
    "dex hours": lambda: targets(dexamethasone(), "hours"),
    "dex response": response,
    "dex or vehicle": lambda: classes(dexamethasone(), "treated"),
    "knock-outs": knock_outs,
    "activations": lambda: classes(read("norman", normalise=False), "perturbation"),
    "pbmc68k_reduced": bone_marrow,
}


def fits(sets: Sets, donors: np.ndarray | None, seed: int, skip: list[str]) -> Iterator[tuple[str, float, float]]:
    """Yield the name of each model, its score on the test cells, and the seconds that it took."""
    train, val, test = sets
    kind = ScBMLPClassifier if train.y.ndim == 1 else ScBMLPRegressor
    size = {"d_input": len(train.gene_names), "d_hidden": 128, "d_output": len(train.output_names), "seed": seed}
    plain = Config(**size, n_epochs=40, batch_size=64, dropout_rate=0.2, weight_decay=3e-3)
    makers = {
        "linear": lambda: linear_baseline(train, val),
        "plain": lambda: fitted(kind(plain), train, val, baseline=False),
        "linear form": lambda: fitted(kind(Config(**size, linear=True)), train, val),
        "tune": lambda: tune(kind, train, val, groups=donors, seed=seed, progress=False),
    }
    for name, make in makers.items():
        if name not in skip:
            start = time.perf_counter()
            model = make()
            yield name, model.score(test), time.perf_counter() - start


def fitted(model, train, val, **options):
    with warnings.catch_warnings(action="ignore"):
        model.fit(train, val, enable_progress_bar=False, **options)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(TASKS))
    parser.add_argument("--skip", nargs="*", default=[])
    args = parser.parse_args()
    for task in args.only:
        try:
            split = TASKS[task]()
        except FileNotFoundError as error:
            print(f"{task}: left out, {error}")
            continue
        rows, seconds = [], []
        for seed in range(args.splits):
            made = list(fits(*split(seed), seed, args.skip))
            rows.append({name: score for name, score, _ in made})
            seconds.append({name: time for name, _, time in made})
        scores, beside = pd.DataFrame(rows), pd.DataFrame(rows).sub(pd.DataFrame(rows)["linear"], axis=0)
        table = pd.DataFrame(
            {
                "score": scores.mean(),
                "less linear": beside.mean(),
                "its standard error": beside.sem(),
                "worst split": beside.min(),
                "seconds": pd.DataFrame(seconds).mean(),
            }
        )
        print(f"\n{task}, {args.splits} splits\n{table.round(4).to_string()}", flush=True)


if __name__ == "__main__":
    main()
