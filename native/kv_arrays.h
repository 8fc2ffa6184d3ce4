// The memory of keys and values for all layers: address space now, pages when first written.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#include "kernels.h"

namespace kvik {

// Superblock after superblock, and in each layer after layer: a context that grows fills memory from one end.
class KVArrays {
public:
  // Throws std::bad_alloc where the address space cannot be had.
  KVArrays(int64_t num_layers, int64_t num_blocks, int64_t num_kv_heads, int64_t head_dim, KVType type,
           int64_t kv_group)
      : num_layers_(num_layers), shape_{nullptr, type, num_blocks, num_kv_heads, head_dim, tile_bytes(type, head_dim)} {
    layer_bytes_ = kSuperblock * num_kv_heads * 2 * shape_.tile_bytes;
    shape_.superblock_bytes = num_layers * layer_bytes_;
    shape_.kv_group = kv_group;
    num_bytes_ = num_superblocks() * shape_.superblock_bytes;
    memory_ = mmap(nullptr, static_cast<std::size_t>(num_bytes_), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    // Decode walks all of a long context once a token: large pages save it most of the address translation.
#ifdef MADV_HUGEPAGE
    madvise(memory_, static_cast<std::size_t>(num_bytes_), MADV_HUGEPAGE);
#endif
  }
  ~KVArrays() { munmap(memory_, static_cast<std::size_t>(num_bytes_)); }
  KVArrays(const KVArrays &) = delete;
  KVArrays &operator=(const KVArrays &) = delete;

  int64_t num_layers() const { return num_layers_; }
  int64_t num_blocks() const { return shape_.num_blocks; }
  int64_t num_superblocks() const { return (shape_.num_blocks + kSuperblock - 1) / kSuperblock; }
  int64_t num_bytes() const { return num_bytes_; }
  LayerKV layer(int64_t index) const {
    LayerKV kv = shape_;
    kv.data = static_cast<uint8_t *>(memory_) + index * layer_bytes_;
    return kv;
  }

  // All keys and values of one layer: whole tiles, so no format matters.
  void copy_block(int64_t index, int64_t source, int64_t target) {
    const uint8_t *from = first_tile(index, source);
    uint8_t *to = first_tile(index, target);
    for (int64_t i = 0; i < 2 * shape_.num_kv_heads; ++i, from += tile_stride(), to += tile_stride())
      std::memcpy(to, from, static_cast<std::size_t>(shape_.tile_bytes));
  }

  // Bytes of one block in all layers: layer after layer, in each head after head, its keys before its values.
  int64_t block_bytes() const { return num_layers_ * 2 * shape_.num_kv_heads * shape_.tile_bytes; }
  void read_block(int64_t block, uint8_t *out) const {
    each_tile(block, [&, size = static_cast<std::size_t>(shape_.tile_bytes)](const uint8_t *tile) {
      std::memcpy(out, tile, size);
      out += size;
    });
  }
  void write_block(int64_t block, const uint8_t *in) {
    each_tile(block, [&, size = static_cast<std::size_t>(shape_.tile_bytes)](uint8_t *tile) {
      std::memcpy(tile, in, size);
      in += size;
    });
  }

  // Gives a superblock's memory back to the system. Only whole pages go: what lies beside it keeps its content.
  void discard(int64_t superblock) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t first = (superblock * shape_.superblock_bytes + page - 1) / page * page;
    const int64_t last = (superblock + 1) * shape_.superblock_bytes / page * page;
    if (first < last)
      madvise(static_cast<uint8_t *>(memory_) + first, static_cast<std::size_t>(last - first), MADV_DONTNEED);
  }

private:
  uint8_t *first_tile(int64_t index, int64_t block) const {
    return static_cast<uint8_t *>(layer(index).data) + block / kSuperblock * shape_.superblock_bytes +
           block % kSuperblock * shape_.tile_bytes;
  }
  // From K to V, and from a head's V to the next head's K.
  int64_t tile_stride() const { return kSuperblock * shape_.tile_bytes; }

  template <class Visit> void each_tile(int64_t block, Visit visit) const {
    for (int64_t index = 0; index < num_layers_; ++index) {
      uint8_t *tile = first_tile(index, block);
      for (int64_t i = 0; i < 2 * shape_.num_kv_heads; ++i, tile += tile_stride()) visit(tile);
    }
  }

  static int64_t tile_bytes(KVType type, int64_t head_dim) {
    if (type == KVType::int8) return kBlockSize * (head_dim + static_cast<int64_t>(sizeof(float)));
    return kBlockSize * head_dim * (type == KVType::f16 ? 2 : 4);
  }

  int64_t num_layers_, layer_bytes_ = 0, num_bytes_ = 0;
  LayerKV shape_;
  void *memory_ = nullptr;
};

} // namespace kvik
