// Codes of one token between a row of bytes and the lines of a page.
#pragma once

#include "kernels/kv_cache/kv_cache.h"

namespace ow::OW_TARGET {
namespace {

// Four codes, one a byte, as the kernels move them.
OW_INLINE uint32_t load_four(const uint8_t* p) {
  uint32_t four;
  memcpy(&four, p, 4);
  return four;
}
OW_INLINE void store_four(uint8_t* p, uint32_t four) { memcpy(p, &four, 4); }

constexpr uint32_t kEachByte = 0x01010101;

// Keys: a lane of each line is the token's own, so it is written whole. `codes` are zero past d.
OW_INLINE void put_key_codes(const KVSide& s, uint8_t* page, int64_t token, const uint8_t* codes) {
  uint8_t* out =
      page + kv_code_place(s.bits, panel_bytes(s.bits, s.d), token, 0).line + token % kKVHalf * 4;
  const int64_t step = block_bytes(s.bits);
  for (int64_t k = 0; k < s.d; k += block_k(s.bits), out += step) {
    const uint8_t* in = codes + k;
    switch (s.bits) {
      case 8:
        for (int l = 0; l < 4; ++l) store_four(out + 64 * l, load_four(in + 4 * l));
        break;
      case 4:
        for (int l = 0; l < 2; ++l) {
          store_four(out + 64 * l, load_four(in + 8 * l) | load_four(in + 8 * l + 4) << 4);
        }
        break;
      case 2:
        store_four(out, load_four(in) | load_four(in + 4) << 2 | load_four(in + 8) << 4 |
                            load_four(in + 12) << 6);
        break;
      default: {
        uint32_t q[8];
        for (int j = 0; j < 8; ++j) q[j] = load_four(in + 4 * j);
        const uint32_t third = (q[2] >> 2 & kEachByte) << 6 | (q[5] >> 2 & kEachByte) << 7;
        store_four(out, q[0] | q[1] << 3 | (q[2] & 3 * kEachByte) << 6);
        store_four(out + 64, q[3] | q[4] << 3 | (q[5] & 3 * kEachByte) << 6);
        store_four(out + 128, q[6] | q[7] << 3 | third);
      }
    }
  }
}

OW_INLINE void get_key_codes(const KVSide& s, const uint8_t* page, int64_t token, uint8_t* codes) {
  const int64_t panel = panel_bytes(s.bits, s.d);
  const uint32_t mask = kEachByte * ((1u << (s.bits == 3 ? 3 : s.bits)) - 1);
  for (int64_t k = 0; k < s.d; k += 4) {
    const CodeLines at = kv_code_place(s.bits, panel, token, k);
    const int64_t lane = token % kKVHalf * 4;
    uint32_t four = load_four(page + at.line + lane) >> at.shift;
    if (at.high_shift >= 0) {
      four = (four & 3 * kEachByte) |
             (load_four(page + at.high_line + lane) >> at.high_shift & kEachByte) << 2;
    }
    store_four(codes + k, four & mask);
  }
}

// Values: a lane of each line holds four tokens of a channel, of which one is replaced.
OW_INLINE void put_bits(uint8_t* line, int64_t lanes, int shift, uint32_t mask,
                        const uint8_t* codes, int drop) {
  for (int64_t n = 0; n < lanes; ++n) {
    const uint32_t others = load_four(line + 4 * n) & ~(mask << shift);
    store_four(line + 4 * n, others | (uint32_t(codes[n]) >> drop & mask) << shift);
  }
}
OW_INLINE void put_value_codes(const KVSide& s, int64_t page_size, uint8_t* page, int64_t token,
                               const uint8_t* codes) {
  const int64_t panel = panel_bytes(s.bits, page_size);
  const int byte = int(token % 4) * 8;
  for (int64_t n = 0; n < s.d; n += kKVHalf) {
    const CodeLines at = kv_code_place(s.bits, panel, n, token);
    const int64_t lanes = min_of(kKVHalf, s.d - n);
    const bool split = at.high_shift >= 0;
    const uint32_t mask = split ? 3 : (1u << s.bits) - 1;
    put_bits(page + at.line, lanes, at.shift + byte, mask, codes + n, 0);
    if (split) put_bits(page + at.high_line, lanes, at.high_shift + byte, 1, codes + n, 2);
  }
}

OW_INLINE void get_value_codes(const KVSide& s, int64_t page_size, const uint8_t* page,
                               int64_t token, uint8_t* codes) {
  const int64_t panel = panel_bytes(s.bits, page_size);
  const int byte = int(token % 4) * 8;
  for (int64_t n = 0; n < s.d; n += kKVHalf) {
    const CodeLines at = kv_code_place(s.bits, panel, n, token);
    const bool split = at.high_shift >= 0;
    const uint32_t mask = split ? 3 : (1u << s.bits) - 1;
    for (int64_t i = 0; i < min_of(kKVHalf, s.d - n); ++i) {
      uint32_t code = load_four(page + at.line + 4 * i) >> (at.shift + byte) & mask;
      if (split) {
        code |= (load_four(page + at.high_line + 4 * i) >> (at.high_shift + byte) & 1) << 2;
      }
      codes[n + i] = uint8_t(code);
    }
  }
}

// One side of one row: the page that a token is in, and its codes and scales there.
struct PagesOfRow {
  const KVPages& p;
  const KVSide& s;
  KVPart part;
  const int32_t* table;
  int64_t page_bytes;   // of codes
  int64_t page_scales;  // scales of a page

  PagesOfRow(const KVPages& pages, KVPart which, int64_t row)
      : p(pages),
        s(side_of(pages, which)),
        part(which),
        table(pages.block_table + row * pages.max_pages),
        page_bytes(which == KVPart::keys ? kv_key_page_bytes(s.bits, p.page_size, s.d)
                                         : kv_value_page_bytes(s.bits, p.page_size, s.d)),
        page_scales(is_dense(s) ? 0 : kv_scales_per_page(s, p.page_size)) {}

  int64_t page(int64_t token) const { return table[token / p.page_size]; }
  int64_t place(int64_t token) const { return token % p.page_size; }
  // Of the token among all of the pool.
  int64_t slot(int64_t token) const { return page(token) * p.page_size + place(token); }
  // Where its scale of `channel` is; those of the next channels (channel axis), or of the next
  // groups a page_size further on (token axis), follow.
  int64_t scale_at(int64_t token, int64_t channel) const {
    return page(token) * page_scales + kv_scale_at(s, p.page_size, place(token), channel);
  }

  void put_codes(int64_t token, const uint8_t* codes) const {
    uint8_t* to = s.codes + page(token) * page_bytes;
    if (part == KVPart::keys) {
      put_key_codes(s, to, place(token), codes);
    } else {
      put_value_codes(s, p.page_size, to, place(token), codes);
    }
  }
  void get_codes(int64_t token, uint8_t* codes) const {
    const uint8_t* from = s.codes + page(token) * page_bytes;
    if (part == KVPart::keys) {
      get_key_codes(s, from, place(token), codes);
    } else {
      get_value_codes(s, p.page_size, from, place(token), codes);
    }
  }
};

// Bytes that a row of codes may take: d rounded up to a k_block.
constexpr int64_t kCodeRow = kMaxKVChannels + 32;

}  // namespace
}  // namespace ow::OW_TARGET
