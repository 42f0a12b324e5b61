from __future__ import annotations

import pytest
import torch

from tdmarl.seeds import derive, generator, routed


def test_streams_are_fixed_numbers():
    """SHA-256 of "0/env" begins b86fc90d, little-endian 0x0dc96fb8: the same on every machine, for ever."""
    assert derive(0, "env") == 0x0DC96FB8
    assert len({derive(s, n) for s in range(50) for n in ("init", "env", "acting", "learning")}) == 200


def test_routed_continues_the_stream_and_leaves_the_global_one():
    expected = torch.rand(6, generator=generator(3, "x"))
    source, outside = generator(3, "x"), torch.get_rng_state()
    found = []
    for _ in range(2):
        with routed(source):
            found.append(torch.rand(3))
        torch.rand(5)  # elsewhere
    assert torch.equal(torch.cat(found), expected)
    torch.set_rng_state(outside)
    with pytest.raises(ValueError), routed(source):
        torch.rand(1)
        raise ValueError
    assert torch.equal(torch.get_rng_state(), outside)


def test_no_generator_is_the_global_one():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with routed(None):
        assert torch.equal(torch.rand(1), expected)
