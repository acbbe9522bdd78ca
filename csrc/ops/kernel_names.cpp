// Every family's kernel list in one place, for openwork.kernels(). A new family adds two lines.
#include <cstring>
#include <vector>

#include "kernels/activations/activations.h"
#include "kernels/active_gemv/active_gemv.h"
#include "kernels/block_attention/block_attention.h"
#include "kernels/block_scores/block_scores.h"
#include "kernels/block_sparse_gemm/block_sparse_gemm.h"
#include "kernels/decode_attention/decode_attention.h"
#include "kernels/hadamard/hadamard.h"
#include "kernels/kv_cache/kv_cache.h"
#include "kernels/line_scores/line_scores.h"
#include "kernels/lowbit_gemm/lowbit_gemm.h"
#include "kernels/merge_states/merge_states.h"
#include "kernels/nm_gemm/nm_gemm.h"
#include "kernels/paged_attention/paged_attention.h"
#include "kernels/quantize/quantize.h"
#include "kernels/sparse_gemm/sparse_gemm.h"

namespace ow {

struct KernelName {
  const char* name;
  Isa isa;
};

std::vector<KernelName> kernel_names() {
  constexpr KernelName kAll[] = {
#define OW_NAME(isa, key, max_m, fn) {#fn, Isa::isa},
      OW_LOWBIT_GEMM_KERNELS(OW_NAME)        //
      OW_NM_GEMM_KERNELS(OW_NAME)            //
      OW_QUANTIZE_KERNELS(OW_NAME)           //
      OW_ACTIVATIONS_KERNELS(OW_NAME)        //
      OW_HADAMARD_KERNELS(OW_NAME)           //
      OW_DECODE_ATTENTION_KERNELS(OW_NAME)   //
      OW_KV_CACHE_KERNELS(OW_NAME)           //
      OW_PAGED_ATTENTION_KERNELS(OW_NAME)    //
      OW_BLOCK_ATTENTION_KERNELS(OW_NAME)    //
      OW_BLOCK_ATTENTION_GRADIENTS(OW_NAME)  //
      OW_MERGE_STATES_KERNELS(OW_NAME)       //
      OW_SPARSE_GEMM_KERNELS(OW_NAME)        //
      OW_SAMPLED_GEMM_KERNELS(OW_NAME)       //
      OW_BLOCK_SPARSE_GEMM_KERNELS(OW_NAME)  //
      OW_ACTIVE_GEMV_KERNELS(OW_NAME)        //
      OW_LINE_SCORES_KERNELS(OW_NAME)        //
      OW_BLOCK_SCORES_KERNELS(OW_NAME)       //
#undef OW_NAME
  };
  std::vector<KernelName> names;
  for (const KernelName& kernel : kAll) {
    // A kernel that reads several layouts stands in its list once for each.
    if (names.empty() || std::strcmp(names.back().name, kernel.name) != 0) names.push_back(kernel);
  }
  return names;
}

}  // namespace ow
