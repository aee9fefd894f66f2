"""What tests of several parts share: tiny models, loaded stages, and a swarm in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from memory_swarm import MemorySwarm, StageShelf
from tiny_models import FAMILIES, make_model

torch.set_num_threads(1)
settings.register_profile("unhurried", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model of a family (a key of tiny_models.FAMILIES), made when first asked for."""
    made: dict[str, Path] = {}

    def path(family: str) -> Path:
        if family not in made:
            made[family] = make_model(tmp_path_factory.mktemp(family), *FAMILIES[family])
        return made[family]

    return path


@pytest.fixture(scope="session")
def shelf() -> StageShelf:
    return StageShelf()


@pytest.fixture
async def swarm() -> AsyncIterator[MemorySwarm]:
    """An empty swarm; closed after the test."""
    swarm = MemorySwarm()
    yield swarm
    await swarm.close()
