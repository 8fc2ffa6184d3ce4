// The arrays of one step as they come from Python, copied and checked before any op looks at them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "bind.h"
#include "program.h"

namespace kvik {

using GroupArrays = std::vector<std::pair<Integers, Array<const int32_t, 2>>>; // slots, block tables

// The arrays of one step as Python has them.
struct StepArrays {
  Integers token_ids, positions, kv_index, kv_bounds, sequence_index, logit_rows;
  GroupArrays groups; // of layers
};

// A copy of them that was checked; `step` refers to it.
struct CheckedStep {
  std::vector<int32_t> token_ids, positions, kv_index, kv_bounds, sequence_index, logit_rows;
  std::vector<std::vector<int32_t>> slots, block_tables; // of each group
  std::vector<KVIndex> groups;
  Step step;

  CheckedStep(const Program &program, const StepArrays &arrays) {
    require(program.finished(), "Program: it is not finished");
    for (const Integers *array : {&arrays.token_ids, &arrays.positions, &arrays.kv_index, &arrays.kv_bounds,
                                  &arrays.sequence_index, &arrays.logit_rows})
      require_aligned(*array, "Program", "an array of the step");
    token_ids = copied(arrays.token_ids), positions = copied(arrays.positions);
    kv_index = copied(arrays.kv_index), kv_bounds = copied(arrays.kv_bounds);
    sequence_index = copied(arrays.sequence_index), logit_rows = copied(arrays.logit_rows);
    step = {};
    step.num_tokens = size(arrays.token_ids, 0), step.num_logits = size(arrays.logit_rows, 0);
    step.num_sequences = arrays.groups.empty() ? 0 : size(arrays.groups[0].second, 0);
    step.token_ids = token_ids.data(), step.positions = positions.data(), step.kv_index = kv_index.data();
    step.kv_bounds = kv_bounds.data(), step.sequence_index = sequence_index.data();
    step.logit_rows = logit_rows.data();
    for (const Integers *array : {&arrays.positions, &arrays.kv_index, &arrays.kv_bounds, &arrays.sequence_index})
      require(size(*array, 0) == step.num_tokens, kOneItemEach);
    require(all_below(token_ids, program.limits.token_ids), "Program: a token id is outside the embedding");
    require(all_below(positions, program.limits.positions), "Program: a position is outside a table of positions");
    require(all_below(logit_rows, step.num_tokens), "Program: a logit row is no token of the step");
    const auto &kv_groups = program.limits.kv_groups;
    require(arrays.groups.size() >= kv_groups.size(), "Program: a KV group has no block tables");
    for (std::size_t i = 0; i < kv_groups.size(); ++i)
      add_group(arrays.groups[i].first, arrays.groups[i].second, kv_groups[i]);
    for (std::size_t i = 0; i < groups.size(); ++i)
      groups[i].slots = slots[i].data(), groups[i].block_tables = block_tables[i].data();
    step.groups = groups.data();
  }
  CheckedStep(const CheckedStep &) = delete;
  CheckedStep &operator=(const CheckedStep &) = delete;

private:
  static constexpr const char *kOneItemEach =
      "Program: positions, kv_index, kv_bounds, slots and sequence_index need one item a token";

  static bool all_below(const std::vector<int32_t> &items, int64_t limit) {
    return std::all_of(items.begin(), items.end(), [=](int32_t item) { return item >= 0 && item < limit; });
  }

  void add_group(const Integers &given_slots, const Array<const int32_t, 2> &tables,
                 const Program::KVGroupLimits &limits) {
    require_aligned(given_slots, "Program", "slots");
    require_aligned(tables, "Program", "block_tables");
    require(size(given_slots, 0) == step.num_tokens, kOneItemEach);
    require(size(tables, 0) == step.num_sequences, "Program: KV groups differ in their number of block tables");
    slots.push_back(copied(given_slots));
    block_tables.push_back(copied(tables));
    groups.push_back({nullptr, nullptr, size(tables, 1)});
    require(all_below(slots.back(), limits.blocks * kBlockSize), "Program: a slot is outside the cache");
    check_block_tables({block_tables.back().data(), step.num_sequences, size(tables, 1)},
                       {step.sequence_index, step.kv_index, step.kv_bounds, step.num_tokens}, limits.blocks,
                       limits.window, limits.is_recent);
  }
};

} // namespace kvik
