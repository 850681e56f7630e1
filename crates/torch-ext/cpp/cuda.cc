// What tch lacks on a GPU, as C functions: each returns 0, or 1 with a message. Built into a library of its own, which is loaded at
// run time where there is a GPU.

#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstddef>
#include <cstring>
#include <exception>
#include <optional>

namespace {

// A captured graph and, while it is captured, the stream that captures.
struct Graph {
  at::cuda::CUDAGraph graph;
  std::optional<c10::cuda::CUDAStreamGuard> stream;
};

template <class F>
int guarded(char* message, size_t size, F&& work) {
  try {
    work();
    return 0;
  } catch (const std::exception& error) {
    if (size > 0) {
      std::strncpy(message, error.what(), size - 1);
      message[size - 1] = 0;
    }
    return 1;
  }
}

}  // namespace

extern "C" {

int unveil_graph_new(void** out, char* message, size_t size) {
  return guarded(message, size, [&] { *out = new Graph(); });
}

// What the calling thread does from here on goes into the graph and is not run.
int unveil_graph_begin(void* handle, int device, char* message, size_t size) {
  auto* self = static_cast<Graph*>(handle);
  return guarded(message, size, [&] {
    c10::cuda::device_synchronize();
    self->stream.emplace(c10::cuda::getStreamFromPool(false, static_cast<c10::DeviceIndex>(device)));
    try {
      self->graph.capture_begin();
    } catch (...) {
      self->stream.reset();
      throw;
    }
  });
}

int unveil_graph_end(void* handle, char* message, size_t size) {
  auto* self = static_cast<Graph*>(handle);
  return guarded(message, size, [&] {
    try {
      self->graph.capture_end();
    } catch (...) {
      self->stream.reset();
      throw;
    }
    self->stream.reset();
  });
}

int unveil_graph_replay(void* handle, char* message, size_t size) {
  return guarded(message, size, [&] { static_cast<Graph*>(handle)->graph.replay(); });
}

void unveil_graph_free(void* handle) { delete static_cast<Graph*>(handle); }
}
