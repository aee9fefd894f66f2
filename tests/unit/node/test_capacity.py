"""What a serving node decides about itself before it loads anything."""

from __future__ import annotations

import subprocess
import sys
from typing import cast

import pytest

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption, NotEnoughMemory, NotHere
from bsns.core.ids import ModelId, PeerId, SessionId
from bsns.core.memory import MemoryUse
from bsns.model.source import ModelSource
from bsns.node.capacity import Room, ServeOptions, choose_blocks, choose_device, choose_dtype, machine_of, rss_bytes
from bsns.protocol.inference import Open
from bsns.worker.journal import Journal
from bsns.worker.sessions import SessionTable

BLOCK_BYTES = [100 * 2**20] * 4


class Shape:
    """As much of a ModelSource as the choice looks at."""

    block_count = 4
    context_tokens = 128


def choose(blocks: str, room_mib: int) -> BlockRange:
    options = ServeOptions(blocks=blocks, memory_bytes=rss_bytes() + room_mib * 2**20)
    return choose_blocks(options, cast("ModelSource", Shape()), [], BLOCK_BYTES, kv_bytes=1, row_bytes=0)


def test_auto_takes_as_much_as_fits() -> None:
    assert choose("auto", 280) == BlockRange(0, 2)
    assert choose("auto", 1000) == BlockRange(0, 4)


def test_a_range_that_does_not_fit_says_how_much_would() -> None:
    assert choose("1:3", 280) == BlockRange(1, 3)
    with pytest.raises(NotEnoughMemory, match=r"blocks 0:3 do not fit .* 2 of them do"):
        choose("0:3", 280)


def test_dtype_follows_the_swarm() -> None:
    assert choose_dtype("auto", "cpu", ["float32", "bfloat16", "float32"]) == "float32"
    assert choose_dtype("float32", "cpu", []) == "float32"
    assert choose_dtype("auto", "cuda", []) == "bfloat16"
    with pytest.raises(NotHere, match="serves the model in bfloat16"):
        choose_dtype("float32", "cpu", ["bfloat16"])
    with pytest.raises(BadOption, match="float8"):
        choose_dtype("float8", "cpu", [])


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu") == "cpu"
    with pytest.raises(BadOption, match=r"available: .*cpu"):
        choose_device("abacus")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere machines have no name")
def test_processes_of_one_machine_name_it_alike() -> None:
    code = "import sys; from bsns.node.capacity import machine_of; print(machine_of('cpu', 'swarm').hex())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    mine = machine_of("cpu", "swarm")
    assert other.stdout.strip() == mine.hex()
    if mine:  # where the control group has no quota
        assert (
            len({mine, machine_of("cpu", "another"), machine_of("cuda:0", "swarm"), machine_of("cuda:1", "swarm")}) == 4
        )


def test_what_is_in_use_counts_the_tokens_that_sessions_have_come_to() -> None:
    room = Room(
        usable_bytes=10**6,
        block_bytes=[100, 200, 300, 400],
        kv_bytes=4,
        row_bytes=10,
        cache_bytes=10**6,
        least_tokens=1,
        most_tokens=100,
        baseline_bytes=7,
    )
    sessions = SessionTable(
        model=ModelId("m"), held=BlockRange(1, 4), dtype="float32", cache_tokens=50, context_tokens=40
    )
    assert room.in_use(sessions) == MemoryUse(7, 900, 0, 0, 50 * (3 * 4 + 10))
    session = sessions.open(
        Open(SessionId(1), ModelId("m"), 1, 3, "float32", 30, depth=1, next_peer=None), PeerId("client"), now_s=0.0
    )
    session.end, session.journal = 5, Journal(10)
    session.journal.write(0, bytes(50), 1)
    now = room.in_use(sessions)
    assert (now.kv_bytes, now.journal_bytes) == (5 * 2 * 4, 50)
    assert now.now_bytes == 7 + 900 + 40 + 50


def test_a_node_that_only_serves_loads_nothing_that_planning_needs() -> None:
    code = "import sys, bsns.node.server; sys.exit(bool({'scipy.optimize', 'ortools'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
