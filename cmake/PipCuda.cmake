# MOECORE_CUDA=pip: the CUDA 13 compiler from NVIDIA's wheels in the build environment. Include before
# enable_language(CUDA).
#
# The wheels differ from a system toolkit in three ways, each repaired here: the compiler is not on PATH, libraries
# are in lib (nvcc looks in lib64), and there is no unversioned libcudart.so.

find_package(Python REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND
    ${Python_EXECUTABLE} -c
    "import os, nvidia; print(next((r for r in (os.path.join(p, 'cu13') for p in nvidia.__path__) if os.path.exists(os.path.join(r, 'bin', 'nvcc'))), ''))"
  OUTPUT_VARIABLE _root
  OUTPUT_STRIP_TRAILING_WHITESPACE
  ERROR_QUIET)
if(NOT _root)
  message(FATAL_ERROR "MOECORE_CUDA=pip found no nvcc in ${Python_EXECUTABLE}'s packages. Install it with: "
                      "pip install 'cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.2'")
endif()
set(CMAKE_CUDA_COMPILER ${_root}/bin/nvcc CACHE FILEPATH "" FORCE)
set(CUDAToolkit_ROOT ${_root} CACHE PATH "" FORCE)
set(ENV{LIBRARY_PATH} "${_root}/lib:$ENV{LIBRARY_PATH}")
set(CMAKE_CUDA_FLAGS_INIT "-L${_root}/lib")
set(CUDA_CUDART ${_root}/lib/libcudart.so.13 CACHE FILEPATH "" FORCE)
