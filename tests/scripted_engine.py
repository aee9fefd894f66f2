"""A gateway in front of a model that says what a test tells it to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx
import torch

from bsns.client.decoder import Answer
from bsns.client.detokenize import Detokenizer, StopMatcher
from bsns.client.pieces import Piece, Stats
from bsns.client.prompts import Prompts
from bsns.client.sampling import Constraint, SamplingOptions
from bsns.client.tally import Tally
from bsns.core.blocks import BlockRange
from bsns.core.errors import BsnsError
from bsns.core.ids import ModelId, PeerId, SessionId
from bsns.core.plan import LEAST_CACHE_TOKENS, Objective, Plan
from bsns.core.snapshot import Link, ModelShape, Pair, Snapshot
from bsns.gateway.app import create_app
from bsns.gateway.grammar import Grammars
from bsns.gateway.settings import Settings
from bsns.node.orchestrator import best_plan
from bsns.node.view import NodeStatus
from bsns.protocol.inference import Description
from bsns.protocol.records import NodeRecord
from bsns.routing.chain import Route
from bsns.swarm.snapshot import snapshot

VOCABULARY = 49152
HERMES = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call with <tool_call></tool_call>.<|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class ScriptedEngine:
    """An Engine whose model would say `says`, whatever it reads; samplers and constraints are the real ones."""

    name = "scripted"
    context_tokens = 512
    vocab_size = VOCABULARY
    repairs = 3
    block_count = 4

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts
        self.tally = Tally(waiting=2, guesses=8, right=5)
        self.tally.sent_bytes["int8"] = 640
        self.says = "Hello there, world."
        self.fails: BsnsError | Exception | None = None
        self.fails_after = 0
        """Pieces before it fails."""
        self.gaps: tuple[BlockRange, ...] = ()
        self.open = 0
        """Streams under way."""
        self.asked: list[tuple[list[int], SamplingOptions]] = []
        self.stands = asyncio.Event()
        """Unset, it waits after its first piece."""
        self.stands.set()
        self.route: Route = ()
        """Where answers go through from now on, those under way too."""
        self.statuses: list[NodeStatus] = []
        self.seen = Snapshot(0.0, ())
        self.looks = 0
        """How often somebody asked who is here."""
        self.plans = 0

    async def stream(
        self, tokens: Sequence[int], options: SamplingOptions, stats: Stats, constraint: Constraint | None, tenant: str
    ) -> AsyncGenerator[Piece, None]:
        self.asked.append((list(tokens), options))
        stats.session = str(len(self.asked))
        ends = self.prompts.end_tokens
        answer = Answer(
            SessionId(1), options, ends, list(tokens), len(tokens), options.max_tokens, constraint=constraint
        )
        script = [*self.prompts.tokenizer(self.says, add_special_tokens=False)["input_ids"], max(ends)]
        detokenizer, matcher = Detokenizer(self.prompts.tokenizer), StopMatcher(options.stop)
        self.open += 1
        try:
            while True:
                at = len(answer.tokens) - answer.prompt_tokens
                if self.fails is not None and at == self.fails_after:
                    raise self.fails
                if at:
                    await self.stands.wait()
                stats.route, stats.tokens = self.route, at + 1
                logits_V = torch.zeros(VOCABULARY)
                logits_V[script[min(at, len(script) - 1)]] = 30.0
                token = answer.choose(logits_V)
                told = answer.logprobs[-1] if answer.logprobs else None
                text, stopped = matcher.push("" if token in ends else detokenizer.push(token))
                if stopped or answer.finished:
                    yield Piece(text, token, "stop" if stopped else answer.finished, told)
                    return
                yield Piece(text, token, None, told)
                await asyncio.sleep(0)
        finally:
            self.open -= 1

    async def missing(self) -> tuple[BlockRange, ...]:
        return self.gaps

    async def nodes(self) -> Sequence[NodeStatus]:
        self.looks += 1
        if isinstance(self.fails, BsnsError):
            raise self.fails
        return list(self.statuses)

    def snapshot(self) -> Snapshot:
        return self.seen

    def plan(self, seen: Snapshot) -> Plan:
        self.plans += 1
        shape = ModelShape(ModelId("scripted"), self.name, (1 << 20,) * self.block_count, 64, 1152)
        return best_plan(seen, shape, Objective(), LEAST_CACHE_TOKENS, plan_s=0.2)


def node_status(
    name: str, blocks: BlockRange, *, answers: bool = True, state: str = "serving", **now: Any
) -> NodeStatus:
    """A node of the scripted model, as the engine tells of it."""
    record = NodeRecord(
        peer=PeerId(name),
        addresses=("/ip4/10.1.2.3/tcp/1",),
        model=ModelId("scripted"),
        model_name="scripted",
        block_count=ScriptedEngine.block_count,
        start=blocks.start,
        end=blocks.end,
        state=state,
        device="cpu",
        dtype="float32",
        executor="native",
        threads=1,
        cache_tokens=1000,
        cache_tokens_left=1000,
        block_time_s=0.002,
        rss_bytes=10**8,
        version="0",
        started_s=0.0,
        expires_s=1e12,
        memory_bytes=1 << 30,
    )
    if not answers:
        return NodeStatus(record, None, None, f"node {name} at {record.addresses[0]} is gone")
    figures = {"sessions": 1, "cache_tokens_left": 900, "rows": 0} | now
    told = Description(blocks.start, blocks.end, cache_tokens=1000, block_time_s=0.002, rss_bytes=1, steps=1, **figures)
    return NodeStatus(record, told, 0.001, None)


def show(engine: ScriptedEngine, statuses: Sequence[NodeStatus], links: Mapping[Pair, Link] | None = None) -> None:
    """Let the engine see these nodes from now on."""
    engine.statuses = list(statuses)
    bare = snapshot([status.record for status in statuses], time.time())
    engine.seen = replace(bare, links=links or {})


def client_of(engine: ScriptedEngine, grammars: Grammars, settings: Settings = Settings()) -> httpx.AsyncClient:  # noqa: B008
    app = create_app(engine, grammars, settings)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")


def chat(**more: Any) -> dict[str, Any]:
    """A chat request's body."""
    return {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0} | more


def tool(name: str = "weather", **properties: Any) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": properties or {"city": {"enum": ["Paris", "Rome"]}},
        "additionalProperties": False,
    }
    schema["required"] = list(schema["properties"])  # type: ignore[call-overload]
    return {"type": "function", "function": {"name": name, "description": "It does.", "parameters": schema}}
