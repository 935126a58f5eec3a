// One step of a cell between matrix products, of all directions at the same time: for the *Cell modules, for layers
// whose products are too large to stand still (plan "steps"), and for all over dual numbers.
//
// CellKernel, CellGradKernel: a thread makes a unit of a row. Bound by memory: a step reads (2 G + 2) B H elements
// and writes up to (slots + 2) B H, 0.3 us for an LSTM of H = 512, B = 64 in bfloat16 at 4.8 TB/s; a launch takes
// longer. What does not cross to the next step, for a reset or a cut, is written as zero. 53 to 76 registers, no shared
// memory.
//
// The same with CellStepDualArgs and CellGradDualArgs compute with numbers and their tangents, Dual of cells/dual.h, of a
// unit in one thread, so that the numbers are read and made once. Twice the bytes; where U has a tangent too, G B H more
// elements of products are read forward and G B H of their operand written backward. 0.6 us for the LSTM above, whose
// product is 0.27 GFLOP, or 0.40 with the tangent of U. 63 to 96 registers.
//
// FusedCellKernel: U h as well, for few rows, where a product of its own would be one more launch. A warp makes all
// gates of a unit for all rows; its lanes share k, so that the rows of U are read once, in order, G H^2 elements in
// all (2 MB, 0.5 us from L2, for an LSTM of H = 512 in bfloat16), and h from the first-level cache. No load waits for
// a branch or for the one before. For 8 rows a lane has G H / 4 multiply-adds, 512 cycles at H = 512, where there is
// one warp for each sub-core. 95 to 106 registers, 128 in float64.
#pragma once

#include "cell_tensors.h"

namespace fastseq::FASTSEQ_ISA {

// What follows the product, for one unit of one row; u holds the gates of the part, without bias.
template <class S, class Args>
FS_DEVICE void finish_step(const Args& a, int direction, int64_t row, int64_t unit, ValueOf<S, Args>* u) {
  using V = ValueOf<S, Args>;
  const CellStepDirection& d = a.direction[direction];
  const int64_t hidden = a.hidden_size, at = row * hidden + unit, of_all = d.now.offset + row;
  const int64_t of_operand = row * row_step(a) * hidden + unit;
  const Crossing to_next = crossing(a, d.now, d.next, d.truncated, row);
  V x[kMostGates];
  const auto tensors = [&](auto plane) -> const CellStepDirection& {
    return tensors_of<plane>(a).direction[direction];
  };
  const auto read_gates = [&](int first, int last, int gates) {
    const int64_t from = (of_all * a.directions + direction) * gates * hidden + unit;
    FS_UNROLL
    for (int g = 0; g < kMostGates; ++g) {
      if (g < first || g >= last) continue;
      x[g] = of_planes<V>([&](auto plane) { return read<S>(tensors_of<plane>(a).pre, from + g * hidden); });
      u[g] =
          u[g] + of_planes<V>([&](auto plane) { return read<S>(tensors(plane).bias_hh, g * hidden + unit); });
    }
  };
  const auto put_saved = [&](int slots, int i, V value) {
    each_plane(value, [&](auto plane, auto x) {
      leave<S>(tensors(plane).saved, (of_all * slots + i) * hidden + unit, x);
    });
  };
  const auto read_c = [&] {
    return of_planes<V>([&](auto plane) { return read_state<S>(a.wide, tensors(plane).c, at); });
  };
  const auto put_c = [&](V c) {
    each_plane(c, [&](auto plane, auto x) { write_state<S>(a.wide, tensors(plane).c_next, at, x); });
  };
  const auto put_h = [&](V h) {
    const V next = a.output.data ? crossed(h, to_next) : h;  // an operand stays in its step
    each_plane(next, [&](auto plane, auto x) { write<S>(tensors(plane).h_next, of_operand, x); });
    if constexpr (kHasTangents<Args>) write<S>(a.h_next_again[direction], of_operand, next.value);
    if (!a.output.data) return;
    each_plane(h, [&](auto plane, auto x) {
      keep(row_at<S>(tensors_of<plane>(a).output, a.packed, d.now, row) + direction * hidden + unit, x);
    });
  };
  if (a.cell == CellKind::kLstm && a.part == StepPart::kRest) {
    put_h(u[0]);
    return;
  }
  const V h = of_planes<V>([&](auto plane) { return read<S>(tensors(plane).h, of_operand); });
  if (a.cell == CellKind::kGruResetBefore) {
    using C = GRUResetBefore<V>;
    V saved[C::kSaved];
    if (a.part == StepPart::kFirst) {
      V operand = 0;
      read_gates(0, C::kFirstGates, C::kGates);
      C::first(x, u, h, saved, operand);
      for (int i = 0; i < C::kFirstGates; ++i) put_saved(C::kSaved, i, saved[i]);
      put_c(saved[C::Z]);
      put_h(operand);
    } else {
      V h_next = 0, unused = 0;
      read_gates(C::kFirstGates, C::kGates, C::kGates);
      saved[C::Z] = read_c();
      C::step(x, u, h, V(0), saved, h_next, unused);
      put_saved(C::kSaved, C::N, saved[C::N]);
      put_h(h_next);
    }
    return;
  }
  with_cell<V, 1>(a.cell, [&](auto cell) {
    using C = decltype(cell);
    constexpr int kSlots = C::kSaved + C::kCellState;
    V saved[C::kSaved + 1], h_next = 0, c_next = 0;
    read_gates(0, C::kGates, C::kGates);
    take_step<C>(x, u, h, C::kCellState ? read_c() : V(0), saved, h_next, c_next);
    if constexpr (C::kCellState) {
      saved[C::kSaved] = c_next;
      put_c(crossed(c_next, to_next));
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

template <class S, class Arguments>
struct CellKernel {
  using Args = Arguments;
  using V = ValueOf<S, Args>;
  static constexpr int kThreads = 256;
  static FS_DEVICE void run(const Args& a) {
    const bool lstm = a.cell == CellKind::kLstm, reset_before = a.cell == CellKind::kGruResetBefore;
    const int gates = lstm ? 4 : a.cell == CellKind::kGru || reset_before ? 3 : 1;
    const bool rest = a.part == StepPart::kRest;
    const int first = rest && reset_before ? 2 : 0;
    const int last = reset_before && !rest ? 2 : rest && lstm ? 1 : gates;
    for_units(a, [&](int direction, int64_t row, int64_t unit) {
      if (!has_step(a.lengths, a.direction[direction].now, row)) return;
      V u[kMostGates] = {};
      FS_UNROLL
      for (int g = 0; g < kMostGates; ++g) {
        if (g < first || g >= last) continue;
        const int64_t at = (row * row_step(a) * (last - first) + g - first) * a.hidden_size + unit;
        u[g] = of_planes<V>(
            [&](auto plane) { return read<S>(tensors_of<plane>(a).direction[direction].product, at); });
        if constexpr (kHasTangents<Args>) u[g].tangent += read<S>(a.product_of_weight_tangent[direction], at);
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

template <class S, class Arguments>
struct CellGradKernel {
  using Args = Arguments;
  using T = ScalarOf<S>;
  using V = ValueOf<S, Args>;
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
    const bool active, before;  // whether the row has this step, and the one before
    const Crossing to_before;

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
          to_before(active ? crossing(a, d.now, d.before, d.truncated, row) : Crossing{false, false}) {}

    FS_DEVICE void run() const {
      if (a.cell == CellKind::kLstm && a.part == StepPart::kFirst) {
        projected();
      } else if (a.cell == CellKind::kGruResetBefore) {
        reset_before();
      } else {
        with_cell<V, 1>(a.cell, [&](auto cell) { whole<decltype(cell)>(); });
      }
    }

    // ---- what a unit reads ----

    template <int plane>
    FS_DEVICE const CellGradDirection& tensors() const {
      return tensors_of<plane>(a).direction[direction];
    }
    FS_DEVICE V output(const StepRows& step) const {
      return of_planes<V>([&](auto plane) {
        return T(widen(
            row_at<const S>(tensors_of<plane>(a).output, a.packed, step, row)[direction * hidden + unit]));
      });
    }
    FS_DEVICE V h_before() const {
      if (before) return crossed(output(d.before), to_before);
      return of_planes<V>([&](auto plane) { return read<S>(tensors<plane>().h0, at); });
    }
    FS_DEVICE V c_before(int slots, int slot) const {
      if (before) return crossed(saved(d.before, slots, slot), to_before);
      return of_planes<V>([&](auto plane) { return read<S>(tensors<plane>().c0, at); });
    }
    FS_DEVICE V saved(const StepRows& step, int slots, int i) const {
      const int64_t from = ((step.offset + row) * slots + i) * hidden + unit;
      return of_planes<V>([&](auto plane) { return read<S>(tensors<plane>().saved, from); });
    }
    FS_DEVICE V grad_of_state() const {
      const int64_t of_product = row * row_step(a) * hidden + unit;
      V dh = of_planes<V>([&](auto plane) {
        return read_state<S>(a.wide, tensors<plane>().grad, at) +
               read<S>(tensors<plane>().product, of_product);
      });
      if constexpr (kHasTangents<Args>)
        dh.tangent += read<S>(a.product_of_weight_tangent[direction], of_product);
      return dh;
    }
    FS_DEVICE V grad_c() const {
      return of_planes<V>([&](auto plane) { return read_state<S>(a.wide, tensors<plane>().grad_c, at); });
    }
    FS_DEVICE Clip<T> clip() const { return {T(a.grad_clip)}; }
    FS_DEVICE V grad_h() const {
      const V of_output = of_planes<V>([&](auto plane) {
        const auto& grad_output = tensors_of<plane>(a).grad_output;
        if (!grad_output.data) return T(0);
        const S* const from = row_at<const S>(grad_output, a.packed, d.now, row);
        return T(widen(from[(direction * hidden + unit) * grad_output.stride[2]]));
      });
      const V dh = grad_of_state() + of_output;
      return d.grad ? clip()(dh) : dh;
    }

    // ---- what it leaves ----

    FS_DEVICE void put_pre(int gates, int gate, V value) const {
      each_plane(value, [&](auto plane, T x) {
        leave<S>(tensors_of<plane>(a).grad_pre,
                 ((of_all * a.directions + direction) * gates + gate) * hidden + unit, x);
      });
    }
    FS_DEVICE void put_product(int gates, int gate, V value) const {
      const int64_t to = (row * row_step(a) * gates + gate) * hidden + unit;
      each_plane(value, [&](auto plane, T x) { write<S>(tensors<plane>().grad_product, to, x); });
      if constexpr (kHasTangents<Args>) write<S>(a.grad_product_again[direction], to, value.value);
    }
    // What the step before takes is zero where it is cut.
    FS_DEVICE V to_step_before(V grad) const { return to_before.cut ? V(0) : grad; }
    FS_DEVICE void put_direct(V value) const {
      each_plane(value, [&](auto plane, T x) { write_state<S>(a.wide, tensors<plane>().direct, at, x); });
    }
    // The tensor, one of a direction, of all rows.
    FS_DEVICE void put_row(void* CellGradDirection::* tensor, V value) const {
      each_plane(value,
                 [&](auto plane, T x) { leave<S>(tensors<plane>().*tensor, of_all * hidden + unit, x); });
    }
    FS_DEVICE void put_previous() const {
      if (d.previous) put_row(&CellGradDirection::previous, h_before());
    }

    FS_DEVICE void projected() const {
      const V dh = active ? grad_h() : V(0);
      put_product(1, 0, dh);
      put_direct(active ? V(0) : grad_of_state());
      if (!active) return;
      put_row(&CellGradDirection::grad_hidden, dh);
      put_previous();
    }

    FS_DEVICE void reset_before() const {
      using C = GRUResetBefore<V>;
      V of_gates[C::kSaved], grads[C::kGrads] = {};
      const bool first = a.part == StepPart::kFirst;
      if (active) {
        for (int slot = 0; slot < C::kSaved; ++slot) of_gates[slot] = saved(d.now, C::kSaved, slot);
        const V h = h_before();
        V direct = 0, operand = 0;
        if (first) {
          C::step_grad(of_gates, h, V(0), V(0), V(0), grad_h(), V(0), grads, direct, operand);
          put_direct(direct);
          put_previous();
        } else {
          direct =
              of_planes<V>([&](auto plane) { return read_state<S>(a.wide, tensors<plane>().direct, at); });
          C::first_grad(of_gates, h, grad_h(), grads, direct, operand);
          put_direct(to_step_before(direct));
          put_row(&CellGradDirection::operand, operand);
        }
      } else if (first) {
        put_direct(grad_of_state());
      }
      for_constants<C::kGates>([&](auto gate) {
        if ((gate == C::R) == first) return;
        if (active) put_pre(C::kGates, gate, grads[gate]);
        put_product(C::kGates, gate, gate == C::N ? grads[gate] : to_step_before(grads[gate]));
      });
    }

    template <class C>
    FS_DEVICE void whole() const {
      constexpr int kSlots = C::kSaved + C::kCellState;
      V of_gates[kSlots + 1] = {}, grads[C::kGrads] = {};
      if (active) {
        for (int slot = 0; slot < kSlots; ++slot) of_gates[slot] = saved(d.now, kSlots, slot);
        // c before an LSTM's step, h before a GRU's, h after an RNN's, which saves nothing else.
        const V state = C::kCellState ? c_before(kSlots, C::kSaved)
                        : kSlots == 0 ? output(d.now)
                                      : h_before();
        V direct = 0, dc = 0;
        C::step_grad(of_gates, state, state, state, of_gates[C::kCellState ? C::kSaved : 0], grad_h(),
                     C::kCellState ? grad_c() : V(0), grads, direct, dc, clip());
        for_constants<C::kGates>([&](auto gate) {
          constexpr int kGrad = C::kInputGrad[gate];
          put_pre(C::kGates, gate, grads[kGrad]);
        });
        if constexpr (C::kGrads > C::kGates) put_row(&CellGradDirection::grad_candidate, grads[C::kGates]);
        put_direct(to_step_before(direct));
        if constexpr (C::kCellState) {
          each_plane(to_step_before(dc), [&](auto plane, T x) {
            write_state<S>(a.wide, tensors<plane>().grad_c_previous, at, x);
          });
          if (d.operand) put_row(&CellGradDirection::operand, C::output(of_gates[C::O], of_gates[C::kSaved]));
        }
        put_previous();
      } else if (d.direct) {
        put_direct(grad_of_state());
      }
      for_constants<C::kGates>([&](auto gate) {
        constexpr int kGrad = C::kRecurrentGrad[gate];
        put_product(C::kGates, gate, to_step_before(grads[kGrad]));
      });
    }
  };
};

}  // namespace fastseq::FASTSEQ_ISA
