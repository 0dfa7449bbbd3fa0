"""Texts as windows of characters, each character to be followed by the next."""

from __future__ import annotations

import re
import string
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fisherlab.errors import DataError
from fisherlab.problems.files import SHAKESPEARE, read_verified
from fisherlab.problems.problem import Pair

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
