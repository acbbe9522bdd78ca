// Prints the table of metadata of cuda/fragments.h: a line for each lane and half of its register,
// with row, column and selector.
#include <stdio.h>

#include "cuda/fragments.h"

int main() {
  for (int lane = 0; lane < 32; ++lane) {
    for (int half = 0; half < 2; ++half) {
      const auto at = ow::fragments::metadata_sp_m16n8k32(lane, half);
      printf("%d %d %d\n", at.row, at.column, at.selector);
    }
  }
}
