// What a cell is to the engines: the math of one time step over a value type V (a SIMD vector on the CPU, a
// float on CUDA), and nothing else. Gate order is torch's. A cell says
//
//   kGates          how many gate pre-activations it has: x[g] = W x_t + b_ih and u[g] = U h + b_hh
//   kFirstGates     for how many of them U multiplies h. The others (none, in most cells) multiply what first()
//                   makes of h and the first gates, so that a step takes two products
//   kSaved          how many values the backward pass needs beside the states
//   kCellState      whether there is a second state c
//   kGrads          how many different pre-activation gradients there are; kInputGrad[g] is the index of that
//                   of x[g], kRecurrentGrad[g] that of u[g]
//   kGradOfOutput   whether step_grad reads h_next
//   kDirect         whether h enters h_next other than through U: the step reads h, step_grad
//                   makes dh_direct
//
// and has
//
//   step(x, u, h, c, saved, h_next, c_next)
//       or, where one function waits for another, two stages that an engine may put far apart:
//       begin(x, u, h, c, saved, carry, c_next), end(x, h, carry, saved_by_end, h_next). kCarry, at most kGates,
//       is how many values go from one to the other, kEndSaves which of the saved values is end()'s, or -1.
//       x is of V, or of another type whose sum with u is what the cell's functions take (see dual.h)
//   step_grad(saved, h, h_next, c, c_next, dh, dc, d, dh_direct, dc_prev, clip)
//       dh, dc are the gradients of h_next and c_next, d the pre-activation gradients, dh_direct the part of h's
//       gradient that does not pass through U. clip bounds the whole gradient of c_next, which only the cell
//       knows; dh comes bounded.
//
// Where kFirstGates < kGates also
//
//   first(x, u, h, saved, operand)
//   first_grad(saved, h, d_operand, d, dh_direct, operand)
//       makes the gradients that step_grad left out (the first kStepGrads of d), adds to dh_direct, and makes
//       the operand again.
#pragma once

#if defined(FS_DEVICE)  // <prim.h> comes first where kernels are built
#define FS_HD FS_DEVICE
#else
#define FS_HD inline
#endif

namespace fastseq::FASTSEQ_ISA {

// The clip of a step_grad that bounds nothing.
struct Unclipped {
  template <class V>
  FS_HD V operator()(V x) const {
    return x;
  }
};

}  // namespace fastseq::FASTSEQ_ISA
