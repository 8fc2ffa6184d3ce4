#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>

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

// How often the process was forked on the way to this one: getpid would be a system call, and there are 150 jobs in a
// step. Static, so that it is there before any pool.
class Forks {
public:
  Forks() {
    pthread_atfork(nullptr, nullptr, [] { count.fetch_add(1, std::memory_order_relaxed); });
  }
  static inline std::atomic<uint64_t> count{0};
} forks;

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#endif
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

// Of what comes next, the most that a thread fetches while it waits: well within an L2 cache.
constexpr int64_t kMaxAhead = 96 << 10;
// Bytes for each pause. A core drops what it is asked for faster than memory brings it: without pauses most of it.
constexpr int64_t kFetchedAtOnce = 6 * 64;

// A thread's share of a job: neighbouring chunks, of which it takes the first and others the last.
struct alignas(64) Share {
  // Generation, first chunk and the one behind the last: 32, 16 and 16 bits, so that one exchange takes a chunk.
  std::atomic<uint64_t> chunks{0};
  // What the thread reads after the job. Two atomics, so they may come from different announcements: no harm is done.
  std::atomic<const uint8_t *> ahead{nullptr};
  std::atomic<int64_t> ahead_bytes{0};
  std::span<const uint8_t> announced; // for the next job; the caller's

  // What of it was fetched; the thread's own.
  alignas(64) const uint8_t *fetching = nullptr;
  int64_t fetched = 0, wanted = 0;

  static uint64_t packed(uint32_t generation, int64_t first, int64_t last) {
    return static_cast<uint64_t>(generation) << 32 | static_cast<uint64_t>(first) << 16 | static_cast<uint64_t>(last);
  }

  void begin_waiting() {
    const uint8_t *data = ahead.load(std::memory_order_relaxed);
    if (data != fetching) fetching = data, fetched = 0;
    wanted = std::min(kMaxAhead, ahead_bytes.load(std::memory_order_relaxed));
  }
  void wait_a_little() {
    for (const int64_t end = std::min(wanted, fetched + kFetchedAtOnce); fetched < end; fetched += 64)
      __builtin_prefetch(fetching + fetched, 0, 2);
    pause();
  }
};
constexpr int64_t kMaxChunks = 65535; // of one job

// Returns the value once it differs from `old`, sleeping in the kernel only after a while.
uint32_t wait_for_change(const std::atomic<uint32_t> &value, uint32_t old, Share &share) {
  const auto poll = [&](int times, const auto &between) {
    for (int i = 0; i < times; ++i) {
      if (value.load(std::memory_order_acquire) != old) return true;
      between();
    }
    return false;
  };
  share.begin_waiting();
  const auto wait_a_little = [&] { share.wait_a_little(); };
  bool changed = poll(kSpinsBetweenLooks, wait_a_little);
  if (!changed) {
    const auto end = std::chrono::steady_clock::now() + kSpinTime;
    do changed = poll(kSpinsBetweenLooks, wait_a_little);
    while (!changed && std::chrono::steady_clock::now() < end);
  }
  if (!changed && !poll(kYields, std::this_thread::yield)) value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

// What different threads write lies on different cache lines.
struct ThreadPool::Shared {
  explicit Shared(int num_threads) : shares(static_cast<std::size_t>(num_threads)) {}

  alignas(64) std::atomic<uint32_t> generation{0};   // counts jobs; sleepers wait for it
  alignas(64) std::atomic<uint32_t> unfinished{0};   // chunks
  alignas(64) std::atomic<const Job *> job{nullptr}; // of the current generation
  std::atomic<bool> stopping{false};
  std::vector<Share> shares; // one for each thread
  std::vector<std::thread> threads;

  // Runs the chunks of one generation: the thread's own, neighbours one after the other as their data lie in memory,
  // then what is left of others' shares.
  void work(int thread, uint32_t current) {
    const int num_threads = static_cast<int>(shares.size());
    run_chunks(thread, shares[static_cast<std::size_t>(thread)], current, true);
    for (int step = 1; step < num_threads; ++step)
      run_chunks(thread, shares[static_cast<std::size_t>((thread + step) % num_threads)], current, false);
  }

  // While a chunk is free or running its job can't be replaced, so a pointer read before a successful exchange is the
  // right one.
  void run_chunks(int thread, Share &share, uint32_t current, bool from_front) {
    uint64_t seen = share.chunks.load(std::memory_order_acquire);
    for (;;) {
      const int64_t first = seen >> 16 & 0xffff, last = seen & 0xffff;
      if (static_cast<uint32_t>(seen >> 32) != current || first == last) return;
      const Job *task = job.load(std::memory_order_relaxed);
      const uint64_t rest =
          from_front ? Share::packed(current, first + 1, last) : Share::packed(current, first, last - 1);
      if (!share.chunks.compare_exchange_weak(seen, rest, std::memory_order_acq_rel, std::memory_order_acquire))
        continue;
      (*task)(thread, from_front ? first : last - 1);
      if (unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished.notify_one();
      seen = share.chunks.load(std::memory_order_acquire);
    }
  }
};

ThreadPool::ThreadPool(int num_threads) : num_threads_(std::max(1, num_threads)) {}

ThreadPool::~ThreadPool() {
  if (started()) stop(shared_);
}

bool ThreadPool::started() const { return shared_ && forks_ == Forks::count.load(std::memory_order_relaxed); }

void ThreadPool::start() {
  Shared *made = new Shared(num_threads_);
  try {
    const NoSignals inherited;
    for (int index = 1; index < num_threads_; ++index) {
      made->threads.emplace_back([made, index] {
        const FloatMode mode;
        for (uint32_t generation = 0; !made->stopping.load(std::memory_order_acquire);) {
          generation = wait_for_change(made->generation, generation, made->shares[static_cast<std::size_t>(index)]);
          made->work(index, generation);
        }
      });
    }
  } catch (...) { // the system has no more threads to give: the next job tries again
    stop(made);
    throw;
  }
  shared_ = made;
  forks_ = Forks::count.load(std::memory_order_relaxed);
}

void ThreadPool::stop(Shared *shared) {
  shared->stopping.store(true, std::memory_order_release);
  shared->generation.fetch_add(1, std::memory_order_release);
  shared->generation.notify_all();
  for (std::thread &thread : shared->threads) thread.join();
  delete shared;
}

void ThreadPool::for_each(int64_t count, Job job) {
  if (num_threads_ == 1 || count <= 1) {
    for (int64_t chunk = 0; chunk < count; ++chunk) job(0, chunk);
    return;
  }
  const std::lock_guard lock(one_job_at_a_time_);
  if (!started()) start();
  for (int64_t first = 0; first < count; first += kMaxChunks) {
    const int64_t some = std::min(count - first, kMaxChunks);
    if (first == 0 && some == count) {
      run_job(count, job);
    } else {
      run_job(some, [&](int thread, int64_t chunk) { job(thread, first + chunk); });
    }
  }
}

void ThreadPool::run_job(int64_t count, const Job &job) {
  const uint32_t generation = shared_->generation.load(std::memory_order_relaxed) + 1;
  shared_->job.store(&job, std::memory_order_relaxed);
  shared_->unfinished.store(static_cast<uint32_t>(count), std::memory_order_relaxed);
  for (int64_t thread = 0; thread < num_threads_; ++thread) {
    Share &share = shared_->shares[static_cast<std::size_t>(thread)];
    share.ahead.store(share.announced.data(), std::memory_order_relaxed);
    share.ahead_bytes.store(static_cast<int64_t>(share.announced.size()), std::memory_order_relaxed);
    share.announced = {};
    share.chunks.store(Share::packed(generation, count * thread / num_threads_, count * (thread + 1) / num_threads_),
                       std::memory_order_release);
  }
  shared_->generation.store(generation, std::memory_order_release);
  shared_->generation.notify_all();
  shared_->work(0, generation);
  for (uint32_t left = shared_->unfinished.load(std::memory_order_acquire); left != 0;)
    left = wait_for_change(shared_->unfinished, left, shared_->shares[0]);
}

int64_t ThreadPool::num_range_chunks(int64_t pieces) const { return std::min(pieces, kChunksPerThread * num_threads_); }

std::pair<int64_t, int64_t> ThreadPool::own_range(int64_t count, int64_t grain, int thread) const {
  const int64_t pieces = (count + grain - 1) / grain, chunks = std::max<int64_t>(1, num_range_chunks(pieces));
  const auto begin = [&](int64_t of) {
    return std::min(pieces * (chunks * of / num_threads_) / chunks * grain, count);
  };
  return {begin(thread), begin(thread + 1)};
}

void ThreadPool::announce(std::span<const std::span<const uint8_t>> ahead) {
  if (num_threads_ == 1) return;
  const std::lock_guard lock(one_job_at_a_time_);
  if (!started()) return;
  for (std::size_t thread = 0; thread < ahead.size(); ++thread) shared_->shares[thread].announced = ahead[thread];
}

void ThreadPool::for_ranges(int64_t count, int64_t grain, FunctionRef<void(int64_t, int64_t)> job) {
  const int64_t pieces = (count + grain - 1) / grain, chunks = num_range_chunks(pieces);
  for_each(chunks, [&](int, int64_t chunk) {
    job(pieces * chunk / chunks * grain, std::min(pieces * (chunk + 1) / chunks * grain, count));
  });
}

} // namespace kvik
