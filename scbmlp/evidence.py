"""What speaks for modules and pairs: cells without pairs, directions at random, and one table of trust."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.cluster import KMeans

from scbmlp.baselines import LARGE
from scbmlp.checks import whole_number
from scbmlp.datasets import ExpressionDataset, check_dataset, check_in_memory, dense_tensor, match_genes, some
from scbmlp.interactions import Model, similarity
from scbmlp.modules import GeneModules, _over
from scbmlp.stability import follows_target, p_values, stability

STABLE, RARE = 0.8, 0.05  # a module is trusted from this stability on, and up to this p


def without_pairs(dataset: ExpressionDataset, *, n_groups: int = 10, random_state: int = 0) -> ExpressionDataset:
    """Return cells whose genes are dealt out, each by itself, among cells of alike targets: a null for pairs.

    Parameters
    ----------
    dataset
        Cells in memory, with their targets.
    n_groups, random_state
        Number of groups of alike continuous targets, by k-means, and the seed; classes are groups of their own.

    Examples
    --------
    >>> null = evidence.without_pairs(train)
    >>> [float(on.scores(part)["module_1"].var().round(1)) for part in (train, null)]
    [5.5, 1.0]
    """
    check_dataset(dataset)
    check_in_memory(dataset, "without_pairs")
    n_groups, y = whole_number(n_groups, "n_groups", 1, len(dataset)), dataset.y.numpy()
    if y.ndim == 2:
        spread = y.std(axis=0)
        y = KMeans(n_groups, n_init=1, random_state=random_state).fit_predict(y / np.where(spread > 0, spread, 1))
    cells = list(pd.Series(range(len(y))).groupby(y).indices.values())
    rng, thin, blocks = np.random.default_rng(random_state), sparse.issparse(dataset.x), []
    columns = sparse.csc_matrix(dataset.x) if thin else dataset.x
    for start in range(0, columns.shape[1], 256):  # genes made dense at a time
        block = dense_tensor(columns[:, start : start + 256]).numpy().copy()
        for rows in cells:
            block[rows] = rng.permuted(block[rows], axis=0)
        blocks.append(sparse.csr_matrix(block) if thin else block)
    found = copy(dataset)
    found.x = sparse.hstack(blocks, format="csr") if thin else np.hstack(blocks)
    return found


def random_directions(modules: GeneModules, dataset: ExpressionDataset, *, random_state: int = 0) -> GeneModules:
    """Return as many directions as there are modules, drawn with the correlations of the cells and blind to any target.

    Gene sets are rich in genes that rise together: any direction has some terms, and modules need more.

    Parameters
    ----------
    modules, dataset, random_state
        Modules to draw a counterpart of, in their units; cells, of which at most 3,000 are used; and the seed.

    Examples
    --------
    >>> blind = evidence.random_directions(on, train)
    >>> int(enrichment.enrich(blind, programs, n_top=10)["overlap"].max())
    9
    """
    x = match_genes(dataset, modules.loadings.index)
    x = x[some(x.shape[0], LARGE)]
    mix = np.random.default_rng(random_state).standard_normal((x.shape[0], modules.loadings.shape[1]))
    # The covariance of the genes with noise over cells has the covariance of the genes.
    drawn = _over(np.asarray(x.T @ (mix - mix.mean(axis=0))), modules.unit.to_numpy())
    drawn *= np.linalg.norm(modules.loadings, axis=0) / np.linalg.norm(drawn, axis=0)
    loadings = pd.DataFrame(drawn, modules.loadings.index, modules.loadings.columns)
    return replace(modules, loadings=loadings, weights=loadings * np.nan, trust=None)


def trust(
    modules: GeneModules | Mapping[str, GeneModules],
    models: Sequence[Model],
    val: ExpressionDataset,
    *,
    null: pd.DataFrame | None = None,
    audit: pd.DataFrame | None = None,
    enriched: pd.DataFrame | None = None,
    enriched_random: pd.DataFrame | None = None,
) -> GeneModules | dict[str, GeneModules]:
    """Gather what speaks for each module into their ``trust``, and say which of them may be interpreted.

    A module is ``trusted`` with a stability of at least 0.8, p of at most 0.05, and no fewer gene sets of q below 0.05,
    its ``terms``, than a random direction has on average. It would then come back, and is about its target; that its
    genes *interact* takes ``gain_curved``. ``similarity`` is that of the output, mean over pairs of six replicas.

    Parameters
    ----------
    modules
        Modules of one output of a model, or of a consensus; or of several outputs by name.
    models, val
        Replicas of the model, as from :func:`scbmlp.models.solve_replicas`, and cells that no weight was fitted to.
    null, audit
        What :func:`scbmlp.modules.permutation_null` and :func:`scbmlp.interactions.audit` returned.
    enriched, enriched_random
        What :func:`scbmlp.enrichment.enrich` returned for the modules, and for :func:`random_directions` of them.

    Examples
    --------
    >>> found = evidence.trust(on, replicas, validation)
    >>> found.trust["trusted"].tolist()
    [True, True, False, False]
    """
    if isinstance(modules, Mapping):
        done, found = {}, {"enriched": enriched, "enriched_random": enriched_random}
        for name, one in modules.items():
            own = {key: None if table is None else table[table["output"] == name] for key, table in found.items()}
            done[name] = trust(one, models, val, null=null, audit=audit, **own)
        return done
    output = modules.output
    if not len(modules.eigenvalues):  # no products, so there is nothing to trust
        return replace(modules, trust=pd.DataFrame({"trusted": np.zeros(0, bool)}))
    table = stability(models, output, modules=modules, dataset=val)[["eigenvalue", "stability", "low"]]
    trusted = table["stability"] >= STABLE
    if null is not None:
        best = null.attrs["null"]
        if str(output) not in best:
            raise KeyError(f"null has no fits read for {output!r}; it has {', '.join(best)}.")
        own, there = modules.metric, null.attrs.get("metric", modules.metric)
        if own not in (None, there):
            raise ValueError(f"null is in metric {there!r}, not {own!r}; pass permutation_null(..., metric={own!r}).")
        table["r"] = follows_target(modules, models[0], val)
        table["p"] = p_values(table["r"], best[str(output)])
        trusted &= table["p"] <= RARE
    table["similarity"] = np.mean([similarity(a, b, output, dataset=val) for a, b in combinations(models[:6], 2)])
    if audit is not None and not isinstance(output, Mapping):  # a mix of outputs has no row
        if output not in audit.index:
            raise KeyError(f"audit has no row {output!r}; it has {', '.join(map(str, audit.index))}.")
        for name in ("interaction", "gain_curved"):
            table[name] = audit.loc[output, name]
    for name, found in {"terms": enriched, "terms_random": enriched_random}.items():
        if found is not None:
            terms = found[found["q"] < 0.05].groupby("module")["term"].nunique()
            table[name] = terms.reindex(table.index, fill_value=0)
    if enriched is not None and enriched_random is not None:
        table["terms_random"] = table["terms_random"].mean()
        trusted &= table["terms"] >= table["terms_random"]
    return replace(modules, trust=table.assign(trusted=trusted))
