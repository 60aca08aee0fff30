// Products of rows of weights with fp32 vectors, in registers: dots (rows . inputs) and axpys (outputs += a * rows).
//
// Every element of a result is added up in one order, whatever stands beside it, so a token's result does not depend
// on its batch: a dot runs along its row in sums of eight lanes, in blocks of kDotColumns that are added one after the
// other; an axpy adds row after row.
#pragma once

#include "vec.h"

namespace resmoe {

constexpr int64_t kRows = 32;    // rows of a block: of U they stay in the first cache between dots and axpys
constexpr int64_t kInputs = 48;  // inputs of a block, a multiple of 3: with kDotColumns they stay in the second
constexpr int64_t kDotColumns = 1024;
constexpr int64_t kAxpyColumns = 256;

// The cache lines of 32 columns of R rows; beyond a buffer's end nothing happens. Always inline: GCC drops calls of
// what does nothing but prefetch.
template <class T, int R>
__attribute__((always_inline)) inline void fetch_ahead(const typename T::type* row, int64_t stride) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (unsigned b = 0; b < 4 * kLanes * sizeof(typename T::type); b += 64)
      _mm_prefetch((const char*)(row + r * stride) + b, _MM_HINT_T0);
}

// ---- dots ----------------------------------------------------------------------------------------------------

// Eight columns of R rows and S inputs into one of the chains of sums.
template <class T, int R, int S, int Chains>
__attribute__((always_inline)) inline void dot_lanes(const typename T::type* row, int64_t stride, const float* const* x,
                                                     int64_t c, int chain, __m256 (&acc)[R][S][Chains]) {
  __m256 in[S];
#pragma GCC unroll 16
  for (int s = 0; s < S; ++s) in[s] = _mm256_loadu_ps(x[s] + c);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const __m256 w = T::load(row + r * stride + c);
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s) acc[r][s][chain] = _mm256_fmadd_ps(w, in[s], acc[r][s][chain]);
  }
}

// sums[r * ld + s] += row r . x[s] over columns [begin, end); n: columns of the whole row. Chains: sums of lanes that
// take turns, for kernels that multiply one row while they decode it.
// Ahead: fetch the R rows behind these, which come next where each row is read once.
template <class T, int R, int S, int Chains, bool Ahead = false>
inline void dot_tile(const typename T::type* row, int64_t stride, const float* const* x, int64_t begin, int64_t end,
                     float* sums, int64_t ld) {
  __m256 acc[R][S][Chains];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 2
      for (int j = 0; j < Chains; ++j) acc[r][s][j] = _mm256_setzero_ps();
  int64_t c = begin;
  if (Ahead && Chains == 1)
    for (; c + 4 * kLanes <= end; c += 4 * kLanes) {
      fetch_ahead<T, R>(row + R * stride + c, stride);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) dot_lanes<T>(row, stride, x, c + j * kLanes, 0, acc);
    }
  for (; c + Chains * kLanes <= end; c += Chains * kLanes)
#pragma GCC unroll 2
    for (int j = 0; j < Chains; ++j) dot_lanes<T>(row, stride, x, c + j * kLanes, j, acc);
  if (c < end) {
    if (Chains == 2 && c + kLanes <= end) {
      dot_lanes<T>(row, stride, x, c, 0, acc);
      c += kLanes;
    }
    if (c < end)
      for (int s = 0; s < S; ++s) {
        const __m256 in = load_tail<FP32>(x[s], end, end - c);
        for (int r = 0; r < R; ++r)
          acc[r][s][0] = _mm256_fmadd_ps(load_tail<T>(row + r * stride, end, end - c), in, acc[r][s][0]);
      }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s)
      sums[r * ld + s] += sum(Chains == 2 ? _mm256_add_ps(acc[r][s][0], acc[r][s][Chains - 1]) : acc[r][s][0]);
}

template <class T, int R, int Chains, bool Ahead, class... Rest>
inline void dot_inputs(int64_t inputs, const typename T::type* row, int64_t stride, const float* const* x,
                       Rest... rest) {
  switch (inputs) {
    case 1:
      return dot_tile<T, R, 1, Chains, Ahead>(row, stride, x, rest...);
    case 2:
      return dot_tile<T, R, 2, Chains, Ahead>(row, stride, x, rest...);
    default:
      return dot_tile<T, R, 3, Chains, Ahead>(row, stride, x, rest...);
  }
}

template <class T, int Chains, bool Ahead, class... Rest>
inline void dot_rows(int64_t rows, Rest... rest) {
  if constexpr (Chains == 1) {
    if (rows == 4) return dot_inputs<T, 4, Chains, Ahead>(rest...);
    if (rows == 3) return dot_inputs<T, 3, Chains, Ahead>(rest...);
  }
  if (rows == 2) return dot_inputs<T, 2, Chains, Ahead>(rest...);
  dot_inputs<T, 1, Chains, Ahead>(rest...);
}

// Rows and inputs by tiles of four (two chains: two) by three.
template <class T, int Chains>
void dot_block(const typename T::type* row, int64_t stride, int64_t rows, const float* const* x, int64_t inputs,
               int64_t begin, int64_t end, float* sums, int64_t ld) {
  constexpr int64_t kTile = Chains == 1 ? 4 : 2;
  for (int64_t r = 0; r < rows; r += kTile)
    for (int64_t s = 0; s < inputs; s += 3) {
      const typename T::type* at = row + r * stride;
      float* into = sums + r * ld + s;
      const int64_t count = std::min<int64_t>(3, inputs - s);
      if (s == 0)
        dot_rows<T, Chains, true>(std::min(kTile, rows - r), count, at, stride, x + s, begin, end, into, ld);
      else
        dot_rows<T, Chains, false>(std::min(kTile, rows - r), count, at, stride, x + s, begin, end, into, ld);
    }
}

// sums[r * ld + s] += row r . x[s], n columns.
template <class T, int Chains = 1>
void add_dots(const typename T::type* row, int64_t stride, int64_t rows, int64_t n, const float* const* x,
              int64_t inputs, float* sums, int64_t ld) {
  const int64_t width = Chains == 1 ? kDotColumns : n;
  if (inputs <= 3) {  // each row once: read it to its end
    for (int64_t r = 0; r < rows; r += 4)
      for (int64_t c = 0; c < n; c += width)
        dot_block<T, Chains>(row + r * stride, stride, std::min<int64_t>(4, rows - r), x, inputs, c,
                             std::min(n, c + width), sums + r * ld, ld);
  } else {
    for (int64_t c = 0; c < n; c += width)
      dot_block<T, Chains>(row, stride, rows, x, inputs, c, std::min(n, c + width), sums, ld);
  }
}

// ---- axpys ---------------------------------------------------------------------------------------------------

// y[s] += a[s * lda + r] * row r for R rows at once, all columns: for few outputs, rows are read along.
template <class T, int R, int S>
inline void axpy_rows(const float* a, int64_t lda, const typename T::type* row, int64_t stride, float* const* y,
                      int64_t n) {
  __m256 factor[S][R];
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) factor[s][r] = _mm256_set1_ps(a[s * lda + r]);
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    if (R == 4 && c % (4 * kLanes) == 0) fetch_ahead<T, R>(row + R * stride + c, stride);
    __m256 into[S];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) into[s] = _mm256_loadu_ps(y[s] + c);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m256 w = T::load(row + r * stride + c);
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) into[s] = _mm256_fmadd_ps(factor[s][r], w, into[s]);
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) _mm256_storeu_ps(y[s] + c, into[s]);
  }
  for (; c < n; ++c)
    for (int s = 0; s < S; ++s)
      for (int r = 0; r < R; ++r) y[s][c] = __builtin_fmaf(a[s * lda + r], T::scalar(row[r * stride + c]), y[s][c]);
}

// V vectors of columns from c on, S outputs, all in registers while the rows pass.
template <class T, int S, int V>
inline void axpy_tile(const float* a, int64_t lda, const typename T::type* row, int64_t stride, int64_t rows,
                      float* const* y, int64_t c) {
  __m256 acc[S][V];
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[s][v] = _mm256_loadu_ps(y[s] + c + v * kLanes);
  for (int64_t r = 0; r < rows; ++r) {
    __m256 factor[S];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) factor[s] = _mm256_broadcast_ss(a + s * lda + r);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m256 w = T::load(row + r * stride + c + v * kLanes);
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) acc[s][v] = _mm256_fmadd_ps(factor[s], w, acc[s][v]);
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) _mm256_storeu_ps(y[s] + c + v * kLanes, acc[s][v]);
}

template <class T, int S>
void axpy_columns(const float* a, int64_t lda, const typename T::type* row, int64_t stride, int64_t rows,
                  float* const* y, int64_t begin, int64_t end) {
  int64_t c = begin;
  for (; c + 4 * kLanes <= end; c += 4 * kLanes) axpy_tile<T, S, 4>(a, lda, row, stride, rows, y, c);
  for (; c + kLanes <= end; c += kLanes) axpy_tile<T, S, 1>(a, lda, row, stride, rows, y, c);
  for (; c < end; ++c)
    for (int s = 0; s < S; ++s)
      for (int64_t r = 0; r < rows; ++r)
        y[s][c] = __builtin_fmaf(a[s * lda + r], T::scalar(row[r * stride + c]), y[s][c]);
}

// y[s] += sum over r of a[s * lda + r] * row r, n columns.
template <class T>
void add_axpys(const float* a, int64_t lda, const typename T::type* row, int64_t stride, int64_t rows, int64_t n,
               float* const* y, int64_t outputs) {
  if (outputs <= 2) {
    for (int64_t r = 0; r < rows; r += 4) {
      const typename T::type* at = row + r * stride;
      if (rows - r >= 4) {
        if (outputs == 1)
          axpy_rows<T, 4, 1>(a + r, lda, at, stride, y, n);
        else
          axpy_rows<T, 4, 2>(a + r, lda, at, stride, y, n);
        continue;
      }
      for (int64_t j = 0; j < rows - r; ++j)
        if (outputs == 1)
          axpy_rows<T, 1, 1>(a + r + j, lda, at + j * stride, stride, y, n);
        else
          axpy_rows<T, 1, 2>(a + r + j, lda, at + j * stride, stride, y, n);
    }
    return;
  }
  for (int64_t c = 0; c < n; c += kAxpyColumns) {
    const int64_t end = std::min(n, c + kAxpyColumns);
    for (int64_t s = 0; s < outputs; s += 3) switch (outputs - s) {
        case 1:
          axpy_columns<T, 1>(a + s * lda, lda, row, stride, rows, y + s, c, end);
          break;
        case 2:
          axpy_columns<T, 2>(a + s * lda, lda, row, stride, rows, y + s, c, end);
          break;
        default:
          axpy_columns<T, 3>(a + s * lda, lda, row, stride, rows, y + s, c, end);
      }
  }
}

}  // namespace resmoe
