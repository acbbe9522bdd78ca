#include "kernels/sparse_gemm/sparse_gemm.h"

namespace ow {
namespace {

bool is_nonzero(const SparsePackArgs& a, int64_t at) {
  switch (a.type) {
    case ValueType::f32: return static_cast<const float*>(a.weight)[at] != 0.0f;
    case ValueType::bf16: return (static_cast<const bf16*>(a.weight)[at].bits & 0x7fff) != 0;
    default: return static_cast<const int8_t*>(a.weight)[at] != 0;
  }
}

uint64_t mask_of(const SparsePackArgs& a, int64_t n, int64_t block) {
  uint64_t mask = 0;
  const int64_t begin = block * kSparseBlockK;
  for (int64_t k = begin; n < a.n && k < min_of(begin + kSparseBlockK, a.k); ++k) {
    const int64_t at = n * a.k + k;
    const bool stored = a.keep != nullptr ? a.keep[at] != 0 : is_nonzero(a, at);
    mask |= uint64_t(stored) << (k - begin);
  }
  return mask;
}

// Calls body(value index, element index) for each element stored in a panel's logical rows.
template <class Body>
void for_each_stored(const SparsePattern& w, int64_t panel, const Body& body) {
  for (int64_t b = 0; b < w.k_blocks; ++b) {
    const int64_t block = panel * w.k_blocks + b;
    int64_t value = w.offsets[block];
    for (int64_t r = 0; r < kSparsePanel; ++r) {
      uint64_t mask = w.masks[block * kSparsePanel + r];
      for (; mask != 0; mask &= mask - 1, ++value) {
        const int64_t n = panel * kSparsePanel + r;
        const int64_t k = b * kSparseBlockK + __builtin_ctzll(mask);
        if (n < w.n && k < w.k) body(value, n * w.k + k);
      }
    }
  }
}

}  // namespace

int64_t sparse_pattern_of(const SparsePackArgs& a, uint64_t* masks, int32_t* offsets,
                          const Parallel& parallel) {
  const SparsePattern w = sparse_pattern(a.n, a.k);
  parallel.for_each(w.panels, [&](int64_t panel) {
    for (int64_t b = 0; b < w.k_blocks; ++b) {
      uint64_t* rows = masks + (panel * w.k_blocks + b) * kSparsePanel;
      for (int64_t r = 0; r < kSparsePanel; ++r) rows[r] = mask_of(a, panel * kSparsePanel + r, b);
    }
  });
  int64_t count = 0;
  for (int64_t block = 0; block < w.panels * w.k_blocks; ++block) {
    offsets[block] = int32_t(count);
    for (int64_t r = 0; r < kSparsePanel; ++r) {
      count += __builtin_popcountll(masks[block * kSparsePanel + r]);
    }
  }
  return count;
}

void sparse_values_of(const SparsePackArgs& a, const SparsePattern& w, void* values,
                      const Parallel& parallel) {
  const size_t size = size_t(value_size(a.type));
  parallel.for_each(w.panels, [&](int64_t panel) {
    for_each_stored(w, panel, [&](int64_t value, int64_t at) {
      memcpy(static_cast<uint8_t*>(values) + size_t(value) * size,
             static_cast<const uint8_t*>(a.weight) + size_t(at) * size, size);
    });
  });
}

void expand_sparse(const SparsePattern& w, ValueType type, const void* values, void* weight,
                   const Parallel& parallel) {
  const size_t size = size_t(value_size(type));
  parallel.for_each(w.panels, [&](int64_t panel) {
    const int64_t begin = panel * kSparsePanel;
    uint8_t* rows = static_cast<uint8_t*>(weight) + size_t(begin * w.k) * size;
    memset(rows, 0, size_t(min_of(kSparsePanel, w.n - begin) * w.k) * size);
    for_each_stored(w, panel, [&](int64_t value, int64_t at) {
      memcpy(static_cast<uint8_t*>(weight) + size_t(at) * size,
             static_cast<const uint8_t*>(values) + size_t(value) * size, size);
    });
  });
}

}  // namespace ow
