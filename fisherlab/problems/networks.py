"""Networks of the papers (perceptrons, convolutions, transformers), weights from a seed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import Final, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

Network = TypeVar("Network", bound=nn.Module)
Draw = Callable[[Tensor, Generator], object]


def built(
    make: Callable[[], Network],
    draw: Draw,
    *,
    seed: int,
    dtype: torch.dtype,
    bias: float = 0.0,
) -> Network:
    """Build a network whose weights are drawn from a generator of their own.

    Weights are drawn in the order of `modules()`; norm layers begin as the identity.
    The network comes in evaluation mode. The global random generator is neither read
    nor changed: the constructors of torch would draw from it, so the network is made
    without memory first and filled afterwards.

    Parameters
    ----------
    make
        Makes the network. Only norm layers may hold buffers.
    draw
        Fills a weight in place, given the generator.
    seed
        Decides the weights.
    dtype
        Of weights and buffers.
    bias
        The value of every bias.

    Examples
    --------
    >>> make = lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> model = built(make, glorot_uniform(), seed=0, dtype=torch.float64)
    >>> model[0].bias.tolist(), model[1].weight.tolist()
    ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    """
    with torch.device("meta"):
        model = make()
    model = model.to_empty(device="cpu").to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            _fill(module, draw, generator, bias)
    return model.eval()


def _fill(module: nn.Module, draw: Draw, generator: Generator, bias: float) -> None:
    if isinstance(module, _BatchNorm | nn.LayerNorm):
        module.reset_parameters()
        return
    assert not list(module.buffers(recurse=False)), "there is no rule to fill a buffer"
    for name, parameter in module.named_parameters(recurse=False):
        if name == "bias":
            parameter.fill_(bias)
        else:
            draw(parameter, generator)


def glorot_uniform(gain: float = 1.0) -> Draw:
    """Return a draw from U(±gain·√(6 / (fan_in + fan_out))).

    References
    ----------
    Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", 2010, eq. 16.
    """
    return partial(_draw, partial(nn.init.xavier_uniform_, gain=gain))


def he_normal() -> Draw:
    """Return a draw from N(0, 2 / fan_in).

    References
    ----------
    He et al., "Delving deep into rectifiers", 2015, eq. 10.
    """
    return partial(_draw, partial(nn.init.kaiming_normal_, nonlinearity="relu"))


def normal(deviation: float) -> Draw:
    """Return a draw from N(0, deviation²)."""
    return partial(_draw, partial(nn.init.normal_, std=deviation))


def _draw(rule: Callable[..., Tensor], weight: Tensor, generator: Generator) -> None:
    rule(weight, generator=generator)


def sparse_normal(connections: int) -> Draw:
    """Return a draw of so many weights of every unit from N(0, 1); the others are zero.

    References
    ----------
    Martens, "Deep learning via Hessian-free optimization", 2010, section 5.
    """

    def draw(weight: Tensor, generator: Generator) -> None:
        order = torch.rand(weight.shape, generator=generator).argsort(dim=1)
        chosen = order[:, :connections]
        values = torch.randn(chosen.shape, generator=generator, dtype=weight.dtype)
        weight.zero_().scatter_(1, chosen, values)

    return draw


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Give batch norm the statistics of a batch, in evaluation mode too.

    Fresh running statistics (mean 0, variance 1) are those of no data: without this, an
    untrained network in evaluation mode is another one than in training. A model
    without batch norm is left alone.

    Parameters
    ----------
    model
        Changed in place; left in evaluation mode.
    x
        Inputs of the model.

    Examples
    --------
    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> settle(model, torch.tensor([[2.0], [4.0]]))
    >>> model[0].running_mean, model.training
    (tensor([3.]), False)
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # average all batches, of which there is one
    model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


Activation = Literal["tanh", "relu", "sigmoid"]

_ACTIVATIONS: Final[dict[str, type[nn.Module]]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
}
# A ReLU passes half of the variance of its input, so its weights carry twice as much.
_GAINS: Final[dict[str, float]] = {"tanh": 1.0, "relu": 2.0**0.5, "sigmoid": 1.0}


def perceptron(
    widths: Sequence[int],
    activation: Activation,
    *,
    linear: Sequence[int] = (),
    gain: float | None = None,
    draw: Draw | None = None,
    bias: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """Build a fully connected network with named layers `fc1`, `fc2`, ….

    Weights are uniform in ±gain·√(6 / (d_in + d_out)), if not drawn otherwise. The last
    layer has no activation. The global random generator is neither read nor changed.

    Parameters
    ----------
    widths
        Sizes of the input, of every layer in turn, and of the output.
    activation
        The function after every layer but the last.
    linear
        Numbers of further layers without an activation, counted from 1.
    gain
        Scales the weights; None means √2 for ReLU and 1 for others.
    draw
        Fills a weight in place, given the generator.
    bias
        The initial value of every bias.
    seed
        Decides the weights.
    dtype
        Of the weights.

    References
    ----------
    Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural
    networks", 2010, eq. 16.

    Examples
    --------
    >>> perceptron([4, 3, 2], "tanh")
    Sequential(
      (fc1): Linear(in_features=4, out_features=3, bias=True)
      (tanh1): Tanh()
      (fc2): Linear(in_features=3, out_features=2, bias=True)
    )
    """

    def make() -> nn.Sequential:
        return _layers(widths, activation, {*linear, len(widths) - 1})

    glorot = glorot_uniform(_GAINS[activation] if gain is None else gain)
    return built(make, draw or glorot, seed=seed, dtype=dtype, bias=bias)


def _layers(widths: Sequence[int], activation: Activation, bare: set[int]) -> nn.Sequential:
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for k, (d_in, d_out) in enumerate(pairwise(widths), start=1):
        modules[f"fc{k}"] = nn.Linear(d_in, d_out)
        if k not in bare:
            modules[f"{activation}{k}"] = _ACTIVATIONS[activation]()
    return nn.Sequential(modules)


def simple_cnn(
    *, classes: int = 10, seed: int = 0, dtype: torch.dtype = torch.float64
) -> nn.Sequential:
    """Build the Simple CNN for images of 1 × 28 × 28 pixels.

    Two convolutions of 5 × 5 with 32 and 64 filters, stride 1, padded to keep the size,
    each followed by ReLU and 2 × 2 max-pooling; a dense layer of 1,024 units; ReLU; the
    output. No batch norm. 3,274,634 parameters for 10 classes. Weights are Glorot
    uniform, biases zero.

    References
    ----------
    Shallue et al., "Measuring the effects of data parallelism on neural network
    training", 2019 (Simple CNN); Bahamou et al. 2022, figures of the inverse empirical
    Fisher.

    Examples
    --------
    >>> model = simple_cnn()
    >>> model(torch.zeros(2, 1, 28, 28, dtype=torch.float64)).shape
    torch.Size([2, 10])
    >>> sum(p.numel() for p in model.parameters())
    3274634
    """
    return built(partial(_simple, classes), glorot_uniform(), seed=seed, dtype=dtype)


def _simple(classes: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 32, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(64 * 7 * 7, 1024),
            relu3=nn.ReLU(),
            fc2=nn.Linear(1024, classes),
        )
    )


# Filters of every 3 × 3 convolution; 0 is a 2 × 2 max-pooling. Models A and D of the
# paper.
_VGG: Final[dict[int, tuple[int, ...]]] = {
    11: (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0),
    16: (64, 64, 0, 128, 128, 0, *[256] * 3, 0, *[512] * 3, 0, *[512] * 3, 0),
}


def vgg(
    depth: Literal[11, 16],
    *,
    classes: int = 10,
    batch_norm: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """Build VGG-11 or VGG-16 for images of 3 × 32 × 32 pixels.

    Convolutions of 3 × 3 with bias, each followed by batch norm and ReLU, and five 2 × 2
    max-poolings, which leave 512 numbers; then dense layers of 4,096, 4,096 and
    `classes` units. No dropout. VGG-16 for 100 classes has 34,015,396 parameters,
    VGG-11 for 10 classes 28,149,514. Weights are He normal, biases zero.

    Parameters
    ----------
    depth
        Number of layers with weights, without batch norm.
    classes
        Number of outputs.
    batch_norm
        Whether batch norm follows every convolution.
    seed
        Decides the weights.
    dtype
        Of weights and buffers.

    References
    ----------
    Simonyan & Zisserman, "Very deep convolutional networks for large-scale image
    recognition", 2015, table 1, models A and D, with the layers of Bahamou et al. 2022
    after the convolutions.

    Examples
    --------
    >>> model = vgg(11, dtype=torch.float32)
    >>> model(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    >>> sum(p.numel() for p in model.parameters())
    28149514
    """
    if depth not in _VGG:
        raise ValueError(f"vgg({depth}): the depth is one of {', '.join(map(str, _VGG))}.")
    make = partial(_vgg, _VGG[depth], classes, batch_norm)
    return built(make, he_normal(), seed=seed, dtype=dtype)


def _vgg(filters: tuple[int, ...], classes: int, batch_norm: bool) -> nn.Sequential:
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    channels, pools = 3, 0
    for width in filters:
        if not width:
            pools += 1
            modules[f"pool{pools}"] = nn.MaxPool2d(2)
            continue
        number = len([name for name in modules if name.startswith("conv")]) + 1
        modules[f"conv{number}"] = nn.Conv2d(channels, width, 3, padding=1)
        if batch_norm:
            modules[f"norm{number}"] = nn.BatchNorm2d(width)
        modules[f"relu{number}"] = nn.ReLU()
        channels = width
    modules["flatten"] = nn.Flatten()
    for number, (d_in, d_out) in enumerate(((channels, 4096), (4096, 4096)), start=1):
        modules[f"fc{number}"] = nn.Linear(d_in, d_out)
        modules[f"fc_relu{number}"] = nn.ReLU()
    modules["fc3"] = nn.Linear(4096, classes)
    return nn.Sequential(modules)


def resnet(
    depth: int = 32,
    *,
    classes: int = 10,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """Build a residual network for images of 3 × 32 × 32 pixels.

    A 3 × 3 convolution, then three stages of (depth − 2) / 6 blocks with 16, 32 and 64
    filters, the first block of the second and third stage with stride 2, global average
    pooling and the output. A block is two 3 × 3 convolutions without bias, each with
    batch norm; its shortcut is the identity, subsampled and padded with zero channels
    where the size changes (option A, which has no parameters). 464,154 parameters at
    depth 32 for 10 classes. Weights are He normal, biases zero.

    Raises
    ------
    ValueError
        If depth is not 6 k + 2.

    References
    ----------
    He et al., "Deep residual learning for image recognition", 2016, section 4.2.

    Examples
    --------
    >>> model = resnet(32)
    >>> model(torch.zeros(2, 3, 32, 32, dtype=torch.float64)).shape
    torch.Size([2, 10])
    >>> sum(p.numel() for p in model.parameters())
    464154
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"resnet({depth}): the depth is 6 k + 2, as in 20, 32, 44, 56.")
    make = partial(_resnet, (depth - 2) // 6, classes, (16, 16, 32, 64))
    return built(make, he_normal(), seed=seed, dtype=dtype)


def resnet18(
    *, classes: int = 10, seed: int = 0, dtype: torch.dtype = torch.float64
) -> nn.Sequential:
    """Build ResNet-18 for images of 3 × 32 × 32 pixels.

    As `resnet`, with four stages of two blocks of 64, 128, 256 and 512 filters: the
    layers of ImageNet's ResNet-18 but for its first, of 7 × 7 and stride 2 with a
    pooling, in whose place there is a 3 × 3 convolution. 11,001,802 parameters.

    References
    ----------
    He et al., "Deep residual learning for image recognition", 2016, table 1.

    Examples
    --------
    >>> model = resnet18(dtype=torch.float32)
    >>> model(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    make = partial(_resnet, 2, classes, (64, 64, 128, 256, 512))
    return built(make, he_normal(), seed=seed, dtype=dtype)


def _resnet(blocks: int, classes: int, widths: tuple[int, ...]) -> nn.Sequential:
    stages = [_stage(a, b, blocks) for a, b in pairwise(widths)]
    names = [f"block{k}" for k in range(1, len(stages) * blocks + 1)]
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, widths[0], 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(widths[0]),
            relu=nn.ReLU(),
            **dict(zip(names, chain.from_iterable(stages), strict=True)),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(widths[-1], classes),
        )
    )


def _stage(width_in: int, width: int, blocks: int) -> list[ResidualBlock]:
    return [ResidualBlock(width_in, width)] + [
        ResidualBlock(width, width) for _ in range(blocks - 1)
    ]


class ResidualBlock(nn.Module):
    """Add two convolutions to a shortcut without parameters; stride 2 if widening.

    Parameters
    ----------
    width_in, width
        Number of channels of the input and of the output.

    Examples
    --------
    >>> ResidualBlock(16, 32)(torch.zeros(1, 16, 8, 8)).shape
    torch.Size([1, 32, 4, 4])
    """

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.stride = 1 if width == width_in else 2
        self.conv1 = nn.Conv2d(
            width_in, width, 3, stride=self.stride, padding=1, bias=False
        )
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.added_channels = width - width_in

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(norm(conv(relu(norm(conv(x))))) + shortcut(x))."""
        inner = functional.relu(self.norm1(self.conv1(x)))
        subsampled = x[..., :: self.stride, :: self.stride]
        # The pairs of sizes to add before and after, from the last axis to the first.
        shortcut = functional.pad(subsampled, (0, 0, 0, 0, 0, self.added_channels))
        return functional.relu(self.norm2(self.conv2(inner)) + shortcut)


# Of the initial weights of GPT-2.
_DEVIATION = 0.02


def vit(
    *,
    channels: int = 1,
    size: int = 16,
    patch: int = 4,
    width: int = 32,
    heads: int = 4,
    depth: int = 2,
    classes: int = 10,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> VisionTransformer:
    """Build a small vision transformer.

    Square patches are embedded by one linear map, a learned class token comes before
    them, a learned position is added, pre-norm blocks follow, and the class token's
    last state gives the logits. Weights are N(0, 0.02²), biases zero.

    Parameters
    ----------
    channels, size
        Of the images, channels × size × size.
    patch
        Width of a patch, a divisor of `size`.
    width
        Numbers per token, a multiple of `heads`.
    heads, depth
        Attention heads of a block, and number of blocks.
    classes
        Number of outputs.
    seed
        Decides the weights.
    dtype
        Of the weights.

    References
    ----------
    Dosovitskiy et al., "An image is worth 16x16 words", 2021, section 3.1.

    Examples
    --------
    >>> vit()(torch.zeros(2, 1, 16, 16, dtype=torch.float64)).shape
    torch.Size([2, 10])
    """
    if size % patch:
        raise ValueError(f"vit(size={size}, patch={patch}): patches must fill the image.")
    _check_heads("vit", width, heads)
    make = partial(VisionTransformer, channels, size, patch, width, heads, depth, classes)
    return built(make, normal(_DEVIATION), seed=seed, dtype=dtype)


def gpt(
    *,
    vocabulary: int,
    context: int = 32,
    width: int = 64,
    heads: int = 4,
    depth: int = 2,
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> LanguageModel:
    """Build a generative transformer, over characters or other tokens.

    The input is a sequence of token numbers, the output the logits of the next token at
    every position. Token and position embeddings are learned, attention looks back
    only. No dropout. Weights are N(0, 0.02²), biases zero. GPT-2 small is
    ``gpt(vocabulary=50257, context=1024, width=768, heads=12, depth=12, tied=True)``.

    Parameters
    ----------
    vocabulary
        Number of tokens.
    context
        The longest sequence.
    width
        Numbers per token, a multiple of `heads`.
    heads, depth
        Attention heads of a block, and number of blocks.
    tied
        Whether the output layer has the weight of the token embedding.
    seed
        Decides the weights.
    dtype
        Of the weights.

    References
    ----------
    Radford et al., "Language models are unsupervised multitask learners", 2019.

    Examples
    --------
    >>> gpt(vocabulary=96)(torch.zeros(2, 32, dtype=torch.int64)).shape
    torch.Size([2, 32, 96])
    """
    _check_heads("gpt", width, heads)
    make = partial(LanguageModel, vocabulary, context, width, heads, depth)
    model = built(make, normal(_DEVIATION), seed=seed, dtype=dtype)
    if tied:
        model.head.weight = model.embed.weight
    return model


def _check_heads(name: str, width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(
            f"{name}(width={width}, heads={heads}): the width must be a multiple of the "
            "number of heads."
        )


class VisionTransformer(nn.Module):
    """See `vit`."""

    def __init__(
        self,
        channels: int,
        size: int,
        patch: int,
        width: int,
        heads: int,
        depth: int,
        classes: int,
    ) -> None:
        super().__init__()
        tokens = (size // patch) ** 2 + 1
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.empty(1, width))
        self.position = nn.Parameter(torch.empty(tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads, False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        """Return the logits of the classes."""
        patches = self.embed(x).flatten(2).transpose(1, 2)
        token = self.token.expand(len(x), 1, -1)
        states = torch.cat((token, patches), 1) + self.position
        return self.head(self.norm(self.blocks(states)[:, 0]))


class LanguageModel(nn.Module):
    """See `gpt`."""

    def __init__(
        self, vocabulary: int, context: int, width: int, heads: int, depth: int
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads, True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t vocabulary"]:
        """Return the logits of the next token at every position."""
        states = self.embed(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(states)))


class Block(nn.Module):
    """Add attention and then a two-layer perceptron, each after a norm layer."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(width, 4 * width),
                gelu=nn.GELU(),
                fc2=nn.Linear(4 * width, width),
            )
        )

    def forward(self, x: Float[Tensor, "n t width"]) -> Float[Tensor, "n t width"]:
        """Return x + attention(norm(x)), plus its own perceptron."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Mix tokens by softmax(q kᵀ / √(width / heads)) v.

    Written out, because torch's fused attention has no rule for per-example gradients.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "n t width"]) -> Float[Tensor, "n t width"]:
        """Return the mixed tokens; position t sees positions up to t if causal."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if self.causal:
            t = x.shape[1]
            later = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        mixed = functional.softmax(scores, -1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))
