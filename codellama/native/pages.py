"""Large pages for memory that is read from end to end again and again, such as weights.

A core that streams through pages of 4 KB stops at each to look where the next one is. This file knows nothing of what
is in the memory.
"""

import ctypes
import mmap

from torch import Tensor


def use_huge_pages(tensor: Tensor) -> bool:
    """Ask the system for large pages under a new CPU tensor, before anything is written to it.

    Returns:
        Whether it was advised so. The system may still give small pages, where large ones have run out.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - start
    if advice is None or length < mmap.PAGESIZE:
        return False
    assert tensor.device.type == "cpu"
    assert tensor.is_contiguous()
    madvise = ctypes.CDLL(None).madvise
    return bool(madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice)) == 0)
