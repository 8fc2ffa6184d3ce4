// The ops over plain arrays, each shared out among a pool's threads. Callers have checked every argument.
#pragma once

#include <cstdint>
#include <span>

#include "kernels.h"
#include "packing.h"
#include "thread_pool.h"
#include "workspace.h"

namespace kvik {

extern const Kernels *kernels; // chosen at import

// What projections read: rows, and the norm that comes before where it has a weight.
struct RowsIn {
  const float *x; // (T, columns)
  int64_t num_tokens, columns;
  Norm norm{};
};

struct Linear {
  const PackedWeight *matrix;
  const float *bias; // (rows,), or null
  float scale;

  bool plain() const { return !bias && scale == 1; }
};

// y = (x W^T + bias) * scale, plus the residual where there is one.
struct Projection {
  Linear linear;
  float *y;                        // (T, rows)
  const float *residual = nullptr; // (T, rows); may be y itself where there is neither bias nor scale
};

// Cosine and sine by position: cos_sin (positions, pairs, 2).
struct RopeArgs {
  const float *cos_sin;
  int64_t pairs; // 0: nothing rotates
  int64_t half;  // dimensions (i, i + half) rotate together; 0: (2i, 2i+1)
};

// All projections of the same rows, which are normed and quantised once.
void project(ThreadPool &pool, Workspace &workspace, const RowsIn &in, std::span<const Projection> projections,
             bool int16_activations);

// Where in these weights, whose products are computed together, a thread of the pool begins, and about how much it has
// to read. It may reach past the end of a matrix: what lies there comes next as a rule.
std::span<const uint8_t> first_weights(const ThreadPool &pool, std::span<const PackedWeight *const> weights,
                                       int thread);

// out = activation(gate(x)) * up(x): (T, rows of each matrix).
void project_gated(ThreadPool &pool, Workspace &workspace, const RowsIn &in, const Linear &gate, const Linear &up,
                   Nonlinearity activation, float *out, bool int16_activations);

// How a router's logits choose experts for a row; ops/base.py says what each field means.
enum class ExpertScores : uint8_t { softmax, sigmoid, logits };
struct Routing {
  int64_t num_experts, num_chosen;
  ExpertScores scores;
  bool renormalize;
  float min_sum, scale;
  int64_t num_groups, num_chosen_groups;
  const float *choice_bias, *scales; // (num_experts,), or null
};
constexpr int64_t kMaxExperts = 1024;

struct Expert {
  Linear gate, up, down; // the gate's matrix is null where there is none
};

// All of one shape; `layer` counts those of a program.
struct Mixture {
  Routing routing;
  std::span<const Expert> experts;
  Nonlinearity activation;
  int layer;
};

// out (T, columns): what the experts that logits (T, num_experts) choose make of each row, weighted and added up by
// ascending id.
void run_experts(ThreadPool &pool, Workspace &workspace, const RowsIn &in, const float *logits, const Mixture &mixture,
                 float *out, bool int16_activations);

// Queries (T, heads * head_dim) of the rows, normed and rotated; their keys and values go to their slots.
struct QueryKeyValue {
  Linear query, key, value;              // without a matrix for values, they are the keys before their norm
  Norm query_norm, key_norm, value_norm; // as wide as a head or as a row; no weight: none
  bool norm_after_rope;                  // of queries and keys
  RopeArgs rope;
  LayerKV kv;
  const int32_t *positions = nullptr, *slots = nullptr, *recent_slots = nullptr; // (T,)
};
void project_qkv(ThreadPool &pool, Workspace &workspace, const RowsIn &in, const QueryKeyValue &args, float *q,
                 bool int16_activations);

// Stores k, v (T, num_kv_heads, head_dim) at slots (T,), and where there is `kv.recent` at its slots too, else null.
void write_kv(ThreadPool &pool, const LayerKV &kv, const float *k, const float *v, const int32_t *slots,
              const int32_t *recent_slots, int64_t num_tokens);

// Causal attention of each token over its own sequence.
void attend(ThreadPool &pool, Workspace &workspace, const AttendArgs &args);

} // namespace kvik
