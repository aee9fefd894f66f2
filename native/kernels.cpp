// The kernels, compiled once for each set of instructions as namespace BSNS_SET.
//
// What a row gives does not depend on the rows beside it: every kernel adds up in the same order however many rows it is
// given. That is what makes a replayed prompt, a larger batch and a speculated token equal what was computed before, bit by
// bit. For bfloat16 the order is that of AMX: within 32 columns the even and the odd ones apart, then their sum added.
#include "kernels.h"

#include <cmath>
#include <type_traits>

#include "codecs.h"
#include "numbers.h"
#include "simd.h"

#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#define BSNS_NAME_OF(set) #set
#define BSNS_NAME(set) BSNS_NAME_OF(set)

namespace {

using namespace bsns;

#if defined(__AMX_INT8__)
constexpr bool HAS_AMX = true;
#else
constexpr bool HAS_AMX = false;
#endif
// Activations are made unsigned, because the instruction multiplies unsigned with signed bytes.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool OFFSET = true;
#else
constexpr bool OFFSET = false;
#endif

// How many rows a kernel keeps in registers at once, beside 32 columns.
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 8;
#elif defined(__AVX2__)
constexpr int TILE_ROWS = 3;
#elif defined(__ARM_NEON)
constexpr int TILE_ROWS = 3;
#else
constexpr int TILE_ROWS = 1;
#endif
constexpr int HALF_ROWS = LANES == 16 ? 4 : 1;  // of bfloat16 and int4, which need registers for two halves
constexpr int AHEAD = 2048;  // bytes that are fetched ahead of a stream of weights

// ---- dot products of four bytes -------------------------------------------------------------------------------------

// sum += a * b over the four bytes of each lane, a unsigned.
BSNS_INLINE Ints dot_unsigned(Ints sum, Ints a, Ints b) {
#if defined(__AVX512VNNI__)
    sum.part[0] = (Vi)_mm512_dpbusd_epi32((__m512i)sum.part[0], (__m512i)a.part[0], (__m512i)b.part[0]);
    return sum;
#elif defined(__AVXVNNI__)
    BSNS_EACH sum.part[i] = (Vi)_mm256_dpbusd_avx_epi32((__m256i)sum.part[i], (__m256i)a.part[i], (__m256i)b.part[i]);
    return sum;
#elif defined(__AVX512BW__)
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)a.part[0], (__m512i)b.part[0]);
    sum.part[0] += (Vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
    return sum;
#elif defined(__AVX2__)
    BSNS_EACH {
        const __m256i pairs = _mm256_maddubs_epi16((__m256i)a.part[i], (__m256i)b.part[i]);
        sum.part[i] += (Vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
    return sum;
#elif defined(__ARM_FEATURE_DOTPROD)
    BSNS_EACH sum.part[i] = (Vi)vdotq_s32((int32x4_t)sum.part[i], (int8x16_t)a.part[i], (int8x16_t)b.part[i]);
    return sum;  // as signed: only called with a below 128 here
#else
    for (int byte = 0; byte < 4; byte++) {
        const Ints x = shift_right(a, 8 * byte) & splat_int(255);
        sum = sum + x * shift_right_signed(shift_left(b, 24 - 8 * byte), 24);
    }
    return sum;
#endif
}

// The same, both signed; for sets without OFFSET.
BSNS_INLINE Ints dot_signed(Ints sum, Ints a, Ints b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    BSNS_EACH {
        const __m256i sign = _mm256_sign_epi8((__m256i)b.part[i], (__m256i)a.part[i]);
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)a.part[i]), sign);
        sum.part[i] += (Vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
    return sum;
#elif defined(__ARM_FEATURE_DOTPROD)
    return dot_unsigned(sum, a, b);
#else
    for (int byte = 0; byte < 4; byte++) {
        const Ints x = shift_right_signed(shift_left(a, 24 - 8 * byte), 24);
        sum = sum + x * shift_right_signed(shift_left(b, 24 - 8 * byte), 24);
    }
    return sum;
#endif
}

// sum += a * b, where a fits 16 bits with its sign and b 15 without one.
BSNS_INLINE Ints add_product(Ints sum, Ints a, Ints b) {
#if defined(__AVX512VNNI__)
    sum.part[0] = (Vi)_mm512_dpwssd_epi32((__m512i)sum.part[0], (__m512i)a.part[0], (__m512i)b.part[0]);
    return sum;
#elif defined(__AVX512BW__)
    sum.part[0] += (Vi)_mm512_madd_epi16((__m512i)a.part[0], (__m512i)b.part[0]);
    return sum;
#elif defined(__AVX2__)
    BSNS_EACH sum.part[i] += (Vi)_mm256_madd_epi16((__m256i)a.part[i], (__m256i)b.part[i]);
    return sum;
#else
    return sum + a * b;
#endif
}

BSNS_INLINE int32_t four_bytes(const uint8_t *at) {
    int32_t value;
    std::memcpy(&value, at, 4);
    return value;
}

// ---- preparing rows -------------------------------------------------------------------------------------------------

BSNS_INLINE void store_bfloat16(uint16_t *at, Floats value) {
    uint32_t lane[16];
    const Ints bits = as_ints(value);
    const Ints rounded = bits + splat_int(0x7fff) + (shift_right(bits, 16) & splat_int(1));
    Ints out;
    BSNS_EACH {
        const Vi nan = (Vi)(value.part[i] != value.part[i]);
        const Vi quiet = (Vi)((Vu)bits.part[i] >> 16) | 0x40;
        out.part[i] = (nan & quiet) | (~nan & (Vi)((Vu)rounded.part[i] >> 16));
    }
    store_line(lane, out);
    for (int i = 0; i < 16; i++) at[i] = static_cast<uint16_t>(lane[i]);
}

BSNS_INLINE void store_int8(int8_t *at, Ints value) {
    int32_t lane[16];
    store_line(lane, value);
    for (int i = 0; i < 16; i++) at[i] = static_cast<int8_t>(lane[i]);
}

// What a norm makes of one row, 16 numbers at a time.
class Normed {
    const float *input, *weight, *bias;
    int64_t columns;
    float mean, scale;
    bool plain;

  public:

    Normed(const Prepare &from, const float *row)
        : input(row), weight(from.weight), bias(from.bias), columns(from.columns) {
        plain = from.norm == NO_NORM;
        mean = 0;
        scale = 1;
        if (plain) return;
        const auto count = static_cast<float>(from.columns);
        const int64_t whole = from.columns / 16 * 16;
        if (from.norm == BSNS_LAYER_NORM) {
            Floats total = splat(0);
            for (int64_t k = 0; k < whole; k += 16) total = total + load(row + k);
            mean = sum(total);
            for (int64_t k = whole; k < from.columns; k++) mean += row[k];
            mean /= count;
        }
        Floats squares = splat(0);
        for (int64_t k = 0; k < whole; k += 16) {
            const Floats x = load(row + k) - splat(mean);
            squares = fma(x, x, squares);
        }
        float total = sum(squares);
        for (int64_t k = whole; k < from.columns; k++) total += (row[k] - mean) * (row[k] - mean);
        scale = 1.0f / std::sqrt(total / count + from.epsilon);
    }

    // Zero behind the last column, whatever lies there.
    BSNS_INLINE Floats at(int64_t k) const {
        if (k + 16 <= columns) return inside(k);
        float lane[16] = {};
        if (k < columns) {
            store(lane, inside(k));
            for (int64_t i = columns - k; i < 16; i++) lane[i] = 0;
        }
        return load(lane);
    }

  private:
    BSNS_INLINE Floats inside(int64_t k) const {
        Floats x = load(input + k);
        if (plain) return x;
        x = (x - splat(mean)) * splat(scale) * load(weight + k);
        return bias == nullptr ? x : x + load(bias + k);
    }
};

// int8 numbers of a row; those of at least `limit` are set apart.
void prepare_int8(const Prepare &from, const Normed &row, int m, uint8_t *line, int64_t stride) {
    const Rows &rows = from.rows;
    Floats most = splat(0), poison = splat(0), squares = splat(0);
    for (int64_t k = 0; k < rows.columns; k += 16) {
        const Floats x = row.at(k);
        most = max(most, absolute(x));
        squares = fma(x, x, squares);
        poison = fma(x, splat(0), poison);  // NaN if anything is not finite
    }
    const float poisoned = sum(poison);
    float largest = greatest(most);
    const float usual = std::sqrt(sum(squares) / static_cast<float>(from.columns));
    const float limit = from.outlier > 0 ? from.outlier * (usual < 1 ? usual : 1) : INFINITY;
    const bool apart = largest >= limit;
    int32_t count = 0;
    if (apart) {
        Outlier *outliers = rows.outliers + static_cast<int64_t>(m) * rows.columns;
        Floats rest = splat(0);
        for (int64_t k = 0; k < rows.columns; k += 16) {
            const Floats x = row.at(k), size = absolute(x);
            const Ints above = at_least(size, splat(limit));
            rest = max(without(size, above), rest);
            if (!any(above)) continue;
            float lane[16];
            store(lane, x);
            for (int i = 0; i < 16; i++)
                if (std::fabs(lane[i]) >= limit) outliers[count++] = {static_cast<uint32_t>(k + i), lane[i]};
        }
        largest = greatest(rest);
    }
    rows.outlier_counts[m] = count;
    rows.scales[m] = largest / 127.0f + poisoned;
    const Floats inverse = splat(largest > 0 && poisoned == 0 ? 127.0f / largest : 0.0f);
    for (int64_t k = 0; k < rows.columns; k += 16) {
        Floats x = row.at(k);
        if (apart) x = without(x, at_least(absolute(x), splat(limit)));
        if (poisoned != 0) x = splat(0);
        store_int8(reinterpret_cast<int8_t *>(line + k / LINE * stride + k % LINE), nearest(x * inverse));
    }
    if (rows.kind != BSNS_INT4) return;
    for (int64_t group = 0; group < rows.columns / GROUP; group++) {
        const auto *at = reinterpret_cast<const int8_t *>(line + group * GROUP / LINE * stride + group * GROUP % LINE);
        int32_t total = 0;
        for (int i = 0; i < GROUP; i++) total += at[i];
        rows.group_sums[static_cast<int64_t>(m) * (rows.columns / GROUP) + group] = -8 * total;
    }
}

void prepare(const Prepare &from, int m) {
    const Rows &rows = from.rows;
    const int64_t source = from.from == nullptr ? m : from.from[m];
    const Normed row(from, from.input + source * from.stride);
    const int panel = m / BLOCK;
    const int64_t stride = static_cast<int64_t>(rows.panel_rows(panel)) * LINE;
    uint8_t *line = rows.panel(panel) + m % BLOCK * LINE;
    if (rows.kind == BSNS_FLOAT32) {
        for (int64_t k = 0; k < rows.columns; k += 16) store(reinterpret_cast<float *>(line + k / 16 * stride), row.at(k));
    } else if (rows.kind == BSNS_BFLOAT16) {
        for (int64_t k = 0; k < rows.columns; k += 16)
            store_bfloat16(reinterpret_cast<uint16_t *>(line + k / 32 * stride + k % 32 * 2), row.at(k));
    } else {
        prepare_int8(from, row, m, line, stride);
    }
}

void normalize_add(const Prepare &from, int m, float *output) {
    const int64_t columns = padded(from.columns, BLOCK);
    const Normed row(from, from.input + m * from.stride);
    for (int64_t k = 0; k < columns; k += 16) store(output + k, load(output + k) + row.at(k));
}

// ---- finishing results ----------------------------------------------------------------------------------------------

BSNS_INLINE Floats activate(Floats x, int32_t activation) {
    if (activation == BSNS_SILU) return x / (splat(1) + exponential(splat(0) - x));
    if (activation == BSNS_GELU_TANH) {
        const Floats inner = fma(x * x * x, splat(0.044715f), x) * splat(-2 * 0.7978845608f);  // -2 sqrt(2 / pi)
        return x / (splat(1) + exponential(inner));
    }
    float lane[16];
    store(lane, x);
    for (float &each : lane) each = 0.5f * each * (1.0f + std::erf(each * 0.70710678118f));
    return load(lane);
}

// 16 factors as whole numbers.
BSNS_INLINE Ints load_factors(const uint8_t *at) {
#if defined(__AVX512F__)
    Ints out;
    out.part[0] = (Vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at)));
    return out;
#else
    int32_t lane[16];
    for (int i = 0; i < 16; i++) lane[i] = at[i];
    return load_line(lane);
#endif
}

// The int8 weight of a column for 16 rows, as float32.
BSNS_INLINE Floats weight_of(const Matrix &matrix, int block, uint32_t column) {
    const uint8_t *weights = matrix.block(block);
    if (matrix.kind == BSNS_INT8) return byte_of(load_line(weights + column / 4 * LINE), column % 4);
    const uint32_t group = column / GROUP, line = column % GROUP / 4;
    Ints halves = load_line(weights + (group * 4 + line % 4) * LINE);
    halves = shift_right(halves, 8 * (column % 4) + (line < 4 ? 0 : 4)) & splat_int(15);
    return to_floats((halves - splat_int(8)) * load_factors(matrix.block_factors(block) + group * BLOCK));
}

// From whole numbers to what they stand for.
BSNS_INLINE Floats scaled(const Multiply &args, int block, int m, Ints whole) {
    const Matrix &matrix = args.matrix;
    const Rows &rows = args.rows;
    Floats x = to_floats(whole) * splat(rows.scales[m]);
    const int32_t count = rows.outlier_counts[m];
    if (count > 0) {
        const Outlier *outliers = rows.outliers + static_cast<int64_t>(m) * rows.columns;
        for (int32_t i = 0; i < count; i++)
            x = fma(splat(outliers[i].value), weight_of(matrix, block, outliers[i].column), x);
    }
    return x * load(matrix.scales + block * BLOCK);
}

// `results` is [2 blocks][rows from `first`][16], whole numbers for int8 and int4.
BSNS_INLINE void finish(const Multiply &args, int pair, int first, int count, const float *results, int block_stride) {
    const bool whole = args.matrix.kind == BSNS_INT8 || args.matrix.kind == BSNS_INT4;
    const int block = 2 * pair;
    for (int i = 0; i < count; i++) {
        const int m = first + i;
        Floats result[2];
        for (int b = 0; b < 2; b++) {
            const float *at = results + b * block_stride + i * BLOCK;
            result[b] = whole ? scaled(args, block + b, m, load_line(at)) : load(at);
            if (args.bias != nullptr) result[b] = result[b] + load(args.bias + (block + b) * BLOCK);
            if (args.weights != nullptr) result[b] = result[b] * splat(args.weights[m]);
        }
        const int64_t row = args.to == nullptr ? m : args.to[m];
        float *out = args.output + row * args.stride;
        if (args.finish == Finish::GATE) {
            store(out + pair * BLOCK, activate(result[0], args.activation) * result[1]);
            continue;
        }
        out += pair * PAIR;
        for (int b = 0; b < 2; b++) {
            if (args.finish == Finish::ADD) result[b] = result[b] + load(out + b * BLOCK);
            if (args.finish == Finish::ACTIVATE) result[b] = activate(result[b], args.activation);
            store(out + b * BLOCK, result[b]);
        }
    }
}

// Fetches what `finish` will write.
BSNS_INLINE void fetch_output(const Multiply &args, int pair, int first, int count) {
    const int64_t at = args.finish == Finish::GATE ? pair * BLOCK : pair * PAIR;
    for (int m = first; m < first + count; m++) {
        const float *out = args.output + (args.to == nullptr ? m : args.to[m]) * args.stride + at;
        __builtin_prefetch(out, 1);
        if (args.finish != Finish::GATE) __builtin_prefetch(out + BLOCK, 1);
    }
}

// ---- multiplying with vectors ---------------------------------------------------------------------------------------

// What one call of a vector kernel sees: B blocks of weights one after another, and R rows of a panel. The more blocks are
// read side by side, the faster memory gives them: 13 GB/s a core with two, 16 with four, 17.5 with eight.
struct Strip {
    const uint8_t *weights;
    int64_t block_bytes;
    const uint8_t *rows;  // the first row's first line
    int64_t stride;  // from line to line of a row
    int64_t lines;
};

constexpr int ALONE_BLOCKS = LANES == 16 ? 8 : LANES == 8 ? 4 : 2;  // for one row

template <int R, int B> void multiply_float32(const Strip &strip, float *results) {
    Floats sums[R][B];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) sums[r][b] = splat(0);
    for (int64_t line = 0; line < strip.lines; line++) {
        const auto *row = reinterpret_cast<const float *>(strip.rows + line * strip.stride);
        for (int k = 0; k < 16; k++) {
            const uint8_t *at = strip.weights + (line * 16 + k) * LINE;
            Floats weights[B];
            for (int b = 0; b < B; b++) weights[b] = as_floats(load_line(at + b * strip.block_bytes));
            for (int r = 0; r < R; r++) {
                const Floats x = splat(row[r * 16 + k]);
                for (int b = 0; b < B; b++) sums[r][b] = fma(x, weights[b], sums[r][b]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) store(results + (b * R + r) * BLOCK, sums[r][b]);
}

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
// Twice as fast as the order of AMX, which a processor without AMX need not keep.
template <int R, int B> void multiply_bfloat16(const Strip &strip, float *results) {
    __m512 sums[R][B];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) sums[r][b] = _mm512_setzero_ps();
    for (int64_t line = 0; line < strip.lines; line++) {
        const uint8_t *row = strip.rows + line * strip.stride;
        for (int k = 0; k < 16; k++) {
            const uint8_t *at = strip.weights + (line * 16 + k) * LINE;
            __m512bh weights[B];
            for (int b = 0; b < B; b++) weights[b] = (__m512bh)load_line(at + b * strip.block_bytes).part[0];
            for (int r = 0; r < R; r++) {
                const auto x = (__m512bh)_mm512_set1_epi32(four_bytes(row + r * LINE + k * 4));
                for (int b = 0; b < B; b++) sums[r][b] = _mm512_dpbf16_ps(sums[r][b], x, weights[b]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) _mm512_storeu_ps(results + (b * R + r) * BLOCK, sums[r][b]);
}
#else
template <int R, int B> void multiply_bfloat16(const Strip &strip, float *results) {
    Floats sums[R][B];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) sums[r][b] = splat(0);
    for (int64_t line = 0; line < strip.lines; line++) {
        const uint8_t *row = strip.rows + line * strip.stride;
        Floats even[R][B], odd[R][B];
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++) even[r][b] = odd[r][b] = splat(0);
        for (int k = 0; k < 16; k++) {
            const uint8_t *at = strip.weights + (line * 16 + k) * LINE;
            Floats low[R], high[R];
            for (int r = 0; r < R; r++) {
                const Ints x = splat_int(four_bytes(row + r * LINE + k * 4));
                low[r] = low_half(x);
                high[r] = high_half(x);
            }
            for (int b = 0; b < B; b++) {
                const Ints weights = load_line(at + b * strip.block_bytes);
                const Floats first = low_half(weights), second = high_half(weights);
                for (int r = 0; r < R; r++) {
                    even[r][b] = fma(low[r], first, even[r][b]);
                    odd[r][b] = fma(high[r], second, odd[r][b]);
                }
            }
        }
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++) sums[r][b] = sums[r][b] + (even[r][b] + odd[r][b]);
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) store(results + (b * R + r) * BLOCK, sums[r][b]);
}
#endif

template <int R, int B> void multiply_int8(const Strip &strip, const int32_t *offsets, float *results) {
    Ints sums[R][B];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) sums[r][b] = splat_int(0);
    for (int64_t line = 0; line < strip.lines; line++) {
        const uint8_t *row = strip.rows + line * strip.stride;
        for (int k = 0; k < 16; k++) {
            const uint8_t *at = strip.weights + (line * 16 + k) * LINE;
            Ints weights[B];
            for (int b = 0; b < B; b++) weights[b] = load_line(at + b * strip.block_bytes);
            for (int r = 0; r < R; r++) {
                const int32_t bytes = four_bytes(row + r * LINE + k * 4);
                const Ints x = splat_int(OFFSET ? bytes ^ static_cast<int32_t>(0x80808080u) : bytes);
                for (int b = 0; b < B; b++)
                    sums[r][b] = OFFSET ? dot_unsigned(sums[r][b], x, weights[b]) : dot_signed(sums[r][b], x, weights[b]);
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int b = 0; b < B; b++) {
            const Ints whole = OFFSET ? sums[r][b] - load_line(offsets + b * BLOCK) : sums[r][b];
            store_line(results + (b * R + r) * BLOCK, whole);
        }
    }
}

template <int R, int B>
void multiply_int4(const Strip &strip, const uint8_t *factors, const int32_t *group_sums, int64_t groups, float *results) {
    Ints sums[R][B];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) sums[r][b] = splat_int(0);
    const Ints low = splat_int(0x0f0f0f0f);
    for (int64_t group = 0; group < groups; group++) {
        const uint8_t *row = strip.rows + group / 2 * strip.stride + group % 2 * GROUP;
        Ints part[R][B];
        for (int r = 0; r < R; r++)
            for (int b = 0; b < B; b++) part[r][b] = splat_int(group_sums[r * groups + group]);
        for (int line = 0; line < 4; line++) {
            const uint8_t *at = strip.weights + (group * 4 + line) * LINE;
            for (int b = 0; b < B; b++) {
                const Ints halves = load_line(at + b * strip.block_bytes);
                const Ints lower = halves & low, upper = shift_right(halves, 4) & low;
                for (int r = 0; r < R; r++) {
                    part[r][b] = dot_unsigned(part[r][b], lower, splat_int(four_bytes(row + r * LINE + line * 4)));
                    part[r][b] = dot_unsigned(part[r][b], upper, splat_int(four_bytes(row + r * LINE + line * 4 + 16)));
                }
            }
        }
        for (int b = 0; b < B; b++) {
            const Ints factor = load_factors(factors + (b * groups + group) * BLOCK);
            for (int r = 0; r < R; r++) sums[r][b] = add_product(sums[r][b], part[r][b], factor);
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) store_line(results + (b * R + r) * BLOCK, sums[r][b]);
}

// R rows from `first` with B / 2 pairs of blocks.
template <int R, int B> BSNS_INLINE void multiply_strip(const Multiply &args, int pair, int first) {
    const Matrix &matrix = args.matrix;
    const Rows &rows = args.rows;
    const int panel = first / BLOCK;
    const int64_t stride = static_cast<int64_t>(rows.panel_rows(panel)) * LINE;
    const uint8_t *row = rows.panel(panel) + first % BLOCK * LINE;
    const Strip strip{matrix.block(2 * pair), matrix.block_bytes, row, stride, rows.row_bytes() / LINE};
    alignas(64) float results[R * B * BLOCK];
    if (matrix.kind == BSNS_FLOAT32) {
        multiply_float32<R, B>(strip, results);
    } else if (matrix.kind == BSNS_BFLOAT16) {
        multiply_bfloat16<R, B>(strip, results);
    } else if (matrix.kind == BSNS_INT8) {
        multiply_int8<R, B>(strip, matrix.offsets + pair * PAIR, results);
    } else {
        const int64_t groups = matrix.padded_columns / GROUP;
        multiply_int4<R, B>(strip, matrix.block_factors(2 * pair), rows.group_sums + first * groups, groups, results);
    }
    for (int b = 0; b < B; b += 2) finish(args, pair + b / 2, first, R, results + b * R * BLOCK, R * BLOCK);
}

// Calls `with` with how many of the next rows of a panel a kernel takes at once.
template <typename With> BSNS_INLINE int take_rows(const Rows &rows, int first, int most, With &&with) {
    const int left = rows.panel_rows(first / BLOCK) - first % BLOCK, count = left < most ? left : most;
    if constexpr (TILE_ROWS >= 8) {
        if (count >= 8) return with(std::integral_constant<int, 8>{});
    }
    if constexpr (TILE_ROWS >= 4) {
        if (count >= 4) return with(std::integral_constant<int, 4>{});
    }
    if constexpr (TILE_ROWS >= 3) {
        if (count >= 3) return with(std::integral_constant<int, 3>{});
    }
    if constexpr (TILE_ROWS >= 2) {
        if (count >= 2) return with(std::integral_constant<int, 2>{});
    }
    return with(std::integral_constant<int, 1>{});
}

void multiply_with_vectors(const Multiply &args, int first_pair, int end_pair) {
    const int count = args.rows.count;
    int pair = first_pair;
    if (count == 1) {
        for (; pair + ALONE_BLOCKS / 2 <= end_pair; pair += ALONE_BLOCKS / 2) multiply_strip<1, ALONE_BLOCKS>(args, pair, 0);
    }
    const bool halves = args.matrix.kind == BSNS_BFLOAT16 || args.matrix.kind == BSNS_INT4;
    for (; pair < end_pair; pair++) {
        for (int first = 0; first < count;) {
            first += take_rows(args.rows, first, halves ? HALF_ROWS : TILE_ROWS, [&](auto taken) {
                multiply_strip<taken(), 2>(args, pair, first);
                return taken();
            });
        }
    }
}

// ---- multiplying with tiles -----------------------------------------------------------------------------------------

#if defined(__AMX_INT8__)

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t line_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0 to 3 are results. Two panels of rows: 4 and 5 are rows, 6 and 7 weights of two blocks. One panel (`second_rows`
// is 0): 4 is rows, 5 to 7 weights, of four blocks.
void configure_tiles(int first_rows, int second_rows) {
    TileConfig config;
    const int second = second_rows > 0 ? second_rows : first_rows;
    const int fifth = second_rows > 0 ? second_rows : BLOCK;
    const int rows[8] = {first_rows, first_rows, second, second, first_rows, fifth, BLOCK, BLOCK};
    for (int i = 0; i < 8; i++) {
        config.rows[i] = static_cast<uint8_t>(rows[i]);
        config.line_bytes[i] = LINE;
    }
    // GCC 12 takes the configuration for unused without it
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
}

constexpr int TILE_BYTES = BLOCK * LINE;

// `steps` of a line each for two panels (or one) of rows with two blocks of weights; `results` is [2 blocks][32 rows][16].
template <bool WHOLE, bool TWO>
BSNS_INLINE void multiply_tiles(
    const uint8_t *first, const uint8_t *second, const uint8_t *upper, int64_t upper_stride, const uint8_t *lower,
    int64_t lower_stride, int64_t steps, bool begin, bool fetch, float *results
) {
    float *const corners[4] = {
        results, results + PAIR * BLOCK, results + BLOCK * BLOCK, results + PAIR * BLOCK + BLOCK * BLOCK
    };
    if (begin) {
        _tile_zero(0);
        _tile_zero(1);
        if (TWO) {
            _tile_zero(2);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, corners[0], LINE);
        _tile_loadd(1, corners[1], LINE);
        if (TWO) {
            _tile_loadd(2, corners[2], LINE);
            _tile_loadd(3, corners[3], LINE);
        }
    }
    for (int64_t step = 0; step < steps; step++) {
        const int64_t at = step * TILE_BYTES;
        if (fetch) {
            for (int line = 0; line < TILE_BYTES; line += LINE) {
                prefetch(first + at + line + 2 * AHEAD);
                prefetch(second + at + line + 2 * AHEAD);
            }
        }
        if (TWO) {  // of as many rows as fill tiles, weights lie in the first cache, rows in the second
            for (int64_t line = 0; line < upper_stride; line += LINE) prefetch(upper + (step + 2) * upper_stride + line);
            for (int64_t line = 0; line < lower_stride; line += LINE) prefetch(lower + (step + 2) * lower_stride + line);
        }
        _tile_loadd(4, upper + step * upper_stride, LINE);
        _tile_loadd(6, first + at, LINE);
        if (TWO) _tile_loadd(5, lower + step * lower_stride, LINE);
        _tile_loadd(7, second + at, LINE);
        if (WHOLE) {
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            if (TWO) {
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            }
        } else {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (TWO) {
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, corners[0], LINE);
    _tile_stored(1, corners[1], LINE);
    if (TWO) {
        _tile_stored(2, corners[2], LINE);
        _tile_stored(3, corners[3], LINE);
    }
}

// Some steps of a block's int4 weights as int8: (half - 8) * factor.
BSNS_INLINE void unpack_steps(const Matrix &matrix, int64_t block, int64_t step, int64_t steps, uint8_t *into) {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i high = _mm512_set1_epi64(0x1020408000000000);  // as a matrix of bits: the high half of every byte moved down
    constexpr int GROUPS = LINE / GROUP;  // of a step
    const uint8_t *from = matrix.block(block) + step * TILE_BYTES / 2;
    const uint8_t *factors = matrix.block_factors(block) + step * GROUPS * BLOCK;
    for (int64_t group = 0; group < steps * GROUPS; group++) {
        const __m512i factor =
            _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(factors + group * BLOCK)));
        const __m512i twice = _mm512_or_si512(factor, _mm512_slli_epi32(factor, 16));
        __m512i eight = _mm512_slli_epi32(factor, 3);
        eight = _mm512_or_si512(eight, _mm512_slli_epi32(eight, 8));
        eight = _mm512_or_si512(eight, _mm512_slli_epi32(eight, 16));
        for (int line = 0; line < 4; line++, from += LINE, into += LINE) {
            prefetch(from + AHEAD);
            const __m512i halves = _mm512_load_si512(from);
            const __m512i lower = _mm512_and_si512(halves, low);
            const __m512i upper = _mm512_gf2p8affine_epi64_epi8(halves, high, 0);
            // 15 * 15 fits a byte, so that two products fit the halves of 16 bits
            _mm512_store_si512(into, _mm512_sub_epi8(_mm512_mullo_epi16(lower, twice), eight));
            _mm512_store_si512(into + 4 * LINE, _mm512_sub_epi8(_mm512_mullo_epi16(upper, twice), eight));
        }
        into += 4 * LINE;
    }
}

// One panel with four blocks, so that memory is read in four places; `results` is [4 blocks][16 rows][16].
template <int32_t KIND>
void multiply_four(const Matrix &matrix, int64_t block, const uint8_t *rows, int64_t stride, int64_t steps, float *results) {
    constexpr bool WHOLE = KIND != BSNS_BFLOAT16;
    const uint8_t *const weights = matrix.block(block);
    alignas(64) uint8_t unpacked[KIND == BSNS_INT4 ? 8 * TILE_BYTES : 1];  // of two steps
    const auto tile = [&](int64_t step, int b) -> const uint8_t * {
        if (KIND != BSNS_INT4) return weights + step * TILE_BYTES + b * matrix.block_bytes;
        return unpacked + (step % 2 * 4 + b) * TILE_BYTES;
    };
    const auto unpack = [&](int64_t step) {
        if (KIND != BSNS_INT4 || step == steps) return;
        for (int b = 0; b < 4; b++) unpack_steps(matrix, block + b, step, 1, unpacked + (step % 2 * 4 + b) * TILE_BYTES);
    };
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    unpack(0);
    for (int64_t step = 0; step < steps; step++) {
        unpack(step + 1);  // while the tiles multiply what was unpacked before
        for (int b = 0; KIND != BSNS_INT4 && b < 4; b++) {
            for (int line = 0; line < TILE_BYTES; line += LINE)
                prefetch(weights + (step + 4) * TILE_BYTES + b * matrix.block_bytes + line);
        }
        _tile_loadd(4, rows + step * stride, LINE);
        _tile_loadd(5, tile(step, 0), LINE);
        _tile_loadd(6, tile(step, 1), LINE);
        _tile_loadd(7, tile(step, 2), LINE);
        if (WHOLE) {
            _tile_dpbssd(0, 4, 5);
            _tile_dpbssd(1, 4, 6);
            _tile_dpbssd(2, 4, 7);
            _tile_loadd(5, tile(step, 3), LINE);
            _tile_dpbssd(3, 4, 5);
        } else {
            _tile_dpbf16ps(0, 4, 5);
            _tile_dpbf16ps(1, 4, 6);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, tile(step, 3), LINE);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, results, LINE);
    _tile_stored(1, results + BLOCK * BLOCK, LINE);
    _tile_stored(2, results + 2 * BLOCK * BLOCK, LINE);
    _tile_stored(3, results + 3 * BLOCK * BLOCK, LINE);
}

// Weights of two blocks stay in the first cache while so many lines of all rows pass.
constexpr int64_t STEPS_AT_ONCE = 16;
constexpr int ROWS_AT_ONCE = 8 * PAIR;

void multiply_with_tiles(const Multiply &args, int first_pair, int end_pair) {
    const Matrix &matrix = args.matrix;
    const Rows &rows = args.rows;
    constexpr int RESULTS = 2 * PAIR * BLOCK;
    alignas(64) float results[ROWS_AT_ONCE / PAIR * RESULTS];
    alignas(64) uint8_t unpacked[2 * STEPS_AT_ONCE * TILE_BYTES];
    const int64_t steps = rows.row_bytes() / LINE;
    int configured = -1;
    int pair = first_pair;
    if (rows.count <= BLOCK) {
        const auto four = matrix.kind == BSNS_BFLOAT16 ? multiply_four<BSNS_BFLOAT16>
                        : matrix.kind == BSNS_INT8     ? multiply_four<BSNS_INT8>
                                                       : multiply_four<BSNS_INT4>;
        configure_tiles(rows.count, 0);
        for (; pair + 2 <= end_pair; pair += 2) {
            four(matrix, 2 * pair, rows.data, int64_t{rows.count} * LINE, steps, results);
            finish(args, pair, 0, rows.count, results, BLOCK * BLOCK);
            finish(args, pair + 1, 0, rows.count, results + 2 * BLOCK * BLOCK, BLOCK * BLOCK);
        }
    }
    for (; pair < end_pair; pair++) {
        for (int start = 0; start < rows.count; start += ROWS_AT_ONCE) {
            const int end = rows.count - start < ROWS_AT_ONCE ? rows.count : start + ROWS_AT_ONCE;
            for (int64_t step = 0; step < steps; step += STEPS_AT_ONCE) {
                const int64_t some = steps - step < STEPS_AT_ONCE ? steps - step : STEPS_AT_ONCE;
                const uint8_t *left, *right;
                if (matrix.kind == BSNS_INT4) {
                    left = unpacked;
                    right = unpacked + STEPS_AT_ONCE * TILE_BYTES;
                    unpack_steps(matrix, 2 * pair, step, some, unpacked);
                    unpack_steps(matrix, 2 * pair + 1, step, some, unpacked + STEPS_AT_ONCE * TILE_BYTES);
                } else {
                    left = matrix.block(2 * pair) + step * TILE_BYTES;
                    right = matrix.block(2 * pair + 1) + step * TILE_BYTES;
                }
                for (int m = start; m < end; m += PAIR) {
                    const int panel = m / BLOCK, upper = rows.panel_rows(panel) * LINE;
                    const int lower = rows.count - m > BLOCK ? rows.panel_rows(panel + 1) * LINE : 0;
                    if (configured != upper * LINE + lower) {
                        configure_tiles(upper / LINE, lower / LINE);
                        configured = upper * LINE + lower;
                    }
                    const uint8_t *above = rows.panel(panel) + step * upper;
                    const uint8_t *below = lower > 0 ? rows.panel(panel + 1) + step * lower : nullptr;
                    const bool begin = step == 0, fetch = m == 0 && matrix.kind != BSNS_INT4;
                    float *into = results + (m - start) / PAIR * RESULTS;
                    if (step + some == steps) fetch_output(args, pair, m, end - m < PAIR ? end - m : PAIR);
                    if (matrix.kind == BSNS_BFLOAT16 && lower > 0)
                        multiply_tiles<false, true>(left, right, above, upper, below, lower, some, begin, fetch, into);
                    else if (matrix.kind == BSNS_BFLOAT16)
                        multiply_tiles<false, false>(left, right, above, upper, below, 0, some, begin, fetch, into);
                    else if (lower > 0)
                        multiply_tiles<true, true>(left, right, above, upper, below, lower, some, begin, fetch, into);
                    else
                        multiply_tiles<true, false>(left, right, above, upper, below, 0, some, begin, fetch, into);
                }
            }
            for (int m = start; m < end; m += PAIR) {
                const int count = end - m < PAIR ? end - m : PAIR;
                finish(args, pair, m, count, results + (m - start) / PAIR * RESULTS, PAIR * BLOCK);
            }
        }
    }
    _tile_release();
}

constexpr int TILES_FROM_ROWS_INT4 = 5;

#endif

void multiply(const Multiply &args, int first_pair, int end_pair) {
#if defined(__AMX_INT8__)
    const int least = args.matrix.kind == BSNS_INT4 ? TILES_FROM_ROWS_INT4 : 2;
    if (args.matrix.kind != BSNS_FLOAT32 && args.rows.count >= least) {
        multiply_with_tiles(args, first_pair, end_pair);
        return;
    }
#endif
    multiply_with_vectors(args, first_pair, end_pair);
}

// ---- attention ------------------------------------------------------------------------------------------------------

constexpr int numbers_in_lane(int32_t kind) { return 4 / activation_bytes(kind); }

template <int32_t KIND> BSNS_INLINE Floats number_of(Ints line, int number) {
    if (KIND == BSNS_FLOAT32) return as_floats(line);
    if (KIND == BSNS_BFLOAT16) return number == 0 ? low_half(line) : high_half(line);
    return byte_of(line, number);
}

void normalize_head(float *head, const float *weight, const Heads &heads) {
    float squares = 0;
    for (int i = 0; i < heads.size; i++) squares += head[i] * head[i];
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(heads.size) + heads.epsilon);
    for (int i = 0; i < heads.size; i++) head[i] = head[i] * scale * weight[i];
}

void rotate_head(float *__restrict head, const float *__restrict cosines, const float *__restrict sines, int half) {
    for (int i = 0; i < half; i++) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cosines[i] - b * sines[i];
        head[i + half] = b * cosines[i] + a * sines[i];
    }
}

// int8 numbers of a head, which are finite; returns their scale.
float quantize_head(const float *head, int size, int8_t *into) {
    float largest = 0;
    for (int i = 0; i < size; i++) largest = std::fabs(head[i]) > largest ? std::fabs(head[i]) : largest;
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    for (int i = 0; i < size; i++) into[i] = static_cast<int8_t>(std::nearbyint(head[i] * inverse));
    return largest / 127.0f;
}

bool all_finite(const float *numbers, int count) {
    float poison = 0;
    for (int i = 0; i < count; i++) poison += numbers[i] * 0.0f;
    return poison == 0;
}

// Values in the cache are always finite: what lies behind the last token, or is not seen, is multiplied with zero. A token
// whose key or value is not gets keys that are no numbers, which poison whatever sees it, and values of zero.
void place(const Place &at, const Heads &heads) {
    const Cache &cache = at.cache;
    const int size = heads.padded_size, half = heads.rotary_size / 2;
    for (int h = 0; h < heads.heads + heads.kv_heads; h++) {
        float *head = at.qkv + static_cast<int64_t>(h) * size;
        const float *norm = h < heads.heads ? heads.query_norm : heads.key_norm;
        if (norm != nullptr) normalize_head(head, norm, heads);
        if (half > 0) rotate_head(head, at.cosines, at.sines, half);
        if (h < heads.heads)
            for (int i = 0; i < size; i++) head[i] *= heads.scale;
    }
    const int32_t kind = cache.kind;
    const int in_lane = numbers_in_lane(kind), bytes = 4 / in_lane;
    const int64_t token = at.position;
    constexpr float MOST_BFLOAT16 = 3.3895313892515355e38f;
    for (int h = 0; h < heads.kv_heads; h++) {
        float *key = at.qkv + static_cast<int64_t>(heads.heads + h) * size;
        float *value = key + static_cast<int64_t>(heads.kv_heads) * size;
        const bool good = all_finite(key, size) && all_finite(value, size);
        if (!good) {
            for (int d = 0; d < size; d++) {
                key[d] = kind == BSNS_INT8 ? 0.0f : NAN;
                value[d] = 0;
            }
        }
        uint8_t *keys = cache.keys + h * cache.head_bytes + token / 16 * 16 * size * bytes + token % 16 * 4;
        uint8_t *values = cache.values + h * cache.head_bytes + token / in_lane * size * 4 + token % in_lane * bytes;
        if (kind == BSNS_FLOAT32) {
            for (int d = 0; d < size; d++) std::memcpy(keys + d * LINE, key + d, 4);
            std::memcpy(values, value, static_cast<size_t>(size) * 4);
        } else if (kind == BSNS_BFLOAT16) {
            for (int d = 0; d < size; d++) {
                float inside = value[d] > MOST_BFLOAT16 ? MOST_BFLOAT16 : value[d];
                inside = inside < -MOST_BFLOAT16 ? -MOST_BFLOAT16 : inside;
                const uint16_t k = to_bfloat16(key[d]), v = to_bfloat16(inside);
                std::memcpy(keys + d / 2 * LINE + d % 2 * 2, &k, 2);
                std::memcpy(values + d * 4, &v, 2);
            }
        } else {
            int8_t whole[1024];
            cache.key_scales[h * cache.head_scales + token] = quantize_head(key, size, whole) + (good ? 0.0f : NAN);
            for (int d = 0; d < size; d++) std::memcpy(keys + d / 4 * LINE + d % 4, whole + d, 1);
            cache.value_scales[h * cache.head_scales + token] = quantize_head(value, size, whole);
            for (int d = 0; d < size; d++) std::memcpy(values + d * 4, whole + d, 1);
        }
    }
}

// A query of a tile, and which keys it sees: [start, end).
struct Query {
    const float *query;
    float *output;
    float *scores;
    int32_t start, end;
};

// Scores of the keys in blocks [first, end). With bfloat16 keys in the order of AMX, as in multiply_bfloat16.
template <int32_t KIND, int C> void score(const Query *queries, const uint8_t *keys, int64_t first, int64_t end, int size) {
    constexpr int IN_LANE = numbers_in_lane(KIND);
    const int lines = size / IN_LANE;
    for (int64_t block = first; block < end; block++) {
        const uint8_t *at = keys + block * lines * LINE;
        Floats sums[C];
        for (int c = 0; c < C; c++) sums[c] = splat(0);
        if (KIND == BSNS_BFLOAT16) {
            for (int line = 0; line < lines; line += 16) {
                Floats even[C], odd[C];
                for (int c = 0; c < C; c++) even[c] = odd[c] = splat(0);
                for (int i = line; i < line + 16; i++) {
                    const Ints numbers = load_line(at + i * LINE);
                    const Floats low = low_half(numbers), high = high_half(numbers);
                    for (int c = 0; c < C; c++) {
                        even[c] = fma(splat(queries[c].query[2 * i]), low, even[c]);
                        odd[c] = fma(splat(queries[c].query[2 * i + 1]), high, odd[c]);
                    }
                }
                for (int c = 0; c < C; c++) sums[c] = sums[c] + (even[c] + odd[c]);
            }
        } else {
            for (int line = 0; line < lines; line++) {
                const Ints numbers = load_line(at + line * LINE);
                for (int i = 0; i < IN_LANE; i++) {
                    const Floats key = number_of<KIND>(numbers, i);
                    for (int c = 0; c < C; c++) sums[c] = fma(splat(queries[c].query[line * IN_LANE + i]), key, sums[c]);
                }
            }
        }
        for (int c = 0; c < C; c++) store(queries[c].scores + block * 16, sums[c]);
    }
}

BSNS_INLINE Floats round_bfloat16(Floats x) {  // of finite numbers
    const Ints bits = as_ints(x);
    const Ints rounded = bits + splat_int(0x7fff) + (shift_right(bits, 16) & splat_int(1));
    return as_floats(rounded & splat_int(static_cast<int32_t>(0xffff0000u)));
}

// Scores of blocks [first, end) to weights, zero where nothing is seen; returns what they are to be multiplied with.
template <int32_t KIND>
BSNS_INLINE float weigh(const Query &query, int64_t first, int64_t end, const float *key_scales, const float *value_scales) {
    float *scores = query.scores;
    const Floats unseen = splat(-INFINITY);
    int32_t numbers[16];
    for (int i = 0; i < 16; i++) numbers[i] = i;
    const Ints lane = load_line(numbers);
    Floats most = unseen;
    for (int64_t block = first; block < end; block++) {
        Floats x = load(scores + block * 16);
        if (KIND == BSNS_INT8) x = x * load(key_scales + block * 16);
        if (block * 16 < query.start || block * 16 + 16 > query.end) {
            const Ints token = lane + splat_int(static_cast<int32_t>(block * 16));
            BSNS_EACH {
                const Vi seen = (token.part[i] >= query.start) & (token.part[i] < query.end);
                x.part[i] = seen != 0 ? x.part[i] : unseen.part[i];
            }
        }
        store(scores + block * 16, x);
        most = max(most, x);
    }
    const Floats top = splat(greatest(most));
    Floats total = splat(0);
    for (int64_t block = first; block < end; block++) {
        const Floats x = load(scores + block * 16);
        Floats weight = exponential(x - top);
        if (block * 16 < query.start || block * 16 + 16 > query.end)
            BSNS_EACH weight.part[i] = x.part[i] == unseen.part[i] ? Vf{} : weight.part[i];
        total = total + weight;
        if (KIND == BSNS_INT8) weight = weight * load(value_scales + block * 16);
        if (KIND == BSNS_BFLOAT16) weight = round_bfloat16(weight);
        store(scores + block * 16, weight);
    }
    return 1.0f / sum(total);
}

// Output columns [column, column + 16 * D) of C queries, over tokens [start, end), which are whole chunks of 32.
template <int32_t KIND, int C, int D>
void gather(const Query *queries, const uint8_t *values, int64_t start, int64_t end, int size, int column, const float *factors) {
    constexpr int IN_LANE = numbers_in_lane(KIND);
    Floats sums[C][D];
    for (int c = 0; c < C; c++)
        for (int d = 0; d < D; d++) sums[c][d] = splat(0);
    for (int64_t chunk = start; chunk < end; chunk += PAIR) {
        Floats odd[C][D], even[C][D];
        if (KIND == BSNS_BFLOAT16)
            for (int c = 0; c < C; c++)
                for (int d = 0; d < D; d++) even[c][d] = odd[c][d] = splat(0);
        for (int64_t token = chunk; token < chunk + PAIR; token += IN_LANE) {
            const uint8_t *at = values + (token / IN_LANE * size + column) * 4;
            for (int d = 0; d < D; d++) {
                const Ints numbers = load_line(at + d * LINE);
                if (KIND == BSNS_BFLOAT16) {
                    const Floats low = low_half(numbers), high = high_half(numbers);
                    for (int c = 0; c < C; c++) {
                        even[c][d] = fma(splat(queries[c].scores[token]), low, even[c][d]);
                        odd[c][d] = fma(splat(queries[c].scores[token + 1]), high, odd[c][d]);
                    }
                    continue;
                }
                for (int i = 0; i < IN_LANE; i++) {
                    const Floats value = number_of<KIND>(numbers, i);
                    for (int c = 0; c < C; c++) sums[c][d] = fma(splat(queries[c].scores[token + i]), value, sums[c][d]);
                }
            }
        }
        if (KIND == BSNS_BFLOAT16)
            for (int c = 0; c < C; c++)
                for (int d = 0; d < D; d++) sums[c][d] = sums[c][d] + (even[c][d] + odd[c][d]);
    }
    for (int c = 0; c < C; c++)
        for (int d = 0; d < D; d++) store(queries[c].output + column + d * 16, sums[c][d] * splat(factors[c]));
}

// Which keys the queries of a tile see, in whole chunks of 32.
BSNS_INLINE void reach(const Query *queries, int count, int64_t &start, int64_t &end) {
    start = queries[0].start, end = queries[0].end;
    for (int c = 1; c < count; c++) {
        start = queries[c].start < start ? queries[c].start : start;
        end = queries[c].end > end ? queries[c].end : end;
    }
    start = start / PAIR * PAIR;
    end = padded(end, PAIR);
}

template <int32_t KIND, int C> void attend_tile(const Attend &args, const Query *queries) {
    const Cache &cache = args.cache;
    const int size = args.heads.padded_size;
    int64_t start, end;
    reach(queries, C, start, end);
    const int64_t head = args.kv_head;
    score<KIND, C>(queries, cache.keys + head * cache.head_bytes, start / 16, end / 16, size);
    float factors[C];
    for (int c = 0; c < C; c++) {
        const float *key_scales = KIND == BSNS_INT8 ? cache.key_scales + head * cache.head_scales : nullptr;
        const float *value_scales = KIND == BSNS_INT8 ? cache.value_scales + head * cache.head_scales : nullptr;
        factors[c] = weigh<KIND>(queries[c], start / 16, end / 16, key_scales, value_scales);
    }
    const uint8_t *values = cache.values + head * cache.head_bytes;
    constexpr int D = LANES != 16 ? 1 : KIND == BSNS_BFLOAT16 ? 2 : 4;
    int column = 0;
    for (; column + 16 * D <= size; column += 16 * D) gather<KIND, C, D>(queries, values, start, end, size, column, factors);
    for (; column < size; column += 16) gather<KIND, C, 1>(queries, values, start, end, size, column, factors);
}

template <int32_t KIND> void attend_some(const Attend &args, const Query *queries, int count) {
    constexpr int MOST = LANES != 16 ? 2 : KIND == BSNS_BFLOAT16 ? 4 : 6;
    while (count > 0) {
        if (MOST >= 6 && count >= 6) {
            attend_tile<KIND, MOST >= 6 ? 6 : 1>(args, queries);
            queries += 6, count -= 6;
        } else if (MOST >= 4 && count >= 4) {
            attend_tile<KIND, MOST >= 4 ? 4 : 1>(args, queries);
            queries += 4, count -= 4;
        } else if (MOST >= 3 && count >= 3) {
            attend_tile<KIND, MOST >= 3 ? 3 : 1>(args, queries);
            queries += 3, count -= 3;
        } else if (count >= 2) {
            attend_tile<KIND, 2>(args, queries);
            queries += 2, count -= 2;
        } else {
            attend_tile<KIND, 1>(args, queries);
            queries += 1, count -= 1;
        }
    }
}

#if defined(__AMX_BF16__)

// The same for bfloat16 keys and values with tiles: up to 32 queries, which lie as bfloat16 in `rounded`.
void attend_with_tiles(const Attend &args, const Query *queries, int count, uint16_t *rounded) {
    const Cache &cache = args.cache;
    const int size = args.heads.padded_size, upper = count < BLOCK ? count : BLOCK, lower = count - upper;
    const int64_t row_bytes = int64_t{size} * 2, score_bytes = reinterpret_cast<const uint8_t *>(queries[1].scores) -
                                                               reinterpret_cast<const uint8_t *>(queries[0].scores);
    for (int c = 0; c < count; c++)
        for (int d = 0; d < size; d += 16) store_bfloat16(rounded + c * size + d, load(queries[c].query + d));
    int64_t start, end;
    reach(queries, count, start, end);
    const uint8_t *keys = cache.keys + args.kv_head * cache.head_bytes;
    const uint8_t *values = cache.values + args.kv_head * cache.head_bytes;
    const auto *above = reinterpret_cast<const uint8_t *>(rounded), *below = above + BLOCK * row_bytes;
    configure_tiles(upper, lower);
    for (int64_t token = start; token < end; token += PAIR) {
        const uint8_t *first = keys + token * row_bytes, *second = first + BLOCK * row_bytes;
        _tile_zero(0);
        _tile_zero(1);
        if (lower > 0) {
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int step = 0; step < size / 32; step++) {
            _tile_loadd(4, above + step * LINE, row_bytes);
            _tile_loadd(6, first + step * TILE_BYTES, LINE);
            _tile_loadd(7, second + step * TILE_BYTES, LINE);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (lower > 0) {
                _tile_loadd(5, below + step * LINE, row_bytes);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        float *scores = queries[0].scores + token;
        _tile_stored(0, scores, score_bytes);
        _tile_stored(1, scores + BLOCK, score_bytes);
        if (lower > 0) {
            float *more = queries[BLOCK].scores + token;
            _tile_stored(2, more, score_bytes);
            _tile_stored(3, more + BLOCK, score_bytes);
        }
    }
    float factors[PAIR];
    for (int c = 0; c < count; c++) {
        factors[c] = weigh<BSNS_BFLOAT16>(queries[c], start / 16, end / 16, nullptr, nullptr);
        // as bfloat16 in place: what is written lies before what is still to be read
        auto *weights = reinterpret_cast<uint16_t *>(queries[c].scores);
        for (int64_t token = start; token < end; token += 16) {
            uint32_t lane[16];
            store_line(lane, shift_right(as_ints(load(queries[c].scores + token)), 16));
            uint16_t half[16];
            for (int i = 0; i < 16; i++) half[i] = static_cast<uint16_t>(lane[i]);
            std::memcpy(weights + token, half, sizeof half);
        }
    }
    alignas(64) float results[2 * PAIR * BLOCK];
    for (int column = 0; column < size; column += PAIR) {
        _tile_zero(0);
        _tile_zero(1);
        if (lower > 0) {
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t token = start; token < end; token += PAIR) {
            const uint8_t *at = values + (token / 2 * size + column) * 4;
            _tile_loadd(4, reinterpret_cast<const uint16_t *>(queries[0].scores) + token, score_bytes);
            _tile_loadd(6, at, int64_t{size} * 4);
            _tile_loadd(7, at + LINE, int64_t{size} * 4);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (lower > 0) {
                _tile_loadd(5, reinterpret_cast<const uint16_t *>(queries[BLOCK].scores) + token, score_bytes);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, results, LINE);
        _tile_stored(1, results + PAIR * BLOCK, LINE);
        if (lower > 0) {
            _tile_stored(2, results + BLOCK * BLOCK, LINE);
            _tile_stored(3, results + PAIR * BLOCK + BLOCK * BLOCK, LINE);
        }
        for (int c = 0; c < count; c++)
            for (int b = 0; b < 2; b++)
                store(queries[c].output + column + b * BLOCK, load(results + b * PAIR * BLOCK + c * BLOCK) * splat(factors[c]));
    }
    _tile_release();
}

#endif

void attend(const Attend &args, Worker &worker) {
    const Heads &heads = args.heads;
    const int group = heads.heads / heads.kv_heads, size = heads.padded_size;
    const int64_t tokens = padded(args.position + args.rows, PAIR) + BLOCK;  // a line apart, for the cache's sake
    Query queries[ATTEND_QUERIES];
    auto *scores = reinterpret_cast<float *>(worker.scratch);
    auto *rounded = reinterpret_cast<float *>(worker.scratch + ATTEND_QUERIES * tokens * 4);
    int count = 0;
    for (int i = 0; i < args.rows * group; i++) {
        const int row = i / group, head = args.kv_head * group + i % group;
        Query &query = queries[count];
        query.query = args.queries + row * args.stride + static_cast<int64_t>(head) * size;
        query.output = args.output + row * args.output_stride + static_cast<int64_t>(head) * size;
        query.scores = scores + count * tokens;
        query.end = args.position + row + 1;
        query.start = heads.window > 0 && query.end > heads.window ? query.end - heads.window : 0;
        if (++count < ATTEND_QUERIES && i + 1 < args.rows * group) continue;
        if (args.cache.kind == BSNS_FLOAT32) {
            attend_some<BSNS_FLOAT32>(args, queries, count);
        } else if (args.cache.kind == BSNS_INT8) {
            attend_some<BSNS_INT8>(args, queries, count);
        } else {
#if defined(__AMX_BF16__)
            attend_with_tiles(args, queries, count, reinterpret_cast<uint16_t *>(rounded));
#else
            for (int c = 0; c < count; c++) {  // queries are rounded, as they are for tiles
                float *to = rounded + c * size;
                for (int d = 0; d < size; d++) to[d] = from_bfloat16(to_bfloat16(queries[c].query[d]));
                queries[c].query = to;
            }
            attend_some<BSNS_BFLOAT16>(args, queries, count);
#endif
        }
        count = 0;
    }
}

// ---- the rest -------------------------------------------------------------------------------------------------------

void convert(const void *input, int32_t kind, float *output, int64_t count) {
    if (kind == BSNS_FLOAT32) {
        std::memcpy(output, input, static_cast<size_t>(count) * 4);
        return;
    }
    const auto *from = static_cast<const uint16_t *>(input);
    for (int64_t i = 0; i < count; i++) {
        uint16_t half;
        std::memcpy(&half, from + i, 2);
        output[i] = from_bfloat16(half);
    }
}

void restore(const float *input, int32_t kind, void *output, int64_t count) {
    if (kind == BSNS_FLOAT32) {
        std::memcpy(output, input, static_cast<size_t>(count) * 4);
        return;
    }
    auto *to = static_cast<uint16_t *>(output);
    for (int64_t i = 0; i < count; i++) {
        const uint16_t half = to_bfloat16(input[i]);
        std::memcpy(to + i, &half, 2);
    }
}

// In two places side by side, fetched ahead, or in eight: which is faster depends on the processor and its neighbours.
float read(const uint8_t *from, int64_t bytes, bool many) {
    Ints sums[8];
    for (Ints &each : sums) each = splat_int(0);
    const int64_t part = bytes / (many ? 8 : 2);
    for (int64_t at = 0; many && at < part; at += LINE) {
        for (int i = 0; i < 8; i++) sums[i] = sums[i] ^ load_line(from + i * part + at);
    }
    for (int64_t at = 0; !many && at < part; at += LINE) {
        for (int i = 0; i < 2; i++) {
            prefetch(from + i * part + at + AHEAD);
            sums[i] = sums[i] ^ load_line(from + i * part + at);
        }
    }
    Ints all = sums[0];
    for (int i = 1; i < 8; i++) all = all ^ sums[i];
    return sum(to_floats(all));
}

// Denormals count as zero, as they do for AMX; and they cost a hundred times as much.
uint32_t enter() {
#if defined(__x86_64__)
    const uint32_t mode = _mm_getcsr();
    _mm_setcsr((mode & ~0x6000u) | 0x8040u);  // round to nearest
    return mode;
#else
    return 0;
#endif
}

void leave([[maybe_unused]] uint32_t mode) {
#if defined(__x86_64__)
    _mm_setcsr(mode);
#endif
}

bool supported() {
#if defined(__x86_64__)
    __builtin_cpu_init();
#if defined(__AMX_INT8__)
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl, of Linux
    uint32_t eax = 7, ebx = 0, ecx = 0, edx = 0;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    constexpr uint32_t AMX = 1u << 22 | 1u << 24 | 1u << 25;
    if ((edx & AMX) != AMX) return false;
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("gfni"))
        return false;
    if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) != 0) return false;
#endif
#if defined(__AVX512BF16__)
    if (!__builtin_cpu_supports("avx512bf16")) return false;
#endif
#if defined(__AVX512VNNI__)
    if (!__builtin_cpu_supports("avx512vnni")) return false;
#endif
#if defined(__AVX512F__)
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return false;
#endif
#if defined(__AVXVNNI__)
    uint32_t a = 7, b = 0, c = 1, d = 0;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    if ((a & (1u << 4)) == 0) return false;
#endif
#if defined(__AVX2__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
#endif
#elif defined(__ARM_FEATURE_DOTPROD) && defined(__linux__)
    if ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) == 0) return false;  // every Apple processor with this code's ABI has it
#endif
    return true;
}

}  // namespace

namespace bsns {

extern const Kernels BSNS_SET;
const Kernels BSNS_SET = {
    BSNS_NAME(BSNS_SET), supported, enter,          leave,          prepare,           multiply, place,
    attend,              normalize_add, convert, restore, codecs::encode, codecs::decode, codecs::row_bytes, read,
};

}  // namespace bsns
