// The arrays of one step as they come from Python, copied and checked before any op looks at them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "bind.h"
#include "program.h"

namespace kvik {

using PlacesArrays = std::vector<std::pair<Integers, Array<const int32_t, 2>>>; // slots, block tables

// The arrays of one step as Python has them.
struct StepArrays {
  Integers token_ids, positions, slots, sequence_index;
  Array<const int32_t, 2> block_tables;
  Integers logit_rows;
  PlacesArrays windows; // of the KV groups behind the first
};

// A copy of them that was checked; `step` refers to it.
struct CheckedStep {
  std::vector<int32_t> token_ids, positions, sequence_index, logit_rows;
  std::vector<std::vector<int32_t>> slots, block_tables; // of each KV group
  std::vector<KVIndex> places;
  Step step;

  CheckedStep(const Program &program, const StepArrays &arrays) {
    require(program.finished(), "Program: it is not finished");
    for (const Integers *array : {&arrays.token_ids, &arrays.positions, &arrays.sequence_index, &arrays.logit_rows})
      require_aligned(*array, "Program", "an array of the step");
    token_ids = copied(arrays.token_ids), positions = copied(arrays.positions);
    sequence_index = copied(arrays.sequence_index), logit_rows = copied(arrays.logit_rows);
    step = {size(arrays.token_ids, 0), size(arrays.block_tables, 0), size(arrays.logit_rows, 0), token_ids.data(),
            positions.data(),          sequence_index.data(),        logit_rows.data(),          nullptr};
    for (const Integers *array : {&arrays.positions, &arrays.sequence_index})
      require(size(*array, 0) == step.num_tokens, "Program: positions, slots and sequence_index need one item a token");
    require(all_below(token_ids, program.limits.token_ids), "Program: a token id is outside the embedding");
    require(all_below(positions, program.limits.positions), "Program: a position is outside a table of positions");
    require(all_below(logit_rows, step.num_tokens), "Program: a logit row is no token of the step");
    const auto &kv_groups = program.limits.kv_groups;
    require(arrays.windows.size() + 1 >= kv_groups.size(), "Program: a KV group has no block tables");
    add_places(arrays.slots, arrays.block_tables, kv_groups[0]);
    for (std::size_t i = 1; i < kv_groups.size(); ++i)
      add_places(arrays.windows[i - 1].first, arrays.windows[i - 1].second, kv_groups[i]);
    for (std::size_t i = 0; i < places.size(); ++i)
      places[i].slots = slots[i].data(), places[i].block_tables = block_tables[i].data();
    step.places = places.data();
  }
  CheckedStep(const CheckedStep &) = delete;
  CheckedStep &operator=(const CheckedStep &) = delete;

private:
  static bool all_below(const std::vector<int32_t> &items, int64_t limit) {
    return std::all_of(items.begin(), items.end(), [=](int32_t item) { return item >= 0 && item < limit; });
  }

  void add_places(const Integers &given_slots, const Array<const int32_t, 2> &tables,
                  const Program::KVGroupLimits &limits) {
    require_aligned(given_slots, "Program", "slots");
    require_aligned(tables, "Program", "block_tables");
    require(size(given_slots, 0) == step.num_tokens,
            "Program: positions, slots and sequence_index need one item a token");
    require(size(tables, 0) == step.num_sequences, "Program: KV groups differ in their number of block tables");
    slots.push_back(copied(given_slots));
    block_tables.push_back(copied(tables));
    places.push_back({nullptr, nullptr, size(tables, 1)});
    require(all_below(slots.back(), limits.blocks * kBlockSize), "Program: a slot is outside the cache");
    check_block_tables(block_tables.back().data(), step.num_sequences, size(tables, 1), step.sequence_index,
                       step.positions, step.num_tokens, limits.blocks, limits.window);
  }
};

} // namespace kvik
