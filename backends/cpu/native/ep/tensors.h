// Tensors over window memory, handed to torch as DLPack capsules.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "engine.h"

namespace hal_ep {

// The element types that tensors are made of; the values are known to the Python side.
enum class Element : int { bf16, f16, f32, u8, i32, i64 };

// A tensor that keeps its memory, and where given the use of it, alive. Strides in elements; none is contiguous.
nanobind::object tensor(const std::shared_ptr<Lease>& lease, const std::shared_ptr<int>& use, uint64_t at,
                        Element element, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides = {});

}  // namespace hal_ep
