"""One running peer: its transport, its membership of a swarm, and the swarm's directory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from msgspec.structs import replace

from bsns.core.errors import BsnsError, PeerUnreachable
from bsns.core.ids import PeerId
from bsns.swarm.directory import Directory
from bsns.swarm.identity import Identity
from bsns.swarm.invites import MAX_BOOTSTRAP, Founder, invite_text, parse_invite
from bsns.swarm.membership import Membership, admit, introduce
from bsns.transport.clock import MACHINE_CLOCK, Clock
from bsns.transport.direct import DirectListener, connect, hosts_of
from bsns.transport.port import Handler, Stream, Transport

log = structlog.get_logger(__name__)

GREETING_S = 5.0
INVITE_LIFETIME_S = 30 * 86400.0


@dataclass(frozen=True, slots=True)
class Listen:
    """Where a peer listens. The default is reachable from this machine only."""

    host: str = "127.0.0.1"
    port: int = 0
    announce: tuple[str, ...] = ()


class Peer:
    """A member of a swarm with a place in the network. Made by `found` or `join`."""

    def __init__(
        self,
        transport: Transport,
        membership: Membership,
        directory: Directory,
        listen: Listen | None,
        invite: str,
        clock: Clock = MACHINE_CLOCK,
    ) -> None:
        self.transport = transport
        self.membership = membership
        self.directory = directory
        self.clock = clock
        self._listen = listen
        self._direct = DirectListener()
        self.invite = invite
        """The text others join with: made here by a founder; else the one we joined with, in which we come first if
        we can be dialled."""

    @property
    def id(self) -> PeerId:
        return self.transport.peer

    @classmethod
    async def found(cls, listen: Listen, *, open_swarm: bool = False) -> Peer:
        """Found a new swarm with this peer as its first member. Raises PortInUse, BadOption."""
        founder, identity = Founder.found(), Identity.draw()
        membership = Membership.of_founder(founder, identity, time.time(), open_swarm=open_swarm)
        transport, directory = await _start(identity, membership, listen, bootstrap=(), client_only=False)
        invite = founder.make_invite(
            transport.addresses, lifetime_s=INVITE_LIFETIME_S, now_s=time.time(), open_swarm=open_swarm
        )
        return cls(transport, membership, directory, listen, invite_text(invite))

    @classmethod
    async def join(cls, invite: str, listen: Listen | None) -> Peer:
        """Join by an invite; without `listen` as a client only, whom nobody can dial.

        Raises InviteInvalid, InviteExpired, NoSuchSwarm, NotAMember, PortInUse.
        """
        parsed = parse_invite(invite, time.time())
        identity = Identity.draw()
        membership = Membership.from_invite(identity, parsed)
        transport, directory = await _start(
            identity, membership, listen, bootstrap=parsed.bootstrap, client_only=listen is None
        )
        if listen is not None:  # others may join through us: the swarm outlives those it was founded by
            known = (*transport.addresses, *(at for at in parsed.bootstrap if at not in transport.addresses))
            invite = invite_text(replace(parsed, bootstrap=known[:MAX_BOOTSTRAP]))
        return cls(transport, membership, directory, listen, invite)

    async def dial(self, peer: PeerId, addresses: Sequence[str] = ()) -> Stream:
        """A greeted stream to another member. Raises PeerError or ProtocolError within seconds."""
        stream = await self.transport.dial(peer, addresses)
        offer = await introduce(stream, self.membership, GREETING_S, self.clock.unix_s)
        if offer is None:
            return stream
        try:
            direct = await connect(peer, offer)
        except PeerUnreachable as error:
            log.info("staying on libp2p", peer=peer, reason=error.message)
            return stream
        await stream.close()
        return direct

    async def listen(self, handler: Handler) -> None:
        """Serve every member that opens a stream; others are refused and never reach the handler."""

        async def guarded(stream: Stream) -> None:
            try:
                await admit(stream, self.membership, GREETING_S, self.clock.unix_s, self._direct.offer)
            except BsnsError as error:
                log.info("refused a stream", peer=stream.peer, error=error.code, reason=error.message)
                return
            await handler(stream)

        if self._listen is not None:
            await self._direct.start(self._listen.host, hosts_of(self.transport.addresses), handler)
        await self.transport.listen(guarded)

    async def close(self) -> None:
        await self._direct.close()
        await self.directory.close()
        await self.transport.close()


async def _start(
    identity: Identity, membership: Membership, listen: Listen | None, *, bootstrap: Sequence[str], client_only: bool
) -> tuple[Transport, Directory]:
    # hivemind loads torch: imported here so that whoever only plans or tests in memory does not pay for it
    from bsns.swarm.hivemind_directory import HivemindDirectory
    from bsns.transport.libp2p import Libp2pTransport

    place = listen or Listen()
    transport = await Libp2pTransport.start(
        identity.seed,
        bootstrap=bootstrap,
        host=place.host,
        port=place.port,
        announce=place.announce,
        listen=listen is not None,
    )
    try:
        directory = await HivemindDirectory.join(transport, membership, bootstrap, client_only=client_only)
    except BaseException:
        await transport.close()
        raise
    return transport, directory
