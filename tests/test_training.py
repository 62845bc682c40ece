"""Are several processes one? What a fit learns is in test_models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scbmlp.datasets import ExpressionDataset, get_classification_datasets
from scbmlp.models import Config, ScBMLPClassifier, ScBMLPRegressor

N_GENES = 200


def cells(kind=ScBMLPClassifier):
    """Training and validation cells, a tenth of whose values are not 0."""
    rng = np.random.default_rng(0)
    x = sparse.random(203, N_GENES, density=0.1, format="csr", dtype=np.float32, random_state=0)
    targets = np.asarray(x[:, :3] @ rng.standard_normal((3, 3))) + 0.1 * rng.standard_normal((203, 3))
    y = targets.argmax(axis=1) if kind is ScBMLPClassifier else targets
    names = pd.Index([f"g{i}" for i in range(N_GENES)]), pd.Index(["a", "b", "c"])
    return [ExpressionDataset(x[rows], y[rows], *names) for rows in (slice(150), slice(150, None))]


def config(**changes):
    return Config(**{"d_input": N_GENES, "d_hidden": 8, "d_output": 3, "n_epochs": 3, "batch_size": 37} | changes)


def _fit_everywhere(folder):
    """Fit in every process that runs this file, and let each write what it has."""
    devices, found = int(os.environ["WORLD_SIZE"]), {}
    several = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}

    def fit(name, model, *sets, **options):
        history = model.fit(*sets, enable_progress_bar=False, **several, **options)
        found[name] = history.to_numpy().tolist(), model.w_l.sum(dim=0).tolist(), model.best_epoch

    forms = {"plain": (ScBMLPClassifier, {}), "linear": (ScBMLPRegressor, {"linear": True, "dropout_rate": 0.0}),
             "balanced": (ScBMLPClassifier, {"class_weight": "balanced"})}  # fmt: skip
    for name, (kind, form) in forms.items():
        # 150 cells in batches of 37 leave two for the last, 53 validation cells an odd number.
        fit(name, kind(config(device="cpu", **form)), *cells(kind))
    if devices > 1:  # dropout of its own in each process, and a fit that goes on
        stop = lightning.Callback()
        stop.on_train_epoch_end = lambda trainer, module: setattr(trainer, "should_stop", trainer.current_epoch == 0)
        for name, more in {"whole": {}, "stopped": {"callbacks": [stop]}, "on": {"ckpt_path": "last"}}.items():
            more |= {"default_root_dir": Path(folder, "whole" if name == "whole" else "kept"), "baseline": False}
            fit(name, ScBMLPClassifier(config(device="cpu", dropout_rate=0.3)), *cells(), **more)
    sets = get_classification_datasets(Path(folder, "cells.h5ad"), "label")
    fit("stored", ScBMLPClassifier(config(device="cpu")), *sets[:2], baseline=False)
    Path(folder, f"{devices}_{os.environ['RANK']}.json").write_text(json.dumps(found))


def test_two_processes_are_one_with_their_batches_joined(tmp_path):
    """The launcher is torch's, as on a cluster."""
    train, _ = cells()
    obs = pd.DataFrame({"label": train.output_names[train.y]}, [f"c{i}" for i in range(150)])
    AnnData(train.x, obs, pd.DataFrame(index=train.gene_names)).write_h5ad(tmp_path / "cells.h5ad")
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    for n in ("1", "2"):
        done = subprocess.run([*command, n, __file__, tmp_path], env=environment, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
    alone, one, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1_0", "2_0", "2_1"))
    assert one == other  # one history and one model, wherever it is asked
    for name in ("plain", "linear", "balanced"):
        for a, b in zip(alone[name], one[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # From disk each reads blocks of its own, in another order than one process would.
    np.testing.assert_allclose(np.array(alone["stored"][0])[:, 2], np.array(one["stored"][0])[:, 2], rtol=0.02)
    assert len(one["stopped"][0]) == 1 and one["on"] == one["whole"]
    assert not np.allclose(one["whole"][1], one["plain"][1])


if __name__ == "__main__":
    _fit_everywhere(sys.argv[1])
