#include <string.h>

#include "testing/peaks.h"

namespace ow {

double peak_fp32_scalar(int64_t rounds, float* sink) {
  float acc[kPeakChains] = {};
  const volatile float factor = 0.999f;
  const float w = factor;
  for (int64_t i = 0; i < rounds; ++i) {
    for (float& a : acc) a = a * w + w;
  }
  for (float a : acc) *sink += a;
  return double(rounds) * kPeakChains * 2;
}

uint64_t stream_read_scalar(const uint8_t* data, int64_t bytes) {
  uint64_t digest[4] = {};
  for (int64_t i = 0; i + 32 <= bytes; i += 32) {
    for (int c = 0; c < 4; ++c) {
      uint64_t word;
      memcpy(&word, data + i + c * 8, 8);
      digest[c] ^= word;
    }
  }
  return digest[0] ^ digest[1] ^ digest[2] ^ digest[3];
}

}  // namespace ow
