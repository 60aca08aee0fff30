// Rows of codes, plain ones or of a trellis, as products in integers (dots.h).
//
// For one or two inputs rows are multiplied while they are decoded, their columns in the lanes of a vector. For more
// they are decoded once and interleaved by quads of columns (4 bits on 256-bit paths: interleaved, then decoded): a
// lane is a row, whose sums of a span need no adding up. Both give the same integers, which are scaled in the same
// order. An axpy's factors are rounded by kRows rows; levels of four rows are interleaved, so that a quad of one column
// is a quad of factors' partner.
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
  int64_t n, octets, stride, group, groups;  // octets: of a row of SignedBytes its columns
  static constexpr int64_t kChunk = D::kPlaces * kBytes;
  static constexpr int kChunkBytes = D::kBits * kChunk / 8;  // that it takes

  CodeRows(const Matrix& m, int64_t e, int64_t i, int64_t columns)
      : tables(m.tables), n(columns), octets(octets_of(n)), stride(D::kBits * octets) {
    group = std::min(m.group, octets * kLanes);
    groups = (n + group - 1) / group;
    codes = (const uint8_t*)m.data + e * m.stride + i * stride;
    scales = m.scales + e * m.scales_stride + i * groups;
  }
  // Rows of SignedBytes, one scale each.
  CodeRows(const int8_t* codes, const uint16_t* scales, int64_t columns)
      : codes((const uint8_t*)codes),
        scales(scales),
        tables(nullptr),
        n(columns),
        octets(columns),
        stride(columns),
        group(columns),
        groups(1) {}
  float scale(int64_t row, int64_t g) const { return BF16::scalar(scales[row * groups + g]); }
  int64_t chunks() const { return (n + kChunk - 1) / kChunk; }
  int64_t span() const { return groups == 1 ? kBlock : std::min(group, kBlock); }
  int64_t spans() const { return (n + span() - 1) / span(); }
  ImageKind kind() const { return {n, D::kPlaces, span(), D::kTwiceBias}; }

  // Whether a row's vectors hold nothing but the row, the bytes before the chunk too.
  bool inside(int64_t chunk) const { return (chunk > 0 || D::kBefore == 0) && (chunk + 1) * kChunk <= n; }
  template <bool Turned, bool Inside = false>
  void decode(int64_t row, int64_t chunk, Bytes (&out)[D::kPlaces]) const {
    D::template decode<Turned, Inside>(tables, codes + row * stride, octets, chunk, out);
  }
  // The same chunk of the next `rows` rows. Always inline: GCC drops calls of what does nothing but prefetch.
  __attribute__((always_inline)) void fetch_ahead(int64_t row, int64_t rows, int64_t chunk) const {
    fetch_lines<kChunkBytes>(codes + (row + rows) * stride + chunk * kChunkBytes);
  }
};

// Images of the numbers of one input and, where they are finer than 16 bits, of what rounding left of them, whose
// product goes to the same sum.
using Inputs = Operands<Image>;

// Buffers of one thread.
struct CodeScratch {
  std::vector<float> scales;  // [spans, rows of a tile]
  Buffer decoded;             // [kPlaces, kWide, kBytes], at least two: a chunk of as many rows as a vector has lanes
  Buffer quads;               // [quads of a block, rows of a tile, 4]
  std::vector<float> totals;  // [inputs, rows of a tile]
  Buffer strip;               // [kRows / 4, columns of a chunk, 4]
  Buffer factors;             // [groups of a chunk, inputs], or those of a row for one input
  Buffer sums;                // [columns], of one output
};

// ---- dots ----------------------------------------------------------------------------------------------------

constexpr int64_t kDirectInputs = 2;  // for which rows are multiplied while they are decoded
constexpr int kDirectRows = 4;

// Scales of each span, or of whole rows, by row; beyond the last row that one's. lanes: a multiple of 4.
template <class D>
void load_scales(const CodeRows<D>& rows, int64_t first, int64_t count, int64_t lanes, std::vector<float>& scales) {
  scales.resize(rows.spans() * lanes);
  if (rows.groups == 1) {
    for (int64_t r = 0; r < lanes; ++r) scales[r] = rows.scale(first + std::min(r, count - 1), 0);
    return;
  }
  const int64_t per_group = rows.group / rows.span();
  for (int64_t r = 0; r < lanes; r += 4) {
    const uint16_t* from[4];
    for (int64_t k = 0; k < 4; ++k) from[k] = rows.scales + (first + std::min(r + k, count - 1)) * rows.groups;
    int64_t g = 0;
    for (; per_group == 1 && g + 8 <= rows.groups; g += 8) four_by_eight(from, g, scales.data() + g * lanes + r, lanes);
    for (; g < rows.spans(); ++g)
      for (int64_t k = 0; k < 4; ++k) scales[g * lanes + r + k] = BF16::scalar(from[k][g / per_group]);
  }
}

// sums[inputs.sum[s] * ld + r] += row first + r . input s for `count` rows, at most kDirectRows. scales: load_scales'.
template <class D, int S>
__attribute__((noinline)) void dot_direct(const CodeRows<D>& rows, int64_t first, int64_t count, const float* scales,
                                          const Image* image, const int32_t* sum, float* sums, int64_t ld) {
  constexpr int kPlaces = D::kPlaces, R = kDirectRows;
  constexpr int64_t kChunk = CodeRows<D>::kChunk;
  const int64_t chunks = rows.chunks(), spans = rows.spans(), span_columns = rows.span();
  const int64_t span_chunks = std::max<int64_t>(1, span_columns / kChunk);
  const int64_t per_chunk = std::max<int64_t>(1, kChunk / span_columns);
  const int64_t octets = rows.octets;
  const typename D::Tables tables = rows.tables;
  const bool one_scale = rows.groups == 1;
  const uint8_t* row[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) row[r] = rows.codes + (first + std::min<int64_t>(r, count - 1)) * rows.stride;
  const uint8_t* ahead = rows.codes + (first + 2 * R) * rows.stride;  // of as many rows, which lie in one piece
  const uint8_t* with[S];
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) with[s] = image[s].vectors;
  Four total[S];
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) total[s] = four_set(0);
  int64_t chunk = 0;
  for (int64_t span = 0; span < spans; span += per_chunk) {
    Acc acc[R][S];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][s] = start(int_set(0));
    const auto add_chunk = [&](auto inside) __attribute__((always_inline)) {
      constexpr int kPiece = R * CodeRows<D>::kChunkBytes;
      fetch_lines<kPiece>(ahead);
      ahead += kPiece;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        Bytes out[kPlaces];
        D::template decode<false, decltype(inside)::value>(tables, row[r], octets, chunk, out);
#pragma GCC unroll 8
        for (int j = 0; j < kPlaces; ++j) {
          const Levels own = prepare(out[j]);
#pragma GCC unroll 4
          for (int s = 0; s < S; ++s) {
            const uint8_t* at = with[s] + 2 * (chunk * kPlaces + j) * kBytes;
            dot(acc[r][s], own, load_ints(at), load_ints(at + kBytes));
          }
        }
      }
    };
    const int64_t end = std::min(chunks, chunk + span_chunks);
    while (chunk < end)
      if (rows.inside(chunk)) {
        const int64_t stop = rows.inside(end - 1) ? end : end - 1;
        for (; chunk < stop; ++chunk) add_chunk(std::true_type());
      } else {
        add_chunk(std::false_type());
        ++chunk;
      }
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      // a quarter of the lanes each, by row
      FourInts quarters[kQuarters];
      split_quarters(sums_of_quarters(value(acc[0][s]), value(acc[1][s]), value(acc[2][s]), value(acc[3][s])),
                     quarters);
      const Four of_input = four_set(image[s].scale[span * span_columns / kBlock]);
      const auto add_span = [&](int64_t own, FourInts integers) __attribute__((always_inline)) {
        Four f = to_floats(add(integers, four_ints(image[s].start[own])));
        if (D::kTwiceBias % 2) f = add(f, four_set(image[s].half[own]));
        const Four scale = one_scale ? of_input : mul(of_input, load_four(scales + own * R));
        total[s] = fma(f, scale, total[s]);
      };
      if (per_chunk == 1) {
        FourInts all = quarters[0];
#pragma GCC unroll 4
        for (int q = 1; q < kQuarters; ++q) all = add(all, quarters[q]);
        add_span(span, all);
      } else {
        const int64_t own = kQuarters / per_chunk;
        for (int64_t p = 0; p < std::min(per_chunk, spans - span); ++p)
          add_span(span + p, own == 1 ? quarters[p] : add(quarters[own * p], quarters[own * p + 1]));
      }
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) {
    alignas(16) float of_row[R];
    store_four(of_row, one_scale ? mul(total[s], load_four(scales)) : total[s]);
    for (int64_t r = 0; r < count; ++r) sums[sum[s] * ld + r] += of_row[r];
  }
}

constexpr int kTileRows = kTileVectors * kWide;

static_assert(kPieceRows % 4 == 0 && kRows % kPieceRows == 0);

// Where an axpy's sums of a chunk stay in registers, and a byte's levels depend on nothing but it and the one before.
template <class D>
constexpr bool kAxpyDirect = D::kPlaces <= 2;
// Whether codes of several rows stand together before they are decoded, for many inputs and outputs too.
template <class D>
constexpr bool kPacked = kPacksFirst && kAxpyDirect<D>;

// make_quads, where words of codes are turned before they are decoded. packed: [2, kWide, kBytes].
template <class D>
void make_quads_packed(const CodeRows<D>& rows, int64_t first, int64_t count, int64_t begin, int64_t end,
                       uint8_t* packed, uint8_t* quads) {
  constexpr int kPlaces = D::kPlaces, V = kTileVectors;
  const typename D::Tables tables = rows.tables;
  const int64_t stride = rows.stride;
  uint8_t* turned = packed + kWide * kBytes;
  // as many rows behind these, which lie in one piece
  const uint8_t* ahead = rows.codes + (first + count) * stride + begin * V * kWide * kBytes;
  for (int g = 0; g < V; ++g) {
    const uint8_t* row[kWide];
    alignas(kBytes) uint8_t last[kBytes] = {};  // of each word its last byte is the one before a row's columns
    for (int64_t r = 0; r < kWide; ++r) {
      row[r] = rows.codes + (first + std::min(g * kWide + r, count - 1)) * stride;
      last[4 * r + 3] = row[r][begin ? begin * kBytes - 1 : stride - 1];
    }
    Bytes before = load_bytes(last);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      fetch_lines<kWide * kBytes>(ahead);
      ahead += kWide * kBytes;
      if ((chunk + 1) * kBytes <= stride) {
        transpose_words([&](int r) { return row[r] + chunk * kBytes; }, turned, kBytes);
      } else {
        for (int64_t r = 0; r < kWide; ++r)
          store_bytes(packed + r * kBytes, load_window<0>(row[r], stride, chunk * kBytes));
        transpose_words([&](int r) { return packed + r * kBytes; }, turned, kBytes);
      }
      uint8_t* to = quads + ((chunk - begin) * kPlaces * kWide * V + g) * kBytes;
#pragma GCC unroll 2
      for (int w = 0; w < kWide; ++w) {
        const Bytes own = load_bytes(turned + w * kBytes);
        Bytes out[kPlaces];
        D::of_bytes(tables, own, last_byte_before(before, own), out);
        before = own;
#pragma GCC unroll 2
        for (int j = 0; j < kPlaces; ++j) store_bytes(to + (j * kWide + w) * V * kBytes, out[j]);
      }
    }
  }
}

// Levels of a block of columns of kTileRows rows as [quads][kTileRows][4]; a quad is what a 32-bit word of an image's
// vector is multiplied with, in their order. count: rows; missing ones are the last one again.
template <class D>
void make_quads(const CodeRows<D>& rows, int64_t first, int64_t count, int64_t begin, int64_t end, uint8_t* decoded,
                uint8_t* quads) {
  constexpr int kPlaces = D::kPlaces;
  if constexpr (kPacked<D> && kPlaces > 1) return make_quads_packed(rows, first, count, begin, end, decoded, quads);
  for (int64_t chunk = begin; chunk < end; ++chunk)
    for (int g = 0; g < kTileVectors; ++g) {
      for (int64_t r = 0; r < kWide; ++r) {
        const int64_t row = std::min(g * kWide + r, count - 1);
        rows.fetch_ahead(first + row, count, chunk);
        Bytes out[kPlaces];
        rows.template decode<false>(first + row, chunk, out);
#pragma GCC unroll 8
        for (int j = 0; j < kPlaces; ++j) store_bytes(decoded + (j * kWide + r) * kBytes, out[j]);
      }
      for (int j = 0; j < kPlaces; ++j) {
        const int64_t quad = ((chunk - begin) * kPlaces + j) * kWide;
        transpose_words([&](int r) { return decoded + (j * kWide + r) * kBytes; },
                        quads + (quad * kTileVectors + g) * kBytes, kTileVectors * kBytes);
      }
    }
}

// totals[s * kTileRows ..] += scaled sums of the spans of columns [begin, end); quads: make_quads' of the block that
// begins at `block * kBlock`.
template <class D, int S>
__attribute__((noinline)) void dot_quads(const CodeRows<D>& rows, const uint8_t* quads, const float* scales,
                                         const Image* image, int64_t block, float* totals) {
  constexpr int kPlaces = D::kPlaces, V = kTileVectors;
  constexpr int64_t kChunk = CodeRows<D>::kChunk;
  const int64_t span_columns = rows.span(), end = std::min(rows.n, (block + 1) * kBlock);
  const bool one_scale = rows.groups == 1;
  Floats total[S][V];
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) total[s][v] = load_floats(totals + s * kTileRows + v * kWide);
  const uint8_t* image_at[S];
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) image_at[s] = image[s].vectors + block * kBlock * 2;
  for (int64_t c = block * kBlock; c < end; c += span_columns) {
    Acc acc[S][V];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[s][v] = start(int_set(image[s].start[c / span_columns]));
    const auto add_words = [&](int64_t vector, int64_t begin_word, int64_t end_word) __attribute__((always_inline)) {
      for (int64_t l = begin_word; l < end_word; ++l) {
        Levels own[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) own[v] = prepare(load_bytes(quads + ((vector * kWide + l) * V + v) * kBytes));
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
          int32_t first, second;
          memcpy(&first, image_at[s] + 2 * vector * kBytes + 4 * l, 4);
          memcpy(&second, image_at[s] + (2 * vector + 1) * kBytes + 4 * l, 4);
          const Ints a = int_set(first), b = int_set(second);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) dot(acc[s][v], own[v], a, b);
        }
      }
    };
    const int64_t from = c - block * kBlock;  // columns of the block before these
    if (span_columns >= kChunk) {
      const int64_t first = from / kBytes, vectors = std::min(span_columns, round_up(end - c, kChunk)) / kBytes;
      for (int64_t v = first; v < first + vectors; ++v) add_words(v, 0, kWide);
    } else {  // some words of each vector of a chunk
      const int64_t words = span_columns / (4 * kPlaces), first = from % kChunk / (4 * kPlaces);
      for (int64_t j = 0; j < kPlaces; ++j) add_words(from / kChunk * kPlaces + j, first, first + words);
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const Floats of_input = float_set(image[s].scale[block]), half = float_set(image[s].half[c / span_columns]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        Floats f = to_floats(value(acc[s][v]));
        if (D::kTwiceBias % 2) f = add(f, half);
        const float* own = scales + c / span_columns * kTileRows + v * kWide;
        total[s][v] = fma(f, one_scale ? of_input : mul(of_input, load_floats(own)), total[s][v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store_floats(totals + s * kTileRows + v * kWide, total[s][v]);
}

template <class D, int MostInputs>
void dot_quads_of(int64_t inputs, const CodeRows<D>& rows, const uint8_t* quads, const float* scales,
                  const Image* image, int64_t block, float* totals) {
  if constexpr (MostInputs > 1)
    if (inputs < MostInputs) return dot_quads_of<D, MostInputs - 1>(inputs, rows, quads, scales, image, block, totals);
  dot_quads<D, MostInputs>(rows, quads, scales, image, block, totals);
}

// sums[inputs.sum[s] * ld + r] += row r . input s, for `count` rows.
template <class D>
void dot_codes(const CodeRows<D>& rows, int64_t count, const Inputs& inputs, float* sums, int64_t ld,
               CodeScratch& scratch) {
  constexpr int64_t kChunk = CodeRows<D>::kChunk;
  // a span must be whole quarters of a vector there
  if (inputs.count <= kDirectInputs && rows.span() * kQuarters >= kChunk) {
    for (int64_t r = 0; r < count; r += kDirectRows) {
      const int64_t own = std::min<int64_t>(kDirectRows, count - r);
      load_scales(rows, r, own, kDirectRows, scratch.scales);
      if (inputs.count == 1)
        dot_direct<D, 1>(rows, r, own, scratch.scales.data(), inputs.at, inputs.sum, sums + r, ld);
      else
        dot_direct<D, 2>(rows, r, own, scratch.scales.data(), inputs.at, inputs.sum, sums + r, ld);
    }
    return;
  }
  constexpr int64_t kBlockChunks = kBlock / kChunk;
  uint8_t* decoded = scratch.decoded.take(std::max(2, D::kPlaces) * kWide * kBytes);
  uint8_t* quads = scratch.quads.take(kBlock * kTileRows);
  scratch.totals.resize(inputs.count * kTileRows);
  for (int64_t r = 0; r < count; r += kTileRows) {
    const int64_t own = std::min<int64_t>(kTileRows, count - r);
    load_scales(rows, r, own, kTileRows, scratch.scales);
    std::fill(scratch.totals.begin(), scratch.totals.end(), 0.0f);
    for (int64_t chunk = 0, block = 0; chunk < rows.chunks(); chunk += kBlockChunks, ++block) {
      make_quads(rows, r, own, chunk, std::min(rows.chunks(), chunk + kBlockChunks), decoded, quads);
      for (int64_t s = 0; s < inputs.count; s += kTileInputs)
        dot_quads_of<D, kTileInputs>(inputs.count - s, rows, quads, scratch.scales.data(), inputs.at + s, block,
                                     scratch.totals.data() + s * kTileRows);
    }
    for (int64_t s = 0; s < inputs.count; ++s) {
      const float* total = scratch.totals.data() + s * kTileRows;
      float* into = sums + inputs.sum[s] * ld + r;
      for (int64_t k = 0; k < own; ++k) into[k] += rows.groups == 1 ? total[k] * scratch.scales[k] : total[k];
    }
  }
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
  into->scale = round_to_16_bits<kRows>(numbers, q);
  split(q, kRows, into->first, into->second);
  int32_t total = 0;
  for (int r = 0; r < kRows; ++r) total += q[r];
  into->start = (kLevelsLess - (int32_t)(twice_bias / 2)) * total;
  into->half = twice_bias % 2 ? -0.5f * total : 0;
  if (!finer) return;
  float rest[kRows];
  for (int r = 0; r < kRows; ++r) rest[r] = numbers[r] - into->scale * q[r];
  make_factors(rest, twice_bias, finer, nullptr);
}

constexpr int kStripVectors = 2;  // at most 32 columns, which share their scales

// y[s][..] += factors of s . strip, kStripVectors of columns of S outputs. columns: that are left of the row. apart:
// from the first vector's columns to the second's. PairOf: 0, or the columns of a byte of a packed strip.
template <int S, bool Half, int PairOf>
inline void axpy_tile(const uint8_t* strip, int64_t quad_stride, const Factors* const* factors, float* const* y,
                      int64_t column, int64_t apart, int64_t columns) {
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
    Ints sums[V] = {value(acc[s][0]), value(acc[s][1])};
    if constexpr (PairOf > 0) pair_in_column_order<PairOf>(sums[0], sums[1]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Floats f = to_floats(sums[v]);
      if (Half) f = add(f, half);
      if (v * apart < columns) add_scaled(y[s] + column + v * apart, scale, f, columns - v * apart);
    }
  }
}

// Four rows after four of a chunk of `count` rows; missing rows are the last one again: their factors are zero.
// Meanwhile the rows behind them, which lie in one piece, are fetched, a piece for each four.
template <class D>
struct FourRows {
  const CodeRows<D>& rows;
  const int64_t count, piece;
  const uint8_t* row[4];
  const uint8_t* ahead;
  __attribute__((always_inline)) FourRows(const CodeRows<D>& rows, int64_t count, int64_t chunk)
      : rows(rows), count(count), piece(4 * rows.stride / rows.chunks()) {
    ahead = rows.codes + count * rows.stride + chunk * piece * (count / 4);
    begin(0);
  }
  // quad: the one behind the last
  __attribute__((always_inline)) void next(int64_t quad) {
    if (4 * quad + 4 > count) return begin(quad);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) row[r] += 4 * rows.stride;
  }
  __attribute__((always_inline)) void fetch_piece() {
    fetch_lines<4 * CodeRows<D>::kChunkBytes>(ahead);
    ahead += piece;
  }

 private:
  __attribute__((always_inline)) void begin(int64_t quad) {
#pragma GCC unroll 4
    for (int64_t r = 0; r < 4; ++r) row[r] = rows.codes + std::min(count - 1, 4 * quad + r) * rows.stride;
  }
};

// Codes of four rows of a chunk, interleaved, and the bytes before each, where levels need them: 32-bit word d of lane
// l of vector q is byte 16 * l + 4 * q + d of each. Inside: as CodeRows has it.
template <class D, bool Inside>
__attribute__((always_inline)) inline void interleave_codes(FourRows<D>& four, int64_t chunk, Bytes (&packed)[4],
                                                            Bytes (&before)[4]) {
  const int64_t stride = four.rows.stride;
  four.fetch_piece();
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    packed[r] = bytes_of_row<Inside, 0>(four.row[r], stride, chunk * kBytes);
    if (D::kBefore) before[r] = bytes_of_row<Inside, D::kBefore>(four.row[r], stride, chunk * kBytes);
  }
  in_columns(packed);  // four rows in place of four places
  if (D::kBefore) {
    before[0] = low_16(low_8(before[0], before[1]), low_8(before[2], before[3]));
#pragma GCC unroll 4
    for (int q = 1; q < 4; ++q) before[q] = last_word_before(packed[q - 1], packed[q]);
  }
}

// Levels of four rows of a chunk, interleaved, in column order, kWide columns a vector.
template <class D>
__attribute__((always_inline)) inline void interleave_rows(FourRows<D>& four, int64_t chunk,
                                                           Bytes (&to)[4 * D::kPlaces]) {
  Bytes own[4][D::kPlaces];
  four.fetch_piece();
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    D::template decode<true, false>(four.rows.tables, four.row[r], four.rows.octets, chunk, own[r]);
    in_columns(own[r]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < D::kPlaces; ++j) {
    const Bytes low01 = low_8(own[0][j], own[1][j]), high01 = high_8(own[0][j], own[1][j]);
    const Bytes low23 = low_8(own[2][j], own[3][j]), high23 = high_8(own[2][j], own[3][j]);
    to[4 * j] = low_16(low01, low23);
    to[4 * j + 1] = high_16(low01, low23);
    to[4 * j + 2] = low_16(high01, high23);
    to[4 * j + 3] = high_16(high01, high23);
  }
}

// Of `count` rows: [kQuads, kChunk, 4].
template <class D>
inline void make_strip(const CodeRows<D>& rows, int64_t count, int64_t chunk, uint8_t* strip) {
  FourRows<D> four(rows, count, chunk);
  for (int64_t quad = 0; quad < kQuads; four.next(++quad)) {
    Bytes own[4 * D::kPlaces];
    interleave_rows(four, chunk, own);
#pragma GCC unroll 16
    for (int v = 0; v < 4 * D::kPlaces; ++v) store_bytes(strip + quad * 4 * rows.kChunk + v * kBytes, own[v]);
  }
}
// The same of codes that are interleaved before they are decoded: pairs of its vectors are in pair_in_column_order().
template <class D, bool Inside>
inline void make_packed_strip(const CodeRows<D>& rows, int64_t count, int64_t chunk, uint8_t* strip) {
  const typename D::Tables tables = rows.tables;
  FourRows<D> four(rows, count, chunk);
  for (int64_t quad = 0; quad < kQuads; four.next(++quad)) {
    Bytes packed[4], before[4] = {};
    interleave_codes<D, Inside>(four, chunk, packed, before);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      Bytes own[D::kPlaces];
      D::of_bytes(tables, packed[q], before[q], own);
#pragma GCC unroll 2
      for (int j = 0; j < D::kPlaces; ++j)
        store_bytes(strip + quad * 4 * rows.kChunk + (D::kPlaces * q + j) * kBytes, own[j]);
    }
  }
}

// y[..] += factors . `count` rows of a chunk, `columns` of them, multiplied while they are decoded. factors(v): of
// vector v.
template <class D, class FactorsOf>
inline void axpy_direct(const CodeRows<D>& rows, int64_t count, int64_t chunk, FactorsOf factors, float* y,
                        int64_t columns) {
  constexpr int V = 4 * D::kPlaces;
  const Factors* own[V];
  Acc acc[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    own[v] = factors(v);
    acc[v] = start(int_set(own[v]->start));
  }
  FourRows<D> four(rows, count, chunk);
  for (int64_t quad = 0; 4 * quad < count; four.next(++quad)) {
    Bytes levels[V];
    interleave_rows(four, chunk, levels);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      int32_t first, second;
      memcpy(&first, own[v]->first + 4 * quad, 4);
      memcpy(&second, own[v]->second + 4 * quad, 4);
      dot(acc[v], prepare(levels[v]), int_set(first), int_set(second));
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    Floats f = to_floats(value(acc[v]));
    if (D::kTwiceBias % 2) f = add(f, float_set(own[v]->half));
    if (v * kWide < columns) add_scaled(y + v * kWide, float_set(own[v]->scale), f, columns - v * kWide);
  }
}

// A piece of the rows that share factors, and of them which: its sums go on from those of the piece before.
struct Piece {
  int64_t first, count;
  bool last;
};

// The same with one group of factors, where codes are interleaved before they are decoded: sums are put in order once
// for all rows. rows: the piece's; sums: [4 * kPlaces, kWide], of the pieces before, then of this one too. Inside: as
// CodeRows has it.
template <class D, bool Inside>
__attribute__((noinline)) void axpy_packed(const CodeRows<D>& rows, const Piece& piece, int64_t chunk,
                                           const Factors* with, int32_t* sums, float* y, int64_t columns) {
  constexpr int kPlaces = D::kPlaces, V = 4 * kPlaces;
  const int64_t count = piece.count;
  Acc acc[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) acc[v] = start(piece.first ? load_ints(sums + v * kWide) : int_set(with->start));
  FourRows<D> four(rows, count, chunk);
  for (int64_t quad = 0; 4 * quad < count; four.next(++quad)) {
    Bytes packed[4], before[4] = {};
    interleave_codes<D, Inside>(four, chunk, packed, before);
    int32_t first, second;
    memcpy(&first, with->first + piece.first + 4 * quad, 4);
    memcpy(&second, with->second + piece.first + 4 * quad, 4);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      Bytes levels[kPlaces];
      D::of_bytes(rows.tables, packed[q], before[q], levels);
#pragma GCC unroll 2
      for (int j = 0; j < kPlaces; ++j) dot(acc[kPlaces * q + j], prepare(levels[j]), int_set(first), int_set(second));
    }
  }
  Ints all[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) all[v] = value(acc[v]);
  if (!piece.last) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store_ints(sums + v * kWide, all[v]);
    return;
  }
  in_column_order(all);
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    Floats f = to_floats(all[v]);
    if (D::kTwiceBias % 2) f = add(f, float_set(with->half));
    if (v * kWide < columns) add_scaled(y + v * kWide, float_set(with->scale), f, columns - v * kWide);
  }
}

// into[s][begin ..] += factors . strip, a chunk of at most n columns, for each product s. factors(c): of the products,
// at the strip's column c. PairOf: as axpy_tile has it.
template <bool Half, int PairOf, class FactorsOf>
inline void axpy_strip(const uint8_t* strip, int64_t chunk_columns, FactorsOf factors, float* const* into,
                       int64_t products, int64_t begin, int64_t n) {
  constexpr int kMostOutputs = kTileInputs;
  const int64_t step = PairOf ? kWide : kStripVectors * kWide, apart = PairOf ? chunk_columns / 2 : kWide;
  const int64_t end = std::min(PairOf ? chunk_columns / 2 : chunk_columns, n - begin);
  for (int64_t s = 0; s < products; s += kMostOutputs)
    for (int64_t c = 0; c < end; c += step) {
      const Factors* own[kMostOutputs];
      for (int64_t k = 0; k < kMostOutputs; ++k) own[k] = factors(c) + std::min(products - 1, s + k);
      const uint8_t* at = strip + c / step * kStripVectors * kBytes;
      const int64_t stride = 4 * chunk_columns, first = begin + c, left = n - first;
      switch (std::min<int64_t>(kMostOutputs, products - s)) {
        case 1:
          axpy_tile<1, Half, PairOf>(at, stride, own, into + s, first, apart, left);
          break;
        case 2:
          axpy_tile<2, Half, PairOf>(at, stride, own, into + s, first, apart, left);
          break;
        default:
          if constexpr (kMostOutputs == 3) axpy_tile<3, Half, PairOf>(at, stride, own, into + s, first, apart, left);
      }
    }
}

// The factors of `count` rows' group g for one output; scales: load_scales'; finer: and those of what is left of them,
// or null.
template <class D>
inline void make_factors(const float* a, const CodeRows<D>& rows, const std::vector<float>& scales, int64_t g,
                         int64_t count, Factors* into, Factors* finer) {
  const float* of_group = scales.data() + g * (rows.group / rows.span()) * kRows;
  float numbers[kRows];
  for (int64_t r = 0; r < kRows; r += kWide)
    store_floats(numbers + r, mul(load_floats(a + r, std::max<int64_t>(0, count - r)), load_floats(of_group + r)));
  make_factors(numbers, D::kTwiceBias, into, finer);
}

// y += sum over r < count of a[r] * row r, 16 bits of each a.
template <class D>
void axpy_one(const float* a, const CodeRows<D>& rows, int64_t count, float* y, CodeScratch& scratch) {
  constexpr int64_t kChunk = CodeRows<D>::kChunk;
  const int64_t chunks = rows.chunks(), groups = rows.groups, group = groups == 1 ? rows.n : rows.group;
  Factors* factors = (Factors*)scratch.factors.take(groups * sizeof(Factors));
  for (int64_t g = 0; g < groups; ++g) make_factors(a, rows, scratch.scales, g, count, factors + g, nullptr);
  if (group < kChunk && groups > 1) {
    for (int64_t chunk = 0, c = 0; chunk < chunks; ++chunk, c += kChunk)
      axpy_direct(
          rows, count, chunk, [&](int64_t v) { return factors + std::min(groups - 1, (c + v * kWide) / group); }, y + c,
          rows.n - c);
    return;
  }
  int32_t* sums = (int32_t*)scratch.sums.take(chunks * kChunk * sizeof(int32_t));
  CodeRows<D> own = rows;
  for (Piece piece{0, kPieceRows, false}; piece.first < count; piece.first += kPieceRows) {
    piece.count = std::min<int64_t>(kPieceRows, count - piece.first);
    piece.last = piece.first + piece.count == count;
    for (int64_t chunk = 0, c = 0; chunk < chunks; ++chunk, c += kChunk)
      (rows.inside(chunk) ? axpy_packed<D, true> : axpy_packed<D, false>)(own, piece, chunk, factors + c / group,
                                                                          sums + c, y + c, rows.n - c);
    own.codes += kPieceRows * rows.stride;
  }
}

// y[s] += sum over r < count of a[s * lda + r] * row r; count at most kRows. fine: whether numbers of s are.
template <class D>
void axpy_codes(const float* a, int64_t lda, const CodeRows<D>& rows, int64_t count, float* const* y, const bool* fine,
                int64_t outputs, CodeScratch& scratch) {
  constexpr int64_t kChunk = CodeRows<D>::kChunk;
  const bool one_scale = rows.groups == 1;
  const int64_t per = one_scale ? 1 : std::max<int64_t>(1, kChunk / rows.group);
  load_scales(rows, 0, count, kRows, scratch.scales);
  if constexpr (kAxpyDirect<D>)
    if (outputs == 1 && !fine[0]) return axpy_one(a, rows, count, y[0], scratch);
  uint8_t* strip = scratch.strip.take(kRows * kChunk);
  Factors* factors = (Factors*)scratch.factors.take(per * 2 * outputs * sizeof(Factors));  // [per, 2 * outputs]
  float* into[2 * kInputs];
  int64_t products = 0, made = -1;
  for (int64_t chunk = 0; chunk < rows.chunks(); ++chunk) {
    const int64_t begin = chunk * kChunk, first_group = one_scale ? 0 : begin / rows.group;
    if (first_group != made) {
      made = first_group;
      for (int64_t p = 0; p < per && first_group + p < rows.groups; ++p) {
        products = 0;
        for (int64_t s = 0; s < outputs; ++s) {
          Factors* own = factors + p * 2 * outputs + products;
          make_factors(a + s * lda, rows, scratch.scales, first_group + p, count, own, fine[s] ? own + 1 : nullptr);
          into[products++] = y[s];
          if (fine[s]) into[products++] = y[s];
        }
      }
    }
    constexpr bool kHalf = D::kTwiceBias % 2;
    if constexpr (kPacked<D>)
      if (per == 1) {
        (rows.inside(chunk) ? make_packed_strip<D, true> : make_packed_strip<D, false>)(rows, count, chunk, strip);
        const Factors* own = factors;
        axpy_strip<kHalf, D::kPlaces>(strip, kChunk, [own](int64_t) { return own; }, into, products, begin, rows.n);
        continue;
      }
    make_strip(rows, count, chunk, strip);
    const auto of = [&](int64_t c) {
      return factors + (one_scale ? 0 : std::min(per - 1, (begin + c) / rows.group - first_group)) * 2 * outputs;
    };
    axpy_strip<kHalf, 0>(strip, kChunk, of, into, products, begin, rows.n);
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

// One row's weights, for the self-test of the loader; NaN where two of the ways in which it is decoded differ.
template <class D>
void decode_codes(const CodeRows<D>& row, float* out) {
  constexpr int kPlaces = D::kPlaces;
  constexpr int64_t kChunk = CodeRows<D>::kChunk, kStrip = kRows * kChunk, kBlockChunks = kBlock / kChunk;
  Buffer strips, quads, decoded;
  uint8_t *strip = strips.take(2 * kStrip), *packed = strip + kStrip;
  uint8_t* quad = quads.take(kBlock * kTileRows);
  for (int64_t chunk = 0; chunk < row.chunks(); ++chunk) {
    Bytes own[kPlaces], inside[kPlaces];
    row.template decode<false>(0, chunk, own);
    if (row.inside(chunk))
      row.template decode<false, true>(0, chunk, inside);
    else
      std::copy_n(own, kPlaces, inside);
    make_strip(row, 1, chunk, strip);
    if constexpr (kAxpyDirect<D>)
      (row.inside(chunk) ? make_packed_strip<D, true> : make_packed_strip<D, false>)(row, 1, chunk, packed);
    const int64_t begin = chunk / kBlockChunks * kBlockChunks;
    if (chunk == begin)
      make_quads(row, 0, 1, begin, std::min(row.chunks(), begin + kBlockChunks),
                 decoded.take(std::max(2, kPlaces) * kWide * kBytes), quad);
    for (int64_t k = 0; k < kChunk && chunk * kChunk + k < row.n; ++k) {
      const int64_t c = chunk * kChunk + k, byte = k / kPlaces, j = k % kPlaces;
      uint8_t levels[kBytes], same[kBytes];
      store_bytes(levels, own[j]);
      store_bytes(same, inside[j]);
      const uint8_t level = levels[byte];
      const int64_t word = ((chunk - begin) * kPlaces + j) * kWide + byte / 4;
      bool equal =
          level == strip[4 * k] && level == same[byte] && level == quad[word * kTileVectors * kBytes + byte % 4];
      if (kAxpyDirect<D>)  // as interleave_codes has bytes
        equal &= level == packed[(byte / 4 % 4 * kPlaces + j) * kBytes + 16 * (byte / 16) + 4 * (byte % 4)];
      out[c] = equal ? (level - 0.5f * D::kTwiceBias) * row.scale(0, c / row.group) : NAN;
    }
  }
}

}  // namespace resmoe
