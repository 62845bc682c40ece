"""What a regressor is to learn: scales of variation of the cells, computed from the cells themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import scanpy as sc
from anndata import AnnData
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import eigsh
from sklearn.neighbors import KNeighborsRegressor


def laplacian_frequencies(
    adata: AnnData,
    n_frequencies: int = 10,
    key_added: str = "X_freq",
    *,
    cells: Any = None,
    neighbors_key: str | None = None,
    n_neighbors: int = 15,
    n_pcs: int = 30,
    normalized: bool = False,
    random_state: int = 0,
) -> None:
    """Add the smoothest functions over the cells: eigenvectors of the Laplacian of their neighbour graph.

    Cells are joined to their nearest neighbours on principal components by scanpy :cite:p:`wolf2018scanpy`. With the
    symmetric weights A and the degrees D, eigenvectors of L = D - A are the frequencies of graph signal processing
    :cite:p:`shuman2013`: the eigenvalue of a unit vector is how much it differs over edges. The first, constant, is
    left out. A sparse solver finds them; no cell x cell array is formed.

    Parameters
    ----------
    adata
        Cells with log-normalised expression in ``X``; it is changed.
    n_frequencies
        Number of frequencies, the lowest first.
    key_added
        ``obsm[key_added]`` has the frequencies (cell x out), in units of their standard deviation over the cells of
        the graph, with the longer tail positive; ``uns[key_added]`` the eigenvalues, rising, and the parameters.
    cells
        Positions or mask of the cells that make principal components and graph, for targets that do not know the
        others; all if None. The others get the Nystrom extension :cite:p:`bengio2004`: the mean of their nearest
        neighbours among `cells`, scaled as the eigenvalue asks for.
    neighbors_key
        Use the graph that ``scanpy.pp.neighbors(adata, key_added=neighbors_key)`` made (``"neighbors"`` is scanpy's
        own key) and do not make one.
    n_neighbors, n_pcs
        Neighbours of a cell, itself included, and number of principal components, at most what the data have.
    normalized
        Solve L f = eigenvalue D f, so that a cell counts by its degree, as in diffusion maps; else frequencies have
        mean 0.
    random_state
        Seed of principal components and neighbours.

    Raises
    ------
    KeyError
        There is no graph under `neighbors_key`.
    ValueError
        The graph has isolated cells or falls apart, it has no `n_frequencies` besides the constant one, or `cells`
        is given with `neighbors_key`.
    """
    chosen = np.arange(adata.n_obs) if cells is None else np.unique(np.arange(adata.n_obs)[cells])
    if not 1 <= n_frequencies <= len(chosen) - 2:
        raise ValueError(
            f"n_frequencies={n_frequencies} were asked for; a graph of {len(chosen)} cells has 1 to {len(chosen) - 2} "
            f"besides the constant one that a sparse solver can find."
        )
    graph_cells = None
    if neighbors_key is None:
        graph_cells = _with_neighbors(adata[chosen], n_neighbors, n_pcs, random_state)
        weights = graph_cells.obsp["connectivities"]
    elif neighbors_key not in adata.uns:
        raise KeyError(f"neighbors_key={neighbors_key!r} is not in adata.uns; call scanpy.pp.neighbors(adata) first.")
    elif cells is not None:
        raise ValueError(f"cells cannot be given with neighbors_key={neighbors_key!r}, whose graph has all cells.")
    else:
        weights = adata.obsp[adata.uns[neighbors_key].get("connectivities_key", "connectivities")]
    weights = sparse.csr_matrix((weights + weights.T) / 2, dtype=np.float64)
    _check_connected(weights, adata.obs_names[chosen])
    values, frequencies = _lowest(weights, n_frequencies, normalized)

    result = np.empty((adata.n_obs, n_frequencies))
    result[chosen] = frequencies
    others = np.setdiff1d(np.arange(adata.n_obs), chosen)
    if len(others):
        # A new cell is joined to its nearest neighbours with equal weights that add up to the mean degree, and
        # its value solves the eigenvector's equation in its own row.
        degree = 1.0 if normalized else weights.sum() / len(chosen)
        known = graph_cells.obsm["X_pca"]
        loadings = graph_cells.varm["PCs"]
        new = adata.X[others] @ loadings - np.asarray(graph_cells.X.mean(axis=0)).ravel() @ loadings
        nearest = KNeighborsRegressor(min(n_neighbors, len(chosen))).fit(known, frequencies)
        result[others] = nearest.predict(new) * degree / (degree - values)
    adata.obsm[key_added] = result
    adata.uns[key_added] = {
        "eigenvalues": values,
        "n_neighbors": n_neighbors,
        "n_pcs": n_pcs,
        "normalized": normalized,
        "n_cells": len(chosen),
    }


def _with_neighbors(adata: AnnData, n_neighbors: int, n_pcs: int, random_state: int) -> AnnData:
    """Return a copy with principal components and a neighbour graph, so that the caller's cells keep their own."""
    most = min(adata.shape) - 1
    if "highly_variable" in adata.var:
        most = min(most, int(adata.var["highly_variable"].sum()) - 1)
    result = AnnData(adata.X.copy(), obs=adata.obs[[]], var=adata.var)
    sc.pp.pca(result, n_comps=min(n_pcs, most), random_state=random_state)
    sc.pp.neighbors(result, n_neighbors=min(n_neighbors, adata.n_obs), random_state=random_state)
    return result


def _check_connected(weights: sparse.csr_matrix, names: Any) -> None:
    degree = np.asarray(weights.sum(axis=1)).ravel()
    isolated = np.flatnonzero(degree <= 0)
    if len(isolated):
        raise ValueError(
            f"{len(isolated)} of {len(names)} cells of the graph have no neighbour ({', '.join(names[isolated[:3]])}); "
            f"drop them, or raise n_neighbors."
        )
    n_parts, part = connected_components(weights, directed=False)
    if n_parts > 1:
        sizes = np.bincount(part)
        small = names[np.flatnonzero(part == sizes.argmin())[:3]]
        raise ValueError(
            f"the graph falls into {n_parts} parts of {', '.join(map(str, np.sort(sizes)[::-1]))} cells, so that its "
            f"lowest frequencies only tell the parts apart; raise n_neighbors, or take each part on its own (the "
            f"smallest has {', '.join(small)})."
        )


def _lowest(weights: sparse.csr_matrix, n: int, normalized: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the `n` lowest eigenvalues above 0 and their eigenvectors (cell x out), scaled, with a fixed sign."""
    degree = np.asarray(weights.sum(axis=1)).ravel()
    start = np.random.default_rng(0).normal(size=len(degree))
    options = {"k": n + 1, "v0": start, "ncv": min(len(degree), max(2 * n + 1, 60))}
    if normalized:
        root = sparse.diags_array(1 / np.sqrt(degree))
        values, vectors = eigsh(root @ weights @ root, which="LA", **options)
        values, vectors = 1 - values[::-1], root @ vectors[:, ::-1]
    else:
        values, vectors = eigsh(sparse.diags_array(degree) - weights, which="SA", **options)
    vectors = vectors[:, 1:] / vectors[:, 1:].std(axis=0)
    return values[1:], vectors * np.where((vectors**3).sum(axis=0) < 0, -1, 1)
