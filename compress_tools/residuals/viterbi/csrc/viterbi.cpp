// The C ABI of viterbi.h.
#include "viterbi.h"

namespace {

template <int Bits>
void search_rows(const int8_t* tables, const int16_t* x, int64_t rows, int64_t columns, int64_t group,
                 const float* ratios, uint8_t* symbols, int8_t* levels) {
  const resmoe::Trellis<Bits> trellis(tables);
  const int64_t groups = group ? (columns + group - 1) / group : columns;
  std::vector<uint8_t> kept;
  for (int64_t r = 0; r < rows; ++r)
    trellis.search({x + r * columns, columns, group, ratios + r * groups}, symbols + r * columns, levels + r * columns,
                   kept);
}

}  // namespace

// x: [rows, columns]; ratios: [rows, groups], or with group 0 [rows, columns]; symbols, levels: [rows, columns]. 0, or
// 1 where bits is none of 1 to 4.
extern "C" int resmoe_trellis_search(int64_t bits, const int8_t* tables, const int16_t* x, int64_t rows,
                                     int64_t columns, int64_t group, const float* ratios, uint8_t* symbols,
                                     int8_t* levels) {
  switch (bits) {
    case 1:
      return search_rows<1>(tables, x, rows, columns, group, ratios, symbols, levels), 0;
    case 2:
      return search_rows<2>(tables, x, rows, columns, group, ratios, symbols, levels), 0;
    case 3:
      return search_rows<3>(tables, x, rows, columns, group, ratios, symbols, levels), 0;
    case 4:
      return search_rows<4>(tables, x, rows, columns, group, ratios, symbols, levels), 0;
    default:
      return 1;
  }
}
