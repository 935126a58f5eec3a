// A block's part of the product of one step: weights that stand still times an operand in shared memory.
//
// Warp w has the rows of tiles im = w % warps_m and the pairs ik = w / warps_m, ik + warps_k, ...; a lane of it has
// 16 bytes of each tile. Its units come in the order in which it uses them: the first kRegisterUnits are in
// registers, the next ones in shared memory, the rest is loaded one unit ahead, over the end of a step into the
// next, so that the first loads of a step are under way while the block waits for its operand.
#pragma once

#include "arithmetic.h"
#include "layout.h"

namespace fastseq::FASTSEQ_ISA {

template <class M, int N, int kRegisterUnits, bool kStreams>
class Product {
  using Element = typename M::Element;
  using Scalar = typename M::Scalar;
  using Pair = Vector16[2];
  static constexpr int kTiles = kMostTiles;

 public:
  // `tiles`: the block's packed weights in global memory; `shared`: room for layout.shared_units of each warp.
  FS_DEVICE void load_weights(const ProductLayout& layout, const Vector16* tiles, Vector16* shared) {
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    place_ = uint32_t(warp / layout.warps_m) << 16 | uint32_t(warp % layout.warps_m);
    shared_ = shared + int64_t(warp) * layout.shared_units * layout.unit_vectors() + lane;
    tiles_ = tiles + int64_t(warp) * layout.units() * layout.unit_vectors() + lane;
    if (warp / layout.warps_m >= layout.warps_k) return;
    FS_UNROLL
    for (int i = 0; i < kRegisterUnits; ++i) {
      if (i < layout.units()) load_unit(layout, i, registers_[i]);
    }
    for (int i = 0; i < layout.shared_units; ++i) {
      Vector16* const to = shared_ + i * layout.unit_vectors();
      const Vector16* const from = tiles_ + int64_t(kRegisterUnits + i) * layout.unit_vectors();
      for (int v = 0; v < layout.unit_vectors(); v += kWarp) copy_async(to + v, from + v);
    }
    copy_async_commit();
    copy_async_wait<0>();  // a lane reads only what it has copied itself
    if constexpr (kStreams) {
      if (first_streamed(layout) < layout.units()) load_unit(layout, first_streamed(layout), next_);
    }
  }

  // acquire(pass, chunk) gives the operand, the same to all threads, and may let the block meet;
  // take(slot, m, n, two) gets every sum once, those of n and n + 1 together.
  template <class Acquire, class Take>
  FS_DEVICE void run(const ProductLayout& layout, Acquire acquire, Take take) {
    const uint32_t place = as_new(place_);
    const int im = int(place & 0xffff), ik = int(place >> 16);
    const bool works = ik < layout.warps_k;
    FS_NO_UNROLL
    for (int pass = 0; pass < layout.passes; ++pass) {
      typename M::template Sums<N> sums[kTiles];
      FS_UNROLL
      for (auto& s : sums) M::clear(s);
      const int first = pass * layout.pairs;
      FS_NO_UNROLL
      for (int chunk = 0; chunk < layout.chunks; ++chunk) {
        const Element* const operand = acquire(pass, chunk);
        const int begin = first + chunk * layout.chunk_pairs;
        const int end = first + (chunk + 1 < layout.chunks ? (chunk + 1) * layout.chunk_pairs : layout.pairs);
        if (works) multiply(layout, ik, begin, end, operand, sums);
      }
      if (!works) continue;
      FS_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        const int tile = (pass * layout.warps_m + im) * layout.tiles + t;
        if (t >= layout.tiles || tile >= layout.m_tiles) break;
        M::finish(sums[t], [&](int row, int n, Two<Scalar> two) { take(ik, tile * 16 + row, n, two); });
      }
    }
  }

 private:
  FS_DEVICE int first_streamed(const ProductLayout& layout) const {
    return kRegisterUnits + layout.shared_units;
  }

  FS_DEVICE void load_unit(const ProductLayout& layout, int unit, Pair (&to)[kTiles]) const {
    const Vector16* const from = tiles_ + int64_t(unit) * layout.unit_vectors();
    FS_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      if (t >= layout.tiles) break;
      FS_UNROLL
      for (int half = 0; half < 2; ++half) to[t][half] = load_constant(from + (t * 2 + half) * kTileVectors);
    }
  }

  // Units [begin, end), whose pairs are warps_k apart in the operand.
  FS_DEVICE void multiply(const ProductLayout& layout, int ik, int begin, int end, const Element* operand,
                          typename M::template Sums<N> (&sums)[kTiles]) {
    // The operand of the next unit is on its way while this one is multiplied, where it takes few registers.
    typename M::template Operand<N> next;
    const auto load = [&](typename M::template Operand<N>& o, int i) {
      M::load(o, operand, layout.chunk_line_stride, ik + (i - begin) * layout.warps_k);
    };
    if constexpr (M::kTensor) load(next, begin);
    const auto unit = [&](int i, const Pair(&a)[kTiles]) {
      typename M::template Operand<N> o;
      if constexpr (M::kTensor) {
        o = next;
        if (i + 1 < end) load(next, i + 1);
      } else {
        load(o, i);
      }
      FS_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        if (t < layout.tiles) M::multiply(sums[t], a[t], o);
      }
    };
    FS_UNROLL
    for (int i = 0; i < kRegisterUnits; ++i) {
      if (begin <= i && i < end) unit(i, registers_[i]);
    }
    int i = begin < kRegisterUnits ? kRegisterUnits : begin;
    const int shared_end = end < first_streamed(layout) ? end : first_streamed(layout);
    FS_NO_UNROLL
    for (; i < shared_end; ++i) {
      const Vector16* const from = shared_ + (i - kRegisterUnits) * layout.unit_vectors();
      Pair a[kTiles];
      FS_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        if (t >= layout.tiles) break;
        FS_UNROLL
        for (int half = 0; half < 2; ++half) a[t][half] = from[(t * 2 + half) * kTileVectors];
      }
      unit(i, a);
    }
    if constexpr (kStreams) {
      FS_NO_UNROLL
      for (; i < end; ++i) {
        Pair a[kTiles];
        FS_UNROLL
        for (int t = 0; t < kTiles; ++t) {
          FS_UNROLL
          for (int half = 0; half < 2; ++half) a[t][half] = next_[t][half];
        }
        load_unit(layout, i + 1 < layout.units() ? i + 1 : first_streamed(layout), next_);
        unit(i, a);
      }
    }
  }

  uint32_t place_;         // ik and im, of 16 bits each; see as_new()
  Vector16* shared_;       // this lane's place in the warp's units
  const Vector16* tiles_;  // likewise
  Pair registers_[kRegisterUnits][kTiles];
  Pair next_[kTiles];
};

}  // namespace fastseq::FASTSEQ_ISA
