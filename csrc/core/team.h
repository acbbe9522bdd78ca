// Threads held ready for a chain of short parallel steps.
//
// Waking a thread pool for every step costs microseconds, as long as the steps of decoding one
// token take. A Team is opened once for the whole chain: the other threads stay inside it and take
// the tasks of each step as they appear. A task is claimed by one compare-and-swap, and whoever
// posts a step takes tasks too, so the chain ends even if no other thread ever comes.
#pragma once

#include <atomic>
#include <thread>

#include "core/parallel.h"

namespace ow {

class Team {
 public:
  // Runs body(parallel) with `parallel` backed by a team of threads of `pool`. Neither the body nor
  // a task may throw, and a task may not post a step of its own.
  template <class Body>
  static void run(const Parallel& pool, const Body& body) {
    if (pool.threads == 1) return body(pool);
    Team team;
    // Whichever task starts first leads: a busy pool may start them one after the other.
    pool.for_each(pool.threads, [&](int64_t) {
      if (team.led_.exchange(true, std::memory_order_relaxed)) return team.serve();
      body(Parallel{pool.threads, &team,
                    [](void* self, int64_t n, Parallel::Task task, const void* context) {
                      static_cast<Team*>(self)->step(n, task, context);
                    }});
      team.ticket_.store(kClosed, std::memory_order_release);
    });
  }

 private:
  // The step's number, its tasks, and the next of them to be claimed, in one word: a claim that
  // succeeds belongs to the step whose fields the claimer is about to read.
  static constexpr int kBits = 16;
  static constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;
  static constexpr uint64_t kClosed = ~uint64_t{0};
  // Looks at the ticket before a thread lets others run: some 100 us, far longer than the serial
  // steps of a chain take, and far shorter than what a thread that lost its core would lose by
  // waiting for one that spins.
  static constexpr unsigned kSpins = 4096;

  static uint64_t tasks_of(uint64_t ticket) { return ticket >> kBits & kMask; }
  static uint64_t next_of(uint64_t ticket) { return ticket & kMask; }

  static void pause(unsigned spin) {
    if (spin % kSpins == kSpins - 1) return std::this_thread::yield();
#if defined(__x86_64__)
    asm volatile("pause");
#endif
  }

  void step(int64_t n, Parallel::Task task, const void* context) {
    for (; n > int64_t(kMask); --n) task(context, n - 1);
    task_ = task;
    context_ = context;
    finished_.store(0, std::memory_order_relaxed);
    ++steps_;
    const uint64_t count = uint64_t(n);
    ticket_.store(steps_ << 2 * kBits | count << kBits, std::memory_order_release);
    while (claim()) {
    }
    for (unsigned spin = 0; finished_.load(std::memory_order_acquire) != n; ++spin) pause(spin);
  }

  void serve() {
    for (unsigned spin = 0;; ++spin) {
      if (ticket_.load(std::memory_order_relaxed) == kClosed) return;
      if (claim()) {
        spin = 0;
      } else {
        pause(spin);
      }
    }
  }

  // Runs one task of the current step if one is left.
  bool claim() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    do {
      if (ticket == kClosed || next_of(ticket) >= tasks_of(ticket)) return false;
    } while (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acquire));
    task_(context_, int64_t(next_of(ticket)));
    finished_.fetch_add(1, std::memory_order_release);
    return true;
  }

  std::atomic<bool> led_{false};
  uint64_t steps_ = 0;
  Parallel::Task task_ = nullptr;
  const void* context_ = nullptr;
  // Apart: the claimers write the one while the poster waits on the other.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> finished_{0};
};

}  // namespace ow
