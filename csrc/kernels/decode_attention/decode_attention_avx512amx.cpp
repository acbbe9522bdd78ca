// Tile products for bf16: what a cache of bf16 allows of several queries is beyond what converting
// to fp32 reaches (measured there: 30 % of the read rate at 16 rows).
#include "kernels/decode_attention/decode_attention_body.h"
#include "simd/attention_bf16_avx512amx.h"

namespace ow {
namespace avx512amx {
namespace {

// Dimensions of a packed query: those of multi-head latent attention, 512 and 64 rotated.
constexpr int64_t kMaxD = 576;

// Up to 16 rows. Keys that only some of its rows see, at most `queries` - 1 at the end, are taken
// row by row.
struct RowBlock {
  const DecodeAttentionArgs& a;
  const Chunk<bf16>& chunk;
  int64_t row, rows;  // first, count
  int64_t common;     // keys that every row sees

  // The values of the chunk, and the keys of the next.
  Ahead values_ahead() const { return Ahead(chunk.values, chunk.value_stride, a.dv); }
  Ahead keys_ahead() const {
    return Ahead(chunk.keys + kKeyChunk * chunk.key_stride, chunk.key_stride, a.d);
  }

  template <class Body>
  void for_each_row(const Body& body) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t seen = chunk.seen_by(a, (row + r) / group_of(a));
      body(r, seen, seen - common);
    }
  }

  void attend(const PackedQueries<kMaxD>& q) const {
    alignas(64) float scores[kTileRows][kKeyChunk];
    float* states = chunk.state(a, row);
    const int64_t size = state_size(a);
    score_keys_bf16(q, rows, chunk.keys, chunk.key_stride, common, a.d, a.scale, scores[0],
                    kKeyChunk, row == 0 ? values_ahead() : Ahead{});
    for_each_row([&](int64_t r, int64_t seen, int64_t more) {
      const bf16* query = chunk.query_row(a, row + r);
      float* to = scores[r] + common;
      const bf16* keys = chunk.keys + common * chunk.key_stride;
      if (more > 0) score_keys<1>(&query, keys, chunk.key_stride, more, a.d, a.scale, &to, Ahead{});
      soften(scores[r], seen, a.dv, states + r * size);
    });
    sum_values_bf16<kKeyChunk>(scores[0], kKeyChunk, rows, chunk.values, chunk.value_stride, common,
                               a.dv, states, size, row == 0 ? keys_ahead() : Ahead{});
    for_each_row([&](int64_t r, int64_t, int64_t more) {
      const float* weights = scores[r] + common;
      float* state = states + r * size;
      const bf16* values = chunk.values + common * chunk.value_stride;
      if (more > 0) {
        sum_values<1>(&weights, values, chunk.value_stride, more, a.dv, &state, Ahead{});
      }
    });
  }
};

void attend_tiles(const DecodeAttentionArgs& a, int64_t begin, int64_t end) {
  if (a.type != FloatType::bf16 || a.d > kMaxD) return attend_any(a, begin, end);
  PackedQueries<kMaxD> q;
  int64_t packed_item = -1;
  int64_t packed_row = -1;
  open_tiles();
  for_each_chunk<bf16>(a, begin, end, [&](const Chunk<bf16>& chunk) {
    for (int64_t row = 0; row < rows_of(a); row += kTileRows) {
      const RowBlock block{a, chunk, row, min_of(kTileRows, rows_of(a) - row),
                           chunk.seen_by(a, row / group_of(a))};
      if (chunk.item != packed_item || row != packed_row) {
        q.pack(block.rows, a.d, [&](int64_t r) { return chunk.query_row(a, row + r); });
        packed_item = chunk.item;
        packed_row = row;
      }
      block.attend(q);
    }
  });
  close_tiles();
}

}  // namespace
}  // namespace avx512amx

const DecodeAttentionKernels decode_attention_avx512amx = {avx512amx::attend_tiles,
                                                           avx512amx::merge_any};

}  // namespace ow
