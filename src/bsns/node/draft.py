"""A draft model: a small one of the same family, whole in the client's process, that guesses what its large one says.

Its guesses are checked like any others (client.speculation), so that answers stay the same.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable, Sequence

import torch

from bsns.client.kept import common_prefix
from bsns.client.prompts import Prompts
from bsns.client.reader import CHUNK_ROWS
from bsns.client.speculation import LEARNS, Chance, Lookup
from bsns.core.blocks import BlockRange
from bsns.core.errors import BadOption, NotEnoughMemory
from bsns.model.source import ModelSource
from bsns.model.tensors import to_memory, to_tensor
from bsns.node.alone import Alone
from bsns.node.ends import load_ends

MOST_DRAFTED = 16
"""Guesses in one step: each takes the draft model a step of its own."""
PRIOR = 0.6
"""How often a guess is taken to be right before anything is known."""


class Draft:
    """A loaded draft model. Not thread-safe: its guessers guess on the decoder's thread."""

    def __init__(self, source: ModelSource, prompts: Prompts, *, dtype: str, threads: int = 1) -> None:
        """`prompts`: those of the model whose answers are guessed.

        Raises BadOption where the two do not have the same tokens, and what loading raises.
        """
        if Prompts(source.path).tokenizer.get_vocab() != prompts.tokenizer.get_vocab():
            raise BadOption(f"{source.name} cannot draft, its tokens are not the model's; take a small one of its kind")
        self.context_tokens = source.context_tokens
        self._ends = load_ends(source, dtype=dtype, threads=threads)
        self._blocks = Alone(source, BlockRange(0, source.block_count), dtype=dtype, threads=threads)
        self._dtype = dtype
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        """How many texts there is room for now: of answers that take turns on the decoder's thread."""
        return len(self._blocks)

    def guesser(self) -> Drafter:
        """For one answer."""
        return Drafter(self)

    def open(self, max_tokens: int) -> tuple[int, Callable[[], None]]:
        """Make room for a text; its number, and what frees it. Raises NotEnoughMemory."""
        number = next(self._numbers)
        self._blocks.open(number, max_tokens)
        return number, lambda: self._blocks.end(number)

    def next_token(self, number: int, position: int, tokens: Sequence[int]) -> int:
        """The likeliest after these, which stand at `position` and after in a text; what stood there is forgotten."""
        for start in range(0, len(tokens), CHUNK_ROWS):
            chunk = tokens[start : start + CHUNK_ROWS]
            places = torch.arange(position + start, position + start + len(chunk))
            hidden = to_memory(self._ends.embed(torch.tensor(chunk), places))
            (output,) = self._blocks.run([(number, position + start, len(chunk), hidden)])
        rows = to_tensor(output, self._dtype, (len(chunk), self._blocks.hidden_size))
        return int(self._ends.logits(rows[-1:]).argmax())


class Drafter:
    """Guesses what followed before, like Lookup; where nothing did, what the draft model says."""

    quick = False

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._lookup = Lookup()
        self._number: int | None = None
        self._fed: list[int] = []
        self._drafted = False
        """Whether the guesses that are under way are the draft model's."""
        self.chance = Chance(PRIOR)
        self._each_s = 0.0
        """What one guess takes."""
        self._no_room = False
        self._room = 0
        """For how many tokens the draft model has room, once that is known."""

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        guesses = self._lookup.guess(tokens, most)
        self._drafted = not guesses
        if guesses or self._no_room:
            return guesses
        self._room = self._room or min(len(tokens) + most + 1, self._draft.context_tokens)
        most = min(most, MOST_DRAFTED, self._room - len(tokens))
        each_s = self._each_s * max(1, len(self._draft))  # while one drafts, the others wait
        count = self._lookup.cost.best_guesses(self.chance.now, most, each_s)
        return self._say(tokens, count) if count else []

    def go_on(self, tokens: Sequence[int], ahead: Sequence[int], most: int) -> list[int]:
        if not self._drafted:
            return self._lookup.go_on(tokens, ahead, most)
        text = [*tokens, *ahead]
        most = min(most, MOST_DRAFTED, self._room - len(text))
        each_s = self._each_s * max(1, len(self._draft))
        count = self._lookup.cost.best_further(self.chance.now, len(ahead), most, each_s)
        return self._say(text, count) if count else []

    def took(self, rows: int, step_s: float, computing_s: Sequence[float]) -> None:
        self._lookup.took(rows, step_s, computing_s)

    def took_further(self, rows: int, behind_s: float) -> None:
        self._lookup.took_further(rows, behind_s)

    def checked(self, guesses: int, right: int) -> None:
        self._lookup.checked(guesses, right)
        if self._drafted and guesses:
            self.chance.checked(guesses, right)

    def _say(self, tokens: Sequence[int], count: int) -> list[int]:
        if self._number is None:
            try:
                self._number, free = self._draft.open(self._room)
            except NotEnoughMemory:  # an answer needs no guesses
                self._no_room = True
                return []
            weakref.finalize(self, free).atexit = False
        known = min(common_prefix(self._fed, tokens), len(tokens) - 1)  # the last one's output is wanted
        said: list[int] = []
        news = list(tokens[known:])
        for number in range(count):
            started_s = time.perf_counter()
            said.append(self._draft.next_token(self._number, known, news))
            known, news = known + len(news), said[-1:]
            if number:  # the first reads the answer's tokens as well
                self._each_s += (time.perf_counter() - started_s - self._each_s) * (LEARNS if self._each_s else 1.0)
        self._fed = [*tokens, *said[:-1]]
        return said
