"""Tuning of glibc's allocator, without which CPU training spends its time in page faults.

A step allocates and frees temporaries of megabytes. By default glibc gives such blocks back to the kernel at
once and faults every page in again at the next step, which was seen to cost up to ten times the computation.
"""

from __future__ import annotations

import ctypes
import os
import platform

# Option numbers of mallopt(3) in glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
KEEP_BYTES = 1 << 30
TOP_PAD_BYTES = 64 << 20


def tune_allocator() -> str | None:
    """Keep freed memory in the process: no mmap for large blocks, trim only above 1 GiB of free top.

    Works on the running process, so nothing has to be restarted and child processes are not affected. Environment
    settings of the user (MALLOC_*, GLIBC_TUNABLES, a preloaded allocator) are left alone.

    Returns:
        One line that says what was done, None if nothing was (not Linux with glibc, or the user tuned it).
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return None
    own = [name for name in os.environ if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD")]
    if own:
        return None
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return None
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, KEEP_BYTES), (M_TOP_PAD, TOP_PAD_BYTES))
    done = all(mallopt(option, value) == 1 for option, value in settings)
    return "glibc keeps freed memory (mallopt: no mmap, trim above 1 GiB)" if done else None
