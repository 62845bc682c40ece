"""What a regressor is to learn: scales of variation of the cells, or their response to perturbations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from scipy import sparse
from scipy.linalg import orthogonal_procrustes
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import eigsh
from sklearn.neighbors import KNeighborsRegressor

from scbmlp import checks
from scbmlp.checks import expression, positions, whole_number


def laplacian_frequencies(
    adata: AnnData,
    n_frequencies: int = 10,
    key_added: str = "X_freq",
    *,
    cells: Any = None,
    layer: str | None = None,
    neighbors_key: str | None = None,
    n_neighbors: int = 15,
    normalized: bool = False,
) -> None:
    """Add the smoothest functions over the cells: eigenvectors of the Laplacian of their neighbour graph.

    Scanpy makes the graph :cite:p:`wolf2018scanpy`. Eigenvalues say how much a frequency differs over edges
    :cite:p:`shuman2013`. The constant one is left out. The longer tail is positive.

    Parameters
    ----------
    adata, layer
        Cells with log-normalised expression in ``X``, or in a layer; it is changed.
    n_frequencies
        Number of frequencies, the lowest first.
    key_added
        Key of ``obsm`` (cell x out, in standard deviations of the graph's cells), and of ``uns`` for the eigenvalues.
    cells
        Positions or mask of the cells that make the graph; others are placed afterwards :cite:p:`bengio2004`.
    neighbors_key
        Key of ``uns`` of a graph from ``scanpy.pp.neighbors``; none is made then.
    n_neighbors
        Neighbours of a cell, itself included, found in 30 principal components, or as many as the data have.
    normalized
        Whether a cell counts by its degree, as in diffusion maps; else frequencies have mean 0.

    Examples
    --------
    >>> control = screen[screen.obs["perturbation"] == "control"].copy()
    >>> sc.pp.neighbors(control, method="gauss", use_rep="X")  # or none: one is made
    >>> targets.laplacian_frequencies(control, 2, neighbors_key="neighbors")
    >>> control.obsm["X_freq"].shape
    (960, 2)
    """
    checks.check_key(key_added)
    chosen = positions(cells, adata)
    n_frequencies = whole_number(n_frequencies, "n_frequencies", 1, len(chosen) - 2)
    if neighbors_key is None:
        x, where = expression(adata, layer)
        checks.check_log_normalised(x, where, adata)
        used = _highly_variable(adata.var)
        graph = AnnData(x[chosen], var=pd.DataFrame({"used": used}, pd.RangeIndex(len(used)).astype(str)))
        n_pcs = min(30, len(chosen) - 1, int(used.sum()) - 1)
        sc.pp.pca(graph, n_comps=n_pcs, mask_var="used", random_state=0)
        n_neighbors = min(n_neighbors, len(chosen))
        sc.pp.neighbors(graph, n_neighbors=n_neighbors, random_state=0)
        weights = graph.obsp["connectivities"]
        made_with = {"n_neighbors": n_neighbors, "n_pcs": n_pcs}
    else:
        known = adata.uns.get(neighbors_key, {})
        key = known.get("connectivities_key", "connectivities")
        if neighbors_key not in adata.uns or key not in adata.obsp:
            where = f"adata.uns and adata.obsp[{key!r}]; scanpy.pp.neighbors(adata) makes one"
            raise KeyError(f"neighbors_key={neighbors_key!r} has no graph in {where}.")
        if cells is not None:
            raise ValueError(f"cells cannot be given with neighbors_key={neighbors_key!r}, whose graph has all cells.")
        weights = adata.obsp[key]
        # None for what is not recorded.
        made_with = {name: known.get("params", {}).get(name) for name in ("n_neighbors", "n_pcs")}
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
        loadings = graph.varm["PCs"]
        new = x[others] @ loadings - np.asarray(graph.X.mean(axis=0)).ravel() @ loadings
        nearest = KNeighborsRegressor(n_neighbors).fit(graph.obsm["X_pca"], frequencies)
        result[others] = nearest.predict(new) * degree / (degree - values)
    adata.obsm[key_added] = result
    adata.uns[key_added] = {"eigenvalues": values, "normalized": normalized, "n_cells": len(chosen)} | made_with


def _highly_variable(var: pd.DataFrame) -> np.ndarray:
    """Return which genes count: those marked highly variable, or all where none is marked."""
    if "highly_variable" not in var:
        return np.ones(len(var), bool)
    used = checks.as_mask(var["highly_variable"], "adata.var['highly_variable']")
    if not used.any():
        raise ValueError("adata.var['highly_variable'] marks no gene; mark some, or delete the column to use all.")
    return used


def _check_connected(weights: sparse.csr_matrix, names: pd.Index) -> None:
    """Raise an error if a graph falls apart, which an isolated cell is enough for."""
    n_parts, part = connected_components(weights, directed=False)
    if n_parts > 1:
        sizes = np.bincount(part)
        small = ", ".join(names[np.flatnonzero(part == sizes.argmin())[:3]])
        parts = f"{n_parts} parts of {', '.join(map(str, np.sort(sizes)[::-1][:9]))} cells"
        remedy = f"raise n_neighbors, or take each part on its own (the smallest has {small})"
        raise ValueError(f"the graph falls into {parts}; {remedy}.")


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


def perturbation_response(
    adata: AnnData,
    perturbation_key: str,
    control: Any,
    n_components: int = 10,
    key_added: str = "X_pert",
    *,
    strata: str | Sequence[str] | None = None,
    cells: Any = None,
    layer: str | None = None,
    min_cells: int = 5,
) -> None:
    """Add an embedding of what each cell's perturbation did: its difference to vehicle, on components of responses.

    Differences are to the mean of vehicle cells, as in pertpy :cite:p:`heumos2024pertpy`. Components are singular
    vectors of the mean differences of every perturbation and stratum, weighted by the root of the cells. Vehicle is
    the origin. Loadings are positive for genes that rise along a component, whose longer tail is positive.

    Parameters
    ----------
    adata, layer
        Cells, log-normalised in ``X`` or a layer; it is changed. Genes not marked ``highly_variable`` are left out.
    perturbation_key, control
        Column of ``obs`` with the perturbation of every cell, and its label for vehicle.
    n_components
        Number of components.
    key_added
        Key of ``obsm`` (cell x comp, log-expression), ``varm`` (gene x comp) and ``uns`` (shares of variance).
    strata, min_cells
        Columns of ``obs`` within which cells are compared; fewest cells of a perturbation, and of vehicle in a stratum.
    cells
        Positions or mask of the cells that the components are fitted on; all if None.

    Examples
    --------
    >>> targets.perturbation_response(
    ...     screen, "perturbation", "control", 2, strata="cell_line"
    ... )
    >>> response = pd.DataFrame(screen.obsm["X_pert"], screen.obs["perturbation"])
    >>> response.loc["AR-42"].mean().round(1).tolist()
    [4.4, 3.9]
    """
    checks.check_key(key_added)
    labels, control = checks.control_labels(adata, perturbation_key, control)
    stratum, names = checks.strata_of(adata, strata)
    vehicle = labels == control
    few = labels.value_counts()[lambda sizes: sizes < min_cells]
    if len(few):
        shown = ", ".join(f"{label} ({size})" for label, size in few.items())
        raise ValueError(f"fewer than min_cells={min_cells} cells of {shown}; drop these perturbations, or lower it.")
    few = vehicle.groupby(stratum).sum()[lambda sizes: sizes < min_cells]
    if len(few):
        shown = "; ".join(f"{name}: {size}" for name, size in few.items())
        lacking = f"strata={names} have fewer than min_cells={min_cells} cells of {control!r} to compare with ({shown})"
        raise ValueError(f"{lacking}; drop the cells of these strata, or name fewer columns.")
    used, fitted = _highly_variable(adata.var), positions(cells, adata)
    most = min((labels + ", " + stratum).iloc[fitted].nunique(), int(used.sum()))  # conditions and genes
    n_components = whole_number(n_components, "n_components", 1, most)
    # Twice over the strata, for means and for projections: the signatures of all cells are never in memory at once.
    x, where = expression(adata, layer)
    checks.check_log_normalised(x, where, adata)
    x = x[:, used]
    means = []
    for rows, signature in _signatures(x, vehicle.to_numpy(), stratum):
        inside = np.isin(rows, fitted)
        for group in labels.iloc[rows[inside]].groupby(labels).indices.values():
            means.append(signature[inside][group].sum(axis=0) / np.sqrt(len(group)))
    _, strength, components = np.linalg.svd(np.stack(means), full_matrices=False)
    components = components[:n_components].T
    embedding = np.empty((adata.n_obs, n_components))
    for rows, signature in _signatures(x, vehicle.to_numpy(), stratum):
        embedding[rows] = signature @ components
    sign = np.where((embedding[fitted] ** 3).sum(axis=0) < 0, -1, 1)
    adata.obsm[key_added] = embedding * sign
    adata.varm[key_added] = np.zeros((adata.n_vars, n_components))
    adata.varm[key_added][used] = components * sign
    ratio = strength[:n_components] ** 2 / (strength**2).sum()
    options = {"perturbation_key": perturbation_key, "control": control, "strata": names}
    adata.uns[key_added] = {"variance_ratio": ratio} | options


def _signatures(x: Any, vehicle: np.ndarray, stratum: pd.Series) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the cells of each stratum, and their expression less the mean of its vehicle cells (cell x gene)."""
    for rows in stratum.groupby(stratum, observed=True).indices.values():
        own = x[rows]
        own = np.asarray(own.toarray() if sparse.issparse(own) else own, dtype=np.float32)
        yield rows, own - own[vehicle[rows]].mean(axis=0)


def dose_coordinates(
    adata: AnnData, perturbation_key: str, dose_key: str, control: Any, key_added: str = "X_dose"
) -> None:
    """Add what each cell was given: its dose on a log scale, in the column of its compound.

    It is not made of expression, so that learning it is not circular.

    Parameters
    ----------
    adata
        Cells; it is changed.
    perturbation_key, dose_key, control
        Columns of ``obs`` with compound and dose, and the label of vehicle, whose dose is taken as 0.
    key_added
        Key of ``obsm`` for a DataFrame: log(1 + dose) over that of the highest dose (cell x compound), 0 to 1.

    Examples
    --------
    >>> targets.dose_coordinates(screen, "perturbation", "dose_value", "control")
    >>> dose = screen.obsm["X_dose"]["AR-42"].astype(float)
    >>> dose.groupby(screen.obs["dose_value"]).max().round(2).tolist()
    [0.0, 0.26, 0.5, 0.75, 1.0]
    """
    checks.check_key(key_added)
    labels, control = checks.control_labels(adata, perturbation_key, control)
    doses = checks.obs_column(adata, dose_key, "dose_key")
    numbers = checks.as_numbers(doses).mask(labels == control, 0.0)
    wrong = ~(numbers >= 0) | np.isinf(numbers)
    if wrong.any():
        some = f"{', '.join(map(repr, doses[wrong].unique().tolist()[:5]))} in {wrong.sum()} treated cells"
        raise ValueError(f"obs[{dose_key!r}] has {some}; convert them to numbers of at least 0, or drop those cells.")
    if numbers.max() == 0:
        raise ValueError(f"obs[{dose_key!r}] is 0 in every treated cell; name the column that has the doses.")
    compounds = sorted(set(labels) - {control})
    scaled = np.log1p(numbers) / np.log1p(numbers.max())
    table = (labels.to_numpy()[:, None] == compounds) * scaled.to_numpy()[:, None]
    adata.obsm[key_added] = pd.DataFrame(table.astype(np.float32), adata.obs_names, compounds)


def noise_ceiling(
    adata: AnnData, compute: Callable[[AnnData], np.ndarray], *, layer: str | None = None
) -> pd.DataFrame:
    """Say how much of a target is there in the molecules, and not a matter of which of them were caught.

    From the correlation r of the targets of random halves, the R2 of a predictor that knows the noiseless target is
    2r / (1 + r) :cite:p:`spearman1910,brown1910`. A model of the same molecules can come above: it shares their noise.

    Parameters
    ----------
    adata, layer
        Cells with counts in ``X``, or in a layer; it is not changed.
    compute
        Returns the target (cell x out) of an AnnData whose ``X`` has the counts of one half.

    Returns
    -------
    ``r`` and ``ceiling`` of every output. Halves are first rotated onto all molecules: components swap order and sign.

    Examples
    --------
    >>> from sklearn.decomposition import TruncatedSVD
    >>> counts, svd = simulate.pancreas(0, 300, 200), TruncatedSVD(2, random_state=0)
    >>> targets.noise_ceiling(counts, lambda half: svd.fit_transform(half.X)).round(2)
          r  ceiling
    0  0.98     0.99
    1  0.98     0.99
    """
    x, where = expression(adata, layer)
    x = sparse.csr_matrix(x)
    if len(some := x.data[(x.data < 0) | (x.data != np.round(x.data))][:1]):
        raise ValueError(f"{where} has values that are no counts, such as {some}: pass layer= with the counts.")
    rng = np.random.default_rng(0)
    taken = rng.binomial(x.data.astype(np.int64), 0.5)
    targets = []
    for data in (x.data, taken, x.data - taken):
        part = sparse.csr_matrix((np.asarray(data, dtype=np.float32), x.indices, x.indptr), x.shape, copy=True)
        part.eliminate_zeros()  # in place, and so on a copy
        target = np.asarray(compute(AnnData(part, adata.obs.copy(), adata.var.copy())), dtype=np.float64)
        if target.ndim != 2 or len(target) != adata.n_obs:
            raise ValueError(f"compute returned shape {target.shape} for {adata.n_obs} cells; (cell x out) is needed.")
        targets.append(target)
    whole, *halves = [(target - target.mean(axis=0)) / target.std(axis=0) for target in targets]
    turned = [half @ orthogonal_procrustes(half, whole)[0] for half in halves]
    r = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(turned[0].T, turned[1].T, strict=True)])
    return pd.DataFrame({"r": r, "ceiling": 2 * np.maximum(r, 0) / (1 + np.maximum(r, 0))})
