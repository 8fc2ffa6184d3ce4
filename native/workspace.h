// Memory that ops use while they run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace kvik {

// Grows and is never cleared: whoever reads an item has written it in the same op.
class Buffer {
public:
  Buffer() = default;
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;

  template <class T> T *get(int64_t count) {
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + kLine - 1) / kLine * kLine;
    if (bytes > capacity_) {
      std::free(data_);
      capacity_ = 0;
      data_ = std::aligned_alloc(kLine, bytes);
      if (!data_) throw std::bad_alloc();
      capacity_ = bytes;
    }
    return static_cast<T *>(data_);
  }

private:
  static constexpr std::size_t kLine = 64; // no two buffers share a cache line
  void *data_ = nullptr;
  std::size_t capacity_ = 0;
};

// One op at a time; a recorded step keeps one for all of its ops.
struct Workspace {
  Buffer high, low, scale, sums, excess; // quantised activations
  Buffer normed;                         // rows after their norm, for float weights
  Buffer up;                             // the other half of a gated projection
  Buffer keys, values;                   // before they go to their slots
};

} // namespace kvik
