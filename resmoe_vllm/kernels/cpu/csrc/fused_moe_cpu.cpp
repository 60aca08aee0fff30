// The fused ResMoE layer on a CPU: weights are read once for each block of tokens, still compressed.
//
// Plain C ABI, no torch headers: resmoe_fused_moe() gets pointers (struct Layer, mirrored in native.py).
// Weights are bf16, fp16, fp32 or codes; sums and activations are fp32. Truth: fused_moe_ref in reference.py.
//
// A pair is (token, local expert, router weight); pairs of one expert stand together. Phases, a barrier after each:
//   1  rows of center gate/up . x, once per token; rows of low-rank V gate/up . x, once per pair          (dots)
//   2  for each block of rows, for each expert: gate, up = center + residual; a = act(gate) * up * weight;
//      mixed[token] += a; low rank: shrunk[pair] += a * U; others: out[token] += a * D_down
//   3  out[token] += mixed[token] * center_down; out[token] += shrunk[pair] * V_down                      (axpys)
//   4  sum of the threads' outputs
// U is read once for gate, up and down. Each thread owns its rows, so nothing is shared but sums per
// thread, and the result depends on the number of threads by rounding only.
//
// Products (products.h) read rows in the layer's dtype where they lie. Rows of codes (rows.h) are multiplied while they
// are decoded, rows of bitmaps for few tokens too; for many these are decoded four at a time for all tokens of an expert.

#include <math.h>
#include <omp.h>
#include <stddef.h>

#include <string>
#include <vector>

#include "products.h"
#include "rows.h"

namespace resmoe {

enum Dtype : int32_t { kFloat = 0, kBFloat16 = 1, kHalf = 2 };
enum Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

constexpr int kProjections = 3;  // gate, up, down
constexpr int64_t kSums = 2 * kInputs;

struct LowRank {            // one part's factors
  Matrix u;                 // [E, I, R]
  Matrix v[kProjections];   // [E, R, H]
  int64_t rank;
};

struct Quantized {          // one part of codes
  Matrix rows[kProjections];  // [E, I, H]
};

struct Layer {
  int64_t hidden, intermediate, experts, mask_bytes;
  Matrix center[kProjections];  // [I, H], down transposed
  const LowRank* low_rank;
  int64_t num_low_rank;
  const Bitmap* bitmap;
  int64_t num_bitmap;
  const Quantized* quantized;
  int64_t num_quantized;
  int32_t dtype, activation;
};

inline float activate(int32_t kind, float g) {
  if (kind == kSilu) return g / (1.0f + expf(-g));
  if (kind == kGelu) return 0.5f * g * (1.0f + erff(g * 0.70710678118654752f));
  return 0.5f * g * (1.0f + tanhf(0.79788456080286536f * (g + 0.044715f * g * g * g)));
}

inline float load(const uint16_t* from, int32_t dtype, int64_t i) {
  return dtype == kHalf ? FP16::scalar(from[i]) : BF16::scalar(from[i]);
}

// Rounded to nearest, ties to even.
inline void store(void* into, int32_t dtype, int64_t i, float value) {
  if (dtype == kFloat) {
    ((float*)into)[i] = value;
  } else if (dtype == kHalf) {
    ((uint16_t*)into)[i] = _mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT), 0);
  } else {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    ((uint16_t*)into)[i] = value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
}

// One line for a field of a struct that crosses the ABI.
#define FIELD(Struct, field) \
  (std::string(#Struct "." #field " ") + std::to_string(offsetof(Struct, field)) + " " + std::to_string(sizeof(Struct::field)) + "\n")

inline std::string struct_fields() {
  return FIELD(Matrix, data) + FIELD(Matrix, scales) + FIELD(Matrix, stride) + FIELD(Matrix, scales_stride) + FIELD(Matrix, bits) + FIELD(Matrix, group) +
         FIELD(Bitmap, mask) + FIELD(Bitmap, row_ptr) + FIELD(Bitmap, values) + FIELD(Bitmap, scales) + FIELD(Bitmap, starts) +
         FIELD(Bitmap, mask_stride) + FIELD(Bitmap, row_ptr_stride) + FIELD(Bitmap, values_stride) + FIELD(Bitmap, scales_stride) +
         FIELD(Bitmap, starts_stride) + FIELD(Bitmap, readable) + FIELD(Bitmap, values_per_row) + FIELD(Bitmap, bits) + FIELD(Bitmap, group) +
         FIELD(LowRank, u) + FIELD(LowRank, v) + FIELD(LowRank, rank) + FIELD(Quantized, rows) +
         FIELD(Layer, hidden) + FIELD(Layer, intermediate) + FIELD(Layer, experts) + FIELD(Layer, mask_bytes) + FIELD(Layer, center) +
         FIELD(Layer, low_rank) + FIELD(Layer, num_low_rank) + FIELD(Layer, bitmap) + FIELD(Layer, num_bitmap) +
         FIELD(Layer, quantized) + FIELD(Layer, num_quantized) + FIELD(Layer, dtype) + FIELD(Layer, activation);
}
#undef FIELD

struct Span {
  int64_t begin, end;
};
inline Span share(int64_t n, int64_t grain, int thread, int threads) {
  const int64_t blocks = (n + grain - 1) / grain;
  return {std::min(n, blocks * thread / threads * grain), std::min(n, blocks * (thread + 1) / threads * grain)};
}

struct Routing {
  std::vector<int32_t> token;    // [P]
  std::vector<float> weight;     // [P]
  std::vector<int64_t> begin;    // [E + 1] first pair of each expert

  // ids: global experts, negative ones are skipped; map: global -> local, negative where not here, or null.
  Routing(const int32_t* ids, const float* weights, int64_t tokens, int64_t top_k, const int32_t* map, int64_t experts)
      : begin(experts + 1) {
    const auto local = [&](int64_t k) { return ids[k] < 0 ? -1 : map ? map[ids[k]] : ids[k]; };
    for (int64_t k = 0; k < tokens * top_k; ++k)
      if (local(k) >= 0) ++begin[local(k) + 1];
    for (int64_t e = 0; e < experts; ++e) begin[e + 1] += begin[e];
    token.resize(begin[experts]), weight.resize(begin[experts]);
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t k = 0; k < tokens * top_k; ++k)
      if (const int32_t e = local(k); e >= 0) token[next[e]] = k / top_k, weight[next[e]++] = weights[k];
  }
  int64_t pairs() const { return (int64_t)token.size(); }
};

template <class T>
struct Run {
  using W = typename T::type;
  const Layer& layer;
  const float* x;           // [T, H]
  int64_t tokens;
  const Routing& routing;
  void* out;                // [T, H]
  int32_t out_dtype;
  std::vector<float> common[2], mixed;            // [T, I] center's gate, up; weighted sums
  std::vector<std::vector<float>> z[2];           // per low-rank part: [P, R], V gate . x and V up . x
  std::vector<std::vector<float>> shrunk;         // per part: [threads, P, R], U^T a
  std::vector<float> partial;                     // [threads, T, H]

  // One thread's buffers.
  struct Scratch {
    std::vector<float> rows;       // four decoded rows
    std::vector<float> sums;       // [kRows, kSums]: of gate, then of up
    std::vector<float> hidden;     // [kInputs, kRows]
    std::vector<float> shifts;     // [kSums, groups, 8], of codes
    const float* in[kSums];
    float* into[kInputs];
    int64_t ld;
    explicit Scratch(int64_t columns) : ld(columns + 2 * kLanes) {
      rows.resize(4 * ld), sums.resize(kRows * kSums), hidden.resize(kInputs * kRows);
    }
  };

  void run(int most_threads) {
    const int64_t I = layer.intermediate, H = layer.hidden;
    int64_t columns = H;
    for (auto& c : common) c.assign(tokens * I, 0.0f);
    mixed.assign(tokens * I, 0.0f);
    for (auto& part : z) part.resize(layer.num_low_rank);
    shrunk.resize(layer.num_low_rank);
    for (int64_t g = 0; g < layer.num_low_rank; ++g) {
      const int64_t rank = layer.low_rank[g].rank;
      columns = std::max(columns, rank);
      for (auto& part : z) part[g].assign(routing.pairs() * rank, 0.0f);
      shrunk[g].assign(most_threads * routing.pairs() * rank, 0.0f);
    }
    partial.assign(most_threads * tokens * H, 0.0f);
#pragma omp parallel num_threads(most_threads)
    {
      const int me = omp_get_thread_num(), threads = omp_get_num_threads();
      Scratch scratch(columns);
      into(me, threads, scratch);
#pragma omp barrier
      across(me, threads, scratch);
#pragma omp barrier
      down(me, threads, scratch);
#pragma omp barrier
      const Span s = share(tokens * H, 64, me, threads);
      for (int64_t c = s.begin; c < s.end; ++c) {
        float total = 0;
        for (int t = 0; t < threads; ++t) total += partial[t * tokens * H + c];
        store(out, out_dtype, c, total);
      }
    }
  }

  // visit(first pair, pairs) for blocks of each expert's pairs.
  template <class Visit>
  void for_pairs(Visit visit) const {
    for (int64_t e = 0; e < layer.experts; ++e)
      for (int64_t q = routing.begin[e]; q < routing.begin[e + 1]; q += kInputs)
        visit(e, q, std::min(kInputs, routing.begin[e + 1] - q));
  }

  const W* stored(const Matrix& m, int64_t e, int64_t i, int64_t columns) const {
    return (const W*)m.data + e * m.stride + i * columns;
  }

  // Row i, or the last one if there are fewer.
  template <class V>
  BitmapRow<V> locate(const Bitmap& part, int p, int64_t e, int64_t i) const {
    return resmoe::locate<V>(part, p, layer.mask_bytes, e, std::min(i, layer.intermediate - 1), layer.hidden);
  }
  // visit(rows, next) of rows i and, if count is 2, i + 1, where they can be multiplied while they are decoded; else false.
  template <class V, class Visit>
  bool direct(const Bitmap& part, int p, int64_t e, int64_t i, int64_t count, Visit visit) const {
    const int64_t whole = layer.hidden / 64 * 64;
    const BitmapRow<V> at[2] = {locate<V>(part, p, e, i), locate<V>(part, p, e, i + count - 1)};
    if (at[0].vectors(layer.hidden) < whole || at[1].vectors(layer.hidden) < whole) return false;
    visit(at, locate<V>(part, p, e, i + count));
    return true;
  }
  // visit(T(), Kept8() or Kept4()): what stands for the values of a bitmap
  template <class Visit>
  static void with_kept(const Bitmap& part, Visit visit) {
    if (part.bits == 8) return visit(Kept8());
    if (part.bits == 4) return visit(Kept4());
    visit(T());
  }

  // sums[r * kSums + s] += row i + r . in[s]
  void dots(const Matrix& m, int64_t e, int64_t i, int64_t rows, int64_t n, int64_t inputs, float* sums, Scratch& scratch) const {
    if (!m.bits) return add_dots<T>(stored(m, e, i, n), n, rows, n, scratch.in, inputs, sums, kSums);
    with_codes(m, e, i, n, [&](const auto& codes) { dots(codes, rows, inputs, sums, scratch); });
  }
  template <int Bits>
  void dots(const CodeRows<Bits>& codes, int64_t rows, int64_t inputs, float* sums, Scratch& scratch) const {
    const int64_t size = codes.groups * kLanes;
    if ((int64_t)scratch.shifts.size() < kSums * size) scratch.shifts.resize(kSums * size);
    const float* shifts[kSums];
    for (int64_t s = 0; s < inputs; ++s) shift_sums(codes, scratch.in[s], scratch.shifts.data() + s * size), shifts[s] = scratch.shifts.data() + s * size;
    for (int64_t r = 0; r < rows; r += 4)
      for (int64_t s = 0; s < inputs; s += 3) {
        const int64_t count = std::min<int64_t>(3, inputs - s);
        if (rows - r >= 4)
          dot_codes<Bits, 4>(codes.from(r), count, scratch.in + s, shifts + s, sums + r * kSums + s, kSums);
        else
          for (int64_t k = r; k < rows; ++k) dot_codes<Bits, 1>(codes.from(k), count, scratch.in + s, shifts + s, sums + k * kSums + s, kSums);
      }
  }
  void dots(const Bitmap& part, int p, int64_t e, int64_t i, int64_t rows, int64_t inputs, float* sums, Scratch& scratch) const {
    with_kept(part, [&](auto kept) { dots<decltype(kept)>(part, p, e, i, rows, inputs, sums, scratch); });
  }
  template <class V>
  void dots(const Bitmap& part, int p, int64_t e, int64_t i, int64_t rows, int64_t inputs, float* sums, Scratch& scratch) const {
    const int64_t H = layer.hidden, step = inputs <= kDirect ? 2 : 4;
    for (int64_t r = 0; r < rows; r += step) {
      const int64_t count = std::min(step, rows - r);
      const auto multiply = [&](const BitmapRow<V>* at, const BitmapRow<V>& next) {
        dot_bitmap<V>(at, next, count, H, scratch.in, inputs, sums + r * kSums, kSums);
      };
      // Where a rest of columns is left over, a row multiplied while it is decoded would add up in another order.
      if (inputs <= kDirect && H % 64 == 0 && direct<V>(part, p, e, i + r, count, multiply)) continue;
      decode<V>(part, p, e, i + r, count, scratch);
      add_dots<FP32, 2>(scratch.rows.data(), scratch.ld, count, H, scratch.in, inputs, sums + r * kSums, kSums);
    }
  }

  // into[s] += sum over r of a[s * lda + r] * row i + r
  void axpys(const float* a, int64_t lda, const Matrix& m, int64_t e, int64_t i, int64_t rows, int64_t n, int64_t outputs, Scratch& scratch) const {
    if (!m.bits) return add_axpys<T>(a, lda, stored(m, e, i, n), n, rows, n, scratch.into, outputs);
    with_codes(m, e, i, n, [&](const auto& codes) { axpy_codes(a, lda, codes, rows, scratch.into, outputs); });
  }
  void axpys(const float* a, int64_t lda, const Bitmap& part, int64_t e, int64_t i, int64_t rows, int64_t outputs, Scratch& scratch) const {
    with_kept(part, [&](auto kept) { axpys<decltype(kept)>(a, lda, part, e, i, rows, outputs, scratch); });
  }
  template <class V>
  void axpys(const float* a, int64_t lda, const Bitmap& part, int64_t e, int64_t i, int64_t rows, int64_t outputs, Scratch& scratch) const {
    const int64_t H = layer.hidden, step = outputs <= kDirect ? 2 : 4;
    for (int64_t r = 0; r < rows; r += step) {
      const int64_t count = std::min(step, rows - r);
      const auto multiply = [&](const BitmapRow<V>* at, const BitmapRow<V>& next) {
        if (count == 2)
          axpy_bitmap<V, 2>(a + r, lda, at, next, H, scratch.into, outputs);
        else
          axpy_bitmap<V, 1>(a + r, lda, at, next, H, scratch.into, outputs);
      };
      if (outputs <= kDirect && direct<V>(part, 2, e, i + r, count, multiply)) continue;
      decode<V>(part, 2, e, i + r, count, scratch);
      add_axpys<FP32>(a + r, lda, scratch.rows.data(), scratch.ld, count, H, scratch.into, outputs);
    }
  }

  // Rows i.. of a bitmap, at most four, to scratch.rows.
  template <class V>
  void decode(const Bitmap& part, int p, int64_t e, int64_t i, int64_t rows, Scratch& scratch) const {
    for (int64_t j = 0; j < rows; ++j) decode_row(locate<V>(part, p, e, i + j), layer.hidden, scratch.rows.data() + j * scratch.ld);
  }

  static void clear(float* sums, int64_t rows, int64_t inputs) {
    for (int64_t r = 0; r < rows; ++r) std::fill_n(sums + r * kSums, inputs, 0.0f);
  }

  void into(int me, int threads, Scratch& scratch) {  // phase 1
    const int64_t I = layer.intermediate, H = layer.hidden;
    const Span rows = share(I, 4, me, threads);
    float* sums = scratch.sums.data();
    for (int64_t t = 0; t < tokens; t += kInputs) {
      const int64_t inputs = std::min(kInputs, tokens - t);
      for (int64_t s = 0; s < inputs; ++s) scratch.in[s] = x + (t + s) * H;
      for (int p = 0; p < 2; ++p)
        if (layer.center[p].data)
          for (int64_t i = rows.begin; i < rows.end; i += kRows) {
            const int64_t count = std::min(kRows, rows.end - i);
            clear(sums, count, inputs);
            dots(layer.center[p], 0, i, count, H, inputs, sums, scratch);
            for (int64_t s = 0; s < inputs; ++s)
              for (int64_t r = 0; r < count; ++r) common[p][(t + s) * I + i + r] = sums[r * kSums + s];
          }
    }
    for (int64_t g = 0; g < layer.num_low_rank; ++g) {
      const LowRank& part = layer.low_rank[g];
      const Span ranks = share(part.rank, 4, me, threads);
      for_pairs([&](int64_t e, int64_t q, int64_t inputs) {
        for (int64_t s = 0; s < inputs; ++s) scratch.in[s] = x + routing.token[q + s] * H;
        for (int p = 0; p < 2; ++p)
          if (part.v[p].data)
            for (int64_t k = ranks.begin; k < ranks.end; k += kRows) {
              const int64_t count = std::min(kRows, ranks.end - k);
              clear(sums, count, inputs);
              dots(part.v[p], e, k, count, H, inputs, sums, scratch);
              for (int64_t s = 0; s < inputs; ++s)
                for (int64_t r = 0; r < count; ++r) z[p][g][(q + s) * part.rank + k + r] = sums[r * kSums + s];
            }
      });
    }
  }

  void across(int me, int threads, Scratch& scratch) {  // phase 2
    const int64_t I = layer.intermediate, H = layer.hidden;
    const Span rows = share(I, 4, me, threads);
    float* hidden = scratch.hidden.data();
    float* mine = partial.data() + me * tokens * H;
    for_pairs([&](int64_t e, int64_t q, int64_t inputs) {
      const int32_t* token = routing.token.data() + q;
      float* sums[2] = {scratch.sums.data(), scratch.sums.data() + inputs};
      for (int64_t i = rows.begin; i < rows.end; i += kRows) {
        const int64_t count = std::min(kRows, rows.end - i);
        for (int p = 0; p < 2; ++p)
          for (int64_t s = 0; s < inputs; ++s)
            for (int64_t r = 0; r < count; ++r) sums[p][r * kSums + s] = common[p][token[s] * I + i + r];
        for (int64_t g = 0; g < layer.num_low_rank; ++g) {
          const LowRank& part = layer.low_rank[g];
          // Gate and up where U serves both: its rows are read once.
          const int first = part.v[0].data ? 0 : 1, last = part.v[1].data ? 1 : 0;
          if (first > last) continue;
          for (int p = first; p <= last; ++p)
            for (int64_t s = 0; s < inputs; ++s) scratch.in[(p - first) * inputs + s] = z[p][g].data() + (q + s) * part.rank;
          dots(part.u, e, i, count, part.rank, (last - first + 1) * inputs, sums[first], scratch);
        }
        for (int64_t s = 0; s < inputs; ++s) scratch.in[s] = x + token[s] * H;
        for (int p = 0; p < 2; ++p) {
          for (int64_t g = 0; g < layer.num_bitmap; ++g)
            if (layer.bitmap[g].mask[p]) dots(layer.bitmap[g], p, e, i, count, inputs, sums[p], scratch);
          for (int64_t g = 0; g < layer.num_quantized; ++g)
            if (layer.quantized[g].rows[p].data) dots(layer.quantized[g].rows[p], e, i, count, H, inputs, sums[p], scratch);
        }
        for (int64_t s = 0; s < inputs; ++s)
          for (int64_t r = 0; r < count; ++r) {
            const float a = activate(layer.activation, sums[0][r * kSums + s]) * sums[1][r * kSums + s] * routing.weight[q + s];
            hidden[s * kRows + r] = a;
            mixed[token[s] * I + i + r] += a;
          }
        for (int64_t g = 0; g < layer.num_low_rank; ++g)
          if (layer.low_rank[g].v[2].data) {
            const int64_t rank = layer.low_rank[g].rank;
            for (int64_t s = 0; s < inputs; ++s) scratch.into[s] = shrunk[g].data() + (me * routing.pairs() + q + s) * rank;
            axpys(hidden, kRows, layer.low_rank[g].u, e, i, count, rank, inputs, scratch);
          }
        for (int64_t s = 0; s < inputs; ++s) scratch.into[s] = mine + token[s] * H;
        for (int64_t g = 0; g < layer.num_bitmap; ++g)
          if (layer.bitmap[g].mask[2]) axpys(hidden, kRows, layer.bitmap[g], e, i, count, inputs, scratch);
        for (int64_t g = 0; g < layer.num_quantized; ++g)
          if (layer.quantized[g].rows[2].data) axpys(hidden, kRows, layer.quantized[g].rows[2], e, i, count, H, inputs, scratch);
      }
    });
  }

  void down(int me, int threads, Scratch& scratch) {  // phase 3
    const int64_t I = layer.intermediate, H = layer.hidden;
    float* mine = partial.data() + me * tokens * H;
    const Span rows = share(I, 4, me, threads);
    if (layer.center[2].data)
      for (int64_t t = 0; t < tokens; t += kInputs) {
        const int64_t outputs = std::min(kInputs, tokens - t);
        for (int64_t s = 0; s < outputs; ++s) scratch.into[s] = mine + (t + s) * H;
        for (int64_t i = rows.begin; i < rows.end; i += kRows)
          axpys(mixed.data() + t * I + i, I, layer.center[2], 0, i, std::min(kRows, rows.end - i), H, outputs, scratch);
      }
    float* sums = scratch.hidden.data();
    for (int64_t g = 0; g < layer.num_low_rank; ++g) {
      const LowRank& part = layer.low_rank[g];
      if (!part.v[2].data) continue;
      const Span ranks = share(part.rank, 4, me, threads);
      for_pairs([&](int64_t e, int64_t q, int64_t outputs) {
        for (int64_t s = 0; s < outputs; ++s) scratch.into[s] = mine + routing.token[q + s] * H;
        for (int64_t k = ranks.begin; k < ranks.end; k += kRows) {
          const int64_t count = std::min(kRows, ranks.end - k);
          for (int64_t s = 0; s < outputs; ++s)
            for (int64_t r = 0; r < count; ++r) {
              float total = 0;
              for (int t = 0; t < threads; ++t) total += shrunk[g][(t * routing.pairs() + q + s) * part.rank + k + r];
              sums[s * kRows + r] = total;
            }
          axpys(sums, kRows, part.v[2], e, k, count, H, outputs, scratch);
        }
      });
    }
  }
};

template <class T>
void run(const Layer& layer, const float* x, int64_t tokens, const Routing& routing, void* out, int32_t out_dtype, int threads) {
  Run<T> work{layer, x, tokens, routing, out, out_dtype, {}, {}, {}, {}, {}};
  work.run(threads);
}

}  // namespace resmoe

using namespace resmoe;

extern "C" {

// x, out: [T, H] in x_dtype; ids: global experts [T, K]; weights: fp32 [T, K]; map: [global experts] -> local, or null.
// Returns 0, or 1 for an unknown dtype.
int resmoe_fused_moe(const Layer* layer, const void* x, int32_t x_dtype, int64_t tokens, const int32_t* ids,
                     const float* weights, int64_t top_k, const int32_t* map, void* out, int threads) {
  const Routing routing(ids, weights, tokens, top_k, map, layer->experts);
  std::vector<float> converted(x_dtype == kFloat ? 0 : tokens * layer->hidden);
  for (size_t c = 0; c < converted.size(); ++c) converted[c] = load((const uint16_t*)x, x_dtype, c);
  const float* wide = x_dtype == kFloat ? (const float*)x : converted.data();
  switch (layer->dtype) {
    case kFloat: run<FP32>(*layer, wide, tokens, routing, out, x_dtype, threads); return 0;
    case kBFloat16: run<BF16>(*layer, wide, tokens, routing, out, x_dtype, threads); return 0;
    case kHalf: run<FP16>(*layer, wide, tokens, routing, out, x_dtype, threads); return 0;
  }
  return 1;
}

// Decode one bitmap row: for the self-test that runs when the library is loaded. bits: of codes, which have scales; or 0.
int resmoe_decode_row(int32_t dtype, int64_t bits, const uint8_t* mask, const void* values, const uint16_t* scales, int64_t group,
                      int64_t readable, int64_t n, float* out) {
  group = std::min(group, n);
  if (bits == 8) decode_row<Kept8>({mask, (const uint8_t*)values, readable, scales, group}, n, out);
  else if (bits == 4) decode_row<Kept4>({mask, {(const uint8_t*)values, 0}, readable, scales, group}, n, out);
  else if (dtype == kFloat) decode_row<FP32>({mask, (const float*)values, readable, nullptr, n}, n, out);
  else if (dtype == kBFloat16) decode_row<BF16>({mask, (const uint16_t*)values, readable, nullptr, n}, n, out);
  else if (dtype == kHalf) decode_row<FP16>({mask, (const uint16_t*)values, readable, nullptr, n}, n, out);
  else return 1;
  return 0;
}

// Decode row i of one matrix of codes: for the self-test.
void resmoe_decode_codes(const Matrix* part, int64_t i, int64_t n, float* out) {
  with_codes(*part, 0, i, n, [&](const auto& row) { decode_codes(row, out); });
}

// Every struct's fields in order, "Struct.field offset bytes" a line: compared with structs.py.
const char* resmoe_struct_fields() {
  static const std::string text = struct_fields();
  return text.c_str();
}
}
