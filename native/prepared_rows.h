// Rows as the kernels of matrix products read them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "ops.h"

namespace kvik {

// As floats, and quantised where a weight asks for it; in a space that nobody else uses meanwhile.
class PreparedRows {
public:
  PreparedRows(ThreadPool &pool, RowsSpace &space, const RowsIn &in, bool quantize, bool int16_activations)
      : num_rows_(in.num_tokens), columns_(in.columns), int16_activations_(int16_activations), x_(in.x) {
    if (quantize) quantized_ = space.quantized(num_rows_, columns_, int16_activations);
    float *normed = in.norm.weight ? space.floats.get<float>(num_rows_ * columns_) : nullptr;
    if (normed) x_ = normed;
    if (!quantize && !normed) return;
    pool.for_ranges(num_rows_, kGrain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t at = i * columns_;
        if (normed) kernels->norm(in.norm, in.x + at, normed + at);
        if (quantize) kernels->quantize(x_ + at, columns_, quantized_, i);
      }
    });
  }

  // Some of the rows of others, in another order and as often as `rows` (count,) names them; floats where `floats`.
  PreparedRows(ThreadPool &pool, RowsSpace &space, const PreparedRows &from, const int32_t *rows, int64_t count,
               bool floats)
      : num_rows_(count), columns_(from.columns_), int16_activations_(from.int16_activations_), x_(nullptr) {
    float *copies = floats ? space.floats.get<float>(count * columns_) : nullptr;
    if (floats) x_ = copies;
    if (from.quantized_.high) quantized_ = space.quantized(count, columns_, int16_activations_);
    pool.for_ranges(count, kGrain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        if (copies) std::copy_n(from.x_ + rows[i] * columns_, columns_, copies + i * columns_);
        if (quantized_.high) copy_quantized(from.quantized_, rows[i], i);
      }
    });
  }

  // Row blocks [first, last) of one projection.
  void multiply(const Projection &projection, int64_t first, int64_t last) const {
    multiply(projection, first, last, 0, num_rows_);
  }

  // The same for `count` rows from one on, of which alone y and the residual have rows.
  void multiply(const Projection &projection, int64_t first, int64_t last, int64_t row, int64_t count) const {
    const auto &[linear, y, residual] = projection;
    const PackedWeight &weight = *linear.matrix;
    const LinearKernel kernel = weight.quantized() ? kernels->quantized_linear[weight.block_format][int16_activations_]
                                                   : kernels->float_linear[static_cast<int>(weight.float_format)];
    const float *x = x_ ? x_ + row * columns_ : nullptr;
    kernel(
        {weight.data.get(), weight.rows, columns_, quantized_, row, x, count, y, linear.plain() ? residual : nullptr},
        first, last);
    if (linear.plain()) return;
    const int64_t begin = first * kRowBlock, end = std::min(last * kRowBlock, weight.rows);
    for (int64_t i = 0; i < count; ++i) {
      float *out = y + i * weight.rows;
      if (linear.bias)
        for (int64_t k = begin; k < end; ++k) out[k] += linear.bias[k];
      if (linear.scale != 1)
        for (int64_t k = begin; k < end; ++k) out[k] *= linear.scale;
      if (residual)
        for (int64_t k = begin; k < end; ++k) out[k] += residual[i * weight.rows + k];
    }
  }

private:
  static constexpr int64_t kGrain = 8; // rows that are worth another thread's while

  void copy_quantized(const QuantizedRows &from, int64_t row, int64_t to) const {
    for (int64_t panel = 0; panel < QuantizedRows::panels(columns_); ++panel) {
      const int64_t source = from.group_at(panel, row), target = quantized_.group_at(panel, to);
      const auto copy = [=](const auto *items, auto *copies, int64_t of_group) {
        std::copy_n(items + source * of_group, QuantizedRows::kGroups * of_group, copies + target * of_group);
      };
      copy(from.high, quantized_.high, kGroup);
      if (int16_activations_) copy(from.low, quantized_.low, kGroup);
      copy(from.scale, quantized_.scale, 1);
      copy(from.totals, quantized_.totals, 3);
      copy(from.sums, quantized_.sums, 3);
    }
  }

  int64_t num_rows_, columns_;
  bool int16_activations_;
  const float *x_; // null where no weight reads floats
  QuantizedRows quantized_{};
};

} // namespace kvik
