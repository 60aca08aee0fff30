// Rows of a bitmap and its kept values: decoded to fp32, or multiplied while they are decoded.
#pragma once

#include <type_traits>

#include "abi.h"
#include "dense.h"

namespace resmoe {

// mask byte -> shuffle controls that spread packed values to their lanes
struct ShuffleTable {
  alignas(32) uint8_t wide[256][32];    // to the upper half of 32-bit lanes: bf16 becomes fp32 by that alone
  alignas(16) uint8_t narrow[256][16];  // to 16-bit lanes
  alignas(32) uint8_t top[256][32];     // bytes to the top of 32-bit lanes, the ninth one below each
  alignas(8) int8_t lane[256][8];       // source of each 32-bit lane, negative where there is none
  uint8_t count[256];                   // of kept values
  ShuffleTable() {
    for (int m = 0; m < 256; ++m)
      for (int to = 0, next = 0; to < kLanes; ++to) {
        const bool kept = m >> to & 1;
        const uint8_t low = kept ? 2 * next : 0x80, high = kept ? 2 * next + 1 : 0x80;
        wide[m][4 * to] = wide[m][4 * to + 1] = 0x80;
        wide[m][4 * to + 2] = narrow[m][2 * to] = low;
        wide[m][4 * to + 3] = narrow[m][2 * to + 1] = high;
        top[m][4 * to] = top[m][4 * to + 1] = 0x80;
        top[m][4 * to + 2] = kept ? 8 : 0x80;
        top[m][4 * to + 3] = kept ? next : 0x80;
        lane[m][to] = kept ? next : -1;
        next += kept;
        count[m] = next;
      }
  }
};
const ShuffleTable kShuffle;

// What stands for a kept value: the layer's dtype or a code. level = scale / kOne * value, where value is an odd
// number, so that 0 is left for columns that are not kept.
struct Kept8 {
  using type = uint8_t;
  static constexpr float kOne = 1 << 24;
  static inline float scalar(type code) { return kOne * (code - 127.5f); }
};
struct Kept4 {
  using type = uint8_t;
  static constexpr float kOne = 1 << 28;
  static inline float scalar(type code) { return kOne * (code - 7.5f); }
};
struct Nibbles {  // a pointer to 4-bit codes, the low half of a byte first
  const uint8_t* from;
  int64_t at;
  uint8_t operator*() const { return from[at >> 1] >> 4 * (at & 1) & 15; }
  void operator+=(int64_t n) { at += n; }
  Nibbles operator+(int64_t n) const { return {from, at + n}; }
  int64_t operator-(const Nibbles& other) const { return 2 * (from - other.from) + at - other.at; }
};
template <class V>
struct CursorTo {
  using type = const typename V::type*;
};
template <>
struct CursorTo<Kept4> {
  using type = Nibbles;
};
template <class V>
using Cursor = typename CursorTo<V>::type;
template <class V>
constexpr bool kCoded = std::is_same_v<V, Kept8> || std::is_same_v<V, Kept4>;
inline const char* address(const void* values) { return (const char*)values; }
inline const char* address(const Nibbles& values) { return (const char*)values.from + (values.at >> 1); }

// Eight columns from packed values, of which it reads 8 (bf16, fp16: 16; fp32: 32) bytes. entry: the mask byte times
// kEntry, the wide tables' offset.
constexpr int kEntry = sizeof ShuffleTable::wide[0];
template <class V>
inline Octet expand8(Cursor<V> values, uint64_t entry);
template <>
inline Octet expand8<BF16>(const uint16_t* values, uint64_t entry) {
  return spread_bf16(values, kShuffle.wide[0] + entry);
}
template <>
inline Octet expand8<FP16>(const uint16_t* values, uint64_t entry) {
  return spread_fp16(values, kShuffle.narrow[entry / kEntry]);
}
template <>
inline Octet expand8<FP32>(const float* values, uint64_t entry) {
  return spread_floats(values, kShuffle.lane[entry / kEntry]);
}
template <>
inline Octet expand8<Kept8>(const uint8_t* values, uint64_t entry) {
  return spread_codes_of_8(values, kShuffle.top[0] + entry);
}
template <>
inline Octet expand8<Kept4>(Nibbles values, uint64_t entry) {
  uint64_t codes;
  memcpy(&codes, address(values), 8);
  return spread_codes_of_4(codes >> 4 * (values.at & 1), kShuffle.top[0] + entry);
}

// Unpacks a row, 64 columns at a time: begin() with their mask, then octet(0) to octet(7), in this order. Reads up to
// 72 values from `values` on, which moves to the next columns' first.
template <class V>
struct Unpacker {
  Cursor<V> values;
  uint64_t word;  // the mask, turned so that an octet's byte comes to lie at its table entry

  __attribute__((always_inline)) inline void begin(const uint8_t* mask) {
    memcpy(&word, mask, 8);
    static_assert(kEntry == 1 << 5);
    word = word << 5 | word >> 59;
  }
  __attribute__((always_inline)) inline Octet octet(int j) {
    uint64_t entry = (word >> 8 * j | word << (64 - 8 * j) % 64) & 255 * kEntry;
    asm("" : "+r"(entry));  // one number serves as offset and for counting: compilers would make two
    const Octet w = expand8<V>(values, entry);
    values += kCountsBits ? __builtin_popcountll(entry) : kShuffle.count[entry / kEntry];
    return w;
  }
};

template <class V>
struct BitmapRow {
  const uint8_t* mask;
  Cursor<V> values;
  int64_t readable;        // elements that may be read from values on
  const uint16_t* scales;  // of codes: one for each group of columns
  int64_t group;
  float scale(int64_t c) const { return BF16::scalar(scales[c / group]) * (1.0f / V::kOne); }
  // Columns that vectors may take: none of a row at the buffer's very end, or where groups end within 32 columns.
  int64_t vectors(int64_t n) const {
    if constexpr (kCoded<V>)
      if (group < n && group % 32) return 0;
    return readable >= n + 72 ? n / 64 * 64 : 0;
  }
};

template <class V>
BitmapRow<V> locate(const Bitmap& part, int p, int64_t mask_bytes, int64_t e, int64_t i, int64_t n) {
  const uint8_t* mask = part.mask[p] + e * part.mask_stride[p] + i * mask_bytes;
  int64_t start =
      part.starts ? part.starts[e * part.starts_stride] : e * part.values_stride[p];  // elements, of codes bytes
  int64_t first = part.row_ptr[p] ? part.row_ptr[p][e * part.row_ptr_stride[p] + i]
                  : kCoded<V>     ? 0
                                  : i * part.values_per_row;
  if constexpr (!kCoded<V>) {
    start += first;
    return {mask, (Cursor<V>)part.values[p] + start, part.readable[p] - start, nullptr, n};
  } else {
    if (!part.row_ptr[p]) start += i * part.bits * octets_of(part.values_per_row);
    const int64_t group = std::min(part.group, n), groups = (n + group - 1) / group;
    const uint16_t* scales = part.scales[p] + e * part.scales_stride[p] + i * groups;
    const uint8_t* codes = (const uint8_t*)part.values[p] + start;
    const int64_t readable = (part.readable[p] - start) * 8 / part.bits - first;
    if constexpr (std::is_same_v<V, Kept4>)
      return {mask, {codes, first}, readable, scales, group};
    else
      return {mask, codes + first, readable, scales, group};
  }
}

// Rows that stand together, and where the ones begin that are read after them: few inputs leave time to fetch those.
template <class V, int R>
struct BitmapRows {
  Unpacker<V> packed[R];
  const BitmapRow<V>* rows;
  int64_t mask_ahead, values_ahead;  // from a row to the one R rows on
  int64_t scaled = 0;                // codes: where columns end that share the scales at hand
  Octet scale[R][2];                 // of the first 32 columns at hand, of the others
  BitmapRows(const BitmapRow<V>* rows, const BitmapRow<V>& next)
      : rows(rows), mask_ahead(next.mask - rows->mask), values_ahead(next.values - rows->values) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      packed[r].values = rows[r].values;
      scale[r][0] = scale[r][1] = octet_set(0);
    }
  }
  __attribute__((always_inline)) inline void begin(int64_t c) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      fetch(address(packed[r].values + values_ahead));
      if (c % 512 == 0) fetch(rows[r].mask + mask_ahead + c / 8);
      packed[r].begin(rows[r].mask + c / 8);
    }
    if constexpr (kCoded<V>)
      if (c + 64 > scaled) {
        const int64_t group = rows->group;
        scaled = c / group == (c + 32) / group ? (c / group + 1) * group : 0;
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) scale[r][half] = octet_set(rows[r].scale(c + 32 * half));
      }
  }
  __attribute__((always_inline)) inline Octet octet(int r, int j) {
    const Octet w = packed[r].octet(j);
    if constexpr (kCoded<V>) return mul(w, scale[r][j / 4]);
    return w;
  }
  // rest(r, k, value) for the kept columns k from c on
  template <class Rest>
  __attribute__((always_inline)) inline void tail(int64_t c, int64_t n, Rest rest) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
      for (int64_t k = c; k < n; ++k)
        if (rows[r].mask[k / 8] >> (k & 7) & 1) {
          float w = V::scalar(*packed[r].values);
          if constexpr (kCoded<V>) w *= rows[r].scale(k);
          packed[r].values += 1;
          rest(r, k, w);
        }
  }
};

// Whether rows are decoded to the dtype of their values, 32 columns an instruction, and never in octets.
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__) && defined(__AVX512VL__)
template <class V>
constexpr bool kAsStored = sizeof(typename V::type) == 2;

// Whole 64 columns are written.
template <class V>
inline void decode_as_stored(const BitmapRow<V>& row, int64_t n, uint16_t* out) {
  constexpr int kAhead = 1024;
  const uint16_t* values = row.values;
  const uint16_t* end = values + row.readable;
  for (int64_t c = 0; c < n; c += 64) {
    fetch(values + kAhead);  // rows lie one behind the other
    if (c % 512 == 0) fetch(row.mask + c / 8 + kAhead);
    uint64_t word;
    memcpy(&word, row.mask + c / 8, 8);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, word >>= 32) {
      const int count = __builtin_popcount((uint32_t)word);
      const __m512i packed =
          end - values >= 32 ? _mm512_loadu_si512(values) : _mm512_maskz_loadu_epi16(first_of_32(count), values);
      _mm512_storeu_si512(out + c + 32 * half, _mm512_maskz_expand_epi16((__mmask32)word, packed));
      values += count;
    }
  }
}

// Four rows of 16-bit values that stand together, 32 columns at a time, for few inputs or outputs: they are multiplied
// where they are expanded. Reads up to 32 values behind a row's last.
constexpr int kExpanded = 4;
template <class V>
struct Expander {
  const uint16_t* values[kExpanded];
  const uint8_t* mask;
  int64_t apart;  // from one row's mask to the next

  // Whether so much may be read.
  static bool fits(const BitmapRow<V> (&rows)[kExpanded], int64_t n) {
    for (const BitmapRow<V>& row : rows)
      if (row.readable < n + 32) return false;
    return true;
  }
  explicit Expander(const BitmapRow<V>* rows) : mask(rows[0].mask), apart(rows[1].mask - rows[0].mask) {
    for (int r = 0; r < kExpanded; ++r) values[r] = rows[r].values;
  }
  // The rows behind these, before each 64 columns.
  __attribute__((always_inline)) inline void fetch_ahead(int64_t c) {
    constexpr int kAhead = 2048;
#pragma GCC unroll 4
    for (int r = 0; r < kExpanded; ++r) {
      fetch(values[r] + kAhead);
      if (c % 512 == 0) fetch(mask + (kExpanded + r) * apart + c / 8);
    }
  }
  __attribute__((always_inline)) inline __m512i next(int r, int64_t c) {
    uint32_t own;
    memcpy(&own, mask + r * apart + c / 8, 4);
    const __m512i w = _mm512_maskz_expand_epi16(own, _mm512_loadu_si512(values[r]));
    values[r] += __builtin_popcount(own);
    return w;
  }
};

#ifdef __AVX512BF16__
// sums[sum[s] * ld + r] += row r . x[s] in the order of dot_tile<Bf16Pairs>.
template <int S>
__attribute__((noinline)) void dot_expanded(const BitmapRow<BF16>* rows, int64_t n, const uint16_t* const* x,
                                            const int32_t* sum, float* sums, int64_t ld) {
  constexpr int R = kExpanded;
  Expander<BF16> at(rows);
  for (int64_t begin = 0; begin < n; begin += Bf16Pairs::kDotColumns) {
    const int64_t stop = std::min(n, begin + Bf16Pairs::kDotColumns);
    Floats acc[R][S];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) acc[r][s] = float_set(0);
    const auto add_columns = [&](int64_t c) __attribute__((always_inline)) {
      __m512i in[S];
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) in[s] = Bf16Pairs::numbers(x[s] + c);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512i w = at.next(r, c);
#pragma GCC unroll 2
        for (int s = 0; s < S; ++s) acc[r][s] = Bf16Pairs::multiply(acc[r][s], w, in[s]);
      }
    };
    for (int64_t c = begin; c < stop; c += 64) {
      at.fetch_ahead(c);
      add_columns(c);
      if (c + 32 < stop) add_columns(c + 32);
    }
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) {
      alignas(16) float totals[4];
      _mm_store_ps(totals, sums_of_four(acc[0][s], acc[1][s], acc[2][s], acc[3][s]));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[sum[s] * ld + r] += totals[r];
    }
  }
}
#endif

// Numbers as axpy_expanded takes them: of each 32 the even ones, then the odd ones; zeros beyond n.
inline __m512i even_or_odd(int odd) {
  return _mm512_add_epi32(_mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 1),
                          int_set(odd));
}
inline void to_pairs(const float* y, int64_t n, float* pairs) {
  const __m512i even = even_or_odd(0), odd = even_or_odd(1);
  for (int64_t c = 0; c < n; c += 2 * kWide) {
    const Floats first = load_floats(y + c, n - c),
                 second = load_floats(y + c + kWide, std::max(int64_t(0), n - c - kWide));
    store_floats(pairs + c, _mm512_permutex2var_ps(first, even, second));
    store_floats(pairs + c + kWide, _mm512_permutex2var_ps(first, odd, second));
  }
}
inline void from_pairs(const float* pairs, int64_t n, float* y) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, int_set(8));
  for (int64_t c = 0; c < n; c += 2 * kWide) {
    const Floats even = load_floats(pairs + c), odd = load_floats(pairs + c + kWide);
    store_floats(y + c, _mm512_permutex2var_ps(even, first, odd), n - c);
    if (n - c > kWide) store_floats(y + c + kWide, _mm512_permutex2var_ps(even, second, odd), n - c - kWide);
  }
}

// y += a[r] * row r, row after row; y: to_pairs'. A pair of bf16 becomes two fp32 numbers without a shuffle.
inline __attribute__((noinline)) void axpy_expanded(const float* a, const BitmapRow<BF16>* rows, int64_t n, float* y) {
  Expander<BF16> at(rows);
  Floats factor[kExpanded];
#pragma GCC unroll 4
  for (int r = 0; r < kExpanded; ++r) factor[r] = float_set(a[r]);
  const __m512i upper = int_set((int32_t)0xffff0000);
  for (int64_t c = 0; c < n; c += 32) {
    if (c % 64 == 0) at.fetch_ahead(c);
    Floats even = load_floats(y + c), odd = load_floats(y + c + kWide);
#pragma GCC unroll 4
    for (int r = 0; r < kExpanded; ++r) {
      const __m512i w = at.next(r, c);
      even = fma(factor[r], _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), even);
      odd = fma(factor[r], _mm512_castsi512_ps(_mm512_and_si512(w, upper)), odd);
    }
    store_floats(y + c, even);
    store_floats(y + c + kWide, odd);
  }
}
#else
template <class V>
constexpr bool kAsStored = false;
template <class V>
inline void decode_as_stored(const BitmapRow<V>&, int64_t, uint16_t*) {}
#endif

template <class V>
void decode_row(const BitmapRow<V>& row, int64_t n, float* out) {
  if constexpr (kAsStored<V>) {
    std::vector<uint16_t> stored(round_up(n, 64));
    decode_as_stored(row, n, stored.data());
    for (int64_t c = 0; c < n; ++c) out[c] = V::scalar(stored[c]);
    return;
  }
  BitmapRows<V, 1> at(&row, row);
  const int64_t vectors = row.vectors(n);
  for (int64_t c = 0; c < vectors; c += 64) {
    at.begin(c);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) store_octet(out + c + kLanes * j, at.octet(0, j));
  }
  std::fill(out + vectors, out + n, 0.0f);
  at.tail(vectors, n, [&](int, int64_t k, float w) { out[k] = w; });
}

// The sum of a vector that one or two octets are, in the order of sums_of_four.
inline float sum(const Octet (&v)[1]) { return sum(v[0]); }
inline float sum(const Octet (&v)[2]) { return sum(add(v[0], v[1])); }

// The two loops below are functions of their own: inlined into a phase, GCC 12 keeps their registers less well (2.60 ms
// a layer of OLMoE's shape at one token against 2.14, AMD Zen 5).

// Multiply while decoding, for few inputs: sums[s * ld + r] += row r . x[s], whole rows of n columns, a multiple of 64,
// in the order of dot_tile<Fma<FP32>>, whose vectors are octets or two of them. Two rows at a time hide the additions'
// latency and share x.
template <class V, int R, int S>
__attribute__((noinline)) void dot_bitmap(const BitmapRow<V>* rows, const BitmapRow<V>& next, int64_t n,
                                          const float* const* x, float* sums, int64_t ld) {
  constexpr int kOctets = kWide / kLanes;
  constexpr int64_t kColumns = Fma<FP32>::kDotColumns;
  BitmapRows<V, R> at(rows, next);
  for (int64_t begin = 0; begin < n; begin += kColumns) {
    Octet acc[R][S][kOctets];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s)
#pragma GCC unroll 2
        for (int o = 0; o < kOctets; ++o) acc[r][s][o] = octet_set(0);
    for (int64_t c = begin; c < std::min(n, begin + kColumns); c += 64) {
      at.begin(c);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        Octet in[S];
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
          in[s] = load_octet(x[s] + c + kLanes * j);
          if (R > 1) keep_in_register(in[s]);  // not loaded for each row
        }
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
          const Octet w = at.octet(r, j);
#pragma GCC unroll 4
          for (int s = 0; s < S; ++s) acc[r][s][j % kOctets] = fma(w, in[s], acc[r][s][j % kOctets]);
        }
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) sums[s * ld + r] += sum(acc[r][s]);
  }
}

// y[s] += a[s * lda + r] * row r, row after row.
template <class V, int R, int S>
__attribute__((noinline)) void axpy_bitmap(const float* a, int64_t lda, const BitmapRow<V>* rows,
                                           const BitmapRow<V>& next, int64_t n, float* const* y) {
  BitmapRows<V, R> at(rows, next);
  Octet factor[R][S];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) factor[r][s] = octet_set(a[s * lda + r]);
  int64_t c = 0;
  for (; c + 64 <= n; c += 64) {
    at.begin(c);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      Octet into[S];
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) into[s] = load_octet(y[s] + c + kLanes * j);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const Octet w = at.octet(r, j);
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) into[s] = fma(factor[r][s], w, into[s]);
      }
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) store_octet(y[s] + c + kLanes * j, into[s]);
    }
  }
  at.tail(c, n, [&](int r, int64_t k, float w) {
    for (int s = 0; s < S; ++s) y[s][k] = __builtin_fmaf(a[s * lda + r], w, y[s][k]);
  });
}

constexpr int64_t kDirect = 4;  // inputs for which a row of a bitmap is multiplied while it is decoded

// One or two rows.
template <class V>
void dot_bitmap(const BitmapRow<V>* rows, const BitmapRow<V>& next, int64_t count, int64_t n, const float* const* x,
                int64_t inputs, float* sums, int64_t ld) {
  if (count == 2 && inputs == 1) return dot_bitmap<V, 2, 1>(rows, next, n, x, sums, ld);
  if (count == 2 && inputs == 2) return dot_bitmap<V, 2, 2>(rows, next, n, x, sums, ld);
  for (int64_t r = 0; r < count; ++r) switch (inputs) {
      case 1:
        dot_bitmap<V, 1, 1>(rows + r, next, n, x, sums + r, ld);
        break;
      case 2:
        dot_bitmap<V, 1, 2>(rows + r, next, n, x, sums + r, ld);
        break;
      case 3:
        dot_bitmap<V, 1, 3>(rows + r, next, n, x, sums + r, ld);
        break;
      default:
        dot_bitmap<V, 1, 4>(rows + r, next, n, x, sums + r, ld);
    }
}

template <class V, int R>
void axpy_bitmap(const float* a, int64_t lda, const BitmapRow<V>* rows, const BitmapRow<V>& next, int64_t n,
                 float* const* y, int64_t outputs) {
  switch (outputs) {
    case 1:
      return axpy_bitmap<V, R, 1>(a, lda, rows, next, n, y);
    case 2:
      return axpy_bitmap<V, R, 2>(a, lda, rows, next, n, y);
    case 3:
      return axpy_bitmap<V, R, 3>(a, lda, rows, next, n, y);
    default:
      return axpy_bitmap<V, R, 4>(a, lda, rows, next, n, y);
  }
}

}  // namespace resmoe
