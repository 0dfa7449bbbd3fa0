"""Images of digits and clothing as pairs of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from fisherlab.errors import DataError
from fisherlab.problems.files import DataFile, read_verified
from fisherlab.problems.formats import decode_idx
from fisherlab.problems.problem import Pair

_SIDE: Final = 28
_CLASSES: Final = 10


def digits(data_dir: Path | None, dtype: torch.dtype) -> tuple[Pair, Pair]:
    """Return scikit-learn's handwritten digits at 16 × 16 pixels.

    The 1,797 images of 8 × 8 pixels come with scikit-learn; they are scaled to [0, 1],
    enlarged bilinearly and flattened. Every fifth image is a test image (359), the
    others are training images (1,438), in the file's order.

    Examples
    --------
    >>> (x, y), (x_test, y_test) = digits(None, torch.float64)
    >>> x.shape, y.shape, x_test.shape
    (torch.Size([1438, 256]), torch.Size([1438]), torch.Size([359, 256]))
    """
    from sklearn.datasets import load_digits

    bundled = load_digits()
    pixels = torch.as_tensor(bundled.images, dtype=dtype) / 16
    x = _resized(pixels, 16).flatten(1)
    y = torch.as_tensor(bundled.target, dtype=torch.int64)
    test = torch.arange(len(y)) % 5 == 4
    return (x[~test], y[~test]), (x[test], y[test])


def digit_images(data_dir: Path | None, dtype: torch.dtype) -> tuple[Pair, Pair]:
    """Return the images of `digits` as 1 × 16 × 16."""
    (x, y), (x_test, y_test) = digits(data_dir, dtype)
    shape = (1, 16, 16)
    return (x.unflatten(1, shape), y), (x_test.unflatten(1, shape), y_test)


def digit_reconstructions(data_dir: Path | None, dtype: torch.dtype) -> tuple[Pair, Pair]:
    """Return the images of `digits`, which are also the targets."""
    (x, _), (x_test, _) = digits(data_dir, dtype)
    return (x, x), (x_test, x_test)


def colour_digits(data_dir: Path | None, dtype: torch.dtype) -> tuple[Pair, Pair]:
    """Return the images of `digits` as 3 × 32 × 32, enlarged bilinearly, channels alike."""

    def enlarged(x: Tensor) -> Tensor:
        return _resized(x.unflatten(1, (16, 16)), 32)[:, None].repeat(1, 3, 1, 1)

    train, test = digits(data_dir, dtype)
    return (enlarged(train[0]), train[1]), (enlarged(test[0]), test[1])


def small_images(
    files: tuple[DataFile, ...], data_dir: Path | None, dtype: torch.dtype
) -> tuple[Pair, Pair]:
    """Return an IDX data set as flat 16 × 16 images in [0, 1] with integer labels.

    The 28 × 28 images are reduced by torch's bilinear interpolation with antialiasing.
    """
    train, test = _idx_pairs(files, data_dir)
    return _small(train, dtype), _small(test, dtype)


def images(
    files: tuple[DataFile, ...], data_dir: Path | None, dtype: torch.dtype
) -> tuple[Pair, Pair]:
    """Return an IDX data set as 1 × 28 × 28 images in [0, 1] with integer labels."""
    (x, y), (x_test, y_test) = _idx_pairs(files, data_dir)
    return (
        (_scaled(x, dtype).unsqueeze(1), y),
        (_scaled(x_test, dtype).unsqueeze(1), y_test),
    )


def reconstructions(
    files: tuple[DataFile, ...], data_dir: Path | None, dtype: torch.dtype
) -> tuple[Pair, Pair]:
    """Return an IDX data set as flat 28 × 28 images in [0, 1] that are also targets."""
    (x, _), (x_test, _) = _idx_pairs(files, data_dir)
    x, x_test = (_scaled(part, dtype).flatten(1) for part in (x, x_test))
    return (x, x), (x_test, x_test)


def _idx_pairs(files: tuple[DataFile, ...], data_dir: Path | None) -> tuple[Pair, Pair]:
    tensors = [
        decode_idx(read_verified(file, data_dir), file.name, axes)
        for file, axes in zip(files, (3, 1, 3, 1), strict=True)
    ]
    x, y, x_test, y_test = tensors
    _check(x, y, files[0], files[1])
    _check(x_test, y_test, files[2], files[3])
    return (x, y.long()), (x_test, y_test.long())


def _check(x: Tensor, y: Tensor, images_file: DataFile, labels_file: DataFile) -> None:
    if tuple(x.shape[1:]) != (_SIDE, _SIDE):
        raise DataError(
            f"{images_file.name} holds images of {' x '.join(map(str, x.shape[1:]))} "
            f"pixels; {_SIDE} x {_SIDE} are expected."
        )
    if len(x) != len(y):
        raise DataError(
            f"{images_file.name} holds {len(x)} images, but {labels_file.name} holds "
            f"{len(y)} labels."
        )
    if len(y) and int(y.max()) >= _CLASSES:
        raise DataError(
            f"{labels_file.name} holds the label {int(y.max())}; labels go from 0 to "
            f"{_CLASSES - 1}."
        )


def _small(pair: Pair, dtype: torch.dtype) -> Pair:
    x, labels = pair
    return _resized(_scaled(x, dtype), 16).flatten(1), labels


def _scaled(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).div_(255)


def _resized(x: Float[Tensor, "n height width"], size: int) -> Float[Tensor, "n size size"]:
    resized = functional.interpolate(
        x.unsqueeze(1),
        size=(size, size),
        mode="bilinear",
        align_corners=False,
        antialias=x.shape[-1] > size,
    )
    # The weights of antialiasing sum to 1 up to rounding only.
    return resized.squeeze(1).clamp_(0, 1)
