#include "amx.h"

#include "amx_tiles.h"

#if KVIK_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <initializer_list>
#endif

namespace kvik {
namespace {

#if KVIK_AMX

// Two blocks of rows, three groups: each register that kernels use.
constexpr int kGroups = 3, kBlocks = 2, kQuads = 8, kSums = kTileRows * kTileRowBytes / 4;
struct Products {
  int32_t sums[kGroups][kBlocks][kSums];
};

template <class Tiles>
void multiply(int tokens, int quads, const int8_t *activations, const uint8_t *weights, Products &out) {
  Tiles tiles(products_config(tokens, quads));
  const TileOperands from = {activations, kGroups * kQuads * 4,    4 * quads,
                             weights,     kBlocks * kTileRowBytes, quads * kBlocks * kTileRowBytes};
  multiply_groups<kBlocks>(tiles, from, kGroups, &out.sums[0][0][0]);
}

bool multiply_as_emulated() {
  int8_t activations[kTileRows * kGroups * kQuads * 4];
  uint8_t weights[kGroups * kQuads * kBlocks * kTileRowBytes];
  uint32_t state = 1;
  const auto next_byte = [&] { return (state = state * 1664525 + 1013904223) >> 24; };
  for (int8_t &byte : activations) byte = static_cast<int8_t>(next_byte());
  for (uint8_t &byte : weights) byte = static_cast<uint8_t>(next_byte());
  for (const int tokens : {kTileRows, 5})
    for (const int quads : {kQuads, kQuads / 2}) {
      Products found{}, wanted{};
      multiply<AmxTiles>(tokens, quads, activations, weights, found);
      multiply<EmulatedTiles>(tokens, quads, activations, weights, wanted);
      if (std::memcmp(&found, &wanted, sizeof found) != 0) return false;
    }
  return true;
}

std::string find_obstacle() {
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25, kSystemSaves = 1u << 27, kTileState = 3u << 17;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 || (d & kInt8) == 0)
    return "the processor does not report AMX-TILE and AMX-INT8";
  if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d) || b != (kNumTiles << 16 | kTileRowBytes) ||
      (c & 0xffff) != kTileRows)
    return "the processor's tiles are not eight of 16 rows of 64 bytes";
  unsigned saved = 0, high = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) && (c & kSystemSaves)) asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if ((saved & kTileState) != kTileState) return "the system does not save the tile registers";
  constexpr long kAskForState = 0x1023, kTileData = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kAskForState, kTileData) != 0)
    return std::string("the system does not let this process use the tile registers: ") + std::strerror(errno);
  if (!multiply_as_emulated()) return "its instructions multiply two small matrices wrongly";
  return "";
}

#else

std::string find_obstacle() { return "this build has no kernels for AMX"; }

#endif

} // namespace

const std::string &amx_obstacle() {
  static const std::string obstacle = find_obstacle();
  return obstacle;
}

} // namespace kvik
