// Vectors of eight fp32 numbers: loads from every dtype of weights, sums, and the partly filled last one of a row.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

namespace resmoe {

constexpr int kLanes = 8;

inline int64_t octets_of(int64_t columns) { return (columns + kLanes - 1) / kLanes; }

struct BF16 {
  using type = uint16_t;
  static inline __m256 widen(__m128i w) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(w), 16)); }
  static inline __m256 load(const type* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
  static inline float scalar(type w) {
    uint32_t bits = (uint32_t)w << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
};
struct FP16 {
  using type = uint16_t;
  static inline __m256 widen(__m128i w) { return _mm256_cvtph_ps(w); }
  static inline __m256 load(const type* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
  static inline float scalar(type w) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(w))); }
};
struct FP32 {
  using type = float;
  static inline __m256 load(const type* p) { return _mm256_loadu_ps(p); }
  static inline float scalar(type w) { return w; }
};

inline float sum(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// The last n % 8 columns are read with the seven or fewer before them, which the mask clears.
alignas(32) constexpr int32_t kTailMasks[2 * kLanes] = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};
inline __m256 keep_last(__m256 v, int64_t columns) {
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_loadu_si256((const __m256i*)(kTailMasks + columns))));
}
template <class T>
inline __m256 load_tail(const typename T::type* row, int64_t n, int64_t columns) {
  if (n >= kLanes) return keep_last(T::load(row + n - kLanes), columns);
  alignas(32) float lanes[kLanes] = {};
  for (int64_t c = n - columns; c < n; ++c) lanes[kLanes - n + c] = T::scalar(row[c]);
  return _mm256_load_ps(lanes);
}

// What lies in the last, partly filled octet of n columns.
inline __m256i lanes_of(int64_t columns) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)columns), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// The first `columns` of eight. vmaskmovps takes tens of cycles to store on AMD processors.
inline void store_lanes(float* to, __m256 v, int64_t columns) {
  if (columns >= kLanes) return _mm256_storeu_ps(to, v);
  alignas(32) float lanes[kLanes];
  _mm256_store_ps(lanes, v);
  for (int64_t k = 0; k < columns; ++k) to[k] = lanes[k];
}

}  // namespace resmoe
