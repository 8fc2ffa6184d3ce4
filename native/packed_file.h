// Packed weights in a file: mapped instead of packed again, and checked before they are used.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "packing.h"
#include "thread_pool.h"

namespace kvik {

// Of the layout of format.h, of the order of types in it, and of how packing.cpp makes it from GGUF's blocks: packed
// weights outlive the process in files, and those of another version are of no use. Raised with every change of a
// packed byte; tests/ops/test_packing.py fails where that was forgotten.
constexpr int kPackedVersion = 1;

constexpr int64_t kRegionBytes = int64_t{256} << 10; // of a matrix, which one checksum covers

// A checksum for each region of so many bytes, by all threads. Against accidents, not against an author: any change of
// one word changes it, others go unnoticed once in 2^64.
std::vector<uint64_t> region_checksums(const uint8_t *data, int64_t num_bytes, ThreadPool &pool);

// A file, mapped read-only; matrices in it keep the mapping alive.
class PackedFile {
public:
  // `on_demand`: memory will not hold all of it. Throws std::bad_alloc.
  PackedFile(int file, int64_t num_bytes, bool on_demand);

  int64_t num_bytes() const { return num_bytes_; }

  // A matrix whose packed bytes begin at `offset`: in the file, and aligned as an arena aligns it.
  PackedWeight weight(const GgufType &type, int64_t rows, int64_t columns, int64_t offset) const;

private:
  int64_t num_bytes_;
  bool on_demand_;
  std::shared_ptr<uint8_t> data_;
};

} // namespace kvik
