// Rows of codes, plain ones or of a trellis, multiplied while they are decoded.
//
// weight = scale / kOne * (value + kShift), one scale for each group of columns. Sums run over a group's values, then
// are scaled, so that a weight costs its conversion and a multiplication.
#pragma once

#include <type_traits>

#include "abi.h"
#include "dense.h"
#include "trellis.h"

namespace resmoe {

template <int Bits>
struct Code {
  static constexpr int kBits = Bits;
  using Tables = NoTables;
  static constexpr float kOne = 1, kShift = -0.5f * ((1 << Bits) - 1);
  template <int Octets>
  static inline __m256i broadcast(const uint8_t* from) {  // 16 bits for each octet
    uint32_t word = 0;
    memcpy(&word, from, 2 * Octets);
    return _mm256_set1_epi32(word);
  }
  static inline __m256i shifts(int step, int from) {
    return _mm256_add_epi32(_mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(step)),
                            _mm256_set1_epi32(from));
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
          code =
              _mm256_or_si256(code, _mm256_and_si256(_mm256_srlv_epi32(highs, shifts(1, 8 * j)), _mm256_set1_epi32(4)));
        visit(j, _mm256_cvtepi32_ps(code));
      }
    }
  }
};

// Values are codes less 128, times 2**24: a shuffle into the upper bytes costs less than widening.
template <>
struct Code<8> {
  static constexpr int kBits = 8;
  using Tables = NoTables;
  static constexpr float kOne = 1 << 24, kShift = 0.5f * kOne;
  template <int First>  // of sixteen codes eight: the first, or from the ninth on
  static inline __m256 eight(__m256i flipped) {
    constexpr int f = First;
    const __m256i to_top = _mm256_setr_epi8(-1, -1, -1, f, -1, -1, -1, f + 1, -1, -1, -1, f + 2, -1, -1, -1, f + 3, -1,
                                            -1, -1, f + 4, -1, -1, -1, f + 5, -1, -1, -1, f + 6, -1, -1, -1, f + 7);
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

// S outputs' octets from o on, in registers: V of them, or a lone one, of which there may be fewer columns than eight.
template <int S, int V>
__attribute__((always_inline)) inline void load_outputs(__m256 (&into)[S][V], const float* const* y, int64_t o,
                                                        int64_t columns) {
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const float* from = y[s] + (o + v) * kLanes;
      into[s][v] = V == 1 ? _mm256_maskload_ps(from, lanes_of(columns)) : _mm256_loadu_ps(from);
    }
}
template <int S, int V>
__attribute__((always_inline)) inline void store_outputs(const __m256 (&from)[S][V], float* const* y, int64_t o,
                                                         int64_t columns) {
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

template <class C>
struct CodeRows {
  const uint8_t* codes;    // the first row
  const uint16_t* scales;  // its first group's
  typename C::Tables tables;
  int64_t n, octets, stride, group, groups;
  CodeRows(const Matrix& m, int64_t e, int64_t i, int64_t columns)
      : tables(m.tables), n(columns), octets(octets_of(n)), stride(C::kBits * octets) {
    group = std::min(m.group, octets * kLanes);
    groups = (n + group - 1) / group;
    codes = (const uint8_t*)m.data + e * m.stride + i * stride;
    scales = m.scales + e * m.scales_stride + i * groups;
  }
  CodeRows from(int64_t row) const {
    CodeRows rest = *this;
    rest.codes += row * stride;
    rest.scales += row * groups;
    return rest;
  }
  float scale(int64_t row, int64_t g) const { return BF16::scalar(scales[row * groups + g]) * (1.0f / C::kOne); }
  int64_t begin(int64_t g) const { return g * group / kLanes; }  // octets
  int64_t end(int64_t g) const { return std::min(octets, (g + 1) * group / kLanes); }
  int64_t whole() const { return n / kLanes; }
  // The next R rows, a cache line at a time. Always inline: GCC drops calls of what does nothing but prefetch.
  template <int R>
  __attribute__((always_inline)) void fetch_ahead(int64_t octet) const {
    constexpr int kLow = C::kBits == 3 ? 2 : C::kBits;  // bytes
    if (octet % (64 / kLow) == 0)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) _mm_prefetch((const char*)codes + (R + r) * stride + octet * kLow, _MM_HINT_T0);
  }
};

// Where the values of R rows come from: plain codes from the rows themselves.
template <class C, int R>
struct Values {
  __attribute__((always_inline)) void fetch(const CodeRows<C>&, int64_t, int64_t) {}
  // visit(j, values) of one octet or of two of row r.
  template <int Octets, class Visit>
  __attribute__((always_inline)) void load(const CodeRows<C>& rows, int r, int64_t o, Visit visit) const {
    C::template load<Octets>(rows.codes + r * rows.stride, o, rows.octets, visit);
  }
};
// Levels of a trellis are decoded some octets at a time.
template <int Bits, int R>
struct Values<TrellisCode<Bits>, R> {
  using Rows = CodeRows<TrellisCode<Bits>>;
  alignas(32) int8_t levels[R][kDecoded * kLanes];
  int64_t first = 0, last = 0;  // octets
  __attribute__((always_inline)) void fetch(const Rows& rows, int64_t o, int64_t end) {
    if (o >= last) decode(rows, o, end);
  }
  __attribute__((noinline)) void decode(const Rows& rows, int64_t o, int64_t end) {
    first = o;
    last = std::min(o + kDecoded, end);
    for (int r = 0; r < R; ++r)
      decode_trellis<Bits>(rows.tables, rows.codes + r * rows.stride, first, last - first, rows.octets, levels[r]);
  }
  template <int Octets, class Visit>
  __attribute__((always_inline)) void load(const Rows&, int r, int64_t o, Visit visit) const {
    for (int j = 0; j < Octets; ++j)
      visit(j, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_8((const uint8_t*)levels[r] + (o - first + j) * kLanes))));
  }
};

// What kShift adds to a dot: x by lane over each group of columns, times kShift: [groups, 8].
template <class C>
void shift_sums(const CodeRows<C>& rows, const float* x, float* shifts) {
  for (int64_t g = 0; g < rows.groups; ++g) {
    __m256 acc = _mm256_setzero_ps();
    for (int64_t o = rows.begin(g); o < rows.end(g); ++o)
      acc = _mm256_add_ps(acc, o < rows.whole() ? _mm256_loadu_ps(x + o * kLanes)
                                                : _mm256_maskload_ps(x + o * kLanes, lanes_of(rows.n - o * kLanes)));
    _mm256_storeu_ps(shifts + g * kLanes, _mm256_mul_ps(acc, _mm256_set1_ps(C::kShift)));
  }
}

// sums[r * ld + s] += row r . x[s]; shifts[s]: shift_sums of x[s].
template <class C, int R, int S>
void dot_codes(const CodeRows<C>& rows, const float* const* x, const float* const* shifts, float* sums, int64_t ld) {
  Values<C, R> values;
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
        values.template load<decltype(count)::value>(rows, r, o, [&](int j, __m256 w) {
#pragma GCC unroll 4
          for (int s = 0; s < S; ++s) acc[r][s] = _mm256_fmadd_ps(w, in[s][j], acc[r][s]);
        });
    };
    int64_t o = rows.begin(g);
    const int64_t end = rows.end(g), whole = std::min(end, rows.whole());
    for (; o + 2 <= whole; o += 2) {
      rows.template fetch_ahead<R>(o);
      values.fetch(rows, o, end);
      __m256 in[S][2];
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) {
        in[s][0] = _mm256_loadu_ps(x[s] + o * kLanes);
        in[s][1] = _mm256_loadu_ps(x[s] + (o + 1) * kLanes);
      }
      add(std::integral_constant<int, 2>(), o, in);
    }
    for (; o < end; ++o) {
      values.fetch(rows, o, end);
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

template <class C, int R>
void dot_codes(const CodeRows<C>& rows, int64_t inputs, const float* const* x, const float* const* shifts, float* sums,
               int64_t ld) {
  switch (inputs) {
    case 1:
      return dot_codes<C, R, 1>(rows, x, shifts, sums, ld);
    case 2:
      return dot_codes<C, R, 2>(rows, x, shifts, sums, ld);
    default:
      return dot_codes<C, R, 3>(rows, x, shifts, sums, ld);
  }
}

// y[s] += shift[s] + sum over r < R of factor[s][r] * row r, over octets from o on.
template <class C, int R, int S, int Octets>
__attribute__((always_inline)) inline void axpy_octets(const __m256 (&factor)[S][R], const float (&shift)[S],
                                                       const CodeRows<C>& rows, const Values<C, R>& values,
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
    values.template load<Octets>(rows, r, o, [&](int j, __m256 w) {
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) into[s][j] = _mm256_fmadd_ps(factor[s][r], w, into[s][j]);
    });
  store_outputs(into, y, o, columns);
}

// y[s] += sum over r < R of a[s * lda + r] * row r.
template <class C, int R, int S>
void axpy_rows(const float* a, int64_t lda, const CodeRows<C>& rows, float* const* y) {
  Values<C, R> values;
  for (int64_t g = 0; g < rows.groups; ++g) {
    float shift[S];
    __m256 factor[S][R];
    for (int s = 0; s < S; ++s) {
      shift[s] = 0;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const float f = a[s * lda + r] * rows.scale(r, g);
        shift[s] += C::kShift * f;
        factor[s][r] = _mm256_set1_ps(f);
      }
    }
    int64_t o = rows.begin(g);
    const int64_t end = rows.end(g), whole = std::min(end, rows.whole());
    for (; o + 2 <= whole; o += 2) {
      rows.template fetch_ahead<R>(o);
      values.fetch(rows, o, end);
      axpy_octets<C, R, S, 2>(factor, shift, rows, values, y, o);
    }
    for (; o < end; ++o) {
      values.fetch(rows, o, end);
      axpy_octets<C, R, S, 1>(factor, shift, rows, values, y, o);
    }
  }
}

// For many outputs: kRows rows of some octets as fp32, and their factors, all in the first cache.
template <class C>
struct CodeBlock {
  static constexpr int64_t kOctets = 16;
  alignas(32) float wide[kRows][kOctets * kLanes];
  float factor[kInputs][kRows],
      shift[kInputs][kRows];  // shift: of the four rows from r on; of one behind the last four

  void set_factors(const float* a, int64_t lda, const CodeRows<C>& rows, int64_t count, int64_t g, int64_t outputs) {
    const int64_t fours = count / 4 * 4;
    for (int64_t s = 0; s < outputs; ++s)
      for (int64_t r = 0; r < count; ++r) {
        float& into = shift[s][r < fours ? r / 4 * 4 : r];
        if (r % 4 == 0 || r >= fours) into = 0;
        factor[s][r] = a[s * lda + r] * rows.scale(r, g);
        into += C::kShift * factor[s][r];
      }
  }
  void widen(const CodeRows<C>& rows, int64_t count, int64_t begin, int64_t end) {
    for (int64_t r = 0; r < count; ++r) {
      const auto store = [&](int64_t o, __m256 w) { _mm256_store_ps(wide[r] + (o - begin) * kLanes, w); };
      const CodeRows<C> row = rows.from(r);
      Values<C, 1> values;
      values.fetch(row, begin, end);
      int64_t o = begin;
      for (; o + 2 <= end; o += 2) values.template load<2>(row, 0, o, [&](int j, __m256 w) { store(o + j, w); });
      if (o < end) values.template load<1>(row, 0, o, [&](int, __m256 w) { store(o, w); });
    }
  }
  // y[s] += factor . wide for S outputs from `first` on and V octets from o, in the order of axpy_octets.
  template <int S, int V>
  __attribute__((always_inline)) inline void add(int64_t count, float* const* y, int64_t first, int64_t begin,
                                                 int64_t o, int64_t columns = kLanes) const {
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
      w += kOctets * kLanes;
      ++f;
      ++h;
    };
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) {
      add_shift();
      for (int k = 0; k < 4; ++k) add_row();
    }
    for (; r < count; ++r) {
      add_shift();
      add_row();
    }
    store_outputs(into, y, o, columns);
  }
  template <int S>
  void add(const CodeRows<C>& rows, int64_t count, float* const* y, int64_t first, int64_t begin, int64_t end) const {
    int64_t o = begin;
    for (; o + 4 <= std::min(end, rows.whole()); o += 4) add<S, 4>(count, y, first, begin, o);
    for (; o < end; ++o) add<S, 1>(count, y, first, begin, o, rows.n - o * kLanes);
  }
};

constexpr int64_t kBlocked = 8;  // outputs for which rows are widened once for all

// y[s] += sum over r < count of a[s * lda + r] * row r; count at most kRows, outputs at most kInputs.
template <class C>
void axpy_codes(const float* a, int64_t lda, const CodeRows<C>& rows, int64_t count, float* const* y, int64_t outputs) {
  if (outputs < kBlocked) {
    const auto add = [&](auto rows_at_once, int64_t r) {
      constexpr int R = decltype(rows_at_once)::value;
      int64_t s = 0;
      for (; s + 2 <= outputs; s += 2) axpy_rows<C, R, 2>(a + s * lda + r, lda, rows.from(r), y + s);
      if (s < outputs) axpy_rows<C, R, 1>(a + s * lda + r, lda, rows.from(r), y + s);
    };
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) add(std::integral_constant<int, 4>(), r);
    for (; r < count; ++r) add(std::integral_constant<int, 1>(), r);
    return;
  }
  CodeBlock<C> block;
  for (int64_t g = 0; g < rows.groups; ++g) {
    block.set_factors(a, lda, rows, count, g, outputs);
    for (int64_t o = rows.begin(g); o < rows.end(g); o += block.kOctets) {
      const int64_t end = std::min(rows.end(g), o + block.kOctets);
      block.widen(rows, count, o, end);
      for (int64_t s = 0; s < outputs; s += 3) switch (outputs - s) {
          case 1:
            block.template add<1>(rows, count, y + s, s, o, end);
            break;
          case 2:
            block.template add<2>(rows, count, y + s, s, o, end);
            break;
          default:
            block.template add<3>(rows, count, y + s, s, o, end);
        }
    }
  }
}

// visit(CodeRows<C>), C the code, of the n columns of expert e's row i and those after it.
template <class Visit>
inline void with_codes(const Matrix& m, int64_t e, int64_t i, int64_t n, Visit visit) {
  if (m.tables) switch (m.bits) {
      case 1:
        return visit(CodeRows<TrellisCode<1>>(m, e, i, n));
      case 2:
        return visit(CodeRows<TrellisCode<2>>(m, e, i, n));
      case 3:
        return visit(CodeRows<TrellisCode<3>>(m, e, i, n));
      default:
        return visit(CodeRows<TrellisCode<4>>(m, e, i, n));
    }
  switch (m.bits) {
    case 2:
      return visit(CodeRows<Code<2>>(m, e, i, n));
    case 3:
      return visit(CodeRows<Code<3>>(m, e, i, n));
    case 4:
      return visit(CodeRows<Code<4>>(m, e, i, n));
    default:
      return visit(CodeRows<Code<8>>(m, e, i, n));
  }
}

// One row's levels, whole octets: for the self-test of the loader.
template <class C>
void decode_codes(const CodeRows<C>& row, float* out) {
  Values<C, 1> values;
  for (int64_t g = 0; g < row.groups; ++g)
    for (int64_t o = row.begin(g); o < row.end(g); ++o) {
      values.fetch(row, o, row.end(g));
      values.template load<1>(row, 0, o, [&](int, __m256 w) {
        _mm256_storeu_ps(out + o * kLanes,
                         _mm256_mul_ps(_mm256_add_ps(w, _mm256_set1_ps(C::kShift)), _mm256_set1_ps(row.scale(0, g))));
      });
    }
}

}  // namespace resmoe
