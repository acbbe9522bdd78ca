// Packed-weight layouts: one line each. A layout names geometry, not a CPU; the picture of each is
// in the header of the family that owns it. Changed bytes need a new version and a new golden file.
#pragma once

#include <stdint.h>

// X(name, version, family, bits of a stored value; 0 where the layout does not say)
#define OW_LAYOUTS(X)                  \
  X(w2_n32k16, 1, lowbit, 2)           \
  X(w3_n32k32, 2, lowbit, 3)           \
  X(w4_n32k8, 1, lowbit, 4)            \
  X(w8_n32k4, 1, lowbit, 8)            \
  X(bitmask_n16k64, 1, sparse, 0)      \
  X(bytes_n16k256, 1, sparse, 0)       \
  X(blocks_n16k16, 1, block_sparse, 0) \
  X(blocks_n32k32, 1, block_sparse, 0) \
  X(blocks_n64k64, 1, block_sparse, 0) \
  X(columns_n16k1, 1, columns, 0)      \
  X(columns2_n256k1, 1, columns, 2)    \
  X(columns4_n128k1, 1, columns, 4)    \
  X(columns8_n64k1, 1, columns, 8)     \
  X(nm4_n16k8, 1, nm, 4)               \
  X(nm8_n16k4, 1, nm, 8)               \
  X(nm16_n16k2, 1, nm, 16)             \
  X(nm32_n16k1, 1, nm, 32)

namespace ow {

enum class Layout : int32_t {
#define OW_LAYOUT_ID(name, version, family, bits) name,
  OW_LAYOUTS(OW_LAYOUT_ID)
#undef OW_LAYOUT_ID
};

// Who packs and reads a layout: kernels/<family>_gemm, and kernels/active_gemv for columns.
enum class LayoutFamily : int32_t { lowbit, sparse, block_sparse, columns, nm };

struct LayoutInfo {
  Layout id;
  LayoutFamily family;
  const char* text;  // "w4_n32k8@1"
  int32_t bits;
};

// Null for an id this build does not know.
const LayoutInfo* layout_info(int64_t id);
// The one layout of a family for values of so many bits; null where it has none.
const LayoutInfo* layout_for_bits(LayoutFamily family, int64_t bits);

}  // namespace ow
