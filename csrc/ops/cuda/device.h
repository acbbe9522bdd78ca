// Between torch's stable ABI and launches: checks of devices, the current stream, registration. The
// emulated library is built of the same operators, as openwork_emulated::* on CPU tensors.
#pragma once

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cuda/status.h"
#include "ops/glue.h"

#if defined(OW_CUDA_EMULATED)
#define OW_DEVICE_OPERATOR(name, schema, function)                       \
  STABLE_TORCH_LIBRARY_FRAGMENT(openwork_emulated, m) { m.def(schema); } \
  STABLE_TORCH_LIBRARY_IMPL(openwork_emulated, CPU, m) { m.impl(name, TORCH_BOX(function)); }
#else
#include <torch/csrc/stable/accelerator.h>
// The schema is the CPU library's.
#define OW_DEVICE_OPERATOR(name, schema, function) \
  STABLE_TORCH_LIBRARY_IMPL(openwork, CUDA, m) { m.impl(name, TORCH_BOX(function)); }

// Defined by a CUDA build of torch. Weak: beside a CPU build the library still loads, so that
// export sees its operators.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);
#endif

namespace ow {

struct Operand {
  const char* name;
  const Tensor* tensor;  // or null
};

inline std::string place_text(Place place) {
  if (place.device_type == aoti_torch_device_type_cpu()) return "cpu";
  std::ostringstream text;
  text << (place.device_type == aoti_torch_device_type_cuda() ? "cuda:" : "another device:")
       << place.device_index;
  return text.str();
}

// All on one device, and none too large for the kernels' indices. What is no tensor is left to the
// checks that follow.
inline void check_operands(const char* op, std::initializer_list<Operand> operands) {
  constexpr int64_t kMaxElements = int64_t{1} << 31;
  const Operand* first = nullptr;
  for (const Operand& operand : operands) {
    if (operand.tensor == nullptr || !operand.tensor->defined()) continue;
    if (first == nullptr) first = &operand;
    const Place want = place_of(*first->tensor);
    const Place got = place_of(*operand.tensor);
    OW_CHECK(got.device_type == want.device_type && got.device_index == want.device_index, op, ": ",
             operand.name, " must be on the device of ", first->name, ", ", place_text(want),
             ", got ", place_text(got));
    OW_CHECK(operand.tensor->numel() < kMaxElements, op, ": ", operand.name,
             " must have fewer than 2^31 elements on a GPU, got ", operand.tensor->numel());
  }
}

inline void check_aligned(const char* op, const char* name, const Tensor& tensor) {
  constexpr uintptr_t kAlignment = 16;  // of cp.async and of vector loads
  const uintptr_t past = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment;
  OW_CHECK(past == 0, op, ": ", name, " must begin at a multiple of ", kAlignment,
           " bytes on a GPU, got ", past, " past one; call .clone()");
}

// Makes the device of an argument current, and launches on torch's stream of it.
class Device {
 public:
  Device(const char* op, const char* name, const Tensor& tensor)
      : op_(op)
#if !defined(OW_CUDA_EMULATED)
        ,
        guard_(tensor.get_device_index())
#endif
  {
    constexpr int kOldest = 80;
    const int32_t index = place_of(tensor).device_index;
    const int capability = compute_capability(index);
    if (capability < 0) fail_with("the CUDA runtime must know the device", -capability);
    OW_CHECK(capability >= kOldest, op, ": ", name,
             " must be on a GPU of compute capability 8.0 or later, got ", capability / 10, ".",
             capability % 10);
#if !defined(OW_CUDA_EMULATED)
    if (aoti_torch_get_current_cuda_stream == nullptr ||
        aoti_torch_get_current_cuda_stream(index, &stream_) != 0) {
      throw std::runtime_error(std::string(op) + ": torch has no CUDA stream");
    }
#endif
  }

  void* stream() const { return stream_; }

  void check(const LaunchStatus& status) const {
    if (status.error == 0) [[likely]]
      return;
    fail_with("kernel " + std::string(status.kernel) + " must launch", status.error);
  }

 private:
  [[noreturn]] void fail_with(const std::string& expected, int error) const {
    std::ostringstream message;
    message << op_ << ": " << expected << ", got CUDA error " << error << ": "
            << launch_error_text(error);
    throw std::runtime_error(message.str());
  }

  const char* op_;
#if !defined(OW_CUDA_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

}  // namespace ow
