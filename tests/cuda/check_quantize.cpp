#include "check_family.h"
#include "kernels/quantize/quantize_cuda.h"

namespace {

using namespace ow;

struct Outputs {
  check::Bytes codes, scales, sums;

  EncodeArgs of(EncodeArgs args) {
    const int64_t groups = div_up(args.k, args.group_size);
    codes.resize(size_t(element_count(args.blocks, args.m * args.digits)));
    scales.resize(size_t(4 * args.m * (args.digits == 1 ? 1 : groups)));
    sums.resize(size_t(4 * args.m * args.digits * groups));
    args.codes = reinterpret_cast<int8_t*>(codes.data());
    args.scales = reinterpret_cast<float*>(scales.data());
    args.sums = reinterpret_cast<int32_t*>(sums.data());
    return args;
  }
};

void check_quantize() {
  for (const int64_t k : {1, 48, 700}) {
    for (const int32_t digits : {1, 3}) {
      for (const FloatType type : {FloatType::f32, FloatType::f16}) {
        EncodeArgs args{};
        args.m = 2;
        args.k = args.stride_x = k;
        args.group_size = k < 16 ? k : 16;
        args.digits = digits;
        args.blocks = {1, 16, round_up(k, 16)};
        args.x_type = type;
        args.sum_factor = -8;
        const check::Bytes x = check::random_floats(args.m * k, type);
        args.x = x.data();
        Outputs got, want;
        encode_rows_scalar(want.of(args), 0, args.m);
        check::require(launch_encode_rows(got.of(args), nullptr));
        const bool same =
            got.codes == want.codes && got.scales == want.scales && got.sums == want.sums;
        check::report("encode_rows", long(k), same);
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) { return ow::check::run(count, arguments, check_quantize); }
