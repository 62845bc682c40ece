import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.metrics import accuracy_score, r2_score

from scbmlp.datasets import ExpressionDataset
from scbmlp.interactions import audit, decompose, direction, interaction_matrices, interaction_matrix, linear_axis
from scbmlp.models import Config, ScBMLPClassifier, ScBMLPRegressor

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


@settings(deadline=None, max_examples=50)
@given(sizes)
def test_factors_are_the_dense_matrix(size):
    """eq-factors, eq-q."""
    model = random_model(*size)
    for i in range(size[2]):
        expected = dense_q(model, model.w_p[i].double().numpy())
        matrix = interaction_matrix(model, i)
        assert matrix.shape == expected.shape
        np.testing.assert_allclose(matrix.to_dense(), expected, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(sizes)
def test_matrix_is_half_the_autograd_hessian(size):
    model = random_model(*size, bias=True, linear=True).double()
    x = torch.rand(size[0], dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda x: model(x[None])[0, 0], x)
    np.testing.assert_allclose(interaction_matrix(model, 0).to_dense(), hessian.numpy() / 2, atol=1e-10)


@settings(deadline=None, max_examples=50)
@given(sizes)
def test_eigenpairs_agree_with_dense_eigh(size):
    model = random_model(*size)
    matrix = interaction_matrix(model, 0)
    dense = matrix.to_dense()
    values, vectors = matrix.eigh()
    scale = max(1, np.abs(dense).max())
    assert (np.diff(np.abs(values)) <= 1e-10 * scale).all()
    expected = np.linalg.eigvalsh(dense)
    largest = expected[np.argsort(-np.abs(expected))][: len(values)]
    np.testing.assert_allclose(np.sort(values), np.sort(largest), atol=1e-10 * scale)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(values)), atol=1e-10)
    np.testing.assert_allclose(vectors * values @ vectors.T, dense, atol=1e-10 * scale)


@settings(deadline=None, max_examples=100)
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


def test_quadratic_form_is_the_output_of_a_model_without_biases():
    """eq-form."""
    model = random_model(30, 5, 3, seed=0)
    x = sparse.random(20, 30, density=0.3, random_state=0, format="csr", dtype=np.float32)
    for i, name in enumerate(model.output_names):
        form = interaction_matrix(model, name).quadratic_form(x)
        np.testing.assert_allclose(form, model.outputs(x)[:, i], rtol=1e-4, atol=1e-4)


def test_between_and_scaled_are_parts_of_the_dense_matrix():
    model = random_model(10, 3, 2, seed=1)
    scale = np.linspace(0, 2, 10)
    matrix = interaction_matrix(model, 1)
    dense = np.diag(scale) @ matrix.to_dense() @ np.diag(scale)
    table = matrix.scaled(scale).between(["gene7", "gene2"], ["gene0", "gene9", "gene7"])
    np.testing.assert_allclose(table, dense[np.ix_([7, 2], [0, 9, 7])], atol=1e-12)
    assert table.columns.tolist() == ["gene0", "gene9", "gene7"]


def test_directions():
    classifier = random_model(4, 2, 3, seed=0, kind=ScBMLPClassifier)
    regressor = random_model(4, 2, 3, seed=0)
    np.testing.assert_allclose(direction(classifier, "out1"), [-1 / 3, 2 / 3, -1 / 3])
    np.testing.assert_allclose(direction(classifier, 1), direction(classifier, "out1"))
    np.testing.assert_allclose(direction(classifier, {"out0": 1, "out2": -1}), [1, 0, -1])
    np.testing.assert_allclose(direction(regressor, "out1"), [0, 1, 0])
    np.testing.assert_allclose(direction(regressor, {0: 0.5, "out0": 0.5}), [1, 0, 0])


@settings(deadline=None, max_examples=50)
@given(sizes, st.booleans(), st.booleans())
def test_homogeneous_coordinate_takes_up_biases_and_linear_part(size, bias, linear):
    """eq-homogeneous."""
    model = random_model(*size, bias=bias, linear=linear).double()
    x = np.random.default_rng(size[3]).random((7, size[0]))
    expected = model(torch.as_tensor(x)).detach().numpy()
    for i, matrix in enumerate(interaction_matrices(model, [{j: 1.0} for j in range(size[2])], homogeneous=True)):
        assert matrix.gene_names[-1] == "(constant)"
        form = matrix.quadratic_form(np.hstack([x, np.ones((7, 1))]))
        np.testing.assert_allclose(form, expected[:, i], rtol=1e-8, atol=1e-8)
        values, vectors = matrix.eigh()
        np.testing.assert_allclose(vectors * values @ vectors.T, matrix.to_dense(), atol=1e-8)


@settings(deadline=None, max_examples=50)
@given(sizes)
def test_operator_diagonal_trace_and_norm(size):
    model = random_model(*size)
    matrix = interaction_matrix(model, 0)
    dense, x = matrix.to_dense(), np.random.default_rng(0).random((size[0], 3))
    scale = max(1, np.abs(dense).max())
    np.testing.assert_allclose(matrix @ x, dense @ x, atol=1e-10 * scale)
    np.testing.assert_allclose(matrix.T @ x[:, 0], dense @ x[:, 0], atol=1e-10 * scale)
    np.testing.assert_allclose(matrix.diagonal(), np.diag(dense), atol=1e-10 * scale)
    assert matrix.trace() == pytest.approx(np.trace(dense), abs=1e-10 * scale)
    assert matrix.norm() == pytest.approx(np.linalg.norm(dense), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_top_pairs_are_the_strongest_of_the_dense_matrix(block):
    matrix = interaction_matrix(random_model(40, 6, 2, seed=5), 1)
    dense = matrix.to_dense()
    i, j = np.triu_indices(40, 1)
    order = np.argsort(-np.abs(dense[i, j]))[:12]
    pairs = matrix.top_pairs(12, block=block)
    np.testing.assert_allclose(pairs["interaction"], dense[i, j][order], rtol=1e-10)
    expected = [f"gene{a} gene{b}" for a, b in zip(i[order], j[order], strict=True)]
    assert (pairs["gene_a"] + " " + pairs["gene_b"]).tolist() == expected
    assert len(matrix.top_pairs(10_000, block=block)) == len(i)


def test_matrices_of_one_model_share_one_decomposition(monkeypatch):
    model = random_model(20, 3, 4, seed=0)
    calls, qr = [], np.linalg.qr
    monkeypatch.setattr(np.linalg, "qr", lambda basis: calls.append(1) or qr(basis))
    matrices = list(interaction_matrices(model))
    for name, matrix in zip(model.output_names, matrices, strict=True):
        np.testing.assert_array_equal(matrix.eigh(2)[0], interaction_matrix(model, name).eigh(2)[0])
    assert len(calls) == 1 + len(matrices)  # one for all of them, and one for each read alone


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: direction(m, "Beta"), "'Beta' is unknown; the outputs are out0, out1"),
        (lambda m: direction(m, "OUT"), r"did you mean out1 or out0\?"),
        (
            lambda m: interaction_matrix(m, 0).between(["Gene0"], ["gene0"]),
            r"not the model's: Gene0; did you mean gene0",
        ),
        (lambda m: direction(m, 2), "output=2 is unknown"),
        (lambda m: interaction_matrix(m, 0).between(["gene0"], ["Ins1"]), "1 of 1 genes are not the model's: Ins1"),
    ],
)
def test_unknown_names(call, message):
    with pytest.raises(KeyError, match=message):
        call(random_model(5, 2, 2, seed=0))


def test_impossible_requests():
    model = random_model(5, 2, 2, seed=0)
    with pytest.raises(ValueError, match=r"k=5 eigenpairs.*1 to 4"):
        interaction_matrix(model, 0).eigh(5)
    with pytest.raises(ValueError, match="dense matrix of 5 genes takes 0.0 GB, more than max_gb=1e-07"):
        interaction_matrix(model, 0).to_dense(max_gb=1e-7)
    with pytest.raises(ValueError, match="reference has 3 values"):
        decompose(model, np.ones((2, 5), np.float32), np.ones(3))


@settings(deadline=None, max_examples=50)
@given(sizes, st.booleans(), st.booleans(), st.integers(1, 7))
def test_parts_add_up_around_any_reference(size, bias, linear, batch_size):
    """eq-reference."""
    model = random_model(*size, bias=bias, linear=linear)
    rng = np.random.default_rng(size[3])
    x, reference = rng.random((9, size[0]), np.float32), rng.random(size[0])
    constant, linear_part, quadratic = decompose(model, sparse.csr_matrix(x), reference, batch_size=batch_size)
    expected = model.double()(torch.as_tensor(x, dtype=torch.float64)).detach().numpy()
    np.testing.assert_allclose(constant + linear_part + quadratic, expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(sizes, st.booleans(), st.booleans())
def test_axis_is_the_gradient_at_the_reference(size, bias, linear):
    """The slope of eq-reference."""
    model = random_model(*size, bias=bias, linear=linear).double()
    reference = torch.rand(size[0], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x[None])[0], reference)
    for i in range(size[2]):
        axis = linear_axis(model, {i: 1.0}, reference.numpy())
        np.testing.assert_allclose(axis, jacobian[i].numpy(), atol=1e-10)
        if not (bias or linear):
            q_m = interaction_matrix(model, {i: 1.0}).to_dense() @ reference.numpy()
            np.testing.assert_allclose(axis, 2 * q_m, atol=1e-10)


@pytest.mark.parametrize("kind", [ScBMLPClassifier, ScBMLPRegressor])
def test_audit_against_its_definition(kind):
    model = random_model(6, 4, 3, seed=2, kind=kind)
    rng = np.random.default_rng(0)
    x = rng.random((50, 6), np.float32)
    y = rng.integers(0, 3, 50) if kind is ScBMLPClassifier else rng.random((50, 3), np.float32)
    dataset = ExpressionDataset(x, y, model.gene_names, model.output_names)
    table = audit(model, dataset)

    d = x - x.mean(axis=0)
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
    linear_only = parts.constant + parts.linear
    outputs = model.outputs(x)
    if kind is ScBMLPClassifier:
        assert table.attrs["score"] == accuracy_score(y, outputs.argmax(1))
        assert table.attrs["score_linear"] == accuracy_score(y, linear_only.argmax(1))
        quadratic_only = parts.constant + parts.quadratic
        assert table.attrs["score_quadratic"] == accuracy_score(y, quadratic_only.argmax(1))
        assert table["score"].tolist() == [np.mean(outputs.argmax(1)[y == i] == i) for i in range(3)]
    else:
        np.testing.assert_allclose(table["score"], r2_score(y, outputs, multioutput="raw_values"), rtol=1e-4)
        np.testing.assert_allclose(table["score_linear"], r2_score(y, linear_only, multioutput="raw_values"), rtol=1e-4)


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
    named, given = audit(model, dataset, "out1"), audit(model, dataset, x[y == 1].mean(axis=0))
    pd.testing.assert_frame_equal(named, given)
    with pytest.raises(KeyError, match=r"reference='Out1' is not a class; did you mean out1"):
        audit(model, dataset, "Out1")


def test_audit_refuses_classes_in_another_order():
    model = random_model(6, 4, 3, seed=2, kind=ScBMLPClassifier)
    x, y = np.random.default_rng(0).random((9, 6), np.float32), np.arange(9) % 3
    with pytest.raises(ValueError, match=r"out2, out1, out0\) are not those of the model.*out0, out1, out2"):
        audit(model, ExpressionDataset(x, y, model.gene_names, model.output_names[::-1]))


def test_audit_tells_an_interaction_from_a_product_with_a_constant():
    """The product of two varying genes is quadratic; times a gene that hardly varies, it is linear."""
    model = ScBMLPRegressor(Config(3, 1, 1))
    with torch.no_grad():
        model.branches.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        model.project.weight.fill_(1.0)
    x = np.random.default_rng(0).standard_normal((500, 3)).astype(np.float32)
    y = x[:, :1] * x[:, 1:2]
    names = pd.RangeIndex(3), pd.RangeIndex(1)
    assert audit(model, ExpressionDataset(x, y, *names))["quadratic"].item() > 0.95
    x[:, 1] = 5 + 0.01 * x[:, 1]
    assert audit(model, ExpressionDataset(x, x[:, :1] * x[:, 1:2], *names))["quadratic"].item() < 0.001
