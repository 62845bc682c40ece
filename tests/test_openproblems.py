"""Does the component for OpenProblems read and write what the task's schema asks for?"""

import re
from pathlib import Path

import anndata
import scanpy as sc
import yaml

from scbmlp import simulate

FOLDER = Path(__file__).parent.parent / "integrations" / "openproblems" / "scbmlp"


def test_labels_are_projected_in_the_schema_of_the_task(tmp_path):
    config = yaml.safe_load((FOLDER / "config.vsh.yaml").read_text())
    adata = simulate.pancreas(n_cells=400)
    adata.layers["counts"] = adata.X.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=150)
    adata.layers["normalized"] = adata.X
    adata.obs["label"], adata.obs["batch"] = adata.obs["clusters"].astype(str), "one"
    adata.obs.iloc[:2, adata.obs.columns.get_loc("label")] = "of two cells alone"
    adata.var["hvg"], adata.var["feature_name"] = adata.var["highly_variable"], adata.var_names
    adata.uns = {"dataset_id": "made", "normalization_id": "log_cp10k"}
    del adata.X
    train, test = adata[:300].copy(), adata[300:].copy()
    truth = test.obs.pop("label")
    names = ("input_train", "input_test", "output")
    par = {name: str(tmp_path / f"{name}.h5ad") for name in names}
    train.write_h5ad(par["input_train"])
    test.write_h5ad(par["input_test"])

    text = (FOLDER / config["resources"][0]["path"]).read_text()
    own = f"par, meta = {par!r}, {{'name': {config['name']!r}}}\n"
    code, n = re.subn(r"## VIASH START\n.*## VIASH END\n", lambda _: own, text, flags=re.DOTALL)
    assert n == 1
    exec(compile(code, "script.py", "exec"), {})

    found = anndata.read_h5ad(par["output"])
    assert list(found.obs) == ["label_pred"] and found.obs_names.equals(test.obs_names)
    assert found.uns == {"dataset_id": "made", "normalization_id": "log_cp10k", "method_id": "scbmlp"}
    assert (found.obs["label_pred"].astype(str) == truth).mean() > 0.7 > 2 * truth.value_counts(normalize=True).max()
