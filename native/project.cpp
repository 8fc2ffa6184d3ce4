// Matrix products of a step: activations quantised once, row blocks of all weights shared out among threads.
#include <algorithm>
#include <cstddef>
#include <vector>

#include "ops.h"

namespace kvik {
namespace {

// Buffers of the quantised activations of one call.
class QuantizedRows {
public:
  QuantizedRows(int64_t rows, int64_t columns, bool fine)
      : columns_(columns), high_(static_cast<std::size_t>(rows * columns)), low_(fine ? high_.size() : 0),
        scale_(high_.size() / kGroup), sums_(3 * scale_.size()), excess_(sums_.size()) {}

  ActivationsOut row(int64_t i) {
    const int64_t groups = columns_ / kGroup;
    return {high_.data() + i * columns_, low_.empty() ? nullptr : low_.data() + i * columns_,
            scale_.data() + i * groups, sums_.data() + 3 * i * groups, excess_.data() + 3 * i * groups};
  }
  Activations all() const { return {high_.data(), low_.data(), scale_.data(), sums_.data(), excess_.data()}; }

private:
  int64_t columns_;
  std::vector<int8_t> high_, low_;
  std::vector<float> scale_, sums_;
  std::vector<int32_t> excess_;
};

constexpr int64_t kRowGrain = 2; // row blocks: 16 rows, one cache line of outputs

} // namespace

void project(ThreadPool &pool, const ProjectionInput &in, std::span<const Projection> projections, bool fine) {
  bool quantize = false;
  int64_t row_blocks = 0;
  for (const Projection &projection : projections) {
    quantize = quantize || projection.weight->quantized();
    row_blocks += projection.weight->row_blocks();
  }
  QuantizedRows rows(quantize ? in.num_tokens : 0, in.columns, fine);
  if (quantize) {
    pool.for_ranges(in.num_tokens, 8, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) kernels->quantize(in.x + i * in.columns, in.columns, fine, rows.row(i));
    });
  }
  // The row blocks of all weights in a row, cut evenly.
  pool.for_ranges(row_blocks, kRowGrain, [&](int64_t first, int64_t last) {
    for (const Projection &projection : projections) {
      const PackedWeight &weight = *projection.weight;
      const int64_t count = weight.row_blocks();
      if (first < count && last > 0) {
        const LinearArgs args{weight.data.get(), weight.rows,  in.columns,         rows.all(), in.x,
                              in.num_tokens,     projection.y, projection.residual};
        const LinearKernel kernel = weight.quantized() ? kernels->quantized_linear[weight.block_format][fine]
                                                       : kernels->float_linear[static_cast<int>(weight.float_format)];
        kernel(args, first, std::min(last, count));
      }
      first = std::max<int64_t>(first - count, 0);
      last -= count;
    }
  });
}

} // namespace kvik
