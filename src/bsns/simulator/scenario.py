"""Scenarios: the file that says what is simulated, with every value checked."""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from bsns.core.errors import BadOption
from bsns.core.plan import LEAST_CACHE_TOKENS

MAX_NODES = 20_000
Kind = Literal["crash", "freeze", "slow", "cut", "flap", "lie", "leave"]
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
    """The scenario in a TOML file; `changes` go before what it says. Raises BadOption, naming the place."""
    try:
        scenario = msgspec.toml.decode(text, type=Scenario)
        scenario = msgspec.structs.replace(scenario, **changes)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadOption(f"this is no scenario: {error}") from None
    check(scenario)
    return scenario


def check(scenario: Scenario) -> None:
    """Raises BadOption unless every value is possible."""
    _require(1 <= scenario.node_count <= MAX_NODES, f"1 to {MAX_NODES} nodes can be simulated")
    _require(_positive(scenario.duration_s) and scenario.duration_s <= 86400, "duration_s is 0 to 86400")
    _require(1 <= scenario.model.blocks <= 1000, "model.blocks is 1 to 1000")
    model = scenario.model
    _require(min(model.block_bytes, model.kv_bytes, model.hidden_bytes) >= 1, "the model's sizes are above 0")
    _require(model.context_tokens >= 2, "model.context_tokens is 2 or more")
    ways = scenario.ways
    _require(min(ways.round_trip_ms, ways.far_round_trip_ms, ways.directory_ms) >= 0, "times on ways are not negative")
    _require(_positive(ways.mbit) and _positive(ways.far_mbit), "ways carry more than 0 Mbit/s")
    _require(0 <= ways.loss < 1 and ways.regions >= 1, "ways.loss is below 1, and there is a region")
    for nodes in scenario.nodes:
        _require(nodes.count >= 1 and nodes.cores >= 1, "nodes.count and nodes.cores are 1 or more")
        _require(_positive(nodes.block_ms) and _positive(nodes.rows_per_block), "nodes take time")
        _require(nodes.overhead_ms >= 0 and nodes.spread >= 0 and nodes.load_s_per_block >= 0, "no time is negative")
        _require(
            0 <= nodes.most_blocks <= model.blocks and nodes.cache_tokens >= 1, "nodes.most_blocks and cache_tokens"
        )
    clients = scenario.clients
    for least, most in (clients.prompt_tokens, clients.answer_tokens):
        _require(1 <= least <= most, "clients' tokens are a least and a most")
    _require(clients.prompt_tokens[1] + clients.answer_tokens[1] <= model.context_tokens, "answers fit the context")
    _require(clients.count >= 0 and clients.think_s >= 0 and clients.turn_ms >= 0, "clients' figures are not negative")
    _require(_positive(clients.deadline_s) and 0 <= clients.seeded <= 1, "clients.deadline_s or seeded")
    _require(
        all(-1 <= fault.node < scenario.node_count and fault.at_s >= 0 for fault in scenario.fault), "a fault's node"
    )
    _require(0 <= scenario.churn.graceful <= 1 and scenario.churn.share_per_minute >= 0, "churn")
    _require(0 <= scenario.verify <= 1 and 0 < scenario.lease_s <= 120, "verify is a share; lease_s is up to 120")


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise BadOption(f"this scenario cannot be: {rule}")
