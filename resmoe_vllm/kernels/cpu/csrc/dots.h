// Dots in integers: unsigned levels of a byte times numbers rounded to 16 bits.
//
// Numbers are rounded once, symmetrically, with one scale, a power of two, for each kBlock columns: what bf16 holds
// stays exact down to 2^-7 of a block's largest, and nothing is off by more than 2^-15 of that. Sums of levels and
// numbers over a span, columns that share their scales, are exact: they wrap while they are added up, but less the
// bias no level is larger than 127.5, and 127.5 * kLargest * kBlock is below 2^31, however long a row is. So they are
// the same in any order, and a result's bits depend neither on the batch nor on how a row was decoded.
#pragma once

#include <string.h>

#include <cmath>
#include <vector>

#include "vec.h"

namespace resmoe {

constexpr int64_t kBlock = 512;
constexpr int kLargest = 127 * 256 + 127;  // whose halves are both within int8

// Rounds N numbers, a whole number of vectors, to q and returns the scale; a NaN or an infinity among them makes it
// NaN.
template <int64_t N>
inline float round_to_16_bits(const float* x, int16_t* q) {
  Ints largest_lanes = int_set(0);
  for (int64_t c = 0; c < N; c += kWide) largest_lanes = larger(largest_lanes, magnitude_bits(load_floats(x + c)));
  const int32_t top = largest_of(largest_lanes);
  if (top == 0 || top >= 0x7f800000) {
    memset(q, 0, 2 * N);
    return top ? NAN : 0;
  }
  float largest, scale, inverse;
  memcpy(&largest, &top, 4);
  const auto power_of_two = [](int exponent, float* into) {
    const uint32_t bits = (uint32_t)(exponent + 127) << 23;
    memcpy(into, &bits, 4);
  };
  const int exponent = std::max((top >> 23) - 127, -100) - 14;
  power_of_two(exponent, &scale);
  power_of_two(-exponent, &inverse);
  if (largest * inverse >= kLargest + 0.5f) {
    scale *= 2;
    inverse *= 0.5f;
  }
  const Floats times = float_set(inverse);
  for (int64_t c = 0; c < N; c += kWide) store_words(q + c, to_nearest(mul(load_floats(x + c), times)));
  return scale;
}

// What levels are multiplied with, four by four, of int16 numbers, at most kLargest: their two halves where the path
// has kHalves, else the even ones and the odd ones.
inline void split(const int16_t* x, int64_t count, uint8_t* first, uint8_t* second) {
  if constexpr (kHalves) {
    for (int64_t k = 0; k < count; ++k) {
      const int16_t high = (int16_t)(x[k] + 128) >> 8;
      first[k] = (uint8_t)high;
      second[k] = (uint8_t)(x[k] - 256 * high);
    }
  } else {
    int16_t *even = (int16_t*)first, *odd = (int16_t*)second;
    for (int64_t k = 0; k < count / 2; ++k) {
      even[k] = x[2 * k];
      odd[k] = x[2 * k + 1];
    }
  }
}

// Whether 16 bits don't hold numbers of these bits: they are not bf16 or fp16.
inline bool is_fine(uint32_t bits) { return bits & 0x1fff; }

// How a row of numbers is laid out for rows of levels.
struct ImageKind {
  int64_t columns;
  int64_t places;      // columns in a byte of codes: see levels.h
  int64_t span;        // columns whose sums are scaled together: at most kBlock
  int64_t twice_bias;  // of levels
  bool operator==(const ImageKind& other) const {
    return columns == other.columns && places == other.places && span == other.span && twice_bias == other.twice_bias;
  }
  int64_t chunk() const { return places * kBytes; }
  int64_t vectors() const { return (columns + chunk() - 1) / chunk() * places; }
  int64_t spans() const { return (columns + span - 1) / span; }
  int64_t blocks() const { return (columns + kBlock - 1) / kBlock; }
};

// One row of numbers as levels are multiplied with it.
struct Image {
  const uint8_t* vectors;  // [vectors, 2, kBytes], column places * k + j of a chunk for byte k of its vector j
  const float* scale;      // [blocks]
  const int32_t* start;    // [spans]: what the bias takes away, and half a level more is in
  const float* half;       // [spans]
};

class Images {
 public:
  explicit Images(const ImageKind& kind) : kind(kind) {}
  const ImageKind kind;

  void resize(int64_t count) {
    if (count <= (int64_t)(scale_.size() / kind.blocks())) return;
    vectors_.take(count * kind.vectors() * 2 * kBytes);
    scale_.resize(count * kind.blocks());
    start_.resize(count * kind.spans());
    half_.resize(count * kind.spans());
  }
  Image at(int64_t i) const {
    return {vectors_.data() + i * kind.vectors() * 2 * kBytes, scale_.data() + i * kind.blocks(),
            start_.data() + i * kind.spans(), half_.data() + i * kind.spans()};
  }
  // rest: what rounding left of x; or null.
  void make(int64_t i, const float* x, float* rest) {
    switch (kind.places) {
      case 1:
        return make<1>(i, x, rest);
      case 2:
        return make<2>(i, x, rest);
      case 4:
        return make<4>(i, x, rest);
      default:
        return make<8>(i, x, rest);
    }
  }

 private:
  Buffer vectors_;
  std::vector<float> scale_, half_;
  std::vector<int32_t> start_;

  template <int Places>
  void make(int64_t i, const float* x, float* rest) {
    const Image to = at(i);
    int32_t* start = const_cast<int32_t*>(to.start);
    float* half = const_cast<float*>(to.half);
    std::fill_n(start, kind.spans(), 0);
    for (int64_t b = 0, c = 0; c < kind.columns; ++b, c += kBlock) {
      const int64_t n = std::min(kBlock, kind.columns - c);
      alignas(64) float own_x[kBlock];
      const float* from = x + c;
      if (n < kBlock) {  // with zeros behind it
        std::fill(std::copy_n(from, n, own_x), own_x + kBlock, 0.0f);
        from = own_x;
      }
      int16_t q[kBlock];
      const float scale = round_to_16_bits<kBlock>(from, q);
      const_cast<float*>(to.scale)[b] = scale;
      if (rest)
        for (int64_t k = 0; k < n; ++k) rest[c + k] = scale == scale ? x[c + k] - scale * q[k] : 0;
      for (int64_t k = 0; k < n; ++k) start[(c + k) / kind.span] += q[k];
      constexpr int64_t kChunk = Places * kBytes;
      for (int64_t first = 0; first < n; first += kChunk)
        for (int j = 0; j < Places; ++j) {
          int16_t own[kBytes];
          for (int k = 0; k < kBytes; ++k) own[k] = q[first + Places * k + j];
          uint8_t* vector = const_cast<uint8_t*>(to.vectors) + ((c + first) / kBytes + j) * 2 * kBytes;
          split(own, kBytes, vector, vector + kBytes);
        }
    }
    const int32_t bias = kind.twice_bias / 2;
    const float rest_of_bias = kind.twice_bias % 2 ? -0.5f : 0;
    for (int64_t k = 0; k < kind.spans(); ++k) {
      half[k] = rest_of_bias * start[k];
      start[k] *= kLevelsLess - bias;
    }
  }
};

}  // namespace resmoe
