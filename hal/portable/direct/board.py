"""A rank's board, where its peers write headers, and what its device tells its host of them."""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hal.portable.direct.kernels import CHANNELS, HEAD, RING, signed

LATE, DIFFERS, UNKNOWN, OUTSIDE, MET = range(1, 6)
"""What became of a header, as ``ep_meet.h`` numbers it: it has not come; it is another call; its window is not known
here; its rows do not lie in their window, or are more than there is room for; all is well."""

KIND, WRONG, WINDOW, COUNT, FIELDS = range(1, 6)
"""Words of a header after the first, which is the call's number."""

SLOTS: Final = RING + CHANNELS
"""Places on a board."""
_FEW_WINDOWS: Final = 16
_MOST_WINDOWS: Final = 1 << 16


def board_bytes(ranks: int) -> int:
    """Headers, and words of who has read what, for all places; behind them what `wrong` and `epoch` name."""
    return epoch(0, ranks, CHANNELS)


def wrong(board: int, ranks: int, slot: int) -> int:
    """Address of the word in which kernels note what is wrong with this rank's own call."""
    return board + 4 * (SLOTS * ranks * (HEAD + 1) + slot)


def epoch(board: int, ranks: int, channel: int) -> int:
    """Address of the word that counts the rounds of a place of captured calls."""
    return wrong(board, ranks, SLOTS) + 4 * channel


class Told:
    """What kernels tell the host of one call.

    Parameters
    ----------
    words : Tensor
        int32, where both can look.
    ranks : int
    """

    def __init__(self, words: Tensor, ranks: int) -> None:
        self.words = words
        self._there: npt.NDArray[np.int32] = words.numpy()
        self._states = self._there[:ranks]
        self._ranks = ranks

    @staticmethod
    def size(ranks: int) -> int:
        """Words of it."""
        return ranks * (2 + HEAD + RING)

    def clear(self, call: int) -> None:
        """Before kernels are launched that tell anew: no number that stands there is that of this call."""
        self._states.fill(signed(call - 1))

    def complete(self, call: int) -> bool:
        """Whether the outcome for every rank is there."""
        return self._states.tobytes() == struct.pack("i", signed(call)) * self._ranks

    def missing(self, call: int) -> list[int]:
        """Ranks for which it is not."""
        return [int(rank) for rank in np.flatnonzero(self._there[: self._ranks] != signed(call))]

    def outcomes(self) -> list[int]:
        """By rank."""
        return [int(one) for one in self._there[self._ranks : 2 * self._ranks]]

    def head(self, rank: int) -> list[int]:
        """The header of a rank that was not late."""
        begin = 2 * self._ranks + rank * HEAD
        return [int(word) for word in self._there[begin : begin + HEAD]]

    def reads(self) -> npt.NDArray[np.int32]:
        """[RING, R]: of the calls that end so, the last that each rank has read."""
        return self._there[self._ranks * (2 + HEAD) :].reshape(RING, self._ranks)


class Addresses:
    """Where the windows of all ranks are for this one.

    Parameters
    ----------
    ranks : int
    device : torch.device
    """

    def __init__(self, ranks: int, device: torch.device) -> None:
        self._device = device
        self._sizes: dict[tuple[int, int], int] = {}
        # Not a tensor, which torch would not let be written to had it been made in its inference mode.
        self._there = np.zeros((ranks, _FEW_WINDOWS, 2), np.int64)
        self.table = self._copied()

    def learn(self, rank: int, number: int, address: int, size: int) -> None:
        """A window that kernels may read from now on.

        Raises
        ------
        ValueError
            Windows are not numbered so.
        """
        if not 0 <= number < _MOST_WINDOWS:
            raise ValueError(f"a window of number {number}")
        while number >= self._there.shape[1]:
            self._there = np.concatenate([self._there, np.zeros_like(self._there)], 1)
        self._there[rank, number] = address, size
        self._sizes[rank, number] = size
        # Another tensor: kernels that were launched may still read the one before.
        self.table = self._copied()

    def _copied(self) -> Tensor:
        return torch.tensor(self._there, device=self._device)

    def size(self, rank: int, number: int) -> int | None:
        """How large it is, if it was learnt."""
        return self._sizes.get((rank, number))
