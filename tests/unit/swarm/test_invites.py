"""Invites: made by the founder, copied as one word, refused when damaged, forged or old."""

from __future__ import annotations

import msgspec
import pytest

from bsns.core.errors import BadOption, InviteExpired, InviteInvalid
from bsns.protocol.membership import Invite
from bsns.swarm.identity import Identity
from bsns.swarm.invites import Founder, invite_text, parse_invite, swarm_id

NOW_S = 1_800_000_000.0
BOOTSTRAP = (f"/ip4/192.0.2.1/tcp/4001/p2p/{Identity(bytes(32)).peer}",)


def invite(founder: Founder | None = None, lifetime_s: float = 3600.0) -> Invite:
    return (founder or Founder.found()).make_invite(BOOTSTRAP, lifetime_s, now_s=NOW_S)


def test_an_invite_survives_its_text() -> None:
    founder = Founder.found()
    made = invite(founder)
    text = invite_text(made)
    assert text.startswith("bsns1-")
    assert parse_invite(f"  {text[:40]}\n{text[40:]} ", NOW_S) == made
    assert swarm_id(made.swarm_key) == founder.swarm == Founder(founder.seed).swarm
    assert len(founder.swarm) == 32


def test_an_invite_ends() -> None:
    text = invite_text(invite())
    parse_invite(text, NOW_S + 3599)
    with pytest.raises(InviteExpired, match="founder"):
        parse_invite(text, NOW_S + 3600)


@pytest.mark.parametrize("text", ["", "hello", "bsns1-", "bsns1-####", "bsns1-AAAA", "bsns1-" + "A" * 100_000])
def test_nonsense_is_no_invite(text: str) -> None:
    with pytest.raises(InviteInvalid):
        parse_invite(text, NOW_S)


def test_every_cut_and_every_change_is_noticed() -> None:
    text = invite_text(invite())
    for end in range(len(text)):
        with pytest.raises(InviteInvalid):
            parse_invite(text[:end], NOW_S)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"swarm_key": Identity.draw().public_key},
        {"swarm_key": b"short"},
        {"open": True},
        {"expires_s": NOW_S + 1e9},
        {"expires_s": float("nan")},
        {"invite_seed": bytes(32)},
        {"invite_seed": bytes(31)},
        {"signature": bytes(64)},
        {"bootstrap": ("/ip4/1.2.3.4/tcp/1",)},
        {"bootstrap": BOOTSTRAP * 100},
    ],
)
def test_a_forged_invite_is_refused(change: dict[str, object]) -> None:
    forged = msgspec.structs.replace(invite(), **change)
    with pytest.raises(InviteInvalid):
        parse_invite(invite_text(forged), NOW_S)


def test_the_founder_cannot_make_nonsense() -> None:
    founder = Founder.found()
    with pytest.raises(BadOption):
        founder.make_invite(BOOTSTRAP, -1, now_s=NOW_S)
    with pytest.raises(BadOption):
        founder.make_invite(["localhost:80"], 60, now_s=NOW_S)
