// Tiles of bytes and the sums of their products: AMX's instructions, and an emulation of those for any processor.
//
// There are eight tile registers of up to 16 rows of 64 bytes; a configuration says how many rows and bytes of a row
// each has. `multiply` adds to tile `sums`, in 32 bits, the products of row m of tile `a` and column n of tile `b`; a
// row of `b` holds four bytes of each column, as a quad of packed weights does. The emulation follows the operation
// sections of Intel's manual (volume 2), and stops the program where the processor would raise an exception.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kNumTiles = 8, kTileRows = 16, kTileRowBytes = 64;

// The 64 bytes that ldtilecfg reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {}; // palette 1 has eight tiles
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

class EmulatedTiles {
public:
  explicit EmulatedTiles(const TileConfig &config) : config_(config) {
    must(config.palette == 1 && config.start_row == 0);
    for (const uint8_t byte : config.reserved) must(byte == 0);
    for (int tile = 0; tile < 16; ++tile) {
      must(config.rows[tile] <= kTileRows && config.row_bytes[tile] <= kTileRowBytes);
      must((config.rows[tile] == 0) == (config.row_bytes[tile] == 0));
      must(tile < kNumTiles || config.rows[tile] == 0);
    }
  }

  template <int tile> void zero() {
    must(rows(tile) > 0);
    std::memset(tiles_[tile], 0, sizeof tiles_[tile]);
  }

  template <int tile> void load(const void *from, int64_t stride) {
    zero<tile>(); // what lies beyond the configured rows and bytes
    for (int row = 0; row < rows(tile); ++row)
      std::memcpy(tiles_[tile][row], static_cast<const uint8_t *>(from) + row * stride, row_size(tile));
  }

  template <int tile> void store(void *to, int64_t stride) const {
    must(rows(tile) > 0);
    for (int row = 0; row < rows(tile); ++row)
      std::memcpy(static_cast<uint8_t *>(to) + row * stride, tiles_[tile][row], row_size(tile));
  }

  // tdpbssd: signed by signed bytes.
  template <int sums, int a, int b> void multiply() {
    static_assert(sums != a && sums != b && a != b);
    must(rows(sums) > 0 && rows(a) > 0 && rows(b) > 0);
    must(bytes(sums) == 4 * quads(sums) && bytes(a) == 4 * quads(a) && bytes(b) == 4 * quads(b));
    must(quads(sums) == quads(b) && quads(a) == rows(b) && rows(sums) == rows(a));
    for (int m = 0; m < rows(sums); ++m) {
      int32_t row[kTileRowBytes / 4] = {};
      std::memcpy(row, tiles_[sums][m], row_size(sums));
      for (int k = 0; k < quads(a); ++k)
        for (int n = 0; n < quads(b); ++n) row[n] = add(row[n], tiles_[a][m] + 4 * k, tiles_[b][k] + 4 * n);
      std::memcpy(tiles_[sums][m], row, row_size(sums));
    }
  }

private:
  static void must(bool condition) {
    if (!condition) __builtin_trap();
  }
  // The sum of four products and `sum`, modulo 2**32.
  static int32_t add(int32_t sum, const uint8_t *a, const uint8_t *b) {
    uint32_t total = static_cast<uint32_t>(sum);
    for (int i = 0; i < 4; ++i) total += static_cast<uint32_t>(static_cast<int8_t>(a[i]) * static_cast<int8_t>(b[i]));
    return static_cast<int32_t>(total);
  }
  int rows(int tile) const { return config_.rows[tile]; }
  int bytes(int tile) const { return config_.row_bytes[tile]; }
  std::size_t row_size(int tile) const { return config_.row_bytes[tile]; }
  int quads(int tile) const { return bytes(tile) / 4; }

  TileConfig config_;
  alignas(64) uint8_t tiles_[kNumTiles][kTileRows][kTileRowBytes] = {};
};

#if KVIK_AMX

// While one lives, the thread's tile registers are configured; then they are given back, which spares the system to
// save them at each switch of threads. Assembly in place of gcc's intrinsics: those of gcc 12 do not say that ldtilecfg
// reads 64 bytes and that a load reads memory, so that stores before them vanish.
class AmxTiles {
public:
  explicit AmxTiles(const TileConfig &config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
  ~AmxTiles() { asm volatile("tilerelease" : : : "memory"); }
  AmxTiles(const AmxTiles &) = delete;
  AmxTiles &operator=(const AmxTiles &) = delete;

  template <int tile> void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(tile)); }
  template <int tile> void load(const void *from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
  }
  template <int tile> void store(void *to, int64_t stride) const {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
  }
  template <int sums, int a, int b> void multiply() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
  }
};

#endif

// Where the operands of some scale groups lie. Rows of activations are tokens, rows of weights are quads of 16 rows of
// the matrix, and one block of 16 follows the other.
struct TileOperands {
  const int8_t *activations;
  int64_t activation_stride, activations_of_group; // bytes
  const uint8_t *weights;
  int64_t weight_stride, weights_of_group;
};

// For products of `tokens` tokens by groups of `quads` quads. Neighbouring groups take turns in the registers, so that
// one's sums are stored while the next are added: activations 0 and 1, weights of two blocks 2 and 3, sums 4 to 7.
inline TileConfig products_config(int tokens, int quads) {
  TileConfig config;
  for (int tile = 0; tile < kNumTiles; ++tile) {
    const bool weights = tile == 2 || tile == 3;
    config.rows[tile] = static_cast<uint8_t>(weights ? quads : tokens);
    config.row_bytes[tile] = static_cast<uint16_t>(tile < 2 ? 4 * quads : kTileRowBytes);
  }
  return config;
}

// products[group][block][token][row], room for 16 tokens each.
template <int blocks, class Tiles>
[[gnu::noinline]] void multiply_groups(Tiles &tiles, TileOperands from, int groups, int32_t *products) {
  const auto multiply_one = [&]<int turn>() {
    tiles.template load<turn>(from.activations, from.activation_stride);
    const auto multiply_block = [&]<int block>() {
      constexpr int kSums = 4 + 2 * turn + block;
      tiles.template zero<kSums>();
      tiles.template load<2 + block>(from.weights + block * kTileRowBytes, from.weight_stride);
      tiles.template multiply<kSums, turn, 2 + block>();
      tiles.template store<kSums>(products, kTileRowBytes);
      products += kTileRows * kTileRowBytes / 4;
    };
    multiply_block.template operator()<0>();
    if constexpr (blocks == 2) multiply_block.template operator()<1>();
    from.activations += from.activations_of_group;
    from.weights += from.weights_of_group;
  };
  for (int group = 0; group < groups; ++group) {
    multiply_one.template operator()<0>();
    if (++group < groups) multiply_one.template operator()<1>();
  }
}

} // namespace
