"""The inference conversation: a session's life on a stage.

    client → every stage     Open      answered by Opened or Failure
    client → first stage     Step      a step's hidden states enter the route
    stage  → next stage      Step      …walk it…
    last stage → client      Result    …and return directly
    client → some stages     Reroute   a neighbour was lost and is replaced; answered by Rerouted
    client → some stages     Mirror    a spare is to get what the next stage gets; answered by Mirrored
    client → every stage     Where     how far a session has come there; answered by There
    client → every stage     Resize    between two answers, and before the next; answered by Resized
    client → every stage     Close     answered by Closed
    stage  → client          Failure   anything that went wrong with a session, with a class of core.errors as code

A frame's Step or Result may carry many sessions: `parts` name them, and the rows of the tensor `hidden`, of shape
(rows, hidden size), belong to the parts in order; its codec is the one their sessions were opened with. The rule that
makes steps idempotent: *a step at position p overwrites everything from p on*.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from bsns.core.ids import ModelId, PeerId, SessionId
from bsns.core.memory import MemoryUse
from bsns.core.plan import block_times
from bsns.protocol.tensors import TensorSpec

MAX_PARTS = 1024
MAX_ROWS_PER_PART = 512
"""As many as a batch takes: a longer step would keep every other session waiting for it."""
MAX_UNDER_WAY = 4
"""Steps of one session whose rows the client may want while none of them has come back: a replay brings so many."""
MAX_DEPTH = 64
"""The most stages a route may have: what each notes in a step must fit the frame's header."""


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Reserve `max_tokens` of KV cache for a session on blocks [start, end) of a model."""

    session: SessionId
    model: ModelId
    start: int
    end: int
    dtype: str
    max_tokens: int
    depth: int
    """How many stages the route has."""
    next_peer: PeerId | None
    """Who gets the output: the next stage, or nobody, which means the client that opened."""
    next_addresses: tuple[str, ...] = ()
    previous_peer: PeerId | None = None
    """Who may send steps besides the client that opened."""
    passes_from: int = 0
    """Outputs before this position are kept for a replay but not passed on: whoever comes after has them. For a stage
    that takes a lost one's place."""
    takes: str = "raw"
    """The codec (protocol.codecs) of what comes to this stage, and of what it sends on."""
    gives: str = "raw"
    waits: bool = False
    """Whether the client stands in line if there is no room: who does so and asks again gets room before who comes
    later."""
    trace: str = ""
    """The client's span (a W3C traceparent), below which the stage may put its own; empty: it traces nothing."""
    at_once: int = 1
    """How many stages of the route can compute at the same time; tells a stage how finely to cut its batches."""


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    session: SessionId
    cache_tokens_left: int


class Passed(NamedTuple):
    """How a step passed a stage."""

    inside_ms: float
    """Inside the node."""
    computing_ms: float
    """Of those, spent computing the batch it was in."""
    rows: int
    """Of the batch."""

    @property
    def alone_ms(self) -> float:
        """What computing one row would have taken, by and large."""
        return self.computing_ms / block_times(max(1, self.rows))


class Part(msgspec.Struct, frozen=True, array_like=True):
    """One session's share of a step: `rows` new tokens at positions `position` … `position + rows - 1`."""

    session: SessionId
    position: int
    rows: int
    wanted: int
    """How many of the last rows the client wants back; 0 for all but the last chunk of a prefill."""
    hops: tuple[Passed, ...] = ()
    """For each stage passed so far."""
    turn: int = 0
    """A number that no other step has whose rows the client wants: of guesses that were wrong, what a replay brings
    once more is told from what came after by nothing else."""


class Step(msgspec.Struct, frozen=True, tag="step"):
    parts: tuple[Part, ...]
    tensors: tuple[TensorSpec, ...]


class Result(msgspec.Struct, frozen=True, tag="result"):
    """What the last stage returns: for each part only the `wanted` last rows, which may be none."""

    parts: tuple[Part, ...]
    tensors: tuple[TensorSpec, ...]


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    """A failed Open, step or session; `about` is the peer to blame, if it is another than the one that tells."""

    session: SessionId
    code: str
    message: str
    about: PeerId | None = None


class Reroute(msgspec.Struct, frozen=True, tag="reroute"):
    """The session's neighbours from now on."""

    session: SessionId
    previous_peer: PeerId | None
    next_peer: PeerId | None
    next_addresses: tuple[str, ...] = ()
    again: bool = False
    """Whether the next stage is to be sent again what it lacks."""
    position: int = 0
    """With `again`: a next stage that was mirrored to is sent what comes from here on, or from where its mirror has
    come to, if that is less. Any other is sent everything."""
    passes_from: int | None = None
    """For a spare: the first position whose output it is to pass on from now on."""


class Rerouted(msgspec.Struct, frozen=True, tag="rerouted"):
    """The neighbours are as asked, unless `code` says what came in the way."""

    session: SessionId
    code: str = ""
    message: str = ""
    about: PeerId | None = None


class Mirror(msgspec.Struct, frozen=True, tag="mirror"):
    """Send a spare for the next stage what the next stage gets: what has been sent on from `position` on, and whatever
    follows. In place of the mirror before; with no peer there is none any more."""

    session: SessionId
    peer: PeerId | None
    addresses: tuple[str, ...] = ()
    position: int = 0


class Mirrored(msgspec.Struct, frozen=True, tag="mirrored"):
    """The mirror to `peer` is as asked, unless `code` says what came in the way."""

    session: SessionId
    peer: PeerId | None
    code: str = ""
    message: str = ""
    about: PeerId | None = None


class Where(msgspec.Struct, frozen=True, tag="where"):
    """Ask how far a session has come on this stage: what a client does when a step is overdue."""

    session: SessionId


class There(msgspec.Struct, frozen=True, tag="there"):
    session: SessionId
    given: int
    """How many tokens the stage has been given; −1 if it does not have the session."""
    done: int
    """How many of them it has computed."""
    onward: tuple[int, int] = (0, 0)
    """Bytes that it has sent to the next stage, of whatever session, and those of them that its host has taken: a slow
    way, if these become more."""
    batches: int = 0
    """How many batches the node has computed, of whatever sessions: it is busy, if these become more."""


class Resize(msgspec.Struct, frozen=True, tag="resize"):
    """Reserve `max_tokens` of cache for a session that is open, in place of what it has.

    One that is `parked` is between two answers: it keeps what it holds as long as nobody else needs the room, and takes
    no steps until it is resized again.
    """

    session: SessionId
    max_tokens: int
    keep: int
    """How many of the first tokens still stand: the rest is forgotten, in caches and journals."""
    parked: bool = False
    trace: str = ""
    """As in `Open`: the client's span from now on."""


class Resized(msgspec.Struct, frozen=True, tag="resized"):
    """The session has what was asked for, unless `code` says what came in the way."""

    session: SessionId
    code: str = ""
    message: str = ""
    about: PeerId | None = None


class Close(msgspec.Struct, frozen=True, tag="close"):
    session: SessionId


class Closed(msgspec.Struct, frozen=True, tag="closed"):
    session: SessionId
    cache_tokens_left: int


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    nonce: int


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    nonce: int


class Describe(msgspec.Struct, frozen=True, tag="describe"):
    """Ask a node for its present numbers."""


class Description(msgspec.Struct, frozen=True, tag="description"):
    """A node's present numbers, fresher than its record."""

    start: int
    end: int
    sessions: int
    cache_tokens: int
    cache_tokens_left: int
    block_time_s: float
    rss_bytes: int
    steps: int
    rows: int
    memory: MemoryUse = MemoryUse()
    waiting: int = 0
    """Steps that wait for a batch."""
