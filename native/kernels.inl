// All kernels, compiled once by each isa_*.cpp, which sets KVIK_KERNELS (the table's name) and KVIK_ISA_NAME. Where it
// sets KVIK_EMULATED_TILES, the name of a second table, matrix products by emulated tiles are there too.
#include <math.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "simd.h"
#include "simd_dots.h"
#include "simd_doubles.h"
#include "simd_math.h"
#include "simd_quads.h"

// clang-format off: each builds on those before it.
#include "kv_codes.inl"
#include "kv_tiles.inl"
#include "attention_work.inl"
#include "attention_floats.inl"
#include "attention_bytes.inl"
#include "attention_codes.inl"
#include "attention.inl"
// clang-format on
#include "elementwise.inl"
// clang-format off: each builds on those before it.
#include "quantized_rows.inl"
#include "packed_weights.inl"
#include "linear.inl"
#ifdef KVIK_EMULATED_TILES
#include "amx_tiles.h"
#include "amx_linear.inl"
#endif
// clang-format on
#include "sample.inl"

namespace {

template <std::size_t... format> constexpr kvik::Kernels all_kernels(std::index_sequence<format...>) {
  return {
      .isa = KVIK_ISA_NAME,
      .vectors = KVIK_ISA_NAME,
      .quantized_linear = {{quantized_linear<format, false>, quantized_linear<format, true>}...},
      .float_linear = {float_linear<Half>, float_linear<BFloat16>, float_linear<float>},
      .quantize = quantize_row,
      .norm = norm,
      .activate = activate,
      .xielu = xielu,
      .soft_cap = soft_cap,
      .exponentials = exponentials,
      .rope = rope,
      .write_kv = write_kv,
      .hadamard = hadamard,
      .attend_segment = attend_segment,
      .merge_segments = merge_segments,
      .highest = highest,
      .weight_sums = weight_sums,
      .weights = weights,
      .find_between = find_between,
      .fold_maxima = fold_maxima,
      .keep_allowed = keep_allowed,
  };
}

#ifdef KVIK_EMULATED_TILES
// The same but for quantised weights and several tokens.
template <class Tiles, std::size_t... format>
constexpr kvik::Kernels tiled_kernels(const char *isa, std::index_sequence<format...> formats) {
  kvik::Kernels kernels = all_kernels(formats);
  kernels.isa = isa;
  ((kernels.quantized_linear[format][0] = tiled_linear<Tiles, format, false>,
    kernels.quantized_linear[format][1] = tiled_linear<Tiles, format, true>),
   ...);
  return kernels;
}
#endif

using Formats = std::make_index_sequence<kvik::kNumBlockFormats>;

} // namespace

namespace kvik {
const Kernels KVIK_KERNELS = all_kernels(Formats{});
#ifdef KVIK_EMULATED_TILES
const Kernels KVIK_EMULATED_TILES = tiled_kernels<EmulatedTiles>("amx-emulated", Formats{});
#endif
#if KVIK_AMX && KVIK_SIMD_AVX512
const Kernels kAmxKernels = tiled_kernels<AmxTiles>("amx", Formats{});
#endif
} // namespace kvik
