// Instruction-set tiers, their detection, and the ceiling a user may put on them.
#pragma once

namespace ow {

// Ordered: a CPU that has a tier has every tier before it.
enum class Isa : int { scalar, avx2, avx512, avx512bf16, avx512amx };
constexpr int kIsaCount = 5;

const char* isa_name(Isa isa);

// Looks a name up; false if there is no such tier.
bool isa_from_name(const char* name, Isa* isa);

// The best tier this CPU and operating system support and this build contains.
Isa detected_isa();

// The tier kernels are chosen for: the detected one, lowered by OPENWORK_ISA or set_active_isa.
Isa active_isa();

// False, and no change, if the CPU lacks the tier.
bool set_active_isa(Isa isa);

// Null, or why the value of OPENWORK_ISA was refused.
const char* isa_environment_error();

}  // namespace ow
