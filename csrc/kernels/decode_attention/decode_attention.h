// Attention of a few queries a sequence over its cached keys and values:
//
//   y[b,t,h] = sum_j p_j values[b,g,j]      p = softmax_j(scale * q[b,t,h] . keys[b,g,j])
//   lse[b,t,h] = log sum_j e^(scale * q[b,t,h] . keys[b,g,j])
//
// with g = h / (heads / kv_heads) and j < n - queries + t + 1: the last query sees all n keys, the
// one before it one less (causal, aligned at the end). A value may have another length than a key,
// and may lie in it.
//
// Bound by the bytes of keys and values. The heads that share a key are rows of one pass over it.
// Keys are taken kKeyChunk at a time. Each span of 1 to kMaxSpan chunks leaves a state
// (simd/attention.h), and states are merged in order of j. Spans do not depend on the number of
// threads, so neither does the result.
#pragma once

#include "core/kernel_table.h"
#include "core/parallel.h"
#include "core/types.h"

namespace ow {

// Keys of a chunk: with values, 64 KiB at 64 dimensions of fp32.
constexpr int64_t kKeyChunk = 128;
// Chunks of a span: enough spans for many threads, and few enough that the bytes of the states do
// not matter beside those of the keys (of one chunk, at 32 rows, they are twice as many).
constexpr int64_t kMaxSpan = 8;
constexpr int64_t kSpans = 32;

// Where the element (b, head, token, 0) of a cache is; strides in elements, the last 1.
struct CacheStrides {
  int64_t b, head, token;
};

struct DecodeAttentionArgs {
  int64_t b, queries, heads, kv_heads, d;
  int64_t dv;  // dimensions of a value
  int64_t n;   // keys, at least `queries`
  FloatType type;
  float scale;
  const void* q;  // [b, queries, heads, d]
  const void* keys;
  CacheStrides key_strides;
  const void* values;
  CacheStrides value_strides;
  float* states;  // [b * kv_heads, spans, rows, dv + 2]
  void* y;        // [b, queries, heads, dv]
  float* lse;     // [b, queries, heads], or null
};

// Rows of one key head: row r is query r / group and, of the heads that read it, the r % group th.
OW_INLINE int64_t group_of(const DecodeAttentionArgs& a) { return a.heads / a.kv_heads; }
OW_INLINE int64_t rows_of(const DecodeAttentionArgs& a) { return a.queries * group_of(a); }
OW_INLINE int64_t span_keys(const DecodeAttentionArgs& a) {
  const int64_t chunks = a.n / (kSpans * kKeyChunk);
  return kKeyChunk * (chunks < 1 ? 1 : min_of(chunks, kMaxSpan));
}
OW_INLINE int64_t spans_of(const DecodeAttentionArgs& a) { return div_up(a.n, span_keys(a)); }
OW_INLINE int64_t items_of(const DecodeAttentionArgs& a) { return a.b * a.kv_heads; }
OW_INLINE int64_t state_size(const DecodeAttentionArgs& a) { return a.dv + 2; }

struct DecodeAttentionKernels {
  // States of spans [begin, end) of the items' spans, in order of item, then span.
  void (*attend)(const DecodeAttentionArgs&, int64_t begin, int64_t end);
  // y of items [begin, end).
  void (*merge)(const DecodeAttentionArgs&, int64_t begin, int64_t end);
};

#define OW_DECODE_ATTENTION_KERNELS(X)                                   \
  OW_IF_AVX512AMX(X(avx512amx, 0, kAnyM, decode_attention_avx512amx))    \
  OW_IF_AVX512BF16(X(avx512bf16, 0, kAnyM, decode_attention_avx512bf16)) \
  OW_IF_AVX512(X(avx512, 0, kAnyM, decode_attention_avx512))             \
  OW_IF_AVX2(X(avx2, 0, kAnyM, decode_attention_avx2))                   \
  X(scalar, 0, kAnyM, decode_attention_scalar)

#define OW_DECLARE(isa, key, max_m, kernels) extern const DecodeAttentionKernels kernels;
OW_DECODE_ATTENTION_KERNELS(OW_DECLARE)
#undef OW_DECLARE

// Floats that `states` takes.
int64_t decode_attention_state_count(const DecodeAttentionArgs& args);

void decode_attention(const DecodeAttentionArgs& args, Isa isa, const Parallel& parallel);

}  // namespace ow
