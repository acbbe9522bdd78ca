// A stack of decoder layers over a cache, as one operator: the same steps as rms_norm,
// lowbit_linear, rope_append, decode_attention and silu_mul called one after another, and the same
// results. One token's steps take microseconds each, less than it takes to get to them through
// Python and the dispatcher or to wake the thread pool, so here a Team of threads stays for all of
// them.
#include <string>
#include <vector>

#include "core/team.h"
#include "ops/cache.h"
#include "ops/lowbit_linear.h"
#include "ops/rope_append.h"

namespace ow {
namespace {

constexpr const char* kOp = "decoder_layers";

constexpr int64_t kLinears = 4;
constexpr const char* kNames[kLinears] = {"qkv", "o", "gate_up", "down"};
// Of one linear: layout, n, k, group_size, compute; packed, scales, zeros, bias.
constexpr int64_t kInts = 5;
constexpr int64_t kLinearTensors = 4;
// Of one layer: attn_norm, mlp_norm, then the linears'.
constexpr int64_t kNorms = 2;
constexpr int64_t kTensors = kNorms + kLinearTensors * kLinears;

struct Layer {
  const void* attn_norm;
  const void* mlp_norm;
  LowbitLinear qkv, o, gate_up, down;
  RopeAppend rope;
  DecodeAttentionArgs attention;
};

// What all layers have in common.
struct Shape {
  int64_t b, t, d, heads, kv_heads, head_dim, ffn;
  FloatType type;
  ScalarType dtype;

  int64_t m() const { return b * t; }
  int64_t qkv() const { return (heads + 2 * kv_heads) * head_dim; }
};

// Runs check(op); if it fails, once more with the name of the part in its messages, which would
// take microseconds to make for every one.
template <class Name, class Check>
auto named(const char* op, const Name& name, const Check& check) {
  try {
    return check(op);
  } catch (const std::invalid_argument&) {
    check((std::string(op) + ": " + name()).c_str());
    throw;
  }
}

// An empty tensor stands for None.
const Tensor* unless_empty(const char* op, const char* name, const Tensor& tensor) {
  check_defined(op, name, tensor);
  return tensor.numel() == 0 ? nullptr : &tensor;
}

// tensors: packed, scales, zeros, bias; ints: layout, n, k, group_size, compute.
LowbitLinear check_linear(const char* op, const Shape& s, const Tensor* tensors,
                          const int64_t* ints, int64_t n, int64_t k) {
  OW_CHECK(ints[1] == n && ints[2] == k, op, ": weight must have n = ", n, " and k = ", k, ", got ",
           ints[1], " and ", ints[2]);
  const Tensor* zeros = unless_empty(op, "zeros", tensors[2]);
  const LowbitWeight w = check_lowbit_geometry(op, check_layout(op, ints[0]), n, k, ints[3]);
  check_lowbit_tensors(op, w, tensors[0], tensors[1], zeros);
  check_compute(op, ints[4]);
  const Tensor* bias = unless_empty(op, "bias", tensors[3]);
  if (bias != nullptr) {
    check_operand(op, "bias", *bias, s.dtype, {n});
  }
  return {w, tensors[0], tensors[1], zeros, bias, ints[4], s.m(), s.type};
}

const void* check_norm(const char* op, const Shape& s, const char* name, const Tensor& weight) {
  check_operand(op, name, weight, s.dtype, {s.d});
  return weight.const_data_ptr();
}

Layer check_layer(const char* op, const Shape& s, const Tensor* tensors, const int64_t* ints,
                  const Tensor& cos, const Tensor& sin, const Tensor& keys, const Tensor& values,
                  int64_t position) {
  const int64_t kv_heads = check_cache(op, keys, values, s.b, s.head_dim, s.head_dim, s.dtype);
  check_position(op, keys, s.t, position);
  OW_CHECK(kv_heads == s.kv_heads, op, ": keys must have ", s.kv_heads,
           " heads, as the first layer's, got ", kv_heads);
  const auto linear = [&](int64_t which, int64_t n, int64_t k) {
    return named(
        op, [&] { return std::string(kNames[which]); },
        [&](const char* where) {
          return check_linear(where, s, tensors + kNorms + kLinearTensors * which,
                              ints + kInts * which, n, k);
        });
  };
  const int64_t width = s.heads * s.head_dim;
  return {
      check_norm(op, s, "attn_norm", tensors[0]),
      check_norm(op, s, "mlp_norm", tensors[1]),
      linear(0, s.qkv(), s.d),
      linear(1, s.d, width),
      linear(2, 2 * s.ffn, s.d),
      linear(3, s.d, s.ffn),
      {s.b, s.t, s.heads, s.head_dim, s.type, cos, sin, keys, values, position},
      attention_over(keys, values, s.b, s.t, s.heads, s.head_dim, position + s.t, std::nullopt)};
}

// The activations of one layer at a time, and the scratch memory of its steps.
struct Buffers {
  void *normed, *qkv, *q, *attended, *gate_up, *gated;
  float* states;
  uint8_t* scratch;

  // Cuts `memory` if it is not null; gives the bytes needed.
  int64_t place(const Shape& s, const std::vector<Layer>& layers, uint8_t* memory) {
    int64_t bytes = 0;
    const auto take = [&](int64_t size) {
      uint8_t* piece = memory == nullptr ? nullptr : memory + bytes;
      bytes += Scratch::bytes_for(size);
      return piece;
    };
    const int64_t row = s.m() * float_size(s.type);
    normed = take(row * s.d);
    qkv = take(row * s.qkv());
    q = take(row * s.heads * s.head_dim);
    attended = take(row * s.heads * s.head_dim);
    gate_up = take(row * 2 * s.ffn);
    gated = take(row * s.ffn);
    states = reinterpret_cast<float*>(take(4 * decode_attention_state_count(layers[0].attention)));
    int64_t largest = 0;
    for (const Layer& layer : layers) {
      for (const LowbitLinear* linear : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) {
        largest = largest < linear->scratch_bytes() ? linear->scratch_bytes() : largest;
      }
    }
    scratch = take(largest);
    return bytes;
  }
};

// x [m, d] is the residual stream, updated in place.
void run_layer(const Shape& s, const Layer& layer, const Buffers& buffers, float eps, void* x,
               const Parallel& parallel) {
  const Isa isa = active_isa();
  const int64_t m = s.m();
  const Scratch scratch(buffers.scratch);
  rms_norm({m, s.d, s.type, x, layer.attn_norm, eps, buffers.normed}, isa, parallel);
  layer.qkv.run(buffers.normed, nullptr, buffers.qkv, scratch, parallel);
  layer.rope.run(buffers.qkv, {s.t * s.qkv(), s.qkv(), s.head_dim}, buffers.q, parallel);
  DecodeAttentionArgs attention = layer.attention;
  attention.q = buffers.q;
  attention.states = buffers.states;
  attention.y = buffers.attended;
  decode_attention(attention, isa, parallel);
  layer.o.run(buffers.attended, x, x, scratch, parallel);
  rms_norm({m, s.d, s.type, x, layer.mlp_norm, eps, buffers.normed}, isa, parallel);
  layer.gate_up.run(buffers.normed, nullptr, buffers.gate_up, scratch, parallel);
  silu_mul({m, s.ffn, s.type, buffers.gate_up, buffers.gated}, isa, parallel);
  layer.down.run(buffers.gated, x, x, scratch, parallel);
}

Shape check_shapes(const Tensor& x, const std::vector<Tensor>& keys,
                   const std::vector<Tensor>& values, const std::vector<Tensor>& weights,
                   const std::vector<int64_t>& linears, int64_t heads) {
  check_float(kOp, "x", x);
  OW_CHECK(x.dim() == 3 && x.size(2) >= 1, kOp, ": x must be [b, t, d], got ", shape_text(x));
  const int64_t layers = int64_t(keys.size());
  OW_CHECK(layers >= 1, kOp, ": keys must hold one tensor a layer, got none");
  const auto check_count = [&](const char* name, size_t got, int64_t each) {
    OW_CHECK(int64_t(got) == layers * each, kOp, ": ", name, " must hold ", layers * each, " (",
             each, " a layer), got ", got);
  };
  check_count("values", values.size(), 1);
  check_count("weights", weights.size(), kTensors);
  check_count("linears", linears.size(), kInts * kLinears);
  check_defined(kOp, "keys", keys[0]);
  OW_CHECK(keys[0].dim() == 4 && keys[0].size(1) >= 1 && keys[0].size(3) >= 2 &&
               keys[0].size(3) % 2 == 0,
           kOp, ": keys must be [b, kv_heads, max_len, head_dim] with head_dim even, got ",
           shape_text(keys[0]));
  const int64_t kv_heads = keys[0].size(1);
  OW_CHECK(heads >= 1 && heads < int64_t{1} << 31 && heads % kv_heads == 0, kOp,
           ": heads must be a multiple of kv_heads = ", kv_heads, ", got ", heads);
  const int64_t ffn = linears[kInts * 3 + 2];  // k of the first layer's down
  OW_CHECK(ffn >= 1 && ffn < int64_t{1} << 31, kOp, ": down must have k in 1 .. 2^31 - 1, got ",
           ffn);
  return {x.size(0),       x.size(1), x.size(2),     heads,          kv_heads,
          keys[0].size(3), ffn,       float_type(x), x.scalar_type()};
}

Tensor decoder_layers(const Tensor& x, const Tensor& cos, const Tensor& sin,
                      std::vector<Tensor> keys, std::vector<Tensor> values, int64_t position,
                      std::vector<Tensor> weights, std::vector<int64_t> linears, int64_t heads,
                      double eps) {
  const Shape s = check_shapes(x, keys, values, weights, linears, heads);
  check_tables(kOp, cos, sin, s.t, s.head_dim);
  std::vector<Layer> layers;
  layers.reserve(keys.size());
  for (size_t i = 0; i < keys.size(); ++i) {
    layers.push_back(named(
        kOp, [&] { return "layer " + std::to_string(i); },
        [&](const char* op) {
          return check_layer(op, s, &weights[i * kTensors], &linears[i * kInts * kLinears], cos,
                             sin, keys[i], values[i], position);
        }));
  }
  Tensor y = fast_empty({s.b, s.t, s.d}, s.dtype);
  if (y.numel() == 0) return y;

  const Tensor contiguous = as_contiguous(x);
  memcpy(y.mutable_data_ptr(), contiguous.const_data_ptr(), size_t(y.numel() * float_size(s.type)));
  Buffers buffers{};
  const Workspace workspace(buffers.place(s, layers, nullptr));
  buffers.place(s, layers, workspace.scratch().take<uint8_t>(0));
  void* residual = y.mutable_data_ptr();
  Team::run(torch_parallel(), [&](const Parallel& parallel) {
    for (const Layer& layer : layers) run_layer(s, layer, buffers, float(eps), residual, parallel);
  });
  return y;
}

}  // namespace
}  // namespace ow

STABLE_TORCH_LIBRARY_FRAGMENT(openwork, m) {
  m.def(
      "decoder_layers(Tensor x, Tensor cos, Tensor sin, Tensor(a!)[] keys, Tensor(b!)[] values, "
      "int position, Tensor[] weights, int[] linears, int heads, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(openwork, CPU, m) {
  m.impl("decoder_layers", TORCH_BOX(&ow::decoder_layers));
}
