"""Modules of all outputs beside the plain recipe, in one run: python benchmarks/eigenvectors.py.

The plain recipe forms the gene x gene matrix of an output and takes its dense eigendecomposition; it is timed on one
output, which is multiplied. What counts is the ratio, since machines are noisy.
"""

import resource
import time

import numpy as np

from scbmlp.interactions import interaction_matrices
from scbmlp.models import Config, ScBMLPRegressor


def factored(genes, hid, out):
    """Print and return seconds for the eigenpairs of every output, and the last of them."""
    model = ScBMLPRegressor(Config(genes, hid, out))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    for matrix in interaction_matrices(model):
        pairs = matrix.eigh(20)
    seconds = time.perf_counter() - start
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    print(f"{genes} genes, hid {hid}, {out} outputs: {seconds:.2f} s, {used:.0f} MB above the start")
    return seconds, matrix, pairs


def main():
    """Print the seconds of both ways, their ratio, and how far the leading pairs are apart."""
    seconds, matrix, (values, vectors) = factored(10_000, 128, 8)
    factored(60_000, 128, 50)
    start = time.perf_counter()
    dense = matrix.to_dense()
    dense_values, dense_vectors = np.linalg.eigh(dense)
    plain = 8 * (time.perf_counter() - start)
    order = np.argsort(-np.abs(dense_values))[:20]
    print(f"plain recipe: {plain:.0f} s for 8 outputs, timed on one; {plain / seconds:.0f} times as long")
    print(f"largest difference of 20 eigenvalues: {np.abs(values - dense_values[order]).max():.1e}")
    overlap = np.abs((vectors * dense_vectors[:, order]).sum(axis=0))
    print(f"smallest |cosine| of 20 eigenvectors: {overlap.min():.12f}")


if __name__ == "__main__":
    main()
