from pathlib import Path

import pytest

from simulator.world import World, WorldConfig, build_world

CONFIG = WorldConfig(seed=7, customers=150, days=60, product_events=8_000)


@pytest.fixture(scope="session")
def world() -> World:
    """The demo's customers and billing, with few product events."""
    return build_world(CONFIG)


@pytest.fixture(scope="session")
def truth(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from simulator.truth import write_truth

    folder = tmp_path_factory.mktemp("truth")
    write_truth(world, folder)
    return folder
