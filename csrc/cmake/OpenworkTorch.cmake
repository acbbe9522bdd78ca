# openwork::torch from the interpreter's own torch. Not find_package(Torch): it brings Caffe2Config,
# CUDA detection and absolute paths, none of which a stable-ABI library needs.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import importlib.util as u, os; print(os.path.dirname(u.find_spec('torch').origin))"
  OUTPUT_VARIABLE OW_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE ow_torch_result ERROR_QUIET)
if(NOT ow_torch_result EQUAL 0)
  message(FATAL_ERROR "openwork: ${Python_EXECUTABLE} has no torch; install torch>=2.10 first and "
                      "build with --no-build-isolation")
endif()

# 2.10: the oldest torch the binary loads into.
set(OW_TORCH_TARGET "0x020a000000000000")

add_library(openwork_torch INTERFACE)
add_library(openwork::torch ALIAS openwork_torch)
target_include_directories(openwork_torch SYSTEM INTERFACE ${OW_TORCH_DIR}/include)
target_compile_definitions(openwork_torch INTERFACE TORCH_TARGET_VERSION=${OW_TORCH_TARGET}
                                                    TORCH_STABLE_ONLY)
# The library is resolved by soname because `import torch` ran first: no rpath is needed.
target_link_options(openwork_torch INTERFACE -Wl,--no-as-needed -Wl,--exclude-libs,ALL -Wl,-z,defs)
target_link_libraries(openwork_torch INTERFACE ${OW_TORCH_DIR}/lib/libtorch_cpu.so)
