// Trellis codes (compress_tools/format/SPEC.md, 4): levels by byte shuffles, 128 columns at a time.
//
// A level is a sum of table entries, one for each field of the last 12 bits of symbols. With 4 bits a field is a
// symbol; with 3 likewise, of 8 entries; with 2 it is a pair of symbols; with 1 four of them. Before a row's first
// octet lies its last one.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "vec.h"

namespace resmoe {

struct NoTables {
  explicit NoTables(const int8_t*) {}
};

inline __m128i load_8(const uint8_t* from) { return _mm_loadl_epi64((const __m128i*)from); }
inline __m128i load_4(const uint8_t* from) {
  int32_t word;
  memcpy(&word, from, 4);
  return _mm_cvtsi32_si128(word);
}
inline __m128i load_2(const uint8_t* from) {
  uint16_t word;
  memcpy(&word, from, 2);
  return _mm_cvtsi32_si128(word);
}
// Bytes of pairs of symbols of Bits bits, the first lower, to one byte each.
template <int Bits>
inline void split(__m128i packed, __m128i* low, __m128i* high) {
  const __m128i mask = _mm_set1_epi8((1 << Bits) - 1);
  const __m128i first = _mm_and_si128(packed, mask), second = _mm_and_si128(_mm_srli_epi16(packed, Bits), mask);
  *low = _mm_unpacklo_epi8(first, second);
  *high = _mm_unpackhi_epi8(first, second);
}

inline int64_t octet_before(int64_t octet, int64_t octets) { return (octet ? octet : octets) - 1; }

// The tables of three fields of four bits, the newest symbols' first. place(k): the entry that nibble k of a row, as it
// lies, chooses: the older symbol is the lower one in a row, the newer in a state.
struct ThreeTables {
  __m128i newest, second, third;
  template <class Place>
  ThreeTables(const int8_t* t, Place place)
      : newest(ordered(t, place)), second(ordered(t + 16, place)), third(ordered(t + 32, place)) {}

 private:
  template <class Place>
  static inline __m128i ordered(const int8_t* t, Place place) {
    alignas(16) int8_t entries[16];
    for (int k = 0; k < 16; ++k) entries[k] = t[place(k)];
    return _mm_load_si128((const __m128i*)entries);
  }
};

// levels(tables, row, octet, octets): of two octets of columns, the first an even one, int8 [16]; if Octets is 1, of
// one octet, the first 8.
template <int Bits>
struct Trellis;

template <>
struct Trellis<4> {
  struct Tables : ThreeTables {
    explicit Tables(const int8_t* t) : ThreeTables(t, [](int k) { return k; }) {}
  };
  template <int Octets>
  static inline __m128i levels(const Tables& t, const uint8_t* row, int64_t octet, int64_t octets) {
    const uint8_t *at = row + 4 * octet, *last = row + 4 * octet_before(octet, octets);
    __m128i before, own, rest;
    if (Octets == 2) {
      // sixteen columns, the octet that is wanted behind
      split<4>(octet ? _mm_loadu_si128((const __m128i*)(at - 8))
                     : _mm_unpacklo_epi64(_mm_slli_si128(load_4(last), 4), load_8(at)),
               &before, &own);
    } else {
      split<4>(_mm_unpacklo_epi32(load_4(last), load_4(at)), &before, &rest);
      own = _mm_srli_si128(before, 8);
      before = _mm_slli_si128(before, 8);
    }
    return _mm_add_epi8(
        _mm_add_epi8(_mm_shuffle_epi8(t.newest, own), _mm_shuffle_epi8(t.second, _mm_alignr_epi8(own, before, 15))),
        _mm_shuffle_epi8(t.third, _mm_alignr_epi8(own, before, 14)));
  }
};

template <>
struct Trellis<3> {
  struct Tables {
    __m128i of_age[4];
    explicit Tables(const int8_t* t) {
      for (int age = 0; age < 4; ++age) of_age[age] = load_8((const uint8_t*)t + 8 * age);
    }
  };
  // Symbols of 16 columns: a plane of 2 bits, and one of a high bit.
  static inline __m128i symbols(__m128i low, uint32_t high) {
    __m128i nibbles, pairs, unused;
    split<4>(low, &nibbles, &unused);  // 4 bytes of columns to 8 nibbles
    split<2>(nibbles, &pairs, &unused);
    const __m128i bytes =
        _mm_shuffle_epi8(_mm_cvtsi32_si128(high), _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1));
    const __m128i bit = _mm_setr_epi8(1, 2, 4, 8, 16, 32, 64, -128, 1, 2, 4, 8, 16, 32, 64, -128);
    const __m128i set = _mm_cmpeq_epi8(_mm_and_si128(bytes, bit), bit);
    return _mm_or_si128(pairs, _mm_and_si128(set, _mm_set1_epi8(4)));
  }
  template <int Octets>
  static inline __m128i levels(const Tables& t, const uint8_t* row, int64_t octet, int64_t octets) {
    const uint8_t *low = row + 2 * octet, *high = row + 2 * octets + octet;
    const __m128i own = Octets == 2 ? symbols(load_4(low), high[0] | high[1] << 8) : symbols(load_2(low), high[0]);
    // Of the octet before, whose columns are the upper eight.
    const int64_t last = octet_before(octet, octets);
    const __m128i before = _mm_slli_si128(symbols(load_2(row + 2 * last), row[2 * octets + last]), 8);
    const __m128i first = _mm_shuffle_epi8(t.of_age[0], own);
    const __m128i second = _mm_shuffle_epi8(t.of_age[1], _mm_alignr_epi8(own, before, 15));
    const __m128i third = _mm_shuffle_epi8(t.of_age[2], _mm_alignr_epi8(own, before, 14));
    const __m128i fourth = _mm_shuffle_epi8(t.of_age[3], _mm_alignr_epi8(own, before, 13));
    return _mm_add_epi8(_mm_add_epi8(first, second), _mm_add_epi8(third, fourth));
  }
};

template <>
struct Trellis<2> {
  struct Tables : ThreeTables {
    explicit Tables(const int8_t* t) : ThreeTables(t, [](int k) { return k >> 2 | (k & 3) << 2; }) {}
  };
  // Levels of the columns that end a byte's nibbles: 8 to the upper half, the nibbles before them in the lower.
  static inline __m128i of_nibbles(const Tables& t, __m128i nibbles) {
    return _mm_add_epi8(
        _mm_add_epi8(_mm_shuffle_epi8(t.newest, nibbles), _mm_shuffle_epi8(t.second, _mm_slli_si128(nibbles, 1))),
        _mm_shuffle_epi8(t.third, _mm_slli_si128(nibbles, 2)));
  }
  template <int Octets>
  static inline __m128i levels(const Tables& t, const uint8_t* row, int64_t octet, int64_t octets) {
    uint64_t word = 0;  // 32 bits of the columns before, of which 16 are needed, then the columns
    memcpy((uint8_t*)&word + 2, row + 2 * octet_before(octet, octets), 2);
    memcpy((uint8_t*)&word + 4, row + 2 * octet, 2 * Octets);
    __m128i odd, even, unused;
    split<4>(_mm_cvtsi64_si128(word), &odd, &unused);
    split<4>(_mm_cvtsi64_si128(word << 2), &even, &unused);
    return _mm_unpackhi_epi8(of_nibbles(t, even), of_nibbles(t, odd));
  }
};

template <>
struct Trellis<1> {
  struct Tables : ThreeTables {
    explicit Tables(const int8_t* t)
        : ThreeTables(t, [](int k) { return k >> 3 | (k >> 1 & 2) | (k << 1 & 4) | (k << 3 & 8); }) {}
  };
  template <int Octets>
  static inline __m128i levels(const Tables& t, const uint8_t* row, int64_t octet, int64_t octets) {
    const int64_t last = octet_before(octet, octets);
    uint32_t word = (uint32_t)row[octet] << 16;  // 16 bits of the columns before, then the columns
    if (Octets == 2) word |= (uint32_t)row[octet + 1] << 24;
    word |= (uint32_t)row[last] << 8 | row[octet_before(last, octets)];
    // Nibbles that end at each column; those of columns before are the windows of four columns earlier.
    const auto nibbles = [&](int earlier) __attribute__((always_inline)) {
      alignas(16) uint8_t out[16];
      for (int k = 0; k < 16; ++k) out[k] = word >> (13 + k - earlier) & 15;
      return _mm_load_si128((const __m128i*)out);
    };
    return _mm_add_epi8(_mm_add_epi8(_mm_shuffle_epi8(t.newest, nibbles(0)), _mm_shuffle_epi8(t.second, nibbles(4))),
                        _mm_shuffle_epi8(t.third, nibbles(8)));
  }
};

// decode_128(tables, row, octet, octets, out): sixteen octets that do not begin the row, 0 < octet. Columns are looked
// up apart by their place in a byte, and interleaved at the end.
inline __m256i table_32(__m128i entries) { return _mm256_broadcastsi128_si256(entries); }
inline __m256i load_32(const uint8_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
inline __m256i low_nibbles(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline __m256i high_nibbles(__m256i v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
inline __m256i three(__m256i first, __m256i a, __m256i second, __m256i b, __m256i third, __m256i c) {
  return _mm256_add_epi8(_mm256_add_epi8(_mm256_shuffle_epi8(first, a), _mm256_shuffle_epi8(second, b)),
                         _mm256_shuffle_epi8(third, c));
}
// Two vectors in the order of 128-bit lanes: low lanes, then high ones.
inline void store_lanes_in_order(int8_t* out, __m256i low, __m256i high) {
  _mm256_storeu_si256((__m256i*)out, _mm256_permute2x128_si256(low, high, 0x20));
  _mm256_storeu_si256((__m256i*)(out + 64), _mm256_permute2x128_si256(low, high, 0x31));
}
// out[4 * k + j] = c[j][k]
inline void interleave_four(const __m256i (&c)[4], int8_t* out) {
  const __m256i low01 = _mm256_unpacklo_epi8(c[0], c[1]), high01 = _mm256_unpackhi_epi8(c[0], c[1]);
  const __m256i low23 = _mm256_unpacklo_epi8(c[2], c[3]), high23 = _mm256_unpackhi_epi8(c[2], c[3]);
  store_lanes_in_order(out, _mm256_unpacklo_epi16(low01, low23), _mm256_unpackhi_epi16(low01, low23));
  store_lanes_in_order(out + 32, _mm256_unpacklo_epi16(high01, high23), _mm256_unpackhi_epi16(high01, high23));
}

inline void decode_128(const Trellis<4>::Tables& t, const uint8_t* row, int64_t octet, int64_t, int8_t* out) {
  const __m256i newest = table_32(t.newest), second = table_32(t.second), third = table_32(t.third);
  for (int half = 0; half < 2; ++half) {
    const uint8_t* at = row + 4 * octet + 32 * half;
    const __m256i own = load_32(at), before = load_32(at - 1);
    const __m256i low = low_nibbles(own), high = high_nibbles(own);
    const __m256i low_before = low_nibbles(before), high_before = high_nibbles(before);
    const __m256i even = three(newest, low, second, high_before, third, low_before);
    const __m256i odd = three(newest, high, second, low, third, high_before);
    const __m256i first = _mm256_unpacklo_epi8(even, odd), last = _mm256_unpackhi_epi8(even, odd);
    _mm256_storeu_si256((__m256i*)(out + 64 * half), _mm256_permute2x128_si256(first, last, 0x20));
    _mm256_storeu_si256((__m256i*)(out + 64 * half + 32), _mm256_permute2x128_si256(first, last, 0x31));
  }
}

inline void decode_128(const Trellis<2>::Tables& t, const uint8_t* row, int64_t octet, int64_t, int8_t* out) {
  const __m256i newest = table_32(t.newest), second = table_32(t.second), third = table_32(t.third);
  const uint8_t* at = row + 2 * octet;
  // Bytes of the same columns, and of those that begin one column earlier.
  const auto earlier = [](__m256i own, __m256i before) __attribute__((always_inline)) {
    return _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi16(own, 2), _mm256_set1_epi8((char)0xFC)),
                           _mm256_and_si256(_mm256_srli_epi16(before, 6), _mm256_set1_epi8(3)));
  };
  const __m256i own = load_32(at), before = load_32(at - 1), oldest = load_32(at - 2);
  __m256i columns[4];
  const auto both = [&](int first, __m256i v, __m256i w) __attribute__((always_inline)) {
    const __m256i low = low_nibbles(v), high = high_nibbles(v);
    const __m256i low_before = low_nibbles(w), high_before = high_nibbles(w);
    columns[first] = three(newest, low, second, high_before, third, low_before);
    columns[first + 2] = three(newest, high, second, low, third, high_before);
  };
  both(1, own, before);
  both(0, earlier(own, before), earlier(before, oldest));
  interleave_four(columns, out);
}

inline void decode_128(const Trellis<3>::Tables& t, const uint8_t* row, int64_t octet, int64_t octets, int8_t* out) {
  const uint8_t *low = row + 2 * octet, *high = row + 2 * octets + octet;
  __m256i of_age[4];
#pragma GCC unroll 4
  for (int age = 0; age < 4; ++age) of_age[age] = table_32(t.of_age[age]);
  const auto load_16 = [](const uint8_t* from) { return _mm_loadu_si128((const __m128i*)from); };
  const __m128i nibble = _mm_set1_epi8(15);
  const auto joined = [](__m128i first, __m128i second) __attribute__((always_inline)) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi8(first, second)),
                                   _mm_unpackhi_epi8(first, second), 1);
  };
  // High bits of four columns a byte, and of the four before them.
  const __m128i bits = load_16(high), bits_before = load_16(high - 1);
  const __m128i low_half = _mm_and_si128(bits, nibble);
  const __m256i tops = joined(low_half, _mm_and_si128(_mm_srli_epi16(bits, 4), nibble));
  const __m256i tops_before = joined(_mm_and_si128(_mm_srli_epi16(bits_before, 4), nibble), low_half);
  const auto symbol = [](__m256i lows, __m256i tops, int column) __attribute__((always_inline)) {
    const __m256i high = column < 2 ? _mm256_slli_epi16(tops, 2 - column) : _mm256_srli_epi16(tops, column - 2);
    return _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(lows, 2 * column), _mm256_set1_epi8(3)),
                           _mm256_and_si256(high, _mm256_set1_epi8(4)));
  };
  const __m256i own = load_32(low), before = load_32(low - 1);
  // The last three columns of the four before, then the four.
  __m256i symbols[7], columns[4];
#pragma GCC unroll 7
  for (int k = 0; k < 7; ++k) symbols[k] = k < 3 ? symbol(before, tops_before, k + 1) : symbol(own, tops, k - 3);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
    columns[j] = _mm256_add_epi8(
        _mm256_add_epi8(_mm256_shuffle_epi8(of_age[0], symbols[j + 3]), _mm256_shuffle_epi8(of_age[1], symbols[j + 2])),
        _mm256_add_epi8(_mm256_shuffle_epi8(of_age[2], symbols[j + 1]), _mm256_shuffle_epi8(of_age[3], symbols[j])));
  interleave_four(columns, out);
}

inline void decode_128(const Trellis<1>::Tables& t, const uint8_t* row, int64_t octet, int64_t octets, int8_t* out) {
  for (int k = 0; k < 16; k += 2)
    _mm_storeu_si128((__m128i*)(out + 8 * k), Trellis<1>::levels<2>(t, row, octet + k, octets));
}

constexpr int64_t kDecoded = 16;  // octets at a time

// Levels of `count` octets, kDecoded at most, from an even one on; the last may be a lone one.
template <int Bits>
inline void decode_trellis(const typename Trellis<Bits>::Tables& t, const uint8_t* row, int64_t octet, int64_t count,
                           int64_t octets, int8_t* out) {
  if (octet && count == kDecoded) return decode_128(t, row, octet, octets, out);
  int64_t k = 0;
  for (; k + 2 <= count; k += 2)
    _mm_storeu_si128((__m128i*)(out + 8 * k), Trellis<Bits>::template levels<2>(t, row, octet + k, octets));
  if (k < count)
    _mm_storel_epi64((__m128i*)(out + 8 * k), Trellis<Bits>::template levels<1>(t, row, octet + k, octets));
}

template <int Bits>
struct TrellisCode {
  static constexpr int kBits = Bits;
  static constexpr float kOne = 1, kShift = 0;
  using Tables = typename Trellis<Bits>::Tables;
};

}  // namespace resmoe
