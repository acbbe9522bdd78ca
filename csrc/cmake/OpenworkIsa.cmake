# The only table from instruction-set tier to compiler flags. The file-name suffix picks the tier
# (foo_avx512.cpp), so a new kernel needs no CMake edit. Never -march=native, -ffast-math (it would
# switch flush-to-zero on for the whole process) or LTO: each would let one tier's code leak into another.

set(OW_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi2)
set(OW_FLAGS_avx512 ${OW_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni
                    -mavx512vbmi -mavx512vbmi2 -mprefer-vector-width=512
                    # gcc 12 sees uninitialized operands in its own intrinsics (GCC PR 105593)
                    -Wno-maybe-uninitialized -Wno-uninitialized)
set(OW_FLAGS_avx512bf16 ${OW_FLAGS_avx512} -mavx512bf16)
set(OW_FLAGS_avx512amx ${OW_FLAGS_avx512bf16} -mamx-tile -mamx-int8 -mamx-bf16)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(OW_X86_TIERS ON)
else()
  set(OW_X86_TIERS OFF)
endif()

# Sets each source's flags and drops the tiers this processor cannot have.
function(openwork_apply_isa sources_var)
  set(kept "")
  foreach(source IN LISTS ${sources_var})
    get_filename_component(stem ${source} NAME_WE)
    set(tier scalar)
    if(stem MATCHES "_(avx2|avx512|avx512bf16|avx512amx)$")
      set(tier ${CMAKE_MATCH_1})
    endif()
    if(tier STREQUAL "scalar")
      if(stem MATCHES "_scalar$")
        set_source_files_properties(${source} PROPERTIES COMPILE_DEFINITIONS "OW_TARGET=scalar")
      endif()
    elseif(OW_X86_TIERS)
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${OW_FLAGS_${tier}}"
                                                       COMPILE_DEFINITIONS "OW_TARGET=${tier}")
    else()
      continue()
    endif()
    list(APPEND kept ${source})
  endforeach()
  set(${sources_var} ${kept} PARENT_SCOPE)
endfunction()
