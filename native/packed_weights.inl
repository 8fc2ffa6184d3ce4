// Packed weights on their way into registers: the quants of a quad, the scales of a group, panels of both.

namespace {

using kvik::BlockFormat;
using kvik::Codes;
using kvik::kGroup;
using kvik::kParts;
using kvik::kQuadsOfPart;
using kvik::kRowBlock;
using kvik::Scales;

constexpr int kWidesOfBlock = kRowBlock / kWideLanes; // wide vectors of outputs in a row block: 1 or 2
constexpr int kWideBytes = 4 * kWideLanes;

// body(Count<0>), body(Count<1>) ... with indices that are constants.
template <int count, int first = 0, class Body> [[gnu::always_inline]] inline void unrolled(const Body &body) {
  if constexpr (first < count) {
    body(Count<first>{});
    unrolled<count, first + 1>(body);
  }
}
#define KVIK_INLINE __attribute__((always_inline)) // of a lambda

// What a weight may be at most, as products see it: chooses the instructions that take it.
constexpr int largest_weight(const BlockFormat &format) {
  if (format.low_bits == 8 || format.codes == Codes::iq4) return 255;
  const int bits = format.codes == Codes::mxfp4 ? 5 : format.low_bits + format.high_bits;
  return bits <= 4 ? 15 : 63;
}

// The values of 4-bit codes as products see them.
struct CodeTable {
  alignas(16) int8_t values[16];
};
constexpr CodeTable code_table(const BlockFormat &format) {
  const bool iq4 = format.codes == Codes::iq4;
  CodeTable table{};
  for (int i = 0; i < 16; ++i) {
    const int value = iq4 ? kvik::kIq4Values[i] : kvik::kMxfp4Values[i];
    table.values[i] = static_cast<int8_t>(iq4 && !kUnsignedBytes ? value : value + format.zero);
  }
  return table;
}
template <BlockFormat format> inline constexpr CodeTable kCodeTable = code_table(format);

// A quad's quants, unsigned or, above 127, as Dot takes them. `block` points to its first row's bytes.
template <BlockFormat format, int part, int quad> inline WideBytes quants(const uint8_t *block) {
  constexpr kvik::PlacedQuad low = placed(format, format.low_bits, part, quad);
  WideBytes w = bit_field<low.field * format.low_bits % 8, format.low_bits, 0>(
      wide_load_bytes(block + 4 * kRowBlock * low.vector));
  if constexpr (format.high_bits > 0) {
    constexpr kvik::PlacedQuad high = placed(format, format.high_bits, part, quad);
    w = w | bit_field<high.field * format.high_bits, format.high_bits, format.low_bits>(
                wide_load_bytes(block + format.low_bytes() + 4 * kRowBlock * high.vector));
  }
  if constexpr (format.codes != Codes::integers) w = look_up(kCodeTable<format>.values, w);
#if KVIK_SIMD_AVX512
  if constexpr (format.low_bits == 8) w = flip_high_bits(w);
#endif
  return w;
}

// The scales of one wide vector of rows of a packed block, in which scale group i is one of columns / scale_group.
template <BlockFormat format> struct BlockScales {
  Wide scale, minimum; // of 256 columns where groups multiply them; or of the only group
  const uint8_t *bytes;

  explicit BlockScales(const uint8_t *block, int wide) {
    const uint8_t *scales = block + format.quant_bytes();
    constexpr int kHalves = 2 * kRowBlock;
    if constexpr (format.scales == Scales::exponents) {
      const Wide exponent = to_float(wide_load_as_ints(scales + wide * kWideLanes) - wide_broadcast_int(128));
      scale = power_of_two(max(exponent, wide_broadcast(-127.0f))); // which is zero: what is subnormal counts as that
      return;
    }
    scale = wide_load(reinterpret_cast<const Half *>(scales) + wide * kWideLanes);
    if constexpr (format.minimum)
      minimum = wide_load(reinterpret_cast<const Half *>(scales + kHalves) + wide * kWideLanes);
    bytes = scales + kHalves * (format.minimum ? 2 : 1) + wide * kWideLanes;
  }

  Wide group_scale(int i) const {
    if constexpr (format.scales == Scales::bytes) return scale * to_float(wide_load_as_ints(bytes + kRowBlock * i));
    if constexpr (format.scales == Scales::signed_bytes)
      return scale * to_float(wide_load_as_ints(reinterpret_cast<const int8_t *>(bytes) + kRowBlock * i));
    if constexpr (format.scales == Scales::nibbles)
      return scale * to_float(bit_field(wide_load_as_ints(bytes + kRowBlock * i), 0, 4));
    if constexpr (format.scales == Scales::six_bits) {
      const WideInt low = bit_field(wide_load_as_ints(bytes + kRowBlock * (i % 8)), i / 8 * 4, 4);
      const WideInt high = bit_field(wide_load_as_ints(bytes + kRowBlock * (8 + i % 4)), i / 4 * 2, 2);
      return scale * to_float(low + scale_int(high, 16) - wide_broadcast_int(32));
    }
    return scale;
  }

  Wide group_minimum(int i) const {
    if constexpr (format.scales == Scales::halves) return minimum;
    const int at = format.scales == Scales::bytes ? kParts + i : i;
    WideInt factor = wide_load_as_ints(bytes + kRowBlock * at);
    if constexpr (format.scales == Scales::nibbles) factor = bit_field(factor, 4, 4);
    return (wide_broadcast(0.0f) - minimum) * to_float(factor);
  }
};

// Up to 256 columns of some neighbouring rows, unpacked once for all tokens that are multiplied with them.
template <int wides> struct Panel {
  alignas(64) uint8_t quants[kParts][kQuadsOfPart][wides][kWideBytes];
  float scales[2 * kParts][wides][kWideLanes], minima[2 * kParts][wides][kWideLanes]; // of scale groups
};

template <int wides> using Unpack = void (*)(const uint8_t *first_block, const uint8_t *later_block,
                                             int64_t row_block_bytes, int parts, Panel<wides> &panel);

// Fills `parts` parts from packed blocks that follow each other; the next row block's are row_block_bytes behind. A
// later panel, of which the first block is given, is fetched into the L2 cache meanwhile.
template <BlockFormat format, int wides> void unpack(const uint8_t *first_block, const uint8_t *later_block,
                                                     int64_t row_block_bytes, int parts, Panel<wides> &panel) {
  constexpr int64_t kAhead = kParts / format.parts() * format.block_bytes(); // the next panel
  for (int start = 0; start < parts;
       start += format.parts(), first_block += format.block_bytes(), later_block += format.block_bytes()) {
    for (int w = 0; w < wides; ++w) {
      const uint8_t *block = first_block + w / kWidesOfBlock * row_block_bytes;
      const uint8_t *later = later_block + w / kWidesOfBlock * row_block_bytes;
      const int half = w % kWidesOfBlock;
      for (int64_t line = half * 64; line < format.block_bytes(); line += kWidesOfBlock * 64) {
        prefetch(block + kAhead + line);
        prefetch_to_l2(later + line);
      }
      unrolled<format.parts()>([&](auto part) KVIK_INLINE {
        unrolled<kQuadsOfPart>([&](auto quad) KVIK_INLINE {
          store_bytes(panel.quants[start + part.value][quad.value][w],
                      quants<format, part.value, quad.value>(block + half * kWideBytes));
        });
      });
      const BlockScales<format> scales(block, half);
      constexpr int kGroups = format.columns / format.scale_group;
      for (int i = 0; i < kGroups; ++i) {
        const int at = start * format.scale_groups() + i;
        store(panel.scales[at][w], scales.group_scale(i));
        if constexpr (format.minimum) store(panel.minima[at][w], scales.group_minimum(i));
      }
    }
  }
}

} // namespace
