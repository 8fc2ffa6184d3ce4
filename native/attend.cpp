// Attention of a step: what is a task, and in which order segments merge.
#include <algorithm>
#include <cstddef>
#include <vector>

#include "ops.h"

namespace kvik {
namespace {

// Room for the softmax state of one KV head's group, and its neighbours' cache lines kept apart.
class PartialBuffer {
public:
  PartialBuffer(int64_t count, int64_t group, int64_t head_dim)
      : group_(group), stride_((group * (head_dim + 2) + 15) / 16 * 16),
        data_(static_cast<std::size_t>(count * stride_)) {}
  Partial at(int64_t index) {
    float *start = data_.data() + index * stride_;
    return {start, start + group_, start + 2 * group_};
  }

private:
  int64_t group_, stride_;
  std::vector<float> data_;
};

void write_output(const AttendArgs &args, int64_t token, int64_t kv_head, const Partial &total) {
  const int64_t head_dim = args.kv.head_dim, group = args.num_heads / args.kv.num_kv_heads;
  float *out = args.out + (token * args.num_heads + kv_head * group) * head_dim;
  for (int64_t h = 0; h < group; ++h)
    for (int64_t d = 0; d < head_dim; ++d) out[h * head_dim + d] = total.value[h * head_dim + d] / total.sum[h];
}

} // namespace

void write_kv(ThreadPool &pool, const LayerKV &kv, const float *k, const float *v, const int32_t *slots,
              int64_t num_tokens) {
  const int64_t width = kv.num_kv_heads * kv.head_dim;
  // Neighbouring tokens share cache lines of a K tile, so a thread takes whole blocks' worth of them.
  pool.for_ranges(num_tokens, kBlockSize, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) kernels->write_kv(kv, k + i * width, v + i * width, slots[i]);
  });
}

void attend(ThreadPool &pool, const AttendArgs &args) {
  const LayerKV &kv = args.kv;
  const int64_t group = args.num_heads / kv.num_kv_heads, head_dim = kv.head_dim;
  const int64_t rows = args.num_tokens * kv.num_kv_heads, threads = pool.num_threads();
  const auto segments = [&](int64_t row) { return args.positions[row / kv.num_kv_heads] / kSegment + 1; };
  std::vector<float> scratch(static_cast<std::size_t>(threads * group * kSegment));
  const auto run_segment = [&](int thread, int64_t row, int64_t segment, const Partial &result) {
    kernels->attend_segment(args, row / kv.num_kv_heads, row % kv.num_kv_heads, segment,
                            scratch.data() + thread * group * kSegment, result);
  };
  const auto merge = [&](const Partial &total, const Partial &next) {
    kernels->merge_segments(total, next, group, head_dim);
  };

  // With many rows a task is a row, its segments merged as they come. With few, a task is one segment, and the
  // merge follows in the same order: either way the same operations, so the same bits.
  if (rows >= 4 * threads) {
    PartialBuffer partials(2 * threads, group, head_dim);
    pool.for_each(rows, [&](int thread, int64_t row) {
      const Partial total = partials.at(2 * thread), next = partials.at(2 * thread + 1);
      run_segment(thread, row, 0, total);
      for (int64_t segment = 1; segment < segments(row); ++segment) {
        run_segment(thread, row, segment, next);
        merge(total, next);
      }
      write_output(args, row / kv.num_kv_heads, row % kv.num_kv_heads, total);
    });
    return;
  }
  std::vector<int64_t> first_task(static_cast<std::size_t>(rows + 1), 0);
  for (int64_t row = 0; row < rows; ++row)
    first_task[static_cast<std::size_t>(row + 1)] = first_task[static_cast<std::size_t>(row)] + segments(row);
  PartialBuffer partials(first_task.back(), group, head_dim);
  pool.for_each(first_task.back(), [&](int thread, int64_t task) {
    const auto after = std::upper_bound(first_task.begin(), first_task.end(), task);
    const int64_t row = after - first_task.begin() - 1;
    run_segment(thread, row, task - first_task[static_cast<std::size_t>(row)], partials.at(task));
  });
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = first_task[static_cast<std::size_t>(row)];
    const Partial total = partials.at(first);
    for (int64_t segment = 1; segment < segments(row); ++segment) merge(total, partials.at(first + segment));
    write_output(args, row / kv.num_kv_heads, row % kv.num_kv_heads, total);
  }
}

} // namespace kvik
