"""Read the IDX format of the MNIST files."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from typing import Final

import torch
from jaxtyping import UInt8
from torch import Tensor

from fisherlab.errors import DataError

_UNSIGNED_BYTES: Final = 0x08


def decode_idx(packed: bytes, name: str, axes: int) -> UInt8[Tensor, "*sizes"]:
    """Decode a gzipped IDX file of unsigned bytes.

    The format is two zero bytes, the type, the number of axes, one big-endian 32-bit
    size per axis, and the values in row-major order.

    Parameters
    ----------
    packed
        Content of the gzipped file.
    name
        What to call the file in an error.
    axes
        The number of axes it must have (3 for images, 1 for labels).

    Raises
    ------
    DataError
        If the file is not gzipped, is of another kind, or is cut short.

    References
    ----------
    LeCun, Cortes & Burges, "The MNIST database", section "File formats".

    Examples
    --------
    >>> import gzip
    >>> decode_idx(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 7])), "labels", 1)
    tensor([5, 7], dtype=torch.uint8)
    """
    try:
        raw = gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} cannot be unpacked: {error}.") from error
    expected = bytes([0, 0, _UNSIGNED_BYTES, axes])
    if raw[:4] != expected:
        raise DataError(
            f"{name} begins with the bytes {raw[:4].hex(' ')}, but an IDX file with "
            f"{axes} axes of unsigned bytes begins with {expected.hex(' ')}."
        )
    header = 4 + 4 * axes
    sizes = _sizes(raw[4:header], name, axes)
    if len(raw) - header != math.prod(sizes):
        raise DataError(
            f"{name} holds {len(raw) - header} values, but its header promises "
            f"{' x '.join(map(str, sizes))}."
        )
    # A bytearray, because torch warns about memory that it cannot write to.
    values = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return values[header:].reshape(sizes)


def _sizes(header: bytes, name: str, axes: int) -> tuple[int, ...]:
    try:
        return struct.unpack(f">{axes}I", header)
    except struct.error as error:
        raise DataError(f"{name} ends inside its header.") from error
