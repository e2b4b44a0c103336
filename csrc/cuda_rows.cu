#include "cuda_rows.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "cuda_prepare.cuh"
#include "cuda_ring.cuh"
#include "cuda_sweeps.cuh"

namespace epo {
namespace {

constexpr int kMostBlocksPerProcessor = std::max(kRingBlocks, sweeps::kBlocks);
constexpr int kThreadsPerProcessor = 2048;  // as many as any chip holds; for launches without rows

const char* said(cudaError_t error) {
    if (error == cudaSuccess) return nullptr;
    (void)cudaGetLastError();  // otherwise the next launch would report it
    return cudaGetErrorString(error);
}

#define EPO_RETURN_IF_FAILED(call)                                                 \
    do {                                                                           \
        if (const cudaError_t failure = (call); failure != cudaSuccess) return failure; \
    } while (0)

// Device properties that determine the launch; read from the driver's tables, without a sync.
struct Chip {
    int processors = 0, shared_bytes = 0, major = 0;
};

cudaError_t read_chip(int device, Chip& chip) {
    EPO_RETURN_IF_FAILED(cudaDeviceGetAttribute(&chip.processors, cudaDevAttrMultiProcessorCount, device));
    EPO_RETURN_IF_FAILED(cudaDeviceGetAttribute(&chip.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return cudaDeviceGetAttribute(&chip.major, cudaDevAttrComputeCapabilityMajor, device);
}

// Makes the device current for the duration of one call.
class OnDevice {
public:
    explicit OnDevice(int device) {
        error_ = cudaGetDevice(&before_);
        if (error_ == cudaSuccess && device != before_) error_ = cudaSetDevice(device);
    }
    ~OnDevice() {
        int now = before_;
        if (cudaGetDevice(&now) == cudaSuccess && now != before_) (void)cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;
    cudaError_t error() const { return error_; }

private:
    int before_ = 0;
    cudaError_t error_ = cudaSuccess;
};

std::int64_t row_bytes(const Rows& rows) { return rows.vocab_size * size_of(rows.dtype); }

// Calls launch with a value of the element type, whose type selects the kernel.
template <class Launch>
cudaError_t with_element(DType dtype, const Launch& launch) {
    if (dtype == DType::float32) return launch(Float32Element{});
    if (dtype == DType::float16) return launch(Float16Element{});
    return launch(BFloat16Element{});
}

using SweepsKernel = void (*)(sweeps::Arguments);

template <SweepsKernel Kernel>
cudaError_t launch_sweeps(const sweeps::Arguments& args, const Chip& chip, void* stream) {
    const std::int64_t count = args.rows.batch * args.rows.time, most = chip.processors * sweeps::kBlocks;
    const auto blocks = static_cast<unsigned>(std::max<std::int64_t>(1, std::min(count, most)));
    Kernel<<<blocks, sweeps::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    return cudaGetLastError();
}

// ---------------------------------------------------------------------------------------------------------------------
// The ring

RingPlan plan_ring(const Rows& rows, const Matrix& out, const Chip& chip) {
    const std::int64_t size = size_of(rows.dtype);
    const auto difference = reinterpret_cast<std::uintptr_t>(out.data) - reinterpret_cast<std::uintptr_t>(rows.logits.data);
    const auto congruent = [&](std::int64_t a, std::int64_t b) { return (a - b) * size % kVectorBytes == 0; };
    const bool dense = rows.logits.vocab_stride == 1 && out.vocab_stride == 1;
    const bool aligned_alike = difference % kVectorBytes == 0 &&
                               (rows.batch <= 1 || congruent(rows.logits.batch_stride, out.batch_stride)) &&
                               (rows.time <= 1 || congruent(rows.logits.time_stride, out.time_stride));
    if (chip.major < 9 || !dense || !aligned_alike || rows.softcap > 0.0f || !(rows.scale > 0.0f)) return {};
    return ring_plan<ring::Tiles>(row_bytes(rows), chip.shared_bytes, ring::shared_bytes(0));
}

// Shorter rows leave most warps of a block without a tile.
bool worth_a_ring(const Rows& rows) { return row_bytes(rows) >= ring::kWarps * ring::kTileBytes; }

template <class Element>
cudaError_t launch_ring(const ring::Arguments& args, int blocks, const Chip& chip, void* stream) {
    const auto kernel = ring::loss_kernel<Element>;
    const int bytes = ring::shared_bytes(args.slots);
    EPO_RETURN_IF_FAILED(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = args.ranks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(chip.processors * blocks / args.ranks * args.ranks);
    config.blockDim = dim3(ring::kThreads);
    config.dynamicSmemBytes = bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = 1;
    int clusters = 0;  // maximum resident clusters: not every multiprocessor has enough neighbours to form one
    EPO_RETURN_IF_FAILED(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    if (clusters < 1) return cudaErrorInvalidConfiguration;
    clusters = std::min(clusters, chip.processors * blocks / args.ranks);  // the workspace has room for no more
    const std::int64_t count = args.rows.batch * args.rows.time;
    config.gridDim = dim3(static_cast<unsigned>(std::max<std::int64_t>(1, std::min<std::int64_t>(clusters, count))) *
                          args.ranks);
    return cudaLaunchKernelEx(&config, kernel, args);
}

template <class Work>
const char* on_chip(const CudaPlace& place, const Work& work) {
    const OnDevice on(place.device);
    if (on.error() != cudaSuccess) return said(on.error());
    Chip chip;
    const cudaError_t error = read_chip(place.device, chip);
    return said(error == cudaSuccess ? work(chip) : error);
}

template <class Element>
cudaError_t launch_loss(const sweeps::Arguments& args, const Chip& chip, Family family, void* stream, Family& ran) {
    ran = Family::ring;
    // A float16 loss with a gradient goes through statistics (epo_kernels/fused/backend.py), so it needs no ring.
    if constexpr (!std::is_same_v<Element, Float16Element>) {
        if (family != Family::sweeps && args.out.data) {
            const RingPlan plan = plan_ring(args.rows, args.out, chip);
            if (plan.ranks > 0 && (family == Family::ring || worth_a_ring(args.rows))) {
                const ring::Arguments to_ring{args.rows, args.terms, args.results, args.out, plan.ranks, plan.slots};
                const cudaError_t launched = launch_ring<Element>(to_ring, plan.blocks, chip, stream);
                // A part of a chip may have too few neighbouring multiprocessors for a cluster.
                const bool too_few =
                    launched == cudaErrorInvalidConfiguration || launched == cudaErrorInvalidClusterSize;
                if (!too_few || family == Family::ring) return launched;
                (void)cudaGetLastError();
            }
        }
    }
    if (family == Family::ring) return cudaErrorNotSupported;
    ran = Family::sweeps;
    if (args.rows.softcap > 0.0f) return launch_sweeps<sweeps::loss_kernel<Element, true>>(args, chip, stream);
    return launch_sweeps<sweeps::loss_kernel<Element, false>>(args, chip, stream);
}

}  // namespace

const char* cuda_statistics(const Rows& rows, const Statistics& out, const CudaPlace& place) {
    return on_chip(place, [&](const Chip& chip) {
        sweeps::Arguments args{};
        args.rows = rows;
        args.statistics = out;
        return with_element(rows.dtype, [&](auto element) {
            using Element = decltype(element);
            if (rows.softcap > 0.0f)
                return launch_sweeps<sweeps::statistics_kernel<Element, true>>(args, chip, place.stream);
            return launch_sweeps<sweeps::statistics_kernel<Element, false>>(args, chip, place.stream);
        });
    });
}

const char* cuda_spread(const Rows& rows, const Statistics& statistics, float* variance, float* collision,
                        const CudaPlace& place) {
    return on_chip(place, [&](const Chip& chip) {
        sweeps::Arguments args{};
        args.rows = rows;
        args.statistics = statistics;
        args.spread = {variance, collision};
        return with_element(rows.dtype, [&](auto element) {
            using Element = decltype(element);
            if (rows.softcap > 0.0f)
                return launch_sweeps<sweeps::spread_kernel<Element, true>>(args, chip, place.stream);
            return launch_sweeps<sweeps::spread_kernel<Element, false>>(args, chip, place.stream);
        });
    });
}

const char* cuda_gradient(const Rows& rows, const Statistics& statistics, const Upstream& upstream, const Matrix& out,
                          const CudaPlace& place) {
    return on_chip(place, [&](const Chip& chip) {
        sweeps::Arguments args{};
        args.rows = rows;
        args.statistics = statistics;
        args.upstream = upstream;
        args.out = out;
        return with_element(rows.dtype, [&](auto element) {
            using Element = decltype(element);
            if (rows.softcap > 0.0f)
                return launch_sweeps<sweeps::gradient_kernel<Element, true>>(args, chip, place.stream);
            return launch_sweeps<sweeps::gradient_kernel<Element, false>>(args, chip, place.stream);
        });
    });
}

const char* cuda_loss(const Rows& rows, const Terms& terms, const Matrix& out, const LossResults& results,
                      Family family, const CudaPlace& place, Family& ran) {
    return on_chip(place, [&](const Chip& chip) {
        sweeps::Arguments args{};
        args.rows = rows;
        args.terms = terms;
        args.results = results;
        args.out = out;
        return with_element(rows.dtype, [&](auto element) {
            return launch_loss<decltype(element)>(args, chip, family, place.stream, ran);
        });
    });
}

const char* cuda_prepare(const Aggregation& aggregation, const Prepared& out, const CudaPlace& place) {
    return on_chip(place, [&](const Chip&) {
        const std::int64_t count = aggregation.batch * aggregation.time;
        const auto blocks = static_cast<unsigned>(
            std::max<std::int64_t>(1, (count + prepare::kTokensPerBlock - 1) / prepare::kTokensPerBlock));
        prepare::kernel<<<blocks, prepare::kThreads, 0, static_cast<cudaStream_t>(place.stream)>>>(aggregation, out);
        return cudaGetLastError();
    });
}

const char* cuda_scale(const void* values, DType dtype, void* out, DType out_dtype, std::int64_t count,
                       const float* factor, const CudaPlace& place) {
    return on_chip(place, [&](const Chip& chip) {
        return with_element(out_dtype, [&](auto element) {
            using Element = decltype(element);
            const auto kernel = dtype == out_dtype ? sweeps::scale_kernel<Element, Element>
                                                   : sweeps::scale_kernel<Float32Element, Element>;
            const int blocks = chip.processors * kThreadsPerProcessor / sweeps::kThreads;
            kernel<<<blocks, sweeps::kThreads, 0, static_cast<cudaStream_t>(place.stream)>>>(
                values, out, count, factor);
            return cudaGetLastError();
        });
    });
}

const char* cuda_most_blocks(int device, int* blocks) {
    Chip chip;
    const cudaError_t error = read_chip(device, chip);
    *blocks = chip.processors * kMostBlocksPerProcessor;
    return said(error);
}

const char* cuda_supports(int device) {
    return on_chip({device, nullptr}, [&](const Chip&) {
        cudaFuncAttributes attributes;
        return cudaFuncGetAttributes(&attributes, sweeps::scale_kernel<Float32Element, Float32Element>);
    });
}

}  // namespace epo
