"""What closes hivemind's Kademlia DHT to everybody but members: checked records, signed requests, bounded storage.

Every request and answer carries the sender's certificate and its Ed25519 signature, is bound to its receiver, and comes
over a connection whose peer id libp2p has proven.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase
from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError
from hivemind.proto import auth_pb2
from hivemind.utils.auth import AuthorizerBase
from hivemind.utils.timed_storage import ValueWithExpiration

from bsns.core.errors import BadFrame, BsnsError, FrameTooLarge, NotAMember
from bsns.core.ids import PeerId
from bsns.protocol.membership import Certificate
from bsns.protocol.plans import PlanRecord
from bsns.protocol.records import NodeRecord
from bsns.swarm.identity import public_key_of, verify
from bsns.swarm.membership import Membership
from bsns.swarm.plans import MAX_LEASE_S, MAX_PLAN_BYTES, lease_of, open_plan
from bsns.swarm.records import MAX_LIFETIME_S, MAX_RECORD_BYTES, open_record

MAX_RECORDS = 2048
MAX_PLANS = 12
"""Of all models and of those that lost an election: with MAX_PLAN_BYTES they fit one answer."""
MAX_KEYS_PER_REQUEST = 16
MAX_REQUEST_BYTES = 12 * 1024 * 1024
MAX_CLOCK_SKEW_S = 60.0
_REMEMBERED_NONCES = 65536

log = logging.getLogger(__name__)
_bytes_decoder = msgspec.msgpack.Decoder(bytes)
_text_decoder = msgspec.msgpack.Decoder(str)
_certificate_decoder = msgspec.msgpack.Decoder(Certificate)
_REFUSAL = re.compile(r"""^(NotAMember|BadFrame|FrameTooLarge)\((['"])(.*)\2\)$""", re.DOTALL)

Rpc = Callable[..., Awaitable[Any]]
Clock = Callable[[], float]


class Shelf(NamedTuple):
    """One key of the DHT: what lies there, each record under its author's peer id, how large, how many, how long."""

    key: str
    open: Callable[[bytes, Membership, float, PeerId], NodeRecord | PlanRecord]
    max_bytes: int
    max_records: int
    max_life_s: float

    @property
    def id_bytes(self) -> bytes:
        id_bytes: bytes = DHTID.generate(source=self.key).to_bytes()
        return id_bytes


def node_shelf(membership: Membership) -> Shelf:
    """Where the swarm's nodes announce themselves."""
    return Shelf(f"bsns/{membership.swarm}/nodes/1", open_record, MAX_RECORD_BYTES, MAX_RECORDS, MAX_LIFETIME_S)


def plan_shelf(membership: Membership) -> Shelf:
    """Where orchestrators announce their leases and plans."""
    return Shelf(f"bsns/{membership.swarm}/plans/1", open_plan, MAX_PLAN_BYTES, MAX_PLANS, MAX_LEASE_S)


class RecordGuard(RecordValidatorBase):  # type: ignore[misc]
    """Accepts nothing but members' signed records, under their own peer id, with the expiry they carry."""

    def __init__(self, membership: Membership, shelves: Iterable[Shelf], clock: Clock) -> None:
        self._membership = membership
        self._shelves = {shelf.id_bytes: shelf for shelf in shelves}
        self._clock = clock

    def shelf(self, key: bytes) -> Shelf | None:
        return self._shelves.get(key)

    def validate(self, record: DHTRecord) -> bool:
        try:
            self.check(record)
        except BsnsError as error:
            log.debug("refused a record: %s", error)
            return False
        return True

    def check(self, record: DHTRecord) -> NodeRecord | PlanRecord:
        """What a DHT record contains. Raises a ProtocolError with the reason."""
        shelf = self._shelves.get(record.key)
        if shelf is None:
            raise BadFrame("a record under a key that is not this swarm's")
        if len(record.value) > shelf.max_bytes + 8:
            raise FrameTooLarge(f"record of {len(record.value)} bytes; the limit is {shelf.max_bytes}")
        try:
            author = PeerId(_text_decoder.decode(record.subkey))
            signed = _bytes_decoder.decode(record.value)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise BadFrame("a record that is not bytes under a peer id") from None
        opened = shelf.open(signed, self._membership, self._clock(), author)
        if opened.expires_s != record.expiration_time:
            raise BadFrame(f"the record of {author} is shown with another expiry than it carries")
        return opened


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
class Verdicts:
    """What the peers we called made of us since the last operation began."""

    refused: dict[PeerId, BsnsError] = field(default_factory=dict)
    answered: int = 0


class _Caller:
    """Calls a peer's DHT: signs for that peer alone, and believes only its own signed answers."""

    def __init__(self, stub: Any, peer: PeerID, authorizer: MemberAuthorizer, verdicts: Verdicts) -> None:
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


class MemberProtocol(DHTProtocol):  # type: ignore[misc]
    """hivemind's DHT conversation between members, about the swarm's shelves, with bounded storage."""

    # each class collects its own handlers; hivemind looks these up on the class and would find its parent's
    _rpc_handlers = None
    _stub_type = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.verdicts = Verdicts()

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
        """One record to store: valid, and on a full shelf not of a newcomer, unless its lease beats one there."""
        if not super()._validate_record(key, subkey, value, expiration_time):
            return False
        shelf = self.record_validator.shelf(key)
        held = self.storage.get(DHTID.from_bytes(key))
        if held is None or not isinstance(held.value, DictionaryDHTValue) or len(held.value) < shelf.max_records:
            return True
        if self.serializer.loads(subkey) in held.value:
            return True
        newcomer = self._opened(key, subkey, value, expiration_time)
        if not isinstance(newcomer, PlanRecord):
            return False
        for author, (there, expires_s) in list(held.value.items()):
            opened = self._opened(key, self.serializer.dumps(author), there, expires_s)
            if not isinstance(opened, PlanRecord) or lease_of(newcomer).beats(lease_of(opened)):
                del held.value[author]
                return True
        return False

    def _opened(self, key: bytes, subkey: bytes, value: bytes, expires_s: float) -> NodeRecord | PlanRecord | None:
        record = DHTRecord(key, subkey, value, expires_s)
        guard: RecordGuard = self.record_validator
        return guard.check(record) if guard.validate(record) else None

    def _validate_dictionary(self, key: bytes, dictionary: DictionaryDHTValue) -> bool:
        """Many records, read or replicated: the bad ones are dropped, so that one cannot spoil the others."""
        shelf = self.record_validator.shelf(key)
        most = shelf.max_records if shelf is not None else 0
        with dictionary.freeze():
            for number, (subkey, (value, expiration_time)) in enumerate(list(dictionary.items())):
                sound = isinstance(value, bytes) and number < most
                subkey_bytes = self.serializer.dumps(subkey)
                record = DHTRecord(key, subkey_bytes, value, expiration_time)
                if not sound or not self.record_validator.validate(record):
                    del dictionary[subkey]
        return True
