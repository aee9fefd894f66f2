"""Models of random weights that can be spoken to: with a tokenizer and a chat template made up."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bsns.client.prompts import Prompts
from bsns.core.errors import BadOption
from bsns.model.source import ModelSource, resolve

TEXT = (
    "A lighthouse keeper counts the ships that pass between the island and the coast, and writes their names down. "
    "On some days there are none, and then he writes what the sea looks like, and which birds sit on the rocks below. "
)
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
_TOKENIZER = "tokenizer.json"
_END = 2


def spoken(source: ModelSource) -> ModelSource:
    """The same model, beside its own directory and with links to its files, where it has no tokenizer.

    Tokens are the 256 bytes, and after them words without a meaning. Raises BadOption where the folder is not writable.
    """
    if (source.path / _TOKENIZER).is_file():
        return source
    target = source.path.with_name(f"{source.path.name}-spoken")
    if not (target / _TOKENIZER).is_file():
        try:
            _make(source, target)
        except OSError as error:
            raise BadOption(f"{target} cannot be written ({error.strerror}); set BSNS_CACHE") from error
    return resolve(str(target))


def text_of(prompts: Prompts, tokens: int, number: int = 0) -> str:
    """English of some `tokens` tokens, another one for each `number`: at least so many, and not a word more."""
    words, text = (TEXT * tokens).split(), f"{number}."
    for word in words:
        if len(prompts.encode(text)) >= tokens:
            return text
        text += f" {word}"
    return text


def _make(source: ModelSource, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        made.mkdir()
        for file in source.path.iterdir():
            (made / file.name).symlink_to(os.path.relpath(file.resolve(), target))
        _tokenizer(source.vocab_size).save_pretrained(made)
        target.mkdir(exist_ok=True)
        for file in sorted(made.iterdir(), key=lambda file: file.name == _TOKENIZER):  # last, as it says all are there
            file.replace(target / file.name)


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<unknown>", "<begin>", "<end>", *letters]
    names = names[:vocab_size] + [f"w{number}" for number in range(len(names), vocab_size)]
    vocabulary = {name: number for number, name in enumerate(names)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=names[0]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=names[_END], unk_token=names[0])
    made.chat_template = _TEMPLATE
    return made
