// Holds the direction of dependencies: reads the #include lines of the sources against the table of
// docs/architecture.md. Needs no compiler, so it also covers what this build leaves out (CUDA, bindings).

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <vector>

namespace moecore::test {
namespace {

namespace fs = std::filesystem;

struct Layer {
  std::string directory;               // of the including file, below the root; the longest match wins
  std::vector<std::string> own;        // prefixes of includes of the project that are allowed
  std::vector<std::string> forbidden;  // prefixes of any includes that are not
};

const std::vector<std::string> kCudaHeaders = {"cuda", "cub/", "cutlass/", "cute/", "cooperative_groups",
                                               "nvrtc"};
const std::vector<std::string> kPythonHeaders = {"nanobind/", "Python.h", "dlpack/", "torch/"};

std::vector<std::string> operator+(std::vector<std::string> a, const std::vector<std::string>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

const std::vector<Layer>& layers() {
  const std::vector<std::string> outside = kCudaHeaders + kPythonHeaders;
  static const std::vector<Layer> table = {
      {"cpp/include/moecore", {"moecore/"}, outside + std::vector<std::string>{"immintrin.h", "x86intrin.h"}},
      {"cpp/src/core", {"moecore/", "core/"}, outside},
      {"cpp/src/ops", {"moecore/", "core/", "ops/", "build_config.h"}, outside},
      {"cpp/src/cpu", {"moecore/", "core/", "ops/", "cpu/"}, outside},
      {"cpp/src/cuda",
       {"moecore/", "core/", "ops/", "cuda/", "build_config.h", "cuda_build_config.h"},
       kPythonHeaders},
      {"cpp/src/cuda/device", {"cuda/device/"}, kPythonHeaders},
      {"bindings", {"moecore/"}, kCudaHeaders},
  };
  return table;
}

// The prefixes under which the project's own headers are included.
const std::vector<std::string>& own_prefixes() {
  static const std::vector<std::string> prefixes = {
      "moecore/", "core/", "ops/", "cpu/", "cuda/", "cuda_build_config.h", "build_config.h"};
  return prefixes;
}

bool starts_with_any(const std::string& text, const std::vector<std::string>& prefixes) {
  for (const std::string& p : prefixes)
    if (text.rfind(p, 0) == 0) return true;
  return false;
}

const Layer* layer_of(const std::string& path) {
  const Layer* best = nullptr;
  for (const Layer& layer : layers())
    if (path.rfind(layer.directory + "/", 0) == 0 &&
        (!best || layer.directory.size() > best->directory.size()))
      best = &layer;
  return best;
}

bool is_policy(const std::string& path) {
  const std::string name = fs::path(path).filename().string();
  return path.rfind("cpp/src/cuda/", 0) == 0 && (name == "policy.h" || name.ends_with("_policy.h"));
}

/// Why `path` may not include `header`; empty when it may.
std::string objection(const std::string& path, const std::string& header) {
  const Layer* layer = layer_of(path);
  if (!layer) return path + " is in no layer";
  const bool own = starts_with_any(header, own_prefixes());
  if (own && !starts_with_any(header, layer->own))
    return path + " includes " + header + ", which " + layer->directory + " may not know";
  if (!own && starts_with_any(header, layer->forbidden))
    return path + " includes " + header + ", which " + layer->directory + " may not use";
  if (!own && is_policy(path) && starts_with_any(header, kCudaHeaders))
    return path + " includes " + header + ": launch policies are tested on machines without CUDA";
  return "";
}

// The header of an #include line, or nothing.
std::optional<std::string> included(const std::string& line) {
  const std::size_t hash = line.find_first_not_of(" \t");
  if (hash == std::string::npos || line[hash] != '#') return {};
  const std::size_t word = line.find_first_not_of(" \t", hash + 1);
  if (word == std::string::npos || line.compare(word, 7, "include") != 0) return {};
  const std::size_t open = line.find_first_of("\"<", word), close = line.find_first_of("\">", open + 1);
  if (open == std::string::npos || close == std::string::npos) return {};
  return line.substr(open + 1, close - open - 1);
}

bool is_source(const fs::path& path) {
  for (const char* extension : {".h", ".cc", ".cu", ".cuh", ".inl", ".in"})
    if (path.extension() == extension) return true;
  return false;
}

TEST(Layering, IncludesFollowTheTable) {
  const fs::path root = MOECORE_SOURCE_DIR;
  int files = 0, includes = 0;
  for (const char* top : {"cpp/include", "cpp/src", "bindings"}) {
    if (!fs::exists(root / top)) continue;
    for (const auto& entry : fs::recursive_directory_iterator(root / top)) {
      if (!entry.is_regular_file() || !is_source(entry.path())) continue;
      ++files;
      std::ifstream in(entry.path());
      for (std::string line; std::getline(in, line);)
        if (const auto header = included(line)) {
          ++includes;
          EXPECT_EQ(objection(fs::relative(entry.path(), root).generic_string(), *header), "");
        }
    }
  }
  EXPECT_GT(files, 40) << "the sources were not found";
  EXPECT_GT(includes, 100);
}

TEST(Layering, ThisTestCanFail) {
  EXPECT_NE(objection("cpp/include/moecore/tensor.h", "core/check.h"), "");
  EXPECT_NE(objection("cpp/include/moecore/tensor.h", "cuda_runtime.h"), "");
  EXPECT_NE(objection("cpp/src/core/check.cc", "ops/plan.h"), "");
  EXPECT_NE(objection("cpp/src/ops/plan.cc", "cuda_runtime.h"), "");
  EXPECT_NE(objection("cpp/src/ops/plan.cc", "cpu/isa.h"), "");
  EXPECT_NE(objection("cpp/src/cpu/plan.cc", "cuda/runtime.h"), "");
  EXPECT_NE(objection("cpp/src/cuda/plan.cu", "cpu/thread_pool.h"), "");
  EXPECT_NE(objection("cpp/src/cuda/finalize_policy.h", "cuda_runtime.h"), "");
  EXPECT_NE(objection("cpp/src/cuda/device/vec.cuh", "ops/plan.h"), "");
  EXPECT_NE(objection("bindings/module.cc", "core/check.h"), "");
  EXPECT_NE(objection("elsewhere/file.cc", "vector"), "");
  EXPECT_EQ(objection("cpp/src/ops/plan.cc", "core/check.h"), "");
  EXPECT_EQ(objection("cpp/src/cuda/plan.cu", "cuda_runtime.h"), "");
  EXPECT_EQ(included("  #  include <cuda_runtime.h>  // why"), "cuda_runtime.h");
  EXPECT_EQ(included("#include \"ops/plan.h\""), "ops/plan.h");
  EXPECT_FALSE(included("// #include \"ops/plan.h\""));
  EXPECT_FALSE(included("#if 0"));
}

}  // namespace
}  // namespace moecore::test
