"""The number of threads of numpy's BLAS, which numpy itself does not offer."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

__all__ = ["set_blas_threads"]

_SYMBOLS = ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_", "openblas_set_num_threads")


def set_blas_threads(count: int) -> bool:
    """Let the OpenBLAS of this process use `count` threads; False if none is found (another BLAS, another system).

    Holds for the whole process: an OpenBLAS has one pool.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return False
    for path in sorted(set(re.findall(r"(/\S*openblas\S*\.so\S*)", maps.read_text()))):
        library = ctypes.CDLL(path)
        for symbol in _SYMBOLS:
            function = getattr(library, symbol, None)
            if function is not None:
                function.argtypes, function.restype = [ctypes.c_int], None
                function(count)
                return True
    return False
