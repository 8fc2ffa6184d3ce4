// Keys and values of 4.5 bits: 32 items share a 16-bit scale, and an item is that times a code of -8 ... 7. Transformed
// heads have no outliers, so that few codes do; the transform is orthonormal, and products of two keep their value.

namespace {

using kvik::kBlockSize;
using kvik::kCodeGroup;

// Adds and subtracts in a fixed order, so that no vectors show in the bits.
void hadamard(float *x, int64_t size) {
  for (int64_t half = 1; half < size; half *= 2)
    for (int64_t begin = 0; begin < size; begin += 2 * half)
      for (int64_t i = begin; i < begin + half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b, x[i + half] = a - b;
      }
  const float scale = 1.0f / sqrtf(static_cast<float>(size));
  for (int64_t i = 0; i < size; ++i) x[i] *= scale;
}

// Scales [head_dim / 32][32 tokens] lie behind the codes, in both kinds of tile.
inline Half *code_scales(uint8_t *tile, int64_t head_dim) {
  return reinterpret_cast<Half *>(tile + kBlockSize * head_dim / 2);
}
inline const Half *code_scales(const uint8_t *tile, int64_t head_dim) {
  return reinterpret_cast<const Half *>(tile + kBlockSize * head_dim / 2);
}

// Codes of 32 items, 8 above their value; gives the scale. The largest item becomes -8 times it. NaN and infinity make
// the scale NaN, and with it all 32.
inline Half encode(const float *x, uint8_t *codes) {
  F32x8 top = zero8(), bottom = zero8(), defect = zero8(); // x - x: NaN where x is NaN or infinite, else zero
  for (int i = 0; i < kCodeGroup; i += kLanes) {
    const F32x8 v = load(x + i);
    top = max(v, top), bottom = max(zero8() - v, bottom);
    defect = defect + (v - v);
  }
  const float above = max_lanes(top), below = max_lanes(bottom), spoiled = add_lanes(defect);
  const bool is_finite = spoiled == 0.0f;
  Half scales[kLanes];
  store(scales, broadcast(is_finite ? (above >= below ? above : -below) / -8.0f : spoiled));
  float values[kLanes];
  store(values, load(scales));
  const float inverse = is_finite && values[0] != 0.0f ? 1.0f / values[0] : 0.0f;
  for (int i = 0; i < kCodeGroup; i += kLanes) {
    const F32x8 scaled = is_finite ? load(x + i) * broadcast(inverse) : zero8();
    int32_t whole[kLanes];
    store(whole, to_int(max(min(scaled, broadcast(7.0f)), broadcast(-8.0f))));
    for (int lane = 0; lane < kLanes; ++lane) codes[i + lane] = static_cast<uint8_t>(whole[lane] + 8);
  }
  return scales[0];
}

inline void write_key_codes(uint8_t *tile, int64_t token, const float *k, int64_t head_dim) {
  for (int64_t d = 0; d < head_dim; d += kCodeGroup) {
    uint8_t codes[kCodeGroup];
    code_scales(tile, head_dim)[d / kCodeGroup * kBlockSize + token] = encode(k + d, codes);
    for (int i = 0; i < kCodeGroup; i += 8)
      for (int j = 0; j < 4; ++j)
        tile[((d + i) / 8 * kBlockSize + token) * 4 + j] = static_cast<uint8_t>(codes[i + j] | codes[i + 4 + j] << 4);
  }
}
inline void write_value_codes(uint8_t *tile, int64_t token, const float *v, int64_t head_dim) {
  const int64_t groups = head_dim / kCodeGroup;
  for (int64_t g = 0; g < groups; ++g) {
    uint8_t codes[kCodeGroup];
    code_scales(tile, head_dim)[g * kBlockSize + token] = encode(v + g * kCodeGroup, codes);
    uint8_t *bytes = tile + (token / 4 * groups + g) * 2 * kCodeGroup + token % 4;
    for (int i = 0; i < kCodeGroup / 2; ++i)
      bytes[4 * i] = static_cast<uint8_t>(codes[i] | codes[i + kCodeGroup / 2] << 4);
  }
}

} // namespace
