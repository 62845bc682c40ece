"""Does the adapter keep scikit-learn's own promises, and give the same model as the package?"""

import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from scbmlp.interactions import interaction_matrix
from scbmlp.sklearn import BilinearClassifier, BilinearRegressor

SMALL = {"d_hidden": 8, "n_epochs": 20, "batch_size": 32, "lr": 0.01, "device": "cpu"}
LONG = SMALL | {"n_epochs": 60, "dropout_rate": 0.0}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fit has no validation cells|the model ends below a linear one")
        yield


# Classes are weighted by their size or not at all, as `linear_baseline` and the audit beside them are.
NOT_ASKED_FOR = {"check_class_weight_classifiers": "a weight for each class, in a dict, is refused"}


@parametrize_with_checks(
    [BilinearClassifier(**SMALL), BilinearRegressor(**SMALL)],
    expected_failed_checks=lambda estimator: NOT_ASKED_FOR if isinstance(estimator, BilinearClassifier) else {},
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def planted(n=300):
    """Cells whose class is an exclusive-or of two genes, that no linear model tells."""
    x = np.random.default_rng(0).uniform(size=(n, 6)).astype(np.float32)
    return x, np.where((x[:, 0] > 0.5) ^ (x[:, 1] > 0.5), "one", "none")


def test_it_learns_in_a_grid_behind_a_pipeline_and_its_model_can_be_read():
    x, y = planted()
    pipeline = make_pipeline(MaxAbsScaler(), BilinearClassifier(**LONG))
    grid = GridSearchCV(pipeline, {"bilinearclassifier__weight_decay": [1e-4, 1e-1]}, cv=2)
    grid.fit(sparse.csr_matrix(x), y)
    assert grid.best_score_ > 0.8 and grid.best_params_["bilinearclassifier__weight_decay"] == 1e-4
    best = grid.best_estimator_[-1]
    assert list(best.classes_) == ["none", "one"]
    strongest = interaction_matrix(best.model_, 1).top_pairs(1).iloc[0]
    assert {strongest["gene_a"], strongest["gene_b"]} == {0, 1}


def test_classes_are_balanced_where_that_is_asked_for():
    x, y = planted(600)
    rare = np.flatnonzero(y == "one")[:12]
    rows = np.sort(np.r_[np.flatnonzero(y == "none"), rare])
    plain, balanced = (
        BilinearClassifier(**LONG, class_weight=kind).fit(x[rows], y[rows]) for kind in (None, "balanced")
    )
    assert plain.get_params()["class_weight"] is None and "class_weight" not in BilinearRegressor().get_params()
    assert balanced.model_.cfg.class_weight == "balanced" and balanced.model_.metric == "balanced_accuracy"
    assert (balanced.predict(x) == "one").sum() > (plain.predict(x) == "one").sum() + 50


def test_it_is_the_model_of_the_package():
    x, _ = planted()
    table = pd.DataFrame(x, columns=list("abcdef"))
    y = table[["a", "b"]].to_numpy() * table[["c", "d"]].to_numpy()
    regressor = BilinearRegressor(**SMALL).fit(table, y)
    assert list(regressor.model_.gene_names) == list("abcdef") and regressor.predict(table).shape == (300, 2)
    np.testing.assert_array_equal(regressor.predict(table), regressor.model_.outputs(x))
    assert regressor.fit(table, y[:, 0]).predict(table).shape == (300,)
    scores = cross_val_score(BilinearRegressor(**LONG), table, y, cv=3)
    assert scores.min() > 0.8
