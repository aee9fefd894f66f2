"""Hosts by their names: which of them only this machine can reach."""

from __future__ import annotations

from ipaddress import ip_address


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def names_this_machine(header: str) -> bool:
    """Whether an HTTP Host header means this machine. A web page's own name, pointed here, does not (DNS rebinding)."""
    name = header.rsplit(":", 1)[0] if not header.endswith("]") else header
    return is_loopback(name.strip("[]"))
