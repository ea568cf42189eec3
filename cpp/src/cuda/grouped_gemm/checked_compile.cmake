# Compiler launcher of the Hopper kernels: cmake -P checked_compile.cmake -- COMMAND...
# ptxas only mentions (C7510, C7512, ...) that it serialises wgmma, which costs half the speed. Here that is an error.
set(command "")
set(found OFF)
math(EXPR last "${CMAKE_ARGC} - 1")
foreach(i RANGE ${last})
  if(found)
    list(APPEND command "${CMAKE_ARGV${i}}")
  elseif("${CMAKE_ARGV${i}}" STREQUAL "--")
    set(found ON)
  endif()
endforeach()

execute_process(
  COMMAND ${command}
  RESULT_VARIABLE status
  OUTPUT_VARIABLE output
  ERROR_VARIABLE errors)
set(text "${output}${errors}")
if(text)
  message("${text}")
endif()
if(NOT status EQUAL 0)
  message(FATAL_ERROR "the compiler failed")
endif()
if(text MATCHES "\\(C75[0-9][0-9]\\)")
  message(FATAL_ERROR "ptxas serialises wgmma in this file")
endif()
