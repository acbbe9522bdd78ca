#include "core/layout.h"

namespace ow {
namespace {

constexpr LayoutInfo kLayouts[] = {
#define OW_LAYOUT_ROW(name, version, family, bits) \
  {Layout::name, LayoutFamily::family, #name "@" #version, bits},
    OW_LAYOUTS(OW_LAYOUT_ROW)
#undef OW_LAYOUT_ROW
};

}  // namespace

const LayoutInfo* layout_info(int64_t id) {
  for (const LayoutInfo& info : kLayouts) {
    if (int64_t(info.id) == id) return &info;
  }
  return nullptr;
}

const LayoutInfo* layout_for_bits(LayoutFamily family, int64_t bits) {
  for (const LayoutInfo& info : kLayouts) {
    if (info.family == family && info.bits == bits) return &info;
  }
  return nullptr;
}

}  // namespace ow
