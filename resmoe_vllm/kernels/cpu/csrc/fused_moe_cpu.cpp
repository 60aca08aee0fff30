// The fused ResMoE layer on a CPU: weights are read once for each block of tokens, still compressed.
//
// Plain C ABI, no torch headers: resmoe_fused_moe() gets pointers (struct Layer in abi.h, mirrored in structs.py).
// Weights are bf16, fp16, fp32 or codes; sums and activations are fp32. Truth: fused_moe_ref in reference.py.

#include "layer.h"

using namespace resmoe;

extern "C" {

// x, out: [T, H] in x_dtype; ids: global experts [T, K]; weights: fp32 [T, K]; map: [global experts] -> local, or null.
// Returns 0, or 1 for an unknown dtype.
int resmoe_fused_moe(const Layer* layer, const void* x, int32_t x_dtype, int64_t tokens, const int32_t* ids,
                     const float* weights, int64_t top_k, const int32_t* map, void* out, int threads) {
  const Routing routing(ids, weights, tokens, top_k, map, layer->experts);
  std::vector<float> converted(x_dtype == kFloat ? 0 : tokens * layer->hidden);
  if (!converted.empty()) load_floats(x, x_dtype, 0, converted.size(), converted.data());
  const float* wide = x_dtype == kFloat ? (const float*)x : converted.data();
  switch (layer->dtype) {
    case kFloat:
      run<FP32>(*layer, wide, tokens, routing, out, x_dtype, threads);
      return 0;
    case kBFloat16:
      run<BF16>(*layer, wide, tokens, routing, out, x_dtype, threads);
      return 0;
    case kHalf:
      run<FP16>(*layer, wide, tokens, routing, out, x_dtype, threads);
      return 0;
  }
  return 1;
}

// Decode one bitmap row: for the self-test that runs when the library is loaded. bits: of codes, which have scales; or
// 0.
int resmoe_decode_row(int32_t dtype, int64_t bits, const uint8_t* mask, const void* values, const uint16_t* scales,
                      int64_t group, int64_t readable, int64_t n, float* out) {
  group = std::min(group, n);
  if (bits == 8)
    decode_row<Kept8>({mask, (const uint8_t*)values, readable, scales, group}, n, out);
  else if (bits == 4)
    decode_row<Kept4>({mask, {(const uint8_t*)values, 0}, readable, scales, group}, n, out);
  else if (dtype == kFloat)
    decode_row<FP32>({mask, (const float*)values, readable, nullptr, n}, n, out);
  else if (dtype == kBFloat16)
    decode_row<BF16>({mask, (const uint16_t*)values, readable, nullptr, n}, n, out);
  else if (dtype == kHalf)
    decode_row<FP16>({mask, (const uint16_t*)values, readable, nullptr, n}, n, out);
  else
    return 1;
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
