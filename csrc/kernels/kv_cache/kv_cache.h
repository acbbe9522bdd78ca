// Writing, moving and choosing pages of keys and values (core/kv_pages.h has formats and layouts).
//
// Quantization of a group of numbers x (a channel of group_size tokens, or group_size channels of a
// token), outliers left out:
//
//   min = min x                 scale = (max x - min) / (2^bits - 1)      rounded up to the type
//   code = round((x - min) / scale), at most 2^bits - 1                   to nearest even
//   with a codebook:  scale = max x - min,  code = the nearest table[code] to (x - min) / scale,
//   the lower one of two as near
//
// so |x - x^| <= scale / 2 without a codebook, and a group of equal numbers is exact (scale 0,
// codes 0). A group that holds an infinity or a NaN, or spans more than the type does, becomes NaN
// (scale 0, min NaN). Outliers of a token are its `outliers` channels furthest from the mean of
// their group (of two as far, the lower channel).
//
// When tokens enter pages. A dense side takes them at once. A quantized one holds them in its tail
// and commits `step` at a time, while the tail has at least window + step tokens:
//
//   KIVI's keys: window 0, step R, channel axis        KIVI's values: window R, step 1, token axis
//
// A row's result depends on nothing but the row, so rows are split over threads freely.
#pragma once

#include "core/kernel_table.h"
#include "core/kv_pages.h"
#include "core/parallel.h"

namespace ow {

// Channels up to which codes and ranges of a token fit on the stack, and those that an
// outlier_index can name.
constexpr int64_t kMaxKVChannels = 1024;
constexpr int64_t kMaxOutlierChannels = 256;
constexpr int64_t kMaxKVGroup = 128;

enum class KVPart : int32_t { keys, values };

OW_INLINE const KVSide& side_of(const KVPages& p, KVPart part) {
  return part == KVPart::keys ? p.keys : p.values;
}

// The score of a page for one row of the block table, from its bounds:
//
//   u(query, 16 tokens) = sum_c max(q[c] * key_min[c], q[c] * key_max[c])   >= q . x^ of any token
//   page = max or sum over queries of max over its 16 tokens of u           (chunks)
//   page = max or sum over queries of u with bounds of the whole page       (flat; never less)
//
// q_positive and q_negative are max(q, 0) and min(q, 0), [queries, d] float.
struct PageScoreArgs {
  const KVPages* pages;
  int64_t row, queries;
  const float* q_positive;
  const float* q_negative;
  bool chunks;
  bool sum;
  float* scores;  // [pages with tokens]
};

struct KVCacheKernels {
  // Tokens [first, first + count) of a row into its pages, from rows of the float type `stride`
  // elements apart. On a channel axis, whole groups.
  void (*write)(const KVPages&, KVPart, int64_t row, int64_t first, int64_t count, const void* x,
                int64_t stride);
  // x^ of tokens in pages, [count, d] of `type`.
  void (*read)(const KVPages&, KVPart, int64_t row, int64_t first, int64_t count, FloatType type,
               void* y);
  // Tokens in pages to an earlier place, bit for bit. On a channel axis, whole groups.
  void (*move)(const KVPages&, KVPart, int64_t row, int64_t from, int64_t to, int64_t count);
  // Bounds of every 16 tokens that reach into [first, end), of which those below `end` are held.
  void (*bound)(const KVPages&, int64_t row, int64_t first, int64_t end);
  // Scores of pages [begin, end).
  void (*score)(const PageScoreArgs&, int64_t begin, int64_t end);
};

#define OW_KV_CACHE_KERNELS(X)                       \
  OW_IF_AVX512(X(avx512, 0, kAnyM, kv_cache_avx512)) \
  OW_IF_AVX2(X(avx2, 0, kAnyM, kv_cache_avx2))       \
  X(scalar, 0, kAnyM, kv_cache_scalar)

#define OW_DECLARE(isa, key, max_m, kernels) extern const KVCacheKernels kernels;
OW_KV_CACHE_KERNELS(OW_DECLARE)
#undef OW_DECLARE

const KVCacheKernels& kv_cache_kernels(Isa isa);

// Calls task(row, index of the thread's task) for each row of the block table; `tokens` of each are
// worked on.
template <class Task>
void kv_each_row(const KVPages& p, int64_t tokens, const Parallel& parallel, const Task& task) {
  // Elements below which another thread costs more than it saves (about 4 us).
  constexpr int64_t kElementsPerTask = 16384;
  const int64_t rows = p.b * p.kv_heads;
  const int64_t work = div_up(rows * tokens * (p.keys.d + p.values.d), kElementsPerTask);
  const int64_t tasks = min_of(min_of(parallel.threads, rows), work > 1 ? work : 1);
  parallel.for_each(tasks, [&](int64_t i) {
    for (int64_t row = rows * i / tasks; row < rows * (i + 1) / tasks; ++row) task(row, i);
  });
}

// What a side would have committed at that length.
OW_INLINE int64_t committed_at(const KVSide& side, int64_t committed, int64_t length) {
  if (is_dense(side)) return length;
  const int64_t due = length - committed - side.window;
  return due < side.step ? committed : committed + due / side.step * side.step;
}

// Where the element (sequence, token, head, 0) of new keys or values is; the last stride is 1.
struct KVStrides {
  int64_t b, token, head;
};
struct KVAppendArgs {
  int64_t t;              // tokens a sequence, at most
  const int32_t* counts;  // [b] of them that there are, or null
  const void* keys;       // [b, t, kv_heads, d] of the float type
  KVStrides key_strides;
  const void* values;
  KVStrides value_strides;
  const int32_t* positions;  // [b, t] contiguous, where pages have positions
  bool commit;
};
// Room is there: pages for what enters them, and in the tail where nothing is committed.
void kv_append(const KVPages& pages, const KVAppendArgs& args, Isa isa, const Parallel& parallel);

// x^ of tokens [begin, end) of every row, zeros past its length.
void kv_read(const KVPages& pages, int64_t begin, int64_t end, void* keys, void* values, Isa isa,
             const Parallel& parallel);

// Forgets the last drop[sequence] tokens of each row.
void kv_rollback(const KVPages& pages, const int32_t* drop, Isa isa, const Parallel& parallel);

// Keeps the tokens before begins[sequence] and those in `kept`, which move down in order. A group
// of a channel axis that stays whole and aligned moves bit for bit; others are quantized anew from
// what they hold. Tokens that fill no group go to the tail.
struct KVCompactArgs {
  int64_t n;              // of kept, at most
  const int32_t* kept;    // [b, kv_heads, n], rising, -1 past the end
  const int32_t* begins;  // [b], or null: 0
  void* staging;          // kv_staging_bytes
};
// Tokens that are left, and of them those in pages on a side.
int64_t kv_kept_length(const KVPages& pages, const KVCompactArgs& args, int64_t row);
int64_t kv_kept_committed(const KVPages& pages, KVPart part, const KVCompactArgs& args,
                          int64_t row);
void kv_compact(const KVPages& pages, const KVCompactArgs& args, Isa isa, const Parallel& parallel);

// x[target] = own * x[target] + sum over its sources of weight * x[source], in fp32 in this order;
// with `norms`, keys are scaled to own * |x[target]| + sum of weight * |x[source]|. Targets of a
// group on a channel axis are merged together, from what it and the sources then hold, and the
// group is quantized anew.
struct KVMergeArgs {
  int64_t m, n;            // targets and sources of a row, at most
  const int32_t* targets;  // [b, kv_heads, m], rising, -1 past the end
  const float* own;        // [b, kv_heads, m]
  const int32_t*
      indptr;  // [b, kv_heads, m + 1]: sources of target i are indptr[i] .. indptr[i + 1]
  const int32_t* sources;  // [b, kv_heads, n]
  const float* weights;    // [b, kv_heads, n]
  bool keys, values, norms;
  void* staging;  // kv_staging_bytes
};
void kv_merge(const KVPages& pages, const KVMergeArgs& args, Isa isa, const Parallel& parallel);

// For so many threads.
int64_t kv_staging_bytes(const KVPages& pages, int64_t threads);

void page_bounds(const KVPages& pages, Isa isa, const Parallel& parallel);

// Of each row's pages with keys: the newest, and the others of the largest scores (of two alike,
// the older) up to `budget` together. scratch has kv_select_bytes.
struct KVSelectArgs {
  int64_t queries;  // t * heads / kv_heads of a row
  const void* q;    // [b, t, heads, d] of the float type, contiguous
  int64_t t, heads;
  int64_t budget;
  bool chunks, sum;
  int32_t* selected;  // [b, kv_heads, budget]: places in the block table, rising, -1 past the end
  uint8_t* scratch;
};
int64_t kv_select_bytes(const KVPages& pages, int64_t queries);
void select_pages(const KVPages& pages, const KVSelectArgs& args, Isa isa,
                  const Parallel& parallel);

}  // namespace ow
