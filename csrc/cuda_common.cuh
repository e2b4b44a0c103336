// Common parts of both CUDA kernel families: elements, warp reductions, and the sums of a launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_rows.h"
#include "tile_math.h"

namespace epo {

// ---------------------------------------------------------------------------------------------------------------------
// Elements: float32 values to and from 16-byte vectors and single elements.

struct Float32Element {
    using Stored = float;
    static constexpr int kPerVector = 4;
    __device__ static float load(const Stored* x) { return *x; }
    __device__ static void store(Stored* x, float value) { *x = value; }
    __device__ static void unpack(const uint4& raw, float (&y)[kPerVector]) {
        y[0] = __uint_as_float(raw.x), y[1] = __uint_as_float(raw.y);
        y[2] = __uint_as_float(raw.z), y[3] = __uint_as_float(raw.w);
    }
    __device__ static uint4 pack(const float (&y)[kPerVector]) {
        return {__float_as_uint(y[0]), __float_as_uint(y[1]), __float_as_uint(y[2]), __float_as_uint(y[3])};
    }
    // The greatest value of a vector and m; NaN is ignored.
    __device__ static float greatest(const uint4& raw, float m) {
        float y[kPerVector];
        unpack(raw, y);
        return fmaxf(m, fmaxf(fmaxf(y[0], y[1]), fmaxf(y[2], y[3])));
    }
};

template <class Half2Functions>
struct TwoByteElement {
    using Stored = typename Half2Functions::Stored;
    static constexpr int kPerVector = 8;
    __device__ static float load(const Stored* x) { return Half2Functions::widen(*x); }
    __device__ static void store(Stored* x, float value) { *x = Half2Functions::round(value); }
    __device__ static void unpack(const uint4& raw, float (&y)[kPerVector]) {
        const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = Half2Functions::widen_pair(words[i]);
            y[2 * i] = pair.x, y[2 * i + 1] = pair.y;
        }
    }
    __device__ static uint4 pack(const float (&y)[kPerVector]) {
        return {Half2Functions::round_pair(y[0], y[1]), Half2Functions::round_pair(y[2], y[3]),
                Half2Functions::round_pair(y[4], y[5]), Half2Functions::round_pair(y[6], y[7])};
    }
    __device__ static float greatest(const uint4& raw, float m) {
        const unsigned left = Half2Functions::larger_pair(raw.x, raw.y);
        const unsigned right = Half2Functions::larger_pair(raw.z, raw.w);
        const float2 pair = Half2Functions::widen_pair(Half2Functions::larger_pair(left, right));
        return fmaxf(m, fmaxf(pair.x, pair.y));
    }
};

struct BFloat16Functions {
    using Stored = __nv_bfloat16;
    __device__ static float widen(Stored x) { return __bfloat162float(x); }
    __device__ static Stored round(float x) { return __float2bfloat16_rn(x); }
    __device__ static float2 widen_pair(unsigned raw) {
        return {__uint_as_float(raw << 16), __uint_as_float(raw & 0xffff0000u)};
    }
    __device__ static unsigned larger_pair(unsigned a, unsigned b) {
        const __nv_bfloat162 pair =
            __hmax2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
        return reinterpret_cast<const unsigned&>(pair);
    }
    __device__ static unsigned round_pair(float low, float high) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<const unsigned&>(pair);
    }
};

struct Float16Functions {
    using Stored = __half;
    __device__ static float widen(Stored x) { return __half2float(x); }
    __device__ static Stored round(float x) { return __float2half_rn(x); }
    __device__ static float2 widen_pair(unsigned raw) { return __half22float2(reinterpret_cast<const __half2&>(raw)); }
    __device__ static unsigned round_pair(float low, float high) {
        const __half2 pair = __floats2half2_rn(low, high);
        return reinterpret_cast<const unsigned&>(pair);
    }
};

using BFloat16Element = TwoByteElement<BFloat16Functions>;
using Float16Element = TwoByteElement<Float16Functions>;

// ---------------------------------------------------------------------------------------------------------------------
// Warps

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float warp_maximum(float x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
    return x;
}

template <class Real>
__device__ __forceinline__ Real warp_sum(Real x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
}

// The moments of all lanes combined, in every lane.
__device__ __forceinline__ Moments2 warp_merge(const Moments2& lane, float outer2) {
    const Moments2 part = about2(lane, warp_maximum(lane.m), outer2);
    return {part.m, warp_sum(part.s), warp_sum(part.u)};
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums of a launch

// A block's sums go to its slot in the workspace; the last block to finish adds all of them, in an order that depends
// only on their number, and resets the ticket to 0. Called by every thread of `count` blocks.
__device__ inline void publish_sums(const double* block_sums, double* workspace, int* ticket, int index, int count,
                                    double* sums, float* loss) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x < kNumSums) workspace[index * kNumSums + threadIdx.x] = block_sums[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) {
        // By the thread that takes the ticket: fences of the writing threads would not be ordered with it.
        __threadfence();  // releases the block's sums
        last = atomicAdd(ticket, 1) == count - 1;
        __threadfence();  // acquires the sums of the others
    }
    __syncthreads();
    if (!last) return;
    const int lane = threadIdx.x % kLanes;
    for (int k = threadIdx.x / kLanes; k < kNumSums; k += blockDim.x / kLanes) {
        double sum = 0.0;
        for (int i = lane; i < count; i += kLanes) sum += __ldcg(&workspace[i * kNumSums + k]);
        sum = warp_sum(sum);
        if (lane == 0) {
            sums[k] = sum;
            if (k == RowSums::loss) *loss = static_cast<float>(sum);
        }
    }
    if (threadIdx.x == 0) *ticket = 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows

struct TokenPlace {
    std::int64_t b, t;
};

// In 32 bits where they suffice, because a division of 64-bit numbers takes hundreds of cycles.
__device__ __forceinline__ TokenPlace place_of(const Rows& rows, std::int64_t row) {
    if ((row | rows.time) >> 32) return {row / rows.time, row % rows.time};
    const auto number = static_cast<std::uint32_t>(row), time = static_cast<std::uint32_t>(rows.time);
    return {number / time, number % time};
}

template <class Element>
__device__ __forceinline__ typename Element::Stored* row_of(const Matrix& matrix, const TokenPlace& at) {
    return static_cast<typename Element::Stored*>(matrix.data) + matrix.offset(at.b, at.t);
}

// Writes 0 to [from, to) of a contiguous row, `worker` of `workers` threads.
template <class Element>
__device__ inline void clear_row(typename Element::Stored* row, std::int64_t from, std::int64_t to, int worker,
                                 int workers) {
    if (from >= to) return;
    constexpr std::int64_t kSize = sizeof(typename Element::Stored);
    const auto address = reinterpret_cast<std::uint64_t>(row + from);
    const RowTiles<1, kVectorBytes * kLanes> tiles(address, (to - from) * kSize);
    char* const start = reinterpret_cast<char*>(row + from);
    for (std::int64_t i = worker; i < tiles.body_bytes / kVectorBytes; i += workers)
        __stcs(reinterpret_cast<uint4*>(start + tiles.head_bytes) + i, uint4{0, 0, 0, 0});
    for (int lane = worker; lane < kLanes; lane += workers) {
        const std::int64_t edge = tiles.edge_of(lane, kSize);
        if (edge >= 0) Element::store(reinterpret_cast<typename Element::Stored*>(start + edge), 0.0f);
    }
}

}  // namespace epo
