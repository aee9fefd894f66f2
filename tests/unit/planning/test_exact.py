"""The exact solver where it is cut off: what it has not settled it does not call proven."""

from __future__ import annotations

import numpy as np
import pytest

from bsns.core.ids import ModelId
from bsns.core.plan import Objective
from bsns.core.snapshot import ModelShape
from bsns.planning import exact
from bsns.planning.exact import solve_exactly
from bsns.planning.network import chain_problem
from bsns.planning.rival_rules import RULES
from bsns.topology.synthetic import synthetic

SHAPE = ModelShape(ModelId("m"), "m", (10**9,) * 16, 0, 8192)


@pytest.mark.parametrize("hinted", [False, True])
def test_a_question_cut_off_before_it_was_read_proves_nothing(hinted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may be so busy that the solver's time is over before it begins."""
    problem = chain_problem(synthetic("uniform", 8, np.random.default_rng(0)), SHAPE)
    hint = next(chain for rule in RULES.values() if (chain := rule(problem)) is not None) if hinted else None
    best = solve_exactly(problem, Objective(), remaining_s=lambda: 60.0)
    assert best.proven
    monkeypatch.setattr(exact, "LEAST_S", 1e-9)
    cut_off = solve_exactly(problem, Objective(), remaining_s=lambda: 2e-9, hint=hint)
    assert not cut_off.proven
    assert cut_off.bound_s <= best.bound_s
