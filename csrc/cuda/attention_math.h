// The arithmetic of attention's matrix products, one struct for each kind. All of them are products of tensor cores,
// mma() of <prim.h>, and hold what they multiply and add up in the same places, so that the kernels know no difference:
//
//   Sums      [16 rows x 8 columns]  lane l has rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next one:
//             element e is row l / 4 + 8 (e / 2), column 2 (l % 4) + e % 2
//   Left      [16 rows x kDepth]     from rows in shared memory, or from sums, which need no exchange for it
//   Right     [kDepth x 8 columns]   from rows in shared memory that are its columns (keys, in Q K^T), or its rows
//             (values, in P V); kRights of them, side by side, at a time
//
// Where elements have 32 or 64 bits, sums become a Left with the order of its depth changed: 0, 2, 4, 6, 1, 3, 5, 7 of
// eight; load_rows() takes the same order.
//
//   struct         tensors    multiplied as                                    mma of a product
//   Bfloat16Math   bfloat16   bfloat16                                         1
//   Float16Math    float16    float16                                          1
//   Tf32Math       float32    tf32, rounded to nearest                         1
//   Float32Math    float32    high + low parts of 11 bits each, but low x low  3: 2^-22 of each product is lost
//   Float64Math    float64    float64                                          1
#pragma once

#include <prim.h>

#include "attention_shapes.h"

namespace fastseq::FASTSEQ_ISA::attention {

using namespace fastseq::attention;  // the shapes of tiles

template <class T>
using Sums = T[4];

// Tiles in shared memory: rows of kColumns elements, a multiple of 64. Those of 16-bit elements have the 16-byte chunks
// of a row exchanged, chunk c in the place of c ^ row % 8, so that the same chunk of eight rows lies in different banks.
// Wider ones have four elements between rows, for lanes that read eight rows and four columns, or four and eight.
template <class E, int kColumns>
struct Tile {
  static_assert(kColumns % 64 == 0);
  static constexpr bool kExchanged = sizeof(E) == 2;
  static constexpr int kChunk = 16 / sizeof(E), kStride = row_elements(sizeof(E), kColumns);
  static constexpr int kChunks = kColumns / kChunk;

  E* data;

  static constexpr int bytes(int rows) { return tile_bytes(sizeof(E), kColumns, rows); }
  FS_DEVICE E* chunk(int row, int c) const {
    return data + row * kStride + (kExchanged ? c ^ row % 8 : c) * kChunk;
  }
  FS_DEVICE E& at(int row, int column) const { return data[row * kStride + column]; }  // of wide elements
};

// Elements that are neither finite nor something that a product with zero leaves zero.
FS_DEVICE bool is_finite(float x) { return x - x == 0; }
FS_DEVICE bool is_finite(double x) { return x - x == 0; }
// The same of the elements in a word, of doubles in their upper one: not 0 where one has an exponent of ones, which one
// more carries into its sign.
constexpr uint32_t exponents_of(bfloat16) { return 0x7f807f80; }
constexpr uint32_t exponents_of(float16) { return 0x7c007c00; }
constexpr uint32_t exponents_of(float) { return 0x7f800000; }
constexpr uint32_t exponents_of(double) { return 0x7ff00000; }
template <class E>
FS_DEVICE uint32_t carries_of(uint32_t word) {
  constexpr uint32_t kAll = exponents_of(E{}), kOne = kAll & ~(kAll << 1);
  return ((word & kAll) + kOne) & (sizeof(E) == 2 ? 0x80008000 : 0x80000000);
}
template <class E>
FS_DEVICE uint32_t carries_of(const Vector16& chunk) {
  uint32_t carries = 0;
  FS_UNROLL
  for (int i = sizeof(E) == 8; i < 4; i += sizeof(E) == 8 ? 2 : 1) carries |= carries_of<E>(chunk.word[i]);
  return carries;
}
template <class T>
FS_DEVICE T sign_of(T x) {
  return x > T(0) ? T(1) : x < T(0) ? T(-1) : T(0);
}

template <class E>
struct HalfMath {
  using Element = E;
  using Sum = float;
  static constexpr int kDepth = 16, kRights = 2;
  struct Left {
    Vector16 words;
  };
  struct Right {
    uint32_t word[2];
  };

  template <int kColumns>
  FS_DEVICE static void load(Left& a, Tile<E, kColumns> tile, int row, int k) {
    const int lane = thread_index() % kWarp;
    load_matrices(a.words.word, tile.chunk(row + lane % 16, k / 8 + lane / 16));
  }
  // Columns of the operand are rows from `row` on.
  template <int kColumns>
  FS_DEVICE static void load_columns(Right (&b)[2], Tile<E, kColumns> tile, int row, int k) {
    const int lane = thread_index() % kWarp;
    uint32_t r[4];
    load_matrices(r, tile.chunk(row + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
    b[0] = {{r[0], r[1]}}, b[1] = {{r[2], r[3]}};
  }
  template <int kColumns>
  FS_DEVICE static void load_rows(Right (&b)[2], Tile<E, kColumns> tile, int k, int column) {
    const int lane = thread_index() % kWarp;
    uint32_t r[4];
    load_matrices_transposed(r, tile.chunk(k + lane % 16, column / 8 + lane / 16));
    b[0] = {{r[0], r[1]}}, b[1] = {{r[2], r[3]}};
  }
  // Of two Sums side by side.
  FS_DEVICE static void take(Left& a, const Sums<float>* d) {
    a.words = {{pack(d[0][0], d[0][1], E{}), pack(d[0][2], d[0][3], E{}), pack(d[1][0], d[1][1], E{}),
                pack(d[1][2], d[1][3], E{})}};
  }
  FS_DEVICE static void multiply(Sums<float>& d, const Left& a, const Right& b) {
    mma(d, a.words, b.word[0], b.word[1], E{});
  }
  // f of each element, which makes no other number of what it does not change.
  template <class F>
  FS_DEVICE static Right map(const Right& b, F f) {
    Right r;
    FS_UNROLL
    for (int i = 0; i < 2; ++i) {
      E low, high;
      low.bits = uint16_t(b.word[i]), high.bits = uint16_t(b.word[i] >> 16);
      r.word[i] = pack(f(widen(low)), f(widen(high)), E{});
    }
    return r;
  }
};

// Elements of 32 and 64 bits; Products says what a Left and a Right are made of.
template <class E, class Products>
struct WideMath {
  using Element = E;
  using Sum = E;
  static constexpr int kDepth = 8, kRights = 1;
  using Left = typename Products::Left;
  using Right = typename Products::Right;

  template <int kColumns>
  FS_DEVICE static void load(Left& a, Tile<E, kColumns> tile, int row, int k) {
    const int lane = thread_index() % kWarp;
    E x[4];
    FS_UNROLL
    for (int i = 0; i < 4; ++i) x[i] = tile.at(row + lane / 4 + i % 2 * 8, k + lane % 4 + i / 2 * 4);
    Products::left(a, x);
  }
  template <int kColumns>
  FS_DEVICE static void load_columns(Right (&b)[1], Tile<E, kColumns> tile, int row, int k) {
    const int lane = thread_index() % kWarp;
    const E x[2] = {tile.at(row + lane / 4, k + lane % 4), tile.at(row + lane / 4, k + lane % 4 + 4)};
    Products::right(b[0], x);
  }
  template <int kColumns>
  FS_DEVICE static void load_rows(Right (&b)[1], Tile<E, kColumns> tile, int k, int column) {
    const int lane = thread_index() % kWarp;
    const E x[2] = {tile.at(k + 2 * (lane % 4), column + lane / 4),
                    tile.at(k + 2 * (lane % 4) + 1, column + lane / 4)};
    Products::right(b[0], x);
  }
  FS_DEVICE static void take(Left& a, const Sums<E>* d) {
    const E x[4] = {d[0][0], d[0][2], d[0][1], d[0][3]};
    Products::left(a, x);
  }
  FS_DEVICE static void multiply(Sums<E>& d, const Left& a, const Right& b) { Products::multiply(d, a, b); }
  template <class F>
  FS_DEVICE static Right map(const Right& b, F f) {
    E x[2], y[2];
    Products::elements(b, x);
    y[0] = f(x[0]), y[1] = f(x[1]);
    Right r;
    Products::right(r, y);
    FS_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (y[i] == x[i]) Products::copy(r, b, i);
    }
    return r;
  }
};

struct Tf32Products {
  struct Left {
    Vector16 words;
  };
  struct Right {
    float x[2];
  };
  FS_DEVICE static void left(Left& a, const float (&x)[4]) {
    FS_UNROLL
    for (int i = 0; i < 4; ++i) a.words.word[i] = bits_of(round_to_tf32(x[i]));
  }
  FS_DEVICE static void right(Right& b, const float (&x)[2]) {
    b = {{round_to_tf32(x[0]), round_to_tf32(x[1])}};
  }
  FS_DEVICE static void elements(const Right& b, float (&x)[2]) { x[0] = b.x[0], x[1] = b.x[1]; }
  FS_DEVICE static void copy(Right& to, const Right& from, int i) { to.x[i] = from.x[i]; }
  FS_DEVICE static void multiply(Sums<float>& d, const Left& a, const Right& b) {
    mma(d, a.words, bits_of(b.x[0]), bits_of(b.x[1]), float{});
  }
};

// The products of eight terms are added to the sum at once: tensor cores cut off what does not fit a float, towards
// zero, each time that they add (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"), and of a long sum all
// that they cut off would add up.
//
// x = high + low + 2^-21 x at most: high is rounded, from what is left the last bit is cut off. By the bits, for splitting
// takes as long as multiplying. Infinity has no low part; NaN, which may have lost its exponent to rounding, has.
struct Float32Products {
  struct Left {
    Vector16 high, low;
  };
  struct Right {
    float high[2], low[2];
  };
  FS_DEVICE static void split(float x, float& high, float& low) {
    constexpr uint32_t kRead = 0xffffe000;  // of a float, by tensor cores
    high = float_of((bits_of(x) + 0x1000) & kRead);
    low = float_of(bits_of(x - high) & kRead);
    if (high - high != 0 && x == x) low = 0;
  }
  FS_DEVICE static void left(Left& a, const float (&x)[4]) {
    FS_UNROLL
    for (int i = 0; i < 4; ++i) {
      float high, low;
      split(x[i], high, low);
      a.high.word[i] = bits_of(high), a.low.word[i] = bits_of(low);
    }
  }
  FS_DEVICE static void right(Right& b, const float (&x)[2]) {
    FS_UNROLL
    for (int i = 0; i < 2; ++i) split(x[i], b.high[i], b.low[i]);
  }
  FS_DEVICE static void elements(const Right& b, float (&x)[2]) {
    FS_UNROLL
    for (int i = 0; i < 2; ++i) x[i] = b.high[i] + b.low[i];
  }
  FS_DEVICE static void copy(Right& to, const Right& from, int i) {
    to.high[i] = from.high[i], to.low[i] = from.low[i];
  }
  FS_DEVICE static void multiply(Sums<float>& d, const Left& a, const Right& b) {
    Sums<float> sum = {};
    mma(sum, a.low, bits_of(b.high[0]), bits_of(b.high[1]), float{});
    mma(sum, a.high, bits_of(b.low[0]), bits_of(b.low[1]), float{});
    mma(sum, a.high, bits_of(b.high[0]), bits_of(b.high[1]), float{});
    FS_UNROLL
    for (int e = 0; e < 4; ++e) d[e] += sum[e];
  }
};

struct Float64Products {
  struct Left {
    double x[4];
  };
  struct Right {
    double x[2];
  };
  FS_DEVICE static void left(Left& a, const double (&x)[4]) {
    FS_UNROLL
    for (int i = 0; i < 4; ++i) a.x[i] = x[i];
  }
  FS_DEVICE static void right(Right& b, const double (&x)[2]) { b = {{x[0], x[1]}}; }
  FS_DEVICE static void elements(const Right& b, double (&x)[2]) { x[0] = b.x[0], x[1] = b.x[1]; }
  FS_DEVICE static void copy(Right& to, const Right& from, int i) { to.x[i] = from.x[i]; }
  FS_DEVICE static void multiply(Sums<double>& d, const Left& a, const Right& b) {
    Sums<double> sum = {};  // of eight terms, so that a long sum is rounded an eighth as often
    mma(sum, a.x, b.x[0], b.x[1]);
    FS_UNROLL
    for (int e = 0; e < 4; ++e) d[e] += sum[e];
  }
};

using Bfloat16Math = HalfMath<bfloat16>;
using Float16Math = HalfMath<float16>;
using Tf32Math = WideMath<float, Tf32Products>;
using Float32Math = WideMath<float, Float32Products>;
using Float64Math = WideMath<double, Float64Products>;

}  // namespace fastseq::FASTSEQ_ISA::attention
