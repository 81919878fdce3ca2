"""Small gray images in a record, and in a picture: as text of 16 shades, which keeps the rows short."""

import base64
import zlib

import numpy as np
from matplotlib.axes import Axes

SHADES = 15


def pack(images: np.ndarray) -> str:
    """Images [n, height, width] in [0, 1] as text."""
    return base64.b64encode(zlib.compress(np.round(images * SHADES).astype(np.uint8).tobytes(), 9)).decode()


def unpack(text: str, shape: tuple[int, int]) -> np.ndarray:
    """The images [n, *shape] in [0, 1] that were packed."""
    found = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    return found.reshape(-1, *shape) / SHADES


def strip(ax: Axes, images: np.ndarray, left: str, right: str = "") -> None:
    """One row of images [n, height, width] side by side, with words on both sides."""
    framed = np.pad(images, ((0, 0), (1, 1), (1, 1)), constant_values=0.5)
    ax.imshow(np.hstack(framed), cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    for place, align, words in ((-0.01, "right", left), (1.01, "left", right)):
        ax.text(place, 0.5, words, transform=ax.transAxes, ha=align, va="center", fontsize=10)
