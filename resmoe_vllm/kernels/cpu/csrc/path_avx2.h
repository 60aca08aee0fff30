// The vectors of integer dots on AVX2: 32 bytes of levels, 8 sums; with AVX-VNNI as path_avx512.h has them.
//
// Without it x stays int16, the even numbers of a quad apart from the odd ones, and so are levels for vpmaddwd.
#pragma once

#include <algorithm>

#include "path_256.h"
#include "path_x86.h"

namespace resmoe {

constexpr int kTileVectors = 2;  // of a tile of products: its sums stay in registers
#ifdef __AVXVNNI__
constexpr int kTileInputs = 2;
#else
constexpr int kTileInputs = 3;
#endif
using Bytes = __m256i;
using Ints = __m256i;
using Floats = Octet;

inline Bytes load_bytes(const uint8_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
inline void store_bytes(uint8_t* to, Bytes v) { _mm256_storeu_si256((__m256i*)to, v); }
inline Bytes byte_set(uint8_t v) { return _mm256_set1_epi8((char)v); }
inline Bytes both(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
inline Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
inline Bytes plus(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
template <int N>  // of 16-bit words
inline Bytes right(Bytes v) {
  return N ? _mm256_srli_epi16(v, N) : v;
}
template <int N>
inline Bytes left(Bytes v) {
  return N ? _mm256_slli_epi16(v, N) : v;
}
inline Bytes table_of(__m128i entries) { return _mm256_broadcastsi128_si256(entries); }
inline Bytes look_up(Bytes table, Bytes index) { return _mm256_shuffle_epi8(table, index); }
inline Bytes low_8(Bytes a, Bytes b) { return _mm256_unpacklo_epi8(a, b); }
inline Bytes high_8(Bytes a, Bytes b) { return _mm256_unpackhi_epi8(a, b); }
inline Bytes low_16(Bytes a, Bytes b) { return _mm256_unpacklo_epi16(a, b); }
inline Bytes high_16(Bytes a, Bytes b) { return _mm256_unpackhi_epi16(a, b); }
inline Bytes low_32(Bytes a, Bytes b) { return _mm256_unpacklo_epi32(a, b); }
inline Bytes high_32(Bytes a, Bytes b) { return _mm256_unpackhi_epi32(a, b); }
// In each 128-bit lane the last word of `before`, then all but the last one of v.
inline Bytes last_word_before(Bytes before, Bytes v) { return _mm256_alignr_epi8(v, before, 12); }
// In each 32-bit word of v all but its last byte, behind the last byte of `before`'s.
inline Bytes last_byte_before(Bytes before, Bytes v) {
  return _mm256_or_si256(_mm256_slli_epi32(v, 8), _mm256_srli_epi32(before, 24));
}
// 16 bytes of each 128-bit lane to `to`, `apart` bytes from one lane to the next.
inline void store_lanes_apart(uint8_t* to, Bytes v, int64_t apart) {
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(v));
  _mm_storeu_si128((__m128i*)(to + apart), _mm256_extracti128_si256(v, 1));
}

// Bytes at - By.. of `size` of them, which bite their tail; zeros beyond. At: from 0 on in steps of whole vectors.
template <int By>
inline Bytes load_window(const uint8_t* from, int64_t size, int64_t at) {
  if (at >= By && at - By + kBytes <= size) return load_bytes(from + at - By);
  if (at == 0 && size >= kBytes) {
    const Bytes own = load_bytes(from);
    const __m128i last = _mm_loadu_si128((const __m128i*)(from + size - 16));
    const Bytes before = _mm256_inserti128_si256(_mm256_castsi128_si256(last), _mm256_castsi256_si128(own), 1);
    return _mm256_alignr_epi8(own, before, 16 - By);
  }
  alignas(32) uint8_t copy[kBytes] = {};
  copy_window<By>(from, size, at, copy, kBytes);
  return load_bytes(copy);
}
// The same of half a vector, each byte in a word of its own.
template <int By>
inline Bytes load_window_of_words(const uint8_t* from, int64_t size, int64_t at) {
  if (at >= By && at - By + kBytes / 2 <= size)
    return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(from + at - By)));
  alignas(16) uint8_t copy[kBytes / 2] = {};
  copy_window<By>(from, size, at, copy, kBytes / 2);
  return _mm256_cvtepu8_epi16(_mm_load_si128((const __m128i*)copy));
}

// Bytes so placed that levels of four rows, interleaved, come to lie in column order; a byte holds Columns columns.
template <int Columns>
inline Bytes turn(Bytes v) {
  if constexpr (Columns == 1) {  // 32-bit words: [4 * lane + q] from [2 * q + lane]
    return _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
  } else {  // units of a lane that belong to the first lane below those of the second; then halves to their lanes
    const __m128i words = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    const __m128i bytes = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m256i apart = _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(Columns == 2 ? words : bytes));
    return _mm256_permute4x64_epi64(apart, _MM_SHUFFLE(3, 1, 2, 0));
  }
}

#ifdef __AVXVNNI__
constexpr bool kHalves = true;
using Levels = Bytes;
inline Levels prepare(Bytes levels) { return levels; }
struct Acc {
  Ints high, low;
};
inline Acc start(Ints from) { return {_mm256_setzero_si256(), from}; }
inline void dot(Acc& acc, Levels levels, Ints first, Ints second) {
  acc.high = _mm256_dpbusd_avx_epi32(acc.high, levels, first);
  acc.low = _mm256_dpbusd_avx_epi32(acc.low, levels, second);
}
inline Ints value(const Acc& acc) { return _mm256_add_epi32(_mm256_slli_epi32(acc.high, 8), acc.low); }
#else
constexpr bool kHalves = false;
struct Levels {
  Bytes even, odd;
};
inline Levels prepare(Bytes levels) {
  return {_mm256_and_si256(levels, _mm256_set1_epi16(255)), _mm256_srli_epi16(levels, 8)};
}
struct Acc {
  Ints all;
};
inline Acc start(Ints from) { return {from}; }
inline void dot(Acc& acc, const Levels& levels, Ints first, Ints second) {
  acc.all = _mm256_add_epi32(
      acc.all, _mm256_add_epi32(_mm256_madd_epi16(levels.even, first), _mm256_madd_epi16(levels.odd, second)));
}
inline Ints value(const Acc& acc) { return acc.all; }
#endif

// Four vectors' sums within 128 bits: [quarters][4].
inline Ints sums_of_quarters(Ints a, Ints b, Ints c, Ints d) {
  const Ints ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  const Ints cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
  return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}
inline void split_quarters(Ints v, FourInts (&to)[kQuarters]) {
  to[0] = _mm256_castsi256_si128(v);
  to[1] = _mm256_extracti128_si256(v, 1);
}
// kWide vectors of words, at row(0), row(1), .., to as many of each one's first, second, .. word, `apart` bytes apart.
template <class Row>
inline void transpose_words(Row row, uint8_t* to, int64_t apart) {
  __m256i rows[8], pairs[8], fours[8];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) rows[r] = load_bytes(row(r));
#pragma GCC unroll 4
  for (int r = 0; r < 8; r += 2) {
    pairs[r] = _mm256_unpacklo_epi32(rows[r], rows[r + 1]);
    pairs[r + 1] = _mm256_unpackhi_epi32(rows[r], rows[r + 1]);
  }
#pragma GCC unroll 2
  for (int r = 0; r < 8; r += 4) {
    fours[r] = _mm256_unpacklo_epi64(pairs[r], pairs[r + 2]);
    fours[r + 1] = _mm256_unpackhi_epi64(pairs[r], pairs[r + 2]);
    fours[r + 2] = _mm256_unpacklo_epi64(pairs[r + 1], pairs[r + 3]);
    fours[r + 3] = _mm256_unpackhi_epi64(pairs[r + 1], pairs[r + 3]);
  }
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) {
    store_bytes(to + w * apart, _mm256_permute2x128_si256(fours[w], fours[w + 4], 0x20));
    store_bytes(to + (w + 4) * apart, _mm256_permute2x128_si256(fours[w], fours[w + 4], 0x31));
  }
}

// Sums of one byte in four, as in_columns() has four rows, of two vectors that stand together, in the order of their
// columns: kWide columns, and those half a chunk behind them. Places: columns of a byte.
template <int Places>
inline void pair_in_column_order(Ints& first, Ints& second) {
  const Ints low = Places == 1 ? first : _mm256_unpacklo_epi32(first, second);
  const Ints high = Places == 1 ? second : _mm256_unpackhi_epi32(first, second);
  first = _mm256_permute2x128_si256(low, high, 0x20);
  second = _mm256_permute2x128_si256(low, high, 0x31);
}
template <int Vectors>
inline void in_column_order(Ints (&v)[Vectors]) {
  order_by_pairs(v, [](Ints& a, Ints& b) { pair_in_column_order<Vectors / 4>(a, b); });
}

inline Ints load_ints(const void* from) { return _mm256_loadu_si256((const __m256i*)from); }
inline void store_ints(int32_t* to, Ints v) { _mm256_storeu_si256((__m256i*)to, v); }
inline Ints int_set(int32_t v) { return _mm256_set1_epi32(v); }
inline Ints larger(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
inline Ints magnitude_bits(Floats v) { return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)); }
inline int32_t largest_of(Ints v) {
  alignas(32) int32_t lanes[kWide];
  _mm256_store_si256((__m256i*)lanes, v);
  return *std::max_element(lanes, lanes + kWide);
}
inline Ints to_nearest(Floats v) { return _mm256_cvtps_epi32(v); }
inline void store_words(int16_t* to, Ints v) {
  _mm_storeu_si128((__m128i*)to, _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
inline Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
inline Floats load_floats(const float* from) { return _mm256_loadu_ps(from); }
inline void store_floats(float* to, Floats v) { _mm256_storeu_ps(to, v); }
inline Floats float_set(float v) { return _mm256_set1_ps(v); }
inline Floats divided(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats within(Floats v, float least, float most) {
  return _mm256_min_ps(float_set(most), _mm256_max_ps(float_set(least), v));
}
inline Floats times_power_of_two(Floats v, Floats n) {  // n from -126 to 127
  return _mm256_mul_ps(
      v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)));
}
// The first `count` of eight, and zeros; nothing beyond them is read.
inline Floats load_floats(const float* from, int64_t count) {
  if (count >= kWide) return load_floats(from);
  const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_maskload_ps(from, inside);
}
inline __m128i load_words(const uint16_t* from, int64_t count) {
  if (count >= kWide) return _mm_loadu_si128((const __m128i*)from);
  uint64_t half[2] = {};
  int filled = 0;  // bits
  const auto take = [&](int64_t words) {
    uint64_t own = 0;
    memcpy(&own, from, 2 * words);
    half[filled / 64] |= own << filled % 64;
    filled += 16 * (int)words;
    from += words;
  };
  if (count & 4) take(4);
  if (count & 2) take(2);
  if (count & 1) take(1);
  return _mm_set_epi64x((int64_t)half[1], (int64_t)half[0]);
}
inline Floats widen_bf16(__m128i w) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(w), 16)); }
inline Floats load_bf16(const uint16_t* from) { return widen_bf16(_mm_loadu_si128((const __m128i*)from)); }
inline Floats load_bf16(const uint16_t* from, int64_t count) { return widen_bf16(load_words(from, count)); }
inline Floats load_fp16(const uint16_t* from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
inline Floats load_fp16(const uint16_t* from, int64_t count) { return _mm256_cvtph_ps(load_words(from, count)); }

// The first `count` of eight. vmaskmovps takes tens of cycles to store on AMD processors.
inline void store_floats(float* to, Floats v, int64_t count) {
  if (count >= kWide) return store_floats(to, v);
  alignas(32) float lanes[kWide];
  store_floats(lanes, v);
  for (int64_t k = 0; k < count; ++k) to[k] = lanes[k];
}
// Four vectors' sums: halves, then pairs two apart, then neighbours.
inline Four sums_of_four(Floats a, Floats b, Floats c, Floats d) {
  const auto half = [](Floats v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); };
  const auto pairs = [](__m128 v, __m128 w) {  // v0 + v2, w0 + w2, v1 + v3, w1 + w3
    return _mm_add_ps(_mm_unpacklo_ps(v, w), _mm_unpackhi_ps(v, w));
  };
  const __m128 ab = pairs(half(a), half(b)), cd = pairs(half(c), half(d));
  return _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
}
}  // namespace resmoe
