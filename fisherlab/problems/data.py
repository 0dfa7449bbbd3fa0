"""Images of digits, clothing and things, curves, faces, and texts as pairs of tensors."""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from importlib import resources
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
    CURVES,
    FACES,
    OLIVETTI,
    SHAKESPEARE,
    SVHN,
    DataFile,
    cached,
    decode_idx,
    decode_mat,
    decode_npz,
    decode_pickle,
    members,
    read_verified,
)
from fisherlab.problems.problem import CropAndFlip, Pair
from fisherlab.settings import numeric

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


_TRAIN, _TEST = 20_000, 10_000

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


CONTEXT: Final = 32
# Line feed, space, and everything that can be seen.
ALPHABET: Final = "\n " + string.digits + string.ascii_letters + string.punctuation
SHAKESPEARE_ALPHABET: Final = (
    "\n !$&',-.3:;?" + string.ascii_uppercase + (string.ascii_lowercase)
)
_TRAIN_SHARE: Final = 0.9


def prose(data_dir: Path | None, dtype: torch.dtype) -> tuple[Pair, Pair]:
    """Return scikit-learn's descriptions of its data sets as windows of 32 characters.

    They are about 45 kB of English with tables, come with scikit-learn (BSD licence) and
    may change with its version. Other characters than printable ASCII are left out.

    Examples
    --------
    >>> (x, y), _ = prose(None, torch.float64)
    >>> x.shape[1], x.dtype
    (32, torch.int64)
    """
    return windows("".join(c for c in _descriptions() if c in ALPHABET), ALPHABET)


def _descriptions() -> str:
    """Return the pages that come with scikit-learn, in the order of their names."""
    folder = resources.files("sklearn.datasets.descr")
    pages = sorted(
        (page for page in folder.iterdir() if page.name.endswith(".rst")),
        key=lambda page: page.name,
    )
    if not pages:
        raise DataError("This scikit-learn comes without descriptions of its data sets.")
    return "\n".join(page.read_text(encoding="utf-8") for page in pages)


def prose_words(data_dir: Path | None, dtype: torch.dtype) -> tuple[Pair, Pair]:
    """Return the text of `prose` as windows of 64 words and signs.

    A word's number is its rank by how often it occurs, ties in alphabetical order: some
    thousands of numbers, of the many that a large vocabulary has.

    Examples
    --------
    >>> (x, y), _ = prose_words(None, torch.float64)
    >>> x.shape[1], bool(x[0, 1] == y[0, 0]), bool(x.max() < 50257)
    (64, True, True)
    """
    words = re.findall(r"\w+|[^\w\s]", _descriptions())
    counts = Counter(words)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    numbers = {word: number for number, word in enumerate(ranked)}
    return _parts(torch.tensor([numbers[word] for word in words]), 64)


def shakespeare(data_dir: Path | None, dtype: torch.dtype) -> tuple[Pair, Pair]:
    """Return the 1.1 MB of Shakespeare known as tiny Shakespeare as windows of 32."""
    content = read_verified(SHAKESPEARE, data_dir)
    return windows(content.decode("ascii"), SHAKESPEARE_ALPHABET)


def windows(text: str, alphabet: str, context: int = CONTEXT) -> tuple[Pair, Pair]:
    """Cut a text into windows of numbered characters that do not overlap.

    The target of a character is the one that follows it. The first nine tenths are for
    training, the rest for testing.

    Parameters
    ----------
    text
        The text.
    alphabet
        Its characters; a character's number is its place here.
    context
        Characters in a window.

    Raises
    ------
    DataError
        If the text has other characters, or is too short for a window in each part.

    Examples
    --------
    >>> (x, y), _ = windows("abc" * 20, "abc", 4)
    >>> x[0], y[0]
    (tensor([0, 1, 2, 0]), tensor([1, 2, 0, 1]))
    """
    numbers = {character: number for number, character in enumerate(alphabet)}
    strange = sorted(set(text) - set(numbers))
    if strange:
        raise DataError(f"The text holds characters outside of its alphabet: {strange}.")
    return _parts(torch.tensor([numbers[character] for character in text]), context)


def _parts(tokens: Tensor, context: int) -> tuple[Pair, Pair]:
    """Cut tokens into windows for training, and for testing."""
    cut = int(_TRAIN_SHARE * len(tokens))
    if len(tokens) - cut <= context:
        raise DataError(f"A text of {len(tokens)} tokens is too short.")
    return _shifted(tokens[:cut], context), _shifted(tokens[cut:], context)


def _shifted(tokens: Tensor, context: int) -> Pair:
    count = (len(tokens) - 1) // context
    x = tokens[: count * context].view(count, context)
    y = tokens[1 : count * context + 1].view(count, context)
    return x, y
