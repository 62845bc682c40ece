"""Are new cells labelled as the model says, genes matched or refused, and files looked at as they are?"""

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata.tests.helpers import assert_adata_equal
from scipy import sparse
from scipy.io import mmwrite
from scipy.special import softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss

from scbmlp.annotate import UNASSIGNED, annotate, calibrate, calibration_error
from scbmlp.datasets import get_classification_datasets
from scbmlp.interactions import attributions
from scbmlp.look import look
from scbmlp.models import ScBMLPClassifier, ScBMLPRegressor, solve
from scbmlp.modules import all_gene_modules
from scbmlp.report import main, prepare
from tests.test_report import G, own_cells


@pytest.fixture(scope="module")
def solved():
    """A solved model of three classes with products, calibrated, of cells with wrong labels; not to be changed."""
    adata, rng = own_cells(), np.random.default_rng(0)
    wrong = rng.random(adata.n_obs) < 0.2
    adata.obs.loc[wrong, "type"] = rng.permutation(adata.obs["type"][wrong])
    train, validation, _ = get_classification_datasets(adata, "type", 0.6, 0.3)
    model = solve(ScBMLPClassifier, train, validation, form="products of components", progress=False)
    model.calibration = calibrate(model, train, validation)
    return model, train, validation


def test_temperature_threshold_and_error_are_those_of_other_computations(solved):
    model, train, validation = solved
    known, logits, y = model.calibration, model.outputs(validation).astype(float), validation.y.numpy()
    grid = np.geomspace(0.1, 10, 2000)
    losses = [log_loss(y, softmax(logits / t, axis=1)) for t in grid]
    assert known["temperature"] == pytest.approx(grid[np.argmin(losses)], rel=0.01)
    assert ((logits.max(axis=1) - logits.mean(axis=1)) >= known["threshold"]).mean() == pytest.approx(0.95, abs=0.02)
    assert set(known["unseen"]) == {"a/b", "<b>", "c"} and all(0 <= share <= 1 for share in known["unseen"].values())
    probability = softmax(logits, axis=1)
    right, most = probability.argmax(axis=1) == y, probability.max(axis=1)
    true, said = calibration_curve(right, most, n_bins=15)
    sizes = np.histogram(most, np.linspace(0, 1, 16))[0]
    expected = (np.abs(true - said) * sizes[sizes > 0]).sum() / len(y)
    assert calibration_error(probability, y) == pytest.approx(expected) == known["error_before"]


def test_a_model_keeps_its_calibration_and_a_new_fit_has_none(solved, tmp_path):
    model, train, _ = solved
    model.save(tmp_path / "model.safetensors")
    again = ScBMLPClassifier.load(tmp_path / "model.safetensors")
    assert again.calibration == model.calibration
    again.cfg.n_epochs = 1
    again.fit(train, baseline=False, enable_progress_bar=False)
    assert again.calibration is None


def test_cells_get_label_probability_genes_and_module_scores_and_stay_as_they_are(solved):
    model, before, adata = solved[0], own_cells(), own_cells()
    found = annotate(adata, model)
    assert_adata_equal(adata, before)
    logits = model.outputs(adata).astype(float)
    low = logits.max(axis=1) - logits.mean(axis=1) < model.calibration["threshold"]
    labels = np.where(low, UNASSIGNED, model.predict(adata))
    np.testing.assert_array_equal(found.obs["scbmlp_label"].astype(str), labels)
    assert 0 < low.sum() == found.uns["scbmlp"]["n_unassigned"]
    assert list(found.obs["scbmlp_label"].cat.categories) == ["<b>", "a/b", "c", UNASSIGNED]
    expected = softmax(logits / model.calibration["temperature"], axis=1).max(axis=1)
    np.testing.assert_allclose(found.obs["scbmlp_probability"], expected, rtol=1e-5)
    for i in np.flatnonzero(~low)[:5]:
        top = attributions(model, labels[i], adata[[i]], model.origin).iloc[0].nlargest(5)
        assert found.obs["scbmlp_genes"].iloc[i].split(", ") == list(top.index[top > 0])
    assert (found.obs["scbmlp_genes"][low] == "").all()
    modules = all_gene_modules(model, ["a/b"], 3, "covariance")["a/b"]
    np.testing.assert_allclose(found.obsm["X_modules_a_b"], modules.scores(adata), atol=1e-5)


def test_counts_are_normalised_and_genes_in_any_order_are_matched(solved):
    model, counts = solved[0], own_cells()
    counts.X = counts.X.expm1().rint()
    logged = counts.copy()
    sc.pp.normalize_total(logged, target_sum=1e4)
    sc.pp.log1p(logged)
    found = annotate(counts[:, ::-1].copy(), model)
    np.testing.assert_array_equal(found.obs["scbmlp_probability"], annotate(logged, model).obs["scbmlp_probability"])
    assert "has counts" in found.uns["scbmlp"]["notes"][0] and found.X.max() == counts.X.max()


def test_missing_genes_say_nothing_and_are_refused_above_a_share(solved):
    model, adata = solved[0], own_cells()
    part = adata[:, 1:].copy()
    found, filled = annotate(part, model, max_missing=1), adata.copy()
    filled.X = filled.X.toarray()
    filled.X[:, 0] = model.statistics.mean[0]
    expected = softmax(model.outputs(filled) / model.calibration["temperature"], axis=1).max(axis=1)
    np.testing.assert_allclose(found.obs["scbmlp_probability"], expected, rtol=1e-4)
    facts = found.uns["scbmlp"]
    assert list(facts["missing"]) == ["gene0"] and 0 < facts["missing_weight"] < 1 and facts["n_matched"] == G - 1
    assert "gene0" not in ", ".join(found.obs["scbmlp_genes"]).split(", ")
    with pytest.raises(ValueError, match=r"lacks 39 of the model's 40 genes.*max_missing=0.2 is allowed.*same species"):
        annotate(adata[:, :1].copy(), model)
    with pytest.raises(ValueError, match="max_missing=2: a number from 0 to 1"):
        annotate(adata, model, max_missing=2)


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (lambda a: a.var_names.str.upper(), "names in any case"),
        (lambda a: a.var_names + ".3", "names without version"),
        (lambda a: [f"ENSG{i:011}" for i in range(a.n_vars)], "var['feature_name']"),
    ],
)
def test_names_are_matched_loosely_only_if_most_do_not_match(solved, change, how):
    adata = own_cells()
    adata.var["feature_name"] = adata.var_names if "feature" in how else "none"
    expected = annotate(own_cells(), solved[0]).obs["scbmlp_probability"]
    adata.var_names = change(adata)
    found = annotate(adata, solved[0])
    assert found.uns["scbmlp"]["matched_by"] == how
    np.testing.assert_array_equal(found.obs["scbmlp_probability"], expected)


def test_what_is_no_classifier_or_has_a_gene_twice_is_refused(solved):
    adata = own_cells()
    with pytest.raises(ValueError, match="model is of type ScBMLPRegressor; labels take a ScBMLPClassifier"):
        annotate(adata, ScBMLPRegressor(solved[0].cfg))
    adata.var_names = ["gene0", "gene0", *adata.var_names[2:]]
    with pytest.raises(ValueError, match=r"genes more than once, such as gene0.*var_names_make_unique"):
        annotate(adata, solved[0])


def test_command_writes_a_file_once(solved, tmp_path, capsys):
    model, path, out = solved[0], tmp_path / "new.h5ad", tmp_path / "out.h5ad"
    model.save(tmp_path / "model.safetensors")
    own_cells().write_h5ad(path)
    words = ["annotate", str(path), "--model", str(tmp_path / "model.safetensors"), "--out", str(out)]
    assert main(words) == 0 and "40 of 40 genes are there, by names" in capsys.readouterr().out
    labels = annotate(own_cells(), model).obs["scbmlp_label"]
    np.testing.assert_array_equal(anndata.read_h5ad(out).obs["scbmlp_label"], labels)
    assert main(words) == 2 and "scbmlp annotate: out=" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0 and sorted(p.name for p in tmp_path.iterdir()) == [
        "model.safetensors", "new.h5ad", "out.h5ad",
    ]  # fmt: skip
    model.calibration, known = None, model.calibration
    free = annotate(own_cells(), model)
    model.calibration = known
    assert (
        UNASSIGNED not in set(free.obs["scbmlp_label"]) and "nothing of calibration" in free.uns["scbmlp"]["notes"][0]
    )


def test_look_says_what_a_file_has_and_a_report_without_a_key_shows_it(tmp_path, capsys):
    adata = own_cells()
    adata.obs["donor"] = pd.Categorical(np.array(["d1", "d2"])[np.arange(adata.n_obs) % 2])
    adata.obs["depth"] = np.linspace(0, 1, adata.n_obs)
    adata.layers["counts"], adata.layers["scaled"] = adata.X.expm1().rint(), adata.X.toarray() - 1
    adata.var["feature_types"] = ["Gene Expression"] * (G - 2) + ["Antibody Capture"] * 2
    table = look(adata)
    known = table.set_index("name")
    assert known["found"]["X"] == "log-normalised, 240 x 40"
    assert known["found"]["layer counts"].startswith("counts") and known["found"]["layer scaled"].startswith("scaled")
    assert known["found"]["feature_types"] == "38 Gene Expression, 2 Antibody Capture" and "depth" not in known.index
    kinds = {"type": "classes", "drug": "perturbations", "donor": "donors or batches"}
    for name, kind in kinds.items():
        sizes = adata.obs[name].value_counts()
        assert (known["is"][name], known["levels"][name], known["smallest"][name]) == (kind, len(sizes), sizes.min())
    adata.write_h5ad(path := tmp_path / "own.h5ad")
    for words, status in ((["look", str(path)], 0), (["report", str(path)], 2)):
        assert main(words) == status
        assert capsys.readouterr().out.rstrip().endswith(f"scbmlp report {path} --class-key type")


def test_ids_become_symbols_and_other_features_are_left_out():
    adata = own_cells()
    symbols = [f"Gene{i}" for i in range(G)]
    symbols[1] = "Gene0"
    adata.var["feature_name"], adata.var_names = symbols, [f"ENSMUSG{i:011}.4" for i in range(G)]
    adata.var["feature_types"] = ["Gene Expression"] * (G - 2) + ["Antibody Capture"] * 2
    before = adata.copy()
    cells = prepare(adata, class_key="type")
    assert_adata_equal(adata, before)
    assert list(cells.train.gene_names) == ["Gene0", "Gene0-1", *symbols[2:-2]]
    left_out, named, twice = cells.notes
    assert "2 of Antibody Capture" in left_out and "var['feature_name']" in named and twice.startswith("1 genes")
    del adata.var["feature_name"]
    assert list(prepare(adata, class_key="type").train.gene_names[:2]) == ["ENSMUSG00000000000", "ENSMUSG00000000001"]


def test_files_of_other_kinds_are_read(tmp_path):
    adata, folder = own_cells(), tmp_path / "folder"
    adata.write_zarr(tmp_path / "own.zarr")
    assert len(prepare(tmp_path / "own.zarr", class_key="type").train) == 168
    folder.mkdir()
    (folder / "barcodes.tsv").write_text("\n".join(adata.obs_names))
    (folder / "genes.tsv").write_text("\n".join(f"{name}\t{name}" for name in adata.var_names))
    mmwrite(folder / "matrix.mtx", sparse.coo_matrix(adata.X.expm1().rint().T.astype(int)))
    assert look(folder).set_index("name")["found"]["X"] == "counts, 240 x 40"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cells='empty' is no folder of 10x's matrices"):
        look(tmp_path / "empty")
