# The CUDA side: built where nvcc works, left out with a reason (for fastseq.show_config()) where it does not.
# bindings.cpp is told by three definitions:
#   FASTSEQ_CUDA_BUILT          0 or 1
#   FASTSEQ_CUDA_REASON         a string literal: why it is not built, "" if it is
#   FASTSEQ_CUDA_ARCHITECTURES  string literals separated by commas, nothing if it is not built
#
# The kernels, listed here once; csrc/cuda_host/cuda_host.cmake compiles the same for the CPU.
# For every architecture.
set(cuda_sources csrc/cuda/recurrent.cu csrc/cuda/recurrent_cell.cu csrc/cuda/attention.cu)
# Those that need thread-block clusters, or include prim_hopper.h: for sm_90a alone.
set(cuda_cluster_sources csrc/cuda/hopper_primitives.cu csrc/cuda/hopper_products.cu
  csrc/cuda/attention_hopper_bfloat16.cu csrc/cuda/attention_hopper_float16.cu)
list(APPEND cuda_cluster_sources csrc/cuda/attention_hopper_backward_bfloat16.cu
  csrc/cuda/attention_hopper_backward_float16.cu)
foreach(arithmetic IN ITEMS bfloat16 float16 tf32 float32 float64)
  list(APPEND cuda_sources csrc/cuda/recurrent_${arithmetic}.cu csrc/cuda/attention_forward_${arithmetic}.cu
    csrc/cuda/attention_backward_${arithmetic}.cu csrc/cuda/attention_dual_forward_${arithmetic}.cu
    csrc/cuda/attention_dual_backward_${arithmetic}.cu)
  list(APPEND cuda_cluster_sources csrc/cuda/recurrent_cluster_${arithmetic}.cu)
endforeach()
set(cuda_kernel_sources ${cuda_sources} ${cuda_cluster_sources})

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80 90a-real)  # 80 with its PTX, which later GPUs can translate, not 90a's
endif()

# Finds nvcc and the C++ compiler that it calls, as CMake would, but neither is remembered when it is gone.
unset(nvcc)
if(DEFINED ENV{CUDACXX})
  set(nvcc $ENV{CUDACXX})
else()
  find_program(nvcc nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
    NO_CMAKE_SYSTEM_PATH NO_CACHE)
endif()
set(nvcc_host ${CMAKE_CXX_COMPILER})
if(DEFINED ENV{CUDAHOSTCXX})
  set(nvcc_host $ENV{CUDAHOSTCXX})
endif()

# Compiles and links device.cu by hand, since enable_language() stops everything where nvcc is broken, too
# old for an architecture, or refuses the C++ compiler. `reason` stays empty if all is well.
function(try_nvcc reason)
  set(code "")
  foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
    string(REGEX REPLACE "-.*" "" number ${architecture})
    list(APPEND code -gencode=arch=compute_${number},code=sm_${number})
  endforeach()
  execute_process(
    COMMAND ${nvcc} -ccbin ${nvcc_host} -std=c++17 ${code} -Xcompiler=-fPIC
            -cudart static -shared -o ${CMAKE_BINARY_DIR}/try_nvcc.so
            ${PROJECT_SOURCE_DIR}/csrc/cuda/device.cu
    RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  set(line "")
  if(NOT result EQUAL 0)
    # The first line that names an error, else the first line, fit for a string literal.
    string(REGEX MATCH "[^\n]*(error|fatal)[^\n]*" line "${output}")
    if(NOT line)
      string(REGEX MATCH "[^\n]+" line "${output}")
    endif()
    string(REGEX REPLACE "[^A-Za-z0-9 .,:/_'()+*=<>-]" "" line "${nvcc} failed (${result}): ${line}")
    string(SUBSTRING "${line}" 0 200 line)
  endif()
  set(${reason} "${line}" PARENT_SCOPE)
endfunction()

set(cuda_reason "")
if(FASTSEQ_CUDA STREQUAL "off")
  set(cuda_reason "switched off when fastseq was built (FASTSEQ_CUDA=off)")
elseif(NOT FASTSEQ_CUDA MATCHES "^(auto|on)$")
  message(FATAL_ERROR "FASTSEQ_CUDA is '${FASTSEQ_CUDA}'\naccepted are auto, on and off\nunset it for auto")
elseif(NOT nvcc)
  set(cuda_reason "nvcc was not in PATH when fastseq was built")
elseif(NOT FASTSEQ_NVCC_WORKS STREQUAL "${nvcc}")
  try_nvcc(cuda_reason)
  if(cuda_reason STREQUAL "")
    set(FASTSEQ_NVCC_WORKS ${nvcc} CACHE INTERNAL "the nvcc that passed try_nvcc")
  endif()
endif()

set(cuda_built 0)
set(cuda_names "")
if(cuda_reason STREQUAL "")
  set(cuda_built 1)
  set(CMAKE_CUDA_COMPILER ${nvcc})
  set(CMAKE_CUDA_HOST_COMPILER ${nvcc_host})
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

  # The registers of every kernel are printed. One that spills fails the build, and one in which ptxas has products of
  # warpgroups wait for each other (compile.sh).
  function(add_kernels name)
    add_library(${name} OBJECT ${ARGN})
    target_include_directories(${name} PRIVATE csrc/cuda csrc)
    target_compile_definitions(${name} PRIVATE FASTSEQ_ISA=cuda)
    target_compile_options(${name} PRIVATE
      --expt-relaxed-constexpr -Xptxas=-v,-warn-spills,-Werror -Xcompiler=-Wall,-Wextra,-ffp-contract=off)
    set(launcher sh ${PROJECT_SOURCE_DIR}/csrc/cuda/compile.sh ${CMAKE_CUDA_COMPILER_LAUNCHER})
    set_target_properties(${name} PROPERTIES CUDA_COMPILER_LAUNCHER "${launcher}")
    target_sources(_C PRIVATE $<TARGET_OBJECTS:${name}>)
  endfunction()
  add_kernels(fastseq_cuda csrc/cuda/device.cu ${cuda_sources})
  if(cuda_cluster_sources)
    add_kernels(fastseq_cuda_cluster csrc/cuda/tensor_map.cu ${cuda_cluster_sources})
    set_target_properties(fastseq_cuda_cluster PROPERTIES CUDA_ARCHITECTURES 90a-real)
  endif()
  set_target_properties(_C PROPERTIES CUDA_RUNTIME_LIBRARY Static)

  add_library(fastseq_cuda_bindings OBJECT csrc/cuda/bindings.cpp)
  target_link_libraries(fastseq_cuda_bindings PRIVATE fastseq_options pybind11::headers Python::Module)
  target_compile_definitions(fastseq_cuda_bindings PRIVATE FASTSEQ_ISA=cuda)
  target_sources(_C PRIVATE $<TARGET_OBJECTS:fastseq_cuda_bindings>)

  string(REGEX REPLACE "([0-9]+[a-z]?)(-real|-virtual)?" "\"sm_\\1\"" cuda_names
    "${CMAKE_CUDA_ARCHITECTURES}")
  string(REPLACE ";" "," cuda_names "${cuda_names}")
  message(STATUS "CUDA: ${cuda_names}")
elseif(FASTSEQ_CUDA STREQUAL "on")
  message(FATAL_ERROR
    "FASTSEQ_CUDA=on but ${cuda_reason}\non needs a working nvcc >= 12.1\nset FASTSEQ_CUDA=auto")
else()
  message(STATUS "CUDA: none, ${cuda_reason}")
endif()

set(cuda_definitions
  FASTSEQ_CUDA_BUILT=${cuda_built}
  FASTSEQ_CUDA_REASON="${cuda_reason}"
  FASTSEQ_CUDA_ARCHITECTURES=${cuda_names})
set_source_files_properties(csrc/bindings.cpp PROPERTIES COMPILE_DEFINITIONS "${cuda_definitions}")
