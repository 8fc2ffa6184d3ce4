// Where packed weights lie.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>

namespace kvik {

// Lays matrices one after the other into large pages: a decode step reads all of them, and with small pages the
// processor spends a tenth of it on looking up addresses. Memory goes back when the last matrix of a chunk does.
class WeightArena {
public:
  static constexpr int64_t kLine = 64;   // that every matrix begins at, wherever it lies
  static constexpr int64_t kPage = 4096; // that matrices begin at which are wanted together

  // Not cleared; `alignment` is kLine or kPage. Throws std::bad_alloc.
  std::shared_ptr<uint8_t> allocate(int64_t num_bytes, int64_t alignment = kLine) {
    const int64_t size = (num_bytes + kLine - 1) / kLine * kLine;
#if defined(__SANITIZE_ADDRESS__) // which sees an access past the end only where each matrix is an allocation of its
                                  // own
    void *data = std::aligned_alloc(static_cast<std::size_t>(alignment),
                                    static_cast<std::size_t>((size + alignment - 1) / alignment * alignment));
    if (!data) throw std::bad_alloc();
    return std::shared_ptr<uint8_t>(static_cast<uint8_t *>(data), std::free);
#else
    const std::lock_guard lock(mutex_);
    used_ = (used_ + alignment - 1) / alignment * alignment;
    if (!chunk_ || used_ + size > chunk_->size) {
      chunk_ = std::make_shared<Chunk>(std::max(size, kChunk));
      used_ = 0;
    }
    uint8_t *data = chunk_->data + used_;
    used_ += size;
    return std::shared_ptr<uint8_t>(chunk_, data);
#endif
  }

private:
  static constexpr int64_t kChunk = int64_t{1} << 30; // of address space; memory comes page by page, when written

  struct Chunk {
    explicit Chunk(int64_t bytes) : size(bytes) {
      void *memory = mmap(nullptr, static_cast<std::size_t>(size), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
      madvise(memory, static_cast<std::size_t>(size), MADV_HUGEPAGE);
#endif
      data = static_cast<uint8_t *>(memory);
    }
    ~Chunk() { munmap(data, static_cast<std::size_t>(size)); }
    Chunk(const Chunk &) = delete;
    Chunk &operator=(const Chunk &) = delete;

    int64_t size;
    uint8_t *data = nullptr;
  };

  std::mutex mutex_;
  std::shared_ptr<Chunk> chunk_;
  int64_t used_ = 0;
};

} // namespace kvik
