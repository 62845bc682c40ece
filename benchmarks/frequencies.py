"""Lowest frequencies by the sparse solver beside a dense one, in one run: python benchmarks/frequencies.py.

Both get the same graph of 5,000 simulated cells. Then the whole way, from expression to frequencies, for 100,000 cells.
"""

import resource
import time

import numpy as np
import scanpy as sc

from scbmlp import simulate
from scbmlp.targets import laplacian_frequencies


def cells(n):
    """Return log-normalised simulated cells."""
    adata = simulate.pancreas(n_cells=n, n_genes=2000)
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    return adata


def seconds(work):
    """Return how long a piece of work took, and what it returned."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main():
    """Print the seconds of both ways, their ratio, how far they are apart, and what 100,000 cells take."""
    adata = cells(5000)
    sc.pp.pca(adata, n_comps=30)
    sc.pp.neighbors(adata)
    weights = adata.obsp["connectivities"].toarray().astype(np.float64)
    laplacian = np.diag(weights.sum(axis=1)) - weights
    dense, (values, _) = seconds(lambda: np.linalg.eigh(laplacian))
    sparse, _ = seconds(lambda: laplacian_frequencies(adata, neighbors_key="neighbors"))
    print(f"5,000 cells: sparse {sparse:.2f} s, dense {dense:.1f} s, {dense / sparse:.0f} times as long")
    difference = np.abs(adata.uns["X_freq"]["eigenvalues"] - values[1:11]).max()
    print(f"largest difference of 10 eigenvalues: {difference:.1e}")

    adata = cells(100_000)
    took, _ = seconds(lambda: laplacian_frequencies(adata))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(f"100,000 cells x 2,000 genes, components and graph included: {took:.0f} s, peak memory {peak:.1f} GB")


if __name__ == "__main__":
    main()
