// A captured step: the ops of one forward pass, run in one call for any number of tokens.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "ops.h"

namespace kvik {

// Where one group of layers keeps the keys and values of a step.
struct KVIndex {
  const int32_t *slots;        // (T,)
  const int32_t *block_tables; // (sequences, table_width)
  int64_t table_width;
};

// The tokens of one step, sequence after sequence.
struct Step {
  int64_t num_tokens, num_sequences, num_logits;
  const int32_t *token_ids;
  const int32_t *positions;            // (T,) what they are rotated by
  const int32_t *kv_index, *kv_bounds; // (T,) where a token stands in its block table, and up to where it sees
  const int32_t *sequence_index;       // (T,)
  const int32_t *logit_rows;           // (R,) tokens whose logits are wanted
  const KVIndex *groups;               // of each group of layers
};

class Program;

// What an op sees when it runs.
class Frame {
public:
  Frame(Program &program, const Step &step, float *out) : step(step), program_(program), out_(out) {}

  float *operator[](int value) const;
  int64_t rows(int value) const;
  ThreadPool &pool() const;
  Workspace &workspace() const;

  const Step &step;

private:
  Program &program_;
  float *out_; // where the program's output goes
};

class Program {
public:
  // Rows of floats that one op computes and later ones read: (T, width), or (R, width) behind `take_rows`.
  struct Value {
    int64_t width;
    bool of_logits;
    int last_use;          // index of the last op that reads it
    std::size_t buffer{0}; // which of the buffers holds it, once the program is finished
  };

  struct Op {
    std::string name;
    std::vector<int> inputs, outputs;
    std::function<void(const Frame &)> run;
    std::vector<const PackedWeight *> weights{}; // whose rows are shared out together
    Norm norm{};                                 // that comes before them, where it has a weight
  };

  // Bounds that every step must keep, gathered from the ops.
  struct KVGroupLimits {
    int64_t blocks = INT32_MAX;
    int64_t window = 1;     // the longest of any op: so far back block tables must be right
    bool is_recent = false; // they must be right in the token's own segment and at the first block
  };
  struct Limits {
    int64_t token_ids = INT32_MAX, positions = INT32_MAX;
    std::vector<KVGroupLimits> kv_groups;
  };

  Program(ThreadPool &pool, bool int16_activations) : pool_(pool), int16_activations_(int16_activations) {}

  int new_value(int64_t width, bool of_logits);
  // A value that each run is given: a row for each token.
  int new_input(int64_t width);
  void add_op(Op op);
  // No op can follow. Values that never live at the same time share a buffer; those that are kept live to the end. The
  // output, if there is one (-1), lies where the caller of `run` says.
  void finish(int output, const std::vector<int> &kept);

  // Runs ops [first, last); out (R, width of the output) is written by the op that computes the output. `inputs` are
  // the rows of each input, in order. Where `seconds` is given, it gets each op's time. Threads take turns.
  void run(const Step &step, float *out, int first, int last, const std::vector<const float *> &inputs = {},
           double *seconds = nullptr);

  // The first rows of a value of the last run; what they are once a later op has reused their memory is anybody's
  // guess. False where the last run had fewer.
  bool copy_value(int value, int64_t rows, float *out);

  // Shows what attention keeps, when no run is in progress.
  template <class Function> void visit_attention(const Function &function) {
    const std::lock_guard lock(one_run_at_a_time_);
    function(workspace_.attention);
  }

  const std::vector<Op> &ops() const { return ops_; }
  const Value &value(int index) const { return values_[static_cast<std::size_t>(index)]; }
  int num_values() const { return static_cast<int>(values_.size()); }
  bool int16_activations() const { return int16_activations_; }
  bool finished() const { return finished_; }
  const std::vector<int> &inputs() const { return inputs_; }
  int output() const { return output_; }

  Limits limits;
  int num_mixtures = 0; // of experts, among the ops

private:
  friend class Frame;

  // What comes soon after an op, to be fetched meanwhile.
  struct Soon {
    std::vector<std::span<const uint8_t>> weights; // for each thread: of the next op that has any
    Norm norm;                                     // of the next op
  };
  void announce(const Soon &soon);

  ThreadPool &pool_;
  bool int16_activations_;
  int output_ = -1;
  bool finished_ = false;
  std::vector<int> inputs_;
  int64_t last_rows_ = 0; // room in each buffer
  std::vector<Value> values_;
  std::vector<Op> ops_;
  std::vector<Soon> soon_; // for each op
  std::vector<int64_t> buffer_widths_;
  std::vector<Buffer> buffers_;
  Workspace workspace_;
  std::mutex one_run_at_a_time_;
};

} // namespace kvik
