"""Looking at a swarm without using it: whoever is there, whatever model they serve."""

from __future__ import annotations

from bsns.client.links import Links
from bsns.node.peer import Peer
from bsns.node.view import NodeStatus, View


async def observe(invite: str) -> list[NodeStatus]:
    """Every node of the swarm, as announced and as it answers now. Raises as joining does."""
    peer = await Peer.join(invite, None)
    links = Links(peer.dial, lambda *_: None, lambda *_: None, lambda *_: None)
    try:
        return await View(peer.directory).status(links)
    finally:
        await links.close()
        await peer.close()
