// The library itself: introspection, and the empty op that measures what a call costs.
#include <string>
#include <vector>

#include "core/isa.h"
#include "core/layout.h"
#include "ops/glue.h"

namespace ow {

// One line for each family: its kernel list as (name, tier).
struct KernelName {
  const char* name;
  Isa isa;
};
std::vector<KernelName> kernel_names();

namespace {

void null_op(const Tensor&) {}

std::string isa() {
  if (const char* error = isa_environment_error()) {
    fail("openwork: OPENWORK_ISA ", error, "; this CPU has ", isa_name(detected_isa()));
  }
  return isa_name(active_isa());
}

std::string cpu_isa() { return isa_name(detected_isa()); }

void set_isa(std::string name) {
  Isa isa;
  OW_CHECK(isa_from_name(name.c_str(), &isa),
           "set_isa: isa must be scalar, avx2, avx512, avx512bf16 or avx512amx, got ", name);
  OW_CHECK(set_active_isa(isa), "set_isa: isa must be at most ", isa_name(detected_isa()),
           " (what this CPU has), got ", name);
}

std::vector<std::string> kernels() {
  std::vector<std::string> names;
  for (const KernelName& kernel : kernel_names()) {
    if (kernel.isa <= active_isa()) names.push_back(kernel.name);
  }
  return names;
}

std::vector<std::string> layouts() {
  std::vector<std::string> texts;
  for (int64_t id = 0; const LayoutInfo* info = layout_info(id); ++id) texts.push_back(info->text);
  return texts;
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY(openwork, m) {
  m.def("null_op(Tensor x) -> ()");
  m.def("isa() -> str");
  m.def("cpu_isa() -> str");
  m.def("set_isa(str isa) -> ()");
  m.def("kernels() -> str[]");
  m.def("layouts() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) { m.impl("null_op", TORCH_BOX(&ow::null_op)); }

STABLE_TORCH_LIBRARY_IMPL(openwork, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&ow::isa));
  m.impl("cpu_isa", TORCH_BOX(&ow::cpu_isa));
  m.impl("set_isa", TORCH_BOX(&ow::set_isa));
  m.impl("kernels", TORCH_BOX(&ow::kernels));
  m.impl("layouts", TORCH_BOX(&ow::layouts));
}
