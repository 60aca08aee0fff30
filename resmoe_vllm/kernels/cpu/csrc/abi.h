// What crosses the C ABI: structs that structs.py mirrors field by field, which struct_fields() lets it check.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>

namespace resmoe {

enum Dtype : int32_t { kFloat = 0, kBFloat16 = 1, kHalf = 2 };
enum Function : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu2 = 3 };

constexpr int kProjections = 3;
enum Projection { kGate = 0, kUp = 1, kDown = 2 };

struct Matrix {            // [E, rows, columns]
  const void* data;        // in the layer's dtype, or uint8 codes; null: there is none
  const uint16_t* scales;  // of codes: bf16 [E, rows, groups]
  int64_t stride;          // from one expert to the next: elements, or bytes of codes
  int64_t scales_stride;   // elements
  int64_t bits;            // of a code; 0: stored in the layer's dtype
  int64_t group;           // columns that share a scale, a multiple of 8; more than there are: the whole row
  const int8_t* tables;    // of trellis codes; null: codes are plain
};

struct Bitmap {                          // one part's pruned values, by projection
  const uint8_t* mask[kProjections];     // [E, I, mask_bytes]; null where the part does not cover it
  const int32_t* row_ptr[kProjections];  // [E, I]: a row's first value; null: every row has values_per_row
  const void* values[kProjections];      // in the layer's dtype [E, N], or codes
  const uint16_t* scales[kProjections];  // of codes: bf16 [E, I, groups]
  const int64_t* starts;                 // [E] first value, or byte of codes, of each expert; null: e * values_stride
  int64_t mask_stride[kProjections];     // bytes from one expert to the next
  int64_t row_ptr_stride[kProjections];  // elements
  int64_t values_stride[kProjections];   // elements, or bytes of codes
  int64_t scales_stride[kProjections];   // elements
  int64_t starts_stride;                 // elements
  int64_t readable[kProjections];        // elements, or bytes of codes, from values on: where reading must stop
  int64_t values_per_row;
  int64_t bits;   // of a code: 4 or 8; 0: values in the layer's dtype
  int64_t group;  // as in Matrix
};

struct LowRank {           // one part's factors
  Matrix u;                // [E, I, R]
  Matrix v[kProjections];  // [E, R, H]
  int64_t rank;
};

struct Quantized {            // one part of codes
  Matrix rows[kProjections];  // [E, I, H]
};

struct Activation {     // f(min(gate, limit)) * (clamp(up, -limit, limit) + beta); without a gate f(up)
  int32_t function;     // f
  int32_t gated;        // the fields below are for experts with a gate
  int32_t limit_after;  // gate's limit is that of f(gate)
  float limit;          // infinite: nothing is clamped
  float alpha;          // of SiLU: x * sigmoid(alpha * x)
  float beta;
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
  const void* bias[kProjections];     // [E, I], of down [E, H], in the layer's dtype; null: there is none
  int64_t bias_stride[kProjections];  // elements from one expert to the next
  Activation activation;
  int32_t dtype;
};

// One line for a field of a struct that crosses the ABI.
#define FIELD(Struct, field)                                                             \
  (std::string(#Struct "." #field " ") + std::to_string(offsetof(Struct, field)) + " " + \
   std::to_string(sizeof(Struct::field)) + "\n")

inline std::string struct_fields() {
  return FIELD(Matrix, data) + FIELD(Matrix, scales) + FIELD(Matrix, stride) + FIELD(Matrix, scales_stride) +
         FIELD(Matrix, bits) + FIELD(Matrix, group) + FIELD(Matrix, tables) + FIELD(Bitmap, mask) +
         FIELD(Bitmap, row_ptr) + FIELD(Bitmap, values) + FIELD(Bitmap, scales) + FIELD(Bitmap, starts) +
         FIELD(Bitmap, mask_stride) + FIELD(Bitmap, row_ptr_stride) + FIELD(Bitmap, values_stride) +
         FIELD(Bitmap, scales_stride) + FIELD(Bitmap, starts_stride) + FIELD(Bitmap, readable) +
         FIELD(Bitmap, values_per_row) + FIELD(Bitmap, bits) + FIELD(Bitmap, group) + FIELD(LowRank, u) +
         FIELD(LowRank, v) + FIELD(LowRank, rank) + FIELD(Quantized, rows) + FIELD(Activation, function) +
         FIELD(Activation, gated) + FIELD(Activation, limit_after) + FIELD(Activation, limit) +
         FIELD(Activation, alpha) + FIELD(Activation, beta) + FIELD(Layer, hidden) + FIELD(Layer, intermediate) +
         FIELD(Layer, experts) + FIELD(Layer, mask_bytes) + FIELD(Layer, center) + FIELD(Layer, low_rank) +
         FIELD(Layer, num_low_rank) + FIELD(Layer, bitmap) + FIELD(Layer, num_bitmap) + FIELD(Layer, quantized) +
         FIELD(Layer, num_quantized) + FIELD(Layer, bias) + FIELD(Layer, bias_stride) + FIELD(Layer, activation) +
         FIELD(Layer, dtype);
}
#undef FIELD

}  // namespace resmoe
