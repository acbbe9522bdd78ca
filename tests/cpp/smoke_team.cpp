// A Team over threads that come at once, and over pools whose tasks come one after the other.
#include <thread>

#include "core/team.h"
#include "smoke.h"

namespace ow::testing {
namespace {

// A thread for each task, as a pool that is idle has.
Parallel threads_parallel(int64_t threads) {
  return {threads, nullptr, [](void*, int64_t n, Parallel::Task task, const void* context) {
            std::vector<std::thread> others;
            for (int64_t i = 1; i < n; ++i) others.emplace_back(task, context, i);
            task(context, 0);
            for (std::thread& other : others) other.join();
          }};
}

// One thread that says it is several: the leader must not wait for the rest.
Parallel one_by_one(int64_t threads) {
  Parallel parallel = serial_parallel();
  parallel.threads = threads;
  return parallel;
}

// Fewer tasks than threads, as many, more, and more than fit into a ticket (one step in a hundred).
int64_t tasks_of(int64_t step) {
  constexpr int64_t kTasks[] = {2, 3, 0, 1, 64, 7, 2};
  return step % 100 == 99 ? 70000 : kTasks[step % 7];
}

struct Chain {
  std::vector<uint64_t> cells;
  std::vector<int64_t> runs;  // of each task
  bool operator==(const Chain&) const = default;
};

// Each task reads what others wrote in the step before, through plain memory.
Chain run_chain(const Parallel& pool, int64_t steps) {
  constexpr size_t kCells = 70000;
  Chain chain{std::vector<uint64_t>(kCells, 1), std::vector<int64_t>(kCells)};
  std::vector<uint64_t> next = chain.cells;
  Team::run(pool, [&](const Parallel& parallel) {
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t tasks = tasks_of(step);
      parallel.for_each(tasks, [&](int64_t i) {
        const size_t at = size_t(i);
        next[at] = 3 * chain.cells[at] + chain.cells[size_t(tasks) - 1 - at] + uint64_t(step);
        ++chain.runs[at];
      });
      for (size_t i = 0; i < size_t(tasks); ++i) std::swap(next[i], chain.cells[i]);
    }
  });
  return chain;
}

}  // namespace

void check_team() {
  running = "Team";
  // Steps of more threads than the machine may have cost a turn of the scheduler each.
  for (const int64_t steps : {0, 1, 300, 5000}) {
    const Chain want = run_chain(serial_parallel(), steps);
    for (const int64_t threads : {2, 3, 7}) {
      if (threads > 3 && steps > 300) continue;
      CHECK(run_chain(threads_parallel(threads), steps) == want, "Team: %d steps, %d threads",
            int(steps), int(threads));
      CHECK(run_chain(one_by_one(threads), steps) == want, "Team: %d steps, one of %d threads",
            int(steps), int(threads));
      CHECK(run_chain(reversed_parallel(threads), steps) == want, "Team: %d steps, reversed",
            int(steps));
    }
  }
  // Opened and closed again before the other thread has come, or just as it comes.
  const Chain want = run_chain(serial_parallel(), 2);
  for (int i = 0; i < 50; ++i) {
    CHECK(run_chain(threads_parallel(2), 2) == want, "Team: opened for the %d. time", i + 1);
  }
}

}  // namespace ow::testing
