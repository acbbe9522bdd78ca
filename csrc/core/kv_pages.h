// The keys and values of one layer in pages: what kernels that write them (kernels/kv_cache) and
// kernels that read them (kernels/paged_attention) know.
//
// b sequences have kv_heads heads; a row r = sequence * kv_heads + head has its own list of pages
// and its own length. A page holds page_size tokens of one row: token t of row r is token
// t % page_size of page block_table[r, t / page_size]. A page's number names a page of keys and a
// page of values alike.
//
// Keys and values each have a side, with a format of its own:
//
//   dense      bits = 32, 16: rows [pages, page_size, d] of the float type; every token is in pages
//   quantized  bits = 8, 4, 3, 2: the tokens below `committed` are in pages, the others, up to the
//              length, exactly as they came in the tail: token t in slot t % tail_len
//
//     x^ = fma(code, scale, min)             or, with a codebook,   x^ = fma(table[code], scale,
//     min)
//
//   channel axis   a scale and a min for each channel of group_size tokens
//                  [pages, page_size / group_size, d]
//   token axis     a scale and a min for each token and group_size channels (the last group may be
//                  shorter)   [pages, ceil(d / group_size), page_size]
//   outliers       c channels of each token, rising, whose x^ is the value stored for them (their
//                  codes are 0): outlier_index [pages, page_size, c], outlier_values alike
//
// Codes lie in the lines of packed weights (core/code_lines.h): panels of 32 n in two halves of 16.
//
//   keys     n = token, k = channel   [pages, page_size / 32, d_padded / k_block, 2, lines, 16, 4]
//   values   n = channel, k = token   [pages, ceil(d / 32), page_size / k_block, 2, lines, 16, 4]
//
// with k_block = 16 (32 for 3 bits) and d_padded = d rounded up to it. Scores are then a product of
// q and codes, 16 tokens a line, and the sum over values one of probabilities and codes, 16
// channels a line.
//
// A page is cleared before its first token is written: past the tokens in pages there are zeros, or
// what tokens that were rolled back have left. Channels past d have codes 0.
//
// bounds, where kept: key_min, key_max [pages, page_size / 16, d] of the float type, of 16 tokens
// each: key_min <= x^ <= key_max for the tokens in pages (rounded outwards).
#pragma once

#include "core/code_lines.h"
#include "core/types.h"

namespace ow {

constexpr int64_t kKVPanel = 32;
constexpr int64_t kKVHalf = 16;
constexpr int64_t kBoundTokens = 16;

enum class KVAxis : int32_t { channel, token };

struct KVSide {
  int64_t d;
  int32_t bits;        // 32, 16 (the float type); 8, 4, 3, 2
  KVAxis axis;         // of scales and mins
  int64_t group_size;  // tokens of a channel, or channels of a token, that share them
  // Tokens enter pages `step` at a time (a multiple of group_size for the channel axis), once
  // `step` of them are older than the newest `window`.
  int64_t window, step;
  int32_t* committed;  // [b, kv_heads]: tokens in pages; dense: the lengths

  void* rows;              // dense: [pages, page_size, d] of the float type
  uint8_t* codes;          // quantized
  void* scales;            // of the float type, as mins
  void* mins;              //
  const float* table;      // [2^bits], rising; or null
  int64_t outliers;        // of a token; 0 where none are kept
  uint8_t* outlier_index;  // or null
  void* outlier_values;    // of the float type; or null
  void* tail;              // quantized: [b, kv_heads, tail_len, d] of the float type
};

struct KVPages {
  FloatType type;
  int64_t b, kv_heads;
  int64_t page_size;     // 32, 64, 128
  int64_t pages;         // of the pools
  int64_t max_pages;     // of a row; its length is at most max_pages * page_size
  int64_t tail_len;      // a multiple of the group size of a channel axis
  int32_t* block_table;  // [b, kv_heads, max_pages]; -1 where there is no page
  int32_t* lengths;      // [b, kv_heads]
  KVSide keys, values;
  void* key_min;       // or null, as key_max
  void* key_max;       //
  int32_t* positions;  // [b, kv_heads, max_pages * page_size]: a token's place in the text; or null
};

OW_INLINE bool is_dense(const KVSide& side) { return side.bits >= 16; }

// Bytes of codes from one page to the next.
OW_INLINE int64_t kv_key_page_bytes(int32_t bits, int64_t page_size, int64_t d) {
  return page_size / kKVPanel * panel_bytes(bits, d);
}
OW_INLINE int64_t kv_value_page_bytes(int32_t bits, int64_t page_size, int64_t d) {
  return div_up(d, kKVPanel) * panel_bytes(bits, page_size);
}
// The lines of the codes of n and of 4 consecutive k, from the start of the page's codes.
OW_INLINE CodeLines kv_code_place(int32_t bits, int64_t panel_bytes, int64_t n, int64_t k) {
  const int64_t half = n / kKVPanel * panel_bytes + k / block_k(bits) * block_bytes(bits) +
                       n % kKVPanel / kKVHalf * (block_bytes(bits) / 2);
  CodeLines at = code_lines(bits, k);
  at.line += half;
  at.high_line += half;
  return at;
}

// Scales (and mins): of one page, and where those of (token of the page, channel) are in it.
OW_INLINE int64_t kv_scales_per_page(const KVSide& side, int64_t page_size) {
  return side.axis == KVAxis::channel ? page_size / side.group_size * side.d
                                      : div_up(side.d, side.group_size) * page_size;
}
OW_INLINE int64_t kv_scale_at(const KVSide& side, int64_t page_size, int64_t token,
                              int64_t channel) {
  return side.axis == KVAxis::channel ? token / side.group_size * side.d + channel
                                      : channel / side.group_size * page_size + token;
}

}  // namespace ow
