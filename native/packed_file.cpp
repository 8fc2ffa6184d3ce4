#include "packed_file.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>

namespace kvik {

namespace {

constexpr int kLanes = 8; // that do not wait for each other
constexpr int64_t kLine = kLanes * 8;
constexpr uint64_t kFactor = 0x9e3779b97f4a7c15; // odd: multiplying loses nothing

uint64_t mix(uint64_t sum, uint64_t word) {
  const uint64_t product = (sum ^ word) * kFactor;
  return product << 29 | product >> 35;
}

// One step is one-to-one in the sum and in the word: a single changed word changes its lane, and the lane the result.
uint64_t checksum(const uint8_t *data, int64_t num_bytes) {
  uint64_t lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<uint64_t>(lane);
  const auto take = [&](const uint8_t *line) {
    uint64_t words[kLanes];
    std::memcpy(words, line, kLine);
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = mix(lanes[lane], words[lane]);
  };
  int64_t at = 0;
  for (; at + kLine <= num_bytes; at += kLine) take(data + at);
  if (at < num_bytes) {
    uint8_t rest[kLine] = {};
    std::memcpy(rest, data + at, static_cast<std::size_t>(num_bytes - at));
    take(rest);
  }
  uint64_t sum = static_cast<uint64_t>(num_bytes);
  for (const uint64_t lane : lanes) sum = mix(sum, lane);
  return sum;
}

} // namespace

std::vector<uint64_t> region_checksums(const uint8_t *data, int64_t num_bytes, ThreadPool &pool) {
  std::vector<uint64_t> sums(static_cast<std::size_t>((num_bytes + kRegionBytes - 1) / kRegionBytes));
  pool.for_each(static_cast<int64_t>(sums.size()), [&](int, int64_t region) {
    const int64_t start = region * kRegionBytes;
    sums[static_cast<std::size_t>(region)] = checksum(data + start, std::min(kRegionBytes, num_bytes - start));
  });
  return sums;
}

PackedFile::PackedFile(int file, int64_t num_bytes, bool on_demand) : num_bytes_(num_bytes), on_demand_(on_demand) {
  const auto size = static_cast<std::size_t>(num_bytes);
  void *memory = mmap(nullptr, size, PROT_READ, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  data_ = {static_cast<uint8_t *>(memory), [size](uint8_t *start) { munmap(start, size); }};
}

PackedWeight PackedFile::weight(const GgufType &type, int64_t rows, int64_t columns, int64_t offset) const {
  PackedWeight made = unpacked_weight(type, rows, columns);
  made.data = std::shared_ptr<uint8_t>(data_, data_.get() + offset);
  made.on_demand = on_demand_;
  return made;
}

} // namespace kvik
