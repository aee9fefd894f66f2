"""The real directory: hivemind's Kademlia DHT, closed to everybody but members.

All records of a swarm's nodes live under one key and its plans under another, each under its author's peer id; whoever
stores or reads them checks them (swarm.dht_guard). Nothing is cached beyond that.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec
from hivemind.dht import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from hivemind.proto import dht_pb2

from bsns.core.errors import NoSuchSwarm, PeerFailed, PeerTimedOut, ProtocolError
from bsns.core.ids import PeerId
from bsns.protocol.plans import PlanRecord
from bsns.protocol.records import NodeRecord
from bsns.swarm.dht_guard import MemberAuthorizer, MemberProtocol, RecordGuard, Shelf, Verdicts, node_shelf, plan_shelf
from bsns.swarm.dht_traversal import tidy
from bsns.swarm.directory import Reading
from bsns.swarm.membership import Membership
from bsns.swarm.plans import open_plan, sign_plan
from bsns.swarm.records import open_record, sign_record

if TYPE_CHECKING:
    from bsns.transport.libp2p import Libp2pTransport

RPC_DEADLINE_S = 2.0
READ_DEADLINE_S = 8.0
JOIN_DEADLINE_S = 5.0
MAX_KNOWN = 64
ASKED_AGAIN = 8
"""How many peers are remembered, and how many of them are greeted by one that has lost sight of all."""
GREETING_S = 0.5
"""How long it waits for them each time."""

log = logging.getLogger(__name__)

tidy()

Clock = Callable[[], float]


class HivemindDirectory:
    """One swarm's directory (swarm.directory.Directory), held by the transports of its members."""

    def __init__(self, node: DHTNode, membership: Membership, client_only: bool, clock: Clock):
        self._node = node
        self._membership = membership
        self._client_only = client_only
        self._clock = clock
        self._nodes, self._plans = node_shelf(membership), plan_shelf(membership)
        self._last_expiry_s = {self._nodes: 0.0, self._plans: 0.0}
        self._known: dict[PeerID, None] = {}
        self._greetings: set[asyncio.Task[object]] = set()
        self._closed = False

    @classmethod
    async def join(
        cls,
        transport: Libp2pTransport,
        membership: Membership,
        bootstrap: Sequence[str] = (),
        *,
        client_only: bool = False,
        clock: Clock = time.time,
    ) -> HivemindDirectory:
        """Take part in the swarm's DHT; without `bootstrap`, begin it. `client_only` reads and serves nothing.

        Raises NoSuchSwarm if no bootstrap peer answers within 5 s, or the NotAMember with which they refused us.
        """
        guard = RecordGuard(membership, (node_shelf(membership), plan_shelf(membership)), clock)
        authorizer = MemberAuthorizer(membership, clock)
        # DHTNode.create would build a plain protocol and swallow refusals while bootstrapping: both are done here
        node = await DHTNode.create(
            p2p=transport.p2p,
            node_id=DHTID.generate(source=transport.peer.encode()),
            client_mode=True,
            record_validator=guard,
            authorizer=authorizer,
            wait_timeout=RPC_DEADLINE_S,
            cache_locally=False,
            cache_nearest=0,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
            reuse_get_requests=False,
        )
        plain = node.protocol
        node.protocol = await MemberProtocol.create(
            transport.p2p,
            node.node_id,
            plain.routing_table.bucket_size,
            plain.routing_table.depth_modulo,
            node.num_replicas,
            RPC_DEADLINE_S,
            client_mode=client_only,
            record_validator=guard,
            authorizer=authorizer,
        )
        directory = cls(node, membership, client_only, clock)
        peers = {address.rpartition("/p2p/")[2] for address in bootstrap} - {transport.peer}
        try:
            if peers:
                await directory._greet([PeerID.from_base58(peer) for peer in sorted(peers)])
                await directory._look_around()
        except BaseException:
            await directory.close()
            raise
        return directory

    async def _greet(self, peers: list[PeerID]) -> None:
        """Ping the bootstrap peers and put those that answer into the routing table. Raises as `join`."""
        outcomes = await asyncio.gather(*(self._ping(peer) for peer in peers), return_exceptions=True)
        if any(outcome is None for outcome in outcomes):
            return
        for outcome in outcomes:
            if isinstance(outcome, ProtocolError):
                raise outcome
        raise NoSuchSwarm(
            f"none of {', '.join(peer.to_base58() for peer in peers)} answers as a member of swarm "
            f"{self._membership.swarm}; is a node of it running there?"
        ) from next((outcome for outcome in outcomes if outcome is not None), None)

    async def _ping(self, peer: PeerID) -> None:
        protocol = self._node.protocol
        request = dht_pb2.PingRequest(peer=protocol.node_info, validate=False)
        response = await protocol.get_stub(peer).rpc_ping(request, timeout=JOIN_DEADLINE_S)
        if response.peer.node_id:
            await protocol.update_routing_table(DHTID.from_bytes(response.peer.node_id), peer, responded=True)

    async def _look_around(self) -> None:
        """Meet the nodes nearest to us, and receive the records that are ours to keep."""
        try:
            async with asyncio.timeout(JOIN_DEADLINE_S):
                await self._node.find_nearest_nodes([self._node.node_id])
        except TimeoutError:
            log.debug("some neighbours in the DHT are slow; going on with those that answered")

    async def _meet_again(self) -> None:
        """Greet those whom we knew, where we have lost sight of everybody.

        A peer that does not answer, or refuses us, is struck from the routing table. Whoever was cut off for a while,
        or had a wrong clock, has an empty one afterwards and is in nobody's: it has to speak first.
        """
        protocol = self._node.protocol
        met = protocol.routing_table.peer_id_to_uid
        if met:
            before = [peer for peer in self._known if peer not in met]
            self._known = dict.fromkeys([*before, *met][-MAX_KNOWN:])
            return
        self._node.blacklist.clear()  # its bans end by the clock that may have been wrong
        if not self._greetings:
            self._greetings = {asyncio.create_task(protocol.call_ping(peer)) for peer in [*self._known][-ASKED_AGAIN:]}
        if self._greetings:  # who takes longer to answer is met all the same
            _, self._greetings = await asyncio.wait(self._greetings, timeout=GREETING_S)

    async def publish(self, record: NodeRecord) -> None:
        """Announce this node; its expiry is cut to our certificate's. Raises PeerFailed if nobody took the record."""
        # room for a goodbye, which has to expire later to replace the record
        await self._publish(record, self._membership.expires_s - 1.0)

    async def withdraw(self, record: NodeRecord) -> None:
        """Replace our record by one that says `leaving` and outlives every earlier one, so none can be replayed."""
        last_s = max(record.expires_s, self._last_s(self._nodes)) + 0.5
        await self._publish(msgspec.structs.replace(record, state="leaving", expires_s=last_s))

    async def publish_plan(self, plan: PlanRecord) -> None:
        """Raises as `publish`."""
        expires_s = self._expiry_s(self._plans, min(plan.expires_s, self._membership.expires_s))
        plan = msgspec.structs.replace(plan, expires_s=expires_s)
        await self._store(self._plans, sign_plan(plan, self._membership), expires_s)

    async def _publish(self, record: NodeRecord, latest_s: float = math.inf) -> None:
        expires_s = min(record.expires_s, latest_s, self._membership.expires_s)
        record = msgspec.structs.replace(record, expires_s=self._expiry_s(self._nodes, expires_s))
        await self._store(self._nodes, sign_record(record, self._membership), record.expires_s)

    def _expiry_s(self, shelf: Shelf, wanted_s: float) -> float:
        """The DHT keeps whichever expires later: what shall replace something has to."""
        last_s = self._last_s(shelf)
        return wanted_s if wanted_s > last_s else last_s + 0.001

    def _last_s(self, shelf: Shelf) -> float:
        """When what we announced last expires; 0 where that is so far ahead that nobody else can have it.

        Then our clock was wrong, and we have it ourselves still: it would stand in the way of what we announce now.
        """
        if self._last_expiry_s[shelf] > self._clock() + shelf.max_life_s:
            self._last_expiry_s[shelf] = 0.0
            held = self._node.protocol.storage.get(DHTID.from_bytes(shelf.id_bytes))
            if held is not None and isinstance(held.value, DictionaryDHTValue):
                del held.value[self._membership.peer]
        return self._last_expiry_s[shelf]

    async def _store(self, shelf: Shelf, signed: bytes, expires_s: float) -> None:
        self._last_expiry_s[shelf] = expires_s
        self._node.protocol.verdicts = Verdicts()
        try:
            async with asyncio.timeout(READ_DEADLINE_S):
                await self._meet_again()
                stored = await self._node.store(
                    shelf.key, signed, expires_s, subkey=self._membership.peer, exclude_self=self._client_only
                )
        except TimeoutError:
            raise PeerTimedOut(f"storing our record took more than {READ_DEADLINE_S:g} s") from None
        if not stored:
            self._raise_refusal()
            raise PeerFailed("nobody in the swarm took our record")

    async def records(self) -> Reading:
        """Raises NotAMember when the swarm refuses us, PeerTimedOut after 8 s."""
        here: list[NodeRecord] = []
        for author, signed in await self._read(self._nodes):
            try:
                record = open_record(signed, self._membership, self._clock(), author)
            except ProtocolError as error:  # expired since it was received
                log.debug("left out a record: %s", error)
                continue
            if record.state != "leaving":
                here.append(record)
        if not here:
            self._raise_refusal()
        return Reading(sorted(here, key=lambda record: record.peer))

    async def plans(self) -> list[PlanRecord]:
        """Raises NotAMember when the swarm refuses us, PeerTimedOut after 8 s."""
        plans: list[PlanRecord] = []
        for author, signed in await self._read(self._plans):
            try:
                plans.append(open_plan(signed, self._membership, self._clock(), author))
            except ProtocolError as error:
                log.debug("left out a plan: %s", error)
        if not plans:
            self._raise_refusal()
        return sorted(plans, key=lambda plan: plan.author)

    async def _read(self, shelf: Shelf) -> list[tuple[PeerId, bytes]]:
        """What lies on a shelf, by author."""
        self._node.protocol.verdicts = Verdicts()
        try:
            async with asyncio.timeout(READ_DEADLINE_S):
                await self._meet_again()
                found = await self._node.get(shelf.key, latest=True)
        except TimeoutError:
            raise PeerTimedOut(f"reading the directory took more than {READ_DEADLINE_S:g} s") from None
        return [(author, item.value) for author, item in found.value.items()] if found is not None else []

    def _raise_refusal(self) -> None:
        """Raises what the others said, when they refused us and nobody answered: then empty-handed means shut out."""
        verdicts: Verdicts = self._node.protocol.verdicts
        if verdicts.refused and not verdicts.answered:
            raise next(iter(verdicts.refused.values()))

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for greeting in self._greetings:
            greeting.cancel()
        try:
            async with asyncio.timeout(RPC_DEADLINE_S):
                await self._node.shutdown()
        except (TimeoutError, P2PDaemonError, OSError) as error:
            log.debug("the DHT did not close in order: %s", error)
