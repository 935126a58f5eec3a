// One step of a cell between matrix products, of all directions at the same time: for the *Cell modules, and for
// layers whose products are too large to stand still (plan "steps").
//
// CellKernel, CellGradKernel: a thread makes a unit of a row. Bound by memory: a step reads (2 G + 2) B H elements
// and writes up to (slots + 2) B H, 0.3 us for an LSTM of H = 512, B = 64 in bfloat16 at 4.8 TB/s; a launch takes
// longer. 50 to 70 registers, no shared memory.
//
// FusedCellKernel: U h as well, for few rows, where a product of its own would be one more launch. A warp makes all
// gates of a unit for all rows; its lanes share k, so that the rows of U are read once, in order, G H^2 elements in
// all (2 MB, 0.5 us from L2, for an LSTM of H = 512 in bfloat16), and h from the first-level cache. No load waits for
// a branch or for the one before. For 8 rows a lane has G H / 4 multiply-adds, 512 cycles at H = 512, where there is
// one warp for each sub-core. 95 to 106 registers, 128 in float64.
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
// What the next product reads, or the next step.
template <class S>
FS_DEVICE void write(void* tensor, int64_t at, ScalarOf<S> value) {
  if (tensor) narrow(value, static_cast<S*>(tensor)[at]);
}
// States between steps, which may be wide.
template <class S>
FS_DEVICE ScalarOf<S> read_state(bool wide, const void* state, int64_t at) {
  if (!wide || !state) return read<S>(state, at);
  return static_cast<const ScalarOf<S>*>(state)[at];
}
template <class S>
FS_DEVICE void write_state(bool wide, void* state, int64_t at, ScalarOf<S> value) {
  if (!wide || !state) return write<S>(state, at, value);
  static_cast<ScalarOf<S>*>(state)[at] = value;
}
// What lies until the backward pass.
template <class S>
FS_DEVICE void leave(void* tensor, int64_t at, ScalarOf<S> value) {
  if (tensor) keep(static_cast<S*>(tensor) + at, value);
}

// Rows of the direction that has most of them.
template <class Args>
FS_DEVICE int64_t most_rows(const Args& a) {
  const int64_t rows = a.direction[0].now.rows, others = a.directions == 2 ? a.direction[1].now.rows : 0;
  return rows > others ? rows : others;
}

// body(direction, row, unit) for the thread's share of them; rows that the direction does not have too.
template <class Args, class Body>
FS_DEVICE void for_units(const Args& a, Body body) {
  const int64_t of_direction = most_rows(a) * a.hidden_size;
  for (int64_t i = int64_t(block_index()) * thread_count() + thread_index(); i < a.directions * of_direction;
       i += int64_t(block_count()) * thread_count()) {
    const int direction = i >= of_direction;
    const int64_t j = i - direction * of_direction;
    body(direction, j / a.hidden_size, j % a.hidden_size);
  }
}

// What follows the product, for one unit of one row; u holds the gates of the part, without bias.
template <class S>
FS_DEVICE void finish_step(const CellStepArgs& a, int direction, int64_t row, int64_t unit, ScalarOf<S>* u) {
  using T = ScalarOf<S>;
  const CellStepDirection& d = a.direction[direction];
  const int64_t hidden = a.hidden_size, at = row * hidden + unit, of_all = d.now.offset + row;
  T x[kMostGates];
  const auto read_gates = [&](int first, int last, int gates) {
    const int64_t from = (of_all * a.directions + direction) * gates * hidden + unit;
    FS_UNROLL
    for (int g = 0; g < kMostGates; ++g) {
      if (g < first || g >= last) continue;
      x[g] = read<S>(a.pre, from + g * hidden);
      u[g] += read<S>(d.bias_hh, g * hidden + unit);
    }
  };
  const auto put_saved = [&](int slots, int i, T value) {
    leave<S>(d.saved, (of_all * slots + i) * hidden + unit, value);
  };
  const auto put_h = [&](T h) {
    write<S>(d.h_next, at, h);
    if (a.output.data) keep(row_at<S>(a.output, a.packed, d.now, row) + direction * hidden + unit, h);
  };
  if (a.cell == CellKind::kLstm && a.part == StepPart::kRest) {
    put_h(u[0]);
    return;
  }
  const T h = read<S>(d.h, at);
  if (a.cell == CellKind::kGruResetBefore) {
    using C = GRUResetBefore<T>;
    T saved[C::kSaved];
    if (a.part == StepPart::kFirst) {
      T operand = 0;
      read_gates(0, C::kFirstGates, C::kGates);
      C::first(x, u, h, saved, operand);
      for (int i = 0; i < C::kFirstGates; ++i) put_saved(C::kSaved, i, saved[i]);
      write_state<S>(a.wide, d.c_next, at, saved[C::Z]);
      put_h(operand);
    } else {
      T h_next = 0, unused = 0;
      read_gates(C::kFirstGates, C::kGates, C::kGates);
      saved[C::Z] = read_state<S>(a.wide, d.c, at);
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
    read_gates(0, C::kGates, C::kGates);
    take_step<C>(x, u, h, C::kCellState ? read_state<S>(a.wide, d.c, at) : T(0), saved, h_next, c_next);
    if constexpr (C::kCellState) {
      saved[C::kSaved] = c_next;
      write_state<S>(a.wide, d.c_next, at, c_next);
    }
    if (a.saves_states) {
      if constexpr (C::kCellState) put_saved(1, 0, c_next);
    } else {
      FS_UNROLL
      for (int i = 0; i < kSlots; ++i) put_saved(kSlots, i, saved[i]);
    }
    put_h(h_next);
  });
}

template <class S>
struct CellKernel {
  using Args = CellStepArgs;
  static constexpr int kThreads = 256;
  static FS_DEVICE void run(const Args& a) {
    const bool lstm = a.cell == CellKind::kLstm, reset_before = a.cell == CellKind::kGruResetBefore;
    const int gates = lstm ? 4 : a.cell == CellKind::kGru || reset_before ? 3 : 1;
    const bool rest = a.part == StepPart::kRest;
    const int first = rest && reset_before ? 2 : 0;
    const int last = reset_before && !rest ? 2 : rest && lstm ? 1 : gates;
    for_units(a, [&](int direction, int64_t row, int64_t unit) {
      const CellStepDirection& d = a.direction[direction];
      if (!has_step(a.lengths, d.now, row)) return;
      ScalarOf<S> u[kMostGates] = {};
      FS_UNROLL
      for (int g = 0; g < kMostGates; ++g) {
        if (g < first || g >= last) continue;
        u[g] = read<S>(d.product, (row * (last - first) + g - first) * a.hidden_size + unit);
      }
      finish_step<S>(a, direction, row, unit, u);
    });
  }
};

// sums[g][row] += the lane's share of U's row of gate g times h's row; kVector elements of k are read at a time.
template <class S, int kVector, int kGates, int kRows, class T>
FS_DEVICE void add_products(const CellStepArgs& a, int64_t unit, T (&sums)[kGates][kRows]) {
  struct alignas(kVector * sizeof(S)) Piece {
    S element[kVector];
  };
  const int64_t hidden = a.hidden_size;
  const auto piece = [](const void* tensor, int64_t at) {
    return *reinterpret_cast<const Piece*>(static_cast<const S*>(tensor) + at);
  };
  const int rows = int(a.direction[0].now.rows);
  FS_NO_UNROLL
  for (int64_t k = thread_index() % kWarp * kVector; k < hidden; k += kWarp * kVector) {
    Piece weight[kGates], h[kRows];
    FS_UNROLL
    for (int g = 0; g < kGates; ++g) weight[g] = piece(a.weight_hh, (g * hidden + unit) * hidden + k);
    // Of a row that is not there the last one, so that no load waits for a branch.
    FS_UNROLL
    for (int row = 0; row < kRows; ++row) {
      h[row] = piece(a.direction[0].h, (row < rows ? row : rows - 1) * hidden + k);
    }
    FS_UNROLL
    for (int i = 0; i < kVector; ++i) {
      FS_UNROLL
      for (int g = 0; g < kGates; ++g) {
        FS_UNROLL
        for (int row = 0; row < kRows; ++row) {
          sums[g][row] = fma(T(widen(weight[g].element[i])), T(widen(h[row].element[i])), sums[g][row]);
        }
      }
    }
  }
}

template <class S>
struct FusedCellKernel {
  using Args = CellStepArgs;
  using T = ScalarOf<S>;
  // Few warps a block, so that a small layer has blocks for all multiprocessors.
  static constexpr int kThreads = 64, kVector = 8 / sizeof(S);
  static FS_DEVICE void run(const Args& a) {
    const int64_t unit = int64_t(block_index()) * (thread_count() / kWarp) + thread_index() / kWarp;
    if (unit >= a.hidden_size) return;
    const auto address =
        reinterpret_cast<uintptr_t>(a.weight_hh) | reinterpret_cast<uintptr_t>(a.direction[0].h);
    const bool vectors = address % 8 == 0 && a.hidden_size % kVector == 0;
    with_cell<T, 1>(a.cell, [&](auto cell) {
      if (a.direction[0].now.rows == 1) {
        multiply_and_finish<decltype(cell)::kGates, 1>(a, unit, vectors);
      } else {
        multiply_and_finish<decltype(cell)::kGates, kMostFusedRows>(a, unit, vectors);
      }
    });
  }

 private:
  template <int kGates, int kRows>
  static FS_DEVICE void multiply_and_finish(const Args& a, int64_t unit, bool vectors) {
    T sums[kGates][kRows] = {};
    if (vectors) {
      add_products<S, kVector>(a, unit, sums);
    } else {
      add_products<S, 1>(a, unit, sums);
    }
    FS_UNROLL
    for (auto& gate : sums) {
      FS_UNROLL
      for (T& sum : gate) {
        FS_UNROLL
        for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      }
    }
    FS_UNROLL
    for (int row = 0; row < kRows; ++row) {
      if (row != thread_index() % kWarp || row >= a.direction[0].now.rows) continue;
      T u[kMostGates] = {};
      FS_UNROLL
      for (int g = 0; g < kGates; ++g) u[g] = sums[g][row];
      finish_step<S>(a, 0, row, unit, u);
    }
  }
};

template <class S>
struct CellGradKernel {
  using Args = CellGradArgs;
  using T = ScalarOf<S>;
  static constexpr int kThreads = 256;
  static FS_DEVICE void run(const Args& a) {
    for_units(a, [&](int direction, int64_t row, int64_t unit) { Unit(a, direction, row, unit).run(); });
  }

 private:
  struct Unit {
    const Args& a;
    const CellGradDirection& d;
    const int direction;
    const int64_t row, unit, hidden, at, of_all;
    const bool active, before,
        resets;  // before: whether the row has the step before; resets: its states are zero

    FS_DEVICE Unit(const Args& a, int direction, int64_t row, int64_t unit)
        : a(a),
          d(a.direction[direction]),
          direction(direction),
          row(row),
          unit(unit),
          hidden(a.hidden_size),
          at(row * hidden + unit),
          of_all(d.now.offset + row),
          active(has_step(a.lengths, d.now, row)),
          before(has_step(a.lengths, d.before, row)),
          resets(active && before && a.resets &&
                 a.resets[(d.before.t > d.now.t ? d.before : d.now).offset + row]) {}

    FS_DEVICE void run() const {
      if (a.cell == CellKind::kLstm && a.part == StepPart::kFirst) {
        projected();
      } else if (a.cell == CellKind::kGruResetBefore) {
        reset_before();
      } else {
        with_cell<T, 1>(a.cell, [&](auto cell) { whole<decltype(cell)>(); });
      }
    }

    // ---- what a unit reads ----

    FS_DEVICE T output(const StepRows& step) const {
      return T(widen(row_at<const S>(a.output, a.packed, step, row)[direction * hidden + unit]));
    }
    FS_DEVICE T h_before() const { return resets ? T(0) : before ? output(d.before) : read<S>(d.h0, at); }
    FS_DEVICE T saved(const StepRows& step, int slots, int i) const {
      return read<S>(d.saved, ((step.offset + row) * slots + i) * hidden + unit);
    }
    FS_DEVICE T grad_of_state() const { return read_state<S>(a.wide, d.grad, at) + read<S>(d.product, at); }
    FS_DEVICE Clip<T> clip() const { return {T(a.grad_clip)}; }
    FS_DEVICE T grad_h() const {
      T dh = grad_of_state();
      if (a.grad_output.data) {
        const S* const from = row_at<const S>(a.grad_output, a.packed, d.now, row);
        dh += T(widen(from[(direction * hidden + unit) * a.grad_output.stride[2]]));
      }
      return d.grad ? clip()(dh) : dh;
    }

    // ---- what it leaves ----

    FS_DEVICE void put_pre(int gates, int gate, T value) const {
      leave<S>(a.grad_pre, ((of_all * a.directions + direction) * gates + gate) * hidden + unit, value);
    }
    FS_DEVICE void put_product(int gates, int gate, T value) const {
      write<S>(d.grad_product, (row * gates + gate) * hidden + unit, value);
    }
    FS_DEVICE void put_direct(T value) const { write_state<S>(a.wide, d.direct, at, value); }
    FS_DEVICE void put_previous() const {
      if (d.previous) leave<S>(d.previous, of_all * hidden + unit, h_before());
    }

    FS_DEVICE void projected() const {
      const T dh = active ? grad_h() : T(0);
      put_product(1, 0, dh);
      put_direct(active ? T(0) : grad_of_state());
      if (!active) return;
      leave<S>(d.grad_hidden, of_all * hidden + unit, dh);
      put_previous();
    }

    FS_DEVICE void reset_before() const {
      using C = GRUResetBefore<T>;
      T of_gates[C::kSaved], grads[C::kGrads] = {};
      const bool first = a.part == StepPart::kFirst;
      if (active) {
        for (int slot = 0; slot < C::kSaved; ++slot) of_gates[slot] = saved(d.now, C::kSaved, slot);
        const T h = h_before();
        T direct = 0, unused = 0;
        if (first) {
          C::step_grad(of_gates, h, T(0), T(0), T(0), grad_h(), T(0), grads, direct, unused);
          put_previous();
        } else {
          direct = read_state<S>(a.wide, d.direct, at);
          C::first_grad(of_gates, h, grad_h(), grads, direct, unused);
        }
        put_direct(direct);
      } else if (first) {
        put_direct(grad_of_state());
      }
      for_constants<C::kGates>([&](auto gate) {
        if ((gate == C::R) == first) return;
        if (active) put_pre(C::kGates, gate, grads[gate]);
        put_product(C::kGates, gate, grads[gate]);
      });
    }

    template <class C>
    FS_DEVICE void whole() const {
      constexpr int kSlots = C::kSaved + C::kCellState;
      T of_gates[kSlots + 1] = {}, grads[C::kGrads] = {};
      if (active) {
        for (int slot = 0; slot < kSlots; ++slot) of_gates[slot] = saved(d.now, kSlots, slot);
        // c before an LSTM's step, h before a GRU's, h after an RNN's, which saves nothing else.
        const T state = C::kCellState && resets   ? T(0)
                        : C::kCellState && before ? saved(d.before, kSlots, C::kSaved)
                        : C::kCellState           ? read<S>(d.c0, at)
                        : kSlots == 0             ? output(d.now)
                                                  : h_before();
        T direct = 0, dc = 0;
        C::step_grad(of_gates, state, state, state, of_gates[C::kCellState ? C::kSaved : 0], grad_h(),
                     C::kCellState ? read_state<S>(a.wide, d.grad_c, at) : T(0), grads, direct, dc, clip());
        for_constants<C::kGates>([&](auto gate) {
          constexpr int kGrad = C::kInputGrad[gate];
          put_pre(C::kGates, gate, grads[kGrad]);
        });
        if constexpr (C::kGrads > C::kGates) {
          leave<S>(d.grad_candidate, of_all * hidden + unit, grads[C::kGates]);
        }
        put_direct(direct);
        if constexpr (C::kCellState) write_state<S>(a.wide, d.grad_c_previous, at, dc);
        put_previous();
      } else if (d.direct) {
        put_direct(grad_of_state());
      }
      for_constants<C::kGates>([&](auto gate) {
        constexpr int kGrad = C::kRecurrentGrad[gate];
        put_product(C::kGates, gate, grads[kGrad]);
      });
    }
  };
};

}  // namespace fastseq::FASTSEQ_ISA
