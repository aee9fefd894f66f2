"""Records: a node's card, signed by the key inside its peer id, and opened with every value checked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from bsns.core.errors import BadFrame
from bsns.core.ids import PeerId
from bsns.core.snapshot import LEAST_BLOCK_TIME_S, LEAST_BYTES_PER_S, MAX_BLOCKS, MAX_PRICE, MAX_TIME_S
from bsns.protocol.membership import Signed
from bsns.protocol.records import LinkRecord, NodeRecord
from bsns.swarm.envelopes import Envelope
from bsns.swarm.identity import SIGNATURE_BYTES, public_key_of
from bsns.swarm.membership import Membership

MAX_RECORD_BYTES = 4096
MAX_LINKS = 24
"""Links that a record may carry: beside the rest they fit MAX_RECORD_BYTES."""
MAX_OTHERS = 2
MAX_LIFETIME_S = 900.0
"""A record may not outlive this; a stolen or forgotten one is gone by then."""
MAX_ADDRESSES = 16
MAX_ADDRESS = 256
MAX_TOKENS = 2**40
MAX_BYTES = 2**50
MACHINE_BYTES = 16
STATES = ("joining", "serving", "leaving")
DTYPES = ("float32", "bfloat16", "float16")

RECORD = Envelope(
    "record", b"bsns/record/1", MAX_RECORD_BYTES, msgspec.msgpack.Decoder(NodeRecord), lambda record: record.peer
)


def sign_record(record: NodeRecord, membership: Membership) -> bytes:
    """Our own record as the bytes that travel. Raises BadFrame or FrameTooLarge for one that others would refuse."""
    check_record(record)
    return RECORD.seal(record, membership)


def with_links(record: NodeRecord, links: Sequence[LinkRecord], membership: Membership) -> NodeRecord:
    """The record with as many of `links`, the most useful of which come first, as it has room for beside the rest."""
    bare = msgspec.structs.replace(record, links=())
    unsigned = Signed(msgspec.msgpack.encode(bare), bytes(SIGNATURE_BYTES), membership.certificate)
    room = MAX_RECORD_BYTES - len(msgspec.msgpack.encode(unsigned)) - 16  # lengths take more bytes as they grow
    kept = 0
    for link in links[:MAX_LINKS]:
        room -= len(msgspec.msgpack.encode(link))
        if room < 0:
            break
        kept += 1
    return msgspec.structs.replace(record, links=tuple(links[:kept]))


def open_record(signed: bytes, membership: Membership, now_s: float, author: PeerId | None = None) -> NodeRecord:
    """The record in a signed one, if everything about it holds; `author`, when given, must be whose it is.

    Raises FrameTooLarge, NotAMember, or BadFrame with the reason: forged, expired, outliving its certificate, insane.
    """
    record = RECORD.open(signed, membership, now_s, author)
    check_record(record)
    if not now_s < record.expires_s:
        raise BadFrame(f"the record of {record.peer} has expired")
    if record.expires_s > now_s + MAX_LIFETIME_S:
        raise BadFrame(f"the record of {record.peer} claims more than {MAX_LIFETIME_S:g} s of life")
    return record


def check_record(record: NodeRecord) -> None:
    """Raises BadFrame unless every value is possible and every text is short and printable."""
    public_key_of(record.peer)
    texts = {
        "model": (record.model, 128),
        "model_name": (record.model_name, 256),
        "state": (record.state, 16),
        "device": (record.device, 64),
        "executor": (record.executor, 64),
        "version": (record.version, 64),
        "quant": (record.quant, 16),
        "kv": (record.kv, 16),
    }
    for name, (text, limit) in texts.items():
        _require(len(text) <= limit and text.isprintable(), record, f"{name} is too long or unprintable")
    _require(record.state in STATES, record, f"state is none of {', '.join(STATES)}")
    _require(record.dtype in DTYPES, record, f"dtype is none of {', '.join(DTYPES)}")
    _require(len(record.addresses) <= MAX_ADDRESSES, record, f"more than {MAX_ADDRESSES} addresses")
    for address in record.addresses:
        sane = len(address) <= MAX_ADDRESS and address.isascii() and address.isprintable() and address.startswith("/")
        _require(sane, record, "an address is not a multiaddress")
        own = "/p2p/" not in address or address.endswith(f"/p2p/{record.peer}")
        _require(own, record, "an address leads to another peer")
    _require(0 <= record.start < record.end <= record.block_count <= MAX_BLOCKS, record, "impossible block range")
    _require(0 <= record.threads <= 65536, record, "impossible number of threads")
    _require(0 <= record.cache_tokens_left <= record.cache_tokens <= MAX_TOKENS, record, "impossible cache size")
    _require(0 <= record.rss_bytes <= MAX_BYTES, record, "impossible memory")
    timed = LEAST_BLOCK_TIME_S <= record.block_time_s <= MAX_TIME_S
    _require(timed or record.block_time_s == 0, record, "impossible block time")
    for start, end in record.others:
        _require(0 <= start < end <= record.block_count, record, "impossible block range")
    _require(len(record.others) <= MAX_OTHERS, record, "too many ranges")
    _require(0 <= record.memory_bytes <= MAX_BYTES, record, "impossible memory")
    _require(0 <= record.baseline_bytes <= MAX_BYTES, record, "impossible memory")
    _require(0 <= record.sessions <= MAX_TOKENS, record, "impossible number of sessions")
    _require(0 <= record.prefill_time_s <= MAX_TIME_S, record, "impossible prefill time")
    _require(0 <= record.price <= MAX_PRICE, record, "impossible price")
    _require(len(record.machine) in (0, MACHINE_BYTES), record, "a machine's name of the wrong size")
    _require(0 < record.share <= 1, record, "an impossible share of its machine")
    _require(len(record.draw) in (0, SIGNATURE_BYTES), record, "a lot of the wrong size")
    _require(len(record.links) <= MAX_LINKS, record, f"more than {MAX_LINKS} links")
    for link in record.links:
        public_key_of(link.peer)
        timed = all(0 <= figure <= MAX_TIME_S for figure in (link.round_trip_s, link.spread_s))
        sane = timed and 0 <= link.measured_s < 1e12 and link.bytes_per_s >= LEAST_BYTES_PER_S
        _require(sane, record, "an impossible link")
    times = math.isfinite(record.started_s) and math.isfinite(record.expires_s)
    _require(times and 0 <= record.started_s <= record.expires_s, record, "impossible times")


def _require(holds: bool, record: NodeRecord, problem: str) -> None:
    if not holds:
        raise BadFrame(f"the record of {record.peer} is not sane: {problem}")
