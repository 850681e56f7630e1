// Tensors of tch across the C boundary: a handle is a pointer to an at::Tensor.
#pragma once

#include <ATen/ATen.h>

#include <vector>

inline const at::Tensor& tensor_of(const void* handle) { return *static_cast<const at::Tensor*>(handle); }

// The tensors behind `count` handles.
inline std::vector<at::Tensor> tensors_of(const void* const* handles, int64_t count) {
  std::vector<at::Tensor> out;
  out.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) out.push_back(tensor_of(handles[i]));
  return out;
}

// A new handle, which the caller owns.
inline void* new_handle(at::Tensor tensor) { return new at::Tensor(std::move(tensor)); }
