#include "support/device_memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#ifdef MOECORE_HAS_CUDA
#include <cuda_runtime.h>
#endif

namespace moecore::test {
namespace {

constexpr std::size_t kAlignment = 256;

#ifdef MOECORE_HAS_CUDA
void cuda_try(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}
#else
[[noreturn]] void no_cuda() {
  throw std::logic_error("these tests were built without CUDA");
}
#endif

}  // namespace

DeviceMemory::DeviceMemory(Device device, std::size_t bytes, Kind kind)
    : device_(device), bytes_(bytes), kind_(kind) {
  void* p = nullptr;
  if (device.type == DeviceType::kCUDA) {
#ifdef MOECORE_HAS_CUDA
    cuda_try(cudaSetDevice(device.index), "cudaSetDevice");
    cuda_try(cudaMalloc(&p, bytes ? bytes : 1), "cudaMalloc");
#else
    no_cuda();
#endif
  } else if (kind == Kind::kSparse) {
    p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
  } else {
    p = ::operator new(bytes, std::align_val_t{kAlignment});
  }
  data_ = static_cast<std::byte*>(p);
}

DeviceMemory::~DeviceMemory() {
  if (device_.type == DeviceType::kCUDA) {
#ifdef MOECORE_HAS_CUDA
    cudaFree(data_);
#endif
  } else if (kind_ == Kind::kSparse) {
    munmap(data_, bytes_);
  } else {
    ::operator delete(data_, std::align_val_t{kAlignment});
  }
}

void DeviceMemory::write(std::size_t offset, const void* from, std::size_t bytes) {
  if (bytes == 0) return;
  if (device_.type == DeviceType::kCPU) {
    std::memcpy(data_ + offset, from, bytes);
    return;
  }
#ifdef MOECORE_HAS_CUDA
  synchronize(device_);
  cuda_try(cudaMemcpy(data_ + offset, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  synchronize(device_);
#endif
}

void DeviceMemory::read(std::size_t offset, void* to, std::size_t bytes) const {
  if (bytes == 0) return;
  if (device_.type == DeviceType::kCPU) {
    std::memcpy(to, data_ + offset, bytes);
    return;
  }
#ifdef MOECORE_HAS_CUDA
  synchronize(device_);
  cuda_try(cudaMemcpy(to, data_ + offset, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
#endif
}

Stream::Stream(Device device) {
  if (device.type == DeviceType::kCPU) return;
#ifdef MOECORE_HAS_CUDA
  cudaStream_t stream = nullptr;
  cuda_try(cudaSetDevice(device.index), "cudaSetDevice");
  cuda_try(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  stream_ = stream;
#else
  no_cuda();
#endif
}

Stream::~Stream() {
#ifdef MOECORE_HAS_CUDA
  if (stream_) cudaStreamDestroy(static_cast<cudaStream_t>(stream_));
#endif
}

#ifdef MOECORE_HAS_CUDA
Graph::Graph(const Stream& stream, const std::function<void()>& work) : stream_(stream.get()) {
  const auto s = static_cast<cudaStream_t>(stream_);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cuda_try(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
  work();
  cuda_try(cudaStreamEndCapture(s, &graph), "cudaStreamEndCapture");
  cuda_try(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  cuda_try(cudaGraphDestroy(graph), "cudaGraphDestroy");
  executable_ = executable;
}

Graph::~Graph() {
  cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable_));
}

void Graph::launch() {
  cuda_try(cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable_), static_cast<cudaStream_t>(stream_)),
           "cudaGraphLaunch");
}
#else
Graph::Graph(const Stream&, const std::function<void()>&) {
  no_cuda();
}
Graph::~Graph() = default;
void Graph::launch() {
  no_cuda();
}
#endif

void synchronize(Device device) {
  if (device.type == DeviceType::kCPU) return;
#ifdef MOECORE_HAS_CUDA
  cuda_try(cudaSetDevice(device.index), "cudaSetDevice");
  cuda_try(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
#endif
}

}  // namespace moecore::test
