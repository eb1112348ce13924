"""The distributed example: the same losses on every mesh, and through a checkpoint from one mesh to another."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from world import World

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ["--rows", "4", "--tokens", "24", "--hidden-size", "32", "--layers", "1"]


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[int, World]]:
    worlds = {size: World(size) for size in (1, 2, 4)}
    yield worlds
    for world in worlds.values():
        world.close()


def train(*arguments: str) -> list[float]:
    """The example's losses on this rank."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("train_distributed", EXAMPLES / "train_distributed.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example.main([*SMALL, *arguments])


def on(world: World, mesh: str, *arguments: str) -> list[float]:
    """The losses, which all ranks agree on."""
    first, *others = world.run(train, "--mesh", *mesh.split(), *arguments)
    assert all(losses == pytest.approx(first, abs=1e-6) for losses in others)
    return first


def test_training_goes_on_from_one_mesh_to_another_as_on_one_rank(worlds: dict[int, World], tmp_path: Path) -> None:
    expected = on(worlds[1], "1 1 1", "--steps", "5")
    checkpoint = ["--checkpoint", str(tmp_path / "checkpoint")]
    losses = on(worlds[4], "1 2 2", "--steps", "2", *checkpoint)
    losses += on(worlds[2], "1 2 1", "--steps", "4", *checkpoint)
    losses += on(worlds[4], "2 1 2", "--steps", "5", *checkpoint)
    assert losses == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0]
