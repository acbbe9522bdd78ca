// Attention over pages: every tier against the scalar one, which tests/ops compares with the
// formula, with each operand against a page that cannot be touched.
#include <math.h>

#include "kernels/paged_attention/paged_attention.h"
#include "smoke.h"

namespace ow::testing {
namespace {

const KernelEntry<const PagedAttentionKernels*> kPaged[] = {
#define OW_ROW(isa, key, max_m, kernels) {#kernels, Isa::isa, key, max_m, &kernels},
    OW_PAGED_ATTENTION_KERNELS(OW_ROW)
#undef OW_ROW
};

struct SideFormat {
  int32_t bits;  // 16: dense, whatever the type
  KVAxis axis;
  int64_t group_size;
  bool table;
  int64_t outliers;
};

struct Case {
  FloatType type;
  int64_t group, queries, d, dv, page_size, length;
  SideFormat keys, values;
  bool selects, rotates;
};

// The operands of one side, in plain memory.
struct SideBytes {
  Bytes rows, codes, scales, mins, index, outlier_values, tail;
  std::vector<float> table;
  std::vector<int32_t> committed;
};

struct Paged {
  PagedAttentionArgs args{};
  std::vector<int32_t> block_table, lengths, selected;
  SideBytes keys, values;
  Bytes q;
  std::vector<float> cos, sin;
};

Bytes random_bytes(int64_t count, int64_t below) {
  Bytes bytes;
  for (int64_t i = 0; i < count; ++i) bytes.push_back(uint8_t(rng.below(below)));
  return bytes;
}

SideBytes make_side(const Paged& p, const SideFormat& format, int64_t d, KVSide* side) {
  const KVPages& kv = p.args.kv;
  SideBytes bytes;
  side->d = d;
  side->bits = format.bits == 16 ? int32_t(8 * float_size(kv.type)) : format.bits;
  if (is_dense(*side)) {
    bytes.rows = floats(kv.pages * kv.page_size * d, kv.type, 1.0f);
    bytes.committed = p.lengths;
    return bytes;
  }
  side->axis = format.axis;
  side->group_size = format.group_size;
  side->outliers = format.outliers;
  const bool keys = side == &p.args.kv.keys;
  const int64_t page = keys ? kv_key_page_bytes(format.bits, kv.page_size, d)
                            : kv_value_page_bytes(format.bits, kv.page_size, d);
  bytes.codes = random_bytes(kv.pages * page, 256);
  const int64_t scales = kv.pages * kv_scales_per_page(*side, kv.page_size);
  bytes.scales = floats(scales, kv.type, 2.0f / float(1 << format.bits));
  bytes.mins = floats(scales, kv.type, 1.0f);
  for (int64_t i = 0; format.table && i < int64_t{1} << format.bits; ++i) {
    bytes.table.push_back(float(i) + 0.25f * rng.uniform());
  }
  bytes.index = random_bytes(kv.pages * kv.page_size * format.outliers, d + 1);  // d is ignored
  bytes.outlier_values = floats(int64_t(bytes.index.size()), kv.type, 2.0f);
  bytes.tail = floats(kv.b * kv.kv_heads * kv.tail_len * d, kv.type, 1.0f);
  for (const int32_t length : p.lengths) {
    const int64_t waiting = min_of(length, rng.below(kv.tail_len));
    const int64_t unit = format.axis == KVAxis::channel ? format.group_size : 1;
    const int64_t committed = (length - waiting) / unit * unit;
    bytes.committed.push_back(int32_t(length - committed > kv.tail_len ? length : committed));
  }
  return bytes;
}

Paged make_paged(const Case& c) {
  Paged p;
  PagedAttentionArgs& a = p.args;
  KVPages& kv = a.kv;
  kv.type = c.type;
  kv.b = 2;
  kv.kv_heads = 2;
  kv.page_size = c.page_size;
  kv.max_pages = div_up(c.length, c.page_size);
  kv.pages = kv.max_pages + 1;  // heads share some
  kv.tail_len = 128;
  for (int64_t row = 0; row < 4; ++row) {
    p.lengths.push_back(int32_t(row == 3 ? 0 : c.length - row * c.length / 3));
    const int64_t used = div_up(p.lengths.back(), c.page_size);
    for (int64_t i = 0; i < kv.max_pages; ++i) {
      p.block_table.push_back(i < used ? int32_t(rng.below(kv.pages)) : -1);
    }
    for (int64_t i = 0; c.selects && i < 3; ++i) {
      p.selected.push_back(2 * i < used ? int32_t(2 * i) : -1);
    }
  }
  p.keys = make_side(p, c.keys, c.d, &kv.keys);
  p.values = make_side(p, c.values, c.dv, &kv.values);
  a.queries = c.queries;
  a.heads = c.group * kv.kv_heads;
  a.scale = 1.0f / sqrtf(float(c.d));
  a.budget = 3;
  p.q = floats(kv.b * c.queries * a.heads * c.d, c.type, 2.0f);
  for (int64_t i = 0; c.rotates && i < c.length * (c.d / 2); ++i) {
    p.cos.push_back(cosf(float(i)));
    p.sin.push_back(sinf(float(i)));
  }
  return p;
}

template <class T>
T* copy_or_null(const std::vector<T>& values, Guarded* memory) {
  return values.empty() ? nullptr : memory->copy(values);
}

void place_side(const SideBytes& bytes, KVSide* side, Guarded* memory) {
  side->committed = memory->copy(bytes.committed);
  side->rows = copy_or_null(bytes.rows, memory);
  side->codes = copy_or_null(bytes.codes, memory);
  side->scales = copy_or_null(bytes.scales, memory);
  side->mins = copy_or_null(bytes.mins, memory);
  side->table = copy_or_null(bytes.table, memory);
  side->outlier_index = copy_or_null(bytes.index, memory);
  side->outlier_values = copy_or_null(bytes.outlier_values, memory);
  side->tail = copy_or_null(bytes.tail, memory);
}

// y and lse of a kernel.
std::vector<float> run_kernel(const KernelEntry<const PagedAttentionKernels*>& entry,
                              const Paged& p, Against side, Guarded* memory) {
  running = entry.name;
  memory->restart(side);
  PagedAttentionArgs a = p.args;
  a.kv.block_table = memory->copy(p.block_table);
  a.kv.lengths = memory->copy(p.lengths);
  place_side(p.keys, &a.kv.keys, memory);
  place_side(p.values, &a.kv.values, memory);
  a.selected = copy_or_null(p.selected, memory);
  a.cos = copy_or_null(p.cos, memory);
  a.sin = copy_or_null(p.sin, memory);
  a.q = memory->copy(p.q);
  std::vector<int64_t> spans(size_t(items_of(a) + 1));
  paged_attention_plan(&a, spans.data());
  a.spans = memory->copy(spans);
  a.states = memory->empty<float>(size_t(paged_attention_state_count(a)));
  const int64_t rows = a.kv.b * a.queries * a.heads;
  a.y = memory->empty<uint8_t>(size_t(rows * a.kv.values.d * float_size(a.kv.type)));
  a.lse = memory->empty<float>(size_t(rows));
  const int64_t units = spans.back();
  entry.fn->attend(a, units / 2, units);
  entry.fn->attend(a, 0, units / 2);
  entry.fn->merge(a, 1, items_of(a));
  entry.fn->merge(a, 0, 1);
  CHECK(memory->intact(), "%s: wrote outside of states, y or lse", entry.name);
  std::vector<float> result;
  for (int64_t i = 0; i < rows * a.kv.values.d; ++i) result.push_back(read(a.y, a.kv.type, i));
  result.insert(result.end(), a.lse, a.lse + rows);
  return result;
}

// What two digits round by, where the largest number is 1.
double digit_error(int32_t bits) {
  return bits == 4 ? 8.5 / 30464.0 : bits == 2 ? 40.0 / 24320.0 : 0.5 / 32639.0;
}

void check_case(const Case& c, Guarded* memory) {
  const Paged p = make_paged(c);
  const auto& scalar = kPaged[sizeof(kPaged) / sizeof(kPaged[0]) - 1];
  const std::vector<float> want = run_kernel(scalar, p, Against::end, memory);
  // Scores, of magnitude up to 50, and sums of up to 400 terms of up to 4, each in another order.
  double error = 0x1p-24 * 2.0 * (double(c.d) + 400.0) * 50.0;
  // Digits of 256 weights of up to 1 times codes of up to 1 from the middle, and of queries
  // likewise.
  if (c.type == FloatType::bf16) {
    error += 256.0 * (digit_error(c.keys.bits) + digit_error(c.values.bits));
  }
  for (const auto& entry : kPaged) {
    if (entry.isa > detected_isa()) continue;
    for (const Against side : kSides) {
      const std::vector<float> got = run_kernel(entry, p, side, memory);
      bool same = got.size() == want.size();
      for (size_t i = 0; same && i < got.size(); ++i) {
        const double bound =
            error + 2.0 * double(roundoff(c.type)) * (fabs(double(want[i])) + error);
        same = got[i] == want[i] || fabs(double(got[i]) - double(want[i])) <= bound;
      }
      CHECK(same, "%s: type %d, %d x %d rows, d %d, %d, page %d, length %d, bits %d, %d differs",
            entry.name, int(c.type), int(c.queries), int(c.group), int(c.d), int(c.dv),
            int(c.page_size), int(c.length), int(c.keys.bits), int(c.values.bits));
    }
  }
}

}  // namespace

void check_paged_attention() {
  Guarded guarded(32);  // a region for each operand
  Guarded* memory = &guarded;
  constexpr auto kChannel = KVAxis::channel;
  constexpr auto kToken = KVAxis::token;
  const SideFormat dense{16, kChannel, 32, false, 0};
  constexpr int64_t kD[] = {17, 64, 80, 128};
  int64_t variant = 0;
  for (const int32_t bits : {2, 3, 4, 8}) {
    for (const int64_t page_size : {32, 64, 128}) {
      for (const int64_t length : {1, 33, 130, 390}) {
        const int64_t d = kD[variant % 4];
        const int64_t group = 1 + variant * 3 % 7;
        const SideFormat channel{bits, kChannel, page_size, false, 0};
        const SideFormat token{bits, kToken, variant % 2 == 0 ? d : 32, false, 0};
        const FloatType type = kTypes[variant % 3];
        const bool selects = variant % 3 == 1;
        check_case(
            {type, group, 1 + variant % 4, d, d, page_size, length, channel, token, selects, false},
            memory);
        ++variant;
      }
    }
  }
  const SideFormat nuq{3, kChannel, 32, true, 2};
  const SideFormat swapped{4, kChannel, 64, false, 1};
  const SideFormat by_token{8, kToken, 64, true, 0};
  for (const FloatType type : kTypes) {
    check_case({type, 4, 1, 64, 64, 64, 300, dense, dense, false, false}, memory);
    check_case({type, 3, 8, 80, 33, 128, 300, dense, dense, true, false}, memory);
    check_case({type, 2, 2, 64, 32, 64, 300, nuq, swapped, false, true}, memory);
    check_case({type, 1, 1, 34, 34, 128, 200, by_token, nuq, false, false}, memory);
  }
}

}  // namespace ow::testing
