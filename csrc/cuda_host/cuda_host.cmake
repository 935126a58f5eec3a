# The host twin of the CUDA kernels: a Python module of its own, for the tests alone. It has what _C has of the CUDA
# side, with csrc/cuda_host/prim.h and launch.h in the place of csrc/cuda's.
#
# Each kernel source is included by a file of one line, for its name ends in .cu and this is the C++ compiler.
set(twin_kernels "")
foreach(source IN LISTS cuda_kernel_sources)
  get_filename_component(name ${source} NAME_WE)
  set(wrapper ${CMAKE_CURRENT_BINARY_DIR}/cuda_host/${name}.cpp)
  file(CONFIGURE OUTPUT ${wrapper} CONTENT "#include \"@PROJECT_SOURCE_DIR@/@source@\"\n" @ONLY)
  list(APPEND twin_kernels ${wrapper})
endforeach()

set(twin_machine
  csrc/cuda_host/arrivals.cpp
  csrc/cuda_host/copies.cpp
  csrc/cuda_host/fibers.cpp
  csrc/cuda_host/hopper.cpp
  csrc/cuda_host/hopper_barriers.cpp
  csrc/cuda_host/hopper_tiles.cpp
  csrc/cuda_host/hopper_wgmma.cpp
  csrc/cuda_host/machine.cpp
  csrc/cuda_host/meeting.cpp
  csrc/cuda_host/mma.cpp
  csrc/cuda_host/report.cpp
  csrc/cuda_host/shared_memory.cpp
  csrc/cuda_host/switch_stack.cpp)

pybind11_add_module(_cuda_host MODULE NO_EXTRAS
  csrc/cuda_host/faults.cpp csrc/cuda_host/hopper_faults.cpp csrc/cuda_host/hopper_product_faults.cpp
  csrc/cuda_host/module.cpp csrc/cuda_host/primitives.cpp ${twin_machine}
  csrc/cuda/bindings.cpp csrc/cuda/plan.cpp csrc/cuda/attention_plan.cpp ${twin_kernels})
target_link_libraries(_cuda_host PRIVATE fastseq_options)
target_include_directories(_cuda_host PRIVATE csrc/cuda_host)
target_compile_definitions(_cuda_host PRIVATE FASTSEQ_ISA=cuda_host)

# The kernels are many templates and run a few steps: compiling them takes longer than running them. The machine
# runs at every meeting, and mma() and wgmma() need the vectors of -O3.
if(NOT FASTSEQ_SANITIZE)
  target_compile_options(_cuda_host PRIVATE -O1)
  set_source_files_properties(${twin_machine} PROPERTIES COMPILE_OPTIONS -O2)
endif()
set_source_files_properties(csrc/cuda_host/mma.cpp csrc/cuda_host/hopper_wgmma.cpp PROPERTIES COMPILE_OPTIONS -O3)
