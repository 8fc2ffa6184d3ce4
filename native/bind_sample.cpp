// The sampler's binding: every index that a row names is checked here, on copies.
#include <cmath>
#include <cstring>
#include <span>
#include <vector>

#include "bind.h"
#include "float_mode.h"
#include "sample.h"

namespace kvik {
namespace {

void check_logits(const Floats<2> &logits) {
  require_aligned(logits, "Sampler", "logits");
  require(size(logits, 1) >= 1 && size(logits, 1) <= kMaxVocabulary, "Sampler: a row has 1 ... 2**22 logits");
}

void checked_argmax(Sampler &sampler, Floats<2> logits, Integers rows, Array<int32_t, 1> out) {
  check_logits(logits);
  require_aligned(rows, "Sampler", "rows");
  require_aligned(out, "Sampler", "out");
  require(size(out, 0) == size(rows, 0), "Sampler: one output a row");
  const std::vector<int32_t> own = copied(rows);
  for (const int32_t row : own) require(row >= 0 && row < size(logits, 0), "Sampler: a row is outside the logits");
  sampler.argmax(logits.data(), size(logits, 1), own, out.data());
}

bool is_range(int64_t first, int64_t end, int64_t count) { return first >= 0 && first <= end && end <= count; }

void check_row(const SampleRow &row, int64_t num_logits, int64_t vocab_size, int64_t num_ids, int64_t num_biases,
               int64_t mask_bytes, int64_t num_top) {
  require(row.row >= 0 && row.row < num_logits, "Sampler: a row is outside the logits");
  require(row.position >= 0, "Sampler: a position must be 0 or more");
  require(is_range(row.history, row.completion, num_ids) && is_range(row.completion, row.history_end, num_ids) &&
              is_range(row.forbidden, row.forbidden_end, num_ids) && is_range(row.bias, row.bias_end, num_biases),
          "Sampler: a range is outside the ids");
  require(row.mask >= -1 && (row.mask == -1 || row.mask <= mask_bytes - (vocab_size + 7) / 8),
          "Sampler: a mask needs a bit for each token");
  require(row.given >= -1 && row.given < vocab_size, "Sampler: the given token is outside the vocabulary");
  require(std::isfinite(row.scale) && row.scale >= 0, "Sampler: the scale must be 0, for the most likely, or more");
  require(std::isfinite(row.presence) && std::isfinite(row.frequency) && std::isfinite(row.repetition) &&
              row.repetition > 0,
          "Sampler: penalties must be finite, that of repetition above 0");
  require(row.top_p >= 1 && row.top_p <= kWholeMass, "Sampler: top_p must be in 1 ... 2**53");
  require(row.top_k >= 0, "Sampler: top_k must be 0, for all, or more");
  require(row.min_weight >= 0 && row.min_weight <= kWeightOne, "Sampler: min_weight must be in 0 ... 2**40");
  require(row.num_top >= -1 && row.num_top <= num_top, "Sampler: more of the most likely than columns for them");
}

void checked_sample(Sampler &sampler, Floats<2> logits, Array<const uint8_t, 2> rows, Integers ids, Floats<1> biases,
                    Array<const uint8_t, 1> masks, Array<int32_t, 1> chosen, Array<int64_t, 1> totals,
                    Array<int32_t, 2> top_ids, FloatsOut<2> top_logits, FloatsOut<2> highest_and_own) {
  check_logits(logits);
  require_aligned(ids, "Sampler", "ids");
  require_aligned(biases, "Sampler", "biases");
  require_aligned(chosen, "Sampler", "chosen");
  require_aligned(totals, "Sampler", "totals");
  require_aligned(top_ids, "Sampler", "top_ids");
  require_aligned(top_logits, "Sampler", "top_logits");
  require_aligned(highest_and_own, "Sampler", "highest_and_own");
  const int64_t num_rows = size(rows, 0), vocab_size = size(logits, 1), num_top = size(top_ids, 1);
  require(size(rows, 1) == sizeof(SampleRow), "Sampler: a row has 152 bytes");
  require(size(chosen, 0) == num_rows && size(totals, 0) == num_rows && size(top_ids, 0) == num_rows &&
              size(top_logits, 0) == num_rows && size(highest_and_own, 0) == num_rows,
          "Sampler: one output a row");
  require(size(top_logits, 1) == num_top && size(highest_and_own, 1) == 2, "Sampler: wrong output shape");
  require(size(biases, 0) <= size(ids, 0), "Sampler: a bias is without an id");
  std::vector<SampleRow> own(static_cast<std::size_t>(num_rows));
  if (num_rows != 0) std::memcpy(own.data(), rows.data(), own.size() * sizeof(SampleRow));
  const std::vector<int32_t> own_ids = copied(ids);
  for (const int32_t id : own_ids) require(id >= 0 && id < vocab_size, "Sampler: an id is outside the vocabulary");
  for (const SampleRow &row : own)
    check_row(row, size(logits, 0), vocab_size, size(ids, 0), size(biases, 0), size(masks, 0), num_top);
  sampler.sample({.logits = logits.data(),
                  .vocab_size = vocab_size,
                  .rows = own,
                  .ids = own_ids.data(),
                  .biases = biases.data(),
                  .masks = masks.data(),
                  .num_top = num_top,
                  .chosen = chosen.data(),
                  .totals = totals.data(),
                  .top_ids = top_ids.data(),
                  .top_logits = top_logits.data(),
                  .highest_and_own = highest_and_own.data()});
}

} // namespace

void bind_sample(nb::module_ &m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release, FloatMode>;
  m.attr("SAMPLE_ROW_BYTES") = sizeof(SampleRow);
  m.def("uniform_bits", &uniform_bits, "seed"_a, "position"_a,
        "The first 53 bits of Philox with this key and counter, as NumPy draws them.");
  nb::class_<Sampler>(m, "Sampler", "Chooses tokens from rows of logits; one call at a time.")
      .def(nb::init<ThreadPool &>(), "pool"_a, nb::keep_alive<1, 2>())
      .def("argmax", &checked_argmax, Unlocked(), "logits"_a.noconvert(), "rows"_a.noconvert(), "out"_a.noconvert(),
           "out[i] = the first of the highest logits of row rows[i]; -1 where that row is not finite.")
      .def("sample", &checked_sample, Unlocked(), "logits"_a.noconvert(), "rows"_a.noconvert(), "ids"_a.noconvert(),
           "biases"_a.noconvert(), "masks"_a.noconvert(), "chosen"_a.noconvert(), "totals"_a.noconvert(),
           "top_ids"_a.noconvert(), "top_logits"_a.noconvert(), "highest_and_own"_a.noconvert(),
           "chosen[i] = the token of rows[i] (native/sample.h has the layout), -1 where there is none.");
}

} // namespace kvik
