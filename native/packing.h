// From GGUF's blocks to the packed container of format.h, without loss.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>

#include "format.h"
#include "thread_pool.h"
#include "weight_arena.h"

namespace kvik {

struct GgufType;

// A GGUF tensor type that the packed container holds exactly, or null.
const GgufType *find_gguf_type(std::string_view name);
int64_t row_bytes(const GgufType &type, int64_t columns);
int64_t columns_multiple(const GgufType &type);

// A weight matrix (rows, columns), owned.
struct PackedWeight {
  int64_t rows, columns;
  int block_format;         // index into kBlockFormats, or -1
  FloatFormat float_format; // where block_format is -1
  int64_t num_bytes;
  std::shared_ptr<uint8_t> data;

  bool quantized() const { return block_format >= 0; }
  int64_t row_blocks() const { return (rows + kRowBlock - 1) / kRowBlock; }
};

// `source` holds `rows` rows of row_bytes(type, columns) bytes. Throws std::bad_alloc.
PackedWeight pack(const GgufType &type, const uint8_t *source, int64_t rows, int64_t columns, WeightArena &arena,
                  ThreadPool &pool);

} // namespace kvik
