"""Speculation: guesses at the next tokens, which the swarm checks in the step that brings the next token anyway. Pure.

A step costs the ways between the stages and the reading of their weights, whether it has one row or sixteen. So the
client sends guesses along, and takes from what comes back as many tokens as it would have drawn itself: each is drawn
from its own row's logits, with the randomness of its own position, and the first that is not what was guessed ends it.
The answer is therefore the same, token for token, as without guesses, greedy or sampled; of rejection sampling
(Leviathan et al. 2023, Chen et al. 2023) that is the case of a guesser that is certain, and no less is accepted.

Guesses are what followed the last few tokens where they stood before (prompt lookup, Saxena 2023), or what a draft
model says (node.draft). How many are sent depends on how many were right lately, and on what a row more takes: where
that is too much, none. While they are being checked, more may follow in further steps, which count if all before them
were right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

LONGEST, SHORTEST = 4, 2
"""Tokens that have to have stood before, in this order, for what followed them to be guessed."""
MOST = 64
"""Guesses in one step."""
LOOKS_BACK = 8192
"""Of a longer prompt only its last so many tokens are read: reading them takes 3 µs each."""
PRIORS = {4: 0.8, 3: 0.6, 2: 0.4}
"""How often a guess is taken to be right before anything is known, by how many tokens stood before."""
PRIOR_WEIGHT = 1.0
FORGETS = 0.95
"""What the outcome of a step counts in the next, and FORGETS_IDLY what it counts after a token without guesses: who is
always wrong tries again every twenty tokens or so."""
FORGETS_IDLY = 0.99
ROW_SHARE = 0.1
"""What a row more takes of what one takes to compute, before it is known."""
LEARNS = 0.25
"""How much the latest step changes what is known of all."""
GAIN = 1.03
"""Guesses have to promise so much more than none."""


class Guesser(Protocol):
    """One answer's guesses."""

    quick: bool
    """Whether guessing takes next to nothing, so that it may be done on the event loop."""

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """What might follow these tokens, the prompt's and the answer's: `most` at the most."""
        ...

    def go_on(self, tokens: Sequence[int], ahead: Sequence[int], most: int) -> list[int]:
        """What might follow the guesses `ahead`, which are being checked, if that is worth a further step now."""
        ...

    def checked(self, guesses: int, right: int) -> None:
        """So many have come back, of which the first `right` were right."""
        ...

    def took(self, rows: int, step_s: float, computing_s: Sequence[float]) -> None:
        """A step of so many rows, one more than guesses, that was sent alone has taken so long, and each of its stages
        so long of that to compute it."""
        ...

    def took_further(self, rows: int, behind_s: float) -> None:
        """A further step of so many rows, sent right after another, has come so long after it."""
        ...


class Chance:
    """How likely a guess is right where the ones before it are, by how guesses came out lately."""

    def __init__(self, prior: float) -> None:
        """`prior`: what it is before anything is known."""
        self._prior = prior
        self._tried = self._right = 0.0

    @property
    def now(self) -> float:
        return (self._right + self._prior * PRIOR_WEIGHT) / (self._tried + PRIOR_WEIGHT)

    def checked(self, guesses: int, right: int) -> None:
        """So many were sent, of which the first `right` were right."""
        self._right = self._right * FORGETS + right
        # the first that is wrong was tried; those after it were not
        self._tried = self._tried * FORGETS + min(guesses, right + 1)

    def passed(self) -> None:
        """A token has come without a guess."""
        self._right *= FORGETS_IDLY
        self._tried *= FORGETS_IDLY


class Lookup:
    """Guesses what followed before."""

    quick = True

    def __init__(self) -> None:
        self._seen: dict[tuple[int, ...], int] = {}
        """Where what follows some tokens begins, the last time they stood there."""
        self._read = 0
        self._matched = 0
        """How many tokens stood before, of the guesses that are under way."""
        self._copied = (0, 0)
        """Where what they repeat begins, and how many tokens there were when they were made."""
        self._chances = {length: Chance(prior) for length, prior in PRIORS.items()}
        self.cost = Cost()

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        self._read_on(tokens)
        self._matched = 0
        for length in range(LONGEST, SHORTEST - 1, -1):
            start = self._seen.get(tuple(tokens[-length:])) if len(tokens) > length else None
            if start is not None:
                count = self.cost.best_guesses(self._chances[length].now, min(most, MOST))
                self._matched = length if count else 0
                self._copied = start, len(tokens)
                return follow(tokens, start, len(tokens), range(count))
        return []

    def go_on(self, tokens: Sequence[int], ahead: Sequence[int], most: int) -> list[int]:
        if not self._matched:
            return []
        count = self.cost.best_further(self._chances[self._matched].now, len(ahead), min(most, MOST))
        start, end = self._copied
        made = len(tokens) - end + len(ahead)
        return follow(tokens, start, end, range(made, made + count))

    def took(self, rows: int, step_s: float, computing_s: Sequence[float]) -> None:
        self.cost.took(rows, step_s, computing_s)

    def took_further(self, rows: int, behind_s: float) -> None:
        self.cost.took_further(rows, behind_s)

    def checked(self, guesses: int, right: int) -> None:
        if self._matched and guesses:
            self._chances[self._matched].checked(guesses, right)
        else:
            for chance in self._chances.values():
                chance.passed()

    def _read_on(self, tokens: Sequence[int]) -> None:
        """Note what each few tokens are followed by: not the last ones, which nothing follows yet."""
        for end in range(max(self._read, SHORTEST, len(tokens) - LOOKS_BACK), len(tokens)):
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self._seen[tuple(tokens[end - length : end])] = end
        self._read = max(self._read, len(tokens))


class Cost:
    """What a step takes, by how many rows it has: so much for the first, so much more for each further one."""

    def __init__(self) -> None:
        self._first_s = 0.0
        """0 before a step of one row was seen."""
        self._row_s = 0.0
        self._known = False
        """Whether a step of several rows was seen."""
        self._computing_s = 0.0
        """What all stages together compute a row."""
        self._share = 1.0
        """How much of what a step takes to compute it comes after one that was sent just before: one of five stages
        computes it while four compute others, unless they are all on one machine."""
        self._share_known = False

    def took(self, rows: int, step_s: float, computing_s: Sequence[float]) -> None:
        """Learn from a step."""
        if rows == 1:
            self._first_s += (step_s - self._first_s) * (LEARNS if self._first_s else 1.0)
            self._computing_s = sum(computing_s)
            if not self._known:
                self._row_s = self._computing_s * ROW_SHARE
            if not self._share_known and self._computing_s:
                self._share = max(computing_s) / self._computing_s
        elif self._first_s:
            self._first_s = min(self._first_s, step_s)
            row_s = max(0.0, (step_s - self._first_s) / (rows - 1))
            self._row_s += (row_s - self._row_s) * (LEARNS if self._known else 1.0)
            self._known = True

    def took_further(self, rows: int, behind_s: float) -> None:
        """Learn from a step that was sent right after another, and came so long after it."""
        if self._computing_s:
            share = behind_s / (self._computing_s + (rows - 1) * self._row_s)
            self._share += (share - self._share) * (LEARNS if self._share_known else 1.0)
            self._share_known = True

    def best_guesses(self, chance: float, most: int, each_s: float = 0.0) -> int:
        """How many guesses give most tokens for their time, where each is right with `chance` if those before it are,
        and is made in `each_s`; 0 where none are worth it, or nothing is known yet."""
        return self._best(chance, 0, most, 0.0, self._row_s + each_s)

    def best_further(self, chance: float, ahead: int, most: int, each_s: float = 0.0) -> int:
        """How many guesses more are worth a further step at once, where `ahead` are being checked already."""
        first_s = self._share * (self._computing_s - self._row_s)  # a further step's rows are all guesses
        return self._best(chance, ahead, most, first_s, self._share * self._row_s + each_s)

    def _best(self, chance: float, ahead: int, most: int, any_s: float, each_s: float) -> int:
        """How many guesses after `ahead` give most tokens for their time: `any_s` for having any, `each_s` for each."""
        if not self._first_s:
            return 0
        all_right = chance**ahead
        tokens = sum(chance**count for count in range(ahead + 1))
        took_s = self._first_s + ahead * self._row_s
        best, best_rate = 0, GAIN * tokens / took_s
        for count in range(1, most + 1):
            all_right *= chance
            tokens += all_right
            rate = tokens / (took_s + any_s + count * each_s)
            if rate > best_rate:
                best, best_rate = count, rate
        return best


def follow(tokens: Sequence[int], start: int, end: int, places: range) -> list[int]:
    """The tokens at places from `start` on, which may lie beyond `end`: what repeats there is taken to go on so."""
    return [tokens[start + place % (end - start)] for place in places]
