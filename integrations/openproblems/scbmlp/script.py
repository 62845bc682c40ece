"""Label the test cells by a model solved on the training cells."""

import anndata
import pandas as pd

from scbmlp.datasets import ExpressionDataset
from scbmlp.models import ScBMLPClassifier, solve

## VIASH START
par = {"input_train": "train.h5ad", "input_test": "test.h5ad", "output": "prediction.h5ad"}
meta = {"name": "scbmlp"}
## VIASH END

train, test = (anndata.read_h5ad(par[name]) for name in ("input_train", "input_test"))
train = train[:, train.var["hvg"].to_numpy(bool)].copy()
labels = train.obs["label"].astype("category").cat.remove_unused_categories()
# Every seventh cell of a class chooses penalties; a class of fewer is fitted whole.
chooses = (labels.groupby(labels, observed=True).cumcount() % 7 == 6).to_numpy()
x, codes = train.layers["normalized"], labels.cat.codes.to_numpy()
parts = [
    ExpressionDataset(x[rows], codes[rows], train.var_names, labels.cat.categories) for rows in (~chooses, chooses)
]
model = solve(ScBMLPClassifier, *parts, progress=False)
found = pd.DataFrame({"label_pred": model.predict(test, layer="normalized").astype(str)}, test.obs_names)
known = {name: test.uns[name] for name in ("dataset_id", "normalization_id")}
anndata.AnnData(obs=found, uns=known | {"method_id": meta["name"]}).write_h5ad(par["output"], compression="gzip")
