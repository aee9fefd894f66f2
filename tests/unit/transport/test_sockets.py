"""Files of sockets: a killed process's are removed by the next, and nobody else's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bsns.transport import sockets


def test_only_what_the_dead_have_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "PLACE", tmp_path)
    ours = sockets.prefix()
    family = ours.split("-")[-3]
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [tmp_path / f"bsns-{family}-{dead.pid}-{name}-x-Y_.sock" for name in ("p2pd", "p2pclient")]
    others = [
        Path(f"{ours}p2pd-x.sock"),
        tmp_path / f"bsns-{family}-{os.getppid()}-p2pd-x.sock",
        tmp_path / f"bsns-1{family}-{dead.pid}-p2pd-x.sock",
        tmp_path / f"bsns-{family}-x-p2pd-x.sock",
        tmp_path / f"bsns-{family}-{dead.pid}.sock",
        tmp_path / "bsns-identity-x",
    ]
    for file in (*left, *others):
        file.touch()
    assert sockets.prefix() == ours
    assert sorted(tmp_path.iterdir()) == sorted(others)
