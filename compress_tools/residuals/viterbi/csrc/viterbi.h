// The symbols of a row at least squared error, by the Viterbi algorithm over 4096 states (SPEC.md, 4).
//
// A state is the last 12 bits of symbols, the newest lowest. A history is a state without its oldest symbol: what is
// kept from one column to the next, for the oldest symbol is chosen as soon as it is the oldest. Of a state the cost is
// level**2 - 2 * x * level, that of (x - level)**2 less what all states have in common; level is a sum over the fields
// of the state, so that -2 * x * level is added to histories, and the squares come from a table.
//
// Rows bite their tails: what lies before the first column is what the last ones hold. A search over the columns around
// that seam, free at both ends, says what lies there; the search of the row begins and ends with it.
//
// Costs are whole numbers: the search is exact, and every processor finds the same symbols. In their lowest bits they
// carry the oldest symbol, so that the least cost says where it came from.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace resmoe {

constexpr int kStateBits = 12, kStates = 1 << kStateBits;
constexpr int kFractionBits = 5;           // of x, and of costs
constexpr int32_t kUnreachable = 1 << 29;  // more than any two histories differ by: see plain_torch.py
constexpr float kMostReweighted = 1 << 28;
constexpr float kMostOver = 1 << 27;
constexpr int32_t kHopeless = 1 << 28;
constexpr int64_t kReach = 64;  // columns on either side of the seam that decide what lies there

#ifdef __AVX512F__
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));

inline Lanes load(const int32_t* from) { return *(const Lanes*)from; }
inline Lanes lower(Lanes a, Lanes b) { return a < b ? a : b; }

template <int Bits>
struct Trellis {
  static constexpr int kField = Bits == 3 ? 3 : 4, kFields = kStateBits / kField, kEntries = 1 << kField;
  static constexpr int kSymbols = 1 << Bits, kHistories = kStates >> Bits, kMiddles = kHistories >> Bits;
  static constexpr int32_t kOldest = kSymbols - 1;                                      // mask of a cost's lowest bits
  static constexpr int kWidth = Bits == 3 ? 4 : Bits, kKept = kHistories * kWidth / 8;  // bytes a column

  alignas(64) int32_t squares[kSymbols][kSymbols][kMiddles];  // [newest][oldest][what lies between]
  int8_t tables[kFields][kEntries];
  int8_t levels[kStates];

  explicit Trellis(const int8_t* from) {
    memcpy(tables, from, sizeof tables);
    for (int state = 0; state < kStates; ++state) {
      int level = 0;
      for (int f = 0; f < kFields; ++f) level += tables[f][state >> kField * f & (kEntries - 1)];
      levels[state] = level;
      const int oldest = state >> (kStateBits - Bits), newest = state & (kSymbols - 1);
      squares[newest][oldest][state >> Bits & (kMiddles - 1)] = (level * level << kFractionBits) * kSymbols + oldest;
    }
  }

  // The bits of an index rotated: out[i * Radix + k] = in[k * (n / Radix) + i].
  template <int Radix>
  static void rotate(const int32_t* __restrict in, int32_t* __restrict out) {
    for (int i = 0; i < kHistories / Radix; ++i)
      for (int k = 0; k < Radix; ++k) out[Radix * i + k] = in[k * (kHistories / Radix) + i];
  }

  // added[h] = times * (what the fields within history h's lowest bits add up to), all fields but the oldest.
  static void add_fields(int32_t times, const int8_t (&tables)[kFields][kEntries], int32_t* added) {
    for (int i = 0; i < kEntries; ++i) added[i] = times * tables[0][i];
    int filled = kEntries;
    for (int f = 1; f < kFields - 1; ++f) {
      for (int e = kEntries - 1; e >= 0; --e) {
        const int32_t add = times * tables[f][e];
        for (int i = 0; i < filled; ++i) added[e * filled + i] = added[i] + add;
      }
      filled *= kEntries;
    }
    for (int i = filled; i < kHistories; ++i) added[i] = added[i - filled];
  }

  // next[newest][middle] = least over oldest of cost[oldest][middle] + squares
  void step(const int32_t* cost, int32_t* next) const {
    constexpr int kTogether = kSymbols < 4 ? kSymbols : 4;
    for (int m = 0; m < kMiddles; m += kLanes)
      for (int c = 0; c < kSymbols; c += kTogether) {
        Lanes best[kTogether];
        const Lanes first = load(cost + m);
#pragma GCC unroll 4
        for (int k = 0; k < kTogether; ++k) best[k] = first + load(&squares[c + k][0][m]);
#pragma GCC unroll 16
        for (int p = 1; p < kSymbols; ++p) {
          const Lanes from = load(cost + p * kMiddles + m);
#pragma GCC unroll 4
          for (int k = 0; k < kTogether; ++k) best[k] = lower(best[k], from + load(&squares[c + k][p][m]));
        }
#pragma GCC unroll 4
        for (int k = 0; k < kTogether; ++k) *(Lanes*)(next + (c + k) * kMiddles + m) = best[k];
      }
  }

  // Costs per unit of error change from one group of columns to the next.
  static void reweight(int32_t* cost, float ratio) {
    for (int h = 0; h < kHistories; ++h) {
      const float scaled = std::min(std::max((float)cost[h] * ratio, -kMostReweighted), kMostReweighted);
      cost[h] = (int32_t)std::nearbyint(scaled) & ~kOldest;
    }
  }

  // The same from one column to the next: over the least cost and bounded, since such ratios multiply up. See
  // plain_torch.py.
  static void reweight_column(int32_t* cost, float ratio) {
    int32_t least = cost[0];
    for (int h = 1; h < kHistories; ++h) least = std::min(least, cost[h]);
    for (int h = 0; h < kHistories; ++h) {
      const int32_t over = cost[h] - least;
      const int32_t scaled = (int32_t)std::nearbyint(std::min((float)over * ratio, kMostOver)) & ~kOldest;
      cost[h] = over >= kHopeless ? kUnreachable : scaled;
    }
  }

  // One row. x: [n], levels times 2**kFractionBits. ratios: for each group, what an error in the group before counts;
  // with group 0 for each column.
  struct Row {
    const int16_t* x;
    int64_t n, group;
    const float* ratios;
  };

  // One column: cost is that of histories, before and after it; keep: the oldest symbols of the best, packed.
  void advance(const Row& row, int64_t t, bool first, int32_t* cost, uint8_t* keep) const {
    alignas(64) int32_t next[kHistories], added[kHistories];
    if (!row.group) {
      if (!first) reweight_column(cost, row.ratios[t]);
    } else if (!first && t % row.group == 0 && row.ratios[t / row.group] != 1)
      reweight(cost, row.ratios[t / row.group]);
    const int32_t times = -2 * kSymbols * (int32_t)row.x[t];
    constexpr int kRun = kHistories / kEntries;
    for (int e = 0; e < kEntries; ++e) {
      const int32_t add = times * tables[kFields - 1][e];
      for (int i = 0; i < kRun; ++i) cost[e * kRun + i] += add;
    }
    step(cost, next);
    rotate<Bits == 3 ? 2 : Bits == 4 ? 4 : kSymbols>(next, cost);
    if constexpr (Bits > 2) rotate<4>(cost, next);
    const int32_t* found = Bits > 2 ? next : cost;
    for (int i = 0; i < kKept; ++i) {
      int32_t byte = 0;
#pragma GCC unroll 8
      for (int k = 0; k < 8 / kWidth; ++k) byte |= (found[k * kKept + i] & kOldest) << k * kWidth;
      keep[i] = byte;
    }
    add_fields(times, tables, added);
    const int32_t base = (found[0] & ~kOldest) + added[0];
    for (int h = 0; h < kHistories; ++h) cost[h] = (found[h] & ~kOldest) + (added[h] - base);
  }

  // The state of a column by the history after it.
  static int state_of(const uint8_t* keep, int history) {
    const int oldest = keep[history % kKept] >> (history / kKept * kWidth) & ((1 << kWidth) - 1);
    return oldest << (kStateBits - Bits) | history;
  }

  // What lies before the first column, by the `reach` last and the `reach` first ones.
  int seam(const Row& row, int64_t reach, uint8_t* kept) const {
    alignas(64) int32_t cost[kHistories] = {};
    for (int64_t k = 0; k < 2 * reach; ++k) advance(row, (row.n - reach + k) % row.n, k == 0, cost, kept + k * kKept);
    int history = std::min_element(cost, cost + kHistories) - cost;
    for (int64_t k = 2 * reach - 1; k >= reach; --k) history = state_of(kept + k * kKept, history) >> Bits;
    // A row shorter than a history is in it more than once.
    int whole = 0;
    for (int64_t age = 0; age < kStateBits / Bits - 1; ++age)
      whole |= (history >> age % row.n * Bits & (kSymbols - 1)) << age * Bits;
    return whole;
  }

  void search(const Row& row, uint8_t* symbols, int8_t* chosen, std::vector<uint8_t>& kept) const {
    const int64_t reach = std::min(kReach, (row.n + 1) / 2);
    kept.resize(std::max(row.n, 2 * reach) * kKept);
    const int ends = seam(row, reach, kept.data());
    alignas(64) int32_t cost[kHistories];
    std::fill(cost, cost + kHistories, kUnreachable);
    cost[ends] = 0;
    for (int64_t t = 0; t < row.n; ++t) advance(row, t, t == 0, cost, kept.data() + t * kKept);
    int history = ends;
    for (int64_t t = row.n - 1; t >= 0; --t) {
      const int state = state_of(kept.data() + t * kKept, history);
      symbols[t] = state & (kSymbols - 1);
      chosen[t] = levels[state];
      history = state >> Bits;
    }
  }
};

}  // namespace resmoe
