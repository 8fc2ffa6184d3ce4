// The Python module kvik._native: arguments are checked here, once a call; kernels trust them.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>
#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "amx.h"
#include "bind.h"
#include "float_mode.h"
#include "kv_arrays.h"
#include "machine_limits.h"
#include "packed_file.h"

namespace kvik {

const Kernels *kernels = nullptr;

Nonlinearity nonlinearity_of(std::string_view name) {
  if (name == "silu") return Nonlinearity::silu;
  if (name == "gelu") return Nonlinearity::gelu;
  if (name == "gelu_tanh") return Nonlinearity::gelu_tanh;
  if (name == "relu") return Nonlinearity::relu;
  if (name == "relu2") return Nonlinearity::relu2;
  require(name == "clamped_silu",
          "activate: the activation must be silu, gelu, gelu_tanh, relu, relu2 or clamped_silu");
  return Nonlinearity::clamped_silu;
}

// Of block tables only what some token sees is looked at: behind a window a block may have gone to someone else.
void check_block_tables(const BlockTables &tables, const TokenPlaces &tokens, int64_t num_blocks, int64_t window,
                        bool recent) {
  const auto require_block = [&](int32_t block) {
    require(block >= 0 && block < num_blocks, "attend: a block id is outside the cache");
  };
  int64_t checked_sequence = -1, checked_first = 0, checked_last = -1; // blocks known to be right
  for (int64_t i = 0; i < tokens.num_tokens; ++i) {
    const int32_t sequence = tokens.sequence_index[i], index = tokens.kv_index[i], bound = tokens.kv_bounds[i];
    require(sequence >= 0 && sequence < tables.num_sequences, "attend: a sequence index has no block table");
    require(index >= 0 && index < bound, "attend: a token's place is not below its bound");
    require(bound <= tables.width * kBlockSize, "attend: a bound is past its block table");
    const int64_t last = (bound - 1) / kBlockSize;
    const int64_t first =
        recent ? last / kSuperblock * kSuperblock : std::max<int64_t>(0, index + 1 - window) / kBlockSize;
    if (recent && sequence != checked_sequence) require_block(tables.blocks[sequence * tables.width]);
    // Neighbouring tokens see nearly the same blocks.
    if (sequence != checked_sequence || first < checked_first || first > checked_last + 1)
      checked_sequence = sequence, checked_first = first, checked_last = first - 1;
    for (; checked_last < last; ++checked_last)
      require_block(tables.blocks[sequence * tables.width + checked_last + 1]);
  }
}

namespace {

struct InstructionSet {
  const Kernels *kernels;
  std::string obstacle; // why it cannot be used here, or nothing
};

// The best set first. Behind them the emulation of AMX, which is for tests.
std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets;
  const Kernels *emulated = &kGenericEmulatedTiles;
#if KVIK_AVX512
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  const std::string no_avx512 = avx512 ? "" : "the processor lacks AVX-512 F, BW, VL, DQ or VNNI";
  if (avx512) emulated = &kAvx512EmulatedTiles;
#if KVIK_AMX
  sets.push_back({&kAmxKernels, avx512 ? amx_obstacle() : no_avx512});
#endif
  sets.push_back({&kAvx512Kernels, no_avx512});
#endif
#if KVIK_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  sets.push_back({&kAvx2Kernels, avx2 ? "" : "the processor lacks AVX2, FMA or F16C"});
#endif
  sets.push_back({&kGenericKernels, ""});
  sets.push_back({emulated, ""});
  return sets;
}

// The sets that this processor has.
std::vector<std::string> usable_instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet &set : instruction_sets())
    if (set.obstacle.empty()) names.push_back(set.kernels->isa);
  return names;
}

// KVIK_ISA, or the best set that this processor has.
const Kernels *choose_kernels() {
  const char *asked = std::getenv("KVIK_ISA");
  const std::string name = asked ? asked : "";
  std::string known;
  for (const InstructionSet &set : instruction_sets()) {
    if (name.empty() ? set.obstacle.empty() : name == set.kernels->isa) {
      if (set.obstacle.empty()) return set.kernels;
      throw nb::import_error(("KVIK_ISA=" + name + " cannot be used: " + set.obstacle).c_str());
    }
    known += (known.empty() ? "" : ", ") + std::string(set.kernels->isa);
  }
  throw nb::import_error(("KVIK_ISA=" + name + " is not one of: " + known).c_str());
}

const GgufType &checked_type(std::string_view name, int64_t rows, int64_t columns) {
  const GgufType *type = find_gguf_type(name);
  if (!type) throw nb::value_error(("pack: no packed format for type " + std::string(name)).c_str());
  constexpr int64_t kMax = int64_t{1} << 31;
  require(rows > 0 && columns > 0 && rows < kMax && columns < kMax, "pack: rows and columns must be in 1 ... 2**31-1");
  require(columns % columns_multiple(*type) == 0, "pack: columns must be a multiple of the type's block");
  return *type;
}

// Room for one matrix; who fills it owns it.
struct WeightPlace {
  std::shared_ptr<uint8_t> memory;
  int64_t num_bytes;
};

// Room for matrices of so many bytes, one behind the other, the first at a page's beginning.
std::vector<WeightPlace> places_together(WeightArena &arena, const std::vector<int64_t> &sizes) {
  std::vector<int64_t> offsets;
  int64_t end = 0;
  for (const int64_t size : sizes) {
    require(size > 0, "WeightArena: a matrix has 1 byte or more");
    offsets.push_back(end);
    if (size > INT64_MAX / 2 - end) throw std::bad_alloc();
    end += (size + WeightArena::kLine - 1) / WeightArena::kLine * WeightArena::kLine;
  }
  const std::shared_ptr<uint8_t> memory = sizes.empty() ? nullptr : arena.allocate(end, WeightArena::kPage);
  std::vector<WeightPlace> places;
  for (std::size_t i = 0; i < sizes.size(); ++i)
    places.push_back({std::shared_ptr<uint8_t>(memory, memory.get() + offsets[i]), sizes[i]});
  return places;
}

WeightPacker *make_packer(std::string_view type_name, int64_t rows, int64_t columns, WeightArena &arena,
                          WeightPlace *place) {
  const GgufType &type = checked_type(type_name, rows, columns);
  if (!place) return new WeightPacker(type, rows, columns, arena);
  require(place->memory != nullptr, "pack: the place has a matrix already");
  require(place->num_bytes == unpacked_weight(type, rows, columns).num_bytes, "pack: the place is of another size");
  return new WeightPacker(type, rows, columns, std::exchange(place->memory, nullptr));
}

void checked_add_rows(WeightPacker &packer, Array<const uint8_t, 1> source, ThreadPool &pool) {
  const int64_t bytes = row_bytes(packer.type(), packer.weight().columns), count = size(source, 0) / bytes;
  require(size(source, 0) % bytes == 0, "pack: source has the wrong number of bytes");
  require(count <= packer.missing_rows(), "pack: source has more rows than the matrix lacks");
  require(count % kRowBlock == 0 || count == packer.missing_rows(),
          "pack: all rows but the last must come in multiples of 16");
  packer.add(source.data(), count, pool);
}

PackedWeight finished(const WeightPacker &packer) {
  require(packer.missing_rows() == 0, "pack: rows are missing");
  return packer.weight();
}

PackedWeight pack_tensor(std::string_view type_name, Array<const uint8_t, 1> source, int64_t rows, int64_t columns,
                         WeightArena &arena, ThreadPool &pool) {
  const GgufType &type = checked_type(type_name, rows, columns);
  const int64_t bytes = row_bytes(type, columns);
  require(size(source, 0) % bytes == 0 && size(source, 0) / bytes == rows,
          "pack: source has the wrong number of bytes");
  WeightPacker packer(type, rows, columns, arena);
  packer.add(source.data(), rows, pool);
  return packer.weight();
}

int64_t checked_packed_bytes(std::string_view type_name, int64_t rows, int64_t columns) {
  return unpacked_weight(checked_type(type_name, rows, columns), rows, columns).num_bytes;
}

nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>> packed_data(const PackedWeight &weight) {
  auto kept = std::make_unique<std::shared_ptr<uint8_t>>(weight.data);
  const std::size_t shape[] = {static_cast<std::size_t>(weight.num_bytes)};
  const nb::capsule owner(kept.get(),
                          [](void *data) noexcept { delete static_cast<std::shared_ptr<uint8_t> *>(data); });
  (void)kept.release();
  return {weight.data.get(), 1, shape, owner};
}

std::vector<uint64_t> weight_checksums(const PackedWeight &weight, ThreadPool &pool) {
  return region_checksums(weight.data.get(), weight.num_bytes, pool);
}

PackedFile *map_packed_file(int file, int64_t num_bytes, bool on_demand) {
  struct stat found;
  require(fstat(file, &found) == 0 && S_ISREG(found.st_mode), "PackedFile: no descriptor of a regular file");
  require(num_bytes > 0 && num_bytes <= found.st_size, "PackedFile: num_bytes must be in 1 ... the file's bytes");
  return new PackedFile(file, num_bytes, on_demand);
}

PackedWeight checked_mapped_weight(const PackedFile &file, std::string_view type_name, int64_t rows, int64_t columns,
                                   int64_t offset) {
  const GgufType &type = checked_type(type_name, rows, columns);
  require(offset >= 0 && offset % WeightArena::kLine == 0, "PackedFile: offset must be a multiple of 64");
  require(offset <= file.num_bytes() && unpacked_weight(type, rows, columns).num_bytes <= file.num_bytes() - offset,
          "PackedFile: the matrix ends behind the file");
  return file.weight(type, rows, columns, offset);
}

MappedTableWeights make_mapped_table(std::string_view type_name, Array<const uint8_t, 1> source, int64_t rows,
                                     int64_t columns) {
  const GgufType &type = checked_type(type_name, rows, columns);
  const int64_t bytes = row_bytes(type, columns);
  require(size(source, 0) % bytes == 0 && size(source, 0) / bytes == rows,
          "MappedTable: source has the wrong number of bytes");
  return {MappedTable(type, rows, columns, source.data()), source};
}

NormWeights make_norm(Floats<1> weight, float eps, std::optional<Floats<1>> bias, bool layer) {
  require_aligned(weight, "Norm", "the weight");
  require(size(weight, 0) > 0, "Norm: the weight is empty");
  if (bias) {
    require_aligned(*bias, "Norm", "the bias");
    require(size(*bias, 0) == size(weight, 0), "Norm: weight and bias differ in width");
  }
  return {weight, bias, eps, layer};
}

LinearWeights make_linear(const PackedWeight &matrix, std::optional<Floats<1>> bias, float scale) {
  if (bias) {
    require_aligned(*bias, "Linear", "the bias");
    require(size(*bias, 0) == matrix.rows, "Linear: the bias needs one item a row of the matrix");
  }
  return {matrix, bias, scale};
}

RopeWeights make_rope(Floats<3> cos_sin, int64_t half) {
  require_aligned(cos_sin, "Rope", "cos_sin");
  require(size(cos_sin, 2) == 2, "Rope: a cosine and a sine for each pair");
  require(half == 0 || (half >= size(cos_sin, 1) && half < int64_t{1} << 31),
          "Rope: half must be 0, for pairs of neighbours, or as many dimensions as there are pairs or more");
  return {cos_sin, half};
}

PositionScales make_position_scales(Floats<1> factors) {
  require_aligned(factors, "PositionScales", "the factors");
  return {factors};
}

constexpr int64_t kMaxKVGroups = 64; // of layers with block tables of their own

KVType kv_type_of(std::string_view name, std::string_view codes) {
  if (name == "f32") return KVType::f32;
  if (name == "f16") return KVType::f16;
  if (name == codes) return KVType::codes;
  require(name == "int8", "KVArrays: dtype must be f32, f16 or int8, of keys also k4, of values also v4");
  return KVType::int8;
}

std::unique_ptr<KVArrays> make_kv_arrays(int64_t num_layers, int64_t num_blocks, int64_t num_kv_heads, int64_t head_dim,
                                         std::string_view key_dtype, std::string_view value_dtype, int64_t kv_group) {
  const KVType key = kv_type_of(key_dtype, "k4"), value = kv_type_of(value_dtype, "v4");
  require(head_dim > 0 && head_dim % 8 == 0 && head_dim <= 1024,
          "KVArrays: head_dim must be a multiple of 8 up to 1024");
  require((key != KVType::int8 && value != KVType::int8) || head_dim <= kMaxInt8HeadDim,
          "KVArrays: int8 takes a head_dim up to 512, where integer scores still fit 32 bits");
  require((key != KVType::codes && value != KVType::codes) ||
              (head_dim >= kCodeGroup && head_dim <= kMaxCodedHeadDim && (head_dim & (head_dim - 1)) == 0),
          "KVArrays: k4 and v4 take a head_dim of 32, 64, 128, 256 or 512");
  for (const int64_t count : {num_layers, num_blocks, num_kv_heads})
    require(count > 0 && count < (int64_t{1} << 26), "KVArrays: layers, blocks and heads must be in 1 ... 2**26-1");
  const double bytes = 2.0 * kBlockSize * 4 * static_cast<double>(num_layers) * static_cast<double>(num_blocks + 8) *
                       static_cast<double>(num_kv_heads) * static_cast<double>(head_dim);
  if (bytes > 1e15) throw std::bad_alloc();
  require(num_blocks * kBlockSize <= std::numeric_limits<int32_t>::max(), "KVArrays: slots must fit 32 bits");
  require(kv_group >= 0 && kv_group < kMaxKVGroups, "KVArrays: kv_group must be in 0 ... 63");
  return std::make_unique<KVArrays>(num_layers, num_blocks, num_kv_heads, head_dim, key, value, kv_group);
}

LayerKV layer_of(const KVArrays &arrays, int64_t index) {
  if (index < 0 || index >= arrays.num_layers()) throw nb::index_error("KVArrays: no such layer");
  return arrays.layer(index);
}

LayerKV with_recent(const LayerKV &kv, const LayerKV &recent) {
  const auto as_written = [](KVType type) { return type == KVType::codes ? KVType::f16 : type; };
  require(kv.has_codes(), "LayerKV: without codes nothing is read as it was written");
  require(recent.num_kv_heads == kv.num_kv_heads && recent.head_dim == kv.head_dim,
          "LayerKV: what is recent has other heads");
  require(recent.key.type == as_written(kv.key.type) && recent.value.type == as_written(kv.value.type),
          "LayerKV: what is recent has f16 where the others are codes, and else the same types");
  require(recent.kv_group != kv.kv_group, "LayerKV: what is recent needs block tables of its own");
  LayerKV both = kv;
  both.recent = recent;
  return both;
}

// Each layer's copies in order: one may read what an earlier one wrote.
void checked_copy_blocks(ThreadPool &pool, KVArrays &arrays, const std::vector<std::pair<int64_t, int64_t>> &copies) {
  for (const auto &[source, target] : copies) {
    for (const int64_t block : {source, target})
      require(block >= 0 && block < arrays.num_blocks(), "copy_blocks: a block id is outside the cache");
    require(source != target, "copy_blocks: a block cannot be copied to itself");
  }
  if (copies.empty()) return;
  pool.for_each(arrays.num_layers(), [&](int, int64_t layer) {
    for (const auto &[source, target] : copies) arrays.copy_block(layer, source, target);
  });
}

void checked_discard_superblocks(KVArrays &arrays, const std::vector<int64_t> &superblocks) {
  for (const int64_t superblock : superblocks)
    require(superblock >= 0 && superblock < arrays.num_superblocks(),
            "discard_superblocks: a superblock is outside the cache");
  for (const int64_t superblock : superblocks) arrays.discard(superblock);
}

void check_blocks(const KVArrays &arrays, const std::vector<int64_t> &blocks, const char *what) {
  for (const int64_t block : blocks) require(block >= 0 && block < arrays.num_blocks(), what);
}

nb::bytes checked_read_blocks(const KVArrays &arrays, const std::vector<int64_t> &blocks) {
  check_blocks(arrays, blocks, "read_blocks: a block id is outside the cache");
  const auto size = static_cast<Py_ssize_t>(blocks.size()) * arrays.block_bytes();
  nb::bytes data = nb::steal<nb::bytes>(PyBytes_FromStringAndSize(nullptr, size));
  if (!data.is_valid()) nb::raise_python_error();
  auto *out = reinterpret_cast<uint8_t *>(PyBytes_AsString(data.ptr()));
  const nb::gil_scoped_release unlocked;
  for (const int64_t block : blocks) arrays.read_block(block, out), out += arrays.block_bytes();
  return data;
}

void checked_write_blocks(KVArrays &arrays, const std::vector<int64_t> &blocks, const Array<const uint8_t, 1> &data) {
  check_blocks(arrays, blocks, "write_blocks: a block id is outside the cache");
  require(size(data, 0) == static_cast<int64_t>(blocks.size()) * arrays.block_bytes(),
          "write_blocks: the data are not as long as the blocks");
  const uint8_t *in = data.data();
  for (const int64_t block : blocks) arrays.write_block(block, in), in += arrays.block_bytes();
}

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#else
  return std::string("g++ ") + __VERSION__;
#endif
}

double checked_read_bandwidth(ThreadPool &pool, int64_t num_bytes) {
  require(num_bytes > 0 && num_bytes <= int64_t{1} << 30, "read_bandwidth: num_bytes must be in 1 ... 2**30");
  return read_bandwidth(pool, num_bytes);
}

} // namespace
} // namespace kvik

NB_MODULE(_native, m) {
  using namespace kvik;
  kernels = choose_kernels();
  // An interpreter that ends while a caller still holds a model is no leak worth a page of warnings.
  nb::set_leak_warnings(false);
  m.doc() = "kvik's native core: packed weights, thread pool and kernels.";
  m.attr("isa") = kernels->isa;
  m.def("usable_isas", &usable_instruction_sets,
        "Names of the instruction sets that can be used here: the best first, an emulation that tests use last.");
  m.def(
      "amx_obstacle", [] { return amx_obstacle(); },
      "Why AMX's tile instructions cannot be used here; empty where they can.");
  m.def("compiler", &compiler, "What compiled this module.");
  m.attr("BLOCK_SIZE") = kBlockSize;
  m.attr("SEGMENT") = kSegment;
  m.attr("PACKED_VERSION") = kPackedVersion;
  m.attr("PACKED_ALIGNMENT") = WeightArena::kLine;
  m.attr("PACKED_REGION_BYTES") = kRegionBytes;

  using Unlocked = nb::call_guard<nb::gil_scoped_release, FloatMode>;
  nb::class_<ThreadPool>(m, "ThreadPool", "Threads that share the work of one op at a time.")
      .def(nb::init<int>(), "num_threads"_a)
      .def_prop_ro("num_threads", &ThreadPool::num_threads);
  nb::class_<WeightPlace>(m, "WeightPlace", "Room for one matrix.");
  nb::class_<WeightArena>(m, "WeightArena", "Memory for packed weights, in large pages.")
      .def(nb::init<>())
      .def("places_together", &places_together, "sizes"_a,
           "Room for matrices of so many packed bytes, one behind the other, the first at a page's beginning.");
  nb::class_<PackedWeight>(m, "PackedWeight", "A weight matrix (rows, columns) in kvik's packed layout.")
      .def_ro("rows", &PackedWeight::rows)
      .def_ro("columns", &PackedWeight::columns)
      .def_ro("num_bytes", &PackedWeight::num_bytes)
      .def_prop_ro("quantized", &PackedWeight::quantized, "Whether activations are quantised for it.")
      .def_prop_ro("data", &packed_data, nb::rv_policy::reference, "The packed bytes, read-only.")
      .def("checksums", &weight_checksums, Unlocked(), "pool"_a,
           "One for each PACKED_REGION_BYTES of the packed bytes.");
  nb::class_<PackedFile>(m, "PackedFile", "A file with packed weights, mapped read-only.")
      .def(nb::new_(&map_packed_file), "file"_a, "num_bytes"_a, "on_demand"_a)
      .def("weight", &checked_mapped_weight, "type"_a, "rows"_a, "columns"_a, "offset"_a,
           "The matrix whose packed bytes begin there, as they are.");
  nb::class_<MappedTableWeights>(m, "MappedTable", "A GGUF tensor's rows, looked up where they lie.")
      .def(nb::new_(&make_mapped_table), "type"_a, "source"_a.noconvert(), "rows"_a, "columns"_a)
      .def_prop_ro("rows", [](const MappedTableWeights &table) { return table.table.rows(); })
      .def_prop_ro("columns", [](const MappedTableWeights &table) { return table.table.columns(); })
      .def_prop_ro("num_bytes", [](const MappedTableWeights &table) { return table.table.num_bytes(); });
  nb::class_<WeightPacker>(m, "WeightPacker", "Packs a GGUF tensor's rows without loss, as they come.")
      .def(nb::new_(&make_packer), "type"_a, "rows"_a, "columns"_a, "arena"_a, "place"_a.none() = nb::none())
      .def("add", &checked_add_rows, Unlocked(), "source"_a.noconvert(), "pool"_a,
           "Takes more whole rows: a multiple of 16 of them, or all that are missing.")
      .def("finish", &finished, "The matrix, once no rows are missing.");
  nb::class_<NormWeights>(m, "Norm", "RMS norm, or layer norm where `layer`.")
      .def(nb::new_(&make_norm), "weight"_a.noconvert(), "eps"_a, "bias"_a.noconvert().none(), "layer"_a);
  nb::class_<LinearWeights>(m, "Linear", "(x @ matrix.T + bias) * scale.")
      .def(nb::new_(&make_linear), "matrix"_a, "bias"_a.noconvert().none(), "scale"_a);
  nb::class_<RopeWeights>(m, "Rope", "Cosine and sine by position: (positions, pairs, 2).")
      .def(nb::new_(&make_rope), "cos_sin"_a.noconvert(), "half"_a);
  nb::class_<PositionScales>(m, "PositionScales", "What queries are multiplied with, by position.")
      .def(nb::new_(&make_position_scales), "factors"_a.noconvert());
  nb::class_<LayerKV>(m, "LayerKV", "One layer's keys and values; keep its KVArrays alive.")
      .def_ro("kv_group", &LayerKV::kv_group, "Which block tables of a step are its own.")
      .def_prop_ro(
          "recent_group",
          [](const LayerKV &kv) { return kv.recent.data ? std::optional(kv.recent.kv_group) : std::nullopt; },
          "The same of what is read as it was written; None where there are no codes.")
      .def_prop_ro("token_bytes", &LayerKV::token_bytes, "Bytes that one token's key and value take.")
      .def("with_recent", &with_recent, "recent"_a, nb::keep_alive<0, 1>(), nb::keep_alive<0, 2>(),
           "The same of a layer with codes, and where tokens of the same segment and the first block are as written.");
  nb::class_<KVArrays>(m, "KVArrays", "Keys and values of all layers, in blocks of 32 tokens.")
      .def(nb::new_(&make_kv_arrays), "num_layers"_a, "num_blocks"_a, "num_kv_heads"_a, "head_dim"_a, "key"_a,
           "value"_a, "kv_group"_a = 0)
      .def_prop_ro("num_bytes", &KVArrays::num_bytes)
      .def_prop_ro("block_bytes", &KVArrays::block_bytes, "Bytes of one block in all layers.")
      .def("layer", &layer_of, "index"_a, nb::keep_alive<0, 1>());

  // noconvert: a quiet copy of an input would cost, and of an output lose, what the caller meant.
  m.def("pack", &pack_tensor, Unlocked(), "type"_a, "source"_a.noconvert(), "rows"_a, "columns"_a, "arena"_a, "pool"_a,
        "Packs a GGUF tensor's bytes without loss.");
  m.def("packed_bytes", &checked_packed_bytes, "type"_a, "rows"_a, "columns"_a, "Bytes that such a matrix packs to.");
  m.def("copy_blocks", &checked_copy_blocks, Unlocked(), "pool"_a, "arrays"_a, "copies"_a,
        "Copies keys and values of all layers from block to block: (source, target) pairs, in order.");
  m.def("discard_superblocks", &checked_discard_superblocks, Unlocked(), "arrays"_a, "superblocks"_a,
        "Gives the memory of superblocks (8 blocks, all layers) back to the system; what they held is lost.");
  m.def("read_blocks", &checked_read_blocks, "arrays"_a, "blocks"_a,
        "The bytes of whole blocks, one after the other: in each layer after layer, head after head, keys and values.");
  m.def("write_blocks", &checked_write_blocks, Unlocked(), "arrays"_a, "blocks"_a, "data"_a.noconvert(),
        "Puts bytes that `read_blocks` gave into blocks.");
  m.def("read_bandwidth", &checked_read_bandwidth, Unlocked(), "pool"_a, "num_bytes"_a,
        "Bytes a second that the threads read from an array of num_bytes, in whole MiB.");
  m.def("integer_throughput", &integer_throughput, Unlocked(), "pool"_a,
        "Multiply-adds of 8-bit integers a second, of operands in registers.");
  m.def("float_throughput", &float_throughput, Unlocked(), "pool"_a,
        "Fused multiply-adds of float32 a second, of operands in registers.");
  bind_program(m);
  bind_sample(m);
}
