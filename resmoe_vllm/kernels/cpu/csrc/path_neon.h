// The vectors of ARM64: NEON's by twos, so that lanes, tiles and the order of sums are those of AVX2.
//
// Levels are multiplied by USDOT (i8mm) or SDOT (dotprod), with x as path_avx512.h has it, or, without them, as int16
// with x as AVX2 has it. BFDOT is not used: it rounds between its two products, FMA of widened numbers does not.
#pragma once

#include <arm_neon.h>

#include "path_256.h"

namespace resmoe {

constexpr int kTileVectors = 2, kTileInputs = 2;  // of a tile of products: its sums stay in registers

constexpr bool kCountsBits = false;  // by vectors alone, which takes longer than a look-up
struct Bytes {
  uint8x16_t low, high;
};
struct Ints {
  int32x4_t low, high;
};
struct Floats {
  float32x4_t low, high;
};

inline float half_to_float(uint16_t w) {
  __fp16 half;
  memcpy(&half, &w, 2);
  return half;
}
inline uint16_t float_to_half(float x) {  // to nearest, ties to even
  const __fp16 half = (__fp16)x;
  uint16_t w;
  memcpy(&w, &half, 2);
  return w;
}

// ---- four lanes ----------------------------------------------------------------------------------------------

using Four = float32x4_t;
using FourInts = int32x4_t;
inline Four four_set(float v) { return vdupq_n_f32(v); }
inline Four load_four(const float* from) { return vld1q_f32(from); }
inline void store_four(float* to, Four v) { vst1q_f32(to, v); }
inline Four add(Four a, Four b) { return vaddq_f32(a, b); }
inline Four mul(Four a, Four b) { return vmulq_f32(a, b); }
inline Four fma(Four a, Four b, Four c) { return vfmaq_f32(c, a, b); }
inline FourInts four_ints(int32_t v) { return vdupq_n_s32(v); }
inline FourInts add(FourInts a, FourInts b) { return vaddq_s32(a, b); }
inline Four to_floats(FourInts v) { return vcvtq_f32_s32(v); }

// Eight bf16 numbers of four rows, from `at` on, to eight times four fp32 ones.
inline void four_by_eight(const uint16_t* const (&rows)[4], int64_t at, float* to, int64_t apart) {
  const auto store_pairs = [&](uint16x8_t a, uint16x8_t b, float* into) {  // rows 0 and 1, 2 and 3 of four columns
    const auto words = [](uint16x8_t v) { return vreinterpretq_u32_u16(v); };
    const uint16x8_t low = vreinterpretq_u16_u32(vzip1q_u32(words(a), words(b)));
    const uint16x8_t high = vreinterpretq_u16_u32(vzip2q_u32(words(a), words(b)));
    vst1q_f32(into, vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(low), 16)));
    vst1q_f32(into + apart, vreinterpretq_f32_u32(vshll_high_n_u16(low, 16)));
    vst1q_f32(into + 2 * apart, vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(high), 16)));
    vst1q_f32(into + 3 * apart, vreinterpretq_f32_u32(vshll_high_n_u16(high, 16)));
  };
  const uint16x8_t a = vld1q_u16(rows[0] + at), b = vld1q_u16(rows[1] + at);
  const uint16x8_t c = vld1q_u16(rows[2] + at), d = vld1q_u16(rows[3] + at);
  store_pairs(vzip1q_u16(a, b), vzip1q_u16(c, d), to);
  store_pairs(vzip2q_u16(a, b), vzip2q_u16(c, d), to + 4 * apart);
}

// ---- bytes ---------------------------------------------------------------------------------------------------

inline Bytes load_bytes(const uint8_t* from) { return {vld1q_u8(from), vld1q_u8(from + 16)}; }
inline void store_bytes(uint8_t* to, Bytes v) {
  vst1q_u8(to, v.low);
  vst1q_u8(to + 16, v.high);
}
inline Bytes byte_set(uint8_t v) { return {vdupq_n_u8(v), vdupq_n_u8(v)}; }
inline Bytes both(Bytes a, Bytes b) { return {vandq_u8(a.low, b.low), vandq_u8(a.high, b.high)}; }
inline Bytes either(Bytes a, Bytes b) { return {vorrq_u8(a.low, b.low), vorrq_u8(a.high, b.high)}; }
inline Bytes plus(Bytes a, Bytes b) { return {vaddq_u8(a.low, b.low), vaddq_u8(a.high, b.high)}; }
inline uint16x8_t as_words(uint8x16_t v) { return vreinterpretq_u16_u8(v); }
inline uint32x4_t as_longs(uint8x16_t v) { return vreinterpretq_u32_u8(v); }
inline uint8x16_t as_bytes(uint16x8_t v) { return vreinterpretq_u8_u16(v); }
inline uint8x16_t as_bytes(uint32x4_t v) { return vreinterpretq_u8_u32(v); }
template <int N>  // of 16-bit words
inline Bytes right(Bytes v) {
  if constexpr (N == 0)
    return v;
  else
    return {as_bytes(vshrq_n_u16(as_words(v.low), N)), as_bytes(vshrq_n_u16(as_words(v.high), N))};
}
template <int N>
inline Bytes left(Bytes v) {
  return {as_bytes(vshlq_n_u16(as_words(v.low), N)), as_bytes(vshlq_n_u16(as_words(v.high), N))};
}
// A look-up table of entries that lie in memory.
inline uint8x16_t entries_of_16(const int8_t* from) { return vld1q_u8((const uint8_t*)from); }
inline uint8x16_t entries_of_8(const int8_t* from) { return vcombine_u8(vld1_u8((const uint8_t*)from), vdup_n_u8(0)); }
inline Bytes table_of(uint8x16_t entries) { return {entries, entries}; }
inline Bytes look_up(Bytes table, Bytes index) {
  return {vqtbl1q_u8(table.low, index.low), vqtbl1q_u8(table.low, index.high)};
}
inline Bytes low_8(Bytes a, Bytes b) { return {vzip1q_u8(a.low, b.low), vzip1q_u8(a.high, b.high)}; }
inline Bytes high_8(Bytes a, Bytes b) { return {vzip2q_u8(a.low, b.low), vzip2q_u8(a.high, b.high)}; }
inline Bytes low_16(Bytes a, Bytes b) {
  return {as_bytes(vzip1q_u16(as_words(a.low), as_words(b.low))),
          as_bytes(vzip1q_u16(as_words(a.high), as_words(b.high)))};
}
inline Bytes high_16(Bytes a, Bytes b) {
  return {as_bytes(vzip2q_u16(as_words(a.low), as_words(b.low))),
          as_bytes(vzip2q_u16(as_words(a.high), as_words(b.high)))};
}
inline Bytes low_32(Bytes a, Bytes b) {
  return {as_bytes(vzip1q_u32(as_longs(a.low), as_longs(b.low))),
          as_bytes(vzip1q_u32(as_longs(a.high), as_longs(b.high)))};
}
inline Bytes high_32(Bytes a, Bytes b) {
  return {as_bytes(vzip2q_u32(as_longs(a.low), as_longs(b.low))),
          as_bytes(vzip2q_u32(as_longs(a.high), as_longs(b.high)))};
}
// In each 128-bit lane the last word of `before`, then all but the last one of v.
inline Bytes last_word_before(Bytes before, Bytes v) {
  return {vextq_u8(before.low, v.low, 12), vextq_u8(before.high, v.high, 12)};
}
// In each 32-bit word of v all but its last byte, behind the last byte of `before`'s.
inline Bytes last_byte_before(Bytes before, Bytes v) {
  const auto half = [](uint8x16_t own_before, uint8x16_t own) {
    return vreinterpretq_u8_u32(vsliq_n_u32(vshrq_n_u32(as_longs(own_before), 24), as_longs(own), 8));
  };
  return {half(before.low, v.low), half(before.high, v.high)};
}
// 16 bytes of each 128-bit lane to `to`, `apart` bytes from one lane to the next.
inline void store_lanes_apart(uint8_t* to, Bytes v, int64_t apart) {
  vst1q_u8(to, v.low);
  vst1q_u8(to + apart, v.high);
}

// Bytes at - By.. of `size` of them, which bite their tail; zeros beyond. At: from 0 on in steps of whole vectors.
template <int By>
inline Bytes load_window(const uint8_t* from, int64_t size, int64_t at) {
  if (at >= By && at - By + kBytes <= size) return load_bytes(from + at - By);
  uint8_t copy[kBytes] = {};
  copy_window<By>(from, size, at, copy, kBytes);
  return load_bytes(copy);
}
// The same of half a vector, each byte in a word of its own.
template <int By>
inline Bytes load_window_of_words(const uint8_t* from, int64_t size, int64_t at) {
  const auto in_words = [](uint8x16_t v) -> Bytes {
    return {as_bytes(vmovl_u8(vget_low_u8(v))), as_bytes(vmovl_high_u8(v))};
  };
  if (at >= By && at - By + kBytes / 2 <= size) return in_words(vld1q_u8(from + at - By));
  uint8_t copy[kBytes / 2] = {};
  copy_window<By>(from, size, at, copy, kBytes / 2);
  return in_words(vld1q_u8(copy));
}

// Bytes so placed that levels of four rows, interleaved, come to lie in column order; a byte holds Columns columns.
template <int Columns>
inline Bytes turn(Bytes v) {
  if constexpr (Columns == 1)
    return {as_bytes(vuzp1q_u32(as_longs(v.low), as_longs(v.high))),
            as_bytes(vuzp2q_u32(as_longs(v.low), as_longs(v.high)))};
  else if constexpr (Columns == 2)
    return {as_bytes(vuzp1q_u16(as_words(v.low), as_words(v.high))),
            as_bytes(vuzp2q_u16(as_words(v.low), as_words(v.high)))};
  else
    return {vuzp1q_u8(v.low, v.high), vuzp2q_u8(v.low, v.high)};
}

// ---- integers ------------------------------------------------------------------------------------------------

inline void store_ints(int32_t* to, Ints v) {
  vst1q_s32(to, v.low);
  vst1q_s32(to + 4, v.high);
}
inline Ints load_ints(const void* from) {
  return {vreinterpretq_s32_u8(vld1q_u8((const uint8_t*)from)),
          vreinterpretq_s32_u8(vld1q_u8((const uint8_t*)from + 16))};
}
inline Ints int_set(int32_t v) { return {vdupq_n_s32(v), vdupq_n_s32(v)}; }
inline Ints larger(Ints a, Ints b) { return {vmaxq_s32(a.low, b.low), vmaxq_s32(a.high, b.high)}; }
inline Ints magnitude_bits(Floats v) {
  const auto cut = [](float32x4_t f) { return vandq_s32(vreinterpretq_s32_f32(f), vdupq_n_s32(0x7fffffff)); };
  return {cut(v.low), cut(v.high)};
}
inline int32_t largest_of(Ints v) { return vmaxvq_s32(vmaxq_s32(v.low, v.high)); }
inline Ints to_nearest(Floats v) { return {vcvtnq_s32_f32(v.low), vcvtnq_s32_f32(v.high)}; }
inline void store_words(int16_t* to, Ints v) { vst1q_s16(to, vcombine_s16(vqmovn_s32(v.low), vqmovn_s32(v.high))); }

// ---- dots of levels ------------------------------------------------------------------------------------------

#if defined(__ARM_FEATURE_MATMUL_INT8) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool kHalves = true;
inline int8x16_t as_halves(int32x4_t v) { return vreinterpretq_s8_s32(v); }
#ifdef __ARM_FEATURE_MATMUL_INT8
constexpr int32_t kLevelsLess = 0;
using Levels = Bytes;
inline Levels prepare(Bytes levels) { return levels; }
inline int32x4_t add_dots(int32x4_t sums, uint8x16_t levels, int32x4_t x) {
  return vusdotq_s32(sums, levels, as_halves(x));
}
#else
constexpr int32_t kLevelsLess = 128;  // SDOT takes signed levels
struct Levels {
  int8x16_t low, high;
};
inline Levels prepare(Bytes levels) {
  const Bytes less = {veorq_u8(levels.low, vdupq_n_u8(128)), veorq_u8(levels.high, vdupq_n_u8(128))};
  return {vreinterpretq_s8_u8(less.low), vreinterpretq_s8_u8(less.high)};
}
inline int32x4_t add_dots(int32x4_t sums, int8x16_t levels, int32x4_t x) {
  return vdotq_s32(sums, levels, as_halves(x));
}
#endif
struct Acc {
  Ints high, low;
};
inline Acc start(Ints from) { return {int_set(0), from}; }
inline void dot(Acc& acc, Levels levels, Ints first, Ints second) {
  acc.high.low = add_dots(acc.high.low, levels.low, first.low);
  acc.high.high = add_dots(acc.high.high, levels.high, first.high);
  acc.low.low = add_dots(acc.low.low, levels.low, second.low);
  acc.low.high = add_dots(acc.low.high, levels.high, second.high);
}
inline Ints value(const Acc& acc) {
  return {vaddq_s32(vshlq_n_s32(acc.high.low, 8), acc.low.low), vaddq_s32(vshlq_n_s32(acc.high.high, 8), acc.low.high)};
}
#else
constexpr int32_t kLevelsLess = 0;
constexpr bool kHalves = false;
struct Levels {
  int16x8_t even[2], odd[2];  // of the low 16 bytes, and of the high ones
};
inline Levels prepare(Bytes levels) {
  const auto even = [](uint8x16_t v) { return vreinterpretq_s16_u16(vandq_u16(as_words(v), vdupq_n_u16(255))); };
  const auto odd = [](uint8x16_t v) { return vreinterpretq_s16_u16(vshrq_n_u16(as_words(v), 8)); };
  return {{even(levels.low), even(levels.high)}, {odd(levels.low), odd(levels.high)}};
}
struct Acc {
  int32x4_t pairs[4];  // two sums of each quad
};
inline Acc start(Ints from) {
  const int32x4_t zero = vdupq_n_s32(0);
  return {{vzip1q_s32(from.low, zero), vzip2q_s32(from.low, zero), vzip1q_s32(from.high, zero),
           vzip2q_s32(from.high, zero)}};
}
inline void dot(Acc& acc, const Levels& levels, Ints first, Ints second) {
  const auto add_pairs = [](int32x4_t& low, int32x4_t& high, int16x8_t own, int32x4_t x) {
    const int16x8_t numbers = vreinterpretq_s16_s32(x);
    low = vmlal_s16(low, vget_low_s16(own), vget_low_s16(numbers));
    high = vmlal_high_s16(high, own, numbers);
  };
  add_pairs(acc.pairs[0], acc.pairs[1], levels.even[0], first.low);
  add_pairs(acc.pairs[2], acc.pairs[3], levels.even[1], first.high);
  add_pairs(acc.pairs[0], acc.pairs[1], levels.odd[0], second.low);
  add_pairs(acc.pairs[2], acc.pairs[3], levels.odd[1], second.high);
}
inline Ints value(const Acc& acc) {
  return {vpaddq_s32(acc.pairs[0], acc.pairs[1]), vpaddq_s32(acc.pairs[2], acc.pairs[3])};
}
#endif

// Sums of one byte in four, as in_columns() has four rows, of two vectors that stand together, in the order of their
// columns: kWide columns, and those half a chunk behind them. Places: columns of a byte.
template <int Places>
inline void pair_in_column_order(Ints& first, Ints& second) {
  const Ints a = first, b = second;
  if constexpr (Places == 1) {
    first = {a.low, b.low};
    second = {a.high, b.high};
  } else {
    first = {vzip1q_s32(a.low, b.low), vzip2q_s32(a.low, b.low)};
    second = {vzip1q_s32(a.high, b.high), vzip2q_s32(a.high, b.high)};
  }
}
template <int Vectors>
inline void in_column_order(Ints (&v)[Vectors]) {
  order_by_pairs(v, [](Ints& a, Ints& b) { pair_in_column_order<Vectors / 4>(a, b); });
}
// Four vectors' sums within 128 bits: [quarters][4].
inline Ints sums_of_quarters(Ints a, Ints b, Ints c, Ints d) {
  return {vpaddq_s32(vpaddq_s32(a.low, b.low), vpaddq_s32(c.low, d.low)),
          vpaddq_s32(vpaddq_s32(a.high, b.high), vpaddq_s32(c.high, d.high))};
}
inline void split_quarters(Ints v, FourInts (&to)[kQuarters]) {
  to[0] = v.low;
  to[1] = v.high;
}
// kWide vectors of words, at row(0), row(1), .., to as many of each one's first, second, .. word, `apart` bytes apart.
template <class Row>
inline void transpose_words(Row row, uint8_t* to, int64_t apart) {
  const auto doubles = [](uint32x4_t v) { return vreinterpretq_u64_u32(v); };
  const auto store = [](uint8_t* into, uint64x2_t v) { vst1q_u8(into, vreinterpretq_u8_u64(v)); };
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half)
#pragma GCC unroll 2
    for (int fours = 0; fours < 2; ++fours) {  // of rows
      uint32x4_t rows[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) rows[r] = as_longs(vld1q_u8(row(4 * fours + r) + 16 * half));
      const uint32x4_t low01 = vzip1q_u32(rows[0], rows[1]), high01 = vzip2q_u32(rows[0], rows[1]);
      const uint32x4_t low23 = vzip1q_u32(rows[2], rows[3]), high23 = vzip2q_u32(rows[2], rows[3]);
      uint8_t* into = to + 4 * half * apart + 16 * fours;
      store(into, vzip1q_u64(doubles(low01), doubles(low23)));
      store(into + apart, vzip2q_u64(doubles(low01), doubles(low23)));
      store(into + 2 * apart, vzip1q_u64(doubles(high01), doubles(high23)));
      store(into + 3 * apart, vzip2q_u64(doubles(high01), doubles(high23)));
    }
}

// ---- eight lanes ---------------------------------------------------------------------------------------------

inline Floats to_floats(Ints v) { return {vcvtq_f32_s32(v.low), vcvtq_f32_s32(v.high)}; }
inline Floats load_floats(const float* from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
inline void store_floats(float* to, Floats v) {
  vst1q_f32(to, v.low);
  vst1q_f32(to + 4, v.high);
}
inline Floats float_set(float v) { return {vdupq_n_f32(v), vdupq_n_f32(v)}; }
inline Floats add(Floats a, Floats b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
inline Floats mul(Floats a, Floats b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
inline Floats divided(Floats a, Floats b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
inline Floats within(Floats v, float least, float most) {
  const auto cut = [&](float32x4_t f) { return vminq_f32(vdupq_n_f32(most), vmaxq_f32(vdupq_n_f32(least), f)); };
  return {cut(v.low), cut(v.high)};
}
inline Floats times_power_of_two(Floats v, Floats n) {  // n from -126 to 127
  const auto power = [](float32x4_t f) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(f), vdupq_n_s32(127)), 23));
  };
  return mul(v, {power(n.low), power(n.high)});
}
inline Floats fma(Floats a, Floats b, Floats c) {
  return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
// The first `count` of eight, and zeros; nothing beyond them is read.
inline Floats load_floats(const float* from, int64_t count) {
  if (count >= kWide) return load_floats(from);
  float lanes[kWide] = {};
  for (int64_t k = 0; k < count; ++k) lanes[k] = from[k];
  return load_floats(lanes);
}
// The first `count` of eight.
inline void store_floats(float* to, Floats v, int64_t count) {
  if (count >= kWide) return store_floats(to, v);
  float lanes[kWide];
  store_floats(lanes, v);
  for (int64_t k = 0; k < count; ++k) to[k] = lanes[k];
}
inline uint16x8_t load_words(const uint16_t* from, int64_t count) {
  if (count >= kWide) return vld1q_u16(from);
  uint16_t words[kWide] = {};
  for (int64_t k = 0; k < count; ++k) words[k] = from[k];
  return vld1q_u16(words);
}
inline Floats widen_bf16(uint16x8_t w) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(w), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(w, 16))};
}
inline Floats widen_fp16(uint16x8_t w) {
  const float16x8_t halves = vreinterpretq_f16_u16(w);
  return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}
inline Floats load_bf16(const uint16_t* from) { return widen_bf16(vld1q_u16(from)); }
inline Floats load_bf16(const uint16_t* from, int64_t count) { return widen_bf16(load_words(from, count)); }
inline Floats load_fp16(const uint16_t* from) { return widen_fp16(vld1q_u16(from)); }
inline Floats load_fp16(const uint16_t* from, int64_t count) { return widen_fp16(load_words(from, count)); }

// Four vectors' sums: halves, then pairs two apart, then neighbours.
inline Four sums_of_four(Floats a, Floats b, Floats c, Floats d) {
  const auto half = [](Floats v) { return vreinterpretq_f64_f32(vaddq_f32(v.low, v.high)); };
  const auto pairs = [](float64x2_t v, float64x2_t w) {  // v0 + v2, v1 + v3, w0 + w2, w1 + w3
    return vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(v, w)), vreinterpretq_f32_f64(vzip2q_f64(v, w)));
  };
  return vpaddq_f32(pairs(half(a), half(b)), pairs(half(c), half(d)));
}

using Octet = Floats;
inline Octet octet_set(float v) { return float_set(v); }
inline Octet load_octet(const float* from) { return load_floats(from); }
inline void store_octet(float* to, Octet v) { store_floats(to, v); }
inline void keep_in_register(Octet& v) { asm("" : "+w"(v.low), "+w"(v.high)); }
// The sum of an octet, in the order of sums_of_four.
inline float sum(Octet v) {
  const float32x4_t half = vaddq_f32(v.low, v.high);
  return vpadds_f32(vadd_f32(vget_low_f32(half), vget_high_f32(half)));
}

// Packed values to the lanes that controls name: an entry of a table in bitmap.h. TBL gives zeros beyond its table.
inline Ints spread(uint8x16_t packed, const uint8_t* controls) {
  return {vreinterpretq_s32_u8(vqtbl1q_u8(packed, vld1q_u8(controls))),
          vreinterpretq_s32_u8(vqtbl1q_u8(packed, vld1q_u8(controls + 16)))};
}
inline Octet spread_bf16(const uint16_t* values, const uint8_t* wide) {
  const Ints words = spread(vld1q_u8((const uint8_t*)values), wide);
  return {vreinterpretq_f32_s32(words.low), vreinterpretq_f32_s32(words.high)};
}
inline Octet spread_fp16(const uint16_t* values, const uint8_t* narrow) {
  return widen_fp16(as_words(vqtbl1q_u8(vld1q_u8((const uint8_t*)values), vld1q_u8(narrow))));
}
inline Octet spread_floats(const float* values, const int8_t* lane) {
  const uint8_t four_times[32] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,
                                  4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7};
  const uint8x16_t of_a_float = vreinterpretq_u8_u32(vdupq_n_u32(0x03020100));
  const uint8x16_t lanes = vcombine_u8(vld1_u8((const uint8_t*)lane), vdup_n_u8(0));
  const uint8x16x2_t packed = {{vld1q_u8((const uint8_t*)values), vld1q_u8((const uint8_t*)(values + 4))}};
  const auto spread_half = [&](const uint8_t* times) {
    const uint8x16_t own = vqtbl1q_u8(lanes, vld1q_u8(times));
    return vreinterpretq_f32_u8(vqtbl2q_u8(packed, vorrq_u8(vshlq_n_u8(own, 2), of_a_float)));
  };
  return {spread_half(four_times), spread_half(four_times + 16)};
}
inline Octet spread_codes_of_8(const uint8_t* codes, const uint8_t* top) {  // code - 128 at the top, a half below
  return to_floats(spread(veorq_u8(vcombine_u8(vld1_u8(codes), vdup_n_u8(0)), vdupq_n_u8(128)), top));
}
inline Octet spread_codes_of_4(uint64_t codes, const uint8_t* top) {  // code - 8 in the upper half, a half below
  const uint8x8_t pairs = vcreate_u8(codes);
  const uint8x8_t upper = veor_u8(vzip1_u8(vshl_n_u8(pairs, 4), vand_u8(pairs, vdup_n_u8(0xf0))), vdup_n_u8(0x88));
  return to_floats(spread(vcombine_u8(upper, vdup_n_u8(0)), top));
}

}  // namespace resmoe
