// Backpropagation through the time loop of a recurrent layer, as one persistent kernel.
//
//   s = 0 .. T-1, against the direction:   dh = U^T d_{t+1} + (what does not pass through U) + grad_output_t
//                                          d_t, dc = cell's gradients(dh, dc, what the forward pass saved)
//   with two products: dh is multiplied by W_hr first (projection), or d_n by U_n (reset-before GRU), and the rest of
//   the gradients follows from that
//
// Who holds what: as in the forward pass, a block has some hidden units of one batch tile for all steps; here it
// makes all d of its units. In a cluster it may multiply its own d by the same rows of U that it had in the forward
// pass and scatter parts of dh for all units, in float: H floats of a row, where d itself would be G H elements. Or d
// is gathered, which is less for one gate of 16 bits; so the plan says. In a grid, where parts from a hundred blocks
// would be too much, d always is.
//
// What is left to matrix products over all steps: grad_pre and the other d are stored for them.
#pragma once

#include "recurrent_pass.h"

namespace fastseq::FASTSEQ_ISA {

template <class Traits>
class BackwardPass : LoopPass<Traits> {
  using Base = LoopPass<Traits>;
  using Base::args_, Base::engine_, Base::gates_, Base::last_round_, Base::loop_, Base::now_, Base::outputs_;
  using Base::kProducts, Base::kRows, Base::active, Base::packed, Base::projects, Base::tensors, Base::width;
  using Base::slots_, Base::units_;
  using typename Base::Scalar, typename Base::Storage;

  struct Inputs {
    Storage saved[kMostSaved];
    Storage previous;  // c_{t-1} of an LSTM, h_{t-1} of a GRU, h_t of an RNN
    Storage grad;      // of the output
  };
  struct Values {
    Scalar saved[kMostSaved], previous, grad;
    FS_DEVICE explicit Values(const Inputs& in)
        : previous(Scalar(widen(in.previous))), grad(Scalar(widen(in.grad))) {
      widen_all(in.saved, saved);
    }
  };
  struct Results {
    Scalar d[kMostGrads];
  };

 public:
  FS_DEVICE explicit BackwardPass(const LoopKernelArgs& args) : Base(args) {}

  FS_DEVICE void run() {
    const int64_t steps = loop_.shape.steps;
    start();
    now_ = rows_of(args_, time(0)), previous_ = rows_of(args_, time(1));
    load(0);
    engine_.start();
    const auto store_round = [&](int begin) { store(begin); };
    for (int64_t s = 0; s < steps; ++s) {
      const int parity = int(s % 2);
      if constexpr (kProducts == 2) {
        Base::for_rounds(outputs_, [&](int begin) { begin_step(begin, parity, s > 0); });
        engine_.template transfer<0>(parity, [] {});
        Base::for_rounds(units_, [&](int begin) { end_step(begin, parity); }, store_round);
      } else {
        Base::for_rounds(units_, [&](int begin) { whole_step(begin, parity, s > 0); }, store_round);
      }
      const auto between = [&] {
        store(last_round_);
        now_ = previous_, previous_ = rows_of(args_, time(s + 2));
        load(0);
      };
      if (s + 1 < steps || tensors().grad_h0) {
        engine_.template transfer<kProducts - 1>(parity, between);
      } else {
        store(last_round_);
      }
    }
    finish(int((steps - 1) % 2));
  }

 private:
  FS_DEVICE int64_t time(int64_t s) const { return Base::time(s, true); }

  // The part of dh that does not pass through U (h's, projected if it is), and dc.
  FS_DEVICE Scalar& dh_at(const Item& item) const { return Base::state(0, item); }
  FS_DEVICE Scalar& dc_at(const Item& item) const { return Base::state(1, item); }

  FS_DEVICE void start() {
    Base::load_state(0, outputs_, tensors().grad_h_n, width());
    Base::load_state(1, units_, tensors().grad_c_n, loop_.hidden_size);
  }

  FS_DEVICE void finish(int parity) {
    Base::store_state(outputs_, tensors().grad_h0, width(), [&](const Item& item) {
      return dh_at(item) + engine_.sum(kProducts - 1, parity, item.u, item.n);
    });
    Base::store_state(units_, tensors().grad_c0, loop_.hidden_size,
                      [&](const Item& item) { return dc_at(item); });
  }

  // ---- what a round reads ----

  FS_DEVICE const Storage* output_row(const StepRows& step, const Item& item) const {
    const Storage* const row = row_at<Storage>(loop_.output, packed(), step, item.row);
    return row + engine_.direction * width() + item.unit;
  }
  FS_DEVICE const Storage* initial(const void* state, const Item& item) const {
    return state ? static_cast<const Storage*>(state) + item.row * loop_.hidden_size + item.unit : nullptr;
  }

  FS_DEVICE void load(int begin) {
    if (projects()) {
      outputs_.for_each(begin, [&](int a, const Item& item) { load_grad(a, item); });
      if (begin == 0) load_saved(0);
    } else {
      units_.for_each(begin, [&](int a, const Item& item) { load_grad(a, item); });
      load_saved(begin);
    }
  }
  FS_DEVICE void load_grad(int a, const Item& item) {
    inputs_[a].grad = Storage{};
    if (!active(item) || !loop_.grad_output.data) return;
    const Storage* const row = row_at<const Storage>(loop_.grad_output, packed(), now_, item.row);
    const int64_t column = engine_.direction * width() + item.unit;
    inputs_[a].grad = load_once(row + column * loop_.grad_output.stride[2]);
  }
  FS_DEVICE void load_saved(int begin) {
    units_.for_each(begin, [&](int a, const Item& item) {
      if (!active(item)) return;
      const Storage* const saved = Base::saved_row(now_, item);
      FS_UNROLL
      for (int i = 0; i < kMostSaved; ++i) {
        if (i < slots_) inputs_[a].saved[i] = load_once(saved + i * loop_.hidden_size);
      }
      const bool before = continues(item);
      const Storage* from;
      if (slots_ == 0) {
        from = output_row(now_, item);
      } else if (loop_.cell == CellKind::kLstm) {
        from = before ? Base::saved_row(previous_, item) + (slots_ - 1) * loop_.hidden_size
                      : initial(tensors().c0, item);
      } else {
        from = before ? output_row(previous_, item) : initial(tensors().h0, item);
      }
      inputs_[a].previous = from ? *from : Storage{};
    });
  }

  // ---- what goes on to the step whose turn is next ----

  // A row of a reverse direction may begin at any step.
  FS_DEVICE bool continues(const Item& item) const { return has_step(loop_.lengths, previous_, item.row); }
  // What is marked between the two steps, for the rows that have both; null: nothing.
  FS_DEVICE bool marked(const uint8_t* marks, const Item& item) const {
    return marks && continues(item) && marks[(Base::reverse() ? previous_ : now_).offset + item.row];
  }
  // The states of this step did not come from that one.
  FS_DEVICE bool resets(const Item& item) const { return marked(loop_.resets, item); }
  // No gradient of a state goes on.
  FS_DEVICE bool cuts(const Item& item) const { return marked(loop_.cuts, item); }
  // What was loaded; the state before a reset is dropped only here, for registers are scarcest while it is loaded.
  FS_DEVICE Values values(int a, const Item& item) const {
    Values in(inputs_[a]);
    if (slots_ > 0 && active(item) && resets(item)) in.previous = 0;
    return in;
  }
  FS_DEVICE Clip<Scalar> clip() const {
    if constexpr (std::is_same_v<Scalar, double>) {
      return {loop_.grad_clip};
    } else {
      return {loop_.grad_clip_float};
    }
  }

  // ---- what a round makes ----

  // dh of an item but for the gradient of the output; `more` if a product has been made before. A row that takes no
  // part in the step keeps it: what the last product made of it, for the reverse direction ends rows at any step.
  FS_DEVICE Scalar gradient_of_state(const Item& item, int parity, bool more) const {
    Scalar dh = dh_at(item);
    if (more) dh += engine_.sum(kProducts - 1, 1 - parity, item.u, item.n);
    if (!active(item)) dh_at(item) = dh;
    return dh;
  }

  FS_DEVICE void whole_step(int begin, int parity, bool more) {
    if (begin > 0) load(begin);
    auto& engine = engine_;
    with_cell<Scalar, 1>(loop_.cell, [&](auto cell) {
      using C = decltype(cell);
      units_.for_each(begin, [&](int a, const Item& item) {
        const Values in = values(a, item);
        Scalar d[C::kGrads] = {};
        const Scalar dh = clip()(gradient_of_state(item, parity, more) + in.grad);
        if (active(item)) {
          Scalar direct = 0, dc = 0;
          C::step_grad(in.saved, in.previous, in.previous, in.previous,
                       in.saved[C::kCellState ? C::kSaved : 0], dh, C::kCellState ? dc_at(item) : Scalar(0),
                       d, direct, dc, clip());
          FS_UNROLL
          for (int i = 0; i < C::kGrads; ++i) results_[a].d[i] = d[i];
          if (cuts(item)) {
            direct = dc = 0;
            for (Scalar& part : d) part = 0;
          }
          dh_at(item) = direct;
          if constexpr (C::kCellState) dc_at(item) = dc;
        }
        for_constants<C::kGates>([&](auto g) {
          constexpr int kGrad = C::kRecurrentGrad[g];
          engine.put(0, parity, g, item.u, item.n, d[kGrad]);
        });
      });
    });
  }

  // Up to the operand of the first product: dh of the projection, or d_n (and d_z, which goes with d_r later).
  FS_DEVICE void begin_step(int begin, int parity, bool more) {
    if (projects()) {
      auto* const grad_hidden = static_cast<Storage*>(tensors().grad_hidden);
      if (begin > 0) load(begin);
      outputs_.for_each(begin, [&](int a, const Item& item) {
        const Scalar all = clip()(gradient_of_state(item, parity, more) + Scalar(widen(inputs_[a].grad)));
        const Scalar dh = active(item) ? all : Scalar(0);
        if (active(item)) {
          dh_at(item) = 0;
          if (grad_hidden) keep(grad_hidden + (now_.offset + item.row) * width() + item.unit, dh);
        }
        engine_.put(0, parity, 0, item.u, item.n, dh);
      });
      return;
    }
    if (begin > 0) load(begin);
    using C = GRUResetBefore<Scalar>;
    units_.for_each(begin, [&](int a, const Item& item) {
      const Values in = values(a, item);
      Scalar d[C::kGrads] = {};
      const Scalar dh = clip()(gradient_of_state(item, parity, more) + in.grad);
      if (active(item)) {
        Scalar direct = 0, unused = 0;
        C::step_grad(in.saved, in.previous, Scalar(0), Scalar(0), Scalar(0), dh, Scalar(0), d, direct,
                     unused);
        dh_at(item) = direct;
        Storage* const to = Base::gates_row(item);
        keep(to + C::Z * loop_.hidden_size, d[C::Z]);
        keep(to + C::N * loop_.hidden_size, d[C::N]);
        if (cuts(item)) d[C::Z] = 0;
      }
      engine_.put(0, parity, 0, item.u, item.n, d[C::N]);
      engine_.put(1, parity, C::Z, item.u, item.n, d[C::Z]);
    });
  }

  FS_DEVICE void end_step(int begin, int parity) {
    if (begin > 0 || Base::has_rounds(units_)) load_saved(begin);
    auto& engine = engine_;
    with_cell<Scalar, 2>(loop_.cell, [&](auto cell) {
      using C = decltype(cell);
      units_.for_each(begin, [&](int a, const Item& item) {
        const Values in = values(a, item);
        const bool on = active(item);
        const Scalar d_operand = on ? engine.sum(0, parity, item.u, item.n) : Scalar(0);
        Scalar d[C::kGrads] = {};
        if constexpr (C::kCellState) {
          if (on) {
            Scalar unused = 0, dc = 0;
            C::step_grad(in.saved, Scalar(0), Scalar(0), in.previous, in.saved[C::kSaved], d_operand,
                         dc_at(item), d, unused, dc, clip());
            dc_at(item) = dc;
          }
          FS_UNROLL
          for (int g = 0; g < C::kGates; ++g) results_[a].d[g] = d[g];
          if (on && cuts(item)) {
            dc_at(item) = 0;
            for (Scalar& part : d) part = 0;
          }
          FS_UNROLL
          for (int g = 0; g < C::kGates; ++g) engine.put(1, parity, g, item.u, item.n, d[g]);
        } else {
          if (on) {
            Scalar direct = dh_at(item), unused = 0;
            C::first_grad(in.saved, in.previous, d_operand, d, direct, unused);
            dh_at(item) = direct;
          }
          results_[a].d[C::R] = d[C::R];
          if (on && cuts(item)) dh_at(item) = d[C::R] = 0;
          engine.put(1, parity, C::R, item.u, item.n, d[C::R]);
        }
      });
    });
  }

  // Gradients that a round made and that are not stored yet. Those of x are the first ones, of every cell.
  FS_DEVICE void store(int begin) const {
    auto* const grad_candidate = static_cast<Storage*>(tensors().grad_candidate);
    units_.for_each(begin, [&](int a, const Item& item) {
      if (!active(item)) return;
      Storage* const to = Base::gates_row(item);
      const int count = kProducts == 2 && !projects() ? 1 : gates_;
      FS_UNROLL
      for (int g = 0; g < kMostGates; ++g) {
        if (g < count) keep(to + g * loop_.hidden_size, results_[a].d[g]);
      }
      if (kProducts == 1 && grad_candidate) {
        keep(grad_candidate + (now_.offset + item.row) * loop_.hidden_size + item.unit,
             results_[a].d[GRU<Scalar>::U]);
      }
    });
  }

  static_assert(GRUResetBefore<float>::R == 0 && GRU<float>::U == 3, "store() relies on it");

  StepRows previous_;  // the step whose turn is next
  Inputs inputs_[kAhead];
  Results results_[kAhead];
};

}  // namespace fastseq::FASTSEQ_ISA
