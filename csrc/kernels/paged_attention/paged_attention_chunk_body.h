// Which tokens a chunk holds, where their bytes are, and fetching them ahead.
#pragma once

#include "kernels/paged_attention/paged_attention.h"
#include "simd/attention.h"

namespace ow::OW_TARGET {
namespace {

// Up to 32 tokens, the first a multiple of 32.
struct Panel {
  int64_t token;
  int64_t page;     // -1 where the block table ends
  int64_t in_page;  // place of the first token
};

// Up to kChunkPanels panels of one head; all are full but the last one of the newest tokens.
struct Chunk {
  int64_t item;
  int64_t tokens = 0;
  int64_t panels = 0;
  bool newest;  // some may be in the ring, or not be seen by every query
  Panel panel[kChunkPanels];

  int64_t count(int64_t i) const { return min_of(tokens - i * kPanelTokens, kPanelTokens); }

  void add(const PagedAttentionArgs& a, int64_t token, int64_t count) {
    const KVPages& kv = a.kv;
    const int64_t place = token / kv.page_size;
    const int64_t page = place < kv.max_pages ? kv.block_table[item * kv.max_pages + place] : -1;
    panel[panels++] = {token, page, token % kv.page_size};
    tokens += count;
  }
};

// The chunks of one span, in order.
class Chunks {
 public:
  Chunks(const PagedAttentionArgs& a, int64_t item, int64_t span)
      : a_(a), item_(item), newest_(newest_of(a, item)) {
    const int64_t tokens = a.span_chunks * kChunkTokens;
    const int64_t pages_per_span = tokens / a.kv.page_size;
    const int64_t listed = listed_pages(a, item);
    const int64_t page_spans = div_up(listed, pages_per_span);
    if (span < page_spans) {
      at_ = span * pages_per_span;
      end_ = min_of(at_ + pages_per_span, listed);
    } else {
      in_newest_ = true;
      at_ = newest_ + (span - page_spans) * tokens;
      end_ = min_of(at_ + tokens, a.kv.lengths[item]);
    }
  }

  // False at the end.
  bool next(Chunk* chunk) {
    chunk->item = item_;
    chunk->tokens = chunk->panels = 0;
    chunk->newest = in_newest_;
    if (in_newest_) {
      for (; at_ < end_ && chunk->panels < kChunkPanels; at_ += kPanelTokens) {
        chunk->add(a_, at_, min_of(kPanelTokens, end_ - at_));
      }
    } else {
      const int64_t panels_per_page = a_.kv.page_size / kPanelTokens;
      for (; at_ < end_ && chunk->panels + panels_per_page <= kChunkPanels; ++at_) {
        const int64_t begin = place(at_) * a_.kv.page_size;
        const int64_t end = min_of(begin + a_.kv.page_size, newest_);
        for (int64_t token = begin; token < end; token += kPanelTokens) {
          chunk->add(a_, token, kPanelTokens);
        }
      }
    }
    return chunk->panels > 0;
  }

 private:
  int64_t place(int64_t i) const {
    return a_.selected == nullptr ? i : a_.selected[item_ * a_.budget + i];
  }

  const PagedAttentionArgs& a_;
  int64_t item_;
  int64_t newest_;
  bool in_newest_ = false;
  int64_t at_, end_;  // listed pages, or tokens
};

// Bytes of one side of a page.
OW_INLINE const uint8_t* key_panel(const PagedAttentionArgs& a, const Panel& p) {
  const KVSide& side = a.kv.keys;
  return side.codes + p.page * kv_key_page_bytes(side.bits, a.kv.page_size, side.d) +
         p.in_page / kKVPanel * panel_bytes(side.bits, side.d);
}
OW_INLINE const uint8_t* value_panel(const PagedAttentionArgs& a, const Panel& p, int64_t channel) {
  const KVSide& side = a.kv.values;
  return side.codes + p.page * kv_value_page_bytes(side.bits, a.kv.page_size, side.d) +
         channel / kKVPanel * panel_bytes(side.bits, a.kv.page_size) +
         p.in_page / block_k(side.bits) * block_bytes(side.bits);
}
// The element of scales or mins, of the panel's first token.
OW_INLINE int64_t scale_at(const PagedAttentionArgs& a, const KVSide& side, const Panel& p,
                           int64_t channel) {
  return p.page * kv_scales_per_page(side, a.kv.page_size) +
         kv_scale_at(side, a.kv.page_size, p.in_page, channel);
}
OW_INLINE const uint8_t* dense_row(const PagedAttentionArgs& a, const KVSide& side,
                                   const Panel& p) {
  return static_cast<const uint8_t*>(side.rows) +
         (p.page * a.kv.page_size + p.in_page) * side.d * float_size(a.kv.type);
}

// One side of a chunk's pages, fetched into the cache a few lines at a time while the other side is
// computed with: left to the hardware, whose streams end with every page of 4 KiB, arithmetic and
// memory take turns. Scales and mins of a page, few lines, come all at once before its codes.
class PagesAhead {
 public:
  PagesAhead(const PagedAttentionArgs& a, const KVSide& side, const Chunk& chunk)
      : a_(a), side_(side), chunk_(chunk) {
    const int64_t page_size = a.kv.page_size;
    const bool keys = &side == &a.kv.keys;
    page_bytes_ = is_dense(side) ? page_size * side.d * float_size(a.kv.type)
                  : keys         ? kv_key_page_bytes(side.bits, page_size, side.d)
                                 : kv_value_page_bytes(side.bits, page_size, side.d);
  }

  void fetch(int64_t lines) {
    if (left_ < 64 * lines) return fetch_to_end(lines);
    const uint8_t* at = at_;
    at_ += 64 * lines;
    left_ -= 64 * lines;
    for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(at + 64 * i, 0, 2);
  }
  // Of dense pages; null where there are none.
  const uint8_t* first_row() const {
    const bool some = is_dense(side_) && chunk_.panels > 0 && chunk_.panel[0].page >= 0;
    return some ? dense_row(a_, side_, chunk_.panel[0]) : nullptr;
  }

 private:
  void fetch_to_end(int64_t lines) {
    for (; lines > 0; --lines) {
      if (left_ <= 0 && !next_page()) return;
      __builtin_prefetch(at_, 0, 2);
      at_ += 64;
      left_ -= 64;
    }
  }
  bool next_page() {
    while (panel_ < chunk_.panels) {
      const int64_t page = chunk_.panel[panel_].page;
      const bool first = panel_ == 0 || page != chunk_.panel[panel_ - 1].page;
      ++panel_;
      if (page < 0 || !first) continue;
      const void* pool = is_dense(side_) ? side_.rows : side_.codes;
      at_ = static_cast<const uint8_t*>(pool) + page * page_bytes_;
      left_ = page_bytes_;
      if (!is_dense(side_)) fetch_scales(page);
      return true;
    }
    return false;
  }
  void fetch_scales(int64_t page) const {
    const int64_t bytes = kv_scales_per_page(side_, a_.kv.page_size) * float_size(a_.kv.type);
    const auto* scales = static_cast<const uint8_t*>(side_.scales) + page * bytes;
    const auto* mins = static_cast<const uint8_t*>(side_.mins) + page * bytes;
    for (int64_t i = 0; i < bytes; i += 64) {
      __builtin_prefetch(scales + i, 0, 2);
      __builtin_prefetch(mins + i, 0, 2);
    }
  }

  const PagedAttentionArgs& a_;
  const KVSide& side_;
  const Chunk& chunk_;
  int64_t page_bytes_;
  int64_t panel_ = 0;
  const uint8_t* at_ = nullptr;
  int64_t left_ = 0;
};

}  // namespace
}  // namespace ow::OW_TARGET
