# Every option of the build, and what all targets share.

set(MOECORE_CUDA AUTO CACHE STRING
    "CUDA engine: AUTO (with nvcc and a GPU or a list of architectures), ON, OFF, or pip (NVIDIA's wheels)")
set_property(CACHE MOECORE_CUDA PROPERTY STRINGS AUTO ON OFF pip)
set(MOECORE_CUDA_ARCHITECTURES "" CACHE STRING
    "CUDA architectures, for example 80;90a;100f;120f. Empty: those of this machine's GPUs, else that list")
option(BUILD_SHARED_LIBS "Build libmoecore as a shared library" OFF)
option(MOECORE_PYTHON "Build the Python extension" OFF)
option(MOECORE_TESTS "Build the C++ tests" ${PROJECT_IS_TOP_LEVEL})
option(MOECORE_BENCH "Build the C++ benchmarks" OFF)
option(MOECORE_WERROR "Treat compiler warnings as errors" OFF)
set(MOECORE_SANITIZE "" CACHE STRING "Sanitizers for host code, for example address,undefined")

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

find_program(MOECORE_CCACHE ccache)
if(MOECORE_CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${MOECORE_CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${MOECORE_CCACHE})
endif()

# Language level, warnings, visibility. No fast-math and no contraction: rounding is part of the contract.
function(moecore_configure_target target)
  target_compile_features(${target} PUBLIC cxx_std_20)
  set_target_properties(
    ${target}
    PROPERTIES CXX_EXTENSIONS OFF
               CXX_VISIBILITY_PRESET hidden
               CUDA_VISIBILITY_PRESET hidden
               VISIBILITY_INLINES_HIDDEN ON
               POSITION_INDEPENDENT_CODE ON)
  target_compile_options(
    ${target}
    PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall
            -Wextra
            -Wshadow
            -ffp-contract=off
            $<$<BOOL:${MOECORE_WERROR}>:-Werror>>)
  if(MOECORE_SANITIZE)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${MOECORE_SANITIZE} -g>)
    target_link_options(${target} PUBLIC -fsanitize=${MOECORE_SANITIZE})
  endif()
endfunction()
