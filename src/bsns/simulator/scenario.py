"""Scenarios: the file that says what is simulated, with every value checked."""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption
from bsns.core.plan import LEAST_CACHE_TOKENS

MAX_NODES = 20_000
MAX_SPREAD = 10.0
Kind = Literal["crash", "freeze", "slow", "cut", "flap", "lie", "jump", "leave"]
RANDOM_KINDS: tuple[Kind, ...] = ("crash", "freeze", "slow", "cut", "flap", "lie")


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The model that the swarm serves. Sizes per block and token, in bytes."""

    blocks: int = 30
    block_bytes: int = 7_100_000
    kv_bytes: int = 768
    hidden_bytes: int = 1152
    context_tokens: int = 2048

    @property
    def least_cache_tokens(self) -> int:
        """The least cache that a node is of use with."""
        return min(LEAST_CACHE_TOKENS, self.context_tokens)


class Ways(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The network. Peers sit in `regions` by turns; ways between regions take `far_round_trip_ms`."""

    round_trip_ms: float = 1.0
    mbit: float = 1000.0
    loss: float = 0.0
    regions: int = 1
    far_round_trip_ms: float = 80.0
    far_mbit: float = 100.0
    directory_ms: float = 20.0
    """What a reading or an announcement takes."""


class Nodes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Nodes that are alike but for their speed."""

    count: int
    joins_at_s: float = 0.0
    """0: from the beginning."""
    block_ms: float = 1.0
    """One block for one row."""
    rows_per_block: float = 16.0
    """So many further rows take as long as the first: less where a machine computes rows side by side."""
    overhead_ms: float = 0.2
    """Of a step beside its blocks."""
    spread: float = 0.0
    """Speeds differ by up to this factor either way: 1 means from half to twice as fast."""
    blocks: str = "auto"
    """`auto`: the orchestrator decides; else the range they are pinned to."""
    most_blocks: int = 0
    """How many fit their memory; 0: all."""
    cache_tokens: int = 65_536
    machine: str = ""
    """Nodes of one name share one machine of `cores`; without a name each has its own."""
    cores: int = 1
    load_s_per_block: float = 0.2


class Clients(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who asks, one answer after the other."""

    count: int = 1
    prompt_tokens: tuple[int, int] = (32, 32)
    answer_tokens: tuple[int, int] = (64, 64)
    think_s: float = 0.0
    """Between answers, on average."""
    turn_ms: float = 1.0
    """Head, sampling and embedding of a turn, of one row."""
    row_ms: float = 0.2
    """Of each further row."""
    machine: str = ""
    seeded: float = 0.0
    """The share of answers that are drawn at a temperature of 0.8; the others are greedy."""
    deadline_s: float = 20.0
    objective: Literal["throughput", "latency"] = "latency"
    """What routes are chosen for."""
    warm_spares: bool = False
    together: bool = False
    """One client process asks for all; else each has its own."""


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One fault: at `at_s` something happens to a node, and is undone after `for_s`."""

    at_s: float
    kind: Kind
    node: int = -1
    """-1: one that has sessions at that time, by lot, or any where none has."""
    for_s: float = 10.0
    """inf: for ever."""
    factor: float = 100.0
    """How many times slower `slow` makes a node."""
    by_s: float = 3600.0
    """How far `jump` puts a node's time of day ahead of the others'; negative: behind."""


class Faults(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Faults by lot: each begins in the given span and lasts as long as drawn."""

    count: int = 0
    kinds: tuple[Kind, ...] = RANDOM_KINDS
    from_s: float = 5.0
    until_s: float = 60.0
    aimed: float = 0.8
    """The share of them that strikes a node which has sessions."""
    for_s: tuple[float, float] = (1.0, 20.0)


class Churn(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Nodes that come and go, as many as each other."""

    share_per_minute: float = 0.0
    graceful: float = 0.5
    """How many of those that go say goodbye."""


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that a simulation depends on: the same scenario gives the same report, byte by byte."""

    name: str = "swarm"
    seed: int = 0
    duration_s: float = 60.0
    """How long new answers are begun; those under way are waited for."""
    model: Model = Model()
    ways: Ways = Ways()
    nodes: tuple[Nodes, ...]
    clients: Clients = Clients()
    fault: tuple[Fault, ...] = ()
    faults: Faults = Faults()
    churn: Churn = Churn()
    lease_s: float = 10.0
    stand: int = 64
    """How many nodes stand for election at most."""
    probing: bool = False
    """Whether nodes measure their ways to each other."""
    objective: Literal["throughput", "latency"] = "throughput"
    """What is planned for."""
    plan_s: float = 0.0
    """Real seconds that a search for a better plan may take beyond rules and dynamic programming. Above 0 a plan may
    depend on how fast the machine is that simulates."""
    optimum_every_s: float = 0.0
    """How often the layout is compared with the best there is; 0: never."""
    verify: float = 1.0
    """The share of answers that are compared with an undisturbed run."""

    @property
    def node_count(self) -> int:
        return sum(nodes.count for nodes in self.nodes)


def parse_scenario(text: str, **changes: Any) -> Scenario:
    """The scenario in a TOML file; `changes` go before what it says. Raises BadOption or BadRange, naming the place."""
    try:
        scenario = msgspec.toml.decode(text, type=Scenario)
        scenario = msgspec.structs.replace(scenario, **changes)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadOption(f"this is no scenario: {error}") from None
    check(scenario)
    return scenario


def check(scenario: Scenario) -> None:
    """Raises BadOption, or BadRange for a node's blocks, unless every value is possible."""
    _check_numbers(scenario)
    _require(1 <= scenario.node_count <= MAX_NODES, f"1 to {MAX_NODES} nodes can be simulated")
    _require(0 < scenario.duration_s <= 86400, "duration_s is 0 to 86400")
    _require(0 < scenario.lease_s <= 120, "lease_s is up to 120")
    model = scenario.model
    _require(1 <= model.blocks <= 1000, "model.blocks is 1 to 1000")
    _require(min(model.block_bytes, model.kv_bytes, model.hidden_bytes) >= 1, "the model's sizes are above 0")
    _require(model.context_tokens >= 2, "model.context_tokens is 2 or more")
    ways = scenario.ways
    _require(ways.mbit > 0 and ways.far_mbit > 0, "ways carry more than 0 Mbit/s")
    _require(ways.loss < 1 and ways.regions >= 1, "ways.loss is below 1, and there is a region")
    for nodes in scenario.nodes:
        _require(nodes.count >= 1 and nodes.cores >= 1, "nodes.count and nodes.cores are 1 or more")
        _require(nodes.block_ms > 0 and nodes.rows_per_block > 0, "nodes take time")
        _require(nodes.spread <= MAX_SPREAD, f"nodes.spread is at most {MAX_SPREAD:g}")
        _require(nodes.most_blocks <= model.blocks, "nodes.most_blocks is no more than the model has")
        _require(nodes.cache_tokens >= 1, "nodes.cache_tokens is 1 or more")
        if nodes.blocks != "auto":
            BlockRange.parse(nodes.blocks, model.blocks)
    clients, faults = scenario.clients, scenario.faults
    for name, least, most in (
        ("clients.prompt_tokens", *clients.prompt_tokens),
        ("clients.answer_tokens", *clients.answer_tokens),
    ):
        _require(1 <= least <= most, f"{name} are a least and a most")
    _require(clients.prompt_tokens[1] + clients.answer_tokens[1] <= model.context_tokens, "answers fit the context")
    _require(clients.deadline_s > 0, "clients.deadline_s is above 0")
    _require(faults.from_s <= faults.until_s and faults.for_s[0] <= faults.for_s[1], "faults begin before they end")
    _require(bool(faults.kinds), "faults are of some kind")
    shares = (clients.seeded, faults.aimed, scenario.churn.graceful, scenario.verify)
    _require(max(shares) <= 1, "shares (seeded, aimed, graceful, verify) are 0 to 1")
    for fault in scenario.fault:
        _require(-1 <= fault.node < scenario.node_count, "a fault's node is one of them, or -1")
        _require(fault.for_s < math.inf or fault.kind in ("slow", "leave"), "only slow and leave last for ever")


def _check_numbers(table: msgspec.Struct) -> None:
    """No number is negative or none at all; infinite is only how long a fault lasts, and -1 its node. A clock may
    jump back."""
    for name in table.__struct_fields__:
        values = getattr(table, name)
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, msgspec.Struct):
                _check_numbers(value)
            elif isinstance(value, int | float) and (name, value) not in (("node", -1), ("for_s", math.inf)):
                _require(0 <= (abs(value) if name == "by_s" else value) < math.inf, f"{name} is {value}")


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise BadOption(f"this scenario cannot be: {rule}")
