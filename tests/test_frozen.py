from __future__ import annotations

import enum
from typing import Any

import pytest
import torch

from tdmarl.frozen import plain


class Side(enum.Enum):
    LEFT, RIGHT = 1, 2


@pytest.mark.parametrize(
    "one, other",
    [
        (1, True), (1, 1.0), (0.0, -0.0), ("1", 1), (None, False), ((), []), ([1], (1,)), ({"a": 1}, {"a": 2}),
        (torch.float32, torch.float64), (torch.Size([2]), torch.Size([3])), (Side.LEFT, Side.RIGHT),
    ],
)  # fmt: skip
def test_values_are_told_apart_by_kind_and_content(one: Any, other: Any) -> None:
    assert plain(one) == plain(one) != plain(other)


@pytest.mark.parametrize("value", [float("nan"), [], {}, set(), (1, [2.0, {"a": None}]), Side.LEFT])
def test_a_value_is_the_same_as_before(value: Any) -> None:
    assert plain(value) == plain(value)


@pytest.mark.parametrize(
    "value, change", [([], lambda x: x.append(1)), ({}, lambda x: x.update(a=1)), (set(), lambda x: x.add(1))]
)
def test_what_is_empty_and_filled_later_has_changed(value: Any, change: Any) -> None:
    before = plain(value)
    change(value)
    assert plain(value) != before
