// Normalisation and activation, one row at a time.

namespace {

inline float sum_of(const float *x, int64_t count) {
  F32x8 sums = zero8();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sums = sums + load(x + i);
  float total = add_lanes(sums);
  for (; i < count; ++i) total += x[i];
  return total;
}

// Of x - center.
inline float sum_of_squares(const float *x, int64_t count, float center) {
  F32x8 squares = zero8();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F32x8 v = load(x + i) - broadcast(center);
    squares = fma(v, v, squares);
  }
  float total = add_lanes(squares);
  for (; i < count; ++i) total = fmaf(x[i] - center, x[i] - center, total);
  return total;
}

void norm(const kvik::Norm &norm, const float *x, float *out) {
  const float count = static_cast<float>(norm.width);
  const float mean = norm.layer ? sum_of(x, norm.width) / count : 0.0f;
  const float factor = 1.0f / sqrtf(sum_of_squares(x, norm.width, mean) / count + norm.eps);
  for (int64_t i = 0; i < norm.width; ++i) out[i] = (x[i] - mean) * factor * norm.weight[i];
  if (!norm.bias) return;
  for (int64_t i = 0; i < norm.width; ++i) out[i] += norm.bias[i];
}

inline F32x8 silu(F32x8 x) { return x / (broadcast(1.0f) + exponential(zero8() - x)); }

inline F32x8 gelu_tanh(F32x8 x) {
  const F32x8 cubic = fma(x * x, x * broadcast(0.044715f), x);
  return x / (broadcast(1.0f) + exponential(cubic * broadcast(-2 * 0.79788456f)));
}

// x * Phi(x). Phi(-|x|) is a polynomial in t times exp(-x**2 / 2), to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
inline F32x8 gelu(F32x8 x) {
  const F32x8 size = max(x, zero8() - x), z = size * broadcast(0.70710678f);
  const F32x8 t = broadcast(1.0f) / fma(z, broadcast(0.3275911f), broadcast(1.0f));
  F32x8 p = broadcast(1.061405429f);
  p = fma(p, t, broadcast(-1.453152027f));
  p = fma(p, t, broadcast(1.421413741f));
  p = fma(p, t, broadcast(-0.284496736f));
  p = fma(p, t, broadcast(0.254829592f));
  const F32x8 tail = p * t * exponential(zero8() - z * z) * broadcast(0.5f);
  return max(zero8(), x) - size * tail;
}

inline F32x8 sigmoid(F32x8 x) { return broadcast(1.0f) / (broadcast(1.0f) + exponential(zero8() - x)); }

inline F32x8 relu(F32x8 x) { return max(zero8(), x); } // in this order NaN stays NaN

inline F32x8 square(F32x8 x) { return x * x; }

inline F32x8 xielu(F32x8 x, const kvik::Xielu &curve) {
  const F32x8 above = broadcast(curve.alpha_p) * square(x);
  const F32x8 below = broadcast(curve.alpha_n) * (exponential_less_1(min(x, broadcast(curve.eps))) - x);
  return fma(broadcast(curve.beta), x, if_positive(x, above, below));
}

// Of gpt-oss: x at most 7, `up` between -7 and 7 and one more. NaN is each bound's right operand, and so it stays.
inline F32x8 clamped_silu(F32x8 x, F32x8 up) {
  const F32x8 limit = broadcast(7.0f), one = broadcast(1.0f);
  const F32x8 gate = min(limit, x), raised = max(zero8() - limit, min(limit, up)) + one;
  return gate / (one + exponential(gate * broadcast(-1.702f))) * raised;
}

// Calls function(x, up) for eight items at a time, with `missing` in place of no `up`. The last vector may be partial.
template <class Function> inline void for_eights(const float *x, const float *up, int64_t count, float *out,
                                                 const Function &function, float missing = 1.0f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    store(out + i, function(load(x + i), up ? load(up + i) : broadcast(missing)));
  if (i == count) return;
  const std::size_t bytes = static_cast<std::size_t>(count - i) * sizeof(float);
  float lanes[2][kLanes] = {};
  std::memcpy(lanes[0], x + i, bytes);
  if (up) std::memcpy(lanes[1], up + i, bytes);
  store(lanes[0], function(load(lanes[0]), up ? load(lanes[1]) : broadcast(missing)));
  std::memcpy(out + i, lanes[0], bytes);
}

void activate(kvik::Nonlinearity activation, const float *x, const float *up, int64_t count, float *out) {
  switch (activation) {
  case kvik::Nonlinearity::silu:
    return for_eights(x, up, count, out, [](F32x8 a, F32x8 b) { return silu(a) * b; });
  case kvik::Nonlinearity::gelu:
    return for_eights(x, up, count, out, [](F32x8 a, F32x8 b) { return gelu(a) * b; });
  case kvik::Nonlinearity::gelu_tanh:
    return for_eights(x, up, count, out, [](F32x8 a, F32x8 b) { return gelu_tanh(a) * b; });
  case kvik::Nonlinearity::relu:
    return for_eights(x, up, count, out, [](F32x8 a, F32x8 b) { return relu(a) * b; });
  case kvik::Nonlinearity::sigmoid:
    return for_eights(x, up, count, out, [](F32x8 a, F32x8 b) { return sigmoid(a) * b; });
  case kvik::Nonlinearity::clamped_silu:
    return for_eights(x, up, count, out, [](F32x8 a, F32x8 b) { return clamped_silu(a, b); }, 0.0f);
  case kvik::Nonlinearity::relu2:
    return for_eights(x, up, count, out, [](F32x8 a, F32x8 b) { return square(relu(a)) * b; });
  }
}

void xielu(const float *x, const kvik::Xielu &curve, int64_t count, float *out) {
  for_eights(x, nullptr, count, out, [&curve](F32x8 a, F32x8) { return xielu(a, curve); });
}

void soft_cap(const float *x, float cap, int64_t count, float *out) {
  for_eights(x, nullptr, count, out, [cap](F32x8 a, F32x8) { return soft_capped(a, cap); });
}

void exponentials(const float *x, float shift, int64_t count, float *out) {
  for_eights(x, nullptr, count, out, [shift](F32x8 a, F32x8) { return exponential(a - broadcast(shift)); });
}

template <bool adjacent> inline void rope_pairs(float *x, const float *cos_sin, int64_t pairs, int64_t half) {
  const int64_t step = adjacent ? 2 : 1, partner = adjacent ? 1 : half;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    float &a = x[pair * step], &b = x[pair * step + partner];
    const float cosine = cos_sin[2 * pair], sine = cos_sin[2 * pair + 1], old = a;
    a = old * cosine - b * sine;
    b = old * sine + b * cosine;
  }
}

void rope(float *x, const float *cos_sin, int64_t pairs, int64_t half) {
  if (half == 0) return rope_pairs<true>(x, cos_sin, pairs, half);
  rope_pairs<false>(x, cos_sin, pairs, half);
}

} // namespace
