"""Interaction matrices read off the weights, kept as thin factors, and what they carry of a prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.linalg import block_diag
from scipy.sparse.linalg import LinearOperator

from scbmlp.baselines import LARGE
from scbmlp.checks import nearest, of_cells, whole_number
from scbmlp.datasets import (
    ExpressionDataset,
    blocks,
    cell_names,
    check_in_memory,
    dense_tensor,
    gene_vector,
    match_genes,
    mean,
    product,
    some,
    take,
)
from scbmlp.display import as_html
from scbmlp.models import ScBMLPClassifier, ScBMLPRegressor

__all__ = [
    "InteractionMatrix", "Model", "Output", "Parts", "attributions", "audit", "decompose", "direction", "gain",
    "group_means", "interaction_matrices", "interaction_matrix", "linear_axis", "pair_effects", "similarity",
    "squares",
]  # fmt: skip

Model = ScBMLPClassifier | ScBMLPRegressor
Output = int | str | Mapping[int | str, float]


def direction(model: Model, output: Output) -> np.ndarray:
    """Return the weight of every output in a direction (out).

    Parameters
    ----------
    model
        A classifier or regressor.
    output
        An index or a name, or ``{name: weight, ...}`` for any mix. A softmax is blind to what is added to every
        class alike, so one class of a classifier means that class minus the mean of all classes. Minus the mean by
        shares of cells it is ``{**-shares, name: 1 - shares[name]}``, where `shares` is a Series of every class.

    Raises
    ------
    KeyError
        An output is unknown, or a number may mean two of them.
    ValueError
        A weight is no finite number.

    Examples
    --------
    >>> interactions.direction(model, "on")
    array([-0.5,  0.5])
    >>> interactions.direction(model, {"on": 1, "off": -1})
    array([-1.,  1.])
    """
    mix = output if isinstance(output, Mapping) else {output: 1.0}
    names = list(model.output_names)
    weights = np.zeros(len(names))
    numbered = isinstance(model.output_names, pd.RangeIndex) or not pd.api.types.is_numeric_dtype(model.output_names)
    if not names or not mix:
        raise KeyError(f"output={output!r} names nothing; the outputs are {', '.join(map(str, names))}.")
    for name, weight in mix.items():
        number = isinstance(name, int | np.integer) and not isinstance(name, bool)
        if not (isinstance(weight, Real) and np.isfinite(weight)):
            raise ValueError(f"output={output!r}: the weight of {name!r} is {weight!r}; a finite number is needed.")
        if name in names:
            weights[names.index(name)] += weight
        # Where outputs are numbers a number is a name, and where their text is one it may be taken for either.
        elif number and numbered and -len(names) <= name < len(names):
            if str(name) in names and names[name] != str(name):
                raise KeyError(
                    f"output={name!r} may be the output named {str(name)!r}, or the one at that place, which is "
                    f"{names[name]!r}; pass the name as text."
                )
            weights[name] += weight
        else:
            raise KeyError(
                f"output={name!r} is unknown; the outputs are {', '.join(map(str, names))}{nearest(name, names)}."
            )
    if isinstance(model, ScBMLPClassifier) and not isinstance(output, Mapping):
        weights -= weights.mean()
    return weights


class InteractionMatrix(LinearOperator):
    """A symmetric gene x gene matrix Q = B C B', held as its factors: a linear operator of scipy's.

    Parameters
    ----------
    basis
        B = [L' R'], gene x 2 hid; of a solved model L', gene x hid, without the units that the output does not use.
    core
        C, symmetric, as large as `basis` has columns.
    gene_names
        Names of the rows and columns (gene).
    thin
        Gives the thin QR decomposition of `basis`; matrices of one model share it.
    output
        What the matrix is of, for the eye alone.
    """

    def __init__(
        self,
        basis: np.ndarray,
        core: np.ndarray,
        gene_names: pd.Index,
        thin: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None,
        output: Any = None,
    ) -> None:
        super().__init__(np.dtype(np.float64), (len(basis), len(basis)))
        self.basis, self.core, self.gene_names, self.output = basis, core, gene_names, output
        self._thin = thin or cache(lambda: np.linalg.qr(basis))

    def _known(self) -> dict[str, str]:
        rows = {} if self.output is None else {"Output": str(self.output)}
        size, rank = self.shape[0], min(self.basis.shape)
        return rows | {"Genes": f"{size:,} x {size:,}, held as factors", "Rank": f"at most {rank:,}"}

    def __repr__(self) -> str:
        return "InteractionMatrix: " + "; ".join(f"{name.lower()} {value}" for name, value in self._known().items())

    def _repr_html_(self) -> str:
        return as_html(self._known(), "InteractionMatrix")

    def _matmat(self, x: np.ndarray) -> np.ndarray:
        return self.basis @ (self.core @ (self.basis.T @ x))

    def _adjoint(self) -> InteractionMatrix:
        return self

    def to_dense(self, *, max_gb: float = 4.0) -> np.ndarray:
        """Return the whole matrix (gene x gene).

        Parameters
        ----------
        max_gb
            Largest size to make, in GB.

        Raises
        ------
        ValueError
            The matrix is larger.

        Examples
        --------
        >>> dense = q.to_dense()
        >>> dense.shape, bool(np.allclose(dense, dense.T))
        ((40, 40), True)
        """
        size = 8e-9 * self.shape[0] ** 2
        if size > max_gb:
            raise ValueError(
                f"the dense matrix of {self.shape[0]} genes takes {size:.1f} GB, more than max_gb={max_gb}; use "
                f"eigh, between, top_pairs or quadratic_form, which do not form it, or allow more."
            )
        return self.basis @ self.core @ self.basis.T

    def quadratic_form(self, x: Any) -> np.ndarray:
        """Return x' Q x of every cell (cell).

        Parameters
        ----------
        x
            Cells, cell x gene: AnnData, a DataFrame or a dataset, whose genes are matched by name, or a matrix.

        Examples
        --------
        >>> x = adata.X[:2] - model.origin
        >>> bool(np.allclose(q.quadratic_form(x), np.diag(x @ q.to_dense() @ x.T)))
        True
        """
        projected = product(match_genes(x, self.gene_names), self.basis)
        return np.einsum("ci,ij,cj->c", projected, self.core, projected, optimize=True)

    def diagonal(self) -> np.ndarray:
        """Return what each gene does with itself (gene).

        Examples
        --------
        >>> bool(np.allclose(q.diagonal(), np.diag(q.to_dense())))
        True
        """
        return np.einsum("gi,gi->g", self.basis @ self.core, self.basis)

    def trace(self) -> float:
        """Return the sum of the eigenvalues.

        Examples
        --------
        >>> bool(np.isclose(q.trace(), q.eigh()[0].sum()))
        True
        """
        return float(np.sum(self.core * (self.basis.T @ self.basis)))

    def norm(self) -> float:
        """Return the Frobenius norm, the root of the sum of all squared interactions.

        Examples
        --------
        >>> bool(np.isclose(q.norm(), np.linalg.norm(q.to_dense())))
        True
        """
        product = self.core @ (self.basis.T @ self.basis)
        return float(np.sqrt(max(0.0, np.sum(product * product.T))))

    def between(self, genes_a: list[str], genes_b: list[str]) -> pd.DataFrame:
        """Return the interactions of two lists of genes (genes_a x genes_b).

        Parameters
        ----------
        genes_a, genes_b
            Names of genes.

        Raises
        ------
        KeyError
            A gene is not the model's.

        Examples
        --------
        >>> q.between(programs["program_03"][:2], programs["program_04"][:3]).round(2)
                 Sim0006  Sim0008  Sim0013
        Sim0007    -0.06    -0.06    -0.05
        Sim0009    -0.04    -0.04    -0.04
        """
        rows, columns = self._positions(genes_a), self._positions(genes_b)
        return pd.DataFrame(self.basis[rows] @ self.core @ self.basis[columns].T, index=genes_a, columns=genes_b)

    def _positions(self, genes: list[str]) -> np.ndarray:
        if isinstance(genes, str):
            raise ValueError(f"genes {genes!r} is one name; pass a list of names.")
        positions = self.gene_names.get_indexer(genes)
        unknown = [gene for gene, position in zip(genes, positions, strict=True) if position < 0]
        if unknown:
            raise KeyError(
                f"{len(unknown)} of {len(genes)} genes are not the model's: {', '.join(map(str, unknown[:5]))}"
                f"{nearest(unknown[0], self.gene_names)}."
            )
        return positions

    def top_pairs(self, n: int = 20, *, dataset: ExpressionDataset | None = None, block: int = 256) -> pd.DataFrame:
        """Return the `n` strongest interactions of two different genes, strongest first.

        Parameters
        ----------
        n
            Number of pairs.
        dataset
            Cells to measure strength on, in units of the output: twice the absolute Q_ij times the standard deviation
            of what is left of d_i d_j, d = x - mean, once the functions of either gene alone are taken off it (1, x,
            x^2 and 1[x > 0], by least squares). Barely expressed genes and curves of single genes then do not lead. At
            most 3,000 of the cells are used. For matrices in log-expression, as a model gives them, not for scaled
            ones.
            If None, pairs are ordered by the entry of Q.
        block
            Genes whose interactions with all others are in memory at a time.

        Returns
        -------
        A row a pair: ``gene_a``, ``gene_b``, ``interaction`` (each of the two entries of Q) and, with `dataset`,
        ``strength``.

        Raises
        ------
        KeyError
            `dataset` lacks genes of the matrix.

        Examples
        --------
        >>> q.top_pairs(n=3, dataset=train).round(3)
            gene_a   gene_b  interaction  strength
        0  Sim0017  Sim0032       -0.069     0.017
        1  Sim0008  Sim0033       -0.063     0.017
        2  Sim0007  Sim0008       -0.065     0.017
        """
        most = self.shape[0] * (self.shape[0] - 1) // 2
        n, block = min(whole_number(n, "n"), most), whole_number(block, "block")
        if dataset is None:
            i, j, values, _ = self._strongest(n, block)
            names = self.gene_names.to_numpy()
            return pd.DataFrame({"gene_a": names[i], "gene_b": names[j], "interaction": values})
        x = match_genes(dataset, self.gene_names)
        x = x[some(x.shape[0], LARGE)]
        x = dense_tensor(x).numpy()
        d = x - x.mean(axis=0)
        # Taking more off a product than its mean only lowers its deviation: candidates come by that bound, until the
        # strength found is above the bound of all that are left.
        size = 50 * n
        while True:
            i, j, values, bound = self._strongest(min(size, most), block, d)
            strength = np.empty(0)
            for start in range(0, len(i), 128):
                if len(strength) >= n and np.partition(strength, -n)[-n] >= bound[start]:
                    break
                part = slice(start, start + 128)
                strength = np.append(strength, 2 * np.abs(values[part]) * _beyond_single(x, d, i[part], j[part]))
            else:
                if size < most and np.partition(strength, -n)[-n] < bound[-1]:
                    size *= 8
                    continue
            break
        order = np.argsort(-strength, kind="stable")[:n]
        names = self.gene_names.to_numpy()
        return pd.DataFrame(
            {
                "gene_a": names[i[order]],
                "gene_b": names[j[order]],
                "interaction": values[order],
                "strength": strength[order],
            }
        )

    def _strongest(self, n: int, block: int, d: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        """Return both genes, the entry and the key of the `n` pairs of largest key.

        The key is the absolute entry, or with centred cells `d` twice that times the deviation of d_i d_j.
        """
        best = np.empty((4, 0))
        for start in range(0, self.shape[0], block):
            rows = self.basis[start : start + block] @ self.core @ self.basis[start:].T
            keys = np.abs(rows)
            if d is not None:
                one, other = d[:, start : start + block], d[:, start:]
                square = (one**2).T @ other**2 / len(d) - ((one.T @ other) / len(d)) ** 2
                keys = 2 * keys * np.sqrt(np.maximum(square, 0))
            i, j = np.triu_indices(rows.shape[0], 1, rows.shape[1])
            values, keys = rows[i, j], keys[i, j]
            strongest = np.argpartition(-keys, n)[:n] if len(keys) > n else slice(None)
            found = [i[strongest] + start, j[strongest] + start, values[strongest], keys[strongest]]
            best = np.hstack([best, found])
            best = best[:, np.argsort(-best[3], kind="stable")[:n]]
        return (*best[:2].astype(int), *best[2:])

    def scaled(self, scale: np.ndarray) -> InteractionMatrix:
        """Return S Q S with S = diag(scale), the matrix for genes measured in units of `scale`.

        Parameters
        ----------
        scale
            Unit of every gene (gene), a Series matched by name.

        Examples
        --------
        >>> values, _ = q.scaled(model.statistics.sd).eigh(4)
        >>> bool(np.allclose(values, on.eigenvalues))
        True
        """
        scale = gene_vector(scale, self.gene_names, "scale")
        return InteractionMatrix(self.basis * scale[:, None], self.core, self.gene_names, output=self.output)

    def eigh(self, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the `k` strongest eigenvalues and their eigenvectors, by falling absolute value.

        Exact to rounding and no gene x gene array: with the thin QR B = U T, the eigenvalues of T C T' are the
        non-zero ones of Q, and U turns its eigenvectors into those of Q.

        Parameters
        ----------
        k
            Number of eigenpairs; all that can be non-zero, min(gene, 2 hid), if None.

        Returns
        -------
        Eigenvalues (comp) and eigenvectors in columns (gene x comp).

        Raises
        ------
        ValueError
            `k` is not between 1 and min(gene, 2 hid).

        Examples
        --------
        >>> values, vectors = q.eigh(2)
        >>> values.round(2), vectors.shape
        (array([ 0.6 , -0.36]), (40, 2))
        """
        u, t = self._thin()
        if k is not None and not (isinstance(k, int | np.integer) and 1 <= k <= t.shape[0]):
            raise ValueError(f"k={k!r} eigenpairs were asked for; 1 to {t.shape[0]} can be non-zero.")
        values, vectors = self._thin_eigh()
        return values[:k], u @ vectors[:, :k]

    def _thin_eigh(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all eigenvalues and the eigenvectors in the coordinates of U, ordered."""
        _, t = self._thin()
        small = t @ self.core @ t.T
        values, vectors = np.linalg.eigh((small + small.T) / 2)
        order = np.argsort(-np.abs(values), kind="stable")
        return values[order], vectors[:, order]


def _beyond_single(x: np.ndarray, d: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Return the deviation of d_i d_j that functions of gene i and of gene j leave, of every pair."""
    single = [part for gene in (i, j) for part in (x[:, gene], x[:, gene] ** 2, x[:, gene] > 0)]
    design = np.stack([np.ones((len(x), len(i))), *single], axis=-1).transpose(1, 0, 2)  # pair x cell x function
    product = (d[:, i] * d[:, j]).T.astype(np.float64)
    # A basis of the functions; where they are dependent it has a direction more, one of as many as there are cells.
    basis, _ = np.linalg.qr(design)
    left = product - np.einsum("pcf,pf->pc", basis, np.einsum("pcf,pc->pf", basis, product))
    return np.sqrt((left**2).mean(axis=1))


def interaction_matrix(model: Model, output: Output, *, homogeneous: bool = False) -> InteractionMatrix:
    """Read the interaction matrix of an output off the weights, after :cite:t:`pearce2025bilinear`.

    Q_p = sym(L' diag(p) R), where p is the output's row of P. Without biases and without a linear part,
    y = x' Q_p x; with them, it is the quadratic part of y.

    Parameters
    ----------
    model
        A classifier or regressor.
    output
        As in :func:`direction`.
    homogeneous
        Append a 1 to x and a row and column ``"(constant)"`` to Q, which take up biases and linear part: then
        y = [x; 1]' Q [x; 1], whatever the model.

    Raises
    ------
    KeyError
        An output is unknown.

    Examples
    --------
    >>> interactions.interaction_matrix(model, "on")
    InteractionMatrix: output on; genes 40 x 40, held as factors; rank at most 16
    """
    return interaction_matrices(model, [output], homogeneous=homogeneous)[0]


def interaction_matrices(
    model: Model,
    outputs: Iterable[Output] | None = None,
    *,
    homogeneous: bool = False,
    scale: np.ndarray | None = None,
) -> list[InteractionMatrix]:
    """Read the interaction matrices of several outputs, with one QR decomposition for all.

    Parameters
    ----------
    model
        A classifier or regressor.
    outputs
        Each as in :func:`direction`; every output of the model if None.
    homogeneous
        As in :func:`interaction_matrix`.
    scale
        Unit to measure every gene in (gene), a Series matched by name, as in :meth:`InteractionMatrix.scaled`.

    Raises
    ------
    KeyError
        An output is unknown.
    ValueError
        `scale` has another number of genes.

    Examples
    --------
    >>> [matrix.shape for matrix in interactions.interaction_matrices(model)]
    [(40, 40), (40, 40)]
    """
    left, right, p = _float64(model.w_l, model.w_r, model.w_p)
    basis, genes = np.hstack([left.T, right.T]), model.gene_names
    scale = np.ones(len(genes)) if scale is None else gene_vector(scale, genes, "scale")
    outputs = list(model.output_names if outputs is None else outputs)
    weights = [direction(model, output) for output in outputs]
    if homogeneous:
        # Around the cell 0, y = constant + slope' x + x' Q x: the biases are the hidden branches there.
        at_zero = np.concatenate(_at(model, np.zeros(len(genes))))
        genes = genes.append(pd.Index(["(constant)"]))
        basis = np.vstack([basis, at_zero])
        constant, slope = _beside_branches(model)
        # Two more columns: the constant coordinate, and the direct weights; each output mixes them in its core.
        unit = np.eye(len(genes))[:, -1:]
        basis = np.hstack([basis, unit, np.vstack([slope.T, np.zeros(len(slope))])])
        scale = np.append(scale, 1)
    basis = basis * scale[:, None]
    thins: dict[bytes, Callable[[], tuple[np.ndarray, np.ndarray]]] = {}
    matrices = []
    for output, mix in zip(outputs, weights, strict=True):
        half = np.diag(mix @ p) / 2
        core, own = np.kron([[0, 1], [1, 0]], half), basis
        used = None if homogeneous else squares(model, output)
        if used is not None:
            core, own = 2 * half[np.ix_(used, used)], basis[:, used]
        thin = thins.setdefault(b"" if used is None else used.tobytes(), cache(lambda own=own: np.linalg.qr(own)))
        if homogeneous:
            beside = np.zeros((1 + len(mix), 1 + len(mix)))
            beside[0, 0] = mix @ constant
            beside[0, 1:] = beside[1:, 0] = mix / 2
            core = block_diag(core, beside)
        matrices.append(InteractionMatrix(own, core, genes, thin, output))
    return matrices


def squares(model: Model, output: Output) -> np.ndarray | None:
    """Return which hidden units an output's matrix is made of, where both branches are alike, as in a solved model.

    Its basis are then the weights of these units alone.
    """
    if not torch.equal(model.w_l, model.w_r):
        return None
    return np.flatnonzero(direction(model, output) @ _float64(model.w_p)[0])


def _float64(*tensors: Any) -> tuple[np.ndarray, ...]:
    return tuple(tensor.detach().cpu().numpy().astype(np.float64) for tensor in tensors)


def _at(model: Model, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both hidden branches (hid, hid) at a cell; biases, where there are any, only shift them."""
    left, right = _float64(model.w_l, model.w_r)
    d = x - model.origin
    bias_left, bias_right = (0, 0) if model.branches.bias is None else np.split(*_float64(model.branches.bias), 2)
    return left @ d + bias_left, right @ d + bias_right


def _beside_branches(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Return what is added to the bilinear part: its value at the cell 0 (out) and its slope (out x gene)."""
    constant, slope = np.zeros(model.cfg.d_output), np.zeros((model.cfg.d_output, model.cfg.d_input))
    if model.direct is not None:
        (slope,) = _float64(model.direct.weight)
        constant = -slope @ model.origin
    if model.project.bias is not None:
        constant = constant + _float64(model.project.bias)[0]
    return constant, slope


class Parts(NamedTuple):
    """Three parts of the outputs, each cell x out, that add up to them."""

    constant: np.ndarray
    linear: np.ndarray
    quadratic: np.ndarray


def decompose(model: Model, x: Any, reference: np.ndarray, *, batch_size: int = 1024) -> Parts:
    """Split the outputs into constant + linear + quadratic around a reference cell; an identity, not a fit.

    With d = x - reference, y = y(reference) + axis d + d' Q d. The Q are those of :func:`interaction_matrix`
    whatever the reference; what is called linear depends on it.

    Parameters
    ----------
    model
        A classifier or regressor.
    x
        Cells, as in ``model.outputs``.
    reference
        Expression of the reference cell (gene).
    batch_size
        Cells made dense at a time.

    Returns
    -------
    ``constant``, ``linear`` and ``quadratic`` (each cell x out).

    Raises
    ------
    ValueError
        `reference` does not have the model's genes.

    Examples
    --------
    >>> parts = interactions.decompose(model, test, reference=model.origin)
    >>> bool(np.allclose(sum(parts), model.outputs(test), atol=1e-4))
    True
    >>> [round(float(part[:, 1].var()), 2) for part in parts]
    [0.0, 0.01, 0.54]
    """
    x = match_genes(x, model.gene_names, model.layer)
    reference = gene_vector(reference, model.gene_names, "reference")
    constant, axis = _expand(model, reference)
    left, right, p = _float64(model.w_l, model.w_r, model.w_p)
    linear, quadratic = [], []
    for _, block in blocks(x, batch_size):
        d = dense_tensor(block).numpy() - reference
        linear.append(d @ axis.T)
        quadratic.append(((d @ left.T) * (d @ right.T)) @ p.T)
    linear, quadratic = np.vstack(linear), np.vstack(quadratic)
    return Parts(np.broadcast_to(constant, linear.shape), linear, quadratic)


def linear_axis(model: Model, output: Output, reference: np.ndarray) -> pd.Series:
    """Return the slope of an output at a reference cell: what each gene does alone (gene).

    Parameters
    ----------
    model
        A classifier or regressor.
    output
        As in :func:`direction`.
    reference
        Expression of the reference cell (gene).

    Raises
    ------
    KeyError
        An output is unknown.
    ValueError
        `reference` does not have the model's genes.

    Examples
    --------
    >>> slopes = interactions.linear_axis(model, "on", reference=model.origin)
    >>> slopes.nlargest(2).round(2)
    Sim0016    0.13
    Sim0007    0.08
    dtype: float64
    """
    return pd.Series(direction(model, output) @ _expand(model, reference)[1], model.gene_names)


def _expand(model: Model, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the outputs (out) and their slopes (out x gene) at a reference cell."""
    reference = gene_vector(reference, model.gene_names, "reference")
    left, right, p = _float64(model.w_l, model.w_r, model.w_p)
    at_left, at_right = _at(model, reference)
    constant, slope = _beside_branches(model)
    outputs = p @ (at_left * at_right) + constant + slope @ reference
    return outputs, (p * at_right) @ left + (p * at_left) @ right + slope


def attributions(model: Model, output: Output, x: Any, reference: np.ndarray) -> pd.DataFrame:
    """Return what each gene adds to an output of cells beside a reference cell (cell x gene); an identity, not a fit.

    With d = x - reference, gene i adds d_i (axis_i + (Q d)_i): its slope, what it does with itself, and half of what it
    does with each other gene. For a second-order model this is the Shapley value :cite:p:`shapley1953`, and the
    integrated gradient :cite:p:`sundararajan2017` along the straight line from the reference. All genes together add up
    to the output less that of the reference cell.

    Parameters
    ----------
    model
        A classifier or regressor.
    output
        As in :func:`direction`.
    x
        Cells, as in ``model.outputs``.
    reference
        Expression of the reference cell (gene), a Series matched by name; 0 is a cell without expression.

    Raises
    ------
    KeyError
        An output is unknown, or genes of the model are missing.
    ValueError
        `reference` does not have the model's genes.

    Examples
    --------
    >>> table = interactions.attributions(model, "on", adata, reference=model.origin)
    >>> set(table.abs().mean().nlargest(20).index) == set(truth["genes"])
    True
    """
    d, index = _around(model, x, reference)
    matrix, axis = interaction_matrix(model, output), linear_axis(model, output, reference)
    return pd.DataFrame(d * (axis.to_numpy() + d @ matrix.basis @ matrix.core @ matrix.basis.T), index, axis.index)


def pair_effects(
    model: Model, output: Output, x: Any, pairs: pd.DataFrame | Iterable[tuple[str, str]], reference: np.ndarray
) -> pd.DataFrame:
    """Return what pairs of genes add to an output of cells beside a reference cell, 2 Q_ij d_i d_j (cell x pair).

    It is what both genes do together and neither does alone: the Shapley interaction index
    :cite:p:`grabisch1999`, which takes a count over all sets of genes for most models, and one product for this one.

    Parameters
    ----------
    model, output, x, reference
        As in :func:`attributions`.
    pairs
        Pairs of names of different genes, or a table with ``gene_a`` and ``gene_b``, as from ``top_pairs``.

    Raises
    ------
    KeyError
        As for :func:`attributions`, and if a gene of a pair is not the model's.
    ValueError
        As for :func:`attributions`, and if a pair is one gene twice.

    Examples
    --------
    >>> pairs = [("Sim0017", "Sim0032")]
    >>> table = interactions.pair_effects(model, "on", adata, pairs, model.origin)
    >>> table.groupby(labels, observed=True).mean().round(3)
    gene_a Sim0017
    gene_b Sim0032
    label
    off     -0.008
    on       0.009
    """
    pairs = list(pairs[["gene_a", "gene_b"]].itertuples(index=False)) if isinstance(pairs, pd.DataFrame) else pairs
    pairs = pd.MultiIndex.from_tuples([tuple(pair) for pair in pairs], names=["gene_a", "gene_b"])
    matrix = interaction_matrix(model, output)
    a, b = (matrix._positions(list(pairs.get_level_values(i))) for i in (0, 1))
    if (a == b).any():
        raise ValueError(f"pairs has {pairs[a == b][0][0]!r} with itself; name two different genes.")
    d, index = _around(model, x, reference)
    entries = np.einsum("pi,ij,pj->p", matrix.basis[a], matrix.core, matrix.basis[b], optimize=True)
    return pd.DataFrame(2 * entries * d[:, a] * d[:, b], index, pairs)


def _around(model: Model, x: Any, reference: np.ndarray) -> tuple[np.ndarray, pd.Index | None]:
    """Return cells less a reference cell (cell x gene), and their names where they have any."""
    index, x = cell_names(x), match_genes(x, model.gene_names, model.layer)
    check_in_memory(x, "a table of cells x genes")
    return dense_tensor(x).numpy() - gene_vector(reference, model.gene_names, "reference"), index


def group_means(model: Model, output: Output, x: Any, groups: Any, reference: np.ndarray) -> pd.DataFrame:
    """Split the mean output of each donor, or other group of cells, into pseudobulk and co-expression; an identity.

    Biologists compare donors and not cells, by the mean expression m of a donor's cells. For a second-order model the
    mean output knows one thing more, the covariance S of the genes over the donor's cells: with m less the reference,
    it is constant + axis m + m' Q m + tr(Q S).

    Parameters
    ----------
    model, output, x, reference
        As in :func:`attributions`.
    groups
        Label of every cell (cell), such as ``adata.obs["donor"]``; a Series is matched with the cells of AnnData by
        name. Cells without a label are left out.

    Returns
    -------
    A row a group: ``n_cells``, ``constant``, ``linear``, ``pseudobulk``, ``coexpression``, and ``mean``, their sum.

    Raises
    ------
    KeyError
        As for :func:`attributions`.
    ValueError
        As for :func:`attributions`, and if `groups` are not one a cell.

    Examples
    --------
    >>> table = interactions.group_means(model, "on", adata, labels, model.origin)
    >>> table[["n_cells", "coexpression", "mean"]].round(1)
         n_cells  coexpression  mean
    off      500          -0.4  -0.5
    on       500           0.7   0.7
    """
    adata, x = x, match_genes(x, model.gene_names, model.layer)
    if np.ndim(groups) != 1 or len(groups) != x.shape[0]:
        raise ValueError(f"groups has shape {np.shape(groups)} for {x.shape[0]} cells; pass one label a cell.")
    if isinstance(groups, pd.Series) and isinstance(adata, AnnData) and not isinstance(groups.index, pd.RangeIndex):
        groups = of_cells(groups, adata, "groups")
    reference = gene_vector(reference, model.gene_names, "reference")
    matrix, axis = interaction_matrix(model, output), linear_axis(model, output, reference).to_numpy()
    constant = direction(model, output) @ _expand(model, reference)[0]
    rows = {}
    for name, cells in pd.Series(np.arange(x.shape[0])).groupby(np.asarray(groups), observed=True).indices.items():
        own = take(x, cells)
        m = mean(own) - reference
        hidden, at_mean = product(own, matrix.basis) - reference @ matrix.basis, m @ matrix.basis
        spread = hidden - at_mean
        parts = [
            constant,
            m @ axis,
            at_mean @ matrix.core @ at_mean,
            np.sum(spread @ matrix.core * spread) / len(cells),
        ]
        rows[name] = [len(cells), *parts, sum(parts)]
    columns = ["n_cells", "constant", "linear", "pseudobulk", "coexpression", "mean"]
    return pd.DataFrame.from_dict(rows, "index", columns=columns)


def similarity(
    a: Model,
    b: Model,
    output: Output,
    part: Literal["all", "linear", "quadratic", "interaction"] = "all",
    *,
    dataset: ExpressionDataset | None = None,
) -> float:
    """Return the correlation of an output of two models, as functions of cells, read off the weights.

    Around the mean of the cells an output is constant + a'd + d'Qd. Over normal cells of covariance S two of them, f
    and g, have the covariance a_f' S a_g + 2 tr(Q_f S Q_g S): products of 2 hid x 2 hid matrices, blind to the order
    and the sign of hidden units and to how eigenvectors of close eigenvalues turn. It compares what the models do,
    after :cite:t:`gonzalez2026`, who take inputs as white.

    Parameters
    ----------
    a, b
        Models of the same genes, which may differ in size and form.
    output
        As in :func:`direction`, of both.
    part
        The whole output, its linear part, its quadratic part, or of that what pairs of different genes do.
    dataset
        Cells whose mean and covariance to take, at most 3,000 of them. If None those of the training cells, which must
        be the same for both, and which are not enough for models with a linear part, nor for pairs of genes.

    Returns
    -------
    From -1 to 1; NaN if one of the two has no such part.

    Raises
    ------
    ValueError
        The genes of the models differ, `part` is unknown, or `dataset` is needed.
    KeyError
        An output is unknown, or `dataset` lacks genes.

    Examples
    --------
    >>> round(interactions.similarity(*replicas[:2], "on", dataset=train), 2)
    0.97
    """
    if part not in ("all", "linear", "quadratic", "interaction"):
        raise ValueError(f"part={part!r} is unknown; choose 'all', 'linear', 'quadratic' or 'interaction'.")
    if not a.gene_names.equals(b.gene_names):
        raise ValueError(
            f"a and b have {len(a.gene_names)} and {len(b.gene_names)} genes, which are not the same in one order; fit "
            f"both on the same genes."
        )
    known = [model.statistics for model in (a, b)]
    if dataset is not None:
        x = match_genes(dataset, a.gene_names)
        x = x[some(x.shape[0], LARGE)]
        d = dense_tensor(x).numpy().astype(np.float64)
        mean = d.mean(axis=0)
        d = (d - mean) / np.sqrt(len(d))
        forms = [_Form(model, output, mean, d) for model in (a, b)]
    elif part == "interaction" or a.direct is not None or b.direct is not None or None in known:
        raise ValueError(
            f"part={part!r} of these models needs cells: pairs of genes, linear parts and models without statistics "
            f"are compared on those that dataset= gives."
        )
    elif not all(np.allclose(*pair) for pair in zip(*known, strict=True) if pair[0].ndim == 1):
        raise ValueError("a and b were trained on different cells; say by dataset= on which to compare them.")
    else:
        forms = [_Form(model, output, known[0].mean) for model in (a, b)]
    own = None
    if part == "interaction":  # squared covariances, weighted by what genes do with themselves, block by block
        diagonal = np.stack([form.diagonal for form in forms], axis=1)
        own = sum(diagonal[i : i + 256].T @ (d[:, i : i + 256].T @ d) ** 2 @ diagonal for i in range(0, len(mean), 256))

    def product(i: int, j: int) -> float:
        f, g = forms[i], forms[j]
        linear, between = f.axis @ g.s_axis, f.basis.T @ g.s_basis
        quadratic = 2 * np.sum((f.core @ between) * (between @ g.core))
        if part == "interaction":
            return quadratic - 2 * (f.diagonal @ g.s_q_s + g.diagonal @ f.s_q_s - own[i, j])
        return {"all": linear + quadratic, "linear": linear, "quadratic": quadratic}[part]

    scale = product(0, 0) * product(1, 1)
    return float(product(0, 1) / np.sqrt(scale)) if scale > 0 else np.nan


class _Form:
    """An output around a mean, a'd + d' B C B' d, with what the covariance S makes of a and B.

    S is that of cells `d`, centred and divided by the root of their number, which then stand for both sides of a
    product; or that of the training cells.
    """

    def __init__(self, model: Model, output: Output, mean: np.ndarray, d: np.ndarray | None = None) -> None:
        matrix, axis = interaction_matrix(model, output), linear_axis(model, output, mean).to_numpy()
        self.core, self.diagonal = matrix.core, matrix.diagonal()
        if d is None:
            covariance, used = model.statistics.covariance, squares(model, output)
            self.axis, self.basis = axis, matrix.basis
            self.s_basis = covariance if used is None else covariance[:, used]
            at_left, at_right = _at(model, mean)
            p = direction(model, output) @ _float64(model.w_p)[0]
            self.s_axis = covariance @ np.concatenate([p * at_right, p * at_left])
        else:
            self.axis = self.s_axis = d @ axis
            self.basis = self.s_basis = d @ matrix.basis
            of_genes = d.T @ self.basis
            self.s_q_s = np.einsum("gi,ij,gj->g", of_genes, self.core, of_genes, optimize=True)  # diagonal of S Q S


def __getattr__(name: str) -> Any:
    """Offer the public functions of :mod:`scbmlp.audit` here too; nothing here needs them."""
    if name in __all__:
        return getattr(import_module("scbmlp.audit"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
