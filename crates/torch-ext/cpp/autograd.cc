// Backward passes that start from given gradients, as a C function: 0, or 1 with a message.

#include <torch/csrc/autograd/autograd.h>

#include "guarded.h"
#include "tensor_handle.h"

extern "C" {

// Runs the backward pass of `count` outputs from their gradients; the gradients of leaves accumulate in the leaves.
int unveil_backward(const void* const* outputs, const void* const* gradients, int64_t count, char* message, size_t size) {
  return guarded(message, size, [&] { torch::autograd::backward(tensors_of(outputs, count), tensors_of(gradients, count)); });
}
}
