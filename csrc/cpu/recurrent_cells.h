// From a cell's math to tiles of memory: loads the operands of `rows` rows and a block of hidden units,
// vector by vector, runs the cell, stores what it made. The engine calls these through CellOps and knows no
// cell.
//
// S is the storage type of tensors, O the operand type of products; sums and gates are Scalar (float or
// double). With two planes everything has a tangent: cells run over Dual vectors, tensors come in pairs, and in the
// engine's own buffers each row of numbers is followed by the row of their tangents.
#pragma once

#include <type_traits>

#include "../cells/dual.h"
#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "../fastseq.h"
#include "gemm.h"

namespace fastseq::FASTSEQ_ISA {

constexpr int kMaxGates = 4;

// Bodies of loops over vectors, and what they are made of, are inlined, so that constants stay in registers.
#define FS_BODY __attribute__((always_inline))

// What cells compute with: vectors, or vectors and their tangents.
template <int kPlanes, class Lane>
struct Planes {
  using V = Lane;
  template <class Get>
  FS_BODY static V of(Get get) {
    return get(0);
  }
  template <class Put>
  FS_BODY static void each(V x, Put put) {
    put(0, x);
  }
};
template <class Lane>
struct Planes<2, Lane> {
  using V = Dual<Lane>;
  template <class Get>
  FS_BODY static V of(Get get) {
    return {get(0), get(1)};
  }
  template <class Put>
  FS_BODY static void each(V x, Put put) {
    put(0, x.value);
    put(1, x.tangent);
  }
};

// Rows of a tensor as addresses, null for rows of zeros. With tangents those of [1] come in pairs, the tangent and then
// the number: so they lie beside the gradients, number and then tangent, that they are multiplied by.
template <class S, int kPlanes>
struct RowsOf {
  const S** rows[kPlanes];
  const S* at(int64_t row, int plane) const { return plane == 0 ? rows[0][row] : rows[kPlanes - 1][2 * row]; }
  RowsOf from(int64_t row) const {
    RowsOf moved = *this;
    moved.rows[0] += row;
    if constexpr (kPlanes == 2) moved.rows[1] += 2 * row;
    return moved;
  }
  void set(int64_t row, int plane, const S* address) {
    if (plane == 0) rows[0][row] = address;
    if constexpr (kPlanes == 2) rows[1][2 * row + 1 - plane] = address;
  }
};

template <class S, class O, int kPlanes>
struct StepTile {
  using Scalar = typename Operand<O>::Scalar;
  int64_t rows, units;  // units: valid ones, at most block
  int64_t block;        // columns of a gate in x and u
  int64_t hidden;       // H: distance of saved slots
  const Scalar* x;      // [rows][planes][gates of the phase][block]  W x + b_ih
  Scalar* u;            // likewise                                   U h + b_hh; overwritten
  const O* h;           // previous state, [rows][planes], stride h_stride
  int64_t h_stride;
  S* c[kPlanes];  // cell state, updated in place
  int64_t c_stride;
  S* saved[kPlanes];  // null where no gates are kept
  int64_t saved_stride;
  S* kept_c[kPlanes];  // null where the cell state is not kept
  int64_t kept_c_stride;
  O* operand;  // [rows][planes] next state, or what first() makes: the operand of the next product
  int64_t operand_stride;
  S* output[kPlanes];  // null if a projection makes it
  int64_t output_stride[kPlanes];
};

template <class S, class O, int kPlanes>
struct StepGradTile {
  using Scalar = typename Operand<O>::Scalar;
  int64_t rows, units, hidden;
  int64_t unit;              // first unit of the block: where to read in a row of h and c
  RowsOf<S, kPlanes> h;      // of the previous state
  RowsOf<S, kPlanes> c;      // of the previous cell state
  const S* h_next[kPlanes];  // the step's output
  int64_t h_next_stride[kPlanes];
  const S* saved[kPlanes];
  int64_t saved_stride;
  const S* grad_output[kPlanes];           // null: zero
  int64_t grad_output_stride[kPlanes][2];  // row, unit
  // Those that follow have a row for each plane.
  Scalar* dh;  // gradient of the next state; leaves as the part that does not pass through U
  int64_t dh_stride;
  Scalar* dc;  // gradient of the next cell state; leaves as that of the previous one
  int64_t dc_stride;
  const Scalar* d_operand;  // first_grad: gradient of first()'s operand, row stride d_operand_stride
  int64_t d_operand_stride;
  O* d;  // pre-activation gradients [rows][..][hidden, padded]
  int64_t d_stride, d_gate;
  O* operand;  // first()'s operand, or the unprojected output, computed again; or null
  int64_t operand_stride;
  // [rows], stride kept_stride: the whole dh of the numbers, before it is bounded; or null. Written, or read where there
  // are tangents; dh has only these then.
  Scalar* kept;
  int64_t kept_stride;
  bool clips;                 // whether step_grad bounds
  Scalar dh_bound, dc_bound;  // the gradients of the next state and of the next cell state
};

// Bounds a gradient from both sides; NaN stays NaN. The tangent of what is bounded is zero.
template <class V>
struct Clip {
  V bound;
  V operator()(V x) const { return max(-bound, min(bound, x)); }
  Dual<V> operator()(Dual<V> x) const {
    const V y = (*this)(x.value);
    return {y, select<typename V::Scalar>(y.v == x.value.v, x.tangent, V(0))};
  }
};

template <class S, class O, int kPlanes>
struct CellOps {
  int gates, first_gates, saved, grads;
  bool cell_state, direct;
  const int *input_grad, *recurrent_grad;
  void (*first)(const StepTile<S, O, kPlanes>&);
  void (*step)(const StepTile<S, O, kPlanes>&);
  // Of tangents alone, where the tile's saved, and output, have the numbers already: x and u are of one plane then.
  void (*first_along)(const StepTile<S, O, kPlanes>&);
  void (*step_along)(const StepTile<S, O, kPlanes>&);
  void (*first_grad)(const StepGradTile<S, O, kPlanes>&);
  void (*step_grad)(const StepGradTile<S, O, kPlanes>&);
};

// Calls body(row, offset of the vector, valid lanes) over a tile. Bodies are inlined twice, for whole vectors
// and for the tail, so that whole vectors have no branches.
template <int kWidth, class Body>
inline void for_each_vector(int64_t rows, int64_t units, Body body) {
  const int64_t whole = units / kWidth * kWidth;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < whole; i += kWidth) body(row, i, kWidth);
    if (whole < units) body(row, whole, units - whole);
  }
}

// x as it will be read back from storage.
template <class S, class V>
inline V rounded(V x) {
  if constexpr (sizeof(S) == sizeof(typename V::Scalar)) {
    return x;
  } else {
    S buffer[V::kWidth];
    store(buffer, x);
    return load<V>(buffer);
  }
}

template <class C, class = void>
constexpr bool kTwoStages = false;
template <class C>
constexpr bool kTwoStages<C, std::void_t<decltype(C::kCarry)>> = true;

template <template <class> class Cell, class S, class O, int kPlanes>
struct CellTile {
  using Lane = Vec<typename Operand<O>::Scalar>;
  using P = Planes<kPlanes, Lane>;
  using V = typename P::V;
  using C = Cell<V>;
  using Step = StepTile<S, O, kPlanes>;
  using Grad = StepGradTile<S, O, kPlanes>;
  static constexpr int kWidth = Lane::kWidth;
  static constexpr int kSlots = C::kSaved > 0 ? C::kSaved : 1;
  static constexpr bool kFirst = C::kFirstGates < C::kGates;

  static void first(const Step& t) {
    if constexpr (kFirst) {
      for_each_vector<kWidth>(t.rows, t.units, [&](int64_t row, int64_t i, int64_t n) FS_BODY {
        V x[kMaxGates], u[kMaxGates], saved[kSlots], operand;
        load_gates<0, C::kFirstGates>(t, row, i, x, u);
        C::first(x, u, of_rows(t.h, t.h_stride, row, i, n), saved, operand);
        for (int g = 0; g < C::kFirstGates; ++g)
          put(t.saved, row * t.saved_stride + g * t.hidden + i, n, saved[g]);
        to_rows(t.operand, t.operand_stride, row, i, n, operand);
      });
    }
  }

  static void step(const Step& t) {
    if constexpr (kTwoStages<C>) {
      step_in_stages(t);
    } else {
      step_at_once(t);
    }
  }

  static void step_at_once(const Step& t) {
    for_each_vector<kWidth>(t.rows, t.units, [&](int64_t row, int64_t i, int64_t n) FS_BODY {
      constexpr int kBegin = kFirst ? C::kFirstGates : 0;
      V x[kMaxGates], u[kMaxGates], saved[kSlots], c_next, h_next;
      load_gates<kBegin, C::kGates>(t, row, i, x, u);
      const int64_t keep = row * t.saved_stride + i;
      if constexpr (kFirst) {
        for (int g = 0; g < kBegin; ++g) saved[g] = get(t.saved, keep + g * t.hidden, n);
      }
      C::step(x, u, load_state(t, row, i, n), V(0), saved, h_next, c_next);
      for (int g = kBegin; g < C::kSaved && t.saved[0]; ++g) put(t.saved, keep + g * t.hidden, n, saved[g]);
      store_output(t, row, i, n, h_next);
    });
  }

  // The functions of one vector wait for each other longer than the processor looks ahead. So all vectors of
  // the tile begin before the first one ends; what goes from one stage to the other overwrites u.
  static void step_in_stages(const Step& t) {
    static_assert(C::kCarry <= C::kGates, "what is carried takes the place of u");
    for_each_vector<kWidth>(t.rows, t.units, [&](int64_t row, int64_t i, int64_t n) FS_BODY {
      V x[kMaxGates], u[kMaxGates], saved[kSlots], carry[C::kCarry], c(0), c_next(0);
      load_gates<0, C::kGates>(t, row, i, x, u);
      if constexpr (C::kCellState) c = get(t.c, row * t.c_stride + i, n);
      C::begin(x, u, load_state(t, row, i, n), c, saved, carry, c_next);
      for (int g = 0; g < C::kCarry; ++g) {
        P::each(carry[g], [&](int p, Lane v) FS_BODY {
          store(t.u + ((row * kPlanes + p) * C::kGates + g) * t.block + i, v);
        });
      }
      if constexpr (C::kCellState) put(t.c, row * t.c_stride + i, n, c_next);
      if (t.saved[0]) {
        for (int g = 0; g < C::kSaved; ++g) {
          if (g != C::kEndSaves) put(t.saved, row * t.saved_stride + g * t.hidden + i, n, saved[g]);
        }
      }
      if constexpr (C::kCellState) {
        if (t.kept_c[0]) put(t.kept_c, row * t.kept_c_stride + i, n, c_next);
      }
    });
    for_each_vector<kWidth>(t.rows, t.units, [&](int64_t row, int64_t i, int64_t n) FS_BODY {
      V x[kMaxGates], carry[kMaxGates], saved, h_next;
      load_gates<0, C::kGates>(t, row, i, x, carry);
      C::end(x, load_state(t, row, i, n), carry, saved, h_next);
      if (C::kEndSaves >= 0 && t.saved[0]) {
        put(t.saved, row * t.saved_stride + C::kEndSaves * t.hidden + i, n, saved);
      }
      store_output(t, row, i, n, h_next);
    });
  }

  static void first_along(const Step& t) {
    if constexpr (kPlanes == 2 && kFirst) {
      for_each_vector<kWidth>(t.rows, t.units, [&](int64_t row, int64_t i, int64_t n) FS_BODY {
        Known<Lane> x[kMaxGates];
        V u[kMaxGates], saved[kSlots], operand;
        load_known<0, C::kFirstGates>(t, row, i, n, x, u);
        C::first(x, u, of_rows(t.h, t.h_stride, row, i, n), saved, operand);
        for (int g = 0; g < C::kFirstGates; ++g) put_tangent(t.saved, saved_at(t, row, i, g), n, saved[g]);
        to_rows(t.operand, t.operand_stride, row, i, n, operand);
      });
    }
  }

  // There is little to wait for: of the functions only c's tanh is not known. So both stages are one.
  static void step_along(const Step& t) {
    if constexpr (kPlanes == 2) {
      for_each_vector<kWidth>(t.rows, t.units, [&](int64_t row, int64_t i, int64_t n) FS_BODY {
        constexpr int kBegin = kFirst ? C::kFirstGates : 0;
        Known<Lane> x[kMaxGates];
        V u[kMaxGates], saved[kSlots], c(0), c_next(0), h_next(0);
        load_known<kBegin, C::kGates>(t, row, i, n, x, u);
        if constexpr (kFirst) {
          for (int g = 0; g < kBegin; ++g) saved[g] = get(t.saved, saved_at(t, row, i, g), n);
        }
        if constexpr (C::kCellState) c = get(t.c, row * t.c_stride + i, n);
        const V h = load_state(t, row, i, n);
        if constexpr (kTwoStages<C>) {
          V carry[C::kCarry], last(0);
          C::begin(x, u, h, c, saved, carry, c_next);
          C::end(x, h, carry, last, h_next);
          if constexpr (C::kEndSaves >= 0) saved[C::kEndSaves] = last;
        } else {
          C::step(x, u, h, c, saved, h_next, c_next);
        }
        for (int g = kBegin; g < C::kSaved && t.saved[1]; ++g) {
          put_tangent(t.saved, saved_at(t, row, i, g), n, saved[g]);
        }
        if constexpr (C::kCellState) {
          const int64_t kept = row * t.kept_c_stride + i;
          c_next.value = load_upto<Lane>(t.kept_c[0] + kept, n);
          put(t.c, row * t.c_stride + i, n, c_next);
          if (t.kept_c[1]) put_tangent(t.kept_c, kept, n, c_next);
        }
        h_next.value = t.output[0] ? load_upto<Lane>(t.output[0] + row * t.output_stride[0] + i, n)
                                   : rounded<S>(h_next.value);
        to_rows(t.operand, t.operand_stride, row, i, n, V(h_next.value, rounded<S>(h_next.tangent)));
        if (t.output[1]) put_tangent(t.output, row * t.output_stride[1] + i, n, h_next);
      });
    }
  }

  static void first_grad(const Grad& t) {
    if constexpr (kFirst) {
      for_each_vector<kWidth>(t.rows, t.units, [&](int64_t row, int64_t i, int64_t n) FS_BODY {
        V saved[kSlots], d[C::kGrads], operand;
        load_saved(t, row, i, n, saved);
        const V h = load_row(t.h, row, t.unit + i, n);
        V dh_direct = of_rows(t.dh, t.dh_stride, row, i, kWidth);
        const V d_operand = of_rows(t.d_operand, t.d_operand_stride, row, i, kWidth);
        C::first_grad(saved, h, d_operand, d, dh_direct, operand);
        for (int g = 0; g < C::kStepGrads; ++g) to_rows(t.d + g * t.d_gate, t.d_stride, row, i, n, d[g]);
        to_rows(t.dh, t.dh_stride, row, i, kWidth, dh_direct);
        to_rows(t.operand, t.operand_stride, row, i, n, operand);
      });
    }
  }

  static void step_grad(const Grad& t) {
    if (t.clips) {
      step_grad_with(t, Clip<Lane>{Lane(t.dh_bound)}, Clip<Lane>{Lane(t.dc_bound)});
    } else {
      step_grad_with(t, Unclipped(), Unclipped());
    }
  }

  template <class AnyClip>
  static void step_grad_with(const Grad& t, AnyClip clip_dh, AnyClip clip_dc) {
    for_each_vector<kWidth>(t.rows, t.units, [&](int64_t row, int64_t i, int64_t n) FS_BODY {
      V saved[kSlots], d[C::kGrads], c(0), c_next(0), h_next(0), dc(0), dh_direct, dc_prev;
      load_saved(t, row, i, n, saved);
      const V h = C::kDirect ? load_row(t.h, row, t.unit + i, n) : V(0);
      V dh = P::of([&](int p) FS_BODY {
        if (kPlanes == 2 && p == 0 && t.kept) return load_upto<Lane>(t.kept + row * t.kept_stride + i, n);
        Lane sum = load<Lane>(t.dh + (row * kPlanes + p) * t.dh_stride + i);
        if (t.grad_output[p]) {
          const int64_t stride = t.grad_output_stride[p][1];
          sum = sum + load_strided<Lane>(t.grad_output[p] + row * t.grad_output_stride[p][0] + i * stride,
                                         stride, n);
        }
        if (kPlanes == 1 && t.kept) store_upto(t.kept + row * t.kept_stride + i, sum, n);
        return sum;
      });
      dh = clip_dh(dh);
      if constexpr (C::kGradOfOutput) {
        h_next = P::of(
            [&](int p) FS_BODY { return load_upto<Lane>(t.h_next[p] + row * t.h_next_stride[p] + i, n); });
      }
      if constexpr (C::kCellState) {
        c = load_row(t.c, row, t.unit + i, n);
        c_next = get(t.saved, row * t.saved_stride + C::kSaved * t.hidden + i, n);
        dc = of_rows(t.dc, t.dc_stride, row, i, kWidth);
      }
      C::step_grad(saved, h, h_next, c, c_next, dh, dc, d, dh_direct, dc_prev, clip_dc);
      for (int g = step_grads(); g < C::kGrads; ++g) to_rows(t.d + g * t.d_gate, t.d_stride, row, i, n, d[g]);
      if constexpr (C::kDirect) to_rows(t.dh, t.dh_stride, row, i, kWidth, dh_direct);
      if constexpr (C::kCellState) {
        to_rows(t.dc, t.dc_stride, row, i, kWidth, dc_prev);
        if (t.operand) to_rows(t.operand, t.operand_stride, row, i, n, C::output(saved[C::O], c_next));
      }
    });
  }

  static constexpr CellOps<S, O, kPlanes> ops() {
    return {C::kGates,   C::kFirstGates, C::kSaved,         C::kGrads, C::kCellState,
            C::kDirect,  C::kInputGrad,  C::kRecurrentGrad, first,     step,
            first_along, step_along,     first_grad,        step_grad};
  }

 private:
  static constexpr int step_grads() {
    if constexpr (kFirst) return C::kStepGrads;
    return 0;
  }

  // n units of tensors, of which each plane has one.
  template <class T>
  FS_BODY static V get(T* const (&from)[kPlanes], int64_t at, int64_t n) {
    return P::of([&](int p) FS_BODY { return load_upto<Lane>(from[p] + at, n); });
  }
  FS_BODY static void put(S* const (&to)[kPlanes], int64_t at, int64_t n, V x) {
    P::each(x, [&](int p, Lane v) FS_BODY { store_upto(to[p] + at, v, n); });
  }
  // n units of a row of a buffer, of which each plane has a row.
  template <class T>
  FS_BODY static V of_rows(const T* from, int64_t stride, int64_t row, int64_t i, int64_t n) {
    return P::of([&](int p) FS_BODY { return load_upto<Lane>(from + (row * kPlanes + p) * stride + i, n); });
  }
  template <class T>
  FS_BODY static void to_rows(T* to, int64_t stride, int64_t row, int64_t i, int64_t n, V x) {
    P::each(x, [&](int p, Lane v) FS_BODY { store_upto(to + (row * kPlanes + p) * stride + i, v, n); });
  }
  FS_BODY static void put_tangent(S* const (&to)[kPlanes], int64_t at, int64_t n, V x) {
    store_upto(to[1] + at, x.tangent, n);
  }
  FS_BODY static int64_t saved_at(const Step& t, int64_t row, int64_t i, int g) {
    return row * t.saved_stride + g * t.hidden + i;
  }
  FS_BODY static V load_row(const RowsOf<S, kPlanes>& rows, int64_t row, int64_t unit, int64_t n) {
    return P::of([&](int p) FS_BODY {
      const S* const from = rows.at(row, p);
      return load_strided<Lane>(from ? from + unit : nullptr, 1, n);
    });
  }

  FS_BODY static V load_state(const Step& t, int64_t row, int64_t i, int64_t n) {
    return C::kDirect ? of_rows(t.h, t.h_stride, row, i, n) : V(0);
  }
  FS_BODY static void store_output(const Step& t, int64_t row, int64_t i, int64_t n, V h_next) {
    P::each(h_next, [&](int p, Lane v) FS_BODY {
      store_upto(t.operand + (row * kPlanes + p) * t.operand_stride + i, rounded<S>(v), n);
      if (t.output[p]) store_upto(t.output[p] + row * t.output_stride[p] + i, v, n);
    });
  }

  template <int kBegin, int kEnd>
  FS_BODY static void load_gates(const Step& t, int64_t row, int64_t i, V* x, V* u) {
    for (int g = kBegin; g < kEnd; ++g) {
      const auto gate = [&](const auto* from) FS_BODY {
        return P::of([&](int p) FS_BODY {
          return load<Lane>(from + ((row * kPlanes + p) * (kEnd - kBegin) + g - kBegin) * t.block + i);
        });
      };
      x[g] = gate(t.x);
      u[g] = gate(t.u);
    }
  }

  // The gates of the numbers are known, and of u, W h + b, what is kept beside them. Without gates h is.
  template <int kBegin, int kEnd>
  FS_BODY static void load_known(const Step& t, int64_t row, int64_t i, int64_t n, Known<Lane>* x, V* u) {
    for (int g = kBegin; g < kEnd; ++g) {
      const auto tangent = [&](const auto* from) FS_BODY {
        return load<Lane>(from + (row * (kEnd - kBegin) + g - kBegin) * t.block + i);
      };
      const S* const known =
          C::kSaved ? t.saved[0] + saved_at(t, row, i, g) : t.output[0] + row * t.output_stride[0] + i;
      x[g] = {load_upto<Lane>(known, n), tangent(t.x)};
      u[g] = {Lane(0), tangent(t.u)};
    }
    if constexpr (C::kSaved > C::kGates) {
      u[kEnd - 1].value = load_upto<Lane>(t.saved[0] + saved_at(t, row, i, C::kGates), n);
    }
  }

  FS_BODY static void load_saved(const Grad& t, int64_t row, int64_t i, int64_t n, V* saved) {
    for (int g = 0; g < C::kSaved; ++g) saved[g] = get(t.saved, row * t.saved_stride + g * t.hidden + i, n);
  }
};

// The cells in the order of CellKind.
template <template <class> class... Cells>
struct CellList {
  template <class S, class O, int kPlanes>
  static constexpr CellOps<S, O, kPlanes> kOps[] = {CellTile<Cells, S, O, kPlanes>::ops()...};

  template <template <class> class Cell>
  static constexpr bool fits(const CellFacts& facts) {
    using C = Cell<Vec<float>>;
    return facts.gates == C::kGates && facts.products == (C::kFirstGates < C::kGates ? 2 : 1) &&
           facts.saved == C::kSaved + C::kCellState && facts.cell_state == C::kCellState;
  }
  static constexpr bool all_fit() {
    int kind = 0;
    return sizeof...(Cells) == kCells && (fits<Cells>(kCellFacts[kind++]) && ...);
  }
};
using AllCells = CellList<RNNTanh, RNNRelu, LSTM, GRU, GRUResetBefore>;
static_assert(AllCells::all_fit(), "kCellFacts and csrc/cells disagree");

template <class S, class O, int kPlanes>
const CellOps<S, O, kPlanes>& cell_ops(CellKind cell) {
  return AllCells::kOps<S, O, kPlanes>[static_cast<int>(cell)];
}

}  // namespace fastseq::FASTSEQ_ISA
