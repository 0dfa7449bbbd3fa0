"""Every parameter of a real network: each block equals the Fisher from its definition."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.statistics import taps
from fisherlab.statistics.batches import Batch
from fisherlab.statistics.model_view import view
from fisherlab.statistics.probe import probe
from fisherlab.statistics.recorder import forward
from tests.brute_force import full_fisher, spans
from tests.model_zoo import (
    MODULES,
    NETWORKS,
    Case,
    randomised,
    rows,
    tokens,
)
from tests.zoo_modules import (
    GPT,
    Coupled,
    FastPathWitness,
    HiddenScale,
    HiddenUse,
    LanguageModel,
    Narrowed,
    Noisy,
    Offloaded,
    Recomputed,
    UntilSettled,
    ViT,
)

CASES = NETWORKS | MODULES
ATTENTION = ("in_proj_weight", "out_proj")
GPT_LAYERS = ("attention.qkv", "attention.proj", "mlp.0", "mlp.2")


@cache
def truth(name: str) -> tuple[Case, Tensor]:
    case = CASES[name]()
    return case, full_fisher(case, fl.blocks(case.model))


@cache
def collected(name: str) -> Any:
    case = truth(name)[0]
    return fl.collect(case.model, (case.x, case.y), case.likelihood)


@pytest.mark.parametrize("name", CASES)
def test_every_block_is_the_brute_force_fisher(name: str) -> None:
    case, full = truth(name)
    stats = collected(name)
    at = spans(stats_blocks(stats), case.model)
    for block, layer in stats.items():
        dense = fl.ExactBlock()(layer).to_dense()
        expected = full[at[block], at[block]]
        error = (dense - expected).abs().max() / full.abs().max()
        assert error < 1e-10, (block, float(error))


@pytest.mark.parametrize("name", CASES)
def test_blocks_partition_the_trainable_parameters(name: str) -> None:
    case, full = truth(name)
    stats = collected(name)
    named = {n: p for n, p in case.model.named_parameters() if p.requires_grad}
    parameters = [p for layer in stats.values() for p in layer.block.parameters]
    assert sorted(parameters) == sorted(named)
    traces = sum(fl.ExactBlock()(layer).trace() for layer in stats.values())
    assert traces == pytest.approx(float(full.trace()), rel=1e-12)
    for layer in stats.values():
        tensors = {p: named[p].detach() for p in layer.block.parameters}
        w = layer.pack(tensors)
        assert tuple(w.shape) == layer.weight_shape
        back = layer.unpack(torch.stack([w, 2 * w]))
        for p, tensor in tensors.items():
            torch.testing.assert_close(back[p], torch.stack([tensor, 2 * tensor]))


@pytest.mark.parametrize("name", CASES)
def test_model_and_data_are_left_as_found(name: str) -> None:
    case = CASES[name]()
    before = {n: t.clone() for n, t in case.model.state_dict().items()}
    plain = [attributes(m) for m in case.model.modules()]
    first = case.x if isinstance(case.x, Tensor) else None
    kept = None if first is None else first.clone()
    fl.collect(case.model, (case.x, case.y), case.likelihood)
    for n, t in case.model.state_dict().items():
        assert torch.equal(t, before[n])
    assert plain == [attributes(m) for m in case.model.modules()]
    assert all(p.grad is None for p in case.model.parameters())
    assert not any(m._forward_hooks for m in case.model.modules())
    if first is not None and kept is not None:
        assert torch.equal(first, kept)


@pytest.mark.parametrize("name", ["vit", "gpt", "lstm", "functional"])
@pytest.mark.parametrize("fisher", [fl.MonteCarlo(2, seed=1), fl.Empirical()])
def test_chunks_of_examples_change_nothing(name: str, fisher: Any) -> None:
    case = CASES[name]()
    y = case.y
    if y is None:
        y = torch.zeros(len(case.x), dtype=torch.long)
        if isinstance(case.likelihood, fl.Gaussian):
            y = torch.zeros_like(case.model(case.x).detach())
    whole = fl.collect(case.model, (case.x, y), case.likelihood, fisher)
    parts = fl.collect(case.model, (case.x, y), case.likelihood, fisher, chunk_size=2)
    for block in whole:
        a, b = (fl.ExactBlock()(s[block]).to_dense() for s in (whole, parts))
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("likelihood", [fl.Bernoulli(), fl.Gaussian(2.0)])
def test_sequence_outputs_of_the_other_likelihoods(likelihood: Any) -> None:
    case = replace(NETWORKS["lstm"](), y=None, likelihood=likelihood)
    blocks = fl.blocks(case.model)
    full, at = full_fisher(case, blocks), spans(blocks, case.model)
    stats = fl.collect(case.model, (case.x, None), likelihood)
    for name, layer in stats.items():
        dense = fl.ExactBlock()(layer).to_dense()
        torch.testing.assert_close(dense, full[at[name], at[name]], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("mlp", {"0", "2", "4"}),
        ("lenet", {"0", "3", "7", "9"}),
        ("twice", {"first", "last"}),
        ("keyword", {"fc"}),
        ("folded", {"fc", "head"}),
        ("time-first", {"fc", "head"}),
        ("functional", {"fc"}),
        ("hidden", {"fc", "head"}),
        ("gpt", {"token"} | {f"blocks.{k}.{n}" for k in (0, 1) for n in GPT_LAYERS}),
        ("encoder", {f"self_attn.{n}" for n in ATTENTION} | {"linear1", "linear2"}),
        ("attention", {f"attention.{n}" for n in ATTENTION} | {"head"}),
        ("attention-time-first", {f"attention.{n}" for n in ATTENTION} | {"head"}),
        (
            "attention-bias-kv",
            {f"attention.{n}_proj_weight" for n in "qkv"}
            | {"attention.in_proj_bias", "attention.out_proj", "head"},
        ),
        ("transposed-1d", {"0", "0.bias"}),
        ("transposed-2d", {"0", "0.bias"}),
        ("weight-norm", {"0.bias", "2"}),
        ("weight-norm-new", {"0.bias", "2"}),
        ("overwritten-input", {"1"}),
        (
            "resnet",
            {"conv1", "layer1.conv1", "layer1.conv2", "layer2.conv1"}
            | {"layer2.conv2", "layer2.downsample.0", "fc"},
        ),
        ("recomputed", {"first", "head"}),
        ("bag", {"0", "2"}),
        ("checkpoint", {"first", "second", "head"}),
        ("checkpoint-reentrant", {"first", "second", "head"}),
    ],
)
def test_form_of_the_statistics(name: str, shared: set[str]) -> None:
    assert {n for n, s in collected(name).items() if s.is_shared} == shared


def test_batched_pullback_equals_the_loop() -> None:
    case = NETWORKS["lenet"]()
    seen = view(case.model, None)
    batch = Batch(case.x, None)
    found = probe(seen, fl.blocks(case.model), batch)
    done = forward(seen, fl.blocks(case.model), batch)
    columns = rows(5, *done.output.shape)
    one = taps.pull([done], found.tapped, columns, 1)
    many = taps.pull([done], found.tapped, columns, 3)
    for name in one:
        torch.testing.assert_close(one[name], many[name], rtol=1e-12, atol=1e-14)
    assert one.keys() == {"0", "3", "7", "9"}


@pytest.mark.parametrize("make", [GPT, ViT, LanguageModel, HiddenUse])
def test_another_precision_goes_through_a_copy(make: Any) -> None:
    model = randomised(make()).float()
    inputs = {GPT: tokens(3, 4, 6), LanguageModel: tokens(3, 4, 5), HiddenUse: rows(3, 3)}
    x = inputs.get(make, torch.rand(3, 1, 4, 4))
    double = fl.collect(model, (x, None), fl.Gaussian(), dtype=torch.float64)
    exact = fl.collect(model.double(), (x, None), fl.Gaussian(), dtype=torch.float64)
    for name in exact:
        a, b = (fl.ExactBlock()(s[name]).to_dense() for s in (double, exact))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks_are_batched(kind: Any, dtype: torch.dtype) -> None:
    model = randomised(LanguageModel(False, kind)).to(dtype)
    batch = Batch(tokens(3, 4, 5), None)
    assert probe(view(model, None), fl.blocks(model), batch).unfollowed == ""


def test_the_fused_encoder_layer_is_out_of_the_way_and_comes_back() -> None:
    model = FastPathWitness()
    assert torch.backends.mha.get_fastpath_enabled()
    fl.collect(model, (torch.ones(3, 3), None), fl.Gaussian())
    assert model.seen == {False}
    assert torch.backends.mha.get_fastpath_enabled()


def test_prelu_is_batched_in_one_level() -> None:
    """Two levels of vmap give it a wrong gradient; a probe need not meet a kink."""
    case = MODULES["prelu"]()
    batch = Batch(case.x, None)
    assert probe(view(case.model, None), fl.blocks(case.model), batch).unfollowed == ""


def test_old_weight_norm_is_seen_in_another_precision() -> None:
    case = MODULES["weight-norm"]()
    single = fl.collect(case.model, (case.x, None), fl.Gaussian(), dtype=torch.float32)
    double = fl.collect(case.model, (case.x, None), fl.Gaussian())
    for name in double:
        a, b = (fl.ExactBlock()(s[name]).trace() for s in (single, double))
        assert a == pytest.approx(b, rel=1e-5)


def test_reasons_of_the_loop() -> None:
    for model, reason in [
        (HiddenScale(), "other gradients than autograd"),
        (Offloaded(), "saved tensor hooks"),
        (Recomputed(), "setup_context"),
    ]:
        batch = Batch(rows(3, 3), None)
        found = probe(view(randomised(model), None), fl.blocks(model), batch)
        assert reason in found.unfollowed


@pytest.mark.parametrize(
    "model",
    [
        Coupled(),
        Noisy(1.0),
        UntilSettled(),
        nn.Sequential(nn.TransformerEncoderLayer(4, 2, 3), nn.Linear(4, 2)),
    ],
)
def test_dependent_examples_are_refused(model: nn.Module) -> None:
    width = 4 if isinstance(model, nn.Sequential) else 3
    x = rows(5, 2, width) if width == 4 else rows(5, width)
    x[0] *= 0.1  # settles sooner than the others
    with pytest.raises(fl.UnsupportedModelError, match="beside it"):
        fl.collect(randomised(model), (x, None), fl.Gaussian())


class ButFirst(nn.Module):
    """Examples that depend on others, but for the first ones."""

    def __init__(self, couple: Any) -> None:
        super().__init__()
        self.fc, self.couple = nn.Linear(3, 2), couple

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.couple(x))


@pytest.mark.parametrize(
    "couple",
    [
        lambda x: x.cumsum(0),
        lambda x: torch.cat([x[:1], x[1:] - x[1:].mean(0)]),
        lambda x: torch.cat([x[:2], x[2:].flip(0)]),
        lambda x: torch.cat([x[:1], x[1:] + x[:-1]]),
    ],
)
def test_examples_that_leave_the_first_as_it_is_are_refused(couple: Any) -> None:
    model = randomised(ButFirst(couple))
    with pytest.raises(fl.UnsupportedModelError, match="beside it"):
        fl.collect(model, (rows(5, 3), None), fl.Gaussian())


def test_the_last_example_costs_one_forward_pass_of_the_first_run() -> None:
    seen: list[int] = []
    model = randomised(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    probes: dict[Any, Any] = {}
    for _ in range(2):
        fl.collect(model, (rows(6, 3), None), fl.Gaussian(), chunk_size=2, probes=probes)
    assert seen == [2, 2, 1, 2, *[2, 1, 2, 2], *[2, 2, 2]]


def test_dependence_of_single_precision_is_refused() -> None:
    """Rounding hid what was less than 1.9 % of the output."""
    model = randomised(UntilSettled(3e-3)).float()
    x = rows(5, 3).float()
    x[0] *= 0.1
    with pytest.raises(fl.UnsupportedModelError, match="beside it"):
        fl.collect(model, (x, None), fl.Gaussian())
    repeated = x[:1].expand(5, 3)  # equal examples settle together
    assert fl.collect(model, (repeated, None), fl.Gaussian())["fc"].count == 5


@pytest.mark.parametrize("within", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_rounding_within_a_model_is_no_dependence(within: torch.dtype, seed: int) -> None:
    """Products of single precision round otherwise for one example than for many."""
    model, x = Narrowed(within).double(), rows(200, 16)
    assert fl.collect(model, (x, None), fl.Gaussian())["last"].count == 200


class NamesItsPrecisions(nn.Module):
    """A model in two precisions, which casts to them by name or by its weights."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3).half(), nn.Linear(3, 2)
        self.by_name = by_name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = torch.float16, torch.float32
        if not self.by_name:
            parts = self.first.weight.dtype, self.last.weight.dtype
        hidden: torch.Tensor = self.first(x.to(parts[0]))
        last: torch.Tensor = self.last(hidden.to(parts[1]))
        return last


def test_a_model_that_names_its_precisions_is_refused_in_a_sentence() -> None:
    """Statistics are of one precision: a copy of the model is run in it."""
    data = torch.ones(3, 4), None
    assert set(fl.collect(NamesItsPrecisions(False), data, fl.Gaussian())) == {
        "first",
        "last",
    }
    message = r"in torch.float16, torch.float32; statistics take a copy in torch.float32"
    with pytest.raises(fl.UnsupportedModelError, match=message):
        fl.collect(NamesItsPrecisions(True), data, fl.Gaussian())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fl.collect(nn.Linear(3, 2), data, fl.Gaussian())  # its own error


def test_complex_parameters_are_refused() -> None:
    model = nn.Linear(2, 2)
    model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(fl.UnsupportedModelError, match="'phase' is complex"):
        fl.collect(model, (torch.ones(2, 2), None), fl.Gaussian())


def test_layers_are_chosen_by_the_name_of_a_parameter() -> None:
    case = NETWORKS["vit"]()
    chosen = ["cls", "head.bias", "encoder.layers.0.norm1"]
    stats = fl.collect(case.model, (case.x, None), case.likelihood, layers=chosen)
    assert list(stats) == ["cls", "encoder.layers.0.norm1", "head"]


def test_frozen_parameters_are_no_part_of_a_block() -> None:
    case = NETWORKS["mlp"]()
    case.model[0].bias.requires_grad_(False)
    case.model[2].weight.requires_grad_(False)
    blocks = fl.blocks(case.model)
    assert list(blocks) == ["0", "2.bias", "4"]
    full, at = full_fisher(case, blocks), spans(blocks, case.model)
    stats = fl.collect(case.model, (case.x, None), case.likelihood)
    for name, layer in stats.items():
        dense = fl.ExactBlock()(layer).to_dense()
        torch.testing.assert_close(dense, full[at[name], at[name]], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", NETWORKS)
def test_approximators_that_need_no_inputs_work_on_every_block(name: str) -> None:
    for layer in collected(name).values():
        exact = fl.ExactBlock()(layer)
        diagonal = fl.Diagonal()(layer).to_dense().diagonal()
        torch.testing.assert_close(diagonal, exact.to_dense().diagonal())
        assert fl.MiniBlock()(layer).trace() == pytest.approx(exact.trace())


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("transposed-2d", {"0": (2, 4), "0.bias": (2, 1)}),
        ("conv2d-depthwise", {"0": (4, 10)}),
        ("layer-norm", {"0": (6, 2)}),
        ("rms-norm", {"0": (5, 1)}),
        ("embedding", {"0": (5, 2)}),
        ("scalar", {"scale": (1, 1), "shift": (2, 1), "fc": (2, 4)}),
        ("weight-norm", {"0.bias": (3, 1), "0.weight_g": (3, 1), "0.weight_v": (3, 3)}),
        ("attention", {"attention.in_proj_weight": (12, 5), "attention.out_proj": (4, 5)}),
        ("lstm-bidirectional", {"lstm.weight_hh_l0_reverse": (12, 3)}),
        ("lstm-bidirectional", {"lstm.weight_hr_l0": (2, 3)}),
        ("gpt", {"token": (6, 4), "position": (5, 4)}),
    ],
)
def test_names_and_shapes_of_blocks(name: str, shapes: dict[str, tuple[int, int]]) -> None:
    stats = collected(name)
    assert {block: stats[block].weight_shape for block in shapes} == shapes


@pytest.mark.parametrize("name", CASES)
def test_mean_gradient_is_that_of_autograd(name: str) -> None:
    case = CASES[name]()
    output = outputs(case)
    if isinstance(case.likelihood, fl.Categorical):
        y = torch.ones(output.shape[:-1], dtype=torch.long)
    else:
        y = torch.full_like(output, 0.5).detach()
    found = fl.mean_gradient(case.model, (case.x, y), case.likelihood)
    assert all(p.grad is None for p in case.model.parameters())
    case.likelihood.loss(outputs(case), y).mean().backward()
    for layer in found.values():
        named = dict(case.model.named_parameters())
        grads = {n: named[n].grad for n in layer.block.parameters}
        full = {n: torch.zeros_like(named[n]) if g is None else g for n, g in grads.items()}
        torch.testing.assert_close(layer.gradient, layer.block.pack(full))


def attributes(module: nn.Module) -> dict[str, int]:
    """Tell which tensors a module holds besides parameters and buffers."""
    return {n: id(t) for n, t in vars(module).items() if isinstance(t, Tensor)}


def outputs(case: Case) -> Tensor:
    """Call the model on differentiable copies, as re-entrant checkpoints need."""
    if isinstance(case.x, dict):
        return case.model(**case.x)
    if isinstance(case.x, tuple):
        return case.model(*case.x)
    floats = case.x.is_floating_point()
    return case.model(case.x.clone().requires_grad_().clone() if floats else case.x)


def stats_blocks(stats: Any) -> dict[str, Any]:
    return {name: layer.block for name, layer in stats.items()}
