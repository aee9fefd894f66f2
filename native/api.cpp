// The C interface: checks what it is given, and turns what goes wrong into a status and a text.
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <system_error>
#include <vector>

#include "bsns_native.h"
#include "memory.h"
#include "pack.h"
#include "pool.h"
#include "stage.h"

using namespace bsns;

struct bsns_pool {
    Pool pool;
    Workspace workspace;
    Scratch input, output;
};

namespace {

thread_local char error_text[256] = "";

__attribute__((format(printf, 2, 3))) bsns_status fail(bsns_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(error_text, sizeof error_text, format, arguments);
    va_end(arguments);
    return status;
}

bsns_status no_memory() { return fail(BSNS_NO_MEMORY, "out of memory"); }

// What a call returns, whatever it throws.
template <typename Call> bsns_status guarded(const Call &call) {
    try {
        return call();
    } catch (const std::bad_alloc &) {
        return no_memory();
    } catch (const std::system_error &error) {
        return fail(BSNS_NO_MEMORY, "no thread could be started: %s", error.what());
    }
}

constexpr int32_t MOST_NUMBERS = 1 << 24;  // rows or columns of a matrix
constexpr int32_t MOST_THREADS = 1024;
constexpr int32_t MOST_HEAD = 1024;
constexpr int32_t MOST_TOKENS = 1 << 26;
constexpr int32_t MOST_ROWS = 1 << 16;  // of a batch

bool is_weight_kind(int32_t kind) { return kind >= BSNS_FLOAT32 && kind <= BSNS_INT4; }

const char *flaw_of(const bsns_matrix &matrix, int64_t rows, int64_t columns) {
    if (!is_weight_kind(matrix.kind)) return "is of an unknown kind";
    if (matrix.data == nullptr || reinterpret_cast<uintptr_t>(matrix.data) % LINE != 0) return "has no aligned memory";
    if (matrix.rows < 1 || matrix.columns < 1 || matrix.rows > MOST_NUMBERS || matrix.columns > MOST_NUMBERS)
        return "has an impossible shape";
    if ((rows > 0 && matrix.rows != rows) || (columns > 0 && matrix.columns != columns)) return "has a shape that does not fit";
    return nullptr;
}

bsns_status check_shape(const bsns_shape &shape) {
    const bool sizes = shape.hidden >= 1 && shape.hidden <= MOST_NUMBERS && shape.heads >= 1 && shape.kv_heads >= 1 &&
                       shape.heads <= 4096 && shape.heads % shape.kv_heads == 0 && shape.head_size >= 1 &&
                       shape.head_size <= MOST_HEAD;
    if (!sizes) return fail(BSNS_BAD_ARGUMENT, "impossible sizes of hidden state or heads");
    if (shape.rotary_size < 0 || shape.rotary_size > shape.head_size || shape.rotary_size % 2 != 0)
        return fail(BSNS_BAD_ARGUMENT, "impossible rotary size %d", shape.rotary_size);
    if (shape.norm < 0 || shape.norm > 1 || shape.activation < 0 || shape.activation > 2)
        return fail(BSNS_BAD_ARGUMENT, "unknown norm or activation");
    if (shape.cache_kind != BSNS_FLOAT32 && shape.cache_kind != BSNS_BFLOAT16 && shape.cache_kind != BSNS_INT8)
        return fail(BSNS_BAD_ARGUMENT, "a cache cannot be of kind %d", shape.cache_kind);
    const bool experts = shape.experts == 0 || (shape.experts >= 1 && shape.experts <= 4096 && shape.experts_per_token >= 1 &&
                                                shape.experts_per_token <= shape.experts && !shape.parallel);
    if (!experts) return fail(BSNS_BAD_ARGUMENT, "impossible number of experts");
    return BSNS_OK;
}

bsns_status check_block(const bsns_shape &shape, const bsns_block &block, int32_t index) {
    const int64_t head = padded_head(shape.head_size);
    const auto bad = [&](const char *part, const char *flaw) {
        return fail(BSNS_BAD_ARGUMENT, "the %s of block %d %s", part, index, flaw);
    };
    const auto *flaw = flaw_of(block.qkv, (shape.heads + 2 * shape.kv_heads) * head, shape.hidden);
    if (flaw != nullptr) return bad("qkv", flaw);
    flaw = flaw_of(block.out, shape.hidden, shape.heads * head);
    if (flaw != nullptr) return bad("out", flaw);
    if (block.up == nullptr || block.down == nullptr) return bad("MLP", "is missing");
    if (shape.experts > 0) {
        flaw = flaw_of(block.router, shape.experts, shape.hidden);
        if (flaw == nullptr && block.router.kind != BSNS_FLOAT32) flaw = "is not in float32";
        if (flaw != nullptr) return bad("router", flaw);
        if (block.after_mlp_norm != nullptr) return bad("norm after the experts", "is not known");
    }
    for (int32_t e = 0; e < (shape.experts > 0 ? shape.experts : 1); e++) {
        flaw = flaw_of(block.up[e], 0, shape.hidden);
        if (flaw == nullptr && shape.gated && block.up[e].rows % PAIR != 0) flaw = "does not hold gate and up by turns";
        if (flaw != nullptr) return bad("up", flaw);
        flaw = flaw_of(block.down[e], shape.hidden, 0);
        const int64_t inner = shape.gated ? block.up[e].rows / 2 : block.up[e].rows;
        if (flaw == nullptr && padded(block.down[e].columns, BLOCK) != padded(inner, BLOCK)) flaw = "does not fit up";
        if (flaw != nullptr) return bad("down", flaw);
    }
    if (shape.rotary_size > 0 && block.inverse_frequencies == nullptr) return bad("rotary", "has no frequencies");
    if (block.window < 0) return bad("window", "is negative");
    return BSNS_OK;
}

const char *codec_flaw(const Kernels &kernels, int32_t codec, int64_t rows, int32_t columns, int32_t kind, int64_t row_bytes) {
    if (codec < BSNS_INT8_BLOCKS || codec > BSNS_INT4_ROTATED) return "a codec that is unknown";
    if (kind != BSNS_FLOAT32 && kind != BSNS_BFLOAT16) return "activations of an unknown kind";
    if (rows < 0 || columns < 1 || columns > MOST_NUMBERS) return "activations of an impossible shape";
    if (kernels.encoded_bytes(codec, columns) != row_bytes) return "rows of another length than the codec gives them";
    return nullptr;
}

// Check, then encode or decode: `call` says which row is the first that cannot be taken, and `flaw` what is wrong with it.
template <typename Call>
bsns_status coded(
    int32_t codec, int64_t rows, int32_t columns, int32_t kind, int64_t row_bytes, int64_t *bad_row, const char *flaw, const Call &call
) {
    return guarded([&] {
        static const Kernels *const kernels = best_kernels();
        if (const char *mistake = codec_flaw(*kernels, codec, rows, columns, kind, row_bytes))
            return fail(BSNS_BAD_ARGUMENT, "%s", mistake);
        std::vector<float> row(static_cast<size_t>(columns));
        *bad_row = call(*kernels, row.data());
        return *bad_row < 0 ? BSNS_OK : fail(BSNS_NOT_FINITE, "%s", flaw);
    });
}

Stage *stage_of(bsns_stage *stage) { return reinterpret_cast<Stage *>(stage); }
const Stage *stage_of(const bsns_stage *stage) { return reinterpret_cast<const Stage *>(stage); }

}  // namespace

extern "C" {

int32_t bsns_abi(void) { return BSNS_ABI; }
int32_t bsns_packing(void) { return BSNS_PACKING; }
const char *bsns_error(void) { return error_text; }

const char *bsns_kernels(void) {
    static const std::string names = [] {
        std::string all;
        int count = 0;
        const Kernels *const *sets = all_kernels(&count);
        for (int i = 0; i < count; i++)
            if (sets[i]->supported()) all.append(all.empty() ? "" : " ").append(sets[i]->name);
        return all;
    }();
    return names.c_str();
}

void *bsns_memory_new(int64_t bytes) { return bytes > 0 ? new_memory(static_cast<size_t>(bytes)) : nullptr; }
void bsns_memory_free(void *memory, int64_t bytes) { free_memory(memory, static_cast<size_t>(bytes)); }
void bsns_let_go(const void *memory, int64_t bytes) { let_go(memory, bytes); }

int32_t bsns_padded_head(int32_t head_size) { return static_cast<int32_t>(padded_head(head_size)); }

int64_t bsns_matrix_bytes(int32_t kind, int32_t rows, int32_t columns) {
    if (!is_weight_kind(kind) || rows < 1 || columns < 1 || rows > MOST_NUMBERS || columns > MOST_NUMBERS) return -1;
    return layout_of(kind, rows, columns).bytes;
}

bsns_status bsns_pack(
    const bsns_matrix *matrix, const bsns_source *source, int32_t first, int32_t step, int32_t segment, int32_t padded_segment
) {
    return guarded([&] {
        const char *flaw = flaw_of(*matrix, 0, 0);
        if (flaw != nullptr) return fail(BSNS_BAD_ARGUMENT, "the matrix %s", flaw);
        const bool kind = source->kind == BSNS_FLOAT32 || source->kind == BSNS_BFLOAT16 || source->kind == BSNS_FLOAT16;
        if (source->data == nullptr || !kind) return fail(BSNS_BAD_ARGUMENT, "the source is nothing that can be packed");
        if (source->count < 1 || source->columns < 1 || first < 0 || step < 1 || segment < 1 || padded_segment < segment)
            return fail(BSNS_BAD_ARGUMENT, "impossible rows or columns");
        const int64_t last = first + int64_t{16} * step * ((source->count - 1) / 16) + (source->count - 1) % 16;
        const int64_t columns = int64_t{source->columns - 1} / segment * padded_segment + (source->columns - 1) % segment + 1;
        const Layout at = layout_of(matrix->kind, matrix->rows, matrix->columns);
        if (last >= at.rows || columns > matrix->columns || (step > 1 && first % 16 != 0))
            return fail(BSNS_BAD_ARGUMENT, "the source does not fit the matrix");
        if (!pack_rows(*matrix, *source, first, step, segment, padded_segment))
            return fail(BSNS_NOT_FINITE, "weights that are not finite");
        return BSNS_OK;
    });
}

bsns_status bsns_unpack(const bsns_matrix *matrix, float *into) {
    return guarded([&] {
        const char *flaw = flaw_of(*matrix, 0, 0);
        if (flaw != nullptr || into == nullptr) return fail(BSNS_BAD_ARGUMENT, "the matrix cannot be unpacked");
        unpack_rows(*matrix, into);
        return BSNS_OK;
    });
}

bsns_status bsns_pool_new(int32_t threads, const char *kernels, bsns_pool **pool) {
    return guarded([&] {
        if (threads < 1 || threads > MOST_THREADS) return fail(BSNS_BAD_ARGUMENT, "impossible number of threads %d", threads);
        const Kernels *set = kernels == nullptr ? best_kernels() : kernels_named(kernels);
        if (set == nullptr) return fail(BSNS_BAD_ARGUMENT, "this processor has no kernels %.32s", kernels);
        *pool = new bsns_pool{{threads, *set}, {}, {}, {}};
        return BSNS_OK;
    });
}

void bsns_pool_free(bsns_pool *pool) { delete pool; }

bsns_status bsns_stage_new(
    bsns_pool *pool, const bsns_shape *shape, const bsns_block *blocks, int32_t count, bsns_stage **stage
) {
    return guarded([&] {
        if (count < 1) return fail(BSNS_BAD_ARGUMENT, "a stage of no blocks");
        bsns_status status = check_shape(*shape);
        for (int32_t i = 0; i < count && status == BSNS_OK; i++) status = check_block(*shape, blocks[i], i);
        if (status != BSNS_OK) return status;
        *stage = reinterpret_cast<bsns_stage *>(new Stage(pool->pool, *shape, blocks, count));
        return BSNS_OK;
    });
}

void bsns_stage_free(bsns_stage *stage) { delete stage_of(stage); }

bsns_status bsns_cache_new(const bsns_stage *stage, int32_t tokens, bsns_cache **cache) {
    return guarded([&] {
        if (tokens < 1 || tokens > MOST_TOKENS) return fail(BSNS_BAD_ARGUMENT, "a cache of %d tokens", tokens);
        const Stage &owner = *stage_of(stage);
        auto made = std::make_unique<SessionCache>(owner.shape(), owner.count(), tokens);
        if (!made->exists()) return no_memory();
        *cache = reinterpret_cast<bsns_cache *>(made.release());
        return BSNS_OK;
    });
}

void bsns_cache_free(bsns_cache *cache) { delete reinterpret_cast<SessionCache *>(cache); }

bsns_status bsns_stage_run(
    bsns_stage *stage, int32_t first, int32_t end, const bsns_segment *segments, int32_t count, const void *input, void *output,
    int32_t kind
) {
    return guarded([&] {
        Stage &runner = *stage_of(stage);
        if (first < 0 || first >= end || end > runner.count())
            return fail(BSNS_BAD_ARGUMENT, "blocks %d to %d of %d", first, end, runner.count());
        if (kind != BSNS_FLOAT32 && kind != BSNS_BFLOAT16) return fail(BSNS_BAD_ARGUMENT, "activations of kind %d", kind);
        if (count < 1 || input == nullptr || output == nullptr) return fail(BSNS_BAD_ARGUMENT, "nothing to run");
        int64_t rows = 0;
        for (int32_t i = 0; i < count; i++) {
            const bsns_segment &segment = segments[i];
            const auto *cache = reinterpret_cast<const SessionCache *>(segment.cache);
            if (cache == nullptr || segment.rows < 1 || segment.position < 0)
                return fail(BSNS_BAD_ARGUMENT, "segment %d has no rows, cache or position", i);
            if (cache->blocks() != runner.count()) return fail(BSNS_BAD_ARGUMENT, "the cache of segment %d is another stage's", i);
            if (int64_t{segment.position} + segment.rows > cache->tokens())
                return fail(
                    BSNS_BAD_ARGUMENT, "segment %d ends at token %lld, beyond its cache of %d", i,
                    static_cast<long long>(segment.position) + segment.rows, cache->tokens()
                );
            rows += segment.rows;
        }
        if (rows > MOST_ROWS) return fail(BSNS_BAD_ARGUMENT, "%lld rows in one batch", static_cast<long long>(rows));
        return runner.run(first, end, segments, count, input, output, kind) ? BSNS_OK : no_memory();
    });
}

bsns_status bsns_project(
    bsns_pool *pool, const bsns_matrix *matrix, int32_t norm, const float *norm_weight, const float *norm_bias, float epsilon,
    float outlier, const float *bias, int32_t rows, const void *input, int32_t kind, float *output
) {
    return guarded([&] {
        const char *flaw = flaw_of(*matrix, 0, 0);
        if (flaw != nullptr) return fail(BSNS_BAD_ARGUMENT, "the matrix %s", flaw);
        if (rows < 1 || rows > MOST_ROWS || input == nullptr || output == nullptr || norm < 0 || norm > 1 ||
            (kind != BSNS_FLOAT32 && kind != BSNS_BFLOAT16))
            return fail(BSNS_BAD_ARGUMENT, "nothing that can be projected");
        const Matrix packed(*matrix);
        const int64_t stride = padded(packed.columns, 64), wide = packed.padded_rows;
        const auto count = static_cast<size_t>(rows);
        const bool there = pool->workspace.reserve_rows(rows, packed.columns) &&
                           pool->input.reserve(count * static_cast<size_t>(stride) * 4) &&
                           pool->output.reserve(count * static_cast<size_t>(wide) * 4);
        if (!there) return no_memory();
        const Kernels &kernels = pool->pool.kernels();
        const uint32_t mode = kernels.enter();
        auto *in = pool->input.as<float>(), *out = pool->output.as<float>();
        const int64_t bytes = int64_t{packed.columns} * (kind == BSNS_FLOAT32 ? 4 : 2);
        for (int64_t m = 0; m < rows; m++) {
            kernels.convert(static_cast<const uint8_t *>(input) + m * bytes, kind, in + m * stride, packed.columns);
            for (int64_t k = packed.columns; k < stride; k++) in[m * stride + k] = 0;
        }
        Prepare prepare{};
        prepare.input = in;
        prepare.stride = stride;
        prepare.columns = packed.columns;
        prepare.norm = norm_weight == nullptr ? NO_NORM : norm;
        prepare.weight = norm_weight;
        prepare.bias = norm_bias;
        prepare.epsilon = epsilon;
        prepare.outlier = outlier;
        prepare.rows = pool->workspace.rows(rows, packed.columns, packed.kind);
        prepare_rows(pool->pool, prepare);
        Multiply multiply{};
        multiply.matrix = packed;
        multiply.rows = prepare.rows;
        multiply.output = out;
        multiply.stride = wide;
        multiply.bias = bias;
        multiply_rows(pool->pool, multiply);
        for (int64_t m = 0; m < rows; m++)
            kernels.restore(out + m * wide, BSNS_FLOAT32, output + m * packed.rows, packed.rows);
        kernels.leave(mode);
        return BSNS_OK;
    });
}

bsns_status bsns_encode(
    int32_t codec, int64_t rows, int32_t columns, int32_t kind, const void *source, void *target, int64_t row_bytes,
    int64_t *bad_row
) {
    const auto encode = [&](const Kernels &kernels, float *row) {
        return kernels.encode(codec, rows, columns, kind, source, static_cast<uint8_t *>(target), row);
    };
    return coded(codec, rows, columns, kind, row_bytes, bad_row, "activations that are not finite", encode);
}

bsns_status bsns_decode(
    int32_t codec, int64_t rows, int32_t columns, int32_t kind, const void *source, void *target, int64_t row_bytes,
    int64_t *bad_row
) {
    const auto decode = [&](const Kernels &kernels, float *row) {
        return kernels.decode(codec, rows, columns, kind, static_cast<const uint8_t *>(source), target, row);
    };
    return coded(codec, rows, columns, kind, row_bytes, bad_row, "scales that are not finite", decode);
}

bsns_status bsns_read_bandwidth(bsns_pool *pool, int64_t bytes, double seconds, double *bytes_per_s) {
    return guarded([&] {
        constexpr int64_t CHUNK = int64_t{1} << 20;
        if (bytes < 2 * CHUNK || bytes > (int64_t{1} << 40)) return fail(BSNS_BAD_ARGUMENT, "impossible number of bytes");
        Scratch memory;
        if (!memory.reserve(static_cast<size_t>(bytes))) return no_memory();
        std::memset(memory.as<uint8_t>(), 1, static_cast<size_t>(bytes));
        const auto chunks = static_cast<int>(bytes / CHUNK);
        std::atomic<int64_t> witness{0};  // so that reading is not left out
        *bytes_per_s = 0;
        const auto now = [] { return std::chrono::steady_clock::now(); };
        const auto started = now();
        bool many = false;
        do {
            const auto before = now();
            pool->pool.run(chunks, [&](int chunk, Worker &) {
                const uint8_t *at = memory.as<uint8_t>() + chunk * CHUNK;
                witness += static_cast<int64_t>(pool->pool.kernels().read(at, CHUNK, many));
            });
            const double took = std::chrono::duration<double>(now() - before).count();
            *bytes_per_s = std::max(*bytes_per_s, static_cast<double>(chunks * CHUNK) / took);
            many = !many;
        } while (std::chrono::duration<double>(now() - started).count() < seconds);
        return BSNS_OK;
    });
}

}  // extern "C"
