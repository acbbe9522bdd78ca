# openwork_cuda, the operators for NVIDIA GPUs: built where nvcc is found, no GPU needed.
#
#   OPENWORK_CUDA   AUTO: if nvcc is found; ON: it must be; OFF: not
#
# nvcc is $CUDACXX, one on the path, the toolkit's in /usr/local/cuda, or that of the wheels
# nvidia-cuda-nvcc, -crt, -nvvm, -cccl and -cuda-runtime beside the interpreter.
set(OPENWORK_CUDA AUTO CACHE STRING "Build the CUDA library: AUTO, ON or OFF")
set(OPENWORK_CUDA_ARCHITECTURES "80-real;90a-real;100-real;120" CACHE STRING
    "GPUs the CUDA library has code for; without -real also as PTX, for later ones")
set(OW_HAVE_CUDA OFF)

if(OPENWORK_CUDA)
  execute_process(COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
                  OUTPUT_VARIABLE ow_site_packages OUTPUT_STRIP_TRAILING_WHITESPACE)
  find_program(OW_NVCC nvcc
    HINTS ENV CUDACXX PATHS /usr/local/cuda/bin ${ow_site_packages}/nvidia/cu13/bin)
  if(DEFINED ENV{CUDACXX})
    set(OW_NVCC $ENV{CUDACXX})
  endif()
  if(OW_NVCC)
    set(OW_HAVE_CUDA ON)
    set(CMAKE_CUDA_COMPILER ${OW_NVCC})
    set(CMAKE_CUDA_ARCHITECTURES ${OPENWORK_CUDA_ARCHITECTURES})
    # The wheels have lib where nvcc's profile has lib64.
    get_filename_component(ow_cuda_root ${OW_NVCC} DIRECTORY)
    get_filename_component(ow_cuda_root ${ow_cuda_root} DIRECTORY)
    if(EXISTS ${ow_cuda_root}/lib/libcudart_static.a)
      set(CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS} -L${ow_cuda_root}/lib")
    endif()
    enable_language(CUDA)
    set(CMAKE_CUDA_STANDARD 20)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  elseif(OPENWORK_CUDA STREQUAL "AUTO")
    message(STATUS "openwork: no nvcc found, the CUDA library is left out")
  else()
    message(FATAL_ERROR "openwork: OPENWORK_CUDA=ON needs nvcc, found none; set CUDACXX, or "
                        "install the wheels named in csrc/cmake/OpenworkCuda.cmake")
  endif()
endif()

# Sources of the operators' host side, which the emulated library has too.
file(GLOB ow_cuda_kernels CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/kernels/*/*.cu)
file(GLOB ow_cuda_ops CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/ops/cuda/*.cpp)
list(APPEND ow_cuda_ops ${PROJECT_SOURCE_DIR}/csrc/ops/lowbit_checks.cpp
                        ${PROJECT_SOURCE_DIR}/csrc/core/layout.cpp)

function(openwork_add_cuda_library)
  add_library(openwork_cuda MODULE ${ow_cuda_kernels} ${ow_cuda_ops}
                                   ${PROJECT_SOURCE_DIR}/csrc/cuda/runtime.cu)
  target_include_directories(openwork_cuda PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
  # Code for five architectures packs to a fifth of its size.
  target_compile_options(openwork_cuda PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-fvisibility=hidden --compress-mode=size>)
  # The C++ compiler links: nvcc moves --no-as-needed and loses libtorch.so, which every torch has
  # and which brings libtorch_cuda.so where there is one. The weak stream symbol needs no -z,defs.
  set_target_properties(openwork_cuda PROPERTIES PREFIX "" SUFFIX ".so" SKIP_BUILD_RPATH ON
                        CUDA_RUNTIME_LIBRARY Static LINKER_LANGUAGE CXX)
  target_link_libraries(openwork_cuda PRIVATE openwork::torch ${OW_TORCH_DIR}/lib/libtorch.so)
  install(TARGETS openwork_cuda LIBRARY DESTINATION openwork)
endfunction()
