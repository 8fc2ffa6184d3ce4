// The table's attention functions, over every format.

namespace {

void attend_segment(const AttendArgs &args, const SegmentTask &task, const SegmentTask *next, float *scratch,
                    const Partial &out) {
  Work work = work_of(args, task);
  const bool halves = args.kv.type == kvik::KVType::f16, widens = halves && work.num_rows > 2 * kRowsAtOnce;
  Ahead ahead = ahead_of(args, task, next, work.all, widens);
  if (args.kv.type == kvik::KVType::int8) return attend_bytes(args.kv, work, scratch, out, ahead);
  if (!widens)
    return halves ? attend_floats<Half>(work, scratch, out, ahead, 0)
                  : attend_floats<float>(work, scratch, out, ahead, 0);
  widen(args.kv, work, scratch + work.num_rows * kSegment);
  const int64_t calls = work.num_rows + (work.num_rows + kRowsAtOnce - 1) / kRowsAtOnce * kSuperblock / 2;
  attend_floats<float>(work, scratch, out, ahead, ahead.num_tiles * ahead.lines / calls + 1);
}

void merge_segments(const Partial &total, const Partial &next, int64_t rows, int64_t head_dim) {
  for (int64_t row = 0; row < rows; ++row) {
    const float top = total.max[row] > next.max[row] ? total.max[row] : next.max[row];
    float factors[kLanes] = {total.max[row] - top, next.max[row] - top};
    store(factors, exponential(load(factors)));
    total.max[row] = top;
    total.sum[row] = fmaf(total.sum[row], factors[0], next.sum[row] * factors[1]);
    const F32x8 keep = broadcast(factors[0]), take = broadcast(factors[1]);
    for (int64_t d = row * head_dim; d < (row + 1) * head_dim; d += kLanes)
      store(total.value + d, fma(load(total.value + d), keep, load(next.value + d) * take));
  }
}

} // namespace
