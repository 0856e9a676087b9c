// The correction of one teacher row in place: rotate the classes above the label, or swap the largest with the label.
//
// Only the classes above the label are touched. They are compacted, ordered by (value descending, index ascending) and
// shifted by one. A handful is ordered by insertion, some dozens by counting for each how many precede it, which vectors do
// at m^2 / 16 steps, more by a radix sort of as many passes as the keys' range has bytes: linear in the rank up to C.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "../row_math.h"
#include "row.h"

namespace sortkd {
inline namespace CPU_CAPABILITY {

// Measured where the next method overtakes: half of the entries' moves mispredict, and a radix pass clears and scans 256 bins.
constexpr int64_t kMaxInsertion = 12;
constexpr int64_t kMaxCounting = 192;
constexpr int kDigit = 9;

template <typename T>
struct Above {
  using Key = std::conditional_t<std::is_same_v<T, float>, uint32_t, uint64_t>;
  struct Entry {
    Key key;
    int32_t index;
  };
  std::vector<Entry> entries, spare;
};

// Indices ascending, so that a stable order by value breaks ties by the lower index.
template <typename T>
inline int64_t collect_above(const Row<T>& row, Above<T>& above, int64_t rank) {
  using V = Vec<T>;
  // Every write lands before its test, so one block past the last entry is written too.
  if (static_cast<int64_t>(above.entries.size()) < rank + V::size()) above.entries.resize(rank + V::size());
  auto* out = above.entries.data();
  int64_t count = 0;
  const V threshold(row.label_value);
  // No branch on a class: with the label in the middle it would be a coin toss for each.
  const auto collect = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      out[count] = {descending_key(row.logits[j]), static_cast<int32_t>(j)};
      count += row.logits[j] > row.label_value;
    }
  };
  if (row.sparse) {
    for (int64_t k = 0; k < row.breaks.count; ++k)
      collect(row.breaks.at[k], std::min<int64_t>(row.breaks.at[k] + V::size(), row.C));
    return count;
  }
  int64_t i = 0;
  for (; i + V::size() <= row.C && count < rank; i += V::size()) {
    if (lanes_above(V::loadu(row.logits + i), threshold)) collect(i, i + V::size());
  }
  if (count < rank) collect(i, row.C);
  return count;
}

template <typename T>
inline void insertion_sort(typename Above<T>::Entry* entries, int64_t count) {
  for (int64_t i = 1; i < count; ++i) {
    const auto moving = entries[i];
    int64_t j = i;
    for (; j > 0 && entries[j - 1].key > moving.key; --j) entries[j] = entries[j - 1];
    entries[j] = moving;
  }
}

// The place of each entry: how many larger values there are, and equal ones before it.
template <typename T>
inline void counting_sort(Above<T>& above, const T* row, int64_t count) {
  using V = Vec<T>;
  constexpr int64_t kWidth = V::size();
  alignas(64) T values[kMaxCounting + kWidth];
  const auto* entries = above.entries.data();
  for (int64_t i = 0; i < count; ++i) values[i] = row[entries[i].index];
  std::fill(values + count, values + count + kWidth, -std::numeric_limits<T>::infinity());
  if (static_cast<int64_t>(above.spare.size()) < count) above.spare.resize(above.entries.size());
  for (int64_t i = 0; i < count; ++i) {
    const V value(values[i]);
    const int64_t own = i / kWidth * kWidth;
    const uint32_t before = (1u << (i - own)) - 1;
    const V beside = V::loadu(values + own);
    int place = std::popcount(lanes_above(beside, value) | (lanes_not_below(beside, value) & before));
    for (int64_t j = 0; j < own; j += kWidth) place += std::popcount(lanes_not_below(V::loadu(values + j), value));
    for (int64_t j = own + kWidth; j < count; j += kWidth) place += std::popcount(lanes_above(V::loadu(values + j), value));
    above.spare[place] = entries[i];
  }
  above.entries.swap(above.spare);
}

template <typename T>
inline void order(Above<T>& above, const T* row, int64_t count) {
  using Key = typename Above<T>::Key;
  using Entry = typename Above<T>::Entry;
  if (count <= kMaxInsertion) return insertion_sort<T>(above.entries.data(), count);
  if (count <= kMaxCounting) return counting_sort(above, row, count);
  Entry* entries = above.entries.data();
  Key low = entries[0].key, high = low;
  for (int64_t i = 1; i < count; ++i) {
    low = std::min(low, entries[i].key);
    high = std::max(high, entries[i].key);
  }
  if (static_cast<int64_t>(above.spare.size()) < count) above.spare.resize(above.entries.size());
  // As few passes as digits of at most kDigit bits allow, and then digits no wider than they need: every bin is scanned.
  int bits = 0;
  while (bits < static_cast<int>(sizeof(Key)) * 8 && ((high - low) >> bits) != 0) ++bits;
  const int passes = (bits + kDigit - 1) / kDigit;
  const int digit = passes ? (bits + passes - 1) / passes : 0;
  const Key mask = (Key(1) << digit) - 1;
  constexpr int kPasses = (static_cast<int>(sizeof(Key)) * 8 + kDigit - 1) / kDigit;
  uint32_t starts[kPasses][1 << kDigit];
  for (int pass = 0; pass < passes; ++pass) std::fill(starts[pass], starts[pass] + mask + 1, 0);
  for (int64_t i = 0; i < count; ++i)
    for (int pass = 0; pass < passes; ++pass) ++starts[pass][((entries[i].key - low) >> (pass * digit)) & mask];
  Entry* from = entries;
  Entry* to = above.spare.data();
  for (int pass = 0; pass < passes; ++pass) {
    uint32_t* start = starts[pass];
    uint32_t sum = 0;
    for (Key bin = 0; bin <= mask; ++bin) sum += std::exchange(start[bin], sum);
    for (int64_t i = 0; i < count; ++i) to[start[((from[i].key - low) >> (pass * digit)) & mask]++] = from[i];
    std::swap(from, to);
  }
  if (from != entries) above.entries.swap(above.spare);
}

// The label takes the largest value, each class above it the next lower one.
template <typename T>
inline void rotate_top(const Row<T>& row, T* corrected, Above<T>& above, int64_t rank) {
  const int64_t count = collect_above(row, above, rank);
  order(above, row.logits, count);
  const auto* entries = above.entries.data();
  corrected[row.label] = row.logits[entries[0].index];
  T next = row.label_value;
  for (int64_t k = count - 1; k >= 0; --k) next = std::exchange(corrected[entries[k].index], next);
}

// The first of several largest is the one exchanged. NaN compares with nothing; the row's sums will tell.
template <typename T>
inline void swap_with_largest(const Row<T>& row, T* corrected) {
  int64_t top = row.label;
  const auto search = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (corrected[i] > corrected[top] || (corrected[i] == corrected[top] && i < top)) top = i;
  };
  if (row.sparse)
    for (int64_t k = 0; k < row.breaks.count; ++k)
      search(row.breaks.at[k], std::min<int64_t>(row.breaks.at[k] + Vec<T>::size(), row.C));
  else
    search(0, row.C);
  std::swap(corrected[top], corrected[row.label]);
}

// The row after the correction: itself with rank 0, for then the teacher was right; else a copy in `scratch`, which may be
// where the row already is.
template <typename T>
inline void correct(Row<T>& row, T* scratch, Above<T>& above, Correction correction, int64_t rank) {
  if (rank == 0 || correction == Correction::None) return;
  if (row.logits != scratch) std::copy(row.logits, row.logits + row.C, scratch);
  if (correction == Correction::Sort)
    rotate_top(row, scratch, above, rank);
  else
    swap_with_largest(row, scratch);
  row.logits = scratch;
  row.label_value = scratch[row.label];
}

}  // namespace CPU_CAPABILITY
}  // namespace sortkd
