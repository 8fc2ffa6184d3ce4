// Ops that work row by row: each with its loop over rows, and how it is appended to a program.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string_view>

#include "bind_ops.h"

namespace kvik {
namespace {

constexpr int64_t kGrain = 8; // rows that are worth another thread's while

void scale_row(float scale, int64_t count, float *row) {
  if (scale != 1)
    for (int64_t k = 0; k < count; ++k) row[k] *= scale;
}

// Whether rows of a table are looked up by position, else by token id; the ids must be those of rows.
bool by_position(Program &program, std::string_view ids, int64_t num_rows) {
  require(!program.finished(), "Program: it is finished");
  const bool of_positions = ids == "positions";
  require(of_positions || ids == "token_ids", "embed: the ids are token_ids or positions");
  int64_t &limit = of_positions ? program.limits.positions : program.limits.token_ids;
  limit = std::min(limit, num_rows);
  return of_positions;
}

// Rows of the weight, by token id or by position, times the scale.
int embed(Program &program, const PackedWeight &table, std::string_view ids, float scale) {
  const bool of_positions = by_position(program, ids, table.rows);
  return append(program, "embed", {}, table.columns, false, [=, &table](const Frame &frame, int out) {
    const int32_t *rows = of_positions ? frame.step.positions : frame.step.token_ids;
    float *to = frame[out];
    for (int64_t i = 0; i < frame.step.num_tokens; ++i, to += table.columns) {
      read_row(table, rows[i], to);
      scale_row(scale, table.columns, to);
    }
  });
}

// The same of a table that lies in a file; its rows are unpacked as they are needed.
int embed_mapped(Program &program, const MappedTableWeights &weights, std::string_view ids, float scale) {
  const MappedTable &table = weights.table;
  const bool of_positions = by_position(program, ids, table.rows());
  return append(program, "embed", {}, table.columns(), false, [=, &table](const Frame &frame, int out) {
    const int32_t *rows = of_positions ? frame.step.positions : frame.step.token_ids;
    float *to = frame[out];
    for (int64_t i = 0; i < frame.step.num_tokens; ++i) table.ask_for(rows[i]);
    const int64_t space_bytes = RowReader::space_bytes(table);
    uint8_t *spaces = frame.workspace().packed.get<uint8_t>(frame.pool().num_threads() * space_bytes);
    frame.pool().for_each(frame.step.num_tokens, [&](int thread, int64_t i) {
      RowReader(table, spaces + thread * space_bytes).read(rows[i], to + i * table.columns());
      scale_row(scale, table.columns(), to + i * table.columns());
    });
  });
}

int norm(Program &program, int x, const NormWeights &weights) {
  const Program::Value in = checked_value(program, x);
  const int64_t width = size(weights.weight, 0);
  require(in.width % width == 0, "norm: the width of x is no multiple of the weight's");
  return append(program, "norm", {x}, in.width, in.of_logits, [=, norm = Norm(weights)](const Frame &frame, int out) {
    const float *from = frame[x];
    float *to = frame[out];
    frame.pool().for_ranges(frame.rows(x) * (in.width / width), kGrain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) kernels->norm(norm, from + i * width, to + i * width);
    });
  });
}

int rope(Program &program, int x, std::string_view positions, const RopeWeights &table, int64_t head_dim) {
  const Program::Value in = checked_value(program, x);
  check_tokens(in, "rope: x must have a row a token");
  check_field(positions, "positions", "rope: it rotates by the batch's positions");
  require(head_dim > 0 && in.width % head_dim == 0, "rope: the width is no multiple of head_dim");
  check_rope(table, head_dim);
  program.limits.positions = std::min(program.limits.positions, size(table.cos_sin, 0));
  return append(program, "rope", {x}, in.width, false, [=, rope = RopeArgs(table)](const Frame &frame, int out) {
    const float *from = frame[x];
    float *to = frame[out];
    frame.pool().for_ranges(frame.step.num_tokens, kGrain, [&](int64_t first, int64_t last) {
      std::copy(from + first * in.width, from + last * in.width, to + first * in.width);
      for (int64_t i = first; i < last; ++i)
        for (int64_t at = 0; at < in.width; at += head_dim)
          kernels->rope(to + i * in.width + at, rope.cos_sin + frame.step.positions[i] * rope.pairs * 2, rope.pairs,
                        rope.half);
    });
  });
}

int scale_by_position(Program &program, int x, std::string_view positions, const PositionScales &scales) {
  const Program::Value in = checked_value(program, x);
  check_tokens(in, "scale_by_position: x must have a row a token");
  check_field(positions, "positions", "scale_by_position: it takes the batch's positions");
  program.limits.positions = std::min(program.limits.positions, size(scales.factors, 0));
  return append(program, "scale_by_position", {x}, in.width, false,
                [=, factors = scales.factors.data()](const Frame &frame, int out) {
                  const float *from = frame[x];
                  float *to = frame[out];
                  frame.pool().for_ranges(frame.step.num_tokens, kGrain, [&](int64_t first, int64_t last) {
                    for (int64_t i = first; i < last; ++i) {
                      const float factor = factors[frame.step.positions[i]];
                      for (int64_t k = i * in.width; k < (i + 1) * in.width; ++k) to[k] = from[k] * factor;
                    }
                  });
                });
}

// Calls function(first item, items) for shares of a value's items: whole rows.
template <class Function> void for_items(const Frame &frame, int value, int64_t width, const Function &function) {
  frame.pool().for_ranges(frame.rows(value), kGrain,
                          [&](int64_t first, int64_t last) { function(first * width, (last - first) * width); });
}

int activate(Program &program, int x, std::string_view name, std::optional<int> up) {
  const Program::Value in = checked_value(program, x);
  std::vector<int> inputs{x};
  if (up) {
    const Program::Value other = checked_value(program, *up);
    require(in.width == other.width && in.of_logits == other.of_logits, "activate: x and up differ in shape");
    inputs.push_back(*up);
  }
  const Nonlinearity activation = nonlinearity_of(name);
  return append(program, "activate", inputs, in.width, in.of_logits, [=](const Frame &frame, int out) {
    const float *from = frame[x], *factors = up ? frame[*up] : nullptr;
    float *to = frame[out];
    for_items(frame, x, in.width, [&](int64_t at, int64_t count) {
      kernels->activate(activation, from + at, factors ? factors + at : nullptr, count, to + at);
    });
  });
}

// x * sigmoid(gates), with as many gates as items, or one for a row.
int gate(Program &program, int x, int gates) {
  const Program::Value in = checked_value(program, x), other = checked_value(program, gates);
  require(in.of_logits == other.of_logits && (other.width == in.width || other.width == 1),
          "gate: gates are one for each item of x, or one for each row");
  return append(program, "gate", {x, gates}, in.width, in.of_logits, [=](const Frame &frame, int out) {
    const float *from = frame[x], *by = frame[gates];
    float *to = frame[out];
    for_items(frame, x, in.width, [&](int64_t at, int64_t count) {
      if (other.width == in.width) return kernels->activate(Nonlinearity::sigmoid, by + at, from + at, count, to + at);
      for (int64_t row = at / in.width; row < (at + count) / in.width; ++row) {
        float factor;
        kernels->activate(Nonlinearity::sigmoid, by + row, nullptr, 1, &factor);
        for (int64_t i = row * in.width; i < (row + 1) * in.width; ++i) to[i] = factor * from[i];
      }
    });
  });
}

int xielu(Program &program, int x, float alpha_p, float alpha_n, float beta, float eps) {
  const Program::Value in = checked_value(program, x);
  const Xielu curve{alpha_p, alpha_n, beta, eps};
  return append(program, "xielu", {x}, in.width, in.of_logits, [=](const Frame &frame, int out) {
    const float *from = frame[x];
    float *to = frame[out];
    for_items(frame, x, in.width, [&](int64_t at, int64_t count) { kernels->xielu(from + at, curve, count, to + at); });
  });
}

int soft_cap(Program &program, int x, float cap) {
  const Program::Value in = checked_value(program, x);
  require(cap > 0, "soft_cap: the cap must be above 0");
  return append(program, "soft_cap", {x}, in.width, in.of_logits, [=](const Frame &frame, int out) {
    const float *from = frame[x];
    float *to = frame[out];
    for_items(frame, x, in.width,
              [&](int64_t at, int64_t count) { kernels->soft_cap(from + at, cap, count, to + at); });
  });
}

int add(Program &program, int x, int y, float scale) {
  const Program::Value in = checked_value(program, x), other = checked_value(program, y);
  require(in.width == other.width && in.of_logits == other.of_logits, "add: x and y differ in shape");
  return append(program, "add", {x, y}, in.width, in.of_logits, [=](const Frame &frame, int out) {
    const float *one = frame[x], *two = frame[y];
    float *to = frame[out];
    for_items(frame, x, in.width, [&](int64_t at, int64_t count) {
      if (scale == 1)
        for (int64_t i = at; i < at + count; ++i) to[i] = one[i] + two[i];
      else
        for (int64_t i = at; i < at + count; ++i) to[i] = (one[i] + two[i]) * scale;
    });
  });
}

int take_columns(Program &program, int x, int64_t start, int64_t count) {
  const Program::Value in = checked_value(program, x);
  require(start >= 0 && count > 0 && start < in.width && count <= in.width - start,
          "take_columns: x has no such columns");
  return append(program, "take_columns", {x}, count, in.of_logits, [=](const Frame &frame, int out) {
    const float *from = frame[x] + start;
    float *to = frame[out];
    for (int64_t i = 0; i < frame.rows(x); ++i) std::copy_n(from + i * in.width, count, to + i * count);
  });
}

int take_rows(Program &program, int x, std::string_view rows) {
  const Program::Value in = checked_value(program, x);
  check_tokens(in, "take_rows: x must have a row a token");
  check_field(rows, "logit_rows", "take_rows: it takes the batch's logit_rows");
  return append(program, "take_rows", {x}, in.width, true, [=](const Frame &frame, int out) {
    const float *from = frame[x];
    float *to = frame[out];
    for (int64_t i = 0; i < frame.step.num_logits; ++i)
      std::copy_n(from + frame.step.logit_rows[i] * in.width, in.width, to + i * in.width);
  });
}

} // namespace

void bind_elementwise(nb::class_<Program> &program) {
  // keep_alive: a program refers to the weights and tables that its ops use.
  program.def("embed", &embed, nb::keep_alive<1, 2>(), "table"_a, "ids"_a, "scale"_a)
      .def("embed", &embed_mapped, nb::keep_alive<1, 2>(), "table"_a, "ids"_a, "scale"_a)
      .def("norm", &norm, nb::keep_alive<1, 3>(), "x"_a, "norm"_a)
      .def("rope", &rope, nb::keep_alive<1, 4>(), "x"_a, "positions"_a, "rope"_a, "head_dim"_a)
      .def("scale_by_position", &scale_by_position, nb::keep_alive<1, 4>(), "x"_a, "positions"_a, "scales"_a)
      .def("activate", &activate, "x"_a, "activation"_a, "up"_a.none())
      .def("gate", &gate, "x"_a, "gates"_a)
      .def("xielu", &xielu, "x"_a, "alpha_p"_a, "alpha_n"_a, "beta"_a, "eps"_a)
      .def("soft_cap", &soft_cap, "x"_a, "cap"_a)
      .def("add", &add, "x"_a, "y"_a, "scale"_a)
      .def("take_columns", &take_columns, "x"_a, "start"_a, "count"_a)
      .def("take_rows", &take_rows, "x"_a, "rows"_a);
}

} // namespace kvik
