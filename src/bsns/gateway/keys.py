"""API keys: random words that clients show, and the file that holds their hashes.

A key has 256 random bits: nobody finds it by trying, and one SHA-256 keeps it as safe as a slow hash would. Slow ones
(scrypt: some 50 ms) are for passwords, which people choose, and would be paid for every request.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
import tempfile
import time
from pathlib import Path

import msgspec

from bsns.core.errors import BadOption
from bsns.gateway.limits import Allowance

PREFIX = "bsns-"
_NAME = re.compile(r"[\w.@-]{1,64}")


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key as the file has it: whose it is and what it may, but not the key."""

    name: str
    sha256: str
    created_s: int
    requests_per_minute: int | None = None
    answers: int | None = None

    @property
    def allowance(self) -> Allowance:
        return Allowance(self.requests_per_minute, self.answers)


def read_keys(path: Path) -> list[Key]:
    """The keys of a file. Raises BadOption if it is none, or if others than its owner could add keys to it."""
    try:
        mode = path.stat().st_mode
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise BadOption(f"others may write to {path}, and so add keys; chmod 600 {path}")
        return msgspec.json.decode(path.read_bytes(), type=list[Key])
    except FileNotFoundError:
        raise BadOption(f"there is no key file {path}; bsns gateway keys add NAME --keys {path} makes one") from None
    except (OSError, msgspec.MsgspecError) as error:
        raise BadOption(f"{path} cannot be read as a key file: {error}") from error


def add_key(path: Path, name: str, allowance: Allowance = Allowance()) -> str:  # noqa: B008  frozen
    """A new key, which is told once and never kept. Raises BadOption."""
    keys = read_keys(path) if path.exists() else []
    if not _NAME.fullmatch(name):
        raise BadOption(f"{name!r} is no name for a key; use up to 64 letters, digits, dots, dashes or @")
    if any(key.name == name for key in keys):
        raise BadOption(f"{path} has a key of the name {name} already; remove it first, or take another name")
    word = PREFIX + secrets.token_urlsafe(32)
    key = Key(name, _hash(word), int(time.time()), allowance.requests_per_minute, allowance.answers)
    _write(path, [*keys, key])
    return word


def remove_key(path: Path, name: str) -> None:
    """A gateway that uses the file refuses the key from its next request on. Raises BadOption."""
    keys = read_keys(path)
    kept = [key for key in keys if key.name != name]
    if len(kept) == len(keys):
        raise BadOption(f"{path} has no key of the name {name}")
    _write(path, kept)


class KeyRing:
    """The keys of a file as they are now: it is read again when it has changed, so that a removed key stops at once."""

    def __init__(self, path: Path) -> None:
        """Raises BadOption."""
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._by_hash: dict[str, Key] = {}
        self._refresh()

    def find(self, word: str) -> Key | None:
        """Whose key this is. Raises BadOption if the file has become unreadable: then nobody is let in."""
        self._refresh()
        return self._by_hash.get(_hash(word))

    def __len__(self) -> int:
        return len(self._by_hash)

    def _refresh(self) -> None:
        try:
            now = self._path.stat()
            stamp = (now.st_mtime_ns, now.st_ino)
        except OSError:
            stamp = None
        if stamp is None or stamp != self._stamp:
            self._by_hash = {key.sha256: key for key in read_keys(self._path)}
            self._stamp = stamp


def _hash(word: str) -> str:
    return hashlib.sha256(word.encode()).hexdigest()


def _write(path: Path, keys: list[Key]) -> None:
    """Replace the file in one step; only its owner may read it."""
    try:
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # which has mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(keys), indent=2) + b"\n")
            os.replace(draft, path)
        except BaseException:
            os.unlink(draft)
            raise
    except OSError as error:
        raise BadOption(f"{path} cannot be written: {error.strerror}") from error
