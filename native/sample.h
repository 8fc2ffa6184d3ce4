// From rows of logits to tokens. What each step means is told by src/kvik/engine/sampler_reference.py, which gives the
// same bits.
#pragma once

#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "thread_pool.h"
#include "workspace.h"

namespace kvik {

constexpr int64_t kMaxVocabulary = int64_t{1} << 22; // so many weights of 2**40 and less add up to 2**62
constexpr int64_t kWeightOne = int64_t{1} << 40;
constexpr uint64_t kWholeMass = uint64_t{1} << 53; // top_p in units of 2**-53
constexpr int64_t kMaxTop = 64;                    // most likely tokens to be told of a row

// What one row is sampled with. Python packs it, so its layout is fixed (engine/sampler_native.py).
struct SampleRow {
  int64_t row; // of the logits
  uint64_t seed;
  int64_t position;
  // Ranges of the ids that come with the rows: [history, completion, history_end), [forbidden, forbidden_end) and,
  // with a value each, [bias, bias_end).
  int64_t history, completion, history_end;
  int64_t forbidden, forbidden_end;
  int64_t bias, bias_end;
  int64_t mask;  // where its bits begin, in bytes; -1: all tokens are allowed
  int64_t given; // the token whose logprob is wanted; -1: one is chosen
  double scale;  // log2(e) / temperature; 0: the most likely token
  double presence, frequency;
  uint64_t top_p;     // in units of kWholeMass; kWholeMass: none
  int64_t top_k;      // 0: none
  int64_t min_weight; // in units of 1 / kWeightOne of the most likely token's; 0: none
  float repetition;   // 1: none
  int32_t num_top;    // most likely tokens to be told, with the chosen one's logprob; -1: nothing
};
static_assert(sizeof(SampleRow) == 152);

struct SampleArgs {
  const float *logits; // (rows, vocab_size), never written to
  int64_t vocab_size;
  std::span<const SampleRow> rows;
  const int32_t *ids;
  const float *biases;    // of the first of the ids
  const uint8_t *masks;   // bit i of byte i / 8: token i is allowed
  int64_t num_top;        // columns of the two below
  int32_t *chosen;        // (rows,): -1 where the row is not finite or nothing is allowed
  int64_t *totals;        // (rows,): sum of exp(logit - highest), in units of 1 / kWeightOne
  int32_t *top_ids;       // (rows, num_top): of the most likely, highest first, of equals the lowest id
  float *top_logits;      // (rows, num_top)
  float *highest_and_own; // (rows, 2): the highest logit, and the chosen token's
};

// Uniform in 0 ... 2**53-1: what np.random.Philox(key=seed, counter=position) gives first, its highest 53 bits.
uint64_t uniform_bits(uint64_t seed, uint64_t position);

class Sampler {
public:
  explicit Sampler(ThreadPool &pool) : pool_(pool), spaces_(static_cast<std::size_t>(pool.num_threads())) {}

  // The first of the highest logits of some rows; -1 where a row has a NaN, or nothing but infinities.
  void argmax(const float *logits, int64_t vocab_size, std::span<const int32_t> rows, int32_t *out);
  void sample(const SampleArgs &args);

private:
  struct Token {
    uint64_t key; // ascending from the most likely token, of equals from the lowest id
    int64_t weight;
    int32_t id() const { return static_cast<int32_t>(static_cast<uint32_t>(key)); }
  };
  // What a thread works with.
  struct Space {
    void reserve(int64_t vocab_size);
    Buffer logits, sums, folded, ids, gathered, weights, tokens, counts;
    int64_t num_reserved = 0, num_counts = 0; // counts are 0 between rows
  };
  struct Row;
  // The tokens that a filter left: all of a band are more likely than all of the next, in a band they have no order.
  struct Kept {
    std::span<Token> tokens;
    std::size_t bands[32] = {0}; // where each begins
    int num_bands = 0;
  };

  void sample_row(Space &space, const SampleArgs &args, int64_t index);
  static const float *adjusted(Space &space, const SampleArgs &args, const SampleRow &row);
  static void apply_penalties(Space &space, const SampleArgs &args, const SampleRow &row, float *x);
  static int32_t draw(Space &space, const Row &row, const SampleRow &params);
  static int32_t draw_filtered(Space &space, const Row &row, const SampleRow &params);
  static Kept keep_top_k(Space &space, const Row &row, const SampleRow &params);
  static Kept keep_likely(Space &space, const Row &row, const SampleRow &params);
  static std::span<Token> find(Space &space, const Row &row, float lower, float upper, std::span<Token> found,
                               const int64_t *sums = nullptr, int64_t least = 0);
  static int64_t sum_of(std::span<const Token> tokens);
  static float bound_for(Space &space, const Row &row, int64_t count);
  static void add_weights(Space &space, const Row &row, double scale, std::span<Token> tokens);
  static std::size_t select(std::span<Token> tokens, int64_t wanted, bool by_count);
  static void note_logprobs(Space &space, const SampleArgs &args, const Row &row, int64_t index);

  ThreadPool &pool_;
  std::mutex one_call_at_a_time_;
  std::vector<Space> spaces_;
};

} // namespace kvik
