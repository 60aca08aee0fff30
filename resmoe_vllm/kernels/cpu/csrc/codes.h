// Rows of codes, plain ones or of a trellis, as products in integers (dots.h).
//
// Dots run along rows: for one or two inputs rows are multiplied while they are decoded, for more they are decoded once
// for all, which gives the same bits. An axpy's factors are rounded by kRows rows; levels of four rows are interleaved,
// so that a quad of one column is a quad of factors' partner.
#pragma once

#include <type_traits>

#include "abi.h"
#include "dense.h"
#include "dots.h"
#include "levels.h"

namespace resmoe {

template <class D>
struct CodeRows {
  const uint8_t* codes;    // the first row
  const uint16_t* scales;  // its first group's
  typename D::Tables tables;
  int64_t n, octets, stride, group, groups;
  static constexpr int64_t kChunk = D::kPlaces * kBytes;

  CodeRows(const Matrix& m, int64_t e, int64_t i, int64_t columns)
      : tables(m.tables), n(columns), octets(octets_of(n)), stride(D::kBits * octets) {
    group = std::min(m.group, octets * kLanes);
    groups = (n + group - 1) / group;
    codes = (const uint8_t*)m.data + e * m.stride + i * stride;
    scales = m.scales + e * m.scales_stride + i * groups;
  }
  float scale(int64_t row, int64_t g) const { return BF16::scalar(scales[row * groups + g]); }
  int64_t chunks() const { return (n + kChunk - 1) / kChunk; }
  ImageKind kind() const { return {n, D::kPlaces, groups == 1 ? kBlock : std::max(group, kChunk), D::kTwiceBias}; }

  template <bool Turned>
  void decode(int64_t row, int64_t chunk, Bytes (&out)[D::kPlaces]) const {
    D::template decode<Turned>(tables, codes + row * stride, octets, chunk, out);
  }
  // Of the sums of a span, where groups have scales of their own.
  Floats span_scale(int64_t row, int64_t span) const {
    if (group >= kChunk) return float_set(scale(row, span));
    const int64_t per = kChunk / group, lanes = kWide / per;
    alignas(64) float of_lane[kWide];
    for (int64_t p = 0; p < per; ++p) {
      const float own = scale(row, std::min(groups - 1, span * per + p));
      for (int64_t l = 0; l < lanes; ++l) of_lane[p * lanes + l] = own;
    }
    return load_floats(of_lane);
  }
  // The same chunk of the next `rows` rows. Always inline: GCC drops calls of what does nothing but prefetch.
  __attribute__((always_inline)) void fetch_ahead(int64_t row, int64_t rows, int64_t chunk) const {
    constexpr int kShare = D::kBits == 3 ? 3 : 2;  // halves of a vector that a chunk takes
    const char* at = (const char*)codes + (row + rows) * stride + chunk * kShare * kBytes / 2;
    _mm_prefetch(at, _MM_HINT_T0);
    if (kShare == 3) _mm_prefetch(at + 64, _MM_HINT_T0);
  }
};

// ---- dots ----------------------------------------------------------------------------------------------------

// sums[inputs.sum[s] * ld + r] += row `first` + r . input s. levels: rows decoded before, or null.
template <class D, int R, int S, bool Decoded>
__attribute__((noinline)) void dot_tile(const CodeRows<D>& rows, int64_t first, const uint8_t* levels,
                                        int64_t levels_stride, const Image* image, const int32_t* sum, float* sums,
                                        int64_t ld) {
  constexpr int kPlaces = D::kPlaces;
  const ImageKind kind = rows.kind();
  const int64_t vectors = kind.vectors(), span_vectors = kind.span / kBytes;
  const bool one_scale = rows.groups == 1;
  Floats total[R][S];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) total[r][s] = float_set(0);
  for (int64_t v = 0, span = 0; v < vectors; ++span) {
    const int64_t end = std::min(vectors, v + span_vectors), block = v * kBytes / kBlock;
    Acc acc[R][S];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][s] = start(load_ints(image[s].start + span * kWide));
    if constexpr (Decoded) {
      for (; v < end; ++v) {
        Levels own[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) own[r] = prepare(load_bytes(levels + r * levels_stride + v * kBytes));
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
          const Ints a = load_ints(image[s].vectors + 2 * v * kBytes);
          const Ints b = load_ints(image[s].vectors + (2 * v + 1) * kBytes);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) dot(acc[r][s], own[r], a, b);
        }
      }
    } else {
      for (; v < end; v += kPlaces)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const int64_t chunk = v / kPlaces;
          rows.fetch_ahead(first + r, R, chunk);
          Bytes out[kPlaces];
          rows.template decode<false>(first + r, chunk, out);
#pragma GCC unroll 8
          for (int j = 0; j < kPlaces; ++j) {
            const Levels own = prepare(out[j]);
#pragma GCC unroll 4
            for (int s = 0; s < S; ++s)
              dot(acc[r][s], own, load_ints(image[s].vectors + 2 * (v + j) * kBytes),
                  load_ints(image[s].vectors + (2 * (v + j) + 1) * kBytes));
          }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Floats own = one_scale ? float_set(0) : rows.span_scale(first + r, span);
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) {
        Floats f = to_floats(value(acc[r][s]));
        if (D::kTwiceBias % 2) f = add(f, load_floats(image[s].half + span * kWide));
        const Floats of_input = float_set(image[s].scale[block]);
        total[r][s] = fma(f, one_scale ? of_input : mul(of_input, own), total[r][s]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s)
      sums[sum[s] * ld + r] += sum_of(total[r][s]) * (one_scale ? rows.scale(first + r, 0) : 1.0f);
}

template <class D, int R, int MostInputs, bool Decoded>
void dot_inputs(int64_t inputs, const CodeRows<D>& rows, int64_t first, const uint8_t* levels, int64_t levels_stride,
                const Image* image, const int32_t* sum, float* sums, int64_t ld) {
  if constexpr (MostInputs > 1)
    if (inputs < MostInputs)
      return dot_inputs<D, R, MostInputs - 1, Decoded>(inputs, rows, first, levels, levels_stride, image, sum, sums,
                                                       ld);
  dot_tile<D, R, MostInputs, Decoded>(rows, first, levels, levels_stride, image, sum, sums, ld);
}

constexpr int64_t kDirectInputs = 2;  // for which rows are multiplied while they are decoded

// Buffers of one thread.
struct CodeScratch {
  std::vector<uint8_t> levels;   // [kRows, vectors + 1, kBytes]
  std::vector<uint8_t> strip;    // [kRows / 4, columns of a chunk, 4]
  std::vector<uint8_t> factors;  // [groups of a chunk, inputs]
};

// sums[inputs.sum[s] * ld + r] += row r . input s, for `count` rows.
template <class D>
void dot_codes(const CodeRows<D>& rows, int64_t count, const Inputs& inputs, float* sums, int64_t ld,
               CodeScratch& scratch) {
  const auto tiles = [&](auto decoded, auto most, const uint8_t* levels, int64_t stride) {
    constexpr bool kDecoded = decltype(decoded)::value;
    constexpr int kMost = decltype(most)::value, kTogether = kDecoded ? kTileRows : kDirectRows;
    for (int64_t s = 0; s < inputs.count; s += kMost)
      for (int64_t r = 0; r < count;) {
        const int64_t own = std::min<int64_t>(kMost, inputs.count - s);
        const uint8_t* at = levels + r * stride;
        if (count - r >= kTogether) {
          dot_inputs<D, kTogether, kMost, kDecoded>(own, rows, r, at, stride, inputs.image + s, inputs.sum + s,
                                                    sums + r, ld);
          r += kTogether;
        } else {
          dot_inputs<D, 1, kMost, kDecoded>(own, rows, r, at, stride, inputs.image + s, inputs.sum + s, sums + r, ld);
          ++r;
        }
      }
  };
  if (inputs.count <= kDirectInputs)
    return tiles(std::false_type(), std::integral_constant<int, kDirectInputs>(), nullptr, 0);
  const int64_t stride = rows.chunks() * CodeRows<D>::kChunk + kBytes;  // one set of the cache can't hold all rows
  if ((int64_t)scratch.levels.size() < kRows * stride) scratch.levels.resize(kRows * stride);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t chunk = 0; chunk < rows.chunks(); ++chunk) {
      rows.fetch_ahead(r, count, chunk);
      Bytes out[D::kPlaces];
      rows.template decode<false>(r, chunk, out);
#pragma GCC unroll 8
      for (int j = 0; j < D::kPlaces; ++j)
        store_bytes(scratch.levels.data() + r * stride + (chunk * D::kPlaces + j) * kBytes, out[j]);
    }
  tiles(std::true_type(), std::integral_constant<int, kTileInputs>(), scratch.levels.data(), stride);
}

// ---- axpys ---------------------------------------------------------------------------------------------------

constexpr int64_t kQuads = kRows / 4;

// What kRows rows are multiplied with: factors of one output times the rows' scales.
struct Factors {
  uint8_t first[kRows], second[kRows];
  float scale;
  float half;     // of the bias
  int32_t start;  // of the sums
};

// Sets the factors of kRows numbers; finer: and those of what is left of them.
inline void make_factors(const float* numbers, int64_t twice_bias, Factors* into, Factors* finer) {
  int16_t q[kRows];
  into->scale = round_to_16_bits(numbers, kRows, q);
  split(q, kRows, into->first, into->second);
  int32_t total = 0;
  for (int r = 0; r < kRows; ++r) total += q[r];
  into->start = -(int32_t)(twice_bias / 2) * total;
  into->half = twice_bias % 2 ? -0.5f * total : 0;
  if (!finer) return;
  float rest[kRows];
  for (int r = 0; r < kRows; ++r) rest[r] = numbers[r] - into->scale * q[r];
  make_factors(rest, twice_bias, finer, nullptr);
}

constexpr int kStripVectors = 2;  // at most 32 columns, which share their scales

// y[s][..] += factors of s . strip, kStripVectors of columns of S outputs. columns: that are left of the row.
template <int S, bool Half>
inline void axpy_tile(const uint8_t* strip, int64_t quad_stride, const Factors* const* factors, float* const* y,
                      int64_t column, int64_t columns) {
  constexpr int V = kStripVectors;
  Acc acc[S][V];
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[s][v] = start(int_set(factors[s]->start));
  for (int64_t quad = 0; quad < kQuads; ++quad) {
    Levels own[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) own[v] = prepare(load_bytes(strip + quad * quad_stride + v * kBytes));
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      int32_t first, second;
      memcpy(&first, factors[s]->first + 4 * quad, 4);
      memcpy(&second, factors[s]->second + 4 * quad, 4);
      const Ints a = int_set(first), b = int_set(second);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) dot(acc[s][v], own[v], a, b);
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) {
    const Floats scale = float_set(factors[s]->scale), half = float_set(factors[s]->half);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Floats f = to_floats(value(acc[s][v]));
      if (Half) f = add(f, half);
      if (v * kWide < columns) add_scaled(y[s] + column + v * kWide, scale, f, columns - v * kWide);
    }
  }
}

// Levels of `count` rows of a chunk, four rows interleaved, in column order: [kQuads, kChunk, 4]. Missing rows are the
// last one again: their factors are zero.
template <class D>
inline void make_strip(const CodeRows<D>& rows, int64_t count, int64_t chunk, uint8_t* strip) {
  constexpr int kPlaces = D::kPlaces;
  const int64_t chunks = rows.chunks(), step = rows.stride / chunks;
  for (int64_t quad = 0; quad < kQuads; ++quad) {
    uint8_t* to = strip + quad * 4 * rows.kChunk;
    Bytes own[4][kPlaces];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const int64_t row = std::min(count - 1, 4 * quad + r);
      // the rows behind these, which lie in one piece, a piece for each
      _mm_prefetch((const char*)rows.codes + count * rows.stride + (chunk * count + row) * step, _MM_HINT_T0);
      rows.template decode<true>(row, chunk, own[r]);
      in_columns(own[r]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kPlaces; ++j) {
      const Bytes low01 = low_8(own[0][j], own[1][j]), high01 = high_8(own[0][j], own[1][j]);
      const Bytes low23 = low_8(own[2][j], own[3][j]), high23 = high_8(own[2][j], own[3][j]);
      store_bytes(to + (4 * j + 0) * kBytes, low_16(low01, low23));
      store_bytes(to + (4 * j + 1) * kBytes, high_16(low01, low23));
      store_bytes(to + (4 * j + 2) * kBytes, low_16(high01, high23));
      store_bytes(to + (4 * j + 3) * kBytes, high_16(high01, high23));
    }
  }
}

// y[s] += sum over r < count of a[s * lda + r] * row r; count at most kRows. fine: whether numbers of s are.
template <class D>
void axpy_codes(const float* a, int64_t lda, const CodeRows<D>& rows, int64_t count, float* const* y, const bool* fine,
                int64_t outputs, CodeScratch& scratch) {
  constexpr int64_t kChunk = CodeRows<D>::kChunk;
  constexpr int kMostOutputs = kTileInputs;
  const bool one_scale = rows.groups == 1;
  const int64_t per = one_scale ? 1 : std::max<int64_t>(1, kChunk / rows.group);
  scratch.strip.resize(kRows * kChunk);
  scratch.factors.resize(per * 2 * outputs * sizeof(Factors));
  Factors* factors = (Factors*)scratch.factors.data();  // [per, 2 * outputs]
  float* into[2 * kInputs];
  int64_t products = 0, made = -1;
  for (int64_t chunk = 0; chunk < rows.chunks(); ++chunk) {
    const int64_t begin = chunk * kChunk, first_group = one_scale ? 0 : begin / rows.group;
    if (first_group != made) {
      made = first_group;
      for (int64_t p = 0; p < per && first_group + p < rows.groups; ++p) {
        float scales[kRows] = {};
        for (int64_t r = 0; r < count; ++r) scales[r] = rows.scale(r, first_group + p);
        products = 0;
        for (int64_t s = 0; s < outputs; ++s) {
          float numbers[kRows];
          for (int64_t r = 0; r < kRows; ++r) numbers[r] = r < count ? a[s * lda + r] * scales[r] : 0;
          Factors* own = factors + p * 2 * outputs + products;
          make_factors(numbers, D::kTwiceBias, own, fine[s] ? own + 1 : nullptr);
          into[products++] = y[s];
          if (fine[s]) into[products++] = y[s];
        }
      }
    }
    make_strip(rows, count, chunk, scratch.strip.data());
    for (int64_t s = 0; s < products; s += kMostOutputs)
      for (int64_t c = 0; c < kChunk && begin + c < rows.n; c += kStripVectors * kWide) {
        const Factors* own[kMostOutputs];
        const int64_t p = one_scale ? 0 : std::min(per - 1, (begin + c) / rows.group - first_group);
        for (int64_t k = 0; k < kMostOutputs; ++k) own[k] = factors + p * 2 * outputs + std::min(products - 1, s + k);
        const uint8_t* at = scratch.strip.data() + 4 * c;
        constexpr bool kHalf = D::kTwiceBias % 2;
        switch (std::min<int64_t>(kMostOutputs, products - s)) {
          case 1:
            axpy_tile<1, kHalf>(at, 4 * kChunk, own, into + s, begin + c, rows.n - begin - c);
            break;
          case 2:
            axpy_tile<2, kHalf>(at, 4 * kChunk, own, into + s, begin + c, rows.n - begin - c);
            break;
          default:
            if constexpr (kMostOutputs == 3)
              axpy_tile<3, kHalf>(at, 4 * kChunk, own, into + s, begin + c, rows.n - begin - c);
        }
      }
  }
}

// visit(CodeRows<D>), D the code, of the n columns of expert e's row i and those after it.
template <class Visit>
inline auto with_codes(const Matrix& m, int64_t e, int64_t i, int64_t n, Visit visit) {
  if (m.tables) switch (m.bits) {
      case 1:
        return visit(CodeRows<Trellis<1>>(m, e, i, n));
      case 2:
        return visit(CodeRows<Trellis<2>>(m, e, i, n));
      case 3:
        return visit(CodeRows<Trellis<3>>(m, e, i, n));
      default:
        return visit(CodeRows<Trellis<4>>(m, e, i, n));
    }
  switch (m.bits) {
    case 2:
      return visit(CodeRows<Plain<2>>(m, e, i, n));
    case 3:
      return visit(CodeRows<Plain<3>>(m, e, i, n));
    case 4:
      return visit(CodeRows<Plain<4>>(m, e, i, n));
    default:
      return visit(CodeRows<Plain<8>>(m, e, i, n));
  }
}
inline ImageKind kind_of(const Matrix& m, int64_t n) {
  return with_codes(m, 0, 0, n, [](const auto& rows) { return rows.kind(); });
}

// One row's weights, for the self-test of the loader; NaN where the two orders of decoding differ.
template <class D>
void decode_codes(const CodeRows<D>& row, float* out) {
  std::vector<uint8_t> strip(kRows * row.kChunk);
  for (int64_t chunk = 0; chunk < row.chunks(); ++chunk) {
    Bytes own[D::kPlaces];
    row.template decode<false>(0, chunk, own);
    make_strip(row, 1, chunk, strip.data());
    for (int64_t k = 0; k < row.kChunk && chunk * row.kChunk + k < row.n; ++k) {
      const int64_t c = chunk * row.kChunk + k;
      uint8_t levels[kBytes];
      store_bytes(levels, own[k % D::kPlaces]);
      const uint8_t level = levels[k / D::kPlaces];
      out[c] = level == strip[4 * k] ? (level - 0.5f * D::kTwiceBias) * row.scale(0, c / row.group) : NAN;
    }
  }
}

}  // namespace resmoe
