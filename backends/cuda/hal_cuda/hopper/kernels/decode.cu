// Dense MLA decode for compute capability 9.0a: 64 query rows against pages of 576-wide keys whose first 512 columns are
// the values.
//
// One block has two warpgroups that compute and one warp that loads. Keys come in steps of 64 tokens, two steps at a
// time, in two buffers of nine swizzled tiles of 64 columns. The float32 output, 64 × 512, is half of a multiprocessor's
// registers, so each warpgroup keeps one half of its columns, and each computes the scores of one of the two steps:
//
//   warpgroup 0                                warpgroup 1
//   S0 = q·K0ᵀ, m0, P0                         S1 = q·K1ᵀ
//                        -- m0, P0 -->
//   O[left] += P0·V0[left]                     O[right] += P0·V0[right], meanwhile m1, P1
//                        <-- m1, P1 --
//   O[left] += P1·V1[left]                     O[right] += P1·V1[right]
//
// so that the tensor cores have one warpgroup's products while the other computes exponentials, and the first buffer is
// free, and being filled again, while the second is still in use. P travels through the last tile of its own keys: those
// 64 columns are no part of V, and done with once the scores are. Each half of a buffer is loaded anew as soon as its
// last reader is done, and scores start on the half that was freed first. Warpgroups tell each other of P by mbarriers
// rather than named barriers: racecheck follows those.
#include "problem.h"

constexpr int kWarpgroup = 128;
constexpr int kComputing = 2 * kWarpgroup;
constexpr int kThreads = kComputing + kWarpgroup;
constexpr int kTileBytes = kTokens * kTileColumns * 2;
constexpr int kBufferBytes = kTiles * kTileBytes;
constexpr int kHalf = kTilesV / 2;

// The pieces in which keys are loaded: two halves of V, and the tile of K that is no part of V.
constexpr int kLeft = 0, kRight = 1, kRope = 2, kPieces = 3;
constexpr int kRopeTile = kTiles - 1;

struct Shared {
    unsigned char q[kBufferBytes];
    unsigned char kv[2][kBufferBytes];
    float most0[kRows], most1[kRows];    // running row maxima after step 0 and step 1 of a pair
    float scale0[kRows], scale1[kRows];  // what each does to sums so far
    float sums[2][kRows], weights[2][kRows];
    u64 full[2][kPieces];
    u64 empty[2][2];  // a buffer's left half; its right half
    u64 ready[2];     // P of a buffer, and what its step does to maxima
};
static_assert(sizeof(Shared) == HAL_SHARED_BYTES, "the host reserves what a block uses");

constexpr float kSlack = 8.0f;  // in powers of two; 2^8 times a probability still fits fp16

// Named barriers; 0 is __syncthreads.
constexpr int kAll = 1, kOwn = 2;

// Address of 16-byte chunk `chunk` of row `row` in a tile of 128-byte rows, swizzled as the copy engine does it.
__device__ __forceinline__ u32 chunk_address(u32 tile, int row, int chunk) {
    return tile + row * 128 + ((chunk ^ (row & 7)) << 4);
}

struct Item {
    int sequence, begin, end, slot;
    bool whole;  // nobody else works on this sequence
};

// Sequence `sequence` as far as this part has it.
__device__ __forceinline__ Item item_of(const Problem& problem, Bound from, Bound to, int sequence, int steps) {
    Item item;
    item.sequence = sequence;
    item.begin = sequence == from.sequence ? from.step : 0;
    item.end = sequence == to.sequence ? min(to.step, steps) : steps;
    item.slot = sequence == from.sequence ? 0 : 1;
    item.whole = item.begin == 0 && item.end == steps;
    return item;
}

// ---- the loading warp ------------------------------------------------------------------------------------------------

// Where a step's keys are.
struct Place {
    int token, row, block;
};

template <bool kWhole>  // a step lies in one page
struct Loader {
    const Problem& problem;
    const TensorMap *half_map, *tile_map;
    u32 kv, full, empty;  // shared addresses
    int kv_head;
    u64 policy;
    u32 rounds[2] = {0, 0};  // how often each buffer was filled
    const int* table = nullptr;

    // One piece of one step: its tiles lie side by side, and so one box can hold them all.
    template <int kPiece>
    __device__ __forceinline__ void load(int buffer, const Place& place) const {
        constexpr int first = kPiece * kHalf, count = kPiece == kRope ? 1 : kHalf;
        const u32 barrier = full + (buffer * kPieces + kPiece) * 8;
        const u32 target = kv + buffer * kBufferBytes + first * kTileBytes;
        ptx::expect_elected(barrier, count * kTileBytes);
        if constexpr (kWhole) {
            ptx::load_box(target, kPiece == kRope ? tile_map : half_map, barrier, place.row, first, kv_head, place.block, policy);
        } else {
            for (int tile = 0; tile < count; ++tile)
                for (int row = 0; row < kTokens; row += problem.page_size) {
                    const int block = block_of(place.token + row);
                    ptx::load_box(
                        target + tile * kTileBytes + row * 128, tile_map, barrier, 0, first + tile, kv_head, block, policy);
                }
        }
    }

    // A table entry out of range, or a token past the table, becomes a coordinate outside the cache: it reads as zero.
    __device__ __forceinline__ int block_of(int token) const {
        const int page = token / problem.page_size;
        return page < problem.max_blocks ? table[page] : -1;
    }

    __device__ __forceinline__ Place place_of(int step) const {
        const int token = step * kTokens;
        return {token, token % problem.page_size, block_of(token)};
    }

    __device__ __forceinline__ void await(int buffer, int half) const {
        // The first filling waits for the phase before the first, which counts as complete.
        ptx::barrier_wait(empty + (buffer * 2 + half) * 8, (rounds[buffer] & 1) ^ 1);
    }

    __device__ __forceinline__ void run(const Item& item) {
        table = problem.block_table + item.sequence * problem.table_batch;
        Place even = place_of(item.begin), odd = place_of(item.begin + 1);
        for (int step = item.begin; step < item.end; step += 2) {
            const bool second = step + 1 < item.end;
            // In the order in which the halves come free.
            await(0, kLeft);
            load<kLeft>(0, even);
            await(0, kRight);
            load<kRight>(0, even);
            load<kRope>(0, even);
            const Place next_even = place_of(step + 2), next_odd = place_of(step + 3);  // while the halves are in use
            if (second) {
                await(1, kRight);
                load<kRight>(1, odd);
                await(1, kLeft);
                load<kLeft>(1, odd);
                load<kRope>(1, odd);
                ++rounds[1];
            }
            ++rounds[0];
            even = next_even, odd = next_odd;
        }
    }
};

// ---- the computing warpgroups ------------------------------------------------------------------------------------------

template <int kGroup>  // 0: the even steps and the left half of out; 1: the odd steps and the right half
struct Computer {
    const Problem& problem;
    Shared& shared;
    u32 q, kv, full, empty;  // shared addresses
    int kv_head, row_block;
    int row;      // of this thread's first row; its second is eight further
    int column;   // of its first two columns in eight
    float o[128];
    float sum[2];     // of the exponentials, for lse
    float weight[2];  // of the same, rounded, for out
    float most[2];
    int limit[2];  // keys each of its rows may see
    u32 rounds[2];

    __device__ __forceinline__ int thread() const { return threadIdx.x % kWarpgroup; }
    __device__ __forceinline__ u32 tile(int buffer, int index) const {
        return kv + buffer * kBufferBytes + index * kTileBytes;
    }
    __device__ __forceinline__ u32 ready(int buffer) const { return empty + (4 + buffer) * 8; }
    __device__ __forceinline__ void await(int buffer, int piece) const {
        ptx::barrier_wait(full + (buffer * kPieces + piece) * 8, rounds[buffer] & 1);
    }
    __device__ __forceinline__ void release(int buffer, int half) const {
        if (threadIdx.x % 32 == 0) ptx::barrier_arrive(empty + (buffer * 2 + half) * 8);
    }

    // s = q · Kᵀ, in the order in which the tiles arrive.
    __device__ __forceinline__ void scores(float (&s)[32]) const {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
            const int index = i == kRopeTile ? kRopeTile : (kGroup == 0 ? i : (i + kHalf) % kTilesV);
            if (index % kHalf == 0) await(kGroup, index / kHalf);
            ptx::product_fence();
            const u64 a = ptx::descriptor_k_major(q + index * kTileBytes);
            const u64 b = ptx::descriptor_k_major(tile(kGroup, index));
#pragma unroll
            for (int k = 0; k < kTileColumns / 16; ++k) ptx::product_64(s, a + k * 2, b + k * 2, i > 0 || k > 0);
        }
        ptx::product_commit();
        ptx::product_wait<0>();
        ptx::settle(s);
    }

    // Scales, masks what lies past each row's limit, and returns the maxima of this thread's two rows.
    __device__ __forceinline__ void mask(float (&s)[32], int step, int least_limit, float (&found)[2]) const {
        found[0] = found[1] = -HAL_INFINITY;
        const int first = step * kTokens;
        if (first + kTokens <= least_limit) {
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                s[i] *= problem.scale_log2;
                found[(i / 2) % 2] = fmaxf(found[(i / 2) % 2], s[i]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                const int key = first + (i / 4) * 8 + column + i % 2;
                s[i] = key < limit[(i / 2) % 2] ? s[i] * problem.scale_log2 : -HAL_INFINITY;
                found[(i / 2) % 2] = fmaxf(found[(i / 2) % 2], s[i]);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            found[r] = fmaxf(found[r], __shfl_xor_sync(~0u, found[r], 1));
            found[r] = fmaxf(found[r], __shfl_xor_sync(~0u, found[r], 2));
        }
    }

    // s becomes exp2(s - most); returns each row's sum over this thread's columns.
    __device__ __forceinline__ void exponentials(float (&s)[32], const float (&highest)[2], float (&total)[2]) const {
        // A row that has seen nothing subtracts 0 from -inf.
        const float base[2] = {highest[0] == -HAL_INFINITY ? 0.0f : highest[0], highest[1] == -HAL_INFINITY ? 0.0f : highest[1]};
        total[0] = total[1] = 0.0f;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            s[i] = ptx::exp2(s[i] - base[(i / 2) % 2]);
            total[(i / 2) % 2] += s[i];
        }
    }

    // The reference of a row's exponents moves only when a maximum passes it by kSlack: until then sums and products are
    // larger than they need be, which float32 does not mind, and the output need not be multiplied again.
    __device__ __forceinline__ static float move(float before, float found) {
        return found > before + kSlack ? found : before;
    }

    // How sums so far change when the reference moves.
    __device__ __forceinline__ static float rescale(float before, float after) {
        return after == before ? 1.0f : ptx::exp2(before - after);
    }

    // Rounds s to what is multiplied, and adds that up too: out is divided by the sum of its own weights, so that
    // rounding a large weight does not scale the row.
    __device__ __forceinline__ static void pack(const float (&s)[32], u32 (&p)[16], float (&rounded)[2]) {
        rounded[0] = rounded[1] = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            p[i] = ptx::pack(s[2 * i], s[2 * i + 1]);
            rounded[i % 2] += ptx::low_of(p[i]) + ptx::high_of(p[i]);
        }
    }

    // A 64 × 64 tile from registers in accumulator order into swizzled shared memory. Free of bank conflicts: the eight
    // rows that a store covers lie in eight different chunks.
    __device__ __forceinline__ void store_tile(u32 target, const u32 (&p)[16]) const {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const int r = row + (i % 2) * 8;
            ptx::store_shared(chunk_address(target, r, i / 2) + column * 2, p[i]);
        }
    }

    __device__ __forceinline__ void scale_out(float first, float second) {
        if (__any_sync(~0u, first != 1.0f || second != 1.0f)) {
#pragma unroll
            for (int i = 0; i < 128; ++i) o[i] *= (i / 2) % 2 ? second : first;
        }
    }

    // The values of tokens past the length may be anything, NaN too: 0 · NaN would reach out.
    __device__ __forceinline__ void clear_past(int buffer, int step, int length) const {
        const int valid = length - step * kTokens;
        if (valid >= kTokens) return;
        for (int i = thread(); i < (kTokens - valid) * kHalf * 8; i += kWarpgroup) {
            const int r = valid + i / (kHalf * 8), chunk = i % (kHalf * 8);
            ptx::store_shared_zero16(tile(buffer, kGroup * kHalf + chunk / 8) + r * 128 + (chunk % 8) * 16);
        }
        ptx::proxy_fence();
        ptx::named_sync<kOwn + kGroup, kWarpgroup>();
    }

    __device__ __forceinline__ u64 values(int buffer, int k) const {
        return ptx::descriptor_mn_major<kTileBytes>(tile(buffer, kGroup * kHalf)) + k * (16 * 128 >> 4);
    }

    // out += p · V of this warpgroup's half; p its own, in registers.
    __device__ __forceinline__ void accumulate(const u32 (&p)[16], int buffer) {
        ptx::settle(o);
        ptx::product_fence();
#pragma unroll
        for (int k = 0; k < kTokens / 16; ++k) ptx::product_256(o, p + 4 * k, values(buffer, k));
        ptx::product_commit();
    }

    // The same with the other warpgroup's p, in the rope tile of its keys.
    __device__ __forceinline__ void accumulate(int buffer) {
        const u64 p = ptx::descriptor_k_major(tile(buffer, kRopeTile));
        ptx::settle(o);
        ptx::product_fence();
#pragma unroll
        for (int k = 0; k < kTokens / 16; ++k) ptx::product_256(o, p + k * 2, values(buffer, k));
        ptx::product_commit();
    }

    __device__ __forceinline__ void pair(const Item& item, int step, int length, int least_limit) {
        const bool second = step + 1 < item.end;
        float s[32], found[2], total[2], rounded[2], scale0[2], scale1[2];
        u32 p[16];
        if constexpr (kGroup == 0) {
            scores(s);
            mask(s, step, least_limit, found);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float before = most[r];
                most[r] = move(before, found[r]);
                scale0[r] = rescale(before, most[r]);
                if (column == 0) {
                    shared.most0[row + r * 8] = most[r];
                    shared.scale0[row + r * 8] = scale0[r];
                }
            }
            exponentials(s, most, total);
            pack(s, p, rounded);
            scale_out(scale0[0], scale0[1]);
            clear_past(0, step, length);
            accumulate(p, 0);
            store_tile(tile(0, kRopeTile), p);
            ptx::proxy_fence();
            ptx::barrier_arrive(ready(0));
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                sum[r] = sum[r] * scale0[r] + total[r];
                weight[r] = weight[r] * scale0[r] + rounded[r];
            }
            ptx::product_wait<0>();
            ptx::settle(o);
            release(0, kLeft);
            if (second) {
                ptx::barrier_wait(ready(1), rounds[1] & 1);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    scale1[r] = shared.scale1[row + r * 8];
                    most[r] = shared.most1[row + r * 8];
                    sum[r] *= scale1[r];
                    weight[r] *= scale1[r];
                }
                scale_out(scale1[0], scale1[1]);
                await(1, kLeft);
                clear_past(1, step + 1, length);
                accumulate(1);
                ptx::product_wait<0>();
                ptx::settle(o);
                release(1, kLeft);
            }
        } else {
            if (second) {
                scores(s);
                mask(s, step + 1, least_limit, found);
            }
            ptx::barrier_wait(ready(0), rounds[0] & 1);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float most0 = shared.most0[row + r * 8];
                scale0[r] = shared.scale0[row + r * 8];
                most[r] = second ? move(most0, found[r]) : most0;
                scale1[r] = rescale(most0, most[r]);
                if (second && column == 0) {
                    shared.most1[row + r * 8] = most[r];
                    shared.scale1[row + r * 8] = scale1[r];
                }
                sum[r] *= scale0[r];
                weight[r] *= scale0[r];
            }
            scale_out(scale0[0], scale0[1]);
            await(0, kRight);
            clear_past(0, step, length);
            accumulate(0);
            if (second) {
                exponentials(s, most, total);
                pack(s, p, rounded);
                store_tile(tile(1, kRopeTile), p);
                ptx::proxy_fence();
                ptx::barrier_arrive(ready(1));
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    sum[r] = sum[r] * scale1[r] + total[r];
                    weight[r] = weight[r] * scale1[r] + rounded[r];
                }
            }
            ptx::product_wait<0>();
            ptx::settle(o);
            release(0, kRight);
            if (second) {
                scale_out(scale1[0], scale1[1]);
                clear_past(1, step + 1, length);
                accumulate(p, 1);
                ptx::product_wait<0>();
                ptx::settle(o);
                release(1, kRight);
            }
        }
        ++rounds[0];
        if (second) ++rounds[1];
    }

    __device__ __forceinline__ void load_q(const Item& item, int group, int rows) const {
        for (int i = threadIdx.x; i < kRows * kTiles * 8; i += kComputing) {
            const int r = i / (kTiles * 8), chunk = i % (kTiles * 8);
            const int index = row_block * kRows + r;
            const bool valid = index < rows;
            const long long offset = valid ? item.sequence * problem.q_batch + (index / group) * problem.q_position +
                                                 (kv_head * group + index % group) * problem.q_head + chunk * 8
                                           : 0;
            ptx::copy16(chunk_address(q + (chunk / 8) * kTileBytes, r, chunk % 8), problem.q + offset, valid);
        }
        ptx::copy16_wait();
        ptx::proxy_fence();
        ptx::named_sync<kAll, kComputing>();
    }

    __device__ __forceinline__ void run(const Item& item, int length, int part) {
        const int group = problem.h_q / problem.h_kv;
        const int rows = problem.s_q * group;
        load_q(item, group, rows);
#pragma unroll
        for (int i = 0; i < 128; ++i) o[i] = 0.0f;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            sum[r] = weight[r] = 0.0f;
            most[r] = -HAL_INFINITY;
            const int position = min(row_block * kRows + row + r * 8, rows - 1) / group;
            limit[r] = problem.causal ? length - problem.s_q + position + 1 : length;
        }
        const int least_limit = problem.causal ? length - problem.s_q + row_block * kRows / group + 1 : length;
        for (int step = item.begin; step < item.end; step += 2) pair(item, step, length, least_limit);
        finish(item, group, rows, part);
    }

    // Divides by the sums, and stores: to out where the sequence is whole, else to the part's slot.
    __device__ __forceinline__ void finish(const Item& item, int group, int rows, int part) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
            sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
            weight[r] += __shfl_xor_sync(~0u, weight[r], 1);
            weight[r] += __shfl_xor_sync(~0u, weight[r], 2);
            if (column == 0) {
                shared.sums[kGroup][row + r * 8] = sum[r];
                shared.weights[kGroup][row + r * 8] = weight[r];
            }
        }
        ptx::named_sync<kAll, kComputing>();
        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            sum[r] = shared.sums[0][row + r * 8] + shared.sums[1][row + r * 8];
            weight[r] = shared.weights[0][row + r * 8] + shared.weights[1][row + r * 8];
            factor[r] = weight[r] > 0.0f ? 1.0f / weight[r] : 0.0f;
        }
        if (item.whole) {
            store_out(item, group, rows, factor);
        } else {
            store_partial(item, rows, part, factor);
        }
        if (kGroup == 0 && column == 0) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int index = row_block * kRows + row + r * 8;
                const float lse = sum[r] > 0.0f ? most[r] + ptx::log2(sum[r]) : -HAL_INFINITY;
                if (!item.whole) {
                    problem.partial_lse[partial_row(problem, part, item.slot, kv_head, row_block) + row + r * 8] = lse;
                } else if (index < rows) {
                    const int head = kv_head * group + index % group;
                    problem.lse[(static_cast<long long>(item.sequence) * problem.h_q + head) * problem.s_q + index / group] =
                        sum[r] > 0.0f ? lse * problem.lse_factor : HAL_INFINITY;
                }
            }
        }
        ptx::named_sync<kAll, kComputing>();  // q's memory and the sums are free again
    }

    // Through the memory of q, so that rows leave in runs of 16 bytes.
    __device__ __forceinline__ void store_out(const Item& item, int group, int rows, const float (&factor)[2]) const {
        const u32 stage = q + kGroup * kHalf * kTileBytes;
#pragma unroll
        for (int t = 0; t < kHalf; ++t) {
            u32 packed[16];
#pragma unroll
            for (int i = 0; i < 16; ++i)
                packed[i] = ptx::pack(o[t * 32 + 2 * i] * factor[i % 2], o[t * 32 + 2 * i + 1] * factor[i % 2]);
            store_tile(stage + t * kTileBytes, packed);
        }
        ptx::named_sync<kOwn + kGroup, kWarpgroup>();
        for (int i = thread(); i < kRows * kHalf * 8; i += kWarpgroup) {
            const int r = i / (kHalf * 8), chunk = i % (kHalf * 8);
            const int index = row_block * kRows + r;
            if (index >= rows) break;
            const uint4 value = ptx::load_shared16(chunk_address(stage + (chunk / 8) * kTileBytes, r, chunk % 8));
            u16* target = problem.out + item.sequence * problem.out_batch + (index / group) * problem.out_position +
                          (kv_head * group + index % group) * problem.out_head + kGroup * (kHeadDimV / 2) + chunk * 8;
            if (reinterpret_cast<u64>(target) % 16 == 0) {
                *reinterpret_cast<uint4*>(target) = value;
            } else {
                const u32 words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
                for (int w = 0; w < 4; ++w) target[2 * w] = u16(words[w]), target[2 * w + 1] = u16(words[w] >> 16);
            }
        }
    }

    __device__ __forceinline__ void store_partial(const Item& item, int rows, int part, const float (&factor)[2]) const {
        float* target = problem.partial_out +
                        (partial_row(problem, part, item.slot, kv_head, row_block) + row) * kHeadDimV +
                        kGroup * (kHeadDimV / 2) + column;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (row_block * kRows + row + r * 8 >= rows) break;
#pragma unroll
            for (int i = r; i < 64; i += 2)
                *reinterpret_cast<float2*>(target + r * 8 * kHeadDimV + (i / 2) * 8) =
                    make_float2(o[2 * i] * factor[r], o[2 * i + 1] * factor[r]);
        }
    }
};

// Every item of a part, with the length of its sequence.
template <typename Work>
__device__ __forceinline__ void for_items(const Problem& problem, int part, Work work) {
    const Bound from = problem.bounds[part], to = problem.bounds[part + 1];
    for (int sequence = from.sequence; sequence <= to.sequence && sequence < problem.batch; ++sequence) {
        const int length = length_of(problem, sequence);
        const Item item = item_of(problem, from, to, sequence, steps_of(length));
        if (item.begin < item.end) work(item, length);
    }
}

template <int kGroup>
__device__ __forceinline__ void compute(const Problem& problem, Shared& shared, int part, int kv_head, int row_block) {
    const int thread = threadIdx.x % kWarpgroup;
    Computer<kGroup> computer{problem, shared};
    computer.q = ptx::shared_address(shared.q);
    computer.kv = ptx::shared_address(shared.kv);
    computer.full = ptx::shared_address(shared.full);
    computer.empty = ptx::shared_address(shared.empty);
    computer.kv_head = kv_head;
    computer.row_block = row_block;
    computer.row = thread / 32 * 16 + thread % 32 / 4;
    computer.column = thread % 4 * 2;
    computer.rounds[0] = computer.rounds[1] = 0;
    for_items(problem, part, [&](const Item& item, int length) { computer.run(item, length, part); });
}

template <bool kWhole>
__device__ __forceinline__ void load(
    const Problem& problem, const TensorMap* half_map, const TensorMap* tile_map, Shared& shared, int part, int kv_head) {
    Loader<kWhole> loader{problem,
                          half_map,
                          tile_map,
                          ptx::shared_address(shared.kv),
                          ptx::shared_address(shared.full),
                          ptx::shared_address(shared.empty),
                          kv_head,
                          ptx::evict_first_policy()};
    for_items(problem, part, [&](const Item& item, int) { loader.run(item); });
}

// Grid: (row_blocks, h_kv, parts): blocks that read the same pages are neighbours and share them in L2.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
decode(
    const __grid_constant__ Problem problem, const __grid_constant__ TensorMap half_map, const __grid_constant__ TensorMap tile_map) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int row_block = blockIdx.x, kv_head = blockIdx.y, part = blockIdx.z;
    if (threadIdx.x == 0) {
        for (int buffer = 0; buffer < 2; ++buffer) {
            for (int piece = 0; piece < kPieces; ++piece) ptx::barrier_init(ptx::shared_address(&shared.full[buffer][piece]), 1);
            for (int half = 0; half < 2; ++half) ptx::barrier_init(ptx::shared_address(&shared.empty[buffer][half]), 4);
            ptx::barrier_init(ptx::shared_address(&shared.ready[buffer]), kWarpgroup);
        }
        ptx::barrier_init_fence();
    }
    __syncthreads();

    const int warpgroup = threadIdx.x / kWarpgroup;
    if (warpgroup == 2) {
        ptx::give_registers<40>();
        if (threadIdx.x < kComputing + 32) {
            ptx::prefetch_map(&half_map);
            ptx::prefetch_map(&tile_map);
            ptx::wait_for_previous();
            if (problem.page_size >= kTokens) {
                load<true>(problem, &half_map, &tile_map, shared, part, kv_head);
            } else {
                load<false>(problem, &half_map, &tile_map, shared, part, kv_head);
            }
        }
    } else if (warpgroup == 1) {
        ptx::take_registers<232>();
        ptx::wait_for_previous();
        compute<1>(problem, shared, part, kv_head, row_block);
    } else {
        ptx::take_registers<232>();
        ptx::wait_for_previous();
        compute<0>(problem, shared, part, kv_head, row_block);
    }
    ptx::launch_dependents();
}
