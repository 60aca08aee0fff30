// The fused ResMoE layer for few tokens on a CPU: weights are read once, at memory speed, still compressed.
//
// Plain C ABI, no torch headers: resmoe_fused_moe() gets pointers (struct Layer, mirrored in cpp_cpu.py).
// Weights are bf16, fp16 or fp32; x, sums and activations are fp32. Truth: fused_moe_ref in reference.py.
//
// Index arrays: pair p = (token, local expert, router weight). Phases, a barrier between each two:
//   1  rows of center gate/up . x, once per token; rows of low-rank V gate/up . x, once per pair       (dot form)
//   2  for each row i, for each pair: gate, up = center + residual; a = act(gate) * up * weight;
//      mixed[token] += a; low rank: shrunk[pair] += a * U[i]; bitmap: out[token] += a * D_down[i]
//   3  out[token] += mixed[token][i] * center_down[i]; out[token] += shrunk[pair][r] * V_down[r]      (axpy form)
//   4  sum of the threads' outputs
// U is read once for gate, up and down together. Each thread owns its rows, so nothing is shared but sums per
// thread, and the result depends on the number of threads by rounding only.
//
// Bitmap rows: 64 columns at a time; a byte's first value is at base + the count of bits below it, all eight
// prefix counts of a word come from one multiplication. AVX2: byte -> table of shuffles. AVX-512 VBMI2: vpexpandw.
// An expert with one token multiplies while it decodes; with several, a row is decoded once for all of them.
//
// Rows of codes (residual or center): eight columns are `bits` bytes, their codes shifted apart into eight lanes. Padding
// makes every row whole octets, so a row is decoded to its last octet without reading beyond it.

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <vector>

namespace {

enum Dtype : int32_t { kFloat = 0, kBFloat16 = 1, kHalf = 2 };
enum Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

constexpr int kLanes = 8;
constexpr int kProjections = 3;  // gate, up, down

struct LowRank {            // one group's factors
  const void* u;            // [E, I, R], rows contiguous
  const void* v[kProjections];  // [E, R, H] each; null where the group does not cover it
  int64_t u_stride;         // elements from one expert to the next
  int64_t v_stride[kProjections];
  int64_t rank;
};

struct Bitmap {             // one group's pruned values
  const uint8_t* mask[kProjections];     // [E, I, mask_bytes]
  const int32_t* row_ptr[kProjections];  // [E, I]
  const void* values;       // [E, N] or packed
  const int64_t* starts;    // [E], or null: expert e starts at e * values_stride
  int64_t mask_stride[kProjections];     // bytes from one expert to the next
  int64_t row_ptr_stride[kProjections];  // elements
  int64_t starts_stride;    // elements
  int64_t values_stride;    // elements
  int64_t num_values;       // elements of the whole buffer: where reading must stop
};

struct Quantized {          // one part of codes and scales: residual, or center (strides 0)
  const uint8_t* codes[kProjections];    // [E, I, bits * ceil(H/8)]; null where the part does not cover it
  const uint16_t* scales[kProjections];  // bf16 [E, I, groups]
  int64_t codes_stride[kProjections];    // bytes from one expert to the next
  int64_t scales_stride[kProjections];   // elements
  int64_t bits;
  int64_t group;            // columns that share a scale, a multiple of 8; H or more: the whole row
};

struct Layer {
  int64_t hidden, intermediate, mask_bytes;
  const void* center[kProjections];  // [I, H], down transposed; null without
  const LowRank* low_rank;
  int64_t num_low_rank;
  const Bitmap* bitmap;
  int64_t num_bitmap;
  const Quantized* quantized;
  int64_t num_quantized;
  const Quantized* center_codes;
  int64_t num_center_codes;
  int32_t dtype, activation;
};

// ---- one vector of 8 weights as fp32 -------------------------------------------------------------------------

struct BF16 {
  using type = uint16_t;
  static inline __m256 widen(__m128i w) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(w), 16)); }
  static inline __m256 load(const type* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
  static inline float scalar(type w) {
    uint32_t bits = (uint32_t)w << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
};
struct FP16 {
  using type = uint16_t;
  static inline __m256 widen(__m128i w) { return _mm256_cvtph_ps(w); }
  static inline __m256 load(const type* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
  static inline float scalar(type w) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(w))); }
};
struct FP32 {
  using type = float;
  static inline __m256 load(const type* p) { return _mm256_loadu_ps(p); }
  static inline float scalar(type w) { return w; }
};

inline float sum(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// ---- dot and axpy over one row of weights --------------------------------------------------------------------

// All dots add in one order: two sums of eight lanes over 16 columns at a time, then the rest one by one. So a token's
// result does not depend on which tokens stand beside it (bitmaps: where H is a multiple of 64).
template <class T>
float dot(const typename T::type* row, const float* x, int64_t n) {
  __m256 acc[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  int64_t c = 0;
  for (; c + 2 * kLanes <= n; c += 2 * kLanes)
    for (int j = 0; j < 2; ++j)
      acc[j] = _mm256_fmadd_ps(T::load(row + c + j * kLanes), _mm256_loadu_ps(x + c + j * kLanes), acc[j]);
  float total = sum(_mm256_add_ps(acc[0], acc[1]));
  for (; c < n; ++c) total += T::scalar(row[c]) * x[c];
  return total;
}

// Four inputs against one row: the row is read and widened once.
template <class T>
void dot4(const typename T::type* row, const float* const* x, int64_t n, float* out) {
  __m256 acc[4][2];
  for (auto& a : acc) a[0] = a[1] = _mm256_setzero_ps();
  int64_t c = 0;
  for (; c + 2 * kLanes <= n; c += 2 * kLanes)
    for (int j = 0; j < 2; ++j) {
      const __m256 w = T::load(row + c + j * kLanes);
      for (int t = 0; t < 4; ++t) acc[t][j] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x[t] + c + j * kLanes), acc[t][j]);
    }
  for (int t = 0; t < 4; ++t) {
    out[t] = sum(_mm256_add_ps(acc[t][0], acc[t][1]));
    for (int64_t r = c; r < n; ++r) out[t] += T::scalar(row[r]) * x[t][r];
  }
}

// Any number of inputs against one row: visit(s, dot(row, input(s))) for s in [begin, end).
template <class T, class Input, class Visit>
inline void dots(const typename T::type* row, int64_t n, int64_t begin, int64_t end, Input input, Visit visit) {
  int64_t s = begin;
  for (; s + 4 <= end; s += 4) {
    const float* x[4] = {input(s), input(s + 1), input(s + 2), input(s + 3)};
    float out[4];
    dot4<T>(row, x, n, out);
    for (int t = 0; t < 4; ++t) visit(s + t, out[t]);
  }
  for (; s < end; ++s) visit(s, dot<T>(row, input(s), n));
}

// Two inputs against one row: joint U serves gate and up in one reading.
template <class T>
void dot2(const typename T::type* row, const float* x, const float* y, int64_t n, float* dx, float* dy) {
  __m256 ax[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, ay[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  int64_t c = 0;
  for (; c + 2 * kLanes <= n; c += 2 * kLanes)
    for (int j = 0; j < 2; ++j) {
      __m256 w = T::load(row + c + j * kLanes);
      ax[j] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + c + j * kLanes), ax[j]);
      ay[j] = _mm256_fmadd_ps(w, _mm256_loadu_ps(y + c + j * kLanes), ay[j]);
    }
  float sx = sum(_mm256_add_ps(ax[0], ax[1])), sy = sum(_mm256_add_ps(ay[0], ay[1]));
  for (; c < n; ++c) sx += T::scalar(row[c]) * x[c], sy += T::scalar(row[c]) * y[c];
  *dx = sx, *dy = sy;
}

template <class T>
void axpy(float a, const typename T::type* row, float* y, int64_t n) {
  const __m256 va = _mm256_set1_ps(a);
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes)
    _mm256_storeu_ps(y + c, _mm256_fmadd_ps(va, T::load(row + c), _mm256_loadu_ps(y + c)));
  for (; c < n; ++c) y[c] += a * T::scalar(row[c]);
}

// Four rows at once: a quarter of the traffic on y.
template <class T>
void axpy4(const float* a, const typename T::type* row, int64_t stride, float* y, int64_t n) {
  const __m256 a0 = _mm256_set1_ps(a[0]), a1 = _mm256_set1_ps(a[1]), a2 = _mm256_set1_ps(a[2]), a3 = _mm256_set1_ps(a[3]);
  const typename T::type *r1 = row + stride, *r2 = r1 + stride, *r3 = r2 + stride;
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    __m256 s = _mm256_fmadd_ps(a0, T::load(row + c), _mm256_loadu_ps(y + c));
    s = _mm256_fmadd_ps(a1, T::load(r1 + c), s);
    s = _mm256_fmadd_ps(a2, T::load(r2 + c), s);
    _mm256_storeu_ps(y + c, _mm256_fmadd_ps(a3, T::load(r3 + c), s));
  }
  for (; c < n; ++c)
    y[c] += a[0] * T::scalar(row[c]) + a[1] * T::scalar(r1[c]) + a[2] * T::scalar(r2[c]) + a[3] * T::scalar(r3[c]);
}

// ---- bitmap rows ---------------------------------------------------------------------------------------------

// mask byte -> shuffle controls that spread packed 16-bit values to their lanes
struct ShuffleTable {
  alignas(32) uint8_t wide[256][32];    // to the upper half of 32-bit lanes: bf16 becomes fp32 by that alone
  alignas(16) uint8_t narrow[256][16];  // to 16-bit lanes
  ShuffleTable() {
    for (int m = 0; m < 256; ++m)
      for (int lane = 0, next = 0; lane < kLanes; ++lane) {
        const bool kept = m >> lane & 1;
        const uint8_t low = kept ? 2 * next : 0x80, high = kept ? 2 * next + 1 : 0x80;
        wide[m][4 * lane] = wide[m][4 * lane + 1] = 0x80;
        wide[m][4 * lane + 2] = narrow[m][2 * lane] = low;
        wide[m][4 * lane + 3] = narrow[m][2 * lane + 1] = high;
        next += kept;
      }
  }
};
const ShuffleTable kShuffle;

// Byte j of the result: set bits in bytes 0..j of word.
inline uint64_t prefix_counts(uint64_t word) {
  uint64_t x = word - (word >> 1 & 0x5555555555555555u);
  x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
  x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return x * 0x0101010101010101u;
}

// Eight columns from packed values; reads 16 (fp32: up to 32) bytes from `values`.
template <class T>
inline __m256 expand8(const typename T::type* values, uint8_t mask);
template <>
inline __m256 expand8<BF16>(const uint16_t* values, uint8_t mask) {
  const __m256i packed = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)values));
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(packed, _mm256_load_si256((const __m256i*)kShuffle.wide[mask])));
}
template <>
inline __m256 expand8<FP16>(const uint16_t* values, uint8_t mask) {
  return FP16::widen(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)values), _mm_load_si128((const __m128i*)kShuffle.narrow[mask])));
}
template <>
inline __m256 expand8<FP32>(const float* values, uint8_t mask) {
  alignas(32) float lanes[kLanes] = {};
  for (int lane = 0; lane < kLanes; ++lane)
    if (mask >> lane & 1) lanes[lane] = *values++;
  return _mm256_load_ps(lanes);
}

// Visit one row: vectors(column, __m256, j) for eight columns at a time, then scalars(column, float) for the rest.
// `readable`: elements that may be read from `values` on; vectors never reach beyond.
template <class T, class Vectors, class Scalars>
inline void visit_row(const uint8_t* mask, const typename T::type* values, int64_t readable, int64_t n, Vectors vectors, Scalars scalars) {
  int64_t c = 0;
  for (; c + 64 <= n && readable >= 72; c += 64, mask += 8) {
    uint64_t word;
    memcpy(&word, mask, 8);
    const uint64_t counts = prefix_counts(word);
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    if constexpr (sizeof(typename T::type) == 2) {
      for (int half = 0; half < 2; ++half) {
        const uint16_t* from = (const uint16_t*)values + (half ? (uint8_t)(counts >> 24) : 0);
        alignas(64) uint16_t lanes[32];
        _mm512_store_si512(lanes, _mm512_maskz_expand_epi16((__mmask32)(word >> 32 * half), _mm512_loadu_si512(from)));
        for (int j = 0; j < 4; ++j) vectors(c + 32 * half + kLanes * j, T::load(lanes + kLanes * j), j);
      }
    } else
#endif
    {
      alignas(8) uint8_t below[8];  // bytes through memory: one load each, where shifting takes two steps
      const uint64_t shifted = counts << 8;
      memcpy(below, &shifted, 8);
      for (int j = 0; j < 8; ++j) vectors(c + kLanes * j, expand8<T>(values + below[j], mask[j]), j);
    }
    values += counts >> 56, readable -= counts >> 56;
  }
  for (; c < n; ++c) {
    scalars(c, mask[0] >> (c & 7) & 1 ? T::scalar(*values++) : 0.0f);
    if ((c & 7) == 7) ++mask;
  }
}

template <class T>
void decode_row(const uint8_t* mask, const typename T::type* values, int64_t readable, int64_t n, float* out) {
  visit_row<T>(mask, values, readable, n, [&](int64_t c, __m256 w, int) { _mm256_storeu_ps(out + c, w); },
               [&](int64_t c, float w) { out[c] = w; });
}

template <class T>
float dot_row(const uint8_t* mask, const typename T::type* values, int64_t readable, int64_t n, const float* x) {
  __m256 acc[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  float rest = 0;
  visit_row<T>(mask, values, readable, n,
               [&](int64_t c, __m256 w, int j) { acc[j & 1] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + c), acc[j & 1]); },
               [&](int64_t c, float w) { rest += w * x[c]; });
  return rest + sum(_mm256_add_ps(acc[0], acc[1]));
}

template <class T>
void axpy_row(float a, const uint8_t* mask, const typename T::type* values, int64_t readable, int64_t n, float* y) {
  const __m256 va = _mm256_set1_ps(a);
  visit_row<T>(mask, values, readable, n,
               [&](int64_t c, __m256 w, int) { _mm256_storeu_ps(y + c, _mm256_fmadd_ps(va, w, _mm256_loadu_ps(y + c))); },
               [&](int64_t c, float w) { y[c] += a * w; });
}

// ---- rows of codes -------------------------------------------------------------------------------------------

template <int Bits>
inline __m256i codes8(const uint8_t* row, int64_t octet, int64_t octets) {
  if constexpr (Bits == 8) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(row + 8 * octet)));
  } else if constexpr (Bits == 4) {
    uint32_t word;
    memcpy(&word, row + 4 * octet, 4);
    const __m256i apart = _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    return _mm256_and_si256(apart, _mm256_set1_epi32(15));
  } else {  // two bits, and for three a plane of high bits behind them
    uint16_t word;
    memcpy(&word, row + 2 * octet, 2);
    const __m256i apart = _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    const __m256i low = _mm256_and_si256(apart, _mm256_set1_epi32(3));
    if constexpr (Bits == 2) return low;
    const __m256i high = _mm256_sllv_epi32(_mm256_set1_epi32(row[2 * octets + octet]), _mm256_setr_epi32(2, 1, 0, 0, 0, 0, 0, 0));
    const __m256i right = _mm256_srlv_epi32(high, _mm256_setr_epi32(0, 0, 0, 1, 2, 3, 4, 5));
    return _mm256_or_si256(low, _mm256_and_si256(right, _mm256_set1_epi32(4)));
  }
}

// Visit the octets of a row of n columns in pairs: vectors(octet, (code - half) * scale, j).
template <int Bits, class Vectors>
inline void visit_codes(const uint8_t* row, const uint16_t* scales, int64_t group, int64_t n, Vectors vectors) {
  const int64_t octets = (n + kLanes - 1) / kLanes;
  for (int64_t o = 0; o < octets; ) {
    const __m256 s = _mm256_set1_ps(BF16::scalar(*scales++)), half = _mm256_set1_ps(0.5f * ((1 << Bits) - 1));
    const int64_t stop = std::min(octets, o + group / kLanes);
    const auto octet = [&](int64_t at) {
      return _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(codes8<Bits>(row, at, octets)), half), s);
    };
    for (; o + 2 <= stop; o += 2) vectors(o, octet(o), 0), vectors(o + 1, octet(o + 1), 1);
    if (o < stop) vectors(o, octet(o), 0), ++o;
  }
}

template <class Vectors>
inline void visit_codes(const Quantized& part, int p, int64_t e, int64_t i, int64_t n, Vectors vectors) {
  const uint8_t* row = part.codes[p] + e * part.codes_stride[p] + i * part.bits * ((n + kLanes - 1) / kLanes);
  const int64_t group = std::min(part.group, (n + kLanes - 1) / kLanes * kLanes);
  const uint16_t* scales = part.scales[p] + e * part.scales_stride[p] + i * ((n + group - 1) / group);
  switch (part.bits) {
    case 2: return visit_codes<2>(row, scales, group, n, vectors);
    case 3: return visit_codes<3>(row, scales, group, n, vectors);
    case 4: return visit_codes<4>(row, scales, group, n, vectors);
    default: return visit_codes<8>(row, scales, group, n, vectors);
  }
}

// Writes whole octets.
void decode_codes(const Quantized& part, int p, int64_t e, int64_t i, int64_t n, float* out) {
  visit_codes(part, p, e, i, n, [&](int64_t o, __m256 w, int) { _mm256_storeu_ps(out + o * kLanes, w); });
}

// Multiply while decoding, in dot()'s order of adding; n a multiple of 16.
float dot_codes(const Quantized& part, int p, int64_t e, int64_t i, int64_t n, const float* x) {
  __m256 acc[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  visit_codes(part, p, e, i, n, [&](int64_t o, __m256 w, int j) {
    acc[j] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + o * kLanes), acc[j]);
  });
  return sum(_mm256_add_ps(acc[0], acc[1]));
}

// n a multiple of 8.
void axpy_codes(float a, const Quantized& part, int p, int64_t e, int64_t i, int64_t n, float* y) {
  const __m256 va = _mm256_set1_ps(a);
  visit_codes(part, p, e, i, n, [&](int64_t o, __m256 w, int) {
    _mm256_storeu_ps(y + o * kLanes, _mm256_fmadd_ps(va, w, _mm256_loadu_ps(y + o * kLanes)));
  });
}

// ---- activation ----------------------------------------------------------------------------------------------

inline float activate(int32_t kind, float g) {
  if (kind == kSilu) return g / (1.0f + expf(-g));
  if (kind == kGelu) return 0.5f * g * (1.0f + erff(g * 0.70710678118654752f));
  return 0.5f * g * (1.0f + tanhf(0.79788456080286536f * (g + 0.044715f * g * g * g)));
}

// ---- the layer -----------------------------------------------------------------------------------------------

struct Span {
  int64_t begin, end;
};
inline Span share(int64_t n, int64_t grain, int thread, int threads) {
  int64_t blocks = (n + grain - 1) / grain;
  return {std::min(n, blocks * thread / threads * grain), std::min(n, blocks * (thread + 1) / threads * grain)};
}

template <class T>
struct Run {
  using W = typename T::type;
  const Layer& layer;
  const float* x;           // [T, H]
  int64_t tokens, pairs;
  const int32_t* token;     // [P], pairs of one expert stand together
  const int32_t* expert;    // [P]
  const float* weight;      // [P]
  float* out;               // [T, H]
  std::vector<float> common[2], mixed;            // [T, I] center's gate, up; weighted sums
  std::vector<std::vector<float>> z[2];           // per low-rank group: [P, R], V gate . x and V up . x
  std::vector<std::vector<float>> shrunk;         // per group: [threads, P, R], U^T a
  std::vector<float> partial;                     // [threads, T, H]

  bool covers(int64_t group, int projection) const { return layer.low_rank[group].v[projection] != nullptr; }

  void run(int threads) {
    const int64_t I = layer.intermediate, H = layer.hidden;
    for (auto& c : common) c.assign(tokens * I, 0.0f);
    mixed.assign(tokens * I, 0.0f);
    for (auto& part : z) part.resize(layer.num_low_rank);
    shrunk.resize(layer.num_low_rank);
    for (int64_t g = 0; g < layer.num_low_rank; ++g) {
      for (auto& part : z) part[g].assign(pairs * layer.low_rank[g].rank, 0.0f);
      shrunk[g].assign(threads * pairs * layer.low_rank[g].rank, 0.0f);
    }
    partial.assign(threads * tokens * H, 0.0f);
#pragma omp parallel num_threads(threads)
    {
      const int me = omp_get_thread_num();
      into(me, threads);
#pragma omp barrier
      across(me, threads);
#pragma omp barrier
      down(me, threads);
#pragma omp barrier
      const Span s = share(tokens * H, 64, me, threads);
      for (int64_t c = s.begin; c < s.end; ++c) {
        float total = 0;
        for (int t = 0; t < threads; ++t) total += partial[t * tokens * H + c];
        out[c] = total;
      }
    }
  }

  void into(int me, int threads) {  // phase 1
    const int64_t I = layer.intermediate, H = layer.hidden;
    const Span rows = share(I, 1, me, threads);
    for (int p = 0; p < 2; ++p)
      if (layer.center[p])
        for (int64_t i = rows.begin; i < rows.end; ++i)
          dots<T>((const W*)layer.center[p] + i * H, H, 0, tokens, [&](int64_t t) { return x + t * H; },
                  [&](int64_t t, float d) { common[p][t * I + i] = d; });
    std::vector<float> row(H + kLanes);
    for (int64_t g = 0; g < layer.num_center_codes; ++g)
      for (int p = 0; p < 2; ++p)
        if (layer.center_codes[g].codes[p])
          for (int64_t i = rows.begin; i < rows.end; ++i) {
            decode_codes(layer.center_codes[g], p, 0, i, H, row.data());
            dots<FP32>(row.data(), H, 0, tokens, [&](int64_t t) { return x + t * H; },
                       [&](int64_t t, float d) { common[p][t * I + i] = d; });
          }
    for (int64_t g = 0; g < layer.num_low_rank; ++g) {
      const LowRank& part = layer.low_rank[g];
      const Span ranks = share(part.rank, 1, me, threads);
      for (int p = 0; p < 2; ++p)
        if (covers(g, p))
          for (int64_t q = 0; q < pairs; ) {
            int64_t next = same_expert(q);
            const W* v = (const W*)part.v[p] + expert[q] * part.v_stride[p];
            for (int64_t r = ranks.begin; r < ranks.end; ++r)
              dots<T>(v + r * H, H, q, next, [&](int64_t s) { return x + token[s] * H; },
                      [&](int64_t s, float d) { z[p][g][s * part.rank + r] = d; });
            q = next;
          }
    }
  }

  void across(int me, int threads) {  // phase 2
    const int64_t I = layer.intermediate, H = layer.hidden;
    const Span rows = share(I, 1, me, threads);
    std::vector<float> row(H + kLanes), gate(pairs), up(pairs);
    float* mine = partial.data() + me * tokens * H;
    for (int64_t q = 0; q < pairs; ) {
      const int64_t next = same_expert(q), e = expert[q];
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        for (int64_t s = q; s < next; ++s) gate[s] = common[0][token[s] * I + i], up[s] = common[1][token[s] * I + i];
        for (int64_t g = 0; g < layer.num_low_rank; ++g) add_low_rank(g, e, i, q, next, gate.data(), up.data());
        for (int64_t g = 0; g < layer.num_bitmap; ++g)
          for (int p = 0; p < 2; ++p)
            if (layer.bitmap[g].mask[p]) {
              const Row at = locate(layer.bitmap[g], p, e, i);
              float* into = p ? up.data() : gate.data();
              if (next == q + 1 && at.whole(H)) {
                into[q] += dot_row<T>(at.mask, at.values, at.readable, H, x + token[q] * H);
                continue;
              }
              decode_row<T>(at.mask, at.values, at.readable, H, row.data());
              dots<FP32>(row.data(), H, q, next, [&](int64_t s) { return x + token[s] * H; },
                         [&](int64_t s, float d) { into[s] += d; });
            }
        for (int64_t g = 0; g < layer.num_quantized; ++g)
          for (int p = 0; p < 2; ++p)
            if (layer.quantized[g].codes[p]) {
              float* into = p ? up.data() : gate.data();
              if (next == q + 1 && H % 16 == 0) {
                into[q] += dot_codes(layer.quantized[g], p, e, i, H, x + token[q] * H);
                continue;
              }
              decode_codes(layer.quantized[g], p, e, i, H, row.data());
              dots<FP32>(row.data(), H, q, next, [&](int64_t s) { return x + token[s] * H; },
                         [&](int64_t s, float d) { into[s] += d; });
            }
        for (int64_t s = q; s < next; ++s) {
          gate[s] = activate(layer.activation, gate[s]) * up[s] * weight[s];  // a, the router weight in it
          mixed[token[s] * I + i] += gate[s];
        }
        for (int64_t g = 0; g < layer.num_low_rank; ++g)
          if (covers(g, 2)) {
            const LowRank& part = layer.low_rank[g];
            const W* u = (const W*)part.u + e * part.u_stride + i * part.rank;
            float* sums = shrunk[g].data() + me * pairs * part.rank;
            for (int64_t s = q; s < next; ++s) axpy<T>(gate[s], u, sums + s * part.rank, part.rank);
          }
        for (int64_t g = 0; g < layer.num_bitmap; ++g)
          if (layer.bitmap[g].mask[2]) {
            const Row at = locate(layer.bitmap[g], 2, e, i);
            if (next == q + 1 && at.whole(H)) {
              axpy_row<T>(gate[q], at.mask, at.values, at.readable, H, mine + token[q] * H);
              continue;
            }
            decode_row<T>(at.mask, at.values, at.readable, H, row.data());
            for (int64_t s = q; s < next; ++s) axpy<FP32>(gate[s], row.data(), mine + token[s] * H, H);
          }
        for (int64_t g = 0; g < layer.num_quantized; ++g)
          if (layer.quantized[g].codes[2]) {
            if (next == q + 1 && H % kLanes == 0) {
              axpy_codes(gate[q], layer.quantized[g], 2, e, i, H, mine + token[q] * H);
              continue;
            }
            decode_codes(layer.quantized[g], 2, e, i, H, row.data());
            for (int64_t s = q; s < next; ++s) axpy<FP32>(gate[s], row.data(), mine + token[s] * H, H);
          }
      }
      q = next;
    }
  }

  void down(int me, int threads) {  // phase 3
    const int64_t I = layer.intermediate, H = layer.hidden;
    float* mine = partial.data() + me * tokens * H;
    if (layer.center[2]) {
      const Span rows = share(I, 4, me, threads);
      for (int64_t i = rows.begin; i < rows.end; i += 4)
        for (int64_t t = 0; t < tokens; ++t)
          axpy_block((const W*)layer.center[2] + i * H, mixed.data() + t * I + i, std::min<int64_t>(4, rows.end - i), mine + t * H);
    }
    std::vector<float> row(H + kLanes);
    for (int64_t g = 0; g < layer.num_center_codes; ++g) {
      if (!layer.center_codes[g].codes[2]) continue;
      const Span rows = share(I, 1, me, threads);
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        decode_codes(layer.center_codes[g], 2, 0, i, H, row.data());
        for (int64_t t = 0; t < tokens; ++t) axpy<FP32>(mixed[t * I + i], row.data(), mine + t * H, H);
      }
    }
    for (int64_t g = 0; g < layer.num_low_rank; ++g) {
      if (!covers(g, 2)) continue;
      const LowRank& part = layer.low_rank[g];
      const Span ranks = share(part.rank, 4, me, threads);
      for (int64_t q = 0; q < pairs; ) {
        const int64_t next = same_expert(q);
        const W* v = (const W*)part.v[2] + expert[q] * part.v_stride[2];
        for (int64_t r = ranks.begin; r < ranks.end; r += 4)
          for (int64_t s = q; s < next; ++s) {
            const int64_t n = std::min<int64_t>(4, ranks.end - r);
            float a[4] = {};
            for (int t = 0; t < threads; ++t)
              for (int64_t j = 0; j < n; ++j) a[j] += shrunk[g][(t * pairs + s) * part.rank + r + j];
            axpy_block(v + r * H, a, n, mine + token[s] * H);
          }
        q = next;
      }
    }
  }

  void axpy_block(const W* rows, const float* a, int64_t n, float* y) const {
    const int64_t H = layer.hidden;
    if (n == 4) return axpy4<T>(a, rows, H, y, H);
    for (int64_t j = 0; j < n; ++j) axpy<T>(a[j], rows + j * H, y, H);
  }

  void add_low_rank(int64_t g, int64_t e, int64_t i, int64_t q, int64_t next, float* gate, float* up) const {
    const LowRank& part = layer.low_rank[g];
    const int64_t R = part.rank;
    const W* u = (const W*)part.u + e * part.u_stride + i * R;
    if (next == q + 1 && covers(g, 0) && covers(g, 1)) {
      float dg, du;
      dot2<T>(u, z[0][g].data() + q * R, z[1][g].data() + q * R, R, &dg, &du);
      gate[q] += dg, up[q] += du;
      return;
    }
    for (int p = 0; p < 2; ++p)
      if (covers(g, p)) {
        float* into = p ? up : gate;
        dots<T>(u, R, q, next, [&](int64_t s) { return z[p][g].data() + s * R; }, [&](int64_t s, float d) { into[s] += d; });
      }
  }

  struct Row {
    const uint8_t* mask;
    const W* values;
    int64_t readable;
    bool whole(int64_t n) const { return readable >= n + 72; }  // vectors all along: not at the buffer's very end
  };
  Row locate(const Bitmap& part, int p, int64_t e, int64_t i) const {
    const int64_t expert_start = part.starts ? part.starts[e * part.starts_stride] : e * part.values_stride;
    const int64_t start = expert_start + part.row_ptr[p][e * part.row_ptr_stride[p] + i];
    return {part.mask[p] + e * part.mask_stride[p] + i * layer.mask_bytes, (const W*)part.values + start, part.num_values - start};
  }

  int64_t same_expert(int64_t q) const {
    int64_t next = q + 1;
    while (next < pairs && expert[next] == expert[q]) ++next;
    return next;
  }
};

template <class T>
void run(const Layer& layer, const float* x, int64_t tokens, const int32_t* token, const int32_t* expert,
         const float* weight, int64_t pairs, float* out, int threads) {
  Run<T> work{layer, x, tokens, pairs, token, expert, weight, out, {}, {}, {}, {}, {}};
  work.run(threads);
}

}  // namespace

extern "C" {

// x, out: fp32 [T, H]; pairs sorted by expert. Returns 0, or 1 for an unknown dtype.
int resmoe_fused_moe(const Layer* layer, const float* x, int64_t tokens, const int32_t* token, const int32_t* expert,
                     const float* weight, int64_t pairs, float* out, int threads) {
  switch (layer->dtype) {
    case kFloat: run<FP32>(*layer, x, tokens, token, expert, weight, pairs, out, threads); return 0;
    case kBFloat16: run<BF16>(*layer, x, tokens, token, expert, weight, pairs, out, threads); return 0;
    case kHalf: run<FP16>(*layer, x, tokens, token, expert, weight, pairs, out, threads); return 0;
  }
  return 1;
}

// Decode one bitmap row: for the self-test that runs when the library is loaded.
int resmoe_decode_row(int32_t dtype, const uint8_t* mask, const void* values, int64_t readable, int64_t n, float* out) {
  switch (dtype) {
    case kFloat: decode_row<FP32>(mask, (const float*)values, readable, n, out); return 0;
    case kBFloat16: decode_row<BF16>(mask, (const uint16_t*)values, readable, n, out); return 0;
    case kHalf: decode_row<FP16>(mask, (const uint16_t*)values, readable, n, out); return 0;
  }
  return 1;
}

// Decode row i of one matrix of codes: for the self-test.
void resmoe_decode_codes(const Quantized* part, int64_t i, int64_t n, float* out) { decode_codes(*part, 0, 0, i, n, out); }

int64_t resmoe_struct_bytes() { return sizeof(LowRank) + sizeof(Bitmap) + sizeof(Quantized) + sizeof(Layer); }
}
