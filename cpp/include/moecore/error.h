#pragma once
// Errors. Messages of user errors read "<op>: <argument> is <actual>, expected <expectation>".

#include <stdexcept>

namespace [[gnu::visibility("default")]] moecore {

/// A shape, stride, device or value that the op does not take. Python: ValueError.
struct InvalidArgument : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

/// An element type that the op does not take here. Python: TypeError.
struct InvalidType : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

/// Valid input for which this build has no kernel; the message lists what is supported. Python:
/// NotImplementedError.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// No such device, driver or compiled architecture; the message lists what was compiled in. Python:
/// BackendError.
struct BackendError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A broken promise inside the library; please report it. Python: RuntimeError.
struct InternalError : std::logic_error {
  using std::logic_error::logic_error;
};

}  // namespace moecore
