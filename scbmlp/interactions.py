"""Interaction matrices read off the weights, kept as thin factors, and what they carry of a prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

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
            raise KeyError(f"output={name!r} is unknown; the outputs are {', '.join(map(str, names))}.")
    if isinstance(model, ScBMLPClassifier) and not isinstance(output, Mapping):
        weights -= weights.mean()
    return weights


@dataclass(frozen=True)
class InteractionMatrix:
    """A symmetric gene x gene matrix Q = B C B', held as its factors.

    Parameters
    ----------
    basis
        B = [L' R'], gene x 2 hid.
    core
        C, symmetric, 2 hid x 2 hid.
    gene_names
        Names of the rows and columns (gene).
    """

    basis: np.ndarray
    core: np.ndarray
    gene_names: pd.Index

    @property
    def shape(self) -> tuple[int, int]:
        """Genes x genes."""
        return self.basis.shape[0], self.basis.shape[0]

    def to_dense(self) -> np.ndarray:
        """Return the whole matrix (gene x gene); 800 MB at 10,000 genes."""
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
        if (positions < 0).any():
            unknown = [gene for gene, position in zip(genes, positions, strict=True) if position < 0]
            raise KeyError(
                f"{len(unknown)} of {len(genes)} genes are not the model's: {', '.join(map(str, unknown[:5]))}."
            )
        return positions

    def scaled(self, scale: np.ndarray) -> InteractionMatrix:
        """Return S Q S with S = diag(scale), the matrix for genes measured in units of `scale`.

        Parameters
        ----------
        scale
            Unit of every gene (gene).
        """
        return InteractionMatrix(self.basis * scale[:, None], self.core, self.gene_names)

    @cached_property
    def _orthogonal(self) -> tuple[np.ndarray, np.ndarray]:
        return np.linalg.qr(self.basis)

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
        u, t = self._orthogonal
        if k is not None and not 1 <= k <= t.shape[0]:
            raise ValueError(f"k={k} eigenpairs were asked for; 1 to {t.shape[0]} can be non-zero.")
        small = t @ self.core @ t.T
        values, vectors = np.linalg.eigh((small + small.T) / 2)
        order = np.argsort(-np.abs(values), kind="stable")[:k]
        return values[order], u @ vectors[:, order]


def interaction_matrix(model: Model, output: Output) -> InteractionMatrix:
    """Read the interaction matrix of an output off the weights, after :cite:t:`pearce2025bilinear`.

    Q_p = sym(L' diag(p) R), where p is the output's row of P. Without biases and without a linear part,
    y = x' Q_p x; with them, it is the quadratic part of y.

    Parameters
    ----------
    model
        A classifier or regressor.
    output
        As in :func:`direction`.

    Raises
    ------
    KeyError
        An output is unknown.
    """
    left, right, p = _float64(model.w_l, model.w_r, model.w_p)
    half = np.diag(direction(model, output) @ p) / 2
    zero = np.zeros_like(half)
    return InteractionMatrix(np.hstack([left.T, right.T]), np.block([[zero, half], [half, zero]]), model.gene_names)


def _float64(*tensors: Any) -> tuple[np.ndarray, ...]:
    return tuple(tensor.detach().cpu().numpy().astype(np.float64) for tensor in tensors)


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
    left, right, p, center = _float64(model.w_l, model.w_r, model.w_p, model.center)
    origin = reference - center if model.cfg.linear else reference
    # The hidden branches at the reference; biases, where there are any, only shift them.
    at_left, at_right = left @ origin, right @ origin
    if model.branches.bias is not None:
        bias_left, bias_right = np.split(*_float64(model.branches.bias), 2)
        at_left, at_right = at_left + bias_left, at_right + bias_right
    outputs, slopes = p @ (at_left * at_right), (p * at_right) @ left + (p * at_left) @ right
    if model.direct is not None:
        (direct,) = _float64(model.direct.weight)
        outputs, slopes = outputs + direct @ origin, slopes + direct
    if model.project.bias is not None:
        outputs = outputs + _float64(model.project.bias)[0]
    return outputs, slopes


def audit(model: Model, dataset: ExpressionDataset, reference: np.ndarray | None = None) -> pd.DataFrame:
    """Say how much of each output the interactions carry.

    Parameters
    ----------
    model
        A fitted classifier or regressor.
    dataset
        Cells with their targets.
    reference
        Expression of the reference cell (gene); the mean of `dataset` if None.

    Returns
    -------
    A row an output: ``linear`` and ``quadratic``, each part's share of the variance over cells; ``covariance``,
    twice their covariance as a share (the three add up to 1); ``score`` of the model, ``score_linear`` without the
    quadratic part: recall of the class, or R2 of the target. ``attrs`` has both scores over all outputs.

    Raises
    ------
    ValueError
        `dataset` or `reference` does not fit the model.
    """
    model.check(dataset)
    if reference is None:
        reference = np.asarray(match_genes(dataset, model.gene_names).mean(axis=0)).ravel()
    parts = decompose(model, dataset, reference)
    y, kept = parts.constant + parts.linear + parts.quadratic, parts.constant + parts.linear
    mixes = np.stack([direction(model, name) for name in model.output_names])
    linear, quadratic = parts.linear @ mixes.T, parts.quadratic @ mixes.T
    total = (linear + quadratic).var(axis=0)
    table = pd.DataFrame(
        {"linear": linear.var(axis=0) / total, "quadratic": quadratic.var(axis=0) / total},
        index=pd.Index(model.output_names, name="output"),
    )
    table["covariance"] = 1 - table["linear"] - table["quadratic"]
    target = dataset.y.numpy()
    for name, outputs in (("score", y), ("score_linear", kept)):
        table[name] = model._measure_each(outputs, target)
        table.attrs[name] = model._measure(outputs, target)
    return table
