// Cuts the steps of a batch into parts of about equal cost, on the device: the lengths never visit the host.
//
// A part takes whole sequences as long as they fit into its share, and of the next as much as still fits. The share is
// an equal one and what a cut costs: so sequences that would be cut to win less than that stay whole, and need no
// merging. It grows where what was rounded off before would be too much for the parts that are left.
#include "problem.h"

constexpr int kThreads = 1024;
constexpr int kNear = 4096;  // batches below have their costs at hand in shared memory

// The last sequence in [low, batch] that begins at or before `cost`, by a whole warp; costs[low] <= cost. The next few
// are looked at one by one, for that is how far a part mostly reaches.
__device__ __forceinline__ int last_at(const long long* costs, int low, int batch, long long cost) {
    const int lane = threadIdx.x;
    int high = batch + 1;
    for (int width = 1; high - low > 1; width = (high - low + 32) / 33) {
        // Probes cut the range; costs rise, so those that pass come first.
        const int probe = low + (lane + 1) * width;
        const int count = __popc(__ballot_sync(~0u, probe < high && costs[probe] <= cost));
        if (count < 32) high = min(high, low + (count + 1) * width);
        low += count * width;
    }
    return low;
}

// How many of `steps` more steps a part takes that has room for `room` of cost; `idle` while it has nothing yet.
__device__ __forceinline__ int share_of(int steps, long long room, bool idle) {
    int take = static_cast<int>(max(room - kOverheadSteps, 0ll)) & ~1;  // even: a block takes steps in pairs
    if (idle) {
        take = max(take, 2);
    } else if (take < kOverheadSteps) {
        return 0;
    }
    // No sliver is left that costs more to merge than to compute.
    return steps - take < min(kOverheadSteps, take) ? steps : take;
}

// By one warp; costs[i] = cost of the sequences before i.
__device__ __forceinline__ void cut(const long long* costs, int batch, int parts, Bound* bounds) {
    const long long total = costs[batch];
    Bound next{0, 0};  // where the next part begins
    long long share = 0;
    for (int part = 0; part < parts; ++part) {
        if (threadIdx.x == 0) bounds[part] = next;
        if (next.sequence == batch) continue;
        const long long done = costs[next.sequence] + next.step;
        const int left = parts - part;
        if ((share - kOverheadSteps) * left < total - done) share = (total - done + left - 1) / left + kOverheadSteps;
        const int end = last_at(costs, next.sequence, batch, done + share);
        const bool idle = end == next.sequence;
        if (!idle) next = Bound{end, 0};
        if (end == batch) continue;
        const long long begin = costs[end];
        const int steps = static_cast<int>(costs[end + 1] - begin) - kOverheadSteps - next.step;
        const int take = share_of(steps, idle ? share : done + share - begin, idle);
        next = take == steps ? Bound{end + 1, 0} : Bound{end, next.step + take};
    }
    if (threadIdx.x == 0) bounds[parts] = Bound{batch, 0};
}

// costs[i] = cost of the sequences before i; costs[batch] = the whole. One block.
extern "C" __global__ void __launch_bounds__(kThreads)
schedule(const int* cache_seqlens, int batch, int most_tokens, int parts, long long* costs, Bound* bounds) {
    __shared__ long long sums[kThreads];
    __shared__ long long carry;
    __shared__ long long copied[kNear];
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
    const bool near = batch < kNear;
    if (near)
        for (int i = thread; i <= batch; i += kThreads) copied[i] = costs[i];
    __syncthreads();
    if (thread < 32) cut(near ? copied : costs, batch, parts, bounds);
}
