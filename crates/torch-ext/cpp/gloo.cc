// libtorch's Gloo process group as C functions. Each returns 0, or 1 with a message. A separate library, because Gloo's headers are a
// package that a machine may lack.

#define USE_C10D_GLOO 1
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "guarded.h"
#include "store.h"

namespace {

using Ms = std::chrono::milliseconds;

struct Store {
  c10::intrusive_ptr<c10d::Store> store;
};

struct Group {
  c10::intrusive_ptr<c10d::ProcessGroupGloo> group;
};

// Set by a Gloo thread when a call has succeeded or failed.
struct Completion {
  std::mutex mutex;
  std::condition_variable changed;
  bool ended = false;
};

struct Work {
  c10::intrusive_ptr<c10d::Work> work;
  std::shared_ptr<Completion> state = std::make_shared<Completion>();
};

Work* watched(c10::intrusive_ptr<c10d::Work> work) {
  auto out = std::make_unique<Work>();
  out->work = std::move(work);
  out->work->getFuture()->addCallback([state = out->state](c10::ivalue::Future&) {
    std::lock_guard<std::mutex> lock(state->mutex);
    state->ended = true;
    state->changed.notify_all();
  });
  return out.release();
}

c10d::ProcessGroupGloo& group_of(void* handle) { return *static_cast<Group*>(handle)->group; }
at::Tensor tensor_of(const void* tensor) { return *static_cast<const at::Tensor*>(tensor); }

template <typename Options>
Options with_timeout(int64_t timeout_ms) {
  Options options;
  options.timeout = Ms(timeout_ms);
  return options;
}

}  // namespace

extern "C" {

// Connects to the other ranks, whose addresses are in the store under `prefix`; `local` is the address of this rank.
int unveil_gloo_new(void* store, const char* prefix, int rank, int ranks, const char* local, int threads, int64_t timeout_ms,
                    void** out, char* message, size_t size) {
  return guarded(message, size, [&] {
    auto options = c10d::ProcessGroupGloo::Options::create(Ms(timeout_ms));
    options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(local));
    options->threads = threads;
    auto base = static_cast<unveil::Store*>(store)->store;
    base->setTimeout(Ms(timeout_ms));
    auto own = c10::make_intrusive<c10d::PrefixStore>(prefix, base);
    *out = new Group{c10::make_intrusive<c10d::ProcessGroupGloo>(own, rank, ranks, options)};
  });
}

// Frees the group after waiting for pending calls.
void unveil_gloo_free(void* handle) { delete static_cast<Group*>(handle); }

int unveil_gloo_all_reduce(void* group, const void* tensor, int64_t timeout_ms, void** out, char* message, size_t size) {
  return guarded(message, size, [&] {
    std::vector<at::Tensor> tensors{tensor_of(tensor)};
    *out = watched(group_of(group).allreduce(tensors, with_timeout<c10d::AllreduceOptions>(timeout_ms)));
  });
}

int unveil_gloo_broadcast(void* group, const void* tensor, int root, int64_t timeout_ms, void** out, char* message,
                          size_t size) {
  return guarded(message, size, [&] {
    auto options = with_timeout<c10d::BroadcastOptions>(timeout_ms);
    options.rootRank = root;
    std::vector<at::Tensor> tensors{tensor_of(tensor)};
    *out = watched(group_of(group).broadcast(tensors, options));
  });
}

// `output` has room for one `input` per rank.
int unveil_gloo_all_gather(void* group, const void* output, const void* input, int64_t timeout_ms, void** out, char* message,
                           size_t size) {
  return guarded(message, size, [&] {
    auto to = tensor_of(output);
    auto from = tensor_of(input);
    *out = watched(group_of(group)._allgather_base(to, from, with_timeout<c10d::AllgatherOptions>(timeout_ms)));
  });
}

// Part r of `input` goes to rank r; part r of `output` came from rank r.
int unveil_gloo_all_to_all(void* group, const void* output, const void* input, int64_t timeout_ms, void** out, char* message,
                           size_t size) {
  return guarded(message, size, [&] {
    const auto options = with_timeout<c10d::AllToAllOptions>(timeout_ms);
    auto to = tensor_of(output);
    auto from = tensor_of(input);
    std::vector<int64_t> equal_to, equal_from;
    *out = watched(group_of(group).alltoall_base(to, from, equal_to, equal_from, options));
  });
}

int unveil_gloo_barrier(void* group, int64_t timeout_ms, void** out, char* message, size_t size) {
  return guarded(message, size, [&] {
    *out = watched(group_of(group).barrier(with_timeout<c10d::BarrierOptions>(timeout_ms)));
  });
}

// Waits up to `timeout_ms` for a call to end; a call that failed returns its message.
int unveil_work_wait(void* handle, int64_t timeout_ms, int* ended, char* message, size_t size) {
  auto* self = static_cast<Work*>(handle);
  return guarded(message, size, [&] {
    {
      std::unique_lock<std::mutex> lock(self->state->mutex);
      *ended = self->state->changed.wait_for(lock, Ms(timeout_ms), [&] { return self->state->ended; }) ? 1 : 0;
    }
    // The future is set just before the work itself, so this hardly waits.
    if (*ended) self->work->wait();
  });
}

void unveil_work_free(void* handle) { delete static_cast<Work*>(handle); }
}
