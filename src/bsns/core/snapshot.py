"""Snapshots: the frozen view of a swarm that everything which decides reads; and a model's shape."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import msgspec

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadRange, BadSnapshot
from bsns.core.ids import ModelId, PeerId

SNAPSHOT_VERSION = 1
MAX_TIME_S = 1e6
LEAST_BLOCK_TIME_S = 1e-9
LEAST_BYTES_PER_S = 1.0
"""Figures beyond these are no measurements; sums and quotients of what lies within are finite."""
MAX_PRICE = 1e12
MAX_SIZE = 2.0**60
MAX_BLOCKS = 10_000
MAX_NAME = 200
MAX_KIND = 16
SHAPE_DTYPES = ("float32", "bfloat16", "float16", "int8", "int4")
"""Precisions that a shape file may name."""

Pair = tuple[PeerId, PeerId]


@dataclass(frozen=True, slots=True)
class Link:
    """A measured way between two peers, the same in both directions. Times in seconds, `bytes_per_s` may be inf."""

    round_trip_s: float
    bytes_per_s: float = math.inf
    spread_s: float = 0.0
    """Median absolute deviation of the round trips."""
    age_s: float = 0.0

    def transfer_s(self, size_bytes: float) -> float:
        """How long a message of this size takes, one way."""
        return self.round_trip_s / 2 + size_bytes / self.bytes_per_s


ASSUMED_LINK = Link(round_trip_s=0.02, bytes_per_s=12.5e6)
"""Of a way that neither was measured nor can be guessed from other links."""
ASSUMED_WORDS = f"a round trip of {ASSUMED_LINK.round_trip_s * 1e3:g} ms and {ASSUMED_LINK.bytes_per_s / 1e6:g} MB/s"


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as the snapshot shows it: how fast, how large, what it holds, what it costs."""

    peer: PeerId
    block_time_s: float
    """One average block for one new token."""
    memory_bytes: int
    """For weights and caches, beyond what the process takes without them."""
    prefill_time_s: float = 0.0
    """One average block for each prompt token of a chunk; 0 where unknown."""
    device: str = "cpu"
    dtype: str = "bfloat16"
    threads: int = 1
    held: tuple[BlockRange, ...] = ()
    serving: bool = True
    cache_tokens: int = 0
    cache_tokens_left: int = 0
    uptime_s: float = 0.0
    price: float = 0.0
    """Per token and block, in the swarm's own unit."""
    reputation: float = 1.0
    """0 to 1, which is the best."""
    attested: bool = False
    quant: str = "none"
    """What it keeps weights in, and keys and values: as they are computed with (`none`), or in fewer bits."""
    kv: str = "none"
    baseline_bytes: int = 0
    """What its process takes without blocks; 0 where unknown."""
    resident_bytes: int = 0
    """What its process takes now; 0 where unknown."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What planning has to know of a model. Sizes in bytes, at the dtype it runs in."""

    model: ModelId
    name: str
    block_bytes: tuple[int, ...]
    kv_bytes_per_token_per_block: int
    hidden_bytes: int
    """What a hop carries for one token."""
    block_work: tuple[float, ...] = ()
    """Each block's work beside the average block's; empty: all the same."""
    dtype: str = "bfloat16"
    quantised_block_bytes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    """What each block weighs where weights are kept in `int8` or `int4`; empty where that is not known."""
    quantised_kv_bytes: Mapping[str, int] = field(default_factory=dict, hash=False)
    """The same of `kv_bytes_per_token_per_block`."""

    @property
    def block_count(self) -> int:
        return len(self.block_bytes)

    @property
    def work(self) -> tuple[float, ...]:
        return self.block_work or (1.0,) * self.block_count

    @classmethod
    def from_json(cls, text: bytes) -> ModelShape:
        """The shape in a file, its fields as here; `block_bytes` may be one number, for `block_count` equal blocks.

        docs/files.md describes it. Raises BadSnapshot with the reason.
        """
        try:
            file = msgspec.json.decode(text, type=_ShapeFile)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadSnapshot(f"this is not a model's shape: {error}") from None
        for name in (file.name, file.model or file.name):
            if not 0 < len(name) <= MAX_NAME or not name.isprintable():
                raise BadSnapshot(f"{name[:64]!r} cannot be a model's name; give 1 to {MAX_NAME} printable characters")
        if file.dtype not in SHAPE_DTYPES:
            raise BadSnapshot(f"the shape's dtype is {file.dtype[:64]!r}; use one of {', '.join(SHAPE_DTYPES)}")
        shape = cls(
            ModelId(file.model or file.name),
            file.name,
            _block_sizes(file),
            _whole(file.kv_bytes_per_token_per_block, "kv_bytes_per_token_per_block"),
            _whole(file.hidden_bytes, "hidden_bytes"),
            tuple(file.block_work),
            file.dtype,
        )
        check_shape(shape)
        return shape


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A swarm at one moment. `links` stand under the pair of peers in order; a missing one was not measured.

    `client` holds the links of whoever looks, and is empty where nobody in particular does.
    """

    taken_s: float
    nodes: tuple[NodeView, ...]
    links: Mapping[Pair, Link] = field(default_factory=lambda: MappingProxyType({}))
    client: Mapping[PeerId, Link] = field(default_factory=lambda: MappingProxyType({}))
    assumptions: tuple[str, ...] = ()
    """What had to be assumed while it was put together, for people to read."""

    def link(self, one: PeerId, other: PeerId) -> Link | None:
        return self.links.get(pair(one, other))

    def node(self, peer: PeerId) -> NodeView | None:
        return next((node for node in self.nodes if node.peer == peer), None)

    def to_json(self) -> bytes:
        """The snapshot as `from_json` reads it; infinite bandwidth is left out."""
        links = [_link_json(link, a=a, b=b) for (a, b), link in self.links.items()]
        links += [_link_json(link, a="client", b=peer) for peer, link in self.client.items()]
        nodes = [
            {
                **{name: getattr(node, name) for name in _NODE_FIELDS},
                "held": [str(blocks) for blocks in node.held],
            }
            for node in self.nodes
        ]
        value = {"version": SNAPSHOT_VERSION, "taken_s": self.taken_s, "nodes": nodes, "links": links}
        return msgspec.json.format(msgspec.json.encode(value), indent=1)

    @classmethod
    def from_json(cls, text: bytes) -> Snapshot:
        """The snapshot in a file, as docs/files.md describes it. Raises BadSnapshot with the place and the reason.

        A link written twice, once for each direction, counts as the slower of the two, which `assumptions` then says.
        """
        try:
            file = msgspec.json.decode(text, type=_File)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadSnapshot(f"this is not a snapshot: {error}") from None
        if file.version != SNAPSHOT_VERSION:
            raise BadSnapshot(f"this snapshot has version {file.version}, this program knows {SNAPSHOT_VERSION}")
        nodes = tuple(_node(entry) for entry in file.nodes)
        peers = {node.peer for node in nodes}
        if len(peers) < len(nodes):
            raise BadSnapshot("two nodes of the snapshot have the same peer id")
        links: dict[Pair, Link] = {}
        client: dict[PeerId, Link] = {}
        notes: list[str] = []
        for entry in file.links:
            link = _checked(Link(entry.round_trip_s, entry.bytes_per_s, entry.spread_s, entry.age_s), entry)
            ends = {PeerId(entry.a), PeerId(entry.b)} - {PeerId("client")}
            if not ends <= peers or entry.a == entry.b:
                raise BadSnapshot(f"the link {entry.a} – {entry.b} does not lie between two nodes of the snapshot")
            if len(ends) == 1:
                client[ends.pop()] = link
                continue
            key = pair(PeerId(entry.a), PeerId(entry.b))
            earlier = links.get(key)
            if earlier is not None and earlier != link:
                notes.append(f"the link {key[0]} – {key[1]} is given twice and differs; the slower figures count")
                link = slower(earlier, link)
            links[key] = link
        return cls(file.taken_s, nodes, MappingProxyType(links), MappingProxyType(client), tuple(notes))


def pair(one: PeerId, other: PeerId) -> Pair:
    """The key of the link between two peers."""
    return (one, other) if one <= other else (other, one)


def slower(one: Link, other: Link) -> Link:
    """The worse figure of each: what two ends measured of the same link, or of its two directions."""
    return Link(
        max(one.round_trip_s, other.round_trip_s),
        min(one.bytes_per_s, other.bytes_per_s),
        max(one.spread_s, other.spread_s),
        max(one.age_s, other.age_s),
    )


def check_node(node: NodeView) -> None:
    """Raises BadSnapshot unless every figure of a node is possible."""
    figures = {
        "block_time_s": (node.block_time_s, MAX_TIME_S),
        "prefill_time_s": (node.prefill_time_s, MAX_TIME_S),
        "memory_bytes": (node.memory_bytes, MAX_SIZE),
        "baseline_bytes": (node.baseline_bytes, MAX_SIZE),
        "resident_bytes": (node.resident_bytes, MAX_SIZE),
        "cache_tokens": (node.cache_tokens, MAX_SIZE),
        "cache_tokens_left": (node.cache_tokens_left, node.cache_tokens),
        "uptime_s": (node.uptime_s, math.inf),
        "price": (node.price, MAX_PRICE),
        "reputation": (node.reputation, 1.0),
    }
    for name, (value, most) in figures.items():
        if not (0 <= value <= most):  # NaN compares false
            raise BadSnapshot(f"node {node.peer[:64]!r}: {name} is {value}")
    for name, text in (("quant", node.quant), ("kv", node.kv)):
        if len(text) > MAX_KIND or not text.isprintable():
            raise BadSnapshot(f"node {node.peer[:64]!r}: {name} is {text[:64]!r}; it can be none, int8 or int4")
    if node.block_time_s < LEAST_BLOCK_TIME_S:
        raise BadSnapshot(
            f"node {node.peer[:64]!r}: block_time_s is {node.block_time_s:g}; measure it, or leave the node out"
        )


def check_shape(shape: ModelShape) -> None:
    """Raises BadSnapshot unless a model's figures are possible and fit together."""
    if not shape.block_bytes:
        raise BadSnapshot(f"the model {shape.name!r} has no blocks")
    if shape.block_work and len(shape.block_work) != shape.block_count:
        raise BadSnapshot(
            f"the model {shape.name!r} has {shape.block_count} blocks and work for {len(shape.block_work)}"
        )
    figures: Iterable[float] = (*shape.block_bytes, *shape.work, shape.kv_bytes_per_token_per_block, shape.hidden_bytes)
    if not all(0 <= figure <= MAX_SIZE for figure in figures) or not all(work > 0 for work in shape.work):
        raise BadSnapshot(f"the model {shape.name!r} has a size or a work that is negative, none, or no number")


class _NodeEntry(msgspec.Struct, forbid_unknown_fields=True):
    peer: str
    block_time_s: float
    memory_bytes: int | float
    prefill_time_s: float = 0.0
    device: str = "cpu"
    dtype: str = "bfloat16"
    threads: int = 1
    held: list[str] = []
    serving: bool = True
    cache_tokens: int = 0
    cache_tokens_left: int = 0
    uptime_s: float = 0.0
    price: float = 0.0
    reputation: float = 1.0
    attested: bool = False
    quant: str = "none"
    kv: str = "none"
    baseline_bytes: int = 0
    resident_bytes: int = 0


class _LinkEntry(msgspec.Struct, forbid_unknown_fields=True):
    a: str
    b: str
    round_trip_s: float
    bytes_per_s: float = math.inf
    spread_s: float = 0.0
    age_s: float = 0.0


class _File(msgspec.Struct, forbid_unknown_fields=True):
    nodes: list[_NodeEntry]
    links: list[_LinkEntry]
    version: int = SNAPSHOT_VERSION
    taken_s: float = 0.0


class _ShapeFile(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    block_bytes: int | float | list[int | float]
    hidden_bytes: int | float
    kv_bytes_per_token_per_block: int | float = 0
    block_count: int | None = None
    block_work: list[float] = []
    dtype: str = "bfloat16"
    model: str = ""


def _block_sizes(file: _ShapeFile) -> tuple[int, ...]:
    """Each block's bytes. Raises BadSnapshot."""
    if isinstance(file.block_bytes, list):
        if file.block_count not in (None, len(file.block_bytes)):
            raise BadSnapshot(
                f"block_count is {file.block_count}, but block_bytes lists {len(file.block_bytes)} blocks; "
                "leave block_count out"
            )
        return tuple(_whole(size, "block_bytes") for size in file.block_bytes)
    if file.block_count is None:
        raise BadSnapshot("block_bytes is one size for all blocks; give block_count too, or a list with every block's")
    if not 0 < file.block_count <= MAX_BLOCKS:
        raise BadSnapshot(f"block_count is {file.block_count}; it can be 1 to {MAX_BLOCKS}")
    return (_whole(file.block_bytes, "block_bytes"),) * file.block_count


def _whole(figure: float, name: str) -> int:
    """A count, however it is written: `1e9` is one. Raises BadSnapshot."""
    if figure != int(figure):
        raise BadSnapshot(f"{name} is {figure}, which is no whole number")
    return int(figure)


_NODE_FIELDS = tuple(name for name in _NodeEntry.__struct_fields__ if name != "held")


def _node(entry: _NodeEntry) -> NodeView:
    if not 0 < len(entry.peer) <= 64 or not entry.peer.isprintable() or entry.peer == "client":
        raise BadSnapshot(f"{entry.peer[:64]!r} cannot be a node's peer id")
    held = []
    for text in entry.held:
        try:
            held.append(BlockRange.parse(text, 10**6))
        except BadRange as error:
            raise BadSnapshot(f"node {entry.peer}: held: {error}") from None
    entry.memory_bytes = _whole(entry.memory_bytes, f"node {entry.peer}: memory_bytes")
    node = NodeView(**{name: getattr(entry, name) for name in _NODE_FIELDS}, held=tuple(held))
    check_node(node)
    return node


def _checked(link: Link, entry: _LinkEntry) -> Link:
    where = f"the link {entry.a[:64]} – {entry.b[:64]}"
    if not 0 <= link.round_trip_s <= MAX_TIME_S:
        raise BadSnapshot(f"{where}: round_trip_s is {link.round_trip_s}")
    if not link.bytes_per_s >= LEAST_BYTES_PER_S:
        raise BadSnapshot(f"{where}: bytes_per_s is {link.bytes_per_s}")
    if not (0 <= link.spread_s <= MAX_TIME_S and link.age_s >= 0):
        raise BadSnapshot(f"{where}: spread_s or age_s is negative or no number")
    return link


def _link_json(link: Link, *, a: str, b: str) -> dict[str, Any]:
    value: dict[str, Any] = {"a": a, "b": b, "round_trip_s": link.round_trip_s}
    if math.isfinite(link.bytes_per_s):
        value["bytes_per_s"] = link.bytes_per_s
    return value | {"spread_s": link.spread_s, "age_s": link.age_s}
