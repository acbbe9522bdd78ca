#include "testing/peaks.h"

namespace ow {
namespace {

struct TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
};

// Four sums at a time hide the latency; all operands are zero.
void begin() {
  const TileConfig config;
  asm volatile("ldtilecfg %0" ::"m"(config));
  asm volatile(
      "tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\t"
      "tilezero %%tmm3\n\ttilezero %%tmm4\n\ttilezero %%tmm5" ::);
}

double end(int64_t products, int64_t k) {
  asm volatile("tilerelease");
  return double(products) * 16 * 16 * double(k) * 2;
}

}  // namespace

double peak_int8_avx512amx(int64_t rounds, float*) {
  begin();
  for (int64_t i = 0; i < rounds; i += 8) {
    asm volatile(
        "tdpbssd %%tmm5, %%tmm4, %%tmm0\n\ttdpbssd %%tmm5, %%tmm4, %%tmm1\n\t"
        "tdpbssd %%tmm5, %%tmm4, %%tmm2\n\ttdpbssd %%tmm5, %%tmm4, %%tmm3" ::);
  }
  return end((rounds + 7) / 8 * 4, 64);
}

double peak_bf16_avx512amx(int64_t rounds, float*) {
  begin();
  for (int64_t i = 0; i < rounds; i += 8) {
    asm volatile(
        "tdpbf16ps %%tmm5, %%tmm4, %%tmm0\n\ttdpbf16ps %%tmm5, %%tmm4, %%tmm1\n\t"
        "tdpbf16ps %%tmm5, %%tmm4, %%tmm2\n\ttdpbf16ps %%tmm5, %%tmm4, %%tmm3" ::);
  }
  return end((rounds + 7) / 8 * 4, 32);
}

}  // namespace ow
