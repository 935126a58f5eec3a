// One step of a cell between matrix products, for the *Cell modules and for layers whose products are too large to
// stand still (plan "steps").
//
// CellKernel, CellGradKernel: a thread makes a unit of a row. Bound by memory: a step reads (2 G + 2) B H elements
// and writes up to (slots + 2) B H, 0.3 us for an LSTM of H = 512, B = 64 in bfloat16 at 4.8 TB/s; a launch takes
// longer. 39 to 56 registers, no shared memory.
//
// FusedCellKernel: U h as well, for few rows, where a product of its own would be one more launch. A warp makes all
// gates of a unit for all rows; its lanes share k, so that the rows of U are read once, in order, G H^2 elements in
// all (2 MB, 0.5 us from L2, for an LSTM of H = 512 in bfloat16), and h from the first-level cache. 80 registers.
#pragma once

#include <prim.h>

#include "cells.h"
#include "recurrent_items.h"

namespace fastseq::FASTSEQ_ISA {

template <class S>
using ScalarOf = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class S>
FS_DEVICE ScalarOf<S> read(const void* tensor, int64_t at) {
  return tensor ? ScalarOf<S>(widen(static_cast<const S*>(tensor)[at])) : ScalarOf<S>(0);
}
template <class S>
FS_DEVICE void write(void* tensor, int64_t at, ScalarOf<S> value) {
  if (tensor) keep(static_cast<S*>(tensor) + at, value);
}

// What follows the product, for one unit of one row; u holds the gates of the part, without bias.
template <class S>
FS_DEVICE void finish_step(const CellStepArgs& a, int64_t row, int64_t unit, ScalarOf<S>* u) {
  using T = ScalarOf<S>;
  const int64_t hidden = a.hidden_size, at = row * hidden + unit;
  T x[kMostGates];
  const auto add_bias = [&](int first, int gates) {
    FS_UNROLL
    for (int g = 0; g < kMostGates; ++g) {
      if (g < first || g >= gates) continue;
      x[g] = read<S>(a.pre, row * a.pre_stride + g * hidden + unit);
      u[g] += read<S>(a.bias_hh, g * hidden + unit);
    }
  };
  const auto put_h = [&](T h) {
    write<S>(a.h_next, at, h);
    write<S>(a.output, row * a.output_stride + unit, h);
  };
  const auto put_saved = [&](int slots, int i, T value) {
    if (a.saved) write<S>(a.saved, (row * slots + i) * hidden + unit, value);
  };
  const T h = read<S>(a.h, at);
  if (a.cell == CellKind::kGruResetBefore) {
    using C = GRUResetBefore<T>;
    T saved[C::kSaved];
    if (a.part == StepPart::kFirst) {
      T operand = 0;
      add_bias(0, C::kFirstGates);
      C::first(x, u, h, saved, operand);
      for (int i = 0; i < C::kFirstGates; ++i) put_saved(C::kSaved, i, saved[i]);
      put_h(operand);
    } else {
      T h_next = 0, unused = 0;
      add_bias(C::kFirstGates, C::kGates);
      saved[C::Z] = read<S>(a.saved, (row * C::kSaved + C::Z) * hidden + unit);
      C::step(x, u, h, T(0), saved, h_next, unused);
      put_saved(C::kSaved, C::N, saved[C::N]);
      put_h(h_next);
    }
    return;
  }
  with_cell<T, 1>(a.cell, [&](auto cell) {
    using C = decltype(cell);
    constexpr int kSlots = C::kSaved + C::kCellState;
    T saved[C::kSaved + 1], h_next = 0, c_next = 0;
    add_bias(0, C::kGates);
    take_step<C>(x, u, h, C::kCellState ? read<S>(a.c, at) : T(0), saved, h_next, c_next);
    if constexpr (C::kCellState) {
      saved[C::kSaved] = c_next;
      write<S>(a.c_next, at, c_next);
    }
    FS_UNROLL
    for (int i = 0; i < kSlots; ++i) put_saved(kSlots, i, saved[i]);
    put_h(h_next);
  });
}

template <class S>
struct CellKernel {
  using Args = CellStepArgs;
  static constexpr int kThreads = 256;
  static FS_DEVICE void run(const Args& a) {
    const bool reset_before = a.cell == CellKind::kGruResetBefore;
    const int gates = a.cell == CellKind::kLstm ? 4 : a.cell == CellKind::kGru || reset_before ? 3 : 1;
    const int first = a.part == StepPart::kRest ? 2 : 0, last = a.part == StepPart::kFirst ? 2 : gates;
    const int64_t all = a.batch * a.hidden_size;
    for (int64_t i = int64_t(block_index()) * thread_count() + thread_index(); i < all;
         i += int64_t(block_count()) * thread_count()) {
      const int64_t row = i / a.hidden_size, unit = i % a.hidden_size;
      ScalarOf<S> u[kMostGates] = {};
      FS_UNROLL
      for (int g = 0; g < kMostGates; ++g) {
        if (g < first || g >= last) continue;
        u[g] = read<S>(a.product, (row * (last - first) + g - first) * a.hidden_size + unit);
      }
      finish_step<S>(a, row, unit, u);
    }
  }
};

template <class S>
struct FusedCellKernel {
  using Args = CellStepArgs;
  using T = ScalarOf<S>;
  static constexpr int kThreads = 256, kRows = kMostFusedRows;
  static FS_DEVICE void run(const Args& a) {
    const int lane = thread_index() % kWarp;
    const int64_t unit = int64_t(block_index()) * (thread_count() / kWarp) + thread_index() / kWarp;
    if (unit >= a.hidden_size) return;
    with_cell<T, 1>(a.cell, [&](auto cell) {
      constexpr int kGates = decltype(cell)::kGates;
      const auto* const weight = static_cast<const S*>(a.weight_hh);
      T sums[kGates * kRows] = {};
      for (int64_t k = lane; k < a.hidden_size; k += kWarp) {
        T w[kGates];
        FS_UNROLL
        for (int g = 0; g < kGates; ++g) {
          w[g] = T(widen(weight[(g * a.hidden_size + unit) * a.hidden_size + k]));
        }
        FS_UNROLL
        for (int row = 0; row < kRows; ++row) {
          if (row >= a.batch) break;
          const T h = read<S>(a.h, row * a.hidden_size + k);
          FS_UNROLL
          for (int g = 0; g < kGates; ++g) sums[g * kRows + row] = fma(w[g], h, sums[g * kRows + row]);
        }
      }
      FS_UNROLL
      for (T& sum : sums) {
        FS_UNROLL
        for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      }
      FS_UNROLL
      for (int row = 0; row < kRows; ++row) {
        if (row != lane || row >= a.batch) continue;
        T u[kMostGates] = {};
        FS_UNROLL
        for (int g = 0; g < kGates; ++g) u[g] = sums[g * kRows + row];
        finish_step<S>(a, row, unit, u);
      }
    });
  }
};

template <class S>
struct CellGradKernel {
  using Args = CellGradArgs;
  using T = ScalarOf<S>;
  static constexpr int kThreads = 256;
  static FS_DEVICE void run(const Args& a) {
    const int64_t all = a.batch * a.hidden_size;
    for (int64_t i = int64_t(block_index()) * thread_count() + thread_index(); i < all;
         i += int64_t(block_count()) * thread_count()) {
      gradients(a, i / a.hidden_size, i % a.hidden_size);
    }
  }

 private:
  static FS_DEVICE void gradients(const Args& a, int64_t row, int64_t unit) {
    const int64_t hidden = a.hidden_size, at = row * hidden + unit;
    T dh = 0;
    FS_UNROLL
    for (int i = 0; i < 2; ++i)
      dh += read<S>(a.grad[i], row * a.grad_stride[i] + unit * a.grad_unit_stride[i]);
    const T previous = read<S>(a.previous, row * a.previous_stride + unit);
    const auto saved_at = [&](int slots, int i) {
      return read<S>(a.saved, (row * slots + i) * hidden + unit);
    };
    const auto put = [&](int gate, T d) {
      write<S>(a.grad_pre, row * a.grad_pre_stride + gate * hidden + unit, d);
    };
    if (a.cell == CellKind::kGruResetBefore) {
      using C = GRUResetBefore<T>;
      T saved[C::kSaved], d[C::kGrads] = {}, direct = 0, unused = 0;
      for (int slot = 0; slot < C::kSaved; ++slot) saved[slot] = saved_at(C::kSaved, slot);
      if (a.part == StepPart::kFirst) {
        C::step_grad(saved, previous, T(0), T(0), T(0), dh, T(0), d, direct, unused);
        put(C::Z, d[C::Z]);
        put(C::N, d[C::N]);
      } else {
        direct = read<S>(a.direct, at);
        C::first_grad(saved, previous, dh, d, direct, unused);
        put(C::R, d[C::R]);
      }
      write<S>(a.direct, at, direct);
      return;
    }
    with_cell<T, 1>(a.cell, [&](auto cell) {
      using C = decltype(cell);
      constexpr int kSlots = C::kSaved + C::kCellState;
      T saved[kSlots + 1] = {}, d[C::kGrads], direct = 0, dc = 0;
      for (int slot = 0; slot < kSlots; ++slot) saved[slot] = saved_at(kSlots, slot);
      C::step_grad(saved, previous, previous, previous, saved[C::kCellState ? C::kSaved : 0], dh,
                   C::kCellState ? read<S>(a.grad_c, at) : T(0), d, direct, dc);
      for_constants<C::kGates>([&](auto g) {
        constexpr int kGrad = C::kInputGrad[g];
        put(g, d[kGrad]);
      });
      if constexpr (C::kGrads > C::kGates) write<S>(a.grad_candidate, at, d[C::kGates]);
      if constexpr (C::kDirect) write<S>(a.direct, at, direct);
      if constexpr (C::kCellState) write<S>(a.grad_c_previous, at, dc);
    });
  }
};

}  // namespace fastseq::FASTSEQ_ISA
