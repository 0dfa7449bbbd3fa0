"""Laws of low rank, quasi-diagonals and what optimisers make of mean gradients."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import fractional_matrix_power
from torch import nn

import fisherlab as fl
from fisherlab.approximators import averages
from fisherlab.approximators import exact as exact_file
from fisherlab.approximators.base import building_flops, result_numbers
from fisherlab.approximators.online import damped_pair
from fisherlab.layers import Block
from fisherlab.operators import FactoredFisher
from fisherlab.operators.quasi_newton import HeldInverse, PairsInverse, bfgs
from fisherlab.statistics import MeanGradient
from tests import cases, oracles
from tests.cases import normal
from tests.oracles import assert_close

F64 = torch.float64
SAMPLES = {
    "outer": cases.outer(2, 5, 3, 4),
    "shared": cases.shared(2, 5, 2, 3, 4),
    "matrices": cases.matrices(2, 5, 3, 4),
}
EVERY_FORM = pytest.mark.parametrize("form", SAMPLES)
LAYERS = pytest.mark.parametrize("layer", cases.LAYERS)


def eye(size):
    return torch.eye(size, dtype=F64)


def dense(stats):
    return oracles.second_moment_block(stats.example_gradients(), stats.count)


# --- low rank ---


@LAYERS
@pytest.mark.parametrize("way", ["gram", "block", "products"])
def test_a_low_rank_leaves_the_tail_of_the_spectrum(layer, way, monkeypatch):
    stats = cases.statistics(layer)
    whole = dense(stats)
    values = torch.linalg.eigvalsh(whole).flip(0).clamp_min(0)
    if way != "gram":  # as if the samples were too many, and then the block too large
        monkeypatch.setattr(exact_file, "DIRECT", 0 if way == "products" else 14)
    for rank in (1, 2):
        if way == "products" and rank >= len(whole):
            continue
        found = fl.LowRank(rank)(stats)
        left = float((whole - found.to_dense()).norm())
        assert_close(left, values[rank:].norm(), 0, 1e-9 * float(whole.norm()))
        assert len(found.values) <= rank
        vectors = found.vectors.flatten(1)
        assert_close(vectors @ vectors.T, eye(len(vectors)), 1e-10)


@LAYERS
def test_a_rank_above_that_of_the_block_is_exact(layer):
    stats = cases.statistics(layer)
    whole = dense(stats)
    found = fl.LowRank(rank=50)(stats)
    assert_close(found.to_dense(), whole, 1e-10)
    assert len(found.values) == int(torch.linalg.matrix_rank(whole, rtol=1e-10))


def test_the_online_average_is_the_best_of_its_rank():
    parts = [cases.layer_statistics(cases.outer(1, 4, 3, 4, seed=s)) for s in (0, 5)]
    old, new = (fl.LowRank(3)(part) for part in parts)
    mixed = 0.7 * old.to_dense() + 0.3 * new.to_dense()
    found = fl.average(old, new, 0.7)
    values, vectors = torch.linalg.eigh(mixed)
    best = (vectors[:, -3:] * values[-3:]) @ vectors[:, -3:].T
    assert_close(found.to_dense(), best, 1e-10)
    again = fl.average(found, new, 0.5)
    assert len(again.values) == 3


def test_a_low_rank_needs_damping_and_a_positive_rank():
    op = fl.LowRank(2)(cases.statistics("linear"))
    with pytest.raises(fl.IndefiniteError, match="smallest"):
        op.inverse(0.0)
    with pytest.raises(ValueError, match="positive rank"):
        fl.LowRank(0)


# --- quasi-diagonal ---


@LAYERS
def test_a_quasi_diagonal_keeps_diagonal_and_bias_and_its_inverse_is_an_arrow(layer):
    stats = cases.statistics(layer, examples=9)
    o, i = stats.weight_shape
    whole, found = dense(stats), fl.QuasiDiagonal()(stats)
    assert_close(found.diagonal().flatten(), whole.diagonal(), 1e-12)
    folded, expected = found.to_dense().view(o, i, o, i), whole.view(o, i, o, i)
    for row in range(o):
        if stats.block.bias is None:
            assert_close(folded[row, :, row], torch.diag(found.diagonal()[row]), 1e-12)
            continue
        assert_close(folded[row, :, row, -1], expected[row, :, row, -1], 1e-12)
        if float(torch.linalg.matrix_rank(folded[row, :, row], rtol=1e-9)) < i:
            continue
        inverse = torch.linalg.inv(folded[row, :, row])
        rest = inverse[:-1, :-1] - torch.diag(inverse[:-1, :-1].diagonal())
        assert_close(rest, torch.zeros_like(rest), 0, 1e-9 * float(inverse.abs().max()))
        folded[row, :, row] = 0
    if stats.block.bias is not None:
        assert float(folded.abs().sum()) == 0 or i > 1


def test_a_quasi_diagonal_is_exact_on_the_rows_of_one_example_and_on_norm_layers():
    model, x, _ = cases.data(cases.LAYERS["linear"], fl.Gaussian(), 1)
    for pair in ((x, None), (x.repeat(3, 1), None)):
        stats = fl.collect(model, pair, fl.Gaussian(), layers=["0"])["0"]
        rows = fl.approximators()["unit-wise"](stats).to_dense()
        assert_close(fl.QuasiDiagonal()(stats).to_dense(), rows, 1e-12)
    stats = cases.statistics("norm")
    rows = fl.approximators()["unit-wise"](stats).to_dense()
    assert_close(fl.QuasiDiagonal()(stats).to_dense(), rows, 1e-12)


def test_a_quasi_diagonal_is_closer_to_each_row_than_the_diagonal():
    """In the divergence of Gaussians, which it minimises over arrow inverses."""
    stats = cases.statistics("linear", examples=40)
    o, i = stats.weight_shape
    whole = dense(stats).view(o, i, o, i)
    quasi = fl.QuasiDiagonal()(stats).to_dense().view(o, i, o, i)

    def divergence(p, q):
        ratio = torch.linalg.solve(q, p)
        return float(ratio.trace() - torch.logdet(ratio) - len(p))

    for row in range(o):
        p, q = whole[row, :, row], quasi[row, :, row]
        assert divergence(p, q) < divergence(p, torch.diag(p.diagonal()))


def test_the_quasi_diagonal_step_does_not_see_a_shift_of_its_inputs():
    """As the natural gradient does not, and the diagonal does."""
    inputs, gradients = normal(12, 3), normal(1, 12, 2, seed=1)
    steps = {}
    for shift in (0.0, 5.0):
        a = torch.cat([inputs + shift, torch.ones(12, 1, dtype=F64)], 1)
        block = Block("layer", "w", "b", (2, 3), 2)
        stats = fl.LayerStatistics(block, 12, a[:, None], gradients[:, :, None])
        mean = stats.example_gradients()[0].mean(0)
        for method in (fl.QuasiDiagonal(), fl.Diagonal()):
            step = method(stats).solve(mean, 0.0)
            steps[method, shift] = step @ a.T  # what the outputs feel
    assert_close(steps[fl.QuasiDiagonal(), 5.0], steps[fl.QuasiDiagonal(), 0.0], 1e-9)
    change = steps[fl.Diagonal(), 5.0] - steps[fl.Diagonal(), 0.0]
    assert float(change.norm()) > 0.1 * float(steps[fl.Diagonal(), 0.0].norm())


def test_the_average_of_quasi_diagonals_averages_what_they_are_made_of():
    parts = [cases.statistics("linear", fisher=kind) for kind in ("exact", "empirical")]
    old, new = (fl.QuasiDiagonal()(part) for part in parts)
    found = fl.average(old, new, 0.7)
    assert_close(found.diagonal(), 0.7 * old.diagonal() + 0.3 * new.diagonal(), 1e-12)


# --- exact blocks as an optimiser ---


@EVERY_FORM
def test_the_average_of_wide_exact_blocks_keeps_samples_and_is_exact(form, monkeypatch):
    monkeypatch.setattr(averages, "KEPT_BLOCK", 0)
    few = {
        "outer": lambda s: cases.outer(1, 3, 4, 6, seed=s),
        "shared": lambda s: cases.shared(1 + s % 2, 2, 2 + s % 2, 4, 6, seed=s),
        "matrices": lambda s: cases.matrices(1 + s % 2, 2, 4, 6, seed=s),
    }[form]
    blocks = [fl.ExactBlock()(cases.layer_statistics(few(s))) for s in (0, 5, 9)]
    op, expected = blocks[0], blocks[0].to_dense()
    for block in blocks[1:]:
        op = fl.average(op, block, 0.8)
        expected = 0.8 * expected + 0.2 * block.to_dense()
    assert isinstance(op, FactoredFisher)
    assert_close(op.to_dense(), expected, 1e-12)
    w = normal(4, 6)
    solved = oracles.damped_inverse(expected, 0.1) @ w.flatten()
    assert_close(op.solve(w, 0.1).flatten(), solved, 1e-9)
    for _ in range(4):
        op = fl.average(op, blocks[0], 0.8)
        expected = 0.8 * expected + 0.2 * blocks[0].to_dense()
    assert_close(op.to_dense(), expected, 1e-12)


def test_samples_of_batches_long_past_fade_from_the_average(monkeypatch):
    monkeypatch.setattr(averages, "KEPT_BLOCK", 0)
    blocks = [
        fl.ExactBlock()(cases.layer_statistics(cases.outer(1, 1, 30, 40, seed=s)))
        for s in range(40)
    ]
    op, expected = blocks[0], blocks[0].to_dense()
    for block in blocks[1:]:
        op = fl.average(op, block, 0.1)
        expected = 0.1 * expected + 0.9 * block.to_dense()
    assert op.samples.examples < 25
    assert_close(op.to_dense(), expected, 1e-12)


# --- Adam ---


def test_averages_of_adams_preconditioner_take_adams_steps():
    model = nn.Linear(4, 3, dtype=F64)
    block = fl.blocks(model)["weight"]
    torch_adam = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-3)
    ours = block.pack({n: p.detach().clone() for n, p in model.named_parameters()})
    op, momentum = None, torch.zeros_like(ours)
    for step in range(1, 6):
        gradient = normal(3, 5, seed=step)
        for name, part in block.unpack(gradient).items():
            model.get_parameter(name).grad = part
        torch_adam.step()
        new = fl.preconditioners()["adam"](MeanGradient(block, gradient, 1))
        share = 0.99 * (1 - 0.99 ** (step - 1)) / (1 - 0.99**step)  # bias-corrected
        op = new if op is None else fl.average(op, new, share)
        momentum = 0.9 * momentum + 0.1 * gradient
        ours = ours - 0.01 * op.solve(momentum / (1 - 0.9**step), damping=1e-3)
    theirs = block.pack({n: p.detach() for n, p in model.named_parameters()})
    assert_close(ours, theirs, 1e-12)


# --- Shampoo and TNT ---


BLOCKS = {
    "matrix": Block("m", "m.weight", "m.bias", (3, 4), 3),
    "convolution": Block("c", "c.weight", "c.bias", (3, 2, 2, 2), 3),
    "convolution 1 × 1": Block("c", "c.weight", None, (3, 2, 1, 1), 3),
    "norm": Block("n", "n.weight", "n.bias", (4,), 4),
}


def unfoldings(block, w):
    """Cut a packed weight into tensors and their mode moments, by einsum."""
    tensors = block.unpack(w)
    weight = tensors[block.weight]
    if len(block.shape) == 2:
        weight = w
    elif len(block.shape) == 4:
        weight = weight.flatten(2).squeeze(2) if block.shape[2] == 1 else weight.flatten(2)
    found = [weight]
    if block.bias is not None and len(block.shape) != 2:
        found.append(tensors[block.bias])
    sums = {1: ["a,b->ab"], 2: ["ai,bi->ab", "ia,ib->ab"]}
    sums[3] = ["aij,bij->ab", "iaj,ibj->ab", "ija,ijb->ab"]
    return [(t, [torch.einsum(s, t, t) for s in sums[t.dim()]]) for t in found]


def repacked(block, tensors):
    if len(tensors) == 1 and len(block.shape) == 2:
        return tensors[0]
    names = (block.weight, block.bias)
    named = dict(zip(names, tensors, strict=False))
    named[block.weight] = named[block.weight].reshape(block.shape)
    return block.pack(named)


def through(tensor, factors):
    for mode, factor in enumerate(factors):
        turned = torch.tensordot(factor, tensor, dims=([1], [mode]))
        tensor = turned.movedim(0, mode)
    return tensor


def power(matrix, exponent):
    return torch.from_numpy(np.real(fractional_matrix_power(matrix.numpy(), exponent)))


@pytest.mark.parametrize("name", BLOCKS)
def test_shampoos_direction_is_that_of_its_definition_after_averaging(name):
    block, epsilon = BLOCKS[name], 0.1
    batches = [normal(*block.weight_shape, seed=s) for s in range(3)]
    method = fl.ShampooPreconditioner(epsilon)
    op = None
    for gradient in batches:
        new = method(MeanGradient(block, gradient, 7))
        op = new if op is None else fl.average(op, new, 0.9)
    weights = 0.81, 0.09, 0.1
    parts = [unfoldings(block, gradient) for gradient in batches]
    expected = []
    for place, (tensor, moments) in enumerate(parts[-1]):
        factors = []
        for mode in range(len(moments)):
            h = sum(w * p[place][1][mode] for w, p in zip(weights, parts, strict=True))
            factors.append(power(h + epsilon * eye(len(h)), -0.5 / len(moments)))
        expected.append(through(tensor, factors))
    assert_close(op.solve(batches[-1], 0.0), repacked(block, expected), 1e-9)


@pytest.mark.parametrize("name", BLOCKS)
def test_tnts_direction_is_that_of_its_definition(name):
    block, epsilon = BLOCKS[name], 0.1
    gradient = normal(*block.weight_shape, seed=3)
    expected = []
    for tensor, moments in unfoldings(block, gradient):
        k, size = tensor.dim(), tensor.numel()
        c = (float(moments[0].trace()) / size) ** (1 / k)
        factors = []
        for h in moments:
            scaled = h / (c ** (k - 1) * size / len(h))
            assert math.isclose(float(scaled.trace()) / len(h), c)
            factors.append(torch.linalg.inv(scaled + epsilon * eye(len(h))))
        expected.append(through(tensor, factors))
    op = fl.TNTPreconditioner(epsilon)(MeanGradient(block, gradient, 7))
    assert_close(op.solve(gradient, 0.0), repacked(block, expected), 1e-9)
    bare = fl.TNTPreconditioner(0.0)(MeanGradient(block, gradient, 7))
    assert_close(bare.trace(), gradient.square().sum(), 1e-12)


def test_tnt_without_a_gradient_is_its_shift_and_bad_shifts_are_refused():
    block = BLOCKS["matrix"]
    op = fl.TNTPreconditioner(0.5)(MeanGradient(block, 0 * normal(3, 5), 1))
    assert_close(op.to_dense(), 0.25 * eye(15))
    for method in (fl.TNTPreconditioner, fl.ShampooPreconditioner):
        with pytest.raises(ValueError, match="epsilon"):
            method(-1.0)


# --- K-BFGS ---


def curved(size, seed):
    root = normal(size, size + 1, seed=seed)
    return root @ root.T / size + 0.5 * eye(size)


@given(st.integers(1, 5), st.integers(0, 99))
def test_bfgs_meets_the_secant_and_stays_positive(size, seed):
    s = normal(size, seed=seed)
    y = curved(size, seed) @ s
    start = curved(size, seed + 1)
    found = bfgs(start, s, y)
    assert_close(found @ y, s, 1e-9)
    assert_close(found, found.T, 1e-12)
    assert float(torch.linalg.eigvalsh(found)[0]) > 0
    assert torch.equal(bfgs(start, s, -y), start)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_pairs_apply_the_bfgs_matrix_of_the_last_of_them(size, memory, seed):
    pairs = []
    for k in range(4):
        s = normal(size, seed=seed + k)
        pairs.append((s, curved(size, seed + 10 * k) @ s))
    held, few = HeldInverse(eye(size)), PairsInverse(normal(size), memory)
    for s, y in pairs[-memory:]:
        held = held.updated(s, y)
    for s, y in pairs:
        few = few.updated(s, y)
    w = normal(size, 3, seed=seed)
    assert_close(few.apply(w), held.apply(w), 1e-7)
    assert_close(few.dense(), held.dense(), 1e-7)


@given(st.integers(1, 5), st.integers(0, 99), st.floats(0.01, 0.9))
def test_double_damping_bounds_the_curvature(size, seed, least):
    h, s, y = curved(size, seed), normal(size, seed=seed + 1), normal(size, seed=seed + 2)
    new_s, new_y = damped_pair(s, y, h @ y, least)
    assert float(new_s @ new_y) >= least * float(new_s @ new_s) * (1 - 1e-9)
    middle, same = damped_pair(s, y, h @ y, 0.0)
    lifted = 0.2 * float(y @ h @ y)
    assert_close(middle @ same, max(float(s @ y), lifted), 1e-9)  # no more than needed
    second = max(float(middle @ same), least * float(middle @ middle))
    assert_close(new_s @ new_y, second, 1e-9)
    good = curved(size, seed + 3) @ s
    if float(s @ good) >= max(0.2 * float(good @ h @ good), least * float(s @ s)):
        kept = damped_pair(s, good, h @ good, least)
        assert torch.equal(kept[0], s)
        assert torch.equal(kept[1], good)


@pytest.mark.parametrize("memory", [None, 3])
def test_k_bfgs_follows_its_definition_over_batches(memory):
    method = fl.KBFGS(damping=0.25, decay=0.9, memory=memory)
    parts = [cases.statistics("linear", fisher=kind) for kind in ("empirical", "exact")]
    o, i = parts[0].weight_shape
    a = parts[0].inputs[:, 0]
    moment = a.T @ a / len(a)
    columns = torch.linalg.inv(moment + 0.5 * eye(i))
    op = method(parts[0])
    w = normal(o, i)
    assert_close(op.solve(w, 0.0), w @ columns, 1e-10)
    rows, mean = eye(o), None
    for step in range(3):
        before, after = (
            fl.approximators.Observation(normal(o, seed=s), normal(o, seed=s + 50))
            for s in (step, step + 9)
        )
        op = method.observe(op, before, after)
        s, y = after.output - before.output, after.gradient - before.gradient
        mean = (
            (s, y) if mean is None else (0.9 * mean[0] + 0.1 * s, 0.9 * mean[1] + 0.1 * y)
        )
        rows = bfgs(rows, *damped_pair(*mean, rows @ mean[1], 0.5))
    assert_close(op.solve(w, 0.0), rows @ w @ columns, 1e-9)
    assert float(torch.linalg.eigvalsh(rows)[0]) > 0
    again = method(parts[1], previous=op)
    b = parts[1].inputs[:, 0]
    moment = 0.9 * moment + 0.1 * b.T @ b / len(b)
    s = columns @ b.mean(0)
    columns = bfgs(columns, s, moment @ s + 0.5 * s)
    assert_close(again.solve(w, 0.0), rows @ w @ columns, 1e-9)
    assert_close((again @ again.solve(w, 0.0)), w, 1e-7)


def test_an_observation_is_the_mean_of_outputs_and_of_their_gradients():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = normal(6, 4), normal(6, 2, seed=1)
    outputs = []

    def keep(module, inputs, output):
        output.retain_grad()
        outputs.append(output)

    handle = model[0].register_forward_hook(keep)
    fl.Gaussian().loss(model(x), y).sum().backward()
    handle.remove()
    stats = fl.collect(model, (x, y), fl.Gaussian(), fl.Empirical(), layers=["0"])["0"]
    w = stats.pack({n: p.detach() for n, p in model.named_parameters()})
    seen = fl.approximators.Observation.of(stats, w)
    assert_close(seen.output, outputs[0].detach().mean(0), 1e-12)
    assert_close(seen.gradient, outputs[0].grad.mean(0), 1e-12)


@pytest.mark.parametrize("memory", [None, 5])
def test_k_bfgs_trains_by_what_it_observes_around_its_steps(memory):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batch, method = (normal(40, 5), torch.arange(40) % 3), fl.KBFGS(memory=memory)
    parameters, operators, losses = dict(model.named_parameters()), {}, []

    def seen():
        return fl.collect(model, batch, fl.Categorical(), fl.Empirical())

    def weight(layer):
        return layer.pack({n: p.detach() for n, p in parameters.items()})

    for _ in range(12):
        loss = fl.Categorical().loss(model(batch[0]), batch[1]).mean()
        losses.append(float(loss.detach()))
        before = seen()
        marks = {}
        for name, layer in before.items():
            operators[name] = method(layer, operators.get(name))
            marks[name] = fl.approximators.Observation.of(layer, weight(layer))
            gradient = layer.example_gradients()[0].mean(0)
            step = layer.unpack(operators[name].solve(gradient, 0.0))
            with torch.no_grad():
                for parameter, part in step.items():
                    parameters[parameter].sub_(0.3 * part)
        for name, layer in seen().items():
            after = fl.approximators.Observation.of(layer, weight(layer))
            operators[name] = method.observe(operators[name], marks[name], after)
    assert losses[-1] < losses[0] - 0.05
    for op in operators.values():
        assert float(op.eigenvalues()[-1]) > 0


def test_k_bfgs_refuses_what_it_cannot_use():
    stats = cases.statistics("linear")
    with pytest.raises(ValueError, match="an operator of KBFGS"):
        fl.KBFGS()(stats, previous=fl.KFAC()(stats))
    with pytest.raises(fl.NeedsSharedForm):
        fl.KBFGS()(cases.statistics("norm"))
    for bad in ({"damping": 0.0}, {"decay": 1.0}, {"memory": 0}):
        with pytest.raises(ValueError, match="positive"):
            fl.KBFGS(**bad)
    op = fl.KBFGS()(stats)
    with pytest.raises(ValueError, match="no average"):
        fl.average(op, op, 0.5)


# --- in the optimiser ---


@pytest.mark.parametrize(
    ("method", "damping", "lr"),
    [
        (fl.MiniBlock("mean_gradient"), 1e-2, 0.01),
        (fl.MiniBlock("mean_gradient", spatial_average=True), 1e-2, 0.01),
        (fl.MiniBlock(), 1e-1, 0.1),
        (fl.AdamPreconditioner(), 1e-3, 0.02),
        (fl.ShampooPreconditioner(1e-2), 0.0, 0.05),
        (fl.TNTPreconditioner(1e-1), 0.0, 0.01),
        (fl.QuasiDiagonal(), 1e-1, 0.1),
        (fl.LowRank(5), 1e-1, 0.05),
        (fl.ExactBlock(), 1e-1, 0.1),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_every_preconditioner_lowers_the_loss(method, damping, lr):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batch = normal(40, 5), torch.arange(40) % 3
    optimiser = fl.NaturalGradient(
        model, fl.Categorical(), method, lr=lr, damping=damping, momentum=0.5
    )
    losses = [float(optimiser.step(batch=batch)) for _ in range(15)]
    assert losses[-1] < losses[0] - 0.03
    assert all(np.isfinite(losses))


def test_operators_keep_their_state_in_another_precision():
    gradient = normal(3, 5)
    mean = MeanGradient(BLOCKS["matrix"], gradient, 1)
    for method in (fl.AdamPreconditioner(), fl.ShampooPreconditioner(), fl.LowRank(2)):
        given_statistics = mean if method != fl.LowRank(2) else cases.statistics("linear")
        op = method(given_statistics)
        single = op.to(torch.float32)
        mixed = fl.average(single, single, 0.5)
        assert mixed.dtype == torch.float32
        assert_close(mixed.to_dense(), op.to_dense(), 1e-4)
        assert replace(op).provenance == op.provenance


# --- a method for each block ---


def test_blocks_may_have_methods_of_their_own():
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.LayerNorm(2), nn.Linear(2, 2))
    data = normal(6, 3), torch.arange(6) % 2
    means = fl.mean_gradient(model.double(), data, fl.Categorical())
    shared = fl.MiniBlock("mean_gradient", spatial_average=True)
    method = fl.MethodByBlock(
        fl.MiniBlock("mean_gradient"), {"2": fl.AdamPreconditioner(), "3": shared}
    )
    assert method.takes == "mean_gradient"
    for name, own in (("0", method.default), ("2", fl.AdamPreconditioner()), ("3", shared)):
        found = method(means[name])
        assert_close(found.to_dense(), own(means[name]).to_dense())
        assert type(found) is type(own(means[name]))
    assert method.method("3.inner") == shared
    assert method.method("30") == method.default
    with pytest.raises(ValueError, match="mean_gradient and per_example"):
        fl.MethodByBlock(fl.KFAC(), {"0": fl.AdamPreconditioner()})


def test_what_is_estimated_is_what_is_held():
    stats = cases.statistics("linear")
    for method in (fl.QuasiDiagonal(), fl.LowRank(3), fl.Diagonal(), fl.EKFAC()):
        found = result_numbers(method, stats.samples)
        assert found == method(stats).stored_numbers
        assert building_flops(method, stats.samples) > 0
    assert result_numbers(fl.MiniBlock(spatial_average=True), stats.samples) is None
