// The Hopper instructions that C++ has no word for: mbarriers, the bulk tensor copy engine, warpgroup matrix products.
// Self-contained, so that NVRTC compiles it without any toolkit header.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#define HAL_INFINITY __int_as_float(0x7f800000)

// A CUtensorMap as the driver encodes it; only ever passed on.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

namespace ptx {

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// ---- mbarriers -------------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra ready;\n"
        "bra again;\n"
        "ready:\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// ---- named barriers among some warps of the block ----------------------------------------------------------------

template <int kBarrier, int kThreads>
__device__ __forceinline__ void named_sync() {
    asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

template <int kBarrier, int kThreads>
__device__ __forceinline__ void named_arrive() {
    asm volatile("bar.arrive %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

// ---- copies --------------------------------------------------------------------------------------------------------

// Orders this thread's ordinary shared-memory accesses before later ones by tensor cores and the copy engine.
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<u64>(map)) : "memory");
}

// One box of the cache, which is five-dimensional here: 64 columns of a tile, rows, tiles, heads, blocks. Coordinates
// outside it read as zero. By one thread of a whole warp, elected here: only then does the compiler know that there is
// one, and otherwise it issues in a loop over lanes.
__device__ __forceinline__ void load_box(
    u32 target, const TensorMap* map, u32 barrier, int row, int tile, int head, int block, u64 policy) {
    asm volatile(
        "{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\n"
        "@p cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;\n}\n" ::"r"(target),
        "l"(reinterpret_cast<u64>(map)), "r"(barrier), "r"(0), "r"(row), "r"(tile), "r"(head), "r"(block), "l"(policy)
        : "memory");
}

// One thread of a whole warp arrives, and announces bytes.
__device__ __forceinline__ void expect_elected(u32 barrier, u32 bytes) {
    asm volatile(
        "{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\n"
        "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n}\n" ::"r"(barrier), "r"(bytes)
        : "memory");
}

__device__ __forceinline__ u64 evict_first_policy() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// 16 bytes from global to shared memory; zeros where `take` is false, and then nothing is read.
__device__ __forceinline__ void copy16(u32 target, const void* source, bool take) {
    const u32 bytes = take ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy16_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void store_shared(u32 target, u32 value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(target), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared_zero16(u32 target) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(target), "r"(0) : "memory");
}

__device__ __forceinline__ uint4 load_shared16(u32 source) {
    uint4 value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(source)
                 : "memory");
    return value;
}

// ---- launches that overlap -----------------------------------------------------------------------------------------

// Lets the next kernel of the stream start its blocks while this one ends.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }

// Waits until the kernel before this one has ended and its writes are visible.
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- registers per warpgroup ---------------------------------------------------------------------------------------

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- numbers -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two floats rounded to nearest even and packed, the first in the low half.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 packed;
#ifdef HAL_FP16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
    return packed;
}

// The floats that two packed values stand for.
__device__ __forceinline__ float low_of(u32 packed) {
#ifdef HAL_FP16
    float value;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(value) : "r"(packed));
    return value;
#else
    return __uint_as_float(packed << 16);
#endif
}

__device__ __forceinline__ float high_of(u32 packed) {
#ifdef HAL_FP16
    float value;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}" : "=f"(value) : "r"(packed));
    return value;
#else
    return __uint_as_float(packed & 0xFFFF0000u);
#endif
}

// ---- warpgroup matrix products -------------------------------------------------------------------------------------

// A matrix in shared memory, in rows of 128 bytes swizzled in groups of eight (PTX ISA, matrix descriptor): bits 0-13 the
// address, 16-29 the leading and 32-45 the stride offset, all in units of 16 bytes; 62-63 the swizzle, 1 = 128 bytes.
// K runs along a row: groups of eight rows are 1024 bytes apart, the leading offset is not used.
__device__ __forceinline__ u64 descriptor_k_major(u32 address) {
    return (u64(1) << 62) | (u64(1024 >> 4) << 32) | (u64(1) << 16) | ((address & 0x3FFFF) >> 4);
}

// K runs over rows: groups of eight rows are 1024 bytes apart, the next 64 columns `kTileBytes` further.
template <int kTileBytes>
__device__ __forceinline__ u64 descriptor_mn_major(u32 address) {
    return (u64(1) << 62) | (u64(1024 >> 4) << 32) | (u64(kTileBytes >> 4) << 16) | ((address & 0x3FFFF) >> 4);
}

__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void product_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler must neither read nor move accumulators while products run: it sees this as a change of each.
template <int kCount>
__device__ __forceinline__ void settle(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#ifdef HAL_FP16
#define HAL_TYPES "f32.f16.f16"
#else
#define HAL_TYPES "f32.bf16.bf16"
#endif
#define HAL_R8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define HAL_R32(d, i) HAL_R8(d, i), HAL_R8(d, i + 8), HAL_R8(d, i + 16), HAL_R8(d, i + 24)
#define HAL_R128(d) HAL_R32(d, 0), HAL_R32(d, 32), HAL_R32(d, 64), HAL_R32(d, 96)
#define HAL_N32                                                                                                        \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                          \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define HAL_N128                                                                                                       \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                          \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                                 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                 \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                                 \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                                 \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                                 \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "                     \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"

// d[64 × 64] = (accumulate ? d : 0) + a[64 × 16] · b[16 × 64], both from shared memory with K along rows.
__device__ __forceinline__ void product_64(float (&d)[32], u64 a, u64 b, bool accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16." HAL_TYPES " " HAL_N32 ", %32, %33, p, 1, 1, 0, 0;\n}\n"
        : HAL_R32(d, 0)
        : "l"(a), "l"(b), "r"(int(accumulate)));
}

// d[64 × 256] += a[64 × 16] · b[16 × 256]: a in registers, b in shared memory with K over rows.
__device__ __forceinline__ void product_256(float (&d)[128], const u32* a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n256k16." HAL_TYPES " " HAL_N128 ", {%128, %129, %130, %131}, %132, 1, 1, 1, 1;\n"
        : HAL_R128(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// The same with a in shared memory, K along rows.
__device__ __forceinline__ void product_256(float (&d)[128], u64 a, u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n256k16." HAL_TYPES " " HAL_N128 ", %128, %129, 1, 1, 1, 0, 1;\n"
        : HAL_R128(d)
        : "l"(a), "l"(b));
}

}  // namespace ptx
