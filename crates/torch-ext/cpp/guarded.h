// How every C function of the parts reports: 0, or 1 with a message.
#pragma once

#include <cstddef>
#include <cstring>
#include <exception>

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
