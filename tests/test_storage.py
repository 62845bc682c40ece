"""Do models come back from their files, and is everything else refused in words?"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from scbmlp.datasets import get_regression_datasets
from scbmlp.models import Config, ScBMLPClassifier, ScBMLPRegressor
from scbmlp.storage import _digest
from tests.test_models import QUIET, TOY, assert_same_weights, fitted_to_toy, toy


def test_saved_model_comes_back(classifier, planted, cells, tmp_path):
    regressor = ScBMLPRegressor(Config(8, 4, 2, linear=True, bias=True, n_epochs=2, device="cpu"), "huber")
    regressor.fit(*get_regression_datasets(planted, "target")[:2], **QUIET)
    unnamed, path = ScBMLPClassifier(Config(**TOY)), tmp_path / "model.pt"
    balanced = fitted_to_toy(class_weight="balanced")
    for model, x in ((classifier, cells), (balanced, toy().x), (unnamed, toy().x), (regressor, planted)):
        model.save(path)
        loaded = type(model).load(str(path))
        np.testing.assert_array_equal(loaded.outputs(x), model.outputs(x))
        np.testing.assert_array_equal(loaded.predict(x), model.predict(x))
        assert_same_weights(loaded, model)
        assert asdict(loaded.cfg) == asdict(model.cfg)
        assert loaded.gene_names.equals(model.gene_names) and loaded.output_names.equals(model.output_names)
        pd.testing.assert_frame_equal(loaded.history, model.history)
    assert loaded.loss_fn == "huber"
    with pytest.raises(ValueError, match=r"model\.pt holds ScBMLPRegressor, not ScBMLPClassifier"):
        ScBMLPClassifier.load(path)


@settings(max_examples=15)
@given(
    genes=st.lists(st.text(), min_size=3, max_size=3, unique=True),
    outputs=st.lists(st.text(), min_size=2, max_size=2, unique=True)
    | st.lists(st.integers(-(2**40), 2**40), min_size=2, max_size=2, unique=True)
    | st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=2, unique=True),
    linear=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_names_and_weights_survive_a_file(tmp_path_factory, genes, outputs, linear, seed):
    path = tmp_path_factory.mktemp("models") / "any name, with blanks.model"
    model = ScBMLPRegressor(Config(3, 2, 2, linear=linear, seed=seed, device="cpu"), "l1")
    model.gene_names, model.output_names = pd.Index(genes), pd.Index(outputs)
    model.save(path)
    loaded = ScBMLPRegressor.load(path)
    assert_same_weights(loaded, model)
    assert list(loaded.gene_names) == genes and list(loaded.output_names) == outputs
    assert loaded.cfg == model.cfg and loaded.loss_fn == "l1"


def rewritten(path, **changes):
    """Change what a saved model says of itself, with a checksum that is right again."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        known = json.loads(file.metadata()["scbmlp"]) | changes
    text = json.dumps(known)
    save_file(tensors, path, {"scbmlp": text, "sha256": _digest(text, tensors)})


class _Code(str):
    """Is made as a folder when it is unpickled."""

    __slots__ = ()

    def __reduce__(self):
        return os.mkdir, (str(self),)


FILES = {
    "text": lambda path: path.write_bytes(b"no model at all"),
    "half a model": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "tensors of others": lambda path: save_file({"x": torch.zeros(2)}, path),
    "other sizes": lambda path: rewritten(path, config=TOY | {"d_hidden": 7}),
    "unknown fields": lambda path: rewritten(path, config=TOY | {"depth": 7}),
    "code to run": lambda path: torch.save({"config": _Code(path.with_name("ran"))}, path),
}


@pytest.mark.parametrize("change", FILES.values(), ids=FILES)
def test_file_without_a_model_is_refused(tmp_path, change):
    path = tmp_path / "model.pt"
    fitted_to_toy().save(path)
    change(path)
    with pytest.raises(ValueError, match=r"(?s)model\.pt is damaged.* save the model again, or take another copy"):
        ScBMLPClassifier.load(path)
    assert not (tmp_path / "ran").exists()


def test_another_format_and_no_file_are_told(tmp_path):
    path = tmp_path / "model.pt"
    fitted_to_toy().save(path)
    rewritten(path, format=99)
    with pytest.raises(ValueError, match=r"was written by scbmlp .*, in format 99; .* take that version, or fit"):
        ScBMLPClassifier.load(path)
    with pytest.raises(FileNotFoundError):
        ScBMLPClassifier.load(tmp_path / "nowhere.pt")


def test_no_cut_and_no_flipped_bit_goes_unnoticed(tmp_path):
    path, rng = tmp_path / "model.pt", np.random.default_rng(0)
    fitted_to_toy().save(path)
    whole = path.read_bytes()
    for trial in range(100):
        spoiled = bytearray(whole)
        if trial % 4 == 0:
            spoiled = spoiled[: rng.integers(len(whole))]
        else:
            spoiled[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(spoiled)
        with pytest.raises(ValueError, match=r"model\.pt is damaged"):
            ScBMLPClassifier.load(path)


def test_saving_keeps_the_file_that_was_there_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path, model = tmp_path / "model.pt", fitted_to_toy()
    model.save(path)
    before = path.read_bytes()

    def cut_short(tensors, partial, metadata):
        Path(partial).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("scbmlp.storage.save_file", cut_short)
    with pytest.raises(OSError, match="disk full"):
        fitted_to_toy(seed=5).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
