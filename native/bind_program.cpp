// Python's side of captured steps: each method checks its arguments, appends one op and names the values it gives.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind_ops.h"
#include "bind_step.h"
#include "float_mode.h"
#include "program.h"

namespace kvik {
namespace {

std::vector<int> capture_project(Program &program, int x, nb::typed<nb::list, LinearWeights> linear_list) {
  const Program::Value in = checked_value(program, x);
  Program::Op op{"project", {x}, {}, {}};
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
      {&matrix}, norm_or_none(norm));
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
      {&gate.matrix}, norm_or_none(norm));
}

// The bounds of a KV group, its blocks among them.
Program::KVGroupLimits &limit_group(Program &program, const KVTiles &kv) {
  const auto kv_group = static_cast<std::size_t>(kv.kv_group);
  if (kv_group >= program.limits.kv_groups.size()) program.limits.kv_groups.resize(kv_group + 1);
  Program::KVGroupLimits &limits = program.limits.kv_groups[kv_group];
  limits.blocks = std::min(limits.blocks, kv.num_blocks);
  return limits;
}

// The same of a layer's groups; gives those of the one that has all tokens.
Program::KVGroupLimits &limit_blocks(Program &program, const LayerKV &kv) {
  require(!kv.has_codes() || kv.recent.data, "LayerKV: codes need what tokens of the same segment read");
  if (kv.recent.data) limit_group(program, kv.recent).is_recent = true;
  return limit_group(program, kv);
}

const int32_t *recent_slots(const Step &step, const LayerKV &kv) {
  return kv.recent.data ? step.groups[kv.recent.kv_group].slots : nullptr;
}

void capture_write_kv(Program &program, const LayerKV &kv, int k, int v, std::string_view slots,
                      std::optional<std::string_view> recent) {
  check_field(slots, "slot_mapping", "write_kv: slots are the batch's slot_mapping");
  if (recent) check_field(*recent, "slot_mapping", "write_kv: slots are the batch's slot_mapping");
  require(recent.has_value() == (kv.recent.data != nullptr),
          "write_kv: recent slots where codes are kept, and only there");
  for (const int id : {k, v}) {
    const Program::Value value = checked_value(program, id);
    require(value.width == kv.num_kv_heads * kv.head_dim, "write_kv: k or v has a wrong shape");
    check_tokens(value, "write_kv: k and v must have a row a token");
  }
  limit_blocks(program, kv);
  program.add_op({"write_kv", {k, v}, {}, [=](const Frame &frame) {
                    write_kv(frame.pool(), kv, frame[k], frame[v], frame.step.groups[kv.kv_group].slots,
                             recent_slots(frame.step, kv), frame.step.num_tokens);
                  }});
}

int capture_norm_qkv(Program &program, int x, const NormWeights *norm, const LinearWeights &query,
                     const LinearWeights &key, const LinearWeights *value, const NormWeights *query_norm,
                     const NormWeights *key_norm, const NormWeights *value_norm, bool norm_after_rope,
                     const RopeWeights *given_rope, const LayerKV &kv) {
  const Program::Value in = checked_value(program, x);
  check_tokens(in, "norm_qkv: x must have a row a token");
  if (norm) check_norm(*norm, in.width);
  const int64_t width = kv.num_kv_heads * kv.head_dim;
  std::vector<const PackedWeight *> weights;
  for (const LinearWeights *linear : {&query, &key, value})
    if (linear) weights.push_back(&linear->matrix);
  for (const PackedWeight *weight : weights)
    require(weight->columns == in.width, "norm_qkv: x has another number of columns than a matrix");
  require(key.matrix.rows == width && (!value || value->matrix.rows == width),
          "norm_qkv: keys or values do not fit the cache");
  require(query.matrix.rows % width == 0, "norm_qkv: query heads must be a multiple of KV heads");
  check_head_norm(query_norm, query.matrix.rows, kv.head_dim);
  check_head_norm(key_norm, width, kv.head_dim);
  check_head_norm(value_norm, width, kv.head_dim);
  RopeArgs rope{};
  if (given_rope) {
    check_rope(*given_rope, kv.head_dim);
    program.limits.positions = std::min(program.limits.positions, size(given_rope->cos_sin, 0));
    rope = *given_rope;
  }
  limit_blocks(program, kv);
  return append(
      program, "norm_qkv", {x}, query.matrix.rows, false,
      [=,
       args = QueryKeyValue{query, key, value ? Linear(*value) : Linear{}, norm_or_none(query_norm),
                            norm_or_none(key_norm), norm_or_none(value_norm), norm_after_rope, rope, kv},
       norm = norm_or_none(norm), int16_activations = program.int16_activations()](const Frame &frame, int out) {
        QueryKeyValue now = args;
        now.positions = frame.step.positions, now.slots = frame.step.groups[args.kv.kv_group].slots;
        now.recent_slots = recent_slots(frame.step, args.kv);
        const RowsIn rows{frame[x], frame.rows(x), in.width, norm};
        project_qkv(frame.pool(), frame.workspace(), rows, now, frame[out], int16_activations);
      },
      weights, norm_or_none(norm));
}

AttendArgs attend_args(const Step &step, const LayerKV &kv, int64_t query_width, int64_t window) {
  AttendArgs args{};
  args.kv = kv;
  args.block_tables = step.groups[kv.kv_group].block_tables;
  args.table_width = step.groups[kv.kv_group].table_width;
  if (kv.recent.data) {
    args.recent_tables = step.groups[kv.recent.kv_group].block_tables;
    args.recent_width = step.groups[kv.recent.kv_group].table_width;
  }
  args.sequence_index = step.sequence_index;
  args.kv_index = step.kv_index;
  args.kv_bounds = step.kv_bounds;
  args.num_tokens = step.num_tokens;
  args.num_heads = query_width / kv.head_dim;
  args.window = window;
  return args;
}

int capture_attend(Program &program, int q, const LayerKV &kv, std::optional<double> given_scale, float soft_cap,
                   std::optional<int64_t> given_window, const std::optional<Floats<1>> &given_sinks) {
  const Program::Value in = checked_value(program, q);
  check_tokens(in, "attend: q must have a row a token");
  require(in.width % (kv.num_kv_heads * kv.head_dim) == 0, "attend: query heads must be a multiple of KV heads");
  require(!given_window || *given_window > 0, "attend: the window must be 1 or more");
  require(!given_window || !kv.has_codes(), "attend: a layer with a window keeps no codes");
  require(soft_cap >= 0, "attend: the soft cap must be 0, for none, or more");
  std::vector<float> sinks;
  if (given_sinks) {
    require_aligned(*given_sinks, "attend", "the array of sinks");
    require(size(*given_sinks, 0) == in.width / kv.head_dim, "attend: a sink for each query head");
    sinks.assign(given_sinks->data(), given_sinks->data() + given_sinks->size());
  }
  const auto scale = static_cast<float>(given_scale.value_or(1.0 / std::sqrt(static_cast<double>(kv.head_dim))));
  const int64_t window = std::min(given_window.value_or(kNoWindow), kNoWindow);
  Program::KVGroupLimits &limits = limit_blocks(program, kv);
  limits.window = std::max(limits.window, window);
  return append(program, "attend", {q}, in.width, false, [=](const Frame &frame, int out) {
    AttendArgs args = attend_args(frame.step, kv, in.width, window);
    args.q = frame[q];
    args.scale = scale;
    args.soft_cap = soft_cap;
    args.sinks = sinks.empty() ? nullptr : sinks.data();
    args.out = frame[out];
    attend(frame.pool(), frame.workspace(), args);
  });
}

void finish(Program &program, std::optional<int> output, const std::vector<int> &kept) {
  require(!program.finished(), "Program: it is finished");
  if (output) checked_value(program, *output);
  for (const int id : kept) checked_value(program, id);
  program.finish(output.value_or(-1), kept);
}

int input(Program &program, int64_t width) {
  require(!program.finished(), "Program: it is finished");
  require(width > 0 && width < int64_t{1} << 31, "Program: an input's width must be in 1 ... 2**31-1");
  require(program.ops().empty(), "Program: inputs come before all ops");
  return program.new_input(width);
}

using InputArrays = std::vector<Floats<2>>;

std::vector<double> run(Program &program, const StepArrays &arrays, std::optional<FloatsOut<2>> out, int first,
                        int last, bool timed, const InputArrays &inputs) {
  const CheckedStep checked(program, arrays);
  const Step &step = checked.step;
  require(out.has_value() == (program.output() >= 0), "Program: an output needs a place, and none has none");
  if (out) {
    const Program::Value &value = program.value(program.output());
    require_aligned(*out, "Program", "out");
    require(size(*out, 0) == (value.of_logits ? step.num_logits : step.num_tokens) && size(*out, 1) == value.width,
            "Program: wrong output shape");
  }
  require(inputs.size() == program.inputs().size(), "Program: another number of inputs");
  std::vector<const float *> rows;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    require_aligned(inputs[i], "Program", "an input");
    require(size(inputs[i], 0) == step.num_tokens && size(inputs[i], 1) == program.value(program.inputs()[i]).width,
            "Program: wrong input shape");
    rows.push_back(inputs[i].data());
  }
  const int count = static_cast<int>(program.ops().size());
  require(0 <= first && first <= last && last <= count, "Program: no such ops");
  std::vector<double> seconds(timed ? static_cast<std::size_t>(last - first) : 0);
  const nb::gil_scoped_release unlocked;
  const FloatMode mode;
  program.run(step, out ? out->data() : nullptr, first, last, rows, timed ? seconds.data() : nullptr);
  return seconds;
}

std::vector<double> run_arrays(Program &program, Integers token_ids, Integers positions, Integers kv_index,
                               Integers kv_bounds, Integers sequence_index, Integers logit_rows,
                               const GroupArrays &groups, std::optional<FloatsOut<2>> out, int first, int last,
                               bool timed, const InputArrays &inputs) {
  return run(program, {token_ids, positions, kv_index, kv_bounds, sequence_index, logit_rows, groups}, out, first, last,
             timed, inputs);
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
  nb::class_<Program> program(m, "Program",
                              "A captured step: ops are appended, each giving the id of its value, then run.");
  bind_elementwise(program);
  bind_experts(m, program);
  program.def(nb::init<ThreadPool &, bool>(), nb::keep_alive<1, 2>(), "pool"_a, "int16_activations"_a)
      .def("project", &capture_project, "x"_a, "linears"_a)
      .def("linear", &capture_linear, Keep(), "x"_a, "linear"_a, "residual"_a.none())
      .def("norm_linear", &capture_norm_linear, Keep(), nb::keep_alive<1, 4>(), "x"_a, "norm"_a.none(), "linear"_a)
      .def("norm_gated", &capture_norm_gated, Keep(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), "x"_a,
           "norm"_a.none(), "gate"_a, "up"_a, "activation"_a)
      .def("norm_qkv", &capture_norm_qkv, Keep(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(),
           nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>(), nb::keep_alive<1, 9>(),
           nb::keep_alive<1, 11>(), nb::keep_alive<1, 12>(), "x"_a, "norm"_a.none(), "query"_a, "key"_a,
           "value"_a.none(), "query_norm"_a.none(), "key_norm"_a.none(), "value_norm"_a.none(), "norm_after_rope"_a,
           "rope"_a.none(), "kv"_a)
      .def("write_kv", &capture_write_kv, nb::keep_alive<1, 2>(), "kv"_a, "k"_a, "v"_a, "slots"_a,
           "recent_slots"_a.none() = nb::none())
      .def("attend", &capture_attend, Keep(), "q"_a, "kv"_a, "scale"_a.none(), "soft_cap"_a, "window"_a.none(),
           "sinks"_a.noconvert().none())
      .def("input", &input, "width"_a, "A value that each run is given, with a row for each token.")
      .def("finish", &finish, "output"_a.none(), "kept"_a = std::vector<int>(),
           "No op can follow; the memory of values that are kept is not reused within a step.")
      .def("run", &run_arrays, "token_ids"_a.noconvert(), "positions"_a.noconvert(), "kv_index"_a.noconvert(),
           "kv_bounds"_a.noconvert(), "sequence_index"_a.noconvert(), "logit_rows"_a.noconvert(),
           "groups"_a.noconvert(), "out"_a.noconvert().none(), "first"_a, "last"_a, "timed"_a,
           "inputs"_a.noconvert() = InputArrays(),
           "Runs ops [first, last) on one step; gives each op's seconds where timed.")
      .def_prop_ro("attend_plans", &attend_plans,
                   "How the last run cut its attention, by shape of layer: units, those that are shared, chunks.")
      .def("copy_value", &copy_value, "value"_a, "out"_a.noconvert(),
           "Copies the first rows of a value of the last run, if it is kept or no later op has reused its memory.");
}

} // namespace kvik
