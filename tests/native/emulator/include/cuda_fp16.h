// float16 of CUDA, for the emulator.
#pragma once

#include "cuda_runtime.h"

struct __half {
    std::uint16_t bits;
};
struct alignas(4) __half2 {
    __half x, y;
};

inline float __half2float(__half x) { return emulator::half_to_float(x.bits); }
inline __half __float2half_rn(float x) { return {emulator::float_to_half(x)}; }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
