// Work cut evenly over blocks, as many as a GPU holds at once, whatever the sizes.
//
//   tiles of a result, each a sum over steps:
//
//     tile 0       | tile 1       | tile 2       | tile 3       |
//     steps 0 .. 4 | steps 0 .. 4 | ...                         |
//     |--- block 0 ---|--- block 1 ---|--- block 2 ----|-- 3 ---|   stripes
//
// A block goes through its stripe in segments, one a tile. Of a tile that lies in one stripe the
// block writes the result; of a tile that is cut every block writes its sum to a part of its own,
// and a second kernel adds them in order of steps. That kernel, rather than the last block to come,
// because its order is that of the stream: there is no fence to forget, and the result is the same
// every time.
#pragma once

#include "cuda/device.h"

#include "core/types.h"

namespace ow {

// A segment of a stripe: steps begin .. end - 1 of a tile.
struct Segment {
  int64_t tile, begin, end;
};

// Tiles of so many steps each over 1 .. tiles * steps blocks. A unit is a step of a tile, counted
// tile after tile.
struct Stripes {
  int64_t tiles, steps, blocks;
};

OW_INLINE int64_t first_unit(const Stripes& s, int64_t block) {
  return s.tiles * s.steps * block / s.blocks;
}
OW_INLINE int64_t block_of(const Stripes& s, int64_t unit) {
  return ((unit + 1) * s.blocks - 1) / (s.tiles * s.steps);
}

// The segment that begins at `unit`, which `block` has.
OW_INLINE Segment segment_at(const Stripes& s, int64_t block, int64_t unit) {
  const int64_t tile = unit / s.steps;
  const int64_t end = min_of(first_unit(s, block + 1), (tile + 1) * s.steps);
  return {tile, unit - tile * s.steps, end - tile * s.steps};
}
OW_INLINE bool is_whole(const Stripes& s, const Segment& segment) {
  return segment.begin == 0 && segment.end == s.steps;
}

OW_INLINE bool has_cuts(const Stripes& s) { return s.tiles % s.blocks != 0; }

// A block cuts at most the tile its stripe begins in and the one it ends in, and has a part to
// write its sum of each to.
OW_INLINE int64_t part_count(const Stripes& s) { return 2 * s.blocks; }
OW_INLINE int64_t part_at_begin(int64_t block) { return 2 * block; }
OW_INLINE int64_t part_of(const Stripes& s, int64_t block, int64_t tile) {
  return part_at_begin(block) + (first_unit(s, block) / s.steps != tile);
}

}  // namespace ow
