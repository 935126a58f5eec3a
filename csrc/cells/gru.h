// GRU steps (Cho et al. 2014).
//
//   r = sigmoid(x_r + u_r)   z = sigmoid(x_z + u_z)
//   n = tanh(x_n + r * u_n)            GRU: reset after the product, as torch and cuDNN do; u_n = U_n h + b_n
//   n = tanh(x_n + U_n (r * h) + b_n)  GRUResetBefore: reset before it, as in the paper
//   h' = (1 - z) * n + z * h
//
// x = W x_t + b_ih, u = U h + b_hh, in torch's order r, z, n.
#pragma once

#include "cell.h"

namespace fastseq::FASTSEQ_ISA {

template <class V>
struct GRU {
  static constexpr int kGates = 3, kFirstGates = 3, kSaved = 4, kGrads = 4;
  static constexpr bool kCellState = false, kDirect = true, kGradOfOutput = false;
  static constexpr int kInputGrad[] = {0, 1, 2}, kRecurrentGrad[] = {0, 1, 3};
  enum { R, Z, N, U };  // saved; U is u_n. Among the gradients N is that of x_n and U that of u_n.
  static constexpr int kCarry = 3, kEndSaves = N;  // r, z and, in the place of n, u_n are carried

  template <class X>
  FS_HD static void begin(const X* x, const V* u, V, V, V* saved, V* carry, V&) {
    carry[R] = saved[R] = sigmoid(x[R] + u[R]);
    carry[Z] = saved[Z] = sigmoid(x[Z] + u[Z]);
    carry[N] = saved[U] = u[N];
  }
  template <class X>
  FS_HD static void end(const X* x, V h, const V* carry, V& n, V& h_next) {
    n      = tanh(x[N] + carry[R] * carry[N]);
    h_next = (1 - carry[Z]) * n + carry[Z] * h;
  }

  template <class Clip = Unclipped>
  FS_HD static void step_grad(const V* saved, V h, V, V, V, V dh, V, V* d, V& dh_direct, V&, Clip = {}) {
    d[N]      = dh * (1 - saved[Z]) * (1 - saved[N] * saved[N]);
    d[U]      = d[N] * saved[R];
    d[R]      = d[N] * saved[U] * saved[R] * (1 - saved[R]);
    d[Z]      = dh * (h - saved[N]) * saved[Z] * (1 - saved[Z]);
    dh_direct = dh * saved[Z];
  }
};

template <class V>
struct GRUResetBefore {
  static constexpr int kGates = 3, kFirstGates = 2, kSaved = 3, kGrads = 3;
  static constexpr int kStepGrads  = 1;  // first_grad makes d[R], which needs the gradient of r * h
  static constexpr bool kCellState = false, kDirect = true, kGradOfOutput = false;
  static constexpr int kInputGrad[] = {0, 1, 2}, kRecurrentGrad[] = {0, 1, 2};
  enum { R, Z, N };

  template <class X>
  FS_HD static void first(const X* x, const V* u, V h, V* saved, V& operand) {
    saved[R] = sigmoid(x[R] + u[R]);
    saved[Z] = sigmoid(x[Z] + u[Z]);
    operand  = saved[R] * h;
  }

  template <class X>
  FS_HD static void step(const X* x, const V* u, V h, V, V* saved, V& h_next, V&) {
    saved[N] = tanh(x[N] + u[N]);
    h_next   = (1 - saved[Z]) * saved[N] + saved[Z] * h;
  }

  template <class Clip = Unclipped>
  FS_HD static void step_grad(const V* saved, V h, V, V, V, V dh, V, V* d, V& dh_direct, V&, Clip = {}) {
    d[N]      = dh * (1 - saved[Z]) * (1 - saved[N] * saved[N]);
    d[Z]      = dh * (h - saved[N]) * saved[Z] * (1 - saved[Z]);
    dh_direct = dh * saved[Z];
  }

  FS_HD static void first_grad(const V* saved, V h, V d_operand, V* d, V& dh_direct, V& operand) {
    d[R]      = d_operand * h * saved[R] * (1 - saved[R]);
    dh_direct = dh_direct + d_operand * saved[R];
    operand   = saved[R] * h;
  }
};

}  // namespace fastseq::FASTSEQ_ISA
