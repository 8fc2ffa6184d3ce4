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

// Scales lie behind the codes of a tile, in both kinds of tile.
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
    for (int i = 0; i < kCodeGroup; i += 2)
      tile[(d + i) / 2 * kBlockSize + token] = static_cast<uint8_t>(codes[i] | codes[i + 1] << 4);
  }
}
inline void write_value_codes(uint8_t *tile, int64_t token, const float *v, int64_t head_dim) {
  uint8_t *bytes = tile + token * head_dim / 2;
  for (int64_t d = 0; d < head_dim; d += kCodeGroup) {
    uint8_t codes[kCodeGroup];
    code_scales(tile, head_dim)[(token * head_dim + d) / kCodeGroup] = encode(v + d, codes);
    for (int i = 0; i < kCodeGroup / 2; ++i)
      bytes[d / 2 + i] = static_cast<uint8_t>(codes[i] | codes[i + kCodeGroup / 2] << 4);
  }
}

inline float code_value(int code, float scale) { return static_cast<float>(code - 8) * scale; }

// A tile's keys as floats [head_dim][32 tokens]: exact, for 4 bits times 11 bits fit.
inline void decode_keys(const uint8_t *tile, int64_t head_dim, float *out) {
  const Half *scales = code_scales(tile, head_dim);
  for (int64_t d = 0; d < head_dim; d += kCodeGroup, scales += kBlockSize) {
    float scale[kBlockSize];
    for (int i = 0; i < kBlockSize; i += kWideLanes) store(scale + i, wide_load(scales + i));
    for (int64_t pair = d / 2; pair < (d + kCodeGroup) / 2; ++pair) {
      const uint8_t *codes = tile + pair * kBlockSize;
      float *first = out + 2 * pair * kBlockSize, *second = first + kBlockSize;
      for (int token = 0; token < kBlockSize; ++token) {
        first[token] = code_value(codes[token] & 15, scale[token]);
        second[token] = code_value(codes[token] >> 4, scale[token]);
      }
    }
  }
}
// A tile's values as floats [32 tokens][head_dim].
inline void decode_values(const uint8_t *tile, int64_t head_dim, float *out) {
  const Half *scales = code_scales(tile, head_dim);
  for (int64_t group = 0; group < kBlockSize * head_dim / kCodeGroup; group += kWideLanes) {
    float scale[kWideLanes];
    store(scale, wide_load(scales + group));
    for (int g = 0; g < kWideLanes; ++g) {
      const uint8_t *codes = tile + (group + g) * kCodeGroup / 2;
      float *items = out + (group + g) * kCodeGroup;
      for (int i = 0; i < kCodeGroup / 2; ++i) {
        items[i] = code_value(codes[i] & 15, scale[g]);
        items[i + kCodeGroup / 2] = code_value(codes[i] >> 4, scale[g]);
      }
    }
  }
}

} // namespace
