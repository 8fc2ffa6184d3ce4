#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "float_mode.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace kvik {

namespace {

// Longer than what Python does between two steps: waking a thread that sleeps costs a tenth of a decode step.
constexpr std::chrono::microseconds kSpinTime{400};
constexpr int kSpinsBetweenLooks = 64; // at the clock
constexpr int kYields = 50;
constexpr int64_t kChunksPerThread = 4; // of a range: enough to even out what the system takes from one thread

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#endif
}

// Returns the value once it differs from `old`, sleeping in the kernel only after a while.
uint32_t wait_for_change(const std::atomic<uint32_t> &value, uint32_t old) {
  const auto spin_end = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < kSpinsBetweenLooks; ++i) {
      const uint32_t now = value.load(std::memory_order_acquire);
      if (now != old) return now;
      pause();
    }
  } while (std::chrono::steady_clock::now() < spin_end);
  for (int i = 0; i < kYields; ++i) {
    const uint32_t now = value.load(std::memory_order_acquire);
    if (now != old) return now;
    std::this_thread::yield();
  }
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

// Threads started while it lives get no signals but those of their own faults: the others are for Python's threads, and
// one that a worker takes would not wake the main thread.
class NoSignals {
public:
  NoSignals() {
    sigset_t all;
    sigfillset(&all);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) sigdelset(&all, fault);
    pthread_sigmask(SIG_BLOCK, &all, &before_);
  }
  ~NoSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  NoSignals(const NoSignals &) = delete;
  NoSignals &operator=(const NoSignals &) = delete;

private:
  sigset_t before_;
};

} // namespace

// What different threads write lies on different cache lines.
struct ThreadPool::Shared {
  alignas(64) std::atomic<uint32_t> generation{0};   // counts jobs; sleepers wait for it
  alignas(64) std::atomic<uint64_t> free{0};         // generation in the high half, chunks nobody took in the low
  alignas(64) std::atomic<uint32_t> unfinished{0};   // chunks
  alignas(64) std::atomic<const Job *> job{nullptr}; // of the current generation
  std::atomic<bool> stopping{false};
  std::vector<std::thread> threads;

  // Takes and runs chunks of one generation until none is left, the last chunk first. While a chunk is free or running
  // its job can't be replaced, so a pointer read before a successful exchange is the right one.
  void work(int thread, uint32_t current) {
    uint64_t seen = free.load(std::memory_order_acquire);
    while (static_cast<uint32_t>(seen >> 32) == current && static_cast<uint32_t>(seen) > 0) {
      const Job *task = job.load(std::memory_order_relaxed);
      if (!free.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      (*task)(thread, static_cast<uint32_t>(seen) - 1);
      if (unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished.notify_one();
      seen = free.load(std::memory_order_acquire);
    }
  }
};

ThreadPool::ThreadPool(int num_threads) : num_threads_(std::max(1, num_threads)) {}

ThreadPool::~ThreadPool() {
  if (process_id_ == getpid()) stop(shared_);
}

void ThreadPool::start() {
  Shared *made = new Shared;
  try {
    const NoSignals inherited;
    for (int index = 1; index < num_threads_; ++index) {
      made->threads.emplace_back([made, index] {
        const FloatMode mode;
        for (uint32_t generation = 0; !made->stopping.load(std::memory_order_acquire);) {
          generation = wait_for_change(made->generation, generation);
          made->work(index, generation);
        }
      });
    }
  } catch (...) { // the system has no more threads to give: the next job tries again
    stop(made);
    throw;
  }
  shared_ = made;
  process_id_ = getpid();
}

void ThreadPool::stop(Shared *shared) {
  shared->stopping.store(true, std::memory_order_release);
  shared->generation.fetch_add(1, std::memory_order_release);
  shared->generation.notify_all();
  for (std::thread &thread : shared->threads) thread.join();
  delete shared;
}

void ThreadPool::for_each(int64_t count, const Job &job) {
  if (num_threads_ == 1 || count <= 1) {
    for (int64_t chunk = 0; chunk < count; ++chunk) job(0, chunk);
    return;
  }
  const std::lock_guard lock(one_job_at_a_time_);
  if (process_id_ != getpid()) start();
  const uint32_t generation = shared_->generation.load(std::memory_order_relaxed) + 1;
  shared_->job.store(&job, std::memory_order_relaxed);
  shared_->unfinished.store(static_cast<uint32_t>(count), std::memory_order_relaxed);
  shared_->free.store(static_cast<uint64_t>(generation) << 32 | static_cast<uint32_t>(count),
                      std::memory_order_release);
  shared_->generation.store(generation, std::memory_order_release);
  shared_->generation.notify_all();
  shared_->work(0, generation);
  for (uint32_t left = shared_->unfinished.load(std::memory_order_acquire); left != 0;)
    left = wait_for_change(shared_->unfinished, left);
}

void ThreadPool::for_ranges(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)> &job) {
  const int64_t pieces = (count + grain - 1) / grain, chunks = std::min(pieces, kChunksPerThread * num_threads_);
  for_each(chunks, [&](int, int64_t chunk) {
    job(pieces * chunk / chunks * grain, std::min(pieces * (chunk + 1) / chunks * grain, count));
  });
}

} // namespace kvik
