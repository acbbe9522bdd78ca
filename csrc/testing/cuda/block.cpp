#include "testing/cuda/block.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <stdexcept>

namespace ow::emulation {
namespace {

constexpr unsigned kLanes = 32;

// Lanes that wait for each other.
struct Meeting {
  unsigned mask, arrived;
  const char* operation;
  Where where;
  void* argument[kLanes];
  unsigned place;  // in Warp::order
};

struct Warp {
  unsigned alive;
  unsigned meeting_count;
  Meeting meetings[kLanes];
  // Places to release and acquire, one a meeting; by the time one is used again, all lanes of its
  // first use are through.
  static constexpr unsigned kPlaces = 64;
  char order[kPlaces];
  unsigned next_place;
};

struct Block {
  uint3 index;
  dim3 size, grid;
  uint8_t* shared;
  size_t shared_bytes;
  unsigned threads, alive;
  unsigned at_barrier, barrier_phase, predicates, predicate_count;
  Where barrier_where;
  unsigned short queue[kMaxThreads];  // of ready threads
  unsigned queue_begin, queue_size;
  uint64_t random;
  char error[512];
  void (*body)(const void*);
  const void* context;
  char begun, ended, barriers[2];  // places to release and acquire
  Fiber launcher;
  Warp warp[kMaxThreads / kLanes];
  Thread thread[kMaxThreads];
};

Block* block = nullptr;
Thread* running = nullptr;
uint64_t seed_of_order = 0;

// Bytes on either side of dynamic shared memory that must stay as they are. ASan has its own.
constexpr size_t kCanaryBytes = 128;
constexpr uint8_t kCanary = 0xc5;

OW_UNCHECKED void make_ready(Thread* thread) {
  thread->state = State::ready;
  block->queue[(block->queue_begin + block->queue_size++) % kMaxThreads] =
      (unsigned short)thread->linear;
}

// To the next ready thread, or back to the launcher if there is none.
OW_UNCHECKED void next(bool last = false) {
  Block& b = *block;
  Fiber* from = running == nullptr ? &b.launcher : &running->fiber;
  if (b.error[0] != 0 || b.queue_size == 0) {
    if (running == nullptr) return;
    running = nullptr;
    return from->switch_to(&b.launcher, last);
  }
  const unsigned first = b.queue_begin % kMaxThreads;
  if (seed_of_order != 0) {
    const unsigned other = (b.queue_begin + unsigned(random_bits() % b.queue_size)) % kMaxThreads;
    const unsigned short chosen = b.queue[other];
    b.queue[other] = b.queue[first];
    b.queue[first] = chosen;
  }
  Thread* to = &b.thread[b.queue[first]];
  ++b.queue_begin;
  --b.queue_size;
  if (to == running) return;
  running = to;
  from->switch_to(&to->fiber, last);
}

OW_UNCHECKED void open_barrier() {
  Block& b = *block;
  b.predicate_count = b.predicates;
  b.predicates = b.at_barrier = 0;
  ++b.barrier_phase;
  for (unsigned i = 0; i < b.threads; ++i) {
    if (b.thread[i].state == State::at_barrier) make_ready(&b.thread[i]);
  }
}

OW_UNCHECKED void thread_main() {
  Thread& self = *running;
  self.fiber.entered();
  acquire(&block->begun);
  block->body(block->context);
  release(&block->ended);
  self.state = State::done;
  block->warp[self.warp].alive &= ~(1u << self.lane);
  if (--block->alive != 0 && block->at_barrier == block->alive) open_barrier();
  next(true);
  abort();
}

OW_UNCHECKED void check_all_ended() {
  for (unsigned i = 0; i < block->threads; ++i) {
    const Thread& t = block->thread[i];
    if (t.state == State::done) continue;
    snprintf(block->error, sizeof block->error,
             "emulation: block (%u, %u, %u): thread %u waits for ever at %s, %s:%u", block->index.x,
             block->index.y, block->index.z, i, t.waits_for, t.where.file_name(), t.where.line());
    return;
  }
}

OW_UNCHECKED void check_canaries() {
#if !defined(__SANITIZE_ADDRESS__)
  for (size_t i = 0; i < kCanaryBytes; ++i) {
    if (block->shared[-1 - ptrdiff_t(i)] != kCanary ||
        block->shared[block->shared_bytes + i] != kCanary) {
      snprintf(
          block->error, sizeof block->error,
          "emulation: block (%u, %u, %u) writes outside its %zu bytes of dynamic shared memory",
          block->index.x, block->index.y, block->index.z, block->shared_bytes);
      return;
    }
  }
#endif
}

// Memory that is not written reads as NaN.
OW_UNCHECKED void fill_shared() {
#if !defined(__SANITIZE_ADDRESS__)
  for (size_t i = 0; i < kCanaryBytes; ++i) {
    block->shared[-1 - ptrdiff_t(i)] = block->shared[block->shared_bytes + i] = kCanary;
  }
#endif
  for (size_t i = 0; i < block->shared_bytes; ++i) block->shared[i] = 0xff;
}

OW_UNCHECKED void run_block() {
  Block& b = *block;
  b.queue_begin = b.queue_size = b.at_barrier = b.barrier_phase = b.predicates = 0;
  b.alive = b.threads;
  b.error[0] = 0;
  // xorshift must not start at 0.
  b.random =
      seed_of_order * 0x9e3779b97f4a7c15u ^ (uint64_t(b.index.y) << 32 | b.index.x) ^ 0x1234567;
  fill_shared();
  for (unsigned i = 0; i < b.threads; ++i) {
    Thread& t = b.thread[i];
    t.linear = i;
    t.lane = i % kLanes;
    t.warp = i / kLanes;
    t.index = {i % b.size.x, i / b.size.x % b.size.y, i / (b.size.x * b.size.y)};
    t.copy_count = 0;
    t.copy_group = 0;
    if (t.lane == 0) {
      const unsigned lanes = b.threads - i < kLanes ? b.threads - i : kLanes;
      Warp& w = b.warp[t.warp];
      w.alive = lanes == kLanes ? ~0u : (1u << lanes) - 1;
      w.meeting_count = w.next_place = 0;
    }
    t.fiber.prepare(thread_main, int(i));
    make_ready(&t);
  }
  release(&b.begun);
  running = nullptr;
  next();
  acquire(&b.ended);
  if (b.error[0] == 0) check_all_ended();
  if (b.error[0] == 0) check_canaries();
}

}  // namespace

void set_seed(uint64_t value) { seed_of_order = value; }
uint64_t seed() { return seed_of_order; }

OW_UNCHECKED Thread& current() { return *running; }
OW_UNCHECKED uint3 block_index() { return block->index; }
OW_UNCHECKED dim3 block_size() { return block->size; }
OW_UNCHECKED dim3 grid_size() { return block->grid; }
OW_UNCHECKED uint8_t* dynamic_shared() { return block->shared; }

OW_UNCHECKED uint64_t random_bits() {
  if (seed_of_order == 0) return 0;
  uint64_t& x = block->random;
  x ^= x << 13;
  x ^= x >> 7;
  return x ^= x << 17;
}

OW_UNCHECKED void fail(const char* what, const Where& where) {
  if (block->error[0] == 0) {
    snprintf(block->error, sizeof block->error,
             "emulation: block (%u, %u, %u), thread (%u, %u, %u): %s, %s:%u", block->index.x,
             block->index.y, block->index.z, running->index.x, running->index.y, running->index.z,
             what, where.file_name(), where.line());
  }
  running->state = State::done;
  release(&block->ended);
  next();
}

OW_UNCHECKED unsigned barrier(bool predicate, const Where& where) {
  Block& b = *block;
  Thread& self = *running;
  if (b.at_barrier != 0 && b.barrier_where.line() != where.line()) {
    fail("threads of one block meet at different __syncthreads", where);
  }
  char* place = &b.barriers[b.barrier_phase % 2];
  release(place);
  self.state = State::at_barrier;
  self.waits_for = "__syncthreads";
  self.where = b.barrier_where = where;
  b.predicates += predicate;
  if (++b.at_barrier == b.alive) open_barrier();
  next();
  acquire(place);
  return b.predicate_count;
}

OW_UNCHECKED void meet(unsigned mask, const char* operation, void* argument,
                       void (*finish)(void* const*, unsigned), bool orders_memory,
                       const Where& where) {
  Thread& self = *running;
  Warp& w = block->warp[self.warp];
  const unsigned own = 1u << self.lane;
  if ((mask & own) == 0) fail("a lane is not in its own mask", where);
  if ((mask & ~w.alive) != 0) fail("a mask names lanes that have ended or do not exist", where);
  unsigned i = 0;
  for (; i < w.meeting_count && w.meetings[i].mask != mask; ++i) {
    if ((w.meetings[i].mask & mask) != 0) fail("masks of a warp overlap but differ", where);
  }
  Meeting& meeting = w.meetings[i];
  if (i == w.meeting_count) {
    ++w.meeting_count;
    meeting.mask = mask;
    meeting.arrived = 0;
    meeting.operation = operation;
    meeting.where = where;
    meeting.place = w.next_place++ % Warp::kPlaces;
  }
  if (strcmp(meeting.operation, operation) != 0 || meeting.where.line() != where.line()) {
    fail("lanes of a warp meet at different operations", where);
  }
  meeting.argument[self.lane] = argument;
  meeting.arrived |= own;
  char* place = &w.order[meeting.place];
  if (orders_memory) release(place);
  self.waits_for = operation;
  self.where = where;
  if (meeting.arrived == mask) {
    if (finish != nullptr) finish(meeting.argument, mask);
    meeting = w.meetings[--w.meeting_count];
    for (unsigned l = 0; l < kLanes; ++l) {
      if ((mask >> l & 1) != 0 && l != self.lane) {
        make_ready(&block->thread[self.warp * kLanes + l]);
      }
    }
    if (seed_of_order != 0) {
      make_ready(&self);
      next();
    }
  } else {
    self.state = State::in_warp;
    next();
  }
  if (orders_memory) acquire(place);
}

void launch(dim3 grid, dim3 size, size_t shared_bytes, void (*body)(const void*),
            const void* context) {
  static const std::unique_ptr<Block> only(new Block());
  block = only.get();
  block->size = size;
  block->grid = grid;
  block->threads = size.x * size.y * size.z;
  block->body = body;
  block->context = context;
  block->shared_bytes = shared_bytes;
  block->launcher.adopt();
#if defined(__SANITIZE_ADDRESS__)
  constexpr size_t kSides = 0;  // red zones end where the memory does
#else
  constexpr size_t kSides = kCanaryBytes;
#endif
  constexpr size_t kAlignment = 128;
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, shared_bytes + 2 * kSides + (shared_bytes == 0)) != 0) {
    throw std::bad_alloc();
  }
  const std::unique_ptr<void, void (*)(void*)> held(memory, free);
  block->shared = static_cast<uint8_t*>(memory) + kSides;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block->index = {x, y, z};
        run_block();
        if (block->error[0] != 0) throw std::runtime_error(block->error);
      }
    }
  }
}

}  // namespace ow::emulation
