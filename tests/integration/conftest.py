"""The process that commands are forked from starts with the first integration test."""

from __future__ import annotations

import os
from unittest import mock

import pytest
from processes import environment, heeded_signals

from bsns.node.processes import FORKS
from bsns.node.zygote import zygote


@pytest.fixture(scope="session", autouse=True)
def loaded() -> None:
    """In the environment that commands have: some of it is read when libraries load."""
    if FORKS:
        with mock.patch.dict(os.environ, environment()), heeded_signals():
            zygote()
