// Between torch's stable ABI and the kernels: typed pointers, allocation, threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "core/parallel.h"
#include "core/types.h"
#include "ops/check.h"

namespace ow {

inline FloatType float_type(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16: return FloatType::bf16;
    case ScalarType::Half: return FloatType::f16;
    default: return FloatType::f32;
  }
}
inline FloatType float_type(const Tensor& tensor) { return float_type(tensor.scalar_type()); }

// Dimensions of a tensor the operators make.
constexpr int64_t kMaxDim = 16;

// Where a tensor's memory is.
struct Place {
  int32_t device_type;
  int32_t device_index;
};
inline Place cpu_place() { return {aoti_torch_device_type_cpu(), 0}; }
inline Place place_of(const Tensor& tensor) {
  Place place{};
  aoti_torch_get_device_type(tensor.get(), &place.device_type);
  aoti_torch_get_device_index(tensor.get(), &place.device_index);
  return place;
}

// A contiguous tensor straight from the C shim. torch::stable::new_empty goes through the
// dispatcher and boxes six optionals, which costs half of a small op's time.
inline Tensor fast_empty(const int64_t* sizes, int64_t dim, ScalarType type,
                         Place place = cpu_place()) {
  int64_t strides[kMaxDim];
  int64_t step = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = step;
    step *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  const int32_t dtype = int32_t(type);
  if (aoti_torch_empty_strided(dim, sizes, strides, dtype, place.device_type, place.device_index,
                               &handle) != 0) {
    fail("openwork: cannot allocate ", step, " elements of ", dtype_name(type));
  }
  return Tensor(handle);
}
inline Tensor fast_empty(std::initializer_list<int64_t> sizes, ScalarType type,
                         Place place = cpu_place()) {
  return fast_empty(sizes.begin(), int64_t(sizes.size()), type, place);
}

// Where `like` is and of its shape, but for the last dimension.
inline Tensor empty_with_last(const char* op, const Tensor& like, int64_t last, ScalarType type) {
  int64_t sizes[kMaxDim];
  const int64_t dim = like.dim();
  OW_CHECK(dim <= kMaxDim, op, ": x must have at most ", kMaxDim, " dimensions, got ", dim);
  for (int64_t i = 0; i + 1 < dim; ++i) sizes[i] = like.size(i);
  sizes[dim - 1] = last;
  return fast_empty(sizes, dim, type, place_of(like));
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Optional arguments as pointers.
inline const Tensor* or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? &*tensor : nullptr;
}
inline const void* const_data(const Tensor* tensor) {
  return tensor == nullptr ? nullptr : tensor->const_data_ptr();
}

// Cuts memory into 64-byte aligned pieces.
class Scratch {
 public:
  explicit Scratch(uint8_t* begin) : next_(begin) {}

  static int64_t bytes_for(int64_t bytes) { return round_up(bytes, 64); }

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += bytes_for(count * int64_t(sizeof(T)));
    return piece;
  }

 private:
  uint8_t* next_;
};

// Scratch memory of one op call. Small calls (decoding) reuse a buffer of the calling thread;
// larger ones allocate a tensor.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    constexpr int64_t kSmall = 256 * 1024;
    alignas(64) static thread_local uint8_t small[kSmall];
    if (bytes <= kSmall) {
      begin_ = small;
    } else {
      large_ = fast_empty({bytes}, ScalarType::Byte);
      begin_ = static_cast<uint8_t*>(large_->mutable_data_ptr());
    }
  }

  Scratch scratch() const { return Scratch(begin_); }

 private:
  std::optional<Tensor> large_;
  uint8_t* begin_;
};

// torch's intra-op pool, so torch.set_num_threads rules openwork too.
inline Parallel torch_parallel() {
  return {int64_t(torch::stable::get_num_threads()), nullptr,
          [](void*, int64_t n, Parallel::Task task, const void* context) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(context, i);
            });
          }};
}

}  // namespace ow
