// Attention of a few queries a sequence over its pages of keys and values (core/kv_pages.h), of any
// format:
//
//   y[b,t,h] = sum_j p_j v^[b,g,j]      p = softmax_j(scale * q[b,t,h] . k^[b,g,j])
//   lse[b,t,h] = log sum_j e^(scale * q[b,t,h] . k^[b,g,j])
//
// with g = h / (heads / kv_heads) and j < length - queries + t + 1 (causal, aligned at the end of
// each head's own tokens). Without a token y = 0 and lse = -infinity. k^ and v^ are what the
// formats say that keys and values are; with tables of cosines and sines, keys are rotated first:
// k^[i] cos[p,i] - k^[i + d/2] sin[p,i] and so on (halves), p the token's position. Accurate to
// fp32's rounding or, of bf16 and quantized sides, to 2^-16 of the largest of the products that
// scales go into; to 1.15 * 2^-12 and 1.69 * 2^-10 of it where codes have 4 and 2 bits.
//
//   0              pages              newest            length
//   | 32 | 32 | … the selected ones … | ring, last queries |
//
// The newest tokens, from the last multiple of 32 on that is in pages on both sides and that every
// query sees, are always attended to: `selected` chooses among the pages before.
//
// Tokens are taken in panels of 32, the unit of packed codes, kChunkPanels of them at a time: first
// all scores, then the sums over values. Each span of 1 to kMaxSpanChunks chunks leaves a state
// (simd/attention.h), and states are merged in order. Neither spans nor chunks depend on the number
// of threads, so neither does the result.
#pragma once

#include "core/kernel_table.h"
#include "core/kv_pages.h"
#include "core/parallel.h"
#include "core/types.h"

namespace ow {

constexpr int64_t kPanelTokens = kKVPanel;
constexpr int64_t kChunkPanels = 8;
constexpr int64_t kChunkTokens = kPanelTokens * kChunkPanels;
// Chunks of a span: few states beside the bytes of the pages, and yet 32 spans of 8k tokens.
constexpr int64_t kMaxSpanChunks = 4;
constexpr int64_t kTokensPerSpan = 8192;

constexpr int64_t kMaxPagedD = 256;
constexpr int64_t kMaxQueries = 8;

struct PagedAttentionArgs {
  KVPages kv;
  int64_t queries, heads;
  float scale;
  const void* q;            // [b, queries, heads, d] of kv.type
  const int32_t* selected;  // [b, kv_heads, budget] places in block_table, rising, then -1; or null
  int64_t budget;
  const float* cos;      // [positions, d / 2], or null
  const float* sin;      // as cos
  const int64_t* spans;  // [b * kv_heads + 1]: the first of each head, from paged_attention_plan
  int64_t span_chunks;   // of a span
  float* states;         // [spans, rows, state_size]
  void* y;               // [b, queries, heads, dv]
  float* lse;            // [b, queries, heads]
};

// Rows of one key head: row r is query r / group and, of the heads that read it, the r % group th.
OW_INLINE int64_t group_of(const PagedAttentionArgs& a) { return a.heads / a.kv.kv_heads; }
OW_INLINE int64_t rows_of(const PagedAttentionArgs& a) { return a.queries * group_of(a); }
OW_INLINE int64_t items_of(const PagedAttentionArgs& a) { return a.kv.b * a.kv.kv_heads; }
// Of floats; whole lines of the cache.
OW_INLINE int64_t state_size(const PagedAttentionArgs& a) {
  return round_up(a.kv.values.d + 2, 16);
}

// Where the newest tokens of a head begin.
OW_INLINE int64_t newest_of(const PagedAttentionArgs& a, int64_t item) {
  const int64_t seen = a.kv.lengths[item] - a.queries + 1;
  const int64_t in_pages = min_of(a.kv.keys.committed[item], a.kv.values.committed[item]);
  const int64_t begin = min_of(seen, in_pages);
  return begin < 0 ? 0 : begin / kPanelTokens * kPanelTokens;
}

// Pages of a head that are chosen from, of those before the newest tokens.
OW_INLINE int64_t listed_pages(const PagedAttentionArgs& a, int64_t item) {
  if (a.selected == nullptr) return div_up(newest_of(a, item), a.kv.page_size);
  int64_t n = 0;
  while (n < a.budget && a.selected[item * a.budget + n] >= 0) ++n;
  return n;
}

struct PagedAttentionKernels {
  // States of spans [begin, end).
  void (*attend)(const PagedAttentionArgs&, int64_t begin, int64_t end);
  // y and lse of heads [begin, end) of all sequences' key heads.
  void (*merge)(const PagedAttentionArgs&, int64_t begin, int64_t end);
};

#define OW_PAGED_ATTENTION_KERNELS(X)                                   \
  OW_IF_AVX512AMX(X(avx512amx, 0, kAnyM, paged_attention_avx512amx))    \
  OW_IF_AVX512BF16(X(avx512bf16, 0, kAnyM, paged_attention_avx512bf16)) \
  OW_IF_AVX512(X(avx512, 0, kAnyM, paged_attention_avx512))             \
  OW_IF_AVX2(X(avx2, 0, kAnyM, paged_attention_avx2))                   \
  X(scalar, 0, kAnyM, paged_attention_scalar)

#define OW_DECLARE(isa, key, max_m, kernels) extern const PagedAttentionKernels kernels;
OW_PAGED_ATTENTION_KERNELS(OW_DECLARE)
#undef OW_DECLARE

// Fills spans [b * kv_heads + 1] and sets args->spans and span_chunks.
void paged_attention_plan(PagedAttentionArgs* args, int64_t* spans);
// Floats that `states` takes, once planned.
int64_t paged_attention_state_count(const PagedAttentionArgs& args);

void paged_attention(const PagedAttentionArgs& args, Isa isa, const Parallel& parallel);

}  // namespace ow
