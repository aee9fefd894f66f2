"""The command's own words."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

import bsns
from bsns.cli.main import app

VERBS = ["up", "serve", "generate", "chat", "status", "doctor"]


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
