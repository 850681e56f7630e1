// What tch lacks on a GPU, as C functions: each returns 0, or 1 with a message. Built into a library of its own, which is loaded at
// run time where there is a GPU.

#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/core/Event.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <memory>
#include <optional>

#include "guarded.h"

namespace {

// A graph that can take back a recording which could not be ended: libtorch leaves the allocator in the recording's pool then.
struct Recording : at::cuda::CUDAGraph {
  void abandon() noexcept {
    if (capture_ended_) return;
    try {
      c10::cuda::CUDACachingAllocator::endAllocateToPool(capture_dev_, mempool_id_);
      c10::cuda::CUDACachingAllocator::releasePool(capture_dev_, mempool_id_);
    } catch (...) {
      // It had not begun, or was over already.
    }
  }
};

// A captured graph and, while it is captured, the stream that captures.
struct Graph {
  Recording graph;
  std::optional<c10::cuda::CUDAStreamGuard> stream;
};

}  // namespace

extern "C" {

int unveil_graph_new(void** out, char* message, size_t size) {
  return guarded(message, size, [&] { *out = new Graph(); });
}

// What the calling thread does from here on goes into the graph and is not run.
int unveil_graph_begin(void* handle, int device, char* message, size_t size) {
  auto* self = static_cast<Graph*>(handle);
  return guarded(message, size, [&] {
    c10::cuda::set_device(static_cast<c10::DeviceIndex>(device));
    c10::cuda::device_synchronize();
    self->stream.emplace(c10::cuda::getStreamFromPool(false, static_cast<c10::DeviceIndex>(device)));
    try {
      // Other threads may allocate and wait meanwhile; only this one may not.
      self->graph.capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
    } catch (...) {
      self->graph.abandon();
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
      self->graph.abandon();
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

// Makes `device` the calling thread's own: what names no device means it.
int unveil_device_own(int device, char* message, size_t size) {
  return guarded(message, size, [&] { c10::cuda::set_device(static_cast<c10::DeviceIndex>(device)); });
}

// Bytes that libtorch's allocator has of a GPU's memory, and what of it tensors use.
int unveil_device_kept(int device, int64_t* reserved, int64_t* allocated, char* message, size_t size) {
  *reserved = *allocated = 0;
  return guarded(message, size, [&] {
    if (!c10::cuda::CUDACachingAllocator::get()->initialized()) return;
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(static_cast<c10::DeviceIndex>(device));
    constexpr auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    *reserved = stats.reserved_bytes[all].current;
    *allocated = stats.allocated_bytes[all].current;
  });
}

// Locks pages of host memory where they lie, so that the GPU copies to and from them by itself.
int unveil_host_lock(void* begin, size_t bytes, char* message, size_t size) {
  return guarded(message, size, [&] { C10_CUDA_CHECK(cudaHostRegister(begin, bytes, cudaHostRegisterPortable)); });
}

int unveil_host_unlock(void* begin, char* message, size_t size) {
  return guarded(message, size, [&] { C10_CUDA_CHECK(cudaHostUnregister(begin)); });
}

// A stream of high priority from libtorch's pool; makes `device` the calling thread's own. `raw` is the driver's handle.
int unveil_stream_new(int device, void** out, void** raw, char* message, size_t size) {
  return guarded(message, size, [&] {
    c10::cuda::set_device(static_cast<c10::DeviceIndex>(device));
    auto stream = c10::cuda::getStreamFromPool(true, static_cast<c10::DeviceIndex>(device));
    *raw = stream.stream();
    *out = new c10::cuda::CUDAStream(stream);
  });
}

void unveil_stream_free(void* handle) { delete static_cast<c10::cuda::CUDAStream*>(handle); }

// What is put on the stream from here on runs after all that the calling thread has put on its current stream.
int unveil_stream_follow(void* handle, char* message, size_t size) {
  auto* self = static_cast<c10::cuda::CUDAStream*>(handle);
  return guarded(message, size, [&] {
    c10::Event event(c10::DeviceType::CUDA);
    event.record(c10::cuda::getCurrentCUDAStream(self->device_index()).unwrap());
    event.block(self->unwrap());
  });
}

// The tensor's memory is not given to others before the stream's work of this moment has ended.
int unveil_stream_keep(void* handle, const void* tensor, char* message, size_t size) {
  auto* self = static_cast<c10::cuda::CUDAStream*>(handle);
  return guarded(message, size, [&] {
    const auto& storage = static_cast<const at::Tensor*>(tensor)->storage();
    c10::cuda::CUDACachingAllocator::recordStream(storage.data_ptr(), *self);
  });
}

// The point that the stream has reached when all of its work of this moment has ended.
int unveil_stream_mark(void* handle, void** out, char* message, size_t size) {
  auto* self = static_cast<c10::cuda::CUDAStream*>(handle);
  return guarded(message, size, [&] {
    auto event = std::make_unique<c10::Event>(c10::DeviceType::CUDA);
    event->record(self->unwrap());
    *out = event.release();
  });
}

int unveil_event_done(void* handle, int* done, char* message, size_t size) {
  return guarded(message, size, [&] { *done = static_cast<c10::Event*>(handle)->query() ? 1 : 0; });
}

// What the calling thread puts on its current stream from here on runs after the event.
int unveil_event_join(void* handle, char* message, size_t size) {
  auto* self = static_cast<c10::Event*>(handle);
  return guarded(message, size, [&] { self->block(c10::cuda::getCurrentCUDAStream(self->device_index()).unwrap()); });
}

void unveil_event_free(void* handle) { delete static_cast<c10::Event*>(handle); }
}
