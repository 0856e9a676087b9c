// The list of a row that is held, with both logits of its few entries: each entry looks at all others, and nothing is sorted,
// nor read from memory again.
#pragma once

#include "list.cuh"

namespace sortkd {
namespace cuda {

// A class above its label.
struct alignas(kNearBytes) Near {
  Entry<float> entry;
  float student, teacher;  // its logits, the teacher's as the correction makes it
};
static_assert(sizeof(Near) == kNearBytes);

template <Kind kind>
class NearList {
  const Group<kind>& group;
  int sent = 0;  // a cluster's lists until now

 public:
  Near* const entries;  // of a row of lanes, or of a block's row
  Near* const of_warp;  // what a block's warp has of them

  SORTKD_DEVICE NearList(const ListPlaces& places, const Group<kind>& group)
      : group(group),
        entries(reinterpret_cast<Near*>(shared_memory() + places.near) +
                (kind == Kind::Lanes ? group.slot * group.size * kNearEntries : 0)),
        of_warp(entries + (kind == Kind::Lanes ? 0 : kNearOfBlock + threadIdx.x / kWarp * kNearOfWarp)) {}
  SORTKD_DEVICE const Near& operator[](int at) const { return entries[at]; }

  // Gives an entry of n its corrected logit. Returns how many come before it.
  SORTKD_DEVICE int correct(int at, int n, Correction correction, float teacher_label) const {
    const Entry<float> own = entries[at].entry;
    auto next = Entry<float>::none();
    int before = 0;
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
      const Entry<float> other = entries[i].entry;
      before += other.before(own);
      if (own.before(other) && other.before(next)) next = other;
    }
    float t = own.value();
    if (correction == Correction::Sort) t = before + 1 < n ? next.value() : teacher_label;
    if (correction == Correction::Swap && before == 0) t = teacher_label;
    entries[at].teacher = t;
    return before;
  }

  // The entry of a class, or null.
  SORTKD_DEVICE const Near* find(int c, int n) const {
#pragma unroll 1
    for (int at = 0; at < n; ++at)
      if (entries[at].entry.c() == c) return entries + at;
    return nullptr;
  }

  // What the warps of a block's row have, together in each of its blocks, for the threads that lead: of all n entries this
  // warp has `own`, behind `before` others.
  SORTKD_DEVICE void gather(int own, int before, int n) {
    const int lane = static_cast<int>(lane_id());
    Near* const to = entries + before;
    if (group.blocks() > 1) {
      Mbarrier* const barrier = Group<kind>::mbarrier(kMbarriers - 1);
      if (threadIdx.x == 0) mbarrier_arrive_expect(barrier, n * kNearBytes);
      const int width = own > 8 ? 32 : 8, entry = lane % width;
#pragma unroll 1
      for (int block = lane / width; block < group.blocks(); block += 32 / width)
        if (entry < own) send_async(to + entry, of_warp[entry], barrier, static_cast<unsigned>(block));
      if (group.leads()) mbarrier_wait(barrier, sent++ & 1);
    } else {
      if (lane < own) to[lane] = of_warp[lane];
      __syncthreads();
    }
  }
};

}  // namespace cuda
}  // namespace sortkd
