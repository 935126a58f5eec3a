// The arithmetic of a product, one struct for each kind: tensor cores (bfloat16, float16, float32 rounded to tf32)
// and plain multiply-adds (float32, float64). They differ in how a tile of weights and the operand lie, and agree
// in everything else, so that the rest of the engine knows no difference:
//
//   Storage    type of tensors       Element  type of weights and operand       Scalar  type of sums and gates
//   kRows      batch rows of one column of tiles         kPair   elements of a pair along k
//   element(x)                 the Element of a Scalar
//   tile_element(lane, i)      row and k, within a tile, of element i of a lane's 16 bytes
//   index(n, k, line_stride)   where the operand has element k of row n; vectors_of(k), lines_of(rows) say how
//                              many 16-byte vectors k elements take in a line, and how many lines rows take
//   Operand<N>, load           what a lane needs of a pair of the operand, for N columns
//   Sums<N>, multiply, finish  += a pair of tiles x the operand; finish calls take(row of the tile, n, sums of n
//                              and n + 1) with every sum in one lane, n even
#pragma once

#include <prim.h>

namespace fastseq::FASTSEQ_ISA {

struct TilePlace {
  int row, k;
};

// Tensor cores: tiles of 16 rows x 32 bytes. The operand lies row by row, [n][k], with 16 bytes between rows, so
// that eight rows are in eight different groups of banks.
template <class S, class E>
struct TensorMath {
  using Storage = S;
  using Element = E;
  using Scalar = float;
  static constexpr bool kTensor = true;
  static constexpr int kRows = 8, kVector = 16 / sizeof(E), kPair = 64 / sizeof(E), kWord = 4 / sizeof(E);

  FS_DEVICE static E element(float x) {
    E e;
    if constexpr (std::is_same_v<E, float>) {
      e = round_to_tf32(x);
    } else {
      narrow(x, e);
    }
    return e;
  }

  FS_DEVICE static TilePlace tile_element(int lane, int i) {
    const int word = i / kWord;
    return {lane / 4 + 8 * (word % 2), (lane % 4 + 4 * (word / 2)) * kWord + i % kWord};
  }

  FS_DEVICE static int64_t index(int n, int64_t k, int line_stride) {
    return int64_t(n) * line_stride * kVector + k;
  }
  static constexpr int64_t vectors_of(int64_t k) { return k / kVector; }
  static constexpr int lines_of(int rows) { return rows; }

  template <int N>
  struct Operand {
    uint32_t b[N][4];
  };
  template <int N>
  FS_DEVICE static void load(Operand<N>& o, const E* operand, int line_stride, int pair) {
    const int lane = thread_index() % kWarp;
    FS_UNROLL
    for (int j = 0; j < N; ++j) {
      load_matrices(o.b[j],
                    operand + index(j * kRows + lane % 8, pair * kPair + lane / 8 * kVector, line_stride));
    }
  }

  // An mma waits some 33 cycles for one that it adds to. With a single column the two tiles of a pair have sums of
  // their own, so that a warp has four chains of them.
  template <int N>
  struct Sums {
    static constexpr int kChains = N == 1 ? 2 : 1;
    float d[kChains * N][4];
  };
  template <int N>
  FS_DEVICE static void clear(Sums<N>& sums) {
    FS_UNROLL
    for (auto& d : sums.d) {
      FS_UNROLL
      for (int i = 0; i < 4; ++i) d[i] = 0;
    }
  }
  template <int N>
  FS_DEVICE static void multiply(Sums<N>& sums, const Vector16 (&a)[2], const Operand<N>& o) {
    constexpr int kSecond = Sums<N>::kChains == 2 ? N : 0;
    FS_UNROLL
    for (int j = 0; j < N; ++j) mma(sums.d[j], a[0], o.b[j][0], o.b[j][1], E{});
    FS_UNROLL
    for (int j = 0; j < N; ++j) mma(sums.d[kSecond + j], a[1], o.b[j][2], o.b[j][3], E{});
  }
  template <int N, class Take>
  FS_DEVICE static void finish(Sums<N>& sums, Take take) {
    const int lane = thread_index() % kWarp;
    if constexpr (Sums<N>::kChains == 2) {
      FS_UNROLL
      for (int i = 0; i < 4; ++i) sums.d[0][i] += sums.d[1][i];
    }
    FS_UNROLL
    for (int j = 0; j < N; ++j) {
      FS_UNROLL
      for (int i = 0; i < 2; ++i) {
        const Two<float> two{{sums.d[j][2 * i], sums.d[j][2 * i + 1]}};
        take(lane / 4 + 8 * i, j * kRows + 2 * (lane % 4), two);
      }
    }
  }
};

// Multiply-adds: a lane has kLaneRows rows and one k of a tile of 16 rows; sums are added up over the lanes that
// share rows at the end. The operand lies in groups of kVector rows n, [n / kVector][k][n % kVector], so that a
// lane reads all rows of one k with 16-byte loads and its neighbours the 16 bytes beside.
template <class T>
struct PlainMath {
  using Storage = T;
  using Element = T;
  using Scalar = T;
  static constexpr bool kTensor = false;
  static constexpr int kVector = 16 / sizeof(T), kLaneRows = kVector, kLanesOfRow = 2 * kVector;
  static constexpr int kRows = 2 * kVector, kGroups = kRows / kVector, kPair = 64 / sizeof(T);
  static_assert(kLanesOfRow * (16 / kLaneRows) == kWarp && kPair == 2 * kLanesOfRow);

  FS_DEVICE static T element(T x) { return x; }

  FS_DEVICE static TilePlace tile_element(int lane, int i) {
    return {lane / kLanesOfRow * kLaneRows + i, lane % kLanesOfRow};
  }

  FS_DEVICE static int64_t index(int n, int64_t k, int line_stride) {
    return (int64_t(n / kVector) * line_stride + k) * kVector + n % kVector;
  }
  static constexpr int64_t vectors_of(int64_t k) { return k; }
  static constexpr int lines_of(int rows) { return rows / kVector; }

  template <int N>
  struct Operand {
    T b[2][N * kRows];
  };
  template <int N>
  FS_DEVICE static void load(Operand<N>& o, const T* operand, int line_stride, int pair) {
    const int k = pair * kPair + thread_index() % kLanesOfRow;
    FS_UNROLL
    for (int half = 0; half < 2; ++half) {
      FS_UNROLL
      for (int group = 0; group < N * kGroups; ++group) {
        const T* const from = operand + index(group * kVector, k + half * kLanesOfRow, line_stride);
        const Vector16 v = *reinterpret_cast<const Vector16*>(from);
        memcpy(&o.b[half][group * kVector], &v, 16);
      }
    }
  }

  template <int N>
  struct Sums {
    T d[kLaneRows * N * kRows];  // [row][n]
  };
  template <int N>
  FS_DEVICE static void clear(Sums<N>& sums) {
    FS_UNROLL
    for (T& sum : sums.d) sum = 0;
  }
  template <int N>
  FS_DEVICE static void multiply(Sums<N>& sums, const Vector16 (&a)[2], const Operand<N>& o) {
    FS_UNROLL
    for (int half = 0; half < 2; ++half) {
      T weight[kVector];
      memcpy(weight, &a[half], 16);
      FS_UNROLL
      for (int row = 0; row < kLaneRows; ++row) {
        FS_UNROLL
        for (int n = 0; n < N * kRows; ++n) {
          T& sum = sums.d[row * N * kRows + n];
          sum = fma(weight[row], o.b[half][n], sum);
        }
      }
    }
  }
  template <int N, class Take>
  FS_DEVICE static void finish(Sums<N>& sums, Take take) {
    int first = 0;
    exchange<kLaneRows * N * kRows / 2, kLanesOfRow / 2>(sums.d, first);
    constexpr int kLeft = kLaneRows * N * kRows / kLanesOfRow;
    const int lane = thread_index() % kWarp;
    FS_UNROLL
    for (int i = 0; i < kLeft; i += 2) {
      const int at = first + i, row = lane / kLanesOfRow * kLaneRows + at / (N * kRows);
      take(row, at % (N * kRows), Two<T>{{sums.d[i], sums.d[i + 1]}});
    }
  }

 private:
  // Of 2 * kHalf sums a lane keeps kHalf, those that its partner gives up; then half of these, and so on.
  template <int kHalf, int kMask>
  FS_DEVICE static void exchange(T* d, int& first) {
    const bool upper = thread_index() & kMask;
    FS_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      const T other = shuffle_xor(upper ? d[i] : d[kHalf + i], kMask);
      d[i] = (upper ? d[kHalf + i] : d[i]) + other;
    }
    first += upper ? kHalf : 0;
    if constexpr (kMask > 1) exchange<kHalf / 2, kMask / 2>(d, first);
  }
};

using Bfloat16Math = TensorMath<bfloat16, bfloat16>;
using Float16Math = TensorMath<float16, float16>;
using Tf32Math = TensorMath<float, float>;
using Float32Math = PlainMath<float>;
using Float64Math = PlainMath<double>;

}  // namespace fastseq::FASTSEQ_ISA
