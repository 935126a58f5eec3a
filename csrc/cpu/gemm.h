// Products of a row block with packed panels: the one place where the CPU engines multiply matrices.
//
//   c[m][n] = init[m][n] + sum over k of a[m][k] * b[k][n]
//
// b is packed once into panels of a few vectors, one after another: panel[k][n], contiguous, zero beyond the
// matrix. a is read in place through two strides (row-major activations), or from a packed transpose. A
// micro-kernel keeps its whole tile of c in registers (kRows x vectors accumulators) while k runs, broadcasting
// a and streaming the panel.
//
// Every element of c is made in the same way whatever the tile, the batch or the partition: a chain of fused
// multiply-adds over each kDepth of k, from zero, and the chains added to init in order. So its bits depend
// on its own row and column only, and rounding errors grow with kDepth and K / kDepth, not with K.
//
// bfloat16 operands (where the CPU multiplies them) go in pairs of k: a and panel hold [k / 2][..][2], an odd
// K is padded with zeros, and k below counts pairs.
#pragma once

#include "../fastseq.h"
#include "vec.h"

namespace fastseq::FASTSEQ_ISA {

// Things are cut into groups of nearly equal size, at most `most`; group i of `count` begins here.
inline int64_t group_begin(int64_t n, int64_t count, int64_t i) {
  const int64_t size = n / count, longer = n % count;
  return i * size + (i < longer ? i : longer);
}
inline int64_t group_count(int64_t n, int64_t most) { return (n + most - 1) / most; }

// With sixteen registers tiles of 4 x 3: 4 rows divide most batches, and kDepth values of k of such a panel fit
// into a first-level cache of 32 KB, which those of a panel of four vectors would fill.
constexpr bool kFewRegisters = kVectorRegisters < 32;
constexpr int kPanelVectors = kFewRegisters ? 3 : 4;

// Few rows need wider panels, or the latency of their few accumulators would be what they wait for; with sixteen
// registers five and six rows are one tile of narrow ones.
constexpr int kWidestPanel = kFewRegisters ? 12 : 8;
constexpr int panel_vectors(int64_t rows) {
  constexpr int kFew[] = {kPanelVectors, kWidestPanel, 6, 4, kPanelVectors, 2, 2};
  if (kFewRegisters && rows < 7) return kFew[rows];
  return rows == 1 ? kWidestPanel : kPanelVectors;
}

// Rows of the register tile for a panel of so many vectors: accumulators, panel vectors and a broadcast fit.
constexpr int tile_rows(int vectors) {
  constexpr int kMany[] = {0, 14, 12, 8, 6}, kFew[] = {0, 8, 6, 4, 3, 2, 2};
  if (kFewRegisters) return vectors <= 6 ? kFew[vectors] : 1;
  return vectors <= 4 ? kMany[vectors] : 1;
}

// How a b of so many vectors is cut into panels of at most `most`, as equal as can be.
struct PanelCut {
  int vectors, most;
  int count() const { return (vectors + most - 1) / most; }
  int begin(int panel) const { return int(group_begin(vectors, count(), panel)); }
  int size(int panel) const { return begin(panel + 1) - begin(panel); }
};

template <class O>
struct Operand {
  using Scalar = O;   // of the sums
  using Element = O;  // what one broadcast moves
  static constexpr int kPair = 1;
};
template <>
struct Operand<bfloat16> {
  using Scalar = float;
  using Element = uint32_t;
  static constexpr int kPair = 2;
};

// Calls body(S{}, O{}) for the storage and operand types of a dtype.
template <class Body>
auto with_types(DType dtype, Body body) {
#if defined(__AVX512BF16__)
  using Bfloat16Operand = bfloat16;
#else
  using Bfloat16Operand = float;
#endif
  switch (dtype) {
    default:
      return body(float{}, float{});
    case DType::kFloat64:
      return body(double{}, double{});
    case DType::kBFloat16:
      return body(bfloat16{}, Bfloat16Operand{});
    case DType::kFloat16:
      return body(float16{}, float{});
  }
}

// b * broadcast(a) + c, one step of k.
template <class T>
struct Multiplier {
  using V = Vec<T>;
  using Loaded = V;
  static Loaded load_panel(const T* p) { return load<V>(p); }
  static V multiply_add(T a, Loaded b, V c) { return fma(V(a), b, c); }
};
#if defined(__AVX512BF16__)
template <>
struct Multiplier<bfloat16> {
  using V = Vec<float>;
  using Loaded = __m512bh;
  static Loaded load_panel(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static V multiply_add(uint32_t a, Loaded b, V c) {
    return V::of((V::Native)_mm512_dpbf16_ps((__m512)c.v, (__m512bh)_mm512_set1_epi32(int(a)), b));
  }
};
#endif

template <class O>
constexpr int64_t pairs(int64_t k) {
  return (k + Operand<O>::kPair - 1) / Operand<O>::kPair;
}

template <class O>
struct TileArgs {
  using Scalar = typename Operand<O>::Scalar;
  using Element = typename Operand<O>::Element;
  int64_t k;
  const Element* a;
  int64_t row_stride, k_stride;  // of a, in elements
  const O* panel;
  Scalar* c;
  int64_t c_stride;
  const Scalar* init;   // null: zero
  int64_t init_stride;  // 0: one row for all, e.g. a bias
  // What is wanted in the second-level cache soon: so many lines of it for each kPrefetchSteps of k.
  const char* ahead = nullptr;
  int ahead_lines = 0;
  int64_t panel_stride = 0;  // elements of a step of k in the panel; 0: the vectors that are used fill it
};
constexpr int64_t kPrefetchSteps = 16, kLineBytes = 64;

template <class O, int kRows, int kVectors>
void micro_kernel(const TileArgs<O>& t) {
  using M = Multiplier<O>;
  using V = typename M::V;
  constexpr int kPair = Operand<O>::kPair;
  V acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 12
    for (int n = 0; n < kVectors; ++n) acc[m][n] = V(0);
  }
  const typename Operand<O>::Element* a = t.a;
  const O* b = t.panel;
  const int64_t row = t.row_stride, step = t.k_stride;
  const int64_t panel_step = t.panel_stride ? t.panel_stride : kVectors * V::kWidth * kPair;
  const char* ahead = t.ahead;
  for (int64_t k = 0; k < t.k; ++k) {
    if (k % kPrefetchSteps == 0) {
      for (int i = 0; i < t.ahead_lines; ++i, ahead += kLineBytes) __builtin_prefetch(ahead, 0, 2);
    }
    typename M::Loaded panel[kVectors];
#pragma GCC unroll 12
    for (int n = 0; n < kVectors; ++n) panel[n] = M::load_panel(b + n * V::kWidth * kPair);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 12
      for (int n = 0; n < kVectors; ++n) acc[m][n] = M::multiply_add(a[m * row], panel[n], acc[m][n]);
    }
    a += step;
    b += panel_step;
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 12
    for (int n = 0; n < kVectors; ++n) {
      if (t.init) acc[m][n] = load<V>(t.init + m * t.init_stride + n * V::kWidth) + acc[m][n];
      store(t.c + m * t.c_stride + n * V::kWidth, acc[m][n]);
    }
  }
}

template <class O, int kVectors, int kRows = tile_rows(kVectors)>
void micro_kernel_of(int rows, const TileArgs<O>& t) {
  if (rows == kRows) {
    micro_kernel<O, kRows, kVectors>(t);
  } else if constexpr (kRows > 1) {
    micro_kernel_of<O, kVectors, kRows - 1>(rows, t);
  }
}

// A slice of a panel of so many k stays in a quarter of a small L2 cache while all row groups pass over it.
constexpr int64_t kDepth = 256;

template <class O, int kVectors = kWidestPanel>
void multiply_group(int vectors, int rows, const TileArgs<O>& t) {
  if (vectors == kVectors) {
    micro_kernel_of<O, kVectors>(rows, t);
  } else if constexpr (kVectors > 1) {
    multiply_group<O, kVectors - 1>(vectors, rows, t);
  }
}

// While many groups of rows pass over a slice of a panel, the next slice, which follows it in memory, comes from
// the third-level cache. With few groups the hardware's own prefetching keeps up, and more only gets in its way.
constexpr int64_t kManyGroups = 8;

template <class O>
void multiply_panel(int vectors, int64_t rows, const TileArgs<O>& t) {
  const bool packed = t.k_stride == 0;
  const int64_t columns = vectors * Vec<typename Operand<O>::Scalar>::kWidth * Operand<O>::kPair;
  const int64_t groups = group_count(rows, tile_rows(packed ? kPanelVectors : vectors));
  int64_t k = 0;
  do {
    const int64_t k_end = t.k - k > kDepth ? k + kDepth : t.k;
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t begin = group_begin(rows, groups, i), size = group_begin(rows, groups, i + 1) - begin;
      TileArgs<O> g = t;
      g.k = k_end - k;
      g.a += packed ? begin * t.k + k * size : begin * t.row_stride + k * t.k_stride;
      if (packed) g.k_stride = size;
      g.panel += k * columns;
      if (groups >= kManyGroups && g.k > 0) {
        const int64_t lines = group_count(g.k * columns * int64_t(sizeof(O)), kLineBytes);
        const int64_t steps = group_count(g.k, kPrefetchSteps);
        g.ahead_lines = int(group_count(lines, groups * steps));
        g.ahead =
            reinterpret_cast<const char*>(g.panel + g.k * columns) + i * steps * g.ahead_lines * kLineBytes;
      }
      g.c += begin * t.c_stride;
      if (k > 0) {
        g.init = g.c;
        g.init_stride = t.c_stride;
      } else if (t.init) {
        g.init += begin * t.init_stride;
      }
      multiply_group(vectors, int(size), g);
    }
    k = k_end;
  } while (k < t.k);
}

// c (rows x vectors) = init + a * b, b in panels. k_stride 0 says that a was packed by pack_left.
template <class O>
void multiply(const PanelCut& cut, int64_t rows, TileArgs<O> t) {
  constexpr int kWidth = Vec<typename Operand<O>::Scalar>::kWidth;
  for (int p = 0; p < cut.count(); ++p) {
    const int vectors = cut.size(p);
    multiply_panel(vectors, rows, t);
    t.panel += t.k * vectors * kWidth * Operand<O>::kPair;
    t.c += vectors * kWidth;
    if (t.init) t.init += vectors * kWidth;
  }
}

// ---- packing ----

// One vector of a panel from kWidth rows of a row-major matrix, transposed: panel[k][i] = matrix[i][k], zero
// for i >= count. panel points at this vector of the panel's first k.
template <class O, class S>
void pack_transposed(const S* matrix, int64_t row_stride, int64_t count, int64_t depth, O* panel,
                     int64_t columns) {
  using V = Vec<typename Operand<O>::Scalar>;
  constexpr int kWidth = V::kWidth, kPair = Operand<O>::kPair;
  for (int64_t k = 0; k < depth; k += kWidth * kPair) {
    V rows[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      const int64_t n = i < count ? depth - k : 0;
      const S* row = matrix + i * row_stride + k;
      if constexpr (kPair == 1) {
        rows[i] = n > 0 ? load_upto<V>(row, n) : V(0);
      } else {
        float words[kWidth] = {};
        std::memcpy(words, row, size_t(n < kWidth * kPair ? n : kWidth * kPair) * sizeof(S));
        rows[i] = load<V>(words);
      }
    }
    transpose(rows);
    const int64_t valid = pairs<O>(depth - k);
    for (int i = 0; i < kWidth && i < valid; ++i) {
      std::memcpy(panel + (k / kPair + i) * columns * kPair, &rows[i].v, sizeof rows[i].v);
    }
  }
}

// Elements [0, n) of a row with a feature stride; a null row reads as zeros.
template <class V, class S>
inline V load_strided(const S* row, int64_t stride, int64_t n) {
  if (!row || n <= 0) return V(0);
  if (stride == 1) return load_upto<V>(row, n);
  typename V::Scalar buffer[V::kWidth] = {};
  for (int64_t i = 0; i < n && i < V::kWidth; ++i) buffer[i] = widen(row[i * stride]);
  return load<V>(buffer);
}

// Lanes of two rows of widened bfloat16 as pairs. Their bits are in the upper half: the even row's move down.
inline void store_pair(void* to, Vec<float> even, Vec<float> odd) {
  const Word32 pair = (Word32)even.v >> 16 | (Word32)odd.v;
  std::memcpy(to, &pair, sizeof pair);
}

// A panel of `vectors` vectors from rows as they lie: panel[k][n] = rows[k][n], zero for n >= count.
template <class O, class S>
void pack_rows(const S* const* rows, int64_t offset, int64_t stride, int64_t count, int64_t depth,
               int vectors, O* panel) {
  using V = Vec<typename Operand<O>::Scalar>;
  constexpr int kPair = Operand<O>::kPair;
  for (int64_t k = 0; k < depth; k += kPair) {
    for (int i = 0; i < vectors; ++i, panel += V::kWidth * kPair) {
      const int64_t n = count - i * V::kWidth, column = offset + i * V::kWidth * stride;
      const auto vector = [&](int64_t at) {
        return load_strided<V>(at < depth && rows[at] ? rows[at] + column : nullptr, stride, n);
      };
      if constexpr (kPair == 1) {
        store(panel, vector(k));
      } else {
        store_pair(panel, vector(k), vector(k + 1));
      }
    }
  }
}

// The left side of a product with a transposed matrix: rows [0, count) of a^T are columns of `depth` rows that
// lie row_stride apart. Read in place with row stride 1, or, where kPackLeft, packed as multiply() cuts them:
// for each group of rows, [k][row of the group]. Pairs have to be packed. Single values in tiles of four rows
// would use a quarter of each line that they touch; in taller tiles reading in place is as fast.
template <class O>
constexpr bool kPackLeft = Operand<O>::kPair == 2 || tile_rows(kPanelVectors) <= 4;

// Moves whole vectors: reads and writes up to kPackSlack elements past the end, and what it writes there is
// filled in later.
constexpr int64_t kPackSlack = kVectorBytes / 4;
template <class O>
void pack_left(const O* matrix, int64_t row_stride, int64_t count, int64_t depth,
               typename Operand<O>::Element* packed) {
  using V = Vec<typename Operand<O>::Scalar>;
  const int64_t groups = group_count(count, tile_rows(kPanelVectors));
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t begin = group_begin(count, groups, i), size = group_begin(count, groups, i + 1) - begin;
    for (int64_t k = 0; k < depth; k += Operand<O>::kPair, packed += size) {
      const O* const row = matrix + k * row_stride + begin;
      for (int64_t m = 0; m < size; m += V::kWidth) {
        if constexpr (Operand<O>::kPair == 1) {
          store(packed + m, load<V>(row + m));
        } else {
          const V odd = k + 1 < depth ? load<V>(row + row_stride + m) : V(0);
          store_pair(packed + m, load<V>(row + m), odd);
        }
      }
    }
  }
}

}  // namespace fastseq::FASTSEQ_ISA
