"""Interaction matrices read off the weights, kept as thin factors, and what they carry of a prediction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from math import comb
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.linalg import block_diag
from scipy.sparse.linalg import LinearOperator

from scbmlp import datasets
from scbmlp.baselines import LARGE
from scbmlp.checks import nearest, of_cells, whole_number
from scbmlp.datasets import ExpressionDataset, dense_tensor, gene_vector, match_genes
from scbmlp.models import ScBMLPClassifier, ScBMLPRegressor

__all__ = [
    "InteractionMatrix", "Model", "Output", "Parts", "attributions", "audit", "decompose", "direction", "gain",
    "group_means", "interaction_matrices", "interaction_matrix", "linear_axis", "similarity",
]  # fmt: skip

Model = ScBMLPClassifier | ScBMLPRegressor
Output = int | str | Mapping[int | str, float]
Part = Literal["all", "linear", "quadratic", "interaction"]
BLOCK = 256  # genes whose interactions with all others are in memory at a time
FALLING = {"by": "strength", "ascending": False, "kind": "stable", "ignore_index": True}


def direction(model: Model, output: Output) -> np.ndarray:
    """Return the weight of every output in a direction (out); for one class less the mean, as a softmax sees it.

    Parameters
    ----------
    model, output
        A classifier or regressor; an index or a name, or ``{name: weight, ...}`` for any mix, taken as it is.

    Examples
    --------
    >>> interactions.direction(model, "on")
    array([-0.5,  0.5])
    """
    mix = output if isinstance(output, Mapping) else {output: 1.0}
    if not mix:
        raise KeyError(f"output={output!r} names nothing; the outputs are {', '.join(map(str, model.output_names))}.")
    weights = np.zeros(len(model.output_names))
    for name, weight in mix.items():
        if not (isinstance(weight, Real) and np.isfinite(weight)):
            raise ValueError(f"output={output!r}: the weight of {name!r} is {weight!r}; a finite number is needed.")
        weights[_place(model, name)] += weight
    if isinstance(model, ScBMLPClassifier) and not isinstance(output, Mapping):
        weights -= weights.mean()
    return weights


def contrast(output: str | int, dataset: ExpressionDataset) -> dict[str | int, float]:
    """Return the direction of a class's logit less the mean of all logits, weighted by the classes' shares of cells.

    Its modules are a little steadier over halves of the cells than those of the logit less the plain mean.

    Parameters
    ----------
    output, dataset
        Name of a class, and cells with their classes.

    Examples
    --------
    >>> interactions.contrast("on", train)
    {'off': -0.5, 'on': 0.5}
    """
    names = list(dataset.output_names)
    if output not in names or dataset.y.ndim == 2:
        raise KeyError(f"output={output!r} is not one of the classes of dataset: {', '.join(map(str, names))}.")
    shares = np.bincount(dataset.y, minlength=len(names)) / len(dataset)
    return {name: float(name == output) - share for name, share in zip(names, shares.tolist(), strict=True)}


def _place(model: Model, name: int | str) -> int:
    """Return where an output is, by its name, or by its place where outputs are not numbered."""
    names = list(model.output_names)
    if name in names:
        return names.index(name)
    number = isinstance(name, int | np.integer) and not isinstance(name, bool)
    numbered = pd.api.types.is_numeric_dtype(model.output_names) and not isinstance(model.output_names, pd.RangeIndex)
    if numbered or not (number and -len(names) <= name < len(names)):
        there = ", ".join(map(str, names))
        raise KeyError(f"output={name!r} is unknown; the outputs are {there}{nearest(name, names)}.")
    if str(name) in names and names[name] != str(name):
        raise KeyError(
            f"output={name!r} may be the output named {str(name)!r}, or the one at that place, which is "
            f"{names[name]!r}; pass the name as text."
        )
    return int(name)


class InteractionMatrix(LinearOperator):
    """A symmetric gene x gene matrix Q = B C B', held as its factors: a linear operator of scipy's.

    Parameters
    ----------
    basis, core, gene_names
        B = [L' R'] (gene x 2 hid), of a solved model L' of the hidden units that the output uses; C; and genes' names.
    """

    def __init__(self, basis: np.ndarray, core: np.ndarray, gene_names: pd.Index) -> None:
        super().__init__(np.dtype(np.float64), (len(basis), len(basis)))
        self.basis, self.core, self.gene_names = basis, core, gene_names
        self._thin = cache(lambda: np.linalg.qr(basis))  # made when it is first asked for
        self._columns: np.ndarray | slice = slice(None)  # those of [L' R'] that the basis has

    def _matmat(self, x: np.ndarray) -> np.ndarray:
        return self.basis @ (self.core @ (self.basis.T @ x))

    def _adjoint(self) -> InteractionMatrix:
        return self

    def to_dense(self, *, max_gb: float = 4.0) -> np.ndarray:
        """Return the whole matrix (gene x gene), if it takes at most `max_gb` GB.

        >>> q.to_dense().shape
        (40, 40)
        """
        size = 8e-9 * self.shape[0] ** 2
        if size > max_gb:
            raise ValueError(f"Q takes {size:.1f} GB, more than max_gb={max_gb}; use eigh or between, or allow more.")
        return self.basis @ self.core @ self.basis.T

    def quadratic_form(self, x: Any) -> np.ndarray:
        """Return x' Q x of every cell (cell), of cells (cell x gene) as in ``model.outputs``.

        >>> q.quadratic_form(adata).shape
        (1000,)
        """
        projected = datasets.product(match_genes(x, self.gene_names), self.basis)
        return np.einsum("ci,ij,cj->c", projected, self.core, projected, optimize=True)

    def _diagonal(self) -> np.ndarray:
        """Return what each gene does with itself (gene)."""
        return np.einsum("gi,gi->g", self.basis @ self.core, self.basis)

    def between(self, genes_a: list[str], genes_b: list[str]) -> pd.DataFrame:
        """Return the interactions of two lists of names of genes (genes_a x genes_b).

        >>> q.between(["Sim0017"], ["Sim0030", "Sim0032"]).to_numpy().round(1)
        array([[-0.6, -0.7]])
        """
        for genes in (genes_a, genes_b):
            if isinstance(genes, str):
                raise ValueError(f"genes {genes!r} is one name; pass a list of names.")
            if unknown := [gene for gene in genes if gene not in self.gene_names]:
                some = ", ".join(map(str, unknown[:5])) + nearest(unknown[0], self.gene_names)
                raise KeyError(f"{len(unknown)} of {len(genes)} genes are not the model's: {some}.")
        rows, columns = (self.basis[self.gene_names.get_indexer(genes)] for genes in (genes_a, genes_b))
        return pd.DataFrame(rows @ self.core @ columns.T, genes_a, genes_b)

    def scaled(self, scale: np.ndarray) -> InteractionMatrix:
        """Return S Q S with S = diag(scale), for genes in units of `scale` (gene), a Series matched by name.

        >>> q.scaled(train.x.std(axis=0)).shape
        (40, 40)
        """
        scale = gene_vector(scale, self.gene_names, "scale")
        return InteractionMatrix(self.basis * scale[:, None], self.core, self.gene_names)

    def eigh(self, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the `k` strongest eigenvalues (comp), all that can be non-zero if None, and vectors (gene x comp).

        >>> values, vectors = q.eigh(2)
        >>> np.abs(values).round(1), vectors.shape
        (array([4.5, 4.5]), (40, 2))
        """
        u, t = self._thin()
        k = k if k is None else whole_number(k, "k", 1, len(t))
        values, vectors = self._thin_eigh()
        return values[:k], u @ vectors[:, :k]

    def _thin_eigh(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all eigenvalues of T C T', with B = U T, and its eigenvectors, by falling absolute value."""
        _, t = self._thin()
        small = t @ self.core @ t.T
        values, vectors = np.linalg.eigh((small + small.T) / 2)
        order = np.argsort(-np.abs(values), kind="stable")
        return values[order], vectors[:, order]

    def top_pairs(self, n: int = 20, *, dataset: ExpressionDataset | None = None) -> pd.DataFrame:
        """Return the `n` strongest interactions of two different genes, strongest first, by abs(Q_ij).

        Parameters
        ----------
        n, dataset
            Number of pairs; and cells, of which 3,000 at most are used, to order pairs by ``strength``: 2 abs(Q_ij)
            times the deviation of d_i d_j, d = x - mean, beyond functions 1, x, x^2 and 1[x > 0] of either gene.

        Examples
        --------
        >>> q.top_pairs(n=1, dataset=train).round(1)
            gene_a   gene_b  interaction  strength
        0  Sim0017  Sim0030         -0.6       0.2
        """
        n = min(whole_number(n, "n"), comb(self.shape[0], 2))
        table = self._largest(n) if dataset is None else self._strongest(n, _drawn(dataset, self.gene_names))
        genes = {name: self.gene_names.to_numpy()[table[name]] for name in ("gene_a", "gene_b")}
        return table.assign(**genes).drop(columns="strength" if dataset is None else [])

    def _largest(self, n: int, d: np.ndarray | None = None) -> pd.DataFrame:
        """Return the `n` pairs of largest abs(Q_ij), or with centred cells of largest 2 abs(Q_ij) sd(d_i d_j)."""
        found = []
        for start in range(0, self.shape[0], BLOCK):
            rows = self.basis[start : start + BLOCK] @ self.core @ self.basis[start:].T
            keys = np.abs(rows)
            if d is not None:
                one, other = d[:, start : start + BLOCK], d[:, start:]
                variance = (one**2).T @ other**2 / len(d) - ((one.T @ other) / len(d)) ** 2
                keys = 2 * keys * np.sqrt(np.maximum(variance, 0))
            i, j = np.triu_indices(rows.shape[0], 1, rows.shape[1])
            values, keys = rows[i, j], keys[i, j]
            top = np.argpartition(-keys, n)[:n] if len(keys) > n else slice(None)
            columns = {"gene_a": i[top] + start, "gene_b": j[top] + start}
            found.append(pd.DataFrame(columns | {"interaction": values[top], "strength": keys[top]}))
        return pd.concat(found).sort_values(**FALLING)[:n]

    def _strongest(self, n: int, x: np.ndarray) -> pd.DataFrame:
        """Return the `n` pairs that do most beyond what either gene does alone, genes by position."""
        d, most = x - x.mean(axis=0), comb(self.shape[0], 2)
        size = min(10 * n, most)
        while True:
            # Taking more off a product than its mean only lowers its deviation: this one is an upper bound.
            table = self._largest(size, d)
            parts = (table[start : start + 128] for start in range(0, size, 128))
            left = [_beyond_single(x, d, part["gene_a"], part["gene_b"]) for part in parts]
            strength = 2 * table["interaction"].abs() * np.concatenate([np.empty(0), *left])
            found, bound = table.assign(strength=strength).sort_values(**FALLING)[:n], table["strength"].min()
            if size == most or found["strength"].min() >= bound:
                return found
            size = min(8 * size, most)


def _drawn(dataset: ExpressionDataset, gene_names: pd.Index) -> np.ndarray:
    """Return the expression of at most 3,000 cells, dense (cell x gene)."""
    x = match_genes(dataset, gene_names)
    return dense_tensor(x[datasets.some(x.shape[0], LARGE)]).numpy()


def _beyond_single(x: np.ndarray, d: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Return the deviation of d_i d_j that functions of gene i and of gene j leave, of every pair."""
    single = [part for gene in (i, j) for part in (x[:, gene], x[:, gene] ** 2, x[:, gene] > 0)]
    design = np.stack([np.ones((len(x), len(i))), *single], axis=-1).transpose(1, 0, 2)  # pair x cell x function
    both = (d[:, i] * d[:, j]).T.astype(np.float64)
    # A basis of the functions; where they are dependent it has a direction more, one of as many as there are cells.
    basis, _ = np.linalg.qr(design)
    left = both - np.einsum("pcf,pf->pc", basis, np.einsum("pcf,pc->pf", basis, both))
    return np.sqrt((left**2).mean(axis=1))


def interaction_matrix(model: Model, output: Output, *, homogeneous: bool = False) -> InteractionMatrix:
    """Read the interaction matrix Q = sym(L' diag(p) R) of an output off the weights :cite:p:`pearce2025bilinear`.

    Parameters
    ----------
    model, output, homogeneous
        As in :func:`direction`; and whether to add a row and column ``"(constant)"`` for biases and linear part, so
        that y = [x; 1]' Q [x; 1].

    Examples
    --------
    >>> interactions.interaction_matrix(model, "on").shape
    (40, 40)
    """
    matrix = interaction_matrices(model, [output])[0]
    if not homogeneous:
        return matrix
    # At the cell 0, y = constant + slope x + x' Q x: one column more for the slope, and one for the 1.
    constant, slopes = (direction(model, output) @ part for part in _expand(model, np.zeros(len(matrix.basis))))
    basis = block_diag(np.column_stack([matrix.basis, slopes]), 1.0)
    core = block_diag(matrix.core, [[0.0, 0.5], [0.5, constant]])
    return InteractionMatrix(basis, core, matrix.gene_names.append(pd.Index(["(constant)"])))


def interaction_matrices(
    model: Model, outputs: Iterable[Output] | None = None, *, scale: np.ndarray | None = None
) -> list[InteractionMatrix]:
    """Read the matrices of several outputs, all if None, with genes in units of `scale` and one QR decomposition.

    >>> [matrix.shape for matrix in interactions.interaction_matrices(model)]
    [(40, 40), (40, 40)]
    """
    left, right, p = map(_float64, (model.w_l, model.w_r, model.w_p))
    unit = 1.0 if scale is None else gene_vector(scale, model.gene_names, "scale")
    whole, shared, matrices = (np.vstack([left, right]) * unit).T, dict[bytes, InteractionMatrix](), []
    alike = torch.equal(model.w_l, model.w_r)  # as in a solved model
    for output in model.output_names if outputs is None else outputs:
        weight = direction(model, output) @ p
        columns = np.flatnonzero(weight) if alike else slice(None)
        core = np.diag(weight[columns]) if alike else np.kron([[0, 1], [1, 0]], np.diag(weight) / 2)
        matrix = InteractionMatrix(whole[:, columns], core, model.gene_names)
        first = shared.setdefault(columns.tobytes() if alike else b"", matrix)
        matrix.basis, matrix._thin, matrix._columns = first.basis, first._thin, columns
        matrices.append(matrix)
    return matrices


def _float64(weights: torch.Tensor) -> np.ndarray:
    """Return weights in double precision."""
    return weights.detach().cpu().numpy().astype(np.float64)


def _branches(model: Model, x: np.ndarray) -> list[np.ndarray]:
    """Return both hidden branches (hid, hid) at a cell; biases, where there are any, only shift them."""
    branches = _float64(model.branches.weight) @ (x - model.origin)
    if model.branches.bias is not None:
        branches += _float64(model.branches.bias)
    return np.split(branches, 2)


def _expand(model: Model, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the outputs (out) and their slopes (out x gene) at a reference cell."""
    left, right, p = map(_float64, (model.w_l, model.w_r, model.w_p))
    at_left, at_right = _branches(model, reference)
    outputs, slopes = p @ (at_left * at_right), (p * at_right) @ left + (p * at_left) @ right
    if model.project.bias is not None:
        outputs += _float64(model.project.bias)
    if model.direct is not None:
        direct = _float64(model.direct.weight)
        outputs += direct @ (reference - model.origin)
        slopes += direct
    return outputs, slopes


class Parts(NamedTuple):
    """Three parts of the outputs, each cell x out, that add up to them."""

    constant: np.ndarray
    linear: np.ndarray
    quadratic: np.ndarray


def decompose(model: Model, x: Any, reference: np.ndarray) -> Parts:
    """Split the outputs into constant + linear + quadratic around a reference cell; an identity, not a fit.

    With d = x - reference, y = y(reference) + axis d + d' Q d. The axis depends on the reference, and Q does not.

    Parameters
    ----------
    model, x
        A classifier or regressor, and cells (cell x gene) as in ``model.outputs``.
    reference
        Expression of the reference cell (gene), a Series matched by name; 0 is a cell without expression.

    Examples
    --------
    >>> parts = interactions.decompose(model, test, reference=model.origin)
    >>> bool(np.allclose(sum(parts), model.outputs(test), atol=1e-4))
    True
    """
    x = match_genes(x, model.gene_names, model.layer, model.scaling)
    reference = gene_vector(reference, model.gene_names, "reference")
    constant, axis = _expand(model, reference)
    left, right, p = map(_float64, (model.w_l, model.w_r, model.w_p))
    parts = []
    for _, block in datasets.blocks(x):
        d = dense_tensor(block).numpy() - reference
        parts.append((d @ axis.T, ((d @ left.T) * (d @ right.T)) @ p.T))
    linear, quadratic = map(np.vstack, zip(*parts, strict=True))
    return Parts(np.broadcast_to(constant, linear.shape), linear, quadratic)


def linear_axis(model: Model, output: Output, reference: np.ndarray) -> pd.Series:
    """Return the slope of an output at a reference cell as in :func:`decompose`: what each gene does alone (gene).

    >>> interactions.linear_axis(model, "on", model.origin).nlargest(2).round(
    ...     2
    ... ).to_dict()
    {'Sim0016': 0.13, 'Sim0007': 0.08}
    """
    reference = gene_vector(reference, model.gene_names, "reference")
    return pd.Series(direction(model, output) @ _expand(model, reference)[1], model.gene_names)


def attributions(model: Model, output: Output, x: Any, reference: np.ndarray) -> pd.DataFrame:
    """Return what each gene adds to an output of cells beside a reference cell (cell x gene); an identity, not a fit.

    It is d_i (axis_i + (Q d)_i), d = x - reference: the Shapley value :cite:p:`shapley1953`, and the integrated
    gradient from the reference :cite:p:`sundararajan2017`. Arguments are as in :func:`direction` and :func:`decompose`.

    >>> table = interactions.attributions(model, "on", adata, reference=model.origin)
    >>> set(table.abs().mean().nlargest(20).index) == set(truth["genes"])
    True
    """
    index, x = datasets.cell_names(x), match_genes(x, model.gene_names, model.layer, model.scaling)
    datasets.check_in_memory(x, "a table of cells x genes")
    d = dense_tensor(x).numpy() - gene_vector(reference, model.gene_names, "reference")
    matrix, axis = interaction_matrix(model, output), linear_axis(model, output, reference)
    return pd.DataFrame(d * (axis.to_numpy() + (matrix @ d.T).T), index, axis.index)


def group_means(model: Model, output: Output, x: Any, groups: Any, reference: np.ndarray) -> pd.DataFrame:
    """Split the mean output of each donor, or other group of cells, into pseudobulk and co-expression; an identity.

    With m a group's mean less the reference and S its covariance, it is constant + axis m + m' Q m + tr(Q S).

    Labels in `groups` (cell), a Series, are matched with AnnData by name; cells without one are left out.

    >>> table = interactions.group_means(model, "on", adata, labels, model.origin)
    >>> table["coexpression"].round(1).to_dict()
    {'off': -0.4, 'on': 0.7}
    """
    adata, x = x, match_genes(x, model.gene_names, model.layer, model.scaling)
    if np.ndim(groups) != 1 or len(groups) != x.shape[0]:
        raise ValueError(f"groups has shape {np.shape(groups)} for {x.shape[0]} cells; pass one label a cell.")
    if isinstance(groups, pd.Series) and isinstance(adata, AnnData) and not isinstance(groups.index, pd.RangeIndex):
        groups = of_cells(groups, adata, "groups")
    reference = gene_vector(reference, model.gene_names, "reference")
    constant, axis = (direction(model, output) @ part for part in _expand(model, reference))
    matrix, rows = interaction_matrix(model, output), {}
    for name, cells in pd.Series(np.arange(x.shape[0])).groupby(np.asarray(groups), observed=True).indices.items():
        own = datasets.take(x, cells)
        m = datasets.mean(own) - reference
        at_mean = m @ matrix.basis
        spread = datasets.product(own, matrix.basis) - reference @ matrix.basis - at_mean
        coexpression = np.sum(spread @ matrix.core * spread) / len(cells)
        parts = [constant, m @ axis, at_mean @ matrix.core @ at_mean, coexpression]
        rows[name] = [len(cells), *parts, sum(parts)]
    columns = ["n_cells", "constant", "linear", "pseudobulk", "coexpression", "mean"]
    return pd.DataFrame.from_dict(rows, "index", columns=columns)


def similarity(
    a: Model, b: Model, output: Output, part: Part = "all", *, dataset: ExpressionDataset | None = None
) -> float:
    """Return the correlation of an output of two models, as functions of normal cells, read off the weights.

    With a'd + d'Qd around the mean cell and S the covariance of the genes, the covariance of outputs f and g is
    a_f' S a_g + 2 tr(Q_f S Q_g S), as in :cite:t:`gonzalez2026`, who take inputs as white.

    Parameters
    ----------
    a, b, output
        Models of the same genes, which may differ in size and form, and as in :func:`direction`.
    part
        The whole output, its linear part, its quadratic part, or of that what pairs of different genes do.
    dataset
        Cells whose mean and covariance to take, at most 3,000; the training cells of both if None.

    Examples
    --------
    >>> round(interactions.similarity(*replicas[:2], "on", dataset=train), 2)
    0.99
    """
    if part not in get_args(Part):
        raise ValueError(f"part={part!r} is unknown; choose {', '.join(map(repr, get_args(Part)))}.")
    if not a.gene_names.equals(b.gene_names):
        sizes = f"{len(a.gene_names)} and {len(b.gene_names)}"
        raise ValueError(f"a and b have {sizes} genes, not the same in one order; fit both on the same genes.")
    known, d = [a.statistics, b.statistics], None
    if dataset is not None:
        x = _drawn(dataset, a.gene_names).astype(np.float64)
        center = x.mean(axis=0)
        d = (x - center) / np.sqrt(len(x))  # S = d'd
    elif part == "interaction" or a.direct is not None or b.direct is not None or None in known:
        raise ValueError(f"part={part!r} of these models needs cells, for their weights do not say it; pass dataset=.")
    elif not all(np.allclose(*pair) for pair in zip(known[0][:2], known[1][:2], strict=True)):
        raise ValueError("a and b were trained on different cells; say by dataset= on which to compare them.")
    else:
        center = known[0].mean
    forms = [_form(model, output, center, d) for model in (a, b)]
    if part == "interaction":  # of two cells: what the pairs of different genes make of them
        pairs = [one[:, 1:] @ q.core @ one[:, 1:].T - d * q._diagonal() @ d.T for q, one, _ in forms]

    def covariance(i: int, j: int) -> float:
        if part == "interaction":
            return 2 * np.sum(pairs[i] * pairs[j])
        (q, one, _), (other, _, of_s) = forms[i], forms[j]
        linear, between = one[:, 0] @ of_s[:, 0], one[:, 1:].T @ of_s[:, 1:]
        quadratic = 2 * np.sum((q.core @ between) * (between @ other.core))
        return {"all": linear + quadratic, "linear": linear, "quadratic": quadratic}[part]

    scale = covariance(0, 0) * covariance(1, 1)
    return float(covariance(0, 1) / np.sqrt(scale)) if scale > 0 else np.nan


def _form(model: Model, output: Output, center: np.ndarray, d: np.ndarray | None) -> tuple[Any, ...]:
    """Return Q = B C B', [a B] with the axis a at the mean cell, and S [a B]; or, of S = d'd, d [a B] twice."""
    q = interaction_matrix(model, output)
    both = np.column_stack([linear_axis(model, output, center), q.basis])
    if d is not None:
        return q, d @ both, d @ both
    covariance = model.statistics.covariance  # S [L' R'], of which a is a mix, for there is no linear part
    p, (at_left, at_right) = direction(model, output) @ _float64(model.w_p), _branches(model, center)
    s_axis = covariance @ np.concatenate([p * at_right, p * at_left])
    return q, both, np.column_stack([s_axis, covariance[:, q._columns]])


def __getattr__(name: str) -> Any:
    """Offer the public functions of :mod:`scbmlp.audit` here too; nothing here needs them."""
    if name in __all__:
        return getattr(import_module("scbmlp.audit"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
