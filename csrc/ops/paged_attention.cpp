#include "kernels/paged_attention/paged_attention.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "ops/kv_pages.h"

namespace ow {
namespace {

constexpr const char* kOp = "paged_attention";

// q must be [b, t, h, d] of the pages' type; gives t and h.
std::pair<int64_t, int64_t> check_queries(const Tensor& q, const KVPages& kv) {
  check_float(kOp, "q", q);
  OW_CHECK(float_type(q) == kv.type, kOp, ": q must be of the dtype of the pages, got ",
           dtype_name(q.scalar_type()));
  OW_CHECK(q.dim() == 4 && q.size(0) == kv.b && q.size(3) == kv.keys.d, kOp,
           ": q must be [b, t, h, d] with b = ", kv.b, " and d = ", kv.keys.d, ", got ",
           shape_text(q));
  const int64_t t = q.size(1);
  const int64_t h = q.size(2);
  OW_CHECK(t <= kMaxQueries, kOp, ": q must have at most ", kMaxQueries, " tokens, got ", t);
  OW_CHECK(h >= 1 && kv.kv_heads >= 1 && h % kv.kv_heads == 0, kOp,
           ": q must have a multiple of kv_heads = ", kv.kv_heads, " heads, got ", h);
  OW_CHECK(kv.keys.d <= kMaxPagedD && kv.values.d <= kMaxPagedD, kOp,
           ": pages must have keys and values of at most ", kMaxPagedD, " channels, got ",
           kv.keys.d, " and ", kv.values.d);
  return {t, h};
}

void check_rotation(const Tensor* cos, const Tensor* sin, const KVPages& kv,
                    PagedAttentionArgs* args) {
  OW_CHECK((cos == nullptr) == (sin == nullptr), kOp, ": sin must be ",
           cos == nullptr ? "None, as cos is" : "given, as cos is", ", got ",
           sin == nullptr ? "None" : "a tensor");
  if (cos == nullptr) return;
  OW_CHECK(kv.keys.d % 2 == 0, kOp, ": cos must be None where d is odd, got d = ", kv.keys.d);
  check_dtype(kOp, "cos", *cos, ScalarType::Float);
  const int64_t positions = cos->dim() > 0 ? cos->size(0) : 0;
  for (const auto& [name, table] : {std::pair("cos", cos), std::pair("sin", sin)}) {
    check_operand(kOp, name, *table, ScalarType::Float, {positions, kv.keys.d / 2});
  }
  args->cos = static_cast<const float*>(cos->const_data_ptr());
  args->sin = static_cast<const float*>(sin->const_data_ptr());
}

// Every token held must have a row of the `positions` in cos.
void check_positions(const KVPages& kv, int64_t positions) {
  for (int64_t row = 0; row < kv.b * kv.kv_heads; ++row) {
    for (int64_t token = 0; token < kv.lengths[row]; ++token) {
      const int64_t places = kv.max_pages * kv.page_size;
      const int64_t position = kv.positions == nullptr ? token : kv.positions[row * places + token];
      OW_CHECK(position >= 0 && position < positions, kOp, ": cos must have a row for position ",
               position, ", got ", positions, " rows");
    }
  }
}

void check_selected(const Tensor* selected, const KVPages& kv, PagedAttentionArgs* args) {
  if (selected == nullptr) return;
  check_dtype(kOp, "selected", *selected, ScalarType::Int);
  const int64_t budget = selected->dim() == 3 ? selected->size(2) : 0;
  check_operand(kOp, "selected", *selected, ScalarType::Int, {kv.b, kv.kv_heads, budget});
  args->selected = static_cast<const int32_t*>(selected->const_data_ptr());
  args->budget = budget;
}

void check_places(const PagedAttentionArgs& args) {
  const KVPages& kv = args.kv;
  const int64_t budget = args.selected == nullptr ? 0 : args.budget;
  for (int64_t row = 0; row < kv.b * kv.kv_heads; ++row) {
    const int32_t* places = args.selected + row * budget;
    const int64_t pages = div_up(kv.lengths[row], kv.page_size);
    for (int64_t i = 0; i < budget; ++i) {
      const int64_t before = i == 0 ? -1 : places[i - 1];
      const bool rises = places[i] > before && places[i] < pages && (i == 0 || before >= 0);
      OW_CHECK(rises || places[i] == -1, kOp, ": selected must rise within 0 .. ", pages - 1,
               " (pages of the row) and end in -1, got ", places[i], " after ", before, " in row ",
               row);
    }
  }
}

// The pages that will be read.
void check_tables(const PagedAttentionArgs& args) {
  const KVPages& kv = args.kv;
  for (int64_t row = 0; row < items_of(args); ++row) {
    const int64_t newest = newest_of(args, row);
    const int64_t end = std::max(kv.keys.committed[row], kv.values.committed[row]);
    check_kv_table(kOp, kv, row, newest, end);
    if (args.selected == nullptr) check_kv_table(kOp, kv, row, 0, newest);
    for (int64_t i = 0; args.selected != nullptr && i < listed_pages(args, row); ++i) {
      const int64_t begin = args.selected[row * args.budget + i] * kv.page_size;
      check_kv_table(kOp, kv, row, begin, std::min(begin + 1, newest));
    }
  }
}

std::tuple<Tensor, Tensor> paged_attention_op(const Tensor& q_any, std::vector<Tensor> pages,
                                              std::vector<int64_t> format,
                                              const std::optional<Tensor>& selected,
                                              std::optional<double> scale,
                                              const std::optional<Tensor>& cos,
                                              const std::optional<Tensor>& sin) {
  PagedAttentionArgs args{};
  args.kv = check_kv_pages(kOp, pages, format);
  const KVPages& kv = args.kv;
  std::tie(args.queries, args.heads) = check_queries(q_any, kv);
  check_rotation(or_null(cos), or_null(sin), kv, &args);
  check_selected(or_null(selected), kv, &args);
  check_kv_values(kOp, kv);
  if (cos.has_value()) check_positions(kv, cos->size(0));
  check_places(args);
  check_tables(args);
  Tensor y = fast_empty({kv.b, args.queries, args.heads, kv.values.d}, q_any.scalar_type());
  Tensor lse = fast_empty({kv.b, args.queries, args.heads}, ScalarType::Float);
  if (y.numel() == 0) return {y, lse};

  const Tensor q = as_contiguous(q_any);
  args.scale = float(scale.value_or(1.0 / __builtin_sqrt(double(kv.keys.d))));
  args.q = q.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  std::vector<int64_t> spans(size_t(items_of(args) + 1));
  paged_attention_plan(&args, spans.data());
  const int64_t states = paged_attention_state_count(args);
  const Workspace workspace(states * 4);
  args.states = workspace.scratch().take<float>(states);
  paged_attention(args, active_isa(), torch_parallel());
  return {y, lse};
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def(
      "paged_attention(Tensor q, Tensor[] pages, int[] format, Tensor? selected=None, "
      "float? scale=None, Tensor? cos=None, Tensor? sin=None) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&ow::paged_attention_op));
}
