// Kernels over pages of keys and values: every tier writes, reads, moves and bounds the very bytes
// of the scalar one.
#include <math.h>

#include "kernels/kv_cache/kv_cache.h"
#include "smoke.h"

namespace ow::testing {
namespace {

const KernelEntry<const KVCacheKernels*> kKernels[] = {
#define OW_ROW(isa, key, max_m, kernels) {#kernels, Isa::isa, key, max_m, &kernels},
    OW_KV_CACHE_KERNELS(OW_ROW)
#undef OW_ROW
};

constexpr int64_t kPageSize = 64, kPages = 3, kTokens = 2 * kPageSize;
constexpr float kTable[] = {0.0f, 0.1f, 0.2f, 0.35f, 0.5f, 0.6f, 0.8f, 1.0f};

struct Format {
  int32_t bits;
  KVAxis axis;
  int64_t group_size, outliers;
  bool codebook;
};
constexpr Format kFormats[] = {
    {16, KVAxis::channel, 0, 0, false}, {8, KVAxis::channel, 32, 0, false},
    {4, KVAxis::channel, 64, 0, false}, {3, KVAxis::channel, 32, 1, true},
    {2, KVAxis::channel, 32, 0, false}, {8, KVAxis::token, 32, 1, false},
    {4, KVAxis::token, 64, 0, false},   {3, KVAxis::token, 32, 0, true},
    {2, KVAxis::token, 128, 1, false},
};

// What the kernels of one side work on; in this order in memory.
enum Operand {
  kRows,
  kCodes,
  kScales,
  kMins,
  kOutlierIndex,
  kOutlierValues,
  kLow,
  kHigh,
  kOperands
};

struct Case {
  Format format;
  FloatType type;
  KVPart part;
  int64_t d;

  KVSide side() const {
    KVSide s{};
    s.d = d;
    s.bits = format.bits == 16 ? int32_t(8 * float_size(type)) : format.bits;
    s.axis = format.axis;
    s.group_size = format.group_size == 128 ? d : format.group_size;
    s.outliers = format.outliers;
    s.table = format.codebook ? kTable : nullptr;
    return s;
  }

  std::vector<Bytes> operands() const {
    const KVSide s = side();
    const int64_t size = float_size(type);
    std::vector<int64_t> bytes(kOperands, 0);
    if (is_dense(s)) {
      bytes[kRows] = kPageSize * d * size;
    } else {
      bytes[kCodes] = part == KVPart::keys ? kv_key_page_bytes(s.bits, kPageSize, d)
                                           : kv_value_page_bytes(s.bits, kPageSize, d);
      bytes[kScales] = bytes[kMins] = kv_scales_per_page(s, kPageSize) * size;
      bytes[kOutlierIndex] = kPageSize * s.outliers;
      bytes[kOutlierValues] = kPageSize * s.outliers * size;
    }
    if (part == KVPart::keys) bytes[kLow] = bytes[kHigh] = kPageSize / kBoundTokens * d * size;
    std::vector<Bytes> result;
    for (const int64_t each : bytes) result.emplace_back(size_t(each * kPages), uint8_t{0});
    return result;
  }

  KVPages pages(uint8_t* const* at, int32_t* table, int32_t* held) const {
    KVPages p{};
    p.type = type;
    p.b = p.kv_heads = 1;
    p.page_size = kPageSize;
    p.pages = kPages;
    p.max_pages = 2;
    p.block_table = table;
    p.keys = side();
    p.keys.rows = at[kRows];
    p.keys.codes = at[kCodes];
    p.keys.scales = at[kScales];
    p.keys.mins = at[kMins];
    p.keys.outlier_index = at[kOutlierIndex];
    p.keys.outlier_values = at[kOutlierValues];
    p.keys.committed = held;
    p.values = p.keys;
    p.key_min = at[kLow];
    p.key_max = at[kHigh];
    return p;
  }
};

// Writes, moves and bounds; y gets what is then read, scores the pages'.
void run(const Case& c, const KVCacheKernels& kernels, const KVPages& p, const uint8_t* x,
         const float* q, float* y, float* scores) {
  const bool groups = c.format.axis == KVAxis::channel && c.format.bits < 16;
  const int64_t row = c.d * float_size(c.type);
  if (groups) {
    kernels.write(p, c.part, 0, 0, kTokens, x, c.d);
    kernels.move(p, c.part, 0, kPageSize, 0, kPageSize);
  } else {
    kernels.write(p, c.part, 0, 0, 3, x, c.d);
    kernels.write(p, c.part, 0, 3, kTokens - 3, x + 3 * row, c.d);
    kernels.move(p, c.part, 0, 61, 2, 7);
  }
  kernels.read(p, c.part, 0, 0, kTokens, FloatType::f32, y);
  if (c.part == KVPart::values) return;
  kernels.bound(p, 0, 0, kTokens - 5);
  const PageScoreArgs args{&p, 0, 5, q, q + 5 * c.d, false, true, scores};
  kernels.score(args, 0, 2);
  PageScoreArgs chunks = args;
  chunks.chunks = true;
  chunks.sum = false;
  chunks.scores = scores + 2;
  kernels.score(chunks, 0, 2);
}

void check_case(const KernelEntry<const KVCacheKernels*>& entry, const Case& c, Guarded* memory) {
  running = entry.name;
  const Bytes x = floats(kTokens * c.d, c.type, 3.0f);
  std::vector<float> q;
  for (int64_t i = 0; i < 10 * c.d; ++i) q.push_back(fabsf(rng.uniform()) * (i < 5 * c.d ? 1 : -1));
  const std::vector<int32_t> table = {2, 0};
  const std::vector<int32_t> held = {kTokens - 5};
  std::vector<Bytes> want = c.operands();
  std::vector<float> want_y(size_t(kTokens * c.d)), want_scores(4, 0.0f);
  {
    std::vector<uint8_t*> at;
    for (Bytes& bytes : want) at.push_back(bytes.data());
    std::vector<int32_t> own_table = table, own_held = held;
    const KVPages p = c.pages(at.data(), own_table.data(), own_held.data());
    run(c, kv_cache_scalar, p, x.data(), q.data(), want_y.data(), want_scores.data());
  }
  for (const Against side : kSides) {
    memory->restart(side);
    std::vector<uint8_t*> at;
    for (const Bytes& bytes : c.operands()) {
      at.push_back(bytes.empty() ? nullptr : memory->copy(bytes));
    }
    int32_t own_table[] = {table[0], table[1]};
    int32_t own_held = held[0];
    const uint8_t* own_x = memory->copy(x);
    const float* own_q = memory->copy(q);
    float* y = memory->empty<float>(want_y.size());
    std::vector<float> scores(4, 0.0f);
    run(c, *entry.fn, c.pages(at.data(), own_table, &own_held), own_x, own_q, y, scores.data());
    for (int i = 0; i < kOperands; ++i) {
      const bool same = want[size_t(i)].empty() ||
                        memcmp(at[size_t(i)], want[size_t(i)].data(), want[size_t(i)].size()) == 0;
      CHECK(same, "%s: operand %d differs: %d bits, axis %d, part %d, d %d, type %d", entry.name, i,
            int(c.format.bits), int(c.format.axis), int(c.part), int(c.d), int(c.type));
    }
    CHECK(memcmp(y, want_y.data(), want_y.size() * 4) == 0, "%s: read differs: %d bits, d %d",
          entry.name, int(c.format.bits), int(c.d));
    for (size_t i = 0; i < 4; ++i) {
      // Sums of 2 d products up to 3 for 5 queries, in another order.
      CHECK(fabsf(scores[i] - want_scores[i]) <= float(c.d) * float(2 * c.d + 5) * 30 * 0x1p-24f,
            "%s: score %d is %g, not %g", entry.name, int(i), double(scores[i]),
            double(want_scores[i]));
    }
    CHECK(memory->intact(), "%s: wrote outside of the pages", entry.name);
  }
}

}  // namespace

void check_kv_cache(Guarded* memory) {
  for (const auto& entry : kKernels) {
    if (entry.isa > detected_isa()) continue;
    for (const FloatType type : kTypes) {
      for (const Format& format : kFormats) {
        for (const int64_t d : {1, 17, 40}) {
          check_case(entry, {format, type, KVPart::keys, d}, memory);
          check_case(entry, {format, type, KVPart::values, d}, memory);
        }
      }
    }
  }
}

}  // namespace ow::testing
