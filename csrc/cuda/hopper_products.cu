// Products of a warpgroup: every N, operands from everywhere, and one product after another as attention has them.
#include <launch.h>
#include <prim_hopper.h>

#include <algorithm>

#include "hopper_primitives.h"
#include "tensor_map.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

enum class From { tiles, registers, stores };  // of a: by load_tile, or by the threads

// Tiles of all columns of a matrix of at most 256 rows, in shared memory.
struct Matrix {
  const void* data;
  int rows, columns;
  int tiles() const { return (columns + kTileColumns - 1) / kTileColumns; }
  int bytes() const { return tiles() * rows * kTileRowBytes; }
  // Of so many of them, one below the other.
  const char* make_map(TensorMap& map, int count = 1) const {
    return make_tensor_map(map, {data, 2, {columns, rows * count}, {2, columns * 2}, {kTileColumns, rows}});
  }
};
FS_DEVICE void load_matrix(unsigned char* to, const TensorMap& map, PhaseBarrier* full, int rows, int bytes,
                           int first_row = 0) {
  const int tile = rows * kTileRowBytes;
  FS_NO_UNROLL
  for (int i = 0; i < bytes / tile; ++i) load_tile(to + i * tile, map, full, {i * kTileColumns, first_row});
}

// Where accumulator 0 of this thread is in a matrix of N columns; the others are constant distances from it, which
// the compiler has to find out.
template <int kN>
FS_DEVICE float* own_elements(float* matrix) {
  const int t = thread_index();
  return matrix + as_new(uint32_t(row_of_accumulator(t, 0) * kN + column_of_accumulator(t, 0)));
}
template <int kN>
FS_DEVICE constexpr int distance(int i) {
  return i / 2 % 2 * 8 * kN + i / 4 * 8 + i % 2;
}

// "product": to [64][N] = from[0] [64][depth] times from[1] [depth][N], plus what `to` was if asked.
// number: 0 for bfloat16 or 1 for float16, N, depth (a multiple of 64 up to 256), a's From, 1 if a is
// stored [depth][64] (Major::mn), 0 if b is stored [N][depth] (Major::k) or 1 if [depth][N], 1 to add.
template <class T, int kN, From kFrom, Major kA, Major kB>
struct ProductKernel {
  struct Args {
    TensorMap a, b;
    const T* from;  // a again
    float* to;
    int depth, a_rows, a_bytes, b_rows, b_bytes, add;
  };
  static constexpr int kThreads = kWarpgroup;

  static FS_DEVICE void run(const Args& args) {
    unsigned char* const a = tile_memory();
    unsigned char* const b = a + args.a_bytes;
    auto* const full = reinterpret_cast<PhaseBarrier*>(b + args.b_bytes);
    if (thread_index() == 0) barrier_begin(full, 1), barriers_begun();
    sync_block();
    if (thread_index() < kWarp && one_lane()) {
      barrier_expect(full, args.b_bytes + (kFrom == From::tiles ? args.a_bytes : 0));
      if (kFrom == From::tiles) load_matrix(a, args.a, full, args.a_rows, args.a_bytes);
      load_matrix(b, args.b, full, args.b_rows, args.b_bytes);
    }
    float* const own = own_elements<kN>(args.to);
    float d[kN / 2];
    FS_UNROLL
    for (int i = 0; i < kN / 2; ++i) d[i] = args.add ? own[distance<kN>(i)] : 0;
    if constexpr (kFrom == From::stores) {
      for (int i = thread_index(); i < 64 * args.depth; i += kThreads) {
        const int row = i / args.depth, column = i % args.depth;
        const int offset = column / 64 * (64 * kTileRowBytes) + tile_offset(row, column % 64);
        *reinterpret_cast<T*>(a + offset) = args.from[i];
      }
      fence_async();
      sync_block();
    }
    barrier_wait(full, 0);
    const uint64_t first_a = operand_of_tiles<kA>(a, args.a_rows),
                   first_b = operand_of_tiles<kB>(b, args.b_rows);
    FS_NO_UNROLL
    for (int step = 0; step < args.depth / 16; ++step) {
      uint32_t words[4];
      if constexpr (kFrom == From::registers) {
        for (int i = 0; i < 4; ++i) {
          const int row = row_of_accumulator(thread_index(), 2 * i);
          const int column = 16 * step + column_of_accumulator(thread_index(), 2 * i);
          words[i] = *reinterpret_cast<const uint32_t*>(args.from + row * args.depth + column);
        }
      }
      const uint64_t operand_b = at_step<kB>(first_b, args.b_rows, step);
      if constexpr (kFrom == From::registers) {
        wgmma_fence(d, words);
        wgmma<T, kN, kB>(d, words, operand_b, step > 0 || args.add);
      } else {
        wgmma_fence(d);
        wgmma<T, kN, kA, kB>(d, at_step<kA>(first_a, args.a_rows, step), operand_b, step > 0 || args.add);
      }
      wgmma_commit();
      wgmma_wait<0>(d);
    }
    FS_UNROLL
    for (int i = 0; i < kN / 2; ++i) own[distance<kN>(i)] = d[i];
  }
};

template <class T, int kN, From kFrom, Major kA, Major kB>
const char* run_product(const HopperTest& test) {
  const int depth = int(test.number[2]);
  const Matrix a = kA == Major::k ? Matrix{test.from[0], 64, depth} : Matrix{test.from[0], depth, 64};
  const Matrix b = kB == Major::k ? Matrix{test.from[1], kN, depth} : Matrix{test.from[1], depth, kN};
  using Kernel = ProductKernel<T, kN, kFrom, kA, kB>;
  typename Kernel::Args args = {{},
                                {},
                                static_cast<const T*>(test.from[0]),
                                static_cast<float*>(test.to),
                                depth,
                                a.rows,
                                kFrom == From::registers ? 0 : a.bytes(),
                                b.rows,
                                b.bytes(),
                                int(test.number[6])};
  if (const char* error = a.make_map(args.a)) return error;
  if (const char* error = b.make_map(args.b)) return error;
  const size_t shared_bytes = size_t(args.a_bytes) + args.b_bytes + sizeof(PhaseBarrier);
  return launch<Kernel>({1, kWarpgroup, shared_bytes, 1, false, test.stream}, args);
}

// The two ways that attention has for every N; the others for a few.
template <class T, int kN>
const char* run_product_of_n(const HopperTest& test) {
  const From from = From(test.number[3]);
  const bool a_mn = test.number[4], b_mn = test.number[5];
  if (from == From::registers && b_mn) return run_product<T, kN, From::registers, Major::k, Major::mn>(test);
  if (from == From::tiles && !a_mn && !b_mn) return run_product<T, kN, From::tiles, Major::k, Major::k>(test);
  if constexpr (kN == 24 || kN == 64 || kN == 192) {
    if (from == From::registers) return run_product<T, kN, From::registers, Major::k, Major::k>(test);
    if (from == From::stores) return run_product<T, kN, From::stores, Major::k, Major::mn>(test);
    if (!a_mn) return run_product<T, kN, From::tiles, Major::k, Major::mn>(test);
    if (!b_mn) return run_product<T, kN, From::tiles, Major::mn, Major::k>(test);
    return run_product<T, kN, From::tiles, Major::mn, Major::mn>(test);
  }
  return "this product is not compiled";
}

template <class T, int... kNs>
const char* run_product_of_type(const HopperTest& test, std::integer_sequence<int, kNs...>) {
  const char* result = "no product of this N is compiled";
  ((test.number[1] == kNs ? void(result = run_product_of_n<T, kNs>(test)) : void()), ...);
  return result;
}
using AllN = std::integer_sequence<int, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224,
                                   240, 248, 256>;

// "products": from are Q [64][D], K [tiles][N][D] and V [tiles][N][D]; to [64][D] is the sum of all P V, where P is
// Q K^T rounded to 16 bits and kept in registers. number: 0 for bfloat16 or 1 for float16, N, D, tiles.
// In the order of attention: while P V of one tile is under way, Q K^T of the next one is.
template <class T, int kN, int kD>
struct ProductsKernel {
  struct Args {
    TensorMap q, k, v;
    float* to;
    int tiles;
  };
  static constexpr int kThreads = kWarpgroup;
  static constexpr int kQBytes = 64 * kD * 2, kKBytes = kN * kD * 2;
  static size_t shared_bytes(int tiles) { return kQBytes + tiles * (2 * kKBytes + 2 * sizeof(PhaseBarrier)); }

  struct Shared {
    unsigned char *q, *k, *v;
    PhaseBarrier* full;  // two for each tile
  };

  static FS_DEVICE void run(const Args& args) {
    Shared shared;
    shared.q = tile_memory();
    shared.k = shared.q + kQBytes;
    shared.v = shared.k + args.tiles * kKBytes;
    shared.full = reinterpret_cast<PhaseBarrier*>(shared.v + args.tiles * kKBytes);
    if (thread_index() == 0) {
      for (int i = 0; i < 2 * args.tiles; ++i) barrier_begin(shared.full + i, 1);
      barriers_begun();
    }
    sync_block();
    if (thread_index() < kWarp && one_lane()) load(args, shared);

    float s[kN / 2], o[kD / 2];
    uint32_t p[kN / 16][4];
    FS_UNROLL
    for (int i = 0; i < kD / 2; ++i) o[i] = 0;
    multiply_by_k(s, shared, 0);
    wgmma_wait<0>(s);
    round(s, p);
    FS_NO_UNROLL
    for (int tile = 1; tile < args.tiles; ++tile) {
      multiply_by_k(s, shared, tile);
      multiply_by_v(o, p, shared, tile - 1);
      wgmma_wait<1>(s);
      wgmma_wait<0>(o, p);
      round(s, p);
    }
    multiply_by_v(o, p, shared, args.tiles - 1);
    wgmma_wait<0>(o, p);
    float* const own = own_elements<kD>(args.to);
    FS_UNROLL
    for (int i = 0; i < kD / 2; ++i) own[distance<kD>(i)] = o[i];
  }

  static FS_DEVICE void load(const Args& args, const Shared& shared) {
    for (int tile = 0; tile < args.tiles; ++tile) {
      PhaseBarrier* const full = shared.full + 2 * tile;
      barrier_expect(full, kKBytes + (tile == 0 ? kQBytes : 0));
      if (tile == 0) load_matrix(shared.q, args.q, full, 64, kQBytes);
      load_matrix(shared.k + tile * kKBytes, args.k, full, kN, kKBytes, tile * kN);
      barrier_expect(full + 1, kKBytes);
      load_matrix(shared.v + tile * kKBytes, args.v, full + 1, kN, kKBytes, tile * kN);
    }
  }

  // s = q k^T
  static FS_DEVICE void multiply_by_k(float (&s)[kN / 2], const Shared& shared, int tile) {
    const uint64_t q = operand_of_tiles<Major::k>(shared.q, 64);
    const uint64_t k = operand_of_tiles<Major::k>(shared.k + tile * kKBytes, kN);
    barrier_wait(shared.full + 2 * tile, 0);
    wgmma_fence(s);
    FS_UNROLL
    for (int step = 0; step < kD / 16; ++step) {
      wgmma<T, kN, Major::k, Major::k>(s, at_step<Major::k>(q, 64, step), at_step<Major::k>(k, kN, step),
                                       step > 0);
    }
    wgmma_commit();
  }

  // o += p v
  static FS_DEVICE void multiply_by_v(float (&o)[kD / 2], uint32_t (&p)[kN / 16][4], const Shared& shared,
                                      int tile) {
    const uint64_t v = operand_of_tiles<Major::mn>(shared.v + tile * kKBytes, kN);
    barrier_wait(shared.full + 2 * tile + 1, 0);
    wgmma_fence(o, p);
    FS_UNROLL
    for (int step = 0; step < kN / 16; ++step) {
      wgmma<T, kD, Major::mn>(o, p[step], at_step<Major::mn>(v, kN, step), true);
    }
    wgmma_commit();
  }

  static FS_DEVICE void round(const float (&s)[kN / 2], uint32_t (&p)[kN / 16][4]) {
    FS_UNROLL
    for (int i = 0; i < kN / 4; ++i) p[i / 4][i % 4] = pack(s[2 * i], s[2 * i + 1], T{});
  }
};

template <class T, int kN, int kD>
const char* run_products(const HopperTest& test) {
  using Kernel = ProductsKernel<T, kN, kD>;
  const int tiles = int(test.number[3]);
  typename Kernel::Args args = {{}, {}, {}, static_cast<float*>(test.to), tiles};
  if (const char* error = Matrix{test.from[0], 64, kD}.make_map(args.q)) return error;
  if (const char* error = Matrix{test.from[1], kN, kD}.make_map(args.k, tiles)) return error;
  if (const char* error = Matrix{test.from[2], kN, kD}.make_map(args.v, tiles)) return error;
  return launch<Kernel>({1, kWarpgroup, Kernel::shared_bytes(tiles), 1, false, test.stream}, args);
}

template <class T>
const char* run_products_of_type(const HopperTest& test) {
  const int64_t n = test.number[1], d = test.number[2];
  if (n == 192 && d == 64) return run_products<T, 192, 64>(test);
  if (n == 176 && d == 128) return run_products<T, 176, 128>(test);
  if (n == 80 && d == 256) return run_products<T, 80, 256>(test);
  return "these products are not compiled";
}

}  // namespace

const char* run_hopper_product(const std::string& name, const HopperTest& test) {
  const bool is_bfloat16 = test.number[0] == 0;
  if (name == "product") {
    return is_bfloat16 ? run_product_of_type<bfloat16>(test, AllN{})
                       : run_product_of_type<float16>(test, AllN{});
  }
  if (name == "products") {
    return is_bfloat16 ? run_products_of_type<bfloat16>(test) : run_products_of_type<float16>(test);
  }
  return "no such primitive";
}

}  // namespace fastseq::FASTSEQ_ISA
