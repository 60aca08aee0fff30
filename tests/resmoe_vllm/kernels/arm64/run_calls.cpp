// Runs calls of the kernels that emulator.py wrote. Arguments: pairs of files, a call and where its result goes.
//
// A call is kCall, the number of pointers in the memory image, ten arguments, where those pointers stand, and the
// image. Pointers are offsets in it; those of a null pointer are not listed, an argument's is -1.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "abi.h"

extern "C" {
int resmoe_fused_moe(const resmoe::Layer*, const void*, int32_t, int64_t, const int32_t*, const float*, int64_t,
                     const int32_t*, void*, int);
void resmoe_rows8(const int8_t*, const uint16_t*, const float*, const void*, int64_t, int64_t, int64_t, void*, int32_t,
                  int);
}

namespace {

enum { kLayer = 0, kRows8 = 1 };
constexpr int kHead = 12;
constexpr size_t kAligned = 64;

std::vector<uint8_t> read_all(const char* path) {
  std::vector<uint8_t> bytes;
  FILE* file = fopen(path, "rb");
  if (!file) return bytes;
  uint8_t part[1 << 16];
  for (size_t n; (n = fread(part, 1, sizeof part, file)) > 0;) bytes.insert(bytes.end(), part, part + n);
  fclose(file);
  return bytes;
}

int run(const char* call, const char* result) {
  const std::vector<uint8_t> bytes = read_all(call);
  if (bytes.size() < 8 * kHead) return fprintf(stderr, "%s: cannot be read\n", call), 1;
  int64_t head[kHead];
  memcpy(head, bytes.data(), sizeof head);
  const int64_t* const a = head + 2;
  std::vector<int64_t> pointers(head[1]);
  const size_t begin = sizeof head + 8 * pointers.size(), size = bytes.size() - begin;
  memcpy(pointers.data(), bytes.data() + sizeof head, 8 * pointers.size());
  uint8_t* image = (uint8_t*)aligned_alloc(kAligned, (size + kAligned) / kAligned * kAligned);
  memcpy(image, bytes.data() + begin, size);
  for (int64_t at : pointers) {
    uint64_t own;
    memcpy(&own, image + at, 8);
    own += (uint64_t)image;
    memcpy(image + at, &own, 8);
  }
  const auto at = [&](int64_t offset) { return offset < 0 ? nullptr : (const void*)(image + offset); };
  std::vector<uint8_t> out(a[7]);
  int failed = 0;
  if (head[0] == kLayer)
    failed = resmoe_fused_moe((const resmoe::Layer*)at(a[0]), at(a[1]), (int32_t)a[2], a[3], (const int32_t*)at(a[4]),
                              (const float*)at(a[5]), a[6], nullptr, out.data(), (int)a[8]);
  else
    resmoe_rows8((const int8_t*)at(a[0]), (const uint16_t*)at(a[1]), (const float*)at(a[2]), at(a[3]), a[4], a[5], a[6],
                 out.data(), (int32_t)a[9], (int)a[8]);
  free(image);
  FILE* file = fopen(result, "wb");
  if (!file || fwrite(out.data(), 1, out.size(), file) != out.size() || fclose(file) || failed)
    return fprintf(stderr, "%s: failed\n", result), 1;
  return 0;
}

}  // namespace

int main(int count, char** names) {
  for (int i = 1; i + 1 < count; i += 2)
    if (run(names[i], names[i + 1])) return 1;
  return 0;
}
