// What the files that face Python share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>

#include "model.hpp"

namespace nb = nanobind;

namespace sage {

template <class T>
using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <class T>
using Inout = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class T>
nb::object new_array(std::initializer_list<size_t> shape, T** data) {
  size_t n = 1;
  for (size_t s : shape) n *= s;
  *data = new T[n ? n : 1];
  nb::capsule owner(*data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T>(*data, shape.size(), shape.begin(), owner));
}

KvFormat kv_format_of(const std::string& name);

// `row` is a sagellm_backend.base.RowSampling.
RowParams row_from(const nb::handle& row, int vocab);

void bind_probe(nb::module_& m);  // probe.cpp

}  // namespace sage
