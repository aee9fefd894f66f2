"""The lists of modules at the doors of packages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import bsns

HOUSE = Path(bsns.__file__).parent
LISTED = ("planning", "protocol", "swarm", "node", "routing", "worker", "client", "compression", "gateway")


@pytest.mark.parametrize("room", LISTED)
def test_a_packages_list_names_every_module_and_nothing_else(room: str) -> None:
    text = (HOUSE / room / "__init__.py").read_text()
    listed = re.findall(r"^(\w+)  +\S", text, re.MULTILINE)
    modules = {file.stem for file in (HOUSE / room).glob("*.py")} - {"__init__"}
    assert sorted(listed) == sorted(modules)
