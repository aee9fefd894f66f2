"""Commands forked where the libraries are loaded: they begin and end as if started anew."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from processes import Forked, environment, running, tiny, until

from bsns.core.errors import PeerFailed
from bsns.node import zygote
from bsns.node.processes import FORKS

__all__ = ["tiny"]

pytestmark = pytest.mark.skipif(not FORKS, reason="processes are forked on Linux")

SERVE = ("--blocks", "0:1", "--threads", "1", "--json")


def test_what_it_says_and_how_it_ends() -> None:
    version, mistake = Forked(["--version"], environment()), Forked(["sing"], environment())
    said, wrong = version.communicate(20), mistake.communicate(20)
    assert (said[0].split()[0], said[1], version.returncode) == ("bsns", "", 0)
    assert (wrong[0], mistake.returncode) == ("", 2)
    assert "sing" in wrong[1]


def test_it_begins_where_and_as_we_are(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    with running("serve", "./mine", *SERVE) as node:
        process = psutil.Process(node.pid)
        assert node.event("serving")["range"] == "0:1"
        assert process.nice() == nice
        assert process.cpu_affinity() == psutil.Process().cpu_affinity()
        assert process.cwd() == str(tmp_path)
        assert process.cmdline()[0].startswith("bsns serve ./mine")
        assert os.getsid(node.pid) == node.pid
        node.signal(signal.SIGKILL)
        assert node.finish().returncode == -signal.SIGKILL


def test_it_does_not_outlive_its_connection(tiny: str) -> None:
    """Not even one that is stopped, and heeds nothing."""
    read, write = os.pipe()
    connection = zygote.zygote().ask(["serve", *SERVE, tiny], environment(), (read, write, 2))
    process = psutil.Process(zygote.Forked.begun(connection).pid)
    process.suspend()
    connection.close()
    until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, 5, "its end")
    os.close(read)
    os.close(write)


def test_without_libraries_nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the zygote is killed, for want of memory say: what it was asked for is refused, and another begins."""
    monkeypatch.setattr(zygote, "_running", None)
    mine = zygote.zygote()
    connection = mine.ask(["--version"], environment(), (0, 1, 2))
    mine._process.kill()
    with pytest.raises(PeerFailed, match="no process could be started"):
        zygote.Forked.begun(connection)
    mine._process.wait()
    assert zygote.zygote() is not mine
    zygote.zygote()._process.kill()
