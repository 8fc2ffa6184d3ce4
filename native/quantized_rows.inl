// Activations to int8, or int16 as two bytes, per group of 32 columns.

namespace {

// Values too small for a scale that float32 divides by become zero.
void quantize_row(const float *x, int64_t columns, const kvik::QuantizedRows &out, int64_t row) {
  const bool int16_activations = out.low;
  const float levels = int16_activations ? 32384.0f : 127.0f; // 254 * 127.5 - 1: the high half must not round to 128
  for (int64_t i = 0; i < columns / kvik::kGroup; ++i, x += kvik::kGroup) {
    const int64_t group = out.group_at(i / out.kGroups, row) + i % out.kGroups, at = group * kvik::kGroup;
    F32x8 largest = zero8(), defect = zero8(); // x - x: NaN where x is NaN or infinite, else zero
    for (int k = 0; k < kvik::kGroup; k += kLanes) {
      const F32x8 v = load(x + k);
      largest = max(abs(v), largest);
      defect = defect + (v - v);
    }
    const float top = max_lanes(largest);
    const bool usable = top > 1e-30f;
    const F32x8 inverse = broadcast(usable ? levels / top : 0.0f);
    const float scale = (usable ? top / levels : 0.0f) + add_lanes(defect); // what is no number must not vanish

    Int32x8 quants[4], high[4];
    for (int j = 0; j < 4; ++j) {
      const F32x8 scaled = load(x + j * kLanes) * inverse;
      quants[j] = to_int(max(min(scaled, broadcast(levels)), broadcast(-levels)));
    }
    if (int16_activations) {
      Int32x8 low[4];
      for (int j = 0; j < 4; ++j) {
        high[j] = to_int(to_float(quants[j]) * broadcast(1.0f / 254));
        low[j] = quants[j] - scale_int(high[j], 254);
      }
      store_bytes(out.high + at, high);
      store_bytes(out.low + at, low);
    } else {
      store_bytes(out.high + at, quants);
    }
    out.scale[group] = scale;
    const int32_t halves[2] = {add_lanes(quants[0] + quants[1]), add_lanes(quants[2] + quants[3])};
    const int32_t totals[3] = {halves[0] + halves[1], halves[0], halves[1]};
    for (int j = 0; j < 3; ++j) {
      out.totals[3 * group + j] = totals[j];
      out.sums[3 * group + j] = scale * static_cast<float>(totals[j]);
    }
  }
}

} // namespace
