"""Do the models compute and train what they say, the same each time, and leave everything else alone?"""

import inspect
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import fields
from pathlib import Path

import lightning
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from scipy import sparse
from scipy.special import huber, softmax
from sklearn.metrics import accuracy_score, balanced_accuracy_score, r2_score, recall_score
from sklearn.utils.class_weight import compute_class_weight
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from scbmlp import exact, solving, training
from scbmlp.baselines import linear_baseline
from scbmlp.datasets import ExpressionDataset, get_classification_datasets, get_regression_datasets
from scbmlp.models import Config, ScBMLPClassifier, ScBMLPRegressor, solve, solve_replicas, statistics, tune

QUIET = {"enable_progress_bar": False}
ALONE = QUIET | {"baseline": False}
SIZES = {"d_input": 300, "d_hidden": 8, "d_output": 8, "n_epochs": 3, "device": "cpu"}
TOY = {"d_input": 6, "d_hidden": 5, "d_output": 3, "n_epochs": 3, "batch_size": 16, "device": "cpu"}


def toy(d_input=6, d_output=3, n_cells=40):
    """Cells whose class is their strongest of the first genes."""
    x = np.random.default_rng(0).gamma(2.0, size=(n_cells, d_input)).astype(np.float32)
    genes, classes = ([f"{kind} {i}" for i in range(n)] for kind, n in (("gene", d_input), ("class", d_output)))
    return ExpressionDataset(x, x[:, :d_output].argmax(axis=1), pd.Index(genes), pd.Index(classes))


def toy_model(**changes):
    return ScBMLPClassifier(Config(**(TOY | changes)))


def fitted_to_toy(**changes):
    model = toy_model(**changes)
    data = toy(model.cfg.d_input, model.cfg.d_output)
    model.fit(data, **ALONE)
    return model


def balance(y):
    """Weights of classes, by scikit-learn."""
    y = np.asarray(y)
    return torch.as_tensor(compute_class_weight("balanced", classes=np.unique(y), y=y), dtype=torch.float32)


def assert_same_weights(a, b, **tolerance):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, weights in a.state_dict().items():
        np.testing.assert_allclose(weights, b.state_dict()[name], err_msg=name, **({"rtol": 0} | tolerance))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_formula(bias, linear):
    """eq-forward, eq-linear."""
    model = toy_model(bias=bias, linear=linear).double().eval()
    rng = np.random.default_rng(1)
    x, center = rng.normal(size=(7, 6)), rng.normal(size=6)
    model.center.copy_(torch.as_tensor(center))
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    left, right, p = (w.numpy() for w in (model.w_l, model.w_r, model.w_p))
    b_l, b_r = np.split(weights.get("branches.bias", np.zeros(10)), 2)
    d = x - center * linear
    # A bias is the weight of a gene that is 1 in every cell.
    ones, left, right = np.c_[d, np.ones(7)], np.c_[left, b_l], np.c_[right, b_r]
    expected = np.einsum("oh,hg,hk,cg,ck->co", p, left, right, ones, ones) + weights.get("project.bias", 0)
    if linear:
        expected += np.einsum("og,cg->co", weights["direct.weight"], d)
    assert ("project.bias" in weights) == (bias or linear) and ("branches.bias" in weights) == bias
    assert [tuple(w.shape) for w in (model.w_l, model.w_r, model.w_p)] == [(5, 6), (5, 6), (3, 5)]
    assert not any(w.requires_grad for w in (model.w_l, model.w_r, model.w_p))
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.as_tensor(x)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("linear", "class_weight"), [(False, None), (True, None), (True, "balanced")])
def test_training_is_adam_along_a_cosine_on_the_cross_entropy(linear, class_weight):
    changes = {"batch_size": 100, "n_epochs": 5, "lr": 0.03, "weight_decay": 0.1, "dropout_rate": 0.0}
    changes |= {"class_weight": class_weight, "linear": linear, "weight_decay_linear": 0.3}
    model, start, data = toy_model(**changes), toy_model(**changes), toy()
    # A batch larger than the training set: one step an epoch.
    history = model.fit(data, **ALONE)
    x = torch.as_tensor(data.x - data.x.mean(axis=0) if linear else data.x)
    left, right, p = (w.clone().requires_grad_() for w in (start.w_l, start.w_r, start.w_p))
    # The linear part starts at 0 without a baseline, and has a penalty of its own.
    extra = [torch.zeros(3, 6, requires_grad=True), torch.zeros(3, requires_grad=True)] if linear else []
    groups = [{"params": [left, right, p, *extra[1:]], "weight_decay": 0.1}]
    groups += [{"params": extra[:1], "weight_decay": 0.3}] if linear else []
    # Over all training cells, torch's own mean over weights is that over cells.
    optimizer, losses, weight = torch.optim.Adam(groups), [], balance(data.y) if class_weight else None
    assert weight is None or weight.max() - weight.min() > 0.1
    for epoch in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 + np.cos(np.pi * epoch / 5)) / 2
        y = ((x @ left.T) * (x @ right.T)) @ p.T + (x @ extra[0].T + extra[1] if linear else 0)
        loss = cross_entropy(y, data.y, weight)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    np.testing.assert_allclose(history["train_loss"], losses, rtol=1e-5)
    for actual, expected in zip((model.w_l, model.w_r, model.w_p), (left, right, p), strict=True):
        np.testing.assert_allclose(actual, expected.detach(), rtol=1e-3, atol=1e-5)


def test_the_seed_alone_decides_the_weights():
    changes, models = {"dropout_rate": 0.3, "linear": True}, []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(fitted_to_toy(**changes))
    first, again = models
    assert_same_weights(first, again)
    history = again.history
    again.fit(toy(), **ALONE)  # from the start, not from where it was
    assert_same_weights(first, again)
    pd.testing.assert_frame_equal(again.history, history)
    assert not torch.equal(first.w_l, fitted_to_toy(**changes, seed=1).w_l)


# Another value of each field, what it changes, and what it takes to be seen.
FIELDS = {
    "d_input": (7, "shapes"), "d_hidden": (4, "shapes"), "d_output": (4, "shapes"), "bias": (True, "shapes"),
    "linear": (True, "shapes"), "class_weight": ("balanced", "shapes"), "n_epochs": (4, "epochs"),
    "batch_size": (8, "weights"), "lr": (0.01, "weights"), "dropout_rate": (0.5, "weights"),
    "weight_decay": (0.5, "weights"), "seed": (1, "weights"), "weight_decay_linear": (0.5, "weights", {"linear": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(Config) if field.name != "device"])
def test_every_field_of_the_configuration_does_something(name):
    value, kind, *beside = FIELDS[name]
    found = []
    for change in ({}, {name: value}):
        model = fitted_to_toy(**dict(*beside) | change)
        shapes = {key: tuple(weights.shape) for key, weights in model.state_dict().items()}
        total = round(float(sum(weights.detach().abs().sum() for weights in model.parameters())), 5)
        found.append({"shapes": shapes, "epochs": len(model.history), "weights": total})
    different = {key for key in found[0] if found[0][key] != found[1][key]}
    assert kind in different <= {kind, "weights"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_a_gpu_gives_what_the_cpu_gives(sets, class_weight):
    outputs = []
    for device in ("cpu", "cuda:0"):
        model = ScBMLPClassifier(Config(**(SIZES | {"device": device}), class_weight=class_weight))
        model.fit(*sets[:2], **QUIET)
        outputs.append(model.outputs(sets[2]))
    np.testing.assert_allclose(*outputs, rtol=0.05, atol=0.05)


def test_fields_are_checked_and_what_is_not_given_follows_the_form():
    """What is of another type is in the table of test_checks."""
    bad = [*((name, 0) for name in ("d_input", "d_hidden", "d_output", "n_epochs", "batch_size", "lr"))]
    for name, value in [*bad, ("weight_decay", -0.1), ("d_hidden", 2.5), ("linear", 1)]:
        with pytest.raises(ValueError, match=rf"Config\({name}={value}\): .* is needed"):
            toy_model(**{name: value})
    names = ("n_epochs", "batch_size", "dropout_rate", "weight_decay")
    for linear, values in ((False, [100, 32, 0.0, 1e-4]), (True, [40, 64, 0.2, 3e-3])):
        assert [getattr(Config(5, 2, 1, linear=linear), name) for name in names] == values
    assert Config(5, 2, 1, linear=True, n_epochs=7).n_epochs == 7


@pytest.mark.parametrize("what", ["gene", "output"])
def test_data_with_other_names_are_refused(what):
    model, train, other = fitted_to_toy(), toy(), toy()
    setattr(other, f"{what}_names", getattr(other, f"{what}_names")[::-1])
    uses = [lambda data: toy_model().fit(train, data, **QUIET)]
    for use in uses + [model.score] * (what == "output"):  # genes are put in order by name
        with pytest.raises(ValueError, match=what):
            use(other)


@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
def test_regressor_learns_an_interaction_by_its_loss(planted, loss):
    train, val, test = get_regression_datasets(planted, "target")
    model = ScBMLPRegressor(Config(8, 8, 2, linear=True, n_epochs=25, lr=0.01, device="cpu"), loss_fn=loss)
    history = model.fit(train, val, **QUIET)
    formula = {"mse": np.square, "l1": np.abs, "huber": lambda error: huber(1, error)}
    y, predicted = val.y.numpy(), model.predict(val)
    # Learnt in units of the standard deviation, told in those of the targets.
    best = history.loc[model.best_epoch]
    assert best["val_loss"] == pytest.approx(formula[loss](y - predicted).mean(), rel=1e-4)
    assert best["val_r2"] == pytest.approx(model.score(val)) == pytest.approx(r2_score(y, predicted))
    table = model.evaluate(val)
    assert list(table.index) == list(val.output_names) == ["product", "difference"] == list(model.output_names)
    np.testing.assert_allclose(table["r2"], r2_score(y, predicted, multioutput="raw_values"), rtol=1e-6)
    np.testing.assert_allclose(table["mae"], np.abs(y - predicted).mean(axis=0), rtol=1e-5)
    # The penalty of the linear part, made for thousands of genes, costs a little where eight say all without noise.
    assert model._measure_each(model.outputs(test), test.y.numpy()).min() > 0.85


def test_fitting_makes_only_a_batch_dense(sets, rows_made_dense):
    model = ScBMLPClassifier(Config(**(SIZES | {"n_epochs": 1}), batch_size=20, linear=True))
    model.fit(sets[0], **ALONE)
    # The statistics are taken of blocks of 1,024 cells at most, here of all.
    assert rows_made_dense == [20] * 14 + [280]


# ------------------------------------------------------------------------------------- never below the linear baseline


@pytest.fixture(scope="module")
def graded():
    """Sets of cells with many noisy genes, and targets, or classes, that are linear in a few of them; odd units."""
    rng = np.random.default_rng(0)
    x = rng.gamma(1.0, size=(600, 150)).astype(np.float32)
    y = 1000 + 300 * (x[:, :4] @ np.array([[1, 0], [1, 0], [0, 1], [0, -1]]) + rng.normal(size=(600, 2)))
    label = np.where(y[:, 0] > np.median(y[:, 0]), "high", "low")
    obs = pd.DataFrame({"label": label}, [f"cell {i}" for i in range(600)])
    adata = AnnData(x, obs=obs, obsm={"target": pd.DataFrame(y, obs.index, ["sum", "difference"])})
    return {
        ScBMLPClassifier: get_classification_datasets(adata, "label"),
        ScBMLPRegressor: get_regression_datasets(adata, "target"),
    }


def wide(n_epochs, **changes):
    return Config(**{"d_input": 150, "d_hidden": 8, "d_output": 2, "n_epochs": n_epochs, "device": "cpu"} | changes)


BOTH = pytest.mark.parametrize("kind", [ScBMLPClassifier, ScBMLPRegressor])


@BOTH
def test_linear_form_starts_at_the_baseline_and_never_ends_below_it_on_validation_cells(graded, kind):
    train, val, test = graded[kind]
    model, baseline = kind(wide(5, linear=True)), linear_baseline(train, val, exact=False)
    with warnings.catch_warnings(action="error"):
        history = model.fit(train, val, **QUIET)
    assert history.index.tolist() == list(range(6))
    for stage, part in (("val", val), ("train", train)):
        assert history.loc[0, f"{stage}_{model.metric}"] == pytest.approx(baseline.score(part), abs=1e-6)
    loss = model.loss(torch.as_tensor(model.outputs(val)), val.y).item()
    assert loss <= history.loc[0, "val_loss"] * (1 + 1e-6)
    assert loss == pytest.approx(history.loc[model.best_epoch, "val_loss"], rel=1e-3)
    assert model.score(test) > baseline.score(test) - 0.02
    # A rate that destroys whatever it touches: the best epoch is the start, here a baseline of one's own, to rounding.
    model, own = kind(wide(2, linear=True, lr=50.0)), linear_baseline(train, val)
    history = model.fit(train, val, baseline=own, **QUIET)
    assert model.best_epoch == 0
    np.testing.assert_allclose(model.outputs(test), own.outputs(test), rtol=1e-4, atol=1e-2)
    assert history.loc[0, f"val_{model.metric}"] == pytest.approx(own.score(val), abs=1e-6)


@BOTH
def test_a_model_below_the_baseline_warns_with_both_scores_and_the_remedy(graded, kind):
    train, val, _ = graded[kind]
    model, other = kind(wide(1, lr=1e-5)), kind(wide(1, lr=1e-5))
    with pytest.warns(UserWarning, match="ends below a linear one") as caught:
        model.fit(train, val, **QUIET)
    (message,) = (str(one.message) for one in caught)
    said = [f"{one.score(val):.3f}" for one in (model, linear_baseline(train, val, exact=False))]
    for text in (*said, "Config(linear=True)", "models.solve", f"val_{model.metric}"):
        assert text in message
    with warnings.catch_warnings(action="error"):
        assert other.fit(train, val, **ALONE).index.tolist() == [1]
        assert_same_weights(other, model)  # the comparison has no part in the weights
        other.fit(train, baseline=True, **QUIET)  # nothing to compare on


def test_without_validation_cells_the_linear_form_says_what_it_goes_without(graded):
    train, val, _ = graded[ScBMLPRegressor]
    model = ScBMLPRegressor(wide(2, linear=True))
    with pytest.warns(UserWarning, match="no validation cells: the linear part starts at 0 .* last epoch.*pass val="):
        model.fit(train, **QUIET)
    assert model.best_epoch == 2
    y = train.y.numpy().copy()
    y[:, 1] = 3.0
    constant = ExpressionDataset(train.x, y, train.gene_names, train.output_names)
    with pytest.raises(ValueError, match="same value in every cell for target 1.*baseline=False"):
        model.fit(constant, val, **QUIET)
    model.fit(constant, val, **ALONE)


def test_dropout_is_for_training_alone(tmp_path):
    model = toy_model(dropout_rate=0.5)
    np.testing.assert_array_equal(model.outputs(toy().x), model.outputs(toy().x))
    assert model.training  # as it was
    model = fitted_to_toy(dropout_rate=0.5)
    model.save(tmp_path / "model.pt")
    x = torch.as_tensor(toy().x)
    for one in (model, ScBMLPClassifier.load(tmp_path / "model.pt")):
        assert torch.equal(one(x), one(x))


@pytest.mark.parametrize("linear", [False, True])
def test_statistics_and_centre_are_those_of_the_training_cells(sets, tmp_path, linear):
    model = ScBMLPClassifier(Config(**(SIZES | {"n_epochs": 1}), linear=linear))
    assert model.statistics is None
    model.fit(*sets[:2], **ALONE)
    x, y = sets[0].x.toarray().astype(np.float64), np.eye(8)[sets[0].y]
    known = model.statistics
    np.testing.assert_allclose(model.center, x.mean(axis=0) * linear, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(known.mean, x.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(known.sd, x.std(axis=0), rtol=1e-4)
    d, hidden = x - x.mean(axis=0), x @ model.branches.weight.detach().double().numpy().T
    np.testing.assert_allclose(known.covariance, d.T @ hidden / len(x), atol=1e-5)
    np.testing.assert_allclose(known.target, d.T @ y / len(x), atol=1e-5)
    model.save(tmp_path / "model.pt")
    for part, stored in zip(known, ScBMLPClassifier.load(tmp_path / "model.pt").statistics, strict=True):
        np.testing.assert_array_equal(part, stored)
    with pytest.raises(ValueError, match="does not match the data"):
        statistics(model, toy())


# -------------------------------------------------------------------------------------------------------- solving


@pytest.fixture(scope="module")
def solvable(planted):
    """Sets of the planted interaction, of classes and of targets, with validation cells enough to choose."""
    adata = planted.copy()
    adata.obs["split"] = np.repeat(["train", "val", "test"], [300, 300, 400])
    pairs = (get_classification_datasets, "label"), (get_regression_datasets, "target")
    return [getter(adata, key, split_key="split") for getter, key in pairs]


def solution_of(recipe, train, x):
    """Outputs of the exact solution of a recipe."""
    found = exact.solution(train, *zip(*recipe, strict=True))
    d = x - found.mean
    return found.constant + d @ found.direct.T + (d @ found.hidden.T) ** 2 @ found.power.T


def test_solve_finds_an_interaction_and_says_what_it_tried(solvable, tmp_path, capsys):
    train, val, test = solvable[0]
    model = tune(ScBMLPClassifier, train, val, device="cpu")  # another name of solve
    assert model.score(test) > 0.9 > linear_baseline(train, val).score(test) + 0.2
    assert "solved, products of" in repr(model) and model.history.empty
    trials = model.trials
    assert trials["form"].tolist() == [
        "linear in genes", "linear in genes and components", "products of components", "products of genes",
        "products of genes in units of their sd", "with presence and squares",
    ]  # fmt: skip
    assert trials["chosen"].sum() == 1 and trials.loc[trials["chosen"] == 1, "products"].item() > 0
    assert trials["behind"].min() == 0 and capsys.readouterr() == ("", "")  # no terminal, no bar
    # The model is the solution, around the training mean, with both branches alike.
    np.testing.assert_allclose(model.outputs(test), solution_of(model.recipe, train, test.x), atol=1e-4)
    assert torch.equal(model.w_l, model.w_r)
    model.save(tmp_path / "model.safetensors")
    again = ScBMLPClassifier.load(tmp_path / "model.safetensors")
    pd.testing.assert_frame_equal(again.trials, trials)
    assert again.recipe == model.recipe and repr(again) == repr(model)


@BOTH
def test_solve_uses_no_product_where_none_pays(graded, kind):
    train, val, test = graded[kind]
    model, baseline = solve(kind, train, val, device="cpu"), linear_baseline(train, val)
    assert not model.w_p.any() and model.statistics is not None and not model.training
    assert "no products" in repr(model)
    assert model.score(test) > baseline.score(test) - 0.02


def test_replicas_are_solved_on_the_cells_that_were_drawn_and_order_changes_nothing(solvable):
    train, _, test = solvable[1]
    train = train.load(slice(200))
    order = np.random.default_rng(0).permutation(len(train))
    # Of folds, since there are no validation cells.
    model, other = (solve(ScBMLPRegressor, part, device="cpu", loss_fn="huber") for part in (train, train.load(order)))
    assert model.recipe == other.recipe and model.loss_fn == "huber"
    np.testing.assert_allclose(model.outputs(test), other.outputs(test), atol=1e-5)
    replicas = solve_replicas(model, train, 2, "half", progress=False)
    for replica, rows in zip(replicas, (order[:100], order[100:]), strict=True):
        expected = solution_of(model.recipe, train.load(np.sort(rows)), test.x)
        np.testing.assert_allclose(replica.outputs(test), expected, atol=1e-4)
        np.testing.assert_allclose(replica.statistics.mean, model.statistics.mean)
        assert replica.loss_fn == "huber"
    for broken in ({"n_replicas": 1}, {"resample": "third"}, {"model": ScBMLPRegressor(model.cfg)}):
        with pytest.raises(ValueError, match="n_replicas|resample|the model was trained"):
            solve_replicas(**({"model": model, "train": train} | broken))


def test_tune_trains_networks_where_it_is_asked_to(solvable):
    train, val, _ = solvable[1]
    options = {"n_epochs": 2, "config": {"d_hidden": 4, "lr": 50.0}, "progress": False, "loss_fn": "huber"}
    model = tune(ScBMLPRegressor, train, val, trained=True, **options)  # a rate that destroys whatever it touches
    assert model.recipe is not None and model.loss_fn == "huber"
    networks = model.trials[model.trials["form"].str.startswith("network")]
    assert networks.index.tolist() == list(range(6, 12)) and networks["behind"].min() > 0
    assert (networks["chosen"] == 0).all() and networks["penalty"].tolist() == [0.03, 0.01, 0.003] * 2


def test_tune_returns_a_network_that_is_ahead(solvable, monkeypatch):
    train, val, _ = solvable[0]
    monkeypatch.setattr(solving, "_cell_losses", lambda outputs, y, counts: np.linspace(0, 1, len(y)) * outputs.std())
    model = tune(ScBMLPClassifier, train, val, trained=True, n_epochs=1, config={"d_hidden": 4, "lr": 1e-6})
    assert model.recipe is None and model.trials["chosen"].tolist().count(len(train.output_names)) == 1


def test_a_model_says_that_a_rival_without_products_is_ahead():
    rng = np.random.default_rng(0)
    x = (rng.gamma(1.0, size=(500, 12)) * (rng.random((500, 12)) < 0.8)).astype(np.float32)
    y = (x > 0).sum(axis=1, keepdims=True).astype(np.float32)  # additive, and neither linear nor a product
    cells = ExpressionDataset(x, y, pd.RangeIndex(12), pd.Index(["y"]))
    model = solve(ScBMLPRegressor, cells.load(slice(200)), cells.load(slice(200, None)), device="cpu", progress=False)
    assert "better the rival with presence and squares, without products" in repr(model)


def test_a_form_may_be_asked_for_and_groups_have_to_be_comparable(graded):
    train, val, _ = graded[ScBMLPRegressor]
    model = solve(ScBMLPRegressor, train, val, form="products of components", device="cpu")
    assert all(mixture.weight("products") > 0 for mixture, _ in model.recipe) and model.w_p.any()
    assert model.trials.set_index("form").loc["products of components", "chosen"] == 2 == model.trials["chosen"].sum()
    with pytest.raises(ValueError, match="form='product of components' is unknown; .*did you mean products of comp"):
        solve(ScBMLPRegressor, train, val, form="product of components")
    for groups in (["a"], ["a"] * len(val), [None, *"ab" * len(val)][: len(val)]):
        with pytest.raises(ValueError, match="groups has .* validation cells; pass one a cell of two groups or more"):
            solve(ScBMLPRegressor, train, val, groups=groups, progress=False)


# -------------------------------------------------------------------------------------------------- class balance


def rare(share=0.03, n_cells=1200):
    """Three sets with a few cells of a class that overlaps: two of its genes go together, in the others apart."""
    rng = np.random.default_rng(0)
    y = rng.choice(3, n_cells, p=[0.6, 0.4 - share, share])
    x = rng.normal(size=(n_cells, 10)) + 1.2 * np.eye(10)[y]
    x[:, 3] += np.where(y == 2, 1, -1) * x[:, 4]
    x, names = np.maximum(x + 3, 0).astype(np.float32), (pd.RangeIndex(10), pd.Index(["many", "some", "rare"]))
    edges = [0, n_cells // 2, 3 * n_cells // 4, n_cells]
    return [ExpressionDataset(x[a:b], y[a:b], *names) for a, b in zip(edges, edges[1:], strict=False)]


def rare_model(class_weight="balanced", **changes):
    sizes = {"d_input": 10, "d_hidden": 6, "d_output": 3, "n_epochs": 8, "lr": 0.01, "device": "cpu"}
    return ScBMLPClassifier(Config(**sizes | changes, class_weight=class_weight))


def test_a_balanced_loss_is_torchs_and_adds_up_over_batches():
    train, model = rare()[0], rare_model(n_epochs=1)
    model.fit(train, **ALONE)
    weight, outputs = balance(train.y), torch.randn(len(train), 3, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(model.class_weight, weight, rtol=1e-6)
    expected = cross_entropy(outputs, train.y, weight)
    torch.testing.assert_close(model.loss(outputs, train.y), expected)
    # Of 70 cells each, the last of fewer; a mean over a batch's weights would not add up to that over all.
    batches = zip(outputs.split(70), train.y.split(70), strict=True)
    torch.testing.assert_close(sum(model.loss(y, target) * len(target) for y, target in batches) / len(train), expected)


@pytest.mark.parametrize("class_weight", [None, "balanced"])
@pytest.mark.parametrize("linear", [False, True])
def test_history_baseline_and_best_epoch_are_of_the_loss_that_is_trained_on(linear, class_weight):
    train, val, test = rare()
    model = rare_model(class_weight, linear=linear, lr=0.03, n_epochs=15)
    history = model.fit(train, val, **QUIET)
    metric, score = ("balanced_accuracy", balanced_accuracy_score) if class_weight else ("accuracy", accuracy_score)
    assert list(history) == ["train_loss", f"train_{metric}", "val_loss", f"val_{metric}"]
    assert history.index.tolist() == list(range(16)) and history.index.name == "epoch"  # 0 is the linear baseline
    assert np.isfinite(history.to_numpy()).all() and history.loc[15, "train_loss"] < history.loc[1, "train_loss"]
    weight, target = balance(train.y).numpy() if class_weight else np.ones(3), val.y.numpy()
    baseline = linear_baseline(train, val, exact=False, class_weight=class_weight)
    for epoch, outputs in ((0, baseline.outputs(val)), (model.best_epoch, model.outputs(val))):
        loss = -np.log(softmax(outputs, axis=1))[np.arange(len(val)), target]
        assert history.loc[epoch, "val_loss"] == pytest.approx((weight[target] * loss).mean(), rel=1e-4)
        assert history.loc[epoch, f"val_{metric}"] == pytest.approx(score(target, outputs.argmax(axis=1)))
    assert model.best_epoch == (history["val_loss"].idxmin() if linear else 15)
    assert model.score(test) == pytest.approx(score(test.y, model.outputs(test).argmax(axis=1)))
    assert f"validation {metric.replace('_', ' ')} {history.loc[model.best_epoch, f'val_{metric}']:.3f}" in repr(model)


def test_a_rare_class_is_found_where_classes_are_balanced():
    def recall(model):
        return recall_score(test.y, model.outputs(test).argmax(axis=1), average=None)[2]

    train, val, test = rare()
    solved = [solve(ScBMLPClassifier, train, val, device="cpu", class_weight=kind) for kind in (None, "balanced")]
    trained = rare_model(linear=True)
    trained.fit(train, val, **QUIET)
    assert min(recall(solved[1]), recall(trained)) > recall(solved[0]) and solved[1].cfg.class_weight == "balanced"


def test_one_cell_of_the_rarest_class_is_no_reason_to_warn(monkeypatch):
    train, val, _ = rare()
    one = 1 / (3 * np.bincount(val.y).min())
    assert one > training.MARGIN
    model, least = rare_model(n_epochs=1), "val_balanced_accuracy"
    for cells, caught in ((1, False), (3, True)):
        monkeypatch.setattr(ScBMLPClassifier, "score", lambda self, _, lost=cells * one: self._baseline[least] - lost)
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            model.fit(train, val, **QUIET)
        assert any("ends below a linear one" in str(warning.message) for warning in record) == caught


def test_a_class_that_is_nowhere_in_training_counts_as_a_cell_does():
    train, val, _ = rare()
    train, model = train.load(np.flatnonzero(train.y != 2)), rare_model(linear=True)
    history = model.fit(train, val, **QUIET)
    np.testing.assert_allclose(model.class_weight, [*balance(train.y), 1], rtol=1e-6)
    assert np.isfinite(history.to_numpy()).all()


# -------------------------------------------------------------------------------- what is left alone, and is kept


def state():
    """What neither an import nor a fit may change; imports are its own, for a process that has nothing else."""
    import logging
    import random
    import signal

    import matplotlib
    import numpy
    import torch

    root = logging.getLogger()
    return {
        "random": (torch.get_rng_state().tolist(), repr(numpy.random.get_state()), random.getstate()),
        "torch": (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "logging": (root.level, list(root.handlers)),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "style": dict(matplotlib.rcParams),
    }


def test_importing_changes_nothing_global():
    rich = "import contextlib\nwith contextlib.suppress(ImportError):\n    import rich.style  # draws a number\n"
    names = "datasets enrichment interactions models modules plotting simulate sources targets".split()
    imports = "\n".join(f"import scbmlp.{name}" for name in names)
    code = f"{rich}{inspect.getsource(state)}\nbefore = state()\n{imports}\nafter = state()\n"
    code += "print(*(key for key in before if before[key] != after[key]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.returncode) == ("", 0), result.stderr


def test_fitting_changes_nothing_global_and_writes_nothing(sets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(logger, "level", logging.INFO)
    before, filters = state(), list(warnings.filters)
    model = ScBMLPClassifier(Config(**(SIZES | {"n_epochs": 1, "dropout_rate": 0.2})))
    model.fit(sets[0], sets[1], **QUIET)
    model.predict(sets[2])
    after = state()
    assert [key for key in before if before[key] != after[key]] == []
    assert logger.level == logging.INFO and warnings.filters == filters and list(tmp_path.iterdir()) == []


def stop_after(epoch):
    """A callback that asks for the end after an epoch, counted from 0."""
    stop = lightning.Callback()
    stop.on_train_epoch_end = lambda trainer, module: setattr(trainer, "should_stop", trainer.current_epoch == epoch)
    return stop


class _CtrlC(lightning.Callback):
    """Press Ctrl-C in the fourth epoch, and note how many steps follow."""

    after = 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.current_epoch == 3 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGINT)
        self.after += trainer.current_epoch == 3 and batch_idx > 1


@pytest.mark.parametrize("linear", [False, True])
def test_ctrl_c_is_a_keyboard_interrupt_and_keeps_weights_and_rows(tmp_path, linear):
    changes = {"n_epochs": 50, "lr": 0.03, "linear": linear, "batch_size": 8, "dropout_rate": 0.0}
    model, three, press = toy_model(**changes), toy_model(**changes), _CtrlC()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            model.fit(toy(), toy(), callbacks=[press], **ALONE)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    assert press.after == 0 and not model.training
    # The same fit up to there: stopped before the fourth epoch.
    history = three.fit(toy(), toy(), callbacks=[stop_after(2)], **ALONE)
    pd.testing.assert_frame_equal(model.history, history)
    assert model.best_epoch == three.best_epoch
    if linear:  # the best are kept, else the last, of a step later
        assert_same_weights(model, three)
    else:
        assert not torch.equal(model.w_l, toy_model(**changes).w_l)
    model.save(tmp_path / "model.pt")
    assert_same_weights(ScBMLPClassifier.load(tmp_path / "model.pt"), model)


@pytest.mark.parametrize("linear", [False, True])
def test_fit_goes_on_from_a_checkpoint_as_if_never_stopped(tmp_path, linear):
    changes = {"n_epochs": 4, "batch_size": 8, "lr": 0.03, "dropout_rate": 0.3, "linear": linear}
    whole, stopped, resumed = (toy_model(**changes) for _ in range(3))
    kept, epochs, look = {"default_root_dir": tmp_path, **QUIET}, [], lightning.Callback()
    whole.fit(toy(), toy(), **QUIET)
    stopped.fit(toy(), toy(), callbacks=[stop_after(1)], **kept)
    assert len(stopped.history) == 3 and len([*tmp_path.rglob("*.ckpt")]) == 1
    (tmp_path / "newer.ckpt").write_bytes(b"half")  # of a process that was killed while it wrote
    look.on_train_epoch_start = lambda trainer, module: epochs.append(trainer.current_epoch)
    history = resumed.fit(toy(), toy(), ckpt_path="last", callbacks=[look], **kept)
    assert epochs == [2, 3] and history.index.tolist() == [0, 1, 2, 3, 4] and resumed.best_epoch == whole.best_epoch
    pd.testing.assert_frame_equal(history, whole.history)
    assert_same_weights(resumed, whole)


KILLED = TOY | {"n_epochs": 60, "batch_size": 8, "lr": 0.01, "dropout_rate": 0.3, "linear": True}


def _fit_in(folder):
    """Fit, or go on; in a process of its own, so that it can be killed."""
    torch.set_num_threads(1)
    model = toy_model(**KILLED)
    model.fit(toy(), toy(), default_root_dir=folder, ckpt_path="last", **QUIET)
    model.save(Path(folder, "model.pt"))


def test_a_fit_killed_four_times_ends_where_the_others_do(tmp_path):
    whole = toy_model(**KILLED)
    whole.fit(toy(), toy(), **QUIET)
    processes, rng, killed = multiprocessing.get_context("forkserver"), np.random.default_rng(0), 0
    processes.set_forkserver_preload(["tests.test_models"])
    while not (tmp_path / "model.pt").is_file():
        before = {*tmp_path.rglob("*.ckpt")}
        process = processes.Process(target=_fit_in, args=(str(tmp_path),))
        process.start()
        if killed < 4:  # at a random step, an epoch or more after the last time
            while {*tmp_path.rglob("*.ckpt")} <= before:
                assert process.is_alive()
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
            killed += 1
        process.join()
    resumed = ScBMLPClassifier.load(tmp_path / "model.pt")
    assert killed == 4
    assert_same_weights(resumed, whole)
    pd.testing.assert_frame_equal(resumed.history, whole.history)


# --------------------------------------------------------------------------------------------- prediction, storage


def test_predictions_are_the_names_of_the_most_probable_classes(classifier, cells, sets):
    test = sets[2]
    outputs, predicted = classifier.outputs(test), classifier.predict(test)
    np.testing.assert_array_equal(predicted, test.output_names[outputs.argmax(axis=1)])
    np.testing.assert_allclose(classifier.predict_proba(test), softmax(outputs, axis=1), rtol=1e-4, atol=1e-6)
    true = cells.obs["clusters"].iloc[test.indices].astype(str)
    assert classifier.score(test) == pytest.approx((predicted == true).mean())
    recalls = recall_score(true, predicted, labels=list(test.output_names), average=None)
    np.testing.assert_allclose(classifier._measure_each(outputs, test.y.numpy()), recalls)
    assert classifier.score(test) > true.value_counts(normalize=True).max()


def test_outputs_do_not_depend_on_format_order_of_genes_or_batch(classifier, cells):
    expected = classifier.outputs(cells)
    order = np.random.default_rng(0).permutation(300)
    extra = AnnData(np.ones((400, 1), np.float32), obs=cells.obs, var=pd.DataFrame(index=["Extra"]))
    more = AnnData(sparse.hstack([extra.X, cells.X[:, order]], format="csr"), obs=cells.obs)
    more.var_names = ["Extra", *cells.var_names[order]]
    same = [cells[:, order], cells[:, order].copy(), more, cells.X.toarray(), sparse.csc_matrix(cells.X)]
    same += [sparse.csr_array(cells.X), torch.as_tensor(cells.X.toarray())]
    for x in same:
        np.testing.assert_array_equal(classifier.outputs(x), expected)
    for rows in (slice(0, 7), order[:7]):
        np.testing.assert_allclose(classifier.outputs(cells[rows]), expected[rows], rtol=1e-5, atol=1e-5)
    assert classifier.outputs(cells[:0]).shape == (0, 8)
    with torch.no_grad():
        np.testing.assert_allclose(classifier(torch.as_tensor(cells.X.toarray())), expected, rtol=1e-4, atol=1e-4)


def test_threads_change_no_answer(classifier, cells, sets):
    outputs = classifier.outputs(cells)
    one, two = (ScBMLPClassifier(Config(**(SIZES | {"n_epochs": 2}))) for _ in range(2))
    one.fit(sets[0], **ALONE)
    torch.set_num_threads(2)
    try:
        np.testing.assert_allclose(classifier.outputs(cells), outputs, rtol=1e-5, atol=1e-5)
        two.fit(sets[0], **ALONE)
    finally:
        torch.set_num_threads(1)
    assert_same_weights(one, two, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_precisions_that_are_allowed_learn_the_same_and_keep_float32(precision):
    plain, model = (toy_model(n_epochs=20, lr=0.01) for _ in range(2))
    plain.fit(toy(), toy(), **ALONE)
    history = model.fit(toy(), toy(), precision=precision, **ALONE)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    np.testing.assert_allclose(history, plain.history, atol=0.1)
    assert model.score(toy()) == pytest.approx(plain.score(toy()), abs=0.05)


@pytest.mark.parametrize(
    ("options", "rows"), [({"check_val_every_n_epoch": 2}, [2, 4]), ({"val_check_interval": 0.5}, [1, 2, 3, 4])]
)
def test_history_has_the_last_validation_of_an_epoch_and_callbacks_find_it(tmp_path, options, rows):
    callbacks = [EarlyStopping("val_loss", patience=9), ModelCheckpoint(tmp_path, monitor="val_loss")]
    model, plain = (toy_model(n_epochs=4, batch_size=10) for _ in range(2))  # four steps an epoch
    options = options | {"callbacks": callbacks, "enable_checkpointing": True, "num_sanity_val_steps": 2}
    history = model.fit(toy(), toy(), **options, **ALONE)
    plain.fit(toy(), toy(), **ALONE)
    assert history.index[history["val_loss"].notna()].tolist() == rows and list(tmp_path.glob("*.ckpt"))
    np.testing.assert_allclose(history.loc[rows], plain.history.loc[rows], rtol=1e-5)


def test_models_print_themselves_in_a_line_and_as_a_table():
    size = "size 6 genes, 5 hidden units, 3 outputs"
    assert repr(toy_model()) == f"ScBMLPClassifier: form plain; {size}; outputs without names; training not fitted"
    model, data = toy_model(linear=True, bias=True), toy()
    data.output_names = pd.Index(["<a>", "b", "c"])
    model.fit(data, data, **QUIET)
    score, linear = (model.history.loc[epoch, "val_accuracy"] for epoch in (model.best_epoch, 0))
    assert repr(model) == (
        f"ScBMLPClassifier: form with a linear part, biases; {size}; outputs <a>, b, c; "
        f"best epoch {model.best_epoch} of 3; validation accuracy {score:.3f}, linear baseline {linear:.3f}"
    )
    html = model._repr_html_()
    assert "&lt;a&gt;" in html and "<a>" not in html and f"{score:.3f}, linear baseline {linear:.3f}" in html
    model.fit(data, **ALONE)
    assert "validation" not in repr(model) and list(model.history) == ["train_loss", "train_accuracy"]


def test_progress_shows_where_somebody_watches_and_after_two_seconds(monkeypatch, capsys):
    shown, solved = [], solve(ScBMLPClassifier, toy(), progress=False)
    monkeypatch.setattr("scbmlp.solving.tqdm", lambda *over, **options: shown.append(options) or tqdm(*over, **options))
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    for watching, wanted in ((False, True), (True, True), (True, False)):
        monkeypatch.setattr("sys.stderr.isatty", lambda watching=watching: watching, raising=False)
        solve_replicas(solved, toy(), 2, progress=wanted)
        assert shown[-1]["disable"] is not (watching and wanted) and shown[-1]["delay"] == 2
    assert capsys.readouterr() == ("", "")
