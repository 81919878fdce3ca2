"""Reading pickles of numpy arrays that strangers wrote: nothing else in them is ever called."""

import pickle
from gzip import GzipFile
from typing import Any, BinaryIO

import numpy as np

# What numpy pickles an array as: a call of this function, the class and the element type.
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, where only numpy arrays are admitted")
        return ADMITTED[module, name]


def load_arrays(file: BinaryIO | GzipFile) -> Any:
    """The numpy arrays, numbers, bytes, lists, tuples and dicts in a pickle; strings of Python 2 come as bytes.

    Raises:
      pickle.UnpicklingError: the pickle wants anything else, or is damaged.
    """
    try:
        return _ArrayUnpickler(file, encoding="bytes").load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle makes the interpreter of its instructions raise almost anything
        raise pickle.UnpicklingError(f"it is damaged ({type(error).__name__}: {error})") from None
