// Which rows a step has, and which values of a step a thread works on.
//
// The items of a block are its units times the rows of its batch tile, units first, so that neighbouring lanes read
// neighbouring addresses. A thread has kAhead of them at a time; it loads what the first ones need one step ahead,
// and stores what they made after it has told the other blocks that its part of the operand is there, since a
// barrier waits for the stores before it.
#pragma once

#include "cells.h"
#include "step_engine.h"

namespace fastseq::FASTSEQ_ISA {

constexpr int kAhead = 2;

FS_DEVICE StepRows rows_of(const LoopKernelArgs& args, int64_t t) {
  if (t < 0 || t >= args.loop.shape.steps) return {t, 0, 0};
  if (!args.loop.shape.batch_sizes) return {t, t * args.loop.shape.batch, args.loop.shape.batch};
  const auto* const offsets = reinterpret_cast<const int64_t*>(
      static_cast<const unsigned char*>(args.loop.workspace) + args.layout.offsets_at);
  return {t, offsets[t], offsets[t + 1] - offsets[t]};
}

// Whether a row has a step.
FS_DEVICE bool has_step(const int64_t* lengths, const StepRows& step, int64_t row) {
  return row < step.rows && (!lengths || step.t < lengths[row]);
}

// Bounds a gradient from both sides; NaN stays NaN. The tangent of what is bounded is zero.
template <class T>
struct Clip {
  T bound;
  FS_DEVICE T operator()(T x) const { return x > bound ? bound : x < -bound ? -bound : x; }
  FS_DEVICE Dual<T> operator()(Dual<T> x) const {
    const bool bounded = x.value > bound || x.value < -bound;
    return {(*this)(x.value), bounded ? T(0) : x.tangent};
  }
};

// A unit of a row. `inside`: both exist.
struct Item {
  int u, n;  // of the block, of the tile
  int unit;
  int64_t row;
  bool inside;
};

// The items of a block: `units` of it times the rows of the tile, of `all_units` there are in the layer.
template <int kRows>
struct Items {
  int units, all_units, rank;
  int64_t first_row, batch;
  // Those of the first round, which in most layouts is the only one: n and u, as numbers of 16 bits. What follows from
  // them is made anew each time, since it would stay in registers over the product.
  uint32_t first[kAhead];

  FS_DEVICE Items(int units, int all_units, int rank, int64_t first_row, int64_t batch)
      : units(units), all_units(all_units), rank(rank), first_row(first_row), batch(batch) {
    FS_UNROLL
    for (int a = 0; a < kAhead; ++a) {
      const int i = thread_index() + a * thread_count();
      first[a] = uint32_t(i / units) << 16 | uint32_t(i % units);
    }
  }
  FS_DEVICE int count() const { return units * kRows; }
  FS_DEVICE Item at(int i) const {
    const int n = i / units;
    return place(i - n * units, n);
  }
  FS_DEVICE Item place(int u, int n) const {
    const int unit = rank * units + u;
    const int64_t row = first_row + n;
    return {u, n, unit, row, unit < all_units && row < batch};
  }
  // body(item) for all of the thread's items.
  template <class Body>
  FS_DEVICE void for_all(Body body) const {
    for (int i = thread_index(); i < count(); i += thread_count()) body(at(i));
  }
  // body(a, item) for the thread's items of the round that begins with item `begin`.
  template <class Body>
  FS_DEVICE void for_each(int begin, Body body) const {
    FS_UNROLL
    for (int a = 0; a < kAhead; ++a) {
      const int i = begin + thread_index() + a * thread_count();
      if (i >= count()) continue;
      const uint32_t known = as_new(first[a]);
      body(a, begin == 0 ? place(known & 0xffff, known >> 16) : at(i));
    }
  }
};

// Address of row 0 of a step in a [T, B, features] tensor, and the elements between rows, as in the contract.
template <class S, class Pointer>
FS_DEVICE S* row_at(const SequenceTensor<Pointer>& tensor, bool packed, const StepRows& step, int64_t row) {
  const int64_t before =
      packed ? (step.offset + row) * tensor.stride[1] : step.t * tensor.stride[0] + row * tensor.stride[1];
  return static_cast<S*>(tensor.data) + before;
}

// x as it will be read back from storage.
template <class S, class T>
FS_DEVICE T rounded(T x) {
  S stored;
  narrow(x, stored);
  return T(widen(stored));
}

// What was loaded stays as it is stored until it is used: a conversion would wait for the load.
template <class T, int n, class S>
FS_DEVICE void widen_all(const S (&stored)[n], T (&x)[n]) {
  FS_UNROLL
  for (int i = 0; i < n; ++i) x[i] = T(widen(stored[i]));
}

template <class S, class T>
FS_DEVICE void keep(S* p, T x) {
  S stored;
  narrow(x, stored);
  store_once(p, stored);
}

}  // namespace fastseq::FASTSEQ_ISA
