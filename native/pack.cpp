// Packing weights: see matrix.h for where each number goes.
#include <algorithm>
#include <cmath>
#include <vector>

#include "matrix.h"
#include "numbers.h"
#include "pack.h"

namespace bsns {

namespace {

float number_at(const bsns_source &source, int64_t index) {
    if (source.kind == BSNS_FLOAT32) {
        float value;
        std::memcpy(&value, static_cast<const uint8_t *>(source.data) + index * 4, 4);
        return value;
    }
    uint16_t half;
    std::memcpy(&half, static_cast<const uint8_t *>(source.data) + index * 2, 2);
    return source.kind == BSNS_BFLOAT16 ? from_bfloat16(half) : from_float16(half);
}

// One row in float32, its columns where the matrix has them. False if a number is not finite.
bool read_row(const bsns_source &source, int64_t row, int32_t segment, int32_t padded_segment, std::vector<float> &into) {
    std::fill(into.begin(), into.end(), 0.0f);
    float poison = 0;
    for (int64_t start = 0, to = 0; start < source.columns; start += segment, to += padded_segment) {
        const int64_t end = std::min<int64_t>(start + segment, source.columns);
        float *out = into.data() + to;
        const int64_t at = row * source.row_stride;
        for (int64_t c = start; c < end; c++) {
            const float value = number_at(source, at + c * source.column_stride);
            poison += value * 0.0f;
            out[c - start] = value;
        }
    }
    return poison == 0;
}

float largest(const float *from, int64_t count) {
    float most = 0;
    for (int64_t i = 0; i < count; i++) most = std::max(most, std::fabs(from[i]));
    return most;
}

void pack_int8(const std::vector<float> &row, uint8_t *block, int lane, float *scale, int32_t *offset) {
    const auto columns = static_cast<int64_t>(row.size());
    const float most = largest(row.data(), columns);
    const float inverse = most > 0 ? 127.0f / most : 0.0f;
    int32_t total = 0;
    for (int64_t c = 0; c < columns; c++) {
        const auto whole = static_cast<int32_t>(std::lrintf(row[static_cast<size_t>(c)] * inverse));
        total += whole;
        block[c / 4 * LINE + lane * 4 + c % 4] = static_cast<uint8_t>(static_cast<int8_t>(whole));
    }
    scale[lane] = most / 127.0f;
    offset[lane] = 128 * total;
}

int half_of(float value, float inverse) { return std::clamp(static_cast<int>(std::lrintf(value * inverse)) + 8, 0, 15); }

// The factor with which a group's numbers are kept best: a smaller one cuts the largest number, and rounds the others less.
int best_factor(const float *from, float unit, float steps) {
    if (unit <= 0) return 1;
    const int reaching = std::clamp(static_cast<int>(std::lrintf(largest(from, GROUP) / steps / unit)), 1, 15);
    int best = reaching;
    float least = INFINITY;
    for (int factor = std::max(1, reaching * 2 / 3); factor <= std::min(15, reaching + 1); factor++) {
        const float step = unit * static_cast<float>(factor), inverse = 1.0f / step;
        float error = 0;
        for (int c = 0; c < GROUP; c++) {
            const float off = static_cast<float>(half_of(from[c], inverse) - 8) * step - from[c];
            error += off * off;
        }
        if (error < least) {
            least = error;
            best = factor;
        }
    }
    return best;
}

void pack_int4(const std::vector<float> &row, uint8_t *block, int lane, uint8_t *factors, float *scale) {
    const auto groups = static_cast<int64_t>(row.size()) / GROUP;
    constexpr float STEPS = 7.5f;  // halves reach from -8 to 7
    const float unit = largest(row.data(), static_cast<int64_t>(row.size())) / STEPS / 15.0f;
    scale[lane] = unit;
    for (int64_t group = 0; group < groups; group++) {
        const float *from = row.data() + group * GROUP;
        const int factor = best_factor(from, unit, STEPS);
        factors[group * BLOCK + lane] = static_cast<uint8_t>(factor);
        const float inverse = unit > 0 ? 1.0f / (unit * static_cast<float>(factor)) : 0.0f;
        for (int c = 0; c < GROUP; c++) {
            const int half = half_of(from[c], inverse), line = c / 4;
            uint8_t &byte = block[group * 4 * LINE + line % 4 * LINE + lane * 4 + c % 4];
            byte = static_cast<uint8_t>(line < 4 ? (byte & 0xf0) | half : (byte & 0x0f) | half << 4);
        }
    }
}

}  // namespace

bool pack_rows(
    const bsns_matrix &into, const bsns_source &source, int32_t first, int32_t step, int32_t segment, int32_t padded_segment
) {
    const Layout at = layout_of(into.kind, into.rows, into.columns);
    auto *memory = static_cast<uint8_t *>(into.data);
    std::vector<float> row(static_cast<size_t>(at.columns));
    for (int32_t i = 0; i < source.count; i++) {
        if (!read_row(source, i, segment, padded_segment, row)) return false;
        const int64_t to = first + int64_t{16} * step * (i / 16) + i % 16;
        const int64_t index = to / BLOCK;
        const int lane = static_cast<int>(to % BLOCK);
        uint8_t *block = memory + index * at.block_bytes;
        auto *scale = reinterpret_cast<float *>(memory + at.scales) + index * BLOCK;
        if (into.kind == BSNS_FLOAT32) {
            for (int64_t c = 0; c < at.columns; c++)
                std::memcpy(block + c * LINE + lane * 4, &row[static_cast<size_t>(c)], 4);
        } else if (into.kind == BSNS_BFLOAT16) {
            for (int64_t c = 0; c < at.columns; c++) {
                const uint16_t half = to_bfloat16(row[static_cast<size_t>(c)]);
                std::memcpy(block + c / 2 * LINE + lane * 4 + c % 2 * 2, &half, 2);
            }
        } else if (into.kind == BSNS_INT8) {
            pack_int8(row, block, lane, scale, reinterpret_cast<int32_t *>(memory + at.offsets) + index * BLOCK);
        } else {
            uint8_t *factors = memory + at.factors + index * (at.columns / GROUP) * BLOCK;
            pack_int4(row, block, lane, factors, scale);
        }
    }
    return true;
}

void unpack_rows(const bsns_matrix &from, float *into) {
    const Matrix matrix(from);
    for (int64_t r = 0; r < matrix.rows; r++) {
        const uint8_t *block = matrix.block(r / BLOCK);
        const int64_t lane = r % BLOCK;
        for (int64_t c = 0; c < matrix.columns; c++) {
            float &out = into[r * matrix.columns + c];
            if (matrix.kind == BSNS_FLOAT32) {
                std::memcpy(&out, block + c * LINE + lane * 4, 4);
            } else if (matrix.kind == BSNS_BFLOAT16) {
                uint16_t half;
                std::memcpy(&half, block + c / 2 * LINE + lane * 4 + c % 2 * 2, 2);
                out = from_bfloat16(half);
            } else if (matrix.kind == BSNS_INT8) {
                out = static_cast<float>(static_cast<int8_t>(block[c / 4 * LINE + lane * 4 + c % 4])) * matrix.scales[r];
            } else {
                const int64_t group = c / GROUP, line = c % GROUP / 4;
                const int byte = block[group * 4 * LINE + line % 4 * LINE + lane * 4 + c % 4];
                const int half = line < 4 ? byte & 15 : byte >> 4;
                const int factor = matrix.block_factors(r / BLOCK)[group * BLOCK + lane];
                out = static_cast<float>((half - 8) * factor) * matrix.scales[r];
            }
        }
    }
}

}  // namespace bsns
