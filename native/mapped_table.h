// A table of which only some rows are ever read: it stays in the file that it is from.
#pragma once

#include <cstdint>

#include "packing.h"
#include "pages.h"

namespace kvik {

// Rows (rows, columns) of a GGUF tensor's bytes, which somebody else keeps and may have mapped from a file.
class MappedTable {
public:
  MappedTable(const GgufType &type, int64_t rows, int64_t columns, const uint8_t *data)
      : type_(type), rows_(rows), columns_(columns), row_bytes_(kvik::row_bytes(type, columns)), data_(data) {}

  const GgufType &type() const { return type_; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t num_bytes() const { return rows_ * row_bytes_; }
  const uint8_t *row(int64_t index) const { return data_ + index * row_bytes_; }

  // Has the system begin to read a row, where it lies in a file.
  void ask_for(int64_t index) const { ask_for_pages(row(index), row_bytes_); }

private:
  const GgufType &type_;
  int64_t rows_, columns_, row_bytes_;
  const uint8_t *data_;
};

// Reads rows one at a time; their values are those that the packed matrix would have.
class RowReader {
public:
  // Bytes that a reader needs to itself, each beginning at a cache line.
  static int64_t space_bytes(const MappedTable &table);

  RowReader(const MappedTable &table, uint8_t *space);

  void read(int64_t row, float *out);

private:
  const MappedTable &table_;
  PackedWeight packed_; // of one row, in the space
};

} // namespace kvik
