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
  }
  OW_CHECK(positions.has_value() == (p.positions != nullptr), kOp, ": positions must be ",
           p.positions != nullptr ? "given, as pages hold them" : "None, as pages hold none",
           ", got ", positions.has_value() ? "a tensor" : "None");
  if (positions.has_value()) {
    check_operand(kOp, "positions", *positions, ScalarType::Int, {p.b, args.t});
    args.positions = static_cast<const int32_t*>(positions->const_data_ptr());
  }
  check_kv_values(kOp, p);
  for (int64_t i = 0; args.counts != nullptr && i < p.b; ++i) {
    OW_CHECK(args.counts[i] >= 0 && args.counts[i] <= args.t, kOp, ": counts must be in 0 .. ",
             args.t, " (tokens of keys), got ", args.counts[i]);
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
  check_kv_values(kOp, p);
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
  check_kv_values(kOp, p);
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
  check_kv_values(kOp, p);
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

// Rising tokens in first .. length - 1, then -1; gives how many.
int64_t check_rising(const char* op, const char* name, const int32_t* tokens, int64_t n,
                     int64_t first, int64_t length) {
  int64_t count = 0;
  while (count < n && tokens[count] >= 0) ++count;
  int64_t previous = first - 1;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t token = tokens[i];
    OW_CHECK(i < count ? token > previous && token < length : token == -1, op, ": ", name,
             " must rise in ", first, " .. ", length - 1, " and end in -1, got ", token,
             " at place ", i);
    previous = token;
  }
  return count;
}

// [b, kv_heads, n] contiguous; gives n.
int64_t check_each_row(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                       const KVPages& p) {
  check_defined(op, name, tensor);
  OW_CHECK(tensor.dim() == 3, op, ": ", name, " must be [b, kv_heads, n], got ",
           shape_text(tensor));
  check_operand(op, name, tensor, dtype, {p.b, p.kv_heads, tensor.size(2)});
  return tensor.size(2);
}

template <class T>
const T* row_data(const Tensor& tensor, int64_t row) {
  return static_cast<const T*>(tensor.const_data_ptr()) + row * tensor.size(2);
}

void kv_compact_op(const Tensor& kept, const std::optional<Tensor>& begins, Tensors tensors,
                   Format format) {
  constexpr const char* kOp = "kv_compact";
  const KVPages p = check_kv_pages(kOp, tensors, format);
  KVCompactArgs args{};
  args.n = check_each_row(kOp, "kept", kept, ScalarType::Int, p);
  args.kept = static_cast<const int32_t*>(kept.const_data_ptr());
  if (begins.has_value()) {
    check_each_sequence(kOp, "begins", *begins, p.b);
    args.begins = static_cast<const int32_t*>(begins->const_data_ptr());
  }
  check_kv_values(kOp, p);
  for (int64_t row = 0; row < p.b * p.kv_heads; ++row) {
    const int64_t begin = args.begins == nullptr ? 0 : args.begins[row / p.kv_heads];
    OW_CHECK(begin >= 0 && begin <= p.lengths[row], kOp, ": begins must be in 0 .. ",
             p.lengths[row], " (tokens held), got ", begin);
    check_rising(kOp, "kept", row_data<int32_t>(kept, row), args.n, begin, p.lengths[row]);
    for (const KVPart part : {KVPart::keys, KVPart::values}) {
      const KVSide& side = side_of(p, part);
      check_kv_table(kOp, p, row, begin - begin % p.page_size, side.committed[row]);
      const int64_t waiting = kv_kept_length(p, args, row) - kv_kept_committed(p, part, args, row);
      OW_CHECK(is_dense(side) || waiting <= p.tail_len, kOp, ": the tail must have room for ",
               waiting, " tokens, got tail_len = ", p.tail_len, "; call kv_commit first");
    }
  }
  const Parallel parallel = torch_parallel();
  const int64_t bytes = kv_staging_bytes(p, parallel.threads);
  const Workspace workspace(bytes);
  args.staging = workspace.scratch().take<uint8_t>(bytes);
  kv_compact(p, args, active_isa(), parallel);
}

// The targets of a row rise, and its sources are other tokens that are held.
void check_merge(const char* op, const KVPages& p, const KVMergeArgs& a, int64_t row,
                 std::vector<uint8_t>* is_target) {
  const int64_t length = p.lengths[row];
  const int32_t* targets = a.targets + row * a.m;
  const int64_t count = check_rising(op, "targets", targets, a.m, 0, length);
  is_target->assign(size_t(length), 0);
  for (int64_t i = 0; i < count; ++i) (*is_target)[size_t(targets[i])] = 1;
  const int32_t* indptr = a.indptr + row * (a.m + 1);
  bool rises = indptr[0] == 0;
  for (int64_t i = 0; i < a.m; ++i) rises &= indptr[i] <= indptr[i + 1];
  OW_CHECK(rises && indptr[a.m] <= a.n, op, ": indptr must rise from 0 to at most ", a.n,
           " (sources), got other values in row ", row);
  for (int64_t i = 0; i < indptr[a.m]; ++i) {
    const int64_t source = a.sources[row * a.n + i];
    OW_CHECK(source >= 0 && source < length && (*is_target)[size_t(source)] == 0, op,
             ": sources must be tokens in 0 .. ", length - 1, " that are no target, got ", source,
             " in row ", row);
  }
  check_kv_table(op, p, row, 0, p.keys.committed[row]);
  check_kv_table(op, p, row, 0, p.values.committed[row]);
}

void kv_merge_op(const Tensor& targets, const Tensor& own, const Tensor& indptr,
                 const Tensor& sources, const Tensor& weights, bool keys, bool values, bool norms,
                 Tensors tensors, Format format) {
  constexpr const char* kOp = "kv_merge";
  const KVPages p = check_kv_pages(kOp, tensors, format);
  KVMergeArgs args{};
  args.m = check_each_row(kOp, "targets", targets, ScalarType::Int, p);
  args.n = check_each_row(kOp, "sources", sources, ScalarType::Int, p);
  check_operand(kOp, "own", own, ScalarType::Float, {p.b, p.kv_heads, args.m});
  check_operand(kOp, "indptr", indptr, ScalarType::Int, {p.b, p.kv_heads, args.m + 1});
  check_operand(kOp, "weights", weights, ScalarType::Float, {p.b, p.kv_heads, args.n});
  check_kv_values(kOp, p);
  args.targets = static_cast<const int32_t*>(targets.const_data_ptr());
  args.own = static_cast<const float*>(own.const_data_ptr());
  args.indptr = static_cast<const int32_t*>(indptr.const_data_ptr());
  args.sources = static_cast<const int32_t*>(sources.const_data_ptr());
  args.weights = static_cast<const float*>(weights.const_data_ptr());
  args.keys = keys;
  args.values = values;
  args.norms = norms;
  std::vector<uint8_t> is_target;
  for (int64_t row = 0; row < p.b * p.kv_heads; ++row) check_merge(kOp, p, args, row, &is_target);
  const Parallel parallel = torch_parallel();
  const int64_t bytes = kv_staging_bytes(p, parallel.threads);
  const Workspace workspace(bytes);
  args.staging = workspace.scratch().take<uint8_t>(bytes);
  kv_merge(p, args, active_isa(), parallel);
}

// More pages than any row will have; the result has place for so many.
constexpr int64_t kMaxBudget = 1 << 20;

Tensor select_pages_op(const Tensor& q_any, Tensors tensors, Format format, int64_t budget,
                       bool chunks, bool sum) {
  constexpr const char* kOp = "select_pages";
  const KVPages p = check_kv_pages(kOp, tensors, format);
  OW_CHECK(p.key_min != nullptr, kOp, ": pages must keep bounds, got a format without");
  check_float(kOp, "q", q_any);
  OW_CHECK(float_type(q_any) == p.type, kOp, ": q must be of the dtype of the pages, got ",
           dtype_name(q_any.scalar_type()));
  OW_CHECK(q_any.dim() == 4 && q_any.size(0) == p.b && q_any.size(1) >= 1 && q_any.size(2) >= 1 &&
               p.kv_heads >= 1 && q_any.size(2) % p.kv_heads == 0 && q_any.size(3) == p.keys.d,
           kOp, ": q must be [b, t, heads, d] with b = ", p.b, ", heads a multiple of ", p.kv_heads,
           " and d = ", p.keys.d, ", got ", shape_text(q_any));
  OW_CHECK(budget >= 1 && budget <= kMaxBudget, kOp, ": budget must be in 1 .. ", kMaxBudget,
           ", got ", budget);
  check_kv_values(kOp, p);
  for (int64_t row = 0; row < p.b * p.kv_heads; ++row) {
    check_kv_table(kOp, p, row, 0, p.keys.committed[row]);
  }
  Tensor selected = fast_empty({p.b, p.kv_heads, budget}, ScalarType::Int);
  const Tensor q = as_contiguous(q_any);
  KVSelectArgs args{};
  args.t = q.size(1);
  args.heads = q.size(2);
  args.queries = args.t * (args.heads / p.kv_heads);
  args.q = q.const_data_ptr();
  args.budget = budget;
  args.chunks = chunks;
  args.sum = sum;
  args.selected = static_cast<int32_t*>(selected.mutable_data_ptr());
  const int64_t bytes = kv_select_bytes(p, args.queries);
  const Workspace workspace(bytes);
  args.scratch = workspace.scratch().take<uint8_t>(bytes);
  select_pages(p, args, active_isa(), torch_parallel());
  return selected;
}

void page_bounds_op(Tensors tensors, Format format) {
  constexpr const char* kOp = "page_bounds";
  const KVPages p = check_kv_pages(kOp, tensors, format);
  OW_CHECK(p.key_min != nullptr, kOp, ": pages must keep bounds, got a format without");
  check_kv_values(kOp, p);
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
  m.def("kv_compact(Tensor kept, Tensor? begins, Tensor(a!)[] pages, int[] format) -> ()");
  m.def(
      "kv_merge(Tensor targets, Tensor own, Tensor indptr, Tensor sources, Tensor weights, "
      "bool keys, bool values, bool norms, Tensor(a!)[] pages, int[] format) -> ()");
  m.def(
      "select_pages(Tensor q, Tensor[] pages, int[] format, int budget, bool chunks, bool sum) -> "
      "Tensor");
  m.def("page_bounds(Tensor(a!)[] pages, int[] format) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("kv_append", TORCH_BOX(&ow::kv_append_op));
  m.impl("kv_commit", TORCH_BOX(&ow::kv_commit_op));
  m.impl("kv_read", TORCH_BOX(&ow::kv_read_op));
  m.impl("kv_rollback", TORCH_BOX(&ow::kv_rollback_op));
  m.impl("kv_compact", TORCH_BOX(&ow::kv_compact_op));
  m.impl("kv_merge", TORCH_BOX(&ow::kv_merge_op));
  m.impl("select_pages", TORCH_BOX(&ow::select_pages_op));
  m.impl("page_bounds", TORCH_BOX(&ow::page_bounds_op));
}
