// The product of matrices that a warp makes: operands of 32 lanes in, brought into the order of a plain product.
#include "machine.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

struct Operands {
  float* d;
  const Vector16* a;
  uint32_t b[2];
};

using Row = float __attribute__((vector_size(32)));  // of b or d
using Words = uint32_t __attribute__((vector_size(32)));
using Doubles = double __attribute__((vector_size(64)));

// The elements number `half` of eight words.
void unpack(const Words& words, int half, bfloat16, Row& to) {
  to = reinterpret_cast<Row>(half ? words & 0xffff0000 : words << 16);
}
void unpack(const Words& words, int half, float16, Row& to) {  // as in widen(float16)
  const Words element = half ? words >> 16 : words & 0xffff;
  const Words sign = (element & 0x8000) << 16, magnitude = (element & 0x7fff) << 13;
  const auto finite = reinterpret_cast<Words>(reinterpret_cast<Row>(magnitude) * 0x1p112f);
  const auto is_finite = reinterpret_cast<Words>(magnitude < 0x7c00u << 13);
  to = reinterpret_cast<Row>(sign | (finite & is_finite) | ((magnitude | 0x7f800000) & ~is_finite));
}
void unpack(const Words& words, int, float, Row& to) { to = reinterpret_cast<Row>(words & 0xffffe000); }

// To the float that is nearest to zero of the two beside it.
float cut_off(double x) {
  const float nearest = float(x);
  if (!(std::abs(double(nearest)) > std::abs(x))) return nearest;  // NaN too
  return float_of(bits_of(nearest) - 1);
}

// Products are exact, and so, to 53 bits, is their sum with d; what does not fit a float is cut off, once (Fasi et al.
// 2021, "Numerical behavior of NVIDIA tensor cores").
template <class T>
void multiply(void* const* operand) {
  Words a[16], b[8];  // words of eight along k, and of eight columns
  float d[16][8];
  for (int l = 0; l < kWarp; ++l) {
    const auto& lane = *static_cast<const Operands*>(operand[l]);
    const int row = l / 4, word = l % 4;
    for (int i = 0; i < 4; ++i) {
      a[row + i % 2 * 8][word + i / 2 * 4] = lane.a->word[i];
      d[row + i / 2 * 8][2 * word + i % 2] = lane.d[i];
    }
    for (int i = 0; i < 2; ++i) b[word + 4 * i][row] = lane.b[i];
  }
  constexpr int kHalves = int(4 / sizeof(T));  // even k, then odd ones
  Row rows[kHalves][8];
  for (int half = 0; half < kHalves; ++half) {
    for (int k = 0; k < 8; ++k) unpack(b[k], half, T{}, rows[half][k]);
  }
  for (int row = 0; row < 16; ++row) {
    Row of_row;
    std::memcpy(&of_row, d[row], sizeof of_row);
    Doubles sum = __builtin_convertvector(of_row, Doubles);
    for (int half = 0; half < kHalves; ++half) {
      Row factors;
      unpack(a[row], half, T{}, factors);
      for (int k = 0; k < 8; ++k) sum += double(factors[k]) * __builtin_convertvector(rows[half][k], Doubles);
    }
    for (int n = 0; n < 8; ++n) d[row][n] = cut_off(sum[n]);
  }
  for (int l = 0; l < kWarp; ++l) {
    const auto& lane = *static_cast<const Operands*>(operand[l]);
    for (int i = 0; i < 4; ++i) lane.d[i] = d[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2];
  }
}

struct DoubleOperands {
  double* d;
  const double* a;
  double b[2];
};

void multiply_doubles(void* const* operand) {
  double a[16][8], b[8][8], d[16][8];
  for (int l = 0; l < kWarp; ++l) {
    const auto& lane = *static_cast<const DoubleOperands*>(operand[l]);
    for (int i = 0; i < 4; ++i) {
      a[l / 4 + i % 2 * 8][l % 4 + i / 2 * 4] = lane.a[i];
      d[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2] = lane.d[i];
    }
    for (int i = 0; i < 2; ++i) b[l % 4 + 4 * i][l / 4] = lane.b[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 8; ++k) {
      for (int n = 0; n < 8; ++n) d[row][n] += a[row][k] * b[k][n];
    }
  }
  for (int l = 0; l < kWarp; ++l) {
    const auto& lane = *static_cast<const DoubleOperands*>(operand[l]);
    for (int i = 0; i < 4; ++i) lane.d[i] = d[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2];
  }
}

}  // namespace

void mma(float (&d)[4], const Vector16& a, uint32_t b0, uint32_t b1, bfloat16) {
  Operands operands{d, &a, {b0, b1}};
  meet(Wait::mma_bfloat16, &operands, multiply<bfloat16>);
}
void mma(float (&d)[4], const Vector16& a, uint32_t b0, uint32_t b1, float16) {
  Operands operands{d, &a, {b0, b1}};
  meet(Wait::mma_float16, &operands, multiply<float16>);
}
void mma(float (&d)[4], const Vector16& a, uint32_t b0, uint32_t b1, float) {
  Operands operands{d, &a, {b0, b1}};
  meet(Wait::mma_float, &operands, multiply<float>);
}
void mma(double (&d)[4], const double (&a)[4], double b0, double b1) {
  DoubleOperands operands{d, a, {b0, b1}};
  meet(Wait::mma_double, &operands, multiply_doubles);
}

}  // namespace fastseq::FASTSEQ_ISA
