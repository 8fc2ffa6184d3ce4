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
  FloatMode() : FloatMode(kNearestMasked | kFlushed) {}
  ~FloatMode() { _mm_setcsr(saved_); }
#else
  FloatMode() {}
  ~FloatMode() {}
#endif
  FloatMode(const FloatMode &) = delete;
  FloatMode &operator=(const FloatMode &) = delete;

protected:
#if defined(__x86_64__) || defined(_M_X64)
  static constexpr unsigned kNearestMasked = 0x1f80, kFlushed = 0x8000 | 0x0040; // flush to zero, denormals are zero
  explicit FloatMode(unsigned mode) : saved_(_mm_getcsr()) { _mm_setcsr(mode); }

private:
  unsigned saved_;
#endif
};

// The same with denormals, for what must give the bits that NumPy gives.
class DenormalFloatMode : public FloatMode {
public:
#if defined(__x86_64__) || defined(_M_X64)
  DenormalFloatMode() : FloatMode(kNearestMasked) {}
#endif
};

} // namespace kvik
