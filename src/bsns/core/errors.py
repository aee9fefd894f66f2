"""Every failure that can reach a person or a peer, each with its remedy.

BsnsError
├── UserError           tell the user      the input has to change
│   ├── ModelNotFound · CorruptModel · UnsupportedModel
│   ├── BadRange · BadOption · NotEnoughMemory · DiskFull · PortInUse
│   ├── BadSnapshot · BadGraph
│   ├── InviteInvalid · InviteExpired · WrongSwarm
│   └── PromptTooLong
├── SwarmError          wait or add nodes  the swarm cannot serve this now
│   ├── MissingBlocks · NoSuchSwarm
├── PeerError           try another peer   this peer cannot serve this now
│   ├── PeerUnreachable · PeerLost · PeerTimedOut · PeerSlow · PeerLeaving
│   ├── CacheFull · NotHere · PeerFailed
│   └── CacheTooSmall, which is a CacheFull that no waiting mends
├── SessionError        reopen and replay  the stage no longer has this session's state
│   ├── UnknownSession · PositionGap
└── ProtocolError       ban the peer       it does not speak the protocol, or must not
    ├── BadFrame · FrameTooLarge · BadTensor · NotAMember · VersionMismatch
    └── NotTheOrchestrator · StalePlan

A failure crosses the wire as its class's `code` and its message; `error_from_wire` rebuilds it. An unknown code
becomes PeerFailed, so that a newer peer's error is still a typed one.
"""

from __future__ import annotations

import enum
from typing import ClassVar, Self

from bsns.core.ids import PeerId


class Remedy(enum.Enum):
    """What the receiver of a failure should do next."""

    TELL_USER = "tell the user"
    WAIT = "wait or add nodes"
    OTHER_PEER = "try another peer"
    REPLAY = "reopen and replay"
    BAN = "ban the peer"


class BsnsError(Exception):
    """A failure with a one-line message that says what to do."""

    remedy: ClassVar[Remedy] = Remedy.TELL_USER
    peer: PeerId | None = None
    """Which peer is to blame, where that is known: whoever looks for another route avoids it."""

    def about(self, peer: PeerId) -> Self:
        """The same error, blaming `peer` unless somebody is blamed already."""
        self.peer = self.peer or peer
        return self

    @property
    def code(self) -> str:
        return type(self).__name__

    @property
    def message(self) -> str:
        return str(self)


class UserError(BsnsError):
    """What the user asked for cannot be done as asked."""


class ModelNotFound(UserError):
    """No such built-in name, directory, GGUF file or hub id."""


class CorruptModel(UserError):
    """The model's files are truncated, unreadable or contradict each other."""


class UnsupportedModel(UserError):
    """The architecture cannot be cut by this engine without changing its result."""


class BadRange(UserError):
    """A block range that is empty, negative or outside the model."""


class BadOption(UserError):
    """An option's value makes no sense."""


class NotEnoughMemory(UserError):
    """Not even one block and its cache fit, or what was to be loaded found no memory."""


class DiskFull(UserError):
    """A disk has no room for what has to be written."""


class BadSnapshot(UserError):
    """A snapshot or a model's shape that contradicts itself or holds impossible figures."""


class BadGraph(UserError):
    """An operator graph with a cycle, unknown operators or impossible figures."""


class PortInUse(UserError):
    """The port asked for belongs to another process."""


class InviteInvalid(UserError):
    """The invite is malformed or its signature does not hold."""


class InviteExpired(UserError):
    """The invite's time is over; ask the swarm's founder for a new one."""


class WrongSwarm(UserError):
    """The invite and the peer belong to different swarms."""


class PromptTooLong(UserError):
    """Prompt plus answer exceed the model's context."""


class SwarmError(BsnsError):
    """The swarm as a whole cannot serve the request now."""

    remedy = Remedy.WAIT


class MissingBlocks(SwarmError):
    """Some blocks of the model are held by nobody."""


class NoSuchSwarm(SwarmError):
    """None of the invite's bootstrap addresses answers."""


class PeerError(BsnsError):
    """One peer cannot serve the request now."""

    remedy = Remedy.OTHER_PEER


class PeerUnreachable(PeerError):
    """No stream to the peer could be opened."""


class PeerLost(PeerError):
    """The stream to the peer closed under a request."""


class PeerTimedOut(PeerError):
    """The peer did not answer within the deadline."""


class PeerSlow(PeerError):
    """The peer answers, but computes far more slowly than it did."""


class PeerLeaving(PeerError):
    """The peer is about to leave, and serves its sessions only until they have gone elsewhere."""


class CacheFull(PeerError):
    """The peer's KV cache has no room for the session."""


class CacheTooSmall(CacheFull):
    """The peer's KV cache has no room for the session even when it is empty."""


class NotHere(PeerError):
    """The peer does not hold the blocks, or not of this model."""


class PeerFailed(PeerError):
    """The peer reported a failure of its own."""


class SessionError(BsnsError):
    """The stage has lost, or never had, the session's state."""

    remedy = Remedy.REPLAY


class UnknownSession(SessionError):
    """A step for a session that this stage does not hold."""


class PositionGap(SessionError):
    """A step that starts beyond the end of what the stage has seen."""


class ProtocolError(BsnsError):
    """The peer broke the protocol."""

    remedy = Remedy.BAN


class BadFrame(ProtocolError):
    """A frame that does not decode to a known message."""


class FrameTooLarge(ProtocolError):
    """A length beyond the protocol's limits."""


class BadTensor(ProtocolError):
    """A tensor of the wrong name, dtype, shape or size."""


class NotAMember(ProtocolError):
    """No valid membership certificate for this swarm."""


class VersionMismatch(ProtocolError):
    """The peer speaks another version of the protocol."""


class NotTheOrchestrator(ProtocolError):
    """A plan from a node that does not hold the lease."""


class StalePlan(ProtocolError):
    """A plan older than the one in force."""


def _leaves(kind: type[BsnsError]) -> list[type[BsnsError]]:
    return [leaf for child in kind.__subclasses__() for leaf in (child, *_leaves(child))]


MAX_MESSAGE = 1000
"""Letters of a peer's message that are passed on."""
ERRORS: dict[str, type[BsnsError]] = {kind.__name__: kind for kind in _leaves(BsnsError)}


def error_from_wire(code: str, message: str, peer: PeerId | None = None) -> BsnsError:
    """The error a peer reported, rebuilt from its code; PeerFailed for a code we do not know.

    The message is cut to a readable length, and what could play tricks on a terminal is left out.
    """
    kind = ERRORS.get(code)
    error = kind(_line(message)) if kind is not None else PeerFailed(_line(f"{code[:64]}: {message}"))
    error.peer = peer
    return error


def _line(text: str) -> str:
    return "".join(letter for letter in " ".join(text[:MAX_MESSAGE].split()) if letter.isprintable())
