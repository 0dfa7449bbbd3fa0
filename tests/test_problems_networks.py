"""Laws of the networks and of the augmentation of the problems."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab import problems
from fisherlab.problems.descriptions import DESCRIPTIONS
from fisherlab.problems.networks import ResidualBlock, gpt, resnet, settle, vgg, vit
from fisherlab.problems.problem import CropAndFlip

# Published or counted by hand from the published widths.
PARAMETERS = {
    "digits": 7_030,
    "mnist": 7_030,
    "fashion-mnist": 7_030,
    "fashion-mnist-cnn": 3_274_634,
    "cifar10-resnet32": 464_154,
    "cifar10-subset-resnet32": 464_154,
    "cifar100-vgg16": 34_015_396,
    "svhn-vgg11": 28_149_514,
    "digits-autoencoder": 28_812,
    "mnist-autoencoder": 2_837_314,
    "faces-autoencoder": 7_537_655,
    "curves-autoencoder": 842_340,
}
INPUTS = {
    "fashion-mnist-cnn": (1, 28, 28),
    "cifar10-resnet32": (3, 32, 32),
    "cifar100-vgg16": (3, 32, 32),
    "svhn-vgg11": (3, 32, 32),
    "cifar10-vit": (3, 32, 32),
    "digits-vit": (1, 16, 16),
}
OUTPUTS = {"cifar100-vgg16": 100}


def count(model):
    return sum(p.numel() for p in model.parameters())


def dense(*widths):
    return sum((a + 1) * b for a, b in pairwise(widths))


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_network_has_the_published_number_of_parameters(name):
    model = problems.describe(name).build(seed=0, dtype=torch.float32)
    assert count(model) == PARAMETERS[name]


def test_the_counts_of_the_autoencoders_follow_from_their_widths():
    there = (256, 50, 25, 6)
    assert dense(*there, *there[-2::-1]) == PARAMETERS["digits-autoencoder"]
    there = (784, 1000, 500, 250, 30)
    assert dense(*there, *there[-2::-1]) == PARAMETERS["mnist-autoencoder"]
    there = (625, 2000, 1000, 500, 30)
    assert dense(*there, *there[-2::-1]) == PARAMETERS["faces-autoencoder"]
    there = (784, 400, 200, 100, 50, 25, 6)
    assert dense(*there, *there[-2::-1]) == PARAMETERS["curves-autoencoder"]


@pytest.mark.parametrize("name", INPUTS)
def test_a_network_takes_the_images_of_its_data(name):
    model = problems.describe(name).build(seed=0, dtype=torch.float32)
    with torch.no_grad():
        output = model(torch.zeros(2, *INPUTS[name]))
    assert output.shape == (2, OUTPUTS.get(name, 10))


@pytest.mark.parametrize("name", ["digits-vit", "prose-gpt", "cifar10-resnet32"])
def test_the_seed_alone_decides_every_network(name):
    build = problems.describe(name).build
    before = torch.get_rng_state()
    first, again, other = (
        build(seed=seed, dtype=torch.float64).state_dict() for seed in (3, 3, 4)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    assert all(value.isfinite().all() for value in first.values())


def test_networks_come_in_evaluation_mode_with_fresh_batch_statistics():
    model = resnet(8)
    assert not any(module.training for module in model.modules())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 7
    for norm in norms:
        assert norm.running_mean.eq(0).all()
        assert norm.running_var.eq(1).all()
        assert norm.num_batches_tracked == 0


def test_a_settled_network_gives_in_evaluation_what_it_gives_in_training():
    model = resnet(8, seed=1)
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(64, 3, 32, 32, generator=generator, dtype=torch.float64) + 1
    momenta = [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        fresh = model(x)
        settle(model, x)
        settled = model(x)
        trained = model.train()(x)
    assert torch.allclose(settled, trained, rtol=1e-2, atol=1e-2)
    assert (fresh - trained).abs().max() > 10 * (settled - trained).abs().max()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [norm.momentum for norm in norms] == momenta


@pytest.mark.parametrize("code", [False, True])
def test_the_two_papers_differ_in_code_and_biases(code):
    name = "mnist-autoencoder-koroko" if code else "mnist-autoencoder"
    model = problems.describe(name).build(seed=0, dtype=torch.float32)
    names = dict(model.named_children())
    assert [n for n in names if n.startswith("relu")] == [
        f"relu{k}" for k in range(1, 8) if code or k != 4
    ]
    gain = 1 if code else 2**0.5
    bound = gain * (6 / 1784) ** 0.5
    assert 0.999 * bound < names["fc1"].weight.abs().max() <= bound
    assert names["fc1"].bias.unique().tolist() == pytest.approx([0.01 if code else 0.0])


def test_logistic_autoencoders_begin_with_fifteen_normal_weights_a_unit():
    model = problems.describe("mnist-autoencoder-martens").build(
        seed=0, dtype=torch.float32
    )
    names = dict(model.named_children())
    assert [n for n in names if n.startswith("sigmoid")] == [
        f"sigmoid{k}" for k in (1, 2, 3, 5, 6, 7)
    ]
    weights = [m.weight.detach() for m in names.values() if isinstance(m, nn.Linear)]
    for weight in weights:
        assert set((weight != 0).sum(dim=1).tolist()) == {15}
    drawn = torch.cat([weight[weight != 0] for weight in weights])
    assert abs(float(drawn.mean())) < 4 / len(drawn) ** 0.5
    assert float(drawn.var()) == pytest.approx(1.0, abs=4 * (2 / len(drawn)) ** 0.5)
    spread = (weights[0] != 0).sum(dim=0).float()  # inputs are taken alike
    assert float(spread.var()) == pytest.approx(15 * 1000 / 784, rel=0.3)


def test_a_residual_block_of_zero_weights_is_its_shortcut():
    """Subsampled, and with zero channels after those of the input (option A)."""
    block = ResidualBlock(2, 4).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    y = block(x)
    assert torch.equal(y[:, :2], x[..., ::2, ::2])
    assert not y[:, 2:].any()


def test_convolutions_of_resnet_have_no_bias_and_those_of_vgg_do():
    convolutions = [
        [m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d)]
        for model in (resnet(8), vgg(11, dtype=torch.float32))
    ]
    assert convolutions == [[True] * 7, [False] * 8]


def test_vgg_without_batch_norm_lacks_two_numbers_per_filter():
    filters = 64 + 128 + 2 * 256 + 4 * 512
    plain = vgg(11, batch_norm=False, dtype=torch.float32)
    assert PARAMETERS["svhn-vgg11"] - count(plain) == 2 * filters


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: vgg(13), "11, 16"),
        (lambda: resnet(30), "6 k"),
        (lambda: vit(size=10), "patches"),
        (lambda: vit(width=30), "heads"),
        (lambda: gpt(vocabulary=4, width=30), "heads"),
    ],
)
def test_impossible_networks_are_refused(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


# --- transformers ---------------------------------------------------------------------


def perturbed(model):
    """Make every parameter matter: norm layers and biases begin as the identity."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.3)
    return model


def test_a_character_cannot_see_those_after_it():
    model = perturbed(gpt(vocabulary=5, context=8, width=8, heads=2))
    tokens = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    changed = tokens.clone()
    changed[0, 5] = 3
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_attention_is_that_of_torch():
    model = perturbed(vit(width=8, heads=2, depth=1))
    attention = model.blocks[0].attention
    reference = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        reference.in_proj_weight.copy_(attention.qkv.weight)
        reference.in_proj_bias.copy_(attention.qkv.bias)
        reference.out_proj.weight.copy_(attention.out.weight)
        reference.out_proj.bias.copy_(attention.out.bias)
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    expected, _ = reference(x, x, x)
    torch.testing.assert_close(attention(x), expected)


def test_a_patch_keeps_its_place():
    """Without positions the class token could not tell two patches apart."""
    model = perturbed(vit(width=8, heads=2, depth=1))
    x = torch.arange(256.0, dtype=torch.float64).sin().view(1, 1, 16, 16)
    swapped = torch.cat((x[..., 4:], x[..., :4]), -1)
    assert not torch.allclose(model(x), model(swapped))
    with torch.no_grad():
        model.position.zero_()
    torch.testing.assert_close(model(x), model(swapped))


@pytest.mark.parametrize("name", ["digits-vit", "prose-gpt"])
def test_every_parameter_of_a_transformer_has_a_block(name):
    problem = problems.load(name, examples=3)
    stats = fl.collect(problem.model, problem.train, problem.likelihood, fl.Empirical())
    packed = sum(s.weight_shape[0] * s.weight_shape[1] for s in stats.values())
    assert packed == count(problem.model)
    assert all(s.count == 3 for s in stats.values())


def test_a_residual_network_is_covered_completely():
    model = resnet(8)
    x = torch.zeros(2, 3, 32, 32, dtype=torch.float64)
    assert fl.coverage(model, (x, torch.tensor([0, 1]))).complete


# --- augmentation ---------------------------------------------------------------------


def image_batch(n=64):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 1


def test_augmented_images_are_windows_of_the_padded_images():
    x = image_batch()
    y = CropAndFlip(2, True, (0.0, -1.0, -2.0))(x, torch.Generator().manual_seed(1))
    padded = torch.stack(
        [
            nn.functional.pad(x[:, c], (2, 2, 2, 2), value=value)
            for c, value in enumerate((0.0, -1.0, -2.0))
        ],
        1,
    )
    found = set()
    for image, whole in zip(y, padded, strict=True):
        places = {
            (row, column, flip)
            for row in range(5)
            for column in range(5)
            for flip in (False, True)
            if torch.equal(
                image.flip(-1) if flip else image,
                whole[:, row : row + 8, column : column + 8],
            )
        }
        assert len(places) == 1
        found |= places
    assert {place[0] for place in found} == set(range(5))
    assert {place[1] for place in found} == set(range(5))
    assert {place[2] for place in found} == {False, True}


def test_the_generator_alone_decides_the_augmentation():
    x, change = image_batch(8), CropAndFlip(4, True, (0.0, 0.0, 0.0))
    before = torch.get_rng_state()
    first, again, other = (
        change(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(x, image_batch(8))


def test_without_padding_and_flip_nothing_changes():
    x = image_batch(4)
    assert torch.equal(CropAndFlip(0, False, (0.0,) * 3)(x, torch.Generator()), x)


def test_images_of_other_channels_are_refused():
    with pytest.raises(ValueError, match="3 channels; 1 are expected"):
        CropAndFlip(4, True, (0.0,))(image_batch(2), torch.Generator())


def test_house_numbers_are_never_mirrored():
    flips = {d.name: d.augment.flip for d in DESCRIPTIONS if d.augment is not None}
    assert flips.pop("svhn-vgg11") is False
    assert set(flips) == {
        "cifar10-resnet32",
        "cifar10-subset-resnet32",
        "cifar10-subset-resnet8",
        "cifar100-vgg16",
        "cifar10-vit",
        "resnet18",
    }
    assert all(flips.values())


@pytest.mark.parametrize(
    ("name", "millions", "classes"),
    [("resnet18", 11.0, 10), ("vit-tiny", 5.4, 10), ("gpt2-small-random", 124.4, 50257)],
)
def test_networks_of_the_size_people_have_are_built_and_fit_their_data(
    name, millions, classes
):
    (one,) = (d for d in DESCRIPTIONS if d.name == name)
    model = one.build(seed=0, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.06
    )
    assert "untrained" in one.network
    x, y = torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64)
    if not one.files:
        x, y = (part[:1] for part in one.data(None, torch.float32)[1])
    with torch.no_grad():
        output = model(x)
    assert output.shape == (*y.shape, classes)
    one.likelihood.check(output, y)
