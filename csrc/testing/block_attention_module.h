// Binds the block_attention kernels.
#pragma once

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/block_attention/block_attention.h"
#include "testing/arrays_module.h"

namespace ow {

inline const BlockAttentionKernels& block_attention_kernels(const std::string& kernel) {
#define OW_ROW(isa, key, max_m, kernels) \
  if (kernel == #kernels) return kernels;
  OW_BLOCK_ATTENTION_KERNELS(OW_ROW)
#undef OW_ROW
  throw std::invalid_argument("unknown kernel " + kernel);
}

struct FreeMemory {
  void operator()(uint8_t* p) const { std::free(p); }
};
using PoisonedMemory = std::unique_ptr<uint8_t, FreeMemory>;

// Aligned as the operator's; what a kernel reads, it must have written.
inline PoisonedMemory poisoned(int64_t bytes) {
  const size_t size = size_t(round_up(bytes + 1, 64));
  PoisonedMemory memory(static_cast<uint8_t*>(std::aligned_alloc(64, size)));
  memset(memory.get(), 0xff, size);
  return memory;
}

// One head and one sequence: q [queries, d], k [keys, d], v [keys, dv], and for every query tile
// the same lists. Writes o; gives m, l [queries] and the column sums [keys].
inline std::tuple<Array<float>, Array<float>, Array<float>> block_attention_kernel(
    const std::string& kernel, const py::array& q, const py::array& k, const py::array& v,
    float scale, bool causal, int64_t block_n, const std::optional<Array<int32_t>>& blocks,
    const Array<int32_t>& columns, py::array o) {
  for (const auto& array : {q, k, v, py::array(o)}) check_contiguous(array, "operands");
  const BlockAttentionKernels& kernels = block_attention_kernels(kernel);
  AttentionSequence sequence{};
  sequence.queries = q.shape(0);
  sequence.keys = k.shape(0);
  BlockAttentionArgs args{};
  args.heads = args.kv_heads = args.kv_end = args.index_heads = 1;
  args.d = q.shape(1);
  args.dv = v.shape(1);
  args.type = float_type(q, "q");
  args.scale = scale;
  args.mask.causal = causal;
  args.sequences = &sequence;
  args.sequence_count = 1;
  args.q = q.data();
  args.k = k.data();
  args.v = v.data();
  args.q_strides = args.k_strides = {args.d, args.d};
  args.v_strides = {args.dv, args.dv};
  args.block_m = kQueryTile;
  args.block_n = block_n;
  const int32_t no_offsets[2] = {0, 0};
  if (blocks) args.blocks = {no_offsets, blocks->data()};
  if (blocks) args.columns = {no_offsets, columns.data()};
  args.o = o.mutable_data();
  const std::vector<uint8_t> rows(size_t(sequence.queries), 1);
  args.score_rows = rows.data();
  args.packed_unit_bytes = kernels.packed_unit_bytes(args);
  const int64_t units = div_up(sequence.keys, kUnitKeys);
  const PoisonedMemory packed = poisoned(units * args.packed_unit_bytes);
  const PoisonedMemory scratch = poisoned(kernels.scratch_bytes(args));
  args.packed = packed.get();
  Array<float> m(sequence.queries), l(sequence.queries), scores(sequence.keys);
  std::fill_n(scores.mutable_data(), sequence.keys, 0.0f);
  kernels.pack(args, 0, units);
  for (int64_t first = 0; first < sequence.queries; first += kQueryTile) {
    QueryTile tile{};
    tile.sequence = &sequence;
    tile.heads = 1;
    tile.first = first;
    tile.count = min_of(kQueryTile, sequence.queries - first);
    if (blocks) tile.blocks = {blocks->data(), blocks->data() + blocks->size()};
    if (blocks) tile.columns = {columns.data(), columns.data() + columns.size()};
    tile.scores = scores.mutable_data();
    kernels.attend(args, tile, scratch.get());
    std::copy_n(tile.m, tile.count, m.mutable_data() + first);
    std::copy_n(tile.l, tile.count, l.mutable_data() + first);
  }
  return {m, l, scores};
}

inline void bind_block_attention(py::module_& m) {
  m.def("block_attention", &block_attention_kernel, py::arg("kernel"), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("scale"), py::arg("causal"), py::arg("block_n"), py::arg("blocks"),
        py::arg("columns"), py::arg("o"),
        "Writes o [queries, dv]; (m, l, scores), m in powers of two. blocks: None for all keys.");
}

}  // namespace ow
