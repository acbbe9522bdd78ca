#include "testing/cache_kernels.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/kv_cache/kv_cache.h"
#include "kernels/paged_attention/paged_attention.h"
#include "testing/arrays_module.h"

namespace ow {
namespace {

constexpr int64_t kPageSize = 64;
// bits (16: dense, whatever the float type), axis, group_size.
using Format = std::tuple<int32_t, std::string, int64_t>;

const KVCacheKernels& kv_cache_kernels_of(const std::string& kernel) {
#define OW_ROW(isa, key, max_m, kernels) \
  if (kernel == #kernels) return kernels;
  OW_KV_CACHE_KERNELS(OW_ROW)
#undef OW_ROW
  throw std::invalid_argument("unknown kernel " + kernel);
}

const PagedAttentionKernels& paged_attention_kernels(const std::string& kernel) {
#define OW_ROW(isa, key, max_m, kernels) \
  if (kernel == #kernels) return kernels;
  OW_PAGED_ATTENTION_KERNELS(OW_ROW)
#undef OW_ROW
  throw std::invalid_argument("unknown kernel " + kernel);
}

// Memory of one side and one row: pages cleared, the tail poisoned.
struct Side {
  std::vector<uint8_t> rows, codes, scales, mins, tail;
  int32_t committed;

  Side(const Format& format, FloatType type, KVPart part, int64_t tokens, int64_t waiting,
       int64_t d, KVSide* side) {
    const int64_t size = float_size(type);
    const int64_t pages = div_up(tokens, kPageSize);
    side->d = d;
    side->bits = std::get<0>(format) == 16 ? int32_t(8 * size) : std::get<0>(format);
    side->axis = std::get<1>(format) == "channel" ? KVAxis::channel : KVAxis::token;
    side->group_size = std::get<2>(format);
    committed = int32_t(tokens);
    if (is_dense(*side)) {
      rows.resize(size_t(pages * kPageSize * d * size));
    } else {
      const int64_t unit = side->axis == KVAxis::channel ? side->group_size : 1;
      committed = int32_t((tokens - waiting) / unit * unit);
      codes.resize(
          size_t(pages * (part == KVPart::keys ? kv_key_page_bytes(side->bits, kPageSize, d)
                                               : kv_value_page_bytes(side->bits, kPageSize, d))));
      scales.resize(size_t(pages * kv_scales_per_page(*side, kPageSize) * size));
      mins.resize(scales.size());
      tail.resize(size_t(2 * kPageSize * d * size), 0xff);
    }
    side->rows = rows.data();
    side->codes = codes.data();
    side->scales = scales.data();
    side->mins = mins.data();
    side->tail = tail.data();
    side->committed = &committed;
  }

  // Tokens that are not in pages, from x [tokens, d].
  void fill_tail(const py::array& x, int64_t row_bytes) {
    for (int64_t t = committed; t < x.shape(0); ++t) {
      memcpy(tail.data() + t % (2 * kPageSize) * row_bytes,
             static_cast<const uint8_t*>(x.data()) + t * row_bytes, size_t(row_bytes));
    }
  }
};

// One row of pages, in reverse order in the pool.
KVPages pages_of(FloatType type, int64_t tokens, std::vector<int32_t>* table, int32_t* length) {
  KVPages p{};
  p.type = type;
  p.b = p.kv_heads = 1;
  p.page_size = kPageSize;
  p.pages = p.max_pages = div_up(tokens, kPageSize);
  p.tail_len = 2 * kPageSize;
  for (int64_t i = p.pages - 1; i >= 0; --i) table->push_back(int32_t(i));
  *length = int32_t(tokens);
  p.block_table = table->data();
  p.lengths = length;
  return p;
}

Array<float> read_back(const KVPages& p, KVPart part, const Side& side, const py::array& x) {
  const int64_t d = x.shape(1);
  Array<float> y({x.shape(0), d});
  kv_cache_scalar.read(p, part, 0, 0, side.committed, FloatType::f32, y.mutable_data());
  for (int64_t i = side.committed * d; i < x.size(); ++i) {
    y.mutable_data()[i] = read_float(x.data(), p.type, i);
  }
  return y;
}

// x [tokens, d] and q [queries, d] float: (x^, moved, low, high, flat, chunks).
std::tuple<Array<float>, Array<float>, Array<float>, Array<float>, Array<float>, Array<float>>
kv_cache_kernel(const std::string& kernel, const py::array& x, const Format& format, bool keys,
                const Array<float>& q) {
  check_contiguous(x, "x");
  const KVCacheKernels& kernels = kv_cache_kernels_of(kernel);
  const FloatType type = float_type(x, "x");
  const KVPart part = keys ? KVPart::keys : KVPart::values;
  const int64_t tokens = x.shape(0);
  const int64_t d = x.shape(1);
  std::vector<int32_t> table;
  int32_t length = 0;
  KVPages p = pages_of(type, tokens, &table, &length);
  KVSide* own = keys ? &p.keys : &p.values;
  Side side(format, type, part, tokens, 0, d, own);
  p.keys.committed = p.values.committed = &side.committed;
  const int64_t bounds = p.pages * kPageSize / kBoundTokens;
  std::vector<uint8_t> low(size_t(bounds * d * float_size(type)));
  std::vector<uint8_t> high(low.size());
  p.key_min = low.data();
  p.key_max = high.data();
  kernels.write(p, part, 0, 0, side.committed, x.data(), d);
  Array<float> y({int64_t(side.committed), d}), moved({int64_t(side.committed), d});
  kernels.read(p, part, 0, 0, side.committed, FloatType::f32, y.mutable_data());
  Array<float> lowest({bounds, d}), highest({bounds, d});
  Array<float> flat(p.pages), chunks(p.pages);
  if (keys) {
    kernels.bound(p, 0, 0, side.committed);
    // q is positive in the first half of its rows and negative in the other.
    const int64_t queries = q.shape(0) / 2;
    PageScoreArgs args{
        &p, 0, queries, q.data(), q.data() + queries * d, false, true, flat.mutable_data()};
    kernels.score(args, 0, p.pages);
    args.chunks = true;
    args.sum = false;
    args.scores = chunks.mutable_data();
    kernels.score(args, 0, p.pages);
  }
  for (int64_t i = 0; i < bounds * d; ++i) {
    // Of the tokens' own order, which pages do not lie in.
    const int64_t page = p.pages - 1 - i / d / (kPageSize / kBoundTokens);
    const int64_t at = (page * (kPageSize / kBoundTokens) + i / d % (kPageSize / kBoundTokens)) * d;
    lowest.mutable_data()[i] = read_float(low.data(), type, at + i % d);
    highest.mutable_data()[i] = read_float(high.data(), type, at + i % d);
  }
  // The second page's tokens to the place of the first's.
  kernels.move(p, part, 0, kPageSize, 0, kPageSize);
  kernels.read(p, part, 0, 0, side.committed, FloatType::f32, moved.mutable_data());
  return {y, moved, lowest, highest, flat, chunks};
}

// Of one key head: q [queries, group, d], keys [tokens, d], values [tokens, dv]; `selected` pages,
// or all. Gives y, lse, and what keys and values are read as.
std::tuple<Array<float>, Array<float>, Array<float>, Array<float>> paged_attention_kernel(
    const std::string& kernel, const py::array& q, const py::array& keys, const py::array& values,
    const Format& key_format, const Format& value_format, float scale,
    const std::vector<int32_t>& selected) {
  for (const auto& array : {q, keys, values}) check_contiguous(array, "operands");
  const PagedAttentionKernels& kernels = paged_attention_kernels(kernel);
  const FloatType type = float_type(q, "q");
  const int64_t tokens = keys.shape(0);
  const int64_t d = keys.shape(1);
  const int64_t dv = values.shape(1);
  std::vector<int32_t> table;
  int32_t length = 0;
  PagedAttentionArgs args{};
  args.kv = pages_of(type, tokens, &table, &length);
  Side key_side(key_format, type, KVPart::keys, tokens, 3, d, &args.kv.keys);
  Side value_side(value_format, type, KVPart::values, tokens, 40, dv, &args.kv.values);
  const KVPages& p = args.kv;
  kv_cache_scalar.write(p, KVPart::keys, 0, 0, key_side.committed, keys.data(), d);
  kv_cache_scalar.write(p, KVPart::values, 0, 0, value_side.committed, values.data(), dv);
  key_side.fill_tail(keys, d * float_size(type));
  value_side.fill_tail(values, dv * float_size(type));
  args.queries = q.shape(0);
  args.heads = q.shape(1);
  args.scale = scale;
  args.q = q.data();
  args.selected = selected.empty() ? nullptr : selected.data();
  args.budget = int64_t(selected.size());
  int64_t spans[2];
  paged_attention_plan(&args, spans);
  // Poisoned: `attend` must write every state that `merge` reads.
  std::vector<float> states(size_t(paged_attention_state_count(args)), bits_to_float(0x7fc00000));
  args.states = states.data();
  std::vector<uint8_t> y(size_t(rows_of(args) * dv * float_size(type)), 0xff);
  Array<float> lse({args.queries, args.heads}), out({args.queries, args.heads, dv});
  args.y = y.data();
  args.lse = lse.mutable_data();
  kernels.attend(args, 0, spans[1]);
  kernels.merge(args, 0, 1);
  for (int64_t i = 0; i < out.size(); ++i) out.mutable_data()[i] = read_float(y.data(), type, i);
  return {out, lse, read_back(p, KVPart::keys, key_side, keys),
          read_back(p, KVPart::values, value_side, values)};
}

}  // namespace

void bind_cache_kernels(py::module_& m) {
  m.def("kv_cache", &kv_cache_kernel, py::arg("kernel"), py::arg("x"), py::arg("format"),
        py::arg("keys"), py::arg("q"),
        "x [tokens, d] written to pages of 64: (what is read, the same once page 1 has moved to "
        "page 0, lower and upper bounds of each 16 tokens, scores of pages by the sum over queries "
        "and all their tokens, and by the largest of 16 tokens each); q: positive parts, then "
        "negative ones.");
  m.def("paged_attention", &paged_attention_kernel, py::arg("kernel"), py::arg("q"),
        py::arg("keys"), py::arg("values"), py::arg("key_format"), py::arg("value_format"),
        py::arg("scale"), py::arg("selected"),
        "(y [queries, group, dv], lse, keys and values as they are held), selected pages of 64.");
}

}  // namespace ow
