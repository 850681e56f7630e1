// Error reporting of the C functions: 0, or 1 with a message.
#pragma once

#include <c10/util/Exception.h>

#include <cstddef>
#include <cstring>
#include <exception>

inline int refused(char* message, size_t size, const char* text) {
  if (size > 0) {
    std::strncpy(message, text, size - 1);
    message[size - 1] = 0;
  }
  return 1;
}

template <class F>
int guarded(char* message, size_t size, F&& work) {
  try {
    work();
    return 0;
  } catch (const c10::Error& error) {
    return refused(message, size, error.what_without_backtrace());
  } catch (const std::exception& error) {
    return refused(message, size, error.what());
  }
}
