// Kernel tables. A family lists its kernels once, best first, as
//
//   OW_FAMILY_KERNELS(X) =
//     OW_IF_AVX512(X(avx512, <key>, <max_m>, <function>))
//     X(scalar, <key>, <max_m>, <function>)
//
// and expands the list to declarations, to its selection table, and to the names that
// openwork.kernels() reports. OW_IF_* drop a line where the tier is not built.
#pragma once

#include <stdint.h>

#include "core/isa.h"

#if defined(OW_HAVE_X86_TIERS)
#define OW_IF_AVX2(line) line
#define OW_IF_AVX512(line) line
#define OW_IF_AVX512BF16(line) line
#define OW_IF_AVX512AMX(line) line
#else
#define OW_IF_AVX2(line)
#define OW_IF_AVX512(line)
#define OW_IF_AVX512BF16(line)
#define OW_IF_AVX512AMX(line)
#endif

namespace ow {

constexpr int64_t kAnyM = INT64_MAX;

template <class Fn>
struct KernelEntry {
  const char* name;
  Isa isa;
  int32_t key;    // what the kernel reads: a layout, a dtype, ...; the family says which
  int64_t max_m;  // largest row count this kernel is chosen for
  Fn fn;
};

// The first entry (the lists are best first) that the tier allows, that reads `key`, and that takes
// `m` rows. Every table ends in scalar entries for every key, so there is always one.
template <class Fn, int64_t N>
const KernelEntry<Fn>& pick(const KernelEntry<Fn> (&table)[N], Isa isa, int32_t key, int64_t m) {
  for (const KernelEntry<Fn>& entry : table) {
    if (entry.isa <= isa && entry.key == key && m <= entry.max_m) return entry;
  }
  __builtin_unreachable();
}

}  // namespace ow
