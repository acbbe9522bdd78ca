// What is read of a cache without changing it, and the bounds that are made of its pages.
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

}  // namespace ow
