#include "kernels/kv_cache/kv_cache.h"

#include <tuple>

#include "ops/kv_pages.h"

namespace ow {
namespace {

using Tensors = std::vector<Tensor>;
using Format = std::vector<int64_t>;

void check_each_sequence(const char* op, const char* name, const Tensor& tensor, int64_t b) {
  check_operand(op, name, tensor, ScalarType::Int, {b});
}

// [b, t, kv_heads, d] of the cache's type, last stride 1.
KVStrides check_tokens_of(const char* op, const char* name, const Tensor& x, const KVPages& p,
                          int64_t t, int64_t d) {
  check_defined(op, name, x);
  check_float(op, name, x);
  OW_CHECK(float_type(x) == p.type, op, ": ", name, " must be of the dtype of the pages, got ",
           dtype_name(x.scalar_type()));
  check_shape(op, name, x, {p.b, t, p.kv_heads, d});
  check_last_stride(op, name, x);
  return {x.stride(0), x.stride(1), x.stride(2)};
}

// Room for `count` more tokens of a row, and pages for those that enter them.
void check_room(const char* op, const KVPages& p, int64_t row, int64_t count, bool commit) {
  const int64_t length = p.lengths[row] + count;
  OW_CHECK(length <= p.max_pages * p.page_size, op, ": pages must have room for ", length,
           " tokens, got max_pages * page_size = ", p.max_pages * p.page_size);
  for (const KVSide* side : {&p.keys, &p.values}) {
    const int64_t held = side->committed[row];
    const bool enters = commit || is_dense(*side);
    OW_CHECK(enters || length - held <= p.tail_len, op, ": the tail must have room for ",
             length - held, " tokens, got tail_len = ", p.tail_len, "; call kv_commit first");
    if (enters) check_kv_table(op, p, row, held, committed_at(*side, held, length));
  }
}

void kv_append_op(const Tensor& keys, const Tensor& values, const std::optional<Tensor>& counts,
                  const std::optional<Tensor>& positions, bool commit, Tensors tensors,
                  Format format) {
  constexpr const char* kOp = "kv_append";
  const KVPages p = check_kv_pages(kOp, tensors, format);
  check_defined(kOp, "keys", keys);
  OW_CHECK(keys.dim() == 4, kOp, ": keys must be [b, t, kv_heads, d], got ", shape_text(keys));
  KVAppendArgs args{};
  args.t = keys.size(1);
  args.key_strides = check_tokens_of(kOp, "keys", keys, p, args.t, p.keys.d);
  args.value_strides = check_tokens_of(kOp, "values", values, p, args.t, p.values.d);
  args.keys = keys.const_data_ptr();
  args.values = values.const_data_ptr();
  args.commit = commit;
  if (counts.has_value()) {
    check_each_sequence(kOp, "counts", *counts, p.b);
    args.counts = static_cast<const int32_t*>(counts->const_data_ptr());
    for (int64_t i = 0; i < p.b; ++i) {
      OW_CHECK(args.counts[i] >= 0 && args.counts[i] <= args.t, kOp, ": counts must be in 0 .. ",
               args.t, " (tokens of keys), got ", args.counts[i]);
    }
  }
  OW_CHECK(positions.has_value() == (p.positions != nullptr), kOp, ": positions must be ",
           p.positions != nullptr ? "given, as pages hold them" : "None, as pages hold none",
           ", got ", positions.has_value() ? "a tensor" : "None");
  if (positions.has_value()) {
    check_operand(kOp, "positions", *positions, ScalarType::Int, {p.b, args.t});
    args.positions = static_cast<const int32_t*>(positions->const_data_ptr());
  }
  for (int64_t row = 0; row < p.b * p.kv_heads; ++row) {
    const int64_t count = args.counts == nullptr ? args.t : args.counts[row / p.kv_heads];
    check_room(kOp, p, row, count, commit);
  }
  kv_append(p, args, active_isa(), torch_parallel());
}

void kv_commit_op(Tensors tensors, Format format) {
  constexpr const char* kOp = "kv_commit";
  const KVPages p = check_kv_pages(kOp, tensors, format);
  for (int64_t row = 0; row < p.b * p.kv_heads; ++row) check_room(kOp, p, row, 0, true);
  KVAppendArgs args{};
  args.commit = true;
  kv_append(p, args, active_isa(), torch_parallel());
}

std::tuple<Tensor, Tensor> kv_read_op(Tensors tensors, Format format, int64_t begin, int64_t end) {
  constexpr const char* kOp = "kv_read";
  const KVPages p = check_kv_pages(kOp, tensors, format);
  const int64_t capacity = p.max_pages * p.page_size;
  OW_CHECK(begin >= 0 && begin <= end && end <= capacity, kOp, ": begin and end must be in 0 .. ",
           capacity, " and rise, got ", begin, " and ", end);
  for (int64_t row = 0; row < p.b * p.kv_heads; ++row) {
    check_kv_table(kOp, p, row, begin, min_of(end, p.keys.committed[row]));
    check_kv_table(kOp, p, row, begin, min_of(end, p.values.committed[row]));
  }
  const ScalarType dtype = tensors[is_dense(p.keys) ? 2 : 6].scalar_type();
  Tensor keys = fast_empty({p.b, p.kv_heads, end - begin, p.keys.d}, dtype);
  Tensor values = fast_empty({p.b, p.kv_heads, end - begin, p.values.d}, dtype);
  kv_read(p, begin, end, keys.mutable_data_ptr(), values.mutable_data_ptr(), active_isa(),
          torch_parallel());
  return {keys, values};
}

void kv_rollback_op(const Tensor& drop, Tensors tensors, Format format) {
  constexpr const char* kOp = "kv_rollback";
  const KVPages p = check_kv_pages(kOp, tensors, format);
  check_each_sequence(kOp, "drop", drop, p.b);
  const int32_t* dropped = static_cast<const int32_t*>(drop.const_data_ptr());
  for (int64_t row = 0; row < p.b * p.kv_heads; ++row) {
    const int64_t count = dropped[row / p.kv_heads];
    OW_CHECK(count >= 0 && count <= p.lengths[row], kOp, ": drop must be in 0 .. ", p.lengths[row],
             " (tokens held), got ", count);
    // The group and the 16 tokens that the new end lies in are read.
    const int64_t length = p.lengths[row] - count;
    const int64_t begin = length - length % p.page_size;
    check_kv_table(kOp, p, row, begin, min_of(length, p.keys.committed[row]));
    check_kv_table(kOp, p, row, begin, min_of(length, p.values.committed[row]));
  }
  kv_rollback(p, dropped, active_isa(), torch_parallel());
}

void page_bounds_op(Tensors tensors, Format format) {
  constexpr const char* kOp = "page_bounds";
  const KVPages p = check_kv_pages(kOp, tensors, format);
  OW_CHECK(p.key_min != nullptr, kOp, ": pages must keep bounds, got a format without");
  for (int64_t row = 0; row < p.b * p.kv_heads; ++row) {
    check_kv_table(kOp, p, row, 0, p.keys.committed[row]);
  }
  page_bounds(p, active_isa(), torch_parallel());
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def(
      "kv_append(Tensor keys, Tensor values, Tensor? counts, Tensor? positions, bool commit, "
      "Tensor(a!)[] pages, int[] format) -> ()");
  m.def("kv_commit(Tensor(a!)[] pages, int[] format) -> ()");
  m.def("kv_read(Tensor[] pages, int[] format, int begin, int end) -> (Tensor, Tensor)");
  m.def("kv_rollback(Tensor drop, Tensor(a!)[] pages, int[] format) -> ()");
  m.def("page_bounds(Tensor(a!)[] pages, int[] format) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("kv_append", TORCH_BOX(&ow::kv_append_op));
  m.impl("kv_commit", TORCH_BOX(&ow::kv_commit_op));
  m.impl("kv_read", TORCH_BOX(&ow::kv_read_op));
  m.impl("kv_rollback", TORCH_BOX(&ow::kv_rollback_op));
  m.impl("page_bounds", TORCH_BOX(&ow::page_bounds_op));
}
