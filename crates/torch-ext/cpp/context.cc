// Switches of libtorch as a whole: each function returns 0, or 1 with a message.

#include <ATen/Context.h>
#include <c10/core/GradMode.h>

#include "guarded.h"

extern "C" {

// Only algorithms that give the same again are used from here on; an operation that has none fails.
int unveil_context_deterministic(int on, char* message, size_t size) {
  return guarded(message, size, [&] {
    at::globalContext().setDeterministicAlgorithms(on != 0, /*warn_only=*/false);
    at::globalContext().setBenchmarkCuDNN(on == 0);
  });
}

// Whether the calling thread's operations are recorded for a backward pass where they meet what needs gradients.
int unveil_context_grad() { return c10::GradMode::is_enabled() ? 1 : 0; }
}
