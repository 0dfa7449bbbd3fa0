"""Laws of the collected per-example gradients, and of the model they come from."""

import importlib
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fisherlab as fl
from tests import cases, oracles
from tests.oracles import (
    assert_close,
    brute_force_fisher,
    example_scores,
    second_moment_block,
)

COLLECT = importlib.import_module("fisherlab.statistics.collect")
LAYERS = pytest.mark.parametrize("layer", cases.LAYERS)
LIKELIHOODS = pytest.mark.parametrize("likelihood", cases.LIKELIHOODS)
SOME_LAYERS = pytest.mark.parametrize(
    "layer", ["linear", "conv strided padded", "tokens", "norm", "used twice"]
)
FISHERS = pytest.mark.parametrize("fisher", cases.FISHERS)


def block_of(stats):
    return fl.ExactBlock()(stats).to_dense()


def dense(model, data, likelihood, fisher=None, **options):
    found = fl.collect(model, data, likelihood, fisher, **options)
    return {name: block_of(layer) for name, layer in found.items()}


def assert_same(actual, expected, rtol=1e-12):
    assert list(actual) == list(expected)
    for name in expected:
        assert_close(actual[name], expected[name], rtol)


@LAYERS
@LIKELIHOODS
def test_the_exact_block_is_the_brute_force_fisher(layer, likelihood):
    case, chosen = cases.LAYERS[layer], cases.LIKELIHOODS[likelihood]
    stats = cases.statistics(layer, likelihood)
    expected = brute_force_fisher(case.make(), case.inputs(), chosen, stats.block)
    assert_close(block_of(stats), expected, 1e-12)
    assert stats.is_shared == case.shared


@LAYERS
@LIKELIHOODS
def test_example_gradients_are_the_gradients_of_each_loss(layer, likelihood):
    case, chosen = cases.LAYERS[layer], cases.LIKELIHOODS[likelihood]
    stats = cases.statistics(layer, likelihood, "empirical")
    model, x, y = cases.data(case, chosen)
    expected = example_scores(model, x, y, chosen, stats.block)
    assert_close(stats.example_gradients().flatten(2), expected[None], 1e-12)


@LIKELIHOODS
def test_example_gradients_are_vmap_of_grad(likelihood):
    chosen = cases.LIKELIHOODS[likelihood]
    model, x, y = cases.data(cases.LAYERS["conv strided padded"], chosen)
    held = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, one, label):
        output = torch.func.functional_call(model, parameters, (one[None],))
        return oracles.loss(chosen, output[0], label)

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(held, x, y)
    for stats in fl.collect(model, (x, y), chosen, fl.Empirical()).values():
        assert_close(stats.example_gradients()[0], stats.pack(grads), 1e-12)


def test_mean_gradient_is_the_gradient_of_the_mean_loss():
    likelihood = fl.Categorical()
    model, x, y = cases.data(cases.LAYERS["conv strided padded"], likelihood)
    F.cross_entropy(model(x), y).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    halves = [(x[:2], y[:2]), (x[2:], y[2:])]
    for name, found in fl.mean_gradient(model, halves, likelihood).items():
        assert_close(found.gradient, found.block.pack(grads), 1e-12)
        stats = fl.collect(model, (x, y), likelihood, fl.Empirical())[name]
        assert_close(found.gradient, stats.example_gradients()[0].mean(0), 1e-12)


def test_conv_inputs_are_the_unfolded_patches_with_ones():
    case = cases.LAYERS["conv strided padded"]
    stats = cases.statistics("conv strided padded")
    patches = F.unfold(case.inputs(), 2, padding=1, stride=(2, 3)).transpose(1, 2)
    ones = torch.ones(*patches.shape[:2], 1, dtype=patches.dtype)
    assert_close(stats.inputs, torch.cat([patches, ones], 2), 1e-15)


PADDINGS = ["zeros", "reflect", "replicate", "circular", "same", "same and even"]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("padding", PADDINGS)
def test_every_padding_of_a_convolution_is_seen(padding):
    options = {"padding": 1, "padding_mode": padding}
    if padding.startswith("same"):
        options = {"padding": "same"}
    conv = nn.Conv2d(1, 2, 2 if "even" in padding else 3, **options)
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(24, 2)).double()
    x, likelihood = cases.normal(2, 1, 3, 4), fl.Gaussian()
    stats = fl.collect(model, (x, None), likelihood, layers=["0"])["0"]
    expected = brute_force_fisher(model, x, likelihood, stats.block)
    assert_close(block_of(stats), expected, 1e-12)
    assert stats.is_shared  # else the probe has found the reading wrong


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_in_one_and_three_dimensions(dims):
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims](1, 2, 2, stride=2)
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)).double()
    x, likelihood = cases.normal(2, 1, *[4, 3, 2][:dims]), fl.Categorical()
    model(x)
    stats = fl.collect(model, (x, None), likelihood, layers=["0"])["0"]
    expected = brute_force_fisher(model, x, likelihood, stats.block)
    assert_close(block_of(stats), expected, 1e-12)
    assert stats.is_shared


def test_frozen_batch_norm_and_its_neighbours_are_exact():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2))
    model.double()[1].running_var.fill_(0.3)
    x, likelihood = cases.normal(4, 3), fl.Categorical()
    with fl.frozen(model):
        found = fl.collect(model, (x, None), likelihood)
        for stats in found.values():
            expected = brute_force_fisher(model, x, likelihood, stats.block)
            assert_close(block_of(stats), expected, 1e-12)
    assert all(module.training for module in model.modules())


def test_an_in_place_activation_changes_nothing():
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    inplace = nn.Sequential(plain[0], nn.ReLU(inplace=True), plain[2])
    data = (cases.normal(5, 3), None)
    expected = dense(plain, data, fl.Categorical())
    assert_same(dense(inplace, data, fl.Categorical()), expected)


@SOME_LAYERS
@FISHERS
@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_chunks_of_examples_equal_the_whole(layer, fisher, chunk_size):
    case, likelihood = cases.LAYERS[layer], cases.LIKELIHOODS["categorical"]
    model, x, y = cases.data(case, likelihood)
    options = {"layers": [case.block]}
    chosen = cases.FISHERS[fisher]
    expected = block_of(cases.statistics(layer, "categorical", fisher))
    found = dense(model, (x, y), likelihood, chosen, chunk_size=chunk_size, **options)
    assert_close(found[case.block], expected, 1e-12)
    halves = [(x[:2], y[:2]), [x[2:], y[2:]]]
    found = dense(model, halves, likelihood, chosen, **options)
    assert_close(found[case.block], expected, 1e-12)


@SOME_LAYERS
@FISHERS
def test_chunks_of_columns_equal_the_whole(layer, fisher, monkeypatch):
    monkeypatch.setattr(COLLECT, "COLUMN_BYTES", 1)  # one column at a time
    case, likelihood = cases.LAYERS[layer], cases.LIKELIHOODS["gaussian"]
    model, x, y = cases.data(case, likelihood)
    found = fl.collect(
        model, (x, y), likelihood, cases.FISHERS[fisher], layers=[case.block], chunk_size=2
    )[case.block]
    whole = cases.statistics(layer, "gaussian", fisher)
    assert_close(block_of(found), block_of(whole), 1e-12)
    assert (found.count, found.positions) == (whole.count, whole.positions)


@SOME_LAYERS
@FISHERS
def test_columns_one_by_one_are_those_of_the_whole(layer, fisher):
    case, likelihood = cases.LAYERS[layer], cases.LIKELIHOODS["gaussian"]
    model, x, y = cases.data(case, likelihood)
    arguments = model, (x, y), likelihood, cases.FISHERS[fisher]
    whole = cases.statistics(layer, "gaussian", fisher)
    found = list(COLLECT.stream(*arguments, layers=[case.block], by_column=True))
    pieces = [piece[case.block] for piece in found]
    together = 1 if case.shared else whole.samples.columns
    assert {piece.samples.columns for piece in pieces} == {together}
    assert [piece.count for piece in pieces] == [len(x)] + [0] * (len(pieces) - 1)
    blocks = [fl.ExactBlock()(replace(piece, count=len(x))).to_dense() for piece in pieces]
    assert_close(sum(blocks), block_of(whole), 1e-12)


class SumOfOutputs(nn.Module):
    def forward(self, x):
        return x.sum(-1, keepdim=True)


def test_gradients_that_repeat_one_number_are_held_as_numbers():
    model = nn.Sequential(nn.Linear(3, 4), SumOfOutputs()).double()
    data = (cases.normal(5, 3), None)
    (stats,) = fl.collect(model, data, fl.Gaussian()).values()
    assert stats.gradients.is_contiguous()
    assert_close(stats.gradients, torch.ones(1, 5, 1, 4, dtype=torch.float64), 0)


@FISHERS
def test_every_example_twice_changes_no_block(fisher):
    if fisher == "monte-carlo":
        pytest.skip("the copies draw labels of their own")
    likelihood = fl.Categorical()
    model, x, y = cases.data(cases.LAYERS["conv strided padded"], likelihood)
    chosen = cases.FISHERS[fisher]
    doubled = (torch.cat([x, x]), torch.cat([y, y]))
    expected = dense(model, (x, y), likelihood, chosen)
    assert_same(dense(model, doubled, likelihood, chosen), expected)


@pytest.mark.draws("the loader, a seed for its workers")
def test_sampled_labels_depend_on_the_index_of_the_example_alone():
    model, x, _ = cases.data(cases.LAYERS["linear"], fl.Categorical())
    fisher = fl.MonteCarlo(samples=3, seed=7)
    whole = fl.collect(model, (x, None), fl.Categorical(), fisher)["0"]
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x)).long()), batch_size=2)
    batched = fl.collect(model, loader, fl.Categorical(), fisher)["0"]
    assert_close(batched.gradients, whole.gradients, 1e-12)
    other = fl.collect(model, (x, None), fl.Categorical(), fisher.at(step=1))["0"]
    assert not torch.allclose(other.gradients, whole.gradients)


@LIKELIHOODS
@pytest.mark.parametrize("samples", [1, 4])
def test_monte_carlo_has_the_exact_fisher_as_its_mean(likelihood, samples):
    chosen = cases.LIKELIHOODS[likelihood]
    model, x, y = cases.data(cases.LAYERS["last"], chosen, 2)
    repeats = 4000 // samples
    many = x.repeat(repeats, 1), None
    sampled = dense(model, many, chosen, fl.MonteCarlo(samples, seed=1), layers=["2"])
    exact = dense(model, (x, y), chosen, layers=["2"])
    error = (sampled["2"] - exact["2"]).norm() / exact["2"].norm()
    assert float(error) < 0.06  # 8000 draws: about 0.02


def test_many_equal_draws_weigh_as_much_as_one():
    model, x, _ = cases.data(cases.LAYERS["last"], fl.Categorical())
    with torch.no_grad():
        model[2].bias[0] = 15.0  # the model is certain: every draw gives class 0
    one = dense(model, (x, None), fl.Categorical(), fl.MonteCarlo(1))
    many = dense(model, (x, None), fl.Categorical(), fl.MonteCarlo(9))
    assert_same(many, one)


def test_pairs_tuples_and_dicts_are_the_same_data():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(2, 3), nn.Linear(3, 3)

        def forward(self, a, b):
            return self.right(torch.tanh(self.left(a))) * b.sum(1, keepdim=True)

    model = Named().double()
    a, b = cases.normal(4, 2), cases.normal(4, 2, seed=1)
    y = torch.tensor([0, 1, 2, 0])
    expected = dense(model, ((a, b), y), fl.Categorical())
    assert_same(dense(model, ({"b": b, "a": a}, y), fl.Categorical()), expected)
    assert_same(dense(model, [[[a, b], y]], fl.Categorical()), expected)
    loader = DataLoader(TensorDataset(a, b, y), batch_size=3)
    lists = [((a, b), y) for a, b, y in loader]
    assert_same(dense(model, lists, fl.Categorical()), expected)
    column = [{"a": a[:3], "b": b[:3]}, {"a": a[3:], "b": b[3:]}]
    assert_same(dense(model, [(x, None) for x in column], fl.Categorical()), expected)


def test_without_labels_exact_and_sampled_blocks_are_the_same():
    model, x, y = cases.data(cases.LAYERS["linear"], fl.Categorical())
    for fisher in (fl.Exact(), fl.MonteCarlo(2)):
        expected = dense(model, (x, y), fl.Categorical(), fisher)
        assert_same(dense(model, (x, None), fl.Categorical(), fisher), expected)


def test_uneven_lengths_are_padded_with_zero_gradients():
    model = cases.LAYERS["tokens"].make()
    short, long = cases.normal(2, 1, 3), cases.normal(1, 2, 3, seed=1)
    likelihood = fl.Categorical()
    found = fl.collect(model, [(short, None), (long, None)], likelihood)
    for name, stats in found.items():
        parts = [
            2 * brute_force_fisher(model, short, likelihood, stats.block),
            1 * brute_force_fisher(model, long, likelihood, stats.block),
        ]
        assert_close(block_of(stats), sum(parts) / 3, 1e-12)
        assert (stats.count, stats.positions) == (3, 2 * 1 + 1 * 2), name


@FISHERS
def test_ignored_positions_drop_out_but_their_example_counts(fisher):
    model, x, y = cases.data(cases.LAYERS["tokens"], fl.Categorical())
    chosen = cases.FISHERS[fisher]
    masked = y.clone()
    masked[0], masked[1, 1] = -100, -100
    found = dense(model, (x, masked), fl.Categorical(), chosen)
    kept = fl.collect(model, (x, y), fl.Categorical(), chosen)
    for name, stats in kept.items():
        v = stats.gradients.clone()
        assert v.shape[2] == 2  # two positions, each with columns of its own
        v[:, masked == -100] = 0
        d = torch.einsum("vnto,nti->vnoi", v, stats.inputs)
        assert_close(found[name], second_moment_block(d, 5), 1e-12)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_missing_labels_drop_their_output(likelihood):
    chosen = cases.LIKELIHOODS[likelihood]
    model, x, y = cases.data(cases.LAYERS["last"], chosen)
    masked = y.clone()
    masked[:, 2] = float("nan")
    fewer = nn.Sequential(*model[:2], nn.Linear(2, 2).double())
    with torch.no_grad():
        fewer[2].weight.copy_(model[2].weight[:2])
        fewer[2].bias.copy_(model[2].bias[:2])
    for fisher in cases.FISHERS.values():
        if isinstance(fisher, fl.MonteCarlo):
            continue  # two outputs take other random numbers than three
        found = dense(model, (x, masked), chosen, fisher, layers=["0"])
        expected = dense(fewer, (x, y[:, :2]), chosen, fisher, layers=["0"])
        assert_same(found, expected)


def test_one_example_has_a_block():
    model = nn.Linear(2, 1).double()
    one = dense(model, (cases.normal(1, 2), None), fl.Gaussian())["weight"]
    a = torch.cat([cases.normal(1, 2)[0], torch.ones(1)])
    assert_close(one, torch.outer(a, a), 1e-14)


def test_pack_and_unpack_are_inverse_and_put_the_bias_last():
    for layer, case in cases.LAYERS.items():
        stats = cases.statistics(layer)
        tensors = {
            name: p.detach()
            for name, p in case.make().named_parameters()
            if name in stats.block.parameters
        }
        w = stats.pack(tensors)
        assert w.shape == stats.weight_shape
        again = stats.unpack(torch.stack([w, w]))
        assert all(torch.equal(again[name][1], tensors[name]) for name in tensors)
        if stats.block.bias:
            assert torch.equal(w[:, -1], tensors[stats.block.bias].flatten())


def test_the_blocks_partition_the_trainable_parameters():
    for case in cases.LAYERS.values():
        model = case.make()
        named = [n for b in fl.blocks(model).values() for n in b.parameters]
        assert sorted(named) == sorted(dict(model.named_parameters()))
    model[0].weight.requires_grad_(False)
    assert "0" not in fl.blocks(model)


def test_values_show_themselves_in_one_line_and_escaped():
    stats = fl.collect(nn.Linear(2, 2), (torch.ones(3, 2), None), fl.Gaussian())
    for value in (stats, stats["weight"]):
        assert "\n" not in repr(value)
        assert "Exact()" in repr(value)
        assert re.search(r"Exact\(\)", value._repr_html_())
    with pytest.raises(KeyError, match="weight"):
        stats["absent"]


def test_progress_counts_every_example():
    seen = []
    x = cases.normal(5, 4)
    fl.collect(
        cases.LAYERS["linear"].make(),
        [(x, None), (x[:2], None)],
        fl.Categorical(),
        chunk_size=2,
        progress=seen.append,
    )
    assert seen == [2, 2, 1, 2]


@pytest.mark.parametrize("layer", [nn.Linear(4, 3, bias=False), nn.Embedding(3, 4)])
def test_a_loader_may_fill_its_buffer_again(layer):
    whole = cases.normal(9, 4) if isinstance(layer, nn.Linear) else torch.arange(9) % 3
    model, buffer = layer.double(), whole[:3].clone()

    def batches():
        for k in range(3):
            buffer.copy_(whole[3 * k : 3 * k + 3])
            yield buffer, None

    (found,) = fl.collect(model, batches(), fl.Gaussian()).values()
    (expected,) = fl.collect(model, (whole, None), fl.Gaussian()).values()
    buffer.zero_()
    assert_close(block_of(found), block_of(expected), 1e-12)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.LayerNorm(3)])
def test_a_chunk_is_never_larger_than_asked_for(layer, size):
    seen = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer.double()

        def forward(self, x):
            seen.append(len(x))
            return self.layer(x)

    data = (cases.normal(7, 3), None)
    fl.collect(Counting(), data, fl.Gaussian(), chunk_size=size)
    assert max(seen) <= max(size, 2)  # two examples are tried first
    with pytest.raises(ValueError, match="chunk_size=0: a positive number"):
        fl.collect(Counting(), data, fl.Gaussian(), chunk_size=0)


def test_a_bias_of_another_length_is_a_block_of_its_own():
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(3, 4))
    model.bias = nn.Parameter(torch.ones(4))
    assert list(fl.blocks(model)) == ["weight", "bias"]
