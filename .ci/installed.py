"""What scbmlp does without any extra; `make dist` runs this with an installed copy, outside the repository."""

import importlib
import pkgutil
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata, resources, util
from pathlib import Path

import numpy as np
import scanpy as sc

import scbmlp
from scbmlp import simulate
from scbmlp.datasets import get_classification_datasets
from scbmlp.interactions import audit
from scbmlp.models import Config, ScBMLPClassifier
from scbmlp.modules import gene_modules

assert Path(scbmlp.__file__).is_relative_to(sys.prefix), f"{scbmlp.__file__} is not what was installed"
assert metadata.version("scbmlp") == scbmlp.__version__
extras = [name for name in ("jupyter_book", "nbconvert", "pertpy", "pytest", "scvelo") if util.find_spec(name)]
assert not extras, f"the environment is not empty: {extras}"

templates = ("page.html.j2", "your_cells.ipynb", "explorer.html.j2", "explorer.css", "explorer.js")
for name in (
    "py.typed",
    "sciplex3_design.csv",
    "sciplex3_mechanisms.csv",
    "simulated_programs.csv",
    *(f"templates/{name}" for name in templates),
):
    assert resources.files("scbmlp").joinpath(name).is_file(), f"{name} is missing"
for module in pkgutil.iter_modules(scbmlp.__path__):
    if module.name != "__main__":
        importlib.import_module(f"scbmlp.{module.name}")

command = shutil.which("scbmlp", path=str(Path(sys.executable).parent))
told = subprocess.run([command, "report", "--help"], capture_output=True, text=True)
assert "--class-key" in told.stdout
refused = subprocess.run([command, "report", "cells.h5ad", "--class-key", "x"], capture_output=True, text=True)
assert refused.returncode == 2 and "pip install 'scbmlp[report]'" in refused.stderr, refused.stderr

adata = simulate.pancreas(seed=0, n_cells=600, n_genes=300)
sc.pp.normalize_total(adata)
sc.pp.log1p(adata)
train, validation, test = get_classification_datasets(adata, "clusters")
model = ScBMLPClassifier(Config(300, 8, len(train.output_names), n_epochs=10, lr=1e-2, device="cpu"))
model.fit(train, validation, baseline=False, enable_progress_bar=False)
largest = adata.obs["clusters"].value_counts(normalize=True).max()
assert model.score(test) > largest, "the model has learnt nothing"
assert len(gene_modules(model, "Beta", n_modules=3, dataset=train).top_genes(n=20)) == 20
assert np.isfinite(audit(model, test, train=train, validation=validation)["gain"]).all()
with tempfile.TemporaryDirectory() as folder:
    model.save(Path(folder) / "model.pt")
    assert ScBMLPClassifier.load(Path(folder) / "model.pt").score(test) == model.score(test)
print(f"scbmlp {scbmlp.__version__} in {sys.prefix}: installed, complete, and works without an extra")
