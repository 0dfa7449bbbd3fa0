"""Small transformers: one that sees, one that writes."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from fisherlab.problems.networks import built, normal

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
