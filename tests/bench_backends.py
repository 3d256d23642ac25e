"""Backends and peers for the tests of the bench: right, wrong, wrong only later, and unable."""

from __future__ import annotations

import dataclasses

import torch

from hal.backend import Backend, Probe
from hal.bench.peers import Peer, Prepared, Presence
from hal.plugins import hookimpl
from hal.reference import mla
from hal.spec import SPEC_VERSION
from hal.spec.capability import Capabilities, Ints, MlaCapabilities, only

DENSE = MlaCapabilities(
    dtypes=("bfloat16",),
    kv_formats=("plain",),
    head_dim=only(576),
    head_dim_v=only(512),
    h_q=Ints(1, 128),
    h_kv=only(1),
    s_q=Ints(1, 4),
    page_size=Ints(1, 256),
    causal=True,
    ragged_q=False,
    batch_invariant=False,
    lse_bases=("e",),
    attn_sink=False,
    extra_kv_cache=False,
    topk=None,
)


class Planted(Backend):
    """The reference, spoilt from the n-th call on: one row of one head is zero."""

    spec_version = SPEC_VERSION
    priority = 0

    def __init__(self, spoilt_from=None):
        self.spoilt_from = spoilt_from
        self.calls = 0

    def probe(self):
        return Probe(True, "a planted backend")

    def capabilities(self):
        return Capabilities(("cpu",), DENSE, None, None)

    def mla_plan(self, args):
        return None

    def mla_decode(self, args):
        out, lse = mla.mla_decode(args.q, args.kv_cache, args.block_table, args.cache_seqlens, causal=args.causal)
        args.out.copy_(out)
        args.lse.copy_(lse)
        self.calls += 1
        if self.spoilt_from is not None and self.calls >= self.spoilt_from:
            args.out[-1, -1, -1] = 0

    def ep_buffer(self, args):
        raise NotImplementedError

    def launches(self):
        return {}


class Plugin:
    def __init__(self, *arguments):
        self._arguments = arguments

    @hookimpl
    def hal_backend(self):
        return Planted(*self._arguments)


right = Plugin()
wrong = Plugin(1)
fading = Plugin(2)


class PlantedPeer(Peer):
    summary = "a planted peer"
    install = "pip install planted"
    lacks = ("lse",)

    def __init__(self, name, *, here=True, reason="", spoil=None):
        self.name = name  # type: ignore[misc]
        self._here, self._reason, self._spoil = here, reason, spoil

    def presence(self):
        return Presence(self._here, "planted 1.0" if self._here else "planted is not installed")

    def cannot(self, case):
        return self._reason

    def prepare(self, data, threads):
        return PlantedCall(data, self._spoil)


@dataclasses.dataclass
class PlantedCall(Prepared):
    data: object
    spoil: object
    out: torch.Tensor | None = None

    def call(self, layer):
        if self.spoil == "raises":
            raise RuntimeError("planted failure\nsecond line")
        if self.spoil == "does nothing":
            return
        out, _ = self.data.expected(0)
        self.out = out.bfloat16()
        if self.spoil == "one row":
            self.out[0, 0, 0] *= 1.1

    def result(self):
        return self.out, None

    def poison(self):
        self.out = torch.full_like(self.data.expected(0)[0], torch.nan)
