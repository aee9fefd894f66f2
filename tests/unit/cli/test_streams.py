"""The command with standard streams that are closed, full, or of an encoding with few characters."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from bsns.cli.streams import replace_what_cannot_be_encoded

STREAMS = """
import sys, os
sys.argv[0] = "bsns"
import bsns.cli
print("told"), print("told", file=sys.stderr)
for descriptor in range(3):
    os.fstat(descriptor)
    assert os.get_inheritable(descriptor)
assert sys.stdin.read() == ""
"""


def ended(redirected: str, *command: str) -> tuple[int, str, str]:
    """The status, standard output and standard error of Python with these arguments."""
    words = ["sh", "-c", f'exec "$@" {redirected}', "sh", sys.executable, *command]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("closed", "out", "err"),
    [("<&-", "told\n", "told\n"), (">&-", "", "told\n"), ("2>&-", "told\n", ""), ("<&- >&- 2>&-", "", "")],
)
def test_what_was_closed_is_open_on_nothing(closed: str, out: str, err: str) -> None:
    assert ended(closed, "-c", STREAMS) == (0, out, err)


@pytest.mark.parametrize("closed", ["", ">&-"])
def test_the_command_does_not_need_them(closed: str) -> None:
    status, out, err = ended(closed, "-m", "bsns.cli.main", "--help")
    assert (status, "Usage" in out, err) == (0, not closed, "")


@pytest.mark.parametrize(
    ("full", "status", "said"),
    [
        (">/dev/full", 1, "error: the output cannot be written: No space left on device\n"),
        (">/dev/full 2>/dev/full", 1, ""),
    ],
)
def test_output_that_cannot_be_written_is_one_line(full: str, status: int, said: str) -> None:
    assert ended(full, "-m", "bsns.cli.main", "--help") == (status, "", said)


def test_a_mistake_that_cannot_be_told_has_its_status() -> None:
    assert ended("2>/dev/full", "-m", "bsns.cli.main", "nosuch") == (2, "", "")


def test_characters_that_the_encoding_lacks_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    replace_what_cannot_be_encoded()
    print("a 🌍")
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"a ?\n"  # type: ignore[attr-defined]
    assert sys.stderr.errors == "replace"
