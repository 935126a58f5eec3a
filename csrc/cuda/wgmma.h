// wgmma.mma_async.m64nNk16 for every N: the accumulators are operands of the instruction one by one, so that each N
// needs an asm statement of its own. prim_hopper.h gives them one name, and says what they mean.
//
// The macros list operands, and are gone at the end of the file:
//   FS_D24         the accumulators of n = 24
//   FS_R24         their names
//   FS_WGMMA(...)  the four statements for an n: A in shared memory or registers, bfloat16 or float16; after n come
//                  the numbers of the operands that follow the accumulators
#pragma once

#include <cstdint>

#include "portable_hopper.h"

namespace fastseq::FASTSEQ_ISA {

// clang-format off

#define FS_D8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define FS_D16 FS_D8, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define FS_D24 FS_D16, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define FS_D32 FS_D24, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define FS_D40 FS_D32, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define FS_D48 FS_D40, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define FS_D56 FS_D48, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define FS_D64 FS_D56, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define FS_D72 FS_D64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define FS_D80 FS_D72, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define FS_D88 FS_D80, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define FS_D96 FS_D88, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define FS_D104 FS_D96, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define FS_D112 FS_D104, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define FS_D120 FS_D112, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define FS_D128 FS_D120, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define FS_D136 FS_D128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define FS_D144 FS_D136, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define FS_D152 FS_D144, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define FS_D160 FS_D152, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define FS_D168 FS_D160, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define FS_D176 FS_D168, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define FS_D184 FS_D176, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define FS_D192 FS_D184, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define FS_D200 FS_D192, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define FS_D208 FS_D200, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define FS_D216 FS_D208, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define FS_D224 FS_D216, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define FS_D232 FS_D224, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define FS_D240 FS_D232, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define FS_D248 FS_D240, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define FS_D256 FS_D248, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

#define FS_R8 "%0, %1, %2, %3"
#define FS_R16 FS_R8 ", %4, %5, %6, %7"
#define FS_R24 FS_R16 ", %8, %9, %10, %11"
#define FS_R32 FS_R24 ", %12, %13, %14, %15"
#define FS_R40 FS_R32 ", %16, %17, %18, %19"
#define FS_R48 FS_R40 ", %20, %21, %22, %23"
#define FS_R56 FS_R48 ", %24, %25, %26, %27"
#define FS_R64 FS_R56 ", %28, %29, %30, %31"
#define FS_R72 FS_R64 ", %32, %33, %34, %35"
#define FS_R80 FS_R72 ", %36, %37, %38, %39"
#define FS_R88 FS_R80 ", %40, %41, %42, %43"
#define FS_R96 FS_R88 ", %44, %45, %46, %47"
#define FS_R104 FS_R96 ", %48, %49, %50, %51"
#define FS_R112 FS_R104 ", %52, %53, %54, %55"
#define FS_R120 FS_R112 ", %56, %57, %58, %59"
#define FS_R128 FS_R120 ", %60, %61, %62, %63"
#define FS_R136 FS_R128 ", %64, %65, %66, %67"
#define FS_R144 FS_R136 ", %68, %69, %70, %71"
#define FS_R152 FS_R144 ", %72, %73, %74, %75"
#define FS_R160 FS_R152 ", %76, %77, %78, %79"
#define FS_R168 FS_R160 ", %80, %81, %82, %83"
#define FS_R176 FS_R168 ", %84, %85, %86, %87"
#define FS_R184 FS_R176 ", %88, %89, %90, %91"
#define FS_R192 FS_R184 ", %92, %93, %94, %95"
#define FS_R200 FS_R192 ", %96, %97, %98, %99"
#define FS_R208 FS_R200 ", %100, %101, %102, %103"
#define FS_R216 FS_R208 ", %104, %105, %106, %107"
#define FS_R224 FS_R216 ", %108, %109, %110, %111"
#define FS_R232 FS_R224 ", %112, %113, %114, %115"
#define FS_R240 FS_R232 ", %116, %117, %118, %119"
#define FS_R248 FS_R240 ", %120, %121, %122, %123"
#define FS_R256 FS_R248 ", %124, %125, %126, %127"

#define FS_BEGIN(ADD) "{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\n"
#define FS_MMA(N, TYPE) "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FS_R##N "}, "
#define FS_SHARED(N, TYPE, A, B, ADD, MAJOR_A, MAJOR_B)                                                   \
  asm volatile(FS_BEGIN(ADD) FS_MMA(N, TYPE) "%" #A ", %" #B ", p, 1, 1, %" #MAJOR_A ", %" #MAJOR_B ";\n}" \
               : FS_D##N : "l"(a), "l"(b), "r"(int(add)), "n"(int(kA)), "n"(int(kB)))
#define FS_REGISTERS(N, TYPE, A0, A1, A2, A3, B, ADD, MAJOR_B)                                            \
  asm volatile(FS_BEGIN(ADD) FS_MMA(N, TYPE)                                                              \
               "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #MAJOR_B ";\n}"             \
               : FS_D##N : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kB)))

template <int kN>
struct Wgmma;

#define FS_WGMMA(N, P0, P1, P2, P3, P4, P5, P6)                                                           \
  template <>                                                                                             \
  struct Wgmma<N> {                                                                                       \
    template <class T, Major kA, Major kB>                                                                \
    static FS_DEVICE void issue(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {                    \
      if constexpr (std::is_same_v<T, bfloat16>) {                                                        \
        FS_SHARED(N, "bf16", P0, P1, P2, P3, P4);                                                         \
      } else {                                                                                            \
        FS_SHARED(N, "f16", P0, P1, P2, P3, P4);                                                          \
      }                                                                                                   \
    }                                                                                                     \
    template <class T, Major kB>                                                                          \
    static FS_DEVICE void issue(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {        \
      if constexpr (std::is_same_v<T, bfloat16>) {                                                        \
        FS_REGISTERS(N, "bf16", P0, P1, P2, P3, P4, P5, P6);                                              \
      } else {                                                                                            \
        FS_REGISTERS(N, "f16", P0, P1, P2, P3, P4, P5, P6);                                               \
      }                                                                                                   \
    }                                                                                                     \
  };
FS_WGMMA(8, 4, 5, 6, 7, 8, 9, 10)
FS_WGMMA(16, 8, 9, 10, 11, 12, 13, 14)
FS_WGMMA(24, 12, 13, 14, 15, 16, 17, 18)
FS_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
FS_WGMMA(40, 20, 21, 22, 23, 24, 25, 26)
FS_WGMMA(48, 24, 25, 26, 27, 28, 29, 30)
FS_WGMMA(56, 28, 29, 30, 31, 32, 33, 34)
FS_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
FS_WGMMA(72, 36, 37, 38, 39, 40, 41, 42)
FS_WGMMA(80, 40, 41, 42, 43, 44, 45, 46)
FS_WGMMA(88, 44, 45, 46, 47, 48, 49, 50)
FS_WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
FS_WGMMA(104, 52, 53, 54, 55, 56, 57, 58)
FS_WGMMA(112, 56, 57, 58, 59, 60, 61, 62)
FS_WGMMA(120, 60, 61, 62, 63, 64, 65, 66)
FS_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
FS_WGMMA(136, 68, 69, 70, 71, 72, 73, 74)
FS_WGMMA(144, 72, 73, 74, 75, 76, 77, 78)
FS_WGMMA(152, 76, 77, 78, 79, 80, 81, 82)
FS_WGMMA(160, 80, 81, 82, 83, 84, 85, 86)
FS_WGMMA(168, 84, 85, 86, 87, 88, 89, 90)
FS_WGMMA(176, 88, 89, 90, 91, 92, 93, 94)
FS_WGMMA(184, 92, 93, 94, 95, 96, 97, 98)
FS_WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
FS_WGMMA(200, 100, 101, 102, 103, 104, 105, 106)
FS_WGMMA(208, 104, 105, 106, 107, 108, 109, 110)
FS_WGMMA(216, 108, 109, 110, 111, 112, 113, 114)
FS_WGMMA(224, 112, 113, 114, 115, 116, 117, 118)
FS_WGMMA(232, 116, 117, 118, 119, 120, 121, 122)
FS_WGMMA(240, 120, 121, 122, 123, 124, 125, 126)
FS_WGMMA(248, 124, 125, 126, 127, 128, 129, 130)
FS_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

#undef FS_WGMMA
#undef FS_REGISTERS
#undef FS_SHARED
#undef FS_MMA
#undef FS_BEGIN
#undef FS_D8
#undef FS_D16
#undef FS_D24
#undef FS_D32
#undef FS_D40
#undef FS_D48
#undef FS_D56
#undef FS_D64
#undef FS_D72
#undef FS_D80
#undef FS_D88
#undef FS_D96
#undef FS_D104
#undef FS_D112
#undef FS_D120
#undef FS_D128
#undef FS_D136
#undef FS_D144
#undef FS_D152
#undef FS_D160
#undef FS_D168
#undef FS_D176
#undef FS_D184
#undef FS_D192
#undef FS_D200
#undef FS_D208
#undef FS_D216
#undef FS_D224
#undef FS_D232
#undef FS_D240
#undef FS_D248
#undef FS_D256
#undef FS_R8
#undef FS_R16
#undef FS_R24
#undef FS_R32
#undef FS_R40
#undef FS_R48
#undef FS_R56
#undef FS_R64
#undef FS_R72
#undef FS_R80
#undef FS_R88
#undef FS_R96
#undef FS_R104
#undef FS_R112
#undef FS_R120
#undef FS_R128
#undef FS_R136
#undef FS_R144
#undef FS_R152
#undef FS_R160
#undef FS_R168
#undef FS_R176
#undef FS_R184
#undef FS_R192
#undef FS_R200
#undef FS_R208
#undef FS_R216
#undef FS_R224
#undef FS_R232
#undef FS_R240
#undef FS_R248
#undef FS_R256
// clang-format on

}  // namespace fastseq::FASTSEQ_ISA
