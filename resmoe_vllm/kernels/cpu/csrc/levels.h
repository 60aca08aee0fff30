// Rows of codes as vectors of unsigned levels, a byte each: plain codes and trellis codes (SPEC.md, 4).
//
// weight = scale * (level - kTwiceBias / 2). A chunk is what one vector of bytes holds, kPlaces columns in each byte:
// decode() gives a vector for each place in a byte, so column kPlaces * k + j of the chunk is byte k of vector j. If
// Turned, bytes are placed by turn() first, and in_columns() makes vectors of consecutive columns of them, their 32-bit
// words in turn<1>'s order. Beyond a row lie zero bytes. Where a byte and the one before it say all, of_bytes() takes
// them in any order.
//
// A trellis's level is a sum of table entries, one for each field of the last 12 bits of symbols. With 4 bits a field
// is a symbol; with 3 likewise, of 8 entries; with 2 it is a pair of symbols; with 1 four of them. Before a row's first
// octet lies its last one. The newest symbols' entries are raised by 128, and sums wrap: they are unsigned.
#pragma once

#include "path.h"
#include "vec.h"

namespace resmoe {

struct NoTables {
  explicit NoTables(const int8_t*) {}
};

inline Bytes low_nibbles(Bytes v) { return both(v, byte_set(15)); }
inline Bytes high_nibbles(Bytes v) { return low_nibbles(right<4>(v)); }

// Bytes at - By.. of `size` of a row. Inside: all of them are.
template <bool Inside, int By>
inline Bytes bytes_of_row(const uint8_t* row, int64_t size, int64_t at) {
  if constexpr (Inside)
    return load_bytes(row + at - By);
  else
    return load_window<By>(row, size, at);
}
// Bytes at - By.. of a plane, turned if asked for.
template <bool Turned, bool Inside, int Places, int By = 0>
inline Bytes window(const uint8_t* plane, int64_t size, int64_t at) {
  const Bytes v = bytes_of_row<Inside, By>(plane, size, at);
  if constexpr (Turned)
    return turn<Places>(v);
  else
    return v;
}

template <int Bits>
struct Plain;
template <int Bits>
struct Trellis;

template <>
struct Plain<8> {
  using Tables = NoTables;
  static constexpr int kBits = 8, kPlaces = 1, kBefore = 0, kTwiceBias = 255;
  template <bool Turned, bool Inside>
  static inline void decode(const Tables& t, const uint8_t* row, int64_t octets, int64_t chunk, Bytes (&out)[1]) {
    of_bytes(t, window<Turned, Inside, 1>(row, 8 * octets, chunk * kBytes), Bytes(), out);
  }
  static inline void of_bytes(const Tables&, Bytes own, Bytes, Bytes (&out)[1]) { out[0] = own; }
};

// Signed bytes, as matrices beside the experts have them (SPEC.md, 6): any number of columns, not octets, a row.
struct SignedBytes {
  using Tables = NoTables;
  static constexpr int kBits = 8, kPlaces = 1, kBefore = 0, kTwiceBias = 256;
  template <bool Turned, bool Inside>
  static inline void decode(const Tables&, const uint8_t* row, int64_t columns, int64_t chunk, Bytes (&out)[1]) {
    out[0] = plus(window<Turned, Inside, 1>(row, columns, chunk * kBytes), byte_set(128));
  }
};

template <>
struct Plain<4> {
  using Tables = NoTables;
  static constexpr int kBits = 4, kPlaces = 2, kBefore = 0, kTwiceBias = 15;
  template <bool Turned, bool Inside>
  static inline void decode(const Tables& t, const uint8_t* row, int64_t octets, int64_t chunk, Bytes (&out)[2]) {
    of_bytes(t, window<Turned, Inside, 2>(row, 4 * octets, chunk * kBytes), Bytes(), out);
  }
  static inline void of_bytes(const Tables&, Bytes own, Bytes, Bytes (&out)[2]) {
    out[0] = low_nibbles(own);
    out[1] = high_nibbles(own);
  }
};

template <>
struct Plain<2> {
  using Tables = NoTables;
  static constexpr int kBits = 2, kPlaces = 4, kBefore = 0, kTwiceBias = 3;
  template <bool Turned, bool Inside>
  static inline void decode(const Tables&, const uint8_t* row, int64_t octets, int64_t chunk, Bytes (&out)[4]) {
    const Bytes own = window<Turned, Inside, 4>(row, 2 * octets, chunk * kBytes), mask = byte_set(3);
    out[0] = both(own, mask);
    out[1] = both(right<2>(own), mask);
    out[2] = both(right<4>(own), mask);
    out[3] = both(right<6>(own), mask);
  }
};

// Three bits are a plane of two bits and one of a high bit behind it. tops: high bits of four columns a byte.
template <int Column>
inline Bytes symbol_of_three(Bytes lows, Bytes tops) {
  const Bytes high = Column < 2 ? left < Column<2 ? 2 - Column : 0>(tops) : right < Column<2 ? 0 : Column - 2>(tops);
  return either(both(right<2 * Column>(lows), byte_set(3)), both(high, byte_set(4)));
}
template <bool Turned>
inline Bytes tops_of(Bytes words) {  // words of eight columns to bytes of four
  const Bytes tops = low_nibbles(either(words, left<4>(words)));
  if constexpr (Turned)
    return turn<4>(tops);
  else
    return tops;
}

template <>
struct Plain<3> {
  using Tables = NoTables;
  static constexpr int kBits = 3, kPlaces = 4, kBefore = 0, kTwiceBias = 7;
  template <bool Turned, bool Inside>
  static inline void decode(const Tables&, const uint8_t* row, int64_t octets, int64_t chunk, Bytes (&out)[4]) {
    const Bytes lows = window<Turned, Inside, 4>(row, 2 * octets, chunk * kBytes);
    const Bytes tops = tops_of<Turned>(load_window_of_words<0>(row + 2 * octets, octets, chunk * kBytes / 2));
    out[0] = symbol_of_three<0>(lows, tops);
    out[1] = symbol_of_three<1>(lows, tops);
    out[2] = symbol_of_three<2>(lows, tops);
    out[3] = symbol_of_three<3>(lows, tops);
  }
};

// The tables of three fields of four bits, the newest symbols' first. place(k): the entry that nibble k of a row, as it
// lies, chooses: the older symbol is the lower one in a row, the newer in a state.
struct ThreeTables {
  Bytes newest, second, third;
  template <class Place>
  ThreeTables(const int8_t* t, Place place)
      : newest(plus(ordered(t, place), byte_set(128))), second(ordered(t + 16, place)), third(ordered(t + 32, place)) {}
  inline Bytes level(Bytes a, Bytes b, Bytes c) const {
    return plus(plus(look_up(newest, a), look_up(second, b)), look_up(third, c));
  }

 private:
  template <class Place>
  static inline Bytes ordered(const int8_t* t, Place place) {
    alignas(16) int8_t entries[16];
    for (int k = 0; k < 16; ++k) entries[k] = t[place(k)];
    return table_of(entries_of_16(entries));
  }
};

template <>
struct Trellis<4> {
  struct Tables : ThreeTables {
    explicit Tables(const int8_t* t) : ThreeTables(t, [](int k) { return k; }) {}
  };
  static constexpr int kBits = 4, kPlaces = 2, kBefore = 1, kTwiceBias = 256;
  template <bool Turned, bool Inside>
  static inline void decode(const Tables& t, const uint8_t* row, int64_t octets, int64_t chunk, Bytes (&out)[2]) {
    const Bytes own = window<Turned, Inside, 2>(row, 4 * octets, chunk * kBytes);
    of_bytes(t, own, window<Turned, Inside, 2, 1>(row, 4 * octets, chunk * kBytes), out);
  }
  static inline void of_bytes(const Tables& t, Bytes own, Bytes before, Bytes (&out)[2]) {
    const Bytes low = low_nibbles(own), high = high_nibbles(own);
    const Bytes high_before = high_nibbles(before);
    out[0] = t.level(low, high_before, low_nibbles(before));
    out[1] = t.level(high, low, high_before);
  }
};

template <>
struct Trellis<3> {
  struct Tables {
    Bytes of_age[4];
    explicit Tables(const int8_t* t) {
      for (int age = 0; age < 4; ++age) of_age[age] = table_of(entries_of_8(t + 8 * age));
      of_age[0] = plus(of_age[0], byte_set(128));
    }
  };
  static constexpr int kBits = 3, kPlaces = 4, kBefore = 1, kTwiceBias = 256;
  template <bool Turned, bool Inside>
  static inline void decode(const Tables& t, const uint8_t* row, int64_t octets, int64_t chunk, Bytes (&out)[4]) {
    const Bytes lows = window<Turned, Inside, 4>(row, 2 * octets, chunk * kBytes);
    const Bytes lows_before = window<Turned, Inside, 4, 1>(row, 2 * octets, chunk * kBytes);
    const uint8_t* plane = row + 2 * octets;
    const Bytes words = load_window_of_words<0>(plane, octets, chunk * kBytes / 2);
    const Bytes words_before = load_window_of_words<1>(plane, octets, chunk * kBytes / 2);
    const Bytes tops = tops_of<Turned>(words);
    // of a byte's columns and those of the four before them
    Bytes tops_before = low_nibbles(either(left<8>(words), right<4>(words_before)));
    if constexpr (Turned) tops_before = turn<4>(tops_before);
    const Bytes symbols[7] = {
        symbol_of_three<1>(lows_before, tops_before),
        symbol_of_three<2>(lows_before, tops_before),
        symbol_of_three<3>(lows_before, tops_before),
        symbol_of_three<0>(lows, tops),
        symbol_of_three<1>(lows, tops),
        symbol_of_three<2>(lows, tops),
        symbol_of_three<3>(lows, tops),
    };
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      out[j] = plus(plus(look_up(t.of_age[0], symbols[j + 3]), look_up(t.of_age[1], symbols[j + 2])),
                    plus(look_up(t.of_age[2], symbols[j + 1]), look_up(t.of_age[3], symbols[j])));
  }
};

template <>
struct Trellis<2> {
  struct Tables : ThreeTables {
    explicit Tables(const int8_t* t) : ThreeTables(t, [](int k) { return k >> 2 | (k & 3) << 2; }) {}
  };
  static constexpr int kBits = 2, kPlaces = 4, kBefore = 2, kTwiceBias = 256;
  template <bool Turned, bool Inside>
  static inline void decode(const Tables& t, const uint8_t* row, int64_t octets, int64_t chunk, Bytes (&out)[4]) {
    const int64_t size = 2 * octets, at = chunk * kBytes;
    const Bytes own = window<Turned, Inside, 4>(row, size, at), before = window<Turned, Inside, 4, 1>(row, size, at);
    const Bytes oldest = window<Turned, Inside, 4, 2>(row, size, at);
    of_pairs(t, own, before, out[1], out[3]);
    of_pairs(t, earlier(own, before), earlier(before, oldest), out[0], out[2]);
  }

 private:
  // Bytes of the columns that begin one column earlier.
  static inline Bytes earlier(Bytes own, Bytes before) {
    return either(both(left<2>(own), byte_set(0xFC)), both(right<6>(before), byte_set(3)));
  }
  static inline void of_pairs(const Tables& t, Bytes own, Bytes before, Bytes& first, Bytes& second) {
    const Bytes low = low_nibbles(own), high = high_nibbles(own), high_before = high_nibbles(before);
    first = t.level(low, high_before, low_nibbles(before));
    second = t.level(high, low, high_before);
  }
};

template <>
struct Trellis<1> {
  struct Tables : ThreeTables {
    explicit Tables(const int8_t* t)
        : ThreeTables(t, [](int k) { return k >> 3 | (k >> 1 & 2) | (k << 1 & 4) | (k << 3 & 8); }) {}
  };
  static constexpr int kBits = 1, kPlaces = 8, kBefore = 2, kTwiceBias = 256;
  template <bool Turned, bool Inside>  // is not turned here: in_columns does it
  static inline void decode(const Tables& t, const uint8_t* row, int64_t octets, int64_t chunk, Bytes (&out)[8]) {
    const int64_t at = chunk * kBytes;
    const Bytes own = bytes_of_row<Inside, 0>(row, octets, at), before = bytes_of_row<Inside, 1>(row, octets, at);
    const Bytes oldest = bytes_of_row<Inside, 2>(row, octets, at);
    Bytes ending[8], ending_before[8];  // four symbols, the last one that of a byte's column j
    endings(own, before, ending);
    endings(before, oldest, ending_before);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
      out[j] = t.level(ending[j], j < 4 ? ending_before[j + 4] : ending[j - 4], ending_before[j]);
  }

 private:
  template <int J>
  static inline Bytes ending_at(Bytes own, Bytes before) {
    if constexpr (J >= 3) {
      return low_nibbles(right<J - 3>(own));
    } else {
      constexpr uint8_t mask = 15 & 15 << (3 - J);
      return either(both(left<3 - J>(own), byte_set(mask)), both(right<5 + J>(before), byte_set(15 & ~mask)));
    }
  }
  static inline void endings(Bytes own, Bytes before, Bytes (&out)[8]) {
    out[0] = ending_at<0>(own, before);
    out[1] = ending_at<1>(own, before);
    out[2] = ending_at<2>(own, before);
    out[3] = ending_at<3>(own, before);
    out[4] = ending_at<4>(own, before);
    out[5] = ending_at<5>(own, before);
    out[6] = ending_at<6>(own, before);
    out[7] = ending_at<7>(own, before);
  }
};

// Vectors of turned bytes to vectors of kBytes consecutive columns.
inline void in_columns(Bytes (&)[1]) {}
inline void in_columns(Bytes (&v)[2]) {
  const Bytes even = v[0];
  v[0] = low_8(even, v[1]);
  v[1] = high_8(even, v[1]);
}
inline void in_columns(Bytes (&v)[4]) {
  const Bytes low01 = low_8(v[0], v[1]), high01 = high_8(v[0], v[1]);
  const Bytes low23 = low_8(v[2], v[3]), high23 = high_8(v[2], v[3]);
  v[0] = low_16(low01, low23);
  v[1] = high_16(low01, low23);
  v[2] = low_16(high01, high23);
  v[3] = high_16(high01, high23);
}
inline void in_columns(Bytes (&v)[8]) {  // through memory: eight columns a byte are two words
  Bytes fours[2][4] = {{v[0], v[1], v[2], v[3]}, {v[4], v[5], v[6], v[7]}};
  in_columns(fours[0]);
  in_columns(fours[1]);
  alignas(64) uint8_t columns[8 * kBytes];
  for (int i = 0; i < 4; ++i) {  // lane by lane 16 columns of two bytes, twice
    store_lanes_apart(columns + 32 * i, low_32(fours[0][i], fours[1][i]), 128);
    store_lanes_apart(columns + 32 * i + 16, high_32(fours[0][i], fours[1][i]), 128);
  }
  for (int o = 0; o < 8; ++o) v[o] = turn<1>(load_bytes(columns + o * kBytes));
}

}  // namespace resmoe
