"""Simulated cells: are they what they claim, and is their recorded truth true of the counts?"""

import os
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from scbmlp import simulate

SIMULATORS = {"pancreas": simulate.pancreas, "planted_interactions": simulate.planted_interactions,
              "sciplex3": simulate.sciplex3}  # fmt: skip
REAL = Path(os.environ.get("SCBMLP_DATA_DIR") or "../shared/data", "sciplex3")


@pytest.fixture(scope="module")
def pancreas():
    return simulate.pancreas(n_cells=2000, n_genes=3000)


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
    table = pd.DataFrame(dense(adata[:, genes]), columns=genes)
    return table.groupby(adata.obs[key].to_numpy(str)).mean()


def activity(adata, program):
    truth = adata.uns["truth"]
    return truth["activities"][:, list(truth["program_names"]).index(program)]


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
        assert_same(adata.uns["truth"], same.uns["truth"])
        assert_same(adata.uns["scbmlp_source"], same.uns["scbmlp_source"])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("pancreas", {"n_cells": 79}, "n_cells=79 is too small: at least 80"),
        ("pancreas", {"n_genes": 100}, r"n_genes=100 is too small: at least \d+ .* marker genes.*pass n_genes"),
        ("sciplex3", {"n_cells": 599}, "n_cells=599 is too small: at least 600"),
        ("sciplex3", {"n_genes": 100}, "n_genes=100 is too small: .* marker genes"),
        ("sciplex3", {"combinations": [("Trametinib", "Aspirin")]},
         r"combinations has \['Aspirin'\], which are no .* pass pairs of Quisinostat, CUDC-907, Trichostatin A,"),
        ("planted_interactions", {"n_cells": 4}, "n_cells=4 is too small"),
        ("planted_interactions", {"n_programs": 1}, "n_programs=1 is too small"),
        ("planted_interactions", {"genes_per_program": 0}, "genes_per_program=0 is too small"),
        ("planted_interactions", {"n_genes": 499}, "n_genes=499 is too small: at least 500"),
        ("planted_interactions", {"rule": "xor"}, "rule='xor' is unknown; choose one of 'exclusive-or',"),
        ("planted_interactions", {"rule": "mixed", "n_programs": 3}, "n_programs=3 is too small: at least 4"),
        ("planted_interactions", {"rule": "readout", "n_genes": 500}, "n_genes=500 is too small: at least 501"),
        ("planted_interactions", {"noise": -1}, "noise=-1 is too small"),
        ("planted_interactions", {"depth": 0}, "depth=0 is too small"),
    ],
)  # fmt: skip
def test_what_cannot_be_simulated_is_an_error_that_says_what_can(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        SIMULATORS[name](**arguments)


def test_pancreas_at_its_default_size_has_the_counts_of_droplets():
    adata = simulate.pancreas()
    assert adata.shape == (3696, 10_000)
    assert sparse.issparse(adata.X) and adata.X.format == "csr"
    assert 0.85 < 1 - adata.X.nnz / np.prod(adata.shape) < 0.92
    np.testing.assert_array_equal(adata.X.data, np.round(adata.X.data))
    totals = np.asarray(adata.X.sum(axis=1)).ravel()
    assert 3500 < np.median(totals) < 6500
    assert 0.3 < np.log(totals).std() < 0.5
    means = np.sort(np.asarray(adata.X.mean(axis=0)).ravel())
    assert means[-100:].sum() > 0.3 * means.sum()  # heavy tail: 1% of the genes has a third of the counts
    assert adata.obs["clusters"].value_counts().to_dict() == simulate.CLUSTER_SIZES


def test_counts_are_negative_binomial_and_follow_depth_and_activity_across_blocks():
    n_cells, n_genes = 5000, 1000  # three blocks
    depth, activity = np.ones(n_cells), np.zeros((n_cells, 1))
    depth[-1000:], activity[:1000] = 2, 1
    loading = np.zeros((1, n_genes))
    loading[:, :500] = np.log(3)
    counts = simulate._negative_binomial(
        np.random.default_rng(0), depth, np.full(n_genes, np.log(4)), activity, loading
    ).toarray()
    assert counts.shape == (n_cells, n_genes)
    np.testing.assert_allclose(counts[1000:4000].mean(), 4, rtol=0.01)
    np.testing.assert_allclose(counts[1000:4000].var(), 4 + 4**2 / 3, rtol=0.02)  # Poisson: 4
    np.testing.assert_allclose(counts[-1000:].mean(), 8, rtol=0.02)
    np.testing.assert_allclose(counts[:1000, :500].mean(), 12, rtol=0.02)
    np.testing.assert_allclose(counts[:1000, 500:].mean(), 4, rtol=0.02)


def test_pancreas_clusters(pancreas):
    clusters = pancreas.obs["clusters"]
    order = ["Ductal", "Ngn3 low EP", "Ngn3 high EP", "Pre-endocrine", "Beta", "Alpha", "Delta", "Epsilon"]
    assert list(clusters.cat.categories) == order
    expected = pd.Series(simulate.CLUSTER_SIZES) * 2000 / 3696
    assert (clusters.value_counts()[expected.index] - expected).abs().max() <= 1
    assert list(pancreas.obs["clusters_coarse"].cat.categories) == [*order[:4], "Endocrine"]
    assert set(clusters[pancreas.obs["clusters_coarse"] == "Endocrine"]) == set(order[4:])
    assert (clusters.cat.codes.diff() != 0).mean() > 0.5  # shuffled
    smallest = simulate.pancreas(n_cells=80, n_genes=200).obs["clusters"].value_counts()
    assert smallest.sum() == 80 and smallest.min() >= 8


def test_pancreas_lies_along_a_tree(pancreas):
    truth, clusters = pancreas.uns["truth"], pancreas.obs["clusters"].to_numpy(str)
    median = pd.Series(truth["pseudotime"]).groupby(clusters).median()
    trunk = ["Ductal", "Ngn3 low EP", "Ngn3 high EP", "Pre-endocrine"]
    assert median[trunk].is_monotonic_increasing
    for fate in simulate.FATES:
        assert median[fate] > median["Pre-endocrine"]
        assert set(truth["branch"][clusters == fate]) == {fate}
    assert set(truth["branch"][clusters == "Ductal"]) == {"trunk"}
    assert set(truth["branch"][clusters == "Pre-endocrine"]) == {"trunk", *simulate.FATES}
    # Neighbours blend: no gap in pseudotime, neither on the trunk nor on the way to the largest fate.
    way = np.isin(truth["branch"], ["trunk", "Beta"])
    assert np.diff(np.sort(truth["pseudotime"][way])).max() < 0.02


def test_pancreas_markers_are_highest_in_their_cluster(pancreas):
    markers = {
        "Ductal": "Spp1 Sox9 Anxa2",
        "Ngn3 high EP": "Neurog3 Btbd17 Gadd45a",
        "Pre-endocrine": "Fev Cck",
        "Beta": "Ins1 Ins2 Pdx1 Nkx6-1 Mafb Nnat Gng12",
        "Alpha": "Gcg Arx Irx2",
        "Delta": "Sst Hhex",
        "Epsilon": "Ghrl Maged2 Anpep",
    }
    cluster_of = {gene: cluster for cluster, genes in markers.items() for gene in genes.split()}
    assert mean_by(pancreas, "clusters", list(cluster_of)).idxmax().to_dict() == cluster_of


def test_pancreas_cell_cycle_runs_in_a_share_of_the_ductal_cells(pancreas):
    clusters = pancreas.obs["clusters"].to_numpy(str)
    cycling = (activity(pancreas, "s_phase") + activity(pancreas, "g2m_phase")) > 0.1
    assert 0.3 < cycling[clusters == "Ductal"].mean() < 0.6
    assert 0.05 < cycling[clusters == "Ngn3 low EP"].mean() < 0.5
    assert cycling[np.isin(clusters, simulate.FATES)].mean() < 0.02
    for gene, program in {"Top2a": "g2m_phase", "Mki67": "g2m_phase", "Pcna": "s_phase", "Mcm5": "s_phase"}.items():
        counts = dense(pancreas[:, gene]).ravel()
        on = activity(pancreas, program) > 0.5
        assert counts[on].mean() > 5 * counts[~cycling].mean()


def test_pancreas_background_programs_are_unrelated_to_type(pancreas):
    clusters = pancreas.obs["clusters"].to_numpy(str)
    for i in range(1, 5):
        mean = pd.Series(activity(pancreas, f"background_{i}")).groupby(clusters).mean()
        assert np.abs(mean.drop("Delta") - 0.5).max() < 0.15


@pytest.mark.parametrize("simulated", ["pancreas", "screen"])
def test_interaction_targets_rise_only_where_both_programs_are_active(simulated, request):
    adata = request.getfixturevalue(simulated)
    assert adata.uns["truth"]["interactions"]
    for interaction in adata.uns["truth"]["interactions"].values():
        a, b = (activity(adata, program) for program in interaction["programs"])
        targets = dense(adata[:, interaction["genes"]]).mean(axis=1)
        low_a, high_a, low_b, high_b = a < 0.1, a > 0.8, b < 0.1, b > 0.8
        neither = targets[low_a & low_b].mean()
        assert targets[high_a & high_b].mean() > 2.5 * neither
        for one_alone in (targets[high_a & low_b], targets[low_a & high_b]):
            error = one_alone.std() / np.sqrt(len(one_alone))
            assert one_alone.mean() - 2 * error < 1.4 * neither


def test_planted_programs_are_disjoint_balanced_and_readable(planted):
    truth = planted.uns["truth"]
    assert planted.shape == (3000, 2000) and truth["state"].shape == (3000, 20)
    genes = np.concatenate(list(truth["programs"].values()))
    assert len(genes) == len(set(genes)) == 500
    np.testing.assert_array_equal(truth["state"].mean(axis=0), 0.5)
    for name, state in zip(truth["program_names"], truth["state"].T, strict=True):
        x = planted[:, truth["programs"][name]].X
        program = x.mean(axis=1)
        assert ((program > np.median(program)) == state).mean() > 0.98
        assert ((x > np.median(x, axis=0)) == state[:, None]).mean() < 0.75  # a gene alone


def program_states(adata, key):
    truth = adata.uns["truth"]
    names = list(truth["program_names"])
    return np.stack([truth["state"][:, names.index(name)] for name in truth[key]])


def test_planted_label_is_the_exclusive_or_of_the_pair_and_needs_their_product(planted):
    truth, on = planted.uns["truth"], (planted.obs["label"] == "on").to_numpy()
    assert list(planted.obs["label"].cat.categories) == ["off", "on"] and on.mean() == 0.5
    a, b = program_states(planted, "pair")
    np.testing.assert_array_equal(on, a != b)
    assert on[a == 1].mean() == on[b == 1].mean() == 0.5
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
def test_planted_rules_have_their_causes_and_their_pair(rule, n_causes, interact):
    adata = simulate.planted_interactions(1, 800, 600, rule=rule)
    truth = adata.uns["truth"]
    assert len(truth["causes"]) == n_causes and len(truth["pair"]) == 2 * interact
    assert set(truth["pair"]) <= set(truth["causes"])
    assert set(truth["genes"]) == {gene for name in truth["causes"] for gene in truth["programs"][name]}
    assert len(truth["readout"]) == (rule == "readout")
    # The cells are those of the exclusive-or; the rule makes the label, and at most one gene.
    as_before = simulate.planted_interactions(1, 800, 600)
    rest = ~adata.var_names.isin(truth["readout"])
    np.testing.assert_array_equal(adata.X[:, rest], as_before.X[:, rest])
    np.testing.assert_array_equal(truth["state"], as_before.uns["truth"]["state"])


def test_planted_labels_follow_their_rule():
    made = {
        rule: simulate.planted_interactions(2, 20_000, 100, 4, 5, rule=rule)
        for rule in ("conjunction", "readout", "additive", "link", "mixed")
    }
    on = {rule: (adata.obs["label"] == "on").to_numpy() for rule, adata in made.items()}
    for rule in ("conjunction", "readout"):
        np.testing.assert_array_equal(on[rule], program_states(made[rule], "pair").all(axis=0))
    readout = made["readout"][:, made["readout"].uns["truth"]["readout"]].X.ravel()
    assert readout[on["readout"]].mean() - readout[~on["readout"]].mean() > 2.5
    number = program_states(made["additive"], "causes").sum(axis=0)
    for rule, chance in {"additive": 1 / (1 + np.exp(4 - 2.0 * np.arange(5))), "link": 2.0 ** np.arange(-4, 1)}.items():
        share = [on[rule][number == k].mean() for k in range(5)]
        np.testing.assert_allclose(share, chance, atol=0.03)
    mixed = made["mixed"]
    a, b = program_states(mixed, "pair")
    added = program_states(mixed, "causes").sum(axis=0) - a - b
    odds = 4.0 * (a != b) - 2 + 2.0 * (added - 1)
    for value in np.unique(odds):
        assert abs(on["mixed"][odds == value].mean() - 1 / (1 + np.exp(-value))) < 0.04


def test_planted_noise_and_depth_blur_the_same_states():
    def spread(**options):
        adata = simulate.planted_interactions(0, 1000, 600, **options)
        truth = adata.uns["truth"]
        genes = adata[:, truth["programs"]["program_01"]].X
        state = truth["state"][:, 0] == 1
        step = genes[state].mean() - genes[~state].mean()
        return step, genes[state].std(axis=0).mean() / step

    clean, noisy = spread(noise=0.25), spread(noise=2)
    assert abs(clean[0] - 0.5) < 0.05 and clean[1] < 0.4 and noisy[1] > 1.5
    deep, shallow = spread(noise=0.25, depth=200_000), spread(noise=0.25, depth=600)
    np.testing.assert_allclose(deep, clean, rtol=0.25)
    assert shallow[1] > 2 * deep[1]
    adata = simulate.planted_interactions(0, 500, 600, depth=600)
    assert adata.X.min() == 0 and (adata.X == 0).mean() > 0.2


def test_sciplex3_has_the_design_of_the_screen(screen):
    obs, compounds = screen.obs, screen.uns["truth"]["compounds"]
    assert set(obs) == {"perturbation", "dose_value", "dose_unit", "cell_line", "pathway", "target", "replicate",
                        "plate", "ncounts"}  # fmt: skip
    assert set(obs["perturbation"]) == {"control", *compounds["name"]} and len(compounds["name"]) == 188
    vehicle = obs["perturbation"] == "control"
    assert vehicle.mean() == 0.08 and set(obs.loc[vehicle, "target"]) == {"Vehicle"}
    assert set(obs.loc[~vehicle, "dose_value"]) == {10, 100, 1000, 10000} and set(obs["dose_unit"]) == {"nM"}
    assert obs["cell_line"].value_counts(normalize=True).round(2).to_dict() == {"MCF7": 0.5, "A549": 0.25, "K562": 0.25}
    plates = [f"plate{i}" for i in range(1, 49)]
    assert list(obs["plate"].cat.categories) == plates == list(obs["plate"].unique().sort_values())
    assert compounds["active"].sum() < 188 / 4  # most do nothing
    np.testing.assert_array_equal(compounds["active"], np.isfinite(compounds["ec50"]))
    acting = list(screen.uns["truth"]["responding_lines"])
    np.testing.assert_array_equal(compounds["active"], np.isin(compounds["mechanism"], acting))
    assert set(compounds["mechanism"]) == {*simulate.MECHANISMS, "none"}
    for column in ("target", "pathway"):
        known = dict(zip(compounds["name"], compounds[column], strict=True)) | {"control": "Vehicle"}
        assert list(obs[column]) == [known[name] for name in obs["perturbation"]]
    plain = dict(zip(compounds["name"], compounds["plain"], strict=True))
    assert plain["Quisinostat (JNJ-26481585) 2HCl"] == "Quisinostat" and plain["CUDC-907"] == "CUDC-907"
    assert len(set(plain.values())) == 188


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


@pytest.mark.skipif(not REAL.is_dir(), reason="the real design is in $SCBMLP_DATA_DIR/sciplex3 or ../shared/data")
def test_sciplex3_compounds_and_wells_are_those_of_the_real_screen():
    real = pd.read_csv(REAL / "compounds.csv").set_index("catalog_number")[["name", "target", "pathway"]]
    # The real table has stray blanks: "Prednisone ", "E3 Ligase ,p53", "Stem Cells &  Wnt".
    real = real.apply(lambda column: column.str.replace("  ", " ").str.replace(" ,", ",").str.strip())
    adata = simulate.sciplex3(n_cells=60_000, n_genes=300)
    compounds = pd.DataFrame(adata.uns["truth"]["compounds"]).set_index("name")[["target", "pathway"]]
    pd.testing.assert_frame_equal(compounds.sort_index(), real.set_index("name").sort_index(), check_dtype=False)

    design = pd.read_csv(REAL / "plate_design.csv").query("hours == 24 and not vehicle")
    design["perturbation"] = design["catalog_number"].map(real["name"])
    columns = ["cell_type", "replicate", "perturbation", "dose_nM", "plate_oligo"]
    wells = set(map(tuple, design[columns].astype({"dose_nM": float}).to_numpy()))
    treated = adata.obs[adata.obs["perturbation"] != "control"]
    seen = treated[["cell_line", "replicate", "perturbation", "dose_value", "plate"]]
    seen = set(map(tuple, seen.to_numpy()))
    assert seen <= wells and len(seen) > 0.98 * len(wells)  # a well may have drawn no cell


def test_sciplex3_every_plate_has_vehicle(screen):
    for adata, fewest in ((simulate.sciplex3(seed=2, n_cells=600, n_genes=300), 1), (screen, 35)):
        sizes = adata.obs[adata.obs["perturbation"] == "control"].groupby("plate", observed=False).size()
        assert len(sizes) == 48 and sizes.min() >= fewest


def test_sciplex3_has_the_flaws_of_the_real_file_and_says_which(screen):
    obs, truth = screen.obs, screen.uns["truth"]
    assert set(obs["perturbation"].cat.categories) - set(obs["perturbation"]) == {"Vehicle"}
    vehicle, first = obs["perturbation"] == "control", obs["replicate"] == "rep1"
    assert (obs.loc[vehicle & first, "dose_value"] == 0).all() and obs.loc[vehicle & ~first, "dose_value"].isna().all()
    total = screen.X.sum(axis=1).A1
    np.testing.assert_array_equal(obs["ncounts"], total)
    assert truth["activities"].min() >= 0 and truth["activities"].max() <= 1
    low = truth["low_count"]
    assert 0.03 < low.mean() < 0.05 and np.median(total[low]) < 0.15 * np.median(total[~low])
    inert = ~low & (activity(screen, "hdac_response") == 0) & (obs["cell_line"] == "MCF7")
    depth = pd.Series(total[inert]).groupby(obs["plate"].to_numpy(str)[inert]).mean()
    known = pd.Series(truth["plate_depth"], truth["plates"])[depth.index]
    assert len(depth) == 16 and np.corrcoef(depth, known)[0, 1] > 0.95


def mechanism(screen):
    """Return the mechanism of every cell's compound."""
    compounds = screen.uns["truth"]["compounds"]
    known = dict(zip(compounds["name"], compounds["mechanism"], strict=True))
    return np.array([known.get(name, "vehicle") for name in screen.obs["perturbation"]])


def by_dose(screen, cells, gene):
    counts = pd.Series(dense(screen[:, gene]).ravel(), index=screen.obs_names)[cells]
    return counts.groupby(screen.obs.loc[cells, "dose_value"].fillna(0)).mean()


def test_sciplex3_hdac_inhibitors_act_by_dose_and_potency_and_inert_compounds_do_not(screen):
    vehicle = screen.obs["perturbation"] == "control"
    mean = {gene: by_dose(screen, vehicle | (mechanism(screen) == "HDAC"), gene)
            for gene in ("CDKN1A", "AURKA", "ACLY", "ACSS2", "SLC25A1", "CS")}  # fmt: skip
    assert mean["CDKN1A"].iloc[-1] > 5 * mean["CDKN1A"].iloc[0] and mean["AURKA"].iloc[-1] < 0.5 * mean["AURKA"].iloc[0]
    assert mean.pop("AURKA").is_monotonic_decreasing and all(gene.is_monotonic_increasing for gene in mean.values())
    for gene in ("CDKN1A", "AURKA", "ACLY"):
        inert = by_dose(screen, vehicle | (mechanism(screen) == "none"), gene)
        assert np.abs(inert / inert.iloc[0] - 1).max() < 0.15
    response = pd.Series(activity(screen, "hdac_response"), index=screen.obs_names)
    middle = screen.obs["dose_value"] == 1000
    mean = response[middle].groupby(screen.obs.loc[middle, "perturbation"], observed=True).mean()
    assert mean["Quisinostat (JNJ-26481585) 2HCl"] > 0.6 and mean["Entinostat (MS-275)"] < 0.3


def test_sciplex3_glucocorticoid_answers_in_one_line_only(screen):
    treated = (screen.obs["perturbation"] == "Triamcinolone Acetonide") & (screen.obs["dose_value"] >= 1000)
    means = mean_by(screen[treated], "cell_line", ["FKBP5", "TSC22D3"])
    assert (means.loc["A549"] > 5 * means.drop("A549").max()).all()
    weaker = mean_by(screen[treated], "cell_line", ["ANGPTL4", "GDF15"])
    assert (weaker.loc["A549"] > 1.5 * weaker.drop("A549").max()).all()


@pytest.mark.parametrize(
    ("target", "gene", "fold"),
    [("MDM2", "MDM2", {"A549": 5, "K562": 1, "MCF7": 5}), ("mTOR", "LDHA", {"A549": 0.3, "K562": 0.3, "MCF7": 0.3}),
     ("MEK", "DUSP6", {"A549": 0.3, "K562": 0.3, "MCF7": 1}), ("HSP90", "HSPA1A", {"A549": 5, "K562": 5, "MCF7": 5}),
     ("Aurora Kinase", "MDM2", {"A549": 3, "K562": 1, "MCF7": 3})],
)  # fmt: skip
def test_sciplex3_mechanisms_move_their_genes_in_their_lines(screen, target, gene, fold):
    vehicle = mean_by(screen[screen.obs["perturbation"] == "control"], "cell_line", [gene])[gene]
    treated = screen[mechanism(screen) == target]
    any_dose = mean_by(treated, "cell_line", [gene])[gene]
    high = mean_by(treated[treated.obs["dose_value"] >= 1000], "cell_line", [gene])[gene]
    for line, mean in high.items():
        if fold[line] == 1:  # all cells: one compound has few
            assert 0.5 < any_dose[line] / vehicle[line] < 2
        else:
            assert mean > fold[line] * vehicle[line] if fold[line] > 1 else mean < fold[line] * vehicle[line]


def test_sciplex3_two_compounds_at_once_both_act():
    pairs = [("Panobinostat", "JNJ-26854165"), ("Trametinib", "(+)-JQ1")]
    adata = simulate.sciplex3(n_cells=20_000, n_genes=300, combinations=pairs)
    mdm2 = "JNJ-26854165 (Serdemetan)"
    both = f"Panobinostat (LBH589)+{mdm2}"
    cells = adata.obs["perturbation"] == both
    assert set(adata.obs.loc[cells, "target"]) == {"HDAC+E3 Ligase,p53"}
    assert set(adata.obs.loc[cells, "pathway"]) == {"Epigenetics+Apoptosis"}
    first = adata.obs["perturbation"] == "Panobinostat (LBH589)"
    assert set(adata.obs.loc[cells, "plate"]) == set(adata.obs.loc[first, "plate"])
    plenty = (adata.obs["dose_value"] == 10_000) & (adata.obs["cell_line"] == "MCF7")
    columns = ["hdac_response", "p53_response", "mapk_output"]
    table = pd.DataFrame({name: activity(adata, name) for name in columns}, index=adata.obs_names)[plenty]
    mean = table.groupby(adata.obs.loc[plenty, "perturbation"], observed=True).mean()
    for name, program in {"Panobinostat (LBH589)": "hdac_response", mdm2: "p53_response"}.items():
        assert mean.loc[name, program] > 0.6
        np.testing.assert_allclose(mean.loc[both, program], mean.loc[name, program], atol=0.1)
    k562 = (adata.obs["perturbation"] == "Trametinib (GSK1120212)+(+)-JQ1") & (adata.obs["cell_line"] == "K562")
    assert activity(adata, "mapk_output")[k562 & (adata.obs["dose_value"] == 10_000)].mean() < 0.2
    alone = simulate.sciplex3(n_cells=600, n_genes=300).obs["perturbation"].cat.categories
    assert len(alone) == 188 + 2  # control, and the Vehicle that no cell has
