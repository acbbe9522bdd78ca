#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(OW_HAVE_X86_TIERS)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ow {
namespace {

constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512bf16", "avx512amx"};

#if defined(OW_HAVE_X86_TIERS)
// Linux gives a process the tile registers when it asks for them. Refused, we do without.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Isa detect() {
#if defined(OW_HAVE_X86_TIERS)
  // __builtin_cpu_supports also checks that the operating system saves the wider registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
  if (!avx2) return Isa::scalar;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
  if (!avx512) return Isa::avx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
  const bool amx = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
                   __builtin_cpu_supports("amx-bf16");
  return amx && may_use_tiles() ? Isa::avx512amx : Isa::avx512bf16;
#else
  return Isa::scalar;
#endif
}

struct State {
  Isa detected = detect();
  std::atomic<Isa> active{detected};
  const char* error = nullptr;

  State() {
    const char* wanted = std::getenv("OPENWORK_ISA");
    if (wanted == nullptr || *wanted == '\0') return;
    Isa isa;
    if (!isa_from_name(wanted, &isa)) {
      error = "is not one of scalar, avx2, avx512, avx512bf16, avx512amx";
    } else if (isa > detected) {
      error = "is not supported by this CPU";
    } else {
      active = isa;
    }
  }
};

State& state() {
  static State instance;
  return instance;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[int(isa)]; }

bool isa_from_name(const char* name, Isa* isa) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      *isa = Isa(i);
      return true;
    }
  }
  return false;
}

Isa detected_isa() { return state().detected; }
Isa active_isa() { return state().active.load(std::memory_order_relaxed); }

bool set_active_isa(Isa isa) {
  if (isa > detected_isa()) return false;
  state().active.store(isa, std::memory_order_relaxed);
  return true;
}

const char* isa_environment_error() { return state().error; }

}  // namespace ow
