"""Lidar without vectors of two in memory, and without directions that are computed once for each entity.

VMAS holds every ray once for each entity that it may meet, origin, direction and nearest point apart. Here each number
of a ray and each of an entity is computed once, so that what is left for all pairs are a few products and one minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_GRAZED = 1e-8  # squared half chord that VMAS takes where a ray only touches a sphere


class _Rays(NamedTuple):
    """Rays, with a dimension for entities before the last."""

    x: Tensor  # of the origin, [E, 1, 1]
    y: Tensor
    cos: Tensor  # of the direction, [E, 1, rays]
    sin: Tensor


def cast_rays(
    world: Any,
    entity: Any,
    angles: Tensor,
    max_range: float,
    entity_filter: Callable[[Any], bool] = lambda _: False,
) -> Tensor:
    """How far each ray goes until it meets an entity: `vmas.simulator.core.World.cast_rays` to rounding.

    A ray that begins in a box does not meet it. One that begins in a sphere and goes towards its centre does: the near
    side is behind, so the distance is negative.

    Args:
        world (World): whose entities are met.
        entity (Entity): where the rays begin.
        angles (Tensor): `[E, rays]`, in radians.
        max_range (float): the most that is returned.
        entity_filter (callable): which entities can be met.

    Returns:
        Tensor: `[E, rays]`.
    """
    from vmas.simulator.core import Box, Line, Sphere

    met = [other for other in world.entities if other is not entity and entity_filter(other)]
    for other in met:
        assert other.collides(entity) and entity.collides(other), "Rays are only casted among collidables"
    x, y = entity.state.pos[:, None].unbind(-1)  # [E, 1] each
    rays = _Rays(x.unsqueeze(-1), y.unsqueeze(-1), angles.cos().unsqueeze(1), angles.sin().unsqueeze(1))
    nearest = torch.full_like(angles, max_range)
    for shape, meets in ((Box, _meets_box), (Sphere, _meets_sphere), (Line, _meets_line)):
        own = [other for other in met if isinstance(other.shape, shape)]
        met = [other for other in met if other not in own]
        if own:
            hit, distance = meets(rays, own)
            found = torch.where(hit, distance, max_range).amin(1)  # [E, rays]
            nearest = torch.minimum(nearest, found)
    if met:
        raise RuntimeError(f"Shape {met[0].shape} currently not handled by cast_ray")
    return nearest


def _meets_sphere(rays: _Rays, spheres: list[Any]) -> tuple[Tensor, Tensor]:
    """Where the centre lies ahead and nearer to the ray's line than the radius; up to the near end of the chord."""
    x, y = _positions(spheres)
    x, y = x - rays.x, y - rays.y
    along = x * rays.cos + y * rays.sin  # [E, spheres, rays]
    off_x, off_y = x - along * rays.cos, y - along * rays.sin
    radius = _sizes([sphere.shape.radius for sphere in spheres], x)
    chord = radius * radius - (off_x * off_x + off_y * off_y)
    hit = (chord > 0) & (along > 0)
    return hit, along - torch.where(hit, chord, _GRAZED).sqrt()


def _meets_box(rays: _Rays, boxes: list[Any]) -> tuple[Tensor, Tensor]:
    """Where the ray is between both pairs of opposite sides at once, in the box's own axes."""
    x, y = _positions(boxes)
    cos, sin = _directions(boxes)
    x, y = rays.x - x, rays.y - y
    first, last = [], []
    for place, direction, size in (
        (cos * x + sin * y, cos * rays.cos + sin * rays.sin, [box.shape.length for box in boxes]),
        (cos * y - sin * x, cos * rays.sin - sin * rays.cos, [box.shape.width for box in boxes]),
    ):
        half = _sizes(size, x) / 2
        ends = (-half - place) / direction, (half - place) / direction
        first.append(torch.minimum(*ends))
        last.append(torch.maximum(*ends))
    enters, leaves = torch.maximum(*first), torch.minimum(*last)
    return (leaves >= enters) & (enters > 0), enters


def _meets_line(rays: _Rays, lines: list[Any]) -> tuple[Tensor, Tensor]:
    """Where the ray's line crosses between the ends, ahead; parallel ones do not meet."""
    x, y = _positions(lines)
    cos, sin = _directions(lines)
    length = _sizes([line.shape.length for line in lines], x)
    along_x, along_y = cos * length, sin * length
    x, y = rays.x - x, rays.y - y
    cross = along_x * rays.sin - along_y * rays.cos
    on_line = (x * rays.sin - y * rays.cos) / cross  # -1/2 and 1/2 at its ends
    distance = (x * along_y - y * along_x) / cross
    return (cross != 0) & (on_line <= 0.5) & (on_line >= -0.5) & (distance >= 0), distance


def _positions(entities: list[Any]) -> tuple[Tensor, Tensor]:
    """Both coordinates, [E, entities, 1] each."""
    x, y = torch.stack([entity.state.pos for entity in entities], 1).unsqueeze(-2).unbind(-1)
    return x, y


def _directions(entities: list[Any]) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each one's rotation, [E, entities, 1]."""
    rotation = torch.stack([entity.state.rot for entity in entities], 1)
    return rotation.cos(), rotation.sin()


def _sizes(sizes: list[float], like: Tensor) -> Tensor | float:
    """A number if all have the same, else [entities, 1]."""
    if len(set(sizes)) == 1:
        return sizes[0]
    return torch.tensor(sizes, dtype=like.dtype, device=like.device).unsqueeze(-1)
