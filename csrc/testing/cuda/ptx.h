// The instructions of cuda/ptx.h, emulated.
#pragma once

#include "cuda/fragments.h"
#include "testing/cuda/device.h"

namespace ow::ptx {

int cvt_rni_s32_f32(float value);
uint32_t prmt_b32(uint32_t a, uint32_t b, uint32_t selector);
float cvt_f32_f16(uint16_t value);
uint32_t sub_f16x2(uint32_t a, uint32_t b);
uint32_t fma_rn_bf16x2(uint32_t a, uint32_t b, uint32_t c);
uint32_t cvt_rn_bf16x2_f32(float high, float low);
uint32_t cvt_rn_f16x2_f32(float high, float low);

void cp_async_cg_16(void* shared, const void* global, int bytes, OW_HERE);
void cp_async_ca_4(void* shared, const void* global, int bytes, OW_HERE);
void cp_async_commit_group();
void cp_async_wait(int pending);
template <int kPending>
void cp_async_wait_group() {
  cp_async_wait(kPending);
}

void ldmatrix_x4(uint32_t (&d)[4], const void* shared_row, OW_HERE);

void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, OW_HERE);
void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, OW_HERE);
void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, OW_HERE);

void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                     uint32_t metadata, int selector, bool bf16, const emulation::Where& where);
template <int kSelector>
void mma_sp_m16n8k32_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                         uint32_t metadata, OW_HERE) {
  mma_sp_m16n8k32(d, a, b, metadata, kSelector, false, where);
}
template <int kSelector>
void mma_sp_m16n8k32_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                          uint32_t metadata, OW_HERE) {
  mma_sp_m16n8k32(d, a, b, metadata, kSelector, true, where);
}

}  // namespace ow::ptx
