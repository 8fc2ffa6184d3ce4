// The ops over plain arrays, each shared out among a pool's threads. Callers have checked every argument.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "thread_pool.h"

namespace kvik {

extern const Kernels *kernels; // chosen at import

// Stores k, v (T, num_kv_heads, head_dim) at slots (T,).
void write_kv(ThreadPool &pool, const LayerKV &kv, const float *k, const float *v, const int32_t *slots,
              int64_t num_tokens);

// Causal attention of each token over its own sequence.
void attend(ThreadPool &pool, const AttendArgs &args);

} // namespace kvik
