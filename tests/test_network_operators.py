"""Operators over whole networks agree with dense matrices built independently."""

import itertools
from functools import cache

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.operators.network import TwoLevelInverse
from fisherlab.operators.network.base import tikhonov_inverse
from tests import network_oracles as oracle
from tests.benchmarks import network as benchmarks
from tests.brute_force import full_fisher
from tests.cases import FISHERS, LIKELIHOODS, labels, normal
from tests.model_zoo import Case
from tests.oracles import assert_close, damped_inverse

LAMBDA = 0.05
N = 7


def network(*, bias=True, sizes=(3, 2, 3, 2)):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        layers = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b, bias=bias), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).double()


@cache
def statistics(likelihood="categorical", fisher="exact", bias=True, examples=N):
    model, x = network(bias=bias), normal(examples, 3, seed=2)
    y = labels(LIKELIHOODS[likelihood], model(x).shape)
    return fl.collect(
        model, (x, y), LIKELIHOODS[likelihood], FISHERS[fisher], compress=False
    )


def chain():
    return fl.KFACTridiagonal()(statistics())


def beside():
    """A chain around a norm layer, which stands in the middle of the order."""
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Tanh(), nn.Linear(2, 3))
    stats = fl.collect(
        model.double(), (normal(N, 3, seed=2), None), fl.Gaussian(), compress=False
    )
    return fl.KFACTridiagonal()(stats)


MAKE = {
    "exact": lambda: fl.ExactNetwork()(statistics()),
    "exact gram": lambda: fl.ExactNetwork("gram")(statistics()),
    "block-diagonal kfac": lambda: fl.block_diagonal("kfac", statistics()),
    "block-diagonal exact": lambda: fl.block_diagonal("exact", statistics()),
    "block-diagonal diagonal": lambda: fl.block_diagonal("diagonal", statistics()),
    "khatri-rao": lambda: fl.KhatriRao()(statistics()),
    "tridiagonal": chain,
    "tridiagonal inverse": lambda: chain().inverse(fl.Factored(LAMBDA)),
    "tridiagonal tikhonov inverse": lambda: chain().inverse(LAMBDA),
    "beside": beside,
    "beside inverse": lambda: beside().inverse(fl.Factored(LAMBDA)),
    "block-diagonal inverse": lambda: fl.block_diagonal("kfac", statistics()).inverse(0.1),
    "exact inverse": lambda: fl.ExactNetwork()(statistics()).inverse(LAMBDA),
    "two-level": lambda: fl.TwoLevelKFAC()(statistics()),
    "two-level inverse": lambda: fl.TwoLevelKFAC(combination="additive")(
        statistics()
    ).inverse(LAMBDA),
    "two-level multiplicative inverse": lambda: fl.TwoLevelKFAC(
        coarse="spectral", vectors=2
    )(statistics()).inverse(LAMBDA),
}
SYMMETRIC = [name for name in MAKE if "multiplicative" not in name]
made = cache(lambda name: MAKE[name]())


def weights(op, *lead, seed=3):
    shapes = op.weight_shapes.items()
    return {n: normal(*lead, *shape, seed=seed + k) for k, (n, shape) in enumerate(shapes)}


@pytest.mark.parametrize("name", MAKE)
def test_products_are_those_of_the_dense_matrix(name):
    op = made(name)
    ws = weights(op, 2)
    flat = torch.cat([w.flatten(1) for w in ws.values()], 1)
    dense = op.to_dense()
    expected = flat @ dense.T
    found = op @ ws
    assert list(found) == list(op.weight_shapes)
    assert_close(torch.cat([w.flatten(1) for w in found.values()], 1), expected, 1e-9)
    assert_close((op @ flat[..., None]).squeeze(-1), expected, 1e-9)
    assert_close(op.quadratic_form(ws), (flat * expected).sum(1), 1e-9)
    single = {n: w[0] for n, w in ws.items()}
    assert all((op @ single)[n].shape == w.shape for n, w in single.items())


@pytest.mark.parametrize("name", MAKE)
def test_numbers_are_those_of_the_dense_matrix(name):
    op = made(name)
    dense = op.to_dense()
    assert op.shape == dense.shape
    assert_close(op.diagonal().flatten(), dense.diagonal(), 1e-9)
    assert_close(op.trace(), dense.trace(), 1e-9)
    assert_close(op.frobenius_norm(), dense.norm(), 1e-9)
    for row, column in itertools.product(op.weight_shapes, repeat=2):
        at = op.offsets[row], op.offsets[column]
        assert_close(op.block(row, column), dense[at], 1e-9, atol=1e-9 * dense.abs().max())
    for block in op.weight_shapes:
        at = op.offsets[block]
        assert_close(op.diagonal_block(block).to_dense(), dense[at, at], 1e-9)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_spectrum_and_solves_are_those_of_the_dense_matrix(name):
    op = made(name)
    dense = op.to_dense()
    assert_close(op.eigenvalues(), torch.linalg.eigvalsh(dense).flip(0), 1e-9)
    if name == "two-level":  # its solves are laws of their own
        return
    inverse = damped_inverse(dense, 0.3)
    assert_close(op.logdet(0.3), -torch.logdet(inverse), 1e-9)
    ws = weights(op, 2)
    flat = torch.cat([w.flatten(1) for w in ws.values()], 1)
    found = op.solve(ws, 0.3)
    assert_close(torch.cat([w.flatten(1) for w in found.values()], 1), flat @ inverse, 1e-8)
    assert_close(op.inverse(0.3).to_dense(), inverse, 1e-8)


SAME_BLOCKS = [name for name in MAKE if "beside" not in name and name != "two-level"]
OTHERS = dict.fromkeys(SAME_BLOCKS, SAME_BLOCKS) | {"beside": ["beside", "beside inverse"]}


@pytest.mark.parametrize("first", OTHERS)
def test_inner_products_are_those_of_the_dense_matrices(first):
    a = made(first)
    left = a.to_dense()
    for second in OTHERS[first]:
        b = made(second)
        right = b.to_dense()
        size = float(left.norm() * right.norm())
        assert abs(a.inner(b) - float((left * right).sum())) <= 1e-9 * size, second


@pytest.mark.parametrize("name", MAKE)
def test_precision_and_words(name):
    op = made(name)
    low = op.to(torch.float32)
    assert low.dtype == torch.float32
    assert op.dtype == torch.float64
    ws = {n: w.float() for n, w in weights(op).items()}
    assert all(w.dtype == torch.float32 for w in (low @ ws).values())
    assert_close(low.to_dense(), op.to_dense(), 1e-3)
    text = repr(op)
    assert f"{len(op.weight_shapes)} blocks" in text
    assert f"{op.shape[0]}×{op.shape[0]}" in text
    assert all(f"block {block}" in op._repr_html_() for block in op.weight_shapes)
    assert op.stored_numbers > 0
    assert op.product_flops > 0


def test_join_and_split_are_inverse():
    op = made("khatri-rao")
    ws = weights(op, 2, 3)
    back = op.split(op.join(ws))
    assert all(torch.equal(back[n], w) for n, w in ws.items())
    dense = op.to_dense()
    vector = op.to_scipy() @ torch.ones(len(dense)).numpy()
    assert_close(torch.as_tensor(vector), dense.sum(1))


def test_wrong_blocks_are_named():
    op = made("khatri-rao")
    ws = weights(op)
    with pytest.raises(ValueError, match=r"missing \['0'\]"):
        op @ {n: w for n, w in ws.items() if n != "0"}
    with pytest.raises(ValueError, match=r"unknown \['9'\]"):
        op.solve(ws | {"9": ws["0"]}, 0.1)
    with pytest.raises(ValueError, match=r"shape .*\(2, 3\).* is expected"):
        op @ (ws | {"0": torch.ones(2, 3).double()})
    for given in (ws | {"0": ws["0"].float()}, ws | {"0": ws["0"].numpy()}, [ws["0"]], 1.0):
        for call in (lambda ws: op @ ws, lambda ws: op.solve(ws, 0.1)):
            with pytest.raises(TypeError, match=r"was given.* is expected|Type-check"):
                call(given)
    half = {n: w.half() for n, w in ws.items()}
    for found in (op @ half, op.solve(half, 1.0)):
        assert {w.dtype for w in found.values()} == {torch.float16}
    with pytest.raises(ValueError, match="at least one block"):
        fl.BlockDiagonal({})
    with pytest.raises(ValueError, match="links of shapes"):
        fl.BlockTridiagonal({"a": (torch.eye(2), torch.eye(2))}, [(torch.eye(2),) * 2])
    with pytest.raises(ValueError, match="are expected"):
        fl.KroneckerBlocks(torch.eye(2), torch.eye(2), {"a": (2, 3)})


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("bias", [True, False])
def test_exact_network_is_the_brute_force_fisher(likelihood, bias):
    model, x = network(bias=bias), normal(N, 3, seed=2)
    kind = LIKELIHOODS[likelihood]
    stats = fl.collect(model, (x, None), kind, compress=False)
    case = Case(model, x, None, kind)
    expected = full_fisher(case, fl.blocks(model))
    for form in ("auto", "gram", "dense"):
        op = fl.ExactNetwork(form)(stats)
        assert_close(op.to_dense(), expected)
        assert_close(op.frobenius_norm(), expected.norm())
        ws = weights(op)
        flat = torch.cat([w.flatten() for w in ws.values()])
        solved = op.join(op.solve(ws, LAMBDA)).flatten()
        assert_close(solved, damped_inverse(expected, LAMBDA) @ flat, 1e-9)


@pytest.mark.parametrize("fisher", FISHERS)
def test_exact_network_with_sampled_and_empirical_columns(fisher):
    stats = statistics(fisher=fisher)
    assert_close(fl.ExactNetwork()(stats).to_dense(), oracle.exact(stats))


def test_exact_network_norm_by_blocks_of_the_gram(monkeypatch):
    """Many samples and a long vector: the Gram matrix is never held whole."""
    from fisherlab.samples import parted

    monkeypatch.setattr(parted, "DENSE_ROWS", 0)
    monkeypatch.setattr(parted, "GRAM_ROWS", 4)
    stats = statistics()
    samples = fl.ExactNetwork()(stats).whole.samples
    expected = (N * oracle.exact(stats)).square().sum()
    assert_close(samples.squared_norm(), expected)


def test_exact_network_with_other_forms():
    """Convolutions and norm layers have other samples; their columns still match."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3)
    ).double()
    stats = fl.collect(model, (normal(4, 1, 3, 3), None), fl.Categorical(), compress=False)
    op = fl.ExactNetwork()(stats)
    assert_close(op.to_dense(), oracle.exact(stats))
    assert_close(op.frobenius_norm(), oracle.exact(stats).norm())
    assert_close(op.logdet(0.1), -op.inverse(0.1).logdet())


def test_large_matrices_are_inverted_iteratively(monkeypatch):
    from fisherlab.operators.network import base, kronecker_blocks

    monkeypatch.setattr(base, "DENSE_ROWS", 3)
    monkeypatch.setattr(kronecker_blocks, "DENSE_ROWS", 3)
    op = fl.KhatriRao()(statistics())
    ws = weights(op)
    flat = torch.cat([w.flatten() for w in ws.values()])
    for damping, dense in (
        (LAMBDA, op.to_dense() + LAMBDA * torch.eye(op.shape[0]).double()),
        (fl.Factored(LAMBDA), oracle.khatri_rao(statistics(), LAMBDA)),
    ):
        solved = op.join(op.solve(ws, damping)).flatten()
        assert_close(dense @ solved, flat, 1e-8)


def test_metrics_take_network_operators():
    exact, approx = made("exact"), made("tridiagonal")
    left, right = exact.to_dense(), approx.to_dense()
    error = fl.metrics.frobenius_error(exact, approx)
    assert_close(error, (left - right).norm() / left.norm(), 1e-9)
    cosine = fl.metrics.cosine_similarity(exact, approx)
    assert_close(cosine, (left * right).sum() / left.norm() / right.norm(), 1e-9)
    damped = fl.metrics.inverse_error(exact, approx, 0.1)
    a, b = damped_inverse(left, 0.1), damped_inverse(right, 0.1)
    assert_close(damped, (a - b).norm() / a.norm(), 1e-6)


def test_not_symmetric_is_said():
    op = made("two-level multiplicative inverse")
    assert isinstance(op, TwoLevelInverse)
    for call in (op.eigenvalues, op.logdet, lambda: op.inverse(0.1)):
        with pytest.raises(ValueError, match="not symmetric"):
            call()


def test_indefinite_matrices_are_refused():
    negative = fl.operators.Diagonal(torch.full((2, 3), -1.0).double())
    with pytest.raises(fl.IndefiniteError):
        tikhonov_inverse(fl.operators.BlockDiagonal({"a": negative}), 0.5, None)


def test_benchmark_cases_run():
    for make in benchmarks.SMALL.values():
        case = make()
        case.ours()
        for rival in case.rivals.values():
            rival()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu])])
def test_single_precision_on_any_device(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    stats = fl.collect(
        network().float().to(device),
        (normal(N, 3, seed=2).float().to(device), None),
        fl.Categorical(),
        compress=False,
    )
    for name, method in fl.network_approximators().items():
        op, reference = method(stats), method(statistics())
        assert (op.dtype, op.device.type) == (torch.float32, device), name
        ws = weights(reference)
        there = {n: w.float().to(device) for n, w in ws.items()}
        for damping in (0.1, fl.Factored(0.1)):
            if "network" in name and isinstance(damping, fl.Factored):
                continue
            found, wanted = op.solve(there, damping), reference.solve(ws, damping)
            for block, w in found.items():
                assert w.dtype == torch.float32
                assert_close(w.cpu(), wanted[block], 1e-3, atol=1e-3)
        assert_close(op.trace(), reference.trace(), 1e-4)
        assert_close(op.frobenius_norm(), reference.frobenius_norm(), 1e-4)
        assert_close(op.to_dense().cpu(), reference.to_dense(), 1e-3)
