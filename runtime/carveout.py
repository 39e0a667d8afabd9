"""How a multiprocessor splits its memory between L1 and shared memory, kernel by kernel.

A kernel that prefers another split than the one before it "may insert a device-side synchronization point" (CUDA Driver API,
cuFuncSetCacheConfig): neighbours that want different ones do not overlap.
"""

from __future__ import annotations

import ctypes
import functools
import weakref

PREFERRED_SHARED_MEMORY_CARVEOUT = 9  # CUfunction_attribute of cuda.h


asked: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # kernel -> percent


def share_memory(kernel, percent: int | None) -> None:
    """Asks, once, for `percent` of a multiprocessor's memory as shared memory whenever `kernel` runs. A wish: the driver takes
    the next larger split that it knows, and never less than a program needs.

    kernel: what Triton's launch gave back; None, where nothing was launched.  percent: None leaves it to the driver.
    """
    if kernel is None or percent is None or asked.get(kernel) == percent:
        return
    function = ctypes.c_void_p(kernel.function)
    error = driver().cuFuncSetAttribute(function, PREFERRED_SHARED_MEMORY_CARVEOUT, ctypes.c_int(percent))
    assert error == 0, f"CUDA error {error} from cuFuncSetAttribute"
    asked[kernel] = percent


@functools.cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
