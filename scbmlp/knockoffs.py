"""Knock-offs of genes, and the pairs of genes that stand out from pairs with knock-offs, with false discovery rates."""

from __future__ import annotations

from functools import reduce
from numbers import Real
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.linalg import cholesky
from scipy.special import ndtr, ndtri

from scbmlp.checks import whole_number
from scbmlp.datasets import ExpressionDataset, check_dataset, check_in_memory, standard_deviation
from scbmlp.exact import Mixture, solution
from scbmlp.interactions import InteractionMatrix, Output, direction
from scbmlp.models import Config, ScBMLPClassifier, ScBMLPRegressor
from scbmlp.nested import Search, Trial, leading

WEIGHTS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of products beside genes, that are tried
SWEEPS = 5  # over all genes, in which the scores of tied cells and the correlations are found from one another
# At most so many float64 arrays of gene x gene, and of cell x gene, are held at a time (measured).
ARRAYS = {"gaussian": (10, 5), "permuted": (0, 3)}
Law = tuple[np.ndarray, np.ndarray]  # correlations of scores (gene x gene), what of a variance is a gene's own (gene)


def knockoffs(
    train: ExpressionDataset,
    *others: ExpressionDataset,
    kind: Literal["gaussian", "permuted"] = "gaussian",
    random_state: int = 0,
    max_gb: float = 4.0,
) -> list[ExpressionDataset]:
    """Put beside every gene a knock-off: values of its own in other cells, drawn without a look at the targets.

    Gaussian knock-offs are those of :cite:t:`candes2018` on normal scores, with a gene's correlations with all others
    by a factor model of what stands out of noise, as in :cite:t:`laloux1999`. Permuted ones are a gene's values in
    random order: right only where genes are independent.

    Parameters
    ----------
    train, others
        Cells in memory. The correlations are those of `train`; each data set keeps marginals of its own.
    kind, random_state, max_gb
        ``"gaussian"`` or ``"permuted"``, the seed of the draw, and most memory to use, in GB.

    Examples
    --------
    >>> twice, _ = knockoffs.knockoffs(train, validation)
    >>> len(twice.gene_names), twice.gene_names[40]
    (80, 'Sim0001 (knock-off)')
    """
    if kind not in ARRAYS:
        raise ValueError(f"kind={kind!r} is unknown; choose 'gaussian' or 'permuted'.")
    for name, dataset in {"train": train, **{f"others[{i}]": one for i, one in enumerate(others)}}.items():
        check_dataset(dataset, name)
        check_in_memory(dataset, "knockoffs")
        if not dataset.gene_names.equals(train.gene_names):
            raise ValueError(f"{name} does not have the genes of train in its order; cut both from one AnnData.")
    if len(train) < 3:
        raise ValueError(f"train has {len(train)} cells; correlations need at least 3: pass more cells.")
    names = pd.Index([*map(str, train.gene_names), *(f"{name} (knock-off)" for name in train.gene_names)], dtype=object)
    if not names.is_unique:
        twice = names[names.duplicated()][0]
        raise ValueError(f"train has genes that are knock-offs already, such as {twice!r}; pass it without them.")
    n_genes, (square, long) = len(train.gene_names), ARRAYS[kind]
    size = 8e-9 * n_genes * (square * n_genes + long * max(map(len, (train, *others))))
    if size > max_gb:
        what = f"knock-offs of {n_genes} genes take {size:.2g} GB, more than max_gb={max_gb}"
        raise ValueError(f"{what}; keep the most variable genes, or allow more.")
    rng, found, law = np.random.default_rng(random_state), [], None
    for dataset in (train, *others):
        thin = sparse.issparse(dataset.x)
        x = dataset.x.toarray() if thin else dataset.x
        if kind == "gaussian":
            scores, law = _scores(x, rng, law)
            drawn = _draw(scores, *law, rng)
        else:
            drawn = rng.random(x.shape)
        new = np.empty_like(x)
        for gene in range(n_genes):
            new[np.argsort(drawn[:, gene]), gene] = np.sort(x[:, gene])
        both = sparse.hstack([dataset.x, new], format="csr") if thin else np.hstack([x, new])
        outputs, y = dataset.output_names, dataset.y.numpy()
        found.append(ExpressionDataset(both, y, names, outputs, dataset.indices, dataset.layer))
    return found


def _scores(x: np.ndarray, rng: np.random.Generator, law: Law | None) -> tuple[np.ndarray, Law]:
    """Return normal scores (cell x gene) within each cell's rank or tie, and their law, estimated unless given."""
    low, high = np.empty(x.shape), np.empty(x.shape)
    for gene in range(x.shape[1]):
        ordered = np.sort(x[:, gene])
        low[:, gene] = np.searchsorted(ordered, x[:, gene]) / len(x)
        high[:, gene] = np.searchsorted(ordered, x[:, gene], "right") / len(x)
    scores = ndtri(low + (high - low) * rng.uniform(0.001, 0.999, x.shape))
    low, high = ndtri(low), ndtri(high)
    estimate, law = law is None, law or _estimate(scores, np.ones(x.shape[1]))
    for _ in range(SWEEPS):
        # Each gene's scores given all others', which its ranks confine to an interval: a step of Gibbs sampling.
        precision = np.linalg.inv(law[0])
        for gene in range(x.shape[1]):
            sd = precision[gene, gene] ** -0.5
            mean = scores[:, gene] - scores @ precision[:, gene] * sd**2
            below, above = ndtr((low[:, gene] - mean) / sd), ndtr((high[:, gene] - mean) / sd)
            quantile = (below + (above - below) * rng.random(len(x))).clip(1e-12, 1 - 1e-12)
            scores[:, gene] = (mean + sd * ndtri(quantile)).clip(low[:, gene], high[:, gene])
        law = _estimate(scores, law[1]) if estimate else law
    return scores, law


def _estimate(scores: np.ndarray, own: np.ndarray) -> Law:
    """Return the factor model of scores (cell x gene) by principal factors, from a first guess of `own`."""
    raw = np.corrcoef(scores, rowvar=False).reshape(len(own), len(own))
    values = np.linalg.eigvalsh(raw)
    edge = (1 + np.sqrt(len(own) / len(scores))) ** 2  # times their mean, where eigenvalues of noise alone end
    n_noise, before = len(values), None
    while n_noise != before:
        before, n_noise = n_noise, np.count_nonzero(values <= edge * values[:n_noise].mean())
    for _ in range(3):
        reduced, vectors = np.linalg.eigh(raw - np.diag(own))
        loadings = vectors[:, n_noise:] * np.sqrt(reduced[n_noise:].clip(0))
        shared = (loadings**2).sum(axis=1)
        loadings *= np.sqrt(np.minimum(1, 0.95 / np.maximum(shared, 0.95)))[:, None]
        own = 1 - np.minimum(shared, 0.95)
    correlation = loadings @ loadings.T
    np.fill_diagonal(correlation, 1)
    return correlation, own


def _draw(scores: np.ndarray, correlation: np.ndarray, own: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return knock-offs of scores (cell x gene): their law, and correlation - diag(s) with the scores themselves."""
    # Correlation = shared + diag(own), so that 2 correlation - diag(s) is positive for any s up to 2 own.
    s = np.minimum(1, 2 * own) * (1 - 1e-6)
    turn = np.linalg.solve(correlation, np.diag(s))
    root = cholesky(2 * np.diag(s) - s[:, None] * turn)
    return scores - scores @ turn + rng.standard_normal(scores.shape) @ root


def pair_discoveries(
    ModelClass: type[ScBMLPClassifier | ScBMLPRegressor],
    train: ExpressionDataset,
    val: ExpressionDataset,
    output: Output,
    *,
    kind: Literal["gaussian", "permuted"] = "gaussian",
    n: int = 2000,
    clump: float = 0.2,
    random_state: int = 0,
    max_gb: float = 4.0,
) -> pd.DataFrame:
    """Return pairs of genes that interact, with the false discovery rate of each list of the strongest.

    A second-order model of all genes and their knock-offs is solved as by :func:`scbmlp.models.solve`, in units of
    their standard deviation. Pairs with a knock-off in them show how strong pairs come out that do not interact, as
    decoys do for peptides :cite:p:`walzthoeni2012` and knock-offs for interactions :cite:p:`chen2025diamond`.

    ``contrast`` is a pair's strength, as in ``top_pairs(dataset=train)``, over the noise: the root of the product of
    both genes' median strengths. ``q`` is the least of (1 + pairs with knock-offs) / pairs of genes over the lists from
    the top that the pair is in; ten pairs can have 0.1, and no less. This estimate is no theorem: it is right in
    expectation or too large for genes one of which does not matter, and two that both matter, but not as a pair, have
    no like among knock-offs. Look at several draws. ``benchmarks/pairs.py`` measures rate and power.

    Parameters
    ----------
    ModelClass, train, val
        ``ScBMLPClassifier`` or ``ScBMLPRegressor``, cells to fit, and cells that choose weight and penalty.
    output, kind, random_state, max_gb
        As in :func:`scbmlp.interactions.direction` and :func:`knockoffs`.
    n, clump
        Number of strongest pairs to look at, those with knock-offs included, and the correlation from which on genes go
        along with each other: a pair next to a stronger one of such genes is left out; 1 for none.

    Examples
    --------
    >>> table = knockoffs.pair_discoveries(ScBMLPClassifier, train, validation, "on")
    >>> {*table.loc[0, ["gene_a", "gene_b"]]} <= {*truth["genes"]}
    True
    """
    n = whole_number(n, "n")
    if not (isinstance(clump, Real) and 0 < clump <= 1):
        raise ValueError(f"clump={clump!r} is no correlation: a number above 0 and at most 1 is needed, 1 for none.")
    check_dataset(train, "train")
    check_dataset(val, "val")
    genes, n_genes = train.gene_names, len(train.gene_names)
    probe = ModelClass(Config(n_genes, 1, len(train.output_names)))
    probe.output_names = train.output_names
    probe.check(train)
    probe.check(val)
    mix = direction(probe, output)  # an unknown output is told before the fit
    train, val = knockoffs(train, val, kind=kind, random_state=random_state, max_gb=max_gb)
    search = Search([(train, val)])
    linear = search.path("", Mixture(space="sd"))
    trials = [search.path("", linear.mixtures[0].plus("products", weight), leading(linear)[1]) for weight in WEIGHTS]
    best = reduce(Trial.or_better, trials)
    found = solution(train, best.mixtures, best.ratios)
    power = mix @ found.power
    used = np.flatnonzero(power)
    matrix = InteractionMatrix(found.hidden[used].T, np.diag(power[used]), pd.RangeIndex(2 * n_genes))
    top = _strongest(matrix, train, n)
    top = top[(top["contrast"] > 0) & (top["gene_a"] % n_genes != top["gene_b"] % n_genes)]
    top = top[_leading(top["gene_a"].to_numpy(), top["gene_b"].to_numpy(), train.x, clump)]
    i, j = top["gene_a"].to_numpy(), top["gene_b"].to_numpy()
    top = top.assign(gene_a=genes[i % n_genes], gene_b=genes[j % n_genes], q=_q_values((i >= n_genes) | (j >= n_genes)))
    return top[(i < n_genes) & (j < n_genes)].reset_index(drop=True)


def _strongest(matrix: InteractionMatrix, dataset: ExpressionDataset, n: int) -> pd.DataFrame:
    """Return the `n` pairs of largest contrast, genes by position."""
    basis = matrix.basis * standard_deviation(dataset.x)[:, None]
    # The median strength of each gene's pairs, not purified, is noise: few of them are more.
    strengths = (2 * np.abs(basis[start : start + 256] @ matrix.core @ basis.T) for start in range(0, len(basis), 256))
    unit = np.sqrt(np.concatenate([np.median(rows, axis=1) for rows in strengths]))
    scaled = matrix.scaled(np.divide(1, unit, out=np.zeros(len(unit)), where=unit > 0))
    top = scaled.top_pairs(n, dataset=dataset)
    back = unit[top["gene_a"]] * unit[top["gene_b"]]
    return top.assign(interaction=top["interaction"] * back, strength=top["strength"] * back, contrast=top["strength"])


def _leading(i: np.ndarray, j: np.ndarray, x: Any, clump: float) -> np.ndarray:
    """Return which pairs (pair), strongest first, no stronger one of genes that go along with theirs stands for."""
    used, at = np.unique(np.concatenate([i, j]), return_inverse=True)
    columns = x[:, used].toarray() if sparse.issparse(x) else x[:, used]
    near = np.abs(np.corrcoef(columns, rowvar=False)) >= clump
    np.fill_diagonal(near, True)
    a, b = np.split(at, 2)
    kept: list[int] = []
    for pair in range(len(a)):
        to_a, to_b = near[a[pair]], near[b[pair]]
        if not np.any(to_a[a[kept]] & to_b[b[kept]] | to_a[b[kept]] & to_b[a[kept]]):
            kept.append(pair)
    return np.isin(np.arange(len(a)), kept)


def _q_values(decoy: np.ndarray) -> np.ndarray:
    """Return the q-value of every pair (pair), strongest first, from whether knock-offs are in it."""
    decoys, originals = np.cumsum(decoy), np.cumsum(~decoy)
    rate = np.minimum(1, (1 + decoys) / np.maximum(originals, 1))
    return np.minimum.accumulate(rate[::-1])[::-1]
