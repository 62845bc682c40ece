import copy
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, r2_score

from scbmlp import audit as audit_of
from scbmlp import baselines, exact, interactions
from scbmlp.baselines import additive_features
from scbmlp.datasets import ExpressionDataset, get_regression_datasets
from scbmlp.interactions import (
    audit,
    contrast,
    decompose,
    direction,
    interaction_matrices,
    interaction_matrix,
    linear_axis,
    similarity,
)
from scbmlp.models import Config, ScBMLPClassifier, ScBMLPRegressor, solve, statistics
from scbmlp.solving import _solved

sizes = st.tuples(st.integers(1, 12), st.integers(1, 8), st.integers(1, 4), st.integers(0, 10_000))


def random_model(gene, hid, out, seed, kind=ScBMLPRegressor, **options):
    """A model whose every weight is drawn anew, the centre too, so that no part is zero by accident."""
    model = kind(Config(gene, hid, out, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.center.copy_(torch.rand(gene, generator=generator))
    model.gene_names = pd.Index([f"gene{i}" for i in range(gene)])
    model.output_names = pd.Index([f"out{i}" for i in range(out)])
    return model.eval()


def dense_q(model, p):
    """Q of eq-q as the sum over hidden units of outer products, in float64."""
    left, right = model.w_l.double().numpy(), model.w_r.double().numpy()
    q = np.einsum("h,hi,hj->ij", p, left, right)
    return (q + q.T) / 2


@settings(max_examples=20)
@given(sizes)
def test_matrix_is_half_the_hessian_and_the_dense_matrix(size):
    """eq-factors, eq-q: eigenpairs, products, diagonal, trace and norm are those of the dense matrix."""
    model = random_model(*size, bias=True, linear=True)
    x = torch.rand(size[0], dtype=torch.float64)
    expected = dense_q(model, model.w_p[0].double().numpy())
    hessian = torch.autograd.functional.hessian(lambda x: model.double()(x[None])[0, 0], x)
    matrix = interaction_matrix(model, 0)
    dense, scale = matrix.to_dense(), max(1, np.abs(expected).max())
    np.testing.assert_allclose(dense, expected, atol=1e-12)
    np.testing.assert_allclose(dense, hessian.numpy() / 2, atol=1e-10)
    values, vectors = matrix.eigh()
    assert (np.diff(np.abs(values)) <= 1e-10 * scale).all()
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(values)), atol=1e-10)
    np.testing.assert_allclose(vectors * values @ vectors.T, dense, atol=1e-10 * scale)
    cells = np.random.default_rng(0).random((size[0], 3))
    np.testing.assert_allclose(matrix @ cells, dense @ cells, atol=1e-10 * scale)
    np.testing.assert_allclose(matrix.T @ cells[:, 0], dense @ cells[:, 0], atol=1e-10 * scale)
    np.testing.assert_allclose(matrix._diagonal(), np.diag(dense), atol=1e-10 * scale)
    for call, message in ((lambda: matrix.eigh(99), "k=99: a whole"), (lambda: matrix.to_dense(max_gb=0), "max_gb=0")):
        with pytest.raises(ValueError, match=message):
            call()


@settings(max_examples=25)
@given(sizes, st.booleans(), st.booleans())
def test_projectors_agree_with_dense_eigh_also_for_repeated_and_zero_eigenvalues(size, bias, homogeneous):
    """Small whole weights, half of them 0 and hidden units in pairs: many eigenvalues coincide or vanish."""
    gene, hid, out, seed = size
    model = random_model(gene, 2 * hid, out, seed, bias=bias)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.as_tensor(rng.integers(-1, 2, parameter.shape) * rng.integers(0, 2, parameter.shape)))
        model.branches.weight[hid : 2 * hid] = model.branches.weight[:hid]
    matrix = interaction_matrix(model, 0, homogeneous=homogeneous)
    dense = matrix.to_dense()
    dense_values, dense_vectors = np.linalg.eigh(dense)
    values, vectors = matrix.eigh()
    scale = max(1, np.abs(dense_values).max())
    # Eigenvalues are one or far apart here: next to each other, rounding turns eigenvectors, whatever the method.
    gaps = np.diff(np.sort([*dense_values, 0])) / scale
    assume(((gaps < 1e-9) | (gaps > 1e-4)).all())
    for value in dense_values[np.abs(dense_values) > 1e-6 * scale]:
        expected = dense_vectors[:, np.abs(dense_values - value) < 1e-8 * scale]
        found = vectors[:, np.abs(values - value) < 1e-8 * scale]
        np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-10)


def test_between_and_units_are_parts_of_the_dense_matrix():
    model, scale = random_model(10, 3, 2, seed=1), np.linspace(0, 2, 10)
    matrix = interaction_matrix(model, "out1")
    dense = scale[:, None] * matrix.to_dense() * scale
    for same in (matrix.scaled(scale), interaction_matrices(model, scale=scale)[1]):
        np.testing.assert_allclose(same.to_dense(), dense, atol=1e-12)
    table = matrix.scaled(scale).between(["gene7", "gene2"], ["gene0", "gene9", "gene7"])
    np.testing.assert_allclose(table, dense[np.ix_([7, 2], [0, 9, 7])], atol=1e-12)
    assert table.columns.tolist() == ["gene0", "gene9", "gene7"]


def test_directions():
    classifier, regressor = (random_model(4, 2, 3, seed=0, kind=kind) for kind in (ScBMLPClassifier, ScBMLPRegressor))
    for model, output, expected in (
        (classifier, "out1", [-1 / 3, 2 / 3, -1 / 3]),
        (classifier, 1, [-1 / 3, 2 / 3, -1 / 3]),
        (classifier, {"out0": 1, "out2": -1}, [1, 0, -1]),
        (regressor, "out1", [0, 1, 0]),
        (regressor, {0: 0.5, "out0": 0.5}, [1, 0, 0]),
    ):
        np.testing.assert_allclose(direction(model, output), expected)


def test_a_contrast_is_blind_to_what_all_logits_share_and_weighs_classes_by_their_cells():
    dataset = ExpressionDataset(np.zeros((4, 4)), np.array([0, 1, 1, 2]), list("abcd"), ["out0", "out1", "out2"])
    weights = contrast("out1", dataset)
    assert weights == {"out0": -0.25, "out1": 0.5, "out2": -0.25}
    model = random_model(4, 2, 3, seed=0, kind=ScBMLPClassifier)
    np.testing.assert_allclose(direction(model, weights), list(weights.values()))


@settings(max_examples=15)
@given(sizes, st.booleans(), st.booleans())
def test_homogeneous_coordinate_takes_up_biases_and_linear_part(size, bias, linear):
    """eq-form where there are none of these, eq-homogeneous."""
    model = random_model(*size, bias=bias, linear=linear).double()
    x = np.random.default_rng(size[3]).random((7, size[0]))
    expected = model(torch.as_tensor(x)).detach().numpy()
    for i in range(size[2]):
        matrix = interaction_matrix(model, {i: 1.0}, homogeneous=True)
        assert matrix.gene_names[-1] == "(constant)"
        form = matrix.quadratic_form(np.hstack([x, np.ones((7, 1))]))
        np.testing.assert_allclose(form, expected[:, i], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_top_pairs_are_the_strongest_of_the_dense_matrix(block, monkeypatch):
    monkeypatch.setattr(interactions, "BLOCK", block)
    matrix = interaction_matrix(random_model(40, 6, 2, seed=5), 1)
    dense = matrix.to_dense()
    i, j = np.triu_indices(40, 1)
    order = np.argsort(-np.abs(dense[i, j]))[:12]
    pairs = matrix.top_pairs(12)
    np.testing.assert_allclose(pairs["interaction"], dense[i, j][order], rtol=1e-10)
    expected = [f"gene{a} gene{b}" for a, b in zip(i[order], j[order], strict=True)]
    assert (pairs["gene_a"] + " " + pairs["gene_b"]).tolist() == expected
    assert len(matrix.top_pairs(10_000)) == len(i)


@settings(max_examples=20)
@given(sizes, st.booleans(), st.booleans())
def test_parts_add_up_around_any_reference_and_the_axis_is_the_gradient_there(size, bias, linear):
    """eq-reference."""
    model = random_model(*size, bias=bias, linear=linear)
    rng = np.random.default_rng(size[3])
    x, reference = rng.random((9, size[0]), np.float32), rng.random(size[0])
    parts = decompose(model, sparse.csr_matrix(x), reference)
    model = model.double()
    expected = model(torch.as_tensor(x, dtype=torch.float64)).detach().numpy()
    np.testing.assert_allclose(sum(parts), expected, rtol=1e-5, atol=1e-5)
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x[None])[0], torch.as_tensor(reference))
    for i in range(size[2]):
        axis = linear_axis(model, {i: 1.0}, reference)
        np.testing.assert_allclose(axis, jacobian[i].numpy(), atol=1e-10)
        if not (bias or linear):
            np.testing.assert_allclose(axis, 2 * interaction_matrix(model, {i: 1.0}) @ reference, atol=1e-10)


@pytest.mark.parametrize("kind", [ScBMLPClassifier, ScBMLPRegressor])
def test_audit_against_its_definition(kind):
    model, (dataset,) = audited(6, 4, 3, seed=2, kind=kind, n_cells=[50])
    x, y = dataset.x.toarray(), dataset.y.numpy()
    table, d = audit(model, dataset), x - x.mean(axis=0)
    p = model.w_p.double().numpy()
    p = p - p.mean(axis=0) if kind is ScBMLPClassifier else p
    for row, weights in zip(table.itertuples(), p, strict=True):
        q = dense_q(model, weights)
        linear, quadratic = 2 * d @ q @ x.mean(axis=0), np.einsum("ci,ij,cj->c", d, q, d)
        total = np.var(linear + quadratic)
        assert row.linear == pytest.approx(np.var(linear) / total, rel=1e-3)
        assert row.quadratic == pytest.approx(np.var(quadratic) / total, rel=1e-3)
        assert row.covariance == pytest.approx(2 * np.cov(linear, quadratic, bias=True)[0, 1] / total, abs=1e-3)
    parts = decompose(model, x, x.mean(axis=0))
    without = {"": 0, "_linear": parts.quadratic, "_quadratic": parts.linear}
    for name, outputs in ((name, sum(parts) - part) for name, part in without.items()):
        if kind is ScBMLPClassifier:
            assert table.attrs[f"score{name}"] == accuracy_score(y, outputs.argmax(1))
            assert table[f"score{name}"].tolist() == [np.mean(outputs.argmax(1)[y == i] == i) for i in range(3)]
        else:
            expected = r2_score(y, outputs, multioutput="raw_values")
            np.testing.assert_allclose(table[f"score{name}"], expected, rtol=1e-4)


def three_sets(model, n_cells, seed=0):
    """Train, validation and test cells with the model's outputs, and noise, as targets."""
    rng, sets, (gene, out) = np.random.default_rng(seed), [], (model.cfg.d_input, model.cfg.d_output)
    for n in n_cells:
        x = (rng.gamma(1.0, size=(n, gene)) * (rng.random((n, gene)) < 0.7)).astype(np.float32)
        y = model.outputs(x) + rng.normal(size=(n, out)).astype(np.float32)
        y = y.argmax(axis=1) if isinstance(model, ScBMLPClassifier) else y
        sets.append(ExpressionDataset(sparse.csr_matrix(x), y, model.gene_names, model.output_names))
    return sets


def audited(*size, n_cells=(50, 30, 30), **options):
    """A model with drawn weights, and cells for it."""
    model = random_model(*size, **options)
    return model, three_sets(model, n_cells)


def test_interaction_is_what_the_best_additive_predictor_leaves():
    """eq-additive."""
    model, sets = audited(5, 4, 2, seed=3, n_cells=(300, 100, 200))
    table = audit(model, sets[2], train=sets[0], validation=sets[1])
    x = [part.x.toarray().astype(np.float64) for part in sets]
    features, d = [np.hstack([one, one**2, one > 0]) for one in x], [one - x[0].mean(axis=0) for one in x]
    grid = baselines.RIDGE * np.square(features[0] - features[0].mean(axis=0)).sum() / 15
    for i, name in enumerate(model.output_names):
        q = dense_q(model, model.w_p.double().numpy()[i])
        pairs = [np.einsum("ci,ij,cj->c", part, q - np.diag(np.diag(q)), part) for part in d]
        fits = [Ridge(penalty, solver="svd").fit(features[0], pairs[0]) for penalty in grid]
        best = min(fits, key=lambda fit, pairs=pairs: np.square(fit.predict(features[1]) - pairs[1]).mean())
        total, alone = model.outputs(sets[2])[:, i].var(), (x[2] - x[2].mean(axis=0)) ** 2 @ np.diag(q)
        left = pairs[2] - best.predict(features[2])
        assert table.loc[name, "interaction"] == pytest.approx(left.var() / total, rel=1e-3)
        assert table.loc[name, "self"] == pytest.approx(alone.var() / total, rel=1e-3)
    # What single genes do on top of it changes nothing of the variance that is left.
    assert 0.01 < table["interaction"].min() and (table["interaction"] < table["pair"]).all()


def test_interaction_does_not_depend_on_the_reference_and_quadratic_does():
    model, (train, val, test) = audited(6, 4, 2, seed=5, n_cells=(100, 50, 50))
    first, second = (audit(model, test, m, train=train, validation=val) for m in (np.zeros(6), np.full(6, 3.0)))
    pd.testing.assert_series_equal(first["interaction"], second["interaction"])
    assert (first["quadratic"] / second["quadratic"] - 1).abs().min() > 0.2


@pytest.mark.parametrize("kind", [ScBMLPClassifier, ScBMLPRegressor])
def test_gain_is_the_score_beyond_the_best_model_without_products(kind):
    """eq-gain."""
    model, (train, val, test) = audited(5, 4, 3, seed=1, kind=kind, n_cells=(400, 200, 200))
    table = audit(model, test, train=train, validation=val)
    np.testing.assert_allclose(table["gain"], table["score"] - table["score_additive"])
    assert table.attrs["gain"] == pytest.approx(table.attrs["score"] - table.attrs["score_additive"])
    target = test.y.numpy()
    x, x_val, x_test = (additive_features(part.x).toarray().astype(np.float64) for part in (train, val, test))
    if kind is ScBMLPClassifier:
        fits = [LogisticRegression(C=c, max_iter=5000).fit(x, train.y) for c in np.logspace(-2, 2, 9)]
        best = min(fits, key=lambda fit: log_loss(val.y, fit.predict_proba(x_val)))
        assert table.attrs["score_additive"] > accuracy_score(target, best.predict(x_test)) - 0.03
        assert table.attrs["gain_log_loss"] > 0.1 and table.attrs["gain"] > 0.02
    else:
        # Hardly weaker than ridge regression on x, x^2 and 1[x > 0] at once, whose weights here happen to be right.
        fits = [Ridge(penalty, solver="svd").fit(x, train.y) for penalty in np.logspace(-3, 4, 29)]
        for i in range(3):
            best = min(fits, key=lambda fit, i=i: np.square(fit.predict(x_val)[:, i] - val.y.numpy()[:, i]).mean())
            assert table["score_additive"].iloc[i] > r2_score(target[:, i], best.predict(x_test)[:, i]) - 0.05
        assert (table["gain"] > 0.05).all() and (table["gain_curved"] > 0.02).all()


def test_audit_of_a_balanced_model_weighs_what_is_fitted_to_the_target_alike():
    model = random_model(5, 4, 2, seed=1, kind=ScBMLPClassifier, class_weight="balanced")
    with torch.no_grad():
        model.project.weight *= 0.2  # as vague as the classes are
    sets = three_sets(model, (600, 300, 300))
    for part in sets:  # about 5% of one class
        first, second = (np.flatnonzero(part.y == i) for i in (0, 1))
        rows = np.sort(np.r_[first, second[: len(first) // 19]])
        part.x, part.y = part.x[rows], part.y[rows]
    train, val, test = sets
    weight = len(train.y) / (2 * np.bincount(train.y))
    model.class_weight.copy_(torch.as_tensor(weight))
    table, target = audit(model, test, train=train, validation=val), test.y.numpy()
    x, x_val, x_test = (additive_features(part.x).toarray().astype(np.float64) for part in sets)
    options = {"class_weight": "balanced", "max_iter": 10_000, "tol": 1e-8}
    fits = [LogisticRegression(C=c, **options).fit(x, train.y) for c in np.logspace(-3, 2, 11)]
    best = min(fits, key=lambda fit: log_loss(val.y, fit.predict_proba(x_val), sample_weight=weight[val.y]))
    for name, predicted in (("score", model.outputs(test).argmax(axis=1)), ("score_additive", best.predict(x_test))):
        assert table.attrs[name] == pytest.approx(balanced_accuracy_score(target, predicted), abs=0.06)
    # Unweighted, the rare class would never be predicted.
    plain = LogisticRegression(C=best.C, max_iter=10_000).fit(x, train.y)
    assert table.attrs["score_additive"] > balanced_accuracy_score(target, plain.predict(x_test)) + 0.02


def linear_targets(link=lambda index: index, n_genes=30, noise=0.3):
    """Training, validation and test cells whose target is a link of a weighted sum of genes, and the weights."""
    rng = np.random.default_rng(0)
    weight, sets = rng.normal(size=n_genes) / 8, []
    for n in (300, 150, 150):
        x = rng.gamma(1.0, size=(n, n_genes)).astype(np.float32)
        y = link(x @ weight)
        y = y + noise * y.std() * rng.normal(size=n)
        sets.append(ExpressionDataset(x, y[:, None].astype(np.float32), pd.RangeIndex(n_genes), pd.Index(["y"])))
    return sets


def test_a_linear_model_of_a_linear_target_gains_nothing_through_curves():
    train, val, test = linear_targets()
    fit = Ridge(1.0).fit(train.x, train.y.numpy().ravel())
    model = ScBMLPRegressor(Config(30, 2, 1, linear=True))
    with torch.no_grad():
        model.direct.weight.copy_(torch.as_tensor(fit.coef_)[None])
        model.project.weight.zero_()
        model.project.bias.fill_(float(fit.intercept_))
    model.gene_names, model.output_names = train.gene_names, train.output_names
    table = audit(model.eval(), test, train=train, validation=val)
    assert table["interaction"].item() == 0 and table["gain_curved"].item() == 0 == table.attrs["gain_curved"]
    assert abs(table["gain"].item()) < 0.02


def test_the_link_of_an_additive_index_is_fitted_with_it():
    """The model is exp(index) itself, up to its second order: what it is ahead of a rival is no interaction."""
    train, val, test = linear_targets(np.exp, noise=0.1)
    solved = solve(ScBMLPRegressor, train, val, progress=False)
    table = audit(solved, test, train=train, validation=val)
    assert table["gain_curved"].item() < 0.02, table.T


def test_audit_without_training_cells_leaves_out_what_needs_them():
    model, (train, val, test) = audited(5, 4, 2, seed=1)
    alone, whole = audit(model, test), audit(model, test, train=train, validation=val)
    needs = ["interaction", "interaction_curved", "gain", "gain_curved", "score_additive"]
    assert alone[needs].isna().all(axis=None) and whole[needs].notna().all(axis=None)
    pd.testing.assert_frame_equal(alone.drop(columns=needs), whole.drop(columns=needs))
    for one in ({"train": train}, {"validation": val}):
        with pytest.raises(ValueError, match=rf"audit has {next(iter(one))} alone; interaction and gain need train="):
            audit(model, test, **one)


def test_audit_of_a_model_that_says_nothing():
    model, sets = audited(5, 4, 2, seed=1)
    with torch.no_grad():
        model.project.weight[0].zero_()
    with warnings.catch_warnings(action="ignore"):  # R2 of a constant
        table = audit(model, sets[2], train=sets[0], validation=sets[1])
    shares = table[["linear", "quadratic", "interaction"]]
    assert shares.loc["out0"].isna().all() and shares.loc["out1"].notna().all()


def test_strength_of_pairs_is_that_of_least_squares(monkeypatch):
    """eq-pair-strength."""
    model, (data,) = audited(12, 5, 1, seed=4, n_cells=[150])
    matrix, x = interaction_matrix(model, 0), data.x.toarray().astype(np.float64)
    dense, d, rows = matrix.to_dense(), x - x.mean(axis=0), []
    for i in range(12):
        for j in range(i + 1, 12):
            design = np.column_stack([np.ones(150), *(f for g in (i, j) for f in (x[:, g], x[:, g] ** 2, x[:, g] > 0))])
            product = d[:, i] * d[:, j]
            left = product - design @ np.linalg.lstsq(design, product, rcond=None)[0]
            rows.append((f"gene{i}", f"gene{j}", dense[i, j], 2 * abs(dense[i, j]) * np.sqrt(np.mean(left**2))))
    expected = sorted(rows, key=lambda row: -row[3])
    monkeypatch.setattr(interactions, "BLOCK", 5)
    for n in (1, 5, 500):
        table = matrix.top_pairs(n, dataset=data)
        assert list(table.columns) == ["gene_a", "gene_b", "interaction", "strength"]
        assert table[["gene_a", "gene_b"]].to_numpy().tolist() == [list(row[:2]) for row in expected[:n]]
        np.testing.assert_allclose(table["strength"], [row[3] for row in expected[:n]], rtol=1e-4)
    assert len(table) == 66


def test_pairs_that_are_curves_of_one_gene_do_not_lead():
    """Six copies of a gene have the largest entries, and products that are functions of the gene."""
    model, (data,) = audited(12, 5, 1, seed=4, n_cells=[150])
    data.x = data.x.toarray()
    data.x[:, :6] = data.x[:, [0]]
    matrix = interaction_matrix(model, 0)
    matrix.basis = matrix.basis * np.where(np.arange(12) < 6, 30, 1)[:, None]
    top = matrix.top_pairs(1, dataset=data).iloc[0]
    assert not {top["gene_a"], top["gene_b"]} <= {f"gene{i}" for i in range(6)}


@pytest.mark.parametrize("linear", [False, True])
def test_rank_of_the_audit_is_the_smallest_that_keeps_the_score(linear):
    model = random_model(6, 5, 2, seed=7, linear=linear)
    x = np.random.default_rng(0).random((200, 6), np.float32)
    y = model.outputs(x)
    table = audit(model, ExpressionDataset(x, y, model.gene_names, model.output_names))
    d = x - model.origin
    for i, name in enumerate(model.output_names):
        values, vectors = np.linalg.eigh(interaction_matrix(model, name).to_dense())
        order = np.argsort(-np.abs(values))
        terms = values[order] * (d @ vectors[:, order]) ** 2
        beside = y[:, i] - terms.sum(axis=1)
        kept = [r2_score(y[:, i], beside + terms[:, :k].sum(axis=1)) for k in range(7)]
        assert table.loc[name, "rank_99"] == next(k for k in range(7) if min(kept[k:]) >= 0.99)
    assert 0 < table.attrs["rank_99"] <= 6


def test_audit_around_the_mean_of_a_class():
    model = random_model(6, 4, 3, seed=2, kind=ScBMLPClassifier)
    x, y = np.random.default_rng(0).random((30, 6), np.float32), np.arange(30) % 3
    dataset = ExpressionDataset(x, y, model.gene_names, model.output_names)
    pd.testing.assert_frame_equal(audit(model, dataset, "out1"), audit(model, dataset, x[y == 1].mean(axis=0)))


# ---------------------------------------------------------------------------------------------------- similarity


@pytest.mark.parametrize("part", ["all", "linear", "quadratic", "interaction"])
@pytest.mark.parametrize("linear", [False, True])
def test_similarity_is_the_correlation_over_normal_cells(part, linear):
    """eq-similarity, against many draws."""
    rng = np.random.default_rng(0)
    a, b = (random_model(5, 3, 2, seed=seed, linear=linear, bias=True) for seed in (0, 1))
    x = np.abs(rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5))).astype(np.float32)
    dataset = ExpressionDataset(x, np.zeros((60, 2)), a.gene_names, a.output_names)
    mean, covariance = x.mean(axis=0), np.cov(x.T, ddof=0)
    d = rng.multivariate_normal(np.zeros(5), covariance, 10**5, method="cholesky")
    values = []
    for model in (a, b):
        axis, q = linear_axis(model, 1, mean).to_numpy(), interaction_matrix(model, 1).to_dense()
        pairs = q - np.diag(np.diag(q)) if part == "interaction" else q
        one, two = d @ axis, np.einsum("ci,ij,cj->c", d, pairs, d, optimize=True)
        values.append({"all": one + two, "linear": one}.get(part, two))
    found = similarity(a, b, 1, part, dataset=dataset)
    assert found == pytest.approx(np.corrcoef(values)[0, 1], abs=0.02) and abs(found) < 0.99
    assert similarity(a, a, 1, part, dataset=dataset) == pytest.approx(1)


def test_similarity_sees_functions_and_not_hidden_units(planted):
    train, *_ = get_regression_datasets(planted, "target")
    a, b = (ScBMLPRegressor(Config(8, 6, 2, n_epochs=5, seed=seed, device="cpu")) for seed in (0, 1))
    for model in (a, b):
        model.fit(train, baseline=False, enable_progress_bar=False)
    other = copy.deepcopy(a)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # units in another order, the branches exchanged, both signs turned
        weight = a.branches.weight.detach()
        other.branches.weight.copy_(-torch.cat([weight[6:][order], weight[:6][order]]))
        other.project.weight.copy_(a.project.weight[:, order])
    other.statistics = statistics(other, train)
    for part in ("all", "linear", "quadratic"):
        assert similarity(a, other, 0, part) == pytest.approx(1, abs=1e-5)
        # From the weights and their statistics alone, as from the cells.
        assert similarity(a, b, 0, part) == pytest.approx(similarity(a, b, 0, part, dataset=train), abs=1e-4)
    assert similarity(a, b, 0, "interaction", dataset=train) < 0.999
    with torch.no_grad():
        other.project.weight.neg_()
    assert similarity(a, other, 0) == pytest.approx(-1, abs=1e-5)


def test_similarity_that_cannot_be_told_is_refused(planted):
    train, val, _ = get_regression_datasets(planted, "target")
    a, b = (ScBMLPRegressor(Config(8, 2, 2, n_epochs=1, device="cpu")) for _ in range(2))
    a.fit(train, baseline=False, enable_progress_bar=False)
    b.fit(val, baseline=False, enable_progress_bar=False)
    without = copy.deepcopy(a)
    without.statistics = None
    for other, part, dataset, message in (
        (a, "pairs", None, "part='pairs' is unknown"),
        (without, "all", None, "part='all' of these models needs cells"),
        (b, "all", None, "trained on different cells; say by dataset="),
        (random_model(5, 2, 1, seed=0), "all", train, "a and b have 8 and 5 genes"),
    ):
        with pytest.raises(ValueError, match=message):
            similarity(a, other, 0, part, dataset=dataset)
    with torch.no_grad():
        b.project.weight.zero_()
    assert np.isnan(similarity(a, b, 0, dataset=train))


def test_outputs_with_modules_of_their_own_are_cut_each_by_itself():
    rng = np.random.default_rng(0)
    x, names = rng.standard_normal((20, 6)).astype(np.float32), [f"g{i}" for i in range(6)]
    cells = ExpressionDataset(x, rng.standard_normal((20, 2)).astype(np.float32), names, ["a", "b"])
    power = np.array([[1, 2, 3, 0, 0], [0, 0, 0, 1, -2.0]])
    found = exact.Solution(np.zeros(6), np.ones(2), np.zeros((2, 6)), rng.standard_normal((5, 6)), power)
    model = _solved(ScBMLPRegressor, Config(6, 1, 2, linear=True), found, cells)
    none, *_, every = audit_of._truncated(model, x)
    np.testing.assert_allclose(none, 1)
    np.testing.assert_allclose(every, 1 + (x @ found.hidden.T) ** 2 @ power.T, rtol=1e-4, atol=1e-4)
