"""The C allocator's habits, in a process that trains: memory that is freed stays for the next step."""

import ctypes

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Keep freed memory in this process instead of giving it back to the system, whatever the size of its blocks.

    By default glibc gives the large blocks of activations and gradients back in every step and fetches them anew,
    page by page, for a tenth to a sixth of the time of a small network's step on a CPU (`benchmarks/speed/memory.py`).
    The process keeps its peak until it ends; `bitwright train` calls this, a training loop of one's own may.

    Returns:
        Whether the system's allocator knows such a setting (glibc on Linux); of no effect elsewhere.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
