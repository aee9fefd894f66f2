// Activations on the wire, in 8 or 4 bits. Compiled with every set of kernels; all of them, and bsns.compression.plain,
// give the same bits: no step of it may be fused or reordered.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "bsns_native.h"
#include "numbers.h"

namespace {
namespace codecs {

using namespace bsns;

constexpr int LANES = 16;
constexpr int INT8_BLOCK = 64, INT4_BLOCK = 32, DYNAMIC_BLOCK = 4096;
constexpr int MOST_ROTATED = 512;
constexpr float GREATEST[] = {3.4028234663852886e38f, 3.3895313892515355e38f};  // of float32, of bfloat16
constexpr uint16_t MOST_SCALE = 0x7f7f;  // bfloat16's greatest: of four bits, beyond 10^38, a larger one would be needed
constexpr float LARGE = 1.2676506002282294e30f;  // 2^100: beyond it a rotation might overflow
constexpr float SHRINK = 2.3283064365386963e-10f, GROW = 4294967296.0f;  // 2^-32, 2^32

inline int blocks_of(int columns, int block) { return (columns + block - 1) / block; }

// The nearest whole number, ties to even, of what is less than 2^22.
inline int32_t nearest(float value) {
    constexpr float SHIFT = 12582912.0f;
    return static_cast<int32_t>(to_bits(value + SHIFT)) - static_cast<int32_t>(to_bits(SHIFT));
}

inline float greatest(const float *numbers, int count) {
    float lanes[LANES] = {};
    int i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            const float size = std::fabs(numbers[i + lane]);
            lanes[lane] = size > lanes[lane] ? size : lanes[lane];
        }
    for (; i < count; i++) lanes[0] = std::fabs(numbers[i]) > lanes[0] ? std::fabs(numbers[i]) : lanes[0];
    float found = 0.0f;
    for (const float lane : lanes) found = lane > found ? lane : found;
    return found;
}

inline bool all_finite(const float *numbers, int count) {
    uint32_t bad = 0;
    for (int i = 0; i < count; i++) bad |= (to_bits(numbers[i]) & 0x7f800000u) == 0x7f800000u;
    return bad == 0;
}

// A scale as bfloat16, rounded up: no number then has a code beyond the last.
inline uint16_t scale_of(float absmax, float codes) {
    if (absmax == 0.0f) return 0;
    const uint32_t up = (to_bits(absmax / codes) + 0xffffu) >> 16;
    return static_cast<uint16_t>(up > 0 ? up : 1);
}

inline void load(const void *source, int32_t kind, int64_t first, int columns, float *row) {
    if (kind == BSNS_FLOAT32) {
        std::memcpy(row, static_cast<const float *>(source) + first, static_cast<size_t>(columns) * 4);
        return;
    }
    const auto *halves = static_cast<const uint16_t *>(source) + first;
    for (int i = 0; i < columns; i++) row[i] = from_bfloat16(halves[i]);
}

inline void store(const float *row, int32_t kind, int64_t first, int columns, void *target) {
    const float most = GREATEST[kind == BSNS_FLOAT32 ? 0 : 1];
    float *numbers = static_cast<float *>(target) + first;
    uint16_t *halves = static_cast<uint16_t *>(target) + first;
    for (int i = 0; i < columns; i++) {
        float value = row[i] < most ? row[i] : most;
        value = value > -most ? value : -most;
        if (kind == BSNS_FLOAT32)
            numbers[i] = value;
        else
            halves[i] = to_bfloat16(value);
    }
}

// Which columns are negated before a rotation, so that no plain pattern of them ends up in one number.
inline bool is_negated(uint32_t column) {
    uint32_t mixed = (column + 1) * 0x9e3779b1u;
    mixed ^= mixed >> 15;
    return ((mixed * 0x85ebca77u) >> 31) != 0;
}

// A step of the rotation within every LANES numbers: sums where bit HALF of the place is 0, differences where it is 1.
template <int HALF>
inline void within(float *numbers, int size) {
    for (int start = 0; start < size; start += LANES) {
        float to[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            const float own = numbers[start + lane];
            to[lane] = numbers[start + (lane ^ HALF)] + ((lane & HALF) != 0 ? -own : own);
        }
        std::memcpy(numbers + start, to, sizeof to);
    }
}

inline void hadamard(float *numbers, int size) {
    int half = 1;
    if (size >= LANES) {  // of few numbers at a time a compiler makes nothing
        within<1>(numbers, size);
        within<2>(numbers, size);
        within<4>(numbers, size);
        within<8>(numbers, size);
        half = LANES;
    }
    for (; half < size; half *= 2)
        for (int start = 0; start < size; start += 2 * half)
            for (int i = start; i < start + half; i++) {
                const float a = numbers[i], b = numbers[i + half];
                numbers[i] = a + b;
                numbers[i + half] = a - b;
            }
    float norm = 1.0f;
    for (int rest = size; rest > 1; rest /= 4) norm *= rest >= 4 ? 0.5f : 0.70710678118654752f;
    for (int i = 0; i < size; i++) numbers[i] *= norm;
}

// Rotate pieces whose sizes are powers of two, the largest first; its own inverse but for the signs' turn.
inline void rotate(float *row, int columns) {
    for (int start = 0; start < columns;) {
        int size = MOST_ROTATED;
        while (size > columns - start) size /= 2;
        hadamard(row + start, size);
        start += size;
    }
}

inline void flip(float *row, int columns) {
    for (int i = 0; i < columns; i++)
        if (is_negated(static_cast<uint32_t>(i))) row[i] = -row[i];
}

// The map of dynamic quantization (Dettmers et al. 2022): a sign, a decade, and the finer the greater the number.
struct Dynamic {
    float values[256];  // ascending
    float between[127];  // between the numbers from 0 on
    uint8_t first[0x3f81];  // for the upper half of a number's bits: how many of `between` lie below the least such

    Dynamic() {
        constexpr double DECADES[] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
        float sizes[128];
        int count = 0;
        sizes[count++] = 0.0f;
        for (int decade = 0, steps = 1; decade < 7; decade++, steps *= 2)
            for (int step = 0; step < steps; step++)
                sizes[count++] = static_cast<float>(DECADES[decade] * (0.1 + (step + 0.5) * 0.9 / steps));
        for (int i = 0; i < 127; i++) values[i] = -sizes[127 - i];
        for (int i = 0; i < 128; i++) values[127 + i] = sizes[i];
        values[255] = 1.0f;
        for (int i = 0; i < 127; i++)
            between[i] = static_cast<float>((static_cast<double>(sizes[i]) + static_cast<double>(sizes[i + 1])) / 2);
        int below = 0;
        for (uint32_t upper = 0; upper < 0x3f81; upper++) {
            while (below < 127 && between[below] < from_bits(upper << 16)) below++;
            first[upper] = static_cast<uint8_t>(below);
        }
    }
};

inline const Dynamic &dynamic() {
    static const Dynamic map;
    return map;
}

inline void encode_dynamic(const float *row, int columns, uint8_t *target) {
    const Dynamic &map = dynamic();
    const float top = static_cast<float>((static_cast<double>(map.values[254]) + 1.0) / 2);
    uint8_t *codes = target + 4 * blocks_of(columns, DYNAMIC_BLOCK);
    for (int start = 0; start < columns; start += DYNAMIC_BLOCK, target += 4) {
        const int count = columns - start < DYNAMIC_BLOCK ? columns - start : DYNAMIC_BLOCK;
        const float absmax = greatest(row + start, count);
        std::memcpy(target, &absmax, 4);
        for (int i = start; i < start + count; i++) {
            const float size = absmax > 0.0f ? std::fabs(row[i]) / absmax : 0.0f;
            int index = map.first[to_bits(size) >> 16];
            while (index < 127 && map.between[index] < size) index++;
            const bool negative = row[i] < 0.0f;
            if (!negative && top < size) index = 128;
            codes[i] = static_cast<uint8_t>(negative ? 127 - index : 127 + index);
        }
    }
}

inline bool decode_dynamic(const uint8_t *source, int columns, float *row) {
    const Dynamic &map = dynamic();
    const uint8_t *codes = source + 4 * blocks_of(columns, DYNAMIC_BLOCK);
    for (int start = 0; start < columns; start += DYNAMIC_BLOCK, source += 4) {
        const int count = columns - start < DYNAMIC_BLOCK ? columns - start : DYNAMIC_BLOCK;
        float absmax;
        std::memcpy(&absmax, source, 4);
        if (!all_finite(&absmax, 1) || absmax < 0.0f) return false;
        for (int i = start; i < start + count; i++) row[i] = map.values[codes[i]] * absmax;
    }
    return true;
}

// `grow`: what the scales are multiplied with once they are used, for a row that was shrunk.
inline void encode_blocks(const float *row, int columns, bool four, float grow, uint8_t *target) {
    const int block = four ? INT4_BLOCK : INT8_BLOCK;
    const float most = four ? 7.0f : 127.0f;
    uint8_t *codes = target + 2 * blocks_of(columns, block);
    if (four) std::memset(codes, 0, static_cast<size_t>(columns + 1) / 2);
    for (int start = 0; start < columns; start += block, target += 2) {
        const int count = columns - start < block ? columns - start : block;
        const uint16_t kept = scale_of(greatest(row + start, count), most);
        const float scale = from_bfloat16(kept);
        const uint16_t wanted = to_bfloat16(scale * grow);
        const uint16_t grown = wanted > MOST_SCALE ? MOST_SCALE : wanted;
        std::memcpy(target, &grown, 2);
        if (kept == 0) {
            if (four)
                for (int i = start; i < start + count; i++) codes[i / 2] |= static_cast<uint8_t>(8 << (i % 2 * 4));
            else
                std::memset(codes + start, 0, static_cast<size_t>(count));
        } else if (four) {
            uint8_t whole[INT4_BLOCK] = {};
            for (int i = 0; i < count; i++) whole[i] = static_cast<uint8_t>(nearest(row[start + i] / scale) + 8);
            for (int i = 0; i < (count + 1) / 2; i++)
                codes[start / 2 + i] = static_cast<uint8_t>(whole[2 * i] | whole[2 * i + 1] << 4);
        } else {
            for (int i = start; i < start + count; i++) codes[i] = static_cast<uint8_t>(nearest(row[i] / scale));
        }
    }
}

inline bool decode_blocks(const uint8_t *source, int columns, bool four, float shrink, float *row) {
    const int block = four ? INT4_BLOCK : INT8_BLOCK;
    const uint8_t *codes = source + 2 * blocks_of(columns, block);
    for (int start = 0; start < columns; start += block, source += 2) {
        const int count = columns - start < block ? columns - start : block;
        uint16_t kept;
        std::memcpy(&kept, source, 2);
        if ((kept & 0x8000u) != 0 || (kept & 0x7f80u) == 0x7f80u) return false;
        const float scale = from_bfloat16(kept) * shrink;
        if (four) {
            uint8_t whole[INT4_BLOCK];
            for (int i = 0; i < (count + 1) / 2; i++) {
                whole[2 * i] = codes[start / 2 + i] & 15;
                whole[2 * i + 1] = codes[start / 2 + i] >> 4;
            }
            for (int i = 0; i < count; i++) row[start + i] = static_cast<float>(static_cast<int>(whole[i]) - 8) * scale;
        } else
            for (int i = start; i < start + count; i++) row[i] = static_cast<float>(static_cast<int8_t>(codes[i])) * scale;
    }
    return true;
}

// Whether a scale of this row is so large that its numbers are rotated smaller.
inline bool is_large(const uint8_t *source, int blocks) {
    for (int i = 0; i < blocks; i++) {
        uint16_t kept;
        std::memcpy(&kept, source + 2 * i, 2);
        if (from_bfloat16(kept) > LARGE / 127.0f / 32.0f) return true;
    }
    return false;
}

inline bool is_rotated(int32_t codec) { return codec == BSNS_INT8_ROTATED || codec == BSNS_INT4_ROTATED; }
inline bool is_four(int32_t codec) { return codec == BSNS_INT4_ROTATED; }

inline int64_t row_bytes(int32_t codec, int columns) {
    if (codec == BSNS_INT8_DYNAMIC) return columns + 4 * blocks_of(columns, DYNAMIC_BLOCK);
    if (is_four(codec)) return (columns + 1) / 2 + 2 * blocks_of(columns, INT4_BLOCK);
    return columns + 2 * blocks_of(columns, INT8_BLOCK);
}

// The first row that is not finite, or -1; `row` has room for one.
int64_t encode(int32_t codec, int64_t rows, int columns, int32_t kind, const void *source, uint8_t *target, float *row) {
    for (int64_t r = 0; r < rows; r++, target += row_bytes(codec, columns)) {
        load(source, kind, r * columns, columns, row);
        if (!all_finite(row, columns)) return r;
        float grow = 1.0f;
        if (is_rotated(codec)) {
            flip(row, columns);
            if (greatest(row, columns) > LARGE) {
                grow = GROW;
                for (int i = 0; i < columns; i++) row[i] *= SHRINK;
            }
            rotate(row, columns);
        }
        if (codec == BSNS_INT8_DYNAMIC)
            encode_dynamic(row, columns, target);
        else
            encode_blocks(row, columns, is_four(codec), grow, target);
    }
    return -1;
}

// The first row whose scales are impossible, or -1.
int64_t decode(int32_t codec, int64_t rows, int columns, int32_t kind, const uint8_t *source, void *target, float *row) {
    for (int64_t r = 0; r < rows; r++, source += row_bytes(codec, columns)) {
        bool sound;
        if (codec == BSNS_INT8_DYNAMIC) {
            sound = decode_dynamic(source, columns, row);
        } else {
            const bool four = is_four(codec), rotated = is_rotated(codec);
            const bool large = rotated && is_large(source, blocks_of(columns, four ? INT4_BLOCK : INT8_BLOCK));
            sound = decode_blocks(source, columns, four, large ? SHRINK : 1.0f, row);
            if (sound && rotated) {
                rotate(row, columns);
                flip(row, columns);
                for (int i = 0; large && i < columns; i++) row[i] *= GROW;
            }
        }
        if (!sound) return r;
        store(row, kind, r * columns, columns, target);
    }
    return -1;
}

}  // namespace codecs
}  // namespace
