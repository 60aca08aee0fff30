// Experts' activations: f(gate) * up and its variants, in vectors where it is SiLU's plain form.
#pragma once

#include <math.h>

#include "abi.h"
#include "vec.h"

namespace resmoe {

inline float silu(float x, float alpha) { return x / (1.0f + expf(-alpha * x)); }
inline float apply(const Activation& a, float x) {
  if (a.function == kSilu) return silu(x, a.alpha);
  if (a.function == kGelu) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  if (a.function == kGeluTanh) return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  const float positive = std::max(x, 0.0f);
  return positive * positive;
}
// e^x to two units in the last place: 2^n * e^r, |r| <= ln(2) / 2, with Cephes' polynomial for e^r.
inline Floats exp_of(Floats x) {
  const Floats n = to_floats(to_nearest(mul(x, float_set(1.44269504f))));
  Floats r = fma(n, float_set(-0.693359375f), x);
  r = fma(n, float_set(2.12194440e-4f), r);
  Floats p = float_set(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fma(p, r, float_set(c));
  return times_power_of_two(fma(mul(p, r), r, add(r, float_set(1.0f))), n);
}
// x / (1 + e^-x); an infinite e^-x gives 0, and NaN of an infinite x
inline Floats silu(Floats x) {
  const Floats power = exp_of(within(mul(x, float_set(-1.0f)), -87.0f, 89.0f));
  return divided(x, add(power, float_set(1.0f)));
}

// visit(f(gate, up)). NaN stays NaN: std::min and std::max give their first argument then.
template <class Visit>
void with_activation(const Activation& a, Visit visit) {
  const bool limited = a.limit < INFINITY;
  if (!a.gated) return visit([&](float, float up) { return apply(a, up); });
  if (!limited && a.beta == 0) return visit([&](float g, float up) { return apply(a, g) * up; });
  visit([&](float g, float up) {
    const float opened = a.limit_after ? std::min(apply(a, g), a.limit) : apply(a, std::min(g, a.limit));
    return opened * (std::max(std::min(up, a.limit), -a.limit) + a.beta);
  });
}

// to[r] = f(gate[r], up[r]) * weight for `rows` of them; whole vectors are read and written.
inline void activate(const Activation& a, const float* gate, const float* up, float weight, int64_t rows, float* to) {
  const bool plain = a.gated && a.function == kSilu && a.alpha == 1 && a.beta == 0 && !(a.limit < INFINITY);
  if (plain) {
    for (int64_t r = 0; r < rows; r += kWide)
      store_floats(to + r, mul(mul(silu(load_floats(gate + r)), load_floats(up + r)), float_set(weight)));
    return;
  }
  with_activation(a, [&](auto function) {
    for (int64_t r = 0; r < rows; ++r) to[r] = function(gate[r], up[r]) * weight;
  });
}

}  // namespace resmoe
