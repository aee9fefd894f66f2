"""Node identities: Ed25519 keys (RFC 8032) and the libp2p peer ids that contain their public half."""

from __future__ import annotations

import secrets
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from bsns.core.errors import BadFrame, BadOption
from bsns.core.ids import PeerId

SEED_BYTES = 32
KEY_BYTES = 32
SIGNATURE_BYTES = 64

# Identity multihash (code 0, 36 bytes) of a PublicKey protobuf (type 1 = Ed25519, 32 bytes of key):
# https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
_PEER_PREFIX = bytes.fromhex("002408011220")
_PEER_TEXT_MAX = 64


class Identity:
    """A key pair and its peer id. Raises BadOption unless the seed has 32 bytes."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise BadOption(f"an identity seed has {SEED_BYTES} bytes, not {len(seed)}")
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.seed = seed
        self.public_key: bytes = self._key.public_key().public_bytes_raw()
        self.peer = peer_of(self.public_key)

    @classmethod
    def draw(cls) -> Identity:
        """A fresh identity from the system's randomness."""
        return cls(secrets.token_bytes(SEED_BYTES))

    @classmethod
    def load_or_draw(cls, path: Path) -> Identity:
        """The identity whose seed is in a file, which is made, readable by its owner only, when absent."""
        try:
            return cls(path.read_bytes())
        except FileNotFoundError:
            identity = cls.draw()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600, exist_ok=False)
        path.write_bytes(identity.seed)
        return identity

    def sign(self, message: bytes) -> bytes:
        """A 64-byte signature; the caller separates domains by a prefix."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"Identity({self.peer})"


def peer_of(public_key: bytes) -> PeerId:
    """The libp2p peer id of an Ed25519 public key, "12D3Koo…"."""
    return PeerId(base58.b58encode(_PEER_PREFIX + public_key).decode())


def public_key_of(peer: str) -> bytes:
    """The public key inside a peer id. Raises BadFrame for anything but an Ed25519 peer id in its one spelling."""
    try:
        raw: bytes = base58.b58decode(peer) if 0 < len(peer) <= _PEER_TEXT_MAX else b""
    except ValueError:
        raw = b""
    key = raw[len(_PEER_PREFIX) :]
    if not raw.startswith(_PEER_PREFIX) or len(key) != KEY_BYTES or peer_of(key) != peer:
        raise BadFrame(f"{peer[:_PEER_TEXT_MAX]!r} is not the peer id of an Ed25519 key")
    return key


def verify(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether an Ed25519 signature holds; False for keys and signatures of a wrong size, too."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
