"""The cells of a report: read from a file of any kind, called by their symbols, judged by their scale, and split."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from anndata.utils import make_index_unique
from scipy import sparse

from scbmlp.checks import (
    LARGEST,
    MANY,
    REMEDY,
    by_case_alone,
    check_finite,
    control_labels,
    entries,
    expression,
    matched,
    obs_column,
    scale_of,
    whole_number,
)
from scbmlp.datasets import ExpressionDataset, get_classification_datasets, get_regression_datasets
from scbmlp.display import listed
from scbmlp.effects import between_donors
from scbmlp.enrichment import read_gene_sets
from scbmlp.sources import DataCard, data_card
from scbmlp.storage import writable
from scbmlp.stores import Scaling, normalised
from scbmlp.targets import perturbation_response

MOST_GENES = 5000  # of a file with more, the N_GENES most variable are taken
N_GENES = 2000
PART = "scbmlp_part"
MOST_GROUPS = 60  # donors or batches
SAID = "scbmlp_notes"  # in uns, of cells in memory on their way to the notebook
COUNTS = "holds only whole numbers, like raw counts", "holds counts that were scaled and not logged"
READERS: dict[str, Callable[[Path], AnnData]] = {
    ".h5ad": anndata.read_h5ad,
    ".zarr": anndata.io.read_zarr,
    ".loom": anndata.io.read_loom,
    ".h5": partial(sc.read_10x_h5, gex_only=False),
    "": partial(sc.read_10x_mtx, gex_only=False),
}
SYMBOLS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "gene_short_name")  # columns of var
GROUPS = r"(?i)(?:donor|batch|sample|patient|replicate|(?:^|_)rep|plate|individual|subject)"  # names of columns
IDS = r"(ENS[A-Z]*G\d{11}|WBGene\d{8}|FBgn\d{7})(\.\d+)?|\d+"  # a loom file may have numbers alone
WAYS = {  # on, for files of other kinds
    ".zip": "unzip it, and give the folder",
    ".h5mu": "write one modality of it: muon.read(path)['rna'].write_h5ad(...)",
    ".gz": "unzip it, or give the folder of 10x's matrices that it lies in",
    ".mtx": "give the folder that it lies in, with its lists of cells and genes",
    ".rds": "write it as h5ad in R, such as by anndataR or zellkonverter",
    ".csv": "make an h5ad file of it: scanpy.read_csv(path).write_h5ad(...), cells in rows",
}
WAYS |= {".rdata": WAYS[".rds"], ".h5seurat": WAYS[".rds"], ".tsv": WAYS[".csv"], ".txt": WAYS[".csv"]}


@dataclass(frozen=True)
class Cells:
    """Cells that a report can be made of, checked and split.

    Parameters
    ----------
    adata
        The cells with all their genes, log-normalised; modules are written to it.
    train, val, test
        The cells that the model sees, with its genes.
    target
        What the model learns, in words.
    labels
        Column of ``adata.obs`` to draw the cells by; None for targets of ``obsm``.
    notes
        What was decided about the data, in sentences.
    card, gene_sets
        Card of the data; gene sets by name, if any were given.
    strata, grouped
        Donor or batch of every cell, within which targets are permuted; None if no column of ``obs`` is one. Whether
        whole groups are in one part of the split.
    """

    adata: AnnData
    train: ExpressionDataset
    val: ExpressionDataset
    test: ExpressionDataset
    target: str
    labels: str | None
    notes: list[str]
    card: DataCard
    gene_sets: dict[str, list[str]]
    strata: pd.Series | None = None
    grouped: bool = False

    @property
    def parts(self) -> tuple[ExpressionDataset, ...]:
        """Training, validation and test cells."""
        return self.train, self.val, self.test


def prepare(
    cells: AnnData | str | Path | None,
    *,
    class_key: str | None = None,
    target_key: str | None = None,
    perturbation_key: str | None = None,
    control: Any = None,
    gene_sets: str | Path | Sequence[str | Path] | None = None,
    layer: str | None = None,
    n_genes: int | None = None,
    min_cells: int | None = None,
    no_normalize: bool = False,
    group_key: str | None = None,
    condition_key: str | None = None,
    seed: int = 0,
) -> Cells:
    """Check the cells of a report and split them; where ``X`` is scaled, ``raw`` is read, of the genes of ``X``.

    Parameters
    ----------
    cells
        Path of an h5ad file, or AnnData, which is not changed; None for ``scanpy.datasets.pbmc68k_reduced()``.
    class_key
        Column of ``obs`` with classes to tell apart.
    target_key
        Key of ``obsm`` with numbers to predict.
    perturbation_key, control
        Column of ``obs`` with perturbations and its label for control cells; the response is predicted.
    gene_sets
        Path of a GMT file, or several.
    layer
        Layer to read instead of ``X``.
    n_genes
        Most variable genes to take; if None all, or 2,000 of more than 5,000.
    min_cells
        Fewest cells of a class; smaller classes are left out, as are cells without a label.
    no_normalize
        Refuse counts, which are else scaled to 10,000 a cell, and log1p is taken.
    group_key
        Column of ``obs`` with donors or batches, three at least; each is then in one part of the split.
    condition_key
        Column of ``obs`` with one of two conditions of each group; module scores are compared over groups.
    seed
        Seed of the split.

    Examples
    --------
    >>> cells = report.prepare(adata, class_key="label")
    >>> cells.target, len(cells.train)
    ('the 2 classes of `label`', 700)
    """
    n_named = sum(name is not None for name in (class_key, target_key, perturbation_key))
    if n_named != 1:
        raise ValueError(
            f"class_key={class_key!r}, target_key={target_key!r}, perturbation_key={perturbation_key!r}: "
            f"{n_named} are named; name one, what the model is to learn."
        )
    if (control is None) != (perturbation_key is None):
        raise ValueError(
            f"perturbation_key={perturbation_key!r} and control={control!r} go together; name both or neither."
        )
    seed, notes = whole_number(seed, "seed", 0, 2**32 - 1), []
    adata, source = _read(cells)
    adata = _with_symbols(adata, notes)
    if not adata.isbacked:  # which is refused below
        adata, words = writable(adata)
        notes.extend([*adata.uns.pop(SAID, []), *words])
    if class_key in adata.obs:
        adata = _labelled(adata, class_key, whole_number(min_cells or 0, "min_cells", 0), notes)
    if group_key is not None:
        adata, groups, part = _by_group(adata, group_key, class_key, perturbation_key, seed, notes)
    if condition_key is not None:
        if group_key is None:
            raise ValueError(f"condition_key={condition_key!r} needs a group_key: donors are compared, and not cells.")
        between_donors(
            pd.DataFrame({"": range(adata.n_obs)}), groups, obs_column(adata, condition_key, "condition_key")
        )
    adata, x, scaling = log_normalised(adata, layer, notes, no_normalize)
    names = adata.var_names
    kept = _most_variable(x, names, n_genes, notes)
    sets = _gene_sets(gene_sets, names[kept], notes)
    where = {"X": x[:, kept]} if layer is None else {"layers": {layer: x[:, kept]}}
    seen = AnnData(**where, obs=adata.obs, var=pd.DataFrame(index=names[kept]), obsm=dict(adata.obsm))
    how = {"random_state": seed, "layer": layer}
    if group_key is not None:
        seen.obs[PART] = part
        how = {"split_key": PART, "layer": layer}
    split, target = _split(seen, class_key, target_key, perturbation_key, control, how)
    for part in split:
        part.scaling = scaling
    labels = class_key or perturbation_key
    shown = AnnData(x[:, kept], obs=adata.obs[[labels]].astype("category") if labels else None, uns=source)
    strata = groups if group_key else _strata(adata.obs, split, class_key, perturbation_key, notes)
    return Cells(adata, *split, target, labels, notes, data_card(shown), sets, strata, group_key is not None)


def _split(
    seen: AnnData,
    class_key: str | None,
    target_key: str | None,
    perturbation_key: str | None,
    control: Any,
    how: dict[str, Any],
) -> tuple[tuple[ExpressionDataset, ...], str]:
    """Return training, validation and test cells, and in words what the model learns."""
    if class_key is not None:
        try:
            split = get_classification_datasets(seen, class_key, **how)
        except ValueError as error:
            raise ValueError(f"{error} Small classes are left out by min_cells (--min-cells).") from None
        return split, f"the {len(split[0].output_names)} classes of `{class_key}`"
    if target_key is not None:
        split = get_regression_datasets(seen, target_key, **how)
        return split, f"the {len(split[0].output_names)} targets of `{target_key}`"
    split = _responses(seen, perturbation_key, control, how["layer"], how["random_state"])
    return split, f"{len(split[0].output_names)} components of the response to `{perturbation_key}`"


def _by_group(
    adata: AnnData, key: str, class_key: str | None, perturbation_key: str | None, seed: int, notes: list[str]
) -> tuple[AnnData, pd.Series, pd.Series]:
    """Return the cells of a class that two groups have, the group of each, and the part that its group is in."""
    if perturbation_key is not None or key == class_key:
        raise ValueError(
            f"group_key={key!r} goes with another class_key or a target_key, not with "
            f"{'a perturbation_key' if perturbation_key else 'the same class_key'}; leave it out."
        )
    obs_column(adata, key, "group_key")
    kept = adata.obs[key].notna()
    if lacking := int((~kept).sum()):
        notes.append(f"{lacking:,} cells have no group in `{key}`, and are left out.")
    if class_key in adata.obs:
        groups_of = adata.obs[kept].groupby(class_key, observed=True)[key].nunique()
        if alone := list(map(str, groups_of.index[groups_of < 2])):
            kept &= ~adata.obs[class_key].astype(str).isin(alone)
            notes.append(
                f"Classes of one `{key}` alone cannot be judged on another, and are left out: {listed(alone)}."
            )
    adata = adata if kept.all() else adata[kept].copy()
    groups = adata.obs[key].astype(str)
    sizes, rng = groups.value_counts(), np.random.default_rng(seed)
    if len(sizes) < 3:
        raise ValueError(
            f"group_key={key!r} has {len(sizes)} groups; three are needed, to fit the model, to choose its penalties "
            f"and to judge it: leave it out for a split of cells."
        )
    classes = adata.obs[class_key].astype(str) if class_key in adata.obs else groups.map(lambda _: "")
    for _ in range(200):  # until every class is among the training cells
        order = sizes.iloc[rng.permutation(len(sizes))].cumsum() / len(groups)
        first, second = [max(int((order <= share).sum()), i) for share, i in ((0.2, 1), (0.4, 2))]
        names = dict.fromkeys(order.index, "train") | dict.fromkeys(order.index[:second], "val")
        part = groups.map(names | dict.fromkeys(order.index[:first], "test"))
        few = min(classes[part == name].nunique() for name in ("val", "test"))
        if len(set(part)) == 3 and set(classes[part == "train"]) == set(classes) and few >= min(2, classes.nunique()):
            break
    else:
        raise ValueError(
            f"group_key={key!r}: no split of its groups has every class among the cells to fit, and two classes among "
            f"those to choose by and to judge by; the groups tell the class, so leave group_key out."
        )
    fit, choose, judge = part.groupby(groups).first().value_counts()[["train", "val", "test"]]
    notes.append(f"Each `{key}` is in one part alone: {fit} to fit, {choose} to choose, {judge} to judge.")
    return adata, groups, part


def _strata(
    obs: pd.DataFrame, split: Sequence[ExpressionDataset], class_key: str | None, other: str | None, notes: list[str]
) -> pd.Series | None:
    """Return the first column of donors or batches whose groups are in all parts, if there is one."""
    for name in obs.columns[obs.columns.astype(str).str.contains(GROUPS)]:
        groups = obs[name].astype(str)
        few = min(
            groups.iloc[part.indices].value_counts().reindex(groups.unique(), fill_value=0).min() for part in split
        )
        if name in (class_key, other) or not 2 <= groups.nunique() <= MOST_GROUPS or obs[name].isna().any() or few < 2:
            continue
        notes.append(f"Targets are permuted within each `{name}`, of which there are {groups.nunique()}.")
        if class_key is not None:
            sizes = pd.crosstab(groups, obs[class_key].astype(str))
            alone = sizes.max(axis=1).sum() / len(obs)
            if alone > 0.9 > sizes.sum().max() / len(obs):
                notes.append(f"`{name}` alone tells the class of {alone:.0%} of the cells, so the two are confounded.")
        return groups
    return None


def _read(cells: AnnData | str | Path | None) -> tuple[AnnData, dict[str, Any]]:
    """Return the cells, and what a data card says of their source."""
    known = {"name": "your cells", "kind": "given", "file": "AnnData in memory"}
    if cells is None:
        known["file"] = "pbmc68k_reduced, which comes with scanpy"
        cells = sc.datasets.pbmc68k_reduced()
    elif isinstance(cells, str | Path):
        path = Path(cells).expanduser()
        cells, known["file"] = opened(path), path.name
        if path.is_file():
            with path.open("rb") as file:
                known["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    elif not isinstance(cells, AnnData):
        raise TypeError(f"cells is of type {type(cells).__name__}; pass AnnData, or the path of an h5ad file.")
    before = cells.uns.get("scbmlp_source", {})
    # Simulated cells stay simulated, whatever file they went through.
    return cells, {"scbmlp_source": dict(before) if before.get("kind") == "simulated" else known}


def opened(path: Path) -> AnnData:
    """Return the cells of a file of any kind, by its suffix, or of a folder of 10x's matrices."""
    path = path.expanduser()
    if not path.exists():
        raise FileNotFoundError(f"cells={str(path)!r}: there is no such file; give the path of an h5ad file.")
    kind = path.suffix.lower() if path.suffix.lower() in READERS else "" if path.is_dir() else ".h5ad"
    try:
        with warnings.catch_warnings(action="ignore"):  # that names come twice is mended or said elsewhere
            return READERS[kind](path)
    except Exception as error:  # h5py, anndata and scanpy raise many kinds
        words = f"is no {kind[1:]} file that can be read" if kind else "is no folder of 10x's matrices"
        empty = path.is_file() and path.stat().st_size == 0
        way = "the file is empty" if empty else WAYS.get(path.suffix.lower(), "take a whole copy of it")
        raise ValueError(f"cells={path.name!r} {words}: {way}. ({error})") from error


def _with_symbols(adata: AnnData, notes: list[str]) -> AnnData:
    """Return the genes alone, by symbols where ids of Ensembl are the names, each by a name of its own."""
    kinds = adata.var.get("feature_types", pd.Series(dtype=object))
    if (genes := kinds == "Gene Expression").any() and not genes.all():
        left_out = ", ".join(f"{n:,} of {kind}" for kind, n in kinds[~genes].value_counts().items() if n)
        notes.append(f"Features other than gene expression are left out: {left_out}.")
        adata = adata[:, genes.to_numpy()].copy()
    names = adata.var_names.astype(str)
    if (ids := names.str.fullmatch(IDS)).mean() > 0.5:
        cut, column = (
            names.str.replace(r"\.\d+$", "", regex=True),
            next((one for one in SYMBOLS if one in adata.var), None),
        )
        known = (
            pd.Index([""] * len(cut))
            if column is None
            else pd.Index(adata.var[column].astype(object).fillna("").astype(str))
        )
        names = pd.Index(np.where(ids & (known != ""), known, np.where(ids, cut, names)), dtype=object)
        if column is not None:
            notes.append(f"Genes have ids as names; they are called by their symbols, from `var[{column!r}]`.")
        elif not names.equals(adata.var_names):
            notes.append("The versions of Ensembl's ids were cut.")
    if twice := int(names.duplicated().sum()):
        names = make_index_unique(names)
        notes.append(f"{twice:,} genes have the name of another; a number was put behind it.")
    if names.equals(adata.var_names):
        return adata
    adata = adata.copy()
    if adata.raw is not None:
        adata.raw = _with_symbols(adata.raw.to_adata(), [])
    adata.var_names = names
    return adata


def _labelled(adata: AnnData, key: str, least: int, notes: list[str]) -> AnnData:
    """Return the cells that have a label, of classes of so many cells at least."""
    labels = adata.obs[key]
    sizes = labels.value_counts()
    small = sizes.index[(sizes > 0) & (sizes < least)]
    kept = (labels.notna() & ~labels.isin(small)).to_numpy()
    if lacking := int(labels.isna().sum()):
        notes.append(f"{lacking:,} of {len(labels):,} cells have no label in `{key}`, and are left out.")
    if len(small):
        names = ", ".join(f"`{name}`" for name in small)
        notes.append(f"Classes of fewer than {least} cells are left out (`--min-cells`): {names}.")
    # Of colours that are none, a subset makes what no file can hold.
    return adata if kept.all() else writable(adata[kept].copy())[0]


def fault_of(x: sparse.csr_matrix | np.ndarray) -> str:
    """Return why values are not those of log-normalised expression, or nothing."""
    values = entries(x)
    if not values.any():
        return "is 0 everywhere"
    if values.min() < 0:
        return f"holds negative values (minimum {values.min():.3g}), as scaled expression does"
    most, whole, share = scale_of(x)
    if whole or share == 1:
        return COUNTS[not whole]
    if share > MANY:
        return f"holds multiples of one number, like counts, in {share:.0%} of its cells, and others in the rest"
    return f"holds values up to {most:.3g}, too large for logarithms" if most > LARGEST else ""


def log_normalised(
    adata: AnnData, layer: str | None, notes: list[str], as_it_is: bool = False, scaling: Scaling | None = None
) -> tuple[AnnData, Any, Scaling | None]:
    """Return cells, their expression, of counts the logarithm, or ``raw`` of scaled, and what counts went through."""
    x, where = expression(adata, layer)
    check_finite(x, where)
    fault = fault_of(x)
    if not fault:
        return adata, x, None
    if fault in COUNTS and not as_it_is:
        kind = "scaled counts" if fault == COUNTS[1] else "counts"
        scaling = scaling or Scaling(1e4, True, x.shape[1])
        total = f"scaled to {scaling.target_sum:,.0f} a cell" if scaling.target_sum else "not scaled"
        log = "and log1p was taken" if scaling.log1p else "without log1p"
        notes.append(f"`{layer or 'X'}` has {kind}. They were {total}, {log}.")
        adata, x = adata.copy(), normalised(sparse.csr_matrix(x, dtype=np.float32), *scaling[:2])
        if layer is None:
            adata.X = x
        else:
            adata.layers[layer] = x
        return adata, x, scaling
    raw = None if adata.raw is None else adata.raw.to_adata()
    raw_fits = raw is not None and not fault_of(expression(raw, None)[0])
    if layer is None and raw_fits and "negative" in fault:
        genes = adata.var_names
        if genes.isin(raw.var_names).all() and raw.var_names.is_unique:
            raw = writable(raw[:, genes].copy())[0]  # colours that are none become what no file can hold
        notes.append(f"`X` {fault}. `raw` has log-normalised values of the same cells, and the report reads those.")
        return raw, expression(raw, None)[0], None
    fitting = [name for name in adata.layers if name != layer and not fault_of(expression(adata, name)[0])]
    remedy = f"name a layer that has them: {', '.join(map(repr, fitting))}" if fitting else REMEDY
    remedy = "adata.raw has them: adata.raw.to_adata()" if raw_fits else remedy
    raise ValueError(f"{where} {fault}; log-normalised values are needed: {remedy}.")


def _most_variable(x: Any, names: pd.Index, n_genes: int | None, notes: list[str]) -> np.ndarray:
    """Return which genes the model sees, as a mask (gene)."""
    if n_genes is not None:
        most = whole_number(n_genes, "n_genes", 2)
    else:
        most = N_GENES if len(names) > MOST_GENES else len(names)
    if most >= len(names):
        return np.ones(len(names), bool)
    table = sc.pp.highly_variable_genes(AnnData(x), n_top_genes=most, inplace=False)
    notes.append(f"Of {len(names):,} genes the model sees the {most:,} most variable (`--n-genes`).")
    return table["highly_variable"].to_numpy()


def paths_of(paths: Any) -> list[Path]:
    """Return no path, one or several as a list."""
    return [Path(path) for path in ([] if paths is None else [paths] if isinstance(paths, str | Path) else paths)]


def _gene_sets(paths: Any, names: pd.Index, notes: list[str]) -> dict[str, list[str]]:
    """Return the gene sets of all files; some must be of the genes of the model."""
    sets: dict[str, list[str]] = {}
    for path in paths_of(paths):
        found = read_gene_sets(path)
        if twice := sets.keys() & found.keys():
            raise ValueError(f"gene_sets has {min(twice)!r} in two files; leave one of them out.")
        sets |= found
    if not paths_of(paths):
        return sets
    found, among = matched(sets, map(str, names)), set().union(*sets.values())
    if not any(5 <= len(one) <= 500 for one in found.values()):
        raise ValueError(
            f"none of {len(sets)} gene sets has 5 to 500 of the {len(names)} genes, such as {', '.join(names[:3])}; "
            f"give gene sets of the same organism and kind of name."
        )
    n_met = len(set().union(*found.values()))
    notes.append(f"Of {len(among):,} genes in the gene sets, {n_met:,} match one of the model's.")
    notes.extend(filter(None, [by_case_alone(names)]))
    return sets


def _responses(seen: AnnData, key: str, control: Any, layer: str | None, seed: int) -> tuple[ExpressionDataset, ...]:
    """Split the cells, each perturbation in equal proportion, with responses on components of the training cells."""
    labels, control = control_labels(seen, key, control)
    seen.obs[key] = labels.to_numpy()
    try:
        parts = get_classification_datasets(seen, key, random_state=seed, layer=layer)
    except ValueError as error:  # its words are about classes
        raise ValueError(str(error).replace("class_key", "perturbation_key")) from None
    part = np.empty(seen.n_obs, dtype=object)
    for name, one in zip(("train", "val", "test"), parts, strict=True):
        part[one.indices] = name
    seen.obs["part"] = part
    n = min(5, labels.nunique() - 1)
    perturbation_response(seen, key, control, n, "response", cells=part == "train", layer=layer)
    return get_regression_datasets(seen, "response", layer=layer, split_key="part")
