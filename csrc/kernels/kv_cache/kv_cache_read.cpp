// What is read of a cache without changing it, and the bounds that are made of its pages.
#include <algorithm>

#include "kernels/kv_cache/kv_cache.h"

namespace ow {
namespace {

void read_row(const KVPages& p, KVPart part, const KVCacheKernels& kernels, int64_t row,
              int64_t begin, int64_t end, void* y) {
  const KVSide& side = side_of(p, part);
  const int64_t bytes = side.d * float_size(p.type);
  char* out = static_cast<char*>(y) + row * (end - begin) * bytes;
  const int64_t held = min_of(end, p.lengths[row]);
  const int64_t in_pages = min_of(held, side.committed[row]);
  int64_t token = begin;
  if (token < in_pages) {
    kernels.read(p, part, row, token, in_pages - token, p.type, out);
    token = in_pages;
  }
  for (; token < held; ++token) {
    const int64_t slot = row * p.tail_len + token % p.tail_len;
    memcpy(out + (token - begin) * bytes, static_cast<const char*>(side.tail) + slot * bytes,
           size_t(bytes));
  }
  memset(out + (token - begin) * bytes, 0, size_t((end - token) * bytes));
}

int64_t pages_of(const KVPages& p, int64_t row) {
  return div_up(p.keys.committed[row], p.page_size);
}

// The scratch of select_pages.
struct SelectScratch {
  float* positive;  // [rows, queries, d], as negative
  float* negative;
  float* scores;   // [rows, max_pages]
  int32_t* order;  // [rows, max_pages]
  int64_t bytes;

  SelectScratch(const KVPages& p, int64_t queries, uint8_t* memory) {
    const int64_t rows = p.b * p.kv_heads;
    positive = reinterpret_cast<float*>(memory);
    negative = positive + rows * queries * p.keys.d;
    scores = negative + rows * queries * p.keys.d;
    order = reinterpret_cast<int32_t*>(scores + rows * p.max_pages);
    bytes = 4 * rows * (2 * queries * p.keys.d + 2 * p.max_pages);
  }
};

// The queries of each row, those of all its heads.
void split_queries(const KVPages& p, const KVSelectArgs& a, const SelectScratch& scratch) {
  const int64_t d = p.keys.d;
  const int64_t group = a.heads / p.kv_heads;
  int64_t out = 0;
  for (int64_t row = 0; row < p.b * p.kv_heads; ++row) {
    for (int64_t i = 0; i < a.queries; ++i) {
      const int64_t token = row / p.kv_heads * a.t + i / group;
      const int64_t head = row % p.kv_heads * group + i % group;
      for (int64_t c = 0; c < d; ++c, ++out) {
        const float q = read_float(a.q, p.type, (token * a.heads + head) * d + c);
        scratch.positive[out] = q > 0.0f ? q : 0.0f;
        scratch.negative[out] = q < 0.0f ? q : 0.0f;
      }
    }
  }
}

void choose_pages(int64_t pages, int64_t budget, float* scores, int32_t* order, int32_t* selected) {
  const int64_t count = min_of(pages, budget);
  for (int64_t i = 0; i < pages; ++i) {
    order[i] = int32_t(i);
    // A NaN has no place in an order.
    if (!(scores[i] >= -__builtin_inff())) scores[i] = -__builtin_inff();
  }
  if (count > 0 && count < pages) {
    // All but the newest compete for all but one place.
    std::nth_element(order, order + count - 1, order + pages - 1, [&](int32_t a, int32_t b) {
      return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    });
    order[count - 1] = int32_t(pages - 1);
    std::sort(order, order + count);
  }
  for (int64_t i = 0; i < budget; ++i) selected[i] = i < count ? order[i] : -1;
}

}  // namespace

void kv_read(const KVPages& p, int64_t begin, int64_t end, void* keys, void* values, Isa isa,
             const Parallel& parallel) {
  const KVCacheKernels& kernels = kv_cache_kernels(isa);
  kv_each_row(p, end - begin, parallel, [&](int64_t row, int64_t) {
    read_row(p, KVPart::keys, kernels, row, begin, end, keys);
    read_row(p, KVPart::values, kernels, row, begin, end, values);
  });
}

void page_bounds(const KVPages& p, Isa isa, const Parallel& parallel) {
  const KVCacheKernels& kernels = kv_cache_kernels(isa);
  kv_each_row(p, p.max_pages * p.page_size, parallel, [&](int64_t row, int64_t) {
    const int64_t held = p.keys.committed[row];
    if (held > 0) kernels.bound(p, row, 0, held);
  });
}

int64_t kv_select_bytes(const KVPages& p, int64_t queries) {
  return SelectScratch(p, queries, nullptr).bytes;
}

void select_pages(const KVPages& p, const KVSelectArgs& a, Isa isa, const Parallel& parallel) {
  // Pages of a task, so that few long rows are shared by threads too; about 4 us.
  constexpr int64_t kPagesPerTask = 64;
  const KVCacheKernels& kernels = kv_cache_kernels(isa);
  const SelectScratch scratch(p, a.queries, a.scratch);
  split_queries(p, a, scratch);
  const int64_t rows = p.b * p.kv_heads;
  int64_t longest = 0;
  for (int64_t row = 0; row < rows; ++row) longest = std::max(longest, pages_of(p, row));
  const int64_t blocks = div_up(longest, kPagesPerTask);
  parallel.for_each(rows * blocks, [&](int64_t i) {
    const int64_t row = i / blocks;
    const int64_t begin = i % blocks * kPagesPerTask;
    const int64_t end = min_of(begin + kPagesPerTask, pages_of(p, row));
    const int64_t queries = row * a.queries * p.keys.d;
    const PageScoreArgs score{&p,
                              row,
                              a.queries,
                              scratch.positive + queries,
                              scratch.negative + queries,
                              a.chunks,
                              a.sum,
                              scratch.scores + row * p.max_pages};
    kernels.score(score, begin, end);
  });
  kv_each_row(p, longest, parallel, [&](int64_t row, int64_t) {
    choose_pages(pages_of(p, row), a.budget, scratch.scores + row * p.max_pages,
                 scratch.order + row * p.max_pages, a.selected + row * a.budget);
  });
}

}  // namespace ow
