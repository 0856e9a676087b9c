// The tensors of a call as rows of classes, for the kernels of both devices.
#pragma once

#include <ATen/ATen.h>

#include "ops.h"
#include "options.h"

namespace sortkd {

struct Rows {
  at::Tensor student, teacher, target;
  Layout layout;
  bool class_last;  // the classes were, or were moved, to the last dimension
};

// Rows without a copy where the memory allows it: classes last, or one dimension in the middle; channels_last logits
// are rows already.
inline Rows as_rows(const LossTensors& tensors, int64_t class_dim) {
  const auto& student = tensors.student;
  const int64_t C = student.size(class_dim);
  const bool top_k = tensors.teacher_indices.has_value();
  Rows rows;
  rows.class_last = class_dim == student.dim() - 1 || student.movedim(class_dim, -1).is_contiguous();
  const auto laid_out = [&](const at::Tensor& t) {
    return rows.class_last && class_dim != t.dim() - 1 ? t.movedim(class_dim, -1).contiguous() : t.contiguous();
  };
  rows.student = laid_out(student);
  rows.teacher = top_k ? tensors.teacher.contiguous() : laid_out(tensors.teacher);
  rows.target = tensors.target.contiguous();
  int64_t inner = 1;
  if (!rows.class_last)
    for (int64_t d = class_dim + 1; d < student.dim(); ++d) inner *= student.size(d);
  rows.layout = {inner ? rows.target.numel() / inner : 0, C, inner};
  return rows;
}

}  // namespace sortkd
