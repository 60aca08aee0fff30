// Dtypes of weights: as vectors of the path's width, as octets, and one by one.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "path.h"

namespace resmoe {

constexpr int kLanes = 8;  // of an octet

// What a path has no use for.
template <class... T>
inline void unused(const T&...) {}

__attribute__((always_inline)) inline void fetch(const void* from) { __builtin_prefetch(from); }
// `Bytes` of them, in lines.
template <int Bytes>
__attribute__((always_inline)) inline void fetch_lines(const uint8_t* from) {
#pragma GCC unroll 8
  for (int line = 0; line < Bytes; line += 64) fetch(from + line);
}

inline int64_t octets_of(int64_t columns) { return (columns + kLanes - 1) / kLanes; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// load(p, count): the first `count` lanes, at most all, and zeros; nothing beyond them is read.
struct BF16 {
  using type = uint16_t;
  static inline Floats load(const type* p) { return load_bf16(p); }
  static inline Floats load(const type* p, int64_t count) { return load_bf16(p, count); }
  static inline float scalar(type w) {
    uint32_t bits = (uint32_t)w << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
  static inline type nearest(float x) {  // ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
};
struct FP16 {
  using type = uint16_t;
  static inline Floats load(const type* p) { return load_fp16(p); }
  static inline Floats load(const type* p, int64_t count) { return load_fp16(p, count); }
  static inline float scalar(type w) { return half_to_float(w); }
};
struct FP32 {
  using type = float;
  static inline Floats load(const type* p) { return load_floats(p); }
  static inline Floats load(const type* p, int64_t count) { return load_floats(p, count); }
  static inline float scalar(type w) { return w; }
};

// The bits that any of n numbers has.
inline uint32_t bits_of(const float* x, int64_t n) {
  uint32_t all = 0;
  for (int64_t c = 0; c < n; ++c) {
    uint32_t bits;
    memcpy(&bits, x + c, 4);
    all |= bits;
  }
  return all;
}

// y[0..] += scale * v, the first `columns` of them.
inline void add_scaled(float* y, Floats scale, Floats v, int64_t columns) {
  if (columns >= kWide) return store_floats(y, fma(scale, v, load_floats(y)));
  store_floats(y, fma(scale, v, load_floats(y, columns)), columns);
}

// Memory for vectors, kept from use to use.
class Buffer {
 public:
  uint8_t* take(int64_t bytes) {
    if ((int64_t)bytes_.size() < bytes + 64) bytes_.resize(bytes + 64);
    return data();
  }
  uint8_t* data() const { return (uint8_t*)(((uintptr_t)bytes_.data() + 63) & ~(uintptr_t)63); }

 private:
  std::vector<uint8_t> bytes_;
};

// What rows are multiplied with. Several inputs may go to one sum: limbs of one number.
template <class Input>
struct Operands {
  static constexpr int64_t kMost = 3 * 96;  // limbs of the inputs of gate and up
  Input at[kMost];
  int32_t sum[kMost];
  int64_t count = 0;
  void clear() { count = 0; }
  void push(const Input& from, int64_t to) {
    at[count] = from;
    sum[count++] = (int32_t)to;
  }
};

}  // namespace resmoe
