// Sequences of tokens in a tensor [b, n, ...]: the rows of the batch, or, packed one behind another
// into a single row, what lies between offsets.
#pragma once

#include <stdint.h>

namespace ow {

struct Sequences {
  const int32_t* offsets;  // [count + 1], or null: rows of the batch, `length` tokens each
  int64_t count, length;

  int64_t size(int64_t s) const {
    return offsets == nullptr ? length : offsets[s + 1] - offsets[s];
  }
  // Elements before the first token of sequence s.
  int64_t begin(int64_t s, int64_t batch_stride, int64_t token_stride) const {
    return offsets == nullptr ? s * batch_stride : offsets[s] * token_stride;
  }
  int64_t longest() const {
    int64_t most = offsets == nullptr ? length : 0;
    for (int64_t s = 0; s < count; ++s) most = size(s) > most ? size(s) : most;
    return most;
  }
};

}  // namespace ow
