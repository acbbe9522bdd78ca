#include "kernels/line_scores/line_scores_body.h"

namespace ow {

void line_scores_scalar(const LineScoresArgs& args, float* scratch, int64_t begin, int64_t end) {
  scalar::score_any(args, scratch, begin, end);
}

}  // namespace ow
