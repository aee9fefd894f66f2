"""The Grafana dashboard asks for what there is: names and labels as the nodes and the gateway really say them."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from memory_swarm import MemorySwarm
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import ScriptedEngine, chat

from bsns.core.blocks import BlockRange
from bsns.node.metrics import node_metrics

DASHBOARD = Path(__file__).parents[3] / "docs" / "grafana.json"
NAME = re.compile(r"\b(?:bsns|process)_\w+")


def expressions() -> list[str]:
    panels: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


class Idle:
    """An executor that nobody asks for anything."""

    name, dtype, device, hidden_size, blocks = "idle", "float32", "cpu", 4, BlockRange(0, 2)


class Figures:
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


def labels_of(text: str) -> dict[str, set[str]]:
    """The labels of every sample's name."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] |= sample.labels.keys()
        if not family.samples:  # it has labels, and nothing has happened yet
            found[family.name + ("_total" if family.type == "counter" else "")] |= {"codec", "reason"}
    return found


@pytest.fixture
async def said(swarm: MemorySwarm, http: httpx.AsyncClient, engine: ScriptedEngine) -> dict[str, set[str]]:
    """All that a node and a gateway say."""
    engine.tally.received_bytes["raw"] = 1
    await http.post("/v1/chat/completions", json=chat())
    node = await swarm.add_node("me", Idle(), block_count=2)  # type: ignore[arg-type]
    tally = node.worker.tally
    tally.sent_bytes["raw"] = tally.received_bytes["raw"] = tally.refused["CacheFull"] = 1
    (record,) = swarm.directory.shelf.values()
    told = generate_latest(Figures(node_metrics(record, node.worker))).decode()
    return labels_of(told) | labels_of((await http.get("/metrics")).text) | {"process_resident_memory_bytes": set()}


async def test_every_name_and_label_is_there(said: dict[str, set[str]]) -> None:
    asked = expressions()
    assert len(asked) > 25
    for expression in asked:
        names = NAME.findall(expression)
        assert names, expression
        for name in names:
            assert name in said, expression
        known = set().union(*(said[name] for name in names)) | {"instance"}
        grouped = {label for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(", ")}
        chosen = set(re.findall(r"(\w+)=\"", expression))
        assert grouped | chosen <= known, expression


async def test_legends_name_labels_that_are_there(said: dict[str, set[str]]) -> None:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            known = set().union(*(said[name] for name in NAME.findall(target["expr"]))) | {"instance"}
            assert wanted <= known, target


async def test_it_leaves_nothing_of_ours_out(said: dict[str, set[str]]) -> None:
    asked = " ".join(expressions())
    families = {re.sub(r"_(total|bucket|sum|count|created)$", "", name) for name in said if name.startswith("bsns_")}
    assert {family for family in families if family not in asked} == set()
