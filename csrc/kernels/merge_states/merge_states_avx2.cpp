#include "kernels/merge_states/merge_states_body.h"

namespace ow {

void merge_states_avx2(const MergeStatesArgs& a, int64_t begin, int64_t end) {
  avx2::merge(a, begin, end);
}

}  // namespace ow
