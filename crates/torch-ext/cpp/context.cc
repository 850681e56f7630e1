// Process-wide and per-thread switches of libtorch.

#include <ATen/Context.h>
#include <c10/core/GradMode.h>

#include "guarded.h"

extern "C" {

// Restricts libtorch to deterministic algorithms, or lifts the restriction; returns 0, or 1 with a message.
int unveil_context_deterministic(int on, char* message, size_t size) {
  return guarded(message, size, [&] {
    at::globalContext().setDeterministicAlgorithms(on != 0, /*warn_only=*/false);
    at::globalContext().setBenchmarkCuDNN(on == 0);
  });
}

// Allows or forbids TF32 in matrix products of fp32 operands on GPUs; returns 0, or 1 with a message.
int unveil_context_tf32(int on, char* message, size_t size) {
  return guarded(message, size, [&] { at::globalContext().setAllowTF32CuBLAS(on != 0); });
}

// Returns 1 if the calling thread's operations on tensors that need gradients are recorded for a backward pass.
int unveil_context_grad() { return c10::GradMode::is_enabled() ? 1 : 0; }
}
