// bfloat16 of CUDA, for the emulator.
#pragma once

#include <cmath>

#include "cuda_runtime.h"

struct __nv_bfloat16 {
    std::uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    if (std::isnan(x)) return {0x7fff};
    const unsigned bits = __float_as_uint(x);
    return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
    return __floats2bfloat162_rn(std::fmax(__bfloat162float(a.x), __bfloat162float(b.x)),
                                 std::fmax(__bfloat162float(a.y), __bfloat162float(b.y)));
}
