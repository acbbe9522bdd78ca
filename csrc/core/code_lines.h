// Where codes of 8, 4, 3 and 2 bits lie in the 64-byte lines that weights (kernels/lowbit_gemm) and
// cached keys and values (core/kv_pages.h) are packed in.
//
//   line       16 lanes of 32 bits, one for each n; the 4 bytes of a lane belong to 4 consecutive k
//   half       the lines of 16 n and one k_block of 16 k (32 for 3 bits): 4, 2, 3, 1 of them
//   block      two halves, of 32 n
//
//   8 bits     line l: k = 4 l ..
//   4 bits     line l: k = 8 l .. in the low nibbles, 8 l + 4 .. in the high ones
//   2 bits     one line: k = 0 .., 4 .., 8 .., 12 .. from the lowest bits up
//   3 bits     line l: k = 12 l .. in bits 0 to 2, 12 l + 4 .. in 3 to 5, and of 12 l + 8 .. the
//              lowest two bits in 6 and 7. The third line has no k = 32 ..: there bits 6 and 7 are
//              the third bits of k = 8 .. and of k = 20 ..
#pragma once

#include "core/types.h"

namespace ow {

constexpr int64_t kCodeLine = 64;

OW_INLINE int64_t block_k(int32_t bits) { return bits == 3 ? 32 : 16; }
OW_INLINE int64_t block_bytes(int32_t bits) { return kCodeLine * (bits == 3 ? 6 : bits); }
// Of 32 n and k codes of each.
OW_INLINE int64_t panel_bytes(int32_t bits, int64_t k) {
  return div_up(k, block_k(bits)) * block_bytes(bits);
}

// The codes of 4 consecutive k, one in each byte of a lane: their low bits at `shift` of the lane
// in one line; where high_shift >= 0 those are two, and the third is at high_shift in another.
struct CodeLines {
  int64_t line;  // in bytes from the start of the half
  int shift;
  int64_t high_line;
  int high_shift;
};
OW_INLINE CodeLines code_lines(int32_t bits, int64_t k) {
  const int sub = int(k / 4 % 4);
  switch (bits) {
    case 8: return {sub * kCodeLine, 0, 0, -1};
    case 4: return {sub / 2 * kCodeLine, sub % 2 * 4, 0, -1};
    case 2: return {0, sub * 2, 0, -1};
  }
  const int j = int(k / 4 % 8);
  return {j / 3 * kCodeLine, j % 3 * 3, 2 * kCodeLine, j % 3 == 2 ? 6 + j / 3 : -1};
}

}  // namespace ow
