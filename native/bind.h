// What the bindings share: array types, and the checks that stand between Python and the kernels.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "mapped_table.h"
#include "ops.h"

namespace kvik {

namespace nb = nanobind;
using namespace nb::literals;

template <class T, int dims> using Array = nb::ndarray<T, nb::ndim<dims>, nb::c_contig, nb::device::cpu>;
template <int dims> using Floats = Array<const float, dims>;
template <int dims> using FloatsOut = Array<float, dims>;
using Integers = Array<const int32_t, 1>;

inline void require(bool holds, const char *what) {
  if (!holds) throw nb::value_error(what);
}

// An array of NumPy's may begin at any byte; no kernel may.
inline void require_aligned(const auto &array, const char *op, const char *argument) {
  if (reinterpret_cast<std::uintptr_t>(array.data()) % sizeof(*array.data()) != 0)
    throw nb::value_error((std::string(op) + ": " + argument + " is not aligned to its item size").c_str());
}

// Checked indices are a copy: no op's output and no other thread can change them between the check and their use.
inline std::vector<int32_t> copied(const auto &array) { return {array.data(), array.data() + array.size()}; }

inline int64_t size(const auto &array, std::size_t axis) { return static_cast<int64_t>(array.shape(axis)); }

// A table of rotations, a norm and a projection as Python makes them. What is made from them refers to their arrays and
// must not outlive them.
struct RopeWeights {
  Floats<3> cos_sin; // of each pair of dimensions, by position: (positions, pairs, 2)
  int64_t half;      // as in RopeArgs

  operator RopeArgs() const { return {cos_sin.data(), size(cos_sin, 1), half}; }
};

inline void check_rope(const RopeWeights &rope, int64_t head_dim) {
  require(2 * std::max(size(rope.cos_sin, 1), rope.half) <= head_dim, "rope: the table does not fit head_dim");
}

// What queries are multiplied with, by position.
struct PositionScales {
  Floats<1> factors; // (positions,)
};

struct NormWeights {
  Floats<1> weight;
  std::optional<Floats<1>> bias;
  float eps;
  bool layer;

  operator Norm() const { return {weight.data(), bias ? bias->data() : nullptr, size(weight, 0), eps, layer}; }
};

struct LinearWeights {
  PackedWeight matrix; // shares its data with the one that it was made from
  std::optional<Floats<1>> bias;
  float scale;

  operator Linear() const { return {&matrix, bias ? bias->data() : nullptr, scale}; }
};

// A table and the array that has its bytes.
struct MappedTableWeights {
  MappedTable table;
  Array<const uint8_t, 1> source;
};

Nonlinearity nonlinearity_of(std::string_view name);

inline void check_norm(const NormWeights &norm, int64_t width) {
  require(size(norm.weight, 0) == width, "norm: the weight has another width than x");
}

// A norm of each head, or of all heads of a token at once.
inline void check_head_norm(const NormWeights *norm, int64_t width, int64_t head_dim) {
  require(!norm || size(norm->weight, 0) == width || size(norm->weight, 0) == head_dim,
          "norm_qkv: a norm is as wide as neither a head nor all heads");
}

struct BlockTables {
  const int32_t *blocks; // (num_sequences, width)
  int64_t num_sequences, width;
};
struct TokenPlaces {
  const int32_t *sequence_index, *kv_index, *kv_bounds; // (T,)
  int64_t num_tokens;
};
// Each token's sequence has a table, and the table names a block for each place that the token sees; with `recent`
// those are its own segment and the first block.
void check_block_tables(const BlockTables &tables, const TokenPlaces &tokens, int64_t num_blocks, int64_t window,
                        bool recent);

void bind_program(nb::module_ &m);
void bind_sample(nb::module_ &m);

} // namespace kvik
