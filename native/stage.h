// A stage: contiguous decoder blocks, and one call that takes a batch through them.
#pragma once

#include <cstdint>
#include <vector>

#include "bsns_native.h"
#include "kernels.h"
#include "memory.h"
#include "pool.h"

namespace bsns {

// One session's keys and values on all blocks of a stage.
class SessionCache {
  public:
    SessionCache(const bsns_shape &shape, int32_t blocks, int32_t tokens);
    ~SessionCache() { free_memory(memory_, bytes_); }
    SessionCache(const SessionCache &) = delete;
    SessionCache &operator=(const SessionCache &) = delete;

    bool exists() const { return memory_ != nullptr; }
    int32_t tokens() const { return tokens_; }
    int32_t blocks() const { return blocks_; }
    Cache layer(int32_t index) const;

  private:
    int32_t tokens_, blocks_, kind_, kv_heads_;
    int64_t head_bytes_, head_scales_, layer_bytes_;
    size_t bytes_;
    uint8_t *memory_;
};

// float32 activations on their way, and what is prepared of them; grows to the largest batch.
class Workspace {
  public:
    // False if there is no memory.
    bool reserve_rows(int32_t rows, int32_t columns);
    // Rows of a kind to be filled, of so many real columns.
    Rows rows(int32_t count, int32_t columns, int32_t kind) const;

  private:
    int32_t columns_ = 0;
    int32_t count_ = 0;
    Scratch data_, scales_, outliers_, counts_, sums_;
};

struct Block {
    Matrix qkv, out, router;
    std::vector<Matrix> up, down;
    bsns_block parts;  // its norms, biases and window
};

class Stage {
  public:
    Stage(Pool &pool, const bsns_shape &shape, const bsns_block *blocks, int32_t count);

    const bsns_shape &shape() const { return shape_; }
    int32_t count() const { return static_cast<int32_t>(blocks_.size()); }

    // Arguments as of bsns_stage_run, checked before. False if there is no memory.
    bool run(
        int32_t first, int32_t end, const bsns_segment *segments, int32_t count, const void *input, void *output, int32_t kind
    );

  private:
    struct Row {
        const SessionCache *cache;
        int32_t position;
    };
    struct Task {
        const SessionCache *cache;
        int32_t row, position, rows;
    };

    bool reserve(int32_t rows, int32_t tokens);
    void rotate(const Block &block, int32_t rows);
    void run_block(int32_t index, int32_t rows);
    void attend(int32_t index, int32_t rows);
    void run_mlp(const Block &block, int32_t rows, const Rows &prepared, float *residual);
    void run_experts(const Block &block, int32_t rows, float *residual);
    Prepare norm_of(const float *input, const float *weight, const float *bias) const;

    Pool &pool_;
    bsns_shape shape_;
    std::vector<Block> blocks_;
    int32_t head_, hidden_stride_, qkv_stride_, attended_stride_, inner_stride_, widest_;
    Workspace workspace_, second_;
    Scratch hidden_, added_, qkv_, attended_, inner_, cosines_, sines_;
    std::vector<Row> rows_;
    std::vector<Task> tasks_;
    const float *rotated_ = nullptr;
    float rotated_scale_ = 0;
};

// Prepare all rows.
void prepare_rows(Pool &pool, const Prepare &prepare);
void multiply_rows(Pool &pool, const Multiply &multiply);

}  // namespace bsns
