"""Plan records: drawn lots, and a lease with its plan, signed by the key inside its author's peer id. Pure."""

from __future__ import annotations

import hashlib
import math
import struct

import msgspec

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadFrame, NotTheOrchestrator, StalePlan
from bsns.core.ids import ModelId, PeerId, SwarmId
from bsns.core.snapshot import MAX_BLOCKS
from bsns.protocol.plans import PlanRecord
from bsns.swarm.election import Lease
from bsns.swarm.envelopes import Envelope
from bsns.swarm.identity import SIGNATURE_BYTES, Identity, public_key_of, verify
from bsns.swarm.membership import Membership
from bsns.swarm.records import DTYPES

MAX_PLAN_BYTES = 256 * 1024
MAX_ASSIGNMENTS = 4096
MAX_LEASE_S = 120.0
"""A lease may not be longer, whatever period its swarm has chosen."""
MAX_SKEW_S = 60.0
"""How far ahead of our clock a plan may have been issued."""

PLAN = Envelope("plan", b"bsns/plan/1", MAX_PLAN_BYTES, msgspec.msgpack.Decoder(PlanRecord), lambda plan: plan.author)


def draw_statement(swarm: SwarmId, model: ModelId, term: int) -> bytes:
    """What a node signs to draw its lot for a term: the signature is the draw."""
    return b"bsns/draw/1" + swarm.encode() + model.encode() + struct.pack("<Q", term)


def draw(identity: Identity, swarm: SwarmId, model: ModelId, term: int) -> bytes:
    """Our draw for a term. Ed25519 signs deterministically (RFC 8032), so an honest node has one for each."""
    return identity.sign(draw_statement(swarm, model, term))


def lot_of(peer: PeerId, swarm: SwarmId, model: ModelId, term: int, drawn: bytes) -> bytes | None:
    """The lot, 32 bytes of which the least wins, in a node's draw for a term; None if it is not its draw for that."""
    try:
        sound = 0 <= term < 2**63 and verify(public_key_of(peer), draw_statement(swarm, model, term), drawn)
    except BadFrame:
        return None
    return hashlib.sha256(drawn).digest() if sound else None


def lease_of(record: PlanRecord) -> Lease:
    """The lease in a record that has been opened."""
    return Lease(record.author, record.term, hashlib.sha256(record.lot).digest(), record.expires_s)


def sign_plan(record: PlanRecord, membership: Membership) -> bytes:
    """Our own plan as the bytes that travel. Raises BadFrame or FrameTooLarge for one that others would refuse."""
    check_plan(record)
    return PLAN.seal(record, membership)


def open_plan(signed: bytes, membership: Membership, now_s: float, author: PeerId | None = None) -> PlanRecord:
    """The plan in a signed one, if everything about it holds; `author`, when given, must be whose it is.

    Whether its author holds the lease is for `Reign` to say. Raises FrameTooLarge, NotAMember, StalePlan once it has
    expired, NotTheOrchestrator for a lot that is not the author's for this term, BadFrame for the rest.
    """
    record = PLAN.open(signed, membership, now_s, author)
    check_plan(record)
    if not now_s < record.expires_s:
        raise StalePlan(f"the plan of {record.author} has expired")
    # so that whoever claims a term far ahead cannot use up the numbers: in a second there is a next one
    if record.issued_s > now_s + MAX_SKEW_S or record.term > now_s + MAX_SKEW_S:
        raise BadFrame(f"the plan of {record.author} comes from the future")
    if lot_of(record.author, membership.swarm, record.model, record.term, record.lot) is None:
        raise NotTheOrchestrator(f"{record.author} shows a lot that it did not draw for term {record.term}")
    return record


def check_plan(record: PlanRecord) -> None:
    """Raises BadFrame unless every value is possible and every text short and printable."""
    public_key_of(record.author)
    _require(0 < len(record.model) <= 128 and record.model.isprintable(), record, "the model's id")
    _require(record.dtype in DTYPES, record, f"the dtype, which is none of {', '.join(DTYPES)}")
    _require(0 < record.block_count <= MAX_BLOCKS, record, "the number of blocks")
    _require(1 <= record.term < 2**53 and 0 <= record.version < 2**53, record, "the term or the version")
    _require(len(record.lot) == SIGNATURE_BYTES, record, "the lot")
    _require(all(0 <= weight < math.inf for weight in record.objective), record, "the objective")
    costs = (record.bottleneck_s, record.latency_s, record.lower_bound_s)
    _require(all(0 <= cost < math.inf for cost in costs), record, "a cost")
    life_s = record.expires_s - record.issued_s
    _require(0 <= record.issued_s < math.inf and 0 < life_s <= MAX_LEASE_S, record, "its times")
    _require(len(record.assignments) <= MAX_ASSIGNMENTS, record, f"more than {MAX_ASSIGNMENTS} assignments")
    _require(record.version > 0 or not record.assignments, record, "a plan without a version")
    for one in record.assignments:
        public_key_of(one.peer)
        _require(0 <= one.start < one.end <= record.block_count, record, "an impossible block range")
    _require(len({one.peer for one in record.assignments}) == len(record.assignments), record, "a node assigned twice")


def ranges_of(record: PlanRecord) -> dict[PeerId, BlockRange]:
    """Who shall hold what under a plan record."""
    return {one.peer: BlockRange(one.start, one.end) for one in record.assignments}


def range_of(record: PlanRecord, peer: PeerId) -> BlockRange | None:
    """What one node shall hold; None if the plan leaves it out."""
    return next((BlockRange(one.start, one.end) for one in record.assignments if one.peer == peer), None)


class Reign:
    """Which plan a node obeys: the newest of whoever holds the lease, and never an older one after it."""

    def __init__(self) -> None:
        self.plan: PlanRecord | None = None
        """The last accepted, which may be expired."""

    def accept(self, record: PlanRecord, holder: PeerId | None) -> bool:
        """Take up an opened plan; whether it is new. `holder` is who holds the lease now.

        Raises NotTheOrchestrator unless its author does, StalePlan for one of an earlier term or version.
        """
        if record.author != holder:
            raise NotTheOrchestrator(f"{record.author} does not hold the lease; {holder or 'nobody'} does")
        known = self.plan
        if known is None:
            self.plan = record
            return True
        # within a term another author may come after: two claimed it, and the better lot has won meanwhile
        same_author = record.author == known.author
        older = record.term < known.term or (
            record.term == known.term and same_author and record.version < known.version
        )
        if older:
            raise StalePlan(
                f"plan {record.term}.{record.version} of {record.author} is older than {known.term}.{known.version}"
            )
        new = (record.term, record.author, record.version) != (known.term, known.author, known.version)
        if new or record.expires_s >= known.expires_s:
            self.plan = record
        return new


def _require(holds: bool, record: PlanRecord, problem: str) -> None:
    if not holds:
        raise BadFrame(f"the plan of {record.author} is not sane: {problem}")
