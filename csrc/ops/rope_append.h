// Rotating a fused projection into a cache: what rope_append and decoder_layers share.
#pragma once

#include "kernels/activations/activations.h"
#include "ops/glue.h"

namespace ow {

// cos and sin must be [t, d / 2] float32.
void check_tables(const char* op, const Tensor& cos, const Tensor& sin, int64_t t, int64_t d);

class RopeAppend {
 public:
  // x [b, t, h + 2 g, d] contiguous; q [b, t, h, d].
  RopeAppend(int64_t b, int64_t t, int64_t h, int64_t d, FloatType type, const Tensor& cos,
             const Tensor& sin, const Tensor& keys, const Tensor& values, int64_t position);

  void run(const void* x, HeadStrides x_strides, void* q, const Parallel& parallel) const;

 private:
  RopeArgs args_;  // of the queries
  int64_t kv_heads_;
  void* keys_;  // where the first new token goes
  HeadStrides key_strides_;
  void* values_;
  HeadStrides value_strides_;
};

}  // namespace ow
