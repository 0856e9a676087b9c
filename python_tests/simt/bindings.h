// The harness's settings for Python; each extension module has its own.
#pragma once

#include <pybind11/pybind11.h>

#include "settings.h"

namespace simt {

inline void bind_settings(pybind11::module_& module) {
  pybind11::enum_<Order>(module, "Order", pybind11::module_local())
      .value("forward", Order::Forward)
      .value("backward", Order::Backward)
      .value("shuffled", Order::Shuffled);
  pybind11::class_<Settings>(module, "Settings", pybind11::module_local())
      .def_readwrite("order", &Settings::order)
      .def_readwrite("seed", &Settings::seed)
      .def_readwrite("multiprocessors", &Settings::multiprocessors)
      .def_readwrite("shared_opt_in", &Settings::shared_opt_in)
      .def_readwrite("seconds", &Settings::seconds);
  module.attr("settings") = pybind11::cast(&settings, pybind11::return_value_policy::reference);
}

}  // namespace simt
