// The correction of a row of halves with many classes above its label, by a table of their values, of which there can be
// 65,536: which values occur, how many larger ones do, and which class of each moves, for of equal logits one does. Nothing is
// sorted, and a row is read in the order of its classes alone.
#pragma once

#include "list.cuh"

namespace sortkd {
namespace cuda {

template <typename X>
class ValueTable {
  struct Place {
    int c;        // the class that moves, as mover() has it
    float value;  // its corrected logit
  };
  static_assert(sizeof(Place) == kPlaceBytes);
  static constexpr int kWords = kHalves / 32;

  const ListPlaces& list;
  Correction correction = Correction::None;
  Place* places = nullptr;

  SORTKD_DEVICE unsigned* bits() const { return reinterpret_cast<unsigned*>(shared_memory() + list.histogram); }
  SORTKD_DEVICE int* before() const { return reinterpret_cast<int*>(bits() + kWords); }  // of each word of bits
  SORTKD_DEVICE float* largest() const { return reinterpret_cast<float*>(shared_memory() + list.notes); }
  static SORTKD_DEVICE unsigned key_of(float value) {
    return descending_bits<unsigned, 16>(narrowed<X>(value + 0.0f).bits);  // -0 and +0 are equal
  }
  static SORTKD_DEVICE float value_of(unsigned key) {
    return widened(X{static_cast<unsigned short>(descending_bits<unsigned, 16>(key))});
  }
  SORTKD_DEVICE int place_of(float value) const {
    const unsigned key = key_of(value), word = key / 32;
    return before()[word] + __popc(bits()[word] & ((1u << key % 32) - 1));
  }
  // Of classes with one value the largest of these moves: sorted the last class, swapped the first.
  SORTKD_DEVICE int mover(int c) const { return correction == Correction::Sort ? c : ~c; }

 public:
  float top = 0;  // the label's corrected logit

  SORTKD_DEVICE explicit ValueTable(const ListPlaces& list) : list(list) {}

  // By a block. each(f) calls f(logit, class) for the thread's classes above the label, `label` is the teacher's logit there.
  template <typename F>
  SORTKD_DEVICE void build(Group<Kind::Block>& group, Correction how, float label, F&& each) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    correction = how;
    __syncthreads();  // the row before is done
#pragma unroll 1
    for (int w = thread; w < kWords; w += threads) bits()[w] = 0;
    __syncthreads();
    each([&](float value, int) {
      const unsigned key = key_of(value), bit = 1u << key % 32;
      if (!(bits()[key / 32] & bit)) atomicOr(bits() + key / 32, bit);
    });
    __syncthreads();
    const int words = (kWords + threads - 1) / threads, first = min(kWords, thread * words), end = min(kWords, first + words);
    int own = 0;
#pragma unroll 1
    for (int w = first; w < end; ++w) own += __popc(bits()[w]);
    const auto in_order = group.places_of(own);
    places =
        reinterpret_cast<Place*>(in_order.all <= list.long_room ? shared_memory() + list.entries
                                                                : list.in_device + static_cast<int64_t>(blockIdx.x) *
                                                                                       kPlaceBytes * min(list.room, kHalves));
    int at = in_order.first;
#pragma unroll 1
    for (int w = first; w < end; ++w) {
      before()[w] = at;
      at += __popc(bits()[w]);
    }
    __syncthreads();
    // A word by a warp: most are empty, and those that are not lie together.
    const int lane = thread % 32;
#pragma unroll 1
    for (int from = thread - lane; from < kWords; from += threads) {
#pragma unroll 1
      for (unsigned some = __ballot_sync(kFullMask, bits()[from + lane]); some; some &= some - 1) {
        const int word = from + __ffs(static_cast<int>(some)) - 1;
        if (!(bits()[word] >> lane & 1)) continue;
        const float value = value_of(static_cast<unsigned>(word * 32 + lane));
        const int place = place_of(value);
        places[place].c = std::numeric_limits<int>::min();
        if (place == 0) *largest() = value;
        if (place > 0 && correction == Correction::Sort) places[place - 1].value = value;
        if (place == in_order.all - 1 || correction == Correction::Swap) places[place].value = label;
      }
    }
    __syncthreads();
    top = *largest();
    if (correction != Correction::None)
      each([&](float value, int c) {
        const int at = place_of(value);
        if (correction == Correction::Sort || at == 0) atomicMax(&places[at].c, mover(c));
      });
    __syncthreads();
  }

  // Of a class above the label.
  SORTKD_DEVICE float corrected(float value, int c) const {
    const Place& place = places[place_of(value)];
    return place.c == mover(c) ? place.value : value;
  }
};

}  // namespace cuda
}  // namespace sortkd
