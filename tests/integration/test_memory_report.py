"""What a node says it has in memory, beside what the system says."""

from __future__ import annotations

import time

import pytest
from processes import running, status


@pytest.mark.parametrize(
    "options",
    [
        ("--quant", "int8", "--kv", "int8"),  # it follows the orchestrator, and is it
        ("--blocks", "0:10", "--executor", "torch"),
        ("--blocks", "0:10", "--executor", "torch", "--dtype", "float32", "--quant", "int8"),
    ],
)
def test_what_is_reckoned_is_what_is_resident(options: tuple[str, ...]) -> None:
    with running("serve", "smollm2-135m", *options, "--threads", "1", "--json") as node:
        invite = node.event("serving")["invite"]
        if "--blocks" not in options:
            time.sleep(8)  # until it has been elected, and has planned
        (told,) = status(invite)["nodes"]
    memory = told["memory"]
    assert memory["resident_bytes"] == pytest.approx(memory["predicted_bytes"], rel=0.05)
    assert memory["weight_bytes"] > 30e6
    assert memory["full_bytes"] > memory["predicted_bytes"]
