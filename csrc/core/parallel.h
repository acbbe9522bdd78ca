// "Run n tasks": what kernels know about threads. ops/glue.h backs it with torch's intra-op pool;
// tests use serial_parallel and one that runs the tasks in reverse.
#pragma once

#include <stdint.h>

namespace ow {

struct Parallel {
  using Task = void (*)(const void* context, int64_t index);

  int64_t threads;
  void* pool;  // what `run` runs on
  void (*run)(void* pool, int64_t n, Task task, const void* context);

  // Calls body(i) once for each i in [0, n), in any order, on any thread.
  template <class Body>
  void for_each(int64_t n, const Body& body) const {
    if (n == 1) {
      body(int64_t{0});
    } else if (n > 1) {
      run(
          pool, n, [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); },
          &body);
    }
  }
};
#ifndef __CUDACC__  // nvcc 13.0 cannot parse the lambda
inline Parallel serial_parallel() {
  return {1, nullptr, [](void*, int64_t n, Parallel::Task task, const void* context) {
            for (int64_t i = 0; i < n; ++i) task(context, i);
          }};
}
#endif
}  // namespace ow
