# The C++ package: headers, libmoecore, and moecore-config.cmake so that find_package(moecore) works.
#
# One install tree serves two uses. `cmake --install` writes the components below under the prefix; the Python wheel
# installs the same tree inside the package directory, so that <site-packages>/moecore is a prefix of its own.

include(CMakePackageConfigHelpers)

set(_moecore_cmake_dir ${CMAKE_INSTALL_LIBDIR}/cmake/moecore)

install(
  TARGETS moecore
  EXPORT moecore-targets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT cpp
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT cpp
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT cpp
  INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(
  DIRECTORY ${PROJECT_SOURCE_DIR}/cpp/include/moecore
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  COMPONENT cpp
  FILES_MATCHING
  PATTERN "*.h")
install(
  EXPORT moecore-targets
  NAMESPACE moecore::
  DESTINATION ${_moecore_cmake_dir}
  COMPONENT cpp)

# Only a static library hands its own dependencies on to whoever links it.
get_target_property(_moecore_type moecore TYPE)
set(MOECORE_NEEDS_CUDATOOLKIT OFF)
if(_moecore_type STREQUAL "STATIC_LIBRARY" AND MOECORE_HAS_CUDA)
  set(MOECORE_NEEDS_CUDATOOLKIT ON)
endif()
configure_package_config_file(
  ${PROJECT_SOURCE_DIR}/cmake/moecore-config.cmake.in ${PROJECT_BINARY_DIR}/moecore-config.cmake
  INSTALL_DESTINATION ${_moecore_cmake_dir})
write_basic_package_version_file(
  ${PROJECT_BINARY_DIR}/moecore-config-version.cmake
  COMPATIBILITY SameMinorVersion)
install(
  FILES ${PROJECT_BINARY_DIR}/moecore-config.cmake ${PROJECT_BINARY_DIR}/moecore-config-version.cmake
  DESTINATION ${_moecore_cmake_dir}
  COMPONENT cpp)
