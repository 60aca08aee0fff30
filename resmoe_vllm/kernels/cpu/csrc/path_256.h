// What paths of 256 bits share, AVX2's and NEON's: their constants, and rows' ends without masks.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>

namespace resmoe {

constexpr int kBytes = 32, kWide = 8;
constexpr int kQuarters = 2;        // of 128 bits
constexpr int kPieceRows = 16;      // on the way down with one output: their lines stay in the first cache
constexpr bool kPacksFirst = true;  // for many inputs rows of codes stand together before they are decoded

template <int By>
inline void copy_window(const uint8_t* from, int64_t size, int64_t at, uint8_t* to, int64_t most) {
  int64_t done = 0;
  if (at == 0)
    for (; done < By; ++done) to[done] = from[(2 * size + done - By) % size];
  memcpy(to + done, from + at - By + done, std::min(most - done, size - at + By - done));
}

// Vectors of sums, pairs of which pair() puts in order: what is first of each, then what is second.
template <class Sums, size_t Vectors, class Pair>
inline void order_by_pairs(Sums (&v)[Vectors], Pair pair) {
  Sums sorted[Vectors];
#pragma GCC unroll 4
  for (size_t p = 0; p < Vectors / 2; ++p) {
    sorted[p] = v[2 * p];
    sorted[Vectors / 2 + p] = v[2 * p + 1];
    pair(sorted[p], sorted[Vectors / 2 + p]);
  }
#pragma GCC unroll 8
  for (size_t k = 0; k < Vectors; ++k) v[k] = sorted[k];
}

}  // namespace resmoe
