// Joins the partial results of sequences that several parts shared, and answers for empty ones.
#include "problem.h"

constexpr int kWarps = 4;
constexpr int kColumns = kHeadDimV / 32;  // a lane's columns

__device__ __forceinline__ bool before(Bound bound, int sequence, int step) {
    return bound.sequence < sequence || (bound.sequence == sequence && bound.step <= step);
}

// The last part that begins at or before this step.
__device__ __forceinline__ int part_of(const Problem& problem, int sequence, int step) {
    int low = 0, high = problem.parts;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (before(problem.bounds[middle], sequence, step)) low = middle; else high = middle;
    }
    return low;
}

// One row of the parts [first, last], by one warp; a lane has 16 columns in runs of four.
__device__ __forceinline__ void merge_row(
    const Problem& problem, int sequence, int kv_head, int row, int group, int first, int last) {
    const int lane = threadIdx.x % 32;
    const int row_block = row / kRows;
    const auto lse_of = [&](int part) {
        const int slot = problem.bounds[part].sequence == sequence ? 0 : 1;
        return problem.partial_lse[partial_row(problem, part, slot, kv_head, row_block) + row % kRows];
    };
    const auto empty = [&](int part) {  // parts between two equal bounds
        const Bound from = problem.bounds[part], to = problem.bounds[part + 1];
        return from.sequence == to.sequence && from.step == to.step;
    };
    float most = -HAL_INFINITY;
    for (int part = first + lane; part <= last; part += 32)
        if (!empty(part)) most = fmaxf(most, lse_of(part));
    for (int distance = 16; distance > 0; distance /= 2)
        most = fmaxf(most, __shfl_xor_sync(~0u, most, distance));

    float sums[kColumns] = {};
    float weights = 0.0f;
    if (most != -HAL_INFINITY) {
        for (int part = first; part <= last; ++part) {
            if (empty(part)) continue;
            const float weight = ptx::exp2(lse_of(part) - most);
            if (weight == 0.0f) continue;  // a partial row with nothing attended holds nothing to read
            weights += weight;
            const int slot = problem.bounds[part].sequence == sequence ? 0 : 1;
            const float* from =
                problem.partial_out + (partial_row(problem, part, slot, kv_head, row_block) + row % kRows) * kHeadDimV;
#pragma unroll
            for (int i = 0; i < kColumns; i += 4) {
                const float4 value = *reinterpret_cast<const float4*>(from + i * 32 + lane * 4);
                sums[i] += weight * value.x;
                sums[i + 1] += weight * value.y;
                sums[i + 2] += weight * value.z;
                sums[i + 3] += weight * value.w;
            }
        }
    }
    const float factor = weights > 0.0f ? 1.0f / weights : 0.0f;
    const int position = row / group, head = kv_head * group + row % group;
    u16* out = problem.out + sequence * problem.out_batch + position * problem.out_position + head * problem.out_head;
#pragma unroll
    for (int i = 0; i < kColumns; i += 4) {
        // Two values at a time, and halves where out is not aligned to eight bytes: any stride is legal.
        const u32 low = ptx::pack(sums[i] * factor, sums[i + 1] * factor);
        const u32 high = ptx::pack(sums[i + 2] * factor, sums[i + 3] * factor);
        u16* target = out + i * 32 + lane * 4;
        if (reinterpret_cast<u64>(target) % 8 == 0) {
            *reinterpret_cast<uint2*>(target) = make_uint2(low, high);
        } else {
            target[0] = u16(low), target[1] = u16(low >> 16), target[2] = u16(high), target[3] = u16(high >> 16);
        }
    }
    if (lane == 0) {
        const float lse = most == -HAL_INFINITY ? HAL_INFINITY : (most + ptx::log2(weights)) * problem.lse_factor;
        problem.lse[(static_cast<long long>(sequence) * problem.h_q + head) * problem.s_q + position] = lse;
    }
}

// Grid: (any, h_kv, b); the warps of a block's column share the rows.
extern "C" __global__ void __launch_bounds__(kWarps * 32) merge(const __grid_constant__ Problem problem) {
    const int kv_head = blockIdx.y;
    const int sequence = blockIdx.z;
    const int group = problem.h_q / problem.h_kv;
    ptx::wait_for_previous();

    const int steps = steps_of(length_of(problem, sequence));
    int first = 0, last = -1;
    if (steps > 0) {
        first = part_of(problem, sequence, 0);
        last = part_of(problem, sequence, steps - 1);
        if (first == last) return;  // one part had it all and has written it
    }
    for (int row = blockIdx.x * kWarps + threadIdx.x / 32; row < problem.s_q * group; row += gridDim.x * kWarps)
        merge_row(problem, sequence, kv_head, row, group, first, last);
}
