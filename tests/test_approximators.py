"""Laws of approximations: definitions, optimality, order, and what leaves them alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.approximators import Streaming, by_name
from fisherlab.approximators.mini_block import partition
from fisherlab.statistics.network import Chunks
from tests import cases, oracles
from tests.cases import METHODS, normal
from tests.oracles import assert_close

NAMES = pytest.mark.parametrize("name", METHODS)
LAYERS = pytest.mark.parametrize("layer", cases.SHARED)
FEW = ["linear", "conv strided padded", "used twice", "norm", "one output"]
SOME_LAYERS = pytest.mark.parametrize("which", FEW)
FISHERS = pytest.mark.parametrize("fisher", cases.FISHERS)
GRADIENT_FREE = {"foof"}
DEGREES = {"muon": 1}  # of the gradients; all others are squares


def layer(name, kind="exact"):
    return cases.statistics(name, "categorical", kind)


def exact(stats):
    return oracles.second_moment_block(stats.example_gradients(), stats.count)


def error(stats, method):
    block = exact(stats)
    return float((block - method(stats).to_dense()).norm() / block.norm())


def part(stats, examples, columns=slice(None), counted=True):
    """Cut a run of examples, and columns of it, out of statistics."""
    cut = {}
    if stats.matrices is not None:
        cut["matrices"] = stats.matrices[columns, examples]
        n, t = cut["matrices"].shape[1], 1
    else:
        cut["inputs"] = stats.inputs[examples]
        cut["gradients"] = stats.gradients[columns, examples]
        n, t = cut["inputs"].shape[:2]
    return replace(stats, count=n * counted, positions=n * t * counted, **cut)


def doubled(stats):
    held = {
        name: torch.cat([value, value], axis)
        for name, axis in (("inputs", 0), ("gradients", 1), ("matrices", 1))
        if (value := getattr(stats, name)) is not None
    }
    return replace(stats, count=2 * stats.count, positions=2 * stats.positions, **held)


def passes(method, groups):
    """Feed groups of pieces to separate states, merge them, go on until it is done."""
    states = [None] * len(groups)
    while True:
        for k, pieces in enumerate(groups):
            for piece in pieces:
                states[k] = method.accumulate(states[k], piece)
        merged = states[0]
        for state in states[1:]:
            merged = method.merge(merged, state)
        following = method.next_pass(merged)
        if following is None:
            return method.finish(merged)
        states = [following] * len(groups)


def assert_same(actual, expected, rtol=1e-8):
    assert_close(actual.to_dense(), expected.to_dense(), rtol)


def works_on(method, stats):
    try:
        method(stats)
    except fl.NeedsSharedForm:
        return False
    return True


# --- every approximator ---


@NAMES
@SOME_LAYERS
def test_pieces_of_examples_and_columns_add_up_to_the_whole(name, which):
    method, stats = METHODS[name], layer(which)
    if not works_on(method, stats) or not isinstance(method, Streaming):
        pytest.skip("needs the shared form, or does not stream")
    first = [
        part(stats, slice(0, 2), slice(0, 1)),
        part(stats, slice(0, 2), slice(1, None), counted=False),
    ]
    groups = [first, [part(stats, slice(2, 3))], [part(stats, slice(3, None))]]
    found = passes(method, groups)
    assert_same(found, method(stats))
    assert found.provenance.examples == stats.count


@NAMES
@SOME_LAYERS
def test_every_example_twice_changes_nothing(name, which):
    method, stats = METHODS[name], layer(which)
    if not works_on(method, stats):
        pytest.skip("needs the shared form")
    assert_same(method(doubled(stats)), method(stats))


@NAMES
def test_the_order_of_the_examples_changes_nothing(name):
    method, stats = METHODS[name], layer("conv strided padded")
    turned = replace(stats, inputs=stats.inputs.flip(0), gradients=stats.gradients.flip(1))
    assert_same(method(turned), method(stats))


@NAMES
def test_every_gradient_doubled_makes_four_of_it(name):
    if name in GRADIENT_FREE:
        pytest.skip("holds the inputs alone")
    method, stats = METHODS[name], layer("conv strided padded")
    larger = replace(stats, gradients=2 * stats.gradients)
    factor = 2 ** DEGREES.get(name, 2)
    assert_close(method(larger).to_dense(), factor * method(stats).to_dense(), 1e-8)


@FISHERS
@pytest.mark.parametrize("which", ["linear", "conv strided padded", "tokens"])
def test_approximate_equals_collect_and_call(fisher, which, monkeypatch):
    chosen = {n: m for n, m in METHODS.items() if isinstance(m, Streaming)}
    model, x, y = cases.data(cases.LAYERS[which], fl.Categorical())
    kind = cases.FISHERS[fisher]
    halves = [(x[:2], y[:2]), (x[2:], y[2:])]
    found = fl.approximate(
        model, halves, fl.Categorical(), chosen, kind, layers=["0"], chunk_size=2
    )
    stats = fl.collect(model, (x, y), fl.Categorical(), kind, layers=["0"])["0"]
    assert list(found) == list(chosen)
    for name, method in chosen.items():
        assert_same(found[name]["0"], method(stats))


@NAMES
def test_a_zero_block_gives_the_zero_operator(name):
    if name in GRADIENT_FREE:
        pytest.skip("holds the inputs alone")
    for samples in (cases.outer(2, 4, 3, 2), cases.shared(2, 4, 2, 3, 2)):
        held = replace(samples, gradients=0 * samples.gradients)
        found = METHODS[name](cases.layer_statistics(held))
        assert_close(found.to_dense(), torch.zeros(6, 6))
        assert_close(found.solve(normal(3, 2), 0.5), 2 * normal(3, 2), 1e-9)


@NAMES
def test_single_precision_gives_the_same_to_its_accuracy(name):
    stats = layer("conv strided padded")
    if name == "lanczos-paper":
        pytest.skip("its second pair is not the one it is named for")
    found = METHODS[name](stats.to(torch.float32))
    assert found.dtype == torch.float32
    assert_close(found.to_dense(), METHODS[name](stats).to_dense(), 2e-4)


@NAMES
def test_a_warm_start_changes_nothing(name):
    stats = layer("conv strided padded")
    cold = METHODS[name](stats)
    assert_same(METHODS[name](stats, previous=cold), cold)


@NAMES
@SOME_LAYERS
def test_every_operator_is_symmetric(name, which):
    method, stats = METHODS[name], layer(which)
    if not works_on(method, stats):
        pytest.skip("needs the shared form")
    dense = method(stats).to_dense()
    assert_close(dense, dense.T, 1e-9, atol=1e-15)


@NAMES
def test_values_are_equal_and_shown_as_they_are_written(name):
    method = METHODS[name]
    assert method == replace(method)
    assert eval(repr(method), vars(fl.approximators)) == method
    assert hash(method) == hash(replace(method))


def test_names_are_looked_up_and_unknown_ones_listed():
    assert by_name(None) == fl.approximators()
    assert list(by_name(["kpsvd", "exact"])) == ["kpsvd", "exact"]
    assert by_name("kfac") == by_name(["kfac"])
    mine = {"mine": fl.KPSVD(rank=5)}
    assert by_name(mine) == mine
    with pytest.raises(ValueError, match=r"'nothing'.*kfac.*diagonal"):
        by_name(["kfac", "nothing"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: fl.KPSVD(rank=0),
        lambda: fl.Deflation(rank=-1),
        lambda: fl.KFACCorrected(rank=0),
    ],
)
def test_parameters_that_mean_nothing_are_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()


# --- exact, diagonal, mini-blocks ---


@LAYERS
@FISHERS
def test_the_exact_block_and_its_diagonal(layer, fisher):
    stats = cases.statistics(layer, "categorical", fisher)
    block = exact(stats)
    for form in ("auto", "dense", "gram"):
        found = fl.ExactBlock(form)(stats)
        assert_close(found.to_dense(), block, 1e-12)
        assert_close(found.frobenius_norm(), block.norm(), 1e-12)
    found = METHODS["diagonal"](stats).to_dense()
    assert_close(found, torch.diag(block.diagonal()), 1e-12)


def mini_block_groups(name):
    """Spell the paper's mini-blocks out for the layers of the cases."""
    o, i = layer(name).weight_shape
    if name == "norm":
        return [[k] for k in range(o * i)]
    if not name.startswith("conv"):
        return [[r * i + c for c in range(i)] for r in range(o)]
    kernels = [range(start, start + 4) for start in (0, 4)]  # two channels of 2 × 2
    groups = [[r * i + c for c in kernel] for r in range(o) for kernel in kernels]
    bias = [] if "without bias" in name else [[r * i + 8] for r in range(o)]
    return groups + bias


@pytest.mark.parametrize("name", cases.LAYERS)
@FISHERS
def test_mini_blocks_are_those_of_the_exact_block(name, fisher):
    stats = layer(name, fisher)
    block, found = exact(stats), fl.MiniBlock()(stats)
    expected = oracles.mini_blocks(block, mini_block_groups(name))
    assert_close(found.to_dense(), expected, 1e-12)
    assert_close(found.frobenius_norm(), expected.norm(), 1e-12)
    square = float(block.norm() ** 2 - expected.norm() ** 2)
    left = float((block - found.to_dense()).norm() ** 2)
    assert_close(left, square, 0, 1e-12 * float(block.norm() ** 2))


def test_another_partition_is_taken_and_one_of_another_shape_refused():
    stats = layer("linear")
    whole = fl.Partition((3, 5), (torch.arange(15)[None],))
    assert_close(fl.MiniBlock(partition=whole)(stats).to_dense(), exact(stats), 1e-12)
    with pytest.raises(ValueError, match=r"\(2, 2\).*'0'.*\(3, 5\)"):
        fl.MiniBlock(partition=fl.Partition.by_row((2, 2)))(stats)


def test_partitions_follow_the_stored_shape_of_the_weight():
    model = nn.ModuleDict(
        {"conv": nn.Conv1d(2, 3, 4), "norm": nn.LayerNorm((2, 2)), "map": nn.Linear(3, 2)}
    )
    shapes = {
        name: [tuple(g.shape) for g in partition(block).groups]
        for name, block in fl.blocks(model).items()
    }
    assert shapes == {
        "conv": [(6, 4), (3, 1)],
        "norm": [(4, 1), (4, 1)],
        "map": [(2, 4)],
    }


# --- one Kronecker product ---


@LAYERS
@FISHERS
def test_kfac_is_its_definition_by_loops(layer, fisher):
    stats = cases.statistics(layer, "categorical", fisher)
    rows, cols = oracles.kfac(stats.inputs, stats.gradients, stats.count, stats.positions)
    ((g, a),) = fl.KFAC()(stats).terms
    assert_close(g, rows, 1e-12)
    assert_close(a, cols, 1e-12)
    assert stats.positions == stats.count * stats.inputs.shape[1]


@LAYERS
def test_kfac_reduce_sums_inputs_and_averages_gradients(layer):
    stats = cases.statistics(layer)
    a, g = stats.inputs.sum(1), stats.gradients.mean(2)
    ((rows, cols),) = fl.KFAC(sharing="reduce")(stats).terms
    assert_close(rows, torch.einsum("vna,vnb->ab", g, g) / stats.count, 1e-12)
    assert_close(cols, torch.einsum("ni,nj->ij", a, a) / stats.count, 1e-12)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "tkfac", "kpsvd", "kfac-corrected"])
@FISHERS
def test_one_product_is_exact_for_one_datum(name, fisher):
    model, x, y = cases.data(cases.LAYERS["linear"], fl.Categorical(), 1)
    kind = cases.FISHERS[fisher]
    for pair in ((x, y), (x.repeat(3, 1), y.repeat(3))):
        if isinstance(kind, fl.MonteCarlo) and len(pair[0]) > 1:
            continue  # the copies draw labels of their own
        stats = fl.collect(model, pair, fl.Categorical(), kind, layers=["0"])["0"]
        assert error(stats, METHODS[name]) < 1e-10


@pytest.mark.parametrize("name", ["kfac", "ekfac", "tkfac", "kpsvd"])
@pytest.mark.parametrize("block", ["0", "1", "2"])
def test_one_product_is_exact_for_deep_linear_gaussian_networks(name, block):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)).double()
    likelihood = fl.Gaussian(variance=0.3)
    flat = fl.collect(model, (normal(6, 4), None), likelihood)[block]
    assert error(flat, METHODS[name]) < 1e-10
    tokens = fl.collect(model, (normal(6, 5, 4), None), likelihood)[block]
    assert tokens.inputs.shape[1] == 5
    if name != "ekfac":
        assert error(tokens, METHODS[name]) < 1e-10


def test_kfac_reduce_is_exact_where_positions_are_averaged():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.second(self.first(x).mean(1))

    model = Pooled().double()
    stats = fl.collect(model, (normal(6, 5, 4), None), fl.Gaussian())["first"]
    assert error(stats, fl.KFAC(sharing="reduce")) < 1e-12
    assert error(stats, fl.KFAC()) > 1e-2


@LAYERS
@FISHERS
def test_ekfac_is_the_best_diagonal_of_its_basis(layer, fisher):
    stats = cases.statistics(layer, "categorical", fisher)
    block, found = exact(stats), fl.EKFAC()(stats)
    basis = torch.from_numpy(np.kron(found.row_basis.numpy(), found.column_basis.numpy()))
    assert_close(found.entries.flatten(), (basis.T @ block @ basis).diagonal(), 1e-10)
    left = float((block - found.to_dense()).norm() ** 2)
    square = float(block.norm() ** 2 - found.entries.norm() ** 2)
    assert_close(left, square, 0, 1e-12 * float(block.norm() ** 2))
    assert_close(found.trace(), block.trace(), 1e-12)


@LAYERS
@FISHERS
def test_tkfac_keeps_the_partial_traces(layer, fisher):
    stats = cases.statistics(layer, "categorical", fisher)
    o, i = stats.weight_shape
    folded = exact(stats).view(o, i, o, i)
    found = fl.TKFAC()(stats).to_dense().view(o, i, o, i)
    rows, cols = torch.einsum("aibi->ab", folded), torch.einsum("aiaj->ij", folded)
    assert_close(torch.einsum("aibi->ab", found), rows, 1e-12)
    assert_close(torch.einsum("aiaj->ij", found), cols, 1e-12)
    z = torch.from_numpy(oracles.rearranged(exact(stats), (o, i)))
    half = z @ torch.eye(i, dtype=z.dtype).flatten()  # half a power step from I
    assert_close(half.view(o, o), rows, 1e-12)


ORDER = (  # the first never has the larger error
    ("kpsvd", "kfac"),
    ("kpsvd", "kfac-reduce"),
    ("kpsvd", "tkfac"),
    ("kpsvd-2", "kpsvd"),
    ("kpsvd-3", "kpsvd-2"),
    ("kpsvd-4", "kpsvd-3"),
    ("kpsvd-2", "kfac-corrected"),
    ("kpsvd-2", "lanczos-paper"),
    ("kfac-corrected", "kfac"),
    ("ekfac", "kfac"),
    ("mini-block", "diagonal"),
    ("exact", "kpsvd-4"),
)


@LAYERS
@FISHERS
def test_errors_are_in_the_order_of_what_is_minimised(layer, fisher):
    stats = cases.statistics(layer, "categorical", fisher)
    names = {name for pair in ORDER for name in pair} | {"lanczos-2"}
    e = {name: error(stats, METHODS[name]) for name in names}
    slack = 1e-9
    for better, worse in ORDER:
        assert e[better] <= e[worse] + slack, (better, worse, e[better], e[worse])
    assert_close(e["lanczos-2"], e["kpsvd-2"], 0, 1e-8)
    assert e["exact"] < 1e-12
    assert e["diagonal"] < 1 + slack


# --- layers without inputs and output gradients ---


@pytest.mark.parametrize("name", ["kfac", "kfac-reduce", "ekfac", "kfac-corrected"])
def test_methods_that_need_the_shared_form_say_so(name):
    with pytest.raises(fl.NeedsSharedForm, match=r"'1'.*ExactBlock") as info:
        METHODS[name](layer("norm"))
    assert info.value.layer == "1"


def test_chunks_of_columns_that_are_held_are_not_copied():
    stats = layer("tokens")
    held, pieces = Chunks(), []
    for k in range(stats.gradients.shape[0]):
        pieces.append(part(stats, slice(None), slice(k, k + 1), counted=k == 0))
        held = held.add(pieces[-1])
    assert all(a is b for a, b in zip(held.pieces, pieces, strict=True))
    assert held.nbytes == stats.inputs.nbytes + stats.gradients.nbytes
    assert_close(held.joined().gradients, stats.gradients, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_do_not_stop_growing(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1000)).to(dtype)
    x = torch.randn(200, 4).to(dtype)
    arguments = (x, None), fl.Gaussian(), ["kfac"]
    found = fl.approximate(model, *arguments, layers=["0"])["kfac"]["0"].to_dense()
    exact = fl.approximate(model.double(), *arguments, layers=["0"])["kfac"]["0"].to_dense()
    assert float((found.double() - exact).norm() / exact.norm()) < 2e-2
