import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from scbmlp.datasets import ExpressionDataset
from scbmlp.interactions import interaction_matrix
from scbmlp.models import ScBMLPClassifier, ScBMLPRegressor
from scbmlp.modules import gene_modules
from tests.test_interactions import random_model


@pytest.fixture
def fitted():
    """A classifier with random weights, and sparse cells with one gene that is never seen."""
    model = random_model(12, 4, 3, seed=3, kind=ScBMLPClassifier)
    rng = np.random.default_rng(0)
    x = sparse.random(60, 12, density=0.6, random_state=0, format="csr", dtype=np.float32).toarray() * rng.uniform(
        0.1, 5, 12
    )
    x[:, 5] = 0
    x = sparse.csr_matrix(x.astype(np.float32))
    return model, ExpressionDataset(x, rng.integers(0, 3, 60), model.gene_names, model.output_names)


@pytest.mark.parametrize("metric", ["sd", "identity"])
def test_modules_are_eigenvectors_in_the_metric(fitted, metric):
    model, dataset = fitted
    modules = gene_modules(model, "out1", 8, metric, dataset=dataset)
    unit = dataset.x.toarray().astype(np.float64).std(axis=0) if metric == "sd" else np.ones(12)
    np.testing.assert_allclose(modules.unit, unit, rtol=1e-5)
    matrix = np.diag(unit) @ interaction_matrix(model, "out1").to_dense() @ np.diag(unit)
    v = modules.loadings.to_numpy()
    np.testing.assert_allclose(matrix @ v, v * modules.eigenvalues.to_numpy(), atol=1e-5)
    np.testing.assert_allclose(v.T @ v, np.eye(8), atol=1e-8)
    assert modules.eigenvalues.abs().is_monotonic_decreasing


@pytest.mark.parametrize("metric", ["sd", "identity"])
def test_contributions_of_all_modules_add_up_to_the_output(fitted, metric):
    model, dataset = fitted
    modules = gene_modules(model, "out0", 8, metric, dataset=dataset)
    logits = model.outputs(dataset)
    expected = logits[:, 0] - logits.mean(axis=1)
    np.testing.assert_allclose(modules.contributions(dataset).sum(axis=1), expected, rtol=1e-3, atol=1e-4)


def test_scores_are_projections_and_genes_are_matched_by_name(fitted):
    model, dataset = fitted
    modules = gene_modules(model, "out2", 3, dataset=dataset)
    unit = modules.unit.where(modules.unit > 0, np.inf).to_numpy()
    expected = dataset.x.toarray() / unit @ modules.loadings.to_numpy()
    adata = AnnData(dataset.x, var=pd.DataFrame(index=dataset.gene_names))
    shuffled = adata[:, np.random.default_rng(0).permutation(12)].copy()
    np.testing.assert_allclose(modules.scores(shuffled), expected, rtol=1e-5, atol=1e-5)
    assert modules.scores(shuffled).index.equals(adata.obs_names)
    with pytest.raises(KeyError, match="lacks 2 of the 12 genes"):
        modules.scores(adata[:, 2:])


def test_cells_the_output_is_about_score_high(fitted):
    model, dataset = fitted
    for i, name in enumerate(model.output_names):
        scores = gene_modules(model, name, 5, dataset=dataset).scores(dataset)
        about = dataset.y.numpy() == i
        assert (scores[about].mean() >= scores[~about].mean()).all()
    regressor = random_model(12, 4, 2, seed=4, kind=ScBMLPRegressor)
    target = np.random.default_rng(1).standard_normal((60, 2)).astype(np.float32)
    cells = ExpressionDataset(dataset.x, target, regressor.gene_names, regressor.output_names)
    scores = gene_modules(regressor, 1, 4, dataset=cells).scores(cells)
    assert all(np.corrcoef(scores[name], target[:, 1])[0, 1] >= 0 for name in scores)


def test_gene_that_never_varied_has_no_loading(fitted):
    model, dataset = fitted
    assert gene_modules(model, 0, 8, dataset=dataset).loadings.loc["gene5"].abs().max() < 1e-12
    constant = dataset.x.toarray()
    constant[:, 5] = 2.0
    cells = ExpressionDataset(constant, dataset.y, dataset.gene_names, dataset.output_names)
    modules = gene_modules(model, 0, 8, dataset=cells)
    assert modules.unit["gene5"] == 2.0
    logits = model.outputs(cells)
    np.testing.assert_allclose(
        modules.contributions(cells).sum(axis=1), logits[:, 0] - logits.mean(axis=1), rtol=1e-3, atol=1e-3
    )


def test_top_genes(fitted):
    model, dataset = fitted
    modules = gene_modules(model, 0, 2, dataset=dataset)
    loading = modules.loadings["module_2"]
    assert modules.top_genes("module_2", 3).tolist() == sorted(loading, reverse=True)[:3]
    assert modules.top_genes(1, 3, pole="-").tolist() == sorted(loading)[:3]
    assert modules.top_genes(1, 3, pole="both").abs().tolist() == sorted(loading.abs(), reverse=True)[:3]
    with pytest.raises(KeyError, match="'module_3' is unknown; there are 2"):
        modules.top_genes("module_3")


def test_bad_requests(fitted):
    model, dataset = fitted
    with pytest.raises(ValueError, match="metric='cosine' is unknown; choose 'sd' or 'identity'"):
        gene_modules(model, 0, metric="cosine", dataset=dataset)
    with pytest.raises(ValueError, match=r"k=9 eigenpairs.*1 to 8"):
        gene_modules(model, 0, 9, dataset=dataset)
    with pytest.raises(KeyError, match="'Beta' is unknown"):
        gene_modules(model, "Beta", 2, dataset=dataset)
