"""Laws of SOAP, KL-Shampoo and Muon, against dense definitions."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

import fisherlab as fl
from fisherlab.approximators.kronecker import Alternation
from fisherlab.approximators.rearranged import Rearranged
from fisherlab.layers import Block
from fisherlab.samples import OuterSamples
from tests import cases
from tests.oracles import assert_close, second_moment_block

SAMPLES = {
    "outer": cases.outer(2, 6, 3, 4),
    "outer, few": cases.outer(1, 3, 3, 4),
    "shared": cases.shared(2, 5, 3, 3, 4),
    "matrices": cases.matrices(2, 5, 3, 4),
}
EACH = pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
RIDGE = 1e-2


def eye(size):
    return torch.eye(size, dtype=torch.float64)


def dense_block(stats, ridge=0.0):
    block = second_moment_block(stats.example_gradients(), stats.count)
    return block + ridge * block.trace() / len(block) * eye(len(block))


def divergence(block, rows, cols):
    """KL(N(0, block) ‖ N(0, rows ⊗ cols)), by torch's own formula."""
    zero = torch.zeros(len(block), dtype=torch.float64)
    ours, theirs = (MultivariateNormal(zero, m) for m in (block, torch.kron(rows, cols)))
    return float(kl_divergence(ours, theirs))


# --- KL-Shampoo ---


@EACH
def test_no_kronecker_product_has_a_smaller_divergence(samples):
    stats = cases.layer_statistics(samples)
    block, op = dense_block(stats, RIDGE), fl.KLShampoo(RIDGE)(stats)
    assert op.converged
    ((rows, cols),) = op.terms
    least = divergence(block, rows, cols)
    others = [fl.TKFAC()(stats).terms[0], fl.KPSVD()(stats).terms[0]]
    others = [[m + RIDGE * eye(len(m)) for m in pair] for pair in others]
    for seed in range(20):
        size = 10.0 ** -(seed % 5)
        pair = []
        for k, m in enumerate((rows, cols)):
            noise = cases.normal(*m.shape, seed=seed + 50 * k)
            half = torch.linalg.cholesky(m) @ torch.matrix_exp(size * (noise + noise.T))
            pair.append(half @ half.T)
        others.append(pair)
    for pair in others:
        assert divergence(block, *pair) >= least - 1e-12 * abs(least)
    assert divergence(block, *others[2]) > least + 1e-3


@EACH
def test_its_factors_are_stationary_and_found_from_anywhere(samples):
    stats = cases.layer_statistics(samples)
    o, i = stats.weight_shape
    folded = dense_block(stats, RIDGE).view(o, i, o, i)
    op = fl.KLShampoo(RIDGE)(stats)
    ((rows, cols),) = op.terms
    assert_close(
        rows, torch.einsum("aibj,ij->ab", folded, torch.linalg.inv(cols)) / i, 1e-8
    )
    assert_close(
        cols, torch.einsum("aibj,ab->ij", folded, torch.linalg.inv(rows)) / o, 1e-8
    )
    assert float(rows.norm()) == pytest.approx(float(cols.norm()))
    skewed = cases.normal(i, i, seed=9)
    start = replace(op, terms=((rows, skewed @ skewed.T + 0.1 * eye(i)),))
    again = fl.KLShampoo(RIDGE)(stats, previous=start)
    assert_close(again.to_dense(), op.to_dense(), 1e-7)


@EACH
def test_no_half_step_raises_the_divergence(samples):
    stats = cases.layer_statistics(samples)
    block = dense_block(stats, RIDGE)
    ridge = RIDGE * float(dense_block(stats).trace()) / len(block)
    steps = Alternation(Rearranged(samples, stats.count), ridge)
    rows, cols = eye(3), torch.diag(torch.tensor([5.0, 1.0, 0.1, 0.01]).double())
    values = [divergence(block, rows, cols)]
    for _ in range(6):
        rows = steps.rows(cols)
        values.append(divergence(block, rows, cols))
        cols = steps.cols(rows)
        values.append(divergence(block, rows, cols))
    falls = [a - b for a, b in pairwise(values)]
    assert min(falls) >= -1e-12 * abs(values[0])
    assert falls[0] > 1e-2


def test_it_is_exact_where_the_block_is_one_product_of_full_rank():
    rows, cols = (cases.normal(k, k, seed=k) for k in (3, 4))
    whole = torch.einsum("oa,ib->aboi", rows, cols).reshape(1, 12, 3, 4)
    stats = cases.layer_statistics(replace(cases.matrices(1, 1, 3, 4), stored=whole))
    expected = torch.kron(rows @ rows.T, cols @ cols.T) / 12
    assert_close(dense_block(stats), expected, 1e-12)
    assert_close(fl.KLShampoo(ridge=0.0)(stats).to_dense(), expected, 1e-9)


def test_without_a_ridge_a_singular_block_is_refused_and_bad_settings_too():
    few = cases.layer_statistics(cases.outer(1, 1, 3, 4))
    with pytest.raises(fl.NumericalError, match="factor of KL-Shampoo"):
        fl.KLShampoo(ridge=0.0)(few)
    assert fl.KLShampoo()(few).converged
    for bad in ({"ridge": -1.0}, {"max_iterations": 0}):
        with pytest.raises(ValueError, match="expected"):
            fl.KLShampoo(**bad)


def test_an_unfinished_iteration_says_so_in_the_table():
    model, x, _ = cases.data(cases.LAYERS["linear"], fl.Categorical())
    stats = fl.collect(model, (x, None), fl.Categorical(), layers=["0"])
    short = fl.KLShampoo(max_iterations=2)
    found = short(stats["0"])
    assert not found.converged
    assert (found.iterations, found.residual > 1e-10) == (2, True)
    ds = fl.compare(stats, {"short": short})
    assert str(ds.status.values[0, 0]).startswith("not converged")


# --- SOAP ---


@EACH
def test_soap_is_the_best_diagonal_in_shampoos_basis(samples):
    stats = cases.layer_statistics(samples)
    block, found = dense_block(stats), fl.SOAP()(stats)
    ((left, right),) = fl.Shampoo()(stats).terms
    basis = torch.kron(torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1])
    best = basis @ torch.diag((basis.T @ block @ basis).diagonal()) @ basis.T
    assert_close(found.trace(), block.trace(), 1e-12)
    shampoo = torch.kron(left, right)
    scale = float((block * shampoo).sum() / shampoo.square().sum())
    error = float((block - found.to_dense()).norm())
    assert error <= float((block - scale * shampoo).norm()) + 1e-12
    assert error == pytest.approx(float((block - best).norm()), rel=1e-8)
    assert_close(found.to_dense(), fl.TEKFAC()(stats).to_dense(), 1e-12)


# --- Muon ---


@EACH
def test_muon_is_the_root_of_one_partial_trace(samples):
    stats = cases.layer_statistics(samples)
    d = stats.example_gradients().flatten(0, 1)
    expected = torch.kron(torch.einsum("mai,mbi->ab", d, d) / stats.count, eye(4))
    found = fl.Muon()(stats).to_dense()
    assert_close(found @ found, expected, 1e-10)
    assert float(torch.linalg.eigvalsh(found)[0]) > -1e-12


def test_muon_of_one_example_makes_its_gradient_semi_orthogonal():
    stats = cases.layer_statistics(cases.matrices(1, 1, 3, 4))
    ((d,),) = stats.example_gradients()
    turned = fl.Muon()(stats).solve(d, damping=0.0)
    assert_close(turned @ turned.T, eye(3), 1e-9)


# --- their preconditioners ---


def means(shape, number=4):
    block = Block("m", "m.weight", None, shape, shape[0])
    return [fl.MeanGradient(block, cases.normal(*shape, seed=s), 7) for s in range(number)]


def averaged(method, gradients, weight):
    op = None
    for mean in gradients:
        new = method(mean)
        op = new if op is None else fl.average(op, new, weight)
    return op


@pytest.mark.parametrize("shape", [(3, 4), (4, 2), (3, 1)])
def test_soaps_average_is_its_published_recursion(shape):
    gradients, rho = means(shape), 0.8
    first, *rest = (m.gradient for m in gradients)
    left, right = first @ first.T, first.T @ first
    q, p = torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1]
    v = (q.T @ first @ p) ** 2
    for g in rest:
        left = rho * left + (1 - rho) * g @ g.T
        right = rho * right + (1 - rho) * g.T @ g
        by_rows = (q.T @ left @ q).diagonal().argsort(descending=True)
        by_cols = (p.T @ right @ p).diagonal().argsort(descending=True)
        q = torch.linalg.qr(left @ q[:, by_rows])[0]
        p = torch.linalg.qr(right @ p[:, by_cols])[0]
        v = rho * v[by_rows][:, by_cols] + (1 - rho) * (q.T @ g @ p) ** 2
    direction = q @ ((q.T @ g @ p) / (v.sqrt() + 1e-3)) @ p.T
    op = averaged(fl.SOAPPreconditioner(), gradients, rho)
    assert_close(op.solve(g, damping=1e-3), direction, 1e-9)


@pytest.mark.parametrize("shape", [(3, 5), (6, 2)])
def test_soap_of_one_gradient_again_and_again_is_its_polar_factor(shape):
    """Whatever basis rounding gives the null space of the larger side."""
    mean = means(shape)[0]
    op = averaged(fl.SOAPPreconditioner(), [mean] * 4, 0.5)
    u, _, vh = torch.linalg.svd(mean.gradient, full_matrices=False)
    assert_close(op.solve(mean.gradient, damping=1e-8), u @ vh, 1e-6)


def test_kl_shampoos_average_is_its_published_recursion():
    gradients, rho, share = means((3, 4)), 0.8, 1e-2
    first, *rest = (m.gradient for m in gradients)
    inv = torch.linalg.inv

    def half(g, other, ridge):
        scaled = g @ inv(other) @ g.T + ridge * inv(other).trace() * eye(len(g))
        return scaled / g.shape[1]

    ridge = share * float(first.square().mean())
    rows = half(first, eye(4), ridge)
    cols = half(first.T, rows, ridge)
    for g in rest:
        ridge = share * float(g.square().mean())
        new_rows, new_cols = half(g, cols, ridge), half(g.T, rows, ridge)
        rows = rho * rows + (1 - rho) * new_rows
        cols = rho * cols + (1 - rho) * new_cols
    op = averaged(fl.KLShampooPreconditioner(share), gradients, rho)
    found = op.to_dense()
    assert_close(found @ found, torch.kron(rows, cols), 1e-9)
    nothing = replace(gradients[0], gradient=0 * first)
    assert_close(averaged(fl.KLShampooPreconditioner(), [nothing] * 2, rho).trace(), 0.0)


def test_the_recipe_muon_steps_by_the_polar_factor_of_the_momentum():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False))
    model, pair = model.double(), (cases.normal(30, 4), torch.arange(30) % 3)
    problem = fl.problems.Problem("tiny", model, fl.Categorical(), pair, pair)
    optimiser = fl.optimizer("muon", problem, lr=0.1, damping=1e-10, momentum=0.7)
    weights = [p.detach().clone() for p in model.parameters()]
    momenta = [torch.zeros_like(w) for w in weights]
    for _ in range(3):
        optimiser.step(batch=pair)
        leaves = [w.requires_grad_() for w in weights]
        output = pair[0] @ leaves[0].T @ leaves[1].T
        loss = nn.functional.cross_entropy(output, pair[1])
        for k, g in enumerate(torch.autograd.grad(loss, leaves)):
            momenta[k] = 0.7 * momenta[k] + g
            u, _, v = torch.linalg.svd(momenta[k], full_matrices=False)
            # the last layer's gradient has rank 2: its classes' gradients add up to zero
            kept = torch.linalg.matrix_rank(momenta[k])
            weights[k] = leaves[k].detach() - 0.1 * u[:, :kept] @ v[:kept]
    for found, expected in zip(model.parameters(), weights, strict=True):
        assert_close(found.detach(), expected, 1e-5)


def test_a_momentum_goes_on_from_the_operator_before():
    first, second, *_ = means((3, 4))
    method = fl.MuonPreconditioner(momentum=0.5)
    op = method(second, previous=method(first))
    assert_close(op.gradient, second.gradient + 0.5 * first.gradient)
    with pytest.raises(ValueError, match="momentum"):
        fl.MuonPreconditioner(momentum=1.0)
    with pytest.raises(ValueError, match="ridge"):
        fl.KLShampooPreconditioner(ridge=0.0)


def test_all_of_them_stand_in_one_table():
    x = cases.normal(20, 4)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 2))
    data = model.double(), (x, torch.arange(20) % 2), fl.Categorical()
    names = ["soap", "kl-shampoo", "muon", "soap-mean", "kl-shampoo-mean", "muon-mean"]
    ds = fl.compare(fl.collect(*data, fl.Empirical()), names)
    constant = "undefined (zero, constant or too large): diagonal_correlation"
    assert set(ds.status.values.ravel()) <= {"ok", constant}
    samples = fl.collect(*data, fl.Exact())["0"].samples
    assert isinstance(samples, OuterSamples)
    with pytest.raises(fl.NeedsMeanGradient):
        fl.SOAPPreconditioner()(fl.collect(*data, fl.Exact())["0"])


@pytest.mark.parametrize("epsilon", [3e-4, 0.0])
def test_what_is_added_in_every_mode_keeps_a_long_sum_invertible(epsilon):
    """Trainings in float32 ended: the bound of rounding of the largest was above ε."""
    torch.manual_seed(0)
    model = nn.Linear(400, 300, bias=False)
    batch = torch.randn(8, 400), 30 * torch.randn(8, 300)
    mean = fl.mean_gradient(model, batch, fl.Gaussian())["weight"]
    op = fl.ShampooPreconditioner(epsilon)(mean)
    bound = 400 * torch.finfo(torch.float32).eps * op.top_eigenvalues(1)[0]
    assert bound > 3e-4**0.5
    if not epsilon:
        with pytest.raises(fl.NumericalError, match="not positive definite"):
            op.solve(mean.gradient, 0.0)
        return
    roots = [
        vectors @ ((values.clamp_min(0) + epsilon) ** -0.25).diag() @ vectors.T
        for values, vectors in (torch.linalg.eigh(h.double()) for h in op.moments)
    ]
    expected = roots[0] @ mean.gradient.double() @ roots[1]
    found = op.solve(mean.gradient, 0.0)
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert math.isfinite(op.logdet(0.0))
