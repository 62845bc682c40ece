"""Simulated cells whose programs and interactions are known, for offline builds, tests and planted truth.

Nothing here is a measurement: ``uns["scbmlp_source"]`` of every AnnData says so, and ``uns["truth"]`` keeps its truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.special import expit, ndtri

HERE = Path(__file__).parent
# Marker symbols of each program, strongest first; expression at full activity falls along the list.
PROGRAMS = pd.read_csv(HERE / "simulated_programs.csv", index_col=["species", "program"])["genes"]
MOUSE_PROGRAMS, HUMAN_PROGRAMS = (PROGRAMS[species].to_dict() for species in ("mouse", "human"))

CLUSTER_SIZES = {
    "Ductal": 916, "Ngn3 low EP": 262, "Ngn3 high EP": 642, "Pre-endocrine": 592,
    "Beta": 591, "Alpha": 481, "Delta": 70, "Epsilon": 142,
}  # fmt: skip
TRUNK, FATES = [*CLUSTER_SIZES][:4], [*CLUSTER_SIZES][4:]
BORDERS = (0.0, 0.26, 0.38, 0.58, 0.76, 1.0)  # pseudotime at which each cluster of the trunk, then the fates, begin
FORK = 0.68  # pseudotime at which a pre-endocrine cell leaves the trunk

# What makes the label of planted interactions: how many programs, how many of them interact, and the chance of "on".
RULES = {
    "exclusive-or": (2, 2, lambda a, b: a ^ b),
    "conjunction": (2, 2, lambda a, b: a & b),
    "readout": (2, 2, lambda a, b: a & b),
    "additive": (4, 0, lambda *on: expit(2.0 * (sum(on) - 2))),
    "link": (4, 0, lambda *on: 2.0 ** (sum(on) - 4)),
    "mixed": (4, 2, lambda a, b, *others: expit(4.0 * (a ^ b) - 2 + 2.0 * (sum(others) - 1))),
}

# The screen's compounds by name: target, pathway and plates are real. Mechanism and EC50 (nM) are invented, the latter
# in the order of known potencies; compounds without a mechanism are inert.
COMPOUNDS = pd.read_csv(HERE / "sciplex3_design.csv", index_col="name")
# The 24-hour arm: 48 plates, each of one line and replicate, 8 of each; the first 24 are the first replicate.
PLATE_LINES = np.tile(np.repeat(["K562", "A549", "MCF7"], 8), 2)
DOSES = np.array([10.0, 100.0, 1000.0, 10_000.0])  # nM
# Two plates in a row, a `plate_pair` in each line and replicate, share 47 compounds. Which of the two has a dose, in
# either replicate:
DOSE_PLATES = np.array([[1, 1, 0, 0], [1, 0, 0, 1]])
# Mechanism -> the lines that respond, what full effect does to each program (+ raises, - silences), and the EC50s.
MECHANISMS = {
    name: (
        lines,
        {program: float(change) for program, change in (one.split(":") for one in changes.split())},
        COMPOUNDS.loc[COMPOUNDS["mechanism"] == name, "ec50"].to_dict(),
    )
    for name, lines, changes in pd.read_csv(HERE / "sciplex3_mechanisms.csv", index_col="name").itertuples()
}


def pancreas(seed: int = 0, n_cells: int = 3696, n_genes: int = 10_000) -> AnnData:
    """Simulate the developing mouse pancreas: a lineage from ductal cells to four endocrine fates.

    Programs switch on and off along the tree, and some ductal cells cycle. Four background programs are unrelated to
    cell type. Two sets of target genes rise only where both programs of a pair are active.

    Parameters
    ----------
    seed, n_cells, n_genes
        Seed; numbers of cells, and of genes: about 130 real marker symbols, and ``Sim0001`` and so on.

    Returns
    -------
    Negative-binomial counts (cell x gene, sparse) with ``clusters`` in ``obs``. ``uns["truth"]`` has ``programs``
    (name: genes), ``interactions`` (name: ``programs`` pair and target ``genes``), ``activities`` (cell x program,
    columns in ``program_names``), ``pseudotime`` and ``branch`` (cell), ``cells``.

    Examples
    --------
    >>> cells = simulate.pancreas(n_cells=300, n_genes=200)
    >>> list(cells.uns["truth"]["interactions"])
    ['background_1 x background_2', 'endocrine x background_3']
    """
    _check_at_least(80, n_cells=n_cells)
    rng = np.random.default_rng(seed)
    names, share = np.array([*CLUSTER_SIZES]), np.array([*CLUSTER_SIZES.values()]) / sum(CLUSTER_SIZES.values())
    rare = n_cells * share < 8  # a handful each; the others share what is left
    sizes = np.where(rare, 8.0, (n_cells - 8 * rare.sum()) * share / share[~rare].sum())
    ends = np.round(np.cumsum(sizes)).astype(int)
    cluster = rng.permutation(np.repeat(np.arange(len(names)), np.diff(ends, prepend=0)))

    stage = np.minimum(cluster, len(TRUNK))
    # Annotators draw borders where cells are continuous: the true position scatters around the labelled one.
    position = rng.uniform(np.take(BORDERS, stage), np.take(BORDERS, stage + 1)) + rng.normal(0, 0.008, n_cells)
    fate = rng.choice(FATES, n_cells, p=share[4:] / share[4:].sum())
    fate = np.where(stage == len(TRUNK), names[cluster], fate)
    branch = np.where((stage == len(TRUNK)) | (position > FORK), fate, "trunk")
    pseudotime = np.clip(position, 0, 1)

    # Programs of one cell are not in lock step: each reads the pseudotime with an error of its own.
    def switch(middle: float, width: float = 0.022) -> np.ndarray:
        return expit((pseudotime + rng.normal(0, 0.015, n_cells) - middle) / width)

    phase = 2 * np.pi * rng.random(n_cells)
    cycling = rng.random(n_cells) < 0.5 * (1 - switch(0.33))
    activities = {
        "ductal": 1 - switch(0.35, 0.035),
        "s_phase": cycling * np.maximum(np.sin(phase), 0),
        "g2m_phase": cycling * np.maximum(-np.sin(phase), 0),
        "progenitor": switch(0.345, 0.03) * (1 - switch(0.60)),
        "pre_endocrine": switch(0.60) * (1 - switch(0.81, 0.03)),
        "endocrine": switch(0.64),
    }
    activities |= {fate.lower(): (branch == fate) * switch(0.81, 0.045) for fate in FATES}
    # Background programs are mostly off or on, so that the four corners of each pair are well filled.
    activities |= {f"background_{i}": rng.beta(0.5, 0.5, n_cells) for i in range(1, 5)}
    pairs = [("background_1", "background_2"), ("endocrine", "background_3")]
    counts, genes, truth = _counts_of_programs(rng, n_genes, MOUSE_PROGRAMS, activities, pairs)
    obs = {
        "clusters": pd.Categorical.from_codes(cluster, names),
        "clusters_coarse": pd.Categorical.from_codes(stage, [*TRUNK, "Endocrine"]),
    }
    return _cells("pancreas", seed, counts, obs, genes, truth | {"pseudotime": pseudotime, "branch": branch})


def planted_interactions(
    seed: int = 0,
    n_cells: int = 3000,
    n_genes: int = 2000,
    n_programs: int = 20,
    genes_per_program: int = 25,
    *,
    rule: str = "exclusive-or",
    noise: float = 1.0,
    depth: float | None = None,
) -> AnnData:
    """Simulate cells whose label a few gene programs make, by default the exclusive-or of two.

    Programs are independent and on in half of the cells. Single genes are noisy, the mean of a program's genes is
    not. Neither program of an exclusive-or alone says anything about the label: only an interaction predicts it.

    Parameters
    ----------
    seed, n_cells, n_genes
        Seed; numbers of cells, and of genes; those in no program are noise.
    n_programs, genes_per_program
        Number of programs, of which two or four, drawn at random, make the label; number of genes that each raises.
    rule
        ``"exclusive-or"``: one program of a pair is on, and not the other; ``"conjunction"``: both are; ``"readout"``:
        the same, and one gene that is in no program is switched on by it; ``"additive"``: the log odds rise by 2 with
        each of four programs; ``"link"``: the chance doubles with each of four; ``"mixed"``: the log odds rise by 4
        where the exclusive-or of a pair holds, and by 2 with each of two others.
    noise
        Standard deviation of a gene's noise, where 1 is what a program adds to it.
    depth
        Mean counts of a cell, which are drawn, scaled to one total and log-transformed; if None, there are none.

    Returns
    -------
    Non-negative expression (cell x gene, float32, like log-normalised counts) with ``off`` or ``on`` in
    ``obs["label"]``. ``uns["truth"]`` has ``programs`` (name: genes), ``causes`` (programs that make the label),
    their ``genes``, ``pair`` (the two that interact, if any), ``readout`` (that gene, or none), ``state`` (cell x
    program, 0 or 1, columns in ``program_names``) and ``cells``.

    Examples
    --------
    >>> cells = simulate.planted_interactions(0, 400, 600, rule="conjunction")
    >>> cells.uns["truth"]["pair"].tolist()
    ['program_10', 'program_14']
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is unknown; choose one of {', '.join(map(repr, RULES))}.")
    n_causes, n_interacting, chance = RULES[rule]
    in_programs = n_programs * genes_per_program
    _check_at_least(8, n_cells=n_cells)
    _check_at_least(n_causes, n_programs=n_programs)
    _check_at_least(1, genes_per_program=genes_per_program, depth=1 if depth is None else depth)
    _check_at_least(in_programs + (rule == "readout"), n_genes=n_genes)
    _check_at_least(0, noise=noise)
    rng = np.random.default_rng(seed)
    names, genes = _numbered("program_", n_programs, width=2), _numbered("Sim", n_genes)
    members = np.sort(rng.permutation(n_genes)[:in_programs].reshape(n_programs, genes_per_program))
    pair = np.sort(rng.choice(n_programs, 2, replace=False))
    state = np.stack([rng.permutation(n_cells) % 2 for _ in names], axis=1)
    # The four states of the pair are equally frequent: the label is balanced, and independent of each program.
    state[:, pair] = np.stack(np.divmod(rng.permutation(n_cells) % 4, 2), axis=1)

    # As much between off and on as the noise, by default: weak in each gene, clear in the mean of 25.
    step = 0.5
    x = rng.normal(rng.uniform(1, 2, n_genes), step * noise, (n_cells, n_genes))
    x[:, members.ravel()] += step * np.repeat(state, genes_per_program, axis=1)
    added = rng.choice(np.setdiff1d(np.arange(n_programs), pair), n_causes - 2, replace=False)
    causes = np.append(pair, added)
    on = chance(*state[:, causes].T) > (rng.random(n_cells) if len(added) else 0)
    readout = np.setdiff1d(np.arange(n_genes), members)[: int(rule == "readout")]
    x[:, readout] += 6 * step * on[:, None]
    x = np.maximum(x, 0)
    if depth is not None:
        rate = np.expm1(x)
        scale = rate.sum(axis=1).mean()
        counts = rng.poisson(rate * depth / scale)
        x = np.log1p(counts * scale / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    truth = {
        "programs": dict(zip(names, genes[members], strict=True)),
        "causes": names[np.sort(causes)],
        "pair": names[pair[:n_interacting]],
        "genes": genes[np.sort(members[causes], axis=None)],
        "readout": genes[readout],
        "program_names": names,
        "state": state,
    }
    obs = {"label": pd.Categorical.from_codes(on.astype(int), ["off", "on"])}
    return _cells("planted_interactions", seed, x.astype(np.float32), obs, genes, truth)


def sciplex3(
    seed: int = 0, n_cells: int = 5000, n_genes: int = 2000, combinations: Sequence[tuple[str, str]] = ()
) -> AnnData:
    """Simulate a chemical screen with the design of sci-Plex3 :cite:p:`srivatsan2020`: 3 lines, 188 compounds, vehicle.

    Real are the compounds' names, targets and pathways, the four doses, and which of the 48 plates of the 24-hour arm
    has a compound at a dose. All else is invented. A few compounds change the programs of their mechanism along a
    Hill curve of the dose, in the lines that respond; all others do nothing. One set of target genes rises only where
    the response to HDAC inhibitors meets a background program, another only where it meets K562's own. As in the real
    file, vehicle's dose is 0 or missing, and 4% of the cells have few counts. Unlike in it, conditions are about
    equally large, half of the cells are MCF7, and 8% are vehicle.

    Parameters
    ----------
    seed, n_cells, n_genes
        Seed; numbers of cells, and of genes: about 140 real symbols, and ``Sim0001`` and so on.
    combinations
        Pairs of compounds, by ``plain`` name, that act together, on the plates of the first; called ``A+B``.

    Returns
    -------
    Negative-binomial counts (cell x gene, sparse) with the columns of the real file in ``obs``; vehicle is ``control``.
    ``uns["truth"]`` has what that of :func:`pancreas` has of programs, ``compounds`` (arrays ``name``, ``plain`` name,
    ``target``, ``pathway``, ``mechanism`` or ``none``, ``active``, ``ec50`` in nM, infinite for an inert one),
    ``responding_lines`` (mechanism: lines), ``plate_depth`` (of the plates in ``plates``) and ``low_count`` (cell).

    Examples
    --------
    >>> cells = simulate.sciplex3(n_cells=1000, n_genes=200)
    >>> known = pd.DataFrame(cells.uns["truth"]["compounds"])
    >>> known.loc[known["mechanism"] == "HSP90", "plain"].tolist()
    ['Luminespib', 'Alvespimycin', 'Tanespimycin']
    """
    _check_at_least(600, n_cells=n_cells)
    rng = np.random.default_rng(seed)
    plain = COMPOUNDS.index.str.split(" (", regex=False).str[0]
    names = dict(zip(plain, COMPOUNDS.index, strict=True))
    if unknown := sorted({name for pair in combinations for name in pair} - names.keys()):
        raise ValueError(f"combinations has {unknown}, which are no compounds; pass pairs of {', '.join(names)}.")
    # The compounds of every treatment, a row each; then a table of treatments like that of compounds.
    taken = pd.Series([*COMPOUNDS.index, *([names[one] for one in pair] for pair in combinations)]).explode()
    of_all = {"plate_pair": "first"} | dict.fromkeys(["name", "target", "pathway"], "+".join)
    treatments = COMPOUNDS.loc[taken].reset_index().groupby(taken.index).agg(of_all)
    treatment = rng.integers(len(treatments), size=n_cells)
    # The first 8% in a random order are vehicle; going round spreads them over the plates, twice over those of MCF7.
    order = rng.permutation(n_cells)
    vehicle = order < 0.08 * n_cells
    turns = np.append(np.arange(len(PLATE_LINES)), np.flatnonzero(PLATE_LINES == "MCF7"))
    plate = turns[order % len(turns)]
    replicate, line = plate // 24, PLATE_LINES[plate]
    step = rng.integers(len(DOSES), size=n_cells)
    plate_pair = treatments["plate_pair"].to_numpy()[treatment] - 1
    plate = np.where(vehicle, plate, plate // 8 * 8 + 2 * plate_pair + DOSE_PLATES[replicate, step])
    dose = np.where(vehicle, 0, DOSES[step])

    activities = _screen_activities(rng, line, dose, taken, treatment)
    pairs = [("hdac_response", "background_1"), ("hdac_response", "line_K562")]
    plate_depth = rng.lognormal(0, 0.15, len(PLATE_LINES))
    low_count = rng.random(n_cells) < 0.04
    depth = plate_depth[plate] * np.where(low_count, 0.1, 1)
    counts, genes, truth = _counts_of_programs(rng, n_genes, HUMAN_PROGRAMS, activities, pairs, depth)

    plates = np.array([f"plate{i}" for i in range(1, len(PLATE_LINES) + 1)])
    codes = np.where(vehicle, len(treatments), treatment)
    obs = {
        "perturbation": pd.Categorical.from_codes(codes, [*treatments["name"], "control", "Vehicle"]),
        "dose_value": np.where(vehicle & (replicate == 1), np.nan, dose),
        "dose_unit": pd.Categorical(["nM"] * n_cells),
        "cell_line": pd.Categorical(line),
        "pathway": pd.Categorical(np.append(treatments["pathway"], "Vehicle")[codes]),
        "target": pd.Categorical(np.append(treatments["target"], "Vehicle")[codes]),
        "replicate": pd.Categorical.from_codes(replicate, ["rep1", "rep2"]),
        "plate": pd.Categorical.from_codes(plate, plates),
        "ncounts": counts.sum(axis=1).A1,
    }
    known = COMPOUNDS.drop(columns="plate_pair").assign(active=np.isfinite(COMPOUNDS["ec50"]), plain=plain)
    truth |= {
        "compounds": {key: np.array(column.tolist()) for key, column in known.reset_index().items()},
        "responding_lines": {name: np.array(lines.split()) for name, (lines, _, _) in MECHANISMS.items()},
        "plates": plates,
        "plate_depth": plate_depth,
        "low_count": low_count,
    }
    return _cells("sciplex3", seed, counts, obs, genes, truth)


def _screen_activities(
    rng: np.random.Generator, line: np.ndarray, dose: np.ndarray, taken: pd.Series, treatment: np.ndarray
) -> dict[str, np.ndarray]:
    """Return how active each program is (cell), after what the compounds do."""
    n_cells = len(dose)
    activities = {name: np.zeros(n_cells) for name in HUMAN_PROGRAMS}
    # Untreated cells are anywhere in the cell cycle, signal, and live.
    activities["cell_cycle"] = rng.beta(1, 1.5, n_cells)
    between = {"mapk_output": (0.5, 0.8), "mtor_output": (0.5, 0.8),
               "acetyl_coa": (0.1, 0.4), "sterol_synthesis": (0.3, 0.5)}  # fmt: skip
    for name, (low, high) in between.items():
        activities[name] = rng.uniform(low, high, n_cells)
    activities |= {f"line_{name}": (line == name).astype(float) for name in np.unique(PLATE_LINES)}
    for lines, changes, potencies in MECHANISMS.values():
        for name, ec50 in potencies.items():
            has_it = np.isin(treatment, taken.index[taken == name])
            given = np.flatnonzero(has_it & np.isin(line, lines.split()))
            # Hill curve of the dose, weaker or stronger from cell to cell.
            effect = dose[given] / (dose[given] + ec50) * rng.uniform(0.6, 1, len(given))
            for program, change in changes.items():
                # A raise moves the activity towards 1, a silencing towards 0: it never leaves [0, 1].
                goal = float(change > 0)
                activities[program][given] += abs(change) * effect * (goal - activities[program][given])
    activities["p53_response"][line == "K562"] = 0  # K562 has lost p53
    return activities | {f"background_{i}": rng.beta(0.5, 0.5, n_cells) for i in range(1, 3)}


def _check_at_least(minimum: float, **given: float) -> None:
    """Raise an error for a number that is too small for what is simulated."""
    for name, value in given.items():
        if value < minimum:
            raise ValueError(f"{name}={value} is too small for what is simulated; pass {minimum} or more.")


def _numbered(prefix: str, n: int, width: int = 4) -> np.ndarray:
    """Return names with numbers of one width, from 1 on."""
    return np.array([f"{prefix}{i:0{max(width, len(str(n)))}d}" for i in range(1, n + 1)])


def _cells(name: str, seed: int, x: Any, obs: Mapping[str, Any], genes: np.ndarray, truth: dict[str, Any]) -> AnnData:
    """Return simulated cells that say what they are."""
    cells = _numbered("sim-", x.shape[0])
    uns = {"truth": truth | {"cells": cells}, "scbmlp_source": {"name": name, "kind": "simulated", "seed": seed}}
    return AnnData(x, obs=pd.DataFrame(obs, index=cells), var=pd.DataFrame(index=genes), uns=uns)


def _counts_of_programs(
    rng: np.random.Generator,
    n_genes: int,
    named: dict[str, str],
    activities: dict[str, np.ndarray],
    pairs: Sequence[tuple[str, str]],
    depth: np.ndarray | float = 1.0,
) -> tuple[sparse.csr_matrix, np.ndarray, dict[str, Any]]:
    """Return counts of log rate = a gene's base + activities (cell) of programs + products of pairs, genes, truth."""
    products = {f"{a} x {b}": activities[a] * activities[b] for a, b in pairs}
    terms = activities | products
    markers = [named.get(name, "").split() for name in terms]
    n_named = sum(map(len, markers))
    _check_at_least(n_named + 3 * len(terms), n_genes=n_genes)

    # Each set also takes simulated genes, 1% of them. Columns are in random order, so that position tells nothing.
    n_each = max(3, (n_genes - n_named) // 100)
    first, rest = np.split(rng.permutation(n_genes), [n_named])
    symbols = np.empty(n_genes, dtype=object)
    symbols[first] = sum(markers, [])
    symbols[np.sort(rest)] = _numbered("Sim", len(rest))
    # Heavy-tailed means: log-normal quantiles in random order, so that one lucky gene does not set a seed's depth.
    base = -3.65 + 2.4 * ndtri((rng.permutation(n_genes) + 0.5) / n_genes)
    loading = np.zeros((len(terms), n_genes))
    sets = {}
    owns = np.split(first, np.cumsum(list(map(len, markers)))[:-1])
    others = rest[: n_each * len(terms)].reshape(len(terms), n_each)
    for name, weights, own, other in zip(terms, loading, owns, others, strict=True):
        on = 25 * 0.82 ** np.arange(len(own))
        base[own] = np.log(0.02 * on + 0.01)  # never quite off: ambient RNA
        weights[own] = np.log(on) - base[own]
        base[other] = rng.normal(-2.3, 1, n_each)
        weights[other] = rng.uniform(1.5, 2.5, n_each) if name in products else rng.uniform(0.3, 1.5, n_each)
        sets[name] = symbols[np.append(own, np.sort(other))].astype(str)

    activity = np.stack([*terms.values()], axis=1)
    counts = _negative_binomial(rng, depth * rng.lognormal(0, 0.35, len(activity)), base, activity, loading)
    truth = {
        "programs": {name: sets[name] for name in activities},
        "interactions": {
            name: {"programs": np.array(pair), "genes": sets[name]} for name, pair in zip(products, pairs, strict=True)
        },
        "program_names": np.array([*activities]),
        "activities": activity[:, : len(activities)].astype(np.float32),
    }
    return counts, symbols, truth


def _negative_binomial(
    rng: np.random.Generator, depth: np.ndarray, base: np.ndarray, activity: np.ndarray, loading: np.ndarray
) -> sparse.csr_matrix:
    """Draw counts (cell x gene) of log rate ``base + activity @ loading`` in blocks: no dense matrix of all cells."""
    size = 3.0  # of the negative binomial: variance = mean + mean^2 / size
    loaded = np.flatnonzero(loading.any(axis=0))
    rows = max(1, 2_000_000 // len(base))
    blocks = []
    for start in range(0, len(depth), rows):
        cells = slice(start, start + rows)
        rate = depth[cells, None] * np.exp(base)
        rate[:, loaded] *= np.exp(activity[cells] @ loading[:, loaded])
        rate *= rng.standard_gamma(size, rate.shape, dtype=np.float32) / size
        blocks.append(sparse.csr_matrix(rng.poisson(rate), dtype=np.float32))
    return sparse.vstack(blocks, format="csr")
