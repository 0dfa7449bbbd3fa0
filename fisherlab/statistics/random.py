"""Random numbers that depend on the example's index, never on its batch."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_PER_COUNTER = 4  # a Philox counter step yields four 64-bit numbers


def uniforms(
    *, seed: int, stream: int, first: int, examples: int, each: int
) -> Float[Tensor, "n u"]:
    """Return `each` uniforms in [0, 1) for a run of examples, in float64 on the CPU.

    A counter-based generator (Philox) is moved to the run's place, so that the numbers
    of example i are the same whichever run it is drawn in.

    Examples
    --------
    >>> both = uniforms(seed=0, stream=0, first=0, examples=2, each=3)
    >>> second = uniforms(seed=0, stream=0, first=1, examples=1, each=3)
    >>> bool((both[1:] == second).all())
    True
    """
    steps = -(-each // _PER_COUNTER)
    key = np.array([seed % 2**64, stream % 2**64], dtype=np.uint64)
    bits = np.random.Philox(key=key).advance(first * steps)
    numbers = np.random.Generator(bits).random((examples, steps * _PER_COUNTER))
    return torch.from_numpy(numbers[:, :each].copy())
