// Vectors of float32 for cpu_sweeps.cpp, with the compiler's vector extensions (GCC, Clang): one source for every
// width. Everything has internal linkage, because it is compiled with different instruction sets into one library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about its own header if an intrinsic leaves lanes undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "rows.h"

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef std::uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * kWidth)));

inline Floats splat(float x) { return Floats{} + x; }

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// The larger; b if either is NaN. One instruction, whereas the compiler generates two for the expression.
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return bits<Floats>(_mm512_max_ps(bits<__m512>(a), bits<__m512>(b)));
#elif defined(__AVX2__)
    return bits<Floats>(_mm256_max_ps(bits<__m256>(a), bits<__m256>(b)));
#else
    return a > b ? a : b;
#endif
}

// e^x to about 1 ulp. It is 0 below -104; between there and -87.3, where float32 has only subnormal numbers, it may be
// 0 too. NaN stays NaN. x <= 88.
inline Floats exp(Floats x) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    const Floats shifted = x * 1.44269504f + kMagic;
    const Floats n = shifted - kMagic;
    Floats r = x - n * 0.693145752f;  // ln 2 in two parts, the first exact in products with |n| < 2^10
    r = r - n * 1.42860677e-6f;
    // e^r = 1 + r + r² q(r), q fitted to |r| <= ln 2 / 2 with a relative error of 3e-9 in e^r.
    Floats q = r * 0.00138145395f + 0.00836874545f;
    q = q * r + 0.0416683890f;
    q = q * r + 0.166665211f;
    q = q * r + 0.499999940f;
    const Floats power = (q * r) * r + r + 1.0f;
#if defined(__AVX512F__)
    return bits<Floats>(_mm512_scalef_ps(bits<__m512>(power), bits<__m512>(n)));
#else
    const Floats result = bits<Floats>(bits<Words>(power) + (bits<Words>(shifted) << 23));
    const Floats kept = x == x ? result : x;  // adding to the exponent bits can turn NaN into a number
    return x < -87.3f ? splat(0.0f) : kept;
#endif
}

// tanh to about 2 ulp, odd; NaN stays NaN.
inline Floats tanh(Floats x) {
    const Floats magnitude = x < 0.0f ? -x : x;
    const Floats square = x * x;
    // Near 0: x + x³ q(x²), fitted to |x| <= 0.63 with a relative error of 5e-9.
    Floats q = square * -0.00566690043f + 0.0206061099f;
    q = q * square - 0.0537299886f;
    q = q * square + 0.133313313f;
    q = q * square - 0.333332777f;
    const Floats small = x + x * square * q;
    const Floats capped = magnitude > 10.0f ? splat(10.0f) : magnitude;  // there tanh is 1
    const Floats large = 1.0f - 2.0f / (exp(2.0f * capped) + 1.0f);
    const Floats signed_large = x < 0.0f ? -large : large;
    return magnitude < 0.625f ? small : signed_large;
}

// ---------------------------------------------------------------------------------------------------------------------
// Elements in memory: load() and store() of kWidth of them, and stream(), a streaming store of kWidth.

template <class T>
inline T read(const void* address) {
    T value;
    std::memcpy(&value, address, sizeof value);
    return value;
}

template <class T>
inline void write(void* address, T value) {
    std::memcpy(address, &value, sizeof value);
}

// Streaming store; the address must be aligned to the vector.
template <class T>
inline void write_past(void* address, T value) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 64) return _mm512_stream_si512(static_cast<__m512i*>(address), bits<__m512i>(value));
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
    if constexpr (sizeof(T) == 32) return _mm256_stream_si256(static_cast<__m256i*>(address), bits<__m256i>(value));
    if constexpr (sizeof(T) == 16) return _mm_stream_si128(static_cast<__m128i*>(address), bits<__m128i>(value));
#endif
    write(address, value);
}

// Between 16 and 32 bits; the compiler's own conversion takes twice as many instructions.
inline Words widen(Halves x) {
#if defined(__AVX512F__)
    return bits<Words>(_mm512_cvtepu16_epi32(bits<__m256i>(x)));
#elif defined(__AVX2__)
    return bits<Words>(_mm256_cvtepu16_epi32(bits<__m128i>(x)));
#else
    return __builtin_convertvector(x, Words);
#endif
}

inline Halves narrow(Words x) {  // x < 2^16
#if defined(__AVX512F__)
    return bits<Halves>(_mm512_cvtepi32_epi16(bits<__m512i>(x)));
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_packus_epi32(bits<__m256i>(x), bits<__m256i>(x));
    return bits<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
#else
    return __builtin_convertvector(x, Halves);
#endif
}

// The upper 16 bits of each.
inline Halves upper_halves(Words x) {
#if defined(__AVX512F__)
    alignas(64) static constexpr std::uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                           23, 25, 27, 29, 31, 1,  3,  5,  7,  9,  11,
                                                           13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    const __m512i odd = _mm512_load_si512(kOdd);
    return bits<Halves>(_mm512_castsi512_si256(_mm512_permutexvar_epi16(odd, bits<__m512i>(x))));
#else
    return narrow(x >> 16);
#endif
}

struct Float32 {
    static constexpr int size = 4;
    static Floats load(const void* x) { return read<Floats>(x); }
    static Floats round(Floats x) { return x; }
};

struct BFloat16 {
    static constexpr int size = 2;
    static Floats load(const void* x) { return bits<Floats>(widen(read<Halves>(x)) << 16); }
    static Halves round(Floats x) {  // to nearest, ties to even; NaN quiet
        const Words raw = bits<Words>(x);
        const Words rounded = raw + 0x7fffu + ((raw >> 16) & 1u);
        return upper_halves(x == x ? rounded : raw | 0x400000u);
    }
};

struct Float16 {
    static constexpr int size = 2;
#if defined(__AVX512F__)
    static Floats load(const void* x) { return bits<Floats>(_mm512_cvtph_ps(bits<__m256i>(read<Halves>(x)))); }
    static Halves round(Floats x) {
        return bits<Halves>(_mm512_cvtps_ph(bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
#elif defined(__AVX2__)  // compiled with F16C
    static Floats load(const void* x) { return bits<Floats>(_mm256_cvtph_ps(bits<__m128i>(read<Halves>(x)))); }
    static Halves round(Floats x) {
        return bits<Halves>(_mm256_cvtps_ph(bits<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
#else
    static Floats load(const void* x) {
        const Words half = widen(read<Halves>(x));
        const Words sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
        // With exponent and mantissa at float32's positions, the value is the number divided by 2^112; one product
        // makes it exact, also for subnormal numbers.
        const Floats finite = bits<Floats>(magnitude << 13) * 5.192296858534828e33f;
        const Words infinite = (magnitude << 13) | 0x7f800000u;
        return bits<Floats>((magnitude >= 0x7c00u ? infinite : bits<Words>(finite)) | sign);
    }
    static Halves round(Floats x) {
        const Words raw = bits<Words>(x), sign = (raw >> 16) & 0x8000u, magnitude = raw & 0x7fffffffu;
        const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        // Below 2^-14 float32's own addition does the rounding, to multiples of 2^-24 = the last bit of 0.5.
        const Words subnormal = bits<Words>(bits<Floats>(magnitude) + 0.5f) - 0x3f000000u;
        Words result = magnitude < 0x38800000u ? subnormal : normal;
        result = magnitude >= 0x477ff000u ? Words{} + 0x7c00u : result;
        result = magnitude > 0x7f800000u ? Words{} + 0x7e00u : result;
        return narrow(result | sign);
    }
#endif
};

}  // namespace
