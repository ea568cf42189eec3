#pragma once
// What this build and this machine offer: for error messages, show-config and the choice of a backend.

#include <string>
#include <string_view>
#include <vector>

#include "moecore/tensor.h"

namespace [[gnu::visibility("default")]] moecore {

/// "0.1.0".
std::string version();

/// Compiled-in CUDA architectures as CMake spells them ("80", "90a", ...); empty for a build without CUDA.
std::vector<std::string> cuda_architectures();

/// Usable CUDA devices; 0 without a GPU, driver or CUDA build. `why` gets the reason when the count is 0.
int cuda_device_count(std::string* why = nullptr);

/// The instruction set the CPU engine chose ("avx2", "avx512", "avx512_bf16", "amx", "baseline").
/// MOECORE_CPU_ISA lowers it.
std::string cpu_isa();

/// Every instruction set this CPU could run the engine with, best last.
std::vector<std::string> cpu_isas();

/// Threads the CPU engine uses by default.
int cpu_threads();

/// The instances of an op, for example {"f32", "f16", "bf16"} for "grouped_gemm"; "any" for pure data
/// movement. Throws InvalidArgument for an op that does not exist.
std::vector<std::string> supported(std::string_view op);

/// Measured ceilings of a device, for benches and the demo. Takes about a second.
struct Roof {
  double read_bytes_per_s = 0;
  double f32_flop_per_s = 0;
  double bf16_flop_per_s = 0;
};
Roof measure_roof(Device device);

/// Reads a file as MOECORE_TUNING does and returns how many launch policies it holds. Throws InvalidArgument
/// that names file and line.
int check_tuning(const std::string& path);

}  // namespace moecore
