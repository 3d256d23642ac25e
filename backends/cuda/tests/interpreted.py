"""The portable Triton kernels as a backend on the host, run by Triton's interpreter: what the suite judges them by.

Entry point of a throw-away distribution; meant for processes with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hal.backend import Backend, Probe
from hal.plugins import hookimpl
from hal.spec.capability import Capabilities, plain_dense
from hal.spec.errors import UnsupportedError

if TYPE_CHECKING:
    from hal.portable.triton.mla import TritonMla
    from hal.spec.mla import MlaDecodeArgs
    from hal.spec.plan import MlaPlanArgs

NAME = "triton-interpreter"
PROCESSORS = 5


class Interpreted(Backend):
    """A device of five processors, in an interpreter."""

    spec_version = "1.0"
    priority = -10

    def __init__(self) -> None:
        self._made: TritonMla | None = None
        # The interpreter changes the language itself while a kernel runs: of two threads one finds it changed back.
        self._alone = threading.Lock()

    @property
    def kernels(self) -> TritonMla:
        if self._made is None:
            from hal.portable.triton import kernels
            from hal.portable.triton.mla import TritonMla

            assert kernels.INTERPRETED.value, "set TRITON_INTERPRET=1 before triton is imported"
            self._made = TritonMla("interpreter", PROCESSORS)
        return self._made

    def probe(self) -> Probe:
        return Probe(True, "Triton's interpreter", evidence="simulation", details={"driver": "triton"})

    def capabilities(self) -> Capabilities:
        return Capabilities(("cpu",), plain_dense(("bfloat16", "float16", "float32")), None, None)

    def mla_plan(self, args: MlaPlanArgs) -> object:
        with self._alone:
            return self.kernels.plan(args)

    def mla_decode(self, args: MlaDecodeArgs) -> None:
        with self._alone:
            self.kernels.decode(args, args.schedule)  # type: ignore[arg-type]

    def ep_buffer(self, args: Any) -> Any:
        raise UnsupportedError(NAME, "group", "a group", "no expert-parallel communication")

    def launches(self) -> Mapping[str, int]:
        return {f"triton:{name}@interpreter": count for name, count in self.kernels.launches.items()}


class _Plugin:
    @hookimpl
    def hal_backend(self) -> Backend:
        return Interpreted()


plugin = _Plugin()
