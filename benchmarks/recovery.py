"""Who finds planted genes and pairs: AUPRC of bilinear models and of what the field uses, on simulated cells.

python benchmarks/recovery.py [part ...]; parts are rules, cells, phase, axes and grnlab, all if none is named.
Each writes its rows to benchmarks/results/recovery.json, which the chapter on recovery draws. ``grnlab`` is a published
simulator that is not ours, and no dependency of the book: ``pip install --no-deps --target DIR grnlab==0.3.0``, and
``PYTHONPATH=DIR`` for that part alone.
"""

import sys
import time
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from keep import keep
from sklearn.cluster import KMeans
from sklearn.decomposition import NMF, PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from scbmlp import simulate
from scbmlp.baselines import linear_baseline
from scbmlp.datasets import get_classification_datasets
from scbmlp.interactions import interaction_matrix, linear_axis
from scbmlp.models import Config, ScBMLPClassifier, solve

RESULTS = Path(__file__).with_name("results") / "recovery.json"

# A method takes training and validation cells, and returns a score for every gene (gene, or comp x gene where the best
# of several components is to be taken, by the truth) and for every pair (gene x gene, as many).


def contributions(weight, q, sd):
    """Return scores of a function c + w'd + d'Qd: root of each gene's share of its variance, and |Q| in units of sd."""
    q = np.abs(q) * np.outer(sd, sd)
    return np.sqrt((weight * sd) ** 2 + 2 * (q**2).sum(axis=1)), q


def of_model(model, sd):
    return contributions(
        linear_axis(model, "on", model.statistics.mean).to_numpy(), interaction_matrix(model, "on").to_dense(), sd
    )


def plain(train, val):
    """Fit the plain recipe: uncentred, without a linear part."""
    cfg = Config(train.x.shape[1], 32, 2, n_epochs=30, batch_size=64, device="cpu")
    model = ScBMLPClassifier(cfg)
    model.fit(train, val, baseline=False, enable_progress_bar=False)
    return of_model(model, train.x.std(axis=0))


def linear_form(train, val):
    """Train the form with a linear part and centred genes, from the linear baseline on; at least 1,500 steps."""
    n_epochs = int(np.clip(np.ceil(1500 * 64 / len(train)), 40, 200))
    model = ScBMLPClassifier(Config(train.x.shape[1], 32, 2, linear=True, n_epochs=n_epochs, device="cpu"))
    model.fit(train, val, baseline=linear_baseline(train, val), enable_progress_bar=False)
    return of_model(model, train.x.std(axis=0))


def solved(train, val):
    """Solve the second-order model, whose form validation cells choose."""
    return of_model(solve(ScBMLPClassifier, train, val, progress=False), train.x.std(axis=0))


def outer(score):
    return np.outer(score, score)


def pca(train, val):
    """Take the loadings of ten principal components; the best is taken."""
    scores = np.abs(PCA(10, random_state=0).fit(train.x).components_)
    return scores, [outer(score) for score in scores]


def nmf(train, val, n_components=10, n_runs=5):
    """Find programs that several runs of non-negative factorisation agree on; the best is taken."""
    runs = [
        NMF(n_components, init="random", random_state=i, max_iter=150).fit(train.x).components_ for i in range(n_runs)
    ]
    runs = np.vstack(runs)
    runs /= np.linalg.norm(runs, axis=1, keepdims=True)
    cluster = KMeans(n_components, n_init=5, random_state=0).fit_predict(runs)
    scores = np.array([np.median(runs[cluster == k], axis=0) for k in np.unique(cluster)])
    # What sets a program apart from the others, else the genes of high mean lead each of them.
    scores = np.maximum(scores - np.median(scores, axis=0), 0) / train.x.std(axis=0)
    return scores, [outer(score) for score in scores]


def logistic(train, val):
    """Fit logistic regression, tuned; weights are in units of each gene's deviation."""
    weight = np.abs(np.diff(linear_baseline(train, val).weight, axis=0)[0]) * train.x.std(axis=0)
    return weight, outer(weight)


def wilcoxon(train, val):
    """Test differential expression of the two classes."""
    adata = AnnData(train.x, obs=pd.DataFrame({"label": train.output_names.to_numpy(str)[train.y]}))
    adata.obs_names, adata.var_names = adata.obs_names.astype(str), train.gene_names
    adata.obs["label"] = adata.obs["label"].astype("category")
    adata.uns["log1p"] = {"base": None}
    sc.tl.rank_genes_groups(adata, "label", groups=["on"], reference="off", method="wilcoxon")
    table = sc.get.rank_genes_groups_df(adata, "on").set_index("names")["scores"]
    score = table.abs().reindex(train.gene_names).to_numpy()
    return score, outer(score)


def forest(train, val):
    """Take importances in a random forest; of pairs, those of splits right under one another."""
    model = RandomForestClassifier(100, min_samples_leaf=3, random_state=0).fit(train.x, train.y.numpy())
    pairs = np.zeros((train.x.shape[1],) * 2)
    for tree in (one.tree_ for one in model.estimators_):
        weight = tree.weighted_n_node_samples * tree.impurity
        inner = np.flatnonzero(tree.children_left >= 0)
        gain = np.zeros(tree.node_count)
        gain[inner] = weight[inner] - weight[tree.children_left[inner]] - weight[tree.children_right[inner]]
        for children in (tree.children_left[inner], tree.children_right[inner]):
            split = tree.children_left[children] >= 0
            np.add.at(pairs, (tree.feature[inner[split]], tree.feature[children[split]]), gain[children[split]])
    pairs = (pairs + pairs.T) / pairs.sum()
    # The product of importances orders the pairs that never met.
    return model.feature_importances_, pairs + 1e-3 * outer(model.feature_importances_)


def class_covariances(train):
    """Return standardised cells, the class as +1 and -1 less its mean, and how the genes' covariances differ."""
    z = (train.x - train.x.mean(axis=0)) / train.x.std(axis=0)
    sign = train.y.numpy() * 2.0 - 1
    sign -= sign.mean()
    return z, sign, (z * sign[:, None]).T @ z / len(z)


def screen(train, val):
    """Correlate every product of two genes with the class: one matrix product."""
    pairs = np.abs(class_covariances(train)[2])
    np.fill_diagonal(pairs, 0)
    return np.sqrt((pairs**2).sum(axis=1)), pairs


def eigen_screen(train, val):
    """Take the two strongest eigenvectors of that screen, which is the difference of two covariances."""
    values, vectors = np.linalg.eigh(class_covariances(train)[2])
    kept = np.argsort(-np.abs(values))[:2]
    pairs = np.abs(vectors[:, kept] * values[kept] @ vectors[:, kept].T)
    np.fill_diagonal(pairs, 0)
    return np.sqrt(vectors[:, kept] ** 2 @ values[kept] ** 2), pairs


def lasso(train, val, n_products=3000):
    """Fit the lasso on all genes and on the products that correlate most with the class."""
    z, _, cross = class_covariances(train)
    i, j = np.triu_indices(len(cross), 1)
    best = np.argsort(-np.abs(cross[i, j]), kind="stable")[:n_products]
    i, j = i[best], j[best]
    features = np.hstack([z, z[:, i] * z[:, j]])
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    fit = LogisticRegression(penalty="l1", C=0.03, solver="liblinear", random_state=0).fit(features, train.y.numpy())
    weight = np.abs(fit.coef_[0])
    pairs = np.zeros_like(cross)
    pairs[i, j] = pairs[j, i] = weight[len(cross) :]
    return weight[: len(cross)] + pairs.sum(axis=1), pairs


def gene_mean(train, val):
    """Take mean expression, which knows nothing of the class."""
    score = train.x.mean(axis=0)
    return score, outer(score)


def gene_variance(train, val):
    """Take the variance, which knows nothing of the class."""
    score = train.x.var(axis=0)
    return score, outer(score)


def linear_weight(train, val):
    """Take the raw weight of logistic regression, whatever the gene's units."""
    weight = np.abs(np.diff(linear_baseline(train, val, exact=False).weight, axis=0)[0])
    return weight, outer(weight)


METHODS = {
    "bilinear, solved": solved,
    "network, linear part": linear_form,
    "network, plain recipe": plain,
    "PCA, best of ten": pca,
    "NMF consensus, best": nmf,
    "logistic regression": logistic,
    "Wilcoxon": wilcoxon,
    "random forest": forest,
    "products + lasso": lasso,
    "product screen": screen,
    "product screen, rank 2": eigen_screen,
    "|linear weight|": linear_weight,
    "gene mean": gene_mean,
    "gene variance": gene_variance,
}
SIMPLE = ["product screen", "product screen, rank 2"]


def planted(names, truth):
    """Return which genes are planted (gene), and which pairs (gene x gene), none where nothing interacts."""
    genes = np.isin(names, truth["genes"])
    sides = [np.isin(names, truth["programs"][name]) for name in truth["pair"]]
    pairs = np.zeros((len(names),) * 2, bool)
    if sides:
        pairs = np.outer(*sides) | np.outer(*sides[::-1])
    return genes, pairs


def auprc(found, genes, pairs):
    """Return the AUPRC of genes and of pairs; the component best for the genes counts, where there are several."""
    scores, matrices = found
    if np.ndim(scores) == 2:
        best = np.argmax([average_precision_score(genes, score) for score in scores])
        scores, matrices = scores[best], matrices[best]
    upper = np.triu_indices(len(genes), 1)
    of_pairs = average_precision_score(pairs[upper], matrices[upper]) if pairs.any() else np.nan
    return average_precision_score(genes, scores), of_pairs


def sets_of(adata, val_split=0.15):
    """Return training and validation cells: there is nothing to test, the truth is known."""
    train, val, _ = get_classification_datasets(adata, "label", train_split=0.8, val_split=val_split)
    return train, val


def compare(adata, methods):
    """Return a row a method: AUPRC of genes and of pairs."""
    train, val = sets_of(adata)
    truth = planted(adata.var_names, adata.uns["truth"])
    rows = []
    for name in methods:
        of_genes, of_pairs = auprc(METHODS[name](train, val), *truth)
        rows.append({"method": name, "genes": of_genes, "pairs": of_pairs})
    return rows


RULES = ("additive", "link", "conjunction", "readout", "mixed", "exclusive-or")
CHEAP = ["bilinear, solved", *SIMPLE]
SMALL = (400, 8)  # genes and programs, where many data sets are made


def part_rules():
    """Run every rule and every method, on 1,500 cells x 400 genes, half of them in 8 programs."""
    for seed, rule in product(range(5), RULES):
        adata = simulate.planted_interactions(seed, 1500, *SMALL, rule=rule)
        yield from ({"rule": rule, "seed": seed, **row} for row in compare(adata, METHODS))


def part_cells():
    """Run the exclusive-or among 2,000 genes, with fewer and fewer cells."""
    for seed, n in product(range(1), (200, 300, 500, 700, 1000, 2000)):
        adata = simulate.planted_interactions(seed, n)
        yield from ({"n_cells": n, "seed": seed, **row} for row in compare(adata, CHEAP))


def part_phase():
    """Run the exclusive-or among 400 genes by number of cells and noise."""
    grid = product((200, 400, 800), (0.5, 1.0, 1.5, 2.0), range(1))
    for n, noise, seed in grid:
        adata = simulate.planted_interactions(seed, n, *SMALL, noise=noise)
        yield from ({"n_cells": n, "noise": noise, "seed": seed, **row} for row in compare(adata, CHEAP))


def part_axes():
    """Run the exclusive-or of 1,000 cells by depth and by number of genes, one at a time."""
    for depth, seed in product((200, 600, 1800), range(1)):
        adata = simulate.planted_interactions(seed, 1000, *SMALL, depth=depth)
        yield from ({"axis": "depth", "value": depth, "seed": seed, **row} for row in compare(adata, CHEAP))
    for n, seed in product((200, 800), range(1)):
        adata = simulate.planted_interactions(seed, 1000, n, 8)
        yield from ({"axis": "genes", "value": n, "seed": seed, **row} for row in compare(adata, CHEAP))


def grn_cells(logic, seed, n_cells=400, n_inputs=6, n_each=6):
    """Simulate cells with grnlab: inputs on or off, genes that follow one of them, and a target of two, kept aside.

    The first two inputs with their genes are the pair. The kinetics, their random constants and the noise are grnlab's.
    """
    import grnlab

    rng = np.random.default_rng(seed)
    n_targets = 2 if logic == "exclusive-or" else 1
    n = n_inputs * (1 + n_each) + n_targets
    s = np.zeros((n, n))
    owner = np.repeat(np.arange(n_inputs), n_each)
    s[n_inputs + np.arange(len(owner)), owner] = rng.choice([1, -1], len(owner), p=[0.75, 0.25])
    s[-n_targets, :2] = (1, -1) if logic == "exclusive-or" else (1, 1)
    if logic == "exclusive-or":
        s[-1, :2] = (-1, 1)
    kinetics = {"hill_range": (2.0, 4.0), "k_rel_range": (0.3, 0.7)}
    model = grnlab.build_model(s, "additive" if logic == "OR" else "multiplicative", seed=seed, **kinetics)
    state = np.stack([rng.permutation(n_cells) % 2 for _ in range(n_inputs)], axis=1)
    x = np.empty((n_cells, n))
    for cell, on in enumerate(state):
        one = grnlab.perturb(model, knockdown=np.flatnonzero(on == 0).tolist(), knockdown_factor=0.1)
        run = grnlab.simulate(
            one, duration=6, sample_dt=6, dt=0.2, noise="langevin", noise_strength=0.6, seed=1000 * seed + cell
        )
        x[cell] = run.x[-1]
    target = x[:, -n_targets:] / np.quantile(x[:, -n_targets:], 0.95, axis=0)
    target = target.max(axis=1)
    names = np.array([f"G{i}" for i in range(n - n_targets)])
    adata = AnnData(np.log1p(x[:, :-n_targets]).astype(np.float32), var=pd.DataFrame(index=names))
    adata.obs_names = adata.obs_names.astype(str)
    # The target is read as on or off, at half of its height.
    middle = np.quantile(target, 0.98) / 2
    adata.obs["label"] = pd.Categorical(np.where(target > middle, "on", "off"), ["off", "on"])
    programs = {f"input_{k}": names[[k, *(n_inputs + np.flatnonzero(owner == k))]] for k in range(n_inputs)}
    pair = np.array(["input_0", "input_1"])
    adata.uns["truth"] = {"programs": programs, "pair": pair, "genes": np.concatenate([programs[k] for k in pair])}
    return adata


def part_grnlab():
    """Put the same question to cells of a published simulator of gene regulation."""
    for seed, logic in product(range(3), ("AND", "OR", "exclusive-or")):
        adata = grn_cells(logic, seed)
        share = float((adata.obs["label"] == "on").mean())
        yield from ({"logic": logic, "seed": seed, "on": share, **row} for row in compare(adata, METHODS))


def main(parts):
    """Run parts, and put each into the file."""
    for part in parts:
        start = time.perf_counter()
        rows = []
        for row in globals()[f"part_{part}"]():
            rows.append(row)
            print(f"{part} {time.perf_counter() - start:5.0f} s", rows[-1], flush=True)
        tools = ["numpy", "scikit-learn", "scanpy", "torch"] + ["grnlab"] * (part == "grnlab")
        keep(RESULTS, part, f"python benchmarks/recovery.py {part}", rows, time.perf_counter() - start, tools)


if __name__ == "__main__":
    with warnings.catch_warnings(action="ignore"):
        main(sys.argv[1:] or ["rules", "cells", "phase", "axes", "grnlab"])
