// Ops that work row by row.
#include <algorithm>
#include <cstring>

#include "half.h"
#include "ops.h"

namespace kvik {
namespace {

constexpr int64_t kGrain = 8; // rows that are worth another thread's while

float read_float(const PackedWeight &weight, int64_t row, int64_t column) {
  const int64_t at = (row / kRowBlock * weight.columns + column) * kRowBlock + row % kRowBlock;
  switch (weight.float_format) {
  case FloatFormat::f16:
    return to_float(reinterpret_cast<const Half *>(weight.data.get())[at]);
  case FloatFormat::bf16:
    return to_float(reinterpret_cast<const BFloat16 *>(weight.data.get())[at]);
  default:
    return reinterpret_cast<const float *>(weight.data.get())[at];
  }
}

} // namespace

void embed_rows(const PackedWeight &weight, const int32_t *row_ids, int64_t count, float scale, float *out) {
  for (int64_t i = 0; i < count; ++i, out += weight.columns) {
    if (weight.quantized()) {
      dequantize_row(weight, row_ids[i], out);
    } else {
      for (int64_t k = 0; k < weight.columns; ++k) out[k] = read_float(weight, row_ids[i], k);
    }
    if (scale != 1)
      for (int64_t k = 0; k < weight.columns; ++k) out[k] *= scale;
  }
}

void take_rows(const float *x, const int32_t *row_ids, int64_t count, int64_t columns, float *out) {
  for (int64_t i = 0; i < count; ++i) std::copy_n(x + row_ids[i] * columns, columns, out + i * columns);
}

void norm_rows(ThreadPool &pool, const Norm &norm, const float *x, int64_t rows, float *out) {
  pool.for_ranges(rows, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) kernels->norm(norm, x + i * norm.width, out + i * norm.width);
  });
}

void activate(ThreadPool &pool, Nonlinearity activation, const float *x, const float *up, int64_t rows, int64_t columns,
              float *out) {
  pool.for_ranges(rows, kGrain, [&](int64_t first, int64_t last) {
    const int64_t at = first * columns;
    kernels->activate(activation, x + at, up ? up + at : nullptr, (last - first) * columns, out + at);
  });
}

void soft_cap(ThreadPool &pool, const float *x, float cap, int64_t rows, int64_t columns, float *out) {
  pool.for_ranges(rows, kGrain, [&](int64_t first, int64_t last) {
    const int64_t at = first * columns;
    kernels->soft_cap(x + at, cap, (last - first) * columns, out + at);
  });
}

void add(ThreadPool &pool, const float *x, const float *y, int64_t rows, int64_t columns, float *out) {
  pool.for_ranges(rows, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first * columns; i < last * columns; ++i) out[i] = x[i] + y[i];
  });
}

void rope(ThreadPool &pool, float *x, const int32_t *positions, int64_t num_tokens, int64_t heads, int64_t head_dim,
          const RopeArgs &args) {
  pool.for_ranges(num_tokens, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t head = 0; head < heads; ++head)
        kernels->rope(x + (i * heads + head) * head_dim, args.cos_sin + positions[i] * args.pairs * 2, args.pairs,
                      args.adjacent_pairs);
  });
}

} // namespace kvik
