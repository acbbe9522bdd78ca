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

// Which of 64 elements of row n from k = begin on are stored.
uint64_t mask_of(const SparsePackArgs& a, int64_t n, int64_t begin) {
  uint64_t mask = 0;
  for (int64_t k = begin; n < a.n && k < min_of(begin + 64, a.k); ++k) {
    const int64_t at = n * a.k + k;
    const bool stored = a.keep != nullptr ? a.keep[at] != 0 : is_nonzero(a, at);
    mask |= uint64_t(stored) << (k - begin);
  }
  return mask;
}

// Calls body(value index, element index) for each element stored in a panel's logical rows.
template <class Body>
void for_each_element(const SparsePattern& w, int64_t panel, const Body& body) {
  for (int64_t b = 0; b < w.k_blocks; ++b) {
    for_each_stored(w, panel * w.k_blocks + b, [&](int64_t value, int64_t r, int64_t column) {
      const int64_t n = panel * kSparsePanel + r;
      const int64_t k = b * w.block_k + column;
      if (n < w.n && k < w.k) body(value, n * w.k + k);
    });
  }
}

// Counts and columns of a block.
void write_bytes(const SparsePackArgs& a, int64_t panel, int64_t b, uint8_t* counts) {
  uint8_t* column = counts + kCountBytes;
  for (int64_t r = 0; r < kSparsePanel; ++r) {
    const uint8_t* first = column;
    for (int64_t j = 0; j < kBytesK; j += 64) {
      uint64_t mask = mask_of(a, panel * kSparsePanel + r, b * kBytesK + j);
      for (; mask != 0; mask &= mask - 1) *column++ = uint8_t(j + __builtin_ctzll(mask));
    }
    const uint16_t count = uint16_t(column - first);
    memcpy(counts + 2 * r, &count, 2);
  }
}

}  // namespace

int64_t sparse_offsets_of(const SparsePackArgs& a, const SparsePattern& w, int32_t* offsets,
                          const Parallel& parallel) {
  parallel.for_each(w.panels, [&](int64_t panel) {
    for (int64_t b = 0; b < w.k_blocks; ++b) {
      int32_t count = 0;
      for (int64_t r = 0; r < kSparsePanel; ++r) {
        for (int64_t j = 0; j < w.block_k; j += 64) {
          count += __builtin_popcountll(mask_of(a, panel * kSparsePanel + r, b * w.block_k + j));
        }
      }
      offsets[panel * w.k_blocks + b] = count;
    }
  });
  int64_t sum = 0;
  for (int64_t block = 0; block < w.panels * w.k_blocks; ++block) {
    const int32_t count = offsets[block];
    offsets[block] = int32_t(sum);
    sum += count;
  }
  return sum;
}

void sparse_index_of(const SparsePackArgs& a, const SparsePattern& w, void* index,
                     const Parallel& parallel) {
  parallel.for_each(w.panels, [&](int64_t panel) {
    for (int64_t b = 0; b < w.k_blocks; ++b) {
      const int64_t block = panel * w.k_blocks + b;
      if (w.block_k == kBytesK) {
        uint8_t* counts = static_cast<uint8_t*>(index) + block * kCountBytes + w.offsets[block];
        write_bytes(a, panel, b, counts);
        continue;
      }
      uint64_t* masks = static_cast<uint64_t*>(index) + block * kSparsePanel;
      for (int64_t r = 0; r < kSparsePanel; ++r) {
        masks[r] = mask_of(a, panel * kSparsePanel + r, b * kMaskK);
      }
    }
  });
}

void sparse_values_of(const SparsePackArgs& a, const SparsePattern& w, void* values,
                      const Parallel& parallel) {
  const size_t size = size_t(value_size(a.type));
  parallel.for_each(w.panels, [&](int64_t panel) {
    for_each_element(w, panel, [&](int64_t value, int64_t at) {
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
    for_each_element(w, panel, [&](int64_t value, int64_t at) {
      memcpy(static_cast<uint8_t*>(weight) + size_t(at) * size,
             static_cast<const uint8_t*>(values) + size_t(value) * size, size);
    });
  });
}

}  // namespace ow
