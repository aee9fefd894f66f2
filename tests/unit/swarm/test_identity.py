"""Identities: keys inside peer ids, and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from bsns.core.errors import BadFrame, BadOption
from bsns.swarm.identity import Identity, peer_of, public_key_of, verify


def test_rfc_8032_test_1() -> None:
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    identity = Identity(seed)
    assert identity.public_key.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert identity.sign(b"").hex().startswith("e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8")


def test_a_peer_id_contains_its_key() -> None:
    identity = Identity.draw()
    assert identity.peer.startswith("12D3Koo")
    assert public_key_of(identity.peer) == identity.public_key
    assert peer_of(identity.public_key) == identity.peer


@pytest.mark.parametrize(
    "text", ["", "12D3Koo", "0OIl", "Qm" + "a" * 44, "x" * 10_000, "12D3KooW" + "1" * 44, "1" + Identity.draw().peer]
)
def test_other_texts_are_no_peer_ids(text: str) -> None:
    with pytest.raises(BadFrame):
        public_key_of(text)


def test_signatures() -> None:
    one, other = Identity.draw(), Identity.draw()
    signature = one.sign(b"message")
    assert verify(one.public_key, b"message", signature)
    assert not verify(one.public_key, b"massage", signature)
    assert not verify(other.public_key, b"message", signature)
    assert not verify(b"short", b"message", signature)
    assert not verify(one.public_key, b"message", b"short")


def test_an_identity_is_kept_in_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "home" / "identity"
    identity = Identity.load_or_draw(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identity.load_or_draw(path).peer == identity.peer
    path.write_bytes(b"cut")
    with pytest.raises(BadOption):
        Identity.load_or_draw(path)
