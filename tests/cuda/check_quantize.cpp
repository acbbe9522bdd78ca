#include "check_family.h"
#include "kernels/quantize/quantize_cuda.h"

namespace {

using namespace ow;

struct Outputs {
  check::Bytes codes, scales;

  EncodeArgs of(EncodeArgs args) {
    const int64_t groups = div_up(args.k, args.group_size);
    codes.resize(size_t(element_count(args.blocks, args.m * args.digits)));
    scales.resize(size_t(4 * args.m * (args.digits == 1 ? 1 : groups)));
    args.codes = reinterpret_cast<int8_t*>(codes.data());
    args.scales = reinterpret_cast<float*>(scales.data());
    return args;
  }
};

void check_quantize() {
  for (const int64_t k : {1, 48, 700, 2600}) {
    for (const int32_t digits : {1, 3}) {
      for (const FloatType type : {FloatType::f32, FloatType::f16}) {
        EncodeArgs args{};
        args.m = 2;
        args.k = args.stride_x = k;
        args.group_size = k < 16 ? k : 16;
        args.digits = digits;
        args.blocks = {1, 16, round_up(k, 16)};
        args.x_type = type;
        const check::Bytes x = check::random_floats(args.m * k, type);
        args.x = x.data();
        Outputs got, want;
        encode_rows_scalar(want.of(args), 0, args.m);
        check::require(launch_encode_rows(got.of(args), nullptr));
        check::report("encode_rows", long(k), got.codes == want.codes && got.scales == want.scales);
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) { return ow::check::run(count, arguments, check_quantize); }
