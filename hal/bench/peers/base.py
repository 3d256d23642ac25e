"""The one interface of every peer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hal.bench.cases import MlaCase
from hal.bench.data import MlaData


@dataclass(frozen=True, slots=True)
class Presence:
    """Whether a peer can be run on this machine.

    Attributes
    ----------
    here : bool
    what : str
        Its version and the variant in use, or precisely what is missing.
    """

    here: bool
    what: str


class Prepared(ABC):
    """A contender with its inputs laid out as it wants them; everything before `call` is not timed."""

    @abstractmethod
    def call(self, layer: int) -> None:
        """Decode from the cache of one layer. This is what is timed."""

    @abstractmethod
    def result(self) -> tuple[Tensor, Tensor | None]:
        """Out [b, s_q, h_q, d_v] of the last call, and lse [b, h_q, s_q], None where the peer has none."""

    @abstractmethod
    def poison(self) -> None:
        """Destroy the result of the last call, so that a call that computes nothing is found out."""


class Peer(ABC):
    """Another implementation of MLA decode.

    Attributes
    ----------
    name : str
        As on the command line and in the JSON document.
    summary : str
        What is run, in one line.
    install : str
        The line that installs it, empty where torch brings it.
    lacks : tuple of str
        What of the interface it does not do in any case; shown with its results.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    install: ClassVar[str] = ""
    lacks: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def presence(self) -> Presence:
        """Look for it. Imports or loads what it needs; must not raise for what may be absent."""

    def elsewhere(self, device: torch.device) -> str:
        """Why it cannot be compared with a backend on this device, empty if it can."""
        return "" if device.type == "cpu" else f"runs on the CPU, the backend is on {device.type}"

    @abstractmethod
    def cannot(self, case: MlaCase) -> str:
        """What of this case it cannot do, empty if it can do all of it."""

    @abstractmethod
    def prepare(self, data: MlaData, threads: int) -> Prepared:
        """Lay out the inputs for it. The number of threads is also torch's at this moment and during every call."""
