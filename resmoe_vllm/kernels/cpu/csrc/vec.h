// Dtypes of weights: as vectors of the path's width, as octets, and one by one.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "path.h"

namespace resmoe {

constexpr int kLanes = 8;  // of an octet

inline int64_t octets_of(int64_t columns) { return (columns + kLanes - 1) / kLanes; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// load(p, count): the first `count` lanes, at most all, and zeros; nothing beyond them is read.
struct BF16 {
  using type = uint16_t;
  static inline Floats load(const type* p) { return load_bf16(p); }
  static inline Floats load(const type* p, int64_t count) { return load_bf16(p, count); }
  static inline float scalar(type w) {
    uint32_t bits = (uint32_t)w << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
};
struct FP16 {
  using type = uint16_t;
  static inline Floats load(const type* p) { return load_fp16(p); }
  static inline Floats load(const type* p, int64_t count) { return load_fp16(p, count); }
  static inline __m256 octet(__m128i w) { return _mm256_cvtph_ps(w); }
  static inline float scalar(type w) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(w))); }
};
struct FP32 {
  using type = float;
  static inline Floats load(const type* p) { return load_floats(p); }
  static inline Floats load(const type* p, int64_t count) { return load_floats(p, count); }
  static inline float scalar(type w) { return w; }
};

// The sum of an octet, in the order of sums_of_four.
inline float sum(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

}  // namespace resmoe
