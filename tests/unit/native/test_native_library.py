"""The native library: where it is looked for, and what is said where there is none."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from native_stages import library, needs_native

from bsns.core.errors import NotEnoughMemory
from bsns.native import library as native
from bsns.native.library import Block, Library, Matrix, Misuse, Segment, Shape, Source, native_library


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    native._loaded.cache_clear()
    monkeypatch.delenv("BSNS_NATIVE", raising=False)


@pytest.mark.parametrize("word", ["0", "off", "OFF"])
def test_it_can_be_turned_off(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BSNS_NATIVE", word)
    assert native_library() == "turned off by BSNS_NATIVE"


def test_what_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BSNS_NATIVE_LIBRARY", str(tmp_path / "nothing.so"))
    assert native_library() == "BSNS_NATIVE_LIBRARY names no file"
    monkeypatch.delenv("BSNS_NATIVE_LIBRARY")
    monkeypatch.setattr(native, "_installed", lambda: tmp_path / "_native.so")
    found = native_library()
    assert isinstance(found, str)
    assert found.startswith("not built")


def test_what_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "_native.so"
    file.write_text("words")
    monkeypatch.setenv("BSNS_NATIVE_LIBRARY", str(file))
    found = native_library()
    assert isinstance(found, str)
    assert "cannot be loaded" in found


def test_a_library_of_another_interface(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "other.c"
    source.write_text("int bsns_abi(void) { return 99; }")
    file = tmp_path / "other.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(file), str(source)], check=True, timeout=60)
    monkeypatch.setenv("BSNS_NATIVE_LIBRARY", str(file))
    found = native_library()
    assert isinstance(found, str)
    assert "interface 99" in found


@needs_native
def test_structures_lie_as_the_header_has_them(tmp_path: Path) -> None:
    """The compiler is asked for every size and offset."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    header = Path(__file__).parents[3] / "native" / "bsns_native.h"
    if compiler is None or not header.is_file():
        pytest.skip("no C compiler, or no header")
    pairs = {
        "bsns_matrix": Matrix,
        "bsns_shape": Shape,
        "bsns_block": Block,
        "bsns_segment": Segment,
        "bsns_source": Source,
    }
    wanted = [("BSNS_ABI", native.ABI)]
    for name, structure in pairs.items():
        wanted.append((f"sizeof({name})", ctypes.sizeof(structure)))
        for field, *_ in structure._fields_:
            wanted.append((f"offsetof({name}, {field})", getattr(structure, field).offset))
    for kind, number in native.KINDS.items():
        wanted.append((f"BSNS_{kind.upper()}", number))
    lines = "\n".join(f'_Static_assert({what} == {number}, "{what}");' for what, number in wanted)
    source = tmp_path / "layout.c"
    source.write_text(f'#include <stddef.h>\n#include "{header}"\n{lines}\n')
    subprocess.run([compiler, "-fsyntax-only", str(source)], check=True, timeout=60)


@needs_native
def test_memory_is_zeroed_and_freed_once() -> None:
    memory = library().memory(3 << 20)
    assert not any(memory.view[:: 1 << 12])
    memory.view[5] = 7
    memory.clear()
    assert memory.view[5] == 0
    memory.close()
    memory.close()
    with pytest.raises(NotEnoughMemory):
        library().memory(1 << 60)


@needs_native
def test_our_own_mistakes_are_told() -> None:
    with pytest.raises(Misuse, match="0 × 5"):
        library().matrix_bytes("int8", 0, 5)
    with pytest.raises(Misuse, match="threads"):
        library().pool(0)
    found: Library = library()
    pool = found.pool(2)
    pool.close()
    with pytest.raises(Misuse, match="closed"):
        _ = pool.pointer
