"""Images of digits, clothing, things and house numbers as pairs of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fisherlab.errors import DataError
from fisherlab.problems.files import (
    CIFAR10,
    CIFAR10_SUBSET,
    CIFAR100,
    SVHN,
    DataFile,
    read_verified,
)
from fisherlab.problems.formats import (
    decode_idx,
    decode_mat,
    decode_npz,
    decode_pickle,
    members,
)
from fisherlab.problems.problem import CropAndFlip, Pair

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


_SHAPE: Final = (3, 32, 32)
Channels = tuple[float, float, float]

# Mean and scale of every channel of pixels in [0, 1], as Bahamou et al. published them
# for CIFAR; those of SVHN are the moments of its training images.
_CIFAR10: Final = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_CIFAR100: Final = ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))
_SVHN: Final = ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))


def _black(moments: tuple[Channels, Channels]) -> Channels:
    red, green, blue = (-mean / scale for mean, scale in zip(*moments, strict=True))
    return red, green, blue


CIFAR10_AUGMENTATION: Final = CropAndFlip(4, True, _black(_CIFAR10))
CIFAR100_AUGMENTATION: Final = CropAndFlip(4, True, _black(_CIFAR100))
# A mirrored digit is no digit.
SVHN_AUGMENTATION: Final = CropAndFlip(4, False, _black(_SVHN))


def cifar10(data_dir: Path | None, dtype: torch.dtype) -> tuple[Pair, Pair]:
    """Return the 50,000 and 10,000 normalised images of CIFAR-10."""
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    batches = _batches(CIFAR10, data_dir, "cifar-10-batches-py", names, "labels", 10)
    pixels, labels = (np.concatenate(parts) for parts in zip(*batches[:5], strict=True))
    return (
        _pair(pixels, labels, _CIFAR10, dtype),
        _pair(*batches[5], _CIFAR10, dtype),
    )


def cifar100(data_dir: Path | None, dtype: torch.dtype) -> tuple[Pair, Pair]:
    """Return the 50,000 and 10,000 normalised images of CIFAR-100 with fine labels."""
    train, test = _batches(
        CIFAR100, data_dir, "cifar-100-python", ["train", "test"], "fine_labels", 100
    )
    return _pair(*train, _CIFAR100, dtype), _pair(*test, _CIFAR100, dtype)


def cifar10_subset(data_dir: Path | None, dtype: torch.dtype) -> tuple[Pair, Pair]:
    """Return the first 2,000 training and 1,000 test images of CIFAR-10."""
    content = read_verified(CIFAR10_SUBSET, data_dir)
    keys = ["x_train", "y_train", "x_test", "y_test"]
    x, y, x_test, y_test = decode_npz(content, CIFAR10_SUBSET.name, keys)
    name = CIFAR10_SUBSET.name
    pairs = [
        (_checked(pixels.transpose(0, 3, 1, 2), name), _labelled(labels, pixels, 10, name))
        for pixels, labels in ((x, y), (x_test, y_test))
    ]
    return _pair(*pairs[0], _CIFAR10, dtype), _pair(*pairs[1], _CIFAR10, dtype)


def svhn(data_dir: Path | None, dtype: torch.dtype) -> tuple[Pair, Pair]:
    """Return the 73,257 and 26,032 normalised house numbers; the digit 0 is class 0."""
    train, test = (_house_numbers(file, data_dir, dtype) for file in SVHN)
    return train, test


def _house_numbers(file: DataFile, data_dir: Path | None, dtype: torch.dtype) -> Pair:
    found = decode_mat(read_verified(file, data_dir), file.name, {"X": 4, "y": 2})
    pixels = _checked(found["X"].transpose(3, 2, 0, 1), file.name)
    # MATLAB counts from 1, so the file calls the digit 0 class 10.
    labels = _labelled(found["y"].ravel(), pixels, 11, file.name) % 10
    return _pair(pixels, labels, _SVHN, dtype)


def _batches(
    file: DataFile,
    data_dir: Path | None,
    folder: str,
    names: Sequence[str],
    key: str,
    classes: int,
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Return pixels and labels of each batch of a CIFAR archive."""
    paths = [f"{folder}/{name}" for name in names]
    contents = members(read_verified(file, data_dir), file.name, paths)
    return [
        decode_batch(content, path, key, classes)
        for content, path in zip(contents, paths, strict=True)
    ]


def decode_batch(
    content: bytes, name: str, key: str, classes: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the pixels (n, 3, 32, 32) and labels (n,) of a pickled CIFAR batch.

    Parameters
    ----------
    content
        The pickle.
    name
        What to call it in an error.
    key
        Where the labels are.
    classes
        The number of classes.

    Raises
    ------
    DataError
        If it cannot be unpickled safely or is not a batch of images with labels.
    """
    batch = decode_pickle(content, name)
    if not isinstance(batch, dict) or "data" not in batch or key not in batch:
        raise DataError(f"{name} is not a batch with 'data' and {key!r}.")
    pixels = batch["data"]
    if not isinstance(pixels, np.ndarray) or pixels.shape[1:] != (3072,):
        raise DataError(f"{name} does not hold rows of 3072 pixels.")
    pixels = _checked(pixels.reshape(-1, *_SHAPE), name)
    return pixels, _labelled(batch[key], pixels, classes, name)


def _checked(pixels: NDArray[Any], name: str) -> NDArray[Any]:
    if pixels.dtype != np.uint8 or pixels.shape[1:] != _SHAPE:
        raise DataError(
            f"{name} holds images of type {pixels.dtype} and shape {pixels.shape[1:]}; "
            f"bytes of shape {_SHAPE} are expected."
        )
    return pixels


def _labelled(labels: Any, pixels: NDArray[Any], classes: int, name: str) -> NDArray[Any]:
    found = np.asarray(labels)
    if found.shape != (len(pixels),) or found.dtype.kind not in "ui":
        raise DataError(
            f"{name} holds {len(pixels)} images, but labels of type {found.dtype} and "
            f"shape {found.shape}."
        )
    if len(found) and not 0 <= found.min() <= found.max() < classes:
        raise DataError(
            f"{name} holds labels from {found.min()} to {found.max()}; they must lie "
            f"between 0 and {classes - 1}."
        )
    return found.astype(np.int64)


def _pair(
    pixels: NDArray[Any],
    labels: NDArray[Any],
    moments: tuple[Channels, Channels],
    dtype: torch.dtype,
) -> Pair:
    mean, scale = (torch.tensor(m, dtype=dtype).view(3, 1, 1) for m in moments)
    x = torch.from_numpy(np.ascontiguousarray(pixels)).to(dtype).div_(255)
    return x.sub_(mean).div_(scale), torch.from_numpy(labels)
