import copy
from dataclasses import fields, replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from anndata import AnnData, concat, read_h5ad
from scipy import sparse

from scbmlp.datasets import ExpressionDataset, get_regression_datasets
from scbmlp.exact import Mixture
from scbmlp.interactions import decompose, interaction_matrices, interaction_matrix, similarity
from scbmlp.models import Config, ScBMLPClassifier, ScBMLPRegressor, Statistics, solve_replicas
from scbmlp.modules import (
    GeneModules,
    agreement,
    all_gene_modules,
    consensus,
    gene_modules,
    stability,
    truncation_curve,
)
from tests.test_evidence import solved_with
from tests.test_interactions import random_model
from tests.test_storage import rewritten

every_metric = pytest.mark.parametrize("metric", ["sd", "identity", "covariance"])


@pytest.fixture
def fitted():
    """A classifier with random weights, and sparse cells with one gene that is never seen."""
    model = random_model(12, 4, 3, seed=3, kind=ScBMLPClassifier)
    rng = np.random.default_rng(0)
    x = sparse.random(60, 12, density=0.6, random_state=0, dtype=np.float32).toarray() * rng.uniform(0.1, 5, 12)
    x[:, 5] = 0
    x = sparse.csr_matrix(x.astype(np.float32))
    return model, ExpressionDataset(x, rng.integers(0, 3, 60), model.gene_names, model.output_names)


def regression(fitted, hid=4, **options):
    """A regressor with random weights, and the same cells with its outputs for targets."""
    model = random_model(12, hid, 2, seed=4, kind=ScBMLPRegressor, **options)
    x = fitted[1].x
    return model, ExpressionDataset(x, model.outputs(x), model.gene_names, model.output_names)


@every_metric
def test_modules_are_eigenvectors_in_the_metric_and_add_up_to_the_output(fitted, metric):
    """eq-metric, eq-covariance: against dense algebra."""
    model, dataset = fitted
    modules = gene_modules(model, "out1", 8, metric, dataset=dataset)
    x = dataset.x.toarray().astype(np.float64)
    np.testing.assert_allclose(modules.unit, np.ones(12) if metric == "identity" else x.std(axis=0), rtol=1e-5)
    assert modules.eigenvalues.abs().is_monotonic_decreasing
    dense, scores = interaction_matrix(model, "out1").to_dense(), modules.scores(dataset).to_numpy()
    v, unit = modules.loadings.to_numpy(), modules.unit.to_numpy()
    if metric == "covariance":
        np.testing.assert_allclose(np.cov(scores, rowvar=False, bias=True), np.eye(8), atol=1e-5)
        values = np.linalg.eigvals(np.cov(x, rowvar=False, bias=True) @ dense).real
        values = values[np.argsort(-np.abs(values))][:8]
        np.testing.assert_allclose(np.sort(modules.eigenvalues), np.sort(values), rtol=1e-4)
        assert v[3, 0] == pytest.approx(np.corrcoef(x[:, 3], scores[:, 0])[0, 1], abs=1e-4)
        with pytest.raises(ValueError, match="n_modules=9: a whole number of at least 1 and at most 8"):
            gene_modules(model, "out1", 9, "covariance", dataset=dataset)
    else:
        scaled = unit[:, None] * dense * unit
        np.testing.assert_allclose(scaled @ v, v * modules.eigenvalues.to_numpy(), atol=1e-5)
        np.testing.assert_allclose(v.T @ v, np.eye(8), atol=1e-8)
        np.testing.assert_allclose(scores, x / np.where(unit > 0, unit, np.inf) @ v, rtol=1e-5, atol=1e-5)
    logits = model.outputs(dataset)
    expected = logits[:, 1] - logits.mean(axis=1)
    np.testing.assert_allclose(modules.contributions(dataset).sum(axis=1), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("metric", "n_decompositions"), [("sd", 1), ("identity", 1), ("covariance", 0)])
def test_modules_of_all_outputs_are_those_of_each_with_one_decomposition(fitted, metric, n_decompositions, monkeypatch):
    model, dataset = fitted
    calls, qr = [], np.linalg.qr
    monkeypatch.setattr(np.linalg, "qr", lambda basis: calls.append(1) or qr(basis))
    found = all_gene_modules(model, n_modules=4, metric=metric, dataset=dataset)
    assert len(calls) == n_decompositions and list(found) == list(model.output_names)
    for name, modules in found.items():
        alone = gene_modules(model, name, 4, metric, dataset=dataset)
        np.testing.assert_array_equal(modules.eigenvalues, alone.eigenvalues)
        np.testing.assert_array_equal(modules.weights, alone.weights)
        assert modules.output == alone.output == name


def test_genes_are_matched_by_name(fitted):
    model, dataset = fitted
    modules = gene_modules(model, "out2", 3, dataset=dataset)
    adata = AnnData(dataset.x, var=pd.DataFrame(index=dataset.gene_names))
    scores = modules.scores(adata[:, ::-1].copy())
    np.testing.assert_allclose(scores, modules.scores(dataset), rtol=1e-5, atol=1e-5)
    assert scores.index.equals(adata.obs_names)


@every_metric
def test_truncation_ends_at_the_model_and_starts_without_it(fitted, metric):
    model, dataset = fitted
    modules = all_gene_modules(model, None, None, metric, dataset=dataset)
    curve = truncation_curve(model, modules, dataset)
    assert curve.index.tolist() == [0, 1, 2, 4, 8]
    assert curve.loc[8, "score"] == model.score(dataset)
    assert curve.loc[0, "score"] == np.mean(dataset.y.numpy() == 0)  # argmax of equal outputs
    logits = [one.contributions(dataset).iloc[:, :2].sum(axis=1) for one in modules.values()]
    assert curve.loc[2, "score"] == np.mean(np.argmax(logits, axis=0) == dataset.y.numpy())


def test_modules_of_a_model_with_a_linear_part_hold_its_quadratic_part(fitted):
    model, cells = regression(fitted, bias=True, linear=True)
    modules = all_gene_modules(model, None, None, "identity", dataset=cells)
    quadratic = decompose(model, cells, model.origin).quadratic[:, 0]
    np.testing.assert_allclose(modules["out0"].contributions(cells).sum(axis=1), quadratic, rtol=1e-6)
    curve = truncation_curve(model, modules, cells, ks=[0, 8])  # biases and the linear part are always kept
    assert curve.loc[8].to_numpy() == pytest.approx(1, abs=1e-4)
    assert curve.loc[0, "out0"] < 0.9


@every_metric
def test_pair_of_modules_is_the_product_of_its_factors(fitted, metric):
    """eq-pair."""
    model, dataset = fitted
    modules = gene_modules(model, 0, None, metric, dataset=dataset)
    first, second = modules.eigenvalues.idxmax(), modules.eigenvalues.idxmin()
    added = modules.contributions(dataset)[[first, second]].sum(axis=1)
    for pair in ((second, first), (first,), (second,)):  # alone: the strongest of the other sign
        product = (modules.scores(dataset) @ modules.factors(*pair)).prod(axis=1)
        np.testing.assert_allclose(product, added, atol=1e-8)


def test_factors_of_one_hidden_unit_are_its_two_maps(fitted):
    model, cells = regression(fitted, hid=1)
    modules = gene_modules(model, 0, None, "identity", dataset=cells)
    factors, maps = (modules.loadings @ modules.factors()).to_numpy(), torch.cat([model.w_l, model.w_r]).numpy().T
    cosines = np.abs((factors / np.linalg.norm(factors, axis=0)).T @ (maps / np.linalg.norm(maps, axis=0)))
    np.testing.assert_allclose([cosines.max(axis=0), cosines.max(axis=1)], 1, atol=1e-5)


def test_modules_of_one_sign_are_no_product(fitted):
    modules = gene_modules(fitted[0], 0, None, dataset=fitted[1])
    rising = modules.eigenvalues[modules.eigenvalues > 0]
    same = list(rising.index[:2])
    of_one_sign = replace(modules, eigenvalues=rising, loadings=modules.loadings[rising.index])
    for factors, pair in ((modules.factors, same), (of_one_sign.factors, ())):
        with pytest.raises(ValueError, match="have eigenvalues .* needs one positive and one negative"):
            factors(*pair)


def test_modules_in_anndata_survive_a_file_and_can_be_drawn(fitted, tmp_path):
    model, dataset = fitted
    modules = gene_modules(model, "out2", 3, dataset=dataset)
    adata = AnnData(dataset.x, var=pd.DataFrame(index=dataset.gene_names))
    wider = concat([adata, AnnData(np.ones((60, 1)), adata.obs, pd.DataFrame(index=["other"]))], axis=1)
    modules.to_adata(wider)
    modules.to_adata(wider, key="out/2")
    wider.write_h5ad(tmp_path / "cells.h5ad")
    stored = read_h5ad(tmp_path / "cells.h5ad")
    np.testing.assert_allclose(stored.obsm["X_modules_out2"], modules.scores(dataset))
    np.testing.assert_array_equal(stored.varm["modules_out2"][:-1], modules.loadings)
    assert np.isnan(stored.varm["modules_out2"][-1]).all()
    np.testing.assert_array_equal(stored.uns["modules_out2"]["eigenvalues"], modules.eigenvalues)
    assert "out_2" in stored.varm
    figure, ax = plt.subplots()
    sc.pl.embedding(stored, "X_modules_out2", color="gene1", ax=ax, show=False)
    offsets = ax.collections[0].get_offsets()
    plt.close(figure)
    np.testing.assert_allclose(np.sort(offsets[:, 0]), np.sort(modules.scores(dataset)["module_1"]), rtol=1e-5)


def test_cells_the_output_is_about_score_high(fitted):
    model, dataset = fitted
    for i, name in enumerate(model.output_names):
        scores = gene_modules(model, name, 5, dataset=dataset).scores(dataset)
        about = dataset.y.numpy() == i
        assert (scores[about].mean() >= scores[~about].mean()).all()
    regressor, cells = regression(fitted)
    cells.y[:] = torch.as_tensor(np.random.default_rng(1).standard_normal((60, 2)))
    scores = gene_modules(regressor, 1, 4, dataset=cells).scores(cells)
    assert all(np.corrcoef(scores[name], cells.y[:, 1])[0, 1] >= 0 for name in scores)


def test_gene_that_never_varied_has_no_loading(fitted):
    model, dataset = fitted
    assert gene_modules(model, 0, 8, dataset=dataset).loadings.loc["gene5"].abs().max() < 1e-12
    constant = dataset.x.toarray()
    constant[:, 5] = 2.0
    cells = ExpressionDataset(constant, dataset.y, dataset.gene_names, dataset.output_names)
    assert gene_modules(model, 0, 8, dataset=cells).unit["gene5"] == 2.0


def test_top_genes(fitted):
    model, dataset = fitted
    modules = gene_modules(model, 0, 2, dataset=dataset)
    loading = modules.loadings["module_2"]
    assert modules.top_genes("module_2", 3).tolist() == sorted(loading, reverse=True)[:3]
    assert modules.top_genes(1, 3, pole="-").tolist() == sorted(loading)[:3]
    assert modules.top_genes(1, 3, pole="both").abs().tolist() == sorted(loading.abs(), reverse=True)[:3]
    with pytest.raises(KeyError, match="'module_3' is unknown; there are 2"):
        modules.top_genes("module_3")
    with pytest.raises(ValueError, match="pole='up' is unknown"):
        modules.top_genes(pole="up")


@pytest.mark.parametrize("linear", [False, True])
def test_weights_and_statistics_are_enough(cells, sets, tmp_path, linear):
    model = ScBMLPClassifier(Config(300, 8, 8, linear=linear, n_epochs=1, device="cpu"))
    model.fit(*sets[:2], baseline=False, enable_progress_bar=False)
    model.save(tmp_path / "model.pt")
    loaded = ScBMLPClassifier.load(tmp_path / "model.pt")
    for output, metric in ((0, "sd"), ({"Beta": 1, "Alpha": -1}, "identity"), ("Beta", "covariance")):
        given = gene_modules(model, output, 4, metric, dataset=sets[0])
        for alone in (gene_modules(model, output, 4, metric), gene_modules(loaded, output, 4, metric)):
            np.testing.assert_allclose(alone.eigenvalues, given.eigenvalues, rtol=1e-8)
            np.testing.assert_allclose(alone.scores(cells), given.scores(cells), rtol=1e-6, atol=1e-8)
            pd.testing.assert_frame_equal(alone.loadings, given.loadings)
    assert not np.allclose(gene_modules(model, 0, dataset=sets[2]).unit, gene_modules(model, 0).unit)  # it is used


def test_agreement_is_the_closest_module_of_every_other_fit():
    rng = np.random.default_rng(0)
    fits = [pd.DataFrame(rng.normal(size=(20, 2)), columns=["one", "two"]) for _ in range(3)]
    expected = [
        np.mean([max(abs(a[m] @ b[n]) / np.sqrt(a[m] @ a[m] * (b[n] @ b[n])) for n in b) for a in fits for b in fits
                 if a is not b])
        for m in ("one", "two")
    ]  # fmt: skip
    np.testing.assert_allclose(agreement(fits), expected)
    swapped = -3 * fits[0][["two", "one"]].set_axis(["one", "two"], axis=1)
    np.testing.assert_allclose(agreement([fits[0], swapped]), 1)


# ------------------------------------------------------------------------------------------------------- replicas


@pytest.fixture(scope="module")
def replicas(planted):
    train, *_ = get_regression_datasets(planted, "target")
    return solve_replicas(solved(train), train, 4, progress=False)


def solved(train):
    """A model of all products of the genes."""
    return solved_with([(Mixture(space="genes").plus("products", 1.0), 1e-1)] * 2, train)


def test_consensus_is_of_the_mean_interaction_matrix(replicas, planted):
    """Against dense algebra: eigenvalues of S^(1/2) Q S^(1/2), where Q is the mean over models."""
    x = get_regression_datasets(planted, "target")[0].x
    covariance = np.cov(x.T, ddof=0)
    q = np.mean([interaction_matrix(model, 0).to_dense() for model in replicas], axis=0)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values) @ vectors.T
    expected = np.linalg.eigvalsh(root @ q @ root)
    expected = expected[np.argsort(-np.abs(expected))]
    found = consensus(replicas, 0, 4)
    np.testing.assert_allclose(found.eigenvalues, expected[:4], rtol=1e-3)
    scores = found.scores(x)
    np.testing.assert_allclose(np.cov(scores.T, ddof=0), np.eye(4), atol=1e-3)
    expected = [np.corrcoef(gene, scores["module_1"])[0, 1] for gene in x.T]
    np.testing.assert_allclose(found.loadings["module_1"], expected, atol=1e-3)


def test_matrices_of_equal_branches_are_those_of_their_own_units_alone(replicas, planted):
    """A solved model: one set of weights, and of that what the output uses."""
    train, *_ = get_regression_datasets(planted, "target")
    model, x = replicas[0], train.x.astype(np.float64) - replicas[0].origin
    left, power = (one.numpy().astype(np.float64) for one in (model.w_l, model.w_p))
    for output, used in (("product", power[0]), ({"product": 1.0, "difference": 2.0}, power[0] + 2 * power[1])):
        dense = left.T * used @ left
        matrix = interaction_matrix(model, output)
        assert matrix.basis.shape == (8, np.count_nonzero(used))
        np.testing.assert_allclose(matrix.to_dense(), dense, atol=1e-12)
        np.testing.assert_allclose(np.sort(matrix.eigh()[0]), np.linalg.eigvalsh(dense), atol=1e-10)
        whole = interaction_matrix(model, output, homogeneous=True)
        np.testing.assert_allclose(whole.to_dense()[:8, :8], dense, atol=1e-12)
        np.testing.assert_allclose(matrix.quadratic_form(x), np.einsum("ci,ij,cj->c", x, dense, x), atol=1e-10)
    assert [one.basis.shape[1] for one in interaction_matrices(model)] == [8, 8]
    assert similarity(model, model, "product", dataset=train) == pytest.approx(1)


def test_what_is_there_is_stable_and_noise_is_not(replicas, planted):
    found = stability(replicas, "product", 3)
    assert list(found.columns) == ["eigenvalue", "stability", "low", "high"]
    assert (found["low"] <= found["stability"]).all() and (found["stability"] <= found["high"]).all()
    noise = planted.copy()
    noise.obsm["target"] = np.random.default_rng(0).normal(size=(1000, 2))
    train, *_ = get_regression_datasets(noise, "target")
    of_noise = stability(solve_replicas(solved(train), train, 4, "half", progress=False), 0, 3)
    assert found["stability"].iloc[:2].min() > 0.95 > 0.9 > of_noise["stability"].iloc[:2].max()


def test_modules_of_equal_strength_may_turn_among_each_other():
    """x1^2 + x2^2 has any two orthogonal directions for modules."""
    models = []
    for angle in (0.0, 0.6):
        one, two = [np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0]
        model = ScBMLPRegressor(Config(3, 2, 1))
        with torch.no_grad():
            model.branches.weight.copy_(torch.tensor([one, two, one, two]))
            model.project.weight.fill_(1.0)
        model.gene_names, model.output_names = pd.Index(list("abc")), pd.Index(["y"])
        both = model.branches.weight.detach().numpy().T
        model.statistics = Statistics(np.zeros(3), np.ones(3), both, np.zeros((3, 1)))
        models.append(model)
    np.testing.assert_allclose(stability(models, 0, 2)[["eigenvalue", "stability"]], 1)


def test_models_that_cannot_be_compared_are_refused(replicas, planted):
    other = solved(get_regression_datasets(planted, "target")[1])
    renamed = copy.deepcopy(replicas[0])
    renamed.output_names = renamed.output_names[::-1]
    for match, call in (
        ("n_modules=0", lambda: consensus(replicas, 0, 0)),
        ("trained on different cells", lambda: consensus([*replicas, other], 0)),
        ("different output_names", lambda: stability([renamed, replicas[1]], 0)),
    ):
        with pytest.raises(ValueError, match=match):
            call()


# ---------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("output", "metric"), [("out1", "sd"), ({"out0": 1.0, "out2": -0.5}, "identity"), ("out1", "covariance")]
)
def test_saved_modules_score_new_cells_without_the_model(fitted, tmp_path, metric, output):
    model, dataset = fitted
    modules = gene_modules(model, output, 3, metric, dataset=dataset)
    trust = pd.DataFrame({"r": [0.1, np.nan, 1 / 3], "terms": [1, 0, 7], "trusted": [True, False, True]})
    modules = replace(modules, layer="logs", trust=trust.set_axis(modules.eigenvalues.index))
    modules.save(tmp_path / "modules")
    loaded = GeneModules.load(str(tmp_path / "modules"))
    for field in fields(GeneModules):
        saved, back = getattr(modules, field.name), getattr(loaded, field.name)
        if isinstance(saved, pd.DataFrame | pd.Series):
            same = pd.testing.assert_frame_equal if saved.ndim == 2 else pd.testing.assert_series_equal
            same(back, saved, check_exact=True)
        else:
            assert back == saved
    new = AnnData(np.zeros((9, 12)), var=pd.DataFrame(index=modules.weights.index[::-1]))
    new.layers["logs"] = np.random.default_rng(5).uniform(0, 3, (9, 12))
    pd.testing.assert_frame_equal(loaded.contributions(new), modules.contributions(new), check_exact=True)


def test_saved_modules_of_unnamed_genes_take_unnamed_genes(tmp_path):
    model = ScBMLPClassifier(Config(6, 2, 3, device="cpu"))
    dataset = ExpressionDataset(np.eye(6), np.arange(6) % 3, pd.RangeIndex(6), pd.RangeIndex(3))
    modules = gene_modules(model, 1, 2, dataset=dataset)
    modules.save(tmp_path / "modules")
    loaded = GeneModules.load(tmp_path / "modules")
    assert isinstance(loaded.weights.index, pd.RangeIndex) and loaded.output == 1 and loaded.trust is None
    np.testing.assert_array_equal(loaded.scores(np.eye(6)), modules.scores(np.eye(6)))


def test_files_that_hold_no_whole_modules_are_refused(fitted, tmp_path):
    model, dataset = fitted
    path = tmp_path / "modules"
    gene_modules(model, "out1", 3, dataset=dataset).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="modules is damaged: save the modules"):
        GeneModules.load(path)
    # A whole file whose parts do not fit.
    for changes in ({"modules": ["module_1"]}, {"genes": ["a"]}, {"trust": 7}, {"genes": ["a"] * 12}):
        path.write_bytes(whole)
        rewritten(path, **changes)
        with pytest.raises(ValueError, match=r"modules is damaged \("):
            GeneModules.load(path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"holds GeneModules, not ScBMLPClassifier; load it by GeneModules\.load"):
        ScBMLPClassifier.load(path)
    model.save(path)
    with pytest.raises(ValueError, match="modules holds ScBMLPClassifier, not GeneModules"):
        GeneModules.load(path)


def test_modules_print_themselves_in_a_line_and_as_a_table(fitted):
    model, dataset = fitted
    model.gene_names = dataset.gene_names = pd.Index([f"<i>{i}" for i in range(12)])
    modules = gene_modules(model, "out1", 3, "covariance", dataset=dataset)
    values = ", ".join(f"{value:.3g}" for value in modules.eigenvalues)
    assert repr(modules) == f"GeneModules: output out1; modules 3 of 12 genes; metric covariance; eigenvalues {values}"
    html = modules._repr_html_()
    assert "<i>" not in html and f"&lt;i&gt;{modules.top_genes(0, 1).index[0][3:]}" in html and "trusted" not in html
    trusted = replace(modules, trust=pd.DataFrame({"trusted": [True, False, False]}, modules.eigenvalues.index))
    assert "trusted 1;" in repr(trusted) and trusted._repr_html_().count("<td>no</td>") == 2


def test_outputs_whose_keys_would_meet_keep_their_own(fitted):
    model, dataset = fitted
    model.output_names = dataset.output_names = pd.Index(["B/T", "B_T", "other"])
    adata = AnnData(dataset.x, var=pd.DataFrame(index=model.gene_names))
    for _ in range(2):  # again is over its own
        for name in model.output_names:
            gene_modules(model, name, 2, dataset=dataset).to_adata(adata)
    assert {key: adata.uns[key]["output"] for key in adata.uns} == {
        "modules_B_T": "B/T", "modules_B_T_2": "B_T", "modules_other": "other"
    }  # fmt: skip
