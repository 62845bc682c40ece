"""Directions, mean effects and additivity, against computations by hand and repeated experiments."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from scbmlp.effects import additivity, mean_effects, response_directions
from scbmlp.targets import dose_coordinates


def test_directions_are_slopes_on_the_dose_within_each_stratum(treated):
    adata = treated.copy()
    dose_coordinates(adata, "drug", "dose", "control")
    rng = np.random.default_rng(0)
    adata.obsm["X_pert"] = rng.normal(size=(adata.n_obs, 2)) + adata.obsm["X_dose"].to_numpy() @ [[3, 0], [0, -1]]
    chosen = rng.random(adata.n_obs) < 0.7
    found = response_directions(adata, strata="line", cells=chosen)
    for line in "ab":
        rows = chosen & (adata.obs["line"] == line).to_numpy()
        design = np.column_stack([np.ones(rows.sum()), adata.obsm["X_dose"].to_numpy()[rows]])
        slopes = np.linalg.lstsq(design, adata.obsm["X_pert"][rows], rcond=None)[0][1:]
        np.testing.assert_allclose(found.loc[line], slopes, atol=1e-6)
    assert list(found.loc["a"].index) == ["active", "inert"]
    together = response_directions(adata)
    assert list(together.index) == ["active", "inert"] and together.loc["active", 0] == pytest.approx(3, abs=0.4)


@pytest.fixture
def scored(treated):
    rng = np.random.default_rng(1)
    line, drug = (treated.obs[key].to_numpy() for key in ("line", "drug"))
    score = rng.normal(size=treated.n_obs) * 2 + 10 * (line == "b") + 3 * (drug == "active")
    return pd.DataFrame({"one": score, "other": rng.normal(size=treated.n_obs)}, treated.obs_names)


def test_mean_effects_and_their_errors_by_hand(treated, scored):
    rows = np.arange(treated.n_obs) % 5 != 0
    line, drug = (treated.obs[key].to_numpy() for key in ("line", "drug"))
    rows &= (line == "a") | (np.arange(treated.n_obs) % 2 == 0)  # unequal strata
    found = mean_effects(scored, treated, "drug", "control", strata="line", cells=rows)
    groups = [scored["one"][(drug == "control") & (line == which)] for which in "ab"]
    pooled = np.sqrt(sum((len(g) - 1) * g.var() for g in groups) / (sum(map(len, groups)) - 2))
    effects = (scored["one"] - np.where(line == "a", groups[0].mean(), groups[1].mean())) / pooled
    for name in ("active", "inert", "control"):
        here = rows & (drug == name)
        shares = [np.mean(line[here] == which) for which in "ab"]
        own = effects[here].var() / here.sum()
        row, of_controls = found.loc[name, "one"], sum(s**2 / len(g) for s, g in zip(shares, groups, strict=True))
        assert row["effect"] == pytest.approx(effects[here].mean())
        assert row["error"] == pytest.approx(np.sqrt(own + of_controls))
        assert row["z"] == pytest.approx(row["effect"] / row["error"]) and row["n_cells"] == here.sum()
    assert found.loc[("active", "one"), "z"] > 5
    by = mean_effects(scored["one"], treated, "drug", "control", by=["drug", "line"], strata="line")
    assert by.index.names == ["drug", "line", "score"] and len(by) == 6


def test_errors_of_mean_effects_are_those_of_repeated_experiments():
    """eq-effect-error: with few controls, z without the noise of their means would not be standard normal."""
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"drug": ["control"] * 8 + ["inert"] * 40, "plate": ["p", "q"] * 24})
    adata = AnnData(np.zeros((48, 1), np.float32), obs=obs.set_index(obs.index.astype(str)))
    scores = pd.DataFrame(rng.normal(size=(48, 2000)), adata.obs_names)
    z = mean_effects(scores, adata, "drug", "control", strata="plate", cells=obs["drug"] == "inert")["z"]
    # In units of a standard deviation from 6 degrees of freedom the tails are a little heavier.
    assert z.std() == pytest.approx(1, abs=0.25) and abs(z.mean()) < 0.1
    assert z.abs().quantile(0.68) == pytest.approx(1, abs=0.15)


def observed(effects, n_cells, noise, rng):
    """Draw noisy cells of perturbations whose effects are known."""
    labels = np.repeat(list(effects), n_cells)
    x = np.stack([effects[name] for name in labels])
    x = x + noise * rng.normal(size=x.shape)
    return x, AnnData(np.zeros((len(x), 1)), obs=pd.DataFrame({"given": labels}, map(str, range(len(x))))), labels


def test_effects_that_add_up_reach_the_ceiling_and_others_do_not():
    rng, n_cells = np.random.default_rng(0), 200
    a, b, c = rng.normal(size=(3, 60))
    effects = {"control": 0 * a, "A": a, "B": b, "A+B": a + b, "C": c, "A+C": a + 2 * rng.normal(size=60)}
    effects |= {"D": 0 * a, "E": 0 * a, "D+E": 0 * a, "A+none": a}
    x, adata, labels = observed(effects, n_cells, 3, rng)
    found = additivity(x, adata, "given", "control", n_splits=20)
    assert list(found.index) == ["A+B", "A+C", "D+E"] and (found["n_cells"] == n_cells).all()
    mean = {name: x[labels == name].mean(axis=0) for name in effects}
    total = mean["A"] + mean["B"] - 2 * mean["control"]
    assert found.loc["A+B", "r"] == pytest.approx(np.corrcoef(mean["A+B"] - mean["control"], total)[0, 1])
    assert found.loc["A+B", "r_halves"] == pytest.approx(found.loc["A+B", "ceiling"], abs=0.03)
    assert found.loc["A+B", "ceiling"] > 0.8 and found.loc["A+B", "slope"] == pytest.approx(1, abs=0.1)
    assert found.loc["A+C", "r_halves"] < found.loc["A+C", "ceiling"] - 0.2
    # Nothing is done, but the shared controls correlate.
    assert found.loc["D+E", "ceiling"] < 0.3 < found.loc["D+E", "r"]
    # The halves of nothing do not agree: no slope along it.
    assert np.isnan(found.loc["D+E", "slope"]) and found["slope"].notna().sum() == 2
    same = additivity(sparse.csr_matrix(x), adata, "given", "control", n_splits=20)
    pd.testing.assert_frame_equal(same, found)


@pytest.mark.parametrize("truth", [0.5, 0.9])
@pytest.mark.parametrize("noise", [3, 7])
def test_correlation_over_ceiling_is_that_of_the_true_effects(truth, noise):
    """eq-ceiling"""
    rng, n_genes, n_cells = np.random.default_rng(0), 3000, 100
    a, b, other = rng.normal(size=(3, n_genes))
    both = truth * (a + b) + np.sqrt(2 * (1 - truth**2)) * other
    x, adata, _ = observed({"control": 0 * a, "A": a, "B": b, "A+B": both}, n_cells, noise, rng)
    found = additivity(x, adata, "given", "control", n_splits=10).loc["A+B"]
    # The ceiling by arithmetic: signal over signal and noise of a half, whose control cells count too.
    of_double, of_sum = (2 / (2 + k * noise**2 / (n_cells / 2)) for k in (2, 6))
    assert found["ceiling"] == pytest.approx(np.sqrt(of_double * of_sum), abs=0.03)
    assert found["r_halves"] / found["ceiling"] == pytest.approx(truth, abs=0.06)
    assert found["slope"] == pytest.approx(truth, abs=0.05)


def test_groups_without_cells_to_compare_are_refused(treated, scored):
    lacking = treated[(treated.obs["line"] == "a") | (treated.obs["drug"] != "control")].copy()
    with pytest.raises(ValueError, match=r"strata=\['line'\] have no cell of 'control' to compare with in b"):
        mean_effects(scored.loc[lacking.obs_names], lacking, "drug", "control", strata="line")
    few = treated[:4].copy()
    few.obs["drug"] = ["control", "A", "B", "A+B"]
    with pytest.raises(ValueError, match="A, A\\+B, B, control have a single cell"):
        additivity(few.X, few, "drug", "control")


def test_halves_are_the_same_in_every_process():
    script = """
import numpy as np, pandas as pd
from anndata import AnnData
from scbmlp.effects import additivity
obs = pd.DataFrame({"given": np.repeat(["control", "A", "B", "A+B"], 10)}, map(str, range(40)))
x = np.random.default_rng(0).normal(size=(40, 5))
print(additivity(x, AnnData(x, obs=obs), "given", "control", n_splits=3)["r_halves"].iloc[0])
"""
    environments = [os.environ | {"PYTHONHASHSEED": seed} for seed in "12"]
    one, other = (subprocess.check_output([sys.executable, "-c", script], env=each, text=True) for each in environments)
    assert one == other != ""
