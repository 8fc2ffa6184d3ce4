#include "mapped_table.h"

namespace kvik {

int64_t RowReader::space_bytes(const MappedTable &table) {
  constexpr int64_t kLine = WeightArena::kLine;
  return (unpacked_weight(table.type(), 1, table.columns()).num_bytes + kLine - 1) / kLine * kLine;
}

RowReader::RowReader(const MappedTable &table, uint8_t *space)
    : table_(table), packed_(unpacked_weight(table.type(), 1, table.columns())) {
  packed_.data = {space, [](uint8_t *) {}}; // which somebody else frees
}

void RowReader::read(int64_t row, float *out) {
  pack_row_block(table_.type(), table_.row(row), 1, table_.columns(), 0, packed_.data.get());
  read_row(packed_, 0, out);
}

} // namespace kvik
