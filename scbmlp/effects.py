"""What perturbations do to cells: directions, mean scores against control cells, and whether two of them add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import stats
from sklearn.linear_model import LinearRegression

from scbmlp.checks import by_cell, control_labels, obs_column, positions, strata_of, whole_number

AGREE = 0.2  # correlation of halves from which on they say the same
Columns = str | Sequence[str] | None


def response_directions(
    adata: AnnData, embedding: str = "X_pert", doses: str = "X_dose", *, strata: str | None = None, cells: Any = None
) -> pd.DataFrame:
    """Return where each compound takes a cell: the least-squares slopes of an embedding on the doses.

    Parameters
    ----------
    adata, embedding, doses
        Cells, and keys of ``obsm``: an embedding (cell x comp), and a DataFrame of doses (cell x compound).
    strata, cells
        Column of ``obs``, each label of which gets slopes and an intercept of its own, such as the cell line; and
        positions or mask of the cells to fit on, all if None.

    Examples
    --------
    >>> targets.dose_coordinates(screen, "perturbation", "dose_value", "control")
    >>> screen.obsm["X_genes"] = screen[:, ["DHRS2", "AURKA"]].to_df()
    >>> effects.response_directions(screen, "X_genes").loc[["AR-42"]].round(1)
           DHRS2  AURKA
    AR-42    2.6   -0.7
    """
    for key in (embedding, doses):
        if key not in adata.obsm:
            raise KeyError(f"{key!r} is not in adata.obsm; there are: {', '.join(adata.obsm)}.")
    table, y = adata.obsm[doses], adata.obsm[embedding]
    rows, labels = positions(cells, adata), strata_of(adata, strata)[0].to_numpy()
    found = {}
    for name, group in pd.Series(rows).groupby(labels[rows]):
        fitted = LinearRegression().fit(table.to_numpy()[group], np.asarray(y)[group])
        found[name] = pd.DataFrame(fitted.coef_.T, table.columns, getattr(y, "columns", None))
    return found["all"] if strata is None else pd.concat(found, names=[strata, None])


def mean_effects(
    scores: pd.DataFrame | pd.Series,
    adata: AnnData,
    perturbation_key: str,
    control: Any,
    *,
    by: Columns = None,
    strata: Columns = None,
    cells: Any = None,
) -> pd.DataFrame:
    """Return the mean score of every condition against control cells of the same strata, with its standard error.

    Scores are in standard deviations of the controls, pooled over the strata. The error has the noise of the controls'
    means, and not what differs from well to well; ``z`` is the effect over it.

    Parameters
    ----------
    scores, adata
        Scores (cell x score) and their cells, matched by name where scores have names.
    perturbation_key, control
        Column of ``obs`` with the perturbation of every cell, and its label for control cells.
    by, strata
        Columns of ``obs`` that make the conditions, such as compound and dose, `perturbation_key` if None; and those
        within which cells are compared.
    cells
        Positions or mask of the cells to average; all if None. They are compared with all control cells.

    Examples
    --------
    >>> score = screen.to_df()["DHRS2"]
    >>> found = effects.mean_effects(score, screen, "perturbation", "control")
    >>> found.loc["AR-42"].round(1)
           effect  error    z  n_cells
    score
    DHRS2     0.5    0.2  3.2       65
    """
    labels, control = control_labels(adata, perturbation_key, control)
    stratum, names = strata_of(adata, strata)
    controls, stratum = (labels == control).to_numpy(), stratum.to_numpy()
    if lacking := sorted(set(stratum) - set(stratum[controls])):
        there = "; ".join(lacking[:5])
        raise ValueError(f"strata={names} have no cell of {control!r} to compare with in {there}; drop these strata.")
    scores = by_cell(scores, adata, "scores")
    means = pd.DataFrame(scores.to_numpy()[controls]).groupby(stratum[controls]).mean()
    centred = scores - means.loc[stratum].to_numpy()
    freedom = max(int(controls.sum()) - len(means), 1)  # as many means were fitted as there are strata
    effects = centred / np.sqrt((centred.to_numpy()[controls] ** 2).sum(axis=0) / freedom)
    per_stratum = pd.Series(stratum[controls]).value_counts()
    by = [by] if isinstance(by, str) else list(by or [perturbation_key])
    keys = [obs_column(adata, key, "by").to_numpy() for key in by]
    rows = positions(cells, adata)
    found = {}
    for name, group in pd.Series(rows).groupby([key[rows] for key in keys], observed=True):
        share = pd.Series(stratum[group]).value_counts(normalize=True)
        of_controls = (share**2 / per_stratum[share.index]).sum()  # squared error of the control means taken off
        here = effects.iloc[group]
        mean, error = here.mean(), np.sqrt(here.var() / len(group) + of_controls)
        table = pd.DataFrame({"effect": mean, "error": error, "z": mean / error, "n_cells": len(group)})
        found[name if len(by) > 1 else name[0]] = table
    return pd.concat(found, names=[*by, "score"])


def additivity(
    values: Any,
    adata: AnnData,
    perturbation_key: str,
    control: Any,
    *,
    n_splits: int = 100,
    random_state: int = 0,
) -> pd.DataFrame:
    """Say how well the effects of two perturbations add up to that of both, and how well they could at most.

    An effect is a mean less that of the controls. Random halves of the cells limit it :cite:p:`spearman1904`.

    Parameters
    ----------
    values
        Expression or an embedding of the cells of `adata` (cell x feature).
    adata, perturbation_key, control
        As in :func:`mean_effects`; the label of two perturbations has a plus between theirs, such as ``A+B``.
    n_splits, random_state
        Number of random halvings to average over, and their seed.

    Returns
    -------
    A row a double perturbation whose two singles are there.

    - ``r``: correlation of the double's effect and the singles' sum. Shared controls raise it, noise lowers it.
    - ``r_halves``: the same between halves, so that no cell is in both.
    - ``ceiling``: what ``r_halves`` reaches if effects add up; near 0, nothing can be said.
    - ``slope``: the double's effect along the sum, in its lengths; NaN where its halves correlate by less than 0.2.

    Examples
    --------
    >>> effects.additivity(screen.to_df(), screen, "perturbation", "control").round(1)
                      n_cells    r  r_halves  ceiling  slope
    AR-42+Hesperadin       65  0.9       0.8      0.8    0.8
    """
    labels, control = control_labels(adata, perturbation_key, control)
    labels = labels.to_numpy()
    x = by_cell(values, adata, "values").to_numpy(np.float64)
    present = set(labels)
    pairs = {name: name.split("+") for name in sorted(present)}
    pairs = {name: pair for name, pair in pairs.items() if len(pair) == 2 and present.issuperset(pair)}
    if not pairs:
        there = f"there are: {', '.join(sorted(present)[:10])}"
        raise ValueError(f"no label of obs[{perturbation_key!r}] is two others joined by '+'; {there}.")
    # In order: a set's differs from process to process, and the halves with it.
    names = sorted({control, *pairs, *sum(pairs.values(), [])})
    cells = {name: np.flatnonzero(labels == name) for name in names}
    if few := [name for name, rows in cells.items() if len(rows) < 2]:
        raise ValueError(f"{', '.join(few)} have a single cell, which cannot be split; drop these labels.")

    def double_and_sum(mean: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
        a, b = pairs[name]
        return mean[name] - mean[control], mean[a] + mean[b] - 2 * mean[control]

    rng, rows = np.random.default_rng(random_state), {name: [] for name in pairs}
    for _ in range(whole_number(n_splits, "n_splits")):
        halves = {name: np.array_split(rng.permutation(found), 2) for name, found in cells.items()}
        mean = {name: np.stack([x[half].mean(axis=0) for half in both]) for name, both in halves.items()}
        for name in pairs:
            double, total = double_and_sum(mean, name)
            r = np.corrcoef(np.vstack([double, total]))
            along = double[0] @ total[1] + double[1] @ total[0]
            rows[name].append([(r[0, 3] + r[1, 2]) / 2, r[0, 1], r[2, 3], along, 2 * total[0] @ total[1]])
    whole = {name: x[found].mean(axis=0) for name, found in cells.items()}
    table = {}
    for name, pair in pairs.items():
        between, of_double, of_sum, along, length = np.mean(rows[name], axis=0)
        table[name] = {
            "n_cells": min(len(cells[key]) for key in (name, *pair, control)),
            "r": np.corrcoef(*double_and_sum(whole, name))[0, 1],
            "r_halves": between,
            "ceiling": np.sqrt(max(of_double, 0) * max(of_sum, 0)),
            "slope": along / length if of_sum >= AGREE else np.nan,
        }
    return pd.DataFrame(table).T.astype({"n_cells": int})


def between_donors(scores: pd.DataFrame, donors: Any, condition: Any) -> pd.DataFrame:
    """Compare the mean scores of donors between two conditions; a donor counts once, however many cells it has.

    Parameters
    ----------
    scores
        Module scores (cell x comp), such as of :meth:`scbmlp.modules.GeneModules.scores`.
    donors, condition
        Donor of every cell, and the condition of that donor (each cell); there are two conditions.

    Returns
    -------
    A row a module: the mean of the donors in each condition, their ``difference``, ``n_donors`` of either, ``p`` of
    Welch's t-test over donors, and ``q`` over modules :cite:p:`benjamini1995`.

    Examples
    --------
    >>> scores = pd.DataFrame({"module_1": [0.0, 1, 1, 2, 4, 5, 5, 6]})
    >>> table = effects.between_donors(
    ...     scores, list("aabbccdd"), ["ill"] * 4 + ["well"] * 4
    ... )
    >>> table[["ill", "well", "difference", "n_donors"]].to_dict("records")
    [{'ill': 1.0, 'well': 5.0, 'difference': 4.0, 'n_donors': '2, 2'}]
    """
    known = pd.DataFrame({"donor": np.asarray(donors, str), "condition": np.asarray(condition, str)}, scores.index)
    of_donor = known.drop_duplicates().set_index("donor")["condition"]
    sizes = of_donor.value_counts()
    if not of_donor.index.is_unique or len(sizes) != 2 or sizes.min() < 2:
        mixed = of_donor.index[of_donor.index.duplicated()].unique()
        raise ValueError(
            f"condition has {len(sizes)} values, {', '.join(f'{name!r} in {n} donors' for name, n in sizes.items())}, "
            f"and {len(mixed)} donors have several; two conditions are needed, each in two donors or more, and a donor "
            f"has one."
        )
    means = scores.groupby(known["donor"].to_numpy()).mean()
    first, second = (means[of_donor[means.index] == name] for name in sorted(sizes.index))
    table = pd.DataFrame({name: part.mean() for name, part in zip(sorted(sizes.index), (first, second), strict=True)})
    table["difference"] = second.mean() - first.mean()
    table["n_donors"] = f"{len(first)}, {len(second)}"
    table["p"] = stats.ttest_ind(first, second, equal_var=False).pvalue
    table["q"] = stats.false_discovery_control(table["p"].fillna(1))
    return table
