// Every kernel-table entry against the scalar one or the formula, on operands that end (then begin)
// at a page that cannot be touched; every driver with its tasks split unevenly and run in reverse;
// and chains of steps on a Team. Run by ctest, also under AddressSanitizer and
// UndefinedBehaviorSanitizer.
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "smoke.h"

namespace ow::testing {
namespace {

// to_float and from_float of core/types.h are each other's inverse on every 16-bit value.
template <class T>
void check_conversions(const char* name) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = to_float(T{uint16_t(bits)});
    T back;
    from_float(value, &back);
    const bool same = isnan(value) ? isnan(to_float(back)) : back.bits == bits;
    CHECK(same, "%s: 0x%04x becomes 0x%04x", name, bits, back.bits);
  }
}

[[maybe_unused]] void name_the_kernel(int) {
  constexpr char kText[] = "fault outside of the operands in ";
  ssize_t ignored = write(STDERR_FILENO, kText, sizeof(kText) - 1);
  ignored = write(STDERR_FILENO, running, strlen(running));
  ignored = write(STDERR_FILENO, "\n", 1);
  (void)ignored;
  _exit(2);
}

}  // namespace
}  // namespace ow::testing

int main() {
  using namespace ow::testing;
#if !defined(__SANITIZE_ADDRESS__)  // which prints where
  signal(SIGSEGV, name_the_kernel);
  signal(SIGBUS, name_the_kernel);
#endif
  Guarded memory(13);
  check_conversions<ow::bf16>("bf16");
  check_conversions<ow::f16>("f16");
  check_lowbit_gemm(&memory);
  check_nm_gemm(&memory);
  check_quantize(&memory);
  check_activations(&memory);
  check_hadamard(&memory);
  check_decode_attention(&memory);
  check_block_attention(&memory);
  check_block_attention_backward(&memory);
  check_sparse_gemm(&memory);
  check_block_sparse_gemm(&memory);
  check_active_gemv(&memory);
  check_block_index(&memory);
  check_line_scores(&memory);
  check_paged_attention();
  check_kv_cache(&memory);
  check_team();
  printf("%d checks on tiers up to %s, %d failed\n", checks, isa_name(ow::detected_isa()),
         failures);
  return failures == 0 ? 0 : 1;
}
