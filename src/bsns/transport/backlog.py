"""Backlogs: how much of what a stream was given its other end has not taken, as far as the system tells."""

from __future__ import annotations

import asyncio
import socket
import struct
import sys

try:
    import fcntl
    import termios
except ImportError:  # no POSIX system: what lies in the kernel's hands is not seen
    fcntl = None  # type: ignore[assignment]

SO_NWRITE = 0x1024
"""Darwin's, in its sys/socket.h; Python has no name for it."""

_INT = struct.Struct("i")


def backlog(transport: asyncio.Transport | asyncio.WriteTransport) -> int:
    """Bytes that wait in this process, or that the kernel still holds: of TCP all that the other host has not
    acknowledged."""
    waiting = transport.get_write_buffer_size()
    raw = transport.get_extra_info("socket")
    if raw is None or fcntl is None or raw.fileno() < 0:
        return waiting
    try:
        if sys.platform == "darwin":
            return waiting + raw.getsockopt(socket.SOL_SOCKET, SO_NWRITE)
        held: bytes = fcntl.ioctl(raw.fileno(), termios.TIOCOUTQ, bytes(_INT.size))
    except OSError:
        return waiting
    return waiting + int(_INT.unpack(held)[0])
