"""Interaction matrices read off the weights, kept as thin factors, and what they carry of a prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.linalg import block_diag
from scipy.sparse.linalg import LinearOperator

from scbmlp.datasets import ExpressionDataset, dense_tensor, match_genes
from scbmlp.models import ScBMLPClassifier, ScBMLPRegressor

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
        class alike, so one class of a classifier means that class minus the mean of all classes.

    Raises
    ------
    KeyError
        An output is unknown.
    """
    mix = output if isinstance(output, Mapping) else {output: 1.0}
    names = list(model.output_names)
    weights = np.zeros(len(names))
    for name, weight in mix.items():
        if name in names:
            weights[names.index(name)] += weight
        elif isinstance(name, int | np.integer) and -len(names) <= name < len(names):
            weights[name] += weight
        else:
            raise KeyError(
                f"output={name!r} is unknown; the outputs are {', '.join(map(str, names))}{_nearest(name, names)}."
            )
    if isinstance(model, ScBMLPClassifier) and not isinstance(output, Mapping):
        weights -= weights.mean()
    return weights


class InteractionMatrix(LinearOperator):
    """A symmetric gene x gene matrix Q = B C B', held as its factors: a linear operator of scipy's.

    Parameters
    ----------
    basis
        B = [L' R'], gene x 2 hid.
    core
        C, symmetric, 2 hid x 2 hid.
    gene_names
        Names of the rows and columns (gene).
    thin
        Gives the thin QR decomposition of `basis`; matrices of one model share it.
    """

    def __init__(
        self,
        basis: np.ndarray,
        core: np.ndarray,
        gene_names: pd.Index,
        thin: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> None:
        super().__init__(np.dtype(np.float64), (len(basis), len(basis)))
        self.basis, self.core, self.gene_names = basis, core, gene_names
        self._thin = thin or cache(lambda: np.linalg.qr(basis))

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
            Cells, a dense or sparse matrix, cell x gene.
        """
        projected = x @ self.basis
        return np.einsum("ci,ij,cj->c", projected, self.core, projected, optimize=True)

    def diagonal(self) -> np.ndarray:
        """Return what each gene does with itself (gene)."""
        return np.einsum("gi,gi->g", self.basis @ self.core, self.basis)

    def trace(self) -> float:
        """Return the sum of the eigenvalues."""
        return float(np.sum(self.core * (self.basis.T @ self.basis)))

    def norm(self) -> float:
        """Return the Frobenius norm, the root of the sum of all squared interactions."""
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
        """
        rows, columns = self._positions(genes_a), self._positions(genes_b)
        return pd.DataFrame(self.basis[rows] @ self.core @ self.basis[columns].T, index=genes_a, columns=genes_b)

    def _positions(self, genes: list[str]) -> np.ndarray:
        positions = self.gene_names.get_indexer(genes)
        unknown = [gene for gene, position in zip(genes, positions, strict=True) if position < 0]
        if unknown:
            raise KeyError(
                f"{len(unknown)} of {len(genes)} genes are not the model's: {', '.join(map(str, unknown[:5]))}"
                f"{_nearest(unknown[0], self.gene_names)}."
            )
        return positions

    def top_pairs(self, n: int = 20, *, block: int = 1024) -> pd.DataFrame:
        """Return the `n` strongest interactions of two different genes, strongest first.

        Parameters
        ----------
        n
            Number of pairs.
        block
            Genes whose interactions with all others are in memory at a time.

        Returns
        -------
        A row a pair: ``gene_a``, ``gene_b``, ``interaction`` (each of the two entries of Q).
        """
        genes = self.shape[0]
        best = np.empty((3, 0))
        for start in range(0, genes, block):
            rows = self.basis[start : start + block] @ self.core @ self.basis[start:].T
            i, j = np.triu_indices(rows.shape[0], 1, rows.shape[1])
            values = rows[i, j]
            strongest = np.argpartition(-np.abs(values), n)[:n] if len(values) > n else slice(None)
            best = np.hstack([best, [i[strongest] + start, j[strongest] + start, values[strongest]]])
            best = best[:, np.argsort(-np.abs(best[2]), kind="stable")[:n]]
        names = self.gene_names.to_numpy()
        a, b = best[:2].astype(int)
        return pd.DataFrame({"gene_a": names[a], "gene_b": names[b], "interaction": best[2]})

    def scaled(self, scale: np.ndarray) -> InteractionMatrix:
        """Return S Q S with S = diag(scale), the matrix for genes measured in units of `scale`.

        Parameters
        ----------
        scale
            Unit of every gene (gene).
        """
        return InteractionMatrix(self.basis * scale[:, None], self.core, self.gene_names)

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
        """
        u, t = self._thin()
        if k is not None and not 1 <= k <= t.shape[0]:
            raise ValueError(f"k={k} eigenpairs were asked for; 1 to {t.shape[0]} can be non-zero.")
        values, vectors = self._thin_eigh()
        return values[:k], u @ vectors[:, :k]

    def _thin_eigh(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all eigenvalues and the eigenvectors in the coordinates of U, ordered."""
        _, t = self._thin()
        small = t @ self.core @ t.T
        values, vectors = np.linalg.eigh((small + small.T) / 2)
        order = np.argsort(-np.abs(values), kind="stable")
        return values[order], vectors[:, order]


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
    """
    return interaction_matrices(model, [output], homogeneous=homogeneous)[0]


def interaction_matrices(
    model: Model, outputs: Iterable[Output] | None = None, *, homogeneous: bool = False
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

    Raises
    ------
    KeyError
        An output is unknown.
    """
    left, right, p = _float64(model.w_l, model.w_r, model.w_p)
    basis, genes = np.hstack([left.T, right.T]), model.gene_names
    weights = [direction(model, output) for output in (model.output_names if outputs is None else outputs)]
    if homogeneous:
        # Around the cell 0, y = constant + slope' x + x' Q x: the biases are the hidden branches there.
        at_zero = np.concatenate(_at(model, np.zeros(len(genes))))
        genes = genes.append(pd.Index(["(constant)"]))
        basis = np.vstack([basis, at_zero])
        constant, slope = _beside_branches(model)
        # Two more columns: the constant coordinate, and the direct weights; each output mixes them in its core.
        unit = np.eye(len(genes))[:, -1:]
        basis = np.hstack([basis, unit, np.vstack([slope.T, np.zeros(len(slope))])])
    thin = cache(lambda: np.linalg.qr(basis))
    matrices = []
    for mix in weights:
        half = np.diag(mix @ p) / 2
        core = np.kron([[0, 1], [1, 0]], half)
        if homogeneous:
            beside = np.zeros((1 + len(mix), 1 + len(mix)))
            beside[0, 0] = mix @ constant
            beside[0, 1:] = beside[1:, 0] = mix / 2
            core = block_diag(core, beside)
        matrices.append(InteractionMatrix(basis, core, genes, thin))
    return matrices


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


def _nearest(name: Any, names: Iterable[Any]) -> str:
    """Return what a mistyped name may have meant, to end a message with."""
    lower = {str(candidate).lower(): str(candidate) for candidate in names}
    matches = [lower[match] for match in get_close_matches(str(name).lower(), lower, n=3)]
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


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
    """
    x = match_genes(x, model.gene_names)
    constant, axis = _expand(model, reference)
    left, right, p = _float64(model.w_l, model.w_r, model.w_p)
    linear, quadratic = [], []
    for start in range(0, x.shape[0], batch_size):
        d = dense_tensor(x[start : start + batch_size]).numpy() - np.ravel(reference)
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
    """
    return pd.Series(direction(model, output) @ _expand(model, reference)[1], model.gene_names)


def _expand(model: Model, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the outputs (out) and their slopes (out x gene) at a reference cell."""
    reference = np.asarray(reference, dtype=np.float64).ravel()
    if reference.shape != (model.cfg.d_input,):
        raise ValueError(
            f"reference has {len(reference)} values; one for each of the model's {model.cfg.d_input} genes is needed."
        )
    left, right, p = _float64(model.w_l, model.w_r, model.w_p)
    at_left, at_right = _at(model, reference)
    constant, slope = _beside_branches(model)
    outputs = p @ (at_left * at_right) + constant + slope @ reference
    return outputs, (p * at_right) @ left + (p * at_left) @ right + slope


def audit(model: Model, dataset: ExpressionDataset, reference: np.ndarray | str | None = None) -> pd.DataFrame:
    """Say how much of each output the interactions carry.

    Parameters
    ----------
    model
        A fitted classifier or regressor.
    dataset
        Cells with their targets.
    reference
        Expression of the reference cell (gene), or the name of a class for the mean of its cells in `dataset`; the
        mean of `dataset` if None.

    Returns
    -------
    A row an output. ``linear`` and ``quadratic``: each part's share of the variance over cells; ``covariance``: twice
    their covariance as a share; the three add up to 1. ``score``: recall of the class, or R2 of the target, and what
    is left of it in ``score_linear`` without the quadratic part and in ``score_quadratic`` without the linear part.
    ``rank_99``: number of modules, in metric ``identity``, from which on 99% of the score are kept. ``attrs`` has the
    scores and the rank over all outputs.

    Raises
    ------
    ValueError
        `dataset` or `reference` does not fit the model.
    KeyError
        `reference` is not a class.
    """
    model.check(dataset)
    x, target = match_genes(dataset, model.gene_names), dataset.y.numpy()
    if reference is None or isinstance(reference, str):
        if reference is not None and (target.ndim > 1 or reference not in model.output_names):
            raise KeyError(f"reference={reference!r} is not a class{_nearest(reference, model.output_names)}.")
        chosen = slice(None) if reference is None else np.flatnonzero(target == model.output_names.get_loc(reference))
        reference = np.asarray(x[chosen].mean(axis=0)).ravel()
    constant, linear, quadratic = decompose(model, x, reference)
    directions = np.stack([direction(model, name) for name in model.output_names])
    one, two = linear @ directions.T, quadratic @ directions.T
    total = (one + two).var(axis=0)
    table = pd.DataFrame(
        {"linear": one.var(axis=0) / total, "quadratic": two.var(axis=0) / total},
        index=pd.Index(model.output_names, name="output"),
    )
    table["covariance"] = 1 - table["linear"] - table["quadratic"]
    kept = {
        "score": constant + linear + quadratic,
        "score_linear": constant + linear,
        "score_quadratic": constant + quadratic,
    }
    for name, outputs in kept.items():
        table[name] = model._measure_each(outputs, target)
        table.attrs[name] = model._measure(outputs, target)
    needed = 0.99 * np.append(table["score"], table.attrs["score"])
    scores = np.array(
        [
            # Outputs that are all 0 are no prediction, though they put every cell into the first class.
            [*model._measure_each(y, target), model._measure(y, target)] if y.any() else needed - np.inf
            for y in _truncated(model, x)
        ]
    )
    # The number from which on the score is kept, for it may come and go; no score, no rank.
    ranks = [
        None if np.isnan(least) else int(np.flatnonzero(~(kept >= least)).max(initial=-1)) + 1
        for kept, least in zip(scores.T, needed, strict=True)
    ]
    table["rank_99"] = pd.array(ranks[:-1], dtype="Int64")
    table.attrs["rank_99"] = ranks[-1]
    return table


def _truncated(model: Model, x: Any, *, batch_size: int = 1024) -> Iterator[np.ndarray]:
    """Yield the outputs (cell x out) with no module of each output, with one, with two, and so on."""
    constant, linear, _ = decompose(model, x, model.origin)
    matrices = interaction_matrices(model)
    u, _ = matrices[0]._thin()
    thin = [(dense_tensor(x[i : i + batch_size]).numpy() - model.origin) @ u for i in range(0, x.shape[0], batch_size)]
    thin = np.vstack(thin)
    pairs = [matrix._thin_eigh() for matrix in matrices]
    outputs = (constant + linear) @ np.stack([direction(model, name) for name in model.output_names]).T
    yield outputs
    for k in range(u.shape[1]):
        outputs = outputs + np.stack([values[k] * (thin @ vectors[:, k]) ** 2 for values, vectors in pairs], axis=1)
        yield outputs
