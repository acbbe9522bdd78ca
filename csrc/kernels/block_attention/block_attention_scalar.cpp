// Block attention, one score at a time.
#include "kernels/block_attention/block_attention.h"

namespace ow {
namespace scalar {
namespace {

constexpr float kLog2E = 1.44269504f;

// 2^x for x <= 0: 2^round(x) times the series of e^(r ln 2), to fp32's last bit or two.
float exp2_of(float x) {
  if (!(x > -127.0f)) return x != x ? x : 0.0f;
  const int32_t whole = int32_t(x - 0.5f);
  const float r = (x - float(whole)) * 0.693147181f;
  float p = 1.0f;
  for (int i = 8; i > 0; --i) p = 1.0f + p * r / float(i);
  return p * bits_to_float(uint32_t(whole + 127) << 23);
}

struct Row {
  const BlockAttentionArgs* a;
  const QueryTile* tile;
  int64_t query;  // of the sequence
  int64_t head;

  const AttentionSequence& sequence() const { return *tile->sequence; }
  int64_t kv_head() const { return head / (a->heads / a->kv_heads); }

  bool sees(int64_t key) const {
    const AttentionMask& mask = a->mask;
    if (!mask.causal) return true;
    const int64_t distance = sequence().keys - sequence().queries + query - key;
    return distance >= 0 && distance >= mask.min_distance &&
           (mask.window == 0 || distance < mask.window || key < mask.sinks);
  }

  // In powers of two.
  float score(int64_t key) const {
    const int64_t q = sequence().q + query * a->q_strides.token + head * a->q_strides.head;
    const int64_t k = sequence().k + key * a->k_strides.token + kv_head() * a->k_strides.head;
    float sum = 0.0f;
    for (int64_t i = 0; i < a->d; ++i) {
      sum += read_float(a->q, a->type, q + i) * read_float(a->k, a->type, k + i);
    }
    return sum * (a->scale * kLog2E);
  }

  // visit(key) for every key that is listed and visible.
  template <class Visit>
  void each_key(const Visit& visit) const {
    const auto visit_range = [&](int64_t begin, int64_t end) {
      for (int64_t key = begin; key < min_of(end, sequence().keys); ++key) {
        if (sees(key)) visit(key);
      }
    };
    if (a->blocks.indptr == nullptr) return visit_range(0, sequence().keys);
    for (const int32_t* c = tile->blocks.begin; c != tile->blocks.end; ++c) {
      visit_range(*c * a->block_n, (*c + 1) * a->block_n);
    }
    for (const int32_t* c = tile->columns.begin; c != tile->columns.end; ++c) {
      visit_range(*c, *c + 1);
    }
  }
};

void attend(const BlockAttentionArgs& a, QueryTile& tile, uint8_t* scratch) {
  float* o = reinterpret_cast<float*>(scratch);
  for (int64_t i = 0; i < tile.heads * tile.count; ++i) {
    const Row row{&a, &tile, tile.first + i % tile.count, tile.head + i / tile.count};
    float m = -3.40282347e38f;
    row.each_key([&](int64_t key) {
      const float score = row.score(key);
      if (!(score <= m)) m = score;
    });
    float l = 0.0f;
    memset(o, 0, size_t(a.dv) * 4);
    row.each_key([&](int64_t key) {
      const float weight = exp2_of(row.score(key) - m);
      const int64_t v =
          row.sequence().v + key * a.v_strides.token + row.kv_head() * a.v_strides.head;
      for (int64_t c = 0; c < a.dv; ++c) o[c] += weight * read_float(a.v, a.type, v + c);
      l += weight;
    });
    const int64_t out = ((row.sequence().row + row.query) * a.heads + row.head) * a.dv;
    for (int64_t c = 0; c < a.dv; ++c) {
      write_float(a.o, a.type, out + c, l == 0.0f ? 0.0f : o[c] / l);
    }
    tile.m[i] = m;
    tile.l[i] = l;
    if (tile.scores == nullptr || !a.score_rows[row.sequence().row + row.query]) continue;
    row.each_key([&](int64_t key) { tile.scores[key] += exp2_of(row.score(key) - m) / l; });
  }
}

int64_t packed_unit_bytes(const BlockAttentionArgs&) { return 0; }
int64_t scratch_bytes(const BlockAttentionArgs& a) { return a.dv * 4; }
void pack(const BlockAttentionArgs&, int64_t, int64_t) {}

}  // namespace
}  // namespace scalar

const BlockAttentionKernels block_attention_scalar{scalar::packed_unit_bytes, scalar::scratch_bytes,
                                                   scalar::pack, scalar::attend};

}  // namespace ow
