// Random codecs, stages and batches, for as long as it is told: against a plain reference, against themselves in other batches and
// with other kernels, and with arguments that must be refused. Built with sanitizers by tests/unit/native.
//
// Usage: random_stages SECONDS [SEED]. Prints the seed of what fails, and ends with status 1.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../bsns_native.h"

namespace {

using Numbers = std::vector<float>;
constexpr int FEW = 8;

std::mt19937_64 draw;
uint64_t seed;

[[noreturn]] void fail(const char *what) {
    std::printf("seed %llu: %s (%s)\n", static_cast<unsigned long long>(seed), what, bsns_error());
    std::exit(1);
}

void must(bsns_status status, const char *what) {
    if (status != BSNS_OK) fail(what);
}

int among(int from, int to) { return std::uniform_int_distribution<int>(from, to)(draw); }
bool chance(double p) { return std::uniform_real_distribution<>(0, 1)(draw) < p; }

Numbers normals(size_t count, float scale) {
    std::normal_distribution<float> normal(0, scale);
    Numbers out(count);
    for (float &x : out) x = normal(draw);
    return out;
}

Numbers padded(Numbers from, size_t to = 64) {
    from.resize((from.size() + to - 1) / to * to, 0.0f);
    return from;
}

// A packed matrix and what it computes.
struct Packed {
    bsns_matrix matrix{};
    int64_t bytes = 0;
    Numbers plain;

    Packed() = default;
    Packed(const Packed &) = delete;
    Packed &operator=(const Packed &) = delete;
    ~Packed() {
        if (matrix.data != nullptr) bsns_memory_free(matrix.data, bytes);
    }

    void make(int kind, int rows, int columns) {
        matrix = {kind, rows, columns, nullptr};
        bytes = bsns_matrix_bytes(kind, rows, columns);
        if (bytes <= 0) fail("matrix bytes");
        matrix.data = bsns_memory_new(bytes);
        if (matrix.data == nullptr) fail("memory");
    }

    // `count` rows of `columns` random numbers
    void fill(int first, int step, int count, int columns, int segment, int padded_segment) {
        const Numbers numbers = normals(static_cast<size_t>(count) * static_cast<size_t>(columns), 1.0f / std::sqrt(static_cast<float>(columns)));
        if (chance(0.3)) {  // as a transposed source
            Numbers turned(numbers.size());
            for (int r = 0; r < count; r++)
                for (int c = 0; c < columns; c++)
                    turned[static_cast<size_t>(c * count + r)] = numbers[static_cast<size_t>(r * columns + c)];
            const bsns_source source{turned.data(), BSNS_FLOAT32, count, columns, 1, count};
            must(bsns_pack(&matrix, &source, first, step, segment, padded_segment), "pack");
            return;
        }
        const bsns_source source{numbers.data(), BSNS_FLOAT32, count, columns, columns, 1};
        must(bsns_pack(&matrix, &source, first, step, segment, padded_segment), "pack");
    }

    void finish() {
        plain.resize(static_cast<size_t>(matrix.rows) * static_cast<size_t>(matrix.columns));
        must(bsns_unpack(&matrix, plain.data()), "unpack");
    }

    // In double, row by row.
    std::vector<double> times(const std::vector<double> &x) const {
        std::vector<double> y(static_cast<size_t>(matrix.rows), 0.0);
        for (size_t r = 0; r < y.size(); r++)
            for (size_t c = 0; c < static_cast<size_t>(matrix.columns) && c < x.size(); c++)
                y[r] += static_cast<double>(plain[r * static_cast<size_t>(matrix.columns) + c]) * x[c];
        return y;
    }
};

struct BlockParts {
    Packed qkv, out, router;
    std::vector<Packed> up, down;
    std::vector<bsns_matrix> up_views, down_views;
    Numbers attention_norm, attention_bias, mlp_norm, mlp_bias, after_attention, after_mlp, query_norm, key_norm;
    Numbers qkv_bias, out_bias, up_bias, down_bias, frequencies;
    bsns_block block{};
};

struct Model {
    bsns_shape shape{};
    int head = 0, inner = 0, kind = 0;
    std::vector<BlockParts> parts;
    std::vector<bsns_block> blocks;

    explicit Model(int weights) : kind(weights) {
        shape.kv_heads = among(1, 3);
        shape.heads = shape.kv_heads * among(1, 4);
        shape.head_size = 2 * among(1, 20);
        shape.hidden = among(1, 90);
        inner = among(1, 100);
        shape.rotary_size = chance(0.2) ? 0 : chance(0.7) ? shape.head_size : 2 * among(1, shape.head_size / 2);
        shape.norm = chance(0.25);
        shape.activation = among(0, 2);
        shape.gated = chance(0.7);
        shape.experts = chance(0.2) ? among(1, 5) : 0;
        shape.experts_per_token = shape.experts > 0 ? among(1, shape.experts) : 0;
        shape.normalize_experts = chance(0.5);
        shape.parallel = shape.experts == 0 && chance(0.2);
        shape.cache_kind = kind == BSNS_FLOAT32 ? (chance(0.8) ? BSNS_FLOAT32 : BSNS_INT8) : (chance(0.7) ? BSNS_BFLOAT16 : BSNS_INT8);
        shape.epsilon = 1e-5f;
        shape.attention_scale = 1.0f / std::sqrt(static_cast<float>(shape.head_size));
        shape.outlier = chance(0.5) ? 3.0f : 0.0f;
        head = bsns_padded_head(shape.head_size);
        parts = std::vector<BlockParts>(static_cast<size_t>(among(1, 3)));
        for (BlockParts &part : parts) fill(part);
        for (BlockParts &part : parts) blocks.push_back(part.block);
    }

    Numbers norm_weight() const {
        Numbers out = normals(static_cast<size_t>(shape.hidden), 0.2f);
        for (float &x : out) x += 1.0f;
        return padded(out);
    }

    void fill(BlockParts &part) const {
        const int H = shape.heads, G = shape.kv_heads, D = shape.head_size;
        const auto n = static_cast<size_t>(shape.hidden);
        part.qkv.make(kind, (H + 2 * G) * head, shape.hidden);
        for (int h = 0; h < H + 2 * G; h++) part.qkv.fill(h * head, 1, D, shape.hidden, shape.hidden, shape.hidden);
        part.qkv.finish();
        part.out.make(kind, shape.hidden, H * head);
        part.out.fill(0, 1, shape.hidden, H * D, D, head);
        part.out.finish();
        const auto experts = static_cast<size_t>(std::max(shape.experts, 1));
        part.up = std::vector<Packed>(experts);
        part.down = std::vector<Packed>(experts);
        const int wide = (inner + 15) / 16 * 16;
        for (size_t e = 0; e < experts; e++) {
            part.up[e].make(kind, shape.gated ? 2 * wide : inner, shape.hidden);
            for (int p = 0; p < (shape.gated ? 2 : 1); p++)
                part.up[e].fill(16 * p, shape.gated ? 2 : 1, inner, shape.hidden, shape.hidden, shape.hidden);
            part.up[e].finish();
            part.down[e].make(kind, shape.hidden, inner);
            part.down[e].fill(0, 1, shape.hidden, inner, inner, inner);
            part.down[e].finish();
            part.up_views.push_back(part.up[e].matrix);
            part.down_views.push_back(part.down[e].matrix);
        }
        bsns_block &block = part.block;
        if (shape.experts > 0) {
            part.router.make(BSNS_FLOAT32, shape.experts, shape.hidden);
            part.router.fill(0, 1, shape.experts, shape.hidden, shape.hidden, shape.hidden);
            part.router.finish();
            block.router = part.router.matrix;
        }
        block.qkv = part.qkv.matrix;
        block.out = part.out.matrix;
        block.up = part.up_views.data();
        block.down = part.down_views.data();
        const auto set = [](Numbers &keep, const float *&at, Numbers numbers) {
            keep = padded(std::move(numbers));
            at = keep.data();
        };
        set(part.attention_norm, block.attention_norm, norm_weight());
        set(part.mlp_norm, block.mlp_norm, norm_weight());
        if (shape.norm == BSNS_LAYER_NORM) {
            set(part.attention_bias, block.attention_norm_bias, normals(n, 0.1f));
            set(part.mlp_bias, block.mlp_norm_bias, normals(n, 0.1f));
        }
        // of very few numbers, or multiples of very few rows, a norm is hardly more than signs, which a rounding may turn
        const bool many = shape.hidden >= FEW && inner >= FEW && H * D >= FEW;
        if (chance(0.3) && shape.experts == 0 && many) {
            set(part.after_attention, block.after_attention_norm, norm_weight());
            set(part.after_mlp, block.after_mlp_norm, norm_weight());
        }
        if (chance(0.3)) {
            set(part.query_norm, block.query_norm, normals(static_cast<size_t>(D), 1.0f));
            set(part.key_norm, block.key_norm, normals(static_cast<size_t>(D), 1.0f));
        }
        if (chance(0.4)) {
            Numbers bias(static_cast<size_t>((H + 2 * G) * head), 0.0f);
            for (int h = 0; h < H + 2 * G; h++)
                for (int d = 0; d < D; d++) bias[static_cast<size_t>(h * head + d)] = normals(1, 0.3f)[0];
            set(part.qkv_bias, block.qkv_bias, bias);
        }
        if (chance(0.3)) set(part.out_bias, block.out_bias, normals(n, 0.3f));
        if (chance(0.3) && shape.experts == 0) {
            set(part.down_bias, block.down_bias, normals(n, 0.3f));
            if (!shape.gated) set(part.up_bias, block.up_bias, normals(static_cast<size_t>(inner), 0.3f));
        }
        if (shape.rotary_size > 0) {
            Numbers frequencies;
            for (int i = 0; i < shape.rotary_size / 2; i++)
                frequencies.push_back(std::pow(10000.0f, -2.0f * static_cast<float>(i) / static_cast<float>(shape.rotary_size)));
            set(part.frequencies, block.inverse_frequencies, frequencies);
            block.rotary_scale = chance(0.8) ? 1.0f : 1.3f;
        }
        block.window = chance(0.3) ? among(1, 20) : 0;
    }

    // ---- the reference: one token at a time, in double ----

    using Vector = std::vector<double>;
    struct Memory {
        std::vector<std::vector<Vector>> keys, values;  // [block][token]
    };

    Vector normed(const Vector &x, const Numbers &weight, const Numbers &bias, int kind_of_norm) const {
        double mean = 0, squares = 0;
        const auto n = static_cast<double>(shape.hidden);
        if (kind_of_norm == BSNS_LAYER_NORM)
            for (double v : x) mean += v / n;
        for (double v : x) squares += (v - mean) * (v - mean) / n;
        Vector out(x.size());
        for (size_t i = 0; i < x.size(); i++) {
            out[i] = (x[i] - mean) / std::sqrt(squares + static_cast<double>(shape.epsilon)) * static_cast<double>(weight[i]);
            if (!bias.empty()) out[i] += static_cast<double>(bias[i]);
        }
        return out;
    }

    double activated(double x) const {
        if (shape.activation == BSNS_SILU) return x / (1 + std::exp(-x));
        if (shape.activation == BSNS_GELU_TANH) return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    }

    static void add(Vector &to, const Vector &what, double weight = 1) {
        for (size_t i = 0; i < to.size(); i++) to[i] += weight * what[i];
    }

    static void add_bias(Vector &to, const Numbers &bias) {
        for (size_t i = 0; i < to.size() && !bias.empty(); i++) to[i] += static_cast<double>(bias[i]);
    }

    Vector mlp(const BlockParts &part, size_t expert, const Vector &x) const {
        Vector up = part.up[expert].times(x);
        if (shape.experts == 0) add_bias(up, part.up_bias);
        Vector mid(static_cast<size_t>(inner));
        for (int i = 0; i < inner; i++) {
            const auto at = static_cast<size_t>(i);
            if (!shape.gated) {
                mid[at] = activated(up[at]);
                continue;
            }
            const auto gate = static_cast<size_t>(i / 16 * 32 + i % 16);
            mid[at] = activated(up[gate]) * up[gate + 16];
        }
        Vector down = part.down[expert].times(mid);
        if (shape.experts == 0) add_bias(down, part.down_bias);
        return down;
    }

    void step(Memory &memory, Vector &x, int position) const {
        memory.keys.resize(parts.size());
        memory.values.resize(parts.size());
        for (size_t b = 0; b < parts.size(); b++) step_block(parts[b], memory.keys[b], memory.values[b], x, position);
    }

    void step_block(const BlockParts &part, std::vector<Vector> &keys, std::vector<Vector> &values, Vector &x, int position) const {
        const int H = shape.heads, G = shape.kv_heads, D = shape.head_size, half = shape.rotary_size / 2;
        const Vector normed_input = normed(x, part.attention_norm, part.attention_bias, shape.norm);
        const Vector ahead = normed(x, part.mlp_norm, part.mlp_bias, shape.norm);
        Vector qkv = part.qkv.times(normed_input);
        add_bias(qkv, part.qkv_bias);
        for (int h = 0; h < H + G; h++) {
            double *at = qkv.data() + h * head;
            const Numbers &norm = h < H ? part.query_norm : part.key_norm;
            if (!norm.empty()) {
                double squares = 0;
                for (int d = 0; d < D; d++) squares += at[d] * at[d] / D;
                for (int d = 0; d < D; d++)
                    at[d] = at[d] / std::sqrt(squares + static_cast<double>(shape.epsilon)) * static_cast<double>(norm[static_cast<size_t>(d)]);
            }
            for (int i = 0; i < half; i++) {
                const auto angle = static_cast<double>(static_cast<float>(position) * part.frequencies[static_cast<size_t>(i)]);
                const double c = std::cos(angle) * static_cast<double>(part.block.rotary_scale);
                const double s = std::sin(angle) * static_cast<double>(part.block.rotary_scale);
                const double a = at[i], e = at[i + half];
                at[i] = a * c - e * s;
                at[i + half] = e * c + a * s;
            }
        }
        keys.resize(static_cast<size_t>(position));
        values.resize(static_cast<size_t>(position));
        keys.emplace_back(qkv.begin() + H * head, qkv.begin() + (H + G) * head);
        values.emplace_back(qkv.begin() + (H + G) * head, qkv.begin() + (H + 2 * G) * head);
        const int start = part.block.window > 0 ? std::max(0, position + 1 - part.block.window) : 0;
        Vector attended(static_cast<size_t>(H * head), 0.0);
        for (int h = 0; h < H; h++) {
            const int g = h / (H / G);
            Vector weights;
            double most = -1e300, total = 0;
            for (int t = start; t <= position; t++) {
                double score = 0;
                for (int d = 0; d < D; d++) score += qkv[static_cast<size_t>(h * head + d)] * keys[static_cast<size_t>(t)][static_cast<size_t>(g * head + d)];
                weights.push_back(score * static_cast<double>(shape.attention_scale));
                most = std::max(most, weights.back());
            }
            for (double &w : weights) total += w = std::exp(w - most);
            for (int t = start; t <= position; t++)
                for (int d = 0; d < D; d++)
                    attended[static_cast<size_t>(h * head + d)] += weights[static_cast<size_t>(t - start)] / total * values[static_cast<size_t>(t)][static_cast<size_t>(g * head + d)];
        }
        Vector out = part.out.times(attended);
        add_bias(out, part.out_bias);
        add(x, part.after_attention.empty() ? out : normed(out, part.after_attention, {}, shape.norm));
        const Vector &second = shape.parallel ? ahead : normed(x, part.mlp_norm, part.mlp_bias, shape.norm);
        if (shape.experts == 0) {
            const Vector down = mlp(part, 0, second);
            add(x, part.after_mlp.empty() ? down : normed(down, part.after_mlp, {}, shape.norm));
            return;
        }
        const Vector scores = part.router.times(second);
        std::vector<int> order(scores.size());
        for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<int>(i);
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return scores[static_cast<size_t>(a)] > scores[static_cast<size_t>(b)]; });
        double total = 0;
        for (size_t i = 0; i < order.size(); i++)
            if (!shape.normalize_experts || i < static_cast<size_t>(shape.experts_per_token)) total += std::exp(scores[static_cast<size_t>(order[i])]);
        for (int i = 0; i < shape.experts_per_token; i++) {
            const auto expert = static_cast<size_t>(order[static_cast<size_t>(i)]);
            add(x, mlp(part, expert, second), std::exp(scores[expert]) / total);
        }
    }
};

// One way to compute: kernels, threads, and its own caches.
struct Engine {
    bsns_pool *pool = nullptr;
    bsns_stage *stage = nullptr;
    std::vector<bsns_cache *> caches;

    Engine(const Model &model, const std::string &kernels, int threads, int sessions, int tokens) {
        must(bsns_pool_new(threads, kernels.c_str(), &pool), "pool");
        must(bsns_stage_new(pool, &model.shape, model.blocks.data(), static_cast<int>(model.blocks.size()), &stage), "stage");
        for (int s = 0; s < sessions; s++) {
            caches.push_back(nullptr);
            must(bsns_cache_new(stage, tokens, &caches.back()), "cache");
        }
    }
    Engine(const Engine &) = delete;
    Engine &operator=(const Engine &) = delete;
    ~Engine() {
        for (bsns_cache *cache : caches) bsns_cache_free(cache);
        bsns_stage_free(stage);
        bsns_pool_free(pool);
    }

    Numbers run(const Model &model, const std::vector<bsns_segment> &segments, const Numbers &input) const {
        Numbers output(input.size());
        const auto blocks = static_cast<int>(model.blocks.size());
        const auto count = static_cast<int>(segments.size());
        must(bsns_stage_run(stage, 0, blocks, segments.data(), count, input.data(), output.data(), BSNS_FLOAT32), "run");
        return output;
    }
};

struct Session {
    std::vector<Numbers> inputs, outputs;  // by position
};

std::vector<std::string> kernel_names() {
    std::istringstream words(bsns_kernels());
    std::vector<std::string> names;
    for (std::string name; words >> name;) names.push_back(name);
    return names;
}

void refuse(bsns_status status, const char *what) {
    if (status != BSNS_BAD_ARGUMENT) fail(what);
}

void bad_arguments(const Model &model, const Engine &engine) {
    Numbers row(static_cast<size_t>(model.shape.hidden), 0.0f), out = row;
    const auto blocks = static_cast<int>(model.blocks.size());
    bsns_segment segment{engine.caches[0], 1 << 20, 1};
    refuse(bsns_stage_run(engine.stage, 0, blocks, &segment, 1, row.data(), out.data(), BSNS_FLOAT32), "a position beyond the cache");
    segment = {engine.caches[0], std::numeric_limits<int32_t>::max(), 2};
    refuse(bsns_stage_run(engine.stage, 0, blocks, &segment, 1, row.data(), out.data(), BSNS_FLOAT32), "a position that overflows");
    segment = {engine.caches[0], 0, 0};
    refuse(bsns_stage_run(engine.stage, 0, blocks, &segment, 1, row.data(), out.data(), BSNS_FLOAT32), "no rows");
    segment = {nullptr, 0, 1};
    refuse(bsns_stage_run(engine.stage, 0, blocks, &segment, 1, row.data(), out.data(), BSNS_FLOAT32), "no cache");
    segment = {engine.caches[0], 0, 1};
    refuse(bsns_stage_run(engine.stage, 0, blocks + 1, &segment, 1, row.data(), out.data(), BSNS_FLOAT32), "too many blocks");
    refuse(bsns_stage_run(engine.stage, 0, blocks, &segment, 0, row.data(), out.data(), BSNS_FLOAT32), "no segments");
    refuse(bsns_stage_run(engine.stage, 0, blocks, &segment, 1, row.data(), out.data(), BSNS_INT8), "int8 activations");
    bsns_cache *cache = nullptr;
    refuse(bsns_cache_new(engine.stage, 0, &cache), "an empty cache");
    bsns_shape shape = model.shape;
    shape.heads = shape.kv_heads * 2 + 1;
    if (shape.kv_heads == 1) shape.heads = 0;
    bsns_stage *stage = nullptr;
    refuse(bsns_stage_new(engine.pool, &shape, model.blocks.data(), blocks, &stage), "heads that cannot be grouped");
    shape = model.shape;
    shape.hidden += 1;
    refuse(bsns_stage_new(engine.pool, &shape, model.blocks.data(), blocks, &stage), "another hidden size");
    if (bsns_matrix_bytes(7, 1, 1) >= 0 || bsns_matrix_bytes(BSNS_INT8, 0, 1) >= 0) fail("an impossible matrix");
    Packed packed;
    packed.make(BSNS_BFLOAT16, 3, 5);
    Numbers numbers(15, 1.0f);
    bsns_source source{numbers.data(), BSNS_FLOAT32, 3, 6, 5, 1};
    refuse(bsns_pack(&packed.matrix, &source, 0, 1, 6, 6), "too many columns");
    source = {numbers.data(), BSNS_FLOAT32, 3, 5, 5, 1};
    refuse(bsns_pack(&packed.matrix, &source, 30, 1, 5, 5), "rows beyond the matrix");
    numbers[7] = std::numeric_limits<float>::quiet_NaN();
    if (bsns_pack(&packed.matrix, &source, 0, 1, 5, 5) != BSNS_NOT_FINITE) fail("weights that are no numbers");
}

// Rows of activations there and back through a codec, in memory that ends where they do.
void one_codec() {
    const int codec = among(BSNS_INT8_BLOCKS, BSNS_INT4_ROTATED), columns = chance(0.1) ? among(4000, 4200) : among(1, 700);
    const int rows = among(1, 9), blocks = (columns + 63) / 64;
    const int row_bytes = codec == BSNS_INT4_ROTATED   ? (columns + 1) / 2 + 2 * ((columns + 31) / 32)
                          : codec == BSNS_INT8_DYNAMIC ? columns + 4 * ((columns + 4095) / 4096)
                                                       : columns + 2 * blocks;
    Numbers numbers = normals(static_cast<size_t>(rows) * static_cast<size_t>(columns), std::exp(static_cast<float>(among(-20, 20))));
    Numbers back(numbers.size());
    std::vector<uint8_t> coded(static_cast<size_t>(rows) * static_cast<size_t>(row_bytes));
    int64_t bad_row = -1;
    must(bsns_encode(codec, rows, columns, BSNS_FLOAT32, numbers.data(), coded.data(), row_bytes, &bad_row), "encode");
    must(bsns_decode(codec, rows, columns, BSNS_FLOAT32, coded.data(), back.data(), row_bytes, &bad_row), "decode");
    double off = 0, whole = 0;
    for (size_t i = 0; i < numbers.size(); i++) {
        off += std::pow(static_cast<double>(back[i]) - static_cast<double>(numbers[i]), 2);
        whole += std::pow(static_cast<double>(numbers[i]), 2);
    }
    if (!(std::sqrt(off) <= (codec == BSNS_INT4_ROTATED ? 0.2 : 0.03) * std::sqrt(whole))) fail("a codec is too far off");

    const int row = among(0, rows - 1);
    numbers[static_cast<size_t>(row * columns + among(0, columns - 1))] = chance(0.5) ? NAN : INFINITY;
    if (bsns_encode(codec, rows, columns, BSNS_FLOAT32, numbers.data(), coded.data(), row_bytes, &bad_row) != BSNS_NOT_FINITE || bad_row != row)
        fail("a row that is not finite was encoded");
    refuse(bsns_decode(codec, rows, columns, BSNS_FLOAT32, coded.data(), back.data(), row_bytes + 1, &bad_row), "rows of another length");
    for (uint8_t &byte : coded) byte = static_cast<uint8_t>(among(0, 255));
    std::vector<uint16_t> halves(numbers.size());
    const bsns_status status = bsns_decode(codec, rows, columns, BSNS_BFLOAT16, coded.data(), halves.data(), row_bytes, &bad_row);
    if (status != BSNS_OK && (status != BSNS_NOT_FINITE || bad_row < 0 || bad_row >= rows)) fail("what anybody may send");
}

void one_round() {
    one_codec();
    const std::vector<std::string> names = kernel_names();
    const int kind = among(BSNS_FLOAT32, BSNS_INT4);
    const Model model(kind);
    const int tokens = among(1, 70), sessions = among(1, 3);
    const auto hidden = static_cast<size_t>(model.shape.hidden);
    const auto some = [&] { return names[static_cast<size_t>(among(0, static_cast<int>(names.size()) - 1))]; };
    // those without fused products round otherwise, and avx512bf16 adds up in an order of its own
    const auto apart = [](const std::string &name) { return name == "portable" || name == "avx512bf16"; };
    const std::string first = some();
    std::string second = some();
    if (apart(first) || apart(second)) second = first;
    Engine engine(model, first, among(1, 3), sessions, tokens), again(model, second, among(1, 3), sessions, tokens);
    bad_arguments(model, engine);

    // sessions side by side, in chunks, with steps back
    std::vector<Session> done(static_cast<size_t>(sessions));
    for (int batch = 0; batch < 12; batch++) {
        std::vector<bsns_segment> segments;
        std::vector<size_t> whose;
        Numbers input;
        for (int s = 0; s < sessions; s++) {
            Session &session = done[static_cast<size_t>(s)];
            auto position = static_cast<int>(session.inputs.size());
            if (position > 0 && chance(0.15)) position = among(0, position - 1);
            if (position >= tokens || chance(0.2)) continue;
            const int rows = chance(0.5) ? 1 : among(1, std::min(tokens - position, 40));
            session.inputs.resize(static_cast<size_t>(position));
            session.outputs.resize(static_cast<size_t>(position));
            for (int r = 0; r < rows; r++) {
                Numbers row = normals(hidden, 1.0f);
                if (chance(0.1)) row[static_cast<size_t>(among(0, model.shape.hidden - 1))] *= 30.0f;
                if (chance(0.03)) std::fill(row.begin(), row.end(), 0.0f);
                input.insert(input.end(), row.begin(), row.end());
                session.inputs.push_back(std::move(row));
            }
            segments.push_back({engine.caches[static_cast<size_t>(s)], position, rows});
            whose.push_back(static_cast<size_t>(s));
        }
        if (segments.empty()) continue;
        const Numbers output = engine.run(model, segments, input);
        size_t at = 0;
        for (size_t i = 0; i < segments.size(); i++)
            for (int r = 0; r < segments[i].rows; r++, at += hidden)
                done[whose[i]].outputs.emplace_back(output.begin() + static_cast<long>(at), output.begin() + static_cast<long>(at + hidden));
    }
    // alone, in other chunks, by other kernels: the same to the bit
    double error = 0, size = 0;
    for (size_t s = 0; s < done.size(); s++) {
        const Session &session = done[s];
        for (size_t position = 0; position < session.inputs.size();) {
            const auto rows = std::min<size_t>(static_cast<size_t>(among(1, 9)), session.inputs.size() - position);
            Numbers input;
            for (size_t r = 0; r < rows; r++) input.insert(input.end(), session.inputs[position + r].begin(), session.inputs[position + r].end());
            const bsns_segment segment{again.caches[s], static_cast<int32_t>(position), static_cast<int32_t>(rows)};
            const Numbers output = again.run(model, {segment}, input);
            for (size_t r = 0; r < rows; r++)
                if (std::memcmp(output.data() + r * hidden, session.outputs[position + r].data(), hidden * 4) != 0) fail(("a row depends on its batch, or on its kernels: " + first + ", " + second).c_str());
            position += rows;
        }
        Model::Memory memory;
        for (size_t position = 0; position < session.inputs.size(); position++) {
            Model::Vector x(session.inputs[position].begin(), session.inputs[position].end());
            model.step(memory, x, static_cast<int>(position));
            for (size_t i = 0; i < hidden; i++) {
                const double off = static_cast<double>(session.outputs[position][i]) - x[i];
                if (!std::isfinite(off)) fail("an output that is no number");
                error += off * off;
                size += x[i] * x[i];
            }
        }
    }
    const bool exact = kind == BSNS_FLOAT32 && model.shape.cache_kind == BSNS_FLOAT32;
    const double bound = exact ? 1e-4 : kind == BSNS_FLOAT32 || kind == BSNS_BFLOAT16 ? 0.1 : 0.25;
    const bool steady = model.shape.experts == 0 && (exact || model.shape.hidden >= FEW);
    if (size > 0 && steady && std::sqrt(error / size) > bound) {
        std::printf("relative error %g of %s\n", std::sqrt(error / size), first.c_str());
        fail("far from the reference");
    }
    if (exact && model.shape.experts > 0 && std::sqrt(error / size) > 1e-3) fail("experts far from the reference");
}

}  // namespace

int main(int count, char **words) {
    const double seconds = count > 1 ? std::atof(words[1]) : 5;
    const uint64_t start = count > 2 ? std::strtoull(words[2], nullptr, 10) : 1;
    const auto began = std::chrono::steady_clock::now();
    uint64_t rounds = 0;
    do {
        seed = start + rounds;
        draw.seed(seed);
        one_round();
        rounds++;
    } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count() < seconds);
    std::printf("%llu rounds from seed %llu, with %s\n", static_cast<unsigned long long>(rounds), static_cast<unsigned long long>(start), bsns_kernels());
    return 0;
}
