// Python's side of experts: what they are made of is checked once, when they are put together.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <vector>

#include "bind_ops.h"

namespace kvik {
namespace {

ExpertScores scores_of(std::string_view name) {
  if (name == "softmax") return ExpertScores::softmax;
  if (name == "sigmoid") return ExpertScores::sigmoid;
  require(name == "logits", "Experts: scores are softmax, sigmoid or logits");
  return ExpertScores::logits;
}

using LinearList = nb::typed<nb::list, LinearWeights>;

// The experts of a layer; shares the data of the projections that it was made from.
struct ExpertsWeights {
  std::vector<LinearWeights> gates, ups, downs;
  std::optional<Floats<1>> choice_bias, scales;
  Routing routing;

  int64_t columns() const { return ups[0].matrix.columns; }

  std::vector<Expert> experts() const {
    std::vector<Expert> found;
    for (std::size_t id = 0; id < ups.size(); ++id)
      found.push_back({gates.empty() ? Linear{nullptr, nullptr, 1} : Linear(gates[id]), ups[id], downs[id]});
    return found;
  }
};

std::vector<LinearWeights> linears_of(const LinearList &list) {
  std::vector<LinearWeights> found;
  for (const nb::handle item : list) {
    const LinearWeights *linear = nullptr;
    require(nb::try_cast(item, linear) && linear, "Experts: a projection is not a Linear");
    found.push_back(*linear);
  }
  return found;
}

void check_shapes(const std::vector<LinearWeights> &linears, int64_t rows, int64_t columns) {
  for (const LinearWeights &linear : linears)
    require(linear.matrix.rows == rows && linear.matrix.columns == columns, "Experts: projections differ in shape");
}

void make(ExpertsWeights *made, const LinearList &gates, const LinearList &ups, const LinearList &downs,
          int64_t num_chosen, std::string_view scores, bool renormalize, float min_sum, float scale, int64_t num_groups,
          int64_t num_chosen_groups, std::optional<Floats<1>> choice_bias, std::optional<Floats<1>> scales) {
  ExpertsWeights weights{linears_of(gates), linears_of(ups), linears_of(downs), choice_bias, scales, {}};
  const auto count = static_cast<int64_t>(weights.ups.size());
  require(count > 0 && count <= kMaxExperts, "Experts: there must be 1 ... 1024 experts");
  require(weights.downs.size() == weights.ups.size(), "Experts: each needs one projection up and one down");
  require(weights.gates.empty() || weights.gates.size() == weights.ups.size(), "Experts: all have a gate, or none");
  const PackedWeight &first = weights.ups[0].matrix;
  check_shapes(weights.ups, first.rows, first.columns);
  check_shapes(weights.gates, first.rows, first.columns);
  check_shapes(weights.downs, first.columns, first.rows);
  require(num_chosen > 0 && num_chosen <= count, "Experts: no more can be chosen than there are");
  require(num_groups > 0 && count % num_groups == 0 && (num_groups == 1 || count / num_groups > 1),
          "Experts: groups must be equal, and of 2 or more");
  require(num_chosen_groups > 0 && num_chosen_groups <= num_groups &&
              num_chosen <= count / num_groups * num_chosen_groups,
          "Experts: too few groups are chosen");
  for (const auto &vector : {weights.choice_bias, weights.scales}) {
    if (!vector) continue;
    require_aligned(*vector, "Experts", "a vector");
    require(size(*vector, 0) == count, "Experts: a vector needs one item an expert");
  }
  weights.routing = {count,
                     num_chosen,
                     scores_of(scores),
                     renormalize,
                     min_sum,
                     scale,
                     num_groups,
                     num_chosen_groups,
                     choice_bias ? choice_bias->data() : nullptr,
                     scales ? scales->data() : nullptr};
  new (made) ExpertsWeights(std::move(weights));
}

int capture_experts(Program &program, int x, int logits, const ExpertsWeights &weights,
                    std::string_view activation_name) {
  const Program::Value in = checked_value(program, x), of_router = checked_value(program, logits);
  require(in.width == weights.columns(), "experts: x has another number of columns than the matrices");
  require(of_router.width == weights.routing.num_experts && of_router.of_logits == in.of_logits,
          "experts: the logits have another shape than a row of x has experts");
  const Mixture mixture{weights.routing, {}, nonlinearity_of(activation_name), program.num_mixtures++};
  return append(
      program, "experts", {x, logits}, in.width, in.of_logits,
      [=, experts = weights.experts(), int16_activations = program.int16_activations()](const Frame &frame, int out) {
        Mixture now = mixture;
        now.experts = experts;
        run_experts(frame.pool(), frame.workspace(), {frame[x], frame.rows(x), in.width}, frame[logits], now,
                    frame[out], int16_activations);
      });
}

} // namespace

void bind_experts(nb::module_ &m, nb::class_<Program> &program) {
  nb::class_<ExpertsWeights>(m, "Experts", "The experts of a layer, by their ids, and how a row chooses some.")
      .def("__init__", &make, "gates"_a, "ups"_a, "downs"_a, "num_chosen"_a, "scores"_a, "renormalize"_a, "min_sum"_a,
           "scale"_a, "num_groups"_a, "num_chosen_groups"_a, "choice_bias"_a.noconvert().none(),
           "scales"_a.noconvert().none());
  // keep_alive: a program refers to the experts.
  program.def("experts", &capture_experts, nb::keep_alive<1, 4>(), "x"_a, "logits"_a, "experts"_a, "activation"_a);
}

} // namespace kvik
