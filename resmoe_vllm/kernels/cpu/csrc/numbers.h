// What a call takes and gives: numbers in a dtype of the ABI, and the threads' shares of them.
#pragma once

#include "abi.h"
#include "vec.h"

namespace resmoe {

inline float load(const uint16_t* from, int32_t dtype, int64_t i) {
  return dtype == kHalf ? FP16::scalar(from[i]) : BF16::scalar(from[i]);
}

// Rounded to nearest, ties to even.
inline void store(void* into, int32_t dtype, int64_t i, float value) {
  if (dtype == kFloat) {
    ((float*)into)[i] = value;
  } else if (dtype == kHalf) {
    ((uint16_t*)into)[i] = float_to_half(value);
  } else {
    ((uint16_t*)into)[i] = BF16::nearest(value);
  }
}

// n numbers from element i on, as fp32.
inline void load_floats(const void* from, int32_t dtype, int64_t i, int64_t n, float* to) {
  if (dtype == kFloat)
    memcpy(to, (const float*)from + i, n * sizeof *to);
  else
    for (int64_t c = 0; c < n; ++c) to[c] = load((const uint16_t*)from, dtype, i + c);
}

struct Span {
  int64_t begin, end;
};
inline Span share(int64_t n, int64_t grain, int thread, int threads) {
  const int64_t blocks = (n + grain - 1) / grain;
  return {std::min(n, blocks * thread / threads * grain), std::min(n, blocks * (thread + 1) / threads * grain)};
}

}  // namespace resmoe
