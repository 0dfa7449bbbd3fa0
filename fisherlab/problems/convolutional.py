"""Convolutional networks of the papers."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from itertools import chain, pairwise
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fisherlab.problems.networks import built, glorot_uniform, he_normal


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
