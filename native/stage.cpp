#include "stage.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace bsns {

namespace {

constexpr int32_t STRIDE = 64;  // numbers: rows of activations are whole lines of int8
constexpr int32_t ROWS_AT_ONCE = 4;  // that a thread prepares

}  // namespace

// ---- memory ---------------------------------------------------------------------------------------------------------

SessionCache::SessionCache(const bsns_shape &shape, int32_t blocks, int32_t tokens)
    : tokens_(tokens), blocks_(blocks), kind_(shape.cache_kind), kv_heads_(shape.kv_heads) {
    const int64_t room = padded(tokens, PAIR);
    head_bytes_ = room * padded_head(shape.head_size) * activation_bytes(kind_);
    head_scales_ = kind_ == BSNS_INT8 ? room : 0;
    layer_bytes_ = 2 * kv_heads_ * (head_bytes_ + head_scales_ * 4);
    bytes_ = static_cast<size_t>(layer_bytes_) * static_cast<size_t>(blocks);
    memory_ = static_cast<uint8_t *>(new_cache_memory(bytes_));
}

Cache SessionCache::layer(int32_t index) const {
    Cache cache{};
    cache.keys = memory_ + index * layer_bytes_;
    cache.values = cache.keys + kv_heads_ * head_bytes_;
    cache.head_bytes = head_bytes_;
    cache.key_scales = reinterpret_cast<float *>(cache.values + kv_heads_ * head_bytes_);
    cache.value_scales = cache.key_scales + kv_heads_ * head_scales_;
    cache.head_scales = head_scales_;
    cache.kind = kind_;
    return cache;
}

bool Workspace::reserve_rows(int32_t rows, int32_t columns) {
    count_ = std::max(count_, static_cast<int32_t>(padded(rows, BLOCK)));
    columns_ = std::max(columns_, static_cast<int32_t>(padded(columns, STRIDE)));
    const auto numbers = static_cast<size_t>(count_) * static_cast<size_t>(columns_);
    return data_.reserve(numbers * 4) && scales_.reserve(static_cast<size_t>(count_) * 4) &&
           outliers_.reserve(numbers * sizeof(Outlier)) && counts_.reserve(static_cast<size_t>(count_) * 4) &&
           sums_.reserve(numbers / GROUP * 4);
}

Rows Workspace::rows(int32_t count, int32_t columns, int32_t kind) const {
    Rows rows;
    rows.count = count;
    rows.kind = kind;
    rows.columns = static_cast<int32_t>(layout_of(kind, 1, columns).columns);
    rows.data = data_.as<uint8_t>();
    rows.scales = scales_.as<float>();
    rows.outliers = outliers_.as<Outlier>();
    rows.outlier_counts = counts_.as<int32_t>();
    rows.group_sums = sums_.as<int32_t>();
    return rows;
}

void prepare_rows(Pool &pool, const Prepare &prepare) {
    const int32_t rows = prepare.rows.count;
    const int32_t chunks = rows < ROWS_AT_ONCE ? 1 : static_cast<int32_t>(padded(rows, ROWS_AT_ONCE) / ROWS_AT_ONCE);
    pool.run(chunks, [&](int chunk, Worker &) {
        const int32_t end = std::min(rows, (chunk + 1) * ROWS_AT_ONCE);
        for (int32_t m = chunk * ROWS_AT_ONCE; m < end; m++) pool.kernels().prepare(prepare, m);
    });
}

void multiply_rows(Pool &pool, const Multiply &multiply) {
    const int pairs = multiply.matrix.pairs();
    // whole fours, which kernels for few rows read side by side
    const int fair = pairs / (pool.threads() * 6) / 4 * 4;
    const int each = pool.threads() == 1 ? pairs : std::clamp(fair, 4, 8);
    pool.run((pairs + each - 1) / each, [&](int chunk, Worker &) {
        pool.kernels().multiply(multiply, chunk * each, std::min(pairs, (chunk + 1) * each));
    });
}

// ---- the stage ------------------------------------------------------------------------------------------------------

Stage::Stage(Pool &pool, const bsns_shape &shape, const bsns_block *blocks, int32_t count) : pool_(pool), shape_(shape) {
    head_ = static_cast<int32_t>(padded_head(shape.head_size));
    int64_t inner = 0, qkv = 0;
    for (int32_t i = 0; i < count; i++) {
        Block block{};
        block.parts = blocks[i];
        block.qkv = Matrix(blocks[i].qkv);
        block.out = Matrix(blocks[i].out);
        if (shape.experts > 0) block.router = Matrix(blocks[i].router);
        for (int32_t e = 0; e < std::max(shape.experts, 1); e++) {
            block.up.emplace_back(blocks[i].up[e]);
            block.down.emplace_back(blocks[i].down[e]);
            inner = std::max<int64_t>(inner, block.up.back().padded_rows / (shape.gated ? 2 : 1));
        }
        qkv = std::max<int64_t>(qkv, block.qkv.padded_rows);
        blocks_.push_back(std::move(block));
    }
    hidden_stride_ = static_cast<int32_t>(padded(shape.hidden, STRIDE));
    qkv_stride_ = static_cast<int32_t>(qkv);
    attended_stride_ = static_cast<int32_t>(padded(int64_t{shape.heads} * head_, STRIDE));
    inner_stride_ = static_cast<int32_t>(padded(std::max<int64_t>(inner, shape.experts), STRIDE));
    widest_ = std::max({hidden_stride_, attended_stride_, inner_stride_});
}

bool Stage::reserve(int32_t rows, int32_t tokens) {
    const auto numbers = [&](int32_t stride) { return static_cast<size_t>(rows) * static_cast<size_t>(stride) * 4; };
    return pool_.reserve(static_cast<size_t>(attend_scratch(tokens, head_))) && workspace_.reserve_rows(rows, widest_) &&
           second_.reserve_rows(rows, hidden_stride_) && hidden_.reserve(numbers(hidden_stride_)) &&
           added_.reserve(numbers(hidden_stride_)) && qkv_.reserve(numbers(qkv_stride_)) &&
           attended_.reserve(numbers(attended_stride_)) && inner_.reserve(numbers(inner_stride_)) &&
           cosines_.reserve(numbers(std::max(shape_.rotary_size / 2, 1))) &&
           sines_.reserve(numbers(std::max(shape_.rotary_size / 2, 1)));
}

bool Stage::run(
    int32_t first, int32_t end, const bsns_segment *segments, int32_t count, const void *input, void *output, int32_t kind
) {
    int32_t rows = 0, tokens = 0;
    rows_.clear();
    tasks_.clear();
    for (int32_t i = 0; i < count; i++) {
        const bsns_segment &segment = segments[i];
        const auto *cache = reinterpret_cast<const SessionCache *>(segment.cache);
        for (int32_t r = 0; r < segment.rows; r += ATTEND_ROWS)
            tasks_.push_back({cache, rows + r, segment.position + r, std::min(ATTEND_ROWS, segment.rows - r)});
        for (int32_t r = 0; r < segment.rows; r++) rows_.push_back({cache, segment.position + r});
        rows += segment.rows;
        tokens = std::max(tokens, segment.position + segment.rows);
    }
    // the latest tokens of a chunk see most: whoever takes them last would be waited for
    std::stable_sort(tasks_.begin(), tasks_.end(), [](const Task &a, const Task &b) {
        return int64_t{a.rows} * (a.position + a.rows) > int64_t{b.rows} * (b.position + b.rows);
    });
    if (!reserve(rows, tokens)) return false;
    const Kernels &kernels = pool_.kernels();
    const uint32_t mode = kernels.enter();
    const int64_t bytes = int64_t{shape_.hidden} * (kind == BSNS_FLOAT32 ? 4 : 2);
    auto *hidden = hidden_.as<float>();
    for (int32_t m = 0; m < rows; m++) {
        float *row = hidden + int64_t{m} * hidden_stride_;
        kernels.convert(static_cast<const uint8_t *>(input) + m * bytes, kind, row, shape_.hidden);
        std::fill(row + shape_.hidden, row + hidden_stride_, 0.0f);
    }
    rotated_ = nullptr;
    for (int32_t index = first; index < end; index++) {
        run_block(index, rows);
        const bool last = index + 1 == end;
        if (kind == BSNS_FLOAT32 && !last) continue;
        // every block passes on what it would send to another stage: a number does not depend on where a model is cut
        for (int32_t m = 0; m < rows; m++) {
            float *row = hidden + int64_t{m} * hidden_stride_;
            uint8_t *to = static_cast<uint8_t *>(output) + m * bytes;
            kernels.restore(row, kind, to, shape_.hidden);
            if (!last) kernels.convert(to, kind, row, shape_.hidden);
        }
    }
    kernels.leave(mode);
    return true;
}

// Cosines and sines of all rows, unless those of the block before serve; in float32, as the model library does.
void Stage::rotate(const Block &block, int32_t rows) {
    const int32_t half = shape_.rotary_size / 2;
    const float *frequencies = block.parts.inverse_frequencies;
    if (half == 0 || (frequencies == rotated_ && block.parts.rotary_scale == rotated_scale_)) return;
    auto *cosines = cosines_.as<float>(), *sines = sines_.as<float>();
    for (int32_t m = 0; m < rows; m++) {
        const auto position = static_cast<float>(rows_[static_cast<size_t>(m)].position);
        for (int32_t i = 0; i < half; i++) {
            const float angle = position * frequencies[i];
            cosines[m * half + i] = std::cos(angle) * block.parts.rotary_scale;
            sines[m * half + i] = std::sin(angle) * block.parts.rotary_scale;
        }
    }
    rotated_ = frequencies;
    rotated_scale_ = block.parts.rotary_scale;
}

Prepare Stage::norm_of(const float *input, const float *weight, const float *bias) const {
    Prepare prepare{};
    prepare.input = input;
    prepare.stride = hidden_stride_;
    prepare.columns = shape_.hidden;
    prepare.norm = weight == nullptr ? NO_NORM : shape_.norm;
    prepare.weight = weight;
    prepare.bias = bias;
    prepare.epsilon = shape_.epsilon;
    prepare.outlier = shape_.outlier;
    return prepare;
}

void Stage::run_block(int32_t index, int32_t rows) {
    const Block &block = blocks_[static_cast<size_t>(index)];
    const bsns_block &parts = block.parts;
    auto *hidden = hidden_.as<float>(), *added = added_.as<float>();

    Prepare prepare = norm_of(hidden, parts.attention_norm, parts.attention_norm_bias);
    prepare.rows = workspace_.rows(rows, shape_.hidden, block.qkv.kind);
    prepare_rows(pool_, prepare);
    Rows ahead;
    if (shape_.parallel) {  // the MLP reads what attention reads, before anything is added
        Prepare second = norm_of(hidden, parts.mlp_norm, parts.mlp_norm_bias);
        second.rows = ahead = second_.rows(rows, shape_.hidden, block.up[0].kind);
        prepare_rows(pool_, second);
    }
    Multiply multiply{};
    multiply.matrix = block.qkv;
    multiply.rows = prepare.rows;
    multiply.output = qkv_.as<float>();
    multiply.stride = qkv_stride_;
    multiply.bias = parts.qkv_bias;
    multiply_rows(pool_, multiply);

    attend(index, rows);

    Prepare attended{};
    attended.input = attended_.as<float>();
    attended.stride = attended_stride_;
    attended.columns = shape_.heads * head_;
    attended.norm = NO_NORM;
    attended.outlier = shape_.outlier;
    attended.rows = workspace_.rows(rows, shape_.heads * head_, block.out.kind);
    prepare_rows(pool_, attended);
    multiply = Multiply{};
    multiply.matrix = block.out;
    multiply.rows = attended.rows;
    multiply.output = parts.after_attention_norm == nullptr ? hidden : added;
    multiply.stride = hidden_stride_;
    multiply.finish = parts.after_attention_norm == nullptr ? Finish::ADD : Finish::STORE;
    multiply.bias = parts.out_bias;
    multiply_rows(pool_, multiply);
    if (parts.after_attention_norm != nullptr) {
        const Prepare after = norm_of(added, parts.after_attention_norm, nullptr);
        for (int32_t m = 0; m < rows; m++) pool_.kernels().normalize_add(after, m, hidden + int64_t{m} * hidden_stride_);
    }

    if (shape_.experts > 0) {
        run_experts(block, rows, hidden);
        return;
    }
    if (!shape_.parallel) {
        Prepare second = norm_of(hidden, parts.mlp_norm, parts.mlp_norm_bias);
        second.rows = ahead = workspace_.rows(rows, shape_.hidden, block.up[0].kind);
        prepare_rows(pool_, second);
    }
    run_mlp(block, rows, ahead, hidden);
}

void Stage::attend(int32_t index, int32_t rows) {
    const Block &block = blocks_[static_cast<size_t>(index)];
    const bsns_block &parts = block.parts;
    rotate(block, rows);
    const Heads heads{
        shape_.heads,     shape_.kv_heads, shape_.head_size,         head_,        shape_.rotary_size, parts.query_norm,
        parts.key_norm, shape_.epsilon,  shape_.attention_scale, parts.window,
    };
    const int32_t half = shape_.rotary_size / 2;
    auto *qkv = qkv_.as<float>();
    const Kernels &kernels = pool_.kernels();
    const int32_t chunks = rows < ROWS_AT_ONCE ? 1 : static_cast<int32_t>(padded(rows, ROWS_AT_ONCE) / ROWS_AT_ONCE);
    pool_.run(chunks, [&](int chunk, Worker &) {
        const int32_t end = std::min(rows, (chunk + 1) * ROWS_AT_ONCE);
        for (int32_t m = chunk * ROWS_AT_ONCE; m < end; m++) {
            const Row &row = rows_[static_cast<size_t>(m)];
            const Place place{
                qkv + int64_t{m} * qkv_stride_, cosines_.as<float>() + m * half, sines_.as<float>() + m * half,
                row.cache->layer(index), row.position,
            };
            kernels.place(place, heads);
        }
    });
    const auto tasks = static_cast<int32_t>(tasks_.size());
    pool_.run(tasks * shape_.kv_heads, [&](int chunk, Worker &worker) {
        const Task &task = tasks_[static_cast<size_t>(chunk / shape_.kv_heads)];
        const Attend attend{
            heads,
            task.cache->layer(index),
            qkv + int64_t{task.row} * qkv_stride_,
            qkv_stride_,
            attended_.as<float>() + int64_t{task.row} * attended_stride_,
            attended_stride_,
            task.position,
            task.rows,
            chunk % shape_.kv_heads,
        };
        kernels.attend(attend, worker);
    });
}

void Stage::run_mlp(const Block &block, int32_t rows, const Rows &prepared, float *residual) {
    const bsns_block &parts = block.parts;
    auto *inner = inner_.as<float>(), *added = added_.as<float>();
    Multiply multiply{};
    multiply.matrix = block.up[0];
    multiply.rows = prepared;
    multiply.output = inner;
    multiply.stride = inner_stride_;
    multiply.finish = shape_.gated ? Finish::GATE : Finish::ACTIVATE;
    multiply.activation = shape_.activation;
    multiply.bias = parts.up_bias;
    multiply_rows(pool_, multiply);

    Prepare prepare{};
    prepare.input = inner;
    prepare.stride = inner_stride_;
    prepare.columns = block.down[0].columns;
    prepare.norm = NO_NORM;
    prepare.outlier = shape_.outlier;
    prepare.rows = workspace_.rows(rows, block.down[0].columns, block.down[0].kind);
    prepare_rows(pool_, prepare);
    multiply = Multiply{};
    multiply.matrix = block.down[0];
    multiply.rows = prepare.rows;
    multiply.output = parts.after_mlp_norm == nullptr ? residual : added;
    multiply.stride = hidden_stride_;
    multiply.finish = parts.after_mlp_norm == nullptr ? Finish::ADD : Finish::STORE;
    multiply.bias = parts.down_bias;
    multiply_rows(pool_, multiply);
    if (parts.after_mlp_norm == nullptr) return;
    const Prepare after = norm_of(added, parts.after_mlp_norm, nullptr);
    for (int32_t m = 0; m < rows; m++) pool_.kernels().normalize_add(after, m, residual + int64_t{m} * hidden_stride_);
}

// Each row through the experts its router chooses, expert by expert.
void Stage::run_experts(const Block &block, int32_t rows, float *residual) {
    const bsns_block &parts = block.parts;
    const int32_t experts = shape_.experts, chosen = shape_.experts_per_token;
    auto *inner = inner_.as<float>(), *normed = added_.as<float>();
    // the norm's result in float32, from which every expert's rows are prepared
    Prepare norm = norm_of(residual, parts.mlp_norm, parts.mlp_norm_bias);
    norm.rows = second_.rows(rows, shape_.hidden, BSNS_FLOAT32);
    prepare_rows(pool_, norm);
    for (int32_t m = 0; m < rows; m++) {
        float *row = normed + int64_t{m} * hidden_stride_;
        std::fill(row, row + hidden_stride_, 0.0f);
        pool_.kernels().normalize_add(norm, m, row);
    }
    Multiply route{};
    route.matrix = block.router;
    route.rows = norm.rows;
    route.output = inner;
    route.stride = inner_stride_;
    multiply_rows(pool_, route);

    std::vector<std::vector<int32_t>> rows_of(static_cast<size_t>(experts));
    std::vector<std::vector<float>> weights_of(static_cast<size_t>(experts));
    std::vector<int32_t> order(static_cast<size_t>(experts));
    for (int32_t m = 0; m < rows; m++) {
        const float *scores = inner + int64_t{m} * inner_stride_;
        std::iota(order.begin(), order.end(), 0);
        // ties go to the lower number; a score that is no number comes last, so that there is an order at all
        const auto better = [&](int32_t a, int32_t b) {
            const float x = std::isnan(scores[a]) ? -INFINITY : scores[a];
            const float y = std::isnan(scores[b]) ? -INFINITY : scores[b];
            return x > y || (x == y && a < b);
        };
        std::partial_sort(order.begin(), order.begin() + chosen, order.end(), better);
        const float top = scores[order[0]];
        float total = 0;
        for (int32_t e = 0; e < (shape_.normalize_experts ? chosen : experts); e++)
            total += std::exp(scores[order[static_cast<size_t>(e)]] - top);
        for (int32_t i = 0; i < chosen; i++) {
            const auto expert = static_cast<size_t>(order[static_cast<size_t>(i)]);
            rows_of[expert].push_back(m);
            weights_of[expert].push_back(std::exp(scores[expert] - top) / total);
        }
    }
    for (size_t e = 0; e < static_cast<size_t>(experts); e++) {
        const auto count = static_cast<int32_t>(rows_of[e].size());
        if (count == 0) continue;
        Prepare prepare = norm_of(normed, nullptr, nullptr);
        prepare.from = rows_of[e].data();
        prepare.rows = workspace_.rows(count, shape_.hidden, block.up[e].kind);
        prepare_rows(pool_, prepare);
        Multiply multiply{};
        multiply.matrix = block.up[e];
        multiply.rows = prepare.rows;
        multiply.output = inner;
        multiply.stride = inner_stride_;
        multiply.finish = shape_.gated ? Finish::GATE : Finish::ACTIVATE;
        multiply.activation = shape_.activation;
        multiply_rows(pool_, multiply);

        Prepare down{};
        down.input = inner;
        down.stride = inner_stride_;
        down.columns = block.down[e].columns;
        down.norm = NO_NORM;
        down.outlier = shape_.outlier;
        down.rows = workspace_.rows(count, block.down[e].columns, block.down[e].kind);
        prepare_rows(pool_, down);
        multiply = Multiply{};
        multiply.matrix = block.down[e];
        multiply.rows = down.rows;
        multiply.output = residual;
        multiply.stride = hidden_stride_;
        multiply.finish = Finish::ADD;
        multiply.to = rows_of[e].data();
        multiply.weights = weights_of[e].data();
        multiply_rows(pool_, multiply);
    }
}

}  // namespace bsns
