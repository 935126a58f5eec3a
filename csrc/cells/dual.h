// A number and its tangent: the derivative of everything along one direction, computed beside it.
//
//   (a, a') + (b, b') = (a + b, a' + b')    (a, a') (b, b') = (a b, a' b + a b')    f(a, a') = (f(a), f'(a) a')
//
// A cell's step over V = Dual<V> is its step and that step's tangent; step_grad is its gradients and their tangents,
// which second derivatives are made of. Where the gates are known, x of Known<V> makes a step's tangent alone.
#pragma once

#include "cell.h"

namespace fastseq::FASTSEQ_ISA {

template <class V>
struct Dual {
  V value, tangent;

  Dual() = default;
  FS_HD Dual(V constant) : value(constant), tangent(0) {}
  FS_HD Dual(V value, V tangent) : value(value), tangent(tangent) {}

  FS_HD friend Dual operator+(Dual a, Dual b) { return {a.value + b.value, a.tangent + b.tangent}; }
  FS_HD friend Dual operator-(Dual a, Dual b) { return {a.value - b.value, a.tangent - b.tangent}; }
  FS_HD friend Dual operator*(Dual a, Dual b) {
    return {a.value * b.value, a.tangent * b.value + a.value * b.tangent};
  }
  // A constant has no tangent.
  FS_HD friend Dual operator-(V a, Dual b) { return {a - b.value, 0 - b.tangent}; }
};

template <class V>
FS_HD Dual<V> sigmoid(Dual<V> a) {
  const V s = sigmoid(a.value);
  return {s, a.tangent * s * (1 - s)};
}

template <class V>
FS_HD Dual<V> tanh(Dual<V> a) {
  const V t = tanh(a.value);
  return {t, a.tangent * (1 - t * t)};
}

template <class V>
FS_HD Dual<V> relu(Dual<V> a) {
  const V h = relu(a.value);
  return {h, relu_grad(h, a.tangent)};
}

// What is given to a function whose result is known already: that result, and the tangent of what is given.
template <class V>
struct Known {
  V result, tangent;

  FS_HD friend Known operator+(Known a, Dual<V> b) { return {a.result, a.tangent + b.tangent}; }
};

template <class V>
FS_HD Dual<V> sigmoid(Known<V> a) {
  return {a.result, a.tangent * a.result * (1 - a.result)};
}

template <class V>
FS_HD Dual<V> tanh(Known<V> a) {
  return {a.result, a.tangent * (1 - a.result * a.result)};
}

template <class V>
FS_HD Dual<V> relu(Known<V> a) {
  return {a.result, relu_grad(a.result, a.tangent)};
}

// Where relu bends it has no derivative; elsewhere h says only whether dh passes.
template <class V>
FS_HD Dual<V> relu_grad(Dual<V> h, Dual<V> dh) {
  return {relu_grad(h.value, dh.value), relu_grad(h.value, dh.tangent)};
}

}  // namespace fastseq::FASTSEQ_ISA
