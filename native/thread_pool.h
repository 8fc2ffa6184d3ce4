// Threads of our own: no OpenMP, whose two common runtimes clash inside one process.
#pragma once

#include <cstdint>
#include <mutex>
#include <span>
#include <utility>

namespace kvik {

// A function that its caller keeps for as long as it is called: two words, nothing is copied or allocated.
template <class Signature> class FunctionRef;
template <class... Arguments> class FunctionRef<void(Arguments...)> {
public:
  template <class Function> FunctionRef(const Function &function) // NOLINT: implicit, as of std::function
      : function_(&function),
        call_([](const void *kept, Arguments... arguments) { (*static_cast<const Function *>(kept))(arguments...); }) {}
  void operator()(Arguments... arguments) const { call_(function_, arguments...); }

private:
  const void *function_;
  void (*call_)(const void *, Arguments...);
};

// Runs one job at a time on up to `num_threads` threads, the caller's among them. A job is cut into chunks. Each thread
// has neighbouring ones for its own, takes them one by one, and then those that others have not come to; the caller
// waits only for chunks that another thread has taken. So data are read in the order they lie in, and a thread that the
// system does not schedule costs its share of speed, and nothing more. Idle threads spin for some tens of microseconds,
// yield, then sleep. After a fork the child starts its own threads at the next job; forking while another thread runs a
// job leaves the child's pool locked.
class ThreadPool {
public:
  // Called with (thread index, chunk) for each chunk; must not throw.
  using Job = FunctionRef<void(int, int64_t)>;

  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool &) = delete;
  ThreadPool &operator=(const ThreadPool &) = delete;

  int num_threads() const { return num_threads_; }

  // Chunks 0 ... count-1, each its own task; for tasks of unequal cost.
  void for_each(int64_t count, Job job);

  // Ranges that cover [0, count), cut at multiples of `grain`.
  void for_ranges(int64_t count, int64_t grain, FunctionRef<void(int64_t, int64_t)> job);

  // The part of [0, count) that `for_ranges` of so much gives this thread first.
  std::pair<int64_t, int64_t> own_range(int64_t count, int64_t grain, int thread) const;

  // Says for each thread what it reads after the next job. It fetches the beginning whenever it waits from then on:
  // memory would stand idle while a job ends and the one after it is prepared. Any address will do, nothing is read
  // through it.
  void announce(std::span<const std::span<const uint8_t>> ahead);

private:
  int64_t num_range_chunks(int64_t pieces) const;

  // Apart from the pool, because a forked child has no use for its copy: the threads exist in the parent only, and
  // their handles can be neither joined nor destroyed. The child leaks it and makes its own.
  struct Shared;
  bool started() const; // by this process
  void start();
  void run_job(int64_t count, const Job &job);
  static void stop(Shared *shared);

  int num_threads_;
  uint64_t forks_ = 0; // of the process when the threads were started
  std::mutex one_job_at_a_time_;
  Shared *shared_ = nullptr;
};

} // namespace kvik
