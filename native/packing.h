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
  bool on_demand = false; // its pages come from a file as they are read, and memory will not hold those of all matrices

  bool quantized() const { return block_format >= 0; }
  int64_t row_blocks() const { return (rows + kRowBlock - 1) / kRowBlock; }
  int64_t row_block_bytes() const { return num_bytes / row_blocks(); }
};

// What a matrix is once it is packed, without its data. Throws std::bad_alloc where its bytes do not fit 64 bits.
PackedWeight unpacked_weight(const GgufType &type, int64_t rows, int64_t columns);

// The float32 values of a row.
void read_row(const PackedWeight &weight, int64_t row, float *out);

// One row block of a source that has `rows` rows, packed.
void pack_row_block(const GgufType &type, const uint8_t *source, int64_t rows, int64_t columns, int64_t row_block,
                    uint8_t *out);

// Fills a matrix with rows as they come, so that nobody need hold it twice.
class WeightPacker {
public:
  WeightPacker(const GgufType &type, int64_t rows, int64_t columns, WeightArena &arena); // throws std::bad_alloc
  // The same into memory that has room for it.
  WeightPacker(const GgufType &type, int64_t rows, int64_t columns, std::shared_ptr<uint8_t> memory);

  // `count` more rows of row_bytes(type, columns) bytes each: a multiple of kRowBlock of them, or all that are missing.
  void add(const uint8_t *source, int64_t count, ThreadPool &pool);

  const GgufType &type() const { return type_; }
  int64_t missing_rows() const { return weight_.rows - filled_rows_; }
  const PackedWeight &weight() const { return weight_; } // whole when no rows are missing

private:
  const GgufType &type_;
  PackedWeight weight_;
  int64_t filled_rows_ = 0;
};

} // namespace kvik
