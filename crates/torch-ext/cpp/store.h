// The object behind a store handle, for the libraries that share it.
#pragma once

#include <torch/csrc/distributed/c10d/TCPStore.hpp>

namespace unveil {

struct Store {
  c10::intrusive_ptr<c10d::TCPStore> store;
};

}  // namespace unveil
