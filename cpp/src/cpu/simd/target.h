#pragma once
// Compiling one source for several instruction sets inside one build.
//
// A target file (cpu/targets/<isa>.cc) includes every standard header first, for the baseline, and then
// includes the kernels (cpu/kernels/*.inl) between MOECORE_TARGET_BEGIN and MOECORE_TARGET_END, inside its
// own namespace. Only what stands between the two is compiled for the newer instruction set. Compiler flags
// like -mavx2 per file would also reach inline functions of the standard library, and the linker might keep
// that copy for every CPU.

// Vectors are passed by value, so every helper on them must be inlined: out of line they would take another
// ABI on each level.
#define MOECORE_INLINE [[gnu::always_inline]] inline
#define MOECORE_INLINE_LAMBDA __attribute__((always_inline))

#define MOECORE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MOECORE_TARGET_BEGIN(isa) \
  MOECORE_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define MOECORE_TARGET_END MOECORE_PRAGMA(clang attribute pop)
#else
#define MOECORE_TARGET_BEGIN(isa) MOECORE_PRAGMA(GCC push_options) MOECORE_PRAGMA(GCC target(isa))
#define MOECORE_TARGET_END MOECORE_PRAGMA(GCC pop_options)
#endif
