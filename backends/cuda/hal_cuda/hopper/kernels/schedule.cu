// Cuts the steps of a batch into parts of equal cost, on the device: the lengths never visit the host.
#include "problem.h"

constexpr int kThreads = 1024;

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
    __threadfence_block();
    __syncthreads();

    const long long share = (total + parts - 1) / parts;
    for (int part = thread; part <= parts; part += kThreads) {
        const long long target = part * share;
        Bound bound{batch, 0};
        if (target < total) {
            int low = 0, high = batch;  // the last sequence whose cost begins at or before the target
            while (high - low > 1) {
                const int middle = (low + high) / 2;
                if (costs[middle] <= target) low = middle; else high = middle;
            }
            const int steps = static_cast<int>(costs[low + 1] - costs[low]) - kOverheadSteps;
            // Even, since a block takes steps in pairs; and no sliver that costs more to merge than to compute.
            int step = max(static_cast<int>(target - costs[low]) - kOverheadSteps, 0) & ~1;
            if (step < kOverheadSteps) step = 0;
            bound = steps - step < kOverheadSteps && step > 0 ? Bound{low + 1, 0} : Bound{low, step};
        }
        bounds[part] = bound;
    }
}
