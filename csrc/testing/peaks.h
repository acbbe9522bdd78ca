// Measured roofs: what one thread of this machine can multiply and read. Loops that do nothing
// else, so that a kernel's share of the roof is a share of something real.
#pragma once

#include <stdint.h>

namespace ow {

// Runs `rounds` rounds of independent multiply-adds and returns the operations done (a
// multiply and an add are two). `sink` keeps the result alive.
using PeakFn = double (*)(int64_t rounds, float* sink);
// Reads every byte once, front to back, and returns a digest of them.
using StreamReadFn = uint64_t (*)(const uint8_t* data, int64_t bytes);

// X(tier, unit, function): unit is what the multiply takes. AVX2's int8 is vpmaddubsw + vpmaddwd.
#define OW_PEAKS(X)                                           \
  OW_IF_AVX512AMX(X(avx512amx, bf16, peak_bf16_avx512amx))    \
  OW_IF_AVX512AMX(X(avx512amx, int8, peak_int8_avx512amx))    \
  OW_IF_AVX512BF16(X(avx512bf16, bf16, peak_bf16_avx512bf16)) \
  OW_IF_AVX512(X(avx512, int8, peak_int8_avx512))             \
  OW_IF_AVX512(X(avx512, fp32, peak_fp32_avx512))             \
  OW_IF_AVX2(X(avx2, int8, peak_int8_avx2))                   \
  OW_IF_AVX2(X(avx2, fp32, peak_fp32_avx2))                   \
  X(scalar, fp32, peak_fp32_scalar)

#define OW_STREAM_READS(X)                    \
  OW_IF_AVX512(X(avx512, stream_read_avx512)) \
  OW_IF_AVX2(X(avx2, stream_read_avx2))       \
  X(scalar, stream_read_scalar)

double peak_fp32_scalar(int64_t rounds, float* sink);
double peak_fp32_avx2(int64_t rounds, float* sink);
double peak_int8_avx2(int64_t rounds, float* sink);
double peak_fp32_avx512(int64_t rounds, float* sink);
double peak_int8_avx512(int64_t rounds, float* sink);
double peak_bf16_avx512bf16(int64_t rounds, float* sink);
double peak_int8_avx512amx(int64_t rounds, float* sink);
double peak_bf16_avx512amx(int64_t rounds, float* sink);
uint64_t stream_read_scalar(const uint8_t* data, int64_t bytes);
uint64_t stream_read_avx2(const uint8_t* data, int64_t bytes);
uint64_t stream_read_avx512(const uint8_t* data, int64_t bytes);

// 12 chains hide 4 cycles of latency at two or three instructions a cycle.
constexpr int kPeakChains = 12;

}  // namespace ow
