#include "mapped_table.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>

namespace kvik {

void MappedTable::ask_for(int64_t index) const {
#ifdef MADV_WILLNEED
  static const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<std::uintptr_t>(row(index)), first = start / page * page;
  madvise(reinterpret_cast<void *>(first), start + static_cast<std::uintptr_t>(row_bytes_) - first, MADV_WILLNEED);
#endif
}

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
