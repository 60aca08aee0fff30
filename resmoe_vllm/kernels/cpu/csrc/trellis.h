// Trellis codes (compress_tools/format/SPEC.md, 4): 16 levels at a time, by byte shuffles.
//
// A level is a sum of table entries, one for each field of the last 12 bits of symbols. With 4 bits a field is a symbol;
// with 3 likewise, of 8 entries; with 2 it is a pair of symbols; with 1 four of them. Before a row's first octet lies its
// last one.
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
inline __m128i table_16(const int8_t* entries) { return _mm_loadu_si128((const __m128i*)entries); }
// Bytes of pairs of symbols of Bits bits, the first lower, to one byte each.
template <int Bits>
inline void split(__m128i packed, __m128i* low, __m128i* high) {
  const __m128i mask = _mm_set1_epi8((1 << Bits) - 1);
  const __m128i first = _mm_and_si128(packed, mask), second = _mm_and_si128(_mm_srli_epi16(packed, Bits), mask);
  *low = _mm_unpacklo_epi8(first, second);
  *high = _mm_unpackhi_epi8(first, second);
}

inline int64_t octet_before(int64_t octet, int64_t octets) { return (octet ? octet : octets) - 1; }

// levels(tables, row, octet, octets): of two octets of columns, the first an even one, int8 [16]; if Octets is 1, of one
// octet, the first 8.
template <int Bits>
struct Trellis;

template <>
struct Trellis<4> {
  struct Tables {
    __m128i newest, second, third;
    explicit Tables(const int8_t* t) : newest(table_16(t)), second(table_16(t + 16)), third(table_16(t + 32)) {}
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
    return _mm_add_epi8(_mm_add_epi8(_mm_shuffle_epi8(t.newest, own),
                                     _mm_shuffle_epi8(t.second, _mm_alignr_epi8(own, before, 15))),
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
    const __m128i bytes = _mm_shuffle_epi8(_mm_cvtsi32_si128(high), _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1));
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
  struct Tables {
    __m128i newest, second, third;
    explicit Tables(const int8_t* t) : newest(turned(t)), second(turned(t + 16)), third(turned(t + 32)) {}
    // In a row the older symbol of a pair is the lower one, in a state the newer.
    static inline __m128i turned(const int8_t* t) {
      alignas(16) int8_t entries[16];
      for (int k = 0; k < 16; ++k) entries[k] = t[k >> 2 | (k & 3) << 2];
      return table_16(entries);
    }
  };
  // Levels of the columns that end a byte's nibbles: 8 to the upper half, the nibbles before them in the lower.
  static inline __m128i of_nibbles(const Tables& t, __m128i nibbles) {
    return _mm_add_epi8(_mm_add_epi8(_mm_shuffle_epi8(t.newest, nibbles),
                                     _mm_shuffle_epi8(t.second, _mm_slli_si128(nibbles, 1))),
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
  struct Tables {
    __m128i newest, second, third;
    explicit Tables(const int8_t* t) : newest(turned(t)), second(turned(t + 16)), third(turned(t + 32)) {}
    static inline __m128i turned(const int8_t* t) {
      alignas(16) int8_t entries[16];
      for (int k = 0; k < 16; ++k) entries[k] = t[k >> 3 | (k >> 1 & 2) | (k << 1 & 4) | (k << 3 & 8)];
      return table_16(entries);
    }
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

template <int Bits>
struct TrellisCode {
  static constexpr int kBits = Bits;
  static constexpr float kOne = 1, kShift = 0;
  using Tables = typename Trellis<Bits>::Tables;
  // visit(j, values) of one octet or of two. octets: of the row.
  template <int Octets, class Visit>
  static inline void load(const Tables& tables, const uint8_t* row, int64_t octet, int64_t octets, Visit visit) {
    const __m128i levels = Trellis<Bits>::template levels<Octets>(tables, row, octet, octets);
    visit(0, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(levels)));
    if constexpr (Octets == 2) visit(1, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(levels, 8))));
  }
};

}  // namespace resmoe
