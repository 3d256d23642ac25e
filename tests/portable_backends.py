"""The portable kernels on the host, with subgroups of several widths, as backends for the cases of the suite."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint
from typing import Any

from hal import plugins
from hal.backend import Backend, Probe
from hal.plugins import hookimpl
from hal.portable import ep
from hal.portable.host import HostDevice
from hal.portable.mla import PortableMla
from hal.portable.runtime import SharingDevice
from hal.spec.capability import Capabilities, plain_dense

WIDTHS = (1, 32, 64, 128)


class OnFibres(Backend):
    spec_version = "1.0"
    priority = -10

    def __init__(self, device: SharingDevice) -> None:
        self.device = device
        self.mla = PortableMla(device)

    def probe(self) -> Probe:
        return Probe(True, "fibres", evidence="simulation")

    def capabilities(self) -> Capabilities:
        return Capabilities(("cpu",), plain_dense(), None, ep.capabilities(self.device.transport))

    def mla_plan(self, args: Any) -> object:
        return self.mla.plan(args)

    def mla_decode(self, args: Any) -> None:
        self.mla.decode(args, args.schedule)

    def ep_buffer(self, args: Any) -> Any:
        return ep.open_engine(args, self.device, "fibres")

    def launches(self) -> Mapping[str, int]:
        return self.mla.device.launches()


class _Plugin:
    def __init__(self, subgroup: int) -> None:
        self.subgroup = subgroup

    @hookimpl
    def hal_backend(self) -> Backend:
        return OnFibres(HostDevice(self.subgroup))


def name(subgroup: int) -> str:
    return f"fibres-{subgroup}"


def registry() -> plugins.Registry:
    return plugins.Registry(EntryPoint(name(w), f"portable_backends:width_{w}", plugins.GROUP) for w in WIDTHS)


width_1, width_32, width_64, width_128 = map(_Plugin, WIDTHS)
