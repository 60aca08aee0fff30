// The vectors of integer dots on AVX-512 with VNNI and VBMI: 64 bytes of levels, 16 sums.
//
// x is 256 * high + low, both int8: vpdpbusd adds four products of unsigned levels at once, once for each half.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "path_x86.h"

namespace resmoe {

constexpr int kBytes = 64, kWide = 16;
constexpr int kTileVectors = 2, kTileInputs = 3;  // GCC 12 copies the sums of larger tiles from register to register
constexpr int kQuarters = 4;                      // of 128 bits
constexpr int kPieceRows = 128;                   // that are read column by column on the way down with one output
// Whether, for many inputs, rows of codes stand together before they are decoded: of the 256-bit paths.
constexpr bool kPacksFirst = false;
using Bytes = __m512i;
using Ints = __m512i;
using Floats = __m512;

inline Bytes load_bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline void store_bytes(uint8_t* to, Bytes v) { _mm512_storeu_si512(to, v); }
inline Bytes byte_set(uint8_t v) { return _mm512_set1_epi8((char)v); }
inline Bytes both(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
inline Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
inline Bytes plus(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
template <int N>  // of 16-bit words
inline Bytes right(Bytes v) {
  return N ? _mm512_srli_epi16(v, N) : v;
}
template <int N>
inline Bytes left(Bytes v) {
  return N ? _mm512_slli_epi16(v, N) : v;
}
inline Bytes table_of(__m128i entries) { return _mm512_broadcast_i32x4(entries); }
inline Bytes look_up(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }
inline Bytes low_8(Bytes a, Bytes b) { return _mm512_unpacklo_epi8(a, b); }
inline Bytes high_8(Bytes a, Bytes b) { return _mm512_unpackhi_epi8(a, b); }
inline Bytes low_16(Bytes a, Bytes b) { return _mm512_unpacklo_epi16(a, b); }
inline Bytes high_16(Bytes a, Bytes b) { return _mm512_unpackhi_epi16(a, b); }
inline Bytes low_32(Bytes a, Bytes b) { return _mm512_unpacklo_epi32(a, b); }
inline Bytes high_32(Bytes a, Bytes b) { return _mm512_unpackhi_epi32(a, b); }
// In each 128-bit lane the last word of `before`, then all but the last one of v.
inline Bytes last_word_before(Bytes before, Bytes v) { return _mm512_alignr_epi8(v, before, 12); }
Bytes last_byte_before(Bytes before, Bytes v);  // of kPacksFirst alone, as the next one
template <int Places>
void pair_in_column_order(Ints& first, Ints& second);
// 16 bytes of each 128-bit lane to `to`, `apart` bytes from one lane to the next.
inline void store_lanes_apart(uint8_t* to, Bytes v, int64_t apart) {
  _mm_storeu_si128((__m128i*)to, _mm512_castsi512_si128(v));
  _mm_storeu_si128((__m128i*)(to + apart), _mm512_extracti32x4_epi32(v, 1));
  _mm_storeu_si128((__m128i*)(to + 2 * apart), _mm512_extracti32x4_epi32(v, 2));
  _mm_storeu_si128((__m128i*)(to + 3 * apart), _mm512_extracti32x4_epi32(v, 3));
}

// Bytes at - By.. of `size` of them, which bite their tail; zeros beyond. At: from 0 on in steps of whole vectors.
template <int By>
inline Bytes load_window(const uint8_t* from, int64_t size, int64_t at) {
  if (at >= By && at - By + kBytes <= size) return load_bytes(from + at - By);
  const int64_t count = std::min<int64_t>(kBytes, size - at + By);
  __mmask64 inside = count >= 64 ? ~0ull : (1ull << count) - 1;
  if (at == 0) inside &= ~((1ull << By) - 1);
  Bytes v = _mm512_maskz_loadu_epi8(inside, from + at - By);
  if (By == 1 && at == 0) v = _mm512_mask_set1_epi8(v, 1, (char)from[size - 1]);
  if (By == 2 && at == 0) v = _mm512_mask_set1_epi16(v, 1, (short)(from[(2 * size - 2) % size] | from[size - 1] << 8));
  return v;
}
// The same of half a vector, each byte in a word of its own.
template <int By>
inline Bytes load_window_of_words(const uint8_t* from, int64_t size, int64_t at) {
  if (at >= By && at - By + kBytes / 2 <= size)
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(from + at - By)));
  const int64_t count = std::min<int64_t>(kBytes / 2, size - at + By);
  __mmask32 inside = count >= 32 ? ~0u : (1u << count) - 1;
  if (at == 0) inside &= ~((1u << By) - 1);
  __m256i v = _mm256_maskz_loadu_epi8(inside, from + at - By);
  if (By == 1 && at == 0) v = _mm256_mask_set1_epi8(v, 1, (char)from[size - 1]);
  return _mm512_cvtepu8_epi16(v);
}

// Bytes so placed that levels of four rows, interleaved, come to lie in column order; a byte holds Columns columns.
template <int Columns>
inline Bytes turn(Bytes v) {
  if constexpr (Columns == 1) {  // 32-bit words: [4 * lane + q] from [4 * q + lane]
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
  } else if constexpr (Columns == 2) {  // 16-bit words: [8 * lane + 4 * o + q] from [16 * o + 4 * q + lane]
    return _mm512_permutexvar_epi16(_mm512_set_epi16(31, 27, 23, 19, 15, 11, 7, 3, 30, 26, 22, 18, 14, 10, 6, 2, 29, 25,
                                                     21, 17, 13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0),
                                    v);
  } else {  // bytes: [16 * lane + 4 * i + d] from [16 * i + 4 * d + lane]
    static_assert(Columns == 4);
    return _mm512_permutexvar_epi8(
        _mm512_set_epi8(63, 59, 55, 51, 47, 43, 39, 35, 31, 27, 23, 19, 15, 11, 7, 3, 62, 58, 54, 50, 46, 42, 38, 34,
                        30, 26, 22, 18, 14, 10, 6, 2, 61, 57, 53, 49, 45, 41, 37, 33, 29, 25, 21, 17, 13, 9, 5, 1, 60,
                        56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0),
        v);
  }
}

constexpr bool kHalves = true;

using Levels = Bytes;
inline Levels prepare(Bytes levels) { return levels; }
struct Acc {
  Ints high, low;
};
inline Acc start(Ints from) { return {_mm512_setzero_si512(), from}; }
inline void dot(Acc& acc, Levels levels, Ints first, Ints second) {
  acc.high = _mm512_dpbusd_epi32(acc.high, levels, first);
  acc.low = _mm512_dpbusd_epi32(acc.low, levels, second);
}
inline Ints value(const Acc& acc) { return _mm512_add_epi32(_mm512_slli_epi32(acc.high, 8), acc.low); }

// Four vectors' sums within 128 bits: [quarters][4].
inline Ints sums_of_quarters(Ints a, Ints b, Ints c, Ints d) {
  const Ints ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const Ints cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}
inline void split_quarters(Ints v, FourInts (&to)[kQuarters]) {
  to[0] = _mm512_castsi512_si128(v);
  to[1] = _mm512_extracti32x4_epi32(v, 1);
  to[2] = _mm512_extracti32x4_epi32(v, 2);
  to[3] = _mm512_extracti32x4_epi32(v, 3);
}
// kWide vectors of words, at row(0), row(1), .., to as many of each one's first, second, .. word, `apart` bytes apart.
template <class Row>
inline void transpose_words(Row row, uint8_t* to, int64_t apart) {
  __m512i rows[16], pairs[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) rows[r] = load_bytes(row(r));
#pragma GCC unroll 8
  for (int r = 0; r < 16; r += 2) {
    pairs[r] = _mm512_unpacklo_epi32(rows[r], rows[r + 1]);
    pairs[r + 1] = _mm512_unpackhi_epi32(rows[r], rows[r + 1]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 16; r += 4) {  // word w of quarter q of four rows
    rows[r] = _mm512_unpacklo_epi64(pairs[r], pairs[r + 2]);
    rows[r + 1] = _mm512_unpackhi_epi64(pairs[r], pairs[r + 2]);
    rows[r + 2] = _mm512_unpacklo_epi64(pairs[r + 1], pairs[r + 3]);
    rows[r + 3] = _mm512_unpackhi_epi64(pairs[r + 1], pairs[r + 3]);
  }
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) {
    const __m512i low01 = _mm512_shuffle_i32x4(rows[w], rows[4 + w], _MM_SHUFFLE(2, 0, 2, 0));   // quarters 0, 2
    const __m512i high01 = _mm512_shuffle_i32x4(rows[w], rows[4 + w], _MM_SHUFFLE(3, 1, 3, 1));  // quarters 1, 3
    const __m512i low23 = _mm512_shuffle_i32x4(rows[8 + w], rows[12 + w], _MM_SHUFFLE(2, 0, 2, 0));
    const __m512i high23 = _mm512_shuffle_i32x4(rows[8 + w], rows[12 + w], _MM_SHUFFLE(3, 1, 3, 1));
    store_bytes(to + w * apart, _mm512_shuffle_i32x4(low01, low23, _MM_SHUFFLE(2, 0, 2, 0)));
    store_bytes(to + (4 + w) * apart, _mm512_shuffle_i32x4(high01, high23, _MM_SHUFFLE(2, 0, 2, 0)));
    store_bytes(to + (8 + w) * apart, _mm512_shuffle_i32x4(low01, low23, _MM_SHUFFLE(3, 1, 3, 1)));
    store_bytes(to + (12 + w) * apart, _mm512_shuffle_i32x4(high01, high23, _MM_SHUFFLE(3, 1, 3, 1)));
  }
}

// Lane l of vector q to lane q of vector l.
inline void swap_lanes(Ints& a, Ints& b, Ints& c, Ints& d) {
  const Ints even_ab = _mm512_shuffle_i32x4(a, b, _MM_SHUFFLE(2, 0, 2, 0));
  const Ints odd_ab = _mm512_shuffle_i32x4(a, b, _MM_SHUFFLE(3, 1, 3, 1));
  const Ints even_cd = _mm512_shuffle_i32x4(c, d, _MM_SHUFFLE(2, 0, 2, 0));
  const Ints odd_cd = _mm512_shuffle_i32x4(c, d, _MM_SHUFFLE(3, 1, 3, 1));
  a = _mm512_shuffle_i32x4(even_ab, even_cd, _MM_SHUFFLE(2, 0, 2, 0));
  b = _mm512_shuffle_i32x4(odd_ab, odd_cd, _MM_SHUFFLE(2, 0, 2, 0));
  c = _mm512_shuffle_i32x4(even_ab, even_cd, _MM_SHUFFLE(3, 1, 3, 1));
  d = _mm512_shuffle_i32x4(odd_ab, odd_cd, _MM_SHUFFLE(3, 1, 3, 1));
}
// Sums of one byte in four, as in_columns() has four rows, in the order of their columns; of Places columns a byte:
// vector Places * q + j has column j of the bytes.
inline void in_column_order(Ints (&v)[4]) { swap_lanes(v[0], v[1], v[2], v[3]); }
inline void in_column_order(Ints (&v)[8]) {
  Ints fours[8];  // of four columns in each lane, [2 * q + half]
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    fours[2 * q] = _mm512_unpacklo_epi32(v[2 * q], v[2 * q + 1]);
    fours[2 * q + 1] = _mm512_unpackhi_epi32(v[2 * q], v[2 * q + 1]);
  }
  swap_lanes(fours[0], fours[1], fours[2], fours[3]);
  swap_lanes(fours[4], fours[5], fours[6], fours[7]);
#pragma GCC unroll 4
  for (int l = 0; l < 4; ++l) {
    v[2 * l] = fours[l];
    v[2 * l + 1] = fours[4 + l];
  }
}

inline Ints load_ints(const void* from) { return _mm512_loadu_si512(from); }
inline void store_ints(int32_t* to, Ints v) { _mm512_storeu_si512(to, v); }
inline Ints int_set(int32_t v) { return _mm512_set1_epi32(v); }
inline Ints larger(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
inline Ints magnitude_bits(Floats v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)); }
inline int32_t largest_of(Ints v) { return _mm512_reduce_max_epi32(v); }
inline Ints to_nearest(Floats v) { return _mm512_cvtps_epi32(v); }
inline void store_words(int16_t* to, Ints v) { _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(v)); }
inline Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
inline void store_floats(float* to, Floats v) { _mm512_storeu_ps(to, v); }
inline Floats float_set(float v) { return _mm512_set1_ps(v); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats divided(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats within(Floats v, float least, float most) {
  return _mm512_min_ps(float_set(most), _mm512_max_ps(float_set(least), v));
}
inline Floats times_power_of_two(Floats v, Floats n) { return _mm512_scalef_ps(v, n); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// The first `count` of n lanes, all of them if there are more.
inline __mmask16 first_of_16(int64_t count) { return count >= 16 ? 0xffff : (1u << count) - 1; }
inline __mmask32 first_of_32(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }
// These, and zeros; nothing beyond them is read.
inline Floats load_floats(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first_of_16(count), from); }
inline Floats widen_bf16(__m256i w) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(w), 16)); }
inline __m256i load_words(const uint16_t* from, int64_t count) {
  return _mm256_maskz_loadu_epi16(first_of_16(count), from);
}
inline Floats load_bf16(const uint16_t* from) { return widen_bf16(_mm256_loadu_si256((const __m256i*)from)); }
inline Floats load_bf16(const uint16_t* from, int64_t count) { return widen_bf16(load_words(from, count)); }
inline Floats load_fp16(const uint16_t* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
inline Floats load_fp16(const uint16_t* from, int64_t count) { return _mm512_cvtph_ps(load_words(from, count)); }

inline void store_floats(float* to, Floats v, int64_t count) { _mm512_mask_storeu_ps(to, first_of_16(count), v); }
// Four vectors' sums: halves, halves of these, then pairs two apart, then neighbours.
inline Four sums_of_four(Floats a, Floats b, Floats c, Floats d) {
  const auto halves = [](Floats v, Floats w) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(v, w, _MM_SHUFFLE(1, 0, 1, 0)),
                         _mm512_shuffle_f32x4(v, w, _MM_SHUFFLE(3, 2, 3, 2)));
  };
  const Floats ab = halves(a, b), cd = halves(c, d);  // of each two halves, four lanes each
  Floats v = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, _MM_SHUFFLE(2, 0, 2, 0)),
                           _mm512_shuffle_f32x4(ab, cd, _MM_SHUFFLE(3, 1, 3, 1)));
  v = _mm512_add_ps(v, _mm512_permute_ps(v, _MM_SHUFFLE(3, 2, 3, 2)));
  v = _mm512_add_ps(v, _mm512_permute_ps(v, _MM_SHUFFLE(1, 1, 1, 1)));
  return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, v));
}
}  // namespace resmoe
