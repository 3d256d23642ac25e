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
from hal.portable.runtime import Mailboxes, SharingDevice
from hal.spec.capability import Capabilities, plain_dense

WIDTHS = (1, 32, 64, 128)
SOCKETS, DEVICES = "sockets", "devices"
"""Where ranks meet: each is an engine of its own."""


class MeetingHost(Mailboxes, HostDevice):
    """A device whose ranks meet on it: what its kernels write the host sees at once, as it is the host that writes."""

    looks = 10**9
    pinned = False
    in_capture = False

    def capturing(self) -> bool:
        return self.in_capture


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
    def __init__(self, device: type[HostDevice], subgroup: int) -> None:
        self.device, self.subgroup = device, subgroup

    @hookimpl
    def hal_backend(self) -> Backend:
        return OnFibres(self.device(self.subgroup))


def name(subgroup: int) -> str:
    return f"fibres-{subgroup}"


def registry(meeting: str = SOCKETS) -> plugins.Registry:
    """The backends, by the same names wherever their ranks meet."""
    found = (EntryPoint(name(w), f"portable_backends:{meeting}_{w}", plugins.GROUP) for w in WIDTHS)
    return plugins.Registry(found)


sockets_1, sockets_32, sockets_64, sockets_128 = (_Plugin(HostDevice, w) for w in WIDTHS)
devices_1, devices_32, devices_64, devices_128 = (_Plugin(MeetingHost, w) for w in WIDTHS)
