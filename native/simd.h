// Sixteen numbers at a time, on vectors of any width: one register of AVX-512, two of AVX2, four of NEON or SSE.
//
// Included by kernels.cpp alone, which is compiled once for each set of instructions; everything here is therefore in an
// unnamed namespace, lest the linker takes a function compiled for a processor that is not there.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define BSNS_INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PARTS = 16 / LANES;

typedef float Vf __attribute__((vector_size(LANES * 4)));
typedef int32_t Vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t Vu __attribute__((vector_size(LANES * 4)));

struct Floats {
    Vf part[PARTS];
};
struct Ints {
    Vi part[PARTS];
};

#define BSNS_EACH for (int i = 0; i < PARTS; i++)

BSNS_INLINE Vf fused(Vf a, Vf b, Vf c) {  // a * b + c
#if defined(__AVX512F__)
    return (Vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (Vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

BSNS_INLINE Floats splat(float value) {  // not Vf{} + value, which adds, because of -0
    Floats out;
#if defined(__AVX512F__)
    out.part[0] = (Vf)_mm512_set1_ps(value);
#elif defined(__AVX2__)
    BSNS_EACH out.part[i] = (Vf)_mm256_set1_ps(value);
#else
    BSNS_EACH out.part[i] = Vf{value, value, value, value};
#endif
    return out;
}
BSNS_INLINE Ints splat_int(int32_t value) {
    Ints out;
    BSNS_EACH out.part[i] = Vi{} + value;
    return out;
}
BSNS_INLINE Floats load(const float *at) {
    Floats out;
    std::memcpy(&out, at, sizeof out);
    return out;
}
BSNS_INLINE void store(float *at, Floats value) { std::memcpy(at, &value, sizeof value); }
BSNS_INLINE Ints load_line(const void *at) {
    Ints out;
    std::memcpy(&out, at, sizeof out);
    return out;
}
BSNS_INLINE void store_line(void *at, Ints value) { std::memcpy(at, &value, sizeof value); }

BSNS_INLINE Floats fma(Floats a, Floats b, Floats c) {
    BSNS_EACH c.part[i] = fused(a.part[i], b.part[i], c.part[i]);
    return c;
}
BSNS_INLINE Floats operator+(Floats a, Floats b) {
    BSNS_EACH a.part[i] += b.part[i];
    return a;
}
BSNS_INLINE Floats operator-(Floats a, Floats b) {
    BSNS_EACH a.part[i] -= b.part[i];
    return a;
}
BSNS_INLINE Floats operator*(Floats a, Floats b) {
    BSNS_EACH a.part[i] *= b.part[i];
    return a;
}
BSNS_INLINE Floats operator/(Floats a, Floats b) {
    BSNS_EACH a.part[i] /= b.part[i];
    return a;
}
BSNS_INLINE Ints operator+(Ints a, Ints b) {
    BSNS_EACH a.part[i] += b.part[i];
    return a;
}
BSNS_INLINE Ints operator-(Ints a, Ints b) {
    BSNS_EACH a.part[i] -= b.part[i];
    return a;
}
BSNS_INLINE Ints operator*(Ints a, Ints b) {
    BSNS_EACH a.part[i] *= b.part[i];
    return a;
}
BSNS_INLINE Ints operator&(Ints a, Ints b) {
    BSNS_EACH a.part[i] &= b.part[i];
    return a;
}
BSNS_INLINE Ints operator^(Ints a, Ints b) {
    BSNS_EACH a.part[i] ^= b.part[i];
    return a;
}
BSNS_INLINE Ints operator|(Ints a, Ints b) {
    BSNS_EACH a.part[i] |= b.part[i];
    return a;
}
BSNS_INLINE Ints shift_left(Ints a, int bits) {
    BSNS_EACH a.part[i] = (Vi)((Vu)a.part[i] << bits);
    return a;
}
BSNS_INLINE Ints shift_right(Ints a, int bits) {  // zeros come in
    BSNS_EACH a.part[i] = (Vi)((Vu)a.part[i] >> bits);
    return a;
}
BSNS_INLINE Ints shift_right_signed(Ints a, int bits) {
    BSNS_EACH a.part[i] = a.part[i] >> bits;
    return a;
}
BSNS_INLINE Floats as_floats(Ints a) {
    Floats out;
    BSNS_EACH out.part[i] = (Vf)a.part[i];
    return out;
}
BSNS_INLINE Ints as_ints(Floats a) {
    Ints out;
    BSNS_EACH out.part[i] = (Vi)a.part[i];
    return out;
}
BSNS_INLINE Floats to_floats(Ints a) {
    Floats out;
    BSNS_EACH out.part[i] = __builtin_convertvector(a.part[i], Vf);
    return out;
}
BSNS_INLINE Floats max(Floats a, Floats b) {  // b where either is NaN
#if defined(__AVX512F__)
    a.part[0] = (Vf)_mm512_max_ps((__m512)a.part[0], (__m512)b.part[0]);
#elif defined(__AVX2__)
    BSNS_EACH a.part[i] = (Vf)_mm256_max_ps((__m256)a.part[i], (__m256)b.part[i]);
#else
    BSNS_EACH a.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
#endif
    return a;
}
BSNS_INLINE Floats min(Floats a, Floats b) {  // b where either is NaN
    BSNS_EACH a.part[i] = a.part[i] < b.part[i] ? a.part[i] : b.part[i];
    return a;
}
// All bits set where a is at least b.
BSNS_INLINE Ints at_least(Floats a, Floats b) {
    Ints out;
    BSNS_EACH out.part[i] = (Vi)(a.part[i] >= b.part[i]);
    return out;
}
// a, and zero where `mask` has all bits set.
BSNS_INLINE Floats without(Floats a, Ints mask) {
    BSNS_EACH a.part[i] = (Vf)((Vi)a.part[i] & ~mask.part[i]);
    return a;
}
BSNS_INLINE bool any(Ints a) {
    Vi all = a.part[0];
    for (int i = 1; i < PARTS; i++) all |= a.part[i];
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)all, (__m512i)all) != 0;
#else
    int32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= all[i];
    return bits != 0;
#endif
}
BSNS_INLINE Floats absolute(Floats a) { return as_floats(as_ints(a) & splat_int(0x7fffffff)); }

// The first and second of the two bfloat16 numbers in each lane.
BSNS_INLINE Floats low_half(Ints line) { return as_floats(shift_left(line, 16)); }
BSNS_INLINE Floats high_half(Ints line) { return as_floats(line & splat_int(static_cast<int32_t>(0xffff0000u))); }
// One of the four int8 in each lane.
BSNS_INLINE Floats byte_of(Ints line, int number) {
    return to_floats(shift_right_signed(shift_left(line, 24 - 8 * number), 24));
}

// Adds in one fixed order, whatever the width.
BSNS_INLINE float sum(Floats a) {
    float lane[16];
    store(lane, a);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}
BSNS_INLINE float greatest(Floats a) {
    float lane[16];
    store(lane, a);
    float most = lane[0];
    for (int i = 1; i < 16; i++) most = lane[i] > most ? lane[i] : most;
    return most;
}

// To the nearest integer, ties to even; |a| below 2^22.
BSNS_INLINE Ints nearest(Floats a) {
    constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: its last bit stands for 1
    return as_ints(a + splat(MAGIC)) - splat_int(0x4b400000);
}

// Within 2 units in the last place where the result is normal; 0 below -87.3, NaN stays NaN.
BSNS_INLINE Floats exponential(Floats x) {
    const Floats clamped = min(splat(88.0f), max(splat(-87.3f), x));  // in this order NaN is handed on
    const Ints whole = nearest(clamped * splat(1.44269504f));
    const Floats n = to_floats(whole);
    Floats rest = fma(n, splat(-0.693359375f), clamped);
    rest = fma(n, splat(2.12194440e-4f), rest);
    Floats series = splat(1.9875691500e-4f);  // Cephes expf
    series = fma(series, rest, splat(1.3981999507e-3f));
    series = fma(series, rest, splat(8.3334519073e-3f));
    series = fma(series, rest, splat(4.1665795894e-2f));
    series = fma(series, rest, splat(1.6666665459e-1f));
    series = fma(series, rest, splat(5.0000001201e-1f));
    series = fma(series * rest, rest, rest + splat(1.0f));
    const Floats power = as_floats(shift_left(whole + splat_int(127), 23));
    return series * power;
}

BSNS_INLINE void prefetch(const void *at) { __builtin_prefetch(at, 0, 3); }

}  // namespace
