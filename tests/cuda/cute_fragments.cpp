// Are the tables of cuda/fragments.h those of CuTe's MMA_Traits? Fails if they differ.
#include <stdio.h>

#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "cuda/fragments.h"

namespace {

using ow::fragments::Element;

// CuTe numbers the elements of a matrix column by column, and has b transposed.
template <class Layout>
int differences(const char* name, Layout layout, int count, int rows, Element (*at)(int, int),
                bool transposed) {
  int wrong = 0;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < count; ++i) {
      const int index = layout(lane, i);
      const Element e = at(lane, i);
      const int row = transposed ? e.column : e.row;
      const int column = transposed ? e.row : e.column;
      wrong += index % rows != row || index / rows != column;
    }
  }
  printf("%s: %d differ\n", name, wrong);
  return wrong;
}

template <class Operation>
int differences_of(const char* name, int a_count, Element (*a)(int, int), Element (*b)(int, int)) {
  using Traits = cute::MMA_Traits<Operation>;
  printf("%s\n", name);
  return differences("a", typename Traits::ALayout{}, a_count, 16, a, false) +
         differences("b", typename Traits::BLayout{}, a_count / 2, 8, b, true) +
         differences("d", typename Traits::CLayout{}, 4, 16, ow::fragments::d_m16n8, false);
}

}  // namespace

int main() {
  using namespace ow::fragments;
  const int wrong =
      differences_of<cute::SM80_16x8x16_F32F16F16F32_TN>("f16", 8, a_m16n8k16, b_m16n8k16) +
      differences_of<cute::SM80_16x8x16_F32BF16BF16F32_TN>("bf16", 8, a_m16n8k16, b_m16n8k16) +
      differences_of<cute::SM80_16x8x32_S32S8S8S32_TN>("s8", 16, a_m16n8k32, b_m16n8k32);
  return wrong == 0 ? 0 : 1;
}
