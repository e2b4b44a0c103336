// What csrc's sources use of CUDA C++ and its runtime, for the emulator. Included before anything else.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "device.h"

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)

// ---------------------------------------------------------------------------------------------------------------------
// Threads, warps and blocks

// Objects and no macros, since a launch's configuration has fields of the same names.
#define EMULATOR_INDEX(name, index)                                       \
    inline constexpr struct {                                             \
        struct {                                                          \
            operator unsigned() const { return ::emulator::index(); }   \
        } x;                                                              \
    } name {}
EMULATOR_INDEX(threadIdx, thread_index);
EMULATOR_INDEX(blockIdx, block_index);
EMULATOR_INDEX(blockDim, block_size);
EMULATOR_INDEX(gridDim, grid_size);
#undef EMULATOR_INDEX

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_PLACE) { emulator::sync_warp(mask, place); }
inline void __syncthreads(EMULATOR_PLACE) { emulator::sync_threads(place); }
inline void __threadfence(EMULATOR_PLACE) { emulator::thread_fence(place); }

inline unsigned __ballot_sync(unsigned mask, bool vote, EMULATOR_PLACE) {
    return emulator::ballot(mask, vote, place);
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, EMULATOR_PLACE) {
    return emulator::from_bits<T>(emulator::shuffle(mask, emulator::to_bits(value), lane & 31, place));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, EMULATOR_PLACE) {
    return emulator::from_bits<T>(
        emulator::shuffle(mask, emulator::to_bits(value), emulator::lane_index() ^ lanes, place));
}

inline int atomicAdd(int* at, int value, EMULATOR_PLACE) { return emulator::atomic_add(at, value, place); }

// ---------------------------------------------------------------------------------------------------------------------
// Numbers and memory

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};

inline unsigned __float_as_uint(float x) { return emulator::from_bits<unsigned>(emulator::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return emulator::from_bits<float>(emulator::to_bits(x)); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

template <class T>
inline T __ldcg(const T* at) {
    return *at;
}
template <class T>
inline void __stcs(T* at, const T& value) {
    *at = value;
}

inline std::size_t __cvta_generic_to_shared(const void* at) { return emulator::shared_offset(at); }
inline std::size_t __cvta_generic_to_global(const void* at) { return reinterpret_cast<std::size_t>(at); }

// ---------------------------------------------------------------------------------------------------------------------
// The runtime

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorNotSupported = 801,
                      cudaErrorInvalidClusterSize = 912;

using dim3 = emulator::Index;

enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrComputeCapabilityMajor
};

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    const emulator::Chip& chip = emulator::chip();
    *value = which == cudaDevAttrMultiProcessorCount            ? chip.processors
             : which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? chip.shared_bytes
                                                                : chip.major;
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return emulator::take_error(); }
inline const char* cudaGetErrorString(cudaError_t error) { return emulator::error_text(error); }

struct cudaFuncAttributes {};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int bytes) {
    return bytes <= emulator::chip().shared_bytes ? cudaSuccess : cudaErrorInvalidConfiguration;
}

enum { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
    int id;
    struct {
        dim3 clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    int numAttrs;
};
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t* config) {
    const int kReserved = 1024, blocks = (emulator::chip().shared_bytes + kReserved) /
                                         (static_cast<int>(config->dynamicSmemBytes) + kReserved);
    *clusters = emulator::chip().processors * blocks / static_cast<int>(config->attrs->val.clusterDim.x);
    return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
    emulator::launch(kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream,
                     config->attrs->val.clusterDim.x)(arguments...);
    return emulator::take_error();
}
