// The arithmetic of the CUDA kernels on a row, and its distribution over threads. It is also host code, so that a test
// can walk the same tree of groups, lanes, warps and blocks without a GPU.
//
// Exponents are in base 2, like the GPU's exponential: t2 = outer2 * (y - m), outer2 = outer * log2(e).
#pragma once

#include "epo_math.h"
#include "rows.h"

namespace epo {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLowestExponent2 = -300.0f;  // 2^-300 is 0 in float32
constexpr int kLanes = 32;

EPO_FN float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return exp2f(x);
#endif
}

// m = max y, s = Σ 2^t2, u = Σ t2 2^t2.
using Moments2 = Moments<float>;
using Spread2 = Spread<float>;

// The sums relative to another maximum. -inf against -inf keeps its zeros, and NaN in s stays.
EPO_FN Moments2 about2(const Moments2& part, float m, float outer2) {
    const float shift = part.m == m ? 0.0f : fmaxf((part.m - m) * outer2, kLowestExponent2);
    const float decay = fast_exp2(shift);
    return {m, part.s * decay, (part.u + shift * part.s) * decay};
}

EPO_FN Moments2 merge2(const Moments2& a, const Moments2& b, float outer2) {
    const float m = fmaxf(a.m, b.m);
    const Moments2 left = about2(a, m, outer2), right = about2(b, m, outer2);
    return {m, left.s + right.s, left.u + right.u};
}

// Adds N values to a thread's moments, given m, the greatest of them and of those before. Values that are all -inf add
// 0; NaN ends up in s.
template <int N>
EPO_FN void add_group_below(Moments2& run, const float (&y)[N], float m, float outer2) {
    run = about2(run, m, outer2);  // one rescaling for all
    const float base = m == -INFINITY ? 0.0f : m;
    EPO_UNROLL
    for (int i = 0; i < N; ++i) {
        const float t = (y[i] - base) * outer2;
        const float e = fast_exp2(t);
        run.s += e;
        run.u = fmaf(fmaxf(t, kLowestExponent2), e, run.u);
    }
}

// The same where their maximum, which ignores NaN, is yet to be found.
template <int N>
EPO_FN void add_group(Moments2& run, const float (&y)[N], float outer2) {
    float m = run.m;
    EPO_UNROLL
    for (int i = 0; i < N; ++i) m = fmaxf(m, y[i]);
    add_group_below(run, y, m, outer2);
}

// Adds Σ e^t (t - mean)² and Σ e^2t of N values about a maximum that is known; t in nats.
template <int N>
EPO_FN void add_spread_group(Spread2& run, const float (&y)[N], float outer2, float m, float mean) {
    EPO_UNROLL
    for (int i = 0; i < N; ++i) {
        const float t = (y[i] - m) * outer2;
        const float e = fast_exp2(t);
        const float distance = fmaxf(t, kLowestExponent2) * kLn2 - mean;
        run.variance = fmaf(e * distance, distance, run.variance);
        run.collision = fmaf(e, e, run.collision);
    }
}

// outer: not in base 2.
EPO_FN RowStats finish2(const Moments2& row, float y_token, float outer) {
    const float log_s = logf(row.s);
    return {(y_token - row.m) * outer - log_s, log_s - row.u / row.s * kLn2, row.m, row.s};
}

// A row's gradient, ∂ℓ/∂x = 2^t2 * (constant + linear * t2), with softcap times 1 - y²; see gradient_line.
struct Slope2 {
    float outer2, m, constant, linear;

    EPO_FN float of(float y) const {
        const float t = (y - m) * outer2;
        return fast_exp2(t) * fmaf(linear, fmaxf(t, kLowestExponent2), constant);
    }
};

EPO_FN Slope2 slope2(float a, float b, const RowStats& row, const Transform& transform) {
    const GradientLine line = gradient_line(a, b, row, transform);
    return {transform.outer * kLog2E, row.m, line.constant, line.linear * kLn2};
}

// ---------------------------------------------------------------------------------------------------------------------
// A row in tiles, for the ring kernel: [head | tiles of whole 16-byte vectors | tail]. Head and tail are the fewer than
// 16 bytes on either side that bulk copies cannot access. Tiles are dealt round-robin to the warps of a cluster's
// blocks.

constexpr int kVectorBytes = 16;

template <int Warps, int TileBytes>
struct RowTiles {
    static constexpr int kTileBytes = TileBytes;
    static constexpr int kVectorsPerLane = TileBytes / kVectorBytes / kLanes;
    static_assert(TileBytes == kVectorsPerLane * kVectorBytes * kLanes, "a tile gives each lane whole vectors");

    std::int64_t head_bytes, body_bytes, tail_bytes;

    // address: start of the row; only its alignment matters.
    EPO_FN RowTiles(std::uint64_t address, std::int64_t row_bytes) {
        const std::int64_t off = static_cast<std::int64_t>((kVectorBytes - address % kVectorBytes) % kVectorBytes);
        head_bytes = off < row_bytes ? off : row_bytes;
        body_bytes = (row_bytes - head_bytes) / kVectorBytes * kVectorBytes;
        tail_bytes = row_bytes - head_bytes - body_bytes;
    }

    EPO_FN int count() const { return static_cast<int>((body_bytes + TileBytes - 1) / TileBytes); }
    // Tiles are dealt to the warps in turn: a warp's first tile, and the distance to its next one.
    EPO_FN static int first(int rank, int warp) { return rank * Warps + warp; }
    EPO_FN static int stride(int ranks) { return ranks * Warps; }
    // Edges belong to the first warp of the first block: the head to lanes 0 to 7, the tail to lanes 8 to 15. Returns
    // the byte offset of the lane's element in the row, -1 if it has none.
    EPO_FN std::int64_t edge_of(int lane, int element_bytes) const {
        const std::int64_t in_head = std::int64_t(lane) * element_bytes;
        if (lane < 8) return in_head < head_bytes ? in_head : -1;
        const std::int64_t in_tail = std::int64_t(lane - 8) * element_bytes;
        return lane < 16 && in_tail < tail_bytes ? head_bytes + body_bytes + in_tail : -1;
    }
};

// A walk over one warp's tiles of a row: bytes from the row's start to the current tile, from there to the end of the
// body, and to the warp's next tile. At the end `left` is 0 or less.
template <class Tiles>
struct TilePart {
    int offset, left, stride;

    EPO_FN TilePart(const Tiles& tiles, int rank, int warp, int ranks) {
        const int before = Tiles::first(rank, warp) * Tiles::kTileBytes;
        offset = static_cast<int>(tiles.head_bytes) + before;
        left = static_cast<int>(tiles.body_bytes) - before;
        stride = Tiles::stride(ranks) * Tiles::kTileBytes;
    }
    EPO_FN int bytes() const { return left < Tiles::kTileBytes ? left : Tiles::kTileBytes; }
    EPO_FN bool holds(int byte) const { return unsigned(byte - offset) < unsigned(bytes()); }
    EPO_FN void advance() {
        offset += stride;
        left -= stride;
    }
};

// The ring's sizes; the reasons are in cuda_ring.cuh.
constexpr int kRingWarps = 4;
constexpr int kRingTileBytes = 2048;
constexpr int kMostRanks = 8;
using RingTiles = RowTiles<kRingWarps, kRingTileBytes>;

// The smallest cluster whose warps hold a row in their slots and keep `spare` for the next row's first tiles; 0 if
// there is none.
template <class Tiles>
inline int ranks_for(std::int64_t row_bytes, int slots, int spare) {
    const Tiles tiles(0, row_bytes);
    for (int ranks = 1; ranks <= kMostRanks; ranks *= 2) {
        // One more, because an unaligned row may start a tile's piece earlier.
        const int most = (tiles.count() + 1 + Tiles::stride(ranks) - 1) / Tiles::stride(ranks);
        if (most + spare <= slots) return ranks;
    }
    return 0;
}

// Blocks of a cluster, slots of a warp, blocks per multiprocessor; all 0: none fits.
struct RingPlan {
    int ranks = 0, slots = 0, blocks = 0;
};

constexpr int kRingBlocks = 4;  // most per multiprocessor; the kernel's registers allow no more
constexpr int kMostSlots = 28;
constexpr int kReservedBytes = 1024;  // of shared memory, per block, by the system
constexpr int kStaticBytes = 256;     // more than the kernel's __shared__ variables

// The more blocks share a multiprocessor, the more of them compute while others wait; the more slots each has, the
// wider its rows may be. block_bytes: shared memory that a block alone may have; fixed_bytes: without its slots.
template <class Tiles>
inline RingPlan ring_plan(std::int64_t row_bytes, int block_bytes, int fixed_bytes) {
    for (int blocks = kRingBlocks; blocks > 0; --blocks) {
        const int room = (block_bytes + kReservedBytes) / blocks - kReservedBytes - kStaticBytes - fixed_bytes;
        const int fitting = room / (Tiles::stride(1) * Tiles::kTileBytes);
        const int slots = fitting < kMostSlots ? fitting : kMostSlots;
        const int ranks = ranks_for<Tiles>(row_bytes, slots, blocks > 1 ? 1 : 3);
        if (ranks > 0) return {ranks, slots, blocks};
    }
    return {};
}

}  // namespace epo
