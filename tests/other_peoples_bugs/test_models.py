"""Modules under two names, forward passes that draw, labels that fit by chance."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherlab as fl
from tests.oracles import assert_close, brute_force_fisher

CLASSES = fl.Categorical()


class Aliased(nn.Module):
    """One module of a network, reachable under a second name."""

    def __init__(self, body, place):
        super().__init__()
        self.body = body
        self.also = body[place]

    def forward(self, x):
        return self.body(x)


class Shared(nn.Module):
    """One layer used under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b, self.o = self.a, nn.Linear(4, 3)

    def forward(self, x):
        return self.o(torch.tanh(self.b(torch.tanh(self.a(x)))))


def perceptron():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def thrice():
    layer = nn.Linear(4, 4)
    layers = nn.ModuleList([layer] * 3)
    return nn.Sequential(*layers, nn.Linear(4, 3))


ALIASED = {
    "a layer": lambda: Aliased(perceptron(), 3),
    "batch norm": lambda: Aliased(perceptron(), 1),
    "used twice": Shared,
    "a list of one": thrice,
}


def slots(model):
    return [
        (name, held_name, id(tensor), type(tensor), getattr(tensor, "requires_grad", None))
        for name, module in model.named_modules(remove_duplicate=False)
        for held in (module._parameters, module._buffers)
        for held_name, tensor in held.items()
    ]


CALLS = {
    "collect": lambda m, d: fl.collect(m, d, fl.Categorical()),
    "collect in float32": lambda m, d: fl.collect(
        m, d, fl.Categorical(), dtype=torch.float32
    ),
    "mean gradient": lambda m, d: fl.mean_gradient(m, d, fl.Categorical()),
    "coverage": lambda m, d: fl.coverage(m, d[0]),
    "estimate": lambda m, d: fl.estimate(m, d, fl.Categorical(), ["kfac"]),
    "approximate": lambda m, d: fl.approximate(m, d, fl.Categorical(), ["diagonal"]),
    "an exception": lambda m, d: fl.collect(m, (d[0], d[1] + 9), fl.Categorical()),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ALIASED)
def test_a_module_under_two_names_keeps_its_parameters(name, call):
    torch.manual_seed(0)
    model = ALIASED[name]().double().eval()
    data = torch.randn(6, 4).double(), torch.randint(0, 3, (6,))
    before = slots(model)
    try:
        CALLS[call](model, data)
    except ValueError:
        assert call == "an exception"
    assert slots(model) == before


@pytest.mark.parametrize("name", ["a layer", "batch norm"])
def test_a_module_under_two_names_has_the_fisher_of_one(name):
    torch.manual_seed(0)
    model = ALIASED[name]().double().eval()
    data = torch.randn(6, 4).double(), None
    found = fl.collect(model, data, fl.Categorical())
    plain = fl.collect(model.body, data, fl.Categorical())
    for layer in plain.values():
        other = fl.ExactBlock()(found[f"body.{layer.name}"])
        assert_close(other.to_dense(), fl.ExactBlock()(layer).to_dense(), 1e-12)


class Drawing(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.first, self.last, self.draw = nn.Linear(4, 4), nn.Linear(4, 3), draw

    def forward(self, x):
        return self.last(self.draw(torch.tanh(self.first(x)), self.training))


def seldom(h, training):
    """Drop the whole layer once in a thousand times: two outputs tell nothing."""
    return h * (torch.rand(()) < 0.999) if training else h


DRAWS = {
    "functional dropout": lambda h, training: F.dropout(h, 0.5, training),
    "noise": lambda h, training: h + training * torch.randn_like(h) if training else h,
    "stochastic depth": seldom,
}


@pytest.mark.draws("the model, before it is refused")
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("call", ["collect", "mean gradient", "approximate"])
def test_a_forward_pass_that_draws_is_refused_and_the_generator_put_back(draw, call):
    torch.manual_seed(0)
    model = Drawing(DRAWS[draw]).double().train()
    data = torch.randn(6, 4).double(), torch.randint(0, 3, (6,))
    before = torch.get_rng_state()
    with pytest.raises(fl.UnsupportedModelError, match=r"draws random numbers.*frozen"):
        CALLS[call](model, data)
    assert torch.equal(torch.get_rng_state(), before)
    with fl.frozen(model):
        CALLS[call](model, data)


@pytest.mark.parametrize("method", ["kfac", "mini-block-mean", "shampoo-mean", "adam"])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_labels_that_would_broadcast_are_refused_in_every_step(method, steps_before):
    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.randn(8, 1)
    optimiser = fl.NaturalGradient(
        nn.Linear(4, 1), fl.Gaussian(), method, lr=0.01, damping=0.1
    )
    for _ in range(steps_before):
        optimiser.step(batch=(x, y))
    with pytest.raises(ValueError, match="labels of shape"):
        optimiser.step(batch=(x, y[:, 0]))


class Changing:
    """A loader whose passes differ in one way."""

    def __init__(self, data, change):
        self.data, self.change, self.passes = data, change, 0

    def __iter__(self):
        x, y = self.data
        x = self.change(x, self.passes)
        self.passes += 1
        return iter([(x[k : k + 3], y[k : k + 3]) for k in range(0, len(x), 3)])


CHANGES = {
    "augmented": lambda x, k: x + 0.01 * k,
    "another example": lambda x, k: torch.cat([x[:-1], x[:1] * (1 + k)]),
    "fewer": lambda x, k: x[: len(x) - 3 * k],
    "used up": lambda x, k: x[: 0 if k else len(x)],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", [fl.EKFAC(), fl.KPSVD(1, fl.Passes())], ids=repr)
def test_data_that_change_between_passes_are_refused(change, method):
    torch.manual_seed(0)
    data = torch.randn(12, 4).double(), torch.randint(0, 3, (12,))
    changing = Changing(data, CHANGES[change])
    with pytest.raises(ValueError, match="gave other examples than the pass before"):
        fl.approximate(nn.Linear(4, 3).double(), changing, fl.Categorical(), {"m": method})


def test_another_order_of_the_same_examples_is_let_through_unless_labels_are_drawn():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    data = torch.randn(12, 4).double(), torch.randint(0, 3, (12,))
    turned = lambda: Changing(data, lambda x, k: x.roll(k, 0))
    found = fl.approximate(model, turned(), fl.Categorical(), ["ekfac"])["ekfac"]
    held = fl.EKFAC()(fl.collect(model, data, fl.Categorical())["weight"])
    assert_close(found["weight"].to_dense(), held.to_dense(), 1e-12)
    with pytest.raises(ValueError, match="shuffle=False"):
        fl.approximate(model, turned(), fl.Categorical(), ["ekfac"], fl.MonteCarlo(1))


def test_parts_that_know_their_first_example_have_the_labels_of_the_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, fisher = torch.randn(9, 4).double(), fl.MonteCarlo(2, seed=3)
    likelihood, parts = fl.Categorical(), [(0, 4), (4, 9)]
    whole = fl.collect(model, (x, None), likelihood, fisher)
    for start, stop in parts:
        data = x[start:stop], None
        part = fl.collect(model, data, likelihood, fisher, first=start)
        for name, layer in part.items():
            assert torch.equal(layer.gradients, whole[name].gradients[:, start:stop])
        streamed = fl.approximate(
            model, data, likelihood, ["diagonal"], fisher, first=start
        )
        for name, layer in part.items():
            expected = fl.Diagonal()(layer).to_dense()
            assert_close(streamed["diagonal"][name].to_dense(), expected, 1e-12)
    means = [
        fl.mean_gradient(model, (x[a:b], None), likelihood, fisher=fisher, first=a)
        for a, b in parts
    ]
    joined = fl.mean_gradient(model, (x, None), likelihood, fisher=fisher)
    for name, one in joined.items():
        sums = sum(
            m[name].gradient * (b - a) for m, (a, b) in zip(means, parts, strict=True)
        )
        assert_close(sums / 9, one.gradient, 1e-12)
    with pytest.raises(ValueError, match="first=-1"):
        fl.collect(model, (x, None), likelihood, first=-1)


class ClassesFirst(nn.Module):
    """Logits as torch's cross_entropy takes them, (N, C, T), or moved, (N, T, C)."""

    def __init__(self, positions, moved):
        super().__init__()
        self.l, self.positions, self.moved = nn.Linear(5, 3 * positions), positions, moved

    def forward(self, x):
        out = self.l(x).view(-1, 3, self.positions)
        return out.mT if self.moved else out


@pytest.mark.parametrize("positions", [3, 4])
@pytest.mark.parametrize("fisher", [fl.Exact(), fl.MonteCarlo(2), fl.Empirical()], ids=repr)
def test_classes_in_axis_one_are_those_of_the_moved_output(fisher, positions):
    torch.manual_seed(0)
    model, moved = (ClassesFirst(positions, m).double() for m in (False, True))
    moved.load_state_dict(model.state_dict())
    x, y = torch.randn(6, 5).double(), torch.randint(0, 3, (6, positions))
    y[0, 0] = -100
    first, last = fl.Categorical(class_axis=1), fl.Categorical(class_axis=-1)
    losses = F.cross_entropy(model(x), y, reduction="none").sum(1)
    assert_close(first.loss(model(x), y), losses, 1e-13)
    found = fl.collect(model, (x, y), first, fisher)["l"]
    wanted = fl.collect(moved, (x, y), last, fisher)["l"]
    assert_close(found.samples.matrices(), wanted.samples.matrices(), 1e-13)
    means = [
        fl.mean_gradient(m, (x, y), axis)["l"].gradient
        for m, axis in ((model, first), (moved, last))
    ]
    assert_close(*means, 1e-13)


@pytest.mark.parametrize("call", ["collect", "mean gradient", "approximate", "estimate"])
def test_a_class_axis_that_shapes_leave_open_is_asked_for(call):
    model, x = ClassesFirst(3, moved=False).double(), torch.ones(6, 5).double()
    with pytest.raises(ValueError, match=r"which axis holds the classes.*class_axis=1"):
        CALLS[call](model, (x, torch.zeros(6, 3, dtype=torch.long)))
    if call != "mean gradient":  # without labels classes are last
        CALLS[call](ClassesFirst(4, moved=True).double(), (x, None))
    with pytest.raises(ValueError, match="axis 0 is the example"):
        fl.Categorical(class_axis=0)


BY_INPUTS = ["kfac", "kfac-reduce", "ekfac", "tkfac", "foof", "kpsvd", "shampoo"]
PADDED = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)),
    "embedding": lambda: nn.Sequential(nn.Embedding(6, 4), nn.Tanh(), nn.Linear(4, 3)),
}


def padded(kind, extra):
    """A model and five positions, with so many masked ones behind."""
    torch.manual_seed(0)
    model = PADDED[kind]().double()
    x, y = torch.randint(1, 6, (8, 5)), torch.randint(0, 3, (8, 5))
    if kind == "linear":
        x = torch.randn(8, 5, 4).double()
    y[0] = -100  # an example without labels at all
    x = torch.cat([x, x.new_full((8, extra, *x.shape[2:]), 3)], 1)
    return model, (x, F.pad(y, (0, extra), value=-100))


@pytest.mark.parametrize("fisher", [fl.Exact(), fl.Empirical()], ids=repr)
@pytest.mark.parametrize("kind", PADDED)
def test_masked_positions_count_in_neither_factor(kind, fisher):
    """KFAC's scale fell with the padding: 1.02, 0.57, 0.35."""
    said = fl.Categorical(class_axis=-1)
    short, long = (fl.collect(*padded(kind, n), said, fisher) for n in (0, 7))
    streamed = fl.approximate(*padded(kind, 7), said, ["kfac"], fisher)["kfac"]
    for name, layer in short.items():
        assert (layer.count, layer.positions) == (8, 35)
        assert long[name].positions == 35
        for method in BY_INPUTS:
            try:
                wanted = fl.approximators()[method](layer)
            except fl.NeedsSharedForm:
                continue
            found = fl.approximators()[method](long[name])
            assert_close(found.to_dense(), wanted.to_dense(), 1e-8)
        kfac = fl.KFAC()(layer).to_dense()
        assert_close(streamed[name].to_dense(), kfac, 1e-12)


def test_positions_whose_units_are_off_count():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    x, y = torch.randn(40, 3, 2).double(), torch.randint(0, 2, (40, 3))
    y[:, 2] = -100
    assert bool((model[:2](x)[:, :2] == 0).all(-1).any())
    found = fl.collect(model, (x, y), fl.Categorical(class_axis=-1))
    assert [layer.positions for layer in found.values()] == [80, 80]


def test_masked_positions_do_not_count_in_steps():
    """The statistics of a training pass are those of `collect`, padding or not."""
    said, moved = fl.Categorical(class_axis=-1), []
    for extra in (0, 7):
        model, batch = padded("linear", extra)
        optimiser = fl.NaturalGradient(
            model, said, "kfac", lr=0.1, damping=0.1, fisher=fl.Empirical()
        )
        for _ in range(2):
            optimiser.step(batch=batch)
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_close(*moved, 1e-12)


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is stored (in, out)."""

    def __init__(self, width, out, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, out))
        self.bias = nn.Parameter(torch.randn(out)) if bias else None

    def forward(self, x):
        y = x.reshape(-1, x.shape[-1]) @ self.weight
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


class Own(nn.Module):
    """A linear layer of one's own, stored (out, in)."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return torch.tanh(F.linear(x, self.weight, self.bias))


PER_OUTPUT = ["mini-block", "unit-wise", "mini-block-shared", "quasi-diagonal", "diagonal"]


@pytest.mark.parametrize("method", PER_OUTPUT)
@pytest.mark.parametrize("width", [3, 4, 5])
def test_methods_per_output_are_so_where_weights_are_stored_in_by_out(width, method):
    """They were per input, and the bias of a square weight was joined to its inputs."""
    torch.manual_seed(0)
    other = nn.Linear(width, 4, bias=False).double()
    turned = Conv1D(width, 4, bias=False).double()
    turned.weight.data = other.weight.data.T.clone()
    data = torch.randn(9, 2, width).double(), torch.randn(9, 2, 4).double()
    found, wanted = (fl.collect(m, data, fl.Gaussian())["weight"] for m in (turned, other))
    dense = fl.approximators()[method](wanted).to_dense()
    order = torch.arange(4 * width).view(4, width).T.flatten()
    assert found.weight_shape == (width, 4)
    op = fl.approximators()[method](found)
    assert_close(op.to_dense(), dense[order][:, order], 1e-12)
    w = torch.randn(width, 4).double()
    solved = fl.approximators()[method](wanted).solve(w.T.contiguous(), 0.1)
    assert_close(op.solve(w, 0.1), solved.T, 1e-10)


def test_a_square_weight_keeps_the_bias_with_its_outputs():
    torch.manual_seed(0)
    models = Conv1D(4, 4), Own(4)
    before = torch.get_rng_state()
    turned, own = map(fl.blocks, models)
    assert torch.equal(torch.get_rng_state(), before)
    assert {n: b.weight_shape for n, b in turned.items()} == {
        "weight": (4, 4),
        "bias": (4, 1),
    }
    assert {n: b.weight_shape for n, b in own.items()} == {"weight": (4, 5)}


@pytest.mark.parametrize("groups", [1, 2])
def test_unit_wise_blocks_of_a_transposed_convolution_are_per_output(groups):
    torch.manual_seed(0)
    model = nn.ConvTranspose1d(4, 6, 2, groups=groups).double()
    data = torch.randn(5, 4, 3).double(), torch.randn(5, 6, 4).double()
    stats = fl.collect(model, data, fl.Gaussian())["weight"]
    found = fl.approximators()["unit-wise"](stats)
    channel = torch.zeros_like(model.weight, dtype=torch.long)
    for out in range(6):  # which entries an output channel depends on
        model.zero_grad()
        model(data[0])[:, out].sum().backward()
        channel[model.weight.grad != 0] = out
    same = channel.flatten()[:, None] == channel.flatten()
    exact = fl.ExactBlock()(stats).to_dense()
    assert_close(found.to_dense(), exact * same, 1e-12)


def test_threads_take_turns_at_one_model():
    """They met each other's hooks and swapped parameters: IndexError, a frozen model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = [(torch.randn(8, 6).double(), torch.randint(0, 3, (8,))) for _ in range(2)]

    def trace(k):
        stats = fl.collect(model, data[k], fl.Categorical())
        return [fl.ExactBlock()(layer).trace() for layer in stats.values()]

    wanted = [trace(k) for k in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(trace, [0, 1] * 5))
    assert found == wanted * 5
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("call", [*CALLS, "step"])
def test_inference_mode_is_refused_around_a_call_and_its_data_are_taken(call):
    """Inside, mean_gradient was zero in silence, the others raised raw errors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def step(m, d):
        fl.NaturalGradient(m, fl.Categorical(), "kfac", lr=0.1, damping=0.1).step(batch=d)

    use = {**CALLS, "step": step}[call]
    data = torch.randn(6, 4).double(), torch.randint(0, 3, (6,))
    with torch.inference_mode():
        made = data[0].clone(), data[1].clone()
        with pytest.raises(fl.UnsupportedModelError, match="inference_mode is on"):
            use(model, data)
    if call != "an exception":
        use(model, made)


@pytest.mark.parametrize("call", [c for c in CALLS if c != "an exception"])
def test_autocast_is_refused_around_a_call(call):
    """The Fisher of a rounded forward pass was returned as that of the model."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = torch.randn(6, 4), torch.randint(0, 3, (6,))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(fl.UnsupportedModelError, match="autocast is on"),
    ):
        CALLS[call](model, data)


class Shifted(nn.Module):
    """A float32 network with one buffer in another precision."""

    def __init__(self, dtype):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, dtype=dtype))
        self.l = nn.Linear(4, 3)

    def forward(self, x):
        return self.l(x - self.mean.to(x.dtype))


def test_a_buffer_of_another_precision_does_not_end_a_training():
    """The second step ended in torch.cat(): expected a non-empty list of Tensors."""
    moved = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model, x, y = Shifted(dtype), torch.randn(9, 4), torch.randint(0, 3, (9,))
        optimiser = fl.NaturalGradient(model, fl.Categorical(), "kfac", lr=0.1, damping=0.1)
        for _ in range(3):
            optimiser.step(batch=(x, y))
        moved.append(model.l.weight.detach())
        plan = next(iter(optimiser._passes._plans.values()))
        assert all(probe.output.nbytes == 0 for probe in plan.probes.values())
    assert_close(*moved, 1e-5)


def test_a_number_of_seeds_is_so_many_seeds():
    torch.manual_seed(0)
    data = torch.randn(6, 4), torch.zeros(6, dtype=torch.long)
    call = (nn.Linear(4, 3), data, fl.Categorical(), ["kfac"])
    found, wanted = (fl.uncertainty(*call, seeds=s) for s in (2, [0, 1]))
    assert found.seed.values.tolist() == [0, 1]
    errors, others = (ds.frobenius_error.values.flatten() for ds in (found, wanted))
    assert errors.tolist() == pytest.approx(others.tolist(), rel=1e-5, abs=1e-6)


def test_a_metric_of_ones_own_is_a_column_and_its_failure_a_status():
    torch.manual_seed(0)
    data = torch.randn(6, 4).double(), torch.randint(0, 3, (6,))
    stats = fl.collect(nn.Linear(4, 3).double(), data, fl.Categorical())

    def trace_gap(exact, approx):
        return exact.trace() - approx.trace()

    def broken(exact, approx):
        raise KeyError("nothing here")

    ds = fl.compare(stats, ["kfac"], metrics=["trace_ratio", trace_gap, broken])
    gap = fl.ExactBlock()(stats["weight"]).trace() - fl.KFAC()(stats["weight"]).trace()
    assert float(ds.trace_gap[0, 0]) == pytest.approx(gap)
    assert ds.broken.isnull().all()
    assert "nothing here" in str(ds.status.values[0, 0])


class Routed(nn.Module):
    """Two experts, each called with the examples it is for: at times with none."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3, sparse=True)
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        out, mine = torch.zeros(len(x), 3).to(x), x[:, 0] > 0
        out[mine], out[~mine] = self.a(x[mine]), self.b(x[~mine])
        return out + self.table((x[:, 1] > 0).long()) + self.table(x[:0].long()).sum()


def test_an_expert_without_examples_and_sparse_gradients_have_their_fisher():
    model, x = Routed().double(), torch.randn(6, 4).double()
    x[:, 0] = x[:, 0].abs()  # the second expert never has one
    stats = fl.collect(model, (x, None), fl.Gaussian())
    total = sum(fl.ExactBlock()(s).trace() for s in stats.values())
    assert_close(total, 3 * (x.square().sum(1) + 2).mean())
    assert fl.ExactBlock()(stats["b"]).trace() == 0


class Sent(nn.Module):
    """Two experts, each for the examples of one sign."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        out, positive = x.new_zeros(len(x), 3), x[:, 0] > 0
        for expert, chosen in ((self.a, positive), (self.b, ~positive)):
            if chosen.any():
                out[chosen] = expert(x[chosen])
        return out


def test_experts_that_few_examples_are_sent_to_are_taken_example_by_example():
    """They were refused where the first two examples did not use them all."""
    x = torch.randn(9, 4).double()
    x[:, 0] = x[:, 0].abs()
    x[5:, 0] *= -1
    model, likelihood = Sent().double(), fl.Categorical()
    stats = fl.collect(model, (x, None), likelihood)
    for name, layer in stats.items():
        expected = brute_force_fisher(model, x, likelihood, fl.blocks(model)[name])
        assert_close(fl.ExactBlock()(layer).to_dense(), expected, 1e-12)
    later = [(x[:5], None), (x[5:], None)]
    with pytest.raises(fl.UnsupportedModelError, match="Let the first batch hold such"):
        fl.collect(model, later, likelihood)


def hooked(model):
    """Mask, scale and watch gradients, as trainings do."""
    seen = []
    model[0].weight.register_hook(lambda g: 3 * g)
    model[2].bias.register_hook(lambda g: 0 * g)
    model[2].register_full_backward_hook(lambda _, given, __: (2 * given[0],))
    model[2].register_full_backward_pre_hook(lambda *_: seen.append(1))
    return seen


def test_hooks_on_gradients_change_no_statistics_and_are_kept():
    """The Fisher was 9 and 4 times too large in silence."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 2, 1, 0])

    def found():
        stats = fl.collect(model, data, CLASSES)
        mean = fl.mean_gradient(model, data, CLASSES)
        made = fl.approximate(model, data, CLASSES, ["kfac"])["kfac"]
        blocks = [fl.ExactBlock()(one).to_dense() for one in stats.values()]
        return [*blocks, *(m.gradient for m in mean.values()), made["0"].to_dense()]

    expected = found()
    seen = hooked(model)
    for one, other in zip(found(), expected, strict=True):
        assert_close(one, other, 1e-12)
    assert not seen
    CLASSES.loss(model(data[0]), data[1]).sum().backward()
    assert seen == [1]
    assert not model[2].bias.grad.any()


class Empty(nn.Module):
    """A layer without outputs, as searches over widths leave it."""

    def __init__(self):
        super().__init__()
        self.none = nn.Parameter(torch.zeros(0, 4))  # torch warns in Linear(4, 0)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(x) + F.linear(x, self.none).sum(-1, keepdim=True)


def test_a_layer_without_entries_is_no_block():
    model, x = Empty().double(), torch.randn(6, 4).double()
    data = x, torch.tensor([0, 1, 2, 2, 1, 0])
    stats = fl.collect(model, data, CLASSES)
    assert list(stats) == ["out"]
    assert fl.coverage(model, x).complete
    expected = brute_force_fisher(model, x, CLASSES, fl.blocks(model)["out"])
    assert_close(fl.ExactBlock()(stats["out"]).to_dense(), expected, 1e-12)
    assert (fl.compare(stats, ["kfac", "kpsvd"]).status == "ok").all()
    optimiser = fl.NaturalGradient(model, CLASSES, "kfac", lr=0.1, damping=0.1)
    losses = [float(optimiser.step(batch=data)) for _ in range(5)]
    optimiser.load_state_dict(optimiser.state_dict())
    assert losses[-1] < losses[0]


def test_truth_values_are_no_classes():
    model, x = nn.Linear(4, 2).double(), torch.randn(3, 4).double()
    with pytest.raises(ValueError, match=r"dtype torch\.bool"):
        fl.collect(model, (x, torch.tensor([True, False, True])), CLASSES)


def test_a_thread_trains_a_model_that_another_one_collects_from():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = torch.randn(20, 4).double(), torch.arange(20) % 3
    optimisers = (
        fl.NaturalGradient(model, CLASSES, "kfac", lr=1e-3, damping=0.1),
        fl.AdaptiveKFAC(model, CLASSES),
    )

    def collect():
        for _ in range(4):
            fl.collect(model, data, CLASSES)

    def train(optimiser):
        for _ in range(2):
            optimiser.step(batch=data)

    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(collect), *(pool.submit(train, o) for o in optimisers)]
        assert [one.result() for one in found] == [None] * 3


@pytest.mark.parametrize(
    ("option", "value"), [("scale_grad_by_freq", True), ("max_norm", 0.1)]
)
def test_a_table_whose_gradients_or_rows_a_call_changes_is_refused(option, value):
    """Its Fisher was half of that without the scale, and its rows were shortened."""
    model = nn.Sequential(nn.Embedding(7, 3, **{option: value}), nn.Flatten())
    before = model[0].weight.detach().clone()
    with pytest.raises(fl.UnsupportedModelError, match=rf"{option} .* '0'"):
        fl.collect(model, (torch.tensor([[1, 1], [2, 1]]), None), fl.Gaussian())
    assert torch.equal(model[0].weight, before)


def stepped(net, data):
    return fl.NaturalGradient(net, CLASSES, "kfac", 0.1, 0.1).step(batch=data)


CALLED = {
    "collect": lambda net, data: fl.collect(net, data, CLASSES),
    "mean_gradient": lambda net, data: fl.mean_gradient(net, data, CLASSES),
    "estimate": lambda net, data: fl.estimate(net, data, CLASSES),
    "approximate": lambda net, data: fl.approximate(net, data, CLASSES, ["kfac"]),
    "compare": lambda net, data: fl.compare(net, data, CLASSES, approximators=["kfac"]),
    "decompose": lambda net, data: fl.decompose(net, data, CLASSES),
    "step": stepped,
}


@pytest.mark.parametrize("call", CALLED)
@pytest.mark.parametrize(
    ("x", "told"),
    [
        (torch.ones(2, 5), r"float32 \(2, 5\)"),
        (torch.ones(2, 4, dtype=torch.long), r"int64 \(2, 4\)"),
        (torch.ones(2, 4, dtype=torch.complex64), r"complex64 \(2, 4\)"),
    ],
)
def test_an_error_of_the_model_says_what_the_model_was_given(call, x, told):
    with pytest.raises(RuntimeError) as caught:
        CALLED[call](nn.Sequential(nn.Linear(4, 3)), (x, torch.zeros(2).long()))
    (note,) = caught.value.__notes__
    assert re.search(f"The forward pass of Sequential .* {told}: give what", note)
