"""Labels for new cells: calibrated probabilities, "unassigned" for unknown classes, and the genes that speak."""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import copy
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from scbmlp.checks import check_cells, entries, expression
from scbmlp.datasets import ExpressionDataset, held
from scbmlp.interactions import attributions, interaction_matrices, linear_axis
from scbmlp.models import ScBMLPClassifier
from scbmlp.modules import GeneModules, all_gene_modules
from scbmlp.moments import LARGE, part_of
from scbmlp.preparing import SYMBOLS, log_normalised, opened
from scbmlp.solving import solve_again
from scbmlp.storage import writable

KEPT = 0.95  # share of the validation cells that the threshold keeps
BLOCK = 1024  # cells that are dense at a time
N_GENES = 5
N_MODULES = 3
UNASSIGNED = "unassigned"


def calibrate(model: ScBMLPClassifier, train: ExpressionDataset, validation: ExpressionDataset) -> dict[str, Any]:
    """Measure how far a classifier's probabilities can be believed, and below which score a cell is "unassigned".

    The score is the largest logit less the mean of the logits: the sum of what all genes say for the label. Most
    validation cells, 95%, are above the threshold. To see how often a cell of an unseen class is below, the model is
    solved again without each class, and has a threshold of its own.

    Parameters
    ----------
    model, train, validation
        What :func:`scbmlp.models.solve` returned, and its data sets. A trained model is not solved without classes.

    Returns
    -------
    ``temperature``, by which logits are divided; ``threshold``; ``error_before`` and ``error_after``, the expected
    calibration error of the validation cells; ``unseen``, the share of each class that is called unassigned where the
    model has not seen it. As ``model.calibration`` it is saved with the model.

    Examples
    --------
    >>> solved.calibration = annotate.calibrate(solved, train, validation)
    >>> solved.calibration["error_after"] < 0.05
    True
    """
    _check_classifier(model)
    model.check(train)
    model.check(validation)
    y, logits = validation.y.numpy(), model.outputs(validation).astype(float)

    def loss(inverse: float) -> float:
        return -log_softmax(logits * inverse, axis=1)[np.arange(len(y)), y].mean()

    inverse = minimize_scalar(loss, bounds=(0.1, 10), method="bounded").x
    unseen, known = {}, np.unique(train.y)
    for code, name in enumerate(model.output_names if model.recipe is not None and len(known) > 2 else []):
        if code not in known or not (left_out := y == code).any():
            continue
        part = _without(train, code)
        scores = _scores(solve_again(model, part, np.ones(len(part)), part).outputs(validation))
        unseen[str(name)] = float((scores[left_out] < np.quantile(scores[~left_out], 1 - KEPT)).mean())
    return {
        "temperature": float(1 / inverse),
        "threshold": float(np.quantile(_scores(logits), 1 - KEPT)),
        "error_before": calibration_error(softmax(logits, axis=1), y),
        "error_after": calibration_error(softmax(logits * inverse, axis=1), y),
        "unseen": unseen,
    }


def calibration_error(probability: np.ndarray, y: np.ndarray, n_bins: int = 15) -> float:
    """Return the expected calibration error: how far the largest probability is from how often it is right.

    Parameters
    ----------
    probability, y
        Probability of every class (cell x out), and class codes (cell).
    n_bins
        Bins of equal width, over which differences are averaged by their cells.

    Examples
    --------
    >>> annotate.calibration_error(
    ...     np.array([[0.9, 0.1], [0.9, 0.1]]), np.array([0, 1])
    ... )
    0.4
    """
    most, right = probability.max(axis=1), probability.argmax(axis=1) == y
    bins = np.minimum((most * n_bins).astype(int), n_bins - 1)
    return float(np.abs(np.bincount(bins, right - most, n_bins)).sum() / len(y))


def annotate(
    adata: AnnData | str | Path,
    model: ScBMLPClassifier | str | Path,
    *,
    layer: str | None = None,
    max_missing: float = 0.2,
) -> AnnData:
    """Label new cells, and say for each which genes speak for its label; returned is a copy.

    Genes are matched by name. A gene that is missing is taken as its training mean, and then says nothing.

    Parameters
    ----------
    adata, model
        Cells with counts or log-normalised expression, and a classifier; or paths of their files.
    layer
        Layer to read; that of the training cells where there is one, else ``X``.
    max_missing
        Largest share of the model's weight that missing genes may carry, from 0 to 1.

    Returns
    -------
    ``obs`` has ``scbmlp_label``, ``scbmlp_probability`` and ``scbmlp_genes``, the five that speak most for the label by
    :func:`scbmlp.interactions.attributions`. ``obsm`` has the scores of three modules a class, where the model has
    products: ``X_modules_<class>``. ``uns["scbmlp"]`` says how genes were matched, and what was decided.

    Examples
    --------
    >>> labelled = annotate.annotate(adata, solved)
    >>> found = labelled.obs["scbmlp_label"].astype(str)
    >>> bool((found == labels).mean() > 0.9)
    True
    """
    if not (isinstance(max_missing, Real) and 0 <= max_missing <= 1):
        raise ValueError(f"max_missing={max_missing!r}: a number from 0 to 1 is needed.")
    model = ScBMLPClassifier.load(model) if isinstance(model, str | Path) else model
    _check_classifier(model)
    if isinstance(model.gene_names, pd.RangeIndex):
        raise ValueError("model has no names of genes, so that none can be matched; fit it to data that have names.")
    check_cells(adata)
    adata = opened(Path(adata)) if isinstance(adata, str | Path) else adata
    layer = model.layer if layer is None and model.layer in adata.layers else layer
    cells, notes = adata, list[str]()
    if layer is None and adata.raw is not None and entries(expression(adata, None)[0]).min(initial=0) < 0:
        cells = adata.raw.to_adata()
        notes.append("`X` is scaled. `raw` is read, with all its genes.")
    cells, x, _ = log_normalised(cells, layer, notes, scaling=model.scaling)
    at, how = _matched(cells.var, model.gene_names)
    missing = model.gene_names[at < 0]
    share = float(_weights(model)[at < 0].sum())
    if share > max_missing:
        raise ValueError(
            f"adata lacks {len(missing):,} of the model's {len(at):,} genes, with {share:.0%} of its weight; "
            f"max_missing={max_missing} is allowed. The model has names such as {_such_as(model.gene_names)}, adata "
            f"{_such_as(cells.var_names)}: pass cells of the same species and kind of names, or raise max_missing."
        )
    facts = model.calibration or {}
    if not facts:
        notes.append("The model says nothing of calibration, so every cell has a label; see annotate.calibrate.")
    modules = {}
    if bool(model.w_p.any()) and model.statistics is not None:
        modules = all_gene_modules(model, n_modules=min(N_MODULES, model.cfg.d_hidden), metric="covariance")
    parts = [_annotated(model, part, facts, modules) for part in _parts(model, x, at)]
    found = adata.copy()
    for name in ("label", "probability", "genes"):
        found.obs[f"scbmlp_{name}"] = np.concatenate([table[name].to_numpy() for table, _ in parts])
    names = dict.fromkeys([*map(str, model.output_names), UNASSIGNED])
    found.obs["scbmlp_label"] = pd.Categorical(found.obs["scbmlp_label"], list(names))
    for key in parts[0][1]:
        found.obsm[key] = np.vstack([scores[key] for _, scores in parts])
    found.uns["scbmlp"] = {
        "n_matched": int((at >= 0).sum()),
        "matched_by": how,
        "missing": missing.to_numpy(str),
        "missing_weight": share,
        "n_unassigned": int((found.obs["scbmlp_label"] == UNASSIGNED).sum()),
        "notes": np.array(notes, dtype=str),
    } | {name: facts[name] for name in ("temperature", "threshold") if name in facts}
    return found


def _check_classifier(model: Any) -> None:
    """Raise an error for all but a classifier."""
    if not isinstance(model, ScBMLPClassifier):
        raise ValueError(f"model is of type {type(model).__name__}; labels take a ScBMLPClassifier, or its file.")


def _scores(logits: np.ndarray) -> np.ndarray:
    """Return what speaks for the label of each cell (cell): the largest logit less the mean of all."""
    return logits.max(axis=1) - logits.mean(axis=1)


def _without(train: ExpressionDataset, code: int) -> ExpressionDataset:
    """Return the cells of all other classes, with codes of their own."""
    part = copy(part_of(train, np.flatnonzero(train.y != code)))
    part = part if len(part) > LARGE else held(part)
    part.y, part.output_names = part.y - (part.y > code).long(), train.output_names.delete(code)
    return part


def _matched(var: pd.DataFrame, wanted: pd.Index) -> tuple[np.ndarray, str]:
    """Return where each gene is (gene), -1 for none, and how: by looser names only if most are not found else."""
    columns = {"names": var.index} | {f"var[{name!r}]": pd.Index(var[name]) for name in SYMBOLS if name in var}
    first = None
    forms = {"": str, " without version": lambda name: re.sub(r"\.\d+$", "", name), " in any case": str.upper}
    for words, change in forms.items():
        for where, names in columns.items():
            names, genes = names.astype(str).map(change), wanted.astype(str).map(change)
            twice = names[names.duplicated()].intersection(genes)
            if len(twice) and not words and where == "names":
                raise ValueError(
                    f"adata has {len(twice)} of the model's genes more than once, such as {twice[0]}; give them names "
                    f"of their own: adata.var_names_make_unique()."
                )
            if len(twice) or not genes.is_unique:
                continue  # nobody knows which of them is meant
            at = pd.Series(np.arange(len(names)), names)[~names.duplicated()].reindex(genes, fill_value=-1).to_numpy()
            first = at if first is None else first
            if (at >= 0).mean() > 0.5:
                return at, where + words
    return first, "names"


def _weights(model: ScBMLPClassifier) -> np.ndarray:
    """Return each gene's share of the model's weight (gene): of the outputs' variance, were genes independent."""
    unit = np.ones(len(model.gene_names)) if model.statistics is None else model.statistics.sd
    total = np.zeros(len(unit))
    for name, matrix in zip(model.output_names, interaction_matrices(model, scale=unit), strict=True):
        half = matrix.basis @ matrix.core
        total += (linear_axis(model, name, model.origin).to_numpy() * unit) ** 2
        total += 2 * ((half @ (matrix.basis.T @ matrix.basis)) * half).sum(axis=1)
    return total / (total.sum() or 1.0)


def _such_as(names: pd.Index) -> str:
    """Return the first names, to compare by eye."""
    return ", ".join(map(str, names[:3]))


def _parts(model: ScBMLPClassifier, x: Any, at: np.ndarray) -> Iterator[AnnData]:
    """Yield blocks of cells with exactly the genes of the model, missing ones at their training mean."""
    mean = model.origin if model.statistics is None else model.statistics.mean
    for start in range(0, x.shape[0], BLOCK):
        block = x[start : start + BLOCK][:, at[at >= 0]]
        filled = np.tile(mean, (block.shape[0], 1))
        filled[:, at >= 0] = block.toarray() if sparse.issparse(block) else block
        where = {"X": filled} if model.layer is None else {"layers": {model.layer: filled}}
        yield AnnData(**where, var=pd.DataFrame(index=model.gene_names.astype(str)))


def _annotated(
    model: ScBMLPClassifier, part: AnnData, facts: dict[str, Any], modules: dict[Any, GeneModules]
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Return label, probability and genes of cells, and their module scores by key."""
    logits = model.outputs(part).astype(float)
    codes = logits.argmax(axis=1)
    genes, names = np.full(len(codes), "", dtype=object), model.gene_names.astype(str).to_numpy()
    for code in np.unique(codes):
        here = np.flatnonzero(codes == code)
        values = attributions(model, model.output_names[code], part[here], model.origin).to_numpy()
        top = np.argsort(-values, axis=1)[:, :N_GENES]
        genes[here] = [", ".join(names[row[one[row] > 0]]) for row, one in zip(top, values, strict=True)]
    labels = model.output_names.astype(str).to_numpy(object)[codes]
    low = _scores(logits) < facts.get("threshold", -np.inf)
    labels[low], genes[low] = UNASSIGNED, ""
    probability = softmax(logits / facts.get("temperature", 1.0), axis=1).max(axis=1)
    for one in modules.values():
        one.to_adata(part)
    table = pd.DataFrame({"label": labels, "probability": probability, "genes": genes})
    return table, {key: scores for key, scores in part.obsm.items() if scores.shape[1]}


def command(commands: Any) -> None:
    """Add ``scbmlp annotate`` to the command line."""
    words = "label new cells with a model of a report"
    one = commands.add_parser("annotate", help=words, description=words)
    one.add_argument("cells", help="a file with counts or log-normalised expression")
    one.add_argument("--model", required=True, help="a report's model.safetensors")
    one.add_argument("--out", required=True, help="h5ad file to write")
    one.add_argument("--layer", help="layer with the expression; X if not given")
    one.add_argument("--max-missing", type=float, default=0.2, help="share of the weight that may be missing (0.2)")
    one.add_argument("--force", action="store_true", help="replace a file that is there")
    one.set_defaults(run=_write)


def _write(cells: str, model: str, out: str, layer: str | None, max_missing: float, force: bool) -> str:
    """Label the cells of a file, write them to another, and return what is to be said."""
    path = Path(out).expanduser()
    if path.exists() and not force:
        raise ValueError(f"out={out!r} is there already; name another file, or add --force.")
    found, mended = writable(annotate(cells, model, layer=layer, max_missing=max_missing))
    partial = path.with_name(f".{path.name}.partial")
    try:  # one that was there is whole until then
        found.write_h5ad(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    facts, sizes = found.uns["scbmlp"], found.obs["scbmlp_label"].value_counts()
    n_matched, n_missing = facts["n_matched"], len(facts["missing"])
    matched = f"{n_matched:,} of {n_matched + n_missing:,} genes are there, by {facts['matched_by']}"
    weight = f"those missing carry {facts['missing_weight']:.1%} of the model's weight"
    return "\n".join([*facts["notes"], *mended, f"{matched}; {weight}.", sizes.to_string(header=False), str(path)])
