"""The files of the daemon's sockets: their names say whose they are, and those of the dead are removed."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import psutil

PLACE = Path("/tmp")  # wherever temporary files are: a socket's path has to be short; names cannot be guessed


def prefix() -> str:
    """How the paths of this process's sockets begin. Removes what processes have left behind that were killed."""
    family = _family()
    for file in PLACE.glob(f"bsns-{family}-*-p2p*.sock"):
        number = file.name.split("-")[2]
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            with contextlib.suppress(OSError):  # another user's, or gone meanwhile
                file.unlink()
    return f"{PLACE}/bsns-{family}-{os.getpid()}-"


def _family() -> str:
    """The processes whose numbers we see: there are others, in containers that share the directory."""
    try:
        return re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:
        return "0"
