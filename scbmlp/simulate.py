"""Simulated cells whose programs and interactions are known, for offline builds, tests and planted truth.

Nothing here is a measurement: ``uns["scbmlp_source"]`` of every AnnData says so, and ``uns["truth"]`` keeps its truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.special import expit, ndtri

# Marker symbols of each program, strongest first; expression at full activity falls along the list.
MOUSE_PROGRAMS = {
    "ductal": "Spp1 Krt18 Mt1 Dbi Mdk Sox9 Anxa2 Krt19 Ccnd1 Clu Krt8 Mt2 Vim Sparc Cldn6 Bicc1 Cldn10 Sdf2l1 Hes1",
    "s_phase": "Pcna Mcm5 Mcm6 Tyms Mcm2 Mcm3 Slbp Gins2 Rrm2 Uhrf1 Cdc6",
    "g2m_phase": "Top2a Ube2c Mki67 Cenpf Cdk1 Birc5 Tubb4b Ccnb1 Cdc20 Aurka Nusap1 Ccnb2",
    "progenitor": "Neurog3 Sox4 Gadd45a Btbd17 Mfng Hes6 Cdkn1a Neurod2 Btg2 Smarcd2 Gadd45g Numbl Tead2 Dll1",
    "pre_endocrine": "Fev Cck Tmsb4x Vwa5b2 Pax4 Neurod1 Runx1t1 Cryba2 Aplp1 Celf3",
    "endocrine": "Chgb Chga Pyy Cpe Pcsk1n Ttr Scg2 Fam183b Tm4sf4 Scg3 Isl1 Pax6 Scgn Meis2",
    "beta": "Ins1 Iapp Ins2 Nnat Ppp1r1a Pcsk2 Gng12 Sytl4 Mafb Pdx1 Nkx6-1 G6pc2 Ero1lb Adra2a Dlk1 Mnx1 Slc30a8",
    "alpha": "Gcg Peg10 Slc38a5 Irx2 Smarca1 Tmem27 Arx Gast Irx1 Wnk3 Pou3f4 Rnf130",
    "delta": "Sst Rbp4 Hhex Cd24a Arg1 Mest Spock3 Frzb",
    "epsilon": "Ghrl Maged2 Anpep Irs4 Mboat4 Arhgap36 Lurap1l Acsl1 Card19 Bex2",
}
CLUSTER_SIZES = {
    "Ductal": 916, "Ngn3 low EP": 262, "Ngn3 high EP": 642, "Pre-endocrine": 592,
    "Beta": 591, "Alpha": 481, "Delta": 70, "Epsilon": 142,
}  # fmt: skip
TRUNK, FATES = tuple(CLUSTER_SIZES)[:4], tuple(CLUSTER_SIZES)[4:]
BORDERS = (0.0, 0.26, 0.38, 0.58, 0.76, 1.0)  # pseudotime at which each cluster of the trunk, then the fates, begin
FORK = 0.68  # pseudotime at which a pre-endocrine cell leaves the trunk

# What makes the label of planted interactions -> number of programs that it takes.
RULES = {"exclusive-or": 2, "conjunction": 2, "readout": 2, "additive": 4, "link": 4, "mixed": 4}

HUMAN_PROGRAMS = {
    "hdac_response": "DHRS2 CALN1 COL26A1 RGL1 ACSBG1 TENM1 KCNAB1 ATP1A3 SYT11 KIF5C GNG7 CRISPLD2",
    "acetyl_coa": "ACLY ACSS2 SLC25A1 CS IDH1 ACO1 GLS SLC2A3 ACSL3 HADHA HADHB SIRT2",
    "sterol_synthesis": "INSIG1 HMGCS1 IDI1 HMGCR LDLR SQLE SREBF1 FDFT1 SC5D MSMO1",
    "growth_arrest": "CDKN1A GDF15 BTG2 TP53INP1 GADD45A BTG1 SESN1 SERTAD1",
    "p53_response": "MDM2 PHLDA3 FAS TP53I3 FDXR PMAIP1 BBC3 ZMAT3 TIGAR RPS27L",
    "cell_cycle": "TOP2A AURKA CCNB1 MKI67 CENPF CDK1 PLK1 BIRC5 UBE2C TPX2 CDC20 CCNB2 AURKB",
    "heat_shock": "HSPA1A HSP90AA1 HSPA8 HSPH1 DNAJB1 HSPD1 HSPA1B HSP90AB1 BAG3 HSPE1 AHSA1 HSPB1",
    "mapk_output": "DUSP6 SPRY2 FOSL1 ETV4 ETV5 SPRY4 PHLDA1 EGR1 IER3 CCND1 SPRED2 DUSP4",
    "mtor_output": "LDHA ENO1 PGK1 ALDOA PKM SLC2A1 HK2 NPM1 EEF2 EIF4EBP1 PSAT1 ASNS",
    "glucocorticoid": "FKBP5 TSC22D3 ZBTB16 PER1 ANGPTL4 KLF9 CEBPD MT2A SCNN1A ERRFI1",
    "line_A549": "AKR1B10 AKR1C1 ALDH1A1 TXNRD1 G6PD NQO1 FGG SERPINA1",
    "line_K562": "HBG1 HBZ HBG2 GYPA ALAS2 GATA1 LMO2 BLVRB TFR2",
    "line_MCF7": "TFF1 KRT19 GREB1 PGR ESR1 GATA3 TFF3 XBP1 AREG",
}
# The screen's 24-hour arm: 48 plates, each of one line and replicate, 8 of each; 1 to 24 are the first replicate.
PLATE_LINES = ("K562", "A549", "MCF7")
N_PLATES = 48
# Two plates in a row, four times in each line and replicate, share 47 compounds. Which of the two has a compound's four
# doses, lowest first, in either replicate:
DOSE_PLATES = np.array([[1, 1, 0, 0], [1, 0, 0, 1]])
# Mechanism -> the lines that respond, what full effect does to each program (+ raises, - silences), and each compound's
# EC50 in nM (invented, in the order of known potencies). The screen's other compounds are inert, siblings too.
MECHANISMS = {
    "HDAC": ("A549 K562 MCF7",
             {"hdac_response": 1, "acetyl_coa": 0.7, "sterol_synthesis": 0.8, "growth_arrest": 0.8, "cell_cycle": -0.9},
             {"Quisinostat (JNJ-26481585) 2HCl": 10, "CUDC-907": 50, "Trichostatin A (TSA)": 60,
              "Panobinostat (LBH589)": 90, "Dacinostat (LAQ824)": 150, "Abexinostat (PCI-24781)": 210, "CUDC-101": 300,
              "Givinostat (ITF2357)": 500, "Belinostat (PXD101)": 800, "AR-42": 900, "Resminostat": 1300,
              "Pracinostat (SB939)": 1500, "M344": 3000, "Mocetinostat (MGCD0103)": 4500, "Entinostat (MS-275)": 6000,
              "Tacedinaline (CI994)": 20000}),
    "Aurora Kinase": ("A549 K562 MCF7", {"growth_arrest": 1, "p53_response": 0.7, "cell_cycle": -0.7},
                      {"Hesperadin": 100, "Barasertib (AZD1152-HQPA)": 150, "Alisertib (MLN8237)": 250,
                       "Danusertib (PHA-739358)": 300, "Tozasertib (VX-680, MK-0457)": 600}),
    "PLK": ("A549 K562 MCF7", {"growth_arrest": 0.5, "cell_cycle": 0.8},  # cells pile up in mitosis
            {"Rigosertib (ON-01910)": 40}),
    "CDK": ("A549 K562 MCF7", {"growth_arrest": 0.7, "cell_cycle": -1}, {"Flavopiridol HCl": 150, "BMS-265246": 400}),
    "MDM2": ("A549 MCF7", {"p53_response": 1, "growth_arrest": 0.9, "cell_cycle": -0.6},
             {"JNJ-26854165 (Serdemetan)": 60}),
    "mTOR": ("A549 K562 MCF7", {"mtor_output": -0.9, "sterol_synthesis": -0.8, "cell_cycle": -0.6},
             {"Temsirolimus (CCI-779, NSC 683864)": 15}),
    "HSP90": ("A549 K562 MCF7", {"heat_shock": 1, "mapk_output": -0.5},
              {"Luminespib (AUY-922, NVP-AUY922)": 30, "Alvespimycin (17-DMAG) HCl": 200,
               "Tanespimycin (17-AAG)": 400}),
    "MEK": ("A549 K562", {"mapk_output": -1, "cell_cycle": -0.4}, {"Trametinib (GSK1120212)": 20}),
    "Glucocorticoid Receptor": ("A549", {"glucocorticoid": 1, "growth_arrest": 0.7}, {"Triamcinolone Acetonide": 15}),
}  # fmt: skip


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
    Negative-binomial counts (cell x gene, sparse) with ``clusters`` and ``clusters_coarse`` in ``obs``.
    ``uns["truth"]`` has ``programs`` (name: genes), ``interactions`` (name: ``programs`` pair and target ``genes``),
    ``activities`` (cell x program, columns in ``program_names``), ``pseudotime`` and ``branch`` (cell), ``cells``.

    Examples
    --------
    >>> cells = simulate.pancreas(n_cells=300, n_genes=200)
    >>> list(cells.uns["truth"]["interactions"])
    ['background_1 x background_2', 'endocrine x background_3']
    """
    _check_at_least("n_cells", n_cells, 80, "are needed for a handful of cells in every cluster")
    rng = np.random.default_rng(seed)
    clusters, pseudotime, branch = _lineage(rng, n_cells)

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
    pairs = {"background_1 x background_2": ("background_1", "background_2"),
             "endocrine x background_3": ("endocrine", "background_3")}  # fmt: skip
    adata = _counts_of_programs(rng, n_genes, MOUSE_PROGRAMS, activities, pairs)
    categories = list(CLUSTER_SIZES)
    adata.obs["clusters"] = pd.Categorical(clusters, categories)
    coarse = np.where(np.isin(clusters, FATES), "Endocrine", clusters)
    adata.obs["clusters_coarse"] = pd.Categorical(coarse, [*TRUNK, "Endocrine"])
    adata.uns["truth"] |= {"pseudotime": pseudotime, "branch": branch}
    adata.uns["scbmlp_source"] = {"name": "pancreas", "kind": "simulated", "seed": seed}
    return adata


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
        What makes the label.

        - ``"exclusive-or"``: one program of a pair is on, and not the other;
        - ``"conjunction"``: both are on;
        - ``"readout"``: the same, and one gene that is in no program is switched on by it;
        - ``"additive"``: the log odds rise by 2 with each of four programs;
        - ``"link"``: the chance doubles with each of four programs, a curve of their number and no interaction;
        - ``"mixed"``: the log odds rise by 4 where the exclusive-or of a pair holds, and by 2 with each of two others.
    noise
        Standard deviation of a gene's noise, where 1 is what a program adds to it.
    depth
        Mean counts of a cell, which are drawn, scaled to one total and log-transformed; if None, there are none.

    Returns
    -------
    Non-negative expression (cell x gene, float32, like log-normalised counts) with ``off`` or ``on`` in
    ``obs["label"]``. ``uns["truth"]`` has ``programs`` (name: genes), ``causes`` (programs that make the label),
    their ``genes``, ``pair`` (the two programs that interact, none for ``additive`` and ``link``), ``state`` (cell x
    program, 0 or 1, columns in ``program_names``), ``cells`` and ``readout`` (that gene, or none).

    Examples
    --------
    >>> cells = simulate.planted_interactions(0, 400, 600, rule="conjunction")
    >>> cells.uns["truth"]["pair"].tolist()
    ['program_10', 'program_14']
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is unknown; choose one of {', '.join(map(repr, RULES))}.")
    _check_at_least("n_cells", n_cells, 8, "are needed to fill the four states of the pair")
    _check_at_least("n_programs", n_programs, RULES[rule], f"are needed for rule={rule!r}")
    _check_at_least("genes_per_program", genes_per_program, 1, "is needed")
    in_use = n_programs * genes_per_program + (rule == "readout")
    _check_at_least("n_genes", n_genes, in_use, "are needed by n_programs x genes_per_program and a readout")
    _check_at_least("noise", noise, 0, "is a standard deviation")
    if depth is not None:
        _check_at_least("depth", depth, 1, "count a cell is needed")
    rng = np.random.default_rng(seed)
    names = _numbered("program_", n_programs, width=2)
    genes = _numbered("Sim", n_genes)
    members = rng.permutation(n_genes)[: n_programs * genes_per_program].reshape(n_programs, genes_per_program)
    pair = np.sort(rng.choice(n_programs, 2, replace=False))
    state = np.stack([rng.permutation(n_cells) % 2 for _ in names], axis=1)
    # The four states of the pair are equally frequent: the label is balanced, and independent of each program.
    corner = rng.permutation(n_cells) % 4
    state[:, pair] = np.stack([corner // 2, corner % 2], axis=1)

    # As much between off and on as the noise, by default: weak in each gene, clear in the mean of 25.
    step = 0.5
    x = rng.normal(rng.uniform(1, 2, n_genes), step * noise, (n_cells, n_genes))
    for program, columns in enumerate(members):
        x[:, columns] += step * state[:, [program]]
    causes, on = _planted_label(rng, rule, state, pair)
    readout = np.setdiff1d(np.arange(n_genes), members)[: int(rule == "readout")]
    x[:, readout] += 6 * step * on[:, None]
    x = np.maximum(x, 0)
    if depth is not None:
        rate = np.expm1(x)
        scale = rate.sum(axis=1).mean()
        counts = rng.poisson(rate * depth / scale)
        x = np.log1p(counts * scale / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    label = pd.Categorical(np.where(on, "on", "off"), ["off", "on"])
    obs = pd.DataFrame({"label": label}, index=_numbered("sim-", n_cells))
    adata = AnnData(x.astype(np.float32), obs=obs, var=pd.DataFrame(index=genes))
    adata.uns["truth"] = {
        "programs": {name: genes[np.sort(columns)] for name, columns in zip(names, members, strict=True)},
        "causes": names[causes],
        "pair": names[[] if rule in ("additive", "link") else pair],
        "genes": genes[np.sort(members[causes].ravel())],
        "readout": genes[readout],
        "program_names": names,
        "state": state,
        "cells": adata.obs_names.to_numpy(str),
    }
    adata.uns["scbmlp_source"] = {"name": "planted_interactions", "kind": "simulated", "seed": seed}
    return adata


def sciplex3(
    seed: int = 0, n_cells: int = 5000, n_genes: int = 2000, combinations: Sequence[tuple[str, str]] = ()
) -> AnnData:
    """Simulate a chemical screen with the design of sci-Plex3 :cite:p:`srivatsan2020`: 3 lines, 188 compounds, vehicle.

    Real are the compounds' names, targets and pathways, the four doses, and which of the 48 plates of the 24-hour arm
    has a compound at a dose. All else is invented. A few compounds change the programs of their mechanism along a
    Hill curve of the dose, in the lines that respond; all others do nothing. One set of target genes rises only where
    the response to HDAC inhibitors meets a background program, another only where it meets K562's own. As in the real
    file, vehicle's dose is 0 or missing, 4% of the cells have few counts, and ``perturbation`` has categories without a
    cell. Unlike in it, conditions are about equally large, half of the cells are MCF7, and 8% are vehicle.

    Parameters
    ----------
    seed, n_cells, n_genes
        Seed; numbers of cells, and of genes: about 140 real symbols, and ``Sim0001`` and so on.
    combinations
        Pairs of compounds, by ``plain`` name, that act together, on the plates of the first; called ``A+B``.

    Returns
    -------
    Negative-binomial counts (cell x gene, sparse) with ``perturbation`` (vehicle is ``control``), ``dose_value``,
    ``dose_unit``, ``cell_line``, ``pathway``, ``target``, ``replicate``, ``plate`` and ``ncounts`` in ``obs``.
    ``uns["truth"]`` has what that of :func:`pancreas` has of programs, ``compounds`` (arrays ``name``, ``plain`` name,
    ``target``, ``pathway``, ``mechanism`` or ``none``, ``active``, ``ec50`` in nM, infinite for an inert one),
    ``responding_lines`` (mechanism: lines), ``plate_depth`` (of the plates in ``plates``) and ``low_count`` (cell).

    Examples
    --------
    >>> cells = simulate.sciplex3(n_cells=1000, n_genes=200)
    >>> known = pd.DataFrame(cells.uns["truth"]["compounds"])
    >>> known.loc[known["mechanism"] == "HSP90", ["plain", "ec50"]]
               plain   ec50
    26    Luminespib   30.0
    27  Alvespimycin  200.0
    28  Tanespimycin  400.0
    """
    _check_at_least("n_cells", n_cells, 600, "are needed for vehicle cells on every plate")
    rng = np.random.default_rng(seed)
    compounds = _compounds()
    names = dict(zip(compounds["plain"], compounds.index, strict=True))
    if unknown := sorted({name for pair in combinations for name in pair} - names.keys()):
        raise ValueError(f"combinations has {unknown}, which are no compounds; pass pairs of {', '.join(names)}.")
    treatments = [(name,) for name in compounds.index]
    treatments += [tuple(names[plain] for plain in pair) for pair in combinations]
    treatment = rng.integers(len(treatments), size=n_cells)
    first = compounds.loc[[taken[0] for taken in treatments]]
    # The first 8% in a random order are vehicle; going round spreads them over the plates, twice over those of MCF7.
    order = rng.permutation(n_cells)
    vehicle = order < 0.08 * n_cells
    line_of_plate = np.take(PLATE_LINES, np.arange(N_PLATES) % 24 // 8)
    turns = np.concatenate([np.arange(N_PLATES), np.flatnonzero(line_of_plate == "MCF7")])
    plate = turns[order % len(turns)]
    replicate, line = plate // 24, line_of_plate[plate]
    step = rng.integers(4, size=n_cells)  # of the four doses
    pair = first["plate_pair"].to_numpy()[treatment] - 1
    plate = np.where(vehicle, plate, plate // 8 * 8 + 2 * pair + DOSE_PLATES[replicate, step])
    doses = np.stack(first["doses_nM"].str.split()).astype(float)
    dose = np.where(vehicle, 0, doses[treatment, step])

    activities = _screen_activities(rng, line, dose, treatments, treatment)
    pairs = {f"hdac_response x {other}": ("hdac_response", other) for other in ("background_1", "line_K562")}
    plate_depth = rng.lognormal(0, 0.15, N_PLATES)
    low_count = rng.random(n_cells) < 0.04
    depth = plate_depth[plate] * np.where(low_count, 0.1, 1)
    adata = _counts_of_programs(rng, n_genes, HUMAN_PROGRAMS, activities, pairs, depth)

    def label(column: pd.Series) -> np.ndarray:
        return np.array(["+".join(column[list(taken)]) for taken in treatments])

    codes = np.where(vehicle, len(treatments), treatment)
    labels = [*label(compounds.index.to_series()), "control", "Vehicle"]
    adata.obs["perturbation"] = pd.Categorical.from_codes(codes, labels)
    adata.obs["dose_value"] = np.where(vehicle & (replicate == 1), np.nan, dose)
    adata.obs["dose_unit"] = pd.Categorical(["nM"] * n_cells)
    adata.obs["cell_line"] = pd.Categorical(line)
    for column in ("pathway", "target"):
        adata.obs[column] = pd.Categorical(np.where(vehicle, "Vehicle", label(compounds[column])[treatment]))
    adata.obs["replicate"] = pd.Categorical(np.take(["rep1", "rep2"], replicate))
    plates = np.array([f"plate{i}" for i in range(1, N_PLATES + 1)])
    adata.obs["plate"] = pd.Categorical.from_codes(plate, plates)
    adata.obs["ncounts"] = np.asarray(adata.X.sum(axis=1)).ravel()
    known = compounds.drop(columns=["plate_pair", "doses_nM"]).reset_index()
    adata.uns["truth"] |= {
        "compounds": {key: np.array(column.tolist()) for key, column in known.items()},
        "responding_lines": {mechanism: np.array(spec[0].split()) for mechanism, spec in MECHANISMS.items()},
    } | {"plates": plates, "plate_depth": plate_depth, "low_count": low_count}
    adata.uns["scbmlp_source"] = {"name": "sciplex3", "kind": "simulated", "seed": seed}
    return adata


def _planted_label(
    rng: np.random.Generator, rule: str, state: np.ndarray, pair: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return which programs make the label of a rule, and in which cells it is on."""
    first, second = state[:, pair].T == 1
    if RULES[rule] == 2:
        return pair, first ^ second if rule == "exclusive-or" else first & second
    added = rng.choice(np.setdiff1d(np.arange(state.shape[1]), pair), 2, replace=False)
    causes = np.sort([*pair, *added])
    number = state[:, causes].sum(axis=1)
    chance = {
        "additive": expit(2.0 * (number - 2)),
        "link": 2.0 ** (number - 4),
        "mixed": expit(4.0 * (first ^ second) - 2 + 2.0 * (state[:, added].sum(axis=1) - 1)),
    }
    return causes, rng.random(len(state)) < chance[rule]


def _screen_activities(
    rng: np.random.Generator,
    line: np.ndarray,
    dose: np.ndarray,
    treatments: list[tuple[str, ...]],
    treatment: np.ndarray,
) -> dict[str, np.ndarray]:
    """Return how active each program is (cell), before and after what the compounds do."""
    n_cells = len(dose)
    activities = {name: np.zeros(n_cells) for name in HUMAN_PROGRAMS}
    # Untreated cells are anywhere in the cell cycle, signal, and live.
    activities["cell_cycle"] = rng.beta(1, 1.5, n_cells)
    activities |= {name: rng.uniform(0.5, 0.8, n_cells) for name in ("mapk_output", "mtor_output")}
    activities |= {"acetyl_coa": rng.uniform(0.1, 0.4, n_cells), "sterol_synthesis": rng.uniform(0.3, 0.5, n_cells)}
    activities |= {f"line_{name}": (line == name).astype(float) for name in sorted(PLATE_LINES)}
    for responding, changes, potencies in MECHANISMS.values():
        for name, ec50 in potencies.items():
            given = np.array([name in taken for taken in treatments])[treatment]
            given = np.flatnonzero(given & np.isin(line, responding.split()))
            # Hill curve of the dose, weaker or stronger from cell to cell.
            effect = dose[given] / (dose[given] + ec50) * rng.uniform(0.6, 1, len(given))
            for program, change in changes.items():
                # A raise moves the activity towards 1, a silencing towards 0: it never leaves [0, 1].
                goal = float(change > 0)
                activities[program][given] += abs(change) * effect * (goal - activities[program][given])
    activities["p53_response"][line == "K562"] = 0  # K562 has lost p53
    activities |= {f"background_{i}": rng.beta(0.5, 0.5, n_cells) for i in range(1, 3)}
    return activities


def _check_at_least(name: str, value: float, minimum: float, why: str) -> None:
    """Raise an error for a number that is too small."""
    if value < minimum:
        raise ValueError(f"{name}={value} is too small: at least {minimum} {why}; pass {name}={minimum} or more.")


def _numbered(prefix: str, n: int, width: int = 4) -> np.ndarray:
    """Return names with numbers of one width, from 1 on."""
    return np.array([f"{prefix}{i:0{max(width, len(str(n)))}d}" for i in range(1, n + 1)])


def _lineage(rng: np.random.Generator, n_cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the cluster, the pseudotime and the branch of every cell, in random order."""
    share = np.array(list(CLUSTER_SIZES.values())) / sum(CLUSTER_SIZES.values())
    rare = n_cells * share < 8  # a handful each; the others share what is left
    sizes = np.where(rare, 8.0, (n_cells - 8 * rare.sum()) * share / share[~rare].sum())
    ends = np.round(np.cumsum(sizes)).astype(int)
    clusters = rng.permutation(np.repeat(list(CLUSTER_SIZES), np.diff(ends, prepend=0)))

    committed = np.isin(clusters, FATES)
    stage = np.where(committed, len(TRUNK), np.argmax(clusters[:, None] == TRUNK, axis=1))
    # Annotators draw borders where cells are continuous: the true position scatters around the labelled one.
    pseudotime = rng.uniform(np.take(BORDERS, stage), np.take(BORDERS, stage + 1)) + rng.normal(0, 0.008, n_cells)
    fate = np.where(committed, clusters, rng.choice(FATES, n_cells, p=share[4:] / share[4:].sum()))
    branch = np.where(committed | (pseudotime > FORK), fate, "trunk")
    return clusters, np.clip(pseudotime, 0, 1), branch


def _compounds() -> pd.DataFrame:
    """Return the screen's compounds by name, facts of the real design, with what the simulation makes of them."""
    table = pd.read_csv(Path(__file__).with_name("sciplex3_design.csv"), index_col="name")
    truth = pd.concat([pd.DataFrame({"mechanism": key, "ec50": spec[2]}) for key, spec in MECHANISMS.items()])
    truth = truth.astype({"ec50": float}).rename_axis("name")
    # The acting ones first, so that the order of a page's tables is that of MECHANISMS.
    table = truth.join(table, how="outer").loc[[*truth.index, *table.index.difference(truth.index, sort=False)]]
    table = table.fillna({"mechanism": "none", "ec50": np.inf})
    return table.assign(active=np.isfinite(table["ec50"]), plain=table.index.str.split(" (", regex=False).str[0])


def _counts_of_programs(
    rng: np.random.Generator,
    n_genes: int,
    named: dict[str, str],
    activities: dict[str, np.ndarray],
    pairs: dict[str, tuple[str, str]],
    depth: np.ndarray | float = 1.0,
) -> AnnData:
    """Turn activities (cell) of programs into counts: log rate = gene's base + activities + products of the pairs."""
    terms = activities | {name: activities[a] * activities[b] for name, (a, b) in pairs.items()}
    markers = {name: named.get(name, "").split() for name in terms}
    n_named = sum(map(len, markers.values()))
    minimum = n_named + 3 * len(terms)
    why = f"are needed for the {n_named} named marker genes and 3 simulated genes in each of {len(terms)} sets"
    _check_at_least("n_genes", n_genes, minimum, why)

    # Each set also takes simulated genes, 1% of them. Columns are in random order, so that position tells nothing.
    n_sim = n_genes - n_named
    n_each = max(3, n_sim // 100)
    column = rng.permutation(n_genes)
    symbols = np.empty(n_genes, dtype=object)
    symbols[column[:n_named]] = [symbol for genes in markers.values() for symbol in genes]
    symbols[np.sort(column[n_named:])] = _numbered("Sim", n_sim)
    # Heavy-tailed means: log-normal quantiles in random order, so that one lucky gene does not set a seed's depth.
    base = -3.65 + 2.4 * ndtri((rng.permutation(n_genes) + 0.5) / n_genes)
    loading = np.zeros((len(terms), n_genes))
    sets, next_marker, next_sim = {}, 0, n_named
    for term, (name, genes) in enumerate(markers.items()):
        own = column[next_marker : next_marker + len(genes)]
        on = 25 * 0.82 ** np.arange(len(genes))
        base[own] = np.log(0.02 * on + 0.01)  # never quite off: ambient RNA
        loading[term, own] = np.log(on) - base[own]
        other = column[next_sim : next_sim + n_each]
        base[other] = rng.normal(-2.3, 1, n_each)
        loading[term, other] = rng.uniform(1.5, 2.5, n_each) if name in pairs else rng.uniform(0.3, 1.5, n_each)
        sets[name] = symbols[np.concatenate([own, np.sort(other)])].astype(str)
        next_marker, next_sim = next_marker + len(genes), next_sim + n_each

    depth = depth * rng.lognormal(0, 0.35, len(next(iter(terms.values()))))
    counts = _negative_binomial(rng, depth, base, np.stack(list(terms.values()), axis=1), loading)
    obs = pd.DataFrame(index=_numbered("sim-", len(depth)))
    adata = AnnData(counts, obs=obs, var=pd.DataFrame(index=symbols))
    adata.uns["truth"] = {
        "programs": {name: sets[name] for name in activities},
        "interactions": {name: {"programs": np.array(pair), "genes": sets[name]} for name, pair in pairs.items()},
        "program_names": np.array(list(activities)),
        "activities": np.stack(list(activities.values()), axis=1).astype(np.float32),
        "cells": adata.obs_names.to_numpy(str),
    }
    return adata


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
