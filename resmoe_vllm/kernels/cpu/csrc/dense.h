// Products of rows of weights with vectors, in registers: dots (rows . inputs) and axpys (outputs += a * rows).
//
// Every element of a result is added up in one order, whatever stands beside it, so a token's result does not depend
// on its batch: a dot runs along its row in the lanes of a vector, in blocks of kDotColumns that are added one after
// the other; an axpy adds row after row.
//
// Products are those of fp32 numbers, or, of x with bf16 weights where the processor has them, of pairs of bf16: x that
// is bf16 is taken as it is, and where it has more bits as a sum of three bf16 numbers, its limbs. What is computed of
// x would need two, and two products of pairs take as long as one of fp32.
#pragma once

#include <type_traits>
#include <vector>

#include "vec.h"

namespace resmoe {

constexpr int64_t kRows = 128;   // rows of a block: of U they stay in the second cache between dots and axpys
constexpr int64_t kInputs = 48;  // inputs of a block: with kDotColumns they stay there too
constexpr int64_t kSums = 2 * kInputs;

// Rows of T as fp32.
template <class T>
struct Fma {
  using Weight = typename T::type;
  using Number = float;
  using Lanes = Floats;
  static constexpr int kColumns = kWide;  // of a vector
  static constexpr int64_t kDotColumns = 1024;
  static constexpr int kMostLimbs = 1;
  static inline Lanes weights(const Weight* p) { return T::load(p); }
  static inline Lanes weights(const Weight* p, int64_t count) { return T::load(p, count); }
  static inline Lanes numbers(const Number* p) { return load_floats(p); }
  static inline Floats multiply(Floats sums, Lanes w, Lanes x) { return fma(w, x, sums); }
  static int64_t limbs_of(uint32_t) { return 1; }
  static void split(const float* x, int64_t n, int64_t, Number* to, int64_t) { std::copy_n(x, n, to); }
};

#ifdef __AVX512BF16__
// Rows of bf16, two columns at once.
struct Bf16Pairs {
  using Weight = uint16_t;
  using Number = uint16_t;
  using Lanes = __m512i;
  static constexpr int kColumns = 32;
  static constexpr int64_t kDotColumns = 2048;
  static constexpr int kMostLimbs = 3;
  static inline Lanes weights(const Weight* p) { return _mm512_loadu_si512(p); }
  static inline Lanes weights(const Weight* p, int64_t count) {
    return _mm512_maskz_loadu_epi16(first_of_32(count), p);
  }
  static inline Lanes numbers(const Number* p) { return _mm512_loadu_si512(p); }
  static inline Floats multiply(Floats sums, Lanes w, Lanes x) {
    return _mm512_dpbf16_ps(sums, (__m512bh)w, (__m512bh)x);
  }
  static int64_t limbs_of(uint32_t bits) { return bits & 0xffff ? 3 : 1; }
  // x to `limbs` rows of limbs, `apart` numbers from one to the next.
  static void split(const float* x, int64_t n, int64_t limbs, Number* to, int64_t apart) {
    for (int64_t c = 0; c < n; ++c) {
      float rest = x[c];
      for (int64_t l = 0; l < limbs; ++l) {
        const uint16_t limb = BF16::nearest(rest);
        const float own = BF16::scalar(limb);
        to[l * apart + c] = limb;
        rest = own - own == 0 ? rest - own : 0;  // of an infinity nothing is left
      }
    }
  }
};
#endif

template <class T>
struct ProductsOf {
  using type = Fma<T>;
};
#ifdef __AVX512BF16__
template <>
struct ProductsOf<BF16> {
  using type = Bf16Pairs;
};
#endif
template <class T>
using Products = typename ProductsOf<T>::type;

// ---- inputs --------------------------------------------------------------------------------------------------

// Rows of numbers as products take them, each `limbs` rows, with zeros behind them.
template <class Number>
class Numbers {
 public:
  void resize(int64_t count, int64_t columns, int64_t limbs) {
    columns_ = columns;
    apart_ = round_up(columns, 64 / sizeof(Number));
    limbs_ = limbs;
    data_.take(count * limbs * apart_ * sizeof(Number));
  }
  const Number* at(int64_t i, int64_t limb) const { return (const Number*)data_.data() + (i * limbs_ + limb) * apart_; }
  template <class P>
  void make(int64_t i, const float* x, int64_t limbs) {
    Number* to = const_cast<Number*>(at(i, 0));
    P::split(x, columns_, limbs, to, apart_);
    for (int64_t l = 0; l < limbs; ++l) std::fill(to + l * apart_ + columns_, to + (l + 1) * apart_, Number(0));
  }

 private:
  Buffer data_;
  int64_t columns_ = 0, apart_ = 0, limbs_ = 0;
};

template <class P>
using OperandsOf = Operands<const typename P::Number*>;
static_assert(OperandsOf<Fma<FP32>>::kMost >= 3 * kSums);

// ---- dots ----------------------------------------------------------------------------------------------------

// The cache lines of 64 bytes of R rows; beyond a buffer's end nothing happens. Always inline: GCC drops calls of what
// does nothing but prefetch.
template <int R, class W>
__attribute__((always_inline)) inline void fetch_ahead(const W* row, int64_t stride) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) fetch(row + r * stride);
}

constexpr int kDotRows = 4;
constexpr int kDotInputs = kWide == 16 ? 6 : 3;  // with the rows their sums fill the registers

// sums[sum[s] * ld + r] += row r . x[s] over columns [begin, end). Ahead: fetch the R rows behind these, which come
// next where each row is read once.
template <class P, int R, int S, bool Ahead>
inline void dot_tile(const typename P::Weight* row, int64_t stride, const typename P::Number* const* x,
                     const int32_t* sum, int64_t begin, int64_t end, float* sums, int64_t ld) {
  constexpr int kColumns = P::kColumns;
  Floats acc[R][S];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) acc[r][s] = float_set(0);
  const auto add_lanes = [&](int64_t c) __attribute__((always_inline)) {
    typename P::Lanes in[S];
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) in[s] = P::numbers(x[s] + c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename P::Lanes w = P::weights(row + r * stride + c);
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) acc[r][s] = P::multiply(acc[r][s], w, in[s]);
    }
  };
  int64_t c = begin;
  if (Ahead) {
    constexpr int kLine = 64 / sizeof(typename P::Weight), kSteps = kLine / kColumns;
    for (; c + kLine <= end; c += kLine) {
      fetch_ahead<R>(row + R * stride + c, stride);
#pragma GCC unroll 4
      for (int j = 0; j < kSteps; ++j) add_lanes(c + j * kColumns);
    }
  }
  for (; c + kColumns <= end; c += kColumns) add_lanes(c);
  if (c < end)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename P::Lanes w = P::weights(row + r * stride + c, end - c);
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) acc[r][s] = P::multiply(acc[r][s], w, P::numbers(x[s] + c));
    }
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) {
    Floats row_sums[kDotRows];
#pragma GCC unroll 4
    for (int r = 0; r < kDotRows; ++r) row_sums[r] = r < R ? acc[r % R][s] : float_set(0);
    alignas(16) float totals[kDotRows];
    store_four(totals, sums_of_four(row_sums[0], row_sums[1], row_sums[2], row_sums[3]));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[sum[s] * ld + r] += totals[r];
  }
}

template <class P, int R, int S, bool Ahead, class... Rest>
inline void dot_inputs(int64_t inputs, Rest... rest) {
  if constexpr (S > 1)
    if (inputs < S) return dot_inputs<P, R, S - 1, Ahead>(inputs, rest...);
  dot_tile<P, R, S, Ahead>(rest...);
}

template <class P, int R, bool Ahead, class... Rest>
inline void dot_rows(int64_t rows, Rest... rest) {
  if constexpr (R > 1)
    if (rows < R) return dot_rows<P, R - 1, Ahead>(rows, rest...);
  dot_inputs<P, R, kDotInputs, Ahead>(rest...);
}

// Rows and inputs by tiles of kDotRows by kDotInputs.
template <class P>
void dot_block(const typename P::Weight* row, int64_t stride, int64_t rows, const OperandsOf<P>& x, int64_t begin,
               int64_t end, float* sums, int64_t ld) {
  for (int64_t r = 0; r < rows; r += kDotRows)
    for (int64_t s = 0; s < x.count; s += kDotInputs) {
      const typename P::Weight* at = row + r * stride;
      const int64_t count = std::min<int64_t>(kDotInputs, x.count - s), own = std::min<int64_t>(kDotRows, rows - r);
      if (s == 0)
        dot_rows<P, kDotRows, true>(own, count, at, stride, x.at + s, x.sum + s, begin, end, sums + r, ld);
      else
        dot_rows<P, kDotRows, false>(own, count, at, stride, x.at + s, x.sum + s, begin, end, sums + r, ld);
    }
}

// sums[x.sum[s] * ld + r] += row r . x[s], n columns.
template <class P>
void add_dots(const typename P::Weight* row, int64_t stride, int64_t rows, int64_t n, const OperandsOf<P>& x,
              float* sums, int64_t ld) {
  constexpr int64_t width = P::kDotColumns;
  if (x.count <= kDotInputs) {  // each row once: read it to its end
    for (int64_t r = 0; r < rows; r += kDotRows)
      for (int64_t c = 0; c < n; c += width)
        dot_block<P>(row + r * stride, stride, std::min<int64_t>(kDotRows, rows - r), x, c, std::min(n, c + width),
                     sums + r, ld);
  } else {
    for (int64_t c = 0; c < n; c += width) dot_block<P>(row, stride, rows, x, c, std::min(n, c + width), sums, ld);
  }
}

// ---- axpys ---------------------------------------------------------------------------------------------------

constexpr int64_t kStrip = 32;  // columns of a tile of axpys
constexpr int kStripParts = kStrip / kWide;
constexpr int64_t kAxpyColumns = 256;
constexpr int kAxpyOutputs = kWide == 16 ? 6 : 3;

// y[s] += a[s * lda + r] * row r, row after row; columns c.. of kStrip, `columns` of them. Rows: of them; 0: `rows`.
template <class T, int S, int Rows, bool Whole>
inline void axpy_tile(const float* a, int64_t lda, const typename T::type* row, int64_t stride, int64_t rows,
                      float* const* y, int64_t c, int64_t columns) {
  const auto left = [&](int v) { return std::max<int64_t>(0, columns - v * kWide); };
  Floats acc[S][kStripParts];
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < kStripParts; ++v) {
      const float* from = y[s] + c + v * kWide;
      acc[s][v] = Whole ? load_floats(from) : load_floats(from, left(v));
    }
  const auto add_row = [&](int64_t r) __attribute__((always_inline)) {
    Floats factor[S];
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) factor[s] = float_set(a[s * lda + r]);
#pragma GCC unroll 4
    for (int v = 0; v < kStripParts; ++v) {
      const typename T::type* from = row + r * stride + c + v * kWide;
      const Floats w = Whole ? T::load(from) : T::load(from, left(v));
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) acc[s][v] = fma(factor[s], w, acc[s][v]);
    }
  };
  if constexpr (Rows > 0) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) add_row(r);
  } else {
    for (int64_t r = 0; r < rows; ++r) add_row(r);
  }
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < kStripParts; ++v) {
      float* to = y[s] + c + v * kWide;
      if (Whole)
        store_floats(to, acc[s][v]);
      else if (left(v))
        store_floats(to, acc[s][v], left(v));
    }
}

// Columns [begin, end) of at most S outputs.
template <class T, int S, int Rows>
inline void axpy_columns(int64_t outputs, const float* a, int64_t lda, const typename T::type* row, int64_t stride,
                         int64_t rows, float* const* y, int64_t begin, int64_t end) {
  if constexpr (S > 1)
    if (outputs < S) return axpy_columns<T, S - 1, Rows>(outputs, a, lda, row, stride, rows, y, begin, end);
  int64_t c = begin;
  for (; c + kStrip <= end; c += kStrip) {
    if (Rows && c * sizeof *row % 64 == 0) fetch_ahead<Rows ? Rows : 1>(row + Rows * stride + c, stride);
    axpy_tile<T, S, Rows, true>(a, lda, row, stride, rows, y, c, kStrip);
  }
  if (c < end) axpy_tile<T, S, 0, false>(a, lda, row, stride, rows, y, c, end - c);
}

// y[s] += sum over r of a[s * lda + r] * row r, n columns.
template <class T>
void add_axpys(const float* a, int64_t lda, const typename T::type* row, int64_t stride, int64_t rows, int64_t n,
               float* const* y, int64_t outputs) {
  constexpr int kFew = 2, kAlong = 4;
  if (outputs <= kFew) {  // rows are read along, four at a time
    for (int64_t r = 0; r < rows; r += kAlong)
      if (rows - r >= kAlong)
        axpy_columns<T, kFew, kAlong>(outputs, a + r, lda, row + r * stride, stride, kAlong, y, 0, n);
      else
        axpy_columns<T, kFew, 0>(outputs, a + r, lda, row + r * stride, stride, rows - r, y, 0, n);
    return;
  }
  for (int64_t c = 0; c < n; c += kAxpyColumns)
    for (int64_t s = 0; s < outputs; s += kAxpyOutputs)
      axpy_columns<T, kAxpyOutputs, 0>(outputs - s, a + s * lda, lda, row, stride, rows, y + s, c,
                                       std::min(n, c + kAxpyColumns));
}

}  // namespace resmoe
