"""Laws of mini-blocks: which entries they keep, of which statistic, at which scale."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fisherlab as fl
from fisherlab.operators import MiniBlocks, Partition
from tests import cases, oracles
from tests.cases import normal
from tests.oracles import assert_close


def conv(channels, outputs, features, **options):
    return nn.Sequential(
        nn.Conv2d(channels, outputs, **options),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(features, 3),
    )


MODELS = {  # model, one example, (rows, columns) of the weight, kernel, bias
    "linear": (lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)), (3,)),
    "linear without bias": (
        lambda: nn.Sequential(nn.Linear(3, 2, bias=False), nn.Tanh(), nn.Linear(2, 3)),
        (3,),
    ),
    "strided, padded": (
        lambda: conv(2, 2, 8, kernel_size=(2, 3), stride=2, padding=1),
        (2, 3, 3),
    ),
    "grouped": (lambda: conv(4, 2, 8, kernel_size=2, groups=2), (4, 3, 3)),
    "1 × 1": (lambda: conv(3, 2, 8, kernel_size=1), (3, 2, 2)),
    "1 × 1 without bias": (lambda: conv(3, 2, 8, kernel_size=1, bias=False), (3, 2, 2)),
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def made(name, examples=3):
    build, example = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double()
    return model, normal(examples, *example, seed=1)


def statistics(name, fisher=None, examples=3):
    model, x = made(name, examples)
    y = torch.arange(examples) % 3
    return fl.collect(model, (x, y), fl.Categorical(), fisher or fl.Exact())["0"]


def groups(block):
    """Spell the paper's mini-blocks out from the shape of the parameter."""
    o, i = block.weight_shape
    bias = block.bias is not None
    if len(block.shape) == 2:
        return [range(r * i, (r + 1) * i) for r in range(o)]
    kernel = block.shape[2] * block.shape[3]
    starts = range(0, i - bias, kernel)
    found = [range(r * i + s, r * i + s + kernel) for r in range(o) for s in starts]
    return found + [[r * i + i - 1] for r in range(o) if bias]


# --- from per-example gradients ---


@EVERY_MODEL
def test_they_are_the_sub_blocks_of_the_fisher_with_enumerated_labels(name):
    model, x = made(name)
    block = fl.blocks(model)["0"]
    whole = oracles.brute_force_fisher(model, x, fl.Categorical(), block)
    expected = oracles.mini_blocks(whole, [list(g) for g in groups(block)])
    found = fl.MiniBlock()(statistics(name))
    assert_close(found.to_dense(), expected, 1e-12)
    assert_close(found.frobenius_norm(), expected.norm(), 1e-12)
    assert_close(found.formed.trace(), whole.trace(), 1e-12)


@given(
    groups_of=st.integers(1, 2),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    bias=st.booleans(),
    shared=st.booleans(),
)
def test_convolutions_of_any_shape(groups_of, kernel, stride, padding, bias, shared):
    options = {"stride": stride, "padding": padding, "groups": groups_of, "bias": bias}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(2, 2, kernel, **options), nn.Tanh(), nn.Flatten())
    model, x = model.double(), normal(2, 2, 3, 3, seed=2)
    block = fl.blocks(model)["0"]
    whole = oracles.brute_force_fisher(model, x, fl.Gaussian(), block)
    stats = fl.collect(model, (x, None), fl.Gaussian())["0"]
    expected = oracles.mini_blocks(whole, [list(g) for g in groups(block)])
    found = fl.MiniBlock(spatial_average=shared)(stats)
    assert_close(found.trace(), whole.trace(), 1e-12)
    if not shared:
        assert_close(found.to_dense(), expected, 1e-12)
        assert_close(
            fl.MiniBlock(partition=fl.ByTile(9, 99))(stats).to_dense(), whole, 1e-12
        )


@pytest.mark.parametrize("shared", [False, True])
def test_solves_in_panels_are_those_of_the_whole(shared, monkeypatch):
    op = fl.MiniBlock(spatial_average=shared)(statistics("strided, padded"))
    op = op if shared else op.formed
    w = normal(2, *op.weight_shape)
    expected, inverse = op.solve(w, 0.1), op.inverse(0.1).to_dense()
    monkeypatch.setattr("fisherlab.operators.mini_blocks.PANEL_BYTES", 1)
    assert_close(op.solve(w, 0.1), expected, 1e-12)
    assert_close(op.inverse(0.1).to_dense(), inverse, 1e-12)
    assert_close(inverse, oracles.damped_inverse(op.to_dense(), 0.1), 1e-10)


@EVERY_MODEL
def test_the_error_is_what_the_blocks_do_not_hold_and_rules_are_ordered(name):
    stats = statistics(name)
    exact, whole = fl.ExactBlock()(stats), float(fl.ExactBlock()(stats).to_dense().norm())
    errors = {}
    chosen = {
        "diagonal": fl.Diagonal(),
        "shared": fl.MiniBlock(spatial_average=True),
        "mini-block": fl.MiniBlock(),
        "unit-wise": fl.MiniBlock(partition=fl.ByOutput()),
        "tiles": fl.MiniBlock(partition=fl.ByTile(2, 2)),
        "inputs": fl.MiniBlock(partition=fl.ByInput()),
    }
    for label, method in chosen.items():
        op = method(stats)
        square = float((exact.to_dense() - op.to_dense()).norm() ** 2)
        assert_close(square, whole**2 - op.frobenius_norm() ** 2, 0, 1e-12 * whole**2)
        errors[label] = square
    order = ("mini-block", "diagonal"), ("unit-wise", "mini-block"), ("tiles", "diagonal")
    for smaller, larger in (*order, ("inputs", "diagonal"), ("mini-block", "shared")):
        assert errors[smaller] <= errors[larger] + 1e-12 * whole**2


@EVERY_MODEL
def test_spatial_averaging_shares_the_mean_of_kernels_and_that_of_biases(name):
    stats = statistics(name)
    last = stats.block.weight_shape[1] - 1
    alone = stats.block.bias is not None and len(stats.block.shape) > 2
    whole = fl.ExactBlock()(stats).to_dense()
    expected = torch.zeros_like(whole)
    every = [torch.tensor(list(g)) for g in groups(stats.block)]
    biases = [t for t in every if alone and int(t[0]) % (last + 1) == last]
    for tables in (every[: len(every) - len(biases)], biases):
        if not tables:
            continue
        mean = sum(whole[t[:, None], t] for t in tables) / len(tables)
        for table in tables:
            expected[table[:, None], table] = mean
    found = fl.MiniBlock(spatial_average=True)(stats)
    assert_close(found.to_dense(), expected, 1e-12)
    assert all(len(stack) == 1 for stack in found.blocks)


def test_mini_blocks_of_norm_layers_are_scalars_and_unit_wise_ones_two_by_two():
    stats = cases.statistics("norm")
    whole = fl.ExactBlock()(stats).to_dense()
    assert_close(fl.MiniBlock()(stats).to_dense(), torch.diag(whole.diagonal()), 1e-12)
    rows = [[2 * k, 2 * k + 1] for k in range(3)]
    found = fl.approximators()["unit-wise"](stats)
    assert_close(found.to_dense(), oracles.mini_blocks(whole, rows), 1e-12)


def test_every_row_of_an_embedding_is_a_block():
    model = nn.Sequential(nn.Embedding(4, 2), nn.Flatten(), nn.Linear(6, 3)).double()
    x = torch.tensor([[0, 1, 1], [3, 0, 2]])
    stats = fl.collect(model, (x, None), fl.Categorical(), layers=["0"])["0"]
    whole = fl.ExactBlock()(stats).to_dense()
    rows = [[2 * k, 2 * k + 1] for k in range(4)]
    found = fl.MiniBlock()(stats)
    assert_close(found.to_dense(), oracles.mini_blocks(whole, rows), 1e-12)


# --- from mean gradients ---


def test_the_mean_gradient_has_the_expectation_of_the_block_over_n():
    """Over all labels of all examples: the scale between the two statistics."""
    model, x = made("linear", examples=2)
    block = fl.blocks(model)["0"]
    whole = oracles.brute_force_fisher(model, x, fl.Categorical(), block)
    kept = oracles.mini_blocks(whole, [list(g) for g in groups(block)])
    chances = model(x).softmax(-1).detach()
    plain, scaled = torch.zeros_like(kept), torch.zeros_like(kept)
    for labels in itertools.product(range(3), repeat=2):
        y = torch.tensor(labels)
        weight = chances[torch.arange(2), y].prod()
        mean = fl.mean_gradient(model, (x, y), fl.Categorical())["0"]
        plain += weight * fl.MiniBlock("mean_gradient")(mean).to_dense()
        scaled += weight * fl.MiniBlock("scaled_mean_gradient")(mean).to_dense()
    assert_close(plain, kept / 2, 1e-12)
    assert_close(scaled, kept, 1e-12)


@EVERY_MODEL
@pytest.mark.parametrize("fisher", [fl.Empirical(), fl.MonteCarlo(1, seed=3)])
def test_a_mean_gradient_is_the_same_from_statistics_and_from_one_backward_pass(
    name, fisher
):
    model, x = made(name)
    y = torch.arange(3) % 3
    mean = fl.mean_gradient(model, (x, y), fl.Categorical(), fisher=fisher)["0"]
    halves = fl.mean_gradient(
        model, [(x[:1], y[:1]), (x[1:], y[1:])], fl.Categorical(), fisher=fisher
    )["0"]
    assert_close(halves.gradient, mean.gradient, 1e-12)
    stats = statistics(name, fisher)
    assert_close(mean.gradient, stats.example_gradients()[0].mean(0), 1e-12)
    flat = mean.gradient.flatten()
    outer = torch.outer(flat, flat)
    expected = oracles.mini_blocks(outer, [list(g) for g in groups(stats.block)])
    for given_statistics in (mean, stats):
        found = fl.MiniBlock("mean_gradient")(given_statistics)
        assert_close(found.to_dense(), expected, 1e-12)
        assert found.provenance.fisher == repr(fisher)
    assert mean.provenance.examples == 3


def test_several_draws_give_the_mean_over_them():
    fisher = fl.MonteCarlo(samples=2, seed=1)
    model, x = made("linear")
    mean = fl.mean_gradient(model, (x, None), fl.Categorical(), fisher=fisher)["0"]
    stats = statistics("linear", fisher)
    found = fl.AdamPreconditioner()(stats).diagonal()
    assert_close(found, mean.gradient.abs(), 1e-12)
    drawn = stats.example_gradients() * 2**0.5  # without the 1/√2
    assert_close(mean.gradient, drawn.mean((0, 1)), 1e-12)


def test_a_shared_block_of_a_mean_gradient_is_its_gram_matrix_over_the_rows():
    stats = statistics("linear", fl.Empirical())
    mean = stats.example_gradients()[0].mean(0)
    found = fl.MiniBlock("mean_gradient", spatial_average=True)(stats)
    assert_close(found.blocks[0][0], mean.T @ mean / 2, 1e-12)


def test_columns_of_the_exact_root_are_refused_and_said_in_the_table():
    model, x = made("linear")
    stats = fl.collect(model, (x, None), fl.Categorical())
    for method in fl.preconditioners().values():
        if getattr(method, "takes", "") != "mean_gradient":
            continue
        with pytest.raises(fl.NeedsMeanGradient, match=r"'0'.*Exact\(\).*MonteCarlo"):
            method(stats["0"])
    table = fl.compare(stats, ["adam", "diagonal"])
    assert "mean loss" in str(table.status.sel(layer="0", approximator="adam").item())
    assert table.frobenius_error.sel(approximator="adam").isnull().all()
    with pytest.raises(ValueError, match="model's own labels is zero"):
        fl.mean_gradient(model, (x, None), fl.Categorical(), fisher=fl.Exact())


def test_preconditioners_stand_in_the_same_table():
    model, x = made("linear")
    data = (x, torch.arange(3))
    stats = fl.collect(model, data, fl.Categorical(), fl.Empirical())
    names = [*fl.preconditioners(), "kfac", "exact"]
    gradient = fl.mean_gradient(model, data, fl.Categorical())
    packed = {name: mean.gradient for name, mean in gradient.items()}
    table = fl.compare(stats, names, damping=0.1, gradient=packed)
    assert (table.status == "ok").all()
    assert table.direction_cosine.sel(approximator="exact").min() > 1 - 1e-9
    assert table.direction_cosine.notnull().all()


def test_the_wrong_statistics_and_unknown_names_are_refused():
    mean = fl.mean_gradient(*_pair())["0"]
    with pytest.raises(ValueError, match=r"LayerStatistics.*mean_gradient"):
        fl.MiniBlock()(mean)
    with pytest.raises((ValueError, TypeError), match=r"per_example|statistic"):
        fl.MiniBlock(statistic="neither")
    assert fl.MiniBlock().takes == "per_example"
    assert fl.MiniBlock("mean_gradient").takes == "mean_gradient"
    with pytest.raises(ValueError, match="positive"):
        fl.ByTile(0, 2)


def _pair():
    model, x = made("linear")
    return model, (x, torch.arange(3)), fl.Categorical()


# --- averages ---


@pytest.mark.parametrize("statistic", ["per_example", "mean_gradient"])
@pytest.mark.parametrize("shared", [False, True])
@EVERY_MODEL
def test_moving_averages_are_those_of_the_dense_blocks(name, shared, statistic):
    method = fl.MiniBlock(statistic, spatial_average=shared)
    parts = [statistics(name, fl.MonteCarlo(1, seed=s)) for s in range(3)]
    op, dense = method(parts[0]), method(parts[0]).to_dense()
    for part in parts[1:]:
        op = fl.average(op, method(part), 0.9)
        dense = 0.9 * dense + 0.1 * method(part).to_dense()
    assert_close(op.to_dense(), dense, 1e-12)
    w = normal(*op.weight_shape)
    solved = oracles.damped_inverse(dense, 1e-3) @ w.flatten()
    assert_close(op.solve(w, 1e-3).flatten(), solved, 1e-9)


def test_shared_blocks_have_the_inner_products_of_their_matrices():
    stats = statistics("strided, padded")
    shared, own = (fl.MiniBlock(spatial_average=flag)(stats) for flag in (True, False))
    matrix, other = shared.to_dense(), own.to_dense()
    assert_close(shared.inner(shared), matrix.square().sum(), 1e-12)
    assert_close(shared.inner(own.formed), (matrix * other).sum(), 1e-12)
    assert_close(own.formed.inner(shared), (matrix * other).sum(), 1e-12)


def test_blocks_of_two_partitions_have_no_average():
    stats = statistics("linear")
    rows, columns = (fl.MiniBlock(partition=rule)(stats) for rule in (None, fl.ByInput()))
    with pytest.raises(ValueError, match="partitions"):
        fl.average(rows, columns, 0.5)
    with pytest.raises(ValueError, match="partitions"):
        fl.average(rows.formed, columns.formed, 0.5)


# --- partitions ---


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 3), st.integers(1, 3))
def test_taking_blocks_out_and_putting_them_back_changes_nothing(o, i, seed, labels):
    generator = torch.Generator().manual_seed(seed)
    marks = torch.randint(0, labels, (o, i), generator=generator)
    w = normal(2, o, i, seed=seed)
    for partition in (
        Partition.by_row((o, i)),
        Partition.by_column((o, i)),
        Partition.by_kernel((o, i), 1, bias=True),
        Partition.by_label((o, i), marks),
    ):
        taken = partition.take(w)
        assert [tuple(t.shape[1:]) for t in taken] == list(partition.sizes)
        for part, table in zip(taken, partition.groups, strict=True):
            assert torch.equal(part, w.flatten(1)[:, table])
        assert torch.equal(partition.assemble(taken), w)
        assert partition.stored_numbers == sum(
            len(t) * t.shape[1] * (t.shape[1] + 1) // 2 for t in partition.groups
        )


def test_blocks_as_large_as_rows_but_elsewhere_are_not_taken_for_rows():
    stats = cases.layer_statistics(cases.outer(2, 5, 3, 4))
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(1)).view(3, 4)
    whole = fl.ExactBlock()(stats).to_dense()
    found = fl.MiniBlock(partition=Partition((3, 4), (shuffled,)))(stats)
    expected = oracles.mini_blocks(whole, shuffled.tolist())
    assert_close(found.to_dense(), expected, 1e-12)
    assert_close(found.frobenius_norm(), expected.norm(), 1e-12)
    exact = fl.ExactBlock()(stats)
    assert_close(exact.inner(found), (whole * expected).sum(), 1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Partition.by_kernel((2, 6), 4, bias=False),
        lambda: Partition.by_label((2, 2), torch.zeros(2, 3, dtype=torch.long)),
        lambda: Partition((2, 2), (torch.tensor([[0, 1], [2, -1]]),)),
    ],
)
def test_partitions_that_do_not_fit_are_refused(make):
    with pytest.raises(ValueError, match=r"blocks of 4|shape \(2, 3\)|once"):
        make()


def test_no_table_of_positions_is_held_for_rows_and_kernels():
    op = MiniBlocks(Partition.by_row((3, 4)), (normal(1, 4, 4),))
    assert not any(isinstance(piece, torch.Tensor) for piece in op.partition.pieces)
    assert op.stored_numbers == 10
    assert op.product_flops == 48


@pytest.mark.parametrize(
    "samples",
    [cases.shared(1, 3, 4, 3, 7), cases.matrices(2, 2, 3, 9), cases.outer(2, 3, 4, 9)],
    ids=["shared", "matrices", "outer"],
)
def test_fewer_samples_than_inputs_are_solved_for_without_any_block(samples, monkeypatch):
    op = fl.MiniBlock()(cases.layer_statistics(samples))
    dense, w = op.to_dense(), cases.normal(2, *samples.weight_shape)
    assert op.frobenius_norm() == pytest.approx(float(dense.norm()), rel=1e-12)
    monkeypatch.setattr(type(op), "formed", property(lambda self: pytest.fail("formed")))
    for damping in (0.3, 1e-3):
        damped = dense + damping * torch.eye(len(dense), dtype=torch.float64)
        expected = torch.linalg.solve(damped, w.flatten(1).T).T.view_as(w)
        assert_close(op.solve(w, damping), expected, 1e-9)


def test_an_eigenbasis_of_blocks_turns_weights_without_copies_of_it():
    """A product of k weights with B bases of n × n takes k B n numbers, not k B n²."""
    roots = normal(40, 30, 30)
    op = MiniBlocks(Partition.by_row((40, 30)), (roots @ roots.mT,))
    form, sizes = op.eigenform(), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view:
                sizes.append(out.numel())
            return out

    w = normal(50, 40, 30)
    with Sizes():
        back = form.combine(form.rotate(w))
    assert_close(back, w)
    assert max(sizes) <= max(w.numel(), op.blocks[0].numel())


def test_singular_blocks_are_refused_before_they_are_formed(monkeypatch):
    """A dead layer has a relative damping of 0: blocks of 9 GB were formed to say no."""
    op = fl.MiniBlock()(cases.layer_statistics(cases.outer(1, 3, 4, 5)))
    monkeypatch.setattr(type(op), "_panels", lambda *_: pytest.fail("formed"))
    for question in (lambda: op.solve(cases.normal(4, 5), 0.0), lambda: op.inverse(0.0)):
        with pytest.raises(fl.errors.IndefiniteError, match="damping"):
            question()


@pytest.mark.parametrize(
    "fisher", [fl.Exact(), fl.MonteCarlo(1), fl.MonteCarlo(2)], ids=repr
)
@pytest.mark.parametrize("damping", [1e-3, 0.5])
def test_inverses_of_few_examples_are_those_of_the_dense_blocks(fisher, damping):
    model = nn.Sequential(nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    layer = fl.collect(model, (torch.randn(9, 20).double(), None), fl.Categorical(), fisher)
    exact, blocks = fl.ExactBlock()(layer["0"]), fl.MiniBlock()(layer["0"])
    f, m = exact.to_dense(), fl.MiniBlock()(layer["0"]).to_dense()
    shift = damping * torch.eye(len(f), dtype=f.dtype)
    p, q = torch.linalg.inv(f + shift), torch.linalg.inv(m + shift)
    inverse, other = blocks.inverse(damping), exact.inverse(damping)
    w = torch.randn(4, 6, 21).double()
    torch.testing.assert_close(inverse @ w, (w.flatten(1) @ q).view_as(w))
    torch.testing.assert_close(inverse.diagonal().flatten(), q.diagonal())
    asked = {
        "trace": (inverse.trace(), q.trace()),
        "norm": (inverse.frobenius_norm(), q.norm()),
        "with F": (exact.inner(inverse), (f * q).sum()),
        "with P⁻¹": (other.inner(inverse), (p * q).sum()),
        "P⁻¹ with the blocks": (other.inner(blocks), (p * m).sum()),
        "log det": (blocks.logdet(damping), torch.logdet(m + shift)),
    }
    for what, (found, expected) in asked.items():
        assert found == pytest.approx(float(expected), rel=1e-9), what
    assert "formed" not in vars(blocks)
    torch.testing.assert_close(inverse.to_dense(), q)


def test_divergences_of_mini_blocks_of_few_examples_form_no_block():
    model = nn.Linear(400, 30).double()
    data = torch.randn(12, 400).double(), None
    layer = fl.collect(model, data, fl.Categorical(), fl.MonteCarlo(1))["weight"]
    exact, blocks = fl.ExactBlock()(layer), fl.MiniBlock()(layer)
    assert fl.metrics.gaussian_kl(exact, blocks, 0.1) > 0
    assert fl.metrics.gaussian_kl(exact, blocks, 0.1, reverse=True) > 0
    assert fl.metrics.inverse_error(exact, blocks, 0.1) > 0
    assert not any("formed" in vars(one) for one in (exact, blocks))
