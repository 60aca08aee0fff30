// One layer: routed pairs, the threads' shares, and the four phases.
//
// A pair is (token, local expert, router weight); pairs of one expert stand together. Phases, a barrier after each:
//
//   0  round_inputs: x in 16 bits, for rows of codes
//   1  project_inputs: rows of center gate/up . x, once per token; rows of low-rank V gate/up . x, once per pair
//   2  run_experts: for each block of an expert's pairs, block of rows after block of rows; without low rank add_down
//      comes after some blocks of the others
//        add_gate_up:    gate, up = center + bias + residual
//        activate_rows:  a = activate(gate, up) * weight; mixed_hidden[token] += a
//        add_down:       low rank: shrunk_hidden[pair] += a * U; others: out[token] += a * D_down
//   3  project_outputs: out[token] += mixed_hidden[token] * center_down; out[token] += shrunk_hidden[pair] * V_down;
//                       out[token] += weight * bias_down
//   4  add_partial_outputs: sum of the threads' outputs
//
// U is read once for gate, up and down. Each thread owns its rows, so nothing is shared but sums per thread, and the
// result depends on the number of threads by rounding only.
//
// Products (dense.h) read rows in the layer's dtype where they lie. Rows of codes (codes.h) are multiplied in integers.
// Rows of bitmaps (bitmap.h) are multiplied while they are decoded for few tokens; for many they are decoded, four or
// 16 at a time, for all tokens of an expert.
#pragma once

#include <math.h>
#include <omp.h>

#include <vector>

#include "activation.h"
#include "bitmap.h"
#include "codes.h"
#include "numbers.h"

namespace resmoe {

struct Routing {
  std::vector<int32_t> token;  // [P]
  std::vector<float> weight;   // [P]
  std::vector<int64_t> begin;  // [E + 1] first pair of each expert

  // ids: global experts, negative ones are skipped; map: global -> local, negative where not here, or null.
  Routing(const int32_t* ids, const float* weights, int64_t tokens, int64_t top_k, const int32_t* map, int64_t experts)
      : begin(experts + 1) {
    const auto local = [&](int64_t k) { return ids[k] < 0 ? -1 : map ? map[ids[k]] : ids[k]; };
    std::vector<int64_t> last_token(experts, -1);
    for (int64_t k = 0; k < tokens * top_k; ++k) {
      const int32_t e = local(k);
      if (e < 0 || last_token[e] == k / top_k) continue;
      last_token[e] = k / top_k;
      ++begin[e + 1];
    }
    for (int64_t e = 0; e < experts; ++e) begin[e + 1] += begin[e];
    token.resize(begin[experts]);
    weight.resize(begin[experts]);
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t k = 0; k < tokens * top_k; ++k) {
      const int32_t e = local(k);
      if (e < 0) continue;
      // One pair for an expert that a token chose twice: pairs of a block write to outputs of their own.
      if (next[e] > begin[e] && token[next[e] - 1] == k / top_k) {
        weight[next[e] - 1] += weights[k];
        continue;
      }
      token[next[e]] = k / top_k;
      weight[next[e]++] = weights[k];
    }
  }
  int64_t pairs() const { return (int64_t)token.size(); }
};

constexpr int64_t kHidden = 8 * kRows;  // of gate and up before those of down: so far each is read on and fetched ahead
constexpr int64_t kHiddenStride = kHidden + 16;  // not of one set of the cache
constexpr int64_t kStoredRows = 16;              // of a bitmap, decoded to the layer's dtype at once

template <class T>
struct Run {
  using W = typename T::type;
  using P = Products<T>;
  using Number = typename P::Number;
  const Layer& layer;
  const float* x;  // [T, H]
  int64_t tokens;
  const Routing& routing;
  void* out;  // [T, H]
  int32_t out_dtype;
  std::vector<float> center_products[2], mixed_hidden;  // [T, I] center's gate, up; weighted sums
  std::vector<std::vector<float>> shrunk_inputs[2];     // per low-rank part: [P, R], V gate . x and V up . x
  std::vector<std::vector<float>> shrunk_hidden;        // per part: [threads, P, R], U^T a
  std::vector<float> partial;                           // [threads, T, H]
  std::vector<Images> images;                           // of x, for each kind of codes: [T, limbs]
  std::vector<uint8_t> fine;      // [T]: 16 bits don't hold x; then what is left of it is used too
  int64_t limbs;                  // 2 where a token is fine
  std::vector<int64_t> limbs_of;  // [T]: of x, where products take it in limbs
  Numbers<float> floats;          // x: [T]
  Numbers<Number> numbers;        // x as products of rows in the layer's dtype take it: [T, most limbs]

  Run(const Layer& layer, const float* x, int64_t tokens, const Routing& routing, void* out, int32_t out_dtype)
      : layer(layer), x(x), tokens(tokens), routing(routing), out(out), out_dtype(out_dtype) {}

  // One thread's buffers.
  struct Scratch {
    std::vector<float> rows;       // decoded rows
    std::vector<uint16_t> stored;  // kStoredRows of them, in the layer's dtype
    std::vector<float> sums;       // [2 * inputs, kRows]: of gate, then of up
    std::vector<float> hidden;     // [inputs, kHiddenStride]
    std::vector<float> rest;       // of numbers rounded to 16 bits
    std::vector<Images> shrunk;    // of a block's pairs, by low-rank part: [kSums, 2]
    // What is at hand for rows of codes; for others as fp32; and, of x, as products of the layer's dtype take it.
    Inputs inputs;
    Operands<const float*> wide;
    OperandsOf<P> operands;
    CodeScratch codes;
    // Outputs at hand, and what the numbers that go to them need.
    float* into[kInputs];
    bool fine[kInputs];
    int64_t ld, ld_stored;
    Scratch(int64_t columns, int64_t tokens) : ld(columns + 2 * kLanes), ld_stored(round_up(columns, 64) + 32) {
      const int64_t inputs = std::min(kInputs, tokens);
      sums.resize(2 * inputs * kRows);
      hidden.resize(inputs * kHiddenStride);
      rest.resize(columns);
    }
  };

  void run(int most_threads) {
    const int64_t I = layer.intermediate, H = layer.hidden;
    int64_t columns = H;
    for (auto& c : center_products) c.assign(tokens * I, 0.0f);
    mixed_hidden.assign(tokens * I, 0.0f);
    for (auto& part : shrunk_inputs) part.resize(layer.num_low_rank);
    shrunk_hidden.resize(layer.num_low_rank);
    for (int64_t g = 0; g < layer.num_low_rank; ++g) {
      const int64_t rank = layer.low_rank[g].rank;
      columns = std::max(columns, rank);
      for (auto& part : shrunk_inputs) part[g].assign(routing.pairs() * shrunk_stride(layer.low_rank[g]), 0.0f);
      shrunk_hidden[g].assign(most_threads * routing.pairs() * rank, 0.0f);
    }
    partial.assign(most_threads * tokens * H, 0.0f);
    prepare_inputs();
#pragma omp parallel num_threads(most_threads)
    {
      const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
      Scratch scratch(columns, tokens);
      round_inputs(thread, threads, scratch);
#pragma omp barrier
      project_inputs(thread, threads, scratch);
#pragma omp barrier
      run_experts(thread, threads, scratch);
#pragma omp barrier
      project_outputs(thread, threads, scratch);
#pragma omp barrier
      add_partial_outputs(thread, threads);
    }
  }

  // With zeros behind each row, as far as vectors read.
  static int64_t shrunk_stride(const LowRank& part) { return round_up(part.rank, kWide); }

  // Room for x as rows of the layer need it: images for codes, numbers for the others.
  void prepare_inputs() {
    fine.resize(tokens);
    limbs_of.resize(tokens);
    const auto need = [&](const Matrix& m) {
      if (!m.data || !m.bits) return;
      const ImageKind kind = kind_of(m, layer.hidden);
      for (const Images& own : images)
        if (own.kind == kind) return;
      images.emplace_back(kind);
    };
    for (int p = kGate; p <= kUp; ++p) {
      need(layer.center[p]);
      for (int64_t g = 0; g < layer.num_low_rank; ++g) need(layer.low_rank[g].v[p]);
      for (int64_t g = 0; g < layer.num_quantized; ++g) need(layer.quantized[g].rows[p]);
    }
    limbs = 1;
    int64_t most_limbs = 1;
    for (int64_t t = 0; t < tokens; ++t) {
      const uint32_t bits = bits_of(x + t * layer.hidden, layer.hidden);
      fine[t] = is_fine(bits);
      limbs_of[t] = P::limbs_of(bits);
      if (fine[t]) limbs = 2;
      most_limbs = std::max(most_limbs, limbs_of[t]);
    }
    for (Images& own : images) own.resize(tokens * limbs);
    floats.resize(tokens, layer.hidden, 1);
    if (!std::is_same_v<Number, float>) numbers.resize(tokens, layer.hidden, most_limbs);
  }
  void round_inputs(int thread, int threads, Scratch& scratch) {
    const Span own = share(tokens, 1, thread, threads);
    for (int64_t t = own.begin; t < own.end; ++t) {
      const float* from = x + t * layer.hidden;
      for (Images& kind : images) round(kind, t * limbs, from, fine[t], scratch);
      floats.template make<Fma<FP32>>(t, from, 1);
      if (!std::is_same_v<Number, float>) numbers.template make<P>(t, from, limbs_of[t]);
    }
  }
  static void round(Images& to, int64_t i, const float* numbers, bool fine, Scratch& scratch) {
    to.make(i, numbers, fine ? scratch.rest.data() : nullptr);
    if (fine) to.make(i + 1, scratch.rest.data(), nullptr);
  }
  // Input s is x of token(s).
  template <class Token>
  void use_tokens(const Matrix& m, int64_t inputs, Scratch& scratch, Token token) const {
    if (!m.bits) return use_numbers(inputs, scratch, token);
    const ImageKind kind = kind_of(m, layer.hidden);
    const Images* own = images.data();
    while (!(own->kind == kind)) ++own;
    scratch.inputs.clear();
    for (int64_t s = 0; s < inputs; ++s)
      for (int64_t limb = 0; limb <= fine[token(s)]; ++limb) scratch.inputs.push(own->at(token(s) * limbs + limb), s);
  }
  template <class Token>
  void use_numbers(int64_t inputs, Scratch& scratch, Token token) const {
    scratch.operands.clear();
    for (int64_t s = 0; s < inputs; ++s)
      if constexpr (std::is_same_v<Number, float>)
        scratch.operands.push(floats.at(token(s), 0), s);
      else
        for (int64_t limb = 0; limb < limbs_of[token(s)]; ++limb) scratch.operands.push(numbers.at(token(s), limb), s);
  }
  template <class Token>
  void use_floats(int64_t inputs, Scratch& scratch, Token token) const {
    scratch.wide.clear();
    for (int64_t s = 0; s < inputs; ++s) scratch.wide.push(floats.at(token(s), 0), s);
  }
  // Output s is into(s), of what is computed of token(s).
  template <class Into, class Token>
  void use_outputs(int64_t outputs, Scratch& scratch, Into into, Token token) const {
    for (int64_t s = 0; s < outputs; ++s) {
      scratch.into[s] = into(s);
      scratch.fine[s] = fine[token(s)];
    }
  }

  // visit(first pair, pairs) for blocks of each expert's pairs.
  template <class Visit>
  void for_pair_blocks(Visit visit) const {
    for (int64_t e = 0; e < layer.experts; ++e)
      for (int64_t q = routing.begin[e]; q < routing.begin[e + 1]; q += kInputs)
        visit(e, q, std::min(kInputs, routing.begin[e + 1] - q));
  }

  const W* stored(const Matrix& m, int64_t e, int64_t i, int64_t columns) const {
    return (const W*)m.data + e * m.stride + i * columns;
  }

  const W* stored_bias(int p, int64_t e) const {
    return layer.bias[p] ? (const W*)layer.bias[p] + e * layer.bias_stride[p] : nullptr;
  }

  // Row i, or the last one if there are fewer.
  template <class V>
  BitmapRow<V> locate(const Bitmap& part, int p, int64_t e, int64_t i) const {
    return resmoe::locate<V>(part, p, layer.mask_bytes, e, std::min(i, layer.intermediate - 1), layer.hidden);
  }
  // visit(rows, next) of rows i and, if count is 2, i + 1, where they can be multiplied while they are decoded; else
  // false.
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

  // sums[s * kRows + r] += row i + r . input s; Q: how rows in the layer's dtype are multiplied.
  template <class Q>
  void dots(const Matrix& m, int64_t e, int64_t i, int64_t rows, int64_t n, const OperandsOf<Q>& x, float* sums,
            Scratch& scratch) const {
    if (!m.bits) return add_dots<Q>(stored(m, e, i, n), n, rows, n, x, sums, kRows);
    with_codes(m, e, i, n,
               [&](const auto& codes) { dot_codes(codes, rows, scratch.inputs, sums, kRows, scratch.codes); });
  }
  void dots(const Bitmap& part, int p, int64_t e, int64_t i, int64_t rows, float* sums, Scratch& scratch) const {
    with_kept(part, [&](auto kept) { dots<decltype(kept)>(part, p, e, i, rows, sums, scratch); });
  }
  template <class V>
  void dots(const Bitmap& part, int p, int64_t e, int64_t i, int64_t rows, float* sums, Scratch& scratch) const {
    const int64_t H = layer.hidden, inputs = scratch.wide.count;
    const int64_t step = inputs <= kDirect && !kAsStored<V> ? 2 : 4;
    for (int64_t r = 0; r < rows; r += step) {
      const int64_t count = std::min(step, rows - r);
      if constexpr (kAsStored<V>) {
        if (dots_expanded<V>(part, p, e, i + r, count, sums + r, scratch)) continue;
        decode_stored<V>(part, p, e, i + r, count, scratch);
        add_dots<P>(scratch.stored.data(), scratch.ld_stored, count, H, scratch.operands, sums + r, kRows);
      } else {
        const auto multiply = [&](const BitmapRow<V>* at, const BitmapRow<V>& next) {
          dot_bitmap<V>(at, next, count, H, scratch.wide.at, inputs, sums + r, kRows);
        };
        // Where a rest of columns is left over, a row multiplied while it is decoded would add up in another order.
        if (inputs <= kDirect && H % 64 == 0 && direct<V>(part, p, e, i + r, count, multiply)) continue;
        decode<V>(part, p, e, i + r, count, scratch);
        add_dots<Fma<FP32>>(scratch.rows.data(), scratch.ld, count, H, scratch.wide, sums + r, kRows);
      }
    }
  }

  // into[s] += sum over r of a[s * lda + r] * row i + r
  void axpys(const float* a, int64_t lda, const Matrix& m, int64_t e, int64_t i, int64_t rows, int64_t n,
             int64_t outputs, Scratch& scratch) const {
    if (!m.bits) return add_axpys<T>(a, lda, stored(m, e, i, n), n, rows, n, scratch.into, outputs);
    with_codes(m, e, i, n, [&](const auto& codes) {
      axpy_codes(a, lda, codes, rows, scratch.into, scratch.fine, outputs, scratch.codes);
    });
  }
  void axpys(const float* a, int64_t lda, const Bitmap& part, int64_t e, int64_t i, int64_t rows, int64_t outputs,
             Scratch& scratch) const {
    with_kept(part, [&](auto kept) { axpys<decltype(kept)>(a, lda, part, e, i, rows, outputs, scratch); });
  }
  template <class V>
  void axpys(const float* a, int64_t lda, const Bitmap& part, int64_t e, int64_t i, int64_t rows, int64_t outputs,
             Scratch& scratch) const {
    const int64_t H = layer.hidden;
    const int64_t step = kAsStored<V> ? outputs <= 2 ? 4 : kStoredRows : outputs <= kDirect ? 2 : kStoredRows;
    for (int64_t r = outputs == 1 ? axpy_rows_expanded<V>(a, part, e, i, rows, scratch) : 0; r < rows; r += step) {
      const int64_t count = std::min(step, rows - r);
      if constexpr (kAsStored<V>) {
        decode_stored<V>(part, kDown, e, i + r, count, scratch);
        add_axpys<V>(a + r, lda, scratch.stored.data(), scratch.ld_stored, count, H, scratch.into, outputs);
      } else {
        const auto multiply = [&](const BitmapRow<V>* at, const BitmapRow<V>& next) {
          if (count == 2)
            axpy_bitmap<V, 2>(a + r, lda, at, next, H, scratch.into, outputs);
          else
            axpy_bitmap<V, 1>(a + r, lda, at, next, H, scratch.into, outputs);
        };
        if (outputs <= kDirect && direct<V>(part, kDown, e, i + r, count, multiply)) continue;
        decode<V>(part, kDown, e, i + r, count, scratch);
        add_axpys<FP32>(a + r, lda, scratch.rows.data(), scratch.ld, count, H, scratch.into, outputs);
      }
    }
  }

  // visit(rows) of rows i to i + 3, where they can be multiplied while they are expanded; else false.
  template <class V, class Visit>
  bool expanded(const Bitmap& part, int p, int64_t e, int64_t i, int64_t rows, Visit visit) const {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
    if constexpr (std::is_same_v<V, BF16>) {
      if (rows != kExpanded) return false;
      const BitmapRow<V> at[kExpanded] = {locate<V>(part, p, e, i), locate<V>(part, p, e, i + 1),
                                          locate<V>(part, p, e, i + 2), locate<V>(part, p, e, i + 3)};
      if (!Expander<V>::fits(at, layer.hidden)) return false;
      visit(at);
      return true;
    }
#else
    unused(part, p, e, i, rows, visit);
#endif
    return false;
  }
  // Four rows for one or two inputs.
  template <class V>
  bool dots_expanded(const Bitmap& part, int p, int64_t e, int64_t i, int64_t rows, float* sums,
                     Scratch& scratch) const {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
    const auto& x = scratch.operands;
    if (x.count <= 2)
      return expanded<V>(part, p, e, i, rows, [&](const auto& at) {
        (x.count == 1 ? dot_expanded<1> : dot_expanded<2>)(at, layer.hidden, x.at, x.sum, sums, kRows);
      });
#else
    unused(part, p, e, i, rows, sums, scratch);
#endif
    return false;
  }
  // How many rows scratch.into[0] has got.
  template <class V>
  int64_t axpy_rows_expanded(const float* a, const Bitmap& part, int64_t e, int64_t i, int64_t rows,
                             Scratch& scratch) const {
    int64_t r = 0;
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
    if constexpr (std::is_same_v<V, BF16>) {
      const int64_t H = layer.hidden;
      scratch.rows.resize(4 * scratch.ld);
      float* pairs = scratch.rows.data();
      to_pairs(scratch.into[0], H, pairs);
      const auto add = [&](const auto& at) { axpy_expanded(a + r, at, H, pairs); };
      while (expanded<V>(part, kDown, e, i + r, std::min<int64_t>(kExpanded, rows - r), add)) r += kExpanded;
      from_pairs(pairs, H, scratch.into[0]);
    }
#else
    unused(a, part, e, i, rows, scratch);
#endif
    return r;
  }

  // Rows i.. of a bitmap, at most kStoredRows, to scratch.stored.
  template <class V>
  void decode_stored(const Bitmap& part, int p, int64_t e, int64_t i, int64_t rows, Scratch& scratch) const {
    scratch.stored.resize(kStoredRows * scratch.ld_stored);
    for (int64_t j = 0; j < rows; ++j)
      decode_as_stored(locate<V>(part, p, e, i + j), layer.hidden, scratch.stored.data() + j * scratch.ld_stored);
  }

  // Rows i.. of a bitmap, at most kStoredRows, to scratch.rows.
  template <class V>
  void decode(const Bitmap& part, int p, int64_t e, int64_t i, int64_t rows, Scratch& scratch) const {
    scratch.rows.resize(kStoredRows * scratch.ld);
    for (int64_t j = 0; j < rows; ++j)
      decode_row(locate<V>(part, p, e, i + j), layer.hidden, scratch.rows.data() + j * scratch.ld);
  }

  void project_inputs(int thread, int threads, Scratch& scratch) {
    const int64_t I = layer.intermediate, H = layer.hidden;
    const Span rows = share(I, 4, thread, threads);
    float* sums = scratch.sums.data();
    for (int64_t t = 0; t < tokens; t += kInputs) {
      const int64_t inputs = std::min(kInputs, tokens - t);
      for (int p = kGate; p <= kUp; ++p)
        if (layer.center[p].data) {
          use_tokens(layer.center[p], inputs, scratch, [&](int64_t s) { return t + s; });
          for (int64_t i = rows.begin; i < rows.end; i += kRows) {
            const int64_t count = std::min(kRows, rows.end - i);
            std::fill_n(sums, inputs * kRows, 0.0f);
            dots<P>(layer.center[p], 0, i, count, H, scratch.operands, sums, scratch);
            for (int64_t s = 0; s < inputs; ++s)
              std::copy_n(sums + s * kRows, count, center_products[p].data() + (t + s) * I + i);
          }
        }
    }
    for (int64_t g = 0; g < layer.num_low_rank; ++g) {
      const LowRank& part = layer.low_rank[g];
      const Span ranks = share(part.rank, 4, thread, threads);
      for_pair_blocks([&](int64_t e, int64_t q, int64_t inputs) {
        for (int p = kGate; p <= kUp; ++p)
          if (part.v[p].data) {
            use_tokens(part.v[p], inputs, scratch, [&](int64_t s) { return routing.token[q + s]; });
            for (int64_t k = ranks.begin; k < ranks.end; k += kRows) {
              const int64_t count = std::min(kRows, ranks.end - k);
              std::fill_n(sums, inputs * kRows, 0.0f);
              dots<P>(part.v[p], e, k, count, H, scratch.operands, sums, scratch);
              for (int64_t s = 0; s < inputs; ++s)
                std::copy_n(sums + s * kRows, count, shrunk_inputs[p][g].data() + (q + s) * shrunk_stride(part) + k);
            }
          }
      });
    }
  }

  // Some pairs of one expert, and some rows of its weights.
  struct Block {
    int64_t expert, first_pair, pairs, first_row, rows;
  };

  void run_experts(int thread, int threads, Scratch& scratch) {
    const Span rows = share(layer.intermediate, 4, thread, threads);
    const int64_t together = layer.num_low_rank ? kRows : kHidden;
    for_pair_blocks([&](int64_t e, int64_t q, int64_t pairs) {
      round_shrunk_inputs(q, pairs, scratch);
      for (int64_t first = rows.begin; first < rows.end; first += together) {
        const int64_t end = std::min(rows.end, first + together);
        const auto for_blocks = [&](auto visit) {
          for (int64_t i = first; i < end; i += kRows)
            visit(Block{e, q, pairs, i, std::min(kRows, end - i)}, scratch.hidden.data() + i - first);
        };
        for_blocks([&](const Block& block, float* hidden) {
          float* sums[2] = {scratch.sums.data(), scratch.sums.data() + pairs * kRows};
          add_gate_up(block, sums, scratch);
          activate_rows(block, sums, hidden);
        });
        for_blocks([&](const Block& block, const float* hidden) { add_down(block, hidden, thread, scratch); });
      }
    });
  }

  // Whether gate and up, one of them or neither go through U.
  static Span projections_of(const LowRank& part) {
    return {part.v[kGate].data ? kGate : kUp, (part.v[kUp].data ? kUp : kGate) + 1};
  }
  // Images of shrunk inputs, where U is in codes.
  void round_shrunk_inputs(int64_t q, int64_t pairs, Scratch& scratch) const {
    for (int64_t g = 0; g < layer.num_low_rank; ++g) {
      const LowRank& part = layer.low_rank[g];
      if ((int64_t)scratch.shrunk.size() == g)
        scratch.shrunk.emplace_back(part.u.bits ? kind_of(part.u, part.rank) : ImageKind{1, 1, kBlock, 0});
      if (!part.u.bits) continue;
      Images& own = scratch.shrunk[g];
      own.resize(2 * kSums);
      const Span both = projections_of(part);
      for (int64_t p = both.begin; p < both.end; ++p)
        for (int64_t s = 0; s < pairs; ++s)
          round(own, 2 * ((p - both.begin) * pairs + s), shrunk_input(p, g, q + s), fine[routing.token[q + s]],
                scratch);
    }
  }
  const float* shrunk_input(int64_t p, int64_t g, int64_t pair) const {
    return shrunk_inputs[p][g].data() + pair * shrunk_stride(layer.low_rank[g]);
  }
  // Input (p - projections.begin) * pairs + s is what V of p makes of pair s.
  void use_shrunk_inputs(int64_t g, const Span& projections, const Block& b, Scratch& scratch) const {
    const int32_t* token = routing.token.data() + b.first_pair;
    scratch.inputs.clear();
    scratch.wide.clear();
    for (int64_t p = projections.begin, to = 0; p < projections.end; ++p)
      for (int64_t s = 0; s < b.pairs; ++s, ++to)
        if (layer.low_rank[g].u.bits)
          for (int64_t limb = 0; limb <= fine[token[s]]; ++limb)
            scratch.inputs.push(scratch.shrunk[g].at(2 * to + limb), to);
        else
          scratch.wide.push(shrunk_input(p, g, b.first_pair + s), to);
  }

  // sums[p][s * kRows + r]: the center's product, the bias, and what the residual's parts add to it.
  void add_gate_up(const Block& b, float* const (&sums)[2], Scratch& scratch) const {
    const int64_t H = layer.hidden, e = b.expert, i = b.first_row;
    const int32_t* token = routing.token.data() + b.first_pair;
    for (int p = kGate; p <= kUp; ++p) {
      for (int64_t s = 0; s < b.pairs; ++s)
        std::copy_n(center_products[p].data() + token[s] * layer.intermediate + i, b.rows, sums[p] + s * kRows);
      if (const W* bias = stored_bias(p, e))
        for (int64_t s = 0; s < b.pairs; ++s)
          for (int64_t r = 0; r < b.rows; ++r) sums[p][s * kRows + r] += T::scalar(bias[i + r]);
    }
    for (int64_t g = 0; g < layer.num_low_rank; ++g) {
      const LowRank& part = layer.low_rank[g];
      // Gate and up where U serves both: its rows are read once.
      const Span both = projections_of(part);
      if (both.begin >= both.end) continue;
      use_shrunk_inputs(g, both, b, scratch);
      dots<Fma<T>>(part.u, e, i, b.rows, part.rank, scratch.wide, sums[both.begin], scratch);
    }
    const auto token_of = [&](int64_t s) { return token[s]; };
    if (layer.num_bitmap) {
      use_floats(b.pairs, scratch, token_of);
      use_numbers(b.pairs, scratch, token_of);
    }
    for (int p = kGate; p <= kUp; ++p)
      for (int64_t g = 0; g < layer.num_bitmap; ++g)
        if (layer.bitmap[g].mask[p]) dots(layer.bitmap[g], p, e, i, b.rows, sums[p], scratch);
    for (int p = kGate; p <= kUp; ++p)
      for (int64_t g = 0; g < layer.num_quantized; ++g)
        if (layer.quantized[g].rows[p].data) {
          use_tokens(layer.quantized[g].rows[p], b.pairs, scratch, token_of);
          dots<P>(layer.quantized[g].rows[p], e, i, b.rows, H, scratch.operands, sums[p], scratch);
        }
  }

  // all[s * kHiddenStride + r], and the tokens' sums of it.
  void activate_rows(const Block& b, float* const (&sums)[2], float* all) {
    for (int64_t s = 0; s < b.pairs; ++s) {
      float* hidden = all + s * kHiddenStride;
      float* mixed = mixed_hidden.data() + routing.token[b.first_pair + s] * layer.intermediate + b.first_row;
      activate(layer.activation, sums[kGate] + s * kRows, sums[kUp] + s * kRows, routing.weight[b.first_pair + s],
               b.rows, hidden);
      for (int64_t r = 0; r < b.rows; ++r) mixed[r] += hidden[r];
    }
  }

  // What the residual's parts of down make of activate_rows()'s numbers.
  void add_down(const Block& b, const float* hidden, int thread, Scratch& scratch) {
    const int64_t H = layer.hidden, e = b.expert, i = b.first_row;
    const int32_t* token = routing.token.data() + b.first_pair;
    const auto token_of = [&](int64_t s) { return token[s]; };
    for (int64_t g = 0; g < layer.num_low_rank; ++g)
      if (layer.low_rank[g].v[kDown].data) {
        const int64_t rank = layer.low_rank[g].rank;
        float* own = shrunk_hidden[g].data() + (thread * routing.pairs() + b.first_pair) * rank;
        use_outputs(b.pairs, scratch, [&](int64_t s) { return own + s * rank; }, token_of);
        axpys(hidden, kHiddenStride, layer.low_rank[g].u, e, i, b.rows, rank, b.pairs, scratch);
      }
    float* own = partial.data() + thread * tokens * H;
    use_outputs(b.pairs, scratch, [&](int64_t s) { return own + token[s] * H; }, token_of);
    for (int64_t g = 0; g < layer.num_bitmap; ++g)
      if (layer.bitmap[g].mask[kDown]) axpys(hidden, kHiddenStride, layer.bitmap[g], e, i, b.rows, b.pairs, scratch);
    for (int64_t g = 0; g < layer.num_quantized; ++g)
      if (layer.quantized[g].rows[kDown].data)
        axpys(hidden, kHiddenStride, layer.quantized[g].rows[kDown], e, i, b.rows, H, b.pairs, scratch);
  }

  void project_outputs(int thread, int threads, Scratch& scratch) {
    const int64_t I = layer.intermediate, H = layer.hidden;
    float* own_out = partial.data() + thread * tokens * H;
    const Span rows = share(I, 4, thread, threads);
    if (layer.center[kDown].data)
      for (int64_t t = 0; t < tokens; t += kInputs) {
        const int64_t outputs = std::min(kInputs, tokens - t);
        const auto token_of = [&](int64_t s) { return t + s; };
        use_outputs(outputs, scratch, [&](int64_t s) { return own_out + (t + s) * H; }, token_of);
        for (int64_t i = rows.begin; i < rows.end; i += kRows)
          axpys(mixed_hidden.data() + t * I + i, I, layer.center[kDown], 0, i, std::min(kRows, rows.end - i), H,
                outputs, scratch);
      }
    float* sums = scratch.hidden.data();
    for (int64_t g = 0; g < layer.num_low_rank; ++g) {
      const LowRank& part = layer.low_rank[g];
      if (!part.v[kDown].data) continue;
      const Span ranks = share(part.rank, 4, thread, threads);
      for_pair_blocks([&](int64_t e, int64_t q, int64_t outputs) {
        const auto token_of = [&](int64_t s) { return routing.token[q + s]; };
        use_outputs(outputs, scratch, [&](int64_t s) { return own_out + token_of(s) * H; }, token_of);
        for (int64_t k = ranks.begin; k < ranks.end; k += kRows) {
          const int64_t count = std::min(kRows, ranks.end - k);
          for (int64_t s = 0; s < outputs; ++s)
            for (int64_t r = 0; r < count; ++r) {
              float total = 0;
              for (int t = 0; t < threads; ++t)
                total += shrunk_hidden[g][(t * routing.pairs() + q + s) * part.rank + k + r];
              sums[s * kRows + r] = total;
            }
          axpys(sums, kRows, part.v[kDown], e, k, count, H, outputs, scratch);
        }
      });
    }
    if (!layer.bias[kDown]) return;
    const Span columns = share(H, 64, thread, threads);
    for_pair_blocks([&](int64_t e, int64_t q, int64_t outputs) {
      const W* bias = stored_bias(kDown, e);
      for (int64_t s = q; s < q + outputs; ++s)
        for (int64_t c = columns.begin; c < columns.end; ++c)
          own_out[routing.token[s] * H + c] += routing.weight[s] * T::scalar(bias[c]);
    });
  }

  void add_partial_outputs(int thread, int threads) {
    const int64_t numbers = tokens * layer.hidden;
    const Span own = share(numbers, 64, thread, threads);
    for (int64_t c = own.begin; c < own.end; ++c) {
      float total = 0;
      for (int t = 0; t < threads; ++t) total += partial[t * numbers + c];
      store(out, out_dtype, c, total);
    }
  }
};

template <class T>
void run(const Layer& layer, const float* x, int64_t tokens, const Routing& routing, void* out, int32_t out_dtype,
         int threads) {
  Run<T> work(layer, x, tokens, routing, out, out_dtype);
  work.run(threads);
}

}  // namespace resmoe
