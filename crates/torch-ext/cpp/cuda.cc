// What tch lacks on a GPU, as C functions. Each returns 0, or 1 with a message. A separate library, which is loaded at run time if
// there is a GPU.

#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/core/Event.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <memory>
#include <optional>
#include <tuple>

#include "guarded.h"

namespace {

// A graph that can undo a recording that failed to end, after which libtorch leaves the allocator in the recording's memory pool.
struct Recording : at::cuda::CUDAGraph {
  void abandon() noexcept {
    if (capture_ended_) return;
    try {
      c10::cuda::CUDACachingAllocator::endAllocateToPool(capture_dev_, mempool_id_);
      c10::cuda::CUDACachingAllocator::releasePool(capture_dev_, mempool_id_);
    } catch (...) {
      // The recording had not begun, or had ended already.
    }
  }
};

// A graph and, while it is being captured, the capturing stream.
struct Graph {
  Recording graph;
  std::optional<c10::cuda::CUDAStreamGuard> stream;
};

// The stream on which the calling thread captures on a device: cuBLAS keeps a workspace for each stream.
c10::cuda::CUDAStream capture_stream(c10::DeviceIndex device) {
  thread_local std::map<c10::DeviceIndex, c10::cuda::CUDAStream> streams;
  const auto found = streams.find(device);
  if (found != streams.end()) return found->second;
  return streams.emplace(device, c10::cuda::getStreamFromPool(false, device)).first->second;
}

}  // namespace

extern "C" {

int unveil_graph_new(void** out, char* message, size_t size) {
  return guarded(message, size, [&] { *out = new Graph(); });
}

// A memory pool for graphs that are never replayed at the same time, as the two numbers that name it.
int unveil_graph_pool(uint64_t* first, uint64_t* second, char* message, size_t size) {
  return guarded(message, size, [&] { std::tie(*first, *second) = at::cuda::graph_pool_handle(); });
}

// Records the calling thread's later work in the graph, without running it; its memory comes from a pool of unveil_graph_pool.
int unveil_graph_begin(void* handle, int device, uint64_t first, uint64_t second, char* message, size_t size) {
  auto* self = static_cast<Graph*>(handle);
  return guarded(message, size, [&] {
    c10::cuda::set_device(static_cast<c10::DeviceIndex>(device));
    c10::cuda::device_synchronize();
    self->stream.emplace(capture_stream(static_cast<c10::DeviceIndex>(device)));
    try {
      // Other threads may allocate and synchronise meanwhile; only this one may not.
      self->graph.capture_begin({first, second}, cudaStreamCaptureModeThreadLocal);
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

// Makes `device` the calling thread's current GPU.
int unveil_gpu_select(int device, char* message, size_t size) {
  return guarded(message, size, [&] { c10::cuda::set_device(static_cast<c10::DeviceIndex>(device)); });
}

// Bytes of a GPU's memory that libtorch's allocator has reserved, and the part of them that tensors use.
int unveil_gpu_allocator_memory(int device, int64_t* reserved, int64_t* allocated, char* message, size_t size) {
  *reserved = *allocated = 0;
  return guarded(message, size, [&] {
    if (!c10::cuda::CUDACachingAllocator::get()->initialized()) return;
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(static_cast<c10::DeviceIndex>(device));
    constexpr auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    *reserved = stats.reserved_bytes[all].current;
    *allocated = stats.allocated_bytes[all].current;
  });
}

// Page-locks host memory in place, so that the GPU copies to and from it directly.
int unveil_host_pin(void* begin, size_t bytes, char* message, size_t size) {
  return guarded(message, size, [&] { C10_CUDA_CHECK(cudaHostRegister(begin, bytes, cudaHostRegisterPortable)); });
}

int unveil_host_unpin(void* begin, char* message, size_t size) {
  return guarded(message, size, [&] { C10_CUDA_CHECK(cudaHostUnregister(begin)); });
}

// A high-priority stream from libtorch's pool; makes `device` the calling thread's current GPU. `raw` is the driver's handle.
int unveil_stream_new(int device, void** out, void** raw, char* message, size_t size) {
  return guarded(message, size, [&] {
    c10::cuda::set_device(static_cast<c10::DeviceIndex>(device));
    auto stream = c10::cuda::getStreamFromPool(true, static_cast<c10::DeviceIndex>(device));
    *raw = stream.stream();
    *out = new c10::cuda::CUDAStream(stream);
  });
}

void unveil_stream_free(void* handle) { delete static_cast<c10::cuda::CUDAStream*>(handle); }

// Makes later work on the stream wait for all work that is now on the calling thread's current stream.
int unveil_stream_wait_current(void* handle, char* message, size_t size) {
  auto* self = static_cast<c10::cuda::CUDAStream*>(handle);
  return guarded(message, size, [&] {
    c10::Event event(c10::DeviceType::CUDA);
    event.record(c10::cuda::getCurrentCUDAStream(self->device_index()).unwrap());
    event.block(self->unwrap());
  });
}

// Keeps the tensor's memory from being reused before all work that is now on the stream has ended.
int unveil_stream_record_use(void* handle, const void* tensor, char* message, size_t size) {
  auto* self = static_cast<c10::cuda::CUDAStream*>(handle);
  return guarded(message, size, [&] {
    const auto& storage = static_cast<const at::Tensor*>(tensor)->storage();
    c10::cuda::CUDACachingAllocator::recordStream(storage.data_ptr(), *self);
  });
}

// Records an event that is reached when all work that is now on the stream has ended.
int unveil_stream_record_event(void* handle, void** out, char* message, size_t size) {
  auto* self = static_cast<c10::cuda::CUDAStream*>(handle);
  return guarded(message, size, [&] {
    auto event = std::make_unique<c10::Event>(c10::DeviceType::CUDA);
    event->record(self->unwrap());
    *out = event.release();
  });
}

int unveil_event_query(void* handle, int* done, char* message, size_t size) {
  return guarded(message, size, [&] { *done = static_cast<c10::Event*>(handle)->query() ? 1 : 0; });
}

// Makes later work on the calling thread's current stream wait for the event.
int unveil_event_block_current(void* handle, char* message, size_t size) {
  auto* self = static_cast<c10::Event*>(handle);
  return guarded(message, size, [&] { self->block(c10::cuda::getCurrentCUDAStream(self->device_index()).unwrap()); });
}

void unveil_event_free(void* handle) { delete static_cast<c10::Event*>(handle); }
}
