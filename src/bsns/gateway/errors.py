"""OpenAI's error object, and the HTTP status of every failure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from bsns.core.blocks import BlockRange
from bsns.core.errors import BsnsError, CacheFull, CacheTooSmall, MissingBlocks, PromptTooLong, UserError

ROOM_AGAIN_S = 5
"""When a client that found a full swarm may ask again."""


class ErrorObject(BaseModel):
    """What went wrong, in one line; `type` is for programs, `param` the argument to blame, `code` the exact case."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorObject


class ApiError(HTTPException):
    """A refusal or a failure as the client is told it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type_: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.error = ErrorObject(message=message, type=type_, param=param, code=code)

    def body(self) -> dict[str, Any]:
        return ErrorBody(error=self.error).model_dump()

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client's own mistake."""
    return ApiError(400, message, param=param, code=code)


def from_bsns(error: BsnsError) -> ApiError:
    """A typed failure of ours as the client is told it: what it can change is 400, a full swarm 429, the rest 503.

    Which node failed, where and how is the operator's business: clients are not told addresses.
    """
    match error:
        case PromptTooLong():
            return bad_request(error.message, "messages", "context_length_exceeded")
        case UserError():
            return bad_request(error.message, code=error.code)
        case CacheTooSmall():
            return bad_request(
                f"{error.message}; ask for fewer tokens, or shorten the prompt", "max_tokens", error.code
            )
        case CacheFull():
            return ApiError(429, error.message, type_="rate_limit_error", code=error.code, retry_after_s=ROOM_AGAIN_S)
        case MissingBlocks():
            return unavailable(error.message.split("; it is needed because")[0], error.code)
        case _:
            return unavailable("the swarm lost this answer, and nobody took over in time; ask again", error.code)


def unserved(gaps: Sequence[BlockRange], model: str) -> ApiError:
    """Nobody has these blocks of the model."""
    return unavailable(f"nobody serves blocks {', '.join(map(str, gaps))} of {model}", MissingBlocks.__name__)


def unavailable(message: str, code: str) -> ApiError:
    """The swarm's state: later it may do."""
    return ApiError(503, message, type_="server_error", code=code, retry_after_s=ROOM_AGAIN_S)


def internal(request_id: str) -> ApiError:
    """Ours to mend: the log has what happened, under this id."""
    message = f"the gateway failed; its log says how, under request {request_id}"
    return ApiError(500, message, type_="server_error", code="internal_error")
