"""Reading IDX files, the format of MNIST (http://yann.lecun.com/exdb/mnist/), plain or gzipped.

An IDX file is two zero bytes, a byte for the element type, a byte for the number of dimensions, the dimensions as
big-endian 32-bit integers, and the elements.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from experiments.errors import UserError

UNSIGNED_BYTE = 0x08  # the only element type that the data sets here use


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read a uint8 array with `dimensions` dimensions; UserError if the file is no such thing or is cut short."""
    content = _content(path)
    header = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, UNSIGNED_BYTE, dimensions]) or len(content) < header:
        raise UserError(
            f"{path} is not an IDX file of {dimensions}-dimensional bytes (it starts with"
            f" {content[:4].hex() or 'nothing'}, not 000008{dimensions:02x}): download it again"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise UserError(
            f"{path} holds {len(content) - header} bytes of data where its header announces {math.prod(shape)}"
            f" (shape {shape}): it is truncated or damaged, download it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _content(path: Path) -> bytes:
    """The bytes of a file, decompressed if they are gzipped."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path} ({error}): download it again, or name another directory") from None
