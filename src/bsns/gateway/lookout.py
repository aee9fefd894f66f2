"""The lookout: sees what the dashboard shows, once a moment for all who watch, and only while somebody does."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bsns.core.blocks import BlockRange, missing_blocks
from bsns.core.ids import PeerId, short, short_names
from bsns.core.snapshot import Link, Snapshot
from bsns.gateway.engine import Engine
from bsns.gateway.running import RunningAnswer, RunningAnswers
from bsns.gateway.solving import Solver, look_of_links, look_of_nodes, plan_state, shape_state
from bsns.gateway.state import (
    GATEWAY,
    DashboardState,
    EventKind,
    EventState,
    HopState,
    LinkState,
    NodeCondition,
    NodeState,
    PlanState,
    SessionState,
    ShapeState,
    SwarmState,
)
from bsns.node.view import NodeStatus
from bsns.routing.chain import Route

EVERY_S = 1.0
NODES_PER_S = 100
"""A larger swarm is looked at less often, so that asking its nodes stays as cheap."""
LOST_S = 2.0
"""A node that has not answered for so long counts as lost."""
FORGET_S = 120.0
"""How long one that is lost is shown."""
RATE_S = 3.0
"""Over how long tokens are counted for their rate."""
HISTORY = 60
MOST_NODES, MOST_LINKS, MOST_SESSIONS, MOST_EVENTS = 200, 600, 50, 40
SOLVE_EVERY_S = 15.0
"""Plan and shape are computed anew when the swarm has changed, but no more often than this."""
UNTOLD_LOOKS = 3
"""A repair whose new route has not shown after so many looks is told without it."""


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who watches: `name` as the gate has it; whether they see the routes of all answers, or else of their own."""

    name: str
    all_routes: bool
    own_routes: bool = True

    def sees(self, tenant: str | None) -> bool:
        return self.all_routes or (self.own_routes and tenant == self.name)


@dataclass(frozen=True, slots=True)
class Event:
    """`text` for whoever may see the answer it is about, `public` for everybody else; `tenant` None: about none."""

    number: int
    at_s: float
    kind: EventKind
    text: str
    tenant: str | None = None
    public: str = ""


@dataclass(frozen=True, slots=True)
class Sight:
    """One look: what all see, and what each is shown a part of."""

    number: int
    swarm: SwarmState
    swarm_json: str
    plan: PlanState | None
    shape: ShapeState | None
    events: tuple[Event, ...]
    answers: tuple[tuple[RunningAnswer, SessionState], ...]

    def sessions_of(self, viewer: Viewer) -> list[SessionState]:
        """Their own first."""
        own = [session for answer, session in self.answers if viewer.sees(answer.tenant)]
        hidden = [
            SessionState(id=session.id, route=None, tokens=None, tokens_per_s=None, age_s=None)
            for answer, session in self.answers
            if not viewer.sees(answer.tenant)
        ]
        return (own + hidden)[:MOST_SESSIONS]

    def events_of(self, viewer: Viewer) -> list[EventState]:
        return [
            EventState(
                number=event.number,
                at_s=event.at_s,
                kind=event.kind,
                text=event.text if event.tenant is None or viewer.sees(event.tenant) else event.public,
            )
            for event in self.events
        ]

    def state(self, viewer: Viewer) -> DashboardState:
        return DashboardState(
            swarm=self.swarm,
            sessions=self.sessions_of(viewer),
            events=self.events_of(viewer),
            plan=self.plan,
            shape=self.shape,
        )


@dataclass(slots=True)
class _Known:
    """A node since it was first seen."""

    status: NodeStatus
    answered_s: float
    """Monotonic; when it was first seen, where it never has."""
    condition: NodeCondition = "joining"
    rows_per_s: float = 0.0


class Lookout:
    """Looks at the swarm through the gateway's engine. Whoever asks while nobody has looked lately looks for all."""

    def __init__(
        self,
        engine: Engine,
        running: RunningAnswers,
        *,
        every_s: float = EVERY_S,
        solve_every_s: float = SOLVE_EVERY_S,
        now_s: Callable[[], float] = time.monotonic,
        unix_s: Callable[[], float] = time.time,
    ) -> None:
        self._engine, self._running = engine, running
        self._least_s = self.every_s = every_s
        self._now_s, self._unix_s = now_s, unix_s
        self._looking = asyncio.Lock()
        self._sight: Sight | None = None
        self._looked_s = -math.inf
        self._known: dict[PeerId, _Known] = {}
        self._counted: deque[tuple[float, int]] = deque()
        self._history: deque[float] = deque(maxlen=HISTORY)
        self._events: deque[Event] = deque(maxlen=MOST_EVENTS)
        self._event_number = 0
        self._repairs = engine.repairs
        self._routes: dict[str, Route] = {}
        self._untold: list[int] = []
        """Repairs of which no route tells yet, by the number of looks since."""
        self._plan: Solver[PlanState] = Solver(solve_every_s, now_s)
        self._shape: Solver[ShapeState | None] = Solver(solve_every_s, now_s)

    async def sight(self, than: int = -1) -> Sight:
        """The newest look, made now unless one is fresh; with `than`, wait until one after that number is due."""
        if self._sight is not None and self._sight.number <= than:
            await asyncio.sleep(max(0.0, self._looked_s + self.every_s - self._now_s()))
        async with self._looking:
            if self._sight is None or self._now_s() - self._looked_s >= self.every_s:
                self._sight = await self._look(self._sight.number + 1 if self._sight is not None else 0)
                self._looked_s = self._now_s()
            return self._sight

    async def _look(self, number: int) -> Sight:
        statuses = await self._engine.nodes()
        now_s, first = self._now_s(), number == 0
        self._take_in(statuses, now_s, first=first)
        here = {peer for peer, known in self._known.items() if known.condition == "serving"}
        seen = self._engine.snapshot()
        present = replace(seen, nodes=tuple(node for node in seen.nodes if node.peer in here))
        names = short_names(self._known)
        answers = tuple((answer, self._session(answer, names)) for answer in self._running.answers.values())
        self._tell_repairs(names)
        self._plan.refresh(look_of_nodes(present), lambda: plan_state(self._engine.plan, present, self._unix_s()))
        self._shape.refresh(look_of_links(present), lambda: shape_state(present))
        self.every_s = max(self._least_s, len(self._known) / NODES_PER_S)
        swarm = self._swarm(seen, names, now_s)
        return Sight(
            number,
            swarm,
            swarm.model_dump_json(),
            self._plan.value,
            self._shape.value,
            tuple(self._events),
            answers,
        )

    def _take_in(self, statuses: Sequence[NodeStatus], now_s: float, *, first: bool) -> None:
        """Who answered, who did not, and what that means for what we know of each."""
        found = {status.record.peer: status for status in statuses}
        names = short_names([*self._known, *found])
        for peer, status in found.items():
            known = self._known.get(peer)
            if known is None:
                known = self._known[peer] = _Known(status, now_s)
                if not first:
                    self._tell("joined", f"node {names[peer]} has joined with blocks {status.record.blocks}")
            before, after = known.status.now, status.now
            if after is None:
                silent_s = now_s - known.answered_s
                joins = status.record.state == "joining"
                self._turn(known, "joining" if joins else "silent" if silent_s < LOST_S else "lost", names[peer])
                continue
            passed_s = now_s - known.answered_s
            if before is not None and passed_s > 0:
                known.rows_per_s = max(0, after.rows - before.rows) / passed_s
            if status.record.blocks != known.status.record.blocks:
                self._tell("moved", f"node {names[peer]} now holds blocks {status.record.blocks}")
            known.status, known.answered_s = status, now_s
            self._turn(known, _condition(status), names[peer])
        for peer in self._known.keys() - found.keys():
            known = self._known[peer]
            if known.condition == "leaving":
                self._tell("left", f"node {names[peer]} has left")
                del self._known[peer]
            elif now_s - known.answered_s > FORGET_S:
                del self._known[peer]
            else:
                self._turn(known, "silent" if now_s - known.answered_s < LOST_S else "lost", names[peer])

    def _turn(self, known: _Known, condition: NodeCondition, name: str) -> None:
        if condition == known.condition:
            return
        was, known.condition = known.condition, condition
        if condition == "lost":
            known.rows_per_s = 0.0
            self._tell("lost", f"node {name} is lost, with blocks {known.status.record.blocks}")
        elif was == "lost":
            self._tell("back", f"node {name} is back")

    def _session(self, answer: RunningAnswer, names: Mapping[PeerId, str]) -> SessionState:
        stats = answer.stats
        return SessionState(
            id=answer.id,
            route=[HopState(node=_name(hop.peer, names), blocks=_ends(hop.blocks)) for hop in stats.route],
            tokens=stats.tokens,
            tokens_per_s=round(stats.tokens_per_s, 1),
            age_s=round(time.monotonic() - answer.began_s, 1),
        )

    def _tell_repairs(self, names: Mapping[PeerId, str]) -> None:
        """A repair and the route it leads to may show in different looks: each repair is told once."""
        repairs = self._engine.repairs
        self._untold += [0] * max(0, repairs - self._repairs)
        self._repairs = repairs
        for answer in self._running.answers.values():
            before, after = self._routes.get(answer.id, ()), answer.stats.route
            gone = {hop.peer for hop in before} - {hop.peer for hop in after}
            new = [hop for hop in after if hop.peer not in {old.peer for old in before}]
            if before and gone and new:
                who = ", ".join(_name(peer, names) for peer in sorted(gone))
                by = ", ".join(f"{_name(hop.peer, names)} ({hop.blocks})" for hop in new)
                text = f"answer {answer.id} goes on: {by} in place of {who}"
                self._tell("repaired", text, answer.tenant, "a lost stage of an answer was replaced")
                if self._untold:
                    self._untold.pop(0)
        self._routes = {answer.id: answer.stats.route for answer in self._running.answers.values()}
        for _ in range(sum(looks >= UNTOLD_LOOKS for looks in self._untold)):
            self._tell("repaired", "a lost stage of an answer was replaced")
        self._untold = [looks + 1 for looks in self._untold if looks < UNTOLD_LOOKS]

    def _tell(self, kind: EventKind, text: str, tenant: str | None = None, public: str = "") -> None:
        self._event_number += 1
        self._events.append(Event(self._event_number, self._unix_s(), kind, text, tenant, public))

    def _swarm(self, seen: Snapshot, names: Mapping[PeerId, str], now_s: float) -> SwarmState:
        unix_s = self._unix_s()
        order = sorted(
            self._known.items(), key=lambda item: (item[1].status.record.start, item[1].status.record.end, item[0])
        )
        ways = dict(self._ways(seen))
        nodes = [
            _node(names[peer], known, ways.get(peer), unix_s - (now_s - known.answered_s))
            for peer, known in order[:MOST_NODES]
        ]
        shown = {peer for peer, _ in order[:MOST_NODES]}
        links = [_link(names[a], names[b], link) for (a, b), link in seen.links.items() if {a, b} <= shown]
        links += [_link(GATEWAY, names[peer], link) for peer, link in ways.items() if peer in shown]
        links.sort(key=lambda link: link.round_trip_ms)
        here = [known for known in self._known.values() if known.condition in ("serving", "silent")]
        serving = [blocks for known in here for blocks in known.status.record.ranges]
        rate = self._rate(now_s)
        return SwarmState(
            model=self._engine.name,
            block_count=self._engine.block_count,
            nodes=nodes,
            nodes_not_shown=len(order) - len(nodes),
            links=links[:MOST_LINKS],
            missing=[_ends(gap) for gap in missing_blocks(serving, self._engine.block_count)],
            tokens_per_s=rate,
            history=list(self._history),
            every_s=self.every_s,
            answers=len(self._running.answers),
            repairs=self._engine.repairs,
        )

    def _ways(self, seen: Snapshot) -> Iterable[tuple[PeerId, Link]]:
        """Our own: as routes are chosen by, or where no route has asked yet, the last answer's."""
        for peer, known in self._known.items():
            trip_s = known.status.round_trip_s
            if peer in seen.client:
                yield peer, seen.client[peer]
            elif trip_s is not None:
                yield peer, Link(trip_s)

    def _rate(self, now_s: float) -> float:
        """Tokens per second of all answers, lately."""
        counted = self._counted
        if counted and now_s - counted[-1][0] > 3 * self.every_s + RATE_S:  # nobody has watched
            counted.clear()
            self._history.clear()
        counted.append((now_s, self._running.tokens))
        while len(counted) > 2 and now_s - counted[1][0] >= RATE_S:
            counted.popleft()
        (then_s, then), (_, now) = counted[0], counted[-1]
        rate = round((now - then) / (now_s - then_s), 1) if now_s > then_s else 0.0
        self._history.append(rate)
        return rate


def _condition(status: NodeStatus) -> NodeCondition:
    """Of a node that answers; records say no more than these (swarm.records)."""
    match status.record.state:
        case "joining":
            return "joining"
        case "leaving":
            return "leaving"
        case _:
            return "serving"


def _node(name: str, known: _Known, way: Link | None, answered_s: float) -> NodeState:
    record, now = known.status.record, known.status.now
    return NodeState(
        name=name,
        blocks=[_ends(blocks) for blocks in record.ranges],
        condition=known.condition,
        answered_s=round(answered_s, 1),
        device=record.device,
        dtype=record.dtype,
        executor=record.executor,
        threads=record.threads,
        cache_tokens=record.cache_tokens,
        cache_tokens_left=now.cache_tokens_left if now is not None else record.cache_tokens_left,
        sessions=now.sessions if now is not None else record.sessions,
        waiting=now.waiting if now is not None else 0,
        rows_per_s=round(known.rows_per_s, 1),
        block_time_ms=round((now.block_time_s if now is not None else record.block_time_s) * 1e3, 4),
        round_trip_ms=None if way is None else round(way.round_trip_s * 1e3, 3),
        resident_bytes=now.rss_bytes if now is not None else record.rss_bytes,
    )


def _link(a: str, b: str, link: Link) -> LinkState:
    return LinkState(
        a=a,
        b=b,
        round_trip_ms=round(link.round_trip_s * 1e3, 4),
        spread_ms=round(link.spread_s * 1e3, 4),
        mb_per_s=round(link.bytes_per_s / 1e6, 3) if math.isfinite(link.bytes_per_s) else None,
        age_s=round(link.age_s),
    )


def _name(peer: PeerId, names: Mapping[PeerId, str]) -> str:
    return names.get(peer) or short(peer)


def _ends(blocks: BlockRange) -> tuple[int, int]:
    return blocks.start, blocks.end
