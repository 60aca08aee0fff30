// What all paths of x86 have: four and eight lanes, fp16 numbers one by one, and what spreads packed values.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace resmoe {

// What dot() takes from each level beside the code's bias; images and factors give it back.
constexpr int32_t kLevelsLess = 0;
constexpr bool kCountsBits = true;  // an instruction counts the bits of a number

inline float half_to_float(uint16_t w) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(w))); }
inline uint16_t float_to_half(float x) {  // to nearest, ties to even
  return (uint16_t)_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT), 0);
}

// ---- four lanes ----------------------------------------------------------------------------------------------

using Four = __m128;
using FourInts = __m128i;
inline Four four_set(float v) { return _mm_set1_ps(v); }
inline Four load_four(const float* from) { return _mm_loadu_ps(from); }
inline void store_four(float* to, Four v) { _mm_storeu_ps(to, v); }
inline Four add(Four a, Four b) { return _mm_add_ps(a, b); }
inline Four mul(Four a, Four b) { return _mm_mul_ps(a, b); }
inline Four fma(Four a, Four b, Four c) { return _mm_fmadd_ps(a, b, c); }
inline FourInts four_ints(int32_t v) { return _mm_set1_epi32(v); }
inline FourInts add(FourInts a, FourInts b) { return _mm_add_epi32(a, b); }
inline Four to_floats(FourInts v) { return _mm_cvtepi32_ps(v); }

// Eight bf16 numbers of four rows, from `at` on, to eight times four fp32 ones.
inline void four_by_eight(const uint16_t* const (&rows)[4], int64_t at, float* to, int64_t apart) {
  const auto load = [&](int r) { return _mm_loadu_si128((const __m128i*)(rows[r] + at)); };
  const __m128i zero = _mm_setzero_si128();
  const auto store_pairs = [&](__m128i a, __m128i b, float* into) {  // rows 0 and 1, 2 and 3 of four columns
    const __m128i low = _mm_unpacklo_epi32(a, b), high = _mm_unpackhi_epi32(a, b);
    _mm_storeu_ps(into, _mm_castsi128_ps(_mm_unpacklo_epi16(zero, low)));
    _mm_storeu_ps(into + apart, _mm_castsi128_ps(_mm_unpackhi_epi16(zero, low)));
    _mm_storeu_ps(into + 2 * apart, _mm_castsi128_ps(_mm_unpacklo_epi16(zero, high)));
    _mm_storeu_ps(into + 3 * apart, _mm_castsi128_ps(_mm_unpackhi_epi16(zero, high)));
  };
  const __m128i a = load(0), b = load(1), c = load(2), d = load(3);
  store_pairs(_mm_unpacklo_epi16(a, b), _mm_unpacklo_epi16(c, d), to);
  store_pairs(_mm_unpackhi_epi16(a, b), _mm_unpackhi_epi16(c, d), to + 4 * apart);
}

// ---- eight lanes ---------------------------------------------------------------------------------------------

using Octet = __m256;
inline Octet octet_set(float v) { return _mm256_set1_ps(v); }
inline Octet load_octet(const float* from) { return _mm256_loadu_ps(from); }
inline void store_octet(float* to, Octet v) { _mm256_storeu_ps(to, v); }
inline Octet add(Octet a, Octet b) { return _mm256_add_ps(a, b); }
inline Octet mul(Octet a, Octet b) { return _mm256_mul_ps(a, b); }
inline Octet fma(Octet a, Octet b, Octet c) { return _mm256_fmadd_ps(a, b, c); }
inline void keep_in_register(Octet& v) { asm("" : "+x"(v)); }
// The sum of an octet, in the order of sums_of_four.
inline float sum(Octet v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Packed values to the lanes that controls name: an entry of a table in bitmap.h.
inline Octet spread_bf16(const uint16_t* values, const uint8_t* wide) {
  const __m256i packed = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)values));
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(packed, _mm256_load_si256((const __m256i*)wide)));
}
inline Octet spread_fp16(const uint16_t* values, const uint8_t* narrow) {
  const __m128i control = _mm_load_si128((const __m128i*)narrow);
  return _mm256_cvtph_ps(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)values), control));
}
inline Octet spread_floats(const float* values, const int8_t* lane) {
  const __m256i lanes = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)lane));
  const __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), lanes);
  return _mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(lanes));
}
inline Octet spread_bytes(__m128i packed, const uint8_t* top) {
  const __m256i control = _mm256_load_si256((const __m256i*)top);
  return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(packed), control));
}
inline Octet spread_codes_of_8(const uint8_t* codes, const uint8_t* top) {  // code - 128 at the top, a half below
  return spread_bytes(_mm_xor_si128(_mm_loadl_epi64((const __m128i*)codes), _mm_set1_epi8(-128)), top);
}
inline Octet spread_codes_of_4(uint64_t codes, const uint8_t* top) {  // code - 8 in the upper half, a half below
  return spread_bytes(_mm_cvtsi64_si128(_pdep_u64(codes, 0xf0f0f0f0f0f0f0f0u) ^ 0x8888888888888888u), top);
}

// A look-up table of entries that lie in memory.
inline __m128i entries_of_16(const int8_t* from) { return _mm_load_si128((const __m128i*)from); }
inline __m128i entries_of_8(const int8_t* from) { return _mm_loadl_epi64((const __m128i*)from); }

}  // namespace resmoe
