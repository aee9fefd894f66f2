"""A swarm over real libp2p and a real DHT: members find each other; the uninvited get a typed refusal."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest
from hivemind.dht import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import PeerID
from running_time import running_s

from bsns.core.errors import BsnsError, NoSuchSwarm, NotAMember, PeerError, PeerLost
from bsns.core.ids import ModelId
from bsns.protocol.frames import MAX_BODY_BYTES, PREFIX
from bsns.protocol.greeting import Refusal
from bsns.protocol.inference import Ping, Pong
from bsns.protocol.membership import Signed
from bsns.protocol.plans import Assignment, PlanRecord
from bsns.protocol.records import NodeRecord
from bsns.swarm.dht_guard import MAX_PLANS
from bsns.swarm.hivemind_directory import HivemindDirectory
from bsns.swarm.identity import Identity
from bsns.swarm.invites import Founder, invite_text, parse_invite
from bsns.swarm.membership import Membership, admit, introduce
from bsns.swarm.plans import MAX_PLAN_BYTES, PLAN, draw, sign_plan
from bsns.swarm.records import MAX_RECORD_BYTES, RECORD, sign_record
from bsns.transport.libp2p import Libp2pTransport
from bsns.transport.port import Stream

DEADLINE_S = 30.0


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Poll until something holds; fails the test at the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while not await holds():  # noqa: ASYNC110 (what others store sets no event of ours)
            await asyncio.sleep(0.05)


@dataclass
class Node:
    """One peer under test, and where it stands."""

    transport: Libp2pTransport
    membership: Membership
    directory: HivemindDirectory

    def record(self, lifetime_s: float = 60.0, **changes: object) -> NodeRecord:
        now_s = time.time()
        record = NodeRecord(
            peer=self.transport.peer,
            addresses=self.transport.addresses,
            model=ModelId("m" * 64),
            model_name="a/model",
            block_count=30,
            start=0,
            end=10,
            state="serving",
            device="cpu",
            dtype="float32",
            executor="torch",
            threads=1,
            cache_tokens=4096,
            cache_tokens_left=4096,
            block_time_s=0.001,
            rss_bytes=10**9,
            version="0.1.0",
            started_s=now_s,
            expires_s=now_s + lifetime_s,
        )
        return msgspec.structs.replace(record, **changes)

    async def sees(self, *others: Node) -> bool:
        return {record.peer for record in await self.directory.records()} == {node.transport.peer for node in others}


class Swarm:
    """A founder and whoever joins; everything is closed in reverse order."""

    def __init__(self, stack: AsyncExitStack, *, open_swarm: bool) -> None:
        self.stack = stack
        self.founder = Founder.found()
        self.open_swarm = open_swarm
        self.first: Node

    async def begin(self) -> None:
        identity = Identity.draw()
        membership = Membership.of_founder(self.founder, identity, time.time(), open_swarm=self.open_swarm)
        self.first = await self.node(membership, bootstrap=())

    async def node(self, membership: Membership, *, bootstrap: tuple[str, ...] | None = None) -> Node:
        bootstrap = self.first.transport.addresses if bootstrap is None else bootstrap
        transport = await Libp2pTransport.start(membership.identity.seed, bootstrap=bootstrap)
        self.stack.push_async_callback(transport.close)
        directory = await HivemindDirectory.join(transport, membership, bootstrap)
        self.stack.push_async_callback(directory.close)
        return Node(transport, membership, directory)

    async def join(self, lifetime_s: float = 3600.0) -> Node:
        """Join as people do: by an invite's text."""
        invite = self.founder.make_invite(
            self.first.transport.addresses, lifetime_s, self.open_swarm, now_s=time.time()
        )
        invite = parse_invite(invite_text(invite), time.time())
        return await self.node(Membership.from_invite(Identity.draw(), invite), bootstrap=invite.bootstrap)

    def uninvited(self) -> Membership:
        """Knows the swarm's key and speaks the protocol, but was never invited."""
        return Membership(Identity.draw(), swarm_key=self.founder.swarm_key, open_swarm=True, certificate=None)


@pytest.fixture
async def swarm() -> AsyncIterator[Swarm]:
    async with AsyncExitStack() as stack:
        swarm = Swarm(stack, open_swarm=False)
        await swarm.begin()
        yield swarm


async def test_members_publish_read_update_and_say_goodbye(swarm: Swarm) -> None:
    one, other = await swarm.join(), await swarm.join()
    first = swarm.first
    await first.directory.publish(first.record())
    await one.directory.publish(one.record())
    await other.directory.publish(other.record())
    for node in (first, one, other):
        await until(lambda node=node: node.sees(first, one, other))  # type: ignore[misc]

    updated = one.record(start=10, end=20)
    await one.directory.publish(updated)

    async def shows_update() -> bool:
        return any(record.peer == updated.peer and record.start == 10 for record in await other.directory.records())

    await until(shows_update)
    await one.directory.withdraw(updated)
    for node in (first, one, other):
        await until(lambda node=node: node.sees(first, other))  # type: ignore[misc]


async def test_records_outlive_the_node_they_were_first_stored_at_and_expire(swarm: Swarm) -> None:
    one = await swarm.join()

    async def seen() -> bool:
        await one.directory.publish(one.record(lifetime_s=1.5))
        return await swarm.first.sees(one)

    await until(seen)
    await until(lambda: swarm.first.sees())
    late = await swarm.join()
    assert await late.directory.records() == []


async def test_a_node_that_only_reads_stores_nothing(swarm: Swarm) -> None:
    await swarm.first.directory.publish(swarm.first.record())
    membership = Membership.from_invite(Identity.draw(), swarm.founder.make_invite((), 3600, now_s=time.time()))
    transport = await Libp2pTransport.start(
        membership.identity.seed, bootstrap=swarm.first.transport.addresses, listen=False
    )
    swarm.stack.push_async_callback(transport.close)
    directory = await HivemindDirectory.join(transport, membership, swarm.first.transport.addresses, client_only=True)
    swarm.stack.push_async_callback(directory.close)
    assert [record.peer for record in await directory.records()] == [swarm.first.transport.peer]


async def test_a_swarm_that_is_gone_is_named_in_time() -> None:
    founder = Founder.found()
    gone = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.draw().peer}"
    invite = founder.make_invite([gone], 3600, now_s=time.time())
    started_s = running_s()
    with pytest.raises(NoSuchSwarm):
        await Libp2pTransport.start(secrets.token_bytes(32), bootstrap=invite.bootstrap)
    assert running_s() - started_s < 10


async def test_a_peer_without_our_directory_is_no_such_swarm() -> None:
    async with AsyncExitStack() as stack:
        bare = await Libp2pTransport.start(secrets.token_bytes(32))
        stack.push_async_callback(bare.close)
        founder = Founder.found()
        invite = founder.make_invite(bare.addresses, 3600, now_s=time.time())
        membership = Membership.from_invite(Identity.draw(), invite)
        transport = await Libp2pTransport.start(membership.identity.seed, bootstrap=invite.bootstrap)
        stack.push_async_callback(transport.close)
        started_s = running_s()
        with pytest.raises(NoSuchSwarm):
            await HivemindDirectory.join(transport, membership, invite.bootstrap)
        assert running_s() - started_s < 10


async def test_the_uninvited_cannot_join(swarm: Swarm) -> None:
    with pytest.raises(NotAMember, match="no certificate"):
        await swarm.node(swarm.uninvited())


async def test_an_invite_to_another_swarm_does_not_open_this_one(swarm: Swarm) -> None:
    invite = Founder.found().make_invite(swarm.first.transport.addresses, 3600, now_s=time.time())
    with pytest.raises(NotAMember):
        await swarm.node(Membership.from_invite(Identity.draw(), invite))


async def test_the_uninvited_cannot_read_or_store(swarm: Swarm) -> None:
    """A peer that speaks the DHT's protocol, and skips the greeting that would have stopped it."""
    first = swarm.first
    await first.directory.publish(first.record())
    membership = swarm.uninvited()
    transport = await Libp2pTransport.start(membership.identity.seed, bootstrap=first.transport.addresses)
    swarm.stack.push_async_callback(transport.close)
    directory = await HivemindDirectory.join(transport, membership)
    swarm.stack.push_async_callback(directory.close)
    intruder = Node(transport, membership, directory)
    target = PeerID.from_base58(first.transport.peer)
    protocol = directory._node.protocol
    protocol.routing_table.add_or_update_node(DHTID.generate(source=first.transport.peer.encode()), target)

    with pytest.raises(NotAMember, match="no certificate"):
        await directory.records()
    protocol.routing_table.add_or_update_node(DHTID.generate(source=first.transport.peer.encode()), target)
    signed = sign_record(intruder.record(), membership)
    stored = await protocol.call_store(
        target,
        [DHTID.generate(source=directory._nodes.key)],
        [msgspec.msgpack.encode(signed)],
        intruder.record().expires_s,
        subkeys=[transport.peer],
    )
    assert stored is None
    assert isinstance(protocol.verdicts.refused[first.transport.peer], NotAMember)
    assert await first.sees(first)


async def test_hivemind_without_our_rules_gets_nothing(swarm: Swarm) -> None:
    first = swarm.first
    await first.directory.publish(first.record())
    transport = await Libp2pTransport.start(secrets.token_bytes(32), bootstrap=first.transport.addresses)
    swarm.stack.push_async_callback(transport.close)
    with pytest.raises(RuntimeError, match="none of the initial_peers"):
        await DHTNode.create(
            p2p=transport.p2p,
            initial_peers=list(first.transport.addresses),
            client_mode=True,
            wait_timeout=1.0,
            bootstrap_timeout=1.0,
        )


async def store_raw(node: Node, target: Node, key: str, subkey: str, value: bytes, expires_s: float) -> bool:
    """Ask a peer's DHT to store whatever we like, past our own checks; whether it accepted."""
    outcome = await node.directory._node.protocol.call_store(
        PeerID.from_base58(target.transport.peer),
        [DHTID.generate(source=key)],
        [msgspec.msgpack.encode(value)],
        expires_s,
        subkeys=[subkey],
    )
    assert outcome is not None, "the request itself was refused"
    return bool(outcome[0])


async def test_forged_replayed_and_oversized_records_are_refused(swarm: Swarm) -> None:
    mallory, victim, first = await swarm.join(), await swarm.join(), swarm.first
    key = first.directory._nodes.key
    record = victim.record()
    old = victim.record(lifetime_s=30.0, start=20, end=30)
    signed_old = sign_record(old, victim.membership)
    await victim.directory.publish(record)
    await until(lambda: first.sees(victim))

    # the victim's record, changed and signed by another member
    payload = msgspec.msgpack.encode(msgspec.structs.replace(record, end=1, expires_s=record.expires_s + 1))
    signature = mallory.membership.identity.sign(RECORD.statement(first.membership.swarm, payload))
    for certificate in (mallory.membership.certificate, victim.membership.certificate):
        forged = msgspec.msgpack.encode(Signed(payload, signature, certificate))
        assert not await store_raw(mallory, first, key, victim.transport.peer, forged, record.expires_s + 1)
    # an older record of the victim's, as it was, and dressed as a newer one
    assert not await store_raw(mallory, first, key, victim.transport.peer, signed_old, old.expires_s)
    assert not await store_raw(mallory, first, key, victim.transport.peer, signed_old, record.expires_s + 1)
    # under another subkey, under another key
    signed = sign_record(record, victim.membership)
    assert not await store_raw(mallory, first, key, mallory.transport.peer, signed, record.expires_s)
    assert not await store_raw(mallory, first, "another", victim.transport.peer, signed, record.expires_s)
    # oversized, empty, and not for ever
    assert not await store_raw(
        mallory, first, key, mallory.transport.peer, bytes(MAX_RECORD_BYTES + 1), time.time() + 60
    )
    assert not await store_raw(mallory, first, key, mallory.transport.peer, b"", time.time() + 60)
    own = msgspec.structs.replace(mallory.record(), expires_s=time.time() + 1e6)
    payload = msgspec.msgpack.encode(own)
    signature = mallory.membership.identity.sign(RECORD.statement(first.membership.swarm, payload))
    endless = msgspec.msgpack.encode(Signed(payload, signature, mallory.membership.certificate))
    assert not await store_raw(mallory, first, key, mallory.transport.peer, endless, own.expires_s)
    # the witness: what mallory may store, it can
    fair = mallory.record()
    assert await store_raw(
        mallory, first, key, mallory.transport.peer, sign_record(fair, mallory.membership), fair.expires_s
    )

    await until(lambda: first.sees(victim, mallory))
    (shown,) = [shown for shown in await first.directory.records() if shown.peer == victim.transport.peer]
    assert shown == record


def plan_of(node: Node, term: int = 1, **changes: object) -> PlanRecord:
    now_s = time.time()
    membership = node.membership
    plan = PlanRecord(
        *(node.transport.peer, ModelId("m" * 64), 30, "float32", term),
        draw(membership.identity, membership.swarm, ModelId("m" * 64), term),
        *(1, (1.0, 0.0), (Assignment(node.transport.peer, 0, 30),), 0.1, 0.1, 0.1, now_s, now_s + 30.0),
    )
    return msgspec.structs.replace(plan, **changes)


async def test_plans_lie_beside_the_records_under_their_authors_and_nobody_elses(swarm: Swarm) -> None:
    mallory, author, first = await swarm.join(), await swarm.join(), swarm.first
    plan = plan_of(author)
    await author.directory.publish_plan(plan)

    async def shown(wanted: PlanRecord) -> bool:
        return await first.directory.plans() == [wanted]

    await until(lambda: shown(plan))
    renewed = msgspec.structs.replace(plan, expires_s=plan.expires_s + 5, issued_s=plan.issued_s + 5)
    await author.directory.publish_plan(renewed)
    await until(lambda: shown(renewed))
    assert await first.sees()  # no plan is a node's record

    key, peer = first.directory._plans.key, author.transport.peer
    replayed = sign_plan(plan, author.membership)
    assert not await store_raw(mallory, first, key, peer, replayed, plan.expires_s)
    assert not await store_raw(mallory, first, key, peer, replayed, renewed.expires_s + 1)
    assert not await store_raw(mallory, first, key, mallory.transport.peer, replayed, plan.expires_s)
    assert not await store_raw(mallory, first, first.directory._nodes.key, peer, replayed, plan.expires_s)
    # another's lot; a record where plans lie; an oversized one
    stolen = plan_of(mallory, lot=plan.lot)
    payload = msgspec.msgpack.encode(stolen)
    signature = mallory.membership.identity.sign(PLAN.statement(first.membership.swarm, payload))
    forged = msgspec.msgpack.encode(Signed(payload, signature, mallory.membership.certificate))
    assert not await store_raw(mallory, first, key, mallory.transport.peer, forged, stolen.expires_s)
    record = mallory.record()
    signed = sign_record(record, mallory.membership)
    assert not await store_raw(mallory, first, key, mallory.transport.peer, signed, record.expires_s)
    huge = bytes(MAX_PLAN_BYTES + 1)
    assert not await store_raw(mallory, first, key, mallory.transport.peer, huge, time.time() + 30)
    # the witness
    fair = plan_of(mallory)
    assert await store_raw(
        mallory, first, key, mallory.transport.peer, sign_plan(fair, mallory.membership), fair.expires_s
    )
    assert len(await first.directory.plans()) == 2


async def test_a_full_shelf_of_plans_takes_a_better_lease(swarm: Swarm) -> None:
    """Whoever loses elections on purpose cannot keep the winner's plan out."""
    first, late = swarm.first, await swarm.join()
    protocol, shelf = first.directory._node.protocol, first.directory._plans
    key = DHTID.generate(source=shelf.key)

    def put(node: Node, plan: PlanRecord) -> bool:
        value = msgspec.msgpack.encode(sign_plan(plan, node.membership))
        subkey = msgspec.msgpack.encode(node.transport.peer)
        if not protocol._validate_record(shelf.id_bytes, subkey, value, plan.expires_s):
            return False
        return bool(protocol.storage.store(key, value, plan.expires_s, subkey=node.transport.peer))

    crowd = []
    for _ in range(MAX_PLANS):
        invite = swarm.founder.make_invite((), 3600, now_s=time.time())
        membership = Membership.from_invite(Identity.draw(), invite)
        crowd.append(Node(cast("Libp2pTransport", SimpleNamespace(peer=membership.peer)), membership, late.directory))
    assert all(put(node, plan_of(node, term=5)) for node in crowd)
    assert not put(late, plan_of(late, term=4))
    assert put(late, plan_of(late, term=6))
    plans = await first.directory.plans()
    assert len(plans) == MAX_PLANS
    assert late.transport.peer in {plan.author for plan in plans}


async def test_a_goodbye_cannot_be_undone_by_replaying_the_record(swarm: Swarm) -> None:
    mallory, victim, first = await swarm.join(), await swarm.join(), swarm.first
    record = victim.record()
    await victim.directory.publish(record)
    await until(lambda: first.sees(victim))
    signed = sign_record(record, victim.membership)
    await victim.directory.withdraw(record)
    await until(lambda: first.sees())
    assert not await store_raw(
        mallory, first, first.directory._nodes.key, victim.transport.peer, signed, record.expires_s
    )
    assert await first.sees()


async def test_a_spoilt_record_does_not_hide_the_others(swarm: Swarm) -> None:
    """A member whose own shelf holds garbage beside honest records."""
    mallory, first = await swarm.join(), swarm.first
    await first.directory.publish(first.record())
    shelf = mallory.directory._node.protocol.storage
    key = DHTID.generate(source=first.directory._nodes.key)
    await until(lambda: mallory.sees(first))
    shelf.store(key, b"\xc4\x01x", time.time() + 1e6, subkey="nobody")
    assert await first.sees(first)


async def test_a_request_carried_to_another_peer_or_repeated_is_refused(swarm: Swarm) -> None:
    from hivemind.proto import dht_pb2

    one = await swarm.join()
    authorizer = swarm.first.directory._node.protocol.authorizer
    signer = one.directory._node.protocol.authorizer
    request = dht_pb2.PingRequest()
    await signer.sign_request(request, swarm.first.membership.identity.public_key)
    assert await authorizer.validate_request(request)
    with pytest.raises(NotAMember, match="twice"):
        await authorizer.validate_request(request)
    await signer.sign_request(request, Identity.draw().public_key)
    with pytest.raises(NotAMember, match="another receiver"):
        await authorizer.validate_request(request)
    await signer.sign_request(request, swarm.first.membership.identity.public_key)
    request.validate = True
    with pytest.raises(NotAMember, match="not signed"):
        await authorizer.validate_request(request)


async def test_an_open_swarm_admits_without_a_certificate() -> None:
    async with AsyncExitStack() as stack:
        swarm = Swarm(stack, open_swarm=True)
        await swarm.begin()
        guest = await swarm.node(swarm.uninvited())
        await guest.directory.publish(guest.record())
        await until(lambda: swarm.first.sees(guest))


async def test_streams_are_for_members(swarm: Swarm) -> None:
    first = swarm.first
    admitted: list[Stream] = []

    async def serve(stream: Stream) -> None:
        await admit(stream, first.membership, 5.0)
        admitted.append(stream)
        while True:
            message, _ = await stream.receive()
            assert isinstance(message, Ping)
            await stream.send(Pong(message.nonce))

    await first.transport.listen(serve)
    member = await swarm.join()
    honest = await member.transport.dial(first.transport.peer, first.transport.addresses)
    await introduce(honest, member.membership, 5.0)

    async def still_served(nonce: int) -> None:
        await honest.send(Ping(nonce))
        assert (await asyncio.wait_for(honest.receive(), 5.0))[0] == Pong(nonce)

    await still_served(1)
    intruder = await Libp2pTransport.start(secrets.token_bytes(32), bootstrap=first.transport.addresses, listen=False)
    swarm.stack.push_async_callback(intruder.close)

    stream = await intruder.dial(first.transport.peer)
    with pytest.raises(NotAMember, match="no certificate"):
        await introduce(stream, swarm.uninvited(), 5.0)
    stolen = Membership(
        Identity.draw(), swarm_key=swarm.founder.swarm_key, open_swarm=True, certificate=member.membership.certificate
    )
    stream = await intruder.dial(first.transport.peer)
    with pytest.raises(NotAMember, match="another peer"):
        await introduce(stream, stolen, 5.0)
    await still_served(2)

    for raw in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        PREFIX.pack(0xFFFFFFFF, 0xFFFFFFFF),
        PREFIX.pack(16, MAX_BODY_BYTES) + bytes(16),
        PREFIX.pack(5, 0) + b"\xc1\xff\xc1\xff\xc1",
        secrets.token_bytes(4096),
    ):
        stream = await intruder.dial(first.transport.peer)
        await stream.send_bytes(raw)
        try:
            async with asyncio.timeout(5.0):
                answer, _ = await stream.receive()
                assert isinstance(answer, Refusal)
                with pytest.raises(PeerLost):
                    await stream.receive()
        except PeerError:
            pass  # closed without a word is a refusal, too
        await still_served(3)
    assert len(admitted) == 1


async def test_a_certificate_that_ends_shuts_its_holder_out(swarm: Swarm) -> None:
    brief = await swarm.join(lifetime_s=5.0)
    await brief.directory.publish(brief.record())
    await until(lambda: swarm.first.sees(brief))

    async def shut_out() -> bool:
        try:
            await brief.directory.records()
        except BsnsError as error:
            return isinstance(error, NotAMember) and "expired" in str(error)
        return False

    await until(shut_out)
    assert await swarm.first.sees()
