/* The native executor's interface: a stage of decoder blocks on a CPU, its weights and its KV caches.
 *
 * Plain C, so that any Python can load it without being compiled against it. Every function that can fail returns a
 * bsns_status; bsns_error() then says what is wrong, for the calling thread. Nothing here throws.
 *
 * Memory belongs to the caller: a stage points into the weights it was given, and a segment into its cache.
 */
#ifndef BSNS_NATIVE_H
#define BSNS_NATIVE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)

#define BSNS_ABI 2 /* raised with every change of this file */
#define BSNS_PACKING 1 /* raised with every change of what packed weights look like */

typedef enum {
    BSNS_OK = 0,
    BSNS_BAD_ARGUMENT = 1, /* the caller's mistake: a shape, a position, a pointer */
    BSNS_NO_MEMORY = 2,
    BSNS_NOT_FINITE = 3, /* weights or activations that hold NaN or infinity */
} bsns_status;

/* How numbers are kept. int8 weights have a scale for each row; int4 one for each row and 32 columns. */
typedef enum { BSNS_FLOAT32 = 0, BSNS_BFLOAT16 = 1, BSNS_INT8 = 2, BSNS_INT4 = 3, BSNS_FLOAT16 = 4 } bsns_kind;

typedef enum { BSNS_RMS_NORM = 0, BSNS_LAYER_NORM = 1 } bsns_norm_kind;
typedef enum { BSNS_SILU = 0, BSNS_GELU_TANH = 1, BSNS_GELU_ERF = 2 } bsns_activation;

/* A packed matrix, (rows, columns) as in y = W x: `data` is `bsns_matrix_bytes` long and aligned to 64 bytes. */
typedef struct {
    int32_t kind; /* float32, bfloat16, int8 or int4 */
    int32_t rows, columns;
    void *data;
} bsns_matrix;

/* What all blocks of a stage have in common. */
typedef struct {
    int32_t hidden;
    int32_t heads, kv_heads, head_size;
    int32_t rotary_size; /* how much of each head is rotated, in halves; 0: nothing */
    int32_t norm; /* bsns_norm_kind, of all norms but those of queries and keys, which are RMS */
    int32_t activation; /* bsns_activation */
    int32_t gated; /* whether the MLP is activation(gate) * up */
    int32_t parallel; /* whether attention and MLP read the same input (GPT-NeoX) */
    int32_t experts, experts_per_token; /* 0: a plain MLP */
    int32_t normalize_experts; /* whether the chosen experts' weights are made to add up to 1 */
    int32_t cache_kind; /* float32, bfloat16 or int8 */
    float epsilon; /* of the norms */
    float attention_scale; /* of queries */
    float outlier; /* activations of at least this size are kept out of int8; 0: none are */
} bsns_shape;

/* One block. Norms and biases are float32 and may be null where the architecture has none.
 *
 * qkv: heads of queries, keys, values, each padded to `bsns_padded_head` rows. out: (hidden, heads * padded head).
 * up: (intermediate), or where gated, 16 rows of gate and 16 of up by turns, of an intermediate size padded to 16.
 * Of experts there is an array of `up` and of `down`, and a router in float32.
 */
typedef struct {
    bsns_matrix qkv, out;
    const bsns_matrix *up, *down; /* one, or as many as there are experts */
    bsns_matrix router;
    const float *attention_norm, *attention_norm_bias;
    const float *mlp_norm, *mlp_norm_bias;
    const float *after_attention_norm, *after_mlp_norm; /* of what is added to the residual (Gemma 3) */
    const float *query_norm, *key_norm; /* per head, padded (Qwen 3) */
    const float *qkv_bias, *out_bias, *up_bias, *down_bias; /* padded and ordered as the matrix' rows */
    const float *inverse_frequencies; /* rotary_size / 2 */
    float rotary_scale; /* of cosines and sines */
    int32_t window; /* a token sees itself and window - 1 before; 0: everything before */
} bsns_block;

typedef struct bsns_pool bsns_pool;
typedef struct bsns_stage bsns_stage;
typedef struct bsns_cache bsns_cache;

/* `rows` new tokens of one session, the first at `position`; they overwrite everything from there on. */
typedef struct {
    bsns_cache *cache;
    int32_t position, rows;
} bsns_segment;

int32_t bsns_abi(void);
int32_t bsns_packing(void);
const char *bsns_error(void);

/* The kernels this processor can run, best first, separated by spaces: amx, avx512bf16, avx512, avx2vnni, avx2, ... */
const char *bsns_kernels(void);

/* Memory in large pages, zeroed and aligned to a page; null if there is none. */
void *bsns_memory_new(int64_t bytes);
void bsns_memory_free(void *memory, int64_t bytes);
/* Tells the system that these bytes of a mapped file are not needed again. */
void bsns_let_go(const void *memory, int64_t bytes);

int32_t bsns_padded_head(int32_t head_size);
int64_t bsns_matrix_bytes(int32_t kind, int32_t rows, int32_t columns); /* a multiple of 64; negative: bad argument */

/* Where rows come from: `count` rows of `columns` numbers, strides in numbers. */
typedef struct {
    const void *data;
    int32_t kind; /* float32, bfloat16 or float16 */
    int32_t count, columns;
    int64_t row_stride, column_stride;
} bsns_source;

/* Pack rows: source row i goes to row first + 16 * step * (i / 16) + i % 16 of the matrix, whose memory was zeroed.
 * Column c goes to (c / segment) * padded_segment + c % segment. May run in several threads, for different rows. */
bsns_status bsns_pack(
    const bsns_matrix *matrix, const bsns_source *source, int32_t first, int32_t step, int32_t segment,
    int32_t padded_segment
);
/* The matrix as it computes, (rows, columns) in float32: for tests. */
bsns_status bsns_unpack(const bsns_matrix *matrix, float *into);

/* Threads that compute together: `threads` of them, the caller among them. `kernels` is one of bsns_kernels(), or null
 * for the best. One call at a time uses a pool. */
bsns_status bsns_pool_new(int32_t threads, const char *kernels, bsns_pool **pool);
void bsns_pool_free(bsns_pool *pool);

bsns_status bsns_stage_new(
    bsns_pool *pool, const bsns_shape *shape, const bsns_block *blocks, int32_t count, bsns_stage **stage
);
void bsns_stage_free(bsns_stage *stage);

/* Room for a session of `tokens` on all blocks of the stage. Pages become resident when they are first written. */
bsns_status bsns_cache_new(const bsns_stage *stage, int32_t tokens, bsns_cache **cache);
void bsns_cache_free(bsns_cache *cache);

/* One step of all segments through blocks [first, end) of the stage: (rows, hidden) in and out, both in `kind`
 * (float32 or bfloat16). The segments' caches differ from each other. */
bsns_status bsns_stage_run(
    bsns_stage *stage, int32_t first, int32_t end, const bsns_segment *segments, int32_t count, const void *input,
    void *output, int32_t kind
);

/* The end of a model: norm (null: none), then the matrix; (rows, hidden) in `kind` to (rows, matrix rows) in float32. */
bsns_status bsns_project(
    bsns_pool *pool, const bsns_matrix *matrix, int32_t norm, const float *norm_weight, const float *norm_bias,
    float epsilon, float outlier, const float *bias, int32_t rows, const void *input, int32_t kind, float *output
);

/* Codecs of activations, row by row, each row its scales and then its codes; see bsns.protocol.codecs. */
typedef enum {
    BSNS_INT8_BLOCKS = 0,
    BSNS_INT8_DYNAMIC = 1,
    BSNS_INT8_ROTATED = 2,
    BSNS_INT4_ROTATED = 3,
} bsns_codec;

/* From (rows, columns) in `kind` (float32 or bfloat16) to rows of `row_bytes`, and back. Where a row is not finite, or its
 * scales are not: BSNS_NOT_FINITE, and which row it is. */
bsns_status bsns_encode(
    int32_t codec, int64_t rows, int32_t columns, int32_t kind, const void *source, void *target, int64_t row_bytes,
    int64_t *bad_row
);
bsns_status bsns_decode(
    int32_t codec, int64_t rows, int32_t columns, int32_t kind, const void *source, void *target, int64_t row_bytes,
    int64_t *bad_row
);

/* Bytes per second at which the pool's threads read memory at best, in large pages: in two places each, fetched
   ahead, and in eight, in turns. */
bsns_status bsns_read_bandwidth(bsns_pool *pool, int64_t bytes, double seconds, double *bytes_per_s);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif

#endif
