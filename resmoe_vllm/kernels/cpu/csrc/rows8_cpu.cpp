// Products with matrices in signed 8-bit codes by row: the integer dots of rows of codes (codes.h), scale by row.
//
// Plain C ABI, no torch headers. Truth: rows8_ref in rows8.py. A token's result does not depend on its batch. Inputs
// are rounded to 16 bits with a scale for each 512 columns; what that leaves of numbers finer than 16 bits is used too.

#include <omp.h>

#include "codes.h"
#include "numbers.h"

using namespace resmoe;

namespace {

constexpr int64_t kStripRows = 4 * kTileRows;  // they stay in the second cache from one block of tokens to the next
constexpr int64_t kTokens = 96;                // of a block
static_assert(2 * kTokens <= Inputs::kMost);

struct RowProducts {
  const CodeRows<SignedBytes> matrix;
  const float* bias;  // [rows], or null
  const void* x;      // [tokens, columns]
  int64_t tokens, rows;
  void* out;  // [tokens, rows]
  int32_t dtype;
  Images images;               // [tokens, 2]: of x, and of what rounding left of it
  std::vector<uint8_t> finer;  // [tokens]: whether that is used

  RowProducts(const CodeRows<SignedBytes>& matrix, const float* bias, const void* x, int64_t tokens, int64_t rows,
              void* out, int32_t dtype)
      : matrix(matrix),
        bias(bias),
        x(x),
        tokens(tokens),
        rows(rows),
        out(out),
        dtype(dtype),
        images(matrix.kind()),
        finer(tokens) {
    images.resize(2 * tokens);
  }

  void run(int threads) {
#pragma omp parallel num_threads(threads)
    {
      const int thread = omp_get_thread_num(), count = omp_get_num_threads();
      round_inputs(share(tokens, 1, thread, count));
#pragma omp barrier
      multiply(share(rows, kTileRows, thread, count));
    }
  }

  void round_inputs(Span own) {
    std::vector<float> numbers(matrix.n), rest(matrix.n);
    for (int64_t t = own.begin; t < own.end; ++t) {
      load_floats(x, dtype, t * matrix.n, matrix.n, numbers.data());
      finer[t] = is_fine(bits_of(numbers.data(), matrix.n));
      images.make(2 * t, numbers.data(), finer[t] ? rest.data() : nullptr);
      if (finer[t]) images.make(2 * t + 1, rest.data(), nullptr);
    }
  }

  void multiply(Span own) {
    CodeScratch scratch;
    Inputs inputs;
    std::vector<float> sums(std::min(kTokens, tokens) * kStripRows);
    for (int64_t r = own.begin; r < own.end; r += kStripRows) {
      const int64_t count = std::min(kStripRows, own.end - r);
      CodeRows<SignedBytes> strip = matrix;
      strip.codes += r * strip.stride;
      strip.scales += r;
      for (int64_t t = 0; t < tokens; t += kTokens) {
        const int64_t block = std::min(kTokens, tokens - t);
        inputs.clear();
        for (int64_t s = 0; s < block; ++s)
          for (int64_t limb = 0; limb <= finer[t + s]; ++limb) inputs.push(images.at(2 * (t + s) + limb), s);
        std::fill_n(sums.data(), block * kStripRows, 0.0f);
        dot_codes(strip, count, inputs, sums.data(), kStripRows, scratch);
        for (int64_t s = 0; s < block; ++s)
          for (int64_t k = 0; k < count; ++k) {
            const float sum = sums[s * kStripRows + k];
            store(out, dtype, (t + s) * rows + r + k, bias == nullptr ? sum : sum + bias[r + k]);
          }
      }
    }
  }
};

}  // namespace

extern "C" {

// out [T, N] = x [T, K] times codes [N, K] by scales, bf16 [N], plus bias, fp32 [N] or null; x and out in dtype.
void resmoe_rows8(const int8_t* codes, const uint16_t* scales, const float* bias, const void* x, int64_t tokens,
                  int64_t rows, int64_t columns, void* out, int32_t dtype, int threads) {
  RowProducts({codes, scales, columns}, bias, x, tokens, rows, out, dtype).run(threads);
}
}
