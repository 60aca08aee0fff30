// Rows of weights that are stored compressed: decoded to fp32, or multiplied while they are decoded.
#pragma once

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
  alignas(8) int8_t lane[256][8];       // source of each 32-bit lane, negative where there is none
  ShuffleTable() {
    for (int m = 0; m < 256; ++m)
      for (int to = 0, next = 0; to < kLanes; ++to) {
        const bool kept = m >> to & 1;
        const uint8_t low = kept ? 2 * next : 0x80, high = kept ? 2 * next + 1 : 0x80;
        wide[m][4 * to] = wide[m][4 * to + 1] = 0x80;
        wide[m][4 * to + 2] = narrow[m][2 * to] = low;
        wide[m][4 * to + 3] = narrow[m][2 * to + 1] = high;
        lane[m][to] = kept ? next : -1;
        next += kept;
      }
  }
};
const ShuffleTable kShuffle;

// Byte j of the result: set bits in bytes 0..j of word.
inline uint64_t prefix_counts(uint64_t word) {
  uint64_t x = word - (word >> 1 & 0x5555555555555555u);
  x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
  x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return x * 0x0101010101010101u;
}

// Eight columns from packed values; reads 16 (fp32: 32) bytes from `values`.
template <class T>
inline __m256 expand8(const typename T::type* values, uint8_t mask);
template <>
inline __m256 expand8<BF16>(const uint16_t* values, uint8_t mask) {
  const __m256i packed = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)values));
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(packed, _mm256_load_si256((const __m256i*)kShuffle.wide[mask])));
}
template <>
inline __m256 expand8<FP16>(const uint16_t* values, uint8_t mask) {
  return FP16::widen(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)values), _mm_load_si128((const __m128i*)kShuffle.narrow[mask])));
}
template <>
inline __m256 expand8<FP32>(const float* values, uint8_t mask) {
  const __m256i lanes = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)kShuffle.lane[mask]));
  const __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), lanes);
  return _mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(lanes));
}

// Visit the 64 columns of one mask word: vectors(j, columns 8 j .. 8 j + 7). Reads up to 72 values; returns their number.
template <class T, class Vectors>
inline int64_t visit_word(const uint8_t* mask, const typename T::type* values, Vectors vectors) {
  uint64_t word;
  memcpy(&word, mask, 8);
  const uint64_t counts = prefix_counts(word);
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(typename T::type) == 2) {
    for (int half = 0; half < 2; ++half) {
      const uint16_t* from = (const uint16_t*)values + (half ? (uint8_t)(counts >> 24) : 0);
      alignas(64) uint16_t lanes[32];
      _mm512_store_si512(lanes, _mm512_maskz_expand_epi16((__mmask32)(word >> 32 * half), _mm512_loadu_si512(from)));
      for (int j = 0; j < 4; ++j) vectors(4 * half + j, T::load(lanes + kLanes * j));
    }
    return counts >> 56;
  }
#endif
  alignas(8) uint8_t below[8];  // bytes through memory: one load each, where shifting takes two steps
  const uint64_t shifted = counts << 8;
  memcpy(below, &shifted, 8);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) vectors(j, expand8<T>(values + below[j], mask[j]));
  return counts >> 56;
}

// Visit one row: vectors(column, __m256) for eight columns at a time, then scalars(column, float) for the rest.
// `readable`: elements that may be read from `values` on; vectors never reach beyond.
template <class T, class Vectors, class Scalars>
inline void visit_row(const uint8_t* mask, const typename T::type* values, int64_t readable, int64_t n, Vectors vectors, Scalars scalars) {
  int64_t c = 0;
  for (; c + 64 <= n && readable >= 72; c += 64, mask += 8) {
    const int64_t count = visit_word<T>(mask, values, [&](int j, __m256 w) { vectors(c + kLanes * j, w); });
    values += count, readable -= count;
  }
  for (; c < n; ++c) {
    scalars(c, mask[0] >> (c & 7) & 1 ? T::scalar(*values++) : 0.0f);
    if ((c & 7) == 7) ++mask;
  }
}

template <class T>
void decode_row(const uint8_t* mask, const typename T::type* values, int64_t readable, int64_t n, float* out) {
  visit_row<T>(mask, values, readable, n, [&](int64_t c, __m256 w) { _mm256_storeu_ps(out + c, w); },
               [&](int64_t c, float w) { out[c] = w; });
}

// ---- rows of codes -------------------------------------------------------------------------------------------

template <int Bits>
inline __m256i codes8(const uint8_t* row, int64_t octet, int64_t octets) {
  if constexpr (Bits == 4) {
    uint32_t word;
    memcpy(&word, row + 4 * octet, 4);
    const __m256i apart = _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    return _mm256_and_si256(apart, _mm256_set1_epi32(15));
  } else {  // two bits, and for three a plane of high bits behind them
    uint16_t word;
    memcpy(&word, row + 2 * octet, 2);
    const __m256i apart = _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    const __m256i low = _mm256_and_si256(apart, _mm256_set1_epi32(3));
    if constexpr (Bits == 2) return low;
    const __m256i high = _mm256_sllv_epi32(_mm256_set1_epi32(row[2 * octets + octet]), _mm256_setr_epi32(2, 1, 0, 0, 0, 0, 0, 0));
    const __m256i right = _mm256_srlv_epi32(high, _mm256_setr_epi32(0, 0, 0, 1, 2, 3, 4, 5));
    return _mm256_or_si256(low, _mm256_and_si256(right, _mm256_set1_epi32(4)));
  }
}

// Visit the octets of a row of n columns in pairs: vectors(octet, (code - half) * scale, j).
template <int Bits, class Vectors>
inline void visit_codes(const uint8_t* row, const uint16_t* scales, int64_t group, int64_t n, Vectors vectors) {
  const int64_t octets = octets_of(n);
  for (int64_t o = 0; o < octets; ) {
    const __m256 s = _mm256_set1_ps(BF16::scalar(*scales++)), half = _mm256_set1_ps(0.5f * ((1 << Bits) - 1));
    const int64_t stop = std::min(octets, o + group / kLanes);
    const auto octet = [&](int64_t at) {
      if constexpr (Bits == 8)  // decoded alone for the self-test of the loader; products take ByteRows
        return _mm256_mul_ps(_mm256_fmadd_ps(Byte::load(row + kLanes * at), _mm256_set1_ps(1 / Byte::kOne), _mm256_set1_ps(0.5f)), s);
      else
        return _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(codes8<Bits>(row, at, octets)), half), s);
    };
    for (; o + 2 <= stop; o += 2) vectors(o, octet(o), 0), vectors(o + 1, octet(o + 1), 1);
    if (o < stop) vectors(o, octet(o), 0), ++o;
  }
}

template <class Vectors>
inline void visit_codes(const Matrix& part, int64_t e, int64_t i, int64_t n, Vectors vectors) {
  const uint8_t* row = (const uint8_t*)part.data + e * part.stride + i * part.bits * octets_of(n);
  const int64_t group = std::min(part.group, octets_of(n) * kLanes);
  const uint16_t* scales = part.scales + e * part.scales_stride + i * ((n + group - 1) / group);
  switch (part.bits) {
    case 2: return visit_codes<2>(row, scales, group, n, vectors);
    case 3: return visit_codes<3>(row, scales, group, n, vectors);
    case 4: return visit_codes<4>(row, scales, group, n, vectors);
    default: return visit_codes<8>(row, scales, group, n, vectors);
  }
}

// Writes whole octets.
inline void decode_codes(const Matrix& part, int64_t e, int64_t i, int64_t n, float* out) {
  visit_codes(part, e, i, n, [&](int64_t o, __m256 w, int) { _mm256_storeu_ps(out + o * kLanes, w); });
}

// Multiply while decoding, in the order of a dot of two chains; n a multiple of 16.
inline float dot_codes(const Matrix& part, int64_t e, int64_t i, int64_t n, const float* x) {
  __m256 acc[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  visit_codes(part, e, i, n, [&](int64_t o, __m256 w, int j) {
    acc[j] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + o * kLanes), acc[j]);
  });
  return sum(_mm256_add_ps(acc[0], acc[1]));
}

// n a multiple of 8.
inline void axpy_codes(float a, const Matrix& part, int64_t e, int64_t i, int64_t n, float* y) {
  const __m256 va = _mm256_set1_ps(a);
  visit_codes(part, e, i, n, [&](int64_t o, __m256 w, int) {
    _mm256_storeu_ps(y + o * kLanes, _mm256_fmadd_ps(va, w, _mm256_loadu_ps(y + o * kLanes)));
  });
}

// ---- rows of 8-bit codes, multiplied as they lie -------------------------------------------------------------
//
// level = scale * (Byte / kOne + 1/2), one scale for each group of columns: sums run over a group's bytes, then are
// scaled, so that a weight costs a conversion and a multiplication.

struct ByteRows {
  const uint8_t* codes;    // the first row
  const uint16_t* scales;  // its first group's
  int64_t stride, groups, group, n;
  ByteRows(const Matrix& m, int64_t e, int64_t i, int64_t columns) : n(columns) {
    stride = octets_of(n) * kLanes, group = std::min(m.group, stride), groups = (n + group - 1) / group;
    codes = (const uint8_t*)m.data + e * m.stride + i * stride;
    scales = m.scales + e * m.scales_stride + i * groups;
  }
  ByteRows from(int64_t row) const {
    ByteRows rest = *this;
    rest.codes += row * stride, rest.scales += row * groups;
    return rest;
  }
  // of a Byte
  float scale(int64_t row, int64_t g) const { return BF16::scalar(scales[row * groups + g]) * (1.0f / Byte::kOne); }
  int64_t end(int64_t g) const { return std::min(n, (g + 1) * group); }
};

// What half a step adds: half the sums of x, by lane, over each group of columns, in Bytes: [groups, 8].
inline void half_sums(const ByteRows& rows, const float* x, float* halves) {
  for (int64_t g = 0; g < rows.groups; ++g) {
    __m256 acc = _mm256_setzero_ps();
    int64_t c = g * rows.group;
    const int64_t end = rows.end(g);
    for (; c + kLanes <= end; c += kLanes) acc = _mm256_add_ps(acc, _mm256_loadu_ps(x + c));
    if (c < end) acc = _mm256_add_ps(acc, load_tail<FP32>(x, end, end - c));
    _mm256_storeu_ps(halves + g * kLanes, _mm256_mul_ps(acc, _mm256_set1_ps(0.5f * Byte::kOne)));
  }
}

// sums[r * ld + s] += row r . x[s]; halves[s]: half_sums of x[s].
template <int R, int S>
void dot_bytes(const ByteRows& rows, const float* const* x, const float* const* halves, float* sums, int64_t ld) {
  __m256 total[R][S];
  for (auto& row : total)
    for (auto& one : row) one = _mm256_setzero_ps();
  for (int64_t g = 0; g < rows.groups; ++g) {
    __m256 acc[R][S][1];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) acc[r][s][0] = _mm256_loadu_ps(halves[s] + g * kLanes);
    int64_t c = g * rows.group;
    const int64_t end = rows.end(g);
    for (; c + 2 * kLanes <= end; c += 2 * kLanes) {
      if (c % 64 == 0) fetch_ahead<Byte, R>(rows.codes + R * rows.stride + c, rows.stride);
      __m256 in[S][2];
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) in[s][0] = _mm256_loadu_ps(x[s] + c), in[s][1] = _mm256_loadu_ps(x[s] + c + kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        Byte::load_two(rows.codes + r * rows.stride + c, [&](int j, __m256 w) {
#pragma GCC unroll 4
          for (int s = 0; s < S; ++s) acc[r][s][0] = _mm256_fmadd_ps(w, in[s][j], acc[r][s][0]);
        });
    }
    if (c + kLanes <= end) dot_lanes<Byte>(rows.codes, rows.stride, x, c, 0, acc), c += kLanes;
    if (c < end)
      for (int s = 0; s < S; ++s) {
        const __m256 in = load_tail<FP32>(x[s], end, end - c);
        for (int r = 0; r < R; ++r)
          acc[r][s][0] = _mm256_fmadd_ps(load_tail<Byte>(rows.codes + r * rows.stride, end, end - c), in, acc[r][s][0]);
      }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m256 scale = _mm256_set1_ps(rows.scale(r, g));
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) total[r][s] = _mm256_fmadd_ps(scale, acc[r][s][0], total[r][s]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < S; ++s) sums[r * ld + s] += sum(total[r][s]);
}

template <int R>
void dot_bytes(const ByteRows& rows, int64_t inputs, const float* const* x, const float* const* halves, float* sums, int64_t ld) {
  switch (inputs) {
    case 1: return dot_bytes<R, 1>(rows, x, halves, sums, ld);
    case 2: return dot_bytes<R, 2>(rows, x, halves, sums, ld);
    default: return dot_bytes<R, 3>(rows, x, halves, sums, ld);
  }
}

// y[s] += half[s] + sum over r < R of factor[s][r] * row r, over Octets octets of columns from c on.
template <int R, int S, int Octets>
__attribute__((always_inline)) inline void axpy_octets(const __m256 (&factor)[S][R], const float (&half)[S], const ByteRows& rows,
                                                       float* const* y, int64_t c) {
  __m256 into[S][Octets];
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 2
    for (int j = 0; j < Octets; ++j) into[s][j] = _mm256_add_ps(_mm256_loadu_ps(y[s] + c + j * kLanes), _mm256_set1_ps(half[s]));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const auto add = [&](int j, __m256 w) {
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) into[s][j] = _mm256_fmadd_ps(factor[s][r], w, into[s][j]);
    };
    const uint8_t* codes = rows.codes + r * rows.stride + c;
    if constexpr (Octets == 2)
      Byte::load_two(codes, add);
    else
      add(0, Byte::load(codes));
  }
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 2
    for (int j = 0; j < Octets; ++j) _mm256_storeu_ps(y[s] + c + j * kLanes, into[s][j]);
}

// y[s] += sum over r < R of a[s * lda + r] * row r.
template <int R, int S>
void axpy_bytes(const float* a, int64_t lda, const ByteRows& rows, float* const* y) {
  for (int64_t g = 0; g < rows.groups; ++g) {
    float scaled[S][R], half[S];
    for (int s = 0; s < S; ++s) {
      half[s] = 0;
      for (int r = 0; r < R; ++r) half[s] += 0.5f * Byte::kOne * (scaled[s][r] = a[s * lda + r] * rows.scale(r, g));
    }
    __m256 factor[S][R];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) factor[s][r] = _mm256_set1_ps(scaled[s][r]);
    int64_t c = g * rows.group;
    const int64_t end = rows.end(g);
    for (; c + 2 * kLanes <= end; c += 2 * kLanes) {
      if (c % 64 == 0) fetch_ahead<Byte, R>(rows.codes + R * rows.stride + c, rows.stride);
      axpy_octets<R, S, 2>(factor, half, rows, y, c);
    }
    if (c + kLanes <= end) axpy_octets<R, S, 1>(factor, half, rows, y, c), c += kLanes;
    for (; c < end; ++c)
      for (int s = 0; s < S; ++s) {
        float into = y[s][c] + half[s];
        for (int r = 0; r < R; ++r) into = __builtin_fmaf(scaled[s][r], Byte::scalar(rows.codes[r * rows.stride + c]), into);
        y[s][c] = into;
      }
  }
}

template <int R>
void axpy_bytes(int64_t outputs, const float* a, int64_t lda, const ByteRows& rows, float* const* y) {
  for (; outputs >= 2; outputs -= 2, a += 2 * lda, y += 2) axpy_bytes<R, 2>(a, lda, rows, y);
  if (outputs) axpy_bytes<R, 1>(a, lda, rows, y);
}

// ---- one row of a bitmap part --------------------------------------------------------------------------------

// Levels of `count` codes of 4 or 8 bits from the `first` on.
inline void decode_levels(const uint8_t* codes, int64_t bits, int64_t first, int64_t count, float* out) {
  if (bits == 8) {
    for (int64_t k = 0; k < count; ++k) out[k] = codes[first + k] - 127.5f;
    return;
  }
  for (int64_t k = 0; k < count; ++k) out[k] = (codes[(first + k) >> 1] >> 4 * ((first + k) & 1) & 15) - 7.5f;
}

template <class T>
struct BitmapRow {
  const uint8_t* mask;
  const typename T::type* values;  // null: codes
  int64_t readable;
  bool whole(int64_t n) const { return values && readable >= n + 72; }  // vectors all along: not at the buffer's very end
};

template <class T>
BitmapRow<T> locate(const Bitmap& part, int p, int64_t mask_bytes, int64_t e, int64_t i) {
  const uint8_t* mask = part.mask[p] + e * part.mask_stride[p] + i * mask_bytes;
  if (part.bits) return {mask, nullptr, 0};
  const int64_t expert = part.starts ? part.starts[e * part.starts_stride] : e * part.values_stride[p];
  const int64_t start = expert + (part.row_ptr[p] ? part.row_ptr[p][e * part.row_ptr_stride[p] + i] : i * part.values_per_row);
  return {mask, (const typename T::type*)part.values[p] + start, part.readable[p] - start};
}

// Multiply while decoding, for few inputs: sums[r * ld + s] += row r . x[s], whole rows, in the order of a dot of two
// chains (where n is a multiple of 64). Two rows at a time hide the additions' latency.
template <class T, int R, int S>
void dot_bitmap(const BitmapRow<T>* rows, int64_t n, const float* const* x, float* sums, int64_t ld) {
  __m256 acc[R][S][2];
  for (auto& row : acc)
    for (auto& sum : row) sum[0] = sum[1] = _mm256_setzero_ps();
  const typename T::type* values[R];
  for (int r = 0; r < R; ++r) values[r] = rows[r].values;
  int64_t c = 0;
  for (; c + 64 <= n; c += 64)
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
      values[r] += visit_word<T>(rows[r].mask + c / 8, values[r], [&](int j, __m256 w) {
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) acc[r][s][j & 1] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x[s] + c + kLanes * j), acc[r][s][j & 1]);
      });
  for (int r = 0; r < R; ++r) {
    float rest[S] = {};
    for (int64_t k = c; k < n; ++k) {
      if (!(rows[r].mask[k / 8] >> (k & 7) & 1)) continue;
      const float w = T::scalar(*values[r]++);
      for (int s = 0; s < S; ++s) rest[s] += w * x[s][k];
    }
    for (int s = 0; s < S; ++s) sums[r * ld + s] += rest[s] + sum(_mm256_add_ps(acc[r][s][0], acc[r][s][1]));
  }
}

// y[s] += a[s * lda] * row.
template <class T, int S>
void axpy_bitmap(const float* a, int64_t lda, const BitmapRow<T>& row, int64_t n, float* const* y) {
  __m256 factor[S];
  for (int s = 0; s < S; ++s) factor[s] = _mm256_set1_ps(a[s * lda]);
  visit_row<T>(
      row.mask, row.values, row.readable, n,
      [&](int64_t c, __m256 w) {
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) _mm256_storeu_ps(y[s] + c, _mm256_fmadd_ps(factor[s], w, _mm256_loadu_ps(y[s] + c)));
      },
      [&](int64_t c, float w) {
        for (int s = 0; s < S; ++s) y[s][c] = __builtin_fmaf(a[s * lda], w, y[s][c]);
      });
}

constexpr int64_t kDirect = 4;  // inputs for which a row of a bitmap is multiplied while it is decoded

template <class T>
void dot_bitmap(const BitmapRow<T>* rows, int64_t count, int64_t n, const float* const* x, int64_t inputs, float* sums, int64_t ld) {
  if (count == 2 && inputs == 1) return dot_bitmap<T, 2, 1>(rows, n, x, sums, ld);
  if (count == 2 && inputs == 2) return dot_bitmap<T, 2, 2>(rows, n, x, sums, ld);
  for (int64_t r = 0; r < count; ++r) switch (inputs) {
      case 1: dot_bitmap<T, 1, 1>(rows + r, n, x, sums + r * ld, ld); break;
      case 2: dot_bitmap<T, 1, 2>(rows + r, n, x, sums + r * ld, ld); break;
      case 3: dot_bitmap<T, 1, 3>(rows + r, n, x, sums + r * ld, ld); break;
      default: dot_bitmap<T, 1, 4>(rows + r, n, x, sums + r * ld, ld);
    }
}

template <class T>
void axpy_bitmap(const float* a, int64_t lda, const BitmapRow<T>& row, int64_t n, float* const* y, int64_t outputs) {
  switch (outputs) {
    case 1: return axpy_bitmap<T, 1>(a, lda, row, n, y);
    case 2: return axpy_bitmap<T, 2>(a, lda, row, n, y);
    case 3: return axpy_bitmap<T, 3>(a, lda, row, n, y);
    default: return axpy_bitmap<T, 4>(a, lda, row, n, y);
  }
}

// `spare`: n + 72 floats.
template <class T>
void decode_bitmap(const Bitmap& part, int p, int64_t mask_bytes, int64_t e, int64_t i, int64_t n, float* out, float* spare) {
  const BitmapRow<T> at = locate<T>(part, p, mask_bytes, e, i);
  if (at.values) return decode_row<T>(at.mask, at.values, at.readable, n, out);
  int64_t count = 0;
  for (int64_t b = 0; b < mask_bytes; b += 8) {
    uint64_t word;
    memcpy(&word, at.mask + b, 8);
    count += __builtin_popcountll(word);
  }
  const uint8_t* codes = (const uint8_t*)part.values[p] + (part.starts ? part.starts[e * part.starts_stride] : e * part.values_stride[p]);
  if (part.row_ptr[p])
    decode_levels(codes, part.bits, part.row_ptr[p][e * part.row_ptr_stride[p] + i], count, spare);
  else
    decode_levels(codes + i * part.bits * octets_of(part.values_per_row), part.bits, 0, count, spare);
  decode_row<FP32>(at.mask, spare, n + 72, n, out);
  const int64_t group = std::min(part.group, n), groups = (n + group - 1) / group;
  const uint16_t* scales = part.scales[p] + e * part.scales_stride[p] + i * groups;
  for (int64_t g = 0; g < groups; ++g) {
    const float scale = BF16::scalar(scales[g]);
    for (int64_t c = g * group; c < std::min(n, (g + 1) * group); ++c) out[c] *= scale;
  }
}

}  // namespace resmoe
