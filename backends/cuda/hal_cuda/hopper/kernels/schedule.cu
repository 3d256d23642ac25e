// Cuts the steps of a batch into parts of about equal cost, on the device: the lengths never visit the host.
//
// A part takes whole sequences as long as they fit into its share, and of the next as much as still fits. The share is
// an equal one and what a cut costs: so sequences that would be cut to win less than that stay whole, and need no
// merging. It grows where what was rounded off before would be too much for the parts that are left.
#include "problem.h"

constexpr int kThreads = 1024;
constexpr int kNear = 8192;           // batches below have their costs at hand in shared memory,
constexpr int kSmall = 1 << 30;       // if all of them together are less

// How many of `steps` more steps a part takes that has room for `room` of cost; `idle` while it has nothing yet.
template <typename Cost>
__device__ __forceinline__ int share_of(int steps, Cost room, bool idle) {
    int take = static_cast<int>(max(room - kOverheadSteps, Cost(0))) & ~1;  // even: a block takes steps in pairs
    if (idle) {
        take = max(take, 2);
    } else if (take < kOverheadSteps) {
        return 0;
    }
    // No sliver is left that costs more to merge than to compute.
    return steps - take < min(kOverheadSteps, take) ? steps : take;
}

// By one warp; costs[i] = cost of the sequences before i.
template <typename Cost>
__device__ __forceinline__ void cut(const Cost* costs, int batch, int parts, Bound* bounds) {
    const int lane = threadIdx.x;
    const Cost total = costs[batch];
    Bound next{0, 0};  // where the next part begins,
    Cost begin = 0;    // and what that sequence begins at
    Cost share = 0;
    for (int part = 0; part < parts; ++part) {
        if (lane == 0) bounds[part] = next;
        if (next.sequence == batch) continue;
        const Cost rest = total - begin - next.step;
        const int left = parts - part;
        if ((share - kOverheadSteps) * left < rest) share = (rest + left - 1) / left + kOverheadSteps;
        const Cost reach = begin + next.step + share;

        // Whole sequences, 32 at a time: those that fit come first.
        int end = next.sequence, count;
        Cost at = begin, there;
        do {
            const int probe = end + 1 + lane;
            there = probe <= batch ? costs[probe] : reach + 1;
            count = __popc(__ballot_sync(~0u, there <= reach));
            if (count > 0) at = __shfl_sync(~0u, there, count - 1);
            end += count;
        } while (count == 32);
        const bool idle = end == next.sequence;
        if (!idle) next = Bound{end, 0}, begin = at;
        if (end == batch) continue;

        const Cost after = __shfl_sync(~0u, there, count);
        const int steps = static_cast<int>(after - begin) - kOverheadSteps - next.step;
        const int take = share_of(steps, idle ? share : reach - begin, idle);
        if (take == steps) begin = after;
        next = take == steps ? Bound{end + 1, 0} : Bound{end, next.step + take};
    }
    if (lane == 0) bounds[parts] = Bound{batch, 0};
}

// costs[i] = cost of the sequences before i; costs[batch] = the whole. One block.
extern "C" __global__ void __launch_bounds__(kThreads)
schedule(const int* cache_seqlens, int batch, int most_tokens, int parts, long long* costs, Bound* bounds) {
    __shared__ long long sums[kThreads];
    __shared__ long long carry;
    const int thread = threadIdx.x;
    ptx::wait_for_previous();
    if (thread == 0) carry = 0;
    for (int first = 0; first < batch; first += kThreads) {
        const int sequence = first + thread;
        long long cost = 0;
        if (sequence < batch) {
            const int steps = steps_of(min(max(cache_seqlens[sequence], 0), most_tokens));
            cost = steps > 0 ? steps + kOverheadSteps : 0;
        }
        sums[thread] = cost;
        __syncthreads();
        for (int distance = 1; distance < kThreads; distance *= 2) {
            const long long before = thread >= distance ? sums[thread - distance] : 0;
            __syncthreads();
            sums[thread] += before;
            __syncthreads();
        }
        if (sequence < batch) costs[sequence] = carry + sums[thread] - cost;
        __syncthreads();
        if (thread == 0) carry += sums[kThreads - 1];
        __syncthreads();
    }
    const long long total = carry;
    if (thread == 0) costs[batch] = total;
    __syncthreads();
    __shared__ int copied[kNear];
    const bool near = batch < kNear && total < kSmall;
    if (near)
        for (int i = thread; i <= batch; i += kThreads) copied[i] = static_cast<int>(costs[i]);
    __syncthreads();
    if (thread >= 32) return;
    if (near) cut(copied, batch, parts, bounds);
    else cut(costs, batch, parts, bounds);
}
