#include "kernels/kv_cache/kv_cache.h"

namespace ow {
namespace {

constexpr KernelEntry<const KVCacheKernels*> kTable[] = {
#define OW_ROW(isa, key, max_m, kernels) {#kernels, Isa::isa, key, max_m, &kernels},
    OW_KV_CACHE_KERNELS(OW_ROW)
#undef OW_ROW
};

// One side of a row while it changes.
struct Side {
  const KVPages& p;
  const KVSide& s;
  KVPart part;
  int64_t row;
  const KVCacheKernels& kernels;

  Side(const KVPages& pages, KVPart which, int64_t r, const KVCacheKernels& k)
      : p(pages), s(side_of(pages, which)), part(which), row(r), kernels(k) {}

  int64_t row_bytes() const { return s.d * float_size(p.type); }
  char* tail(int64_t token) const {
    return static_cast<char*>(s.tail) + (row * p.tail_len + token % p.tail_len) * row_bytes();
  }
  // Tokens from `token` on that lie together in the tail.
  int64_t run(int64_t token, int64_t count) const {
    return min_of(count, p.tail_len - token % p.tail_len);
  }

  void clear_page(int64_t page) const {
    const auto clear = [&](void* base, int64_t bytes) {
      if (base != nullptr) memset(static_cast<char*>(base) + page * bytes, 0, size_t(bytes));
    };
    const int64_t size = float_size(p.type);
    if (is_dense(s)) return clear(s.rows, p.page_size * row_bytes());
    clear(s.codes, part == KVPart::keys ? kv_key_page_bytes(s.bits, p.page_size, s.d)
                                        : kv_value_page_bytes(s.bits, p.page_size, s.d));
    clear(s.scales, kv_scales_per_page(s, p.page_size) * size);
    clear(s.mins, kv_scales_per_page(s, p.page_size) * size);
    clear(s.outlier_index, p.page_size * s.outliers);
    clear(s.outlier_values, p.page_size * s.outliers * size);
  }

  // New tokens into pages, which are clear when their first token comes.
  void write(int64_t first, int64_t count, const void* x, int64_t stride) const {
    for (int64_t t = round_up(first, p.page_size); t < first + count; t += p.page_size) {
      clear_page(p.block_table[row * p.max_pages + t / p.page_size]);
    }
    kernels.write(p, part, row, first, count, x, stride);
  }

  // From the tail to pages, as far as the rule says.
  void commit(int64_t length) const {
    const int64_t end = committed_at(s, s.committed[row], length);
    for (int64_t t = s.committed[row]; t < end;) {
      const int64_t count = run(t, end - t);
      write(t, count, tail(t), s.d);
      t += count;
    }
    s.committed[row] = int32_t(end);
  }

  // x of `count` tokens, `stride` elements apart.
  void append(int64_t length, int64_t count, const char* x, int64_t stride, bool commits) const {
    if (is_dense(s)) return write(length, count, x, stride);
    while (count > 0) {
      int64_t room = p.tail_len - (length - s.committed[row]);
      if (room == 0) {
        commit(length);
        room = p.tail_len - (length - s.committed[row]);
      }
      const int64_t taken = min_of(room, count);
      for (int64_t i = 0; i < taken; ++i) {
        memcpy(tail(length + i), x, size_t(row_bytes()));
        x += stride * float_size(p.type);
      }
      length += taken;
      count -= taken;
    }
    if (commits) commit(length);
  }

  // The last tokens of a group that loses some go back to the tail.
  void rollback(int64_t length) const {
    if (is_dense(s) || length >= s.committed[row]) return;
    const int64_t end = s.axis == KVAxis::channel ? length / s.group_size * s.group_size : length;
    if (end < length) kernels.read(p, part, row, end, length - end, p.type, tail(end));
    s.committed[row] = int32_t(end);
  }
};

// Tokens of the key side in pages, where that side is dense: the length.
int64_t keys_in_pages(const KVPages& p, int64_t row) { return p.keys.committed[row]; }

void append_row(const KVPages& p, const KVAppendArgs& a, const KVCacheKernels& kernels,
                int64_t row) {
  const int64_t sequence = row / p.kv_heads;
  const int64_t head = row % p.kv_heads;
  const int64_t count = a.counts == nullptr ? a.t : a.counts[sequence];
  const int64_t length = p.lengths[row];
  const int64_t bounded = keys_in_pages(p, row);
  const auto add = [&](KVPart part, const void* x, const KVStrides& strides) {
    const int64_t offset = sequence * strides.b + head * strides.head;
    Side(p, part, row, kernels)
        .append(length, count, static_cast<const char*>(x) + offset * float_size(p.type),
                strides.token, a.commit);
  };
  add(KVPart::keys, a.keys, a.key_strides);
  add(KVPart::values, a.values, a.value_strides);
  if (p.positions != nullptr) {
    memcpy(p.positions + row * p.max_pages * p.page_size + length, a.positions + sequence * a.t,
           size_t(count) * sizeof(int32_t));
  }
  p.lengths[row] = int32_t(length + count);
  if (p.key_min != nullptr && keys_in_pages(p, row) > bounded) {
    kernels.bound(p, row, bounded, keys_in_pages(p, row));
  }
}

}  // namespace

const KVCacheKernels& kv_cache_kernels(Isa isa) { return *pick(kTable, isa, 0, 1).fn; }

void kv_append(const KVPages& p, const KVAppendArgs& args, Isa isa, const Parallel& parallel) {
  const KVCacheKernels& kernels = kv_cache_kernels(isa);
  kv_each_row(p, args.t, parallel,
              [&](int64_t row, int64_t) { append_row(p, args, kernels, row); });
}

void kv_rollback(const KVPages& p, const int32_t* drop, Isa isa, const Parallel& parallel) {
  const KVCacheKernels& kernels = kv_cache_kernels(isa);
  kv_each_row(p, 1, parallel, [&](int64_t row, int64_t) {
    const int64_t length = p.lengths[row] - drop[row / p.kv_heads];
    const int64_t bounded = keys_in_pages(p, row);
    Side(p, KVPart::keys, row, kernels).rollback(length);
    Side(p, KVPart::values, row, kernels).rollback(length);
    p.lengths[row] = int32_t(length);
    // Only the last tokens' bounds still count some that are gone.
    const int64_t left = keys_in_pages(p, row);
    if (p.key_min != nullptr && left < bounded && left % kBoundTokens != 0) {
      kernels.bound(p, row, left - 1, left);
    }
  });
}

}  // namespace ow
