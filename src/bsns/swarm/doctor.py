"""The doctor: what looks wrong in a swarm, in sentences for people. Pure: records, a snapshot and the time go in."""

from __future__ import annotations

import math
import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bsns.core.blocks import missing_blocks
from bsns.core.ids import ModelId, PeerId, short_names
from bsns.core.plan import LEAST_CACHE_TOKENS
from bsns.core.snapshot import Link, Pair, Snapshot, pair
from bsns.protocol.records import NodeRecord
from bsns.swarm.records import MAX_LINKS

SLOW_FACTOR = 1.5
"""How much slower than others of its kind a node may be."""
FAR_FACTOR = 4.0
FAR_S = 0.01
"""A link is slow that takes so many times as long as the middle one, and at least so long more, for REFERENCE_BYTES."""
REFERENCE_BYTES = 16 * 1024
"""Activations of a token or two of a large model."""
HOPELESS_S = 0.5
"""What is slow whatever the others are."""
UNSTEADY_S = 0.005
SKEW_S = 5.0
"""The directory refuses who is 60 s off; routes and records go wrong before."""
STALE_S = 180.0
YOUNG_S = 60.0
"""A node so young has not measured everybody yet."""
NEARLY_FULL = 0.05
LOADING_S = 600.0
MANY = 3
"""More findings of one kind about one node are told as one."""

Names = Mapping[PeerId, str]
"""What each peer is called, see `short_names`."""
Kind = Literal[
    "missing blocks",
    "no answer",
    "slow link",
    "unsteady link",
    "slow node",
    "clock",
    "memory",
    "unmeasured",
    "stale",
    "loading",
    "empty",
]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that looks wrong: `grave` if the swarm cannot serve because of it."""

    kind: Kind
    text: str
    peers: tuple[PeerId, ...] = ()
    grave: bool = False


def findings(
    records: Sequence[NodeRecord],
    snapshot: Snapshot,
    now_s: float,
    *,
    silent: Mapping[PeerId, str] | None = None,
    lifetime_s: float = 75.0,
    announce_s: float = 30.0,
) -> list[Finding]:
    """What looks wrong, the gravest first. `now_s` is Unix time by our own clock.

    `silent` did not answer us, and why. A record lives for `lifetime_s` and is renewed every `announce_s`.
    """
    if not records:
        return [Finding("empty", "the swarm has no nodes; start one with: bsns serve MODEL --join INVITE", grave=True)]
    unheard = silent or {}
    names = short_names(
        [
            *(record.peer for record in records),
            *unheard,
            *snapshot.client,
            *(peer for ends in snapshot.links for peer in ends),
        ]
    )
    found = [
        *_missing(records, unheard),
        *_no_answer(unheard, names),
        *_clocks(records, names, now_s, lifetime_s, announce_s),
        *_slow_nodes(records, names),
        *_memory(records, names),
        *_loading(records, names, now_s),
        *_slow_links(snapshot, names),
        *_unmeasured(records, snapshot, names, now_s, unheard),
        *_stale(snapshot, names),
    ]
    return sorted(found, key=lambda finding: not finding.grave)


def _missing(records: Sequence[NodeRecord], silent: Mapping[PeerId, str]) -> Iterable[Finding]:
    for members in _by_model(records).values():
        held = [
            r for member in members if member.state == "serving" and member.peer not in silent for r in member.ranges
        ]
        # one node that has the number wrong, or lies, does not tell the others what is missing
        gaps = missing_blocks(held, statistics.mode(member.block_count for member in members))
        if gaps:
            text = (
                f"nobody serves blocks {', '.join(map(str, gaps))} of {members[0].model_name}; start a node with: "
                f"bsns serve {shlex.quote(members[0].model_name)} --blocks {gaps[0]} --join INVITE"
            )
            yield Finding("missing blocks", text, grave=True)


def _no_answer(silent: Mapping[PeerId, str], names: Names) -> Iterable[Finding]:
    for peer, why in sorted(silent.items()):
        text = f"node {names[peer]} announces itself but does not answer us: {why.replace(peer, names[peer])}"
        yield Finding("no answer", text, (peer,), grave=True)


def _clocks(
    records: Sequence[NodeRecord], names: Names, now_s: float, lifetime_s: float, announce_s: float
) -> Iterable[Finding]:
    """A record is renewed while it has more than half its life, so its expiry tells its author's time."""
    skews_s = {record.peer: _skew_s(record, now_s, lifetime_s, announce_s) for record in records}
    ahead = [peer for peer, skew_s in skews_s.items() if skew_s > SKEW_S]
    behind = [peer for peer, skew_s in skews_s.items() if skew_s < -SKEW_S]
    for off, how in ((ahead, "slow"), (behind, "fast")):
        if len(off) == len(records) > 1:
            seconds = statistics.median(abs(skews_s[peer]) for peer in off)
            yield Finding(
                "clock", f"this machine's clock is about {seconds:.0f} s {how}, by every node's record", tuple(off)
            )
            return
    for peer in ahead:
        yield Finding("clock", f"the clock of node {names[peer]} is {skews_s[peer]:.0f} s fast, by its record", (peer,))
    for peer in behind:
        text = (
            f"the record of node {names[peer]} is {-skews_s[peer]:.0f} s older than it should become: "
            "its clock is slow, or it can hardly reach the directory"
        )
        yield Finding("clock", text, (peer,))


def _skew_s(record: NodeRecord, now_s: float, lifetime_s: float, announce_s: float) -> float:
    """How far its author's clock is ahead of ours at least; negative: behind. 0 where its record is as it may be."""
    author_s = record.expires_s - lifetime_s  # when it was written, by its author's clock
    latest_s = max((author_s, record.started_s, *(link.measured_s for link in record.links)))
    if latest_s > now_s:
        return latest_s - now_s
    return min(0.0, author_s + announce_s - now_s)


def _slow_nodes(records: Sequence[NodeRecord], names: Names) -> Iterable[Finding]:
    kinds: defaultdict[tuple[object, ...], list[NodeRecord]] = defaultdict(list)
    for record in records:
        if record.block_time_s > 0:
            kinds[record.model, record.device, record.dtype, record.threads].append(record)
    for kind, members in kinds.items():
        for record in members:
            others = [other.block_time_s for other in members if other is not record]
            if others and record.block_time_s > SLOW_FACTOR * (usual_s := statistics.median(others)):
                text = (
                    f"node {names[record.peer]} is slow: {record.block_time_s * 1e3:.2f} ms a block, where "
                    f"{_others(len(others))} of its kind ({_kind(kind)}) "
                    f"take{'s' * (len(others) == 1)} {usual_s * 1e3:.2f} ms; is its machine busy with something else?"
                )
                yield Finding("slow node", text, (record.peer,))


def _kind(kind: tuple[object, ...]) -> str:
    _, device, dtype, threads = kind
    return f"{device}, {dtype}, {threads} thread{'s' * (threads != 1)}"


def _others(count: int) -> str:
    return "the other one" if count == 1 else f"the {count} others"


def _memory(records: Sequence[NodeRecord], names: Names) -> Iterable[Finding]:
    for record in records:
        name, advice = names[record.peer], "give it more --memory or fewer --blocks"
        if record.cache_tokens < LEAST_CACHE_TOKENS:
            text = f"node {name} has cache for only {record.cache_tokens} tokens; {advice}"
        elif record.cache_tokens_left < NEARLY_FULL * record.cache_tokens:
            text = (
                f"the cache of node {name} is nearly full ({record.cache_tokens_left} of {record.cache_tokens} tokens "
                f"left): new sessions will be refused; {advice}, or start another node for blocks {record.blocks}"
            )
        else:
            continue
        yield Finding("memory", text, (record.peer,))


def _loading(records: Sequence[NodeRecord], names: Names, now_s: float) -> Iterable[Finding]:
    for record in records:
        if record.state == "joining" and now_s - record.started_s > LOADING_S:
            minutes = (now_s - record.started_s) / 60
            text = f"node {names[record.peer]} began {minutes:.0f} minutes ago and still does not serve {record.blocks}"
            yield Finding("loading", text, (record.peer,))


def _slow_links(snapshot: Snapshot, names: Names) -> Iterable[Finding]:
    for links in (dict(snapshot.links), {(PeerId("client"), peer): link for peer, link in snapshot.client.items()}):
        times_s = {ends: link.transfer_s(REFERENCE_BYTES) for ends, link in links.items()}
        for ends, link in sorted(links.items(), key=lambda entry: -times_s[entry[0]]):
            others_s = [time_s for other, time_s in times_s.items() if other != ends]
            usual_s = statistics.median(others_s) if others_s else math.inf
            slow = times_s[ends] > max(FAR_FACTOR * usual_s, usual_s + FAR_S)
            if slow or times_s[ends] > HOPELESS_S:
                usual = f", where the middle one of the others takes {_ms(usual_s)}" if others_s else ""
                text = f"{_way(ends, names)} is slow: {_figures(link)}; {_ms(times_s[ends])} for 16 KiB{usual}"
                yield Finding("slow link", text, _peers(ends))
            elif link.spread_s > max(UNSTEADY_S, link.round_trip_s / 2):
                trips = f"its round trips take {_ms(link.round_trip_s)}, give or take {_ms(link.spread_s)}"
                text = f"{_way(ends, names)} is unsteady: {trips}"
                yield Finding("unsteady link", text, _peers(ends))


def _unmeasured(
    records: Sequence[NodeRecord], snapshot: Snapshot, names: Names, now_s: float, silent: Mapping[PeerId, str]
) -> Iterable[Finding]:
    """In a large swarm only neighbours are expected to know each other."""
    gaps: list[Pair] = []
    for members in _by_model(records).values():
        grown = [m for m in members if m.state == "serving" and m.peer not in silent and now_s - m.started_s > YOUNG_S]
        small = len(members) <= MAX_LINKS + 1
        gaps += [
            pair(one.peer, other.peer)
            for number, one in enumerate(grown)
            for other in grown[number + 1 :]
            if (small or _adjacent(one, other)) and _is_unknown(snapshot.link(one.peer, other.peer))
        ]
        for member in grown:
            if member.prefill_time_s == 0 or member.memory_bytes == 0:
                what = "how fast it reads prompts" if member.prefill_time_s == 0 else "its memory"
                yield Finding("unmeasured", f"node {names[member.peer]} does not say {what}", (member.peer,))
    text = "{} never measured: plans assume it is as slow as the slower of its ends' middle links"
    yield from _together(
        gaps, names, "unmeasured", text, "{} of the ways of node {} were never measured: is it behind a firewall?"
    )


def _stale(snapshot: Snapshot, names: Names) -> Iterable[Finding]:
    old = {ends: link.age_s for ends, link in snapshot.links.items() if link.age_s > STALE_S}
    text = f"{{}} last measured {_minutes(max(old.values(), default=0.0))} ago; it may be quite another by now"
    many = "{} of the ways of node {} were not measured for minutes"
    yield from _together(sorted(old), names, "stale", text, many)


def _together(gaps: Sequence[Pair], names: Names, kind: Kind, text: str, many: str) -> Iterable[Finding]:
    """Pairs one by one, but those of a node that has many of them as one finding."""
    left = list(gaps)
    while left:
        counts: defaultdict[PeerId, int] = defaultdict(int)
        for ends in left:
            for peer in ends:
                counts[peer] += 1
        worst = max(sorted(counts), key=counts.__getitem__)
        if counts[worst] <= MANY:
            break
        yield Finding(kind, many.format(counts[worst], names[worst]), (worst,))
        left = [ends for ends in left if worst not in ends]
    for ends in left:
        yield Finding(kind, text.format(f"{_way(ends, names)} was"), _peers(ends))


def _by_model(records: Sequence[NodeRecord]) -> dict[ModelId, list[NodeRecord]]:
    models: dict[ModelId, list[NodeRecord]] = {}
    for record in records:
        models.setdefault(record.model, []).append(record)
    return models


def _adjacent(one: NodeRecord, other: NodeRecord) -> bool:
    return any(a.end == b.start or b.end == a.start for a in one.ranges for b in other.ranges)


def _is_unknown(link: Link | None) -> bool:
    return link is None or math.isinf(link.bytes_per_s)


def _way(ends: Pair, names: Names) -> str:
    one, other = ends
    return f"our way to node {names[other]}" if one == "client" else f"the link {names[one]} – {names[other]}"


def _peers(ends: Pair) -> tuple[PeerId, ...]:
    return tuple(peer for peer in ends if peer != "client")


def _figures(link: Link) -> str:
    bandwidth = "" if math.isinf(link.bytes_per_s) else f", {link.bytes_per_s / 1e6:.3g} MB/s"
    return f"{_ms(link.round_trip_s)} round trip{bandwidth}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
