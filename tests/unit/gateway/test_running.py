"""Which answers are under way."""

from __future__ import annotations

import pytest

from bsns.client.pieces import Stats
from bsns.gateway.running import RunningAnswers


def test_two_answers_never_have_the_same_id(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter(["aa", "aa", "aa", "bb", "bb", "aa"])
    monkeypatch.setattr("bsns.gateway.running.secrets.token_hex", lambda size: next(drawn))
    running = RunningAnswers()
    with running.under_way("one", Stats(tokens=3)):
        with running.under_way("other", Stats(tokens=4)):
            assert [(id_, answer.id, answer.tenant) for id_, answer in running.answers.items()] == [
                ("aa", "aa", "one"),
                ("bb", "bb", "other"),
            ]
        assert list(running.answers) == ["aa"]
        with running.under_way("third", Stats()):
            assert list(running.answers) == ["aa", "bb"]
    assert (running.answers, running.tokens) == ({}, 7)
