#include "tensor_arg.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <array>
#include <cstring>
#include <optional>
#include <string_view>

namespace moecore::python {
namespace {

using dlpack::DataType;
using dlpack::ExchangeApi;

constexpr char kExpected[] =
    ", expected a tensor: an object of a type with __dlpack__ (torch, NumPy, CuPy, JAX, ...)";

// The one table of DLPack element types.
struct CodeRow {
  DataType code;
  DType dtype;
};
constexpr CodeRow kCodes[] = {
    {{dlpack::kFloat, 32, 1}, DType::kF32},
    {{dlpack::kBfloat, 16, 1}, DType::kBF16},
    {{dlpack::kFloat, 16, 1}, DType::kF16},
    {{dlpack::kInt, 32, 1}, DType::kI32},
    {{dlpack::kInt, 64, 1}, DType::kI64},
    {{dlpack::kUInt, 8, 1}, DType::kU8},
    {{dlpack::kFloat8E4M3Fn, 8, 1}, DType::kE4M3},
    {{dlpack::kFloat8E5M2, 8, 1}, DType::kE5M2},
    {{dlpack::kFloat8E8M0Fnu, 8, 1}, DType::kE8M0},
    {{dlpack::kFloat4E2M1Fn, 4, 1}, DType::kE2M1},
    {{dlpack::kFloat4E2M1Fn, 4, 2}, DType::kE2M1},
    {{dlpack::kBool, 8, 1}, DType::kBool},
    {{dlpack::kInt, 8, 1}, DType::kI8},
    {{dlpack::kInt, 16, 1}, DType::kI16},
    {{dlpack::kUInt, 16, 1}, DType::kU16},
    {{dlpack::kUInt, 32, 1}, DType::kU32},
    {{dlpack::kUInt, 64, 1}, DType::kU64},
    {{dlpack::kFloat, 64, 1}, DType::kF64},
    {{dlpack::kComplex, 64, 1}, DType::kC64},
    {{dlpack::kComplex, 128, 1}, DType::kC128},
};

// NumPy's extension types, exported through an unsigned view of the same width.
struct MlDtypeRow {
  std::string_view name;
  const char* view;
  DType dtype;
};
constexpr MlDtypeRow kMlDtypes[] = {
    {"bfloat16", "uint16", DType::kBF16},
    {"float8_e4m3fn", "uint8", DType::kE4M3},
    {"float8_e5m2", "uint8", DType::kE5M2},
    {"float8_e8m0fnu", "uint8", DType::kE8M0},
};

// What is known about one Python type. Types in the cache are kept alive, so a pointer names one type for
// good.
enum class Producer { kExchange, kProtocol, kHostProtocol, kJax, kRetagged, kNone };
struct TypeEntry {
  PyTypeObject* type = nullptr;
  Producer producer = Producer::kNone;
  const ExchangeApi* api = nullptr;
  bool has_flags = false;  // exchange API only: read-only tensors exist, so ask for the managed form
  // torch only: the methods that tell of a sign or conjugation that is not in memory.
  nb::handle is_neg{}, is_conj{};
};

std::string text(nb::handle object) {
  return nb::str(object).c_str();
}

std::string qualified_type(nb::handle object) {
  const nb::handle type = object.type();
  const std::string module = text(type.attr("__module__")), name = text(type.attr("__qualname__"));
  return module == "builtins" ? name : module + "." + name;
}

bool starts_with_package(const std::string& module, std::string_view package) {
  return module.compare(0, package.size(), package) == 0 &&
         (module.size() == package.size() || module[package.size()] == '.');
}

// Whether `type` is torch.Tensor or derives from it. torch has no read-only tensors.
bool is_torch_type(nb::handle type) {
  const nb::object torch =
      nb::getattr(nb::module_::import_("sys").attr("modules"), "get")(nb::str("torch"), nb::none());
  if (torch.is_none()) return false;
  return PyObject_IsSubclass(type.ptr(), torch.attr("Tensor").ptr()) == 1;
}

const ExchangeApi* exchange_api(nb::handle type) {
  const nb::object capsule = nb::getattr(type, "__dlpack_c_exchange_api__", nb::none());
  if (capsule.is_none()) return nullptr;
  auto* header =
      static_cast<ExchangeApi::Header*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!header) PyErr_Clear();
  while (header && header->version.major > dlpack::kMajorVersion) header = header->previous;
  if (!header || header->version.major != dlpack::kMajorVersion) return nullptr;
  return reinterpret_cast<const ExchangeApi*>(header);
}

TypeEntry inspect(nb::handle type) {
  TypeEntry entry{.type = reinterpret_cast<PyTypeObject*>(type.ptr())};
  const std::string module = text(type.attr("__module__"));
  if (type.is(nb::type<Retagged>())) {
    entry.producer = Producer::kRetagged;
  } else if (const ExchangeApi* api = exchange_api(type)) {
    entry.producer = Producer::kExchange;
    entry.api = api;
    entry.has_flags = !api->tensor_from_object || !is_torch_type(type);
  } else if (!nb::hasattr(type, "__dlpack__")) {
    entry.producer = Producer::kNone;
  } else if (starts_with_package(module, "numpy")) {
    entry.producer = Producer::kHostProtocol;
  } else if (starts_with_package(module, "jax") || starts_with_package(module, "jaxlib")) {
    entry.producer = Producer::kJax;
  } else {
    entry.producer = Producer::kProtocol;
  }
  if (is_torch_type(type)) {
    entry.is_neg = nb::object(type.attr("is_neg")).release();
    entry.is_conj = nb::object(type.attr("is_conj")).release();
  }
  return entry;
}

TypeEntry lookup(nb::handle object) {
  static std::array<TypeEntry, 16> cache;
  static std::size_t size = 0;
  PyTypeObject* type = Py_TYPE(object.ptr());
  for (std::size_t i = 0; i < size; ++i)
    if (cache[i].type == type) return cache[i];
  const TypeEntry entry = inspect(object.type());
  if (size < cache.size()) {
    Py_INCREF(reinterpret_cast<PyObject*>(type));
    cache[size++] = entry;
  }
  return entry;
}

std::string describe_unknown_dtype(nb::handle object, DataType d) {
  const nb::object dtype = nb::getattr(object, "dtype", nb::none());
  const std::string code = "DLPack code " + std::to_string(d.code) + ", " + std::to_string(d.bits) +
                           " bits, " + std::to_string(d.lanes) + " lanes";
  return "a " + qualified_type(object) + " of dtype " +
         (dtype.is_none() ? code : text(dtype) + " (" + code + ")") +
         ", expected a dtype that moecore knows: f32, f16, bf16, e4m3, e5m2, e2m1, e8m0, or an integer, "
         "bool, "
         "f64, c64 or c128 type that is only moved";
}

std::optional<DType> dtype_of(DataType d) {
  for (const CodeRow& row : kCodes)
    if (row.code.code == d.code && row.code.bits == d.bits && row.code.lanes == d.lanes) return row.dtype;
  return std::nullopt;
}

// Bytes that hold two 4-bit elements each become a view that counts elements.
void count_nibbles(TensorView& view) {
  if (view.ndim == 0) return;
  const int last = view.ndim - 1;
  for (int i = 0; i < last; ++i) view.strides[i] *= 2;
  if (view.strides[last] != 1) view.strides[last] *= 2;
  view.shape[last] *= 2;
}

void read_tensor(TensorArg& arg, const dlpack::Tensor& t, std::uint64_t flags) {
  const std::optional<DType> dtype = dtype_of(t.dtype);
  if (!dtype || (*dtype == DType::kE2M1 && (flags & dlpack::kFlagSubBytePadded))) {
    arg.refuse_type(describe_unknown_dtype(arg.source, t.dtype));
    return;
  }
  TensorView& view = arg.view;
  switch (t.device.kind) {
    case dlpack::kCpu:
    case dlpack::kCudaHost:
      view.device = {DeviceType::kCPU, 0};
      break;
    case dlpack::kCuda:
    case dlpack::kCudaManaged:
      view.device = {DeviceType::kCUDA, t.device.id};
      break;
    default:
      arg.refuse_type("a " + qualified_type(arg.source) + " on a device of DLPack kind " +
                      std::to_string(t.device.kind) + ", expected one on cpu or cuda");
      return;
  }
  if (t.ndim > TensorView::kMaxDims) {
    arg.refuse_value("a tensor of " + std::to_string(t.ndim) + " dimensions, expected at most " +
                     std::to_string(TensorView::kMaxDims));
    return;
  }
  view.dtype = *dtype;
  view.ndim = t.ndim;
  view.data = t.data ? static_cast<std::byte*>(t.data) + t.byte_offset : nullptr;
  view.read_only = flags & dlpack::kFlagReadOnly;
  std::int64_t dense = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    view.shape[i] = t.shape[i];
    view.strides[i] = t.strides ? t.strides[i] : dense;
    dense *= t.shape[i];
  }
  if (*dtype == DType::kE2M1 && t.dtype.lanes == 2) count_nibbles(view);
}

// The text of the pending Python exception, which is cleared.
std::string take_error() {
  nb::python_error error;
  return text(error.value());
}

void load_exchange(TensorArg& arg, const TypeEntry& entry) {
  arg.api = entry.api;
  if (!entry.has_flags) {
    dlpack::Tensor tensor;
    if (entry.api->tensor_from_object(arg.source.ptr(), &tensor) == 0) return read_tensor(arg, tensor, 0);
  } else {
    dlpack::ManagedVersioned* managed = nullptr;
    if (entry.api->managed_from_object(arg.source.ptr(), &managed) == 0) {
      arg.owner = nb::capsule(managed, [](void* p) noexcept {
        auto* m = static_cast<dlpack::ManagedVersioned*>(p);
        if (m->deleter) m->deleter(m);
      });
      return read_tensor(arg, managed->tensor, managed->flags);
    }
  }
  arg.refuse_type("a " + qualified_type(arg.source) + " that cannot be exported (" + take_error() + ")" +
                  kExpected);
}

// Calls object.__dlpack__ without synchronisation; null with a Python exception set when that fails.
PyObject* export_capsule(nb::handle object, Producer producer) {
  static const nb::handle empty = nb::make_tuple().release();
  static const nb::handle host = [] {
    nb::dict kwargs;
    kwargs["max_version"] = nb::make_tuple(1, 3);
    return kwargs.release();
  }();
  static const nb::handle device = [] {
    nb::dict kwargs;
    kwargs["max_version"] = nb::make_tuple(1, 3);
    kwargs["stream"] = -1;
    return kwargs.release();
  }();
  const nb::object method = nb::getattr(object, "__dlpack__");
  bool on_device = false;
  // A JAX buffer takes no -1; the Python layer has waited for it.
  if (producer == Producer::kProtocol)
    on_device = nb::cast<int>(object.attr("__dlpack_device__")()[0]) != dlpack::kCpu;
  PyObject* capsule = PyObject_Call(method.ptr(), empty.ptr(), (on_device ? device : host).ptr());
  if (capsule || !PyErr_ExceptionMatches(PyExc_TypeError)) return capsule;
  // Producers from before DLPack 1.0 know no max_version.
  PyErr_Clear();
  nb::dict kwargs;
  if (on_device) kwargs["stream"] = -1;
  return PyObject_Call(method.ptr(), empty.ptr(), kwargs.ptr());
}

void load_protocol(TensorArg& arg, nb::handle object, Producer producer) {
  nb::object capsule = nb::steal(export_capsule(object, producer));
  if (!capsule.is_valid()) {
    const std::string why = take_error();
    const nb::object dtype = nb::getattr(object, "dtype", nb::none());
    const std::string name = text(nb::getattr(dtype, "name", nb::str("")));
    for (const MlDtypeRow& row : kMlDtypes) {
      if (row.name != name) continue;
      load_protocol(arg, object.attr("view")(row.view), producer);
      arg.view.dtype = row.dtype;
      return;
    }
    arg.refuse_type("a " + qualified_type(object) + (name.empty() ? "" : " of dtype " + name) +
                    " that cannot be exported (" + why + ")" + kExpected);
    if (name == "float4_e2m1fn")
      arg.problem->text +=
          "; NumPy's float4 holds one element per byte: pack two to a uint8 and use view_as(x, \"e2m1\")";
    return;
  }
  if (void* p = PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned")) {
    const auto* managed = static_cast<const dlpack::ManagedVersioned*>(p);
    if (managed->version.major != dlpack::kMajorVersion) {
      arg.refuse_type("a " + qualified_type(object) + " exported as DLPack " +
                      std::to_string(managed->version.major) + ".x, expected DLPack 1.x");
      return;
    }
    read_tensor(arg, managed->tensor, managed->flags);
  } else {
    PyErr_Clear();
    p = PyCapsule_GetPointer(capsule.ptr(), "dltensor");
    if (!p) {
      arg.refuse_type("a " + qualified_type(object) + " whose __dlpack__ gave no capsule (" + take_error() +
                      ")" + kExpected);
      return;
    }
    read_tensor(arg, static_cast<const dlpack::Managed*>(p)->tensor, 0);
  }
  // Immutable: JAX may share the buffer between arrays.
  if (producer == Producer::kJax) arg.view.read_only = true;
  arg.owner = std::move(capsule);
}

void load_retagged(TensorArg& arg, const Retagged& tag) {
  arg.load(tag.base);
  if (arg.problem) return;
  if (tag.dtype == DType::kE2M1 && bit_width(arg.view.dtype) == 8) count_nibbles(arg.view);
  arg.view.dtype = tag.dtype;
}

// torch's lazy views: DLPack gives their memory and not the flag. Integers get none from a public function.
void refuse_lazy(TensorArg& arg, const TypeEntry& entry) {
  if (arg.problem || !entry.is_neg.is_valid()) return;
  switch (arg.view.dtype) {
    case DType::kF32:
    case DType::kF16:
    case DType::kBF16:
    case DType::kF64:
    case DType::kC64:
    case DType::kC128:
      break;
    default:
      return;
  }
  const bool complex = arg.view.dtype == DType::kC64 || arg.view.dtype == DType::kC128;
  if (nb::cast<bool>(entry.is_neg(arg.source)))
    arg.refuse_value("a " + qualified_type(arg.source) +
                     " with the negative bit, expected its values in memory: resolve_neg()");
  else if (complex && nb::cast<bool>(entry.is_conj(arg.source)))
    arg.refuse_value("a " + qualified_type(arg.source) +
                     " with the conjugate bit, expected its values in memory: resolve_conj()");
}

Retagged retag(nb::object base, std::string_view name) {
  const std::optional<DType> dtype = parse_dtype(name);
  if (!dtype)
    throw InvalidArgument("view_as: dtype is \"" + std::string(name) +
                          "\", expected a moecore dtype such as \"e4m3\", \"e2m1\", \"e8m0\" or \"bf16\"");
  TensorArg arg;
  arg.load(base);
  arg.check("view_as", "x");
  const int bits = bit_width(arg.view.dtype), wanted = bit_width(*dtype);
  const bool packed = *dtype == DType::kE2M1 && bits == 8 && arg.view.ndim > 0;
  if (bits != wanted && !packed)
    throw InvalidType("view_as: x is " + arg.view.describe() + ", expected elements of " +
                      std::to_string(wanted) + " bits for " + std::string(name) +
                      (*dtype == DType::kE2M1 ? ", or bytes that hold two each" : ""));
  return {std::move(base), *dtype};
}

}  // namespace

void TensorArg::fail(const char* op, const char* argument) const {
  const std::string text = std::string(op) + ": " + argument + " is " + problem->text;
  if (problem->is_type) throw InvalidType(text);
  throw InvalidArgument(text);
}

void TensorArg::load(nb::handle object) {
  source = object;
  try {
    const TypeEntry entry = lookup(object);
    switch (entry.producer) {
      case Producer::kExchange:
        load_exchange(*this, entry);
        return refuse_lazy(*this, entry);
      case Producer::kRetagged:
        return load_retagged(*this, *nb::inst_ptr<Retagged>(object));
      case Producer::kNone:
        refuse_type("a " + qualified_type(object) + kExpected);
        return;
      default:
        load_protocol(*this, object, entry.producer);
        return refuse_lazy(*this, entry);
    }
  } catch (const std::exception& error) {
    refuse_type(std::string("an object that cannot be read (") + error.what() + ")" + kExpected);
  }
}

void bind_retagged(nb::module_& m) {
  nb::class_<Retagged>(m, "Retagged",
                       "A tensor's memory under another element type; made by moecore.view_as().")
      .def(
          "__init__",
          [](Retagged* self, nb::object base, std::string_view dtype) {
            new (self) Retagged(retag(std::move(base), dtype));
          },
          nb::arg("base"), nb::arg("dtype"))
      .def_ro("base", &Retagged::base, "The tensor whose memory this is.")
      .def_prop_ro(
          "dtype", [](const Retagged& self) { return std::string(name(self.dtype)); },
          "The moecore dtype, for example \"e4m3\".")
      .def_prop_ro(
          "shape",
          [](nb::handle self) {
            TensorArg arg;
            arg.load(self);
            nb::list shape;
            for (int i = 0; i < arg.view.ndim; ++i) shape.append(arg.view.shape[i]);
            return nb::tuple(shape);
          },
          nb::sig("def shape(self) -> tuple[int, ...]"), "The shape in elements of `dtype`.")
      .def("__repr__", [](nb::handle self) {
        TensorArg arg;
        arg.load(self);
        return "moecore.view_as(" + arg.view.describe() + ")";
      });
}

}  // namespace moecore::python
