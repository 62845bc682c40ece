"""What scbmlp does without any extra; `make dist` runs this with an installed copy, outside the repository."""

import pkgutil
import subprocess
import sys
from importlib import import_module, metadata, util

import scanpy as sc

import scbmlp
from scbmlp import simulate
from scbmlp.datasets import get_classification_datasets
from scbmlp.models import Config, ScBMLPClassifier

assert scbmlp.__file__.startswith(sys.prefix), f"{scbmlp.__file__} is not what was installed"
assert metadata.version("scbmlp") == scbmlp.__version__
extras = [name for name in ("jupyter_book", "nbconvert", "pertpy", "pytest", "scvelo") if util.find_spec(name)]
assert not extras, f"the environment is not empty: {extras}"
for module in pkgutil.iter_modules(scbmlp.__path__):
    if module.name != "__main__":
        import_module(f"scbmlp.{module.name}")

command = [f"{sys.prefix}/bin/scbmlp", "report", "cells.h5ad", "--class-key", "x"]
refused = subprocess.run(command, capture_output=True, text=True)
assert refused.returncode == 2 and "pip install 'scbmlp[report]'" in refused.stderr, refused.stderr

adata = simulate.pancreas(seed=0, n_cells=600, n_genes=300)
sc.pp.normalize_total(adata)
sc.pp.log1p(adata)
train, validation, test = get_classification_datasets(adata, "clusters")
model = ScBMLPClassifier(Config(300, 8, len(train.output_names), n_epochs=10, lr=1e-2, device="cpu"))
model.fit(train, validation, baseline=False, enable_progress_bar=False)
assert model.score(test) > adata.obs["clusters"].value_counts(normalize=True).max(), "the model has learnt nothing"
model.save("model.pt")
assert ScBMLPClassifier.load("model.pt").score(test) == model.score(test)
print(f"scbmlp {scbmlp.__version__} in {sys.prefix}: installed, complete, and works without an extra")
