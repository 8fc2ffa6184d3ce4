// What the machine can do with a pool's threads: the yardsticks that kernels are measured by.
#pragma once

#include <cstdint>

#include "thread_pool.h"

namespace kvik {

// Bytes a second that the threads read together from one array of `num_bytes`, the best of several passes; far larger
// than the caches, that is the memory's. Throws std::bad_alloc.
double read_bandwidth(ThreadPool &pool, int64_t num_bytes);

// Multiply-adds of 8-bit integers a second, of operands in registers: the limit of quantised matrix products.
double integer_throughput(ThreadPool &pool);

// Fused multiply-adds of float32 a second, of operands in registers.
double float_throughput(ThreadPool &pool);

} // namespace kvik
