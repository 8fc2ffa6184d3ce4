// What the files that define ops share: how one is appended to a program, and how its arguments are checked.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bind.h"
#include "program.h"

namespace kvik {

inline const Program::Value &checked_value(const Program &program, int id) {
  require(id >= 0 && id < program.num_values(), "Program: no such value");
  require(!program.finished(), "Program: it is finished");
  return program.value(id);
}

inline void check_tokens(const Program::Value &value, const char *what) { require(!value.of_logits, what); }

// An op reads the array of the batch that is its own.
inline void check_field(std::string_view name, std::string_view wanted, const char *what) {
  require(name == wanted, what);
}

// `run` is called with a frame and the id of the op's output. What it refers to should lie in few places: between two
// runs of an op the cache holds nothing of them.
template <class Run> int append(Program &program, std::string name, std::vector<int> inputs, int64_t width,
                                bool of_logits, Run run, std::vector<const PackedWeight *> weights = {},
                                const Norm &norm = {}) {
  require(!program.finished(), "Program: it is finished");
  const int out = program.new_value(width, of_logits);
  program.add_op({std::move(name),
                  std::move(inputs),
                  {out},
                  [run = std::move(run), out](const Frame &frame) { run(frame, out); },
                  std::move(weights),
                  norm});
  return out;
}

// The ops that work row by row.
void bind_elementwise(nb::class_<Program> &program);
// Mixtures of experts.
void bind_experts(nb::module_ &m, nb::class_<Program> &program);

} // namespace kvik
