// The two 16-bit storage types and their scalar conversions (round to nearest even, NaN stays NaN).
#pragma once

#include <cstdint>
#include <cstring>

#ifndef FASTSEQ_ISA
#error "compiled once per instruction set: FASTSEQ_ISA names it"
#endif

namespace fastseq::FASTSEQ_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float widen(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // Inf, NaN
  // The bits of a half, moved to where a float keeps them, are the value times 2^-112; exact for subnormals.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

inline void narrow(float x, float& y) { y = x; }
inline void narrow(double x, double& y) { y = x; }
inline void narrow(float x, bfloat16& y) {
  const uint32_t u = bits_of(x);
  y.bits = x != x ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void narrow(float x, float16& y) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t h;
  if (magnitude > 0x7f800000) {
    h = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
    h = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: the addition rounds at the right bit
    h = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  } else {
    h = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  y.bits = uint16_t(sign | h);
}

}  // namespace fastseq::FASTSEQ_ISA
