"""The native library's own test: random stages against a plain reference, against themselves, and under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bsns.native.library import native_library

NATIVE = Path(__file__).parents[2] / "native"
SECONDS = 10

COMPILER = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(not (shutil.which("cmake") and COMPILER), reason="needs cmake and a C++ compiler")


def must(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def run_rounds(program: Path) -> None:
    done = subprocess.run([program, str(SECONDS)], capture_output=True, text=True, timeout=60 * SECONDS, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    assert int(done.stdout.split()[0]) >= 10, "so few rounds would prove little"


def test_the_installed_library(tmp_path: Path) -> None:
    library = native_library()
    if isinstance(library, str):
        pytest.skip(library)
    program = tmp_path / "random_stages"
    found_at_run_time = f"-Wl,-rpath,{library.path.parent}"
    test = NATIVE / "tests" / "random_stages.cpp"
    must(COMPILER, "-std=c++20", "-O1", test, library.path, found_at_run_time, "-o", program)
    run_rounds(program)


@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_sanitizers(sanitize: str, tmp_path: Path) -> None:
    """Of two sets only: the widest, and the one that is plain C++. Compiling is what takes the time."""
    options = (f"-DBSNS_SANITIZE={sanitize}", "-DBSNS_ONLY=amx;dotprod", "-DCMAKE_BUILD_TYPE=None")
    must("cmake", "-S", NATIVE, "-B", tmp_path, "-DCMAKE_CXX_FLAGS=-O1", *options)
    must("cmake", "--build", tmp_path, "--target", "random_stages", "--parallel", os.cpu_count())
    run_rounds(tmp_path / "random_stages")
