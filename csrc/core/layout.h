// Packed-weight layouts: one line each. A layout names geometry, not a CPU; the picture of each is
// in the header of the family that owns it. Changed bytes need a new version and a new golden file.
#pragma once

#include <stdint.h>

// X(name, version, bits), with bits 0 for layouts that are not of lowbit_gemm.
#define OW_LAYOUTS(X)      \
  X(w2_n32k16, 1, 2)       \
  X(w3_n32k32, 2, 3)       \
  X(w4_n32k8, 1, 4)        \
  X(w8_n32k4, 1, 8)        \
  X(bitmask_n16k64, 1, 0)  \
  X(blocks_n16k16, 1, 0)   \
  X(blocks_n32k32, 1, 0)   \
  X(blocks_n64k64, 1, 0)   \
  X(columns_n16k1, 1, 0)   \
  X(columns2_n256k1, 1, 0) \
  X(columns4_n128k1, 1, 0) \
  X(columns8_n64k1, 1, 0)

namespace ow {

enum class Layout : int32_t {
#define OW_LAYOUT_ID(name, version, bits) name,
  OW_LAYOUTS(OW_LAYOUT_ID)
#undef OW_LAYOUT_ID
};

struct LayoutInfo {
  Layout id;
  const char* text;  // "w4_n32k8@1"
  int32_t bits;
};

// Null for an id this build does not know.
const LayoutInfo* layout_info(int64_t id);
// That of lowbit_gemm; null where it has none.
const LayoutInfo* layout_for_bits(int64_t bits);

}  // namespace ow
