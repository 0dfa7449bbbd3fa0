"""Data sets as pairs of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from fisherlab.problems.files import DataFile, read_verified
from fisherlab.problems.idx import decode_idx
from fisherlab.problems.problem import Pair

_MNIST_SOURCE: Final = "https://ossci-datasets.s3.amazonaws.com/mnist"
_FASHION_SOURCE: Final = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"

# In the order train images, train labels, test images, test labels.
_IDX_NAMES: Final = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def _idx_files(
    folder: str, source: str, checksums: tuple[str, ...]
) -> tuple[DataFile, ...]:
    return tuple(
        DataFile(folder, name, checksum, source)
        for name, checksum in zip(_IDX_NAMES, checksums, strict=True)
    )


MNIST: Final = _idx_files(
    "mnist",
    _MNIST_SOURCE,
    (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
)
FASHION_MNIST: Final = _idx_files(
    "fashion-mnist",
    _FASHION_SOURCE,
    (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
)


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
    images = torch.as_tensor(bundled.images, dtype=dtype) / 16
    x = _resized(images, 16).flatten(1)
    y = torch.as_tensor(bundled.target, dtype=torch.int64)
    test = torch.arange(len(y)) % 5 == 4
    return (x[~test], y[~test]), (x[test], y[test])


def small_images(
    files: tuple[DataFile, ...], data_dir: Path | None, dtype: torch.dtype
) -> tuple[Pair, Pair]:
    """Return an IDX data set as flat 16 × 16 images in [0, 1] with integer labels.

    The 28 × 28 images are reduced by torch's bilinear interpolation with antialiasing.
    """
    train, test = _idx_pairs(files, data_dir)
    return _small(train, dtype), _small(test, dtype)


def reconstructions(
    files: tuple[DataFile, ...], data_dir: Path | None, dtype: torch.dtype
) -> tuple[Pair, Pair]:
    """Return an IDX data set as flat 28 × 28 images in [0, 1] that are also targets."""
    (images, _), (test_images, _) = _idx_pairs(files, data_dir)
    x = _scaled(images, dtype).flatten(1)
    x_test = _scaled(test_images, dtype).flatten(1)
    return (x, x), (x_test, x_test)


def _idx_pairs(files: tuple[DataFile, ...], data_dir: Path | None) -> tuple[Pair, Pair]:
    tensors = [
        decode_idx(read_verified(file, data_dir), file.name, axes)
        for file, axes in zip(files, (3, 1, 3, 1), strict=True)
    ]
    x, y, x_test, y_test = tensors
    return (x, y.long()), (x_test, y_test.long())


def _small(pair: Pair, dtype: torch.dtype) -> Pair:
    images, labels = pair
    return _resized(_scaled(images, dtype), 16).flatten(1), labels


def _scaled(images: Tensor, dtype: torch.dtype) -> Tensor:
    return images.to(dtype).div_(255)


def _resized(
    images: Float[Tensor, "n height width"], size: int
) -> Float[Tensor, "n size size"]:
    resized = functional.interpolate(
        images.unsqueeze(1),
        size=(size, size),
        mode="bilinear",
        align_corners=False,
        antialias=images.shape[-1] > size,
    )
    # The weights of antialiasing sum to 1 up to rounding only.
    return resized.squeeze(1).clamp_(0, 1)
