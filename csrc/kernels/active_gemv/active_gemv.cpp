#include "kernels/active_gemv/active_gemv.h"

namespace ow {
namespace {

constexpr KernelEntry<ActiveGemvFn> kTable[] = {
#define OW_ROW(isa, key, max_m, fn) {#fn, Isa::isa, key, max_m, fn},
    OW_ACTIVE_GEMV_KERNELS(OW_ROW)
#undef OW_ROW
};

// Multiply-adds below which a second thread costs more than it saves: about 4 us of work.
constexpr int64_t kWorkPerTask = 1 << 16;

template <class T>
int64_t find(const T* x, int64_t k, int64_t group_size, float threshold, int32_t* index,
             float* active_x, int64_t* group_end) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < k; begin += group_size) {
    for (int64_t j = begin; j < min_of(begin + group_size, k); ++j) {
      const float value = to_float(x[j]);
      index[count] = int32_t(j);
      active_x[count] = value;
      count += !(__builtin_fabsf(value) <= threshold);
    }
    *group_end++ = count;
  }
  return count;
}

// Where output n of a column lies: the first byte of its lane, and how far its code is shifted.
struct CodePlace {
  int64_t byte;
  int shift;

  CodePlace(int32_t bits, int64_t n) {
    const int64_t in_strip = n % strip_outputs(bits);
    byte = n / strip_outputs(bits) * kStripBytes + in_strip % 16 * 4;
    shift = int(in_strip / 16) * bits;
  }
  uint32_t lane(const uint8_t* column) const {
    uint32_t bits;
    memcpy(&bits, column + byte, sizeof(bits));
    return bits;
  }
};

}  // namespace

int64_t find_active(const void* x, FloatType x_type, int64_t k, int64_t group_size, float threshold,
                    int32_t* index, float* active_x, int64_t* group_end) {
  const auto typed = [&](const auto* p) {
    return find(p, k, group_size, threshold, index, active_x, group_end);
  };
  switch (x_type) {
    case FloatType::f32: return typed(static_cast<const float*>(x));
    case FloatType::bf16: return typed(static_cast<const bf16*>(x));
    default: return typed(static_cast<const f16*>(x));
  }
}

void active_gemv(const ActiveGemvArgs& args, Isa isa, const Parallel& parallel) {
  const ActiveGemvFn kernel = pick(kTable, isa, 0, 1).fn;
  const int64_t strip = strip_outputs(args.type == ColumnType::codes ? args.bits : 0);
  const int64_t strips = args.n_padded / strip;
  const int64_t work = (args.active.count + 1) * args.n;
  const int64_t tasks = min_of(min_of(parallel.threads, strips), div_up(work, kWorkPerTask));
  parallel.for_each(tasks, [&](int64_t i) {
    kernel(args, strips * i / tasks * strip, strips * (i + 1) / tasks * strip);
  });
}

void pack_code_columns(const ColumnPackArgs& a, const uint8_t* codes, uint8_t* columns,
                       const Parallel& parallel) {
  const int64_t bytes = strips_bytes(a.bits, a.n_padded);
  const uint32_t mask = (1u << a.bits) - 1;
  const uint32_t center = 1u << (a.bits - 1);
  parallel.for_each(a.k, [&](int64_t k) {
    uint8_t* column = columns + k * bytes;
    memset(column, 0, size_t(bytes));
    for (int64_t n = 0; n < a.n; ++n) {
      const CodePlace at(a.bits, n);
      const uint32_t lane = at.lane(column) | ((codes[n * a.k + k] - center) & mask) << at.shift;
      memcpy(column + at.byte, &lane, sizeof(lane));
    }
  });
}

void unpack_code_columns(const ColumnPackArgs& a, const uint8_t* columns, uint8_t* codes,
                         const Parallel& parallel) {
  const int64_t bytes = strips_bytes(a.bits, a.n_padded);
  const uint32_t mask = (1u << a.bits) - 1;
  const uint32_t center = 1u << (a.bits - 1);
  parallel.for_each(a.n, [&](int64_t n) {
    const CodePlace at(a.bits, n);
    for (int64_t k = 0; k < a.k; ++k) {
      codes[n * a.k + k] = uint8_t(((at.lane(columns + k * bytes) >> at.shift) + center) & mask);
    }
  });
}

}  // namespace ow
