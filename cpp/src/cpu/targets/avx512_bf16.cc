// The peak rate of AVX512-BF16.

#if defined(__x86_64__)

#include "cpu/kernels/roof.h"
#include "cpu/simd/target.h"

#include <immintrin.h>

namespace moecore::cpu {
MOECORE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

double bf16_dot_flops(std::int64_t rounds, float* sink) {
  constexpr int kChains = 12;
  __m512 chain[kChains];
  for (int j = 0; j < kChains; ++j) chain[j] = _mm512_set1_ps(static_cast<float>(j));
  const __m512bh tiny = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0x1p-40f), _mm512_set1_ps(0x1p-40f));
  for (std::int64_t i = 0; i < rounds; ++i)
    for (int j = 0; j < kChains; ++j) chain[j] = _mm512_dpbf16_ps(chain[j], tiny, tiny);
  for (int j = 1; j < kChains; ++j) chain[0] = _mm512_add_ps(chain[0], chain[j]);
  *sink = _mm512_cvtss_f32(chain[0]);
  return 64.0 * kChains * static_cast<double>(rounds);
}

MOECORE_TARGET_END
}  // namespace moecore::cpu

#endif
