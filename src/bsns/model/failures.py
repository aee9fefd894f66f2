"""Failures of whatever reads and writes models, as typed errors that say what to do.

Libraries raise what they like, and the system what it must: out of memory and out of disk are no damage to a file.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from bsns.core.errors import CorruptModel, DiskFull, NotEnoughMemory, UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
# In torch's words, on a CPU and on a GPU, and the system's; a library's own exception has no number.
_NO_MEMORY = ("can't allocate memory", "out of memory", os.strerror(errno.ENOMEM).lower(), "memoryerror")
_NO_DISK = tuple(os.strerror(number).lower() for number in _FULL)


def is_no_memory(error: Exception | str) -> bool:
    """Whether memory ran out, by an exception or by what a process said of it."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return any(words in text.lower() for words in _NO_MEMORY)


def is_no_disk(error: Exception | str) -> bool:
    """Whether a disk, or what may be used of it, is full."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(words in str(error).lower() for words in _NO_DISK)


def failure(error: Exception, path: Path) -> UserError:
    """What the failed reading or writing of `path` means: NotEnoughMemory, DiskFull, or else CorruptModel."""
    if is_no_memory(error):
        return NotEnoughMemory(f"there is no memory left to load {path}; free some, or hold fewer blocks")
    if is_no_disk(error):
        return DiskFull(f"the disk is full, so that {path} cannot be loaded or written; free some of it")
    return CorruptModel(f"{path} cannot be loaded: {first_line(error)}; fetch it again")


def first_line(error: Exception) -> str:
    """An exception in a line."""
    return str(error).strip().split("\n")[0] or type(error).__name__
