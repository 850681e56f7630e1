// Control over the memory behind tensors, as C functions. Each returns 0, or 1 with a message.

#include <ATen/ATen.h>

#include "guarded.h"

namespace {

// A handle is a tch tensor: a pointer to an at::Tensor.
at::Tensor& tensor_of(void* handle) { return *static_cast<at::Tensor*>(handle); }

}  // namespace

extern "C" {

// Size in bytes of the memory behind a tensor, which may be shared with others; -1 if it cannot be resized.
int unveil_memory_size(void* tensor, int64_t* bytes, char* message, size_t size) {
  return guarded(message, size, [&] {
    const c10::Storage& storage = tensor_of(tensor).storage();
    *bytes = storage.allocator() == nullptr ? -1 : static_cast<int64_t>(storage.nbytes());
  });
}

// Frees that memory (0 bytes), or allocates new memory with undefined contents. Shapes, strides and all tensors that share it stay.
int unveil_memory_resize(void* tensor, int64_t bytes, char* message, size_t size) {
  return guarded(message, size, [&] {
    c10::StorageImpl* storage = tensor_of(tensor).storage().unsafeGetStorageImpl();
    if (static_cast<int64_t>(storage->nbytes()) == bytes) return;
    TORCH_CHECK(storage->allocator() != nullptr, "the memory belongs to another library or to a file");
    storage->set_data_ptr_noswap(storage->allocator()->allocate(bytes));
    storage->set_nbytes(static_cast<size_t>(bytes));
  });
}

// Drops a leaf's gradient and frees its memory.
int unveil_memory_drop_grad(void* tensor, char* message, size_t size) {
  return guarded(message, size, [&] { tensor_of(tensor).mutable_grad().reset(); });
}
}
