// What the system is told of pages.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>

namespace kvik {

// Has it begin to read these bytes, where they lie in a mapped file.
inline void ask_for_pages(const uint8_t *bytes, int64_t num_bytes) {
#ifdef MADV_WILLNEED
  static const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<std::uintptr_t>(bytes), first = start / page * page;
  madvise(reinterpret_cast<void *>(first), start - first + static_cast<std::size_t>(num_bytes), MADV_WILLNEED);
#else
  static_cast<void>(bytes), static_cast<void>(num_bytes);
#endif
}

} // namespace kvik
