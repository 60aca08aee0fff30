// Rows of weights that are stored compressed: decoded to fp32, or multiplied while they are decoded.
#pragma once

#include <type_traits>

#include "products.h"

namespace resmoe {

struct Matrix {             // [E, rows, columns]
  const void* data;         // in the layer's dtype, or uint8 codes; null: there is none
  const uint16_t* scales;   // of codes: bf16 [E, rows, groups]
  int64_t stride;           // from one expert to the next: elements, or bytes of codes
  int64_t scales_stride;    // elements
  int64_t bits;             // of a code; 0: stored in the layer's dtype
  int64_t group;            // columns that share a scale, a multiple of 8; more than there are: the whole row
};

struct Bitmap {             // one part's pruned values; index: gate, up, down
  const uint8_t* mask[3];        // [E, I, mask_bytes]; null where the part does not cover it
  const int32_t* row_ptr[3];     // [E, I]: a row's first value; null: every row has values_per_row
  const void* values[3];         // in the layer's dtype [E, N], or codes
  const uint16_t* scales[3];     // of codes: bf16 [E, I, groups]
  const int64_t* starts;         // [E] first value, or byte of codes, of each expert; null: e * values_stride
  int64_t mask_stride[3];        // bytes from one expert to the next
  int64_t row_ptr_stride[3];     // elements
  int64_t values_stride[3];      // elements, or bytes of codes
  int64_t scales_stride[3];      // elements
  int64_t starts_stride;         // elements
  int64_t readable[3];           // elements, or bytes of codes, from values on: where reading must stop
  int64_t values_per_row;
  int64_t bits;                  // of a code: 4 or 8; 0: values in the layer's dtype
  int64_t group;                 // as in Matrix
};

inline int64_t octets_of(int64_t columns) { return (columns + kLanes - 1) / kLanes; }

// ---- bitmap rows ---------------------------------------------------------------------------------------------

// mask byte -> shuffle controls that spread packed values to their lanes
struct ShuffleTable {
  alignas(32) uint8_t wide[256][32];    // to the upper half of 32-bit lanes: bf16 becomes fp32 by that alone
  alignas(16) uint8_t narrow[256][16];  // to 16-bit lanes
  alignas(32) uint8_t top[256][32];     // bytes to the top of 32-bit lanes, the ninth one below each
  alignas(8) int8_t lane[256][8];       // source of each 32-bit lane, negative where there is none
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
      }
  }
};
const ShuffleTable kShuffle;

// What stands for a kept value: the layer's dtype or a code. level = scale / kOne * value, where value is an odd number,
// so that 0 is left for columns that are not kept.
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
inline __m256 expand8(Cursor<V> values, uint64_t entry);
template <>
inline __m256 expand8<BF16>(const uint16_t* values, uint64_t entry) {
  const __m256i packed = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)values));
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(packed, _mm256_load_si256((const __m256i*)(kShuffle.wide[0] + entry))));
}
template <>
inline __m256 expand8<FP16>(const uint16_t* values, uint64_t entry) {
  const __m128i control = _mm_load_si128((const __m128i*)kShuffle.narrow[entry / kEntry]);
  return FP16::widen(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)values), control));
}
template <>
inline __m256 expand8<FP32>(const float* values, uint64_t entry) {
  const __m256i lanes = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)kShuffle.lane[entry / kEntry]));
  const __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), lanes);
  return _mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(lanes));
}
inline __m256 expand8(__m128i tops, uint64_t entry) {
  const __m256i control = _mm256_load_si256((const __m256i*)(kShuffle.top[0] + entry));
  return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(tops), control));
}
template <>
inline __m256 expand8<Kept8>(const uint8_t* values, uint64_t entry) {  // code - 128 at the top, a half below
  return expand8(_mm_xor_si128(_mm_loadl_epi64((const __m128i*)values), _mm_set1_epi8(-128)), entry);
}
template <>
inline __m256 expand8<Kept4>(Nibbles values, uint64_t entry) {  // code - 8 in the upper half of a byte, a half below
  uint64_t codes;
  memcpy(&codes, address(values), 8);
  return expand8(_mm_cvtsi64_si128(_pdep_u64(codes >> 4 * (values.at & 1), 0xf0f0f0f0f0f0f0f0u) ^ 0x8888888888888888u), entry);
}

#if defined(__AVX512VBMI2__) && defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr bool kWideExpand = true;  // vpexpandw
#else
constexpr bool kWideExpand = false;
#endif

// Unpacks a row, 64 columns at a time: begin() with their mask, then octet(0) to octet(7), in this order. Reads up to
// 72 values from `values` on, which moves to the next columns' first.
template <class V>
struct Unpacker {
  Cursor<V> values;
  uint64_t word;  // the mask, turned so that an octet's byte comes to lie at its table entry
  static constexpr bool kExpand = kWideExpand && sizeof(typename V::type) == 2;
  alignas(64) uint16_t lanes[kExpand ? 64 : 1];

  __attribute__((always_inline)) inline void begin(const uint8_t* mask) {
    memcpy(&word, mask, 8);
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (kExpand)
      for (int half = 0; half < 2; ++half, word >>= 32) {
        _mm512_store_si512(lanes + 32 * half, _mm512_maskz_expand_epi16((__mmask32)word, _mm512_loadu_si512(values)));
        values += __builtin_popcount((uint32_t)word);
      }
#endif
    static_assert(kEntry == 1 << 5);
    if constexpr (!kExpand) word = word << 5 | word >> 59;
  }
  __attribute__((always_inline)) inline __m256 octet(int j) {
    if constexpr (kExpand) return V::load((const typename V::type*)lanes + kLanes * j);
    uint64_t entry = (word >> 8 * j | word << (64 - 8 * j) % 64) & 255 * kEntry;
    asm("" : "+r"(entry));  // one number serves as offset and for counting: compilers would make two
    const __m256 w = expand8<V>(values, entry);
    values += __builtin_popcountll(entry);
    return w;
  }
};

// ---- rows of codes -------------------------------------------------------------------------------------------
//
// level = scale / kOne * (value + kShift), one scale for each group of columns. Sums run over a group's values, then
// are scaled, so that a weight costs its conversion and a multiplication.

template <int Bits>
struct Code {
  static constexpr float kOne = 1, kShift = -0.5f * ((1 << Bits) - 1);
  template <int Octets>
  static inline __m256i broadcast(const uint8_t* from) {  // 16 bits for each octet
    uint32_t word = 0;
    memcpy(&word, from, 2 * Octets);
    return _mm256_set1_epi32(word);
  }
  static inline __m256i shifts(int step, int from) {
    return _mm256_add_epi32(_mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(step)), _mm256_set1_epi32(from));
  }
  // visit(j, values) of one octet or of two. octets: of the row.
  template <int Octets, class Visit>
  static inline void load(const uint8_t* row, int64_t octet, int64_t octets, Visit visit) {
    if constexpr (Bits == 4) {
#pragma GCC unroll 2
      for (int j = 0; j < Octets; ++j) {
        uint32_t word;
        memcpy(&word, row + 4 * (octet + j), 4);
        const __m256i apart = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts(4, 0));
        visit(j, _mm256_cvtepi32_ps(_mm256_and_si256(apart, _mm256_set1_epi32(15))));
      }
    } else {
      static_assert(Bits == 2 || Bits == 3);  // three: a plane of high bits behind the row's low ones
      const __m256i low = broadcast<Octets>(row + 2 * octet);
      uint32_t high = 0;
      if (Bits == 3) memcpy(&high, row + 2 * octets + octet, Octets);
      const __m256i highs = _mm256_set1_epi32(high << 2);
#pragma GCC unroll 2
      for (int j = 0; j < Octets; ++j) {
        __m256i code = _mm256_and_si256(_mm256_srlv_epi32(low, shifts(2, 16 * j)), _mm256_set1_epi32(3));
        if (Bits == 3)
          code = _mm256_or_si256(code, _mm256_and_si256(_mm256_srlv_epi32(highs, shifts(1, 8 * j)), _mm256_set1_epi32(4)));
        visit(j, _mm256_cvtepi32_ps(code));
      }
    }
  }
};

// Values are codes less 128, times 2**24: a shuffle into the upper bytes costs less than widening.
template <>
struct Code<8> {
  static constexpr float kOne = 1 << 24, kShift = 0.5f * kOne;
  template <int First>  // of sixteen codes eight: the first, or from the ninth on
  static inline __m256 eight(__m256i flipped) {
    constexpr int f = First;
    const __m256i to_top = _mm256_setr_epi8(-1, -1, -1, f, -1, -1, -1, f + 1, -1, -1, -1, f + 2, -1, -1, -1, f + 3,
                                            -1, -1, -1, f + 4, -1, -1, -1, f + 5, -1, -1, -1, f + 6, -1, -1, -1, f + 7);
    return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(flipped, to_top));
  }
  template <int Octets, class Visit>
  static inline void load(const uint8_t* row, int64_t octet, int64_t, Visit visit) {
    const __m128i* from = (const __m128i*)(row + kLanes * octet);
    const __m128i codes = Octets == 2 ? _mm_loadu_si128(from) : _mm_loadl_epi64(from);
    const __m256i flipped = _mm256_xor_si256(_mm256_broadcastsi128_si256(codes), _mm256_set1_epi8(-128));
    visit(0, eight<0>(flipped));
    if constexpr (Octets == 2) visit(1, eight<8>(flipped));
  }
};

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

// S outputs' octets from o on, in registers: V of them, or a lone one, of which there may be fewer columns than eight.
template <int S, int V>
__attribute__((always_inline)) inline void load_outputs(__m256 (&into)[S][V], const float* const* y, int64_t o, int64_t columns) {
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const float* from = y[s] + (o + v) * kLanes;
      into[s][v] = V == 1 ? _mm256_maskload_ps(from, lanes_of(columns)) : _mm256_loadu_ps(from);
    }
}
template <int S, int V>
__attribute__((always_inline)) inline void store_outputs(const __m256 (&from)[S][V], float* const* y, int64_t o, int64_t columns) {
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = y[s] + (o + v) * kLanes;
      if (V == 1)
        store_lanes(to, from[s][v], columns);
      else
        _mm256_storeu_ps(to, from[s][v]);
    }
}

template <int Bits>
struct CodeRows {
  const uint8_t* codes;    // the first row
  const uint16_t* scales;  // its first group's
  int64_t n, octets, stride, group, groups;
  CodeRows(const Matrix& m, int64_t e, int64_t i, int64_t columns) : n(columns), octets(octets_of(n)), stride(Bits * octets) {
    group = std::min(m.group, octets * kLanes), groups = (n + group - 1) / group;
    codes = (const uint8_t*)m.data + e * m.stride + i * stride;
    scales = m.scales + e * m.scales_stride + i * groups;
  }
  CodeRows from(int64_t row) const {
    CodeRows rest = *this;
    rest.codes += row * stride, rest.scales += row * groups;
    return rest;
  }
  float scale(int64_t row, int64_t g) const { return BF16::scalar(scales[row * groups + g]) * (1.0f / Code<Bits>::kOne); }
  int64_t begin(int64_t g) const { return g * group / kLanes; }  // octets
  int64_t end(int64_t g) const { return std::min(octets, (g + 1) * group / kLanes); }
  int64_t whole() const { return n / kLanes; }
  // The next R rows, a cache line at a time. Always inline: GCC drops calls of what does nothing but prefetch.
  template <int R>
  __attribute__((always_inline)) void fetch_ahead(int64_t octet) const {
    constexpr int kLow = Bits == 3 ? 2 : Bits;  // bytes
    if (octet % (64 / kLow) == 0)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) _mm_prefetch((const char*)codes + (R + r) * stride + octet * kLow, _MM_HINT_T0);
  }
};

// What kShift adds to a dot: x by lane over each group of columns, times kShift: [groups, 8].
template <int Bits>
void shift_sums(const CodeRows<Bits>& rows, const float* x, float* shifts) {
  for (int64_t g = 0; g < rows.groups; ++g) {
    __m256 acc = _mm256_setzero_ps();
    for (int64_t o = rows.begin(g); o < rows.end(g); ++o)
      acc = _mm256_add_ps(acc, o < rows.whole() ? _mm256_loadu_ps(x + o * kLanes) : _mm256_maskload_ps(x + o * kLanes, lanes_of(rows.n - o * kLanes)));
    _mm256_storeu_ps(shifts + g * kLanes, _mm256_mul_ps(acc, _mm256_set1_ps(Code<Bits>::kShift)));
  }
}

// sums[r * ld + s] += row r . x[s]; shifts[s]: shift_sums of x[s].
template <int Bits, int R, int S>
void dot_codes(const CodeRows<Bits>& rows, const float* const* x, const float* const* shifts, float* sums, int64_t ld) {
  __m256 total[R][S];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) total[r][s] = _mm256_setzero_ps();
  for (int64_t g = 0; g < rows.groups; ++g) {
    __m256 acc[R][S];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) acc[r][s] = _mm256_loadu_ps(shifts[s] + g * kLanes);
    const auto add = [&](auto count, int64_t o, const auto& in) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        Code<Bits>::template load<decltype(count)::value>(rows.codes + r * rows.stride, o, rows.octets, [&](int j, __m256 w) {
#pragma GCC unroll 4
          for (int s = 0; s < S; ++s) acc[r][s] = _mm256_fmadd_ps(w, in[s][j], acc[r][s]);
        });
    };
    int64_t o = rows.begin(g);
    const int64_t end = rows.end(g), whole = std::min(end, rows.whole());
    for (; o + 2 <= whole; o += 2) {
      rows.template fetch_ahead<R>(o);
      __m256 in[S][2];
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) in[s][0] = _mm256_loadu_ps(x[s] + o * kLanes), in[s][1] = _mm256_loadu_ps(x[s] + (o + 1) * kLanes);
      add(std::integral_constant<int, 2>(), o, in);
    }
    for (; o < end; ++o) {
      const __m256i lanes = lanes_of(rows.n - o * kLanes);
      __m256 in[S][1];
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) in[s][0] = _mm256_maskload_ps(x[s] + o * kLanes, lanes);
      add(std::integral_constant<int, 1>(), o, in);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m256 scale = _mm256_set1_ps(rows.scale(r, g));
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) total[r][s] = _mm256_fmadd_ps(scale, acc[r][s], total[r][s]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) sums[r * ld + s] += sum(total[r][s]);
}

template <int Bits, int R>
void dot_codes(const CodeRows<Bits>& rows, int64_t inputs, const float* const* x, const float* const* shifts, float* sums, int64_t ld) {
  switch (inputs) {
    case 1: return dot_codes<Bits, R, 1>(rows, x, shifts, sums, ld);
    case 2: return dot_codes<Bits, R, 2>(rows, x, shifts, sums, ld);
    default: return dot_codes<Bits, R, 3>(rows, x, shifts, sums, ld);
  }
}

// y[s] += shift[s] + sum over r < R of factor[s][r] * row r, over octets from o on.
template <int Bits, int R, int S, int Octets>
__attribute__((always_inline)) inline void axpy_octets(const __m256 (&factor)[S][R], const float (&shift)[S], const CodeRows<Bits>& rows,
                                                       float* const* y, int64_t o) {
  const int64_t columns = rows.n - o * kLanes;
  __m256 into[S][Octets];
  load_outputs(into, y, o, columns);
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 2
    for (int j = 0; j < Octets; ++j) into[s][j] = _mm256_add_ps(into[s][j], _mm256_set1_ps(shift[s]));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    Code<Bits>::template load<Octets>(rows.codes + r * rows.stride, o, rows.octets, [&](int j, __m256 w) {
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) into[s][j] = _mm256_fmadd_ps(factor[s][r], w, into[s][j]);
    });
  store_outputs(into, y, o, columns);
}

// y[s] += sum over r < R of a[s * lda + r] * row r.
template <int Bits, int R, int S>
void axpy_rows(const float* a, int64_t lda, const CodeRows<Bits>& rows, float* const* y) {
  for (int64_t g = 0; g < rows.groups; ++g) {
    float shift[S];
    __m256 factor[S][R];
    for (int s = 0; s < S; ++s) {
      shift[s] = 0;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const float f = a[s * lda + r] * rows.scale(r, g);
        shift[s] += Code<Bits>::kShift * f, factor[s][r] = _mm256_set1_ps(f);
      }
    }
    int64_t o = rows.begin(g);
    const int64_t end = rows.end(g), whole = std::min(end, rows.whole());
    for (; o + 2 <= whole; o += 2) {
      rows.template fetch_ahead<R>(o);
      axpy_octets<Bits, R, S, 2>(factor, shift, rows, y, o);
    }
    for (; o < end; ++o) axpy_octets<Bits, R, S, 1>(factor, shift, rows, y, o);
  }
}

// For many outputs: kRows rows of some octets as fp32, and their factors, all in the first cache.
template <int Bits>
struct CodeBlock {
  static constexpr int64_t kOctets = 16;
  alignas(32) float wide[kRows][kOctets * kLanes];
  float factor[kInputs][kRows], shift[kInputs][kRows];  // shift: of the four rows from r on; of one behind the last four

  void set_factors(const float* a, int64_t lda, const CodeRows<Bits>& rows, int64_t count, int64_t g, int64_t outputs) {
    const int64_t fours = count / 4 * 4;
    for (int64_t s = 0; s < outputs; ++s)
      for (int64_t r = 0; r < count; ++r) {
        float& into = shift[s][r < fours ? r / 4 * 4 : r];
        if (r % 4 == 0 || r >= fours) into = 0;
        into += Code<Bits>::kShift * (factor[s][r] = a[s * lda + r] * rows.scale(r, g));
      }
  }
  void widen(const CodeRows<Bits>& rows, int64_t count, int64_t begin, int64_t end) {
    for (int64_t r = 0; r < count; ++r) {
      const auto store = [&](int64_t o, __m256 w) { _mm256_store_ps(wide[r] + (o - begin) * kLanes, w); };
      const uint8_t* codes = rows.codes + r * rows.stride;
      int64_t o = begin;
      for (; o + 2 <= end; o += 2) Code<Bits>::template load<2>(codes, o, rows.octets, [&](int j, __m256 w) { store(o + j, w); });
      if (o < end) Code<Bits>::template load<1>(codes, o, rows.octets, [&](int, __m256 w) { store(o, w); });
    }
  }
  // y[s] += factor . wide for S outputs from `first` on and V octets from o, in the order of axpy_octets.
  template <int S, int V>
  __attribute__((always_inline)) inline void add(int64_t count, float* const* y, int64_t first, int64_t begin, int64_t o, int64_t columns = kLanes) const {
    __m256 into[S][V];
    load_outputs(into, y, o, columns);
    const float *f = factor[first], *h = shift[first], *w = wide[0] + (o - begin) * kLanes;
    const auto add_shift = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) into[s][v] = _mm256_add_ps(into[s][v], _mm256_broadcast_ss(h + s * kRows));
    };
    const auto add_row = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const __m256 one = _mm256_load_ps(w + v * kLanes);
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) into[s][v] = _mm256_fmadd_ps(_mm256_broadcast_ss(f + s * kRows), one, into[s][v]);
      }
      w += kOctets * kLanes, ++f, ++h;
    };
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) {
      add_shift();
      for (int k = 0; k < 4; ++k) add_row();
    }
    for (; r < count; ++r) add_shift(), add_row();
    store_outputs(into, y, o, columns);
  }
  template <int S>
  void add(const CodeRows<Bits>& rows, int64_t count, float* const* y, int64_t first, int64_t begin, int64_t end) const {
    int64_t o = begin;
    for (; o + 4 <= std::min(end, rows.whole()); o += 4) add<S, 4>(count, y, first, begin, o);
    for (; o < end; ++o) add<S, 1>(count, y, first, begin, o, rows.n - o * kLanes);
  }
};

constexpr int64_t kBlocked = 8;  // outputs for which rows are widened once for all

// y[s] += sum over r < count of a[s * lda + r] * row r; count at most kRows, outputs at most kInputs.
template <int Bits>
void axpy_codes(const float* a, int64_t lda, const CodeRows<Bits>& rows, int64_t count, float* const* y, int64_t outputs) {
  if (outputs < kBlocked) {
    const auto add = [&](auto rows_at_once, int64_t r) {
      constexpr int R = decltype(rows_at_once)::value;
      int64_t s = 0;
      for (; s + 2 <= outputs; s += 2) axpy_rows<Bits, R, 2>(a + s * lda + r, lda, rows.from(r), y + s);
      if (s < outputs) axpy_rows<Bits, R, 1>(a + s * lda + r, lda, rows.from(r), y + s);
    };
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) add(std::integral_constant<int, 4>(), r);
    for (; r < count; ++r) add(std::integral_constant<int, 1>(), r);
    return;
  }
  CodeBlock<Bits> block;
  for (int64_t g = 0; g < rows.groups; ++g) {
    block.set_factors(a, lda, rows, count, g, outputs);
    for (int64_t o = rows.begin(g); o < rows.end(g); o += block.kOctets) {
      const int64_t end = std::min(rows.end(g), o + block.kOctets);
      block.widen(rows, count, o, end);
      for (int64_t s = 0; s < outputs; s += 3)
        switch (outputs - s) {
          case 1: block.template add<1>(rows, count, y + s, s, o, end); break;
          case 2: block.template add<2>(rows, count, y + s, s, o, end); break;
          default: block.template add<3>(rows, count, y + s, s, o, end);
        }
    }
  }
}

// visit(CodeRows<Bits>) of the n columns of expert e's row i and those after it.
template <class Visit>
inline void with_codes(const Matrix& m, int64_t e, int64_t i, int64_t n, Visit visit) {
  switch (m.bits) {
    case 2: return visit(CodeRows<2>(m, e, i, n));
    case 3: return visit(CodeRows<3>(m, e, i, n));
    case 4: return visit(CodeRows<4>(m, e, i, n));
    default: return visit(CodeRows<8>(m, e, i, n));
  }
}

// One row's levels, whole octets: for the self-test of the loader.
template <int Bits>
void decode_codes(const CodeRows<Bits>& row, float* out) {
  for (int64_t g = 0; g < row.groups; ++g)
    for (int64_t o = row.begin(g); o < row.end(g); ++o)
      Code<Bits>::template load<1>(row.codes, o, row.octets, [&](int, __m256 w) {
        _mm256_storeu_ps(out + o * kLanes, _mm256_mul_ps(_mm256_add_ps(w, _mm256_set1_ps(Code<Bits>::kShift)), _mm256_set1_ps(row.scale(0, g))));
      });
}

// ---- rows of a bitmap part -----------------------------------------------------------------------------------

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
  int64_t start = part.starts ? part.starts[e * part.starts_stride] : e * part.values_stride[p];  // elements, of codes bytes
  int64_t first = part.row_ptr[p] ? part.row_ptr[p][e * part.row_ptr_stride[p] + i] : kCoded<V> ? 0 : i * part.values_per_row;
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
  __m256 scale[R][2];                // of the first 32 columns at hand, of the others
  BitmapRows(const BitmapRow<V>* rows, const BitmapRow<V>& next) : rows(rows), mask_ahead(next.mask - rows->mask), values_ahead(next.values - rows->values) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) packed[r].values = rows[r].values, scale[r][0] = scale[r][1] = _mm256_setzero_ps();
  }
  __attribute__((always_inline)) inline void begin(int64_t c) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      _mm_prefetch(address(packed[r].values + values_ahead), _MM_HINT_T0);
      if (c % 512 == 0) _mm_prefetch(rows[r].mask + mask_ahead + c / 8, _MM_HINT_T0);
      packed[r].begin(rows[r].mask + c / 8);
    }
    if constexpr (kCoded<V>)
      if (c + 64 > scaled) {
        const int64_t group = rows->group;
        scaled = c / group == (c + 32) / group ? (c / group + 1) * group : 0;
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) scale[r][half] = _mm256_set1_ps(rows[r].scale(c + 32 * half));
      }
  }
  __attribute__((always_inline)) inline __m256 octet(int r, int j) {
    const __m256 w = packed[r].octet(j);
    if constexpr (kCoded<V>) return _mm256_mul_ps(w, scale[r][j / 4]);
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

template <class V>
void decode_row(const BitmapRow<V>& row, int64_t n, float* out) {
  BitmapRows<V, 1> at(&row, row);
  const int64_t vectors = row.vectors(n);
  for (int64_t c = 0; c < vectors; c += 64) {
    at.begin(c);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) _mm256_storeu_ps(out + c + kLanes * j, at.octet(0, j));
  }
  std::fill(out + vectors, out + n, 0.0f);
  at.tail(vectors, n, [&](int, int64_t k, float w) { out[k] = w; });
}

// Multiply while decoding, for few inputs: sums[r * ld + s] += row r . x[s], whole rows of n columns, a multiple of 64,
// in the order of a dot of two chains. Two rows at a time hide the additions' latency and share x.
template <class V, int R, int S>
void dot_bitmap(const BitmapRow<V>* rows, const BitmapRow<V>& next, int64_t n, const float* const* x, float* sums, int64_t ld) {
  BitmapRows<V, R> at(rows, next);
  __m256 acc[R][S][2];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) acc[r][s][0] = acc[r][s][1] = _mm256_setzero_ps();
  for (int64_t c = 0; c < n; c += 64) {
    at.begin(c);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      __m256 in[S];
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) {
        in[s] = _mm256_loadu_ps(x[s] + c + kLanes * j);
        if (R > 1) asm("" : "+x"(in[s]));  // in a register, not loaded for each row
      }
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const __m256 w = at.octet(r, j);
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) acc[r][s][j & 1] = _mm256_fmadd_ps(w, in[s], acc[r][s][j & 1]);
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) sums[r * ld + s] += sum(_mm256_add_ps(acc[r][s][0], acc[r][s][1]));
}

// y[s] += a[s * lda + r] * row r, row after row.
template <class V, int R, int S>
void axpy_bitmap(const float* a, int64_t lda, const BitmapRow<V>* rows, const BitmapRow<V>& next, int64_t n, float* const* y) {
  BitmapRows<V, R> at(rows, next);
  __m256 factor[R][S];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) factor[r][s] = _mm256_set1_ps(a[s * lda + r]);
  int64_t c = 0;
  for (; c + 64 <= n; c += 64) {
    at.begin(c);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      __m256 into[S];
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) into[s] = _mm256_loadu_ps(y[s] + c + kLanes * j);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const __m256 w = at.octet(r, j);
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) into[s] = _mm256_fmadd_ps(factor[r][s], w, into[s]);
      }
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) _mm256_storeu_ps(y[s] + c + kLanes * j, into[s]);
    }
  }
  at.tail(c, n, [&](int r, int64_t k, float w) {
    for (int s = 0; s < S; ++s) y[s][k] = __builtin_fmaf(a[s * lda + r], w, y[s][k]);
  });
}

constexpr int64_t kDirect = 4;  // inputs for which a row of a bitmap is multiplied while it is decoded

// One or two rows.
template <class V>
void dot_bitmap(const BitmapRow<V>* rows, const BitmapRow<V>& next, int64_t count, int64_t n, const float* const* x, int64_t inputs, float* sums, int64_t ld) {
  if (count == 2 && inputs == 1) return dot_bitmap<V, 2, 1>(rows, next, n, x, sums, ld);
  if (count == 2 && inputs == 2) return dot_bitmap<V, 2, 2>(rows, next, n, x, sums, ld);
  for (int64_t r = 0; r < count; ++r) switch (inputs) {
      case 1: dot_bitmap<V, 1, 1>(rows + r, next, n, x, sums + r * ld, ld); break;
      case 2: dot_bitmap<V, 1, 2>(rows + r, next, n, x, sums + r * ld, ld); break;
      case 3: dot_bitmap<V, 1, 3>(rows + r, next, n, x, sums + r * ld, ld); break;
      default: dot_bitmap<V, 1, 4>(rows + r, next, n, x, sums + r * ld, ld);
    }
}

template <class V, int R>
void axpy_bitmap(const float* a, int64_t lda, const BitmapRow<V>* rows, const BitmapRow<V>& next, int64_t n, float* const* y, int64_t outputs) {
  switch (outputs) {
    case 1: return axpy_bitmap<V, R, 1>(a, lda, rows, next, n, y);
    case 2: return axpy_bitmap<V, R, 2>(a, lda, rows, next, n, y);
    case 3: return axpy_bitmap<V, R, 3>(a, lda, rows, next, n, y);
    default: return axpy_bitmap<V, R, 4>(a, lda, rows, next, n, y);
  }
}

}  // namespace resmoe
