// Mixtures of experts: rows are grouped by the experts that they chose, and each expert's are one product.
#include <algorithm>
#include <bitset>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "ops.h"
#include "pages.h"
#include "prepared_rows.h"

namespace kvik {
namespace {

constexpr int64_t kRowGrain = 2;     // row blocks: a tile of the widest vectors
constexpr int64_t kTokenGrain = 8;   // tokens that are worth another thread's while
constexpr int64_t kChunkTokens = 60; // whose products are added to the output while they are in cache

// Float by float, in the order of ids: what is not a kernel is compiled once, and has the same bits everywhere.
class Router {
public:
  explicit Router(const Routing &routing) : routing_(routing) {}

  // The experts of one row, in no order, and what their results are multiplied with.
  void choose(const float *logits, float *scores, int32_t *chosen, float *weights) const {
    score(logits, scores);
    std::bitset<kMaxExperts> taken = groups_left_out(scores);
    for (int64_t i = 0; i < routing_.num_chosen; ++i) {
      chosen[i] = static_cast<int32_t>(highest(scores, 0, routing_.num_experts, taken));
      taken.set(static_cast<std::size_t>(chosen[i]));
      weights[i] = scores[chosen[i]];
    }
    weigh(chosen, weights);
  }

private:
  void score(const float *logits, float *scores) const {
    const int64_t count = routing_.num_experts;
    switch (routing_.scores) {
    case ExpertScores::softmax:
      return softmax(logits, count, scores);
    case ExpertScores::sigmoid:
      return kernels->activate(Nonlinearity::sigmoid, logits, nullptr, count, scores);
    case ExpertScores::logits:
      std::copy_n(logits, count, scores);
    }
  }

  static void softmax(const float *x, int64_t count, float *out) {
    kernels->exponentials(x, *std::max_element(x, x + count), count, out);
    float sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += out[i];
    for (int64_t i = 0; i < count; ++i) out[i] /= sum;
  }

  float to_choose_by(const float *scores, int64_t expert) const {
    return routing_.choice_bias ? scores[expert] + routing_.choice_bias[expert] : scores[expert];
  }

  // Of [first, last) and not taken; of equal ones the first, and the first of all where none is a number.
  int64_t highest(const float *scores, int64_t first, int64_t last, const std::bitset<kMaxExperts> &taken) const {
    int64_t best = -1;
    for (int64_t expert = first; expert < last; ++expert)
      if (!taken[static_cast<std::size_t>(expert)] &&
          (best < 0 || to_choose_by(scores, expert) > to_choose_by(scores, best)))
        best = expert;
    return best;
  }

  // The experts of all groups but the best ones.
  std::bitset<kMaxExperts> groups_left_out(const float *scores) const {
    std::bitset<kMaxExperts> left_out;
    const int64_t groups = routing_.num_groups;
    if (groups == 1) return left_out;
    const int64_t size = routing_.num_experts / groups;
    std::vector<float> best_two(static_cast<std::size_t>(groups));
    for (int64_t group = 0; group < groups; ++group) {
      std::bitset<kMaxExperts> taken;
      const int64_t first = highest(scores, group * size, (group + 1) * size, taken);
      taken.set(static_cast<std::size_t>(first));
      const int64_t second = highest(scores, group * size, (group + 1) * size, taken);
      best_two[static_cast<std::size_t>(group)] = to_choose_by(scores, first) + to_choose_by(scores, second);
    }
    std::vector<bool> kept(best_two.size());
    for (int64_t i = 0; i < routing_.num_chosen_groups; ++i) {
      std::size_t best = best_two.size();
      for (std::size_t group = 0; group < best_two.size(); ++group)
        if (!kept[group] && (best == best_two.size() || best_two[group] > best_two[best])) best = group;
      kept[best] = true;
    }
    for (int64_t expert = 0; expert < routing_.num_experts; ++expert)
      if (!kept[static_cast<std::size_t>(expert / size)]) left_out.set(static_cast<std::size_t>(expert));
    return left_out;
  }

  void weigh(const int32_t *chosen, float *weights) const {
    const int64_t count = routing_.num_chosen;
    if (routing_.scores == ExpertScores::logits) softmax(weights, count, weights);
    if (routing_.renormalize) {
      float sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += weights[i];
      for (int64_t i = 0; i < count; ++i) weights[i] /= sum + routing_.min_sum;
    }
    for (int64_t i = 0; i < count; ++i) {
      weights[i] *= routing_.scale;
      if (routing_.scales) weights[i] *= routing_.scales[chosen[i]];
    }
  }

  const Routing &routing_;
};

// The rows of one expert among those that are grouped.
struct ExpertRows {
  const Expert *expert;
  int64_t first, count;
};

// Each token as often as it chose an expert, expert by expert in the order of ids, tokens in theirs.
struct Grouped {
  std::vector<ExpertRows> experts; // that some token chose
  const int32_t *tokens;           // (rows,)
  const float *factors;            // (rows,) what a row's result is multiplied with
  int64_t num_rows;
};

Grouped group_rows(ThreadPool &pool, ExpertsSpace &space, int64_t num_tokens, const float *logits,
                   const Routing &routing, std::span<const Expert> experts) {
  const int64_t num_rows = num_tokens * routing.num_chosen;
  float *scores = space.scores.get<float>(num_tokens * routing.num_experts);
  int32_t *chosen = space.chosen.get<int32_t>(num_rows);
  float *weights = space.weights.get<float>(num_rows);
  const Router router(routing);
  pool.for_ranges(num_tokens, kTokenGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      router.choose(logits + i * routing.num_experts, scores + i * routing.num_experts, chosen + i * routing.num_chosen,
                    weights + i * routing.num_chosen);
  });
  std::vector<int64_t> ends(experts.size() + 1); // first the number of an expert's rows, then where the next ones go
  for (int64_t row = 0; row < num_rows; ++row) ++ends[static_cast<std::size_t>(chosen[row]) + 1];
  Grouped grouped{{}, nullptr, nullptr, num_rows};
  for (std::size_t id = 0; id < experts.size(); ++id) {
    if (ends[id + 1] > 0) grouped.experts.push_back({&experts[id], ends[id], ends[id + 1]});
    ends[id + 1] += ends[id];
  }
  int32_t *tokens = space.tokens.get<int32_t>(num_rows);
  float *factors = space.factors.get<float>(num_rows);
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t to = ends[static_cast<std::size_t>(chosen[row])]++;
    tokens[to] = static_cast<int32_t>(row / routing.num_chosen);
    factors[to] = weights[row];
  }
  grouped.tokens = tokens, grouped.factors = factors;
  return grouped;
}

// Has the system read an expert's pages while others are computed.
void ask_for(const Expert &expert) {
  for (const Linear &linear : {expert.gate, expert.up, expert.down})
    if (linear.matrix) ask_for_pages(linear.matrix->data.get(), linear.matrix->num_bytes);
}

// Those that are chosen; and of the next layer those that it chose last, as neighbouring tokens often choose alike.
void ask_for_chosen(ExpertsSpace &space, const Grouped &grouped, int layer) {
  const auto at = static_cast<std::size_t>(layer);
  if (at >= space.last_chosen.size()) space.last_chosen.resize(at + 1);
  std::vector<const Expert *> &chosen = space.last_chosen[at];
  chosen.clear();
  for (const ExpertRows &rows : grouped.experts) chosen.push_back(rows.expert);
  for (const Expert *expert : chosen) ask_for(*expert);
  for (const Expert *expert : space.last_chosen[(at + 1) % space.last_chosen.size()]) ask_for(*expert);
}

} // namespace

void run_experts(ThreadPool &pool, Workspace &workspace, const RowsIn &in, const float *logits, const Mixture &mixture,
                 float *out, bool int16_activations) {
  if (in.num_tokens == 0) return;
  const std::span<const Expert> experts = mixture.experts;
  ExpertsSpace &space = workspace.experts;
  const Grouped grouped = group_rows(pool, space, in.num_tokens, logits, mixture.routing, experts);
  if (experts[0].up.matrix->on_demand) ask_for_chosen(space, grouped, mixture.layer);
  bool quantizes_x = false, quantizes_hidden = false, floats = false;
  for (const auto &[expert, first, count] : grouped.experts) {
    for (const Linear &linear : {expert->gate, expert->up}) {
      if (!linear.matrix) continue;
      (linear.matrix->quantized() ? quantizes_x : floats) = true;
    }
    quantizes_hidden = quantizes_hidden || expert->down.matrix->quantized();
  }
  const PreparedRows of_tokens(pool, workspace.rows, in, quantizes_x, int16_activations);
  // A single token is the row of all of its experts.
  const bool is_one = in.num_tokens == 1;
  const PreparedRows rows(pool, space.grouped, of_tokens, grouped.tokens, is_one ? 1 : grouped.num_rows, floats);

  const int64_t width = experts[0].up.matrix->rows, blocks = experts[0].up.matrix->row_blocks();
  float *hidden = space.hidden.get<float>(grouped.num_rows * width);
  float *up = workspace.up.get<float>(grouped.num_rows * width);
  pool.for_ranges(static_cast<int64_t>(grouped.experts.size()) * blocks, kRowGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const auto &[expert, first_row, count] = grouped.experts[static_cast<std::size_t>(begin / blocks)];
      const int64_t first = begin % blocks, last = std::min(blocks, first + end - begin);
      const int64_t start = first * kRowBlock, columns = std::min(last * kRowBlock, width) - start;
      float *to = hidden + first_row * width, *other = up + first_row * width;
      const int64_t row = is_one ? 0 : first_row;
      rows.multiply({expert->up, expert->gate.matrix ? other : to}, first, last, row, count);
      if (expert->gate.matrix) rows.multiply({expert->gate, to}, first, last, row, count);
      for (int64_t i = start; i < start + count * width; i += width)
        kernels->activate(mixture.activation, to + i, expert->gate.matrix ? other + i : nullptr, columns, to + i);
      begin += last - first;
    }
  });

  const PreparedRows of_hidden(pool, workspace.rows, {hidden, grouped.num_rows, width}, quantizes_hidden,
                               int16_activations);
  float *added = space.added.get<float>(std::min(kChunkTokens, grouped.num_rows) * in.columns);
  pool.for_ranges(experts[0].down.matrix->row_blocks(), kRowGrain, [&](int64_t first, int64_t last) {
    const int64_t start = first * kRowBlock, end = std::min(last * kRowBlock, in.columns);
    for (int64_t token = 0; token < in.num_tokens; ++token)
      std::fill(out + token * in.columns + start, out + token * in.columns + end, 0.0f);
    for (const auto &[expert, first_row, all] : grouped.experts) {
      for (int64_t row = first_row; row < first_row + all; row += kChunkTokens) {
        const int64_t count = std::min(kChunkTokens, first_row + all - row);
        of_hidden.multiply({expert->down, added}, first, last, row, count);
        for (int64_t i = 0; i < count; ++i) {
          float *to = out + grouped.tokens[row + i] * in.columns;
          const float *from = added + i * in.columns, factor = grouped.factors[row + i];
          for (int64_t k = start; k < end; ++k) to[k] += factor * from[k];
        }
      }
    }
  });
}

} // namespace kvik
