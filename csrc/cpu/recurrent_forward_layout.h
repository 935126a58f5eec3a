// The memory of the forward pass: what it keeps beside the tensors, and where it lies.
#pragma once

#include "recurrent_common.h"

namespace fastseq::FASTSEQ_ISA {

template <class S, class O, int kPlanes>
struct ForwardLayout : RecurrentPass<S, O, kPlanes> {
  using Base = RecurrentPass<S, O, kPlanes>;
  using Base::args, Base::plan, Base::cell, Base::steps, Base::plane;
  using Base::most_rows, Base::slots, Base::team_size, Base::two_products, Base::width;
  using Scalar = typename Operand<O>::Scalar;
  static constexpr int kWidth = Vec<Scalar>::kWidth;

  // A product and the cell function that follows it: all gates, or the first ones and then the rest.
  struct Phase {
    int first_gate, gates;
    void (*run)(const StepTile<S, O, kPlanes>&);
    Panels<O> input[kPlanes], recurrent[kPlanes];  // of the direction at hand
  };

  struct DirectionState {
    Phase phase[2];
    Panels<O> projection[kPlanes];
    O* state[2];             // [B, planes, R, padded]: h_{t-1} and h_t
    O* middle;               // [B, planes, H, padded]: r * h, or the output before its projection; or null
    S* saved_step[kPlanes];  // [B, slots, H]: stands in for args.saved where a second phase needs it
  };

  const bool in_place;     // no weight is packed
  const bool single_step;  // each block is packed into the thread's slot just before its use
  Blocks units, projected;
  int sum_planes;  // rows of sums for each row: of known numbers there are none
  int64_t chunk_rows, input_stride, state_stride, middle_stride;
  DirectionState direction[2];
  Scalar* projected_input;  // [direction and batch part][chunk row, plane, gate, unit]
  O* staged;                // [direction and batch part][chunk row, plane][input_stride]
  Panels<O> slot;           // the shape of a slot
  int64_t slot_size;
  O* slot_memory;     // [thread]
  Scalar* slot_bias;  // [thread]

  ForwardLayout(const RecurrentArgs& args, const RecurrentPlan& plan)
      : Base(args, plan),
        in_place(kPlanes == 1 && args.one_step),
        single_step(kPlanes == 1 && args.shape.steps == 1 && !in_place) {
    this->allocate([this](Arena& arena) { lay_out(arena); });
    const size_t rows = size_t(steps.all_rows()), hidden = size_t(args.hidden_size);
    for (int p = 0; p < kPlanes; ++p) {
      advise_large_pages(plane(p).output.data, rows * size_t(args.directions * width()) * sizeof(S));
      for (int d = 0; d < args.directions; ++d) {
        advise_large_pages(plane(p).direction[d].saved, rows * size_t(slots()) * hidden * sizeof(S));
      }
    }
  }

  bool packs_ahead() const { return !in_place && !single_step; }
  int phases() const { return two_products() ? 2 : 1; }

 private:
  void lay_out(Arena& arena) {
    const int64_t hidden = args.hidden_size, batch = args.shape.batch;
    const int most_gates = phases() == 2 ? cell.first_gates : cell.gates;
    sum_planes = args.known ? 1 : kPlanes;
    const int64_t operand_rows = sum_planes * most_rows();
    units = {hidden, kWidth * unit_vectors<Scalar>(hidden, most_gates, plan.unit_parts, operand_rows,
                                                   block_vectors(operand_rows))};
    projected = {args.proj_size, kPanelVectors * kWidth};
    chunk_rows = least(rows_of(args.shape), most(plan.chunk_rows, most_rows()));
    input_stride = round_up(args.input_size, kWidth);
    state_stride =
        round_up(width(), kWidth) + kWidth;  // an odd number of lines: rows spread over the cache's sets
    middle_stride = round_up(hidden, kWidth) + kWidth;
    this->take_shared();
    for (int d = 0; d < args.directions; ++d) {
      DirectionState& state = direction[d];
      for (int p = 0; p < phases(); ++p) {
        const int first = p == 0 ? 0 : cell.first_gates;
        const int gates = (p == 0 ? cell.first_gates : cell.gates) - first;
        const bool last = p == phases() - 1;
        const auto run = args.known ? last ? cell.step_along : cell.first_along
                         : last     ? cell.step
                                    : cell.first;
        state.phase[p] = {first, gates, run, {}, {}};
        Phase& phase = state.phase[p];
        for (int i = 0; i < kPlanes; ++i) {
          const RecurrentDirection& t = plane(i).direction[d];
          phase.input[i] = {nullptr, nullptr, units, gates, args.input_size, 1};
          if (packs_ahead()) phase.input[i].take(arena, t.bias_ih, t.weight_ih);
          phase.recurrent[i] = {nullptr, nullptr, units, gates, width(), 1, panel_vectors(operand_rows)};
          if (packs_ahead()) phase.recurrent[i].take(arena, t.bias_hh, t.weight_hh);
        }
      }
      for (int i = 0; i < kPlanes; ++i) {
        state.projection[i] = {nullptr, nullptr, projected, 1, hidden, 1};
        if (args.proj_size) state.projection[i].take(arena, false, plane(i).direction[d].weight_hr);
      }
      for (O*& buffer : state.state) buffer = arena.take<O>(kPlanes * batch * state_stride);
      state.middle =
          args.proj_size || phases() == 2 ? arena.take<O>(kPlanes * batch * middle_stride) : nullptr;
      for (int i = 0; i < kPlanes; ++i) {
        const bool stand_in = phases() == 2 && !plane(i).direction[d].saved;
        state.saved_step[i] = stand_in ? arena.take<S>(batch * slots() * hidden) : nullptr;
      }
    }
    const int64_t rows = plan.direction_parts * plan.batch_parts * chunk_rows;
    projected_input = arena.take<Scalar>(rows * sum_planes * cell.gates * units.count() * units.width);
    staged = arena.take<O>(rows * kPlanes * input_stride);
    const int64_t depth = single_step ? most(args.input_size, width()) : 0;
    slot = {nullptr, nullptr, {1, units.width}, most_gates, depth, 1, kPanelVectors, true};
    slot_size = slot.block_size();
    slot_memory = arena.take<O>(team_size() * slot_size);
    slot_bias = arena.take<Scalar>(team_size() * most_gates * units.width);
  }
};

}  // namespace fastseq::FASTSEQ_ISA
