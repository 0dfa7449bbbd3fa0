"""CURVES and FACES, which autoencoders learn: original files, and surrogates of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from fisherlab.errors import DataError
from fisherlab.problems.files import CURVES, FACES, OLIVETTI, cached, read_verified
from fisherlab.problems.formats import decode_mat
from fisherlab.problems.problem import Pair
from fisherlab.settings import numeric

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


@numeric
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


_FACE: Final = 25
_PEOPLE: Final = 40
_TRAIN_PEOPLE, _TEST_PEOPLE = 25, 10
_PATCHES: Final = 414  # of each photograph, as in the original
_PHOTO: Final = 64
_PHOTOS_PER_PERSON: Final = 10

# Half the width of a patch at scale 1, in pixels of the photograph, and the deviation
# of the blur against aliasing; fitted to the published statistics of FACES.
_HALF_WIDTH: Final = 24 * 1.6
_BLUR: Final = 0.55


def faces(data_dir: Path | None, dtype: torch.dtype) -> tuple[Pair, Pair]:
    """Return the original FACES: 103,500 and 41,400 flat 25 × 25 images.

    The images are ordered by person; the first 25 of 40 people are for training, the
    last 10 for testing.
    """
    found = decode_mat(read_verified(FACES, data_dir), FACES.name, {"newfaces_single": 2})
    patches = found["newfaces_single"].T
    if patches.shape[1] != _FACE**2 or len(patches) % _PEOPLE:
        raise DataError(
            f"The variable 'newfaces_single' of {FACES.name} has the shape "
            f"{patches.T.shape}; {_FACE**2} rows and a column for each of {_PEOPLE} x n "
            "images are expected."
        )
    each = len(patches) // _PEOPLE
    parts = patches[: _TRAIN_PEOPLE * each], patches[-_TEST_PEOPLE * each :]
    x, x_test = (torch.from_numpy(np.array(part, order="C")).to(dtype) for part in parts)
    return (x, x), (x_test, x_test)


def faces_surrogate(data_dir: Path | None, dtype: torch.dtype) -> tuple[Pair, Pair]:
    """Return 103,500 and 41,400 patches of the Olivetti photographs as flat 25 × 25.

    As many patches of each photograph, and people in each part, as the original FACES
    has, cut by `face_patches`. The training images' mean at every pixel is 0 and their
    average variance over the pixels is 1; the test images are shifted and scaled alike.
    """
    found = decode_mat(read_verified(OLIVETTI, data_dir), OLIVETTI.name, {"faces": 2})
    columns = found["faces"]
    if columns.shape != (_PHOTO**2, _PEOPLE * _PHOTOS_PER_PERSON):
        raise DataError(
            f"The variable 'faces' of {OLIVETTI.name} has the shape {columns.shape}; "
            f"({_PHOTO**2}, {_PEOPLE * _PHOTOS_PER_PERSON}) is expected."
        )
    # A column lists a photograph's pixels from top to bottom, then from left to right.
    photos = torch.tensor(columns.T.reshape(-1, _PHOTO, _PHOTO)).to(dtype).mT
    x = face_patches(photos[: _TRAIN_PEOPLE * _PHOTOS_PER_PERSON], _PATCHES, seed=0)
    x_test = face_patches(photos[-_TEST_PEOPLE * _PHOTOS_PER_PERSON :], _PATCHES, seed=1)
    mean, scale = x.mean(0), x.var(0, correction=0).mean().sqrt()
    x, x_test = (part.sub_(mean).div_(scale) for part in (x, x_test))
    return (x, x), (x_test, x_test)


def face_patches(
    photos: Float[Tensor, "photos height width"], patches: int, *, seed: int = 0
) -> Float[Tensor, "n pixels"]:
    """Cut random square patches of 25 × 25 pixels from photographs.

    Patches are centred, turned by an angle uniform in ±90° and span ±38.4 / scale
    pixels of the photograph, scale uniform in [1.4, 1.8]. Photographs are blurred by 0.55
    pixels first, sampled bilinearly, and continued by their edge. The recipe follows
    what is known of the original FACES; with it, the squared error of PCA with 30
    components per test image is 135, as published.

    Parameters
    ----------
    photos
        Square photographs.
    patches
        Number of patches of each photograph.
    seed
        Decides angles and scales.

    References
    ----------
    Hinton & Salakhutdinov, "Reducing the dimensionality of data with neural networks",
    2006 (the original data and its statistics).

    Examples
    --------
    >>> face_patches(torch.zeros(2, 64, 64), 3).shape
    torch.Size([6, 625])
    """
    generator = torch.Generator().manual_seed(seed)
    size, dtype = (len(photos), patches), photos.dtype
    angle, scale = torch.rand(2, *size, generator=generator, dtype=torch.float64)
    angle, scale = math.pi * (angle - 0.5), 1.4 + 0.4 * scale
    # In the units of `grid_sample`, a photograph spans −1 … 1.
    half = _HALF_WIDTH / scale / (photos.shape[-1] / 2)
    cosine, sine = half * angle.cos(), half * angle.sin()
    turn = torch.stack((cosine, -sine, sine, cosine), -1).unflatten(-1, (2, 2)).to(dtype)
    step = torch.linspace(-1, 1, _FACE, dtype=dtype)
    square = torch.stack(torch.meshgrid(step, step, indexing="xy"), -1).flatten(0, 1)
    cut = [
        functional.grid_sample(
            photo[None, None],
            (square @ turns.mT)[None],
            padding_mode="border",
            align_corners=False,
        )[0, 0]
        for photo, turns in zip(_blurred(photos), turn, strict=True)
    ]
    return torch.cat(cut)


def _blurred(photos: Float[Tensor, "n h w"]) -> Float[Tensor, "n h w"]:
    at = torch.arange(-2, 3, dtype=photos.dtype)
    kernel = at.square().div(-2 * _BLUR**2).exp()
    kernel = kernel / kernel.sum()
    padded = functional.pad(photos[:, None], (2, 2, 2, 2), mode="replicate")
    return functional.conv2d(padded, torch.outer(kernel, kernel)[None, None])[:, 0]
