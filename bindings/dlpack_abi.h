#pragma once
// The parts of the DLPack 1.x C ABI that moecore consumes, declared from the specification: the borrowed
// tensor, the two managed forms that `__dlpack__` capsules carry, and the table behind
// `__dlpack_c_exchange_api__`.

#include <cstdint>

namespace moecore::dlpack {

inline constexpr std::uint32_t kMajorVersion = 1;

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};

enum DeviceKind : std::int32_t {
  kCpu = 1,
  kCuda = 2,
  kCudaHost = 3,      // pinned host memory
  kCudaManaged = 13,  // unified memory
};

struct Device {
  std::int32_t kind;
  std::int32_t id;
};

enum TypeCode : std::uint8_t {
  kInt = 0,
  kUInt = 1,
  kFloat = 2,
  kBfloat = 4,
  kComplex = 5,
  kBool = 6,
  kFloat8E4M3Fn = 10,
  kFloat8E5M2 = 12,
  kFloat8E8M0Fnu = 14,
  kFloat4E2M1Fn = 17,
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null means dense (before 1.2)
  std::uint64_t byte_offset;
};

/// Capsule "dltensor".
struct Managed {
  Tensor tensor;
  void* manager_ctx;
  void (*deleter)(Managed*);
};

inline constexpr std::uint64_t kFlagReadOnly = 1;
inline constexpr std::uint64_t kFlagSubBytePadded = 4;

/// Capsule "dltensor_versioned".
struct ManagedVersioned {
  Version version;
  void* manager_ctx;
  void (*deleter)(ManagedVersioned*);
  std::uint64_t flags;
  Tensor tensor;
};

/// Capsule "dlpack_exchange_api", an attribute of the tensor's type. Functions that return int give 0 for
/// success and -1 with a Python exception set.
struct ExchangeApi {
  struct Header {
    Version version;
    Header* previous;  // an older table, or null
  } header;
  int (*allocate)(Tensor* prototype, ManagedVersioned** out, void* error_ctx,
                  void (*set_error)(void* error_ctx, const char* kind, const char* message));
  int (*managed_from_object)(void* object, ManagedVersioned** out);
  int (*managed_to_object)(ManagedVersioned* tensor, void** out);
  int (*tensor_from_object)(void* object, Tensor* out);  // may be null
  int (*current_work_stream)(std::int32_t device_kind, std::int32_t device_id, void** out);
};

}  // namespace moecore::dlpack
