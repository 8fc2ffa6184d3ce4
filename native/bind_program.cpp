// Python's side of captured steps: each method checks its arguments, appends one op and names the values it gives.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind.h"
#include "bind_step.h"
#include "float_mode.h"
#include "program.h"

namespace kvik {
namespace {

const Program::Value &checked_value(const Program &program, int id) {
  require(id >= 0 && id < program.num_values(), "Program: no such value");
  require(!program.finished(), "Program: it is finished");
  return program.value(id);
}

// `run` is called with a frame and the id of the op's output. What it refers to should lie in few places: between two
// runs of an op the cache holds nothing of them.
template <class Run> int append(Program &program, std::string name, std::vector<int> inputs, int64_t width,
                                bool of_logits, Run run, std::function<Cost(const Step &)> cost,
                                std::vector<const PackedWeight *> weights = {}, const Norm &norm = {}) {
  require(!program.finished(), "Program: it is finished");
  const int out = program.new_value(width, of_logits);
  program.add_op({std::move(name),
                  std::move(inputs),
                  {out},
                  [run = std::move(run), out](const Frame &frame) { run(frame, out); },
                  std::move(cost),
                  std::move(weights),
                  norm});
  return out;
}

double bytes_of_floats(const Step &step, int64_t width) { return 4.0 * static_cast<double>(step.num_tokens * width); }

Cost elementwise(const Step &step, int64_t width, double arrays, double operations) {
  return {arrays * bytes_of_floats(step, width), operations * static_cast<double>(step.num_tokens * width)};
}

// Each weight is read once, whatever the number of rows.
Cost product_cost(int64_t num_rows, const std::vector<const PackedWeight *> &weights) {
  Cost cost{0, 0};
  if (num_rows == 0) return cost;
  for (const PackedWeight *weight : weights) {
    cost.bytes += static_cast<double>(weight->num_bytes);
    cost.operations += 2.0 * static_cast<double>(weight->rows) * static_cast<double>(weight->columns);
  }
  cost.operations *= static_cast<double>(num_rows);
  return cost;
}

int64_t rows_of(const Step &step, bool of_logits) { return of_logits ? step.num_logits : step.num_tokens; }

int capture_embed(Program &program, const PackedWeight &table, bool of_positions, float scale) {
  require(!program.finished(), "Program: it is finished");
  int64_t &limit = of_positions ? program.limits.positions : program.limits.token_ids;
  limit = std::min(limit, table.rows);
  return append(
      program, "embed", {}, table.columns, false,
      [=, &table](const Frame &frame, int out) {
        const int32_t *ids = of_positions ? frame.step.positions : frame.step.token_ids;
        embed_rows(table, ids, frame.step.num_tokens, scale, frame[out]);
      },
      [&table](const Step &step) {
        return Cost{static_cast<double>(step.num_tokens * table.num_bytes / table.rows), 0};
      });
}

int capture_norm(Program &program, int x, const NormWeights &norm) {
  const Program::Value in = checked_value(program, x);
  const int64_t width = size(norm.weight, 0);
  require(in.width % width == 0, "norm: the width of x is no multiple of the weight's");
  return append(
      program, "norm", {x}, in.width, in.of_logits,
      [=, norm = Norm(norm)](const Frame &frame, int out) {
        norm_rows(frame.pool(), norm, frame[x], frame.rows(x) * (in.width / width), frame[out]);
      },
      [=](const Step &step) { return elementwise(step, in.width, 2, 4); });
}

std::vector<int> capture_project(Program &program, int x, nb::typed<nb::list, LinearWeights> linear_list) {
  const Program::Value in = checked_value(program, x);
  Program::Op op{"project", {x}, {}, {}, {}};
  std::vector<const LinearWeights *> linears;
  std::vector<const PackedWeight *> weights;
  for (const nb::handle item : linear_list) {
    const LinearWeights *linear = nullptr;
    require(nb::try_cast(item, linear) && linear, "project: a projection is not a Linear");
    require(linear->matrix.columns == in.width, "project: x has another number of columns than the matrix");
    linears.push_back(linear);
    weights.push_back(&linear->matrix);
  }
  const nb::tuple alive(linear_list); // the list itself may change
  for (const PackedWeight *weight : weights) op.outputs.push_back(program.new_value(weight->rows, in.of_logits));
  const std::vector<int> outputs = op.outputs;
  op.run = [=, int16_activations = program.int16_activations()](const Frame &frame) {
    (void)alive;
    std::vector<Projection> projections;
    for (std::size_t i = 0; i < linears.size(); ++i) projections.push_back({*linears[i], frame[outputs[i]]});
    project(frame.pool(), frame.workspace(), {frame[x], frame.rows(x), in.width}, projections, int16_activations);
  };
  op.cost = [=](const Step &step) { return product_cost(rows_of(step, in.of_logits), weights); };
  program.add_op(std::move(op));
  return outputs;
}

Norm norm_or_none(const NormWeights *norm) { return norm ? Norm(*norm) : Norm{}; }

// With a norm before and a residual behind, or without.
int capture_product(Program &program, const char *name, int x, const LinearWeights &linear, const NormWeights *norm,
                    std::optional<int> residual) {
  const Program::Value in = checked_value(program, x);
  const PackedWeight &matrix = linear.matrix;
  require(matrix.columns == in.width, "linear: x has another number of columns than the matrix");
  if (norm) check_norm(*norm, in.width);
  std::vector<int> inputs{x};
  if (residual) {
    const Program::Value other = checked_value(program, *residual);
    require(other.width == matrix.rows && other.of_logits == in.of_logits, "linear: the residual has another shape");
    inputs.push_back(*residual);
  }
  return append(
      program, name, inputs, matrix.rows, in.of_logits,
      [=, linear = Linear(linear), norm = norm_or_none(norm),
       int16_activations = program.int16_activations()](const Frame &frame, int out) {
        const Projection projection{linear, frame[out], residual ? frame[*residual] : nullptr};
        const RowsIn rows{frame[x], frame.rows(x), in.width, norm};
        project(frame.pool(), frame.workspace(), rows, {&projection, 1}, int16_activations);
      },
      [=, &matrix](const Step &step) { return product_cost(rows_of(step, in.of_logits), {&matrix}); }, {&matrix},
      norm_or_none(norm));
}

int capture_linear(Program &program, int x, const LinearWeights &linear, std::optional<int> residual) {
  return capture_product(program, "linear", x, linear, nullptr, residual);
}

int capture_norm_linear(Program &program, int x, const NormWeights *norm, const LinearWeights &linear) {
  return capture_product(program, "norm_linear", x, linear, norm, std::nullopt);
}

int capture_norm_gated(Program &program, int x, const NormWeights *norm, const LinearWeights &gate,
                       const LinearWeights &up, std::string_view activation_name) {
  const Program::Value in = checked_value(program, x);
  if (norm) check_norm(*norm, in.width);
  require(gate.matrix.columns == in.width && up.matrix.columns == in.width,
          "norm_gated: x has another number of columns");
  require(gate.matrix.rows == up.matrix.rows, "norm_gated: gate and up differ in shape");
  const Nonlinearity activation = nonlinearity_of(activation_name);
  return append(
      program, "norm_gated", {x}, gate.matrix.rows, in.of_logits,
      [=, gate = Linear(gate), up = Linear(up), norm = norm_or_none(norm),
       int16_activations = program.int16_activations()](const Frame &frame, int out) {
        const RowsIn rows{frame[x], frame.rows(x), in.width, norm};
        project_gated(frame.pool(), frame.workspace(), rows, gate, up, activation, frame[out], int16_activations);
      },
      [=, &gate, &up](const Step &step) {
        return product_cost(rows_of(step, in.of_logits), {&gate.matrix, &up.matrix});
      },
      {&gate.matrix}, norm_or_none(norm));
}

void check_tokens(const Program::Value &value, const char *what) { require(!value.of_logits, what); }

int capture_rope(Program &program, int x, Floats<3> table, bool adjacent_pairs, int64_t head_dim) {
  const Program::Value in = checked_value(program, x);
  check_tokens(in, "rope: x must have a row a token");
  require(head_dim > 0 && in.width % head_dim == 0, "rope: the width is no multiple of head_dim");
  check_rope(table, head_dim);
  program.limits.positions = std::min(program.limits.positions, size(table, 0));
  return append(
      program, "rope", {x}, in.width, false,
      [=](const Frame &frame, int out) {
        std::copy_n(frame[x], frame.step.num_tokens * in.width, frame[out]);
        rope(frame.pool(), frame[out], frame.step.positions, frame.step.num_tokens, in.width / head_dim, head_dim,
             {table.data(), size(table, 1), adjacent_pairs});
      },
      [=](const Step &step) { return elementwise(step, in.width, 2, 3); });
}

// The bounds of the layer's KV group, its blocks among them.
Program::KVGroupLimits &limit_blocks(Program &program, const LayerKV &kv) {
  const auto kv_group = static_cast<std::size_t>(kv.kv_group);
  if (kv_group >= program.limits.kv_groups.size()) program.limits.kv_groups.resize(kv_group + 1);
  Program::KVGroupLimits &limits = program.limits.kv_groups[kv_group];
  limits.blocks = std::min(limits.blocks, kv.num_blocks);
  return limits;
}

void capture_write_kv(Program &program, const LayerKV &kv, int k, int v) {
  for (const int id : {k, v}) {
    const Program::Value value = checked_value(program, id);
    require(value.width == kv.num_kv_heads * kv.head_dim, "write_kv: k or v has a wrong shape");
    check_tokens(value, "write_kv: k and v must have a row a token");
  }
  limit_blocks(program, kv);
  program.add_op({"write_kv",
                  {k, v},
                  {},
                  [=](const Frame &frame) {
                    write_kv(frame.pool(), kv, frame[k], frame[v], frame.step.places[kv.kv_group].slots,
                             frame.step.num_tokens);
                  },
                  [=](const Step &step) { return elementwise(step, kv.num_kv_heads * kv.head_dim, 4, 0); }});
}

int capture_norm_qkv(Program &program, int x, const NormWeights *norm, const LinearWeights &query,
                     const LinearWeights &key, const LinearWeights &value, const NormWeights *query_norm,
                     const NormWeights *key_norm, std::optional<Floats<3>> table, bool adjacent_pairs,
                     const LayerKV &kv) {
  const Program::Value in = checked_value(program, x);
  check_tokens(in, "norm_qkv: x must have a row a token");
  if (norm) check_norm(*norm, in.width);
  const int64_t width = kv.num_kv_heads * kv.head_dim;
  for (const LinearWeights *linear : {&query, &key, &value})
    require(linear->matrix.columns == in.width, "norm_qkv: x has another number of columns than a matrix");
  require(key.matrix.rows == width && value.matrix.rows == width, "norm_qkv: keys or values do not fit the cache");
  require(query.matrix.rows % width == 0, "norm_qkv: query heads must be a multiple of KV heads");
  check_head_norm(query_norm, query.matrix.rows, kv.head_dim);
  check_head_norm(key_norm, width, kv.head_dim);
  RopeArgs rope{};
  if (table) {
    check_rope(*table, kv.head_dim);
    program.limits.positions = std::min(program.limits.positions, size(*table, 0));
    rope = {table->data(), size(*table, 1), adjacent_pairs};
  }
  limit_blocks(program, kv);
  const std::vector<const PackedWeight *> weights{&query.matrix, &key.matrix, &value.matrix};
  return append(
      program, "norm_qkv", {x}, query.matrix.rows, false,
      [=, args = QueryKeyValue{query, key, value, norm_or_none(query_norm), norm_or_none(key_norm), rope, kv},
       norm = norm_or_none(norm), int16_activations = program.int16_activations()](const Frame &frame, int out) {
        (void)table; // what rope refers to
        QueryKeyValue now = args;
        now.positions = frame.step.positions, now.slots = frame.step.places[args.kv.kv_group].slots;
        const RowsIn rows{frame[x], frame.rows(x), in.width, norm};
        project_qkv(frame.pool(), frame.workspace(), rows, now, frame[out], int16_activations);
      },
      [=](const Step &step) { return product_cost(step.num_tokens, weights); }, weights, norm_or_none(norm));
}

AttendArgs attend_args(const Step &step, const LayerKV &kv, int64_t query_width, int64_t window) {
  AttendArgs args{};
  args.kv = kv;
  args.block_tables = step.places[kv.kv_group].block_tables;
  args.table_width = step.places[kv.kv_group].table_width;
  args.sequence_index = step.sequence_index;
  args.positions = step.positions;
  args.num_tokens = step.num_tokens;
  args.num_heads = query_width / kv.head_dim;
  args.window = window;
  return args;
}

// Keys and values are read once for neighbouring tokens: all of one sequence's, and what several sequences share.
Cost attend_cost(const Step &step, const LayerKV &kv, int64_t query_width, int64_t window) {
  const AttendArgs args = attend_args(step, kv, query_width, window);
  double keys = 0, read = 0;
  for (int64_t i = 0; i < step.num_tokens; ++i) {
    const int64_t seen = std::min<int64_t>(window, step.positions[i] + 1);
    const bool goes_on =
        i > 0 && step.sequence_index[i] == step.sequence_index[i - 1] && step.positions[i] == step.positions[i - 1] + 1;
    keys += static_cast<double>(seen);
    if (goes_on) {
      read += 1;
      continue;
    }
    read += static_cast<double>(seen);
    for (int64_t segment = 0; i > 0 && segment <= step.positions[i] / kSegment; ++segment)
      if (shares_segment(args, i - 1, i, segment)) read -= kSegment;
  }
  return {read * static_cast<double>(kv.token_bytes()), 4 * keys * static_cast<double>(query_width)};
}

int capture_attend(Program &program, int q, const LayerKV &kv, float scale, float soft_cap,
                   std::optional<int64_t> given_window) {
  const Program::Value in = checked_value(program, q);
  check_tokens(in, "attend: q must have a row a token");
  require(in.width % (kv.num_kv_heads * kv.head_dim) == 0, "attend: query heads must be a multiple of KV heads");
  require(!given_window || *given_window > 0, "attend: the window must be 1 or more");
  require(soft_cap >= 0, "attend: the soft cap must be 0, for none, or more");
  const int64_t window = std::min(given_window.value_or(kNoWindow), kNoWindow);
  Program::KVGroupLimits &limits = limit_blocks(program, kv);
  limits.window = std::max(limits.window, window);
  return append(
      program, "attend", {q}, in.width, false,
      [=](const Frame &frame, int out) {
        AttendArgs args = attend_args(frame.step, kv, in.width, window);
        args.q = frame[q];
        args.scale = scale;
        args.soft_cap = soft_cap;
        args.out = frame[out];
        attend(frame.pool(), frame.workspace(), args);
      },
      [=](const Step &step) { return attend_cost(step, kv, in.width, window); });
}

int capture_activate(Program &program, int x, std::string_view name, std::optional<int> up) {
  const Program::Value in = checked_value(program, x);
  std::vector<int> inputs{x};
  if (up) {
    const Program::Value other = checked_value(program, *up);
    require(in.width == other.width && in.of_logits == other.of_logits, "activate: x and up differ in shape");
    inputs.push_back(*up);
  }
  const Nonlinearity activation = nonlinearity_of(name);
  return append(
      program, "activate", inputs, in.width, in.of_logits,
      [=](const Frame &frame, int out) {
        activate(frame.pool(), activation, frame[x], up ? frame[*up] : nullptr, frame.rows(x), in.width, frame[out]);
      },
      [=](const Step &step) { return elementwise(step, in.width, up ? 3 : 2, 20); });
}

int capture_soft_cap(Program &program, int x, float cap) {
  const Program::Value in = checked_value(program, x);
  require(cap > 0, "soft_cap: the cap must be above 0");
  return append(
      program, "soft_cap", {x}, in.width, in.of_logits,
      [=](const Frame &frame, int out) { soft_cap(frame.pool(), frame[x], cap, frame.rows(x), in.width, frame[out]); },
      [=](const Step &step) {
        const double items = static_cast<double>(rows_of(step, in.of_logits) * in.width);
        return Cost{8.0 * items, 20.0 * items};
      });
}

int capture_add(Program &program, int x, int y) {
  const Program::Value in = checked_value(program, x), other = checked_value(program, y);
  require(in.width == other.width && in.of_logits == other.of_logits, "add: x and y differ in shape");
  return append(
      program, "add", {x, y}, in.width, in.of_logits,
      [=](const Frame &frame, int out) { add(frame.pool(), frame[x], frame[y], frame.rows(x), in.width, frame[out]); },
      [=](const Step &step) { return elementwise(step, in.width, 3, 1); });
}

int capture_take_rows(Program &program, int x) {
  const Program::Value in = checked_value(program, x);
  check_tokens(in, "take_rows: x must have a row a token");
  return append(
      program, "take_rows", {x}, in.width, true,
      [=](const Frame &frame, int out) {
        take_rows(frame[x], frame.step.logit_rows, frame.step.num_logits, in.width, frame[out]);
      },
      [=](const Step &step) { return Cost{8.0 * static_cast<double>(step.num_logits * in.width), 0}; });
}

void finish(Program &program, int output, const std::vector<int> &kept) {
  const Program::Value out = checked_value(program, output);
  require(out.of_logits, "Program: the output must have a row for each logit row");
  for (const int id : kept) checked_value(program, id);
  program.finish(output, kept);
}

std::vector<double> run(Program &program, const StepArrays &arrays, FloatsOut<2> out, int first, int last, bool timed) {
  const CheckedStep checked(program, arrays);
  const Step &step = checked.step;
  require_aligned(out, "Program", "out");
  require(size(out, 0) == step.num_logits && size(out, 1) == program.value(program.output()).width,
          "Program: wrong output shape");
  const int count = static_cast<int>(program.ops().size());
  require(0 <= first && first <= last && last <= count, "Program: no such ops");
  std::vector<double> seconds(timed ? static_cast<std::size_t>(last - first) : 0);
  const nb::gil_scoped_release unlocked;
  const FloatMode mode;
  program.run(step, out.data(), first, last, timed ? seconds.data() : nullptr);
  return seconds;
}

std::vector<double> run_arrays(Program &program, Integers token_ids, Integers positions, Integers slots,
                               Integers sequence_index, Array<const int32_t, 2> block_tables, Integers logit_rows,
                               const PlacesArrays &windows, FloatsOut<2> out, int first, int last, bool timed) {
  return run(program, {token_ids, positions, slots, sequence_index, block_tables, logit_rows, windows}, out, first,
             last, timed);
}

// (name, bytes, operations) of each op in such a step.
std::vector<std::tuple<std::string, double, double>> costs(const Program &program, Integers token_ids,
                                                           Integers positions, Integers slots, Integers sequence_index,
                                                           Array<const int32_t, 2> block_tables, Integers logit_rows,
                                                           const PlacesArrays &windows) {
  const CheckedStep checked(program, {token_ids, positions, slots, sequence_index, block_tables, logit_rows, windows});
  const Step &step = checked.step;
  std::vector<std::tuple<std::string, double, double>> rows;
  for (const Program::Op &op : program.ops()) {
    const Cost cost = op.cost(step);
    rows.emplace_back(op.name, cost.bytes, cost.operations);
  }
  return rows;
}

// (units, those that several runs share, chunks) of each plan that the last run made.
std::vector<std::tuple<int64_t, int64_t, int64_t>> attend_plans(Program &program) {
  const nb::gil_scoped_release unlocked; // another thread may be in the middle of a step
  std::vector<std::tuple<int64_t, int64_t, int64_t>> rows;
  program.visit_attention([&rows](const AttentionSpace &space) {
    for (std::size_t i = 0; i < space.num_plans; ++i)
      rows.emplace_back(space.plans[i].units.size(), space.plans[i].num_shared_units, space.plans[i].chunk_ends.size());
  });
  return rows;
}

bool is_of_logits(const Program &program, int id) {
  require(id >= 0 && id < program.num_values(), "Program: no such value");
  return program.value(id).of_logits;
}

void copy_value(Program &program, int id, FloatsOut<2> out) {
  require(id >= 0 && id < program.num_values() && program.finished(), "Program: no such value");
  require_aligned(out, "Program", "out");
  require(id != program.output(), "Program: the output is where the run has put it");
  require(size(out, 1) == program.value(id).width, "Program: wrong output shape");
  const int64_t rows = size(out, 0);
  float *to = out.data();
  bool had_rows = false;
  {
    const nb::gil_scoped_release unlocked; // another thread may be in the middle of a step
    had_rows = program.copy_value(id, rows, to);
  }
  require(had_rows, "Program: the last run had fewer rows");
}

} // namespace

void bind_program(nb::module_ &m) {
  // keep_alive: a program refers to the weights and arrays that its ops use.
  using Keep = nb::keep_alive<1, 3>;
  nb::class_<Program>(m, "Program", "A captured step: ops are appended, each giving the id of its value, then run.")
      .def(nb::init<ThreadPool &, bool>(), nb::keep_alive<1, 2>(), "pool"_a, "int16_activations"_a)
      .def("embed", &capture_embed, nb::keep_alive<1, 2>(), "table"_a, "of_positions"_a, "scale"_a)
      .def("norm", &capture_norm, Keep(), "x"_a, "norm"_a)
      .def("project", &capture_project, "x"_a, "linears"_a)
      .def("linear", &capture_linear, Keep(), "x"_a, "linear"_a, "residual"_a.none())
      .def("norm_linear", &capture_norm_linear, Keep(), nb::keep_alive<1, 4>(), "x"_a, "norm"_a.none(), "linear"_a)
      .def("norm_gated", &capture_norm_gated, Keep(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), "x"_a,
           "norm"_a.none(), "gate"_a, "up"_a, "activation"_a)
      .def("norm_qkv", &capture_norm_qkv, Keep(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(),
           nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>(), nb::keep_alive<1, 11>(), "x"_a,
           "norm"_a.none(), "query"_a, "key"_a, "value"_a, "query_norm"_a.none(), "key_norm"_a.none(),
           "table"_a.noconvert().none(), "adjacent_pairs"_a, "kv"_a)
      .def("rope", &capture_rope, "x"_a, "table"_a.noconvert(), "adjacent_pairs"_a, "head_dim"_a)
      .def("write_kv", &capture_write_kv, nb::keep_alive<1, 2>(), "kv"_a, "k"_a, "v"_a)
      .def("attend", &capture_attend, Keep(), "q"_a, "kv"_a, "scale"_a, "soft_cap"_a, "window"_a.none())
      .def("activate", &capture_activate, "x"_a, "activation"_a, "up"_a.none())
      .def("soft_cap", &capture_soft_cap, "x"_a, "cap"_a)
      .def("add", &capture_add, "x"_a, "y"_a)
      .def("take_rows", &capture_take_rows, "x"_a)
      .def("finish", &finish, "output"_a, "kept"_a = std::vector<int>(),
           "No op can follow; the memory of values that are kept is not reused within a step.")
      .def("run", &run_arrays, "token_ids"_a.noconvert(), "positions"_a.noconvert(), "slots"_a.noconvert(),
           "sequence_index"_a.noconvert(), "block_tables"_a.noconvert(), "logit_rows"_a.noconvert(),
           "windows"_a.noconvert(), "out"_a.noconvert(), "first"_a, "last"_a, "timed"_a,
           "Runs ops [first, last) on one step; gives each op's seconds where timed.")
      .def("costs", &costs, "token_ids"_a.noconvert(), "positions"_a.noconvert(), "slots"_a.noconvert(),
           "sequence_index"_a.noconvert(), "block_tables"_a.noconvert(), "logit_rows"_a.noconvert(),
           "windows"_a.noconvert(), "Name, bytes and operations of each op in such a step.")
      .def_prop_ro("attend_plans", &attend_plans,
                   "How the last run cut its attention, by shape of layer: units, those that are shared, chunks.")
      .def("is_of_logits", &is_of_logits, "value"_a, "Whether a value has a row for each logit row, not each token.")
      .def("copy_value", &copy_value, "value"_a, "out"_a.noconvert(),
           "Copies the first rows of a value of the last run, if it is kept or no later op has reused its memory.");
}

} // namespace kvik
