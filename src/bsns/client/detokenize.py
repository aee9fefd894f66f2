"""Streaming text: tokens become text as soon as it is certain, and stop strings end it, however they are split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 6
_WINDOW_TOKENS = 64


class Tokenizer(Protocol):
    """What a detokeniser needs of a transformers tokenizer."""

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool = ..., clean_up_tokenization_spaces: bool = ...
    ) -> str: ...


class Detokenizer:
    """Turns one answer's tokens into text, piece by piece; the pieces joined are the decoded whole.

    With `prompt_ids` the text is the prompt's continuation, so that a first " word" keeps its space under tokenizers
    that strip it at the beginning of a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        # Only the tokens since the last clean boundary are decoded again, with those before it as their context.
        self._window = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._fresh = len(self._window)
        self._said = self._decode(self._window).rstrip(_REPLACEMENT)

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; "" while a character is unfinished."""
        self._window.append(token_id)
        text = self._decode(self._window)
        certain = text.rstrip(_REPLACEMENT)
        full = len(self._window) - self._fresh >= _WINDOW_TOKENS  # so much is not one character, but garbage
        if full or certain == text:
            piece = text[len(self._said) :]
            if piece or full:
                self._advance()
            return piece
        # An unfinished character spoils all the bytes before it where bytes are tokens of their own (Llama 2), for
        # the time being; so only text that goes on from what has been said is certain.
        piece = certain[len(self._said) :] if certain.startswith(self._said) else ""
        self._said += piece
        return piece

    def flush(self) -> str:
        """What is left when no more tokens come: an unfinished character, as replacement characters."""
        piece = self._decode(self._window)[len(self._said) :]
        self._advance()
        return piece

    def _advance(self) -> None:
        self._window = self._window[self._fresh :]
        self._fresh = len(self._window)
        self._said = self._decode(self._window)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special, clean_up_tokenization_spaces=False)


class StopMatcher:
    """Cuts a stream of text before the first stop string to be complete, holding back what could begin one.

    The result does not depend on how the text is split.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text to emit, whether a stop string was met). After a stop nothing more is emitted."""
        if self._stopped:
            return "", True
        text = self._held + text
        # The one that ends first, and of those the longest: what matching character by character would find.
        met = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if met:
            self._held, self._stopped = "", True
            return text[: min(met)[1]], True
        held = max((self._beginning(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """What was held back, when the text is over."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
