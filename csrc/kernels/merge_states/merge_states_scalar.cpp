#include "kernels/merge_states/merge_states_body.h"

namespace ow {

void merge_states_scalar(const MergeStatesArgs& a, int64_t begin, int64_t end) {
  scalar::merge(a, begin, end);
}

}  // namespace ow
