# Decides whether the CUDA engine is built, with which compiler and for which architectures.
# Sets MOECORE_HAS_CUDA and MOECORE_CUDA_ARCH_LIST.

set(MOECORE_RELEASE_ARCHITECTURES 80 90a 100f 120f)

# Architectures of the GPUs of this machine, each in the variant that has all its instructions: 90a, 100f, 120f, and
# before CMake 4.0.2, which does not know families, 100a, 120a. Empty without a GPU. CMake's own 'native' names plain
# architectures, which lack wgmma and the fp4 conversions.
function(moecore_native_architectures result)
  set(list)
  find_program(MOECORE_NVIDIA_SMI nvidia-smi)
  if(MOECORE_NVIDIA_SMI)
    execute_process(
      COMMAND ${MOECORE_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE capabilities
      ERROR_QUIET
      RESULT_VARIABLE status)
    if(status EQUAL 0)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]" capabilities "${capabilities}")
      foreach(capability IN LISTS capabilities)
        string(REPLACE "." "" arch ${capability})
        string(REGEX REPLACE "^90$" "90a" arch ${arch})
        if(CMAKE_VERSION VERSION_LESS 4.0.2)
          string(REGEX REPLACE "^1[02].$" "\\0a" arch ${arch})
        else()
          string(REGEX REPLACE "^1([02]).$" "1\\10f" arch ${arch})
        endif()
        list(APPEND list ${arch})
      endforeach()
      list(REMOVE_DUPLICATES list)
    endif()
  endif()
  set(${result} ${list} PARENT_SCOPE)
endfunction()

# AUTO builds what this machine can use: a CUDA engine needs a GPU here, or a list of architectures to build for.
set(MOECORE_HAS_CUDA OFF)
moecore_native_architectures(_native)
if(MOECORE_CUDA STREQUAL "pip")
  include(PipCuda)
  set(MOECORE_HAS_CUDA ON)
elseif(MOECORE_CUDA STREQUAL "AUTO")
  if(_native OR MOECORE_CUDA_ARCHITECTURES)
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      set(MOECORE_HAS_CUDA ON)
    endif()
  endif()
elseif(MOECORE_CUDA)
  set(MOECORE_HAS_CUDA ON)
endif()

if(NOT MOECORE_HAS_CUDA)
  message(STATUS "moecore: without CUDA (MOECORE_CUDA=${MOECORE_CUDA}; ON builds it wherever nvcc is)")
  return()
endif()

if(MOECORE_CUDA_ARCHITECTURES STREQUAL "native" AND NOT _native)
  message(FATAL_ERROR "MOECORE_CUDA_ARCHITECTURES=native found no GPU on this machine; "
                      "name the architectures, for example 80;90a")
elseif(MOECORE_CUDA_ARCHITECTURES AND NOT MOECORE_CUDA_ARCHITECTURES STREQUAL "native")
  set(MOECORE_CUDA_ARCH_LIST ${MOECORE_CUDA_ARCHITECTURES})
elseif(_native)
  set(MOECORE_CUDA_ARCH_LIST ${_native})
else()
  set(MOECORE_CUDA_ARCH_LIST ${MOECORE_RELEASE_ARCHITECTURES})
endif()
if(CMAKE_VERSION VERSION_LESS 4.0.2 AND MOECORE_CUDA_ARCH_LIST MATCHES "f")
  message(FATAL_ERROR "Family architectures such as 100f need CMake >= 4.0.2 (pip install cmake); "
                      "this is ${CMAKE_VERSION}. Or set -DMOECORE_CUDA_ARCHITECTURES=80;90a")
endif()
set(CMAKE_CUDA_ARCHITECTURES ${MOECORE_CUDA_ARCH_LIST})
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
list(TRANSFORM MOECORE_CUDA_ARCH_LIST REPLACE "-(real|virtual)$" "")
message(STATUS "moecore: CUDA ${CUDAToolkit_VERSION} for ${MOECORE_CUDA_ARCH_LIST}")
