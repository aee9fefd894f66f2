"""Founding a swarm, and the invites that let others join it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import secrets
import struct
from collections.abc import Sequence

import msgspec

from bsns.core.errors import BadOption, InviteExpired, InviteInvalid
from bsns.core.ids import SwarmId
from bsns.protocol.membership import Invite
from bsns.swarm.identity import KEY_BYTES, SEED_BYTES, Identity, verify

INVITE_VERSION = 1
PREFIX = "bsns1-"
MAX_TEXT = 16 * 1024
MAX_BOOTSTRAP = 16
MAX_ADDRESS = 256

_decoder = msgspec.msgpack.Decoder(Invite)


def swarm_id(swarm_key: bytes) -> SwarmId:
    """The swarm's name: the first 16 bytes of its key's SHA-256, in hex."""
    return SwarmId(hashlib.sha256(swarm_key).digest()[:16].hex())


def invite_statement(invite_key: bytes, expires_s: float, open_swarm: bool) -> bytes:
    """What the swarm key signs to vouch for an invite key."""
    return b"bsns/invite/1" + invite_key + struct.pack("<d?", expires_s, open_swarm)


class Founder:
    """The holder of a swarm's key: alone able to make invites. Losing the seed loses that right for ever."""

    def __init__(self, seed: bytes) -> None:
        self._key = Identity(seed)
        self.seed = seed
        self.swarm_key = self._key.public_key
        self.swarm = swarm_id(self.swarm_key)

    @classmethod
    def found(cls) -> Founder:
        """Found a new swarm under a fresh key."""
        return cls(secrets.token_bytes(SEED_BYTES))

    def make_invite(
        self, bootstrap: Sequence[str], lifetime_s: float, open_swarm: bool = False, *, now_s: float
    ) -> Invite:
        """An invite valid until `now_s + lifetime_s`, for anybody who holds its text; certificates end with it too.

        `open_swarm` tells those who join by it to admit peers without a certificate. Raises BadOption.
        """
        if not (math.isfinite(lifetime_s) and lifetime_s > 0):
            raise BadOption(f"an invite cannot last {lifetime_s} s")
        if len(bootstrap) > MAX_BOOTSTRAP or any(not _is_address(address) for address in bootstrap):
            raise BadOption(f"bootstrap takes at most {MAX_BOOTSTRAP} multiaddresses that end in /p2p/ and a peer id")
        invite_seed = secrets.token_bytes(SEED_BYTES)
        expires_s = now_s + lifetime_s
        return Invite(
            version=INVITE_VERSION,
            swarm_key=self.swarm_key,
            open=open_swarm,
            expires_s=expires_s,
            invite_seed=invite_seed,
            signature=self._key.sign(invite_statement(Identity(invite_seed).public_key, expires_s, open_swarm)),
            bootstrap=tuple(bootstrap),
        )


def invite_text(invite: Invite) -> str:
    """The invite as one word to copy: `bsns1-` and base64url. Whoever reads it can join: it is a secret."""
    return PREFIX + base64.urlsafe_b64encode(msgspec.msgpack.encode(invite)).decode().rstrip("=")


def parse_invite(text: str, now_s: float) -> Invite:
    """The invite in a text. Raises InviteInvalid or InviteExpired with a line that says what is wrong."""
    text = "".join(text[: 2 * MAX_TEXT].split())
    if not text.startswith(PREFIX):
        raise InviteInvalid(f"this is not an invite: it should begin with {PREFIX!r}")
    if len(text) > MAX_TEXT:
        raise InviteInvalid("this invite is too long; copy exactly what the founder sent")
    encoded = text[len(PREFIX) :]
    try:
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        invite = _decoder.decode(raw)
    except (binascii.Error, ValueError):
        raise InviteInvalid("this invite is damaged or cut off; copy the whole of it, in one piece") from None
    if invite.version != INVITE_VERSION:
        raise InviteInvalid(f"this invite has version {invite.version}, this program knows {INVITE_VERSION}; upgrade")
    if len(invite.swarm_key) != KEY_BYTES or len(invite.invite_seed) != SEED_BYTES:
        raise InviteInvalid("this invite is damaged: its keys have the wrong size")
    if len(invite.bootstrap) > MAX_BOOTSTRAP or any(not _is_address(address) for address in invite.bootstrap):
        raise InviteInvalid("this invite's addresses are damaged; ask the swarm's founder for a new one")
    statement = invite_statement(Identity(invite.invite_seed).public_key, invite.expires_s, invite.open)
    if not verify(invite.swarm_key, statement, invite.signature):
        raise InviteInvalid("this invite's signature does not hold; ask the swarm's founder for a new one")
    if not now_s < invite.expires_s:
        age_s = now_s - invite.expires_s
        raise InviteExpired(f"this invite ended {age_s / 3600:.1f} hours ago; ask the swarm's founder for a new one")
    return invite


def _is_address(text: str) -> bool:
    return len(text) <= MAX_ADDRESS and text.isascii() and text.isprintable() and text[:1] == "/" and "/p2p/" in text
