// What the sampler does to whole rows of logits; the rest of it, which touches few tokens, is sample.cpp.

namespace {

constexpr float kImpossible = -__builtin_inff();
constexpr int64_t kScanned = 1024; // floats of a block among which the highest is looked for again

// Calls function(p) for each whole vector of `step` floats, and for a last one filled up with -infinity.
template <int64_t step, class Function> inline void for_vectors(const float *x, int64_t count, Function function) {
  int64_t i = 0;
  for (; i + step <= count; i += step) function(x + i);
  if (i == count) return;
  float rest[step];
  for (int64_t k = 0; k < step; ++k) rest[k] = k < count - i ? x[i + k] : kImpossible;
  function(rest);
}

inline float highest_of(const float *x, int64_t count, Wide &sum) {
  Wide highest[4] = {spread<Wide>(kImpossible), spread<Wide>(kImpossible), spread<Wide>(kImpossible),
                     spread<Wide>(kImpossible)};
  Wide sums[4] = {sum, wide_zero(), wide_zero(), wide_zero()};
  int64_t i = 0;
  for (; i + 4 * kWideLanes <= count; i += 4 * kWideLanes) {
    KVIK_UNROLL
    for (int k = 0; k < 4; ++k) {
      const Wide v = wide_load(x + i + k * kWideLanes);
      highest[k] = max(v, highest[k]); // in this order a NaN is passed over
      sums[k] = sums[k] + v;
    }
  }
  for_vectors<kWideLanes>(x + i, count - i, [&](const float *p) {
    const Wide v = wide_load(p);
    highest[0] = max(v, highest[0]);
    sums[0] = sums[0] + v;
  });
  sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return max_of(max(max(highest[0], highest[1]), max(highest[2], highest[3])));
}

inline bool any_nan(const float *x, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (x[i] != x[i]) return true;
  return false;
}

kvik::Highest highest(const float *x, int64_t count) {
  // A NaN makes its lane's sum NaN; so do infinities of both signs or sums that overflow, which is why a NaN is looked
  // for then, one by one.
  Wide sum = wide_zero();
  float best = kImpossible;
  int64_t first = 0;
  for (int64_t i = 0; i < count; i += kScanned) {
    const float value = highest_of(x + i, smaller(kScanned, count - i), sum);
    if (value > best) best = value, first = i;
  }
  float sums[kWideLanes];
  store(sums, sum);
  if (any_nan(sums, kWideLanes) && any_nan(x, count)) return {__builtin_nanf(""), -1};
  if (best == kImpossible) return {best, 0};
  while (x[first] != best) ++first;
  return {best, first};
}

// 2**scaled for scaled <= 0, in units of 2**-40 and rounded to a whole number of them, plus kWeightZero's bits. The
// polynomial is 2**f for |f| <= 1/2, to 1e-7 (a minimax fit). Every step is one IEEE operation.
constexpr double kWeightZero = 6144.0; // 1.5 * 2**12: in this binade a unit in the last place is 2**-40
inline Int64s weight_bits(Doubles logits, Doubles most, Doubles scale) {
  const Doubles magic = doubles(6755399441055744.0); // 1.5 * 2**52: adding it rounds to a whole number, in the low bits
  const Doubles scaled = max((logits - most) * scale, doubles(-64.0));
  const Doubles shifted = scaled + magic, f = scaled - (shifted - magic);
  Doubles p = doubles(0.0013264727123718878);
  p = p * f + doubles(0.009671512644834256);
  p = p * f + doubles(0.05550733743496679);
  p = p * f + doubles(0.24022242085262066);
  p = p * f + doubles(0.6931469775989935);
  p = p * f + doubles(1.0);
  return bits_of(from_bits(bits_of(p) + to_exponent(bits_of(shifted))) + doubles(kWeightZero));
}

inline Int64s weight_zero() { return bits_of(doubles(kWeightZero)); }

// Modulo 2**64: what the lanes hold may still have kWeightZero's bits in it.
inline uint64_t add_lanes(Int64s a) {
  int64_t lanes[kDoubles];
  store(lanes, a);
  uint64_t sum = 0;
  for (const int64_t lane : lanes) sum += static_cast<uint64_t>(lane);
  return sum;
}

int64_t weight_sums(const float *x, int64_t count, float most, double scale, int64_t *block_sums) {
  const Doubles wide_most = doubles(most), wide_scale = doubles(scale);
  int64_t total = 0;
  for (int64_t i = 0; i < count; i += kvik::kSummed) {
    const int64_t size = smaller(kvik::kSummed, count - i), num_vectors = (size + kDoubles - 1) / kDoubles;
    Int64s sum = int64s(0);
    for_vectors<kDoubles>(x + i, size,
                          [&](const float *p) { sum = sum + weight_bits(load_doubles(p), wide_most, wide_scale); });
    *block_sums = static_cast<int64_t>(add_lanes(sum) - static_cast<uint64_t>(num_vectors) * add_lanes(weight_zero()));
    total += *block_sums++;
  }
  return total;
}

void weights(const float *x, int64_t count, float most, double scale, int64_t *out) {
  const Doubles wide_most = doubles(most), wide_scale = doubles(scale);
  int64_t i = 0;
  for_vectors<kDoubles>(x, count, [&](const float *p) {
    const Int64s lanes = weight_bits(load_doubles(p), wide_most, wide_scale) - weight_zero();
    if (i + kDoubles <= count) return store(out + i, lanes), static_cast<void>(i += kDoubles);
    int64_t rest[kDoubles];
    store(rest, lanes);
    std::memcpy(out + i, rest, static_cast<std::size_t>(count - i) * sizeof *rest);
  });
}

int64_t find_between(const float *x, int64_t count, float lower, float upper, int32_t *ids) {
  const Wide least = spread<Wide>(lower), above = spread<Wide>(upper);
  int32_t *end = ids;
  int64_t i = 0;
  constexpr int64_t kStep = 4 * kWideLanes;
  for (; i + kStep <= count; i += kStep) {
    uint32_t masks[4];
    KVIK_UNROLL
    for (int k = 0; k < 4; ++k) masks[k] = lanes_between(wide_load(x + i + k * kWideLanes), least, above);
    if ((masks[0] | masks[1] | masks[2] | masks[3]) == 0) continue;
    KVIK_UNROLL
    for (int k = 0; k < 4; ++k) end = store_places(end, masks[k], static_cast<int32_t>(i) + k * kWideLanes);
  }
  for (; i < count; ++i)
    if (x[i] >= lower && x[i] < upper) *end++ = static_cast<int32_t>(i);
  return end - ids;
}

void fold_maxima(const float *x, int64_t count, int64_t columns, float *out) {
  std::memcpy(out, x, static_cast<std::size_t>(columns) * sizeof *x);
  for (int64_t first = columns; first + columns <= count; first += columns)
    for (int64_t i = 0; i < columns; i += kWideLanes) store(out + i, max(wide_load(x + first + i), wide_load(out + i)));
}

void keep_allowed(float *x, int64_t count, const uint8_t *allowed) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes, ++allowed)
    store(x + i, select_lanes(*allowed, load(x + i), broadcast(kImpossible)));
  for (int64_t k = 0; i + k < count; ++k)
    if ((*allowed >> k & 1) == 0) x[i + k] = kImpossible;
}

} // namespace
