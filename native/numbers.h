// Between float32 and the shorter floating-point kinds, one number at a time.
#pragma once

#include <cstdint>
#include <cstring>

namespace bsns {

static inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

static inline float from_bfloat16(uint16_t half) { return from_bits(static_cast<uint32_t>(half) << 16); }

// Rounds to the nearest, ties to even; NaN stays NaN.
static inline uint16_t to_bfloat16(float value) {
    uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    bits += 0x7fffu + ((bits >> 16) & 1u);
    return static_cast<uint16_t>(bits >> 16);
}

static inline float from_float16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t exponent = (half >> 10) & 0x1fu, fraction = half & 0x3ffu;
    if (exponent == 31) return from_bits(sign | 0x7f800000u | (fraction << 13));
    if (exponent == 0) {  // zero or subnormal: the fraction in units of 2^-24
        const float value = static_cast<float>(fraction) * 5.9604644775390625e-8f;
        return from_bits(to_bits(value) | sign);
    }
    return from_bits(sign | ((exponent + 112) << 23) | (fraction << 13));
}

}  // namespace bsns
