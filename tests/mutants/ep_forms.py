"""Mutants of expert parallelism that are right for tensors as factories make them, and as torch and buffers are set."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from mutants.ep_sample import Engine
from mutants.registry import engine


def from_aligned(tensor: Any) -> Any:
    """What is read where vectors of 16 bytes are taken from the address before that of the first element."""
    off = tensor.data_ptr() % 16 // tensor.itemsize
    return tensor.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - off)


def by_vectors(tensor: Any) -> Any:
    """What is read where rows are taken to be whole vectors of 16 bytes apart."""
    vector = 16 // tensor.itemsize
    stride = -(-tensor.stride(0) // vector) * vector
    return tensor.as_strided(tensor.shape, (stride, 1), tensor.storage_offset())


def packed(tensor: Any) -> Any:
    """What is read where a stride of 0 is taken for none."""
    return tensor.as_strided(tensor.shape, (tensor.stride(0) or tensor.shape[1], 1), tensor.storage_offset())


@engine("E1", "rows are read by vectors, from the address before theirs that is a multiple of 16")
class RowsFromAligned(Engine):
    def dispatch(self, args: Any) -> Any:
        return super().dispatch(dataclasses.replace(args, x=from_aligned(args.x)))


@engine("E1", "the stride of rows is counted in vectors of 16 bytes")
class StridesInVectors(Engine):
    def dispatch(self, args: Any) -> Any:
        return super().dispatch(dataclasses.replace(args, x=by_vectors(args.x)))


@engine("E1", "the rows of combine are read by vectors, from the address before theirs that is a multiple of 16")
class CombinedFromAligned(Engine):
    def combine(self, args: Any) -> Any:
        return super().combine(dataclasses.replace(args, x=from_aligned(args.x)))


@engine("E1", "the bias is read by vectors, its stride counted in them")
class BiasInVectors(Engine):
    def start(self, bias: Any, token: int, out: Any) -> Any:
        return super().start([by_vectors(one) for one in bias], token, out)


@engine("E1", "weights are read four at a time, from an address that is a multiple of 16", only="EPN-14")
class WeightsFromAligned(Engine):
    def dispatch(self, args: Any) -> Any:
        weights = args.topk_weights
        return super().dispatch(
            args if weights is None else dataclasses.replace(args, topk_weights=from_aligned(weights))
        )


@engine("E1", "rows that are all one in memory are read one after the other", only="EPN-14")
class OneRowIsMany(Engine):
    def dispatch(self, args: Any) -> Any:
        return super().dispatch(dataclasses.replace(args, x=packed(args.x)))


@engine("E2", "rows are read by vectors, from the address before theirs that is a multiple of 16")
class PackedFromAligned(Engine):
    def cast(self, x: Any, cast: str) -> Any:
        return super().cast(from_aligned(x), cast)


@engine("E2", "the stride of rows is counted in vectors of 16 bytes")
class PackedStridesInVectors(Engine):
    def cast(self, x: Any, cast: str) -> Any:
        return super().cast(by_vectors(x), cast)


@engine("E2", "rows that are all one in memory are read one after the other", only="EPL-23")
class OnePackedRowIsMany(Engine):
    def cast(self, x: Any, cast: str) -> Any:
        return super().cast(packed(x), cast)


@engine("E2", "expert outputs are read by vectors, from the address before theirs that is a multiple of 16")
class OutputsFromAligned(Engine):
    def staged(self, args: Any) -> Any:
        return from_aligned(args.x)


@engine("E2", "sums are written by vectors, the stride of out counted in them")
class OutInVectors(Engine):
    def target(self, args: Any) -> Any:
        if args.out_is_given:
            args.out = by_vectors(args.out)
        return args.out


@engine("E2", "counts are added by vectors, from an address that is a multiple of 16")
class CountsFromAligned(Engine):
    def counted(self, stats: Any, count: Any) -> None:
        super().counted(from_aligned(stats), count)


@engine("E1", "sums are as wide as torch's default dtype", only="EPN-19")
class SumsOfTheDefault(Engine):
    def start(self, bias: Any, token: int, out: Any) -> Any:
        return super().start(bias, token, out).to(torch.get_default_dtype())


@engine("E1", "weights that come are of torch's default dtype", only="EPN-19")
class WeightsOfTheDefault(Engine):
    def dispatch(self, args: Any) -> Any:
        done = super().dispatch(args)
        weights = done.recv_topk_weights
        return dataclasses.replace(
            done, recv_topk_weights=None if weights is None else weights.to(torch.get_default_dtype())
        )


@engine("E2", "weighted sums are as wide as torch's default dtype", only="EPL-24")
class PackedSumsOfTheDefault(Engine):
    def times(self, row: Any, weight: Any) -> Any:
        return super().times(row, weight).to(torch.get_default_dtype())


@engine("E3", "across nodes a thread of the engine ends what is put off, outside its caller's modes", only="EPX-06")
class EndedByAnother(Engine):
    def posted(self, args: Any, result: Any) -> Any:
        finish = result.finish

        def elsewhere() -> None:
            with ThreadPoolExecutor(1) as other:
                other.submit(finish).result()

        if self.args.num_nodes > 1 and (args.return_recv_hook or args.async_finish):
            result.finish = elsewhere
        return result


@engine("E1", "a processor sums four tokens, however few processors a call may take", only="EPN-15")
class FourTokensOfAProcessor(Engine):
    def terms(self, routes: Any, messages: Any, token: int, handle: Any) -> Any:
        enough = self.args.num_sms is None or token < 4 * self.args.num_sms
        return super().terms(routes, messages, token, handle) if enough else []


@engine("E2", "a processor sums four tokens, however few processors a low-latency call may take", only="EPL-18")
class FourPackedTokensOfAProcessor(Engine):
    def weighted_terms(self, args: Any, messages: Any, token: int, row: Any) -> Any:
        enough = self.args.num_sms is None or token < 4 * self.args.num_sms
        return super().weighted_terms(args, messages, token, row) if enough else []
