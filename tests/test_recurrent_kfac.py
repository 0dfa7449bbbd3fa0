"""The chain in time, built from its definition: lags one by one, dense inverses."""

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.operators import Tikhonov
from fisherlab.operators.kronecker_series import KroneckerSeries, weights
from tests import cases
from tests.oracles import assert_close

F64 = torch.float64


def chain(size, seed, length=200):
    """Moments at equal and at neighbouring times of a stable linear recursion."""
    step = 0.3 * cases.normal(size, size, seed=seed)
    noise = cases.normal(length, size, seed=seed + 1)
    rows = [noise[0]]
    for one in noise[1:]:
        rows.append(step @ rows[-1] + one)
    x = torch.stack(rows)
    return x.T @ x / length, x[1:].T @ x[:-1] / length


def series(length=4, kind="symmetric", seed=0):
    return KroneckerSeries(chain(3, seed), chain(2, seed + 9), length, kind)


def root(matrix, power=0.5):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**power) @ vectors.T


def dense_series(op):
    """Σ_{t, t'} V_{t − t'} with V_d = Ψ^d X₀ in both factors."""
    o, i = op.weight_shape
    total = torch.zeros(o * i, o * i, dtype=F64)
    for t in range(op.length):
        for s in range(op.length):
            lag = abs(t - s)
            one = torch.kron(lagged(op.rows, lag, op.chain), lagged(op.cols, lag, op.chain))
            total += one if t >= s else one.T
    return total


def lagged(moments, lag, kind):
    zero, one = moments
    if kind == "stationary":
        return torch.linalg.matrix_power(one @ torch.linalg.inv(zero), lag) @ zero
    psi = root(zero, -0.5) @ one @ root(zero, -0.5)
    half = root(zero)
    return half @ torch.linalg.matrix_power((psi + psi.T) / 2, lag) @ half


KINDS = pytest.mark.parametrize("kind", ["symmetric", "stationary"])


@KINDS
@pytest.mark.parametrize("length", [1, 2, 5])
def test_it_is_the_sum_over_pairs_of_times(kind, length):
    op = series(length, kind)
    dense = dense_series(op)
    assert_close(op.to_dense(), dense)
    w = cases.normal(2, 3, 2)
    assert_close((op @ w).flatten(1), w.flatten(1) @ dense)
    assert_close(op.diagonal().flatten(), dense.diagonal())
    assert op.trace() == pytest.approx(float(dense.trace()))
    assert op.frobenius_norm() == pytest.approx(float(dense.norm()))
    assert_close(op.eigenvalues(), torch.linalg.eigvalsh(dense).flip(0))
    other = series(3, kind, seed=4)
    assert op.inner(other) == pytest.approx(float((dense * other.to_dense()).sum()))


@KINDS
def test_tikhonov_inverts_the_series(kind):
    op, w = series(4, kind), cases.normal(3, 2)
    damped = dense_series(op) + 0.2 * torch.eye(6, dtype=F64)
    expected = torch.linalg.solve(damped, w.flatten()).view(3, 2)
    for damping in (0.2, Tikhonov(0.2)):
        assert_close(op.solve(w, damping), expected, rtol=1e-8)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_the_factored_inverse_of_a_symmetric_chain_is_exact(value):
    op, w = series(4), cases.normal(3, 2)
    damping = fl.Factored(value, pi=1.5)
    dense = dense_series(op.damped(damping))
    assert_close(op.damped(damping).rows[0], op.rows[0] + value**0.5 / 1.5 * eye(3))
    expected = torch.linalg.solve(dense, w.flatten()).view(3, 2)
    assert_close(op.solve(w, damping), expected, rtol=1e-9)


def eye(size):
    return torch.eye(size, dtype=F64)


def test_the_factored_inverse_of_a_stationary_chain_is_the_limit_of_long_ones():
    damping, w = fl.Factored(0.05), cases.normal(3, 2)
    op = series(7, "stationary")
    inverse = op.inverse(damping)
    damped = op.damped(damping)
    total = sum(
        (
            one := torch.kron(
                lagged(damped.rows, d, "stationary"), lagged(damped.cols, d, "stationary")
            )
        )
        + (one.T if d else 0)
        for d in range(200)
    )
    assert_close(inverse.to_dense(), torch.linalg.inv(7 * total), rtol=1e-9)
    expected = torch.linalg.solve(7 * total, w.flatten()).view(3, 2)
    assert_close(inverse @ w, expected, rtol=1e-9)
    assert inverse.trace() == pytest.approx(float(torch.linalg.inv(7 * total).trace()))


def test_the_weights_do_not_cancel_near_full_correlation():
    x = torch.tensor([-1.0, -0.3, 0.0, 0.5, 1 - 1e-9, 1.0], dtype=F64)
    length = 6
    expected = sum((length - abs(d)) * x ** abs(d) for d in range(-length + 1, length))
    assert_close(weights(x, length), expected)
    assert float(weights(x, length)[-1]) == length**2
    y = x[:4]
    closed = (length * (1 - y**2) - 2 * y * (1 - y**length)) / (1 - y) ** 2
    assert_close(weights(y, length), closed, atol=1e-12)


class Recurrent(nn.Module):
    """A plain recurrent network whose map is a layer called once a step."""

    def __init__(self):
        super().__init__()
        self.step, self.read = nn.Linear(5, 3), nn.Linear(3, 2)

    def forward(self, x):
        state = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            state = torch.tanh(self.step(torch.cat([x[:, t], state], 1)))
        return self.read(state)


def recurrent_statistics(length, examples=6):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Recurrent().double()
    data = [(part, None) for part in cases.normal(examples, length, 2).split((4, 2))]
    return model, data


@KINDS
def test_moments_come_from_neighbouring_times(kind):
    model, data = recurrent_statistics(4)
    stats = fl.collect(model, data, fl.Categorical())["step"]
    op = fl.RecurrentKFAC(kind)(stats)
    assert op.length == 4
    a, g = stats.inputs, stats.gradients
    assert_close(op.cols[0], torch.einsum("nti,ntj->ij", a, a) / 24)
    assert_close(op.cols[1], torch.einsum("nti,ntj->ij", a[:, 1:], a[:, :-1]) / 18)
    assert_close(op.rows[0], torch.einsum("vnto,vntp->op", g, g) / 24)
    assert_close(op.rows[1], torch.einsum("vnto,vntp->op", g[:, :, 1:], g[:, :, :-1]) / 18)
    method = {"recurrent": fl.RecurrentKFAC(kind)}
    streamed = fl.approximate(model, data, fl.Categorical(), method, chunk_size=3)
    found = streamed["recurrent"]["step"]
    assert_close(found.to_dense(), op.to_dense(), rtol=1e-8)
    smallest = float(torch.linalg.eigvalsh(op.to_dense())[0])
    assert kind == "stationary" or smallest >= -1e-9 * op.trace()


@KINDS
def test_one_time_step_is_kfac(kind):
    model, data = recurrent_statistics(1)
    stats = fl.collect(model, data, fl.Categorical())["step"]
    found = fl.RecurrentKFAC(kind)(stats).to_dense()
    assert_close(found, fl.KFAC()(stats).to_dense(), rtol=1e-9)


def test_compare_takes_it():
    model, data = recurrent_statistics(3)
    stats = fl.collect(model, data, fl.Categorical())
    methods = {"chain": fl.RecurrentKFAC(), "kfac": fl.KFAC()}
    ds = fl.compare(stats, methods, damping=0.1)
    assert (ds.status == "ok").all()
    assert bool(ds.inverse_error.notnull().all())


@KINDS
def test_float32_is_the_same_matrix(kind):
    model, data = recurrent_statistics(5)
    x = data[0][0] * torch.tensor([1.0, 1e-3], dtype=F64)  # a small direction
    stats = fl.collect(model, (x, None), fl.Categorical())["step"]
    method = fl.RecurrentKFAC(kind)
    wide = method(stats)
    w = cases.normal(*wide.weight_shape)
    for narrow in (wide.to(torch.float32), method(stats.to(torch.float32))):
        assert narrow.dtype == torch.float32
        assert_close(narrow.to_dense().double(), wide.to_dense(), rtol=1e-5)
        assert_close((narrow @ w.float()).double(), wide @ w, rtol=1e-5)
        found = narrow.solve(w.float(), 0.1).double()
        assert_close(found, wide.solve(w, 0.1), rtol=1e-4)
