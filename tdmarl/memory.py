"""Memory for large results that are made again and again, used anew once nobody holds the last ones."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

_PLACES = 2  # a loop's variable holds the last batch while the next one is made


class Memory:
    """Gives out tensors whose memory was in use before, where no tensor, view or array shares it any more.

    A CPU's allocator gives large pieces back to the system, which clears them page by page when they are asked for
    again: half of the time in which batches of 16 agents were collected. GPUs' allocators keep what they have, so there
    tensors are made anew. At most two pieces are held for each name.
    """

    def __init__(self) -> None:
        self._pieces: dict[Hashable, list[_Piece]] = {}

    def empty(self, name: Hashable, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """What `torch.empty` would make.

        Args:
            name (hashable): whose memory is looked through; one for each of what is held at the same time.
            shape (sequence of int): shape of the tensor.
            dtype (torch.dtype): its type.
            device (torch.device): where it is.
        """
        new = torch.empty(shape, dtype=dtype, device="meta" if device.type == "cpu" else device)
        if device.type != "cpu":
            return new
        pieces = self._pieces.setdefault(name, [])
        pieces[:] = [piece for piece in pieces if piece.fits(new.nbytes)]
        free = next((piece for piece in pieces if piece.is_free()), None)
        if free is None:
            free = _Piece(new.nbytes)
            pieces[:] = [free, *pieces[: _PLACES - 1]]
        return torch.empty(0, dtype=dtype).set_(free.storage, 0, new.shape, new.stride())


class _Piece:
    def __init__(self, size: int) -> None:
        self.storage = torch.UntypedStorage(size)
        self._holders = self._count()

    def fits(self, size: int) -> bool:
        """Whether it has the size, and no other process may look at it."""
        return self.storage.nbytes() == size and not self.storage.is_shared()

    def is_free(self) -> bool:
        return self._count() == self._holders

    def _count(self) -> int:
        return int(torch._C._storage_Use_Count(self.storage._cdata))
