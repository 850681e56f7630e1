// Counts of the operations that a thread dispatches, as C functions: 0, or 1 with a message.

#include <ATen/record_function.h>

#include <map>
#include <memory>
#include <string>

#include "guarded.h"

namespace {

thread_local std::map<std::string, int64_t> counts;
thread_local at::CallbackHandle callback = at::INVALID_CALLBACK_HANDLE;

std::unique_ptr<at::ObserverContext> count(const at::RecordFunction& function) {
  ++counts[function.name()];
  return nullptr;
}

}  // namespace

extern "C" {

// Begins to count the operations of the calling thread.
int unveil_operations_begin(char* message, size_t size) {
  return guarded(message, size, [&] {
    TORCH_CHECK(callback == at::INVALID_CALLBACK_HANDLE, "the operations of this thread are counted already");
    counts.clear();
    callback = at::addThreadLocalCallback(at::RecordFunctionCallback(count).scopes({at::RecordScope::FUNCTION}));
  });
}

// Stops counting, and calls `visit` with each name and its count.
int unveil_operations_end(void (*visit)(void*, const char*, int64_t), void* context, char* message, size_t size) {
  return guarded(message, size, [&] {
    if (callback != at::INVALID_CALLBACK_HANDLE) at::removeCallback(callback);
    callback = at::INVALID_CALLBACK_HANDLE;
    for (const auto& [name, times] : counts) visit(context, name.c_str(), times);
    counts.clear();
  });
}
}
