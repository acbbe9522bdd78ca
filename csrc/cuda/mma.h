// The tensor core instructions of cuda/ptx.h by the type of their operands.
#pragma once

#include "core/types.h"
#include "cuda/ptx.h"

namespace ow {

// d += a b; the fragments are those of cuda/fragments.h.
OW_DEVICE void mma(f16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ptx::mma_m16n8k16_f16(d, a, b0, b1);
}
OW_DEVICE void mma(bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ptx::mma_m16n8k16_bf16(d, a, b0, b1);
}
OW_DEVICE void mma(int8_t, int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ptx::mma_m16n8k32_s8(d, a, b0, b1);
}

// The same of a 2:4 sparse a, 16 x 32.
template <int kSelector>
OW_DEVICE void mma_sparse(f16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                          uint32_t metadata) {
  ptx::mma_sp_m16n8k32_f16<kSelector>(d, a, b, metadata);
}
template <int kSelector>
OW_DEVICE void mma_sparse(bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                          uint32_t metadata) {
  ptx::mma_sp_m16n8k32_bf16<kSelector>(d, a, b, metadata);
}

}  // namespace ow
