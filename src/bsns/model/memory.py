"""Memory that was freed, and goes back to the system."""

from __future__ import annotations

import ctypes
import sys


def give_back_freed() -> None:
    """Hand memory that was freed back to the system: glibc keeps what loading took, as much as a block or two."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not every libc has it
        if trim is not None:
            trim(0)
