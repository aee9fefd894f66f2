// The port to the kernels: what a set of them computes. kernels.cpp is compiled once for each set of instructions.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace bsns {

// What a thread brings along.
struct Worker {
    uint8_t *scratch = nullptr;
};

struct Outlier {
    uint32_t column;
    float value;
};

// Activations ready to be multiplied, in the kind the weights want: panels of up to 16 rows, and within a panel lines of
// 64 bytes, row beside row. A row alone is thus plain, and 16 rows are a tile's worth.
struct Rows {
    int32_t count = 0;
    int32_t columns = 0;  // padded
    int32_t kind = 0;  // of the weights
    uint8_t *data = nullptr;
    float *scales = nullptr;  // int8: what a row's numbers stand for
    Outlier *outliers = nullptr;  // int8: what is not among them; up to `columns` a row
    int32_t *outlier_counts = nullptr;
    int32_t *group_sums = nullptr;  // int4: -8 times the sum of each group of a row

    int64_t row_bytes() const { return static_cast<int64_t>(columns) * activation_bytes(kind); }
    int panel_rows(int panel) const { return count - panel * BLOCK < BLOCK ? count - panel * BLOCK : BLOCK; }
    uint8_t *panel(int index) const { return data + index * BLOCK * row_bytes(); }
};

constexpr int NO_NORM = -1;

// From float32 to rows that can be multiplied, through a norm.
struct Prepare {
    const float *input;  // rows of a stride that is a multiple of 64
    int64_t stride;
    const int32_t *from;  // which input row each is, or null: the same
    int32_t columns;
    int32_t norm;  // bsns_norm_kind or NO_NORM
    const float *weight, *bias;
    float epsilon;
    float outlier;
    Rows rows;
};

enum class Finish { STORE, ADD, ACTIVATE, GATE };

// y = W x for 32 rows of W at a time, and what becomes of the result.
struct Multiply {
    Matrix matrix;
    Rows rows;
    float *output;
    int64_t stride;
    Finish finish;  // ADD: output += result; GATE: output = activation(first 16) * last 16
    int32_t activation;
    const float *bias;
    const int32_t *to;  // which output row each is, or null: the same
    const float *weights;  // what each row's result is multiplied with, or null
};

// One layer's cache of one session. Keys in blocks of 16 tokens, as the rows of a packed matrix; values as the columns of
// one: [tokens/16][size/n][16][n] and [tokens/n][size][n], n being 1, 2 and 4 numbers of float32, bfloat16 and int8.
struct Cache {
    uint8_t *keys, *values;  // of the first head
    int64_t head_bytes;  // from head to head, of keys and of values
    float *key_scales, *value_scales;  // int8: per token
    int64_t head_scales;  // from head to head
    int32_t kind;
};

// Queries, keys and values of one row.
struct Place {
    float *qkv;
    const float *cosines, *sines;  // rotary_size / 2
    Cache cache;
    int32_t position;
};

struct Heads {
    int32_t heads, kv_heads, size, padded_size;
    int32_t rotary_size;
    const float *query_norm, *key_norm;
    float epsilon, scale;
    int32_t window;
};

// Attention of the query heads that share one key head, for a few rows of one session.
constexpr int ATTEND_ROWS = 8;
struct Attend {
    Heads heads;
    Cache cache;
    const float *queries;  // of the first row
    int64_t stride;
    float *output;  // of the first row: heads * padded_size
    int64_t output_stride;
    int32_t position, rows, kv_head;
};

struct Kernels {
    const char *name;
    bool (*supported)();
    // Set the thread's way of computing (denormals are zero) and say what it was.
    uint32_t (*enter)();
    void (*leave)(uint32_t mode);
    void (*prepare)(const Prepare &, int row);
    void (*multiply)(const Multiply &, int first_pair, int end_pair);
    void (*place)(const Place &, const Heads &);
    void (*attend)(const Attend &, Worker &);
    void (*normalize_add)(const Prepare &, int row, float *output);  // output += norm(input)
    void (*convert)(const void *input, int32_t kind, float *output, int64_t count);
    void (*restore)(const float *input, int32_t kind, void *output, int64_t count);
    // Codecs: the first row that cannot be taken, or -1; `row` has room for one in float32.
    int64_t (*encode)(int32_t codec, int64_t rows, int columns, int32_t kind, const void *source, uint8_t *target, float *row);
    int64_t (*decode)(int32_t codec, int64_t rows, int columns, int32_t kind, const uint8_t *source, void *target, float *row);
    int64_t (*encoded_bytes)(int32_t codec, int columns);  // of a row
    float (*read)(const uint8_t *from, int64_t bytes, bool many);  // a multiple of 8 lines
};

// Bytes of a thread's scratch that attend needs: scores of the queries it takes at once, and the queries themselves.
constexpr int32_t ATTEND_QUERIES = PAIR;
constexpr int64_t attend_scratch(int32_t tokens, int32_t head) {
    return int64_t{ATTEND_QUERIES} * (padded(tokens, PAIR) + BLOCK + head) * 4;
}

// All sets compiled in, best first.
const Kernels *const *all_kernels(int *count);
const Kernels *best_kernels();
const Kernels *kernels_named(const char *name);

}  // namespace bsns
