"""CURVES: the original file, and a calibrated surrogate of it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import DataError
from fisherlab.problems.files import CURVES, cached, read_verified
from fisherlab.problems.formats import decode_mat
from fisherlab.problems.problem import Pair

_TRAIN, _TEST, _SIDE = 20_000, 10_000, 28

# Fitted to the published statistics of CURVES, see `curve_images`.
_MARGIN: Final = 0.191
_PEN: Final = 1.146
_SPREAD: Final = 0.9
_SAMPLES: Final = 64
# Bounds memory, and changes no result.
_CHUNK: Final = 256


def curves(data_dir: Path | None, dtype: torch.dtype) -> tuple[Pair, Pair]:
    """Return the original CURVES: 20,000 and 10,000 flat 28 × 28 images in [0, 1]."""
    names = {"bdata": 2, "bdatatest": 2}
    found = decode_mat(read_verified(CURVES, data_dir), CURVES.name, names)
    for name, values in found.items():
        if values.shape[1] != _SIDE**2 or not 0 <= values.min() <= values.max() <= 1:
            raise DataError(
                f"The variable {name!r} of {CURVES.name} has the shape {values.shape} and "
                f"values from {values.min():g} to {values.max():g}; rows of {_SIDE**2} "
                "numbers in [0, 1] are expected."
            )
    x, x_test = (torch.from_numpy(np.array(found[k], order="C")).to(dtype) for k in names)
    return (x, x), (x_test, x_test)


def curves_surrogate(data_dir: Path | None, dtype: torch.dtype) -> tuple[Pair, Pair]:
    """Return 20,000 and 10,000 images of `curve_images`; drawn once, then cached."""
    drawn = cached(
        f"curves-{_TRAIN + _TEST}-{_MARGIN}-{_PEN}-{_SPREAD}-{_SAMPLES}",
        (_TRAIN + _TEST, _SIDE**2),
        lambda: curve_images(_TRAIN + _TEST).numpy(),
    )
    x, x_test = torch.from_numpy(drawn).to(dtype).split((_TRAIN, _TEST))
    return (x, x), (x_test, x_test)


def curve_images(count: int, *, seed: int = 0) -> Float[Tensor, "n pixels"]:
    """Draw images of smooth curves through random points, a surrogate of CURVES.

    A quadratic Bézier curve with the control points p_0, p_1, p_2 is drawn with a round
    pen: ink = exp(−d² / (2 s²)) where d is a pixel's distance to the curve and s = 1.146
    pixels. The points have x uniform in [m, 1 − m], m = 0.191, and y_i uniform in
    overlapping bands of half-width 0.9 h around m + h (i + ½), h = (1 − 2 m) / 3.

    The original's drawing rule is not published. This one was fitted to what is: squared
    error of PCA with 18 components per test image 6.0 (published 5.90), mean Bernoulli
    entropy per image about 54 nats (the best published losses are 54.9 to 55.3).

    Parameters
    ----------
    count
        Number of images.
    seed
        Decides the curves. An image depends on the seed and its number only.

    References
    ----------
    Hinton & Salakhutdinov, "Reducing the dimensionality of data with neural networks",
    2006 (the original data and its statistics).

    Examples
    --------
    >>> curve_images(5).shape
    torch.Size([5, 784])
    """
    centres = torch.arange(_SIDE) + 0.5
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    pixels = torch.stack((columns, rows), -1).flatten(0, 1)
    images = torch.empty(count, _SIDE**2)
    path = _paths(count, seed)
    for part in range(0, count, _CHUNK):
        squares = torch.cdist(pixels, path[part : part + _CHUNK]).amin(-1).square_()
        images[part : part + _CHUNK] = squares.div_(-2 * _PEN**2).exp_()
    return images


def _paths(count: int, seed: int) -> Float[Tensor, "n samples 2"]:
    """Return points along every curve, in pixels."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(count, 3, 2, generator=generator, dtype=torch.float64)
    band = (1 - 2 * _MARGIN) / 3
    centres = _MARGIN + band * (torch.arange(3) + 0.5)
    x = _MARGIN + (1 - 2 * _MARGIN) * drawn[..., 0]
    y = centres + _SPREAD * band * (2 * drawn[..., 1] - 1)
    t = torch.linspace(0, 1, _SAMPLES, dtype=torch.float64)
    weights = torch.stack(((1 - t) ** 2, 2 * t * (1 - t), t**2), 1)
    return (_SIDE * weights @ torch.stack((x, y), -1)).float()
