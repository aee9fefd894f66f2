"""What clients may send: OpenAI's arguments, and `top_k`, `min_p`, `repetition_penalty` beside them.

An argument that is not here is refused, as OpenAI does: an answer that silently ignores one would mislead. A few that
concern OpenAI's own books (`user`, `store`, …) are taken and have no effect.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from bsns.client.sampling import SamplingOptions
from bsns.gateway.errors import bad_request

MOST_CHOICES = 16
MOST_STOPS = 4
MOST_STOP_LETTERS = 1000
MOST_TOOLS = 128
MOST_MESSAGES = 8192
"""And so many parts of one, or calls in it."""
MOST_BIASED = 1024
MOST_NOTES = 16
"""OpenAI's, of `metadata`."""
CHAT_TOKENS = 1024
"""An answer's most tokens where the client names none. Not all that fit: a session reserves its cache."""
COMPLETION_TOKENS = 16
"""OpenAI's."""

T = TypeVar("T")
Text = Annotated[str, Field(min_length=1)]
# The first thing that is wrong is all that is told, and to look for more takes a minute and gigabytes where two million
# items are.
Quick = Annotated[list[T], Field(fail_fast=True)]
Few = Annotated[list[T], Field(fail_fast=True, max_length=MOST_CHOICES)]
Some = Annotated[list[T], Field(fail_fast=True, max_length=MOST_MESSAGES)]


def _few(most: int) -> BeforeValidator:
    """A mapping of at most so many; pydantic itself looks at each of them first."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise PydanticCustomError("too_long", f"there are {len(value)}; give up to {most}")
        return value

    return BeforeValidator(check)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, value: Any) -> Any:
        """Of arguments that there are none of, one is enough to tell."""
        if isinstance(value, dict) and len(value) > len(cls.model_fields):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            unknown = next(name for name in value if name not in known)
            value = {name: value[name] for name in (*known, unknown) if name in value}
        return value


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class Sampling(_Strict):
    """What chat and text completions share."""

    model: str
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], _few(MOST_BIASED)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Quick[str] | None = None
    user: str | None = None
    metadata: Annotated[dict[str, str], _few(MOST_NOTES)] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def options(self, wanted: int | None, default: int, context_tokens: int, logprobs: int | None) -> SamplingOptions:
        """For the first choice: `wanted` tokens at most, or `default`; without a seed one is drawn. Raises ApiError."""
        max_tokens = wanted or min(default, context_tokens)
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS:
            raise bad_request(f"stop has {len(stops)} strings; give up to {MOST_STOPS}", "stop")
        if not all(0 < len(stop) <= MOST_STOP_LETTERS for stop in stops):
            raise bad_request(f"a stop string has 1 to {MOST_STOP_LETTERS} characters", "stop")
        if max_tokens > context_tokens:
            raise bad_request(f"max_tokens is {max_tokens}; the model's context holds {context_tokens}", "max_tokens")
        try:
            bias = tuple((int(token), float(value)) for token, value in (self.logit_bias or {}).items())
        except ValueError:
            raise bad_request("logit_bias maps token ids to numbers", "logit_bias") from None
        return SamplingOptions(
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else float(self.top_p),
            min_p=float(self.min_p or 0),
            repetition_penalty=1.0 if self.repetition_penalty is None else float(self.repetition_penalty),
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            stop=tuple(stops),
            max_tokens=max_tokens,
            logit_bias=bias,
            presence_penalty=float(self.presence_penalty or 0),
            frequency_penalty=float(self.frequency_penalty or 0),
            logprobs=logprobs,
        )


class CompletionRequest(Sampling):
    """POST /v1/completions. A prompt is text or tokens; several prompts are answered side by side."""

    prompt: Text | Few[Text] | Few[Quick[int]] | Quick[int]
    logprobs: int | None = Field(None, ge=0, le=5)

    def prompts(self) -> list[str | list[int]]:
        """Raises ApiError."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if any(isinstance(part, int) for part in self.prompt):
            return [[part for part in self.prompt if isinstance(part, int)]]
        prompts = [part for part in self.prompt if not isinstance(part, int)]
        if not prompts or not all(prompts):
            raise bad_request("the prompt is empty; give at least one token", "prompt")
        return prompts


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class CalledFunction(_Strict):
    name: str
    arguments: str


class Call(BaseModel):
    """A tool call of an earlier answer."""

    model_config = ConfigDict(strict=True)

    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(BaseModel):
    """Clients send answers back as they got them, so that more fields than these may come along."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Some[TextPart] | None = None
    name: str | None = None
    tool_calls: Some[Call] | None = None
    tool_call_id: str | None = None


class Function(_Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(_Strict):
    name: str


class NamedTool(_Strict):
    type: Literal["function"]
    function: NamedFunction


class PlainFormat(_Strict):
    type: Literal["text", "json_object"]


class NamedSchema(_Strict):
    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class SchemaFormat(_Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Some[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: PlainFormat | SchemaFormat | None = None
    tools: Quick[Tool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
