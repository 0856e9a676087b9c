// The list of a row: the classes above its label, and of a top-k teacher the k. In shared memory; in device memory
// where they are more than it holds, which only launches of their own see.
#pragma once

#include "choices.h"

namespace sortkd {
namespace cuda {

// A class and its value, smaller where it comes first: value descending, then class ascending. No two are equal.
template <typename T>
struct Entry;

template <>
struct Entry<float> {
  uint64_t word;
  static SORTKD_DEVICE Entry of(float value, int c) {
    return {static_cast<uint64_t>(descending_key(value)) << 32 | static_cast<unsigned>(c)};
  }
  SORTKD_DEVICE uint32_t key() const { return static_cast<uint32_t>(word >> 32); }
  SORTKD_DEVICE float value() const { return __uint_as_float(descending_bits(key())); }
  SORTKD_DEVICE int c() const { return static_cast<int>(word); }
  SORTKD_DEVICE bool before(const Entry& other) const { return word < other.word; }
  static SORTKD_DEVICE Entry none() { return {~uint64_t{0}}; }  // behind all others
  // The class with another number in the value's place, as it is.
  SORTKD_DEVICE Entry with(float number) const {
    return {static_cast<uint64_t>(__float_as_uint(number)) << 32 | static_cast<uint32_t>(word)};
  }
  SORTKD_DEVICE float number() const { return __uint_as_float(key()); }
};

template <>
struct Entry<double> {
  uint64_t key, index;
  static SORTKD_DEVICE Entry of(double value, int c) { return {descending_key(value), static_cast<uint64_t>(c)}; }
  SORTKD_DEVICE double value() const { return __longlong_as_double(static_cast<long long>(descending_bits(key))); }
  SORTKD_DEVICE int c() const { return static_cast<int>(index); }
  SORTKD_DEVICE bool before(const Entry& other) const { return key < other.key || (key == other.key && index < other.index); }
  SORTKD_DEVICE Entry with(double number) const { return {static_cast<uint64_t>(__double_as_longlong(number)), index}; }
  SORTKD_DEVICE double number() const { return __longlong_as_double(static_cast<long long>(key)); }
};

// A bitonic network of comparisons that all put the smaller entry first: places beyond n hold infinity, which never
// moves.
template <typename T, typename G>
SORTKD_DEVICE void sort_by_exchanges(Entry<T>* entries, int n, const G& group) {
  const int member = group.member, size = group.size;
  // Columns have a barrier of the whole block for each step, and seldom more entries of a row than threads.
  if constexpr (std::is_same_v<G, Group<Kind::Columns>>)
    if (!group.any(n > size)) {
      Entry<T> own{};
      int before = 0;
      if (member < n) own = entries[member];
#pragma unroll 1
      for (int i = 0; i < n; ++i) before += entries[i].before(own);
      group.sync();
      if (member < n) entries[before] = own;
      group.sync();
      return;
    }
  // All pairs of an entry, in the lower half of a stretch of 2 * distance, and the other entry at its place ^ mask.
  const auto exchange = [&](int distance, int mask) {
#pragma unroll 1
    for (int pair = member, low; (low = 2 * pair - (pair & (distance - 1))) < n; pair += size) {
      const int high = low ^ mask;
      if (high >= n) continue;
      const Entry<T> a = entries[low], b = entries[high];
      if (b.before(a)) entries[low] = b, entries[high] = a;
    }
    group.sync();
  };
#pragma unroll 1
  for (int run = 1; group.any(run < n); run *= 2) {
#pragma unroll 1
    for (int distance = run, mask = 2 * run - 1; distance >= 1; distance /= 2, mask = distance) exchange(distance, mask);
  }
}

constexpr int kDigits = 256;
constexpr int histogram_bytes(int threads) { return (threads / 32 + 1) * kDigits * static_cast<int>(sizeof(int)); }

// A radix sort from the last digit, by a block: each warp keeps the order within a stretch of its own. Digits that all
// entries share, as most are of halves and of few classes, are left out. Four entries of a thread are under way at a
// time. `first_bit`: 0, or of the key where the classes are in order. Returns where the entries are in order.
SORTKD_DEVICE Entry<float>* sort_by_digits(Entry<float>* from, Entry<float>* to, int n, int* histogram, int first_bit) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), warps = threads / 32;
  const int warp = thread / 32, lane = thread % 32;
  const int stretch = (n + threads - 1) / threads * 32, begin = min(n, warp * stretch), end = min(n, begin + stretch);
  int* const mine = histogram + (warp + 1) * kDigits;
  // f(entry, whether there is one), by all lanes of the warp.
  const auto each = [&](auto&& f) {
#pragma unroll 1
    for (int first = begin + lane; first - lane < end; first += 4 * 32) {
      Entry<float> some[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) some[k] = first + 32 * k < end ? from[first + 32 * k] : Entry<float>{};
#pragma unroll
      for (int k = 0; k < 4; ++k) f(some[k], first + 32 * k < end);
    }
  };
  uint64_t differs = 0;
  each([&](const Entry<float>& e, bool held) { differs |= held ? e.word ^ from[0].word : 0; });
#pragma unroll 1
  for (int shift = first_bit; shift < 64; shift += 8) {
    const auto digit_of = [&](const Entry<float>& e) { return static_cast<int>(e.word >> shift & (kDigits - 1)); };
    if (!__syncthreads_or((differs >> shift & (kDigits - 1)) != 0)) continue;
#pragma unroll 1
    for (int i = thread; i < (warps + 1) * kDigits; i += threads) histogram[i] = 0;
    __syncthreads();
    each([&](const Entry<float>& e, bool held) {
      if (held) atomicAdd(mine + digit_of(e), 1);
    });
    __syncthreads();
#pragma unroll 1
    for (int digit = thread; digit < kDigits; digit += threads) {
      int before = 0;
      for (int w = 1; w <= warps; ++w) {
        const int counted = histogram[w * kDigits + digit];
        histogram[w * kDigits + digit] = before;
        before += counted;
      }
      histogram[digit] = before;
    }
    __syncthreads();
    if (warp == 0) {
      int own = 0;
      for (int d = 0; d < kDigits / 32; ++d) own += histogram[lane * (kDigits / 32) + d];
      int before = warp_prefix(own) - own;
      for (int d = 0; d < kDigits / 32; ++d) {
        int& place = histogram[lane * (kDigits / 32) + d];
        const int counted = place;
        place = before;
        before += counted;
      }
    }
    __syncthreads();
    each([&](const Entry<float>& e, bool held) {
      const int digit = held ? digit_of(e) : kDigits;
      const unsigned peers = __match_any_sync(kFullMask, digit);
      const int before = __popc(peers & ((1u << lane) - 1));
      if (held) to[histogram[digit] + mine[digit] + before] = e;
      __syncwarp();
      if (held && before == 0) mine[digit] += __popc(peers);
      __syncwarp();
    });
    __syncthreads();
    Entry<float>* const ordered = to;
    to = from;
    from = ordered;
  }
  return from;
}

// Shared memory for what some thread of a block has for all of them.
constexpr int kNoteBytes = 112;

// Where the launch has put the lists: pointers would take registers.
struct ListPlaces {
  int counts, entries, histogram, notes,
      present;  // bytes from the start of shared memory; the table of values has the histogram's, top-k teachers `present`
  int room;     // entries of a list
  int near;     // bytes from the start of shared memory, of rows that are held: of the lists with few entries
  // For each block two lists of so many entries, in a launch whose lists may be long, or places by value; else null.
  char* in_device;
  int long_room;  // entries of two lists in shared memory, in such a launch
  float* moved;   // and for each of its blocks, by class, the corrected logits of those on its list
};

template <typename T, Kind kind, bool kMayBeInDevice>
struct List {
  const ListPlaces& places;
  const Group<kind>& group;
  Entry<T>*own, *spare;  // in a launch whose lists may be long: where the entries are, and room for as many

  // `expected`: the most entries that a list of such a launch has.
  SORTKD_DEVICE List(const ListPlaces& places, const Group<kind>& group, int expected = 0)
      : places(places), group(group), own(nullptr), spare(nullptr) {
    if constexpr (kMayBeInDevice) {
      if (!places.in_device) return;
      const bool fits = expected <= places.long_room;
      own = fits ? in_shared()
                 : reinterpret_cast<Entry<T>*>(places.in_device) + 2 * static_cast<int64_t>(blockIdx.x) * places.room;
      spare = own + (fits ? places.long_room : places.room);
    }
  }
  SORTKD_DEVICE Entry<T>* in_shared() const { return reinterpret_cast<Entry<T>*>(shared_memory() + places.entries); }
  SORTKD_DEVICE int* count() const { return reinterpret_cast<int*>(shared_memory() + places.counts) + group.slot; }
  SORTKD_DEVICE Entry<T>* entries() const { return kMayBeInDevice && own ? own : in_shared() + group.slot * places.room; }
  SORTKD_DEVICE Entry<T>& operator[](int at) const { return entries()[at]; }

  // The caller has a barrier before any thread appends.
  SORTKD_DEVICE void clear() const {
    if (group.member == 0) *count() = 0;
  }
  SORTKD_DEVICE void put(int at, T value, int c) const { entries()[at] = Entry<T>::of(value, c); }
  // Beyond its room the list only counts.
  SORTKD_DEVICE void append(T value, int c) const {
    const int at = atomicAdd(count(), 1);
    if (at < places.room) put(at, value, c);
  }
  // The classes whose value is above the threshold, in their order, by a block: each warp has a stretch of them, each lane
  // eight neighbours at a time. With barriers before and after.
  template <typename F>
  SORTKD_DEVICE void collect(Group<kind>& block, int C, T threshold, F&& value_of) const {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int stretch = (C + 8 * threads - 1) / (8 * threads) * (8 * 32), begin = thread / 32 * stretch;
    const int end = min(C, begin + stretch);
    int next = 0;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {  // counts them; puts them
      int higher = 0;
#pragma unroll 1
      for (int first = begin + thread % 32 * 8; first - thread % 32 * 8 < end; first += 8 * 32) {
        T values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = first + i < end ? value_of(first + i) : threshold;
        int own = 0;
#pragma unroll
        for (const T value : values) own += value > threshold;
        higher += own;
        if (pass == 0) continue;
        const int through = warp_prefix(own);
        int at = next + through - own;
        next += __shfl_sync(kFullMask, through, 31);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (values[i] > threshold) put(at++, values[i], first + i);
      }
      if (pass == 1) break;
      const auto places = block.places_of(higher);
      next = __shfl_sync(kFullMask, places.first, 0);
      if (thread == 0) *count() = places.all;
    }
    __syncthreads();
  }
  // The value that the correction gives to an entry: of those above the label, each takes the next one's.
  SORTKD_DEVICE T corrected(int at, Correction correction, int above, T label) const {
    if (correction == Correction::Sort && at < above) return at + 1 < above ? entries()[at + 1].value() : label;
    return correction == Correction::Swap && at == 0 && above > 0 ? label : entries()[at].value();
  }
  // f(at) in the place of each entry's value, which it may read until then, as the next one's. By all threads of the row.
  template <typename F>
  SORTKD_DEVICE void replace_values(int n, F&& f) const {
#pragma unroll 1
    for (int first = 0; group.any(first < n); first += group.size) {
      const int at = first + group.member;
      T number = 0;
      if (at < n) number = f(at);
      group.sync();
      if (at < n) entries()[at] = entries()[at].with(number);
    }
  }
  // By all threads of the row; `collected`: it is in the order of the classes.
  SORTKD_DEVICE void put_in_order(int n, bool collected = false) {
    if constexpr (std::is_same_v<T, float> && kMayBeInDevice) {
      if (own) {
        Entry<T>* const ordered =
            sort_by_digits(own, spare, n, reinterpret_cast<int*>(shared_memory() + places.histogram), collected ? 32 : 0);
        if (ordered == spare) spare = own, own = ordered;
        return;
      }
    }
    sort_by_exchanges(entries(), n, group);
  }
};

}  // namespace cuda
}  // namespace sortkd
