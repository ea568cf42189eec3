#pragma once
// wgmma.mma_async m64nNk16 and, for e4m3, k32, with f32 accumulators in registers: one specialisation per
// token width N, a multiple of 8 up to 256.
//
// Inline assembly must spell out its operands, so the lists below are built eight columns (four registers) at
// a time: MOECORE_R<i> names the registers of the first i groups, MOECORE_D<i> binds them to d[0 .. 4i-1].

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/grouped_gemm/operands.cuh"

namespace moecore::cuda::sm90 {

/// op(): d (+)= A * B^T over 32 bytes of K, A [64,K] and B [N,K] by their shared-memory descriptors.
template <class T, int N>
struct Wgmma;

/// op(): d += A * B^T over 16 of K, bf16, A [64,16] in registers: of rows r = 16w + l/4 and r + 8 (warp w,
/// lane l), columns 2(l%4) and + 1 in a[0], a[1], eight further in a[2], a[3].
template <int N>
struct WgmmaDecoded;

// clang-format off
#define MOECORE_R1 "%0,%1,%2,%3"
#define MOECORE_D1 "+f"(d[0]),"+f"(d[1]),"+f"(d[2]),"+f"(d[3])
#define MOECORE_R2 MOECORE_R1 "," "%4,%5,%6,%7"
#define MOECORE_D2 MOECORE_D1,"+f"(d[4]),"+f"(d[5]),"+f"(d[6]),"+f"(d[7])
#define MOECORE_R3 MOECORE_R2 "," "%8,%9,%10,%11"
#define MOECORE_D3 MOECORE_D2,"+f"(d[8]),"+f"(d[9]),"+f"(d[10]),"+f"(d[11])
#define MOECORE_R4 MOECORE_R3 "," "%12,%13,%14,%15"
#define MOECORE_D4 MOECORE_D3,"+f"(d[12]),"+f"(d[13]),"+f"(d[14]),"+f"(d[15])
#define MOECORE_R5 MOECORE_R4 "," "%16,%17,%18,%19"
#define MOECORE_D5 MOECORE_D4,"+f"(d[16]),"+f"(d[17]),"+f"(d[18]),"+f"(d[19])
#define MOECORE_R6 MOECORE_R5 "," "%20,%21,%22,%23"
#define MOECORE_D6 MOECORE_D5,"+f"(d[20]),"+f"(d[21]),"+f"(d[22]),"+f"(d[23])
#define MOECORE_R7 MOECORE_R6 "," "%24,%25,%26,%27"
#define MOECORE_D7 MOECORE_D6,"+f"(d[24]),"+f"(d[25]),"+f"(d[26]),"+f"(d[27])
#define MOECORE_R8 MOECORE_R7 "," "%28,%29,%30,%31"
#define MOECORE_D8 MOECORE_D7,"+f"(d[28]),"+f"(d[29]),"+f"(d[30]),"+f"(d[31])
#define MOECORE_R9 MOECORE_R8 "," "%32,%33,%34,%35"
#define MOECORE_D9 MOECORE_D8,"+f"(d[32]),"+f"(d[33]),"+f"(d[34]),"+f"(d[35])
#define MOECORE_R10 MOECORE_R9 "," "%36,%37,%38,%39"
#define MOECORE_D10 MOECORE_D9,"+f"(d[36]),"+f"(d[37]),"+f"(d[38]),"+f"(d[39])
#define MOECORE_R11 MOECORE_R10 "," "%40,%41,%42,%43"
#define MOECORE_D11 MOECORE_D10,"+f"(d[40]),"+f"(d[41]),"+f"(d[42]),"+f"(d[43])
#define MOECORE_R12 MOECORE_R11 "," "%44,%45,%46,%47"
#define MOECORE_D12 MOECORE_D11,"+f"(d[44]),"+f"(d[45]),"+f"(d[46]),"+f"(d[47])
#define MOECORE_R13 MOECORE_R12 "," "%48,%49,%50,%51"
#define MOECORE_D13 MOECORE_D12,"+f"(d[48]),"+f"(d[49]),"+f"(d[50]),"+f"(d[51])
#define MOECORE_R14 MOECORE_R13 "," "%52,%53,%54,%55"
#define MOECORE_D14 MOECORE_D13,"+f"(d[52]),"+f"(d[53]),"+f"(d[54]),"+f"(d[55])
#define MOECORE_R15 MOECORE_R14 "," "%56,%57,%58,%59"
#define MOECORE_D15 MOECORE_D14,"+f"(d[56]),"+f"(d[57]),"+f"(d[58]),"+f"(d[59])
#define MOECORE_R16 MOECORE_R15 "," "%60,%61,%62,%63"
#define MOECORE_D16 MOECORE_D15,"+f"(d[60]),"+f"(d[61]),"+f"(d[62]),"+f"(d[63])
#define MOECORE_R17 MOECORE_R16 "," "%64,%65,%66,%67"
#define MOECORE_D17 MOECORE_D16,"+f"(d[64]),"+f"(d[65]),"+f"(d[66]),"+f"(d[67])
#define MOECORE_R18 MOECORE_R17 "," "%68,%69,%70,%71"
#define MOECORE_D18 MOECORE_D17,"+f"(d[68]),"+f"(d[69]),"+f"(d[70]),"+f"(d[71])
#define MOECORE_R19 MOECORE_R18 "," "%72,%73,%74,%75"
#define MOECORE_D19 MOECORE_D18,"+f"(d[72]),"+f"(d[73]),"+f"(d[74]),"+f"(d[75])
#define MOECORE_R20 MOECORE_R19 "," "%76,%77,%78,%79"
#define MOECORE_D20 MOECORE_D19,"+f"(d[76]),"+f"(d[77]),"+f"(d[78]),"+f"(d[79])
#define MOECORE_R21 MOECORE_R20 "," "%80,%81,%82,%83"
#define MOECORE_D21 MOECORE_D20,"+f"(d[80]),"+f"(d[81]),"+f"(d[82]),"+f"(d[83])
#define MOECORE_R22 MOECORE_R21 "," "%84,%85,%86,%87"
#define MOECORE_D22 MOECORE_D21,"+f"(d[84]),"+f"(d[85]),"+f"(d[86]),"+f"(d[87])
#define MOECORE_R23 MOECORE_R22 "," "%88,%89,%90,%91"
#define MOECORE_D23 MOECORE_D22,"+f"(d[88]),"+f"(d[89]),"+f"(d[90]),"+f"(d[91])
#define MOECORE_R24 MOECORE_R23 "," "%92,%93,%94,%95"
#define MOECORE_D24 MOECORE_D23,"+f"(d[92]),"+f"(d[93]),"+f"(d[94]),"+f"(d[95])
#define MOECORE_R25 MOECORE_R24 "," "%96,%97,%98,%99"
#define MOECORE_D25 MOECORE_D24,"+f"(d[96]),"+f"(d[97]),"+f"(d[98]),"+f"(d[99])
#define MOECORE_R26 MOECORE_R25 "," "%100,%101,%102,%103"
#define MOECORE_D26 MOECORE_D25,"+f"(d[100]),"+f"(d[101]),"+f"(d[102]),"+f"(d[103])
#define MOECORE_R27 MOECORE_R26 "," "%104,%105,%106,%107"
#define MOECORE_D27 MOECORE_D26,"+f"(d[104]),"+f"(d[105]),"+f"(d[106]),"+f"(d[107])
#define MOECORE_R28 MOECORE_R27 "," "%108,%109,%110,%111"
#define MOECORE_D28 MOECORE_D27,"+f"(d[108]),"+f"(d[109]),"+f"(d[110]),"+f"(d[111])
#define MOECORE_R29 MOECORE_R28 "," "%112,%113,%114,%115"
#define MOECORE_D29 MOECORE_D28,"+f"(d[112]),"+f"(d[113]),"+f"(d[114]),"+f"(d[115])
#define MOECORE_R30 MOECORE_R29 "," "%116,%117,%118,%119"
#define MOECORE_D30 MOECORE_D29,"+f"(d[116]),"+f"(d[117]),"+f"(d[118]),"+f"(d[119])
#define MOECORE_R31 MOECORE_R30 "," "%120,%121,%122,%123"
#define MOECORE_D31 MOECORE_D30,"+f"(d[120]),"+f"(d[121]),"+f"(d[122]),"+f"(d[123])
#define MOECORE_R32 MOECORE_R31 "," "%124,%125,%126,%127"
#define MOECORE_D32 MOECORE_D31,"+f"(d[124]),"+f"(d[125]),"+f"(d[126]),"+f"(d[127])

// r0 .. r4 are the numbers of the operands behind the accumulators.
#define MOECORE_WGMMA(T, shape, types, transposed, i, n, r0, r1, r2)                                        \
  template <>                                                                                               \
  struct Wgmma<T, n> {                                                                                      \
    template <bool kAdd = true>                                                                             \
    static __device__ __forceinline__ void op(float (&d)[n / 2], std::uint64_t a, std::uint64_t b) {        \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n shape ".f32." types " {" MOECORE_R##i "},%" #r0 ",%" #r1 \
                   ",%" #r2 ",1,1" transposed ";" : MOECORE_D##i : "l"(a), "l"(b), "n"(kAdd));              \
    }                                                                                                       \
  };
#define MOECORE_WGMMA_ALL(i, n, r0, r1, r2, r3, r4)                                                         \
  MOECORE_WGMMA(__nv_bfloat16, "k16", "bf16.bf16", ",0,0", i, n, r0, r1, r2)                                \
  MOECORE_WGMMA(__half, "k16", "f16.f16", ",0,0", i, n, r0, r1, r2)                                         \
  MOECORE_WGMMA(E4m3Codes, "k32", "e4m3.e4m3", "", i, n, r0, r1, r2)                                        \
  template <>                                                                                               \
  struct WgmmaDecoded<n> {                                                                                  \
    static __device__ __forceinline__ void op(float (&d)[n / 2], const std::uint32_t (&a)[4], std::uint64_t b) { \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" MOECORE_R##i                \
                   "},{%" #r0 ",%" #r1 ",%" #r2 ",%" #r3 "},%" #r4 ",1,1,1,0;"                              \
                   : MOECORE_D##i : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                    \
    }                                                                                                       \
  };

MOECORE_WGMMA_ALL(1, 8, 4, 5, 6, 7, 8)
MOECORE_WGMMA_ALL(2, 16, 8, 9, 10, 11, 12)
MOECORE_WGMMA_ALL(3, 24, 12, 13, 14, 15, 16)
MOECORE_WGMMA_ALL(4, 32, 16, 17, 18, 19, 20)
MOECORE_WGMMA_ALL(5, 40, 20, 21, 22, 23, 24)
MOECORE_WGMMA_ALL(6, 48, 24, 25, 26, 27, 28)
MOECORE_WGMMA_ALL(7, 56, 28, 29, 30, 31, 32)
MOECORE_WGMMA_ALL(8, 64, 32, 33, 34, 35, 36)
MOECORE_WGMMA_ALL(9, 72, 36, 37, 38, 39, 40)
MOECORE_WGMMA_ALL(10, 80, 40, 41, 42, 43, 44)
MOECORE_WGMMA_ALL(11, 88, 44, 45, 46, 47, 48)
MOECORE_WGMMA_ALL(12, 96, 48, 49, 50, 51, 52)
MOECORE_WGMMA_ALL(13, 104, 52, 53, 54, 55, 56)
MOECORE_WGMMA_ALL(14, 112, 56, 57, 58, 59, 60)
MOECORE_WGMMA_ALL(15, 120, 60, 61, 62, 63, 64)
MOECORE_WGMMA_ALL(16, 128, 64, 65, 66, 67, 68)
MOECORE_WGMMA_ALL(17, 136, 68, 69, 70, 71, 72)
MOECORE_WGMMA_ALL(18, 144, 72, 73, 74, 75, 76)
MOECORE_WGMMA_ALL(19, 152, 76, 77, 78, 79, 80)
MOECORE_WGMMA_ALL(20, 160, 80, 81, 82, 83, 84)
MOECORE_WGMMA_ALL(21, 168, 84, 85, 86, 87, 88)
MOECORE_WGMMA_ALL(22, 176, 88, 89, 90, 91, 92)
MOECORE_WGMMA_ALL(23, 184, 92, 93, 94, 95, 96)
MOECORE_WGMMA_ALL(24, 192, 96, 97, 98, 99, 100)
MOECORE_WGMMA_ALL(25, 200, 100, 101, 102, 103, 104)
MOECORE_WGMMA_ALL(26, 208, 104, 105, 106, 107, 108)
MOECORE_WGMMA_ALL(27, 216, 108, 109, 110, 111, 112)
MOECORE_WGMMA_ALL(28, 224, 112, 113, 114, 115, 116)
MOECORE_WGMMA_ALL(29, 232, 116, 117, 118, 119, 120)
MOECORE_WGMMA_ALL(30, 240, 120, 121, 122, 123, 124)
MOECORE_WGMMA_ALL(31, 248, 124, 125, 126, 127, 128)
MOECORE_WGMMA_ALL(32, 256, 128, 129, 130, 131, 132)

#undef MOECORE_WGMMA_ALL
#undef MOECORE_WGMMA
#undef MOECORE_R1
#undef MOECORE_D1
#undef MOECORE_R2
#undef MOECORE_D2
#undef MOECORE_R3
#undef MOECORE_D3
#undef MOECORE_R4
#undef MOECORE_D4
#undef MOECORE_R5
#undef MOECORE_D5
#undef MOECORE_R6
#undef MOECORE_D6
#undef MOECORE_R7
#undef MOECORE_D7
#undef MOECORE_R8
#undef MOECORE_D8
#undef MOECORE_R9
#undef MOECORE_D9
#undef MOECORE_R10
#undef MOECORE_D10
#undef MOECORE_R11
#undef MOECORE_D11
#undef MOECORE_R12
#undef MOECORE_D12
#undef MOECORE_R13
#undef MOECORE_D13
#undef MOECORE_R14
#undef MOECORE_D14
#undef MOECORE_R15
#undef MOECORE_D15
#undef MOECORE_R16
#undef MOECORE_D16
#undef MOECORE_R17
#undef MOECORE_D17
#undef MOECORE_R18
#undef MOECORE_D18
#undef MOECORE_R19
#undef MOECORE_D19
#undef MOECORE_R20
#undef MOECORE_D20
#undef MOECORE_R21
#undef MOECORE_D21
#undef MOECORE_R22
#undef MOECORE_D22
#undef MOECORE_R23
#undef MOECORE_D23
#undef MOECORE_R24
#undef MOECORE_D24
#undef MOECORE_R25
#undef MOECORE_D25
#undef MOECORE_R26
#undef MOECORE_D26
#undef MOECORE_R27
#undef MOECORE_D27
#undef MOECORE_R28
#undef MOECORE_D28
#undef MOECORE_R29
#undef MOECORE_D29
#undef MOECORE_R30
#undef MOECORE_D30
#undef MOECORE_R31
#undef MOECORE_D31
#undef MOECORE_R32
#undef MOECORE_D32
// clang-format on

}  // namespace moecore::cuda::sm90
