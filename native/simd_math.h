// Functions of float lanes that no instruction computes: written once, the same bits from all instruction sets.
#pragma once

#include "simd.h"

namespace {

// e**x = scale * (1 + r * series).
template <class V> struct ExponentialParts {
  V r, series, scale;
};

// x is held above -87.3 and below 88.3; NaN stays NaN: it is the right operand of both bounds, which x86's min and max
// return when either is NaN. Range reduction by ln 2 in two parts (Cody and Waite), then the Taylor polynomial of e**r
// to degree 6 on |r| <= ln(2)/2.
template <class V> inline ExponentialParts<V> exponential_parts(V x) {
  x = min(spread<V>(88.3f), max(spread<V>(-87.3f), x));
  const V n = round_even(x * spread<V>(1.44269504f));
  V r = fma(n, spread<V>(-0.693359375f), x);
  r = fma(n, spread<V>(2.12194440e-4f), r);
  V p = spread<V>(1.0f / 720);
  p = fma(p, r, spread<V>(1.0f / 120));
  p = fma(p, r, spread<V>(1.0f / 24));
  p = fma(p, r, spread<V>(1.0f / 6));
  p = fma(p, r, spread<V>(0.5f));
  p = fma(p, r, spread<V>(1.0f));
  return {r, p, power_of_two(n)};
}

// e**x to about one unit in the last place; below -87.3 it stays at the smallest normal number, about 1e-38.
template <class V> inline V exponential(V x) {
  const ExponentialParts<V> parts = exponential_parts(x);
  return fma(parts.series, parts.r, spread<V>(1.0f)) * parts.scale;
}

// e**x - 1, near 0 too to about a unit in the last place.
template <class V> inline V exponential_less_1(V x) {
  const ExponentialParts<V> parts = exponential_parts(x);
  return fma(parts.series * parts.r, parts.scale, parts.scale - spread<V>(1.0f));
}

// cap * tanh(x / cap), with tanh(y) = 1 - 2 / (1 + exp(2 y)).
template <class V> inline V soft_capped(V x, float cap) {
  const V one = spread<V>(1.0f);
  return spread<V>(cap) * (one - spread<V>(2.0f) / (one + exponential(x * spread<V>(2.0f / cap))));
}

} // namespace
