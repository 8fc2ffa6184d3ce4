// From rows of logits to tokens: each row by one thread, and nothing of it depends on the others.
#include "sample.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>

#include "float_mode.h"
#include "ops.h"

namespace kvik {

// A row as it is sampled: adjusted, with its highest logit.
struct Sampler::Row {
  const float *logits;
  int64_t size;
  Highest highest;
};

namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

constexpr float kEverything = std::numeric_limits<float>::infinity();

// Tokens are looked at in bands of weights below the highest, in halvings; the last band has all the rest.
constexpr int kFirstBand = 8, kBand = 2, kLastBand = 42;

// The logit in the upper half, so that a lower number is a higher logit; zeros of both signs are equal.
uint64_t key_of(float logit, int32_t id) {
  logit += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &logit, 4);
  const uint32_t ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~ascending) << 32 | static_cast<uint32_t>(id);
}

// a * b / 2**53, rounded down; b < 2**62.
int64_t share(uint64_t a, int64_t b, bool round_up) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * static_cast<uint64_t>(b);
  return static_cast<int64_t>((product + (round_up ? kWholeMass - 1 : 0)) >> 53);
}

} // namespace

// Philox4x64-10 (Salmon et al., 2011). NumPy counts up before the first block.
uint64_t uniform_bits(uint64_t seed, uint64_t position) {
  uint64_t counter[4] = {position + 1, position + 1 == 0, 0, 0}, key[2] = {seed, 0};
  for (int round = 0; round < 10; ++round) {
    const unsigned __int128 left = static_cast<unsigned __int128>(0xD2E7470EE14C6C93u) * counter[0];
    const unsigned __int128 right = static_cast<unsigned __int128>(0xCA5A826395121157u) * counter[2];
    const uint64_t next[4] = {static_cast<uint64_t>(right >> 64) ^ counter[1] ^ key[0], static_cast<uint64_t>(right),
                              static_cast<uint64_t>(left >> 64) ^ counter[3] ^ key[1], static_cast<uint64_t>(left)};
    std::copy_n(next, 4, counter);
    key[0] += 0x9E3779B97F4A7C15u;
    key[1] += 0xBB67AE8584CAA73Bu;
  }
  return counter[0] >> 11;
}

void Sampler::argmax(const float *logits, int64_t vocab_size, std::span<const int32_t> rows, int32_t *out) {
  pool_.for_each(static_cast<int64_t>(rows.size()), [&](int, int64_t i) {
    const DenormalFloatMode mode;
    const Highest found = kernels->highest(logits + rows[static_cast<std::size_t>(i)] * vocab_size, vocab_size);
    out[i] = std::isfinite(found.value) ? static_cast<int32_t>(found.index) : -1;
  });
}

// A job of the pool must not throw, so nothing is allocated in it. Memory that no row needs is never touched.
void Sampler::Space::reserve(int64_t vocab_size) {
  if (vocab_size > num_reserved) num_counts = 0;
  num_reserved = std::max(num_reserved, vocab_size);
  logits.get<float>(vocab_size);
  sums.get<int64_t>(vocab_size / kSummed + 1);
  folded.get<float>(vocab_size);
  ids.get<int32_t>(vocab_size);
  gathered.get<float>(vocab_size);
  weights.get<int64_t>(vocab_size);
  tokens.get<Token>(vocab_size);
  counts.get<int32_t>(vocab_size);
}

void Sampler::sample(const SampleArgs &args) {
  const std::lock_guard lock(one_call_at_a_time_);
  for (Space &space : spaces_) space.reserve(args.vocab_size);
  pool_.for_each(static_cast<int64_t>(args.rows.size()), [&](int thread, int64_t index) {
    const DenormalFloatMode mode;
    sample_row(spaces_[static_cast<std::size_t>(thread)], args, index);
  });
}

void Sampler::sample_row(Space &space, const SampleArgs &args, int64_t index) {
  const SampleRow &params = args.rows[static_cast<std::size_t>(index)];
  const float *logits = args.logits + params.row * args.vocab_size;
  const Row raw{logits, args.vocab_size, kernels->highest(logits, args.vocab_size)};
  int32_t &chosen = args.chosen[index];
  chosen = -1;
  if (!std::isfinite(raw.highest.value)) return;
  if (params.given >= 0) {
    chosen = static_cast<int32_t>(params.given);
  } else if (const float *own = adjusted(space, args, params); own == logits) {
    chosen = draw(space, raw, params);
  } else {
    chosen = draw(space, {own, args.vocab_size, kernels->highest(own, args.vocab_size)}, params);
  }
  if (params.num_top >= 0 && chosen >= 0) note_logprobs(space, args, raw, index);
}

// The logits after penalties, biases and masks; the given ones themselves where nothing is to do.
const float *Sampler::adjusted(Space &space, const SampleArgs &args, const SampleRow &row) {
  const float *logits = args.logits + row.row * args.vocab_size;
  const bool penalised = row.repetition != 1 || row.presence != 0 || row.frequency != 0;
  if (!penalised && row.bias == row.bias_end && row.mask < 0 && row.forbidden == row.forbidden_end) return logits;
  float *x = space.logits.get<float>(args.vocab_size);
  std::copy_n(logits, args.vocab_size, x);
  if (penalised) apply_penalties(space, args, row, x);
  for (int64_t i = row.bias; i < row.bias_end; ++i) x[args.ids[i]] += args.biases[i];
  if (row.mask >= 0) kernels->keep_allowed(x, args.vocab_size, args.masks + row.mask);
  for (int64_t i = row.forbidden; i < row.forbidden_end; ++i) x[args.ids[i]] = kNothing;
  return x;
}

void Sampler::apply_penalties(Space &space, const SampleArgs &args, const SampleRow &row, float *x) {
  if (space.num_counts < args.vocab_size) {
    std::fill_n(space.counts.get<int32_t>(args.vocab_size), args.vocab_size, 0);
    space.num_counts = args.vocab_size;
  }
  int32_t *counts = space.counts.get<int32_t>(args.vocab_size);
  const std::span history(args.ids + row.history, args.ids + row.history_end);
  const std::span completion(args.ids + row.completion, args.ids + row.history_end);
  if (row.repetition != 1) {
    for (const int32_t id : history) {
      if (std::exchange(counts[id], 1) != 0) continue;
      const float value = x[id] > 0 ? x[id] / row.repetition : x[id] * row.repetition;
      x[id] = std::min(value, FLT_MAX);
    }
    for (const int32_t id : history) counts[id] = 0;
  }
  if (row.presence == 0 && row.frequency == 0) return;
  for (const int32_t id : completion) ++counts[id];
  for (const int32_t id : completion) {
    const int32_t times = std::exchange(counts[id], 0);
    if (times != 0) x[id] -= static_cast<float>(row.presence + row.frequency * times);
  }
}

int32_t Sampler::draw(Space &space, const Row &row, const SampleRow &params) {
  if (!std::isfinite(row.highest.value)) return -1;
  if (params.scale == 0) return static_cast<int32_t>(row.highest.index);
  const bool has_top_k = params.top_k > 0 && params.top_k < row.size;
  if (has_top_k || params.top_p < kWholeMass || params.min_weight > 0) return draw_filtered(space, row, params);
  // By ids: first the block of neighbours in which the sum passes the target, then the token.
  const float most = row.highest.value;
  int64_t *sums = space.sums.get<int64_t>((row.size + kSummed - 1) / kSummed);
  const int64_t total = kernels->weight_sums(row.logits, row.size, most, params.scale, sums);
  int64_t target = share(uniform_bits(params.seed, static_cast<uint64_t>(params.position)), total, false);
  int64_t first = 0;
  for (; *sums <= target; ++sums, first += kSummed) target -= *sums;
  int64_t weights[kSummed];
  kernels->weights(row.logits + first, std::min(kSummed, row.size - first), most, params.scale, weights);
  int64_t i = 0;
  for (; weights[i] <= target; ++i) target -= weights[i];
  return static_cast<int32_t>(first + i);
}

// The same from the most likely token down, of what top_k, then top_p and min_p keep.
int32_t Sampler::draw_filtered(Space &space, const Row &row, const SampleRow &params) {
  const bool has_top_k = params.top_k > 0 && params.top_k < row.size;
  Kept kept = has_top_k ? keep_top_k(space, row, params) : keep_likely(space, row, params);
  if (params.min_weight > 0) {
    const auto end = std::partition(kept.tokens.begin(), kept.tokens.end(),
                                    [&](const Token &token) { return token.weight >= params.min_weight; });
    kept.tokens = kept.tokens.first(static_cast<std::size_t>(end - kept.tokens.begin()));
    kept.num_bands = 1;
  }
  int64_t total = sum_of(kept.tokens);
  int64_t target = share(uniform_bits(params.seed, static_cast<uint64_t>(params.position)), total, false);
  for (int i = 0;; ++i) {
    const std::size_t first = kept.bands[i];
    const std::span<Token> band =
        i + 1 < kept.num_bands ? kept.tokens.subspan(first, kept.bands[i + 1] - first) : kept.tokens.subspan(first);
    const int64_t sum = sum_of(band);
    if (target < sum) return band[select(band, target + 1, false)].id();
    target -= sum;
  }
}

Sampler::Kept Sampler::keep_top_k(Space &space, const Row &row, const SampleRow &params) {
  std::span<Token> tokens = find(space, row, bound_for(space, row, params.top_k), kEverything, {});
  tokens = tokens.first(select(tokens, params.top_k, true) + 1);
  add_weights(space, row, params.scale, tokens);
  if (params.top_p < kWholeMass)
    tokens = tokens.first(select(tokens, share(params.top_p, sum_of(tokens), true), false) + 1);
  return {tokens};
}

// What top_p keeps, or what min_p may: found band by band of logits, from the highest down.
Sampler::Kept Sampler::keep_likely(Space &space, const Row &row, const SampleRow &params) {
  const double most = row.highest.value, temperature = kLog2E / params.scale;
  int64_t missing = std::numeric_limits<int64_t>::max(); // of the mass that top_p wants
  int64_t *sums = nullptr;
  if (params.top_p < kWholeMass) {
    sums = space.sums.get<int64_t>((row.size + kSummed - 1) / kSummed);
    missing =
        share(params.top_p, kernels->weight_sums(row.logits, row.size, row.highest.value, params.scale, sums), true);
  }
  double lowest = kNothing; // below it no weight is min_weight: a thousandth is far more than weights are off by
  if (params.min_weight > 0)
    lowest = most + temperature * (std::log(static_cast<double>(params.min_weight) / kWeightOne) - 1e-3);
  Kept kept;
  float upper = kEverything;
  for (int halvings = kFirstBand; halvings <= kLastBand; halvings += kBand) {
    const double bound = halvings < kLastBand ? most - temperature * kLn2 * halvings : kNothing;
    const bool last = params.top_p == kWholeMass || bound <= lowest;
    const float lower = static_cast<float>(last ? lowest : bound);
    const std::size_t first = kept.tokens.size();
    // Neighbours that weigh less together than `lower` does, but for what weights are off by, have none of the band.
    int64_t least;
    kernels->weights(&lower, 1, row.highest.value, params.scale, &least);
    kept.tokens = find(space, row, lower, upper, kept.tokens, sums, least - (least >> 20) - 1);
    const std::span<Token> band = kept.tokens.subspan(first);
    add_weights(space, row, params.scale, band);
    kept.bands[kept.num_bands++] = first;
    const int64_t sum = sum_of(band);
    if (sum >= missing) kept.tokens = kept.tokens.first(first + select(band, missing, false) + 1);
    if (sum >= missing || last) break;
    missing -= sum;
    upper = lower;
  }
  return kept;
}

// Adds the tokens with logits in [lower, upper) to those that `found` has, without weights. Where there are sums of
// weights, neighbours with less than `least` are not looked at.
std::span<Sampler::Token> Sampler::find(Space &space, const Row &row, float lower, float upper, std::span<Token> found,
                                        const int64_t *sums, int64_t least) {
  int32_t *ids = space.ids.get<int32_t>(row.size);
  Token *tokens = space.tokens.get<Token>(row.size), *end = tokens + found.size();
  const auto look = [&](int64_t first, int64_t last) {
    const int64_t count = kernels->find_between(row.logits + first, last - first, lower, upper, ids);
    for (int64_t i = 0; i < count; ++i) {
      const int32_t id = static_cast<int32_t>(first) + ids[i];
      *end++ = {key_of(row.logits[id], id), 0};
    }
  };
  if (!sums) {
    look(0, row.size);
  } else {
    for (int64_t first = 0; first < row.size;) {
      int64_t last = first;
      while (last < row.size && sums[last / kSummed] >= least) last += kSummed;
      if (last > first) look(first, std::min(last, row.size));
      first = last + kSummed;
    }
  }
  return {tokens, static_cast<std::size_t>(end - tokens)};
}

int64_t Sampler::sum_of(std::span<const Token> tokens) {
  int64_t sum = 0;
  for (const Token &token : tokens) sum += token.weight;
  return sum;
}

void Sampler::add_weights(Space &space, const Row &row, double scale, std::span<Token> tokens) {
  float *logits = space.gathered.get<float>(row.size);
  int64_t *weights = space.weights.get<int64_t>(row.size);
  for (std::size_t i = 0; i < tokens.size(); ++i) logits[i] = row.logits[tokens[i].id()];
  kernels->weights(logits, static_cast<int64_t>(tokens.size()), row.highest.value, scale, weights);
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i].weight = weights[i];
}

// A number that at least `count` and hardly more of the logits reach; -infinity where all may be looked at as well.
// Folded into rows, a column's maximum is one of its logits, so the `count`-th highest maximum is such a number.
float Sampler::bound_for(Space &space, const Row &row, int64_t count) {
  const int64_t columns = std::max<int64_t>(256, (4 * count + 15) / 16 * 16);
  if (columns > row.size / 2) return kNothing;
  float *maxima = space.folded.get<float>(columns);
  kernels->fold_maxima(row.logits, row.size, columns, maxima);
  std::nth_element(maxima, maxima + count - 1, maxima + columns, std::greater<float>());
  return maxima[count - 1];
}

// Where the sum of weights, or the count, reaches `wanted`, from the most likely token down: the place of that token,
// before which then are the ones more likely than it. A quickselect that goes by weights.
std::size_t Sampler::select(std::span<Token> tokens, int64_t wanted, bool by_count) {
  const auto size_of = [by_count](const Token &token) { return by_count ? 1 : token.weight; };
  std::size_t first = 0, last = tokens.size();
  for (int rounds = 0; last - first > 16 && rounds < 64; ++rounds) {
    const uint64_t a = tokens[first].key, b = tokens[first + (last - first) / 2].key, c = tokens[last - 1].key;
    const uint64_t pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    // The median of three is neither the least nor the greatest, so both sides have tokens.
    std::size_t middle = first;
    int64_t sum = 0;
    for (std::size_t i = first; i < last; ++i) {
      if (tokens[i].key > pivot) continue;
      sum += size_of(tokens[i]);
      std::swap(tokens[i], tokens[middle++]);
    }
    if (sum >= wanted) {
      last = middle;
    } else {
      wanted -= sum;
      first = middle;
    }
  }
  std::sort(tokens.begin() + static_cast<std::ptrdiff_t>(first), tokens.begin() + static_cast<std::ptrdiff_t>(last),
            [](const Token &a, const Token &b) { return a.key < b.key; });
  for (; first + 1 < last; ++first)
    if ((wanted -= size_of(tokens[first])) <= 0) break;
  return first;
}

void Sampler::note_logprobs(Space &space, const SampleArgs &args, const Row &row, int64_t index) {
  const SampleRow &params = args.rows[static_cast<std::size_t>(index)];
  int64_t *sums = space.sums.get<int64_t>((row.size + kSummed - 1) / kSummed);
  args.totals[index] = kernels->weight_sums(row.logits, row.size, row.highest.value, kLog2E, sums);
  args.highest_and_own[2 * index] = row.logits[row.highest.index];
  args.highest_and_own[2 * index + 1] = row.logits[args.chosen[index]];
  const int64_t count = std::min<int64_t>(params.num_top, row.size);
  if (count == 0) return;
  std::span<Token> tokens = find(space, row, bound_for(space, row, count), kEverything, {});
  tokens = tokens.first(select(tokens, count, true) + 1);
  std::sort(tokens.begin(), tokens.end(), [](const Token &a, const Token &b) { return a.key < b.key; });
  for (int64_t i = 0; i < count; ++i) {
    const int32_t id = tokens[static_cast<std::size_t>(i)].id();
    args.top_ids[index * args.num_top + i] = id;
    args.top_logits[index * args.num_top + i] = row.logits[id];
  }
}

} // namespace kvik
