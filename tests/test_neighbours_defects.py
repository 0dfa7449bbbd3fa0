"""Defects measured in other libraries, each a law here (scale, silence, precision)."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fisherlab as fl
from tests.brute_force import full_fisher, spans
from tests.model_zoo import MODULES, NETWORKS, Case, randomised, rows


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("samples", [1, 4, 16])
def test_the_scale_of_sampled_labels_does_not_depend_on_their_number(samples: int) -> None:
    model = randomised(nn.Linear(5, 4))
    data = (torch.randn(4000, 5, generator=generator(0)).double(), None)
    exact = fl.collect(model, data, fl.Categorical())
    sampled = fl.collect(model, data, fl.Categorical(), fl.MonteCarlo(samples))
    ratio = trace(sampled, "weight") / trace(exact, "weight")
    assert ratio == pytest.approx(1.0, abs=0.05)


def test_positions_are_no_examples() -> None:
    """The gradient of an example is summed over its positions before it is squared."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), MeanOfPositions(), nn.Linear(5, 3))
    x = torch.randn(4, 16, 6, generator=generator(1)).double()
    case = Case(randomised(model), x, None, fl.Categorical())
    blocks = fl.blocks(model)
    found = fl.ExactBlock()(fl.collect(model, (x, None), fl.Categorical())["0"])
    expected = full_fisher(case, blocks)[(at := spans(blocks, model)["0"]), at]
    torch.testing.assert_close(found.to_dense(), expected, rtol=1e-11, atol=1e-14)


def test_a_sequence_and_the_same_convolution_agree() -> None:
    """Independent positions, T = 16: the trace of KFAC is F's, not 16 times it."""
    x = torch.randn(200, 16, 6, generator=generator(2)).double()
    linear = randomised(nn.Sequential(nn.Linear(6, 4)))
    conv = nn.Sequential(nn.Conv1d(6, 4, 1)).double()
    with torch.no_grad():
        conv[0].weight.copy_(linear[0].weight[..., None])
        conv[0].bias.copy_(linear[0].bias)
    over_positions = fl.collect(linear, (x, None), fl.Gaussian(), fl.MonteCarlo(1))["0"]
    convolved = nn.Sequential(Transposed(), *conv, Transposed())
    as_conv = fl.collect(convolved, (x, None), fl.Gaussian(), fl.MonteCarlo(1))["1"]
    for method in (fl.KFAC(), fl.ExactBlock()):
        a, b = method(over_positions).to_dense(), method(as_conv).to_dense()
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    ratio = fl.KFAC()(as_conv).trace() / fl.ExactBlock()(as_conv).trace()
    assert ratio == pytest.approx(1.05, abs=0.1)


def test_bare_parameters_are_not_dropped() -> None:
    case = NETWORKS["vit"]()
    stats = fl.collect(case.model, (case.x, None), case.likelihood)
    sizes = [o * i for o, i in (layer.weight_shape for layer in stats.values())]
    assert sum(sizes) == sum(p.numel() for p in case.model.parameters())
    assert trace(stats, "cls") > 0
    assert trace(stats, "pos") > 0


@pytest.mark.parametrize("name", ["conv1d-groups", "conv2d-depthwise", "conv3d-groups"])
def test_grouped_convolutions_have_their_own_size(name: str) -> None:
    case = MODULES[name]()
    layer = fl.collect(case.model, (case.x, None), case.likelihood)["0"]
    o, i = layer.weight_shape
    assert o * i == sum(p.numel() for p in case.model.parameters())


def test_tied_weights_are_one_block_with_gradients_of_both_uses() -> None:
    case = NETWORKS["gpt"]()
    stats = fl.collect(case.model, (case.x, case.y), case.likelihood)
    assert "head" not in stats
    blocks = fl.blocks(case.model)
    expected = full_fisher(case, blocks)
    at = spans(blocks, case.model)["token"]
    assert trace(stats, "token") == pytest.approx(
        float(expected[at, at].trace()), rel=1e-11
    )


def test_the_softmax_root_keeps_its_digits_in_float32() -> None:
    logits = 5 * torch.randn(200, 10, generator=generator(3))
    root = fl.Categorical().root(logits, None, slice(0, 9))
    found = torch.einsum("vnc,vnd->ncd", root, root).double()
    p = logits.double().softmax(-1)
    exact = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    error = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert float(error.max()) < 1e-5


@pytest.fixture
def float32_default() -> Iterator[None]:
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(kept)


@pytest.mark.usefixtures("float32_default")
@pytest.mark.parametrize("name", NETWORKS)
def test_double_models_stay_double_under_a_float32_default(name: str) -> None:
    case = NETWORKS[name]()
    blocks = fl.blocks(case.model)
    full, at = full_fisher(case, blocks), spans(blocks, case.model)
    stats = fl.collect(case.model, (case.x, case.y), case.likelihood)
    for block, layer in stats.items():
        assert layer.dtype == torch.float64
        error = fl.ExactBlock()(layer).to_dense() - full[at[block], at[block]]
        assert float(error.norm() / full.norm()) < 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_eigenvectors_are_orthogonal_whatever_the_number_of_classes(name: str) -> None:
    case = NETWORKS[name]()
    stats = fl.collect(case.model, (case.x, case.y), case.likelihood)
    for layer in stats.values():
        if layer.is_shared:
            operator = fl.EKFAC()(layer)
            assert operator.trace() == pytest.approx(fl.ExactBlock()(layer).trace())
            norms = operator.frobenius_norm(), fl.ExactBlock()(layer).frobenius_norm()
            assert norms[0] <= norms[1] * (1 + 1e-12)


def test_rank_one_factors_have_a_positive_sign() -> None:
    for seed in range(20):
        x = torch.randn(30, 4, generator=generator(seed)).double()
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
        stats = fl.collect(randomised(model), (x, None), fl.Categorical())
        for layer in stats.values():
            operator = fl.KPSVD()(layer)
            for factor in operator.terms[0]:
                assert float(torch.linalg.eigvalsh(factor).min()) > -1e-12
            assert operator.inverse(1e-3).logdet() < 1e6


class MeanOfPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def trace(stats: object, name: str) -> float:
    return fl.ExactBlock()(stats[name]).trace()  # type: ignore[index]


def test_functional_dropout_is_not_averaged_over_in_silence() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(30, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.dropout(x, 0.5))

    with pytest.raises(fl.UnsupportedModelError, match="dropout"):
        fl.collect(Dropped().double(), (rows(4, 30), None), fl.Gaussian())
