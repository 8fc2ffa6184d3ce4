#include "program.h"

#include <algorithm>
#include <chrono>

namespace kvik {

namespace {
constexpr int64_t kFewTokens = 4;
} // namespace

float *Frame::operator[](int value) const {
  if (value == program_.output_) return out_;
  return program_.buffers_[program_.value(value).buffer].get<float>(0);
}

int64_t Frame::rows(int value) const { return program_.value(value).of_logits ? step.num_logits : step.num_tokens; }
ThreadPool &Frame::pool() const { return program_.pool_; }
Workspace &Frame::workspace() const { return program_.workspace_; }

int Program::new_value(int64_t width, bool of_logits) {
  values_.push_back({width, of_logits, static_cast<int>(ops_.size())});
  return num_values() - 1;
}

int Program::new_input(int64_t width) {
  inputs_.push_back(new_value(width, false));
  return inputs_.back();
}

void Program::add_op(Op op) {
  for (const int input : op.inputs) values_[static_cast<std::size_t>(input)].last_use = static_cast<int>(ops_.size());
  ops_.push_back(std::move(op));
}

void Program::finish(int output, const std::vector<int> &kept) {
  if (output >= 0) values_[static_cast<std::size_t>(output)].last_use = static_cast<int>(ops_.size());
  for (const int id : kept) values_[static_cast<std::size_t>(id)].last_use = static_cast<int>(ops_.size());
  output_ = output, finished_ = true;
  std::vector<int> holder; // of each buffer: the value that lives there
  for (const int id : inputs_) {
    values_[static_cast<std::size_t>(id)].buffer = holder.size();
    holder.push_back(id);
    buffer_widths_.push_back(value(id).width);
  }
  for (std::size_t index = 0; index < ops_.size(); ++index) {
    for (const int id : ops_[index].outputs) {
      Value &value = values_[static_cast<std::size_t>(id)];
      value.buffer = holder.size();
      for (std::size_t buffer = 0; buffer < holder.size(); ++buffer) {
        const Value &held = values_[static_cast<std::size_t>(holder[buffer])];
        if (id != output && held.last_use < static_cast<int>(index) && buffer_widths_[buffer] == value.width) {
          value.buffer = buffer;
          break;
        }
      }
      if (value.buffer == holder.size()) {
        holder.push_back(id);
        buffer_widths_.push_back(value.width);
      }
      holder[value.buffer] = id;
    }
  }
  buffers_ = std::vector<Buffer>(holder.size());
  for (std::size_t index = 0; index < ops_.size(); ++index) {
    Soon soon{{}, ops_[(index + 1) % ops_.size()].norm};
    for (std::size_t next = 1; next <= ops_.size() && soon.weights.empty(); ++next)
      if (const Op &op = ops_[(index + next) % ops_.size()]; !op.weights.empty())
        for (int thread = 0; thread < pool_.num_threads(); ++thread)
          soon.weights.push_back(first_weights(pool_, op.weights, thread));
    soon_.push_back(std::move(soon));
  }
}

void Program::announce(const Soon &soon) {
  pool_.announce(soon.weights);
  const auto *norm = reinterpret_cast<const uint8_t *>(soon.norm.weight);
  for (int64_t at = 0; norm && at < 4 * soon.norm.width; at += 64) __builtin_prefetch(norm + at);
}

void Program::run(const Step &step, float *out, int first, int last, const std::vector<const float *> &inputs,
                  double *seconds) {
  const std::lock_guard lock(one_run_at_a_time_);
  const int64_t rows = std::max(step.num_tokens, step.num_logits);
  last_rows_ = 0; // should a buffer not be had
  for (std::size_t i = 0; i < buffers_.size(); ++i)
    if (output_ < 0 || i != value(output_).buffer) buffers_[i].get<float>(rows * buffer_widths_[i]);
  last_rows_ = rows;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const Value &input = value(inputs_[i]);
    std::copy_n(inputs[i], step.num_tokens * input.width, buffers_[input.buffer].get<float>(0));
  }
  workspace_.attention.begin_step();
  const Frame frame(*this, step, out);
  auto before = std::chrono::steady_clock::now();
  for (int index = first; index < last; ++index) {
    // With more tokens the time goes into arithmetic, and memory keeps up.
    if (step.num_tokens <= kFewTokens) announce(soon_[static_cast<std::size_t>(index)]);
    ops_[static_cast<std::size_t>(index)].run(frame);
    if (!seconds) continue;
    const auto now = std::chrono::steady_clock::now();
    seconds[index - first] = std::chrono::duration<double>(now - before).count();
    before = now;
  }
}

bool Program::copy_value(int id, int64_t rows, float *out) {
  const std::lock_guard lock(one_run_at_a_time_);
  if (rows > last_rows_) return false;
  std::copy_n(buffers_[value(id).buffer].get<float>(0), rows * value(id).width, out);
  return true;
}

} // namespace kvik
