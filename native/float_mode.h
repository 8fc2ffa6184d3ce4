// The floating-point mode that every op runs in, whatever its caller set.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace kvik {

// While it lives, this thread rounds to nearest, takes denormals as zero and traps nothing; then all is as it was.
// A caller with another rounding mode must not change a bit of a result, and denormals would cost a hundred cycles
// each.
class FloatMode {
public:
#if defined(__x86_64__) || defined(_M_X64)
  FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(kNearestFlushedMasked); }
  ~FloatMode() { _mm_setcsr(saved_); }
#else
  FloatMode() {}
  ~FloatMode() {}
#endif
  FloatMode(const FloatMode &) = delete;
  FloatMode &operator=(const FloatMode &) = delete;

private:
#if defined(__x86_64__) || defined(_M_X64)
  static constexpr unsigned kNearestFlushedMasked = 0x8000 | 0x1f80 | 0x0040; // flush to zero, masks, zero denormals
  unsigned saved_;
#endif
};

} // namespace kvik
