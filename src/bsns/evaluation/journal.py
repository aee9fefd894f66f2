"""The journal of a run: a file with a line for each item that is done, so that an interrupted run goes on there."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import msgspec

from bsns.core.errors import BadOption, DiskFull
from bsns.evaluation.results import ItemResult

SUFFIX = ".partial"


class _Line(msgspec.Struct, frozen=True):
    task: str
    settings: str
    result: ItemResult


class Journal:
    """Open while its context is. Without a file it keeps what is done in memory only."""

    def __init__(self, output: Path | None, settings: str) -> None:
        """The journal lies beside `output`. `settings` (a digest): items of other settings count as not done."""
        self._file = None if output is None else output.expanduser().with_name(output.name + SUFFIX)
        self._settings = settings
        self._stream: BinaryIO | None = None
        self._done: dict[tuple[str, str], ItemResult] = {}

    @property
    def file(self) -> Path | None:
        """Where it lies."""
        return self._file

    def __len__(self) -> int:
        return len(self._done)

    def __enter__(self) -> Journal:
        """Raises BadOption for a file that cannot be written, or holds something else."""
        if self._file is not None:
            try:
                self._stream = self._file.open("a+b")
                self._read(self._stream)
            except OSError as error:
                raise BadOption(f"{self._file} cannot be written: {error.strerror}") from None
            except BaseException:
                self._close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def find(self, task: str, item: str) -> ItemResult | None:
        """What was found for an item, if it is done."""
        return self._done.get((task, item))

    def add(self, task: str, result: ItemResult) -> None:
        """An item is done. It is in the file when this returns, whatever becomes of the process. Raises DiskFull."""
        self._done[task, result.item] = result
        if self._stream is not None:
            try:
                self._stream.write(msgspec.json.encode(_Line(task, self._settings, result)) + b"\n")
                self._stream.flush()
            except OSError as error:
                raise DiskFull(f"{self._file} cannot be written any more: {error.strerror}") from None

    def finish(self) -> None:
        """The results are where they belong: the file is not needed any more."""
        self._close()
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _read(self, stream: BinaryIO) -> None:
        stream.seek(0)
        content = stream.read()
        whole = content.rfind(b"\n") + 1
        for number, text in enumerate(content[:whole].splitlines(), 1):
            try:
                line = msgspec.json.decode(text, type=_Line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                raise BadOption(
                    f"line {number} of {self._file} is no item of bsns eval; remove the file, or give another --output"
                ) from None
            if line.settings == self._settings:
                self._done[line.task, line.result.item] = line.result
        stream.truncate(whole)  # a process that was killed may have left half a line

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
