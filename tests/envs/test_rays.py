"""Rays meet what they meet by geometry, and what they meet in VMAS."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from vmas.simulator.core import Agent, Box, Landmark, Line, Sphere, World

from tdmarl.envs.rays import cast_rays

RANGE = 5.0


def world_of(
    *entities: tuple[Any, float, float, float], envs: int = 1, agent: tuple[float, float] = (0.0, 0.0)
) -> World:
    """An agent that sees, and landmarks: shape, place and rotation of each."""
    world = World(batch_dim=envs, device=torch.device("cpu"))
    world.add_agent(Agent("seer", shape=Sphere(0.01)))
    for i, (shape, *_) in enumerate(entities):
        world.add_landmark(Landmark(f"met_{i}", shape=shape, collide=True, movable=True))
    world.agents[0].set_pos(torch.tensor(agent).expand(envs, 2), batch_index=None)
    for landmark, (_, x, y, rotation) in zip(world.landmarks, entities):
        landmark.set_pos(torch.tensor([x, y]).expand(envs, 2), batch_index=None)
        landmark.set_rot(torch.full((envs, 1), rotation), batch_index=None)
    return world


def cast(world: World, angles: Tensor) -> Tensor:
    return cast_rays(world, world.agents[0], angles, RANGE, lambda _: True)


@pytest.mark.parametrize(
    ("shape", "place", "angle", "distance"),
    [
        (Sphere(0.5), (2.0, 0.0, 0.0), 0.0, 1.5),
        (Sphere(0.5), (2.0, 0.0, 0.0), math.pi, RANGE),  # it lies behind
        (Sphere(0.5), (2.0, 0.3, 0.0), 0.0, 2 - 0.4),  # half a chord: sqrt(.25 - .09)
        (Sphere(0.5), (2.0, 0.6, 0.0), 0.0, RANGE),
        (Sphere(0.5), (9.0, 0.0, 0.0), 0.0, RANGE),  # too far
        (Sphere(2.0), (1.0, 0.0, 0.0), 0.0, -1.0),  # from within, the near side is behind
        (Box(length=2.0, width=1.0), (3.0, 0.2, 0.0), 0.0, 2.0),
        (
            Box(length=2.0, width=1.0),
            (3.0, 0.0, math.pi / 2),
            0.0,
            2.5,
        ),  # turned, its width lies along the ray
        (Box(length=2.0, width=1.0), (0.0, 3.0, 0.0), math.pi / 2, 2.5),
        (Box(length=2.0, width=1.0), (3.0, 0.6, 0.0), 0.0, RANGE),
        (Box(length=2.0, width=1.0), (0.0, 0.0, 0.0), 0.3, RANGE),  # from within
        (Line(length=2.0), (2.0, 0.0, math.pi / 2), 0.0, 2.0),
        (Line(length=2.0), (2.0, 0.9, math.pi / 2), 0.0, 2.0),
        (Line(length=2.0), (2.0, 1.1, math.pi / 2), 0.0, RANGE),
        (Line(length=2.0), (2.0, 0.0, math.pi / 2), math.pi, RANGE),
        (
            Line(length=2.0),
            (2.0, 1.0, math.pi / 4 * 3),
            math.pi / 4,
            1.5 * math.sqrt(2),
        ),  # x + y = 3 at (1.5, 1.5)
        (Line(length=2.0), (2.0, 0.5, 0.0), 0.0, RANGE),  # parallel
    ],
)
def test_one_ray(shape: Any, place: tuple[float, float, float], angle: float, distance: float) -> None:
    found = cast(world_of((shape, *place)), torch.tensor([[angle]]))
    torch.testing.assert_close(found, torch.tensor([[distance]]), atol=2e-6, rtol=0)


def test_the_nearest_counts() -> None:
    """Of all kinds, and of those that the filter lets through."""
    world = world_of(
        (Sphere(0.5), 4.0, 0.0, 0.0),
        (Line(length=1.0), 2.0, 0.0, math.pi / 2),
        (Box(length=1.0, width=1.0), 3.5, 0.0, 0.0),
    )
    angles = torch.zeros(1, 1)
    assert cast(world, angles).item() == pytest.approx(2.0)
    line = world.landmarks[1]
    found = cast_rays(world, world.agents[0], angles, RANGE, lambda entity: entity is not line)
    assert found.item() == pytest.approx(3.0)
    assert cast_rays(world, world.agents[0], angles, RANGE).item() == RANGE  # nothing passes by default


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("shape", ["sphere", "box", "line"])
def test_as_vmas(shape: str, equal: bool) -> None:
    """Random places; where the two differ, a ray only just meets or misses."""
    torch.manual_seed(0)
    sizes = [0.4] * 5 if equal else [0.2, 0.3, 0.4, 0.5, 0.6]
    made = {
        "sphere": Sphere,
        "box": lambda s: Box(length=2 * s, width=s),
        "line": lambda s: Line(length=2 * s),
    }
    world = world_of(*((made[shape](size), 0.0, 0.0, 0.0) for size in sizes), envs=400)
    for landmark in world.landmarks:
        landmark.set_pos(torch.rand(400, 2) * 4 - 2, batch_index=None)
        landmark.set_rot(torch.rand(400, 1) * 7, batch_index=None)
    angles = torch.rand(400, 13) * 7
    found = cast(world, angles)
    expected = world.cast_rays(world.agents[0], angles, RANGE, lambda _: True)
    assert 0.2 < (expected < RANGE).float().mean() < 0.9
    close = torch.isclose(found, expected, atol=1e-5, rtol=1e-4)
    assert close.float().mean() > 0.999
    torch.testing.assert_close(found.mean(), expected.mean(), atol=1e-3, rtol=0)


def test_only_what_collides() -> None:
    world = world_of((Sphere(0.5), 2.0, 0.0, 0.0))
    world.landmarks[0]._collide = False
    with pytest.raises(AssertionError, match="collidables"):
        cast(world, torch.zeros(1, 1))
