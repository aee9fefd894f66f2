"""The command's own standard streams, whatever it was started with."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper


def open_missing() -> None:
    """Open what was closed, on nothing. Else the next socket would become standard output, where libuv aborts."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(opened, True)
    os.close(opened)
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115  open to the end


def replace_what_cannot_be_encoded() -> None:
    """An answer may hold any character; one that the terminal's encoding lacks becomes a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
