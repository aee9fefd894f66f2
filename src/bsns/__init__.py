"""BSNS: run models too large for one machine across the machines you already have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bsns.core.errors import BsnsError

if TYPE_CHECKING:
    from bsns.client.sampling import SamplingOptions
    from bsns.node.client import Client, SyncClient

__version__ = "0.1.0"
__all__ = ["BsnsError", "Client", "SamplingOptions", "SyncClient", "__version__"]


def __getattr__(name: str) -> Any:
    # loaded when first used: `import bsns` must not cost the seconds that torch takes
    if name in ("Client", "SyncClient"):
        from bsns.node import client

        return getattr(client, name)
    if name == "SamplingOptions":
        from bsns.client.sampling import SamplingOptions

        return SamplingOptions
    raise AttributeError(f"module 'bsns' has no attribute {name!r}")
