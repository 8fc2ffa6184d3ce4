// The table's attention functions, over every format.

namespace {

void attend_segment(const AttendArgs &args, const SegmentTask &task, const SegmentTask *next, float *scratch,
                    const Partial &out) {
  Work work = work_of(args, task, next);
  Ahead ahead;
  switch (args.kv.type) {
  case kvik::KVType::int8:
    return attend_bytes(args.kv, work, scratch, out);
  case kvik::KVType::f16:
    if (work.num_rows > 2 * kRowsAtOnce) {
      widen(args.kv, work, scratch + work.num_rows * kSegment);
      // The tiles' own prefetching sees the widened ones only.
      ahead = ahead_of(args, next, work.num_rows + (work.num_rows + kRowsAtOnce - 1) / kRowsAtOnce * kSuperblock / 2);
      return attend_floats<float>(work, scratch, out, ahead);
    }
    return attend_floats<Half>(work, scratch, out, ahead);
  default:
    return attend_floats<float>(work, scratch, out, ahead);
  }
}

void merge_segments(const Partial &total, const Partial &next, int64_t rows, int64_t head_dim) {
  for (int64_t row = 0; row < rows; ++row) {
    const float top = total.max[row] > next.max[row] ? total.max[row] : next.max[row];
    float factors[kLanes] = {total.max[row] - top, next.max[row] - top};
    store(factors, exponential(load(factors)));
    total.max[row] = top;
    total.sum[row] = fmaf(total.sum[row], factors[0], next.sum[row] * factors[1]);
    const Float8 keep = broadcast(factors[0]), take = broadcast(factors[1]);
    for (int64_t d = row * head_dim; d < (row + 1) * head_dim; d += kLanes)
      store(total.value + d, fma(load(total.value + d), keep, load(next.value + d) * take));
  }
}

} // namespace
