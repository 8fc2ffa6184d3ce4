// The table's attention functions, over every format.

namespace {

// Where a layer keeps codes nothing is fetched ahead: what follows may lie elsewhere, and in other tiles.
void attend_part(const AttendArgs &args, const SegmentTask &task, const Part &part, const SegmentTask *next,
                 float *scratch, const Partial &out) {
  using kvik::KVType;
  Work work = work_of(args, task, part);
  const KVType keys = part.tiles.key.type, values = part.tiles.value.type;
  const bool has_many_rows = work.num_rows > 2 * kRowsAtOnce;
  const auto widens = [&](KVType type) { return has_many_rows && type == KVType::f16; };
  const bool widens_keys = widens(keys), widens_values = widens(values), widens_both = widens_keys && widens_values;
  Ahead ahead{};
  if (!args.kv.has_codes()) ahead = ahead_of(args, task, next, work.all, widens_both);
  // What follows the scores: factors of bytes, or widened tiles, keys before values.
  float *rest = scratch + work.num_rows * kSegment;
  int64_t lines_a_call = 0;
  if (widens_keys) rest = widen(work, work.keys, rest);
  if (widens_both) {
    widen(work, work.values, rest);
    const int64_t calls = work.num_rows + (work.num_rows + kRowsAtOnce - 1) / kRowsAtOnce * kSuperblock / 2;
    lines_a_call = ahead.num_tiles * ahead.lines / calls + 1;
  }
  float *begin = scratch + work.num_rows * kSegment;
  if (keys == KVType::int8)
    score_bytes(work, scratch, begin, ahead);
  else if (keys == KVType::codes)
    score_all_codes(work, scratch, begin);
  else if (keys == KVType::f16 && !widens_keys)
    score_floats<Half>(work, scratch, ahead, lines_a_call);
  else
    score_floats<float>(work, scratch, ahead, lines_a_call);
  softmax_rows(work, scratch, ahead, lines_a_call, out);
  if (widens_values && !widens_both) widen(work, work.values, begin); // in place of what the scores needed
  if (values == KVType::int8)
    add_bytes(work, scratch, begin, out, ahead);
  else if (values == KVType::codes)
    add_all_codes(work, scratch, begin, out);
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

// Tokens of the segment itself, which are all of one, read it as it was written; later ones read codes, but for the
// first block.
void attend_segment(const AttendArgs &args, const SegmentTask &task, const SegmentTask *next, float *scratch,
                    const Partial &out) {
  const LayerKV &kv = args.kv;
  const Part kept{kv, args.block_tables, args.table_width, {0, kSegment}};
  if (!kv.has_codes()) return attend_part(args, task, kept, next, scratch, out);
  Part written{kv.recent, args.recent_tables, args.recent_width, {0, kSegment}};
  if (args.own_segment(task.first_token) == task.segment) return attend_part(args, task, written, next, scratch, out);
  if (task.segment > 0) return attend_part(args, task, kept, next, scratch, out);
  written.columns = {0, kBlockSize};
  attend_part(args, task, written, next, scratch, out);
  const int64_t rows = task.num_tokens * (args.num_heads / kv.num_kv_heads);
  const Partial behind{scratch, scratch + rows, scratch + 2 * rows};
  const Part others{kv, args.block_tables, args.table_width, {kBlockSize, kSegment}};
  attend_part(args, task, others, next, scratch + rows * (kv.head_dim + 2), behind);
  merge_segments(out, behind, rows, kv.head_dim);
}

} // namespace
