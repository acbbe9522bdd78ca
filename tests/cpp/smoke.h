// What the smoke tests of the families share: checks, random operands, the three float types.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#include "core/kernel_table.h"
#include "core/parallel.h"
#include "core/types.h"
#include "guarded.h"

namespace ow::testing {

inline int failures = 0;
inline int checks = 0;
inline const char* running = "";  // the kernel to name when a guard page is touched

#define CHECK(condition, ...)                         \
  do {                                                \
    ++ow::testing::checks;                            \
    if (!(condition)) {                               \
      ++ow::testing::failures;                        \
      fprintf(stderr, "%s:%d: ", __FILE__, __LINE__); \
      fprintf(stderr, __VA_ARGS__);                   \
      fprintf(stderr, "\n");                          \
    }                                                 \
  } while (false)

constexpr FloatType kTypes[] = {FloatType::f32, FloatType::bf16, FloatType::f16};
constexpr Against kSides[] = {Against::end, Against::begin};

// A fixed sequence: a failure happens again.
class Random {
 public:
  uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state_ >> 33);
  }
  int64_t below(int64_t n) { return int64_t(next()) % n; }
  float uniform() { return float(next()) * 0x1p-30f - 1.0f; }  // -1 .. 1

 private:
  uint64_t state_ = 1;
};
inline Random rng;

using Bytes = std::vector<uint8_t>;

template <class T>
void append_as(Bytes* bytes, float value) {
  T stored;
  from_float(value, &stored);
  const uint8_t* p = reinterpret_cast<const uint8_t*>(&stored);
  bytes->insert(bytes->end(), p, p + sizeof(T));
}
inline void append(Bytes* bytes, FloatType type, float value) {
  switch (type) {
    case FloatType::f32: return append_as<float>(bytes, value);
    case FloatType::bf16: return append_as<bf16>(bytes, value);
    case FloatType::f16: return append_as<f16>(bytes, value);
  }
}
inline float read(const void* p, FloatType type, int64_t i) {
  switch (type) {
    case FloatType::f32: return static_cast<const float*>(p)[i];
    case FloatType::bf16: return to_float(static_cast<const bf16*>(p)[i]);
    default: return to_float(static_cast<const f16*>(p)[i]);
  }
}
// `count` values in -size .. size.
inline Bytes floats(int64_t count, FloatType type, float size) {
  Bytes bytes;
  for (int64_t i = 0; i < count; ++i) append(&bytes, type, rng.uniform() * size);
  return bytes;
}
// Half a unit in the last place, relative.
inline float roundoff(FloatType type) {
  switch (type) {
    case FloatType::f32: return 0x1p-24f;
    case FloatType::bf16: return 0x1p-8f;
    default: return 0x1p-11f;
  }
}

inline Parallel reversed_parallel(int64_t threads) {
  return {threads, nullptr, [](void*, int64_t n, Parallel::Task task, const void* context) {
            for (int64_t i = n - 1; i >= 0; --i) task(context, i);
          }};
}

void check_lowbit_gemm(Guarded* memory);
void check_nm_gemm(Guarded* memory);
void check_quantize(Guarded* memory);
void check_activations(Guarded* memory);
void check_hadamard(Guarded* memory);
void check_decode_attention(Guarded* memory);
void check_block_attention(Guarded* memory);
void check_block_attention_backward(Guarded* memory);
void check_sparse_gemm(Guarded* memory);
void check_block_sparse_gemm(Guarded* memory);
void check_active_gemv(Guarded* memory);
void check_block_index(Guarded* memory);
void check_line_scores(Guarded* memory);
void check_paged_attention();
void check_kv_cache(Guarded* memory);
void check_team();

}  // namespace ow::testing
