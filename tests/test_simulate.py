"""Simulated cells: are they what they claim, and is their recorded truth true of the counts?"""

import os
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from scbmlp import simulate

SIMULATORS = {name: getattr(simulate, name) for name in ("pancreas", "planted_interactions", "sciplex3")}
REAL = Path(os.environ.get("SCBMLP_DATA_DIR") or "../shared/data", "sciplex3")
PAIRS = [("Panobinostat", "JNJ-26854165"), ("Trametinib", "(+)-JQ1")]


@pytest.fixture(scope="module")
def pancreas():
    return simulate.pancreas(n_cells=2000, n_genes=1000)


@pytest.fixture(scope="module")
def planted():
    return simulate.planted_interactions()


@pytest.fixture(scope="module")
def screen():
    return simulate.sciplex3(n_cells=30_000, n_genes=300)


def dense(adata):
    return adata.X.toarray() if sparse.issparse(adata.X) else adata.X


def mean_by(adata, key, genes):
    """Return the mean expression of each gene in each group of cells."""
    return adata[:, genes].to_df().groupby(adata.obs[key], observed=True).mean()


def activities(adata):
    truth = adata.uns["truth"]
    return pd.DataFrame(truth["activities"], adata.obs_names, truth["program_names"])


def states(adata, key):
    truth = adata.uns["truth"]
    return pd.DataFrame(truth["state"], columns=truth["program_names"])[[*truth[key]]].to_numpy().T


def assert_same(a, b, where="truth"):
    """Compare two nested dicts of arrays, strings and numbers."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    else:
        np.testing.assert_array_equal(np.asarray(a).astype(str), np.asarray(b).astype(str), err_msg=where)


@pytest.mark.parametrize("name", SIMULATORS)
def test_seed_decides_everything_and_the_truth_survives_a_file(name, tmp_path):
    np.random.seed(7)
    before = np.random.get_state()[1].copy()
    adata, again, other = (SIMULATORS[name](seed=seed, n_cells=600, n_genes=500) for seed in (3, 3, 4))
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.testing.assert_array_equal(dense(adata), dense(again))
    assert not np.array_equal(dense(adata), dense(other))
    assert adata.shape == (600, 500) and adata.X.dtype == np.float32 and dense(adata).min() >= 0
    assert adata.var_names.is_unique and adata.obs_names.is_unique and adata.obs_names.str.startswith("sim-").all()
    assert adata.uns["scbmlp_source"] == {"name": name, "kind": "simulated", "seed": 3}
    assert all(set(genes) <= set(adata.var_names) for genes in adata.uns["truth"]["programs"].values())
    np.testing.assert_array_equal(adata.uns["truth"]["cells"], adata.obs_names)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    pd.testing.assert_frame_equal(adata.obs, again.obs)
    assert list(read.obs) == list(adata.obs)
    for same in (again, read):
        assert_same(adata.uns, same.uns)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pancreas", {"n_cells": 79}), ("pancreas", {"n_genes": 100}), ("sciplex3", {"n_cells": 599}),
        ("sciplex3", {"combinations": [("Trametinib", "Aspirin")]}), ("planted_interactions", {"n_cells": 4}),
        ("planted_interactions", {"n_programs": 1}), ("planted_interactions", {"n_programs": 3, "rule": "mixed"}),
        ("planted_interactions", {"genes_per_program": 0}), ("planted_interactions", {"n_genes": 499}),
        ("planted_interactions", {"n_genes": 500, "rule": "readout"}), ("planted_interactions", {"rule": "xor"}),
        ("planted_interactions", {"noise": -1}), ("planted_interactions", {"depth": 0}),
    ],
)  # fmt: skip
def test_what_cannot_be_simulated_is_an_error_that_names_the_argument(name, arguments):
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))}.*pass|choose"):
        SIMULATORS[name](**arguments)


def test_pancreas_at_its_default_size_has_the_counts_of_droplets():
    adata = simulate.pancreas()
    assert adata.shape == (3696, 10_000) and adata.X.format == "csr"
    assert 0.85 < 1 - adata.X.nnz / np.prod(adata.shape) < 0.92
    np.testing.assert_array_equal(adata.X.data, np.round(adata.X.data))
    totals = adata.X.sum(axis=1).A1
    assert 3500 < np.median(totals) < 6500 and 0.3 < np.log(totals).std() < 0.5
    means = np.sort(adata.X.mean(axis=0).A1)
    assert means[-100:].sum() > 0.3 * means.sum()  # heavy tail: 1% of the genes has a third of the counts
    assert adata.obs["clusters"].value_counts().to_dict() == simulate.CLUSTER_SIZES


def test_counts_are_negative_binomial_and_follow_depth_and_activity_across_blocks():
    n_cells, n_genes = 5000, 1000  # three blocks
    depth, activity, loading = np.ones(n_cells), np.zeros((n_cells, 1)), np.zeros((1, n_genes))
    depth[-1000:], activity[:1000], loading[:, :500] = 2, 1, np.log(3)
    base, rng = np.full(n_genes, np.log(4)), np.random.default_rng(0)
    counts = simulate._negative_binomial(rng, depth, base, activity, loading).toarray()
    assert counts.shape == (n_cells, n_genes)
    np.testing.assert_allclose(counts[1000:4000].mean(), 4, rtol=0.01)
    np.testing.assert_allclose(counts[1000:4000].var(), 4 + 4**2 / 3, rtol=0.02)  # Poisson: 4
    np.testing.assert_allclose(counts[-1000:].mean(), 8, rtol=0.02)
    np.testing.assert_allclose(counts[:1000, :500].mean(), 12, rtol=0.02)
    np.testing.assert_allclose(counts[:1000, 500:].mean(), 4, rtol=0.02)


def test_pancreas_has_clusters_of_the_real_sizes_along_a_tree(pancreas):
    clusters, truth = pancreas.obs["clusters"], pancreas.uns["truth"]
    order = ["Ductal", "Ngn3 low EP", "Ngn3 high EP", "Pre-endocrine", "Beta", "Alpha", "Delta", "Epsilon"]
    assert list(clusters.cat.categories) == order
    expected = pd.Series(simulate.CLUSTER_SIZES) * 2000 / 3696
    assert (clusters.value_counts()[expected.index] - expected).abs().max() <= 1
    coarse = pancreas.obs["clusters_coarse"]
    assert list(coarse.cat.categories) == [*order[:4], "Endocrine"]
    assert set(clusters[coarse == "Endocrine"]) == set(order[4:])
    assert (clusters.cat.codes.diff() != 0).mean() > 0.5  # shuffled
    smallest = simulate.pancreas(n_cells=80, n_genes=200).obs["clusters"].value_counts()
    assert smallest.sum() == 80 and smallest.min() >= 8
    median = pd.Series(truth["pseudotime"]).groupby(clusters.to_numpy(str)).median()
    assert median[order[:4]].is_monotonic_increasing and (median[order[4:]] > median["Pre-endocrine"]).all()
    branches = {name: set(truth["branch"][clusters == name]) for name in order}
    assert branches["Ductal"] == {"trunk"} and branches["Pre-endocrine"] == {"trunk", *order[4:]}
    assert all(branches[fate] == {fate} for fate in order[4:])
    # Neighbours blend: no gap in pseudotime, neither on the trunk nor on the way to the largest fate.
    way = np.isin(truth["branch"], ["trunk", "Beta"])
    assert np.diff(np.sort(truth["pseudotime"][way])).max() < 0.02


def test_pancreas_markers_are_highest_in_their_cluster_and_ductal_cells_cycle(pancreas):
    markers = {
        "Ductal": "Spp1 Sox9 Anxa2", "Ngn3 high EP": "Neurog3 Btbd17 Gadd45a", "Pre-endocrine": "Fev Cck",
        "Beta": "Ins1 Ins2 Pdx1 Nkx6-1 Mafb Nnat Gng12", "Alpha": "Gcg Arx Irx2", "Delta": "Sst Hhex",
        "Epsilon": "Ghrl Maged2 Anpep",
    }  # fmt: skip
    cluster_of = {gene: cluster for cluster, genes in markers.items() for gene in genes.split()}
    assert mean_by(pancreas, "clusters", list(cluster_of)).idxmax().to_dict() == cluster_of
    activity = activities(pancreas)
    by_cluster = activity.groupby(pancreas.obs["clusters"], observed=True).mean().drop("Delta")
    assert (by_cluster.filter(like="background") - 0.5).abs().max(axis=None) < 0.15
    cycling = activity[["s_phase", "g2m_phase"]].sum(axis=1) > 0.1
    share = cycling.groupby(pancreas.obs["clusters"], observed=True).mean()
    assert 0.3 < share["Ductal"] < 0.6 and 0.05 < share["Ngn3 low EP"] < 0.5 and share[simulate.FATES].max() < 0.02
    for gene, program in {"Top2a": "g2m_phase", "Mki67": "g2m_phase", "Pcna": "s_phase", "Mcm5": "s_phase"}.items():
        counts = dense(pancreas[:, gene]).ravel()
        assert counts[activity[program] > 0.5].mean() > 5 * counts[~cycling].mean()


@pytest.mark.parametrize("simulated", ["pancreas", "screen"])
def test_interaction_targets_rise_only_where_both_programs_are_active(simulated, request):
    adata = request.getfixturevalue(simulated)
    activity, known = activities(adata), adata.uns["truth"]["interactions"]
    assert len(known) == 2
    for interaction in known.values():
        (low_a, low_b), (high_a, high_b) = (
            mask[[*interaction["programs"]]].to_numpy().T for mask in (activity < 0.1, activity > 0.8)
        )
        targets = dense(adata[:, interaction["genes"]]).mean(axis=1)
        neither = targets[low_a & low_b].mean()
        assert targets[high_a & high_b].mean() > 2.5 * neither
        for one_alone in (targets[high_a & low_b], targets[low_a & high_b]):
            error = one_alone.std() / np.sqrt(len(one_alone))
            assert one_alone.mean() - 2 * error < 1.4 * neither


def test_planted_programs_are_readable_and_the_label_needs_the_product_of_two(planted):
    truth, on = planted.uns["truth"], (planted.obs["label"] == "on").to_numpy()
    assert planted.shape == (3000, 2000) and truth["state"].shape == (3000, 20)
    genes = np.concatenate(list(truth["programs"].values()))
    assert len(genes) == len(set(genes)) == 500
    np.testing.assert_array_equal(truth["state"].mean(axis=0), 0.5)
    for name, state in zip(truth["program_names"], truth["state"].T, strict=True):
        x = planted[:, truth["programs"][name]].X
        program = x.mean(axis=1)
        assert ((program > np.median(program)) == state).mean() > 0.98
        assert ((x > np.median(x, axis=0)) == state[:, None]).mean() < 0.75  # a gene alone
    a, b = states(planted, "pair")
    assert on.mean() == on[a == 1].mean() == on[b == 1].mean() == 0.5
    train, test = slice(0, 2100), slice(2100, None)
    linear = LogisticRegression(C=0.01, max_iter=500).fit(planted.X[train], on[train])
    assert abs(linear.score(planted.X[test], on[test]) - 0.5) < 0.06
    programs = np.stack([planted[:, truth["programs"][name]].X.mean(axis=1) for name in truth["pair"]])
    a, b = programs - programs[:, train].mean(axis=1, keepdims=True)
    product = (a * b)[:, None]
    assert LogisticRegression(C=1e4).fit(product[train], on[train]).score(product[test], on[test]) > 0.95


@pytest.mark.parametrize(
    ("rule", "n_causes", "interact"),
    [("exclusive-or", 2, True), ("conjunction", 2, True), ("readout", 2, True), ("additive", 4, False),
     ("link", 4, False), ("mixed", 4, True)],
)  # fmt: skip
def test_planted_labels_follow_their_rule(rule, n_causes, interact):
    adata = simulate.planted_interactions(2, 20_000, 21, 4, 5, rule=rule)
    truth, on, states_of = adata.uns["truth"], (adata.obs["label"] == "on").to_numpy(), states(adata, "causes")
    assert len(truth["causes"]) == n_causes and len(truth["pair"]) == 2 * interact
    assert set(truth["pair"]) <= set(truth["causes"])
    assert set(truth["genes"]) == {gene for name in truth["causes"] for gene in truth["programs"][name]}
    assert len(truth["readout"]) == (rule == "readout")
    # The cells are those of the exclusive-or; the rule makes the label, and at most one gene.
    as_before = simulate.planted_interactions(2, 20_000, 21, 4, 5)
    rest = ~adata.var_names.isin(truth["readout"])
    np.testing.assert_array_equal(adata.X[:, rest], as_before.X[:, rest])
    np.testing.assert_array_equal(truth["state"], as_before.uns["truth"]["state"])

    number = states_of.sum(axis=0)
    a, b = states(adata, "pair") if interact else (0, 0)
    chance = {
        "exclusive-or": 1.0 * (number == 1),
        "additive": expit(2.0 * number - 4),
        "link": 2.0 ** (number - 4),
        "mixed": expit(4.0 * (a != b) + 2.0 * (number - a - b) - 4),
    }.get(rule, 1.0 * (number == 2))
    shares = pd.Series(on).groupby(chance).mean()
    np.testing.assert_allclose(shares, shares.index, atol=0.04 if n_causes == 4 else 0)
    assert len(shares) == {"additive": 5, "link": 5, "mixed": 5}.get(rule, 2)
    for gene in truth["readout"]:
        means = mean_by(adata, "label", [gene])[gene]
        assert means["on"] - means["off"] > 2.5


def test_planted_noise_and_depth_blur_the_same_states():
    def spread(**options):
        adata = simulate.planted_interactions(0, 1000, 600, **options)
        genes, state = adata[:, adata.uns["truth"]["programs"]["program_01"]].X, adata.uns["truth"]["state"][:, 0] == 1
        step = genes[state].mean() - genes[~state].mean()
        return step, genes[state].std(axis=0).mean() / step, (adata.X == 0).mean()

    clean, noisy = spread(noise=0.25), spread(noise=2)
    assert abs(clean[0] - 0.5) < 0.05 and clean[1] < 0.4 and noisy[1] > 1.5
    deep, shallow = spread(noise=0.25, depth=200_000), spread(noise=0.25, depth=600)
    np.testing.assert_allclose(deep[:2], clean[:2], rtol=0.25)
    assert shallow[1] > 2 * deep[1] and shallow[2] > 0.2


def test_sciplex3_has_the_design_of_the_screen(screen):
    obs, truth = screen.obs, screen.uns["truth"]
    compounds = pd.DataFrame(truth["compounds"]).set_index("name")
    columns = "perturbation dose_value dose_unit cell_line pathway target replicate plate ncounts"
    assert {*obs} == {*columns.split()} and len(compounds) == len(set(compounds["plain"])) == 188
    assert set(obs["perturbation"]) == {"control", *compounds.index}
    vehicle = obs["perturbation"] == "control"
    assert vehicle.mean() == 0.08 and set(obs.loc[~vehicle, "dose_value"]) == {10, 100, 1000, 10000}
    assert obs["cell_line"].value_counts(normalize=True).round(2).to_dict() == {"MCF7": 0.5, "A549": 0.25, "K562": 0.25}
    plates = [f"plate{i}" for i in range(1, 49)]
    assert list(obs["plate"].cat.categories) == plates == list(obs["plate"].unique().sort_values())
    assert compounds["active"].sum() < 188 / 4  # most do nothing
    np.testing.assert_array_equal(compounds["active"], np.isfinite(compounds["ec50"]))
    np.testing.assert_array_equal(compounds["active"], compounds["mechanism"].isin([*truth["responding_lines"]]))
    assert set(compounds["mechanism"]) == {*simulate.MECHANISMS, "none"}
    for column in ("target", "pathway"):
        known = compounds[column].to_dict() | {"control": "Vehicle"}
        assert list(obs[column]) == [known[name] for name in obs["perturbation"]]
    assert compounds["plain"]["Quisinostat (JNJ-26481585) 2HCl"] == "Quisinostat"


def test_sciplex3_plates_are_of_one_line_and_replicate_and_share_compounds_in_twos(screen):
    obs = screen.obs[screen.obs["perturbation"] != "control"]
    by_plate = screen.obs.groupby("plate", observed=True)
    assert (by_plate["cell_line"].nunique() == 1).all() and (by_plate["replicate"].nunique() == 1).all()
    assert (screen.obs.groupby(["cell_line", "replicate"], observed=True)["plate"].nunique() == 8).all()
    pair = (obs["plate"].str.removeprefix("plate").astype(int) - 1) % 8 // 2
    assert (pair.groupby(obs["perturbation"], observed=True).nunique() == 1).all()
    assert set(obs.groupby(pair)["perturbation"].nunique()) == {47}
    wells = obs.groupby(["cell_line", "replicate", "perturbation", "dose_value"], observed=True)["plate"].nunique()
    assert (wells == 1).all()
    assert set(obs.groupby(["plate", "perturbation"], observed=True)["dose_value"].nunique()) <= {1, 2}
    for adata, fewest in ((simulate.sciplex3(seed=2, n_cells=600, n_genes=200), 1), (screen, 35)):
        sizes = adata.obs[adata.obs["perturbation"] == "control"].groupby("plate", observed=False).size()
        assert len(sizes) == 48 and sizes.min() >= fewest


@pytest.mark.skipif(not REAL.is_dir(), reason="the real design is in $SCBMLP_DATA_DIR/sciplex3 or ../shared/data")
def test_sciplex3_compounds_and_wells_are_those_of_the_real_screen(screen):
    real = pd.read_csv(REAL / "compounds.csv").set_index("catalog_number")[["name", "target", "pathway"]]
    # The real table has stray blanks: "Prednisone ", "E3 Ligase ,p53", "Stem Cells &  Wnt".
    real = real.apply(lambda column: column.str.replace("  ", " ").str.replace(" ,", ",").str.strip())
    compounds = pd.DataFrame(screen.uns["truth"]["compounds"]).set_index("name")[["target", "pathway"]]
    pd.testing.assert_frame_equal(compounds.sort_index(), real.set_index("name").sort_index(), check_dtype=False)

    design = pd.read_csv(REAL / "plate_design.csv").query("hours == 24 and not vehicle")
    design["perturbation"] = design["catalog_number"].map(real["name"])
    columns = ["cell_type", "replicate", "perturbation", "dose_nM", "plate_oligo"]
    wells = set(map(tuple, design[columns].astype({"dose_nM": float}).to_numpy()))
    treated = screen.obs[screen.obs["perturbation"] != "control"]
    seen = treated[["cell_line", "replicate", "perturbation", "dose_value", "plate"]]
    seen = set(map(tuple, seen.to_numpy()))
    assert seen <= wells and len(seen) > 0.95 * len(wells)  # a well may have drawn no cell


def test_sciplex3_has_the_flaws_of_the_real_file_and_says_which(screen):
    obs, truth, activity = screen.obs, screen.uns["truth"], activities(screen)
    assert set(obs["perturbation"].cat.categories) - set(obs["perturbation"]) == {"Vehicle"}
    vehicle, first = obs["perturbation"] == "control", obs["replicate"] == "rep1"
    assert (obs.loc[vehicle & first, "dose_value"] == 0).all() and obs.loc[vehicle & ~first, "dose_value"].isna().all()
    total = screen.X.sum(axis=1).A1
    np.testing.assert_array_equal(obs["ncounts"], total)
    assert activity.min(axis=None) >= 0 and activity.max(axis=None) <= 1
    low = truth["low_count"]
    assert 0.03 < low.mean() < 0.05 and np.median(total[low]) < 0.15 * np.median(total[~low])
    inert = ~low & (activity["hdac_response"] == 0) & (obs["cell_line"] == "MCF7")
    depth = obs["ncounts"][inert].groupby(obs["plate"].astype(str)).mean()
    known = pd.Series(truth["plate_depth"], truth["plates"])[depth.index]
    assert len(depth) == 16 and np.corrcoef(depth, known)[0, 1] > 0.95


def mechanism(screen):
    """Return the mechanism of every cell's compound."""
    compounds = screen.uns["truth"]["compounds"]
    known = dict(zip(compounds["name"], compounds["mechanism"], strict=True))
    return screen.obs["perturbation"].astype(str).map(known)


def test_sciplex3_hdac_inhibitors_act_by_dose_and_potency_and_inert_compounds_do_not(screen):
    obs, of = screen.obs, mechanism(screen)
    genes = screen[:, ["AURKA", "CDKN1A", "ACLY", "ACSS2", "SLC25A1", "CS"]].to_df()
    hdac, inert = (
        genes[of.isna() | (of == one)].groupby(obs["dose_value"].fillna(0)).mean() for one in ("HDAC", "none")
    )
    assert hdac["CDKN1A"].iloc[-1] > 5 * hdac["CDKN1A"].iloc[0] and hdac["AURKA"].iloc[-1] < 0.5 * hdac["AURKA"].iloc[0]
    assert hdac.pop("AURKA").is_monotonic_decreasing and all(mean.is_monotonic_increasing for _, mean in hdac.items())
    assert (inert[["CDKN1A", "AURKA", "ACLY"]] / inert.loc[0] - 1).abs().max(axis=None) < 0.15
    middle = obs["dose_value"] == 1000
    mean = activities(screen)["hdac_response"][middle].groupby(obs["perturbation"], observed=True).mean()
    assert mean["Quisinostat (JNJ-26481585) 2HCl"] > 0.6 and mean["Entinostat (MS-275)"] < 0.3


@pytest.mark.parametrize(
    ("target", "gene", "fold"),
    [("MDM2", "MDM2", {"A549": 5, "K562": 1, "MCF7": 5}), ("mTOR", "LDHA", {"A549": 0.3, "K562": 0.3, "MCF7": 0.3}),
     ("MEK", "DUSP6", {"A549": 0.3, "K562": 0.3, "MCF7": 1}), ("HSP90", "HSPA1A", {"A549": 5, "K562": 5, "MCF7": 5}),
     ("Aurora Kinase", "MDM2", {"A549": 3, "K562": 1, "MCF7": 3}),
     *(("Glucocorticoid Receptor", gene, {"A549": 1.3, "K562": 1, "MCF7": 1}) for gene in ("ANGPTL4", "GDF15")),
     *(("Glucocorticoid Receptor", gene, {"A549": 4, "K562": 1, "MCF7": 1}) for gene in ("FKBP5", "TSC22D3"))],
)  # fmt: skip
def test_sciplex3_mechanisms_move_their_genes_in_their_lines(screen, target, gene, fold):
    vehicle = mean_by(screen[screen.obs["perturbation"] == "control"], "cell_line", [gene])[gene]
    treated = screen[mechanism(screen) == target]
    any_dose = mean_by(treated, "cell_line", [gene])[gene] / vehicle
    high = mean_by(treated[treated.obs["dose_value"] >= 1000], "cell_line", [gene])[gene] / vehicle
    for line, change in fold.items():
        if change == 1:  # all cells: one compound has few
            assert 0.5 < any_dose[line] < 2
        else:
            assert high[line] > change if change > 1 else high[line] < change


def test_sciplex3_two_compounds_at_once_both_act(screen):
    adata = simulate.sciplex3(n_cells=20_000, n_genes=200, combinations=PAIRS)
    hdac, mdm2, mek = "Panobinostat (LBH589)", "JNJ-26854165 (Serdemetan)", "Trametinib (GSK1120212)+(+)-JQ1"
    by_name = adata.obs.groupby("perturbation", observed=True)
    both = by_name.get_group(f"{hdac}+{mdm2}")
    assert set(both["target"]) == {"HDAC+E3 Ligase,p53"} and set(both["pathway"]) == {"Epigenetics+Apoptosis"}
    assert set(both["plate"]) == set(by_name.get_group(hdac)["plate"])
    plenty = adata.obs[adata.obs["dose_value"] == 10_000]
    mean = activities(adata).groupby([plenty["cell_line"], plenty["perturbation"]], observed=True).mean()
    for name, program in {hdac: "hdac_response", mdm2: "p53_response"}.items():
        alone, together = (mean.loc[("MCF7", one), program] for one in (name, f"{hdac}+{mdm2}"))
        assert alone > 0.6 and together == pytest.approx(alone, abs=0.1)
    assert mean.loc[("K562", mek), "mapk_output"] < 0.2
    assert len(screen.obs["perturbation"].cat.categories) == 188 + 2  # control, and the Vehicle that no cell has
