// moecore._core: exceptions, facts about the build and the machine, and the ops.

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "moecore/error.h"
#include "moecore/info.h"
#include "op_call.h"

namespace moecore::python {

void bind_ops(nb::module_& m);
void bind_quantize(nb::module_& m);
Device parse_device(std::string_view text);

namespace {

using namespace nb::literals;

void bind_exceptions(nb::module_& m) {
  nb::exception<BackendError>(m, "BackendError", PyExc_RuntimeError);
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const InvalidType& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    } catch (const InvalidArgument& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    } catch (const Unsupported& e) {
      PyErr_SetString(PyExc_NotImplementedError, e.what());
    } catch (const InternalError& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what());
    }
  });
}

void bind_info(nb::module_& m) {
  m.def("version", &version);
  m.def("cuda_architectures", &cuda_architectures);
  m.def(
      "cuda_device_count",
      [] {
        std::string why;
        const int count = cuda_device_count(&why);
        return std::pair(count, why);
      },
      "Usable CUDA devices, and the reason when there are none.");
  m.def("cpu_isa", &cpu_isa);
  m.def("cpu_isas", &cpu_isas);
  m.def("cpu_threads", &cpu_threads);
  m.def("supported", &supported, "op"_a);
  m.def("check_tuning", &check_tuning, "path"_a,
        "Reads a file as MOECORE_TUNING does; returns how many launch policies it holds.");
  nb::class_<Roof>(m, "Roof", "Measured ceilings of a device.")
      .def_ro("read_bytes_per_s", &Roof::read_bytes_per_s)
      .def_ro("f32_flop_per_s", &Roof::f32_flop_per_s)
      .def_ro("bf16_flop_per_s", &Roof::bf16_flop_per_s);
  m.def(
      "measure_roof",
      [](std::string_view device) {
        const Device parsed = parse_device(device);
        nb::gil_scoped_release unlocked;
        return measure_roof(parsed);
      },
      "device"_a = "cpu");
}

}  // namespace
}  // namespace moecore::python

NB_MODULE(_core, m) {
  using namespace moecore::python;
  m.doc() = "moecore's compiled ops. Outputs are arguments; moecore's Python functions allocate them.";
  bind_exceptions(m);
  bind_retagged(m);
  bind_call_settings(m);
  bind_info(m);
  bind_quantize(m);  // QuantFormat, which ops take
  bind_ops(m);
}
