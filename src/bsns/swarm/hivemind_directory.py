"""The real directory: hivemind's Kademlia DHT, closed to everybody but members.

Every request and answer carries the sender's certificate and its Ed25519 signature, is bound to its receiver, and comes
over a connection whose peer id libp2p has proven. All records of a swarm live under one key, each under its author's
peer id; whoever stores or reads them checks them (swarm.records). Nothing is cached beyond that.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
from hivemind.dht import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
from hivemind.proto import auth_pb2, dht_pb2
from hivemind.utils.auth import AuthorizerBase
from hivemind.utils.timed_storage import ValueWithExpiration

from bsns.core.errors import (
    BadFrame,
    BsnsError,
    FrameTooLarge,
    NoSuchSwarm,
    NotAMember,
    PeerFailed,
    PeerTimedOut,
    ProtocolError,
)
from bsns.core.ids import PeerId
from bsns.protocol.membership import Certificate
from bsns.protocol.records import NodeRecord
from bsns.swarm.identity import public_key_of, verify
from bsns.swarm.membership import Membership
from bsns.swarm.records import MAX_RECORD_BYTES, open_record, sign_record

if TYPE_CHECKING:
    from bsns.transport.libp2p import Libp2pTransport

MAX_RECORDS = 2048
MAX_KEYS_PER_REQUEST = 16
MAX_REQUEST_BYTES = 12 * 1024 * 1024
RPC_DEADLINE_S = 2.0
READ_DEADLINE_S = 8.0
JOIN_DEADLINE_S = 5.0
MAX_CLOCK_SKEW_S = 60.0
_REMEMBERED_NONCES = 65536

log = logging.getLogger(__name__)
_bytes_decoder = msgspec.msgpack.Decoder(bytes)
_text_decoder = msgspec.msgpack.Decoder(str)
_certificate_decoder = msgspec.msgpack.Decoder(Certificate)
_REFUSAL = re.compile(r"""^(NotAMember|BadFrame|FrameTooLarge)\((['"])(.*)\2\)$""", re.DOTALL)

Rpc = Callable[..., Awaitable[Any]]
Clock = Callable[[], float]


class RecordGuard(RecordValidatorBase):  # type: ignore[misc]
    """Accepts nothing but members' signed records, under their own peer id, with the expiry they carry."""

    def __init__(self, membership: Membership, key: bytes, clock: Clock) -> None:
        self._membership = membership
        self._key = key
        self._clock = clock

    def validate(self, record: DHTRecord) -> bool:
        try:
            self.check(record)
        except BsnsError as error:
            log.debug("refused a record: %s", error)
            return False
        return True

    def check(self, record: DHTRecord) -> NodeRecord:
        """The node record inside a DHT record. Raises a ProtocolError with the reason."""
        if record.key != self._key:
            raise BadFrame("a record under a key that is not this swarm's")
        if len(record.value) > MAX_RECORD_BYTES + 8:
            raise FrameTooLarge(f"record of {len(record.value)} bytes; the limit is {MAX_RECORD_BYTES}")
        try:
            author = PeerId(_text_decoder.decode(record.subkey))
            signed = _bytes_decoder.decode(record.value)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise BadFrame("a record that is not bytes under a peer id") from None
        node = open_record(signed, self._membership, self._clock(), author)
        if node.expires_s != record.expiration_time:
            raise BadFrame(f"the record of {author} is shown with another expiry than it carries")
        return node


class MemberAuthorizer(AuthorizerBase):  # type: ignore[misc]
    """Signs our requests and answers and judges others'.

    The signature covers the whole message, with its kind, its receiver, the time and a nonce. AccessToken carries:
    username = peer id, signature = certificate (msgpack), empty in an open swarm for those who have none.
    """

    def __init__(self, membership: Membership, clock: Clock) -> None:
        self._membership = membership
        self._clock = clock
        self._nonces: OrderedDict[bytes, None] = OrderedDict()

    async def sign_request(self, request: Any, service_public_key: bytes | None) -> None:
        auth = request.auth
        auth.Clear()
        auth.client_access_token.CopyFrom(self._token())
        auth.service_public_key = service_public_key or b""
        auth.time = self._clock()
        auth.nonce = secrets.token_bytes(16)
        auth.signature = self._membership.identity.sign(_statement(b"request", request))

    async def validate_request(self, request: Any) -> bool:
        """True, or raises NotAMember with the reason, which reaches the caller."""
        auth = request.auth
        if request.ByteSize() > MAX_REQUEST_BYTES:
            raise FrameTooLarge(f"request of {request.ByteSize()} bytes; the limit is {MAX_REQUEST_BYTES}")
        sender = self._sender(auth.client_access_token)
        if auth.service_public_key != self._membership.identity.public_key:
            raise NotAMember(f"a request of {sender} was made for another receiver")
        skew_s = abs(auth.time - self._clock())
        if not skew_s <= MAX_CLOCK_SKEW_S:
            raise NotAMember(
                f"the clocks of {sender} and {self._membership.peer} differ by {skew_s:.0f} s; set them right"
            )
        self._check_signature(b"request", request, sender)
        seen = sender.encode() + auth.nonce
        if len(auth.nonce) != 16 or seen in self._nonces:
            raise NotAMember(f"a request of {sender} came twice")
        self._nonces[seen] = None
        if len(self._nonces) > _REMEMBERED_NONCES:
            self._nonces.popitem(last=False)
        return True

    async def sign_response(self, response: Any, request: Any) -> None:
        auth = response.auth
        auth.Clear()
        auth.service_access_token.CopyFrom(self._token())
        auth.nonce = request.auth.nonce
        auth.signature = self._membership.identity.sign(_statement(b"response", response))

    async def validate_response(self, response: Any, request: Any) -> bool:
        """True, or raises NotAMember."""
        sender = self._sender(response.auth.service_access_token)
        if response.auth.nonce != request.auth.nonce:
            raise NotAMember(f"{sender} answered another request than ours")
        self._check_signature(b"response", response, sender)
        return True

    def _token(self) -> auth_pb2.AccessToken:
        certificate = self._membership.certificate
        return auth_pb2.AccessToken(
            username=self._membership.peer,
            signature=msgspec.msgpack.encode(certificate) if certificate is not None else b"",
        )

    def _sender(self, token: auth_pb2.AccessToken) -> PeerId:
        """Whose message this claims to be, once its certificate is proven. Raises NotAMember."""
        sender = PeerId(token.username[:64])
        certificate: Certificate | None = None
        if token.signature:
            try:
                certificate = _certificate_decoder.decode(token.signature)
            except (msgspec.DecodeError, UnicodeDecodeError):
                raise NotAMember(f"the certificate that {sender!r} showed cannot be read") from None
        self._membership.verify(certificate, sender, self._clock())
        return sender

    def _check_signature(self, role: bytes, message: Any, sender: PeerId) -> None:
        signature = message.auth.signature
        message.auth.signature = b""
        try:
            signed = verify(public_key_of(sender), _statement(role, message), signature)
        finally:
            message.auth.signature = signature
        if not signed:
            raise NotAMember(f"a {role.decode()} that claims to be of {sender} is not signed by it")


def _statement(role: bytes, message: Any) -> bytes:
    """What is signed of a DHT message whose own signature field is still empty."""
    kind: str = type(message).__name__
    body: bytes = message.SerializeToString(deterministic=True)
    return b"bsns/dht-%s/1/%s/" % (role, kind.encode()) + body


class _Door:
    """Stands before our DHT's handlers: only signed requests of members, sent by themselves, pass."""

    def __init__(self, protocol: DHTProtocol, authorizer: MemberAuthorizer) -> None:
        self.rpc_ping = self._guard(protocol.rpc_ping, authorizer)
        self.rpc_store = self._guard(protocol.rpc_store, authorizer)
        self.rpc_find = self._guard(protocol.rpc_find, authorizer)

    @staticmethod
    def _guard(handle: Rpc, authorizer: MemberAuthorizer) -> Rpc:
        async def guarded(request: Any, context: P2PContext) -> Any:
            await authorizer.validate_request(request)
            _check_bearer(request.auth.client_access_token, context.remote_id)
            if max(len(getattr(request, "keys", ())), len(getattr(request, "values", ()))) > MAX_KEYS_PER_REQUEST:
                raise FrameTooLarge(f"more than {MAX_KEYS_PER_REQUEST} keys in one request")
            response = await handle(request, context)
            await authorizer.sign_response(response, request)
            return response

        return guarded


@dataclass
class _Verdicts:
    """What the peers we called made of us since the last operation began."""

    refused: dict[PeerId, BsnsError] = field(default_factory=dict)
    answered: int = 0


class _Caller:
    """Calls a peer's DHT: signs for that peer alone, and believes only its own signed answers."""

    def __init__(self, stub: Any, peer: PeerID, authorizer: MemberAuthorizer, verdicts: _Verdicts) -> None:
        self._peer = peer
        self._authorizer = authorizer
        self._verdicts = verdicts
        self.rpc_ping = self._guard(stub.rpc_ping)
        self.rpc_store = self._guard(stub.rpc_store)
        self.rpc_find = self._guard(stub.rpc_find)

    def _guard(self, call: Rpc) -> Rpc:
        async def guarded(request: Any, timeout: float | None = None) -> Any:
            name = PeerId(self._peer.to_base58())
            await self._authorizer.sign_request(request, public_key_of(name))
            try:
                response = await call(request, timeout=timeout)
                _check_bearer(response.auth.service_access_token, self._peer)
                await self._authorizer.validate_response(response, request)
            except P2PHandlerError as error:
                refusal = _refusal_in(str(error))
                if refusal is None:
                    raise
                self._verdicts.refused[name] = refusal
                raise refusal from None
            self._verdicts.answered += 1
            return response

        return guarded


def _check_bearer(token: auth_pb2.AccessToken, proven: PeerID) -> None:
    """Raises NotAMember unless the message comes from the peer that signed it, not through another."""
    if token.username != proven.to_base58():
        raise NotAMember(f"a message of {token.username[:64]!r} was carried by {proven.to_base58()}")


def _refusal_in(text: str) -> BsnsError | None:
    """The typed error in what a peer's handler raised, which hivemind sends as its repr; None for anything else."""
    found = _REFUSAL.match(text[:600])
    if found is None:
        return None
    kind = {"NotAMember": NotAMember, "BadFrame": BadFrame, "FrameTooLarge": FrameTooLarge}[found[1]]
    message = "".join(letter for letter in found[3] if letter.isprintable())
    return kind(f"refused: {message}")


class _MemberProtocol(DHTProtocol):  # type: ignore[misc]
    """hivemind's DHT conversation between members, about one key, with bounded storage."""

    # each class collects its own handlers; hivemind looks these up on the class and would find its parent's
    _rpc_handlers = None
    _stub_type = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.verdicts = _Verdicts()

    async def add_p2p_handlers(self, p2p: P2P, wrapper: Any = None, **options: Any) -> None:
        await super().add_p2p_handlers(p2p, _Door(self, self.authorizer), **options)

    def get_stub(self, peer: PeerID) -> _Caller:
        return _Caller(ServicerBase.get_stub.__func__(type(self), self.p2p, peer), peer, self.authorizer, self.verdicts)

    async def call_find(self, peer: PeerID, keys: Collection[DHTID]) -> Any:
        """As hivemind's, but a found value expires when its records do: a claim of more would end the search early."""
        found = await super().call_find(peer, keys)
        for key, (value, nearest) in list((found or {}).items()):
            if value is not None:
                ends = [expiration_time for _, (_, expiration_time) in value.value.items()]
                found[key] = (ValueWithExpiration(value.value, max(ends)) if ends else None, nearest)
        return found

    def _validate_record(self, key: bytes, subkey: bytes, value: bytes, expiration_time: float) -> bool:
        """One record to store: valid, and not of a newcomer when the store is full."""
        held = self.storage.get(DHTID.from_bytes(key))
        full = held is not None and isinstance(held.value, DictionaryDHTValue) and len(held.value) >= MAX_RECORDS
        if full and self.serializer.loads(subkey) not in held.value:
            return False
        return bool(super()._validate_record(key, subkey, value, expiration_time))

    def _validate_dictionary(self, key: bytes, dictionary: DictionaryDHTValue) -> bool:
        """Many records, read or replicated: the bad ones are dropped, so that one cannot spoil the others."""
        with dictionary.freeze():
            for number, (subkey, (value, expiration_time)) in enumerate(list(dictionary.items())):
                sound = isinstance(value, bytes) and number < MAX_RECORDS
                subkey_bytes = self.serializer.dumps(subkey)
                record = DHTRecord(key, subkey_bytes, value, expiration_time)
                if not sound or not self.record_validator.validate(record):
                    del dictionary[subkey]
        return True


class HivemindDirectory:
    """One swarm's directory (swarm.directory.Directory), held by the transports of its members."""

    def __init__(self, node: DHTNode, membership: Membership, guard: RecordGuard, client_only: bool, clock: Clock):
        self._node = node
        self._membership = membership
        self._guard = guard
        self._client_only = client_only
        self._clock = clock
        self._key = _key_name(membership)
        self._last_expiry_s = 0.0
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
        key = DHTID.generate(source=_key_name(membership)).to_bytes()
        guard = RecordGuard(membership, key, clock)
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
        node.protocol = await _MemberProtocol.create(
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
        directory = cls(node, membership, guard, client_only, clock)
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

    async def publish(self, record: NodeRecord) -> None:
        """Announce this node; its expiry is cut to our certificate's. Raises PeerFailed if nobody took the record."""
        # room for a goodbye, which has to expire later to replace the record
        latest_s = self._membership.expires_s - 1.0
        await self._store(msgspec.structs.replace(record, expires_s=min(record.expires_s, latest_s)))

    async def withdraw(self, record: NodeRecord) -> None:
        """Replace our record by one that says `leaving` and outlives every earlier one, so none can be replayed."""
        expires_s = max(record.expires_s, self._last_expiry_s)
        expires_s = min(expires_s + 0.5, self._membership.expires_s)
        await self._store(msgspec.structs.replace(record, state="leaving", expires_s=expires_s))

    async def _store(self, record: NodeRecord) -> None:
        if record.expires_s <= self._last_expiry_s:  # the DHT keeps whichever expires later
            record = msgspec.structs.replace(record, expires_s=self._last_expiry_s + 0.001)
        signed = sign_record(record, self._membership)
        self._last_expiry_s = record.expires_s
        self._node.protocol.verdicts = _Verdicts()
        try:
            async with asyncio.timeout(READ_DEADLINE_S):
                stored = await self._node.store(
                    self._key, signed, record.expires_s, subkey=record.peer, exclude_self=self._client_only
                )
        except TimeoutError:
            raise PeerTimedOut(f"storing our record took more than {READ_DEADLINE_S:g} s") from None
        if not stored:
            self._raise_refusal()
            raise PeerFailed("nobody in the swarm took our record")

    async def records(self) -> list[NodeRecord]:
        """Raises NotAMember when the swarm refuses us, PeerTimedOut after 8 s."""
        self._node.protocol.verdicts = _Verdicts()
        try:
            async with asyncio.timeout(READ_DEADLINE_S):
                found = await self._node.get(self._key, latest=True)
        except TimeoutError:
            raise PeerTimedOut(f"reading the directory took more than {READ_DEADLINE_S:g} s") from None
        now_s = self._clock()
        here: list[NodeRecord] = []
        for author, item in found.value.items() if found is not None else ():
            try:
                record = open_record(item.value, self._membership, now_s, author)
            except ProtocolError as error:  # expired since it was received
                log.debug("left out a record: %s", error)
                continue
            if record.state != "leaving":
                here.append(record)
        if not here:
            self._raise_refusal()
        return sorted(here, key=lambda record: record.peer)

    def _raise_refusal(self) -> None:
        """Raises what the others said, when they refused us and nobody answered: then empty-handed means shut out."""
        verdicts: _Verdicts = self._node.protocol.verdicts
        if verdicts.refused and not verdicts.answered:
            raise next(iter(verdicts.refused.values()))

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            async with asyncio.timeout(RPC_DEADLINE_S):
                await self._node.shutdown()
        except (TimeoutError, P2PDaemonError, OSError) as error:
            log.debug("the DHT did not close in order: %s", error)


def _key_name(membership: Membership) -> str:
    return f"bsns/{membership.swarm}/nodes/1"
