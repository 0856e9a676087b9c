// What the row loop of an instruction set is told: a call, and where its row values go before they are reduced.
#pragma once

#include "../kernels.h"

namespace sortkd {

struct RowLoop {
  const LossArgs& args;
  void* kd;           // acc [N]
  void* ce;           // acc [N], or null
  double mean_scale;  // 1 / n of the mean, or 1
};

#define SORTKD_DECLARE_ROWS(CAPABILITY)                           \
  namespace CAPABILITY {                                          \
  void loss_rows(const RowLoop&, int64_t, int64_t, float);        \
  void loss_rows(const RowLoop&, int64_t, int64_t, double);       \
  void corrected_rows(const SortArgs&, int64_t, int64_t, float);  \
  void corrected_rows(const SortArgs&, int64_t, int64_t, double); \
  }

}  // namespace sortkd
