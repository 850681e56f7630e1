// libtorch's key-value store as C functions. Each returns 0, or 1 with a message.

#include "store.h"

#include <chrono>
#include <string>
#include <vector>

#include "guarded.h"

namespace {

using Ms = std::chrono::milliseconds;
using unveil::Store;

std::vector<std::string> strings(const char* const* keys, size_t count) { return {keys, keys + count}; }
c10d::Store& store_of(void* handle) { return *static_cast<Store*>(handle)->store; }

}  // namespace

extern "C" {

// Receives one value; the bytes are valid during the call.
typedef void (*unveil_value_sink)(void* values, const uint8_t* bytes, size_t length);

// Joins the store at host:port. If `listener` is a bound socket, which then belongs to the store, this process also hosts it.
int unveil_store_new(const char* host, uint16_t port, int listener, int64_t timeout_ms, void** out, char* message, size_t size) {
  return guarded(message, size, [&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = listener >= 0;
    if (listener >= 0) options.masterListenFd = listener;
    options.waitWorkers = false;
    options.timeout = Ms(timeout_ms);
    *out = new Store{c10::make_intrusive<c10d::TCPStore>(host, options)};
  });
}

// A second connection to the same store, for another thread.
int unveil_store_clone(void* handle, void** out, char* message, size_t size) {
  return guarded(message, size, [&] { *out = new Store{c10::static_intrusive_pointer_cast<c10d::TCPStore>(store_of(handle).clone())}; });
}

void unveil_store_free(void* handle) { delete static_cast<Store*>(handle); }

int unveil_store_set(void* handle, const char* key, const uint8_t* bytes, size_t length, char* message, size_t size) {
  return guarded(message, size, [&] { store_of(handle).set(key, std::vector<uint8_t>(bytes, bytes + length)); });
}

// Passes the values of keys, which must all exist, to `sink`.
int unveil_store_get(void* handle, const char* const* keys, size_t count, unveil_value_sink sink, void* values, char* message,
                     size_t size) {
  return guarded(message, size, [&] {
    for (const auto& value : store_of(handle).multiGet(strings(keys, count))) sink(values, value.data(), value.size());
  });
}

int unveil_store_check(void* handle, const char* const* keys, size_t count, int* all, char* message, size_t size) {
  return guarded(message, size, [&] { *all = store_of(handle).check(strings(keys, count)) ? 1 : 0; });
}

int unveil_store_add(void* handle, const char* key, int64_t by, int64_t* out, char* message, size_t size) {
  return guarded(message, size, [&] { *out = store_of(handle).add(key, by); });
}

// Sets the key if its value is `expected`; passes its value afterwards to `sink`.
int unveil_store_compare_set(void* handle, const char* key, const uint8_t* expected, size_t expected_length, const uint8_t* bytes,
                      size_t length, unveil_value_sink sink, void* values, char* message, size_t size) {
  return guarded(message, size, [&] {
    auto now = store_of(handle).compareSet(key, std::vector<uint8_t>(expected, expected + expected_length),
                                           std::vector<uint8_t>(bytes, bytes + length));
    sink(values, now.data(), now.size());
  });
}
}
