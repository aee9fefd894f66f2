"""Finding stages: what a client asks of whoever knows the swarm, and tells it of those it was given."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection

from bsns.core.blocks import BlockRange
from bsns.core.errors import BsnsError
from bsns.core.ids import PeerId
from bsns.routing.chain import Route

FindRoute = Callable[[int, Collection[PeerId], BlockRange | None, bool], Awaitable[Route]]
"""Chooses stages for a range (None: for all blocks) with room for so many tokens, avoiding these peers; among those
known already unless the last says that they are to be asked for again.

Raises MissingBlocks, CacheFull."""
ChooseCodec = Callable[[PeerId | None, PeerId | None], str]
"""Chooses the codec (protocol.codecs) of what one peer sends another; None is the client itself."""
Release = Callable[[Route], None]
"""Told of chosen stages when their session has ended, could not be opened, or has lost them."""
Blame = Callable[[PeerId, BsnsError], None]
"""Told of every stage that failed, and how."""
