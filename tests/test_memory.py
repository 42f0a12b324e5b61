"""Memory is used again when, and only when, nobody can see it any more."""

from __future__ import annotations

import pytest
import torch

from tdmarl.memory import Memory

CPU = torch.device("cpu")
SHAPE = (40, 50)


@pytest.fixture
def memory():
    return Memory()


def take(memory, shape=SHAPE, dtype=torch.float32, name="x"):
    return memory.empty(name, shape, dtype, CPU)


def test_what_nobody_holds_is_used_again(memory):
    x = take(memory)
    place = x.data_ptr()
    assert x.shape == SHAPE and x.dtype == torch.float32 and x.is_contiguous() and not x._is_view()
    del x
    assert take(memory).data_ptr() == place
    assert take(memory, (50, 40), torch.int32).data_ptr() == place  # of the same size
    assert take(memory, name="y").data_ptr() != place


HOLD = {
    "tensor": lambda x: x,
    "view": lambda x: x[3:5].t(),
    "detached": lambda x: x.detach(),
    "array": lambda x: x.numpy(),
    "storage's tensor": lambda x: torch.empty(0).set_(x.untyped_storage()),
    "dlpack": lambda x: torch.utils.dlpack.to_dlpack(x),
    "graph": lambda x: (torch.ones(SHAPE, requires_grad=True) * x).sum(),
}


@pytest.mark.parametrize("how", HOLD)
def test_what_somebody_holds_is_left_alone(memory, how):
    x = take(memory)
    place, held = x.data_ptr(), HOLD[how](x)
    del x
    assert take(memory).data_ptr() != place
    del held
    both = [take(memory), take(memory)]
    assert place in [x.data_ptr() for x in both]


def test_two_are_held_for_a_loop_that_still_holds_the_last_one(memory):
    places = set()
    batch = None
    for _ in range(6):
        batch = take(memory)  # the last one is let go afterwards
        places.add(batch.data_ptr())
    assert len(places) == 2
    several = [take(memory) for _ in range(4)]
    assert len({x.data_ptr() for x in [batch, *several]}) == 5


def test_another_size_takes_the_place(memory):
    take(memory)
    assert take(memory, (7,)).shape == (7,)
    assert len(memory._pieces["x"]) == 1
    assert take(memory, (0, 3)).shape == (0, 3)


def test_what_other_processes_may_see_is_not_used_again(memory):
    x = take(memory)
    x.share_memory_()
    x.fill_(3)
    place = x.data_ptr()
    del x
    assert take(memory).data_ptr() != place


def test_elsewhere_tensors_are_new(memory):
    x = memory.empty("x", SHAPE, torch.float32, torch.device("meta"))
    assert x.shape == SHAPE and x.device.type == "meta" and not memory._pieces
