"""The directory: where nodes announce themselves and find each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Protocol

import msgspec

from bsns.core.ids import ModelId, PeerId
from bsns.protocol.plans import PlanRecord
from bsns.protocol.records import NodeRecord


class Reading(list[NodeRecord]):
    """Records that were read together, with what is asked of them often worked out once: they do not change."""

    def __init__(self, records: Iterable[NodeRecord] = ()) -> None:
        super().__init__(records)
        self._of: dict[tuple[ModelId, str, int], Reading] = {}

    def of(self, model: ModelId, dtype: str, block_count: int) -> Reading:
        """Those of one model's nodes."""
        key = (model, dtype, block_count)
        if key not in self._of:
            self._of[key] = Reading(r for r in self if (r.model, r.dtype, r.block_count) == key)
        return self._of[key]

    @cached_property
    def draws(self) -> Mapping[PeerId, bytes]:
        """The draw of every node that serves, b"" of those that do not stand for election."""
        return {record.peer: record.draw if record.state == "serving" else b"" for record in self}


class Directory(Protocol):
    """Records of one swarm's nodes, each written by its own node only, each gone when it expires."""

    async def publish(self, record: NodeRecord) -> None:
        """Announce this node, replacing what it announced before. Raises PeerError if nobody took the record."""
        ...

    async def withdraw(self, record: NodeRecord) -> None:
        """Say goodbye: others see the node gone at their next reading, without waiting for its record to expire."""
        ...

    async def records(self) -> Reading:
        """The nodes that are here: records verified, unexpired and not leaving, in order of peer id.

        Raises NotAMember when the swarm refuses us.
        """
        ...

    async def publish_plan(self, plan: PlanRecord) -> None:
        """Announce our lease and plan, replacing what we announced before. Raises as `publish`."""
        ...

    async def plans(self) -> list[PlanRecord]:
        """Leases and plans, verified and unexpired, in order of author; who holds the lease the reader decides.

        Raises NotAMember when the swarm refuses us.
        """
        ...

    async def close(self) -> None:
        """Stop taking part; idempotent. Does not withdraw."""
        ...


class MemoryDirectory:
    """A Directory for peers of one process, who pass the same shelves; records are believed as they come."""

    def __init__(
        self,
        shelf: dict[PeerId, NodeRecord] | None = None,
        clock: Callable[[], float] = time.time,
        plan_shelf: dict[PeerId, PlanRecord] | None = None,
    ) -> None:
        self.shelf: dict[PeerId, NodeRecord] = shelf if shelf is not None else {}
        self.plan_shelf: dict[PeerId, PlanRecord] = plan_shelf if plan_shelf is not None else {}
        self._clock = clock

    async def publish(self, record: NodeRecord) -> None:
        self.shelf[record.peer] = record

    async def withdraw(self, record: NodeRecord) -> None:
        self.shelf[record.peer] = msgspec.structs.replace(record, state="leaving")

    async def records(self) -> Reading:
        now_s = self._clock()
        here = [record for record in self.shelf.values() if record.expires_s > now_s and record.state != "leaving"]
        return Reading(sorted(here, key=lambda record: record.peer))

    async def publish_plan(self, plan: PlanRecord) -> None:
        self.plan_shelf[plan.author] = plan

    async def plans(self) -> list[PlanRecord]:
        now_s = self._clock()
        return sorted((p for p in self.plan_shelf.values() if p.expires_s > now_s), key=lambda plan: plan.author)

    async def close(self) -> None:
        return None
