"""Data files: evaluation data inside installed packages, found without running those packages' code."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from bsns.core.errors import BadOption


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file in a package: `module` is its import name, `path` lies below it, `install` is the command for it."""

    module: str
    path: str
    install: str
    sha256: str

    def find(self) -> Path | None:
        """Where it is, or None where the package is not installed or lacks it."""
        # Found, not imported: such packages want libraries that nobody needs who only reads their files.
        try:
            spec = importlib.util.find_spec(self.module)
        except (ImportError, ValueError):
            return None
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (file := Path(folder) / self.path).is_file():
                return file
        return None

    def read(self) -> bytes:
        """What is in it. Raises BadOption if it is not there, or not what it was when the scores were compared."""
        file = self.find()
        if file is None:
            raise BadOption(f"{self.module}/{self.path} is not installed; run: {self.install}")
        try:
            content = file.read_bytes()
        except OSError as error:
            raise BadOption(f"{file} cannot be read: {error.strerror}") from None
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise BadOption(f"{file} is not the one these tasks were written for; run: {self.install}")
        return content
