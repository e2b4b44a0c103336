// The family for chips with clusters (compute capability 9.0 on): a row stays on chip, one HBM read and one write.
//
// A cluster of 1, 2, 4 or 8 persistent blocks processes one row at a time. Each *warp* owns a ring of 2 KB tiles in
// shared memory: bulk copies load its tiles of the row, it computes their statistics as they arrive, and sends its
// moments to every block of the cluster. The first warp of each block merges the moments of the whole row, computes
// the loss of its token, and tells the other warps of its block what the gradient is. Each warp then writes the
// gradient of its tiles straight to memory; a tile's slot is refilled with a tile of the next row as soon as it has
// been read again. There is no barrier per tile or per block: a warp orders its own tiles, and two mbarriers order a
// row.
//
// Exchange: each warp sends its 16 bytes (m, s, u, y_token) to each block of the cluster with st.async, which
// decrements that block's mbarrier. A cluster of one block may not use st.async (undefined where %cluster_nctarank
// is 1): there each warp's lane 0 stores the message and arrives, and the mbarrier counts warps instead of bytes.
//
// Two sets of messages and decisions take turns: a warp sends for row r+2 only after row r+1 has been decided, hence
// after every warp has sent for row r+1, which each does only after it has read row r. The arrivals of a single
// block are releases, so there the reads of row r happen before the messages of row r+2 in the memory model too. For
// st.async the model has no such rule: it is an asynchronous, weak store, whose complete_tx releases that store
// alone and none of the sender's earlier accesses. It is safe because those accesses are loads from the sender's own
// shared memory whose values the shuffles of the merge, or the gradient, consume: a warp issues in order, and these
// issue only when their operands have arrived in all lanes. So the reads of row r are over before the warp issues
// the st.async for row r+1, and the first st.async that could overwrite what they read is issued by a warp that has
// seen that message.
//
// What limits it, by the counters of an H200 for 8192 x 151,936 bf16, with two blocks of eight warps (docs/log.md
// has every attempt): not memory, which is 62 % busy, but instructions: 23 an element, issued in 58 % of the cycles.
// About 15 of the 23 are the arithmetic of statistics and gradient; two exponentials an element keep the special
// function units 42 % busy. The rest is spent per tile and per row; and clusters do not fill every group of
// multiprocessors, which leaves 6 % of the chip idle. Hence small blocks, many to a multiprocessor, because they
// wait at different times (four of four warps beat two of eight by 1 to 4 %, and those one of eight by 3 to 45 %,
// most with narrow rows); tiles of 2 KB (1 KB: 12 to 15 % slower); the maximum of bfloat16 in pairs; the token's
// loss in one warp; and gradients that go from registers to memory (through shared memory they need a proxy fence a
// tile).
#pragma once

#include <cuda/std/cstdint>

#include "cuda_common.cuh"

namespace epo {
namespace ring {

constexpr int kWarps = kRingWarps;
constexpr int kThreads = kWarps * kLanes;
constexpr int kTileBytes = kRingTileBytes;
using Tiles = RingTiles;
using Part = TilePart<Tiles>;

struct Arguments {
    Rows rows;
    Terms terms;
    LossResults results;
    Matrix out;
    int ranks, slots;
};

// A warp's message to the others about its part of a row.
struct alignas(16) Message {
    float m, s, u, y_token;
};

// What a block's first warp tells the others about the gradient of a row.
struct alignas(16) Decision {
    float m, constant, linear, at_token;  // see Slope2
};

// The tiles of one row that a warp fetches next; used only by its lane 0.
struct Fetching {
    std::int64_t row;
    const char* from;
    int left, stride;  // as in Part
};

struct alignas(128) Shared {
    Message messages[2][kMostRanks * kWarps];
    Decision decisions[2];
    double sums[kNumSums];
    Fetching fetching[kWarps];
    std::uint64_t exchanged[2], decided[2];    // mbarriers
    std::uint64_t landed[kWarps][kMostSlots];  // mbarriers
};

constexpr int shared_bytes(int slots) { return int(sizeof(Shared)) + kWarps * slots * kTileBytes; }

// PTX instructions without a CUDA C++ equivalent. Only chips with clusters have them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ unsigned shared_address(const void* at) {
    return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ unsigned address_in(unsigned address, unsigned rank) {
    unsigned remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    return remote;
}

__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void init_barrier(std::uint64_t* barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void expect_bytes(std::uint64_t* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void arrive(std::uint64_t* barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Waits for data of this block's threads. An acquire at cluster scope would invalidate the L1 at every tile.
__device__ __forceinline__ void wait_for_block(std::uint64_t* barrier, unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Waits for data sent by other blocks.
__device__ __forceinline__ void wait_for_cluster(std::uint64_t* barrier, unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Undefined in a cluster of one block.
__device__ __forceinline__ void send(const Message& message, unsigned to, unsigned barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "r"(__float_as_uint(message.m)), "r"(__float_as_uint(message.s)), "r"(__float_as_uint(message.u)),
                 "r"(__float_as_uint(message.y_token)), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void load_tile(void* tile, const char* from, unsigned bytes, std::uint64_t* barrier) {
    expect_bytes(barrier, bytes);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(tile)),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------

// Position of a warp in its ring: slot, and parity of its mbarrier's phase.
struct Cursor {
    int slot = 0;
    unsigned parity = 0;
    __device__ void advance(int slots) {
        if (++slot == slots) {
            slot = 0;
            parity ^= 1u;
        }
    }
};

// One warp of the cluster, with its tiles of every row that the cluster processes.
template <class Element>
struct Warp {
    using Stored = typename Element::Stored;
    static constexpr int kVectors = Tiles::kVectorsPerLane;
    static constexpr int kPerVector = Element::kPerVector;
    static constexpr std::int64_t kSize = sizeof(Stored);

    const Arguments& args;
    std::uint64_t* landed;
    char* ring;
    int rank, warp, lane;
    std::int64_t cluster, clusters, count;
    Cursor reading;
    Fetching& next;
    int next_slot = 0;
    bool next_counted = false;  // the mask of row next.row + clusters, loaded long before it is needed

    __device__ Warp(const Arguments& args_, Shared& shared, char* rings)
        : args(args_),
          rank(static_cast<int>(cluster_rank())),
          warp(threadIdx.x / kLanes),
          lane(threadIdx.x % kLanes),
          next(shared.fetching[threadIdx.x / kLanes]) {
        landed = shared.landed[warp];
        ring = rings + warp * args.slots * kTileBytes;
        cluster = blockIdx.x / args.ranks;
        clusters = gridDim.x / args.ranks;
        count = args.rows.batch * args.rows.time;
    }

    __device__ const char* source(const TokenPlace& at) const {
        return reinterpret_cast<const char*>(row_of<Element>(args.rows.logits, at));
    }
    __device__ Tiles tiles_of(const char* row) const {
        return Tiles(reinterpret_cast<std::uint64_t>(row), args.rows.vocab_size * kSize);
    }
    // False past the last row.
    __device__ bool counted(std::int64_t row) const {
        if (row >= count) return false;
        const TokenPlace at = place_of(args.rows, row);
        return args.rows.mask.at(at.b, at.t);
    }
    __device__ char* slot(const Cursor& cursor) const { return ring + cursor.slot * kTileBytes; }

    // Advances to the first row from `row` on in which this warp has tiles. Lane 0 only.
    __device__ void turn_to(std::int64_t row, bool is_counted) {
        for (; row < count; row += clusters, is_counted = counted(row)) {
            if (!is_counted) continue;
            const char* const from = source(place_of(args.rows, row));
            const Part part(tiles_of(from), rank, warp, args.ranks);
            if (part.left <= 0) continue;
            next = {row, from + part.offset, part.left, part.stride};
            next_counted = counted(row + clusters);
            return;
        }
        next.left = 0;
    }

    // Fetches the next tile into the next free slot. Lane 0 only.
    __device__ void fetch() {
        const int left = next.left;
        if (left <= 0) return;  // no row is left
        const unsigned bytes = left < kTileBytes ? left : kTileBytes;
        load_tile(ring + next_slot * kTileBytes, next.from, bytes, &landed[next_slot]);
        if (++next_slot == args.slots) next_slot = 0;
        next.from += next.stride;
        next.left = left - next.stride;
        if (next.left <= 0) turn_to(next.row + clusters, next_counted);
    }

    // This lane's moments of one tile.
    __device__ void add_tile(Moments2& run, const char* tile, int bytes, float outer2) const {
        if (bytes == kTileBytes) {
            float y[kVectors * kPerVector], m = run.m;
#pragma unroll
            for (int k = 0; k < kVectors; ++k) {
                const uint4 raw = reinterpret_cast<const uint4*>(tile)[k * kLanes + lane];
                m = Element::greatest(raw, m);
                float part[kPerVector];
                Element::unpack(raw, part);
#pragma unroll
                for (int i = 0; i < kPerVector; ++i) y[k * kPerVector + i] = part[i];
            }
            add_group_below(run, y, m, outer2);
            return;
        }
        for (int v = lane; v * kVectorBytes < bytes; v += kLanes) {
            float y[kPerVector];
            Element::unpack(reinterpret_cast<const uint4*>(tile)[v], y);
            add_group(run, y, outer2);
        }
    }

    // The gradient of one tile. token_byte: the token's, from the start of the tile.
    __device__ void write_tile(char* out, const char* tile, int bytes, const Slope2& slope, int token_byte,
                               float at_token) const {
        if (bytes == kTileBytes) {
#pragma unroll
            for (int k = 0; k < kVectors; ++k) write_vector(out, tile, k * kLanes + lane, slope);
        } else {
            for (int v = lane; v * kVectorBytes < bytes; v += kLanes) write_vector(out, tile, v, slope);
        }
        // The lane that has just written the token's vector.
        const int writer = token_byte / kVectorBytes % kLanes;
        if (unsigned(token_byte) < unsigned(bytes) && lane == writer)
            Element::store(reinterpret_cast<Stored*>(out + token_byte), at_token);
    }

    __device__ void write_vector(char* out, const char* tile, int v, const Slope2& slope) const {
        float y[kPerVector];
        Element::unpack(reinterpret_cast<const uint4*>(tile)[v], y);
#pragma unroll
        for (int i = 0; i < kPerVector; ++i) y[i] = slope.of(y[i]);
        __stcs(reinterpret_cast<uint4*>(out) + v, Element::pack(y));
    }

    // This lane's element at the row's edge, -1 if it has none.
    __device__ std::int64_t edge(const Tiles& tiles) const {
        if (rank != 0 || warp != 0) return -1;
        const std::int64_t byte = tiles.edge_of(lane, kSize);
        return byte < 0 ? -1 : byte / kSize;
    }

    // This warp's moments of its part of the row, and the token's logit if the warp has it (0 otherwise).
    __device__ Message take_statistics(const char* row, const Tiles& tiles, float outer2, std::int64_t token) {
        const Stored* const x = reinterpret_cast<const Stored*>(row);
        Moments2 run = no_moments<float>();
        float y_token = 0.0f, y_edge = 0.0f;
        const std::int64_t at_edge = edge(tiles);
        if (at_edge >= 0) y_edge = Element::load(x + at_edge);  // used last
        const int token_byte = static_cast<int>(token * kSize);
        Cursor cursor = reading;
        for (Part part(tiles, rank, warp, args.ranks); part.left > 0; part.advance()) {
            wait_for_block(&landed[cursor.slot], cursor.parity);
            add_tile(run, slot(cursor), part.bytes(), outer2);
            if (part.holds(token_byte))
                y_token = Element::load(reinterpret_cast<const Stored*>(slot(cursor) + (token_byte - part.offset)));
            cursor.advance(args.slots);
        }
        if (at_edge >= 0) {
            const float one[1] = {y_edge};
            add_group(run, one, outer2);
            if (at_edge == token) y_token = y_edge;
        }
        // In an edge one lane has the token's logit, in a tile all lanes have it.
        const unsigned holders = __ballot_sync(kAllLanes, at_edge >= 0 && at_edge == token);
        if (holders) y_token = __shfl_sync(kAllLanes, y_token, __ffs(holders) - 1);
        const Moments2 part = warp_merge(run, outer2);
        return {part.m, part.s, part.u, y_token};
    }

    // Computes and stores the gradient of this warp's part of the row; the slots fetch the next rows' tiles.
    __device__ void put_gradient(char* out, const char* row, const Tiles& tiles, const Slope2& slope,
                                 std::int64_t token, float at_token) {
        const int token_byte = static_cast<int>(token * kSize);
        const std::int64_t at_edge = edge(tiles);
        if (at_edge >= 0) {
            const float y = Element::load(reinterpret_cast<const Stored*>(row) + at_edge);
            const float gradient = at_edge == token ? at_token : slope.of(y);
            Element::store(reinterpret_cast<Stored*>(out) + at_edge, gradient);
        }
        for (Part part(tiles, rank, warp, args.ranks); part.left > 0; part.advance()) {
            write_tile(out + part.offset, slot(reading), part.bytes(), slope, token_byte - part.offset, at_token);
            __syncwarp();  // every lane has read the tile, in both passes
            if (lane == 0) fetch();
            reading.advance(args.slots);
        }
    }
};

// Sends this warp's message to every block of the cluster.
__device__ inline void send_to_all(Shared& shared, const Message& own, int rank, int ranks, int warp, int lane,
                                   unsigned set) {
    if (ranks == 1) {
        if (lane == 0) {
            shared.messages[set][warp] = own;
            arrive(&shared.exchanged[set]);
        }
        return;
    }
    if (warp == 0 && lane == 0) expect_bytes(&shared.exchanged[set], ranks * kWarps * unsigned(sizeof(Message)));
    if (lane < ranks) {
        const unsigned place = shared_address(&shared.messages[set][rank * kWarps + warp]);
        const unsigned barrier = shared_address(&shared.exchanged[set]);
        send(own, address_in(place, lane), address_in(barrier, lane));
    }
}

// Merges the messages of all warps of the cluster: statistics of the row.
__device__ inline Message receive(Shared& shared, int ranks, int lane, unsigned set, unsigned parity, float outer2) {
    wait_for_cluster(&shared.exchanged[set], parity);
    Moments2 run = no_moments<float>();
    float y_token = 0.0f;
    for (int i = lane; i < ranks * kWarps; i += kLanes) {
        const Message message = shared.messages[set][i];
        run = merge2(run, {message.m, message.s, message.u}, outer2);
        y_token += message.y_token;  // nonzero in one message only
    }
    const Moments2 row = warp_merge(run, outer2);
    return {row.m, row.s, row.u, warp_sum(y_token)};
}

#endif  // chips with clusters

template <class Element>
__global__ void __launch_bounds__(kThreads, kRingBlocks) loss_kernel(const __grid_constant__ Arguments args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Warp<Element> warp(args, shared, memory + sizeof(Shared));
    const Rows& rows = args.rows;
    const bool decides = warp.warp == 0, leads = decides && warp.rank == 0;  // all lanes of a warp
    if (warp.lane == 0) {
#pragma unroll 1
        for (int i = 0; i < args.slots; ++i) init_barrier(&warp.landed[i], 1);
        if (warp.warp == 0) {
            const unsigned arrivals = args.ranks == 1 ? kWarps : 1;  // one block: its warps; more: the expected bytes
            for (auto& barrier : shared.exchanged) init_barrier(&barrier, arrivals);
            for (auto& barrier : shared.decided) init_barrier(&barrier, 1);
        }
        publish_barriers();
    }
    __syncthreads();
    cluster_barrier();  // every block's mbarriers must exist before any block sends
    if (warp.lane == 0) {
        warp.turn_to(warp.cluster, warp.counted(warp.cluster));
        for (int i = 0; i < args.slots; ++i) warp.fetch();
    }
    __syncwarp();

    const Coefficients coefficients = read_coefficients(args.terms.coefficients);
    const int worker = warp.rank * kThreads + static_cast<int>(threadIdx.x), workers = args.ranks * kThreads;
    unsigned turn = 0;
    double sum = 0.0;  // of the leading warp's lane k: sum k
    for (std::int64_t i = warp.cluster; i < warp.count; i += warp.clusters) {
        const TokenPlace at = place_of(rows, i);
        auto* const target = row_of<Element>(args.out, at);
        const bool counted = rows.mask.at(at.b, at.t);
        clear_row<Element>(target, counted ? rows.vocab_size : 0, rows.width, worker, workers);
        if (!counted) {
            if (leads && warp.lane == 0) args.results.log_probs[i] = args.results.entropy[i] = 0.0f;
            continue;
        }
        // The scale is positive and there is no softcap, so y is the raw logit.
        const Transform transform = transform_at(rows, at.b, at.t);
        const float outer2 = transform.outer * kLog2E;
        const std::int64_t given = rows.tokens.at(at.b, at.t);
        const std::int64_t token = given >= 0 && given < rows.vocab_size ? given : -1;
        const TokenTerms terms = decides ? terms_at(args.terms, at.b, at.t) : TokenTerms{};
        const char* const row_start = warp.source(at);
        const Tiles tiles = warp.tiles_of(row_start);
        const unsigned set = turn & 1u, parity = (turn >> 1) & 1u;
        ++turn;

        const Message own = warp.take_statistics(row_start, tiles, outer2, token);
        send_to_all(shared, own, warp.rank, args.ranks, warp.warp, warp.lane, set);
        if (decides) {
            const Message row = receive(shared, args.ranks, warp.lane, set, parity, outer2);
            const RowStats stats = finish2({row.m, row.s, row.u}, token < 0 ? NAN : row.y_token, transform.outer);
            const TokenLoss loss = token_loss(stats.log_prob, stats.entropy, terms, coefficients, args.terms.choices);
            const float a = terms.weight * loss.d_log_prob, b = terms.weight * loss.d_entropy;
            const Slope2 slope = slope2(a, b, stats, transform);
            if (warp.lane == 0) {
                const float at_token = token_gradient(a, b, stats, transform);
                shared.decisions[set] = {slope.m, slope.constant, slope.linear, at_token};
                arrive(&shared.decided[set]);
            }
            if (leads) {
                if (warp.lane == 0) {
                    args.results.log_probs[i] = stats.log_prob;
                    args.results.entropy[i] = stats.entropy;
                }
                float values[kNumSums] = {};
                add_sums(values, loss, stats.log_prob, stats.entropy, terms.weight, token < 0);
#pragma unroll
                for (int k = 0; k < kNumSums; ++k) sum += warp.lane == k ? double(values[k]) : 0.0;
            }
        }
        wait_for_block(&shared.decided[set], parity);
        const Decision decision = shared.decisions[set];
        __syncwarp();  // every lane has read messages and decision; one may send for the next row
        warp.put_gradient(reinterpret_cast<char*>(target), row_start, tiles,
                          {outer2, decision.m, decision.constant, decision.linear}, token, decision.at_token);
    }
    if (leads && warp.lane < kNumSums) shared.sums[warp.lane] = sum;
    cluster_barrier();  // precautionary: each block has already waited for everything that others send it
    if (warp.rank == 0)
        publish_sums(shared.sums, args.results.workspace, args.results.ticket, static_cast<int>(warp.cluster),
                     static_cast<int>(warp.clusters), args.results.sums, args.results.loss);
#endif
}

}  // namespace ring
}  // namespace epo
