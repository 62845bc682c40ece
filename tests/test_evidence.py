from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse
from scipy.special import comb
from scipy.stats import chisquare, pearsonr

from scbmlp import simulate
from scbmlp import stability as stable
from scbmlp.datasets import ExpressionDataset, get_classification_datasets
from scbmlp.enrichment import enrich
from scbmlp.evidence import random_directions, trust, without_pairs
from scbmlp.exact import Mixture, solution
from scbmlp.interactions import attributions, audit, decompose, group_means, interaction_matrix
from scbmlp.models import Config, ScBMLPClassifier, ScBMLPRegressor
from scbmlp.modules import consensus, gene_modules, permutation_null, stability
from scbmlp.solving import _solved, solve, solve_replicas
from scbmlp.stability import follows_in_groups, follows_target
from tests.test_interactions import random_model


def cells_of(model, n=9, seed=0):
    """Expression of cells, drawn at random."""
    return np.random.default_rng(seed).gamma(1, 1, (n, model.cfg.d_input)).astype(np.float32)


# ---------------------------------------------------------------------------------------------- faithfulness


@pytest.mark.parametrize("linear", [False, True])
def test_attributions_are_shapley_values_counted_over_all_sets_of_genes(linear):
    """eq-attributions, on eight genes and 256 sets: the count knows nothing of weights."""
    n = 8
    model = random_model(n, 4, 2, seed=1, bias=True, linear=linear).double()
    x, reference = cells_of(model, 2), cells_of(model, 1, seed=5)[0].astype(np.float64)
    codes = np.arange(2**n)
    sets = (codes[:, None] >> np.arange(n)) % 2 == 1
    size, found = sets.sum(axis=1), attributions(model, "out1", x, reference)
    for cell, own in enumerate(x.astype(np.float64)):
        value = model(torch.as_tensor(np.where(sets, own, reference))).detach().numpy()[:, 1]
        for i in range(n):
            out = codes[~sets[:, i]]
            expected = (value[out + 2**i] - value[out]) @ (1 / (n * comb(n - 1, size[out])))
            np.testing.assert_allclose(found.iloc[cell, i], expected, rtol=1e-6, atol=1e-8)


def test_attributions_are_integrated_gradients():
    model = random_model(7, 3, 2, seed=2).double()
    x = cells_of(model, 4)
    steps = (torch.arange(200, dtype=torch.float64) + 0.5) / 200  # the midpoint rule is exact for a straight line
    path = (steps[:, None, None] * torch.as_tensor(x, dtype=torch.float64)).requires_grad_()
    model(path.reshape(-1, 7))[:, 0].sum().backward()
    found = attributions(model, "out0", x, np.zeros(7))
    np.testing.assert_allclose(found, path.grad.mean(dim=0).numpy() * x, rtol=1e-6, atol=1e-9)


def test_attributions_keep_the_names_of_cells_and_match_genes():
    model = random_model(6, 3, 2, seed=3)
    adata = AnnData(cells_of(model), pd.DataFrame(index=list("abcdefghi")), pd.DataFrame(index=model.gene_names))
    whole = attributions(model, "out0", adata, np.zeros(6))
    pd.testing.assert_frame_equal(whole, attributions(model, "out0", adata[:, ::-1], np.zeros(6)))
    assert list(whole.index) == list(adata.obs_names)
    np.testing.assert_allclose(whole.sum(axis=1), model.outputs(adata)[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_group_means_split_the_mean_output(linear, form):
    """eq-donor."""
    model = random_model(6, 3, 2, seed=4, bias=True, linear=linear)
    x, reference = cells_of(model, 40), cells_of(model, 1, seed=9)[0]
    donors = np.random.default_rng(1).choice(["a", "b", "c"], 40)
    table = group_means(model, "out1", form(x), donors, reference)
    q, (constant, _, _) = interaction_matrix(model, "out1").to_dense(), decompose(model, x, reference)
    for donor, row in table.iterrows():
        own = x[donors == donor].astype(np.float64)
        m = own.mean(axis=0) - reference
        assert row["n_cells"] == len(own)
        np.testing.assert_allclose(row["constant"], constant[0, 1], rtol=1e-6)
        np.testing.assert_allclose(row["pseudobulk"], m @ q @ m, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(row["coexpression"], np.trace(q @ np.cov(own.T, bias=True)), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(row["mean"], model.outputs(own)[:, 1].mean(), rtol=1e-4, atol=1e-5)
    # Labels of AnnData's cells are matched by name.
    obs, var = pd.DataFrame({"donor": donors}, [f"c{i}" for i in range(40)]), pd.DataFrame(index=model.gene_names)
    adata = AnnData(form(x), obs, var)
    turned = group_means(model, "out1", adata, adata.obs["donor"][::-1], reference)
    pd.testing.assert_frame_equal(turned, table)
    with pytest.raises(ValueError, match="groups has rows of other cells than adata"):
        group_means(model, "out1", adata, adata.obs["donor"].add_prefix("x"), reference)


# ------------------------------------------------------------------------------------------------------ nulls


def noise(seed, n=160, n_genes=12, kind=ScBMLPClassifier):
    rng = np.random.default_rng(seed)
    x = rng.gamma(1, 1, (n, n_genes)).astype(np.float32)
    y = rng.integers(0, 2, n) if kind is ScBMLPClassifier else rng.standard_normal((n, 2)).astype(np.float32)
    genes, outputs = pd.Index([f"gene{i}" for i in range(n_genes)]), pd.Index(["a", "b"])
    parts = slice(0, n * 5 // 8), slice(n * 5 // 8, n)
    return [ExpressionDataset(x[part], y[part], genes, outputs) for part in parts]


def solved_with(recipe, train, kind=ScBMLPRegressor):
    """A model whose mixtures and penalties are given, products that do not pay among them."""
    cfg = Config(len(train.gene_names), 1, len(train.output_names), linear=True, device="cpu")
    model = _solved(kind, cfg, solution(train, *zip(*recipe, strict=True)), train)
    model.recipe = recipe
    return model


PRODUCTS = Mixture(rank=8).plus("products", 1.0)
RECIPE = [(PRODUCTS, 1e-2), (Mixture(rank=5).plus("components", 2.0).plus("products", 0.5), 1e-1)]


@pytest.mark.parametrize("kind", [ScBMLPClassifier, ScBMLPRegressor])
def test_p_values_are_uniform_where_nothing_is_and_products_are_forced(kind):
    """eq-permutation."""
    p, recipe = [], RECIPE[:1] if kind is ScBMLPClassifier else RECIPE
    for seed in range(40):
        sets = noise(seed, kind=kind)
        model = solved_with(recipe, sets[0], kind)
        p.append(permutation_null(model, *sets, "a", 19, seed=seed, progress=False)["p"].min())
    assert chisquare(np.histogram(p, [0, 0.21, 0.41, 0.61, 0.81, 1])[0]).pvalue > 1e-3, p
    assert abs(np.mean(p) - 0.525) < 0.12


@pytest.mark.parametrize(
    ("metric", "space", "dense"),
    [
        ("sd", "components", 400),
        ("identity", "genes", 400),
        ("covariance", "sd", 400),
        ("covariance", "components", 2),
        ("sd", "genes", 2),
    ],
)
def test_a_permutation_is_the_model_solved_again(metric, space, dense, monkeypatch):
    """For an output, and for a mix of outputs of different mixtures; by both ways to the eigenvectors."""
    monkeypatch.setattr(stable, "DENSE", dense)
    train, val = noise(1, kind=ScBMLPRegressor)
    recipe = [(RECIPE[0][0]._replace(space=space), 1e-2), RECIPE[1]]
    prepare = stable._preparer(solved_with(recipe, train), train, val, metric)
    rng = np.random.default_rng(0)
    orders = [np.stack([np.arange(n), rng.permutation(n)]) for n in (len(train), len(val))]
    for output in ("a", {"a": 1.0, "b": -0.5}):
        first, r = stable._read(*prepare(output), 4, *orders, False)
        for k, (order, order_val) in enumerate(zip(*orders, strict=True)):
            model, dealt = solved_with(recipe, replaced(train, order)), replaced(val, order_val)
            known = gene_modules(model, output, 4, metric)
            if k == 0:
                np.testing.assert_allclose(first, known.eigenvalues, rtol=1e-3)
            np.testing.assert_allclose(r[k], follows_target(known, model, dealt), atol=2e-4)


def replaced(dataset, order):
    names = dataset.gene_names, dataset.output_names
    return ExpressionDataset(dataset.x, dataset.y[order].numpy(), *names, dataset.indices)


def test_classes_are_judged_by_squared_errors():
    train, val = noise(4)
    table = permutation_null(solved_with(RECIPE[:1], train, ScBMLPClassifier), train, val, "b", 9, progress=False)
    shares = np.bincount(train.y) / len(train)
    both = [ExpressionDataset(one.x, np.eye(2)[one.y], one.gene_names, one.output_names) for one in (train, val)]
    model = solved_with([(PRODUCTS, 1e-2 / np.mean(shares * (1 - shares)))] * 2, both[0])
    known = gene_modules(model, {"b": 0.5, "a": -0.5}, 5, "covariance")
    np.testing.assert_allclose(table["eigenvalue"], known.eigenvalues, rtol=1e-4)
    np.testing.assert_allclose(table["r"], follows_target(known, model, both[1]), atol=1e-4)


def test_a_module_follows_the_target_in_each_group_by_itself():
    train, val = noise(5, kind=ScBMLPRegressor)
    val.indices = np.arange(len(val)) + len(train)
    model = solved_with(RECIPE, train)
    known = gene_modules(model, "a", 3, "covariance")
    groups = np.repeat(["one", "two", "three", "four"], [60, 40, 59, 1])
    found = follows_in_groups(known, model, [train, val], pd.Series(groups))
    assert list(found) == ["one", "two", "three", "four"] and found["four"].isna().all()
    for name, part, rows in (("two", train, slice(60, 100)), ("three", val, slice(0, 59))):
        alone = np.corrcoef(known.contributions(part).iloc[rows, 1], part.y[rows, 0])[0, 1]
        np.testing.assert_allclose(found[name].iloc[1], alone, atol=1e-5)


def test_p_values_are_small_where_something_is():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 6)).astype(np.float32)
    y = np.stack([x[:, 0] * x[:, 1], x[:, 2]], axis=1) + 0.2 * rng.standard_normal((400, 2))
    names = pd.Index(list("abcdef")), pd.Index(["y", "z"])
    parts = [ExpressionDataset(x[i], y[i], *names) for i in np.split(np.arange(400), 2)]
    model = solve(ScBMLPRegressor, *parts, progress=False)
    table = permutation_null(model, *parts, "y", n_modules=2, progress=False)
    assert (table["p"] == 0.001).all() and (table["r"] > table["null"]).all() and len(table.attrs["null"]["y"]) == 999
    both = permutation_null(model, *parts, ["y", "z"], 99, n_modules=2, metric="sd", progress=False)
    assert (both.loc["y", "p"] == 0.01).all() and both.attrs["metric"] == "sd"
    # Nothing is read where products do not pay.
    assert model.recipe[1][0].weight("products") == 0 and "z" not in both.index and both.attrs["null"]["z"] == []
    nothing = permutation_null(model, *parts, "z", 9, progress=False)
    assert nothing.empty and list(nothing) == ["eigenvalue", "r", "null", "p"]
    assert len(gene_modules(model, "z").eigenvalues) == 0


def test_targets_are_permuted_within_strata():
    """The target is the stratum, and stays."""
    train, val = noise(2, kind=ScBMLPRegressor)
    donors = np.where(np.arange(160) % 4 == 0, "one", "two")
    train.indices, val.indices = np.arange(100), np.arange(100, 160)
    for one in (train, val):
        one.y[:] = torch.as_tensor(donors[one.indices] == "one").float()[:, None]
    model = solved_with(RECIPE, train)
    table = permutation_null(model, train, val, "a", 3, donors, progress=False)
    np.testing.assert_allclose(table.attrs["null"]["a"], table["r"].max(), rtol=1e-6)
    assert np.ptp(permutation_null(model, train, val, "a", 3, progress=False).attrs["null"]["a"]) > 0


def test_a_null_needs_a_solved_model_a_target_that_differs_and_strata_of_all_cells():
    train, val = noise(3)
    train.indices, val.indices = np.arange(100), np.arange(100, 160)
    model = solved_with(RECIPE[:1], train, ScBMLPClassifier)
    known = {"model": model, "train": train, "val": val, "output": "a", "n_permutations": 1, "progress": False}
    donors = ["one", "two"] * 80
    for match, options in (
        ("val is of type NoneType", {"val": None}),
        ("val has the same target of 'a' in every cell", {"val": replaced(val, np.zeros(len(val), int))}),
        ("n_permutations=0", {"n_permutations": 0}),
        ("metric='cosine' is unknown", {"metric": "cosine"}),
        ("strata has 120 labels, the last cell of val is cell 159; pass one label", {"strata": donors[:120]}),
        ("strata has no label for 1 cells of train", {"strata": [None, *donors[1:]]}),
    ):
        with pytest.raises(ValueError, match=match):
            permutation_null(**known | options)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_without_pairs_each_gene_keeps_its_target_and_loses_the_others(form):
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 500)
    both = rng.gamma(2, 1, (1000, 1))
    x = (both + 0.1 * rng.gamma(2, 1, (1000, 300)) + y[:, None]).astype(np.float32)
    dataset = ExpressionDataset(form(x), y, pd.RangeIndex(300).astype(str), pd.Index(["a", "b"]), layer="log")
    before = x.copy()
    dealt = without_pairs(dataset)
    assert sparse.issparse(dealt.x) == sparse.issparse(dataset.x) and dealt.layer == "log"
    new = dealt.x.toarray() if sparse.issparse(dealt.x) else dealt.x
    for label in (0, 1):  # values of every gene in every class are the same ones
        np.testing.assert_array_equal(np.sort(new[y == label], axis=0), np.sort(x[y == label], axis=0))
        r = np.corrcoef(new[y == label].T)[np.triu_indices(300, 1)]
        assert np.abs(r).max() < 0.3 and np.corrcoef(x[y == label].T).min() > 0.8
    np.testing.assert_array_equal(dataset.x.toarray() if sparse.issparse(dataset.x) else dataset.x, before)
    again = without_pairs(dataset).x
    assert (again != dealt.x).sum() == 0
    continuous = ExpressionDataset(x, (x[:, :1] - 3), dataset.gene_names, pd.Index(["y"]))
    dealt = without_pairs(continuous, n_groups=20)
    assert pearsonr(dealt.x[:, 0], continuous.y[:, 0])[0] > 0.95
    with pytest.raises(ValueError, match="n_groups"):
        without_pairs(continuous, n_groups=1001)


# ------------------------------------------------------------------------------------------------------ trust


@pytest.fixture(scope="module")
def found():
    """Cells with one planted pair, replicas of a solved model, their consensus, a null, gene sets and an audit."""
    adata = simulate.planted_interactions(seed=3, n_cells=900, n_genes=120, n_programs=3, genes_per_program=20)
    train, val, test = get_classification_datasets(adata, "label")
    solved = solve(ScBMLPClassifier, train, val, progress=False)
    replicas = solve_replicas(solved, train, 4, progress=False)
    null = permutation_null(solved, train, val, "on", 99, progress=False)
    noise = {f"noise{i}": [f"Sim{i * 7 + j:04d}" for j in range(1, 7)] for i in range(9)}
    parts = {"sets": adata.uns["truth"]["programs"] | noise, "modules": consensus(replicas, "on", 5)}
    return SimpleNamespace(adata=adata, train=train, val=val, test=test, replicas=replicas, null=null, **parts)


def test_a_model_without_products_has_nothing_to_trust(found):
    none = {name: getattr(found.modules, name).iloc[:, :0] for name in ("loadings", "weights")}
    table = trust(replace(found.modules, eigenvalues=found.modules.eigenvalues[:0], **none), [], None).trust
    assert len(table) == 0 and list(table.columns) == ["trusted"]


def test_trust_is_earned_by_the_modules_of_the_planted_pair_alone(found):
    modules, replicas, val = found.modules, found.replicas, found.val
    table = audit(replicas[0], found.test, train=found.train, validation=val)
    drawn = random_directions(modules, found.train)
    enriched, blind = (enrich(one, found.sets, n_top=20) for one in (modules, drawn))
    believed = trust(modules, replicas, val, null=found.null, audit=table, enriched=enriched, enriched_random=blind)
    rows = believed.trust
    assert list(rows["trusted"]) == [True, True, False, False, False], rows.T
    assert (rows["p"][:2] == 0.01).all() and (rows["stability"][:2] > 0.9).all()
    assert (rows["gain_curved"] == table.loc["on", "gain_curved"]).all() and rows["gain_curved"].iloc[0] > 0.1
    back = stability(replicas, "on", modules=modules, dataset=val)
    pd.testing.assert_frame_equal(rows[["stability", "low"]], back[["stability", "low"]])
    assert modules.trust is None
    both = trust({"on": modules}, replicas, val, null=found.null)
    assert list(both["on"].trust.columns) == ["eigenvalue", "stability", "low", "r", "p", "similarity", "trusted"]
    cells = found.adata.copy()
    believed.to_adata(cells)
    pd.testing.assert_frame_equal(cells.uns["modules_on"]["trust"], rows)
    with pytest.raises(KeyError, match="audit has no row 'on'; it has off"):
        trust(modules, replicas, val, audit=table.drop("on"))


def test_modules_that_other_fits_do_not_have_are_not_trusted(found):
    """However well they follow the target."""
    dealt = replaced(found.train, np.random.default_rng(0).permutation(len(found.train)))
    strangers = solve_replicas(found.replicas[0], dealt, 2, progress=False)
    alone = trust(found.modules, strangers, found.val, null=found.null).trust
    assert (alone["p"][:2] == 0.01).all() and not alone["trusted"].any(), alone.T


def test_what_does_not_go_together_is_refused(found):
    replicas, val, null = found.replicas, found.val, found.null
    for modules, error, message in (
        (consensus(replicas, "off", 2), KeyError, "null has no fits read for 'off'; it has on"),
        (gene_modules(replicas[0], "on", 2), ValueError, r"metric 'covariance', .*null\(..., metric='sd'\)"),
    ):
        with pytest.raises(error, match=message):
            trust(modules, replicas, val, null=null)
    with pytest.raises(ValueError, match="modules= and dataset= together"):
        stability(replicas, "on", modules=found.modules)


def test_stability_of_given_modules_is_their_best_match_in_every_model(found):
    modules = gene_modules(found.replicas[0], "on", 2, "covariance")
    table = stability(found.replicas, "on", modules=modules, dataset=found.val)
    scores, by_hand = modules.scores(found.val).to_numpy(), []
    for model in found.replicas:
        other = gene_modules(model, "on", 2, "covariance").scores(found.val).to_numpy()
        by_hand.append(np.abs(np.corrcoef(scores.T, other.T)[:2, 2:]).max(axis=1))
    np.testing.assert_allclose(table["stability"], np.mean(by_hand, axis=0), atol=1e-6)


def test_random_directions_have_the_correlations_of_the_cells(found):
    draws = [random_directions(found.modules, found.train, random_state=i).loadings for i in range(60)]
    length = np.linalg.norm(found.modules.loadings, axis=0)
    np.testing.assert_allclose(np.linalg.norm(draws[0], axis=0), length, rtol=1e-6)
    x = found.train.x.toarray() if sparse.issparse(found.train.x) else found.train.x
    pairs = np.triu_indices(120, 1)
    assert pearsonr(np.corrcoef(x.T)[pairs], np.corrcoef(np.hstack(draws))[pairs])[0] > 0.5
    assert not np.allclose(draws[0], draws[1], rtol=0.1)  # another draw is another direction
