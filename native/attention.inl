// The table's attention functions, over every format.

namespace {

void attend_segment(const AttendArgs &args, const SegmentTask &task, const SegmentTask *next, float *scratch,
                    const Partial &out) {
  using kvik::KVType;
  Work work = work_of(args, task);
  const KVType keys = args.kv.key.type, values = args.kv.value.type;
  const bool has_many_rows = work.num_rows > 2 * kRowsAtOnce;
  const bool widens_keys = has_many_rows && keys == KVType::f16, widens_values = has_many_rows && values == KVType::f16;
  const bool widens = widens_keys && widens_values;
  Ahead ahead = ahead_of(args, task, next, work.all, widens);
  // What follows the scores: factors of bytes, or widened tiles, keys before values.
  float *rest = scratch + work.num_rows * kSegment;
  int64_t lines_a_call = 0;
  if (widens_keys) rest = widen(args.kv, work, work.keys, rest);
  if (widens) {
    widen(args.kv, work, work.values, rest);
    const int64_t calls = work.num_rows + (work.num_rows + kRowsAtOnce - 1) / kRowsAtOnce * kSuperblock / 2;
    lines_a_call = ahead.num_tiles * ahead.lines / calls + 1;
  }
  float *begin = scratch + work.num_rows * kSegment;
  if (keys == KVType::int8)
    score_bytes(work, scratch, begin, ahead);
  else if (keys == KVType::f16 && !widens_keys)
    score_floats<Half>(work, scratch, ahead, lines_a_call);
  else
    score_floats<float>(work, scratch, ahead, lines_a_call);
  softmax_rows(work, scratch, ahead, lines_a_call, out);
  if (widens_values && !widens) widen(args.kv, work, work.values, begin); // in place of what the scores needed
  if (values == KVType::int8)
    add_bytes(args.kv, work, scratch, begin, out, ahead);
  else if (values == KVType::f16 && !widens_values)
    add_floats<Half>(work, scratch, out, ahead, lines_a_call);
  else
    add_floats<float>(work, scratch, out, ahead, lines_a_call);
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
