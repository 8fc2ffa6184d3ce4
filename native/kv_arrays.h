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
  KVArrays(int64_t num_layers, int64_t num_blocks, int64_t num_kv_heads, int64_t head_dim, KVType key, KVType value,
           int64_t kv_group)
      : num_layers_(num_layers),
        shape_{{nullptr, tiles(key, head_dim), tiles(value, head_dim), num_blocks, 0, kv_group},
               num_kv_heads,
               head_dim,
               {}} {
    layer_bytes_ = num_kv_heads * shape_.head_bytes();
    shape_.superblock_bytes = num_layers * layer_bytes_;
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
    each_tile(index, [&](int64_t offset, int64_t bytes) {
      std::memcpy(tile(index, target, offset, bytes), tile(index, source, offset, bytes),
                  static_cast<std::size_t>(bytes));
    });
  }

  // Bytes of one block in all layers: layer after layer, in each head after head, its keys before its values.
  int64_t block_bytes() const { return num_layers_ * shape_.num_kv_heads * (shape_.key.bytes + shape_.value.bytes); }
  void read_block(int64_t block, uint8_t *out) const {
    for (int64_t index = 0; index < num_layers_; ++index)
      each_tile(index, [&](int64_t offset, int64_t bytes) {
        std::memcpy(out, tile(index, block, offset, bytes), static_cast<std::size_t>(bytes));
        out += bytes;
      });
  }
  void write_block(int64_t block, const uint8_t *in) {
    for (int64_t index = 0; index < num_layers_; ++index)
      each_tile(index, [&](int64_t offset, int64_t bytes) {
        std::memcpy(tile(index, block, offset, bytes), in, static_cast<std::size_t>(bytes));
        in += bytes;
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
  // Where a layer's first tiles of each head lie in a superblock, the keys' and the values', and the bytes of a tile.
  template <class Visit> void each_tile(int64_t index, Visit visit) const {
    const LayerKV kv = layer(index);
    for (int64_t head = 0; head < kv.num_kv_heads; ++head) {
      visit(head * kv.head_bytes(), kv.key.bytes);
      visit(head * kv.head_bytes() + kSuperblock * kv.key.bytes, kv.value.bytes);
    }
  }
  uint8_t *tile(int64_t index, int64_t block, int64_t offset, int64_t bytes) const {
    return static_cast<uint8_t *>(layer(index).data) + block / kSuperblock * shape_.superblock_bytes + offset +
           block % kSuperblock * bytes;
  }

  static TileFormat tiles(KVType type, int64_t head_dim) {
    if (type == KVType::codes) return {type, kBlockSize * (head_dim / 2 + head_dim / kCodeGroup * 2)};
    if (type == KVType::int8) return {type, kBlockSize * (head_dim + static_cast<int64_t>(sizeof(float)))};
    return {type, kBlockSize * head_dim * (type == KVType::f16 ? 2 : 4)};
  }

  int64_t num_layers_, layer_bytes_ = 0, num_bytes_ = 0;
  LayerKV shape_;
  void *memory_ = nullptr;
};

} // namespace kvik
