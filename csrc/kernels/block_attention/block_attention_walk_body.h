// Which keys a tile of queries reads: those listed and visible to one of them, in units.
#pragma once

#include "kernels/block_attention/block_attention.h"

namespace ow::OW_TARGET {
namespace {

// Keys that are multiplied together: of the aligned unit at `key`, or single ones; of either the
// keys begin .. end - 1 count.
struct Unit {
  int64_t key;
  bool single;
  int64_t begin, end;
  int32_t columns[kUnitKeys];

  int64_t position(int64_t j) const { return single ? columns[j] : key + j; }
};

struct Range {
  int64_t begin, end;
};
OW_INLINE Range both(Range a, Range b) {
  return {a.begin > b.begin ? a.begin : b.begin, min_of(a.end, b.end)};
}

// What the mask leaves of the keys to a tile as a whole, and to each of its queries.
struct Sight {
  AttentionMask mask;
  int64_t position;  // of the first query
  int64_t count;     // queries
  Range ranges[2];   // seen by any: sinks, then a window; or one range, and nothing

  Sight(const BlockAttentionArgs& a, const QueryTile& tile)
      : mask(a.mask),
        position(tile.sequence->keys - tile.sequence->queries + tile.first),
        count(tile.count),
        ranges{{0, tile.sequence->keys}, {0, 0}} {
    if (!mask.causal) return;
    const int64_t end = min_of(position + count - mask.min_distance, tile.sequence->keys);
    const int64_t window = mask.window > 0 ? position - mask.window + 1 : 0;
    if (window <= mask.sinks) {
      ranges[0] = {0, end};
    } else {
      ranges[0] = {0, min_of(mask.sinks, end)};
      ranges[1] = {window, end};
    }
  }

  bool sees(int64_t key) const {
    return (key >= ranges[0].begin && key < ranges[0].end) ||
           (key >= ranges[1].begin && key < ranges[1].end);
  }

  // Of the tile's queries, those that see `key`; an empty range may be the other way round.
  Range queries(int64_t key) const {
    if (!mask.causal) return {0, count};
    const int64_t first = key + mask.min_distance - position;
    const bool always = mask.window == 0 || key < mask.sinks;
    const int64_t last = always ? count : min_of(key + mask.window - position, count);
    return {first > 0 ? first : 0, last};
  }

  // Whether every query sees every key of `unit`.
  bool is_full(const Unit& unit) const {
    if (unit.begin != 0 || unit.end != kUnitKeys) return false;
    const Range nearest = queries(unit.position(kUnitKeys - 1));
    const Range furthest = queries(unit.position(0));
    // Sinks come first: if the last key is one, all are; if the first is not, none is.
    const bool one_kind = mask.window == 0 || unit.position(kUnitKeys - 1) < mask.sinks ||
                          unit.position(0) >= mask.sinks;
    return one_kind && nearest.begin == 0 && furthest.end >= count;
  }
};

// Units of a tile: of its blocks in order, then of its columns.
class Walk {
 public:
  Walk(const BlockAttentionArgs& a, const QueryTile& tile, const Sight& sight)
      : sight_(sight),
        keys_(tile.sequence->keys),
        block_n_(a.block_n),
        dense_(a.blocks.indptr == nullptr),
        blocks_(tile.blocks),
        columns_(tile.columns) {}

  // False at the end.
  bool next(Unit* unit) {
    while (at_ >= range_.end) {
      if (!next_range()) return next_columns(unit);
    }
    unit->key = at_ / kUnitKeys * kUnitKeys;
    unit->single = false;
    unit->begin = at_ - unit->key;
    unit->end = min_of(range_.end - unit->key, kUnitKeys);
    at_ = unit->key + kUnitKeys;
    return true;
  }

 private:
  // What is seen of the next run of blocks: first the one range, then the other.
  bool next_range() {
    if (part_ == 2) {
      if (!next_run()) return false;
      part_ = 0;
    }
    range_ = both(run_, sight_.ranges[part_++]);
    at_ = range_.begin;
    return true;
  }

  bool next_run() {
    if (dense_) {
      dense_ = false;
      run_ = {0, keys_};
      return true;
    }
    if (blocks_.begin == blocks_.end) return false;
    const int64_t first = *blocks_.begin++;
    int64_t last = first;
    while (blocks_.begin != blocks_.end && *blocks_.begin == last + 1) last = *blocks_.begin++;
    run_ = {first * block_n_, min_of((last + 1) * block_n_, keys_)};
    return true;
  }

  bool next_columns(Unit* unit) {
    unit->single = true;
    unit->begin = unit->end = 0;
    for (; columns_.begin != columns_.end && unit->end < kUnitKeys; ++columns_.begin) {
      if (sight_.sees(*columns_.begin)) unit->columns[unit->end++] = *columns_.begin;
    }
    return unit->end > 0;
  }

  const Sight& sight_;
  int64_t keys_, block_n_;
  bool dense_;
  KeyList blocks_, columns_;
  Range run_{0, 0};
  int part_ = 2;  // of the ranges seen: the next to meet the run
  Range range_{0, 0};
  int64_t at_ = 0;
};

}  // namespace
}  // namespace ow::OW_TARGET
