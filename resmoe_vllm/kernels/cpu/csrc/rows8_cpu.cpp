// Products with matrices in 8-bit codes by row on a CPU: codes are read once for each block of tokens.
//
// Plain C ABI, no torch headers. Inputs and sums are fp32. Truth: rows8_ref in rows8.py. Each element of a result is
// added up in one order, whatever stands beside it, so a token's result does not depend on its batch.

#include "vec.h"

using namespace resmoe;

namespace {

constexpr int64_t kTile = 4;    // rows at a time
constexpr int64_t kInputs = 3;  // inputs at a time: with the rows their sums fill the registers

// out[s][r] = scales[r] * (codes row r . x[s]) + bias[r], n columns.
template <int R, int S>
inline void dot_tile(const int8_t* codes, int64_t n, const float* const* x, const float* scales, const float* bias,
                     float* const* out) {
  Octet acc[R][S];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) acc[r][s] = octet_set(0);
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    Octet in[S];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) in[s] = load_octet(x[s] + c);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Octet w = octet_of_bytes(codes + r * n + c);
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) acc[r][s] = fma(w, in[s], acc[r][s]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      float total = sum(acc[r][s]);
      for (int64_t t = c; t < n; ++t) total = __builtin_fmaf(codes[r * n + t], x[s][t], total);
      out[s][r] = bias == nullptr ? total * scales[r] : __builtin_fmaf(total, scales[r], bias[r]);
    }
}

template <int R>
inline void dot_rows(const int8_t* codes, int64_t n, const float* x, int64_t tokens, const float* scales,
                     const float* bias, float* out, int64_t rows) {
  for (int64_t s = 0; s < tokens; s += kInputs) {
    const float* in[kInputs];
    float* into[kInputs];
    for (int64_t k = 0; k < std::min(kInputs, tokens - s); ++k) in[k] = x + (s + k) * n, into[k] = out + (s + k) * rows;
    switch (std::min(kInputs, tokens - s)) {
      case 1:
        dot_tile<R, 1>(codes, n, in, scales, bias, into);
        break;
      case 2:
        dot_tile<R, 2>(codes, n, in, scales, bias, into);
        break;
      default:
        dot_tile<R, 3>(codes, n, in, scales, bias, into);
    }
  }
}

}  // namespace

extern "C" {

// out [T, N] = x [T, K] times codes [N, K] by scales [N], plus bias [N] or null; all but the codes fp32.
void resmoe_rows8(const int8_t* codes, const float* scales, const float* bias, const float* x, int64_t tokens,
                  int64_t rows, int64_t columns, float* out, int threads) {
  const int64_t blocks = (rows + kTile - 1) / kTile;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t r = b * kTile;
    const int8_t* at = codes + r * columns;
    const float* shift = bias == nullptr ? nullptr : bias + r;
    switch (std::min(kTile, rows - r)) {
      case 1:
        dot_rows<1>(at, columns, x, tokens, scales + r, shift, out + r, rows);
        break;
      case 2:
        dot_rows<2>(at, columns, x, tokens, scales + r, shift, out + r, rows);
        break;
      case 3:
        dot_rows<3>(at, columns, x, tokens, scales + r, shift, out + r, rows);
        break;
      default:
        dot_rows<4>(at, columns, x, tokens, scales + r, shift, out + r, rows);
    }
  }
}
}
