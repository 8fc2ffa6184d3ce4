// Normalisation and activation, one row at a time.

namespace {

// x / sqrt(mean(x**2) + eps) * weight (Zhang and Sennrich, 2019).
void rms_norm(const float *x, const float *weight, int64_t columns, float eps, float *out) {
  Float8 squares = zero8();
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    const Float8 v = load(x + i);
    squares = fma(v, v, squares);
  }
  float total = add_lanes(squares);
  for (; i < columns; ++i) total = fmaf(x[i], x[i], total);
  const float factor = 1.0f / sqrtf(total / static_cast<float>(columns) + eps);
  for (i = 0; i < columns; ++i) out[i] = x[i] * factor * weight[i];
}

inline Float8 silu(Float8 x) { return x / (broadcast(1.0f) + exponential(zero8() - x)); }

// gate * sigmoid(gate) * up.
void silu_multiply(const float *gate, const float *up, int64_t count, float *out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, silu(load(gate + i)) * load(up + i));
  if (i == count) return;
  float lanes[2][kLanes] = {};
  std::memcpy(lanes[0], gate + i, static_cast<std::size_t>(count - i) * sizeof(float));
  std::memcpy(lanes[1], up + i, static_cast<std::size_t>(count - i) * sizeof(float));
  store(lanes[0], silu(load(lanes[0])) * load(lanes[1]));
  std::memcpy(out + i, lanes[0], static_cast<std::size_t>(count - i) * sizeof(float));
}

template <bool adjacent> inline void rope_pairs(float *x, const float *turns, int64_t pairs) {
  const int64_t step = adjacent ? 2 : 1, partner = adjacent ? 1 : pairs;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    float &a = x[pair * step], &b = x[pair * step + partner];
    const float cosine = turns[2 * pair], sine = turns[2 * pair + 1], old = a;
    a = old * cosine - b * sine;
    b = old * sine + b * cosine;
  }
}

void rope(float *x, const float *turns, int64_t pairs, bool adjacent_pairs) {
  if (adjacent_pairs) return rope_pairs<true>(x, turns, pairs);
  rope_pairs<false>(x, turns, pairs);
}

} // namespace
