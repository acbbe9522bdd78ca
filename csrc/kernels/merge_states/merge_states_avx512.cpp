#include "kernels/merge_states/merge_states_body.h"

namespace ow {

void merge_states_avx512(const MergeStatesArgs& a, int64_t begin, int64_t end) {
  avx512::merge(a, begin, end);
}

}  // namespace ow
