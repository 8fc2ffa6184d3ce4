// The ops over plain arrays, each shared out among a pool's threads. Callers have checked every argument.
#pragma once

#include <cstdint>
#include <span>

#include "kernels.h"
#include "packing.h"
#include "thread_pool.h"

namespace kvik {

extern const Kernels *kernels; // chosen at import

struct ProjectionInput {
  const float *x; // (T, columns)
  int64_t num_tokens, columns;
};

// y = x W^T, plus the residual where there is one.
struct Projection {
  const PackedWeight *weight;
  float *y;                        // (T, rows)
  const float *residual = nullptr; // (T, rows); may be y itself
};

// All projections of one x, which is quantised once for them.
void project(ThreadPool &pool, const ProjectionInput &in, std::span<const Projection> projections, bool fine);

// Stores k, v (T, num_kv_heads, head_dim) at slots (T,).
void write_kv(ThreadPool &pool, const LayerKV &kv, const float *k, const float *v, const int32_t *slots,
              int64_t num_tokens);

// Causal attention of each token over its own sequence.
void attend(ThreadPool &pool, const AttendArgs &args);

} // namespace kvik
