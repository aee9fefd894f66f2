// How a packed matrix lies in memory.
//
// Rows of the matrix (outputs) come in blocks of 16, two blocks to a pair, padded with zeros. Within a block, columns come
// in groups that fill 4 bytes (1 float32, 2 bfloat16, 4 int8), and the 16 rows' groups lie side by side in a line of 64
// bytes. One layout thus serves a vector of any width, the dot products of VNNI and NEON, and the tiles of AMX.
//
//   float32   [rows/16][columns][16]
//   bfloat16  [rows/16][columns/2][16][2]
//   int8      [rows/16][columns/4][16][4], then float scale[rows], int32 offset[rows]: 128 times the sum of a row
//   int4      [rows/16][columns/32][4][16][4]: the low half of byte line r holds line r of an int8 group of 32 columns,
//             the high half line r + 4, both plus 8; then uint8 factor[rows/16][columns/32][16], float scale[rows].
//             A weight is (half - 8) * factor * scale, so that (half - 8) * factor fits int8 and whole rows share a
//             scale ("progressive" quantisation, QServe, arXiv 2405.04532).
#pragma once

#include <cstddef>
#include <cstdint>

#include "bsns_native.h"

namespace bsns {

constexpr int BLOCK = 16;
constexpr int PAIR = 2 * BLOCK;
constexpr int LINE = 64;   // bytes
constexpr int GROUP = 32;  // columns that share a factor in int4

constexpr int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// A head's numbers, with zeros behind: whole tiles of bfloat16.
constexpr int64_t padded_head(int64_t size) { return padded(size, 32); }

// Bytes of one activation as it meets weights of a kind: int4 weights are multiplied with int8 activations.
constexpr int activation_bytes(int32_t kind) { return kind == BSNS_FLOAT32 ? 4 : kind == BSNS_BFLOAT16 ? 2 : 1; }

struct Layout {
    int64_t rows, columns;  // padded
    int64_t scales, offsets, factors;  // byte offsets from the start
    int64_t block_bytes;  // of the weights of 16 rows
    int64_t bytes;
};

inline Layout layout_of(int32_t kind, int64_t rows, int64_t columns) {
    Layout at{};
    at.rows = padded(rows, PAIR);
    at.columns = padded(columns, LINE / activation_bytes(kind));
    const int64_t halves = kind == BSNS_INT4 ? 1 : 2 * activation_bytes(kind);  // half bytes of a weight
    at.block_bytes = BLOCK * at.columns * halves / 2;
    int64_t end = at.rows / BLOCK * at.block_bytes;
    if (kind == BSNS_INT4) {
        at.factors = end;
        end = padded(end + at.rows * at.columns / GROUP, LINE);
    }
    if (kind == BSNS_INT8 || kind == BSNS_INT4) {
        at.scales = end;
        end += at.rows * 4;
    }
    if (kind == BSNS_INT8) {
        at.offsets = end;
        end += at.rows * 4;
    }
    at.bytes = padded(end, LINE);
    return at;
}

// A matrix with its parts found.
struct Matrix {
    int32_t kind = 0;
    int32_t rows = 0, columns = 0;  // real ones
    int32_t padded_rows = 0, padded_columns = 0;
    int64_t block_bytes = 0;
    const uint8_t *weights = nullptr;
    const float *scales = nullptr;
    const int32_t *offsets = nullptr;
    const uint8_t *factors = nullptr;

    Matrix() = default;
    explicit Matrix(const bsns_matrix &from) : kind(from.kind), rows(from.rows), columns(from.columns) {
        const Layout at = layout_of(kind, rows, columns);
        padded_rows = static_cast<int32_t>(at.rows);
        padded_columns = static_cast<int32_t>(at.columns);
        block_bytes = at.block_bytes;
        weights = static_cast<const uint8_t *>(from.data);
        scales = reinterpret_cast<const float *>(weights + at.scales);
        offsets = reinterpret_cast<const int32_t *>(weights + at.offsets);
        factors = weights + at.factors;
    }

    const uint8_t *block(int64_t index) const { return weights + index * block_bytes; }
    const uint8_t *block_factors(int64_t index) const { return factors + index * (padded_columns / GROUP) * BLOCK; }
    int pairs() const { return padded_rows / PAIR; }
};

}  // namespace bsns
