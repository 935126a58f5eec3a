// What a cell is to the engines: the math of one time step over a value type V (a SIMD vector on the CPU, a
// float on CUDA), and nothing else. Gate order is torch's.
//
//   kGates         gate pre-activations; x[g] = W x_t + b_ih comes from the input, u[g] = U h + b_hh from the
//   state kFirstGates    gates whose u multiplies h. The rest (none, in most cells) multiply the operand that
//   first()
//                  makes from h and the first gates, so that a step takes two products.
//   kSaved         values that the backward pass needs, beside the states
//   kCellState     whether there is a second state c
//   kGrads         distinct pre-activation gradients; gate g finds its own at kInputGrad[g] for x[g] and at
//                  kRecurrentGrad[g] for u[g]
//   kGradOfOutput  whether step_grad reads h_next
//   kDirect        whether h enters h_next other than through U, so that step reads h and step_grad makes a
//   dh_direct
//
//   step(x, u, h, c, saved, h_next, c_next)
//   step_grad(saved, h, h_next, c, c_next, dh, dc, d, dh_direct, dc_prev)   dh, dc: gradients of h_next,
//   c_next.
//       d: pre-activation gradients. dh_direct: the part of h's gradient that does not pass through U.
// and where kFirstGates < kGates
//   first(x, u, h, saved, operand)
//   first_grad(saved, h, d_operand, d, dh_direct, operand)   makes the gradients that step_grad left out
//   (those of
//       gates below kStepGrads), adds to dh_direct, makes the operand again.
#pragma once

#if defined(__CUDACC__)
#define FS_HD __host__ __device__ __forceinline__
#else
#define FS_HD inline
#endif
