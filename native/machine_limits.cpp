// The loops stand here and not among the kernels, because they must do nothing that a kernel does: only reach a limit.
#include "machine_limits.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <new>
#include <string_view>

#include "amx_tiles.h"
#include "ops.h"

#if KVIK_X86
#include <immintrin.h>
#endif

namespace kvik {
namespace {

constexpr int kPasses = 5;               // of which the fastest counts: others share the machine
constexpr int64_t kReadChunk = 1 << 20;  // bytes
constexpr int64_t kPrefetchAhead = 4096; // bytes
constexpr int64_t kRounds = 1 << 20;     // of a loop over registers
constexpr int kChains = 12;              // independent sums: latency times instructions a cycle

// Each loop gives a sum that the caller keeps, so that it is not optimised away.
struct Loops {
  // With prefetching of its own and with the processor's alone: which is faster depends on the machine.
  uint64_t (*read[2])(const uint8_t *data, int64_t num_bytes); // a multiple of 512 bytes
  uint64_t (*multiply_integers)(int64_t rounds);
  uint64_t (*multiply_floats)(int64_t rounds);
  int64_t integers, floats; // multiply-adds of a round
};

// The compiler must take the value for another one in each round.
#define KVIK_OPAQUE(value, registers) asm volatile("" : "+" registers(value))

template <class Number> uint64_t total(const Number *lanes, int count) {
  Number sum = 0;
  for (int i = 0; i < count; ++i) sum = static_cast<Number>(sum + lanes[i]);
  return static_cast<uint64_t>(sum);
}

uint64_t read_plain(const uint8_t *data, int64_t num_bytes) {
  uint64_t sums[8] = {}, words[8];
  for (int64_t i = 0; i < num_bytes; i += 64) {
    std::memcpy(words, data + i, 64);
    for (int lane = 0; lane < 8; ++lane) sums[lane] += words[lane];
  }
  return total(sums, 8);
}

uint64_t multiply_integers_plain(int64_t rounds) {
  int32_t a = 3, b = 5;
  uint32_t sums[kChains] = {};
  for (auto &sum : sums) KVIK_OPAQUE(sum, "r"); // else equal sums would be one
  for (int64_t i = 0; i < rounds; ++i) {
    KVIK_OPAQUE(a, "r");
    for (int chain = 0; chain < kChains; ++chain) sums[chain] += static_cast<uint32_t>(a * (b + chain));
  }
  return total(sums, kChains);
}

uint64_t multiply_floats_plain(int64_t rounds) {
  float a = 0.5f, b = 0.25f;
  float sums[kChains] = {};
  for (auto &sum : sums) KVIK_OPAQUE(sum, "x"); // else equal sums would be one
  for (int64_t i = 0; i < rounds; ++i)
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = sums[chain] * a + b;
  return total(sums, kChains);
}

constexpr Loops kPlainLoops = {
    {read_plain, read_plain}, multiply_integers_plain, multiply_floats_plain, kChains, kChains};

#if KVIK_X86

template <bool prefetching> __attribute__((target("avx2"))) uint64_t read_avx2(const uint8_t *data, int64_t num_bytes) {
  __m256i sums[4] = {};
  for (int64_t i = 0; i < num_bytes; i += 256) {
    for (int64_t line = 0; prefetching && line < 256; line += 64) // past the end of an array this is harmless
      _mm_prefetch(reinterpret_cast<const char *>(data) + i + kPrefetchAhead + line, _MM_HINT_T0);
    for (int64_t part = 0; part < 8; ++part) {
      const auto *from = reinterpret_cast<const __m256i *>(data + i + 32 * part);
      sums[part % 4] = _mm256_add_epi64(sums[part % 4], _mm256_loadu_si256(from));
    }
  }
  uint64_t lanes[16];
  std::memcpy(lanes, sums, sizeof lanes);
  return total(lanes, 16);
}

// Products of bytes, pairs of them added, and the pairs' sums: as in a product of 4-bit weights.
__attribute__((target("avx2"))) uint64_t multiply_integers_avx2(int64_t rounds) {
  constexpr int kSums = 6; // with as many operands, what the registers hold
  __m256i a = _mm256_set1_epi8(3), b[kSums], sums[kSums] = {};
  for (int i = 0; i < kSums; ++i) b[i] = _mm256_set1_epi8(static_cast<char>(i));
  for (int64_t i = 0; i < rounds; ++i) {
    KVIK_OPAQUE(a, "x");
    for (int chain = 0; chain < kSums; ++chain)
      sums[chain] = _mm256_add_epi16(sums[chain], _mm256_maddubs_epi16(a, b[chain]));
  }
  uint16_t lanes[kSums * 16];
  std::memcpy(lanes, sums, sizeof lanes);
  return total(lanes, kSums * 16);
}

__attribute__((target("avx2,fma"))) uint64_t multiply_floats_avx2(int64_t rounds) {
  const __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
  __m256 sums[kChains] = {};
  for (auto &sum : sums) KVIK_OPAQUE(sum, "x"); // else equal sums would be one
  for (int64_t i = 0; i < rounds; ++i)
    for (__m256 &sum : sums) sum = _mm256_fmadd_ps(sum, a, b);
  float lanes[kChains * 8];
  std::memcpy(lanes, sums, sizeof lanes);
  return total(lanes, kChains * 8);
}

constexpr Loops kAvx2Loops = {
    {read_avx2<true>, read_avx2<false>}, multiply_integers_avx2, multiply_floats_avx2, 6 * 32, kChains * 8};

template <bool prefetching>
__attribute__((target("avx512f"))) uint64_t read_avx512(const uint8_t *data, int64_t num_bytes) {
  __m512i sums[4] = {};
  for (int64_t i = 0; i < num_bytes; i += 256) {
    for (int64_t part = 0; part < 4; ++part) {
      if (prefetching) _mm_prefetch(reinterpret_cast<const char *>(data) + i + kPrefetchAhead + 64 * part, _MM_HINT_T0);
      sums[part] = _mm512_add_epi64(sums[part], _mm512_loadu_si512(data + i + 64 * part));
    }
  }
  uint64_t lanes[32];
  std::memcpy(lanes, sums, sizeof lanes);
  return total(lanes, 32);
}

__attribute__((target("avx512f,avx512vnni"))) uint64_t multiply_integers_avx512(int64_t rounds) {
  __m512i a = _mm512_set1_epi8(3), sums[kChains] = {};
  for (auto &sum : sums) KVIK_OPAQUE(sum, "v");
  const __m512i b = _mm512_set1_epi8(5);
  for (int64_t i = 0; i < rounds; ++i) {
    KVIK_OPAQUE(a, "v");
    for (__m512i &sum : sums) sum = _mm512_dpbusd_epi32(sum, a, b);
  }
  uint32_t lanes[kChains * 16];
  std::memcpy(lanes, sums, sizeof lanes);
  return total(lanes, kChains * 16);
}

__attribute__((target("avx512f"))) uint64_t multiply_floats_avx512(int64_t rounds) {
  const __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
  __m512 sums[kChains] = {};
  for (auto &sum : sums) KVIK_OPAQUE(sum, "v"); // else equal sums would be one
  for (int64_t i = 0; i < rounds; ++i)
    for (__m512 &sum : sums) sum = _mm512_fmadd_ps(sum, a, b);
  float lanes[kChains * 16];
  std::memcpy(lanes, sums, sizeof lanes);
  return total(lanes, kChains * 16);
}

constexpr Loops kAvx512Loops = {{read_avx512<true>, read_avx512<false>},
                                multiply_integers_avx512,
                                multiply_floats_avx512,
                                kChains * 64,
                                kChains * 16};

#if KVIK_AMX
// One product of tiles a round, four sums in turns: of 32 columns, as many as share a scale at most.
uint64_t multiply_integers_amx(int64_t rounds) {
  AmxTiles tiles(products_config(kTileRows, kQuadsOfPart));
  alignas(64) int8_t bytes[kTileRows * kTileRowBytes];
  std::memset(bytes, 3, sizeof bytes);
  tiles.load<0>(bytes, kTileRowBytes);
  tiles.load<2>(bytes, kTileRowBytes);
  tiles.zero<4>(), tiles.zero<5>(), tiles.zero<6>(), tiles.zero<7>();
  for (int64_t i = 0; i < rounds; i += 4)
    tiles.multiply<4, 0, 2>(), tiles.multiply<5, 0, 2>(), tiles.multiply<6, 0, 2>(), tiles.multiply<7, 0, 2>();
  uint32_t lanes[4][kTileRows * kTileRowBytes / 4];
  tiles.store<4>(lanes[0], kTileRowBytes), tiles.store<5>(lanes[1], kTileRowBytes);
  tiles.store<6>(lanes[2], kTileRowBytes), tiles.store<7>(lanes[3], kTileRowBytes);
  return total(lanes[0], 4 * kTileRows * kTileRowBytes / 4);
}

constexpr Loops kAmxLoops = {{read_avx512<true>, read_avx512<false>},
                             multiply_integers_amx,
                             multiply_floats_avx512,
                             kTileRows * kRowBlock * kGroup,
                             kChains * 16};
#endif

#endif

// The loops of the instruction set that the kernels use.
const Loops &loops() {
#if KVIK_X86
#if KVIK_AMX
  if (std::string_view(kernels->isa) == "amx") return kAmxLoops;
#endif
  const std::string_view vectors = kernels->vectors;
  if (vectors == "avx512") return kAvx512Loops;
  if (vectors == "avx2") return kAvx2Loops;
#endif
  return kPlainLoops;
}

// Seconds of the fastest pass.
template <class Pass> double fastest(const Pass &pass) {
  double best = 1e30;
  for (int i = 0; i < kPasses; ++i) {
    const auto started = std::chrono::steady_clock::now();
    pass();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - started;
    best = std::min(best, took.count());
  }
  return best;
}

// Takes a sum that nobody needs.
void keep(uint64_t sum) { KVIK_OPAQUE(sum, "r"); }

class Pages {
public:
  explicit Pages(int64_t num_bytes) : num_bytes_(static_cast<std::size_t>(num_bytes)) {
    void *memory = mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<uint8_t *>(memory);
#ifdef MADV_HUGEPAGE
    madvise(memory, num_bytes_, MADV_HUGEPAGE);
#endif
  }
  ~Pages() { munmap(data_, num_bytes_); }
  Pages(const Pages &) = delete;
  Pages &operator=(const Pages &) = delete;
  uint8_t *data() const { return data_; }

private:
  std::size_t num_bytes_;
  uint8_t *data_ = nullptr;
};

double multiply_adds_a_second(ThreadPool &pool, uint64_t (*loop)(int64_t), int64_t in_a_round) {
  // Short chunks, many of them: a thread that starts late costs little.
  constexpr int64_t kChunks = 32;
  const int64_t chunks = kChunks * pool.num_threads();
  const double seconds = fastest([&] { pool.for_each(chunks, [&](int, int64_t) { keep(loop(kRounds / kChunks)); }); });
  return static_cast<double>(chunks * (kRounds / kChunks) * in_a_round) / seconds;
}

} // namespace

double read_bandwidth(ThreadPool &pool, int64_t num_bytes) {
  const int64_t chunks = std::max<int64_t>(1, num_bytes / kReadChunk);
  const Pages pages(chunks * kReadChunk);
  // Written by the threads that will read, since an untouched page is no memory.
  pool.for_each(chunks, [&](int, int64_t chunk) { std::memset(pages.data() + chunk * kReadChunk, 1, kReadChunk); });
  double seconds = 1e30;
  for (const auto read : loops().read)
    seconds = std::min(
        seconds, fastest([&] {
          pool.for_each(chunks, [&](int, int64_t chunk) { keep(read(pages.data() + chunk * kReadChunk, kReadChunk)); });
        }));
  return static_cast<double>(chunks * kReadChunk) / seconds;
}

double integer_throughput(ThreadPool &pool) {
  return multiply_adds_a_second(pool, loops().multiply_integers, loops().integers);
}

double float_throughput(ThreadPool &pool) {
  return multiply_adds_a_second(pool, loops().multiply_floats, loops().floats);
}

} // namespace kvik
