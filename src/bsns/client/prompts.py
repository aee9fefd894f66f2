"""Text to tokens: the model's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig

from bsns.core.errors import BadOption, CorruptModel
from bsns.model.stage import quiet_library


class Prompts:
    """A model's tokenizer, its chat template and the tokens that end an answer."""

    def __init__(self, path: Path) -> None:
        """Raises CorruptModel if the directory has no usable tokenizer."""
        try:
            with quiet_library():
                self.tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CorruptModel(f"{path} has no usable tokenizer: {str(error).splitlines()[0]}") from error
        self.end_tokens = frozenset(_end_tokens(path, self.tokenizer))

    def encode(self, text: str) -> list[int]:
        """Plain text, with whatever the tokenizer puts before it (for example a beginning-of-text token)."""
        return self._tokens(text, add_special_tokens=True)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        opening: str = "",
    ) -> list[int]:
        """Messages with `role` and `content`, through the chat template; `opening` is how the answer shall begin.

        Raises BadOption if the model has no template, or if its template refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise BadOption("this model has no chat template; use plain text (bsns generate --raw)")
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=True, tokenize=False
            )
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            # A template is code that meets whatever users write.
            raise BadOption(f"the chat template refuses this conversation: {error}") from error
        return self._tokens(text + opening, add_special_tokens=False)

    def chat_template(self) -> str:
        """The template that conversations with tools go through; "" if there is none."""
        return str(self.tokenizer.get_chat_template(tools=[{}])) if self.tokenizer.chat_template else ""

    def _tokens(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadOption("the prompt is no valid Unicode: it holds half of a surrogate pair") from None
        tokens: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return tokens

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)


def _end_tokens(path: Path, tokenizer: Any) -> set[int]:
    ends = {tokenizer.eos_token_id}
    if (path / "generation_config.json").is_file():
        declared = GenerationConfig.from_pretrained(path).eos_token_id
        ends.update(declared if isinstance(declared, list) else [declared])
    return {end for end in ends if end is not None}
