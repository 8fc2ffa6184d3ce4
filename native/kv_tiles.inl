// Where keys and values lie, and how they are written there.

namespace {

using kvik::AttendArgs;
using kvik::kBlockSize;
using kvik::kSegment;
using kvik::kSuperblock;
using kvik::KVTiles;
using kvik::LayerKV;
using kvik::Partial;
using kvik::SegmentTask;

enum Side { kKey = 0, kValue = 1 };

inline uint8_t *tile_of(const KVTiles &kv, int64_t block, int64_t head, Side side) {
  const int64_t superblock = block / kSuperblock, within = block % kSuperblock;
  const int64_t tile = side == kKey ? within * kv.key.bytes : kSuperblock * kv.key.bytes + within * kv.value.bytes;
  return static_cast<uint8_t *>(kv.data) + superblock * kv.superblock_bytes + head * kv.head_bytes() + tile;
}

// One head's key or value, converted eight at a time; `put(d, x)` stores dimension d.
template <class Stored, class Put> inline void convert(const float *x, int64_t head_dim, Put put) {
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    Stored eight[kLanes];
    store(eight, load(x + d));
    for (int i = 0; i < kLanes; ++i) put(d + i, eight[i]);
  }
}

// A token's key, or its value, in one head's tile.
template <class Stored> inline void write_key(uint8_t *tile, int64_t token, const float *k, int64_t head_dim) {
  Stored *keys = reinterpret_cast<Stored *>(tile) + token;
  convert<Stored>(k, head_dim, [&](int64_t d, Stored x) { keys[d * kBlockSize] = x; });
}
template <class Stored> inline void write_value(uint8_t *tile, int64_t token, const float *v, int64_t head_dim) {
  Stored *values = reinterpret_cast<Stored *>(tile) + token * head_dim;
  for (int64_t d = 0; d < head_dim; d += kLanes) store(values + d, load(v + d));
}

// What an array is multiplied with to become whole numbers of at most `levels`, and the value of 1 afterwards. NaN and
// infinity have no such number: the unit becomes NaN, and with it everything that the array takes part in.
struct Unit {
  float inverse, value;
};
inline Unit unit_of(float top, F32x8 defect, float levels, float min_top) {
  const bool usable = top > min_top;
  return {usable ? levels / top : 0.0f, (usable ? top / levels : 0.0f) + add_lanes(defect)};
}
inline Unit unit_of(const float *x, int64_t count, float levels, float min_top) {
  F32x8 largest = zero8(), defect = zero8(); // x - x: NaN where x is NaN or infinite, else zero
  for (int64_t i = 0; i < count; i += kLanes) {
    const F32x8 v = load(x + i);
    largest = max(abs(v), largest);
    defect = defect + (v - v);
  }
  return unit_of(max_lanes(largest), defect, levels, min_top);
}

// Writes the bytes through `put(d, byte)` and gives the scale.
template <class Put> inline float quantize_head(const float *x, int64_t head_dim, Put put) {
  const Unit unit = unit_of(x, head_dim, 127.0f, 1e-30f);
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const F32x8 scaled = load(x + d) * broadcast(unit.inverse);
    int32_t quants[kLanes];
    store(quants, to_int(max(min(scaled, broadcast(127.0f)), broadcast(-127.0f))));
    for (int i = 0; i < kLanes; ++i) put(d + i, static_cast<uint8_t>(quants[i] + 128));
  }
  return unit.value;
}

inline float *scales_of(uint8_t *tile, int64_t head_dim) {
  return reinterpret_cast<float *>(tile + kBlockSize * head_dim);
}
inline const float *scales_of(const uint8_t *tile, int64_t head_dim) {
  return reinterpret_cast<const float *>(tile + kBlockSize * head_dim);
}

inline void write_key_bytes(uint8_t *keys, int64_t token, const float *k, int64_t head_dim) {
  scales_of(keys, head_dim)[token] = quantize_head(
      k, head_dim, [&](int64_t d, uint8_t byte) { keys[(d / 4 * kBlockSize + token) * 4 + d % 4] = byte; });
}
inline void write_value_bytes(uint8_t *values, int64_t token, const float *v, int64_t head_dim) {
  scales_of(values, head_dim)[token] = quantize_head(
      v, head_dim, [&](int64_t d, uint8_t byte) { values[(token / 4 * head_dim + d) * 4 + token % 4] = byte; });
}

// A token's key and value in one head.
inline void write_head(const KVTiles &kv, int64_t slot, int64_t head, int64_t head_dim, const float *k,
                       const float *v) {
  using kvik::KVType;
  const int64_t block = slot / kBlockSize, token = slot % kBlockSize;
  uint8_t *keys = tile_of(kv, block, head, kKey), *values = tile_of(kv, block, head, kValue);
  switch (kv.key.type) {
  case KVType::f32:
    write_key<float>(keys, token, k, head_dim);
    break;
  case KVType::f16:
    write_key<Half>(keys, token, k, head_dim);
    break;
  case KVType::int8:
    write_key_bytes(keys, token, k, head_dim);
    break;
  case KVType::codes:
    write_key_codes(keys, token, k, head_dim);
    break;
  }
  switch (kv.value.type) {
  case KVType::f32:
    write_value<float>(values, token, v, head_dim);
    break;
  case KVType::f16:
    write_value<Half>(values, token, v, head_dim);
    break;
  case KVType::int8:
    write_value_bytes(values, token, v, head_dim);
    break;
  case KVType::codes:
    write_value_codes(values, token, v, head_dim);
    break;
  }
}

// What is kept of a head in that format: itself, or its transform.
inline const float *kept(const kvik::TileFormat &format, const float *x, int64_t head_dim, float *transformed) {
  if (format.type != kvik::KVType::codes) return x;
  std::memcpy(transformed, x, static_cast<std::size_t>(head_dim) * sizeof(float));
  hadamard(transformed, head_dim);
  return transformed;
}

void write_kv(const LayerKV &kv, const float *k, const float *v, int64_t slot, int64_t recent_slot) {
  const int64_t head_dim = kv.head_dim;
  for (int64_t head = 0; head < kv.num_kv_heads; ++head, k += head_dim, v += head_dim) {
    float key[kvik::kMaxCodedHeadDim], value[kvik::kMaxCodedHeadDim];
    const float *kept_key = kept(kv.key, k, head_dim, key), *kept_value = kept(kv.value, v, head_dim, value);
    write_head(kv, slot, head, head_dim, kept_key, kept_value);
    if (kv.recent.data) write_head(kv.recent, recent_slot, head, head_dim, kept_key, kept_value);
  }
}

} // namespace
