"""Local search for a path of great worth: which nodes, in which order, where each way from one to the next has a worth.

Under a limit on every turn, the worth of going from m to n is the work that n can take after m. All insertions,
replacements, exchanges, moves of stretches and reversals of a path are weighed at once, as tables; the best is taken,
until none helps. Then a part of the path is torn up, and so on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bsns.planning.chain_dp import Ints
from bsns.planning.problem import Floats

NEVER = -1e9
"""The worth of a way that must not be taken."""
LEAST_GAIN = 1e-9
GREED = 0.6
"""How much less than its worth a node may count for when a path is regrown."""
STRETCH = 3
"""Stretches of up to so many nodes are moved."""


class PathSearch:
    """Worths (N + 2, N + 2): nodes, then the start (row N) and the end (column N + 1). A path goes between."""

    def __init__(self, worth: Floats) -> None:
        self.worth = worth
        self.count = len(worth) - 2
        self.start, self.end = self.count, self.count + 1

    def total(self, path: Ints) -> float:
        """The worth of a path of nodes, its ends included."""
        return float(self._along(path).sum())

    def improve(self, path: Ints, should_stop: Callable[[], bool], enough: float) -> tuple[Ints, float]:
        """A path that no single change makes better, or one worth `enough`; and its worth."""
        total = self.total(path)
        while total < enough and not should_stop():
            change = max(
                (self._insert(path), self._replace(path), self._move(path), self._reverse(path), self._exchange(path)),
                key=lambda found: found[0],
            )
            if change[0] <= LEAST_GAIN:
                break
            path = change[1]()
            total = self.total(path)
        return path, total

    def shake(self, path: Ints, rng: np.random.Generator) -> Ints:
        """The path with a stretch torn out, or two stretches swapped, or random nodes dropped, or a part regrown."""
        size = len(path)
        kind = int(rng.integers(5))
        if kind >= 3:
            return self._regrow(path[: int(rng.integers(size))], rng)
        if kind == 0 and size > 3:
            cut = np.sort(rng.choice(size, 3, replace=False))
            return np.concatenate([path[: cut[0]], path[cut[1] : cut[2]], path[cut[0] : cut[1]], path[cut[2] :]])
        if kind == 1 and size > 2:
            length = int(rng.integers(1, max(2, min(6, size // 2 + 1))))
            at = int(rng.integers(size - length + 1))
            kept = np.concatenate([path[:at], path[at + length :]])
        else:
            kept = path[rng.random(size) > min(0.5, 3 / max(size, 1))]
        return kept if len(kept) else path

    def _regrow(self, path: Ints, rng: np.random.Generator) -> Ints:
        """The path, greedily lengthened while that is worth something, not always by the very best."""
        nodes = path.tolist()
        worth = self.worth[:, : self.count] * rng.uniform(GREED, 1.0, self.count)
        worth[:, path] = NEVER
        last = nodes[-1] if nodes else self.start
        while True:
            node = int(worth[last].argmax())
            if worth[last, node] <= 0 and nodes:
                return np.array(nodes)
            nodes.append(node)
            worth[:, node] = NEVER
            last = node

    def _along(self, path: Ints) -> Floats:
        whole = np.concatenate([[self.start], path, [self.end]])
        return np.asarray(self.worth[whole[:-1], whole[1:]])

    def _unused(self, path: Ints) -> Ints:
        free = np.ones(self.count, dtype=bool)
        free[path] = False
        return np.flatnonzero(free)

    def _insert(self, path: Ints) -> tuple[float, Callable[[], Ints]]:
        free = self._unused(path)
        if not len(free):
            return NEVER, lambda: path
        whole = np.concatenate([[self.start], path, [self.end]])
        before, after = whole[:-1], whole[1:]
        gain = self.worth[before[:, None], free] + self.worth[free[:, None], after].T - self._along(path)[:, None]
        gap, node = np.unravel_index(int(gain.argmax()), gain.shape)
        return float(gain[gap, node]), lambda: np.insert(path, gap, free[node])

    def _replace(self, path: Ints) -> tuple[float, Callable[[], Ints]]:
        """One node of the path by one outside; or by none."""
        free = self._unused(path)
        whole = np.concatenate([[self.start], path, [self.end]])
        before, after = whole[:-2], whole[2:]
        along = self._along(path)
        lost = along[:-1] + along[1:]
        gain = self.worth[before[:, None], free] + self.worth[free[:, None], after].T - lost[:, None]
        without = self.worth[before, after] - lost if len(path) > 1 else np.full(len(path), NEVER)
        drop = int(without.argmax())
        if len(free) and gain.max() >= without[drop]:
            at, node = np.unravel_index(int(gain.argmax()), gain.shape)
            return float(gain[at, node]), lambda: np.concatenate([path[:at], free[node : node + 1], path[at + 1 :]])
        return float(without[drop]), lambda: np.delete(path, drop)

    def _exchange(self, path: Ints) -> tuple[float, Callable[[], Ints]]:
        """Two nodes of the path that are no neighbours in it."""
        size = len(path)
        if size < 3:
            return NEVER, lambda: path
        whole = np.concatenate([[self.start], path, [self.end]])
        before, after = whole[:-2], whole[2:]
        along = self._along(path)
        lost = along[:-1] + along[1:]
        there = self.worth[before[:, None], path] + self.worth[path[:, None], after].T  # node b in the place of a
        gain = there + there.T - lost[:, None] - lost
        apart = np.abs(np.subtract.outer(np.arange(size), np.arange(size))) > 1
        gain = np.where(apart, gain, NEVER)
        one, other = np.unravel_index(int(gain.argmax()), gain.shape)

        def exchanged() -> Ints:
            new = path.copy()
            new[one], new[other] = path[other], path[one]
            return new

        return float(gain[one, other]), exchanged

    def _move(self, path: Ints) -> tuple[float, Callable[[], Ints]]:
        """A stretch of the path to another place in it, either way round."""
        best: tuple[float, Callable[[], Ints]] = (NEVER, lambda: path)
        whole = np.concatenate([[self.start], path, [self.end]])
        along = self._along(path)
        size = len(path)
        for length in range(1, min(STRETCH, size - 1) + 1):
            first, last = path[: size - length + 1], path[length - 1 :]
            begin = np.arange(size - length + 1)
            closed = self.worth[whole[begin], whole[begin + length + 1]] - along[begin] - along[begin + length]
            gaps = np.arange(size + 1)
            outside = (gaps[None, :] < begin[:, None]) | (gaps[None, :] > begin[:, None] + length)
            before, after = whole[:-1], whole[1:]
            for turned in (False, True) if length > 1 else (False,):
                head, tail = (last, first) if turned else (first, last)
                inner = np.zeros(len(begin))
                if turned:
                    for step in range(length - 1):
                        a, b = path[begin + step], path[begin + step + 1]
                        inner += self.worth[b, a] - self.worth[a, b]
                gain = self.worth[before, head[:, None]] + self.worth[tail[:, None], after] - along[None, :]
                gain = np.where(outside, gain + (closed + inner)[:, None], NEVER)
                at, gap = np.unravel_index(int(gain.argmax()), gain.shape)
                if gain[at, gap] > best[0]:
                    best = (float(gain[at, gap]), _moved(path, int(at), length, int(gap), turned))
        return best

    def _reverse(self, path: Ints) -> tuple[float, Callable[[], Ints]]:
        size = len(path)
        if size < 2:
            return NEVER, lambda: path
        whole = np.concatenate([[self.start], path, [self.end]])
        along = self._along(path)
        forth = np.concatenate([[0.0], np.cumsum(along[1:-1])])
        back = np.concatenate([[0.0], np.cumsum(self.worth[path[1:], path[:-1]])])
        inner = (back - forth)[None, :] - (back - forth)[:, None]  # of [i, j]
        ends = self.worth[whole[:-2, None], path] + self.worth[path[:, None], whole[2:]]
        gain = ends + inner - along[:-1, None] - along[None, 1:]
        gain = np.where(np.triu(np.ones((size, size), dtype=bool), 1), gain, NEVER)
        low, high = np.unravel_index(int(gain.argmax()), gain.shape)
        return float(gain[low, high]), lambda: np.concatenate(
            [path[:low], path[low : high + 1][::-1], path[high + 1 :]]
        )


def _moved(path: Ints, at: int, length: int, gap: int, turned: bool) -> Callable[[], Ints]:
    def new() -> Ints:
        stretch = path[at : at + length][::-1] if turned else path[at : at + length]
        if gap < at:
            return np.concatenate([path[:gap], stretch, path[gap:at], path[at + length :]])
        return np.concatenate([path[:at], path[at + length : gap], stretch, path[gap:]])

    return new
