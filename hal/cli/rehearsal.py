"""The run behind ``hal demo``: decode every layer of every step, time it, compare some of it with the reference."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import hal
from hal.cli.microkernel import devices, synchronize
from hal.cli.verify import Agreement, compare
from hal.cli.workload import Shape, Step, Workload
from hal.plugins import Selected
from hal.reference.mla import mla_decode as reference_decode
from hal.spec.errors import BackendUnavailable


class Pick(NamedTuple):
    """One result to compare: what one sequence got in one layer of one step."""

    layer: int
    step: int
    sequence: int


class Rehearsal:
    """A workload on the device of one backend, with its results and timings.

    Attributes
    ----------
    selected : Selected
    device : torch.device
        The first of those the backend takes.
    workload : Workload
    seconds : list of list of float
        Of each `hal.mla_decode`, by step and layer.
    plan_seconds : list of float
        Of each `hal.mla_plan`, by step.
    """

    def __init__(self, selected: Selected, shape: Shape, seed: int) -> None:
        self.selected = selected
        found = devices(selected.capabilities)
        if not found:
            kinds = ", ".join(selected.capabilities.device_types) or "none"
            raise BackendUnavailable(f"torch sees no device of the types that backend {selected.name!r} takes: {kinds}")
        self.device = torch.device(found[0])
        self.workload = Workload(shape, seed, self.device)
        self.seconds: list[list[float]] = []
        self.plan_seconds: list[float] = []
        self._random = random.Random(seed)
        self._steps: list[Step] = []
        self._results: list[list[tuple[Tensor, Tensor]]] = []
        self._launched = dict(selected.backend.launches())

    def decode(self) -> Iterator[int]:
        """Run every step; yields the layer done. The first decode is done once before, untimed, to compile and warm."""
        for number in range(self.workload.shape.steps):
            step = self.workload.step(number)
            start = time.perf_counter()
            plan = self._plan(step)
            self.plan_seconds.append(time.perf_counter() - start)
            if number == 0:
                self._decode(step, 0, plan)
            self._steps.append(step)
            self._results.append([])
            self.seconds.append([])
            for layer in range(self.workload.shape.layers):
                start = time.perf_counter()
                result = self._decode(step, layer, plan)
                self.seconds[-1].append(time.perf_counter() - start)
                self._results[-1].append(result)
                yield layer

    def picks(self, count: int) -> list[Pick]:
        """So many results drawn at random, or all for 0, layer by layer."""
        s = self.workload.shape
        every = range(s.layers * s.steps * s.batch)
        numbers = self._random.sample(every, count) if 0 < count < len(every) else every
        return [Pick(n // (s.steps * s.batch), n // s.batch % s.steps, n % s.batch) for n in sorted(numbers)]

    def compare(self, picks: Sequence[Pick]) -> Iterator[Agreement]:
        """Compare each picked result with the reference, which the lengths keep from rows appended since."""
        s = self.workload.shape
        layer, cache = -1, torch.empty(0)
        for pick in picks:
            if pick.layer != layer:
                layer, cache = pick.layer, self.workload.caches[pick.layer].cpu()
            step = self._steps[pick.step]
            one = slice(pick.sequence, pick.sequence + 1)
            right = reference_decode(
                step.queries[layer][one],
                cache,
                step.table[one],
                step.cache_seqlens[one],
                head_dim_v=s.head_dim_v,
                causal=True,
            )
            out, lse = self._results[pick.step][layer]
            yield compare(out[one], lse[one], *right, f"step {pick.step}, layer {layer}, ", pick.sequence)

    def launches(self) -> dict[str, int]:
        """Which kernels this run launched, and how often."""
        now = self.selected.backend.launches()
        return {name: count - self._launched.get(name, 0) for name, count in now.items()}

    def _plan(self, step: Step) -> hal.MlaPlan:
        s = self.workload.shape
        plan = hal.mla_plan(
            step.cache_seqlens,
            h_q=s.h_q,
            h_kv=s.h_kv,
            s_q=s.s_q,
            head_dim=s.head_dim,
            head_dim_v=s.head_dim_v,
            page_size=s.page_size,
            dtype=s.dtype,
            causal=True,
            backend=self.selected.name,
        )
        synchronize(self.device)
        return plan

    def _decode(self, step: Step, layer: int, plan: hal.MlaPlan) -> tuple[Tensor, Tensor]:
        result = hal.mla_decode(
            step.queries[layer],
            self.workload.caches[layer],
            step.table,
            step.cache_seqlens,
            head_dim_v=self.workload.shape.head_dim_v,
            causal=True,
            plan=plan,
            backend=self.selected.name,
        )
        synchronize(self.device)
        return result
