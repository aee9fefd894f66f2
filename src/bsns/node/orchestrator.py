"""The orchestrator's office: a node stands for it, holds it, plans while it does, and says which plan is in force.

The swarm never waits for it. What runs goes on without an orchestrator; nobody moves then, and whoever joins chooses by
itself (planning.joining). Nodes that were pinned to their blocks take no part: they are planned around.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypedDict, Unpack

import msgspec
import structlog

from bsns.core.blocks import missing_blocks
from bsns.core.errors import BsnsError, NotTheOrchestrator, StalePlan
from bsns.core.ids import PeerId
from bsns.core.plan import LEAST_CACHE_TOKENS, Objective, Plan
from bsns.core.snapshot import ModelShape, Snapshot
from bsns.protocol.plans import PlanRecord
from bsns.protocol.records import NodeRecord
from bsns.swarm.directory import Directory
from bsns.swarm.election import LEASE_S, Claim, Election, Lease, Seen, Stand, StepDown, Stored
from bsns.swarm.membership import Membership
from bsns.swarm.plans import Reign, draw, lease_of, lot_of
from bsns.swarm.proposals import Planner, Proposal, assignments_of, propose
from bsns.transport.clock import MACHINE_CLOCK, Clock

log = structlog.get_logger(__name__)

PLAN_S = 2.0
"""The most a search for a better plan may take; it shares its process with a node that serves."""
QUIET_LEASES = 6
"""While nothing changes, a better plan is looked for only once in so many leases' time."""
LEAST_WAIT_S = 0.02

Obey = Callable[[PlanRecord | None, Sequence[NodeRecord], float], None]


def best_plan(
    snapshot: Snapshot, shape: ModelShape, objective: Objective, cache_tokens: int, *, plan_s: float = PLAN_S
) -> Plan:
    """The planner's best within `plan_s`. The same snapshot gives the same plan where time does not run out."""
    import numpy as np  # planning loads scipy and ortools: only a node that plans pays for them

    from bsns.planning.planner import make_plan

    until_s = time.monotonic() + plan_s
    return make_plan(
        snapshot,
        shape,
        objective=objective,
        cache_tokens=cache_tokens,
        rng=np.random.default_rng(0),
        remaining_s=lambda: max(0.0, until_s - time.monotonic()),
    )


class Governing(TypedDict, total=False):
    """How a node takes part in its model's government."""

    stands: bool
    """Whether for election."""
    objective: Objective
    """What it would plan for."""
    cache_tokens: int
    """What it would reckon with on every node."""
    lease_s: float
    planner: Planner


class Orchestrator:
    """One node's part in its model's government. `run` is a task; `look` one turn of it, for tests."""

    def __init__(
        self,
        directory: Directory,
        membership: Membership,
        shape: ModelShape,
        *,
        obey: Obey,
        stand: Callable[[bytes], None],
        clock: Clock = MACHINE_CLOCK,
        **governing: Unpack[Governing],
    ) -> None:
        """`obey` is told the plan in force and who is here, at every turn; `stand` our draw for the next term.

        Raises BadOption for an impossible lease.
        """
        self._directory = directory
        self._me = membership.peer
        self._shape = shape
        self._obey = obey
        self._stand = stand
        self._objective = governing.get("objective", Objective())
        self._cache_tokens = governing.get("cache_tokens", LEAST_CACHE_TOKENS)
        self._planner = governing.get("planner", best_plan)
        self._now_s = clock.now_s
        self._clock = clock.unix_s
        self._lots_term = 0
        self._lots: dict[tuple[PeerId, int, bytes], bytes | None] = {}
        swarm, identity = membership.swarm, membership.identity

        def own_draw(term: int) -> bytes:
            return draw(identity, swarm, shape.model, term)

        def checked(peer: PeerId, term: int, drawn: bytes) -> bytes | None:
            known = (peer, term, drawn)
            if known not in self._lots:
                if term > self._lots_term:
                    self._lots_term = term
                    self._lots = {key: lot for key, lot in self._lots.items() if key[1] >= term}
                self._lots[known] = lot_of(peer, swarm, shape.model, term, drawn)
            return self._lots[known]

        self._draw = own_draw
        lease_s = governing.get("lease_s", LEASE_S)
        self.election = Election(self._me, own_draw, checked, lease_s=lease_s, stands=governing.get("stands", True))
        self._reign = Reign()
        self._ordered: PlanRecord | None = None  # the last that ordered anything: a new orchestrator goes on from there
        self._planned_s = -math.inf
        self._planned_for: tuple[object, ...] = ()
        self._governed = 0
        self._search: asyncio.Task[Proposal | None] | None = None
        self._trouble = ""

    @property
    def acts(self) -> bool:
        """Whether the office is ours, and what we order holds."""
        return self.election.acts(self._clock())

    @property
    def plan(self) -> PlanRecord | None:
        """The plan in force: that of whoever holds the lease now."""
        plan, holder = self._reign.plan, self.election.holder(self._clock())
        return plan if plan is not None and holder is not None and plan.author == holder.holder else None

    async def run(self) -> None:
        """Govern and obey until cancelled."""
        try:
            while True:
                least_s = self.election.step_s  # of who fails at once, as when our clock is wrong and all refuse us
                try:
                    await self.look()
                    self._tell_trouble("")
                    least_s = LEAST_WAIT_S
                except BsnsError as error:
                    self._tell_trouble(error.message)
                except Exception:
                    log.exception("a turn of the orchestrator failed; trying again")
                wait_s = min(max(self.election.wake_s - self._clock(), least_s), self.election.renew_s)
                if self._search is not None and not self._search.done():
                    await asyncio.wait([self._search], timeout=wait_s)
                else:
                    await asyncio.sleep(wait_s)
        finally:
            if self._search is not None:
                self._search.cancel()

    async def look(self) -> None:
        """Read the directory, do what the election asks for, plan if that is ours to do, and pass on what is in force.

        Raises PeerError or NotAMember where the directory does not answer.
        """
        read_s = self._now_s()
        shape = self._shape
        records = (await self._directory.records()).of(shape.model, shape.dtype, shape.block_count)
        plans = [plan for plan in await self._directory.plans() if self._ours(plan)]
        now_s = self._clock()
        last = self._reign.plan
        if last is not None and last.expires_s > now_s + 2 * self.election.lease_s:
            self._reign = Reign()  # it was made while our clock was wrong: nobody else has heard of its term
        try:
            for action in self.election.handle(Seen([lease_of(plan) for plan in plans], records.draws), now_s):
                match action:
                    case Claim(lease):
                        await self._store(self._record(lease))
                    case Stand(term):
                        self._stand(self._draw(term))
                    case StepDown(to):
                        log.info("no longer the orchestrator", to=to)
            self._take_up(plans)
            if self.election.acts(self._clock()):
                await self._govern(records)
        finally:  # whoever cannot govern now obeys all the same
            self._obey(self.plan, records, read_s)

    def _ours(self, plan: PlanRecord) -> bool:
        shape = self._shape
        return (plan.model, plan.dtype, plan.block_count) == (shape.model, shape.dtype, shape.block_count)

    def _take_up(self, plans: Sequence[PlanRecord]) -> None:
        """Accept the leaseholder's plan, and nobody else's."""
        holder = self.election.holder(self._clock())
        for plan in plans:
            try:
                new = self._reign.accept(plan, holder.holder if holder is not None else None)
                if plan.version:
                    self._ordered = plan
                if new:
                    log.info("a plan is in force", term=plan.term, version=plan.version, author=plan.author)
            except (NotTheOrchestrator, StalePlan) as error:
                log.debug("a plan was not accepted", reason=error.message)

    def _record(self, lease: Lease, changes: Proposal | None = None) -> PlanRecord:
        """Our record for a lease: with a new plan, or the one we have published in this term."""
        last = self._reign.plan
        ours = last if last is not None and (last.author, last.term) == (self._me, lease.term) else None
        record = PlanRecord(
            author=self._me,
            model=self._shape.model,
            block_count=self._shape.block_count,
            dtype=self._shape.dtype,
            term=lease.term,
            lot=self._draw(lease.term),
            version=ours.version if ours is not None else 0,
            objective=(self._objective.bottleneck, self._objective.latency),
            assignments=ours.assignments if ours is not None else (),
            bottleneck_s=ours.bottleneck_s if ours is not None else 0.0,
            latency_s=ours.latency_s if ours is not None else 0.0,
            lower_bound_s=ours.lower_bound_s if ours is not None else 0.0,
            issued_s=lease.expires_s - self.election.lease_s,
            expires_s=lease.expires_s,
        )
        if changes is None:
            return record
        return msgspec.structs.replace(
            record,
            version=record.version + 1,
            assignments=assignments_of(changes.ranges),
            bottleneck_s=changes.cost.bottleneck_s,
            latency_s=changes.cost.latency_s,
            lower_bound_s=changes.lower_bound_s,
        )

    async def _store(self, record: PlanRecord) -> None:
        await self._directory.publish_plan(record)
        self.election.handle(Stored(lease_of(record)), self._clock())
        self._take_up([record])

    async def _govern(self, records: Sequence[NodeRecord]) -> None:
        """Look for a better plan once in a lease's time if the swarm has changed, and publish one that is worth it."""
        now_s, passed_s = self._clock(), self._now_s()
        if self._search is not None and self._search.done():
            search, self._search = self._search, None
            proposal = search.result()
            lease = self.election.holder(now_s)
            if proposal is not None and proposal.reason is not None and lease is not None:
                renewed = replace(lease, expires_s=now_s + self.election.lease_s)
                await self._store(self._record(renewed, proposal))
                log.info("published a plan", reason=proposal.reason, term=renewed.term)
            return
        plan = self.plan
        if self._governed != self.election.term:
            self._governed = self.election.term
            held = [blocks for record in records if record.state == "serving" for blocks in record.ranges]
            if not missing_blocks(held, self._shape.block_count):
                self._planned_s = (
                    passed_s  # nothing is urgent: whoever has just come up answers its first requests first
                )
        looks = (plan.term, plan.version) if plan is not None else (), *(_look_of(record) for record in records)
        quiet = looks == self._planned_for and plan is not None and plan.version > 0
        wait_s = self.election.lease_s * (QUIET_LEASES if quiet else 1)
        if self._search is None and passed_s - self._planned_s >= wait_s:
            self._planned_s, self._planned_for = passed_s, looks
            self._search = asyncio.create_task(asyncio.to_thread(self._propose, records, now_s))

    def _propose(self, records: Sequence[NodeRecord], now_s: float) -> Proposal | None:
        last = self._ordered
        first = last is None or (last.author, last.term) != (self._me, self.election.term)
        try:
            return propose(
                records, last, self._shape, self._planner, self._objective, self._cache_tokens, now_s, first=first
            )
        except BsnsError as error:
            log.info("no plan for the nodes that are here", reason=error.message)
        except Exception:
            log.exception("planning failed; trying again when the swarm has changed")
        return None

    def _tell_trouble(self, reason: str) -> None:
        """Log a failure once, not at every turn."""
        if reason and reason != self._trouble:
            log.warning("the directory does not answer the orchestrator; trying again", reason=reason)
        self._trouble = reason


def _look_of(record: NodeRecord) -> tuple[object, ...]:
    """What of a node matters to plans: where it is, and its speed, in steps of about a fifth."""
    speed = round(4 * math.log2(record.block_time_s)) if record.block_time_s > 0 else None
    return record.peer, record.state, record.ranges, record.follows, record.memory_bytes, speed
