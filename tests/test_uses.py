"""Layers are known by how their weights are used, whoever makes the call."""

from collections import UserDict, defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fisherlab as fl
from fisherlab.layers.opened import as_product, as_rows
from fisherlab.operators import Stacked
from tests.brute_force import full_fisher, spans
from tests.explicit_uses import (
    Added,
    Autoencoder,
    Bagged,
    Bare,
    BiasOnce,
    Contracted,
    Conv1D,
    CrossAttention,
    GPT2Block,
    LateUnknownUse,
    LateUnseenUse,
    LateUse,
    OneDict,
    Sliced,
    Tied,
    Upsampled,
    Upsampling,
)
from tests.model_zoo import MODULES, Case, randomised, rows, tokens
from tests.oracles import assert_close

GAUSSIAN = fl.Gaussian()
NETWORKS: dict[str, tuple[type[nn.Module], type[nn.Module], Tensor]] = {
    "Conv1D": (GPT2Block, GPT2Block, rows(3, 2, 3)),
    "bare products": (Bare, Bare, rows(3, 3, 3)),
    "bias that is added": (Added, Added, rows(3, 2, 3)),
    "einsum": (Contracted, Contracted, rows(3, 2, 3)),
    "bag of rows": (Bagged, Bagged, tokens(3, 3, 5)),
    "slices": (Sliced, Sliced, rows(3, 2, 3)),
    "tied head": (Tied, Tied, tokens(3, 3, 5)),
    "tied transpose": (Autoencoder, Autoencoder, rows(3, 2, 3)),
    "one position": (Autoencoder, Autoencoder, rows(3, 1, 3)),
    "bias used once": (BiasOnce, BiasOnce, rows(3, 2, 3)),
    "attention": (CrossAttention, CrossAttention, rows(3, 4, 4)),
    "transposed convolution": (Upsampling, Upsampled, rows(3, 2, 3)),
}
NAMES = pytest.mark.parametrize("name", NETWORKS)


def case_of(name: str) -> Case:
    kind, _, x = NETWORKS[name]
    return Case(randomised(kind()), x, None, GAUSSIAN)


def explicit(name: str) -> dict[str, list[tuple[bool, Tensor, Tensor]]]:
    """Return turned, a (n, t, i) and g (v, n, t, o) of every use that the network tells."""
    _, kind, x = NETWORKS[name]
    model = randomised(kind())
    seen: list[tuple[str, bool, Tensor, Tensor]] = []

    def see(block: str, a: Tensor, z: Tensor, turned: bool = False) -> Tensor:
        z = z.clone()
        seen.append((block, turned, a.detach(), z))
        return z

    output = model(x, see)
    outputs = [z for *_, z in seen]
    columns = []
    for entry in torch.eye(output[0].numel(), dtype=output.dtype):
        column = entry.view(output[0].shape).expand(output.shape)
        columns.append(torch.autograd.grad(output, outputs, column, retain_graph=True))
    found = defaultdict(list)
    for (block, turned, a, _), *grads in zip(seen, *columns, strict=True):
        found[block].append((turned, a, torch.stack(grads)))
    return found


def kfac_by_hand(uses: list[tuple[bool, Tensor, Tensor]]) -> Tensor:
    """Return Σ over the kinds of uses of G ⊗ A, or A ⊗ G where the weight is turned."""
    total = torch.zeros(())
    for turned in {way for way, *_ in uses}:
        alike = [(a, g) for way, a, g in uses if way == turned]
        examples, positions = len(alike[0][0]), sum(a.shape[1] for a, _ in alike)
        inputs = sum(a.flatten(0, 1).T @ a.flatten(0, 1) for a, _ in alike) / examples
        outputs = sum(g.flatten(0, 2).T @ g.flatten(0, 2) for _, g in alike)
        outputs = outputs / (examples * positions)
        pair = (inputs, outputs) if turned else (outputs, inputs)
        total = total + torch.kron(*pair)
    return total


@NAMES
def test_kfac_is_its_definition_with_every_use_written_out(name: str) -> None:
    case, uses = case_of(name), explicit(name)
    stats = fl.collect(case.model, (case.x, None), GAUSSIAN)
    for block, layer in stats.items():
        operator = fl.KFAC()(layer)
        if block in uses:
            assert_close(operator.to_dense(), kfac_by_hand(uses[block]))
            continue
        assert isinstance(operator, Stacked)
        own = [told for key, told in uses.items() if key.startswith("rows ")]
        for part, told in zip(operator.parts, own, strict=True):
            assert_close(part.to_dense(), kfac_by_hand(told))


PRODUCTS = [
    "nti,io->nto", "nti,oi->nto", "ni,io->no", "ni,io", "io,nti->nto", "n...i,io->n...o",
    "...i,io->...o", "nti,iho->nhto", "ntij,ijo->nto", "ntij,oji->ont",
    "nit,io->not",
]  # fmt: skip
OTHERS = [
    "ni,i->n",
    "nti,nio->nto",
    "nti,ti->n",
    "ni,io->n",
    "ni,ij->nij",
    "ii,io->io",
    "in,io->on",
]
SIZES = dict(zip("ntijho", (2, 3, 4, 5, 6, 7), strict=True))


@pytest.mark.parametrize("equation", PRODUCTS + OTHERS)
def test_an_einsum_is_a_product_or_left_alone(equation: str) -> None:
    names = equation.partition("->")[0].replace("...", "t").split(",")
    sides = [rows(*(SIZES[axis] for axis in name)) for name in names]
    weight = sides[0] if names[0][0] in "io" and equation not in OTHERS else sides[1]
    found = as_product(lambda tensor: tensor is weight, equation, *sides)
    assert (found is None) == (equation in OTHERS)
    if found is not None:
        assert_close(found(), torch.einsum(equation, *sides))


@pytest.mark.parametrize("equation", ["ni,io->no", "ni->n", "n,io->no", "a,b,c->abc"])
@pytest.mark.parametrize("shape", [(2, 1), (2, 3, 4)])
def test_an_einsum_that_repeats_an_axis_or_is_wrong_is_torchs_own(
    equation: str, shape: tuple[int, ...]
) -> None:
    weight = rows(4, 3)
    found = as_product(lambda tensor: tensor is weight, equation, rows(*shape), weight)
    assert found is None


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 0, -1])
def test_a_bag_is_its_rows_added_or_left_alone(mode: str, padding: int | None) -> None:
    table, x = rows(5, 3), tokens(4, 3, 5)
    options: dict[str, Any] = {"mode": mode, "padding_idx": padding}
    if mode == "sum":
        options["per_sample_weights"] = rows(4, 3)
    found = as_rows(torch.is_tensor, x, table, **options)
    assert (found is None) == (mode == "max")
    if found is not None:
        assert_close(found(), F.embedding_bag(x, table, **options))
    given = x.flatten(), table, torch.tensor([0, 4])
    assert as_rows(torch.is_tensor, *given, **options) is None
    weighted = options | {"mode": "mean", "per_sample_weights": rows(4, 3)}
    assert as_rows(torch.is_tensor, x, table, **weighted) is None, "torch refuses it"
    assert as_rows(lambda _: False, x, table, **options) is None, "somebody else's table"


@NAMES
def test_every_block_is_the_brute_force_fisher(name: str) -> None:
    case = case_of(name)
    blocks = fl.blocks(case.model)
    full, at = full_fisher(case, blocks), spans(blocks, case.model)
    stats = fl.collect(case.model, (case.x, None), GAUSSIAN)
    assert all(layer.is_shared for layer in stats.values())
    for block, layer in stats.items():
        exact = fl.ExactBlock()(layer)
        block_of_full = full[at[block], at[block]]
        assert_close(exact.to_dense(), block_of_full)
        assert exact.trace() == pytest.approx(float(block_of_full.trace()))
        assert exact.frobenius_norm() == pytest.approx(float(block_of_full.norm()))
        w = rows(2, *layer.weight_shape)
        expected = (w.flatten(1) @ block_of_full).view_as(w)
        assert_close(exact @ w, expected)
        damped = torch.linalg.solve(
            block_of_full + 0.1 * torch.eye(len(block_of_full)).double(), w.flatten(1).T
        )
        assert_close(exact.solve(w, 0.1), damped.T.reshape(w.shape), rtol=1e-8)


@NAMES
def test_every_method_takes_every_use_and_errs_in_order(name: str) -> None:
    case = case_of(name)
    methods = ["kfac", "ekfac", "kpsvd", "kpsvd-2", "tkfac", "tekfac", "kfac-corrected"]
    methods += ["foof", "shampoo", "mini-block", "diagonal", "kfac-reduce"]
    stats = fl.collect(case.model, (case.x, None), GAUSSIAN)
    found = fl.compare(stats, methods, metrics=["frobenius_error"])
    errors = found.frobenius_error.to_pandas()
    assert errors.notna().all().all()
    slack = 1e-6
    assert (errors["kpsvd"] <= errors["tkfac"] + slack).all()
    products = [block for block, layer in stats.items() if not layer.uses]
    assert (errors["kpsvd"] <= errors["kfac"] + slack)[products].all()
    assert (errors["kpsvd-2"] <= errors["kpsvd"] + slack).all()
    assert (errors["kfac-corrected"] <= errors["kfac"] + slack).all()
    for block, layer in stats.items():
        for method in methods:
            dense = fl.approximators()[method](layer).to_dense()
            exact = fl.ExactBlock()(layer).to_dense()
            by_hand = float((exact - dense).norm() / exact.norm())
            assert errors[method][block] == pytest.approx(by_hand, abs=1e-7), method


@NAMES
def test_chunks_and_columns_change_nothing(name: str) -> None:
    case = case_of(name)
    methods = ["kfac", "ekfac", "kpsvd"]
    data = [(case.x[:1], None), (case.x[1:], None)]
    streamed = fl.approximate(case.model, data, GAUSSIAN, methods)
    stats = fl.collect(case.model, (case.x, None), GAUSSIAN, chunk_size=2)
    whole = fl.collect(case.model, (case.x, None), GAUSSIAN)
    for block, layer in whole.items():
        assert_close(stats[block].example_gradients(), layer.example_gradients())
        for method in methods:
            operator = fl.approximators()[method](layer)
            assert_close(streamed[method][block].to_dense(), operator.to_dense(), 1e-7)


@NAMES
def test_a_step_takes_the_statistics_of_collect(name: str) -> None:
    case = case_of(name)
    y = torch.zeros_like(case.model(case.x).detach())
    stats = fl.collect(case.model, (case.x, y), GAUSSIAN, fl.Empirical())
    gradient = fl.mean_gradient(case.model, (case.x, y), GAUSSIAN)
    before = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    options: dict[str, Any] = {"lr": 1.0, "damping": 0.1, "momentum": 0.0}
    optimiser = fl.NaturalGradient(
        case.model, GAUSSIAN, "kfac", fisher=fl.Empirical(), **options
    )
    optimiser.step(batch=(case.x, y))
    named = dict(case.model.named_parameters())
    for block, layer in stats.items():
        step = layer.pack(
            {n: before[n] - named[n].detach() for n in layer.block.parameters}
        )
        expected = fl.KFAC()(layer).solve(gradient[block].gradient, 0.1)
        assert_close(step, expected, rtol=1e-7)
    optimiser.step(batch=(case.x, y))


def test_a_bare_product_has_the_samples_of_its_twin() -> None:
    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.head = nn.Linear(3, 4, bias=False), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.w(x)))

    class Bare(Twin):
        def __init__(self, use: Any, turned: bool) -> None:
            super().__init__()
            size = (3, 4) if turned else (4, 3)
            self.w, self.use = nn.Parameter(torch.randn(size)), use

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.use(x, self.w)))

    uses: list[tuple[Any, bool]] = [
        (lambda x, w: x @ w, True),
        (torch.matmul, True),
        (torch.mm, True),
        (lambda x, w: w.__rmatmul__(x), True),
        (lambda x, w: torch.addmm(x.new_zeros(4), x, w), True),
        (lambda x, w: F.linear(x, w.mT), True),
        (lambda x, w: x @ w.t(), False),
        (F.linear, False),
        (lambda x, w: (w @ x.T).T, False),
        (lambda x, w: F.conv1d(x[..., None], w[..., None])[..., 0], False),
    ]
    x, twin = rows(5, 3), randomised(Twin())
    expected = fl.collect(twin, (x, None), fl.Categorical())["w"]
    for use, turned in uses:
        model = randomised(Bare(use, turned))
        model.load_state_dict(
            {"w": twin.w.weight.T.clone() if turned else twin.w.weight}  # type: ignore
            | {f"head.{n}": p for n, p in twin.head.state_dict().items()}
        )
        found = fl.collect(model, (x, None), fl.Categorical())["w"]
        assert (found.turned, found.why) == (turned, "")
        for kind in ("inputs", "gradients"):
            assert_close(getattr(found, kind), getattr(expected, kind), rtol=1e-12)
        dense = fl.KFAC()(found).to_dense()
        if turned:
            dense = dense.view(3, 4, 3, 4).permute(1, 0, 3, 2).reshape(12, 12)
        assert_close(dense, fl.KFAC()(expected).to_dense(), rtol=1e-12)


@pytest.mark.parametrize("turned", [False, True])
def test_a_tied_table_forms_no_matrix_of_its_size(turned: bool) -> None:
    class Head(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mid = nn.Embedding(50, 3), nn.Linear(3, 3)
            self.w = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.mid(self.table(x)))
            w = self.table.weight
            return F.linear(F.linear(h, w), w.T)[..., :2] if turned else F.linear(h, w)

    model, x = randomised(Head()), tokens(3, 4, 50)
    for fisher in (fl.MonteCarlo(2), fl.MonteCarlo(1)):
        data = (x, None)
        samples = fl.collect(model, data, GAUSSIAN, fisher, layers=["table"])[
            "table"
        ].samples
        rows_ = samples.flat()
        for name in ("gram", "squared_norms", "squared_norm"):
            found = getattr(samples, name)()
            expected = rows_ @ rows_.T
            if name == "squared_norms":
                expected = expected.diagonal().view(found.shape)
            if name == "squared_norm":
                expected = expected.square().sum()
            assert_close(found, expected)


def test_a_bias_of_folded_positions_of_which_one_counts_is_seen() -> None:
    """Ones tell no examples apart; what enters the layer does."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Conv1D(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)[:, -1]

    model = randomised(Last())
    stats = fl.collect(model, (rows(4, 5, 3), None), GAUSSIAN)
    assert [layer.is_shared for layer in stats.values()] == [True, True]
    assert_close(fl.ExactBlock()(stats["first.bias"]).to_dense(), torch.eye(2))


def test_the_explicit_networks_are_those_of_torch() -> None:
    for name, (kind, other, x) in NETWORKS.items():
        told = randomised(other())(x, lambda block, a, z, turned=False: z)
        assert_close(told, randomised(kind())(x).detach(), rtol=1e-12), name


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"stride": 2, "padding": 1, "output_padding": 1}, (3, 4, 5)),
        ({"stride": 3, "output_padding": 2, "bias": False}, (3, 4, 3)),
        ({"dilation": 3, "output_padding": 2, "stride": 2}, (3, 4, 4)),
        ({"groups": 2, "padding": 1}, (3, 4, 4)),
    ],
)
def test_transposed_convolutions_of_every_kind(options: Any, size: Any) -> None:
    layer = nn.ConvTranspose1d(4, 2, 3, **options)
    case = Case(randomised(nn.Sequential(layer, nn.Tanh())), rows(*size), None, GAUSSIAN)
    blocks = fl.blocks(case.model)
    full, at = full_fisher(case, blocks), spans(blocks, case.model)
    for name, found in fl.collect(case.model, (case.x, None), GAUSSIAN).items():
        assert found.is_shared
        assert_close(fl.ExactBlock()(found).to_dense(), full[at[name], at[name]])
        fl.KFAC()(found)


@pytest.mark.parametrize("kind", [LateUse, LateUnknownUse, LateUnseenUse])
def test_a_use_that_only_later_examples_reach_is_refused(kind: Any) -> None:
    model, x = randomised(kind()), rows(6, 3)
    data = [(x, None), (torch.cat([x, x.abs() + 6]), None)]
    fl.collect(model, data[0], GAUSSIAN)
    with pytest.raises(fl.UnsupportedModelError, match=r"Examples 6 to 17 use .* 'fc'"):
        fl.collect(model, data, GAUSSIAN)
    head = fl.collect(model, data, GAUSSIAN, layers=["head"])["head"]
    assert head.count == 18


def test_parametrised_weights_refuse_kronecker_methods_with_the_reason() -> None:
    for name in ("weight-norm", "weight-norm-new"):
        case = MODULES[name]()
        stats = fl.collect(case.model, (case.x, None), case.likelihood)
        found = fl.compare(stats, ["kfac", "diagonal"])
        kept = [n for n, layer in stats.items() if not layer.is_shared]
        assert len(kept) == 2
        for block in kept:
            status = str(found.status.sel(layer=block, approximator="kfac").item())
            assert "computes the weight from it" in status
            assert found.frobenius_error.sel(layer=block, approximator="diagonal") < 1


def test_coverage_names_the_rule_of_every_parameter() -> None:
    rules = {
        name: {r.block: r.rule for r in fl.coverage(case.model, (case.x, None)).rows}
        for name, case in ((n, case_of(n)) for n in NETWORKS)
    }
    assert rules["Conv1D"]["c_fc"] == "linear, stored (in, out)"
    assert rules["Conv1D"]["c_fc.bias"] == "bias"
    assert rules["tied head"]["table"] == "embedding + linear"
    assert rules["tied transpose"]["enc"] == "linear + linear, stored (in, out)"
    assert rules["attention"]["attention.in_proj_weight"] == "linear ×2, 2 groups of rows"
    assert rules["transposed convolution"]["up"] == "transposed convolution"
    expected = {r.block: r.rule for r in fl.coverage(GPT2Block()).rows}
    assert expected["c_fc"] == "linear, stored (in, out)"


def test_batches_are_taken_as_they_come() -> None:
    model, a, scale = randomised(OneDict()), rows(4, 3), rows(4, 1)
    plain = nn.Linear(3, 2).double()
    plain.load_state_dict(model.fc.state_dict())
    x = UserDict(a=a, more=UserDict(scale=scale))
    stats = fl.collect(model, (x, None), GAUSSIAN)["fc"]
    assert_close(stats.example_gradients()[0, :, 0, :3], a * scale)
    assert_close(fl.collect(model, ((x,), None), GAUSSIAN)["fc"].inputs, stats.inputs)
    y = rows(4, 2)
    optimiser = fl.NaturalGradient(model, GAUSSIAN, "kfac", lr=0.1, damping=0.1)
    optimiser.step(batch=(x, y))
    with pytest.raises(ValueError, match="holds str"):
        fl.collect(model, (UserDict(a=a, more="text"), None), GAUSSIAN)
    with pytest.raises(TypeError, match="UserDict was given"):
        fl.collect(model, x, GAUSSIAN)
