// From a cell's math to tiles of memory: loads the operands of `rows` rows and a block of hidden units,
// vector by vector, runs the cell, stores what it made. The engine calls these through CellOps and knows no
// cell.
//
// S is the storage type of tensors, O the operand type of products; sums and gates are Scalar (float or
// double).
#pragma once

#include <type_traits>

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "../fastseq.h"
#include "gemm.h"

namespace fastseq::FASTSEQ_ISA {

constexpr int kMaxGates = 4;

template <class S, class O>
struct StepTile {
  using Scalar = typename Operand<O>::Scalar;
  int64_t rows, units;  // units: valid ones, at most block
  int64_t block;        // columns of a gate in x and u
  int64_t hidden;       // H: distance of saved slots
  const Scalar* x;      // [rows][gates of the phase][block]  W x + b_ih
  Scalar* u;            // likewise                           U h + b_hh; overwritten
  const O* h;           // previous state, row stride h_stride
  int64_t h_stride;
  S* c;  // cell state, updated in place
  int64_t c_stride;
  S* saved;  // null where no gates are kept
  int64_t saved_stride;
  S* kept_c;  // null where the cell state is not kept
  int64_t kept_c_stride;
  O* operand;  // next state, or what first() makes: the operand of the next product
  int64_t operand_stride;
  S* output;  // null if a projection makes it
  int64_t output_stride;
};

template <class S, class O>
struct StepGradTile {
  using Scalar = typename Operand<O>::Scalar;
  int64_t rows, units, hidden;
  int64_t unit;       // first unit of the block: where to read in a row of h and c
  const S* const* h;  // rows of the previous state; a null row is zero
  const S* const* c;  // rows of the previous cell state, likewise
  const S* h_next;    // the step's output
  int64_t h_next_stride;
  const S* saved;
  int64_t saved_stride;
  const S* grad_output;           // null: zero
  int64_t grad_output_stride[2];  // row, unit
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
  bool clips;                 // whether step_grad bounds
  Scalar dh_bound, dc_bound;  // the gradients of the next state and of the next cell state
};

// Bounds a gradient from both sides; NaN stays NaN.
template <class V>
struct Clip {
  V bound;
  V operator()(V x) const { return max(-bound, min(bound, x)); }
};

template <class S, class O>
struct CellOps {
  int gates, first_gates, saved, grads;
  bool cell_state, direct;
  const int *input_grad, *recurrent_grad;
  void (*first)(const StepTile<S, O>&);
  void (*step)(const StepTile<S, O>&);
  void (*first_grad)(const StepGradTile<S, O>&);
  void (*step_grad)(const StepGradTile<S, O>&);
};

// Calls body(row, offset of the vector, valid lanes) over a tile. Bodies are inlined twice, for whole vectors
// and for the tail, so that constants stay in registers and whole vectors have no branches; FS_BODY marks
// them.
#define FS_BODY __attribute__((always_inline))
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
constexpr bool kTwoStages<C, std::void_t<decltype(&C::begin)>> = true;

template <template <class> class Cell, class S, class O>
struct CellTile {
  using V = Vec<typename Operand<O>::Scalar>;
  using C = Cell<V>;
  static constexpr int kWidth = V::kWidth;
  static constexpr int kSlots = C::kSaved > 0 ? C::kSaved : 1;
  static constexpr bool kFirst = C::kFirstGates < C::kGates;

  static void first(const StepTile<S, O>& t) {
    if constexpr (kFirst) {
      for_each_vector<kWidth>(t.rows, t.units, [&](int64_t row, int64_t i, int64_t n) FS_BODY {
        V x[kMaxGates], u[kMaxGates], saved[kSlots], operand;
        load_gates<0, C::kFirstGates>(t, row, i, x, u);
        const V h = load_upto<V>(t.h + row * t.h_stride + i, n);
        C::first(x, u, h, saved, operand);
        for (int g = 0; g < C::kFirstGates; ++g) {
          store_upto(t.saved + row * t.saved_stride + g * t.hidden + i, saved[g], n);
        }
        store_upto(t.operand + row * t.operand_stride + i, operand, n);
      });
    }
  }

  static void step(const StepTile<S, O>& t) {
    if constexpr (kTwoStages<C>) {
      step_in_stages(t);
    } else {
      step_at_once(t);
    }
  }

  static void step_at_once(const StepTile<S, O>& t) {
    for_each_vector<kWidth>(t.rows, t.units, [&](int64_t row, int64_t i, int64_t n) FS_BODY {
      constexpr int kBegin = kFirst ? C::kFirstGates : 0;
      V x[kMaxGates], u[kMaxGates], saved[kSlots], c_next, h_next;
      load_gates<kBegin, C::kGates>(t, row, i, x, u);
      S* const keep = t.saved ? t.saved + row * t.saved_stride + i : nullptr;
      if constexpr (kFirst) {
        for (int g = 0; g < kBegin; ++g) saved[g] = load_upto<V>(keep + g * t.hidden, n);
      }
      C::step(x, u, load_state(t, row, i, n), V(0), saved, h_next, c_next);
      for (int g = kBegin; g < C::kSaved && keep; ++g) store_upto(keep + g * t.hidden, saved[g], n);
      store_output(t, row, i, n, h_next);
    });
  }

  // The functions of one vector wait for each other longer than the processor looks ahead. So all vectors of
  // the tile begin before the first one ends; what goes from one stage to the other overwrites u.
  static void step_in_stages(const StepTile<S, O>& t) {
    static_assert(C::kCarry <= C::kGates, "what is carried takes the place of u");
    for_each_vector<kWidth>(t.rows, t.units, [&](int64_t row, int64_t i, int64_t n) FS_BODY {
      V x[kMaxGates], u[kMaxGates], saved[kSlots], carry[C::kCarry], c(0), c_next(0);
      load_gates<0, C::kGates>(t, row, i, x, u);
      if constexpr (C::kCellState) c = load_upto<V>(t.c + row * t.c_stride + i, n);
      C::begin(x, u, load_state(t, row, i, n), c, saved, carry, c_next);
      for (int g = 0; g < C::kCarry; ++g) store(t.u + (row * C::kGates + g) * t.block + i, carry[g]);
      if constexpr (C::kCellState) store_upto(t.c + row * t.c_stride + i, c_next, n);
      if (S* const keep = t.saved) {
        S* const at = keep + row * t.saved_stride + i;
        for (int g = 0; g < C::kSaved; ++g) {
          if (g != C::kEndSaves) store_upto(at + g * t.hidden, saved[g], n);
        }
      }
      if constexpr (C::kCellState) {
        if (t.kept_c) store_upto(t.kept_c + row * t.kept_c_stride + i, c_next, n);
      }
    });
    for_each_vector<kWidth>(t.rows, t.units, [&](int64_t row, int64_t i, int64_t n) FS_BODY {
      V x[kMaxGates], carry[kMaxGates], saved, h_next;
      load_gates<0, C::kGates>(t, row, i, x, carry);
      C::end(x, load_state(t, row, i, n), carry, saved, h_next);
      if (C::kEndSaves >= 0 && t.saved) {
        store_upto(t.saved + row * t.saved_stride + C::kEndSaves * t.hidden + i, saved, n);
      }
      store_output(t, row, i, n, h_next);
    });
  }

  static void first_grad(const StepGradTile<S, O>& t) {
    if constexpr (kFirst) {
      for_each_vector<kWidth>(t.rows, t.units, [&](int64_t row, int64_t i, int64_t n) FS_BODY {
        V saved[kSlots], d[C::kGrads], operand;
        load_saved(t, row, i, n, saved);
        const V h = load_strided<V>(at(t.h[row], t.unit + i), 1, n);
        typename V::Scalar* const dh = t.dh + row * t.dh_stride + i;
        V dh_direct = load<V>(dh);
        C::first_grad(saved, h, load<V>(t.d_operand + row * t.d_operand_stride + i), d, dh_direct, operand);
        for (int g = 0; g < C::kStepGrads; ++g)
          store_upto(t.d + row * t.d_stride + g * t.d_gate + i, d[g], n);
        store(dh, dh_direct);
        store_upto(t.operand + row * t.operand_stride + i, operand, n);
      });
    }
  }

  static void step_grad(const StepGradTile<S, O>& t) {
    if (t.clips) {
      step_grad_with(t, Clip<V>{V(t.dh_bound)}, Clip<V>{V(t.dc_bound)});
    } else {
      step_grad_with(t, Unclipped(), Unclipped());
    }
  }

  template <class AnyClip>
  static void step_grad_with(const StepGradTile<S, O>& t, AnyClip clip_dh, AnyClip clip_dc) {
    for_each_vector<kWidth>(t.rows, t.units, [&](int64_t row, int64_t i, int64_t n) FS_BODY {
      V saved[kSlots], d[C::kGrads], c(0), c_next(0), h_next(0), dc(0), dh_direct, dc_prev;
      load_saved(t, row, i, n, saved);
      const V h = C::kDirect ? load_strided<V>(at(t.h[row], t.unit + i), 1, n) : V(0);
      typename V::Scalar* const dh_at = t.dh + row * t.dh_stride + i;
      V dh = load<V>(dh_at);
      if (t.grad_output) {
        const int64_t stride = t.grad_output_stride[1];
        dh = dh + load_strided<V>(t.grad_output + row * t.grad_output_stride[0] + i * stride, stride, n);
      }
      dh = clip_dh(dh);
      if constexpr (C::kGradOfOutput) h_next = load_upto<V>(t.h_next + row * t.h_next_stride + i, n);
      if constexpr (C::kCellState) {
        c = load_strided<V>(at(t.c[row], t.unit + i), 1, n);
        c_next = load_upto<V>(t.saved + row * t.saved_stride + C::kSaved * t.hidden + i, n);
        dc = load<V>(t.dc + row * t.dc_stride + i);
      }
      C::step_grad(saved, h, h_next, c, c_next, dh, dc, d, dh_direct, dc_prev, clip_dc);
      for (int g = step_grads(); g < C::kGrads; ++g) {
        store_upto(t.d + row * t.d_stride + g * t.d_gate + i, d[g], n);
      }
      if constexpr (C::kDirect) store(dh_at, dh_direct);
      if constexpr (C::kCellState) {
        store(t.dc + row * t.dc_stride + i, dc_prev);
        if (t.operand) store_upto(t.operand + row * t.operand_stride + i, C::output(saved[C::O], c_next), n);
      }
    });
  }

  static constexpr CellOps<S, O> ops() {
    return {C::kGates,     C::kFirstGates,    C::kSaved, C::kGrads, C::kCellState, C::kDirect,
            C::kInputGrad, C::kRecurrentGrad, first,     step,      first_grad,    step_grad};
  }

 private:
  static const S* at(const S* row, int64_t unit) { return row ? row + unit : nullptr; }
  static constexpr int step_grads() {
    if constexpr (kFirst) return C::kStepGrads;
    return 0;
  }

  static V load_state(const StepTile<S, O>& t, int64_t row, int64_t i, int64_t n) {
    return C::kDirect ? load_upto<V>(t.h + row * t.h_stride + i, n) : V(0);
  }
  static void store_output(const StepTile<S, O>& t, int64_t row, int64_t i, int64_t n, V h_next) {
    store_upto(t.operand + row * t.operand_stride + i, rounded<S>(h_next), n);
    if (t.output) store_upto(t.output + row * t.output_stride + i, h_next, n);
  }

  template <int kBegin, int kEnd>
  static void load_gates(const StepTile<S, O>& t, int64_t row, int64_t i, V* x, V* u) {
    for (int g = kBegin; g < kEnd; ++g) {
      const int64_t offset = (row * (kEnd - kBegin) + g - kBegin) * t.block + i;
      x[g] = load<V>(t.x + offset);
      u[g] = load<V>(t.u + offset);
    }
  }

  static void load_saved(const StepGradTile<S, O>& t, int64_t row, int64_t i, int64_t n, V* saved) {
    for (int g = 0; g < C::kSaved; ++g) {
      saved[g] = load_upto<V>(t.saved + row * t.saved_stride + g * t.hidden + i, n);
    }
  }
};

// The cells in the order of CellKind.
template <template <class> class... Cells>
struct CellList {
  template <class S, class O>
  static constexpr CellOps<S, O> kOps[] = {CellTile<Cells, S, O>::ops()...};

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

template <class S, class O>
const CellOps<S, O>& cell_ops(CellKind cell) {
  return AllCells::kOps<S, O>[static_cast<int>(cell)];
}

}  // namespace fastseq::FASTSEQ_ISA
