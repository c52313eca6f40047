// The pointwise work between integer products, fused: what a GroupNorm, SiLU, an addition and a quantization
// would each do in a pass of its own. Activations lie as [n][pixels][ld] floats or bfloat16s, channels innermost (channels_last).
// Where there is a coef [c], coef times the number of the pixel in sums [n][pixels] is subtracted first (weight zero points).
// Compiled without any header of PyTorch; called through ctypes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

inline float exp_(float x) {  // relative error below 2e-7; the compiler vectorizes it
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    const float k = std::rint(x * 1.44269504088896341f);
    float r = x - k * 0.693359375f;
    r = r - k * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(k) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

struct bfloat16 {  // the upper half of a float
    uint16_t bits;
    operator float() const {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
};

inline void store(float value, float* to) { *to = value; }
inline void store(float value, bfloat16* to) {  // to the nearest, ties to even
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    to->bits = static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

// One row of values: x, corrected, then as a * value + b, then SiLU. The result, maybe x itself; out holds c floats.
template <typename T>
inline const float* row(const T* from, int64_t c, const float* coef, float sum, const float* a, const float* b, bool silu, float* out) {
    const float* x;
    if constexpr (std::is_same_v<T, float>) {
        x = from;
    } else {
        for (int64_t i = 0; i < c; ++i) out[i] = from[i];
        x = out;
    }
    if (coef) {
        for (int64_t i = 0; i < c; ++i) out[i] = x[i] - coef[i] * sum;
        x = out;
    }
    if (a) {
        for (int64_t i = 0; i < c; ++i) out[i] = x[i] * a[i] + b[i];
        x = out;
    }
    if (silu) {
        for (int64_t i = 0; i < c; ++i) out[i] = x[i] / (1.0f + exp_(-x[i]));
        x = out;
    }
    return x;
}

// Sums of the values of `count` pixels less offset, and of their squares; in blocks of 32 in float, added up in double.
template <typename T>
void sums_of(const T* x, int64_t count, int64_t c, int64_t ld, const float* coef, const float* sums, const float* offset, double* sum,
             double* square) {
    std::vector<float> s(c), q(c);
    float *values = s.data(), *squares = q.data();
    for (int64_t from = 0; from < count; from += 32) {
        std::fill(s.begin(), s.end(), 0.0f);
        std::fill(q.begin(), q.end(), 0.0f);
        const int64_t to = std::min<int64_t>(from + 32, count);
        for (int64_t p = from; p < to; ++p) {
            const T* in = x + p * ld;
            if (coef) {
                const float z = sums[p];
                for (int64_t k = 0; k < c; ++k) {
                    const float value = in[k] - coef[k] * z + offset[k];
                    values[k] += value;
                    squares[k] += value * value;
                }
            } else {
                for (int64_t k = 0; k < c; ++k) {
                    const float value = in[k] + offset[k];
                    values[k] += value;
                    squares[k] += value * value;
                }
            }
        }
        for (int64_t k = 0; k < c; ++k) {
            sum[k] += s[k];
            square[k] += q[k];
        }
    }
}

// mean and 1 / sqrt(variance + eps) of each group of channels of each image; shift [n][c] is added first.
// Summed are differences from a value of the group, its first: squares of values far from 0 would cancel.
// Threads share parts of 256 pixels, which are added up in order: any number of them gives the same bits.
template <typename T>
void stats(const T* x, int64_t n, int64_t pixels, int64_t c, int64_t ld, const float* coef, const float* sums, const float* shift,
           int64_t groups, double eps, float* mean, float* rstd, int threads) {
    const int64_t width = c / groups, part = 256, parts = (pixels + part - 1) / part;
    std::vector<float> offsets(n * c);
    for (int64_t i = 0; i < n; ++i) {
        const T* first = x + i * pixels * ld;
        for (int64_t g = 0; g < c; g += width) {
            const float start = first[g] - (coef ? coef[g] * sums[i * pixels] : 0.0f);
            for (int64_t k = g; k < g + width; ++k) offsets[i * c + k] = shift ? shift[i * c + k] - (start + shift[i * c + g]) : -start;
        }
    }
    std::vector<double> totals(2 * n * parts * c, 0.0);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t index = 0; index < n * parts; ++index) {
        const int64_t i = index / parts, from = index % parts * part, pixel = i * pixels + from;
        double* sum = totals.data() + 2 * index * c;
        sums_of(x + pixel * ld, std::min<int64_t>(part, pixels - from), c, ld, coef, coef ? sums + pixel : nullptr, offsets.data() + i * c,
                sum, sum + c);
    }
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t g = 0; g < groups; ++g) {
            double total = 0.0, squares = 0.0;
            for (int64_t index = i * parts; index < (i + 1) * parts; ++index) {
                const double* sum = totals.data() + 2 * index * c;
                for (int64_t k = g * width; k < (g + 1) * width; ++k) {
                    total += sum[k];
                    squares += sum[c + k];
                }
            }
            const double count = static_cast<double>(width * pixels), m = total / count;  // of the differences
            const double pivot = (shift ? static_cast<double>(shift[i * c + g * width]) : 0.0) - offsets[i * c + g * width];
            const double variance = squares / count - m * m;
            mean[i * groups + g] = static_cast<float>(m + pivot);
            rstd[i * groups + g] = static_cast<float>(1.0 / std::sqrt((variance > 0.0 ? variance : 0.0) + eps));
        }
    }
}

// Rows of values as integers, clamp(round(value / delta), low, high) + offset, each value divided by the divisor [c] of
// its channel first, where there is one; and the sum of each row's integers. Integers of one byte (with or without a
// sign) go to `out`. Of integers of two bytes, the upper ones go to `upper`.
template <bool two_bytes, typename T>
void quantize(const T* x, int64_t n, int64_t pixels, int64_t c, int64_t ld, const float* coef, const float* sums, const float* a,
              const float* b, int silu, const float* divisor, float delta, float low, float high, float offset, uint8_t* out,
              uint8_t* upper, int32_t* totals, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> v(c);
#pragma omp for schedule(static)
        for (int64_t pixel = 0; pixel < n * pixels; ++pixel) {
            const int64_t i = pixel / pixels;
            const float* values = row(x + pixel * ld, c, coef, coef ? sums[pixel] : 0.0f, a ? a + i * c : nullptr, b ? b + i * c : nullptr,
                                      silu, v.data());
            if (divisor) {
                for (int64_t k = 0; k < c; ++k) v[k] = values[k] / divisor[k];
                values = v.data();
            }
            uint8_t* to = out + pixel * c;
            int32_t total = 0;
            for (int64_t k = 0; k < c; ++k) {
                float q = std::rint(values[k] / delta);
                q = q < low ? low : (q > high ? high : q);
                const int32_t integer = static_cast<int32_t>(q + offset);
                to[k] = static_cast<uint8_t>(integer);
                if constexpr (two_bytes) upper[pixel * c + k] = static_cast<uint8_t>(integer >> 8);
                total += integer;
            }
            totals[pixel] = total;
        }
    }
}

// Rows of values, with another activation [n][pixels][c] added where there is one.
template <typename T>
void values(const T* x, int64_t n, int64_t pixels, int64_t c, int64_t ld, const float* coef, const float* sums, const float* a,
            const float* b, int silu, const T* other, T* out, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> v(c);
#pragma omp for schedule(static)
        for (int64_t pixel = 0; pixel < n * pixels; ++pixel) {
            const int64_t i = pixel / pixels;
            const float* in = row(x + pixel * ld, c, coef, coef ? sums[pixel] : 0.0f, a ? a + i * c : nullptr, b ? b + i * c : nullptr,
                                  silu, v.data());
            T* to = out + pixel * c;
            if (other) {
                const T* from = other + pixel * c;
                for (int64_t k = 0; k < c; ++k) store(in[k] + from[k], to + k);
            } else {
                for (int64_t k = 0; k < c; ++k) store(in[k], to + k);
            }
        }
    }
}

}  // namespace

#define QDIFF_OPERATORS(T, SUFFIX)                                                                                                     \
    void qdiff_stats_##SUFFIX(const T* x, int64_t n, int64_t pixels, int64_t c, int64_t ld, const float* coef, const float* sums,       \
                              const float* shift, int64_t groups, double eps, float* mean, float* rstd, int threads) {                 \
        stats(x, n, pixels, c, ld, coef, sums, shift, groups, eps, mean, rstd, threads);                                               \
    }                                                                                                                                  \
    void qdiff_quantize_##SUFFIX(const T* x, int64_t n, int64_t pixels, int64_t c, int64_t ld, const float* coef, const float* sums,    \
                                 const float* a, const float* b, int silu, const float* divisor, float delta, float low, float high,   \
                                 float offset, uint8_t* out, uint8_t* upper, int32_t* totals, int threads) {                           \
        const auto run = upper ? quantize<true, T> : quantize<false, T>;                                                               \
        run(x, n, pixels, c, ld, coef, sums, a, b, silu, divisor, delta, low, high, offset, out, upper, totals, threads);              \
    }                                                                                                                                  \
    void qdiff_values_##SUFFIX(const T* x, int64_t n, int64_t pixels, int64_t c, int64_t ld, const float* coef, const float* sums,      \
                               const float* a, const float* b, int silu, const T* other, T* out, int threads) {                        \
        values(x, n, pixels, c, ld, coef, sums, a, b, silu, other, out, threads);                                                      \
    }

extern "C" {
QDIFF_OPERATORS(float, float32)
QDIFF_OPERATORS(bfloat16, bfloat16)
}
