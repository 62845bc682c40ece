"""Interaction matrices read off the weights, kept as thin factors, and what they carry of a prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse, stats
from scipy.linalg import block_diag
from scipy.sparse.linalg import LinearOperator
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import SplineTransformer
from tqdm.auto import tqdm

from scbmlp import exact, nested
from scbmlp.baselines import LARGE, Axes, LinearModel, accuracy, additive_features, ridge
from scbmlp.checks import check_class_weight, nearest, of_cells, whole_number
from scbmlp.datasets import (
    ExpressionDataset,
    blocks,
    cell_names,
    check_dataset,
    check_in_memory,
    dense_tensor,
    gene_vector,
    held,
    match_genes,
    mean,
    product,
    some,
    take,
)
from scbmlp.display import as_html, watched
from scbmlp.models import ScBMLPClassifier, ScBMLPRegressor
from scbmlp.stores import BLOCK_CELLS

Model = ScBMLPClassifier | ScBMLPRegressor
Output = int | str | Mapping[int | str, float]
RIVAL_CELLS = 3000  # that a rival without products is fitted to at most, drawn where there are more


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


def gain(
    train: ExpressionDataset,
    *others: ExpressionDataset,
    groups: Any = None,
    n_folds: int = 3,
    n_permutations: int = 0,
    counts: Any = None,
    class_weight: Literal["balanced"] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Say whether products of expression pay on these cells, without any model: nested convex fits, cross-fitted.

    Compared are the best model without products and the best with products of principal components on top. Blocks of
    the former are genes, components, presence 1[x > 0], squares x^2, and depth: total and number of genes, and either
    times the components. In each fold some of the cells choose blocks, weights and penalties; both models are fitted
    to all but the fold, and scored on the fold.

    Parameters
    ----------
    train, others
        Data sets with the same genes and outputs. All their cells are taken together.
    groups
        Donor or batch of every cell, of all data sets in order. Whole groups are then left out.
    n_folds
        Number of folds.
    n_permutations
        How often to deal out the targets anew, with blocks and penalties as chosen.
    counts
        Raw counts (cell x gene) of all cells in order. The gain is then also taken of cells with counts drawn to one
        depth, without the tenth of the cells that have the least: is the gain technical?
    class_weight
        As in :class:`scbmlp.models.Config`.
    progress
        Show how many folds are done, in a terminal or a notebook.

    Returns
    -------
    A row an output; one for all classes together, ``all``.

    - ``without``, ``with``: R2 of either model; for classes log-loss in nats a cell.
    - ``gain``: how much better the latter is; 0 where products paid in no fold.
    - ``standard_error``: of the gain, paired over cells, or over groups. ``p``: of no gain, one-sided, by t; 1
      where the gain is 0.
    - ``gain_curved``: the gain after both went through a curve of one number, so that a link counts as no gain.
    - ``accuracy_without``, ``accuracy_with``: for classes.

    ``attrs["blocks"]`` has what every fold chose, ``attrs["permuted"]`` the gains of every permutation, by output,
    and ``attrs["downsampled"]`` the row of every output at one depth.

    Raises
    ------
    ValueError
        Data sets have other outputs, `groups` or `counts` do not fit the cells, or there are too few to leave some out.

    Examples
    --------
    >>> table = interactions.gain(train, validation, test)
    >>> table[["without", "with", "gain"]].round(1)
            without  with  gain
    output
    all         0.4   0.0   0.4
    """
    parts = []
    for i, given in enumerate((train, *others)):
        check_dataset(given, f"data set {i}")
        parts.append(part := held(given))
        if list(part.output_names) != list(train.output_names) or part.y.ndim != train.y.ndim:
            raise ValueError(f"data set {i} has other outputs than the first; pass parts of one AnnData.")
        if len(part) < len(given) and (groups is not None or counts is not None):
            raise ValueError(f"data set {i} is stored, and too large to hold; pass load() of fewer cells.")
    check_class_weight(class_weight, classes=train.y.ndim == 1)
    whole, classes = nested.pooled(parts), train.y.ndim == 1
    n_folds = whole_number(n_folds, "n_folds", 2)
    n_permutations = whole_number(n_permutations, "n_permutations", 0)
    if groups is not None:
        groups = pd.factorize(np.asarray(groups), sort=True)[0]
        n_groups = len(set(groups) - {-1})
        if len(groups) != len(whole) or n_groups < 2 or -1 in groups:
            raise ValueError(
                f"groups has {len(groups)} labels of {n_groups} groups for {len(whole)} cells; pass one a cell, none "
                f"missing, of two groups or more, or leave groups out."
            )
        n_folds = min(n_folds, n_groups)
    y = exact.targets_of(whole, len(whole.output_names))
    if len(whole) < 10 * n_folds or (y.std(dim=0) == 0).all():
        raise ValueError(
            f"there are {len(whole)} cells, {'all with the same target' if len(whole) >= 10 * n_folds else 'too few'} "
            f"for n_folds={n_folds}; pass more data sets, or other cells."
        )
    fold, rng = nested.fold_of(whole, n_folds, groups), np.random.default_rng(0)
    orders = [rng.permutation(len(whole)) for _ in range(n_permutations)]
    outputs = np.empty((4, *y.shape))  # without and with products, and both through curves
    dealt = np.empty((2, n_permutations, *y.shape))
    chosen, weight, names = [], np.ones(len(whole)), ["all"] if classes else list(whole.output_names)
    for i in tqdm(range(n_folds), "gain", delay=2, disable=not (progress and watched())):
        rest, there = whole.load(fold != i), fold == i
        weight[there] = exact.counts_of(whole.load(there), rest, class_weight)
        own = None if groups is None or len(set(groups[~there])) < 2 else groups[~there]
        inner = nested.fold_of(rest, 4 if own is None else min(4, len(set(own))), own)
        fit, val = rest.load(inner != 0), rest.load(inner == 0)
        trials = nested.compared(fit, val, class_weight)
        for name, mixture, ratio in zip(names, trials[1].mixtures, trials[1].ratios, strict=True):
            one = {"fold": i, "output": name, "rank": mixture.rank, "penalty": ratio}
            chosen.append(one | dict(mixture.weights))
        of_val = exact.counts_of(val, fit, class_weight)
        seen = _both(nested.kernels_of(fit, val.x, class_weight=class_weight), trials, classes)
        known = nested.kernels_of(rest, whole.x[there], class_weight=class_weight)
        outputs[:2, there] = _both(known, trials, classes)
        for k in range(2):
            outputs[2 + k, there] = _through_curves(seen[k], val.y.numpy(), outputs[k, there], of_val)
        kernels, many = known[0], 1 if classes else max(n_permutations, 1)
        for first in range(0, n_permutations, many):  # targets are solved all at once
            dealt_y = [y[order][~there] for order in orders[first : first + many]]
            if class_weight is not None:
                by_class = exact.counts_of(whole, rest, class_weight)[orders[first]]
                kernels.counts = torch.as_tensor(by_class[~there])
            again = [nested.Trial("", one.mixtures * many, one.ratios * many, one.losses) for one in trials]
            found = _both((kernels, torch.cat(dealt_y, dim=1)), again, classes)
            dealt[:, first : first + many, there] = found.reshape(2, there.sum(), many, -1).transpose(0, 2, 1, 3)
    losses = _losses(outputs, y.numpy(), weight, classes)
    better = losses[0] - losses[1]
    error, freedom = _standard_error(better, groups)
    means, paid = losses.mean(axis=1), (better != 0).any(axis=0)
    table = pd.DataFrame(index=pd.Index(names, name="output"))
    table["without"], table["with"] = means[:2] if classes else 1 - means[:2]
    table["gain"], table["standard_error"] = better.mean(axis=0), error
    table["p"] = np.where(paid, stats.t.sf(table["gain"] / np.where(error > 0, error, 1), freedom), 1.0)
    table["gain_curved"] = np.where(paid, means[2] - means[3], 0.0)
    if classes:
        for k, name in enumerate(("without", "with")):
            table[f"accuracy_{name}"] = accuracy(outputs[k], whole.y.numpy(), class_weight)
    table.attrs["blocks"] = chosen
    if n_permutations:
        permuted = [_losses(dealt[:, k], y[order].numpy(), weight[order], classes) for k, order in enumerate(orders)]
        gains = np.array([(one[0] - one[1]).mean(axis=0) for one in permuted])
        table.attrs["permuted"] = dict(zip(names, gains.T.tolist(), strict=True))
    if counts is not None:
        few, rows = _one_depth(whole, counts)
        again = gain(few, groups=None if groups is None else groups[rows], n_folds=n_folds, class_weight=class_weight)
        table.attrs["downsampled"] = again.to_dict("index")
    return table


def _both(known: tuple[exact.Kernels, torch.Tensor], trials: Any, classes: bool) -> np.ndarray:
    """Return the outputs of two trials (trial x cell x out), the same where they chose the same."""
    kernels, y = known
    first, second = ([*zip(one.mixtures, one.ratios, strict=True)] for one in trials)
    found = [nested.predicted(kernels, y, trials[0].mixtures, trials[0].ratios, classes)[0]] * 2
    differ = [i for i, (one, other) in enumerate(zip(first, second, strict=True)) if one != other]
    if differ:
        mixtures, ratios = zip(*(second[i] for i in differ), strict=True)
        columns, found[1] = slice(None) if classes else differ, found[0].copy()
        found[1][:, columns] = nested.predicted(kernels, y[:, columns], mixtures, ratios, classes)[0]
    return np.stack(found)


def _losses(outputs: np.ndarray, y: np.ndarray, weight: np.ndarray, classes: bool) -> np.ndarray:
    """Return the loss of every cell (trial x cell x out): in nats, one column, or in units of the target's variance."""
    if classes:
        return -(log_softmax(outputs, axis=2) * y).sum(axis=2, keepdims=True) * (weight / weight.mean())[:, None]
    return (outputs - y) ** 2 / np.where(y.var(axis=0) > 0, y.var(axis=0), np.nan)


def _standard_error(better: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, int]:
    """Return the standard error of a mean over cells (out), whose groups stand together, and degrees of freedom."""
    left = better - better.mean(axis=0)
    if groups is not None:
        left = np.stack([left[groups == group].sum(axis=0) for group in np.unique(groups)])
    n = len(left)
    return np.sqrt(n / (n - 1) * (left**2).sum(axis=0)) / len(better), n - 1


def _one_depth(dataset: ExpressionDataset, counts: Any) -> tuple[ExpressionDataset, np.ndarray]:
    """Return cells whose counts are drawn to one depth, log-normalised, and which cells have as many."""
    counts = sparse.csr_matrix(counts)
    if counts.shape != dataset.x.shape or (counts.data < 0).any() or (counts.data % 1).any():
        raise ValueError(
            f"counts has shape {counts.shape}, and the data sets have {dataset.x.shape} (cell x gene); pass raw "
            f"counts, whole numbers, of the same cells and genes in order."
        )
    import scanpy  # it takes a second

    totals = np.asarray(counts.sum(axis=1)).ravel()
    depth = int(np.quantile(totals, 0.1))
    rows = np.flatnonzero(totals >= max(depth, 1))
    few = AnnData(counts[rows].astype(np.float64))
    scanpy.pp.downsample_counts(few, counts_per_cell=depth, random_state=0)
    few.X = sparse.csr_matrix(few.X) * (np.median(totals) / depth)
    part = dataset.load(rows)
    part.x = few.X.log1p().astype(np.float32)
    return part, rows


def audit(
    model: Model,
    dataset: ExpressionDataset,
    reference: np.ndarray | str | None = None,
    *,
    train: ExpressionDataset | None = None,
    validation: ExpressionDataset | None = None,
) -> pd.DataFrame:
    """Say how much of each output is quadratic, how much of that is interaction, and whether it pays.

    Quadratic is a word about the formula: it depends on the reference cell, and a curve of a single gene is quadratic
    too. Interaction is what no sum of functions of single genes can do. Such sums stand here as the weighted sums of 1,
    x, x^2 and 1[x > 0] of every gene, fitted on `train` with an L2 penalty that `validation` chooses.

    Parameters
    ----------
    model
        A fitted classifier or regressor.
    dataset
        Cells with their targets, best ones that neither `train` nor `validation` has.
    reference
        Expression of the reference cell (gene), a Series matched by name, or the name of a class for the mean of its
        cells in `dataset`; the mean of `dataset` if None.
    train, validation
        Cells that additive models are fitted on, and cells that choose their penalty and fit the curves; of stored
        cells as many are drawn as 256 MB hold, and of any 3,000 for the rival of ``gain``. Without both,
        ``interaction``, ``gain`` and what goes with them are NaN.

    Returns
    -------
    A row an output.

    - ``linear``, ``quadratic``: each part's share of the output's variance over cells; ``covariance``: twice their
      covariance as a share; the three add up to 1.
    - ``self``, ``pair``: the shares of Q_ii d_i^2, summed over genes, and of the rest of the quadratic part.
    - ``interaction``: share of the output's variance that the best additive predictor of the *output* leaves, which is
      its linear part, Q_ii d_i^2, and what is fitted to the pairs. At most: more training cells can only lower it. It
      does not depend on `reference`. It says what the model does, not whether the data ask for it.
    - ``interaction_curved``: the same after the additive predictor passes through one curve, fitted on `validation`:
      what neither a sum of single-gene functions nor a link of one can do.
    - ``gain``: score less that of the best model of the *target* without products: of genes, of components, presence
      1[x > 0], squares x^2, and depth, which may multiply components. `validation` chooses which of these. It says
      whether what the model does pays. A sum of functions of genes through one curve, a link, gains as well.
    - ``gain_curved``: the same after either model's outputs pass through curves of one number each, fitted on
      `validation`, so that a link is not taken for an interaction; where it is better there, the rival of a target is
      fitted together with its link. It is 0 where the model has no pairs. Only a positive one supports interactions
      in the data, and it is as noisy as a difference of two scores: look at several splits, or take :func:`gain`.
    - ``score``: recall of the class, or R2 of the target; ``score_additive`` that of the rival;
      ``score_linear`` and ``score_quadratic`` what is left without the quadratic or the linear part, which were trained
      together: neither loss proves need.
    - ``rank_99``: number of modules, in metric ``identity``, from which on 99% of the score are kept.

    ``attrs`` has scores, gains and the rank over all outputs, for classes also ``gain_log_loss`` and
    ``gain_log_loss_curved``, in nats a cell. For a model with ``class_weight`` they are of balanced accuracy and
    of weighted cells, as noisy as the few cells of the rarest class, and what is fitted to the target counts cells
    as the model does. Shares of variance, and what is fitted to the outputs for them, are of all cells alike.

    Raises
    ------
    ValueError
        `dataset` or `reference` does not fit the model, or one of `train` and `validation` is given alone.
    KeyError
        `reference` is not a class.

    Examples
    --------
    >>> table = interactions.audit(model, test, train=train, validation=validation)
    >>> table[["linear", "quadratic", "score", "score_additive", "gain"]].round(2)
            linear  quadratic  score  score_additive  gain
    output
    off       0.04       0.97    1.0            0.45  0.55
    on        0.04       0.97    1.0            0.48  0.52
    """
    model.check(dataset)
    if (train is None) != (validation is None):
        raise ValueError(
            f"audit has {'validation' if train is None else 'train'} alone; interaction and gain need train= to fit "
            f"additive models and validation= to choose their penalty: pass both, or neither to go without."
        )
    x, target = match_genes(dataset, model.gene_names), dataset.y.numpy()
    if reference is None or np.ndim(reference) == 0:
        if reference is not None and (target.ndim > 1 or reference not in model.output_names):
            names = list(model.output_names)
            raise KeyError(
                f"reference={reference!r} is not a class; they are {', '.join(map(repr, names))}"
                f"{nearest(reference, names)}."
            )
        chosen = slice(None) if reference is None else np.flatnonzero(target == model.output_names.get_loc(reference))
        if not isinstance(chosen, slice) and not len(chosen):
            raise ValueError(f"reference={reference!r}: dataset has no cell of that class; pass its mean expression.")
        reference = mean(take(x, chosen))
    reference = gene_vector(reference, model.gene_names, "reference")
    constant, linear, quadratic = decompose(model, x, reference)
    directions = np.stack([direction(model, name) for name in model.output_names])
    one, two, alone = linear @ directions.T, quadratic @ directions.T, _self_terms(model, x, reference)
    total = (one + two).var(axis=0)
    # An output that is the same in every cell has no variance to share out.
    total = np.where(total > 0, total, np.nan)
    table = pd.DataFrame(
        {"linear": one.var(axis=0) / total, "quadratic": two.var(axis=0) / total},
        index=pd.Index(model.output_names, name="output"),
    )
    table["covariance"] = 1 - table["linear"] - table["quadratic"]
    outputs = {"score": constant + linear + quadratic}
    beside = _additive(model, train, validation, x, target, outputs["score"]) if train is not None else {}
    for name in ("interaction", "interaction_curved"):
        table[name] = beside.get(name, np.nan)
    table["self"], table["pair"] = alone.var(axis=0) / total, (two - alone).var(axis=0) / total
    outputs |= {"score_linear": constant + linear, "score_quadratic": constant + quadratic}
    outputs |= {f"score_{name}": beside[name] for name in ("additive", "curved", "additive_curved") if name in beside}
    scores = {name: np.append(model._measure_each(y, target), model._measure(y, target)) for name, y in outputs.items()}
    unknown = np.full(len(table) + 1, np.nan)
    scores["gain"] = scores["score"] - scores.get("score_additive", unknown)
    scores["gain_curved"] = scores.pop("score_curved", unknown) - scores.pop("score_additive_curved", unknown)
    if beside:  # curves differ by chance: without products there is nothing to gain
        scores["gain_curved"][~np.append(beside["pairs"], beside["pairs"].any())] = 0.0
    scores.setdefault("score_additive", unknown)
    for name in ("gain", "gain_curved", "score", "score_additive", "score_linear", "score_quadratic"):
        table[name], table.attrs[name] = scores[name][:-1], float(scores[name][-1])
    if target.ndim == 1 and beside:
        options = {"labels": range(len(table)), "sample_weight": model._counts(target)}
        losses = {name: log_loss(target, softmax(outputs[name], axis=1), **options)
                  for name in ("score", "score_additive", "score_curved", "score_additive_curved")}  # fmt: skip
        table.attrs["gain_log_loss"] = losses["score_additive"] - losses["score"]
        curved = losses["score_additive_curved"] - losses["score_curved"]
        table.attrs["gain_log_loss_curved"] = curved if beside["pairs"].any() else 0.0
    needed = 0.99 * np.append(table["score"], table.attrs["score"])
    kept = np.array(
        [
            # Outputs that are all 0 are no prediction, though they put every cell into the first class.
            [*model._measure_each(y, target), model._measure(y, target)] if y.any() else needed - np.inf
            for y in _truncated(model, x)
        ]
    )
    # The number from which on the score is kept, for it may come and go; no score, no rank.
    ranks = [
        None if np.isnan(least) else int(np.flatnonzero(~(column >= least)).max(initial=-1)) + 1
        for column, least in zip(kept.T, needed, strict=True)
    ]
    table["rank_99"] = pd.array(ranks[:-1], dtype="Int64")
    table.attrs["rank_99"] = ranks[-1]
    return table


def _self_terms(model: Model, x: Any, reference: np.ndarray) -> np.ndarray:
    """Return the sum over genes of Q_ii d_i^2 of every direction (cell x out), without making cells dense."""
    own = np.stack([matrix.diagonal() for matrix in interaction_matrices(model)], axis=1)
    m, parts = np.ravel(reference).astype(np.float64), []
    for _, block in blocks(x, BLOCK_CELLS):
        square = block.multiply(block) if sparse.issparse(block) else np.square(block, dtype=np.float64)
        parts.append(np.asarray(square @ own - 2 * (block @ (m[:, None] * own))))
    return np.vstack(parts) + m**2 @ own


def _pairs(model: Model, cells: Any, reference: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the part of pairs of different genes, and the whole, of every direction (each cell x out)."""
    x = match_genes(cells, model.gene_names)
    parts = decompose(model, x, reference)
    return parts.quadratic @ directions.T - _self_terms(model, x, reference), sum(parts) @ directions.T


def _additive(
    model: Model,
    train: ExpressionDataset,
    validation: ExpressionDataset,
    x: Any,
    target: np.ndarray,
    outputs: np.ndarray,
) -> dict[str, np.ndarray]:
    """Return what additive models leave of the outputs (out), and what a rival makes of the target (cell x out).

    ``interaction`` and ``interaction_curved``; then ``additive``, the outputs of the best model without products,
    ``additive_curved``, the same through its curves, and ``curved``, the model's own outputs through theirs; and which
    outputs have ``pairs`` at all (out).
    """
    for dataset in (train, validation):
        model.check(dataset)
    train, validation = held(train), held(validation)
    features, watched = (additive_features(match_genes(cells, model.gene_names)) for cells in (train, validation))
    axes, directions = Axes(features), np.stack([direction(model, name) for name in model.output_names])
    result = {name: np.full(len(directions), np.nan) for name in ("interaction", "interaction_curved")}
    # Around any cell the linear part and the Q_ii d_i^2 are additive as they are; only the pairs need a predictor.
    # Around the training mean, so that the answer does not depend on a reference.
    center = mean(match_genes(train, model.gene_names))
    of_pairs, whole = zip(*(_pairs(model, cells, center, directions) for cells in (train, validation, x)), strict=True)
    total = whole[2].var(axis=0)
    if len(varied := np.flatnonzero((np.ptp(of_pairs[0], axis=0) > 0) & (total > 0))):
        predictor = ridge(axes, of_pairs[0][:, varied], watched, of_pairs[1][:, varied])
        predicted = predictor.outputs(watched), _of_additive(predictor, x)
        left = [part[:, varied] - one for part, one in zip(of_pairs[1:], predicted, strict=True)]
        additive = [part[:, varied] - rest for part, rest in zip(whole[1:], left, strict=True)]
        curved = _through_curves(additive[0], whole[1][:, varied], additive[1])
        result["interaction"][varied] = left[1].var(axis=0) / total[varied]
        result["interaction_curved"][varied] = (whole[2][:, varied] - curved).var(axis=0) / total[varied]
    for name in ("interaction", "interaction_curved"):  # a model without pairs has no interactions
        result[name][(np.ptp(of_pairs[0], axis=0) == 0) & (total > 0)] = 0.0
    counts, y_seen = model._counts(validation.y.numpy()), validation.y.numpy()
    own = model.outputs(validation).astype(np.float64)
    seen, linked_seen, result["additive"], linked = _rival(model, train, validation, x)
    result["curved"] = _through_curves(own, y_seen, outputs, counts)
    result["additive_curved"] = _through_curves(seen, y_seen, result["additive"], counts)
    if linked is not None:  # index and link fitted together, where that is better on validation cells
        fitted = [_through_curves(one, y_seen, one, counts) for one in (seen, linked_seen)]
        error = [np.square(one - y_seen).mean(axis=0) for one in fitted]
        again = _through_curves(linked_seen, y_seen, linked, counts)
        result["additive_curved"] = np.where(error[1] < error[0], again, result["additive_curved"])
    result["pairs"] = of_pairs[0].std(axis=0) > 1e-6 * whole[0].std(axis=0)
    return result


def _rival(
    model: Model, train: ExpressionDataset, validation: ExpressionDataset, x: Any
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray | None]:
    """Return outputs of the best model without products, and of targets an index fitted with its link.

    For validation cells either, and then for others either (each cell x out).
    """
    kind, classes, few = model.cfg.class_weight, train.y.ndim == 1, []
    for part in (train, validation):
        few.append(part.load(some(len(part), RIVAL_CELLS)))
        few[-1].x, few[-1].gene_names = match_genes(few[-1], model.gene_names), model.gene_names
    trial = nested.without_products(*few, kind)
    genes, found = model.gene_names, []
    for i, (_, block) in enumerate(blocks(x, RIVAL_CELLS)):
        others = (match_genes(validation, genes), block) if i == 0 else (block,)
        kernels, y = nested.kernels_of(few[0], *others, class_weight=kind)
        parts = nested.predicted(kernels, y, trial.mixtures, trial.ratios, classes)
        indices = [None if classes else np.empty(part.shape) for part in parts]
        pairs = [] if classes else [*zip(trial.mixtures, trial.ratios, strict=True)]
        for pair in dict.fromkeys(pairs):
            here = [k for k, own in enumerate(pairs) if own == pair]
            for index, one in zip(indices, nested.linked(kernels, y[:, here].numpy(), *pair), strict=True):
                index[:, here] = one
        found += [*zip(parts, indices, strict=True)]
    outputs, indices = zip(*found[1:], strict=True)
    return *found[0], np.vstack(outputs), None if classes else np.vstack(indices)


def _of_additive(model: LinearModel, x: Any) -> np.ndarray:
    """Return the outputs (cell x out) of a model of additive features, which take three times the memory of cells."""
    return np.vstack([model.outputs(additive_features(block)) for _, block in blocks(x, BLOCK_CELLS)])


def _through_curves(
    seen: np.ndarray, target: np.ndarray, outputs: np.ndarray, counts: np.ndarray | None = None
) -> np.ndarray:
    """Return outputs (cell x out), each through a curve of that one number, fitted on other cells, counted so often.

    A curve is a spline that follows the target, or for classes the log-probability of the class.
    """
    curved = np.empty_like(outputs, dtype=np.float64)
    if target.ndim == 1:  # of a class: its logit less the mean of all, since a softmax is blind to that
        seen, outputs = (y - y.mean(axis=1, keepdims=True) for y in (seen, outputs))
    for i in range(outputs.shape[1]):
        about = (target == i).astype(int) if target.ndim == 1 else target[:, i]
        if np.ptp(about) == 0 or np.ptp(seen[:, i]) == 0:  # a class without a validation cell, or nothing to bend
            curved[:, i] = np.log(1e-6) if target.ndim == 1 else about.mean()
            continue
        line = LogisticRegression(C=10) if target.ndim == 1 else Ridge(0.01)
        knots = np.unique(np.quantile(seen[:, i], np.linspace(0, 1, 8)))[:, None]
        curve = Pipeline([("spline", SplineTransformer(knots=knots)), ("line", line)])
        curve.fit(seen[:, [i]], about, line__sample_weight=counts)
        predict = curve.predict if target.ndim == 2 else lambda y, curve=curve: curve.predict_log_proba(y)[:, 1]
        curved[:, i] = predict(outputs[:, [i]])
    return curved


def _truncated(model: Model, x: Any, *, batch_size: int = 1024) -> Iterator[np.ndarray]:
    """Yield the outputs (cell x out) with no module of each output, with one, with two, and so on."""
    constant, linear, _ = decompose(model, x, model.origin)
    matrices = interaction_matrices(model)
    thin = {}  # of a solved model, outputs may have hidden units of their own
    for matrix in matrices:
        if matrix._thin not in thin:
            u, _ = matrix._thin()
            parts = [(dense_tensor(block).numpy() - model.origin) @ u for _, block in blocks(x, batch_size)]
            thin[matrix._thin] = np.vstack(parts)
    pairs = [(thin[matrix._thin], *matrix._thin_eigh()) for matrix in matrices]
    outputs = (constant + linear) @ np.stack([direction(model, name) for name in model.output_names]).T
    yield outputs
    for k in range(max(len(values) for _, values, _ in pairs)):
        outputs = outputs.copy()
        for i, (own, values, vectors) in enumerate(pairs):
            if k < len(values):
                outputs[:, i] += values[k] * (own @ vectors[:, k]) ** 2
        yield outputs
