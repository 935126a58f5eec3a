// What the forward and the backward pass share: who has which units and rows, the state between steps, and the
// order of loading, computing and storing.
#pragma once

#include "recurrent_items.h"

namespace fastseq::FASTSEQ_ISA {

template <class Traits>
class LoopPass {
 protected:
  using M = typename Traits::M;
  using Storage = typename M::Storage;
  using Scalar = typename M::Scalar;
  using Engine = StepEngine<Traits>;
  static constexpr int kProducts = Traits::kProducts, kRows = Engine::kRows;

  FS_DEVICE explicit LoopPass(const LoopKernelArgs& args)
      : args_(args),
        loop_(args.loop),
        engine_(args),
        units_(args.layout.units, int(loop_.hidden_size), engine_.rank, engine_.first_row, loop_.shape.batch),
        outputs_(projects() ? args.layout.projected_units : args.layout.units, width(), engine_.rank,
                 engine_.first_row, loop_.shape.batch),
        gates_(args.layout.gates),
        slots_(args.layout.saved) {}

  FS_DEVICE bool projects() const { return kProducts == 2 && loop_.proj_size > 0; }
  FS_DEVICE int width() const { return int(loop_.proj_size ? loop_.proj_size : loop_.hidden_size); }
  FS_DEVICE const LoopDirection& tensors() const { return engine_.tensors(); }
  FS_DEVICE bool packed() const { return loop_.shape.batch_sizes != nullptr; }
  FS_DEVICE bool active(const Item& item) const {
    return item.inside && has_step(loop_.lengths, now_, item.row);
  }
  FS_DEVICE bool reverse() const { return loop_.reversed || engine_.direction == 1; }
  // Step s in the order of time, or against it.
  FS_DEVICE int64_t time(int64_t s, bool against) const {
    return reverse() != against ? loop_.shape.steps - 1 - s : s;
  }

  // Two values of each unit and row, in shared memory; only the thread that has the item touches them.
  FS_DEVICE Scalar& state(int which, const Item& item) const {
    const LoopLayout& layout = args_.layout;
    const int units = layout.units > layout.projected_units ? layout.units : layout.projected_units;
    return engine_.template shared<Scalar>(layout.state_at)[(which * kRows + item.n) * units + item.u];
  }
  // From or to [batch, width] in global memory; null: zeros, or not wanted.
  FS_DEVICE void load_state(int which, const Items<kRows>& items, const void* tensor, int64_t width) const {
    const auto* const from = static_cast<const Storage*>(tensor);
    items.for_all([&](const Item& item) {
      const bool there = from && item.inside;
      state(which, item) = there ? Scalar(widen(from[item.row * width + item.unit])) : Scalar(0);
    });
  }
  template <class Value>
  FS_DEVICE void store_state(const Items<kRows>& items, void* tensor, int64_t width, Value value) const {
    if (!tensor) return;
    items.for_all([&](const Item& item) {
      if (item.inside) keep(static_cast<Storage*>(tensor) + item.row * width + item.unit, value(item));
    });
  }

  FS_DEVICE Storage* saved_row(const StepRows& step, const Item& item) const {
    auto* const saved = static_cast<Storage*>(tensors().saved);
    return saved + (step.offset + item.row) * slots_ * loop_.hidden_size + item.unit;
  }
  // Of pre, or of its gradient.
  FS_DEVICE Storage* gates_row(const Item& item) const {
    const int64_t row = (now_.offset + item.row) * loop_.directions + engine_.direction;
    return static_cast<Storage*>(loop_.pre) + row * gates_ * loop_.hidden_size + item.unit;
  }

  // The items in rounds of kAhead a thread: body(first item of the round).
  template <class Body>
  FS_DEVICE static void for_rounds(const Items<kRows>& items, Body body) {
    FS_NO_UNROLL
    for (int begin = 0; begin < items.count(); begin += kAhead * thread_count()) body(begin);
  }
  // What a round leaves to store is stored before the next round, but for the last one, whose turn comes when the
  // other blocks have been told: store(last_round_).
  template <class Body, class Store>
  FS_DEVICE void for_rounds(const Items<kRows>& items, Body body, Store store) {
    for_rounds(items, [&](int begin) {
      body(begin);
      last_round_ = begin;
      if (begin + kAhead * thread_count() < items.count()) store(begin);
    });
  }
  // Whether what was loaded for the first round has been overwritten by a later one.
  FS_DEVICE bool has_rounds(const Items<kRows>& items) const {
    return items.count() > kAhead * thread_count();
  }

  const LoopKernelArgs& args_;
  const RecurrentLoopArgs& loop_;
  Engine engine_;
  const Items<kRows> units_;    // hidden units
  const Items<kRows> outputs_;  // units of h: the same, or those of the projection
  const int gates_, slots_;
  StepRows now_;
  int last_round_ = 0;
};

}  // namespace fastseq::FASTSEQ_ISA
