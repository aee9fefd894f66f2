"""The command's own words."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import bsns
from bsns.cli.main import app

VERBS = ["up", "serve", "generate", "chat", "status", "doctor", "gateway"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_an_example(verb: str) -> None:
    said = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "80", "TERM": "dumb"})
    assert said.exit_code == 0
    assert "Example:" in said.output
    assert re.search(rf"bsns {verb} ", said.output)
    assert "Usage" in said.output


def test_the_command_lists_its_verbs() -> None:
    said = CliRunner().invoke(app, ["--help"])
    assert all(verb in said.output for verb in [*VERBS, "bench"])


def test_version() -> None:
    said = CliRunner().invoke(app, ["--version"])
    assert said.output.strip() == f"bsns {bsns.__version__}"


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_routes_can_be_asked_for(verb: str) -> None:
    said = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert "--objective" in said.output
    assert "attested-only" in said.output


@pytest.mark.parametrize(("own", "expected"), [(None, "1"), ("0", "0")])
def test_large_pages_are_asked_for_before_torch_loads_unless_the_user_says_otherwise(
    own: str | None, expected: str
) -> None:
    code = """
import os, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("THP_MEM_ALLOC_ENABLE"))
sys.meta_path.insert(0, Watch())
import bsns.cli.main
print(os.environ["THP_MEM_ALLOC_ENABLE"])
import torch
"""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    if own is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = own
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    assert set(done.stdout.split()) == {expected}
