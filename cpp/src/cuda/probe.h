#pragma once

namespace moecore::cuda {

/// A kernel of every compiled architecture: whether it has an image for a device says whether this build has.
const void* probe_kernel();

}  // namespace moecore::cuda
