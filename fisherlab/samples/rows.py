"""Sums over matrices that are formed chunk by chunk: the general path of every form."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.memory import chunks
from fisherlab.numerics.packed import mirror_, symmetric_product_
from fisherlab.samples.base import Samples

CHUNK_BYTES = 64 * 2**20  # matrices formed at once


def parts(samples: Samples, limit: int = CHUNK_BYTES) -> Iterator[slice]:
    """Cut the examples so that their matrices stay below `limit` bytes."""
    o, i = samples.weight_shape
    each = samples.columns * o * i * samples.dtype.itemsize
    return chunks(samples.examples, limit // max(each, 1))


def stacks(samples: Samples, limit: int = CHUNK_BYTES) -> Iterator[Float[Tensor, "m o i"]]:
    """Yield all matrices in stacks below `limit` bytes, for sums over all of them.

    Where those of one example are more, its columns are cut too: 1,000 classes on a
    convolution are gigabytes an example.
    """
    o, i = samples.weight_shape
    width = max(1, limit // max(o * i * samples.dtype.itemsize, 1))
    for columns in chunks(samples.columns, width):
        some = samples.some_columns(columns)
        for part in parts(some, limit):
            yield _in_memory_order(some.matrices(part))


def flat(samples: Samples, part: slice) -> Float[Tensor, "m p"]:
    """Return the matrices of some examples as rows vec(D), v-major."""
    o, i = samples.weight_shape
    return samples.matrices(part).reshape(-1, o * i)


def summed(samples: Samples, term: Callable[[Float[Tensor, "m o i"]], Tensor]) -> Tensor:
    """Add up term(matrices) over all chunks."""
    total: Tensor | None = None
    for stack in stacks(samples):
        value = term(stack)
        total = value if total is None else total + value
    if total is None:  # no examples: an empty chunk has the right shape
        total = term(samples.matrices(slice(0, 0)).flatten(0, 1))
    return total


def add_dense_(
    samples: Samples, out: Float[Tensor, "p p"], scale: float
) -> Float[Tensor, "p p"]:
    """Write scale · Σ vec(D) vec(D)ᵀ into `out`: half a product of p × M × p."""
    if samples.examples == 0:
        return out.zero_()
    for number, stack in enumerate(stacks(samples)):
        symmetric_product_(out, stack.flatten(1), scale, beta=float(number > 0))
    return mirror_(out)


def _in_memory_order(matrices: Float[Tensor, "v n o i"]) -> Float[Tensor, "m o i"]:
    """Return a stack in the order that needs no copy; sums do not mind."""
    turned = matrices.transpose(0, 1)
    chosen = turned if turned.is_contiguous() else matrices
    return chosen.flatten(0, 1)


Tiles = Iterator[tuple[slice, slice, Tensor]]


def gram(samples: Samples, tiles: Tiles | None = None) -> Float[Tensor, "m m"]:
    """Return all inner products of the samples, v-major."""
    v, n = samples.columns, samples.examples
    table = torch.empty(v, n, v, n, dtype=samples.dtype, device=samples.device)
    for left, right, tile in tiles or _gram_blocks(samples):
        size = (v, left.stop - left.start, v, right.stop - right.start)
        block = tile.view(size)
        table[:, left, :, right] = block
        table[:, right, :, left] = block.permute(2, 3, 0, 1)
    return table.view(v * n, v * n)


def squared_norm(samples: Samples, tiles: Tiles | None = None) -> float:
    """Return Σ ⟨D_a, D_b⟩² by chunks of the Gram matrix, summed in float64."""
    total = 0.0
    for left, right, block in tiles or _gram_blocks(samples):
        weight = 1.0 if left == right else 2.0
        total += weight * float(block.square().sum(dtype=torch.float64))
    return total


def _gram_blocks(samples: Samples) -> Tiles:
    pieces = list(parts(samples))
    for at, left in enumerate(pieces):
        rows = flat(samples, left)
        for right in pieces[at:]:
            others = rows if left == right else flat(samples, right)
            yield left, right, rows @ others.T
