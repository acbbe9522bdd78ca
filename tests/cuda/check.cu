// Every instruction of cuda/ptx.h on data that is exact in any order of sums: one line a case, PASS
// or FAIL. The same file runs emulated (argument: a seed) and, compiled by nvcc, on a GPU, where a
// PASS proves that instructions and cuda/fragments.h are what the emulation takes them for:
//
//   nvcc -std=c++20 -I csrc -arch=native tests/cuda/check.cu -o check && ./check
#include "check_kernels.h"

#include <stdio.h>
#include <stdlib.h>

#include <stdexcept>
#include <vector>

namespace ow::check {
namespace {

uint32_t state = 7;
uint32_t random_bits() { return (state = state * 1664525u + 1013904223u) >> 8; }
int below(int n) { return int(random_bits() % uint32_t(n)); }
// Eighths up to one: products and sums of hundreds of them are exact in fp32.
template <class T>
T eighths() {
  T value;
  from_float(float(below(17) - 8) / 8.0f, &value);
  return value;
}

// An array on the host, and the same on the device.
template <class T>
class Array {
 public:
  explicit Array(int count) : host_(size_t(count)) {}
#if defined(__CUDACC__)
  ~Array() { cudaFree(device_); }
  T* send() {
    cudaMalloc(&device_, bytes());
    cudaMemcpy(device_, host_.data(), bytes(), cudaMemcpyHostToDevice);
    return device_;
  }
  void receive() {
    const cudaError_t error = cudaMemcpy(host_.data(), device_, bytes(), cudaMemcpyDeviceToHost);
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  }
#else
  T* send() { return host_.data(); }
  void receive() {}
#endif
  Array(const Array&) = delete;
  T& operator[](int i) { return host_[size_t(i)]; }
  int size() const { return int(host_.size()); }

 private:
  size_t bytes() const { return host_.size() * sizeof(T); }
  std::vector<T> host_;
  T* device_ = nullptr;
};

int failures = 0;
void report(const char* name, int wrong) {
  failures += wrong != 0;
  printf("%s %s: %d wrong\n", wrong == 0 ? "PASS" : "FAIL", name, wrong);
}
void require(const LaunchStatus& status) {
  if (status.error != 0) throw std::runtime_error(status.kernel);
}

template <class T>
void check_gemm(const char* name, int m, int n, int k) {
  Array<T> x(m * k), w(n * k);
  Array<float> y(m * n);
  for (int i = 0; i < m * k; ++i) x[i] = eighths<T>();
  for (int i = 0; i < n * k; ++i) w[i] = eighths<T>();
  const dim3 grid(unsigned(div_up(n, kTile)), unsigned(div_up(m, kTile)));
  require(launch("gemm", gemm<T>, grid, kGemmThreads, kGemmBytes, nullptr, x.send(), w.send(),
                 y.send(), m, n, k));
  y.receive();
  int wrong = 0;
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      float sum = 0.0f;
      for (int l = 0; l < k; ++l) sum += to_float(x[i * k + l]) * to_float(w[j * k + l]);
      wrong += !(y[i * n + j] == sum);
    }
  }
  report(name, wrong);
}

void check_gemm_s8() {
  const int n = 32, m = 24, k = 96;
  Array<int8_t> w(n * k);
  Array<int8_t> x(m * k);
  Array<int> y(n * m);
  for (int i = 0; i < n * k; ++i) w[i] = int8_t(random_bits());
  for (int i = 0; i < m * k; ++i) x[i] = int8_t(random_bits());
  require(launch("gemm_s8", gemm_s8, dim3(m / 8, n / 16), kWarp, 0, nullptr, w.send(), x.send(),
                 y.send(), m, k));
  y.receive();
  int wrong = 0;
  for (int i = 0; i < n * m; ++i) {
    int sum = 0;
    for (int l = 0; l < k; ++l) sum += w[i / m * k + l] * x[i % m * k + l];
    wrong += y[i] != sum;
  }
  report("mma.m16n8k32 s8", wrong);
}

template <class T, int kSelector>
void check_gemm_sparse(const char* name) {
  const int n = 32, m = 24, k = 128;
  Array<T> values(n * k / 2), x(m * k);
  Array<uint16_t> metadata(n * k / 16);
  Array<float> y(n * m);
  std::vector<float> dense(size_t(n) * k);
  for (int i = 0; i < m * k; ++i) x[i] = eighths<T>();
  for (int row = 0; row < n; ++row) {
    for (int four = 0; four < k / 4; ++four) {
      const int first = below(3);
      const int kept[2] = {first, first + 1 + below(3 - first)};
      for (int i = 0; i < 2; ++i) {
        const T value = eighths<T>();
        values[row * k / 2 + four * 2 + i] = value;
        dense[size_t(row * k + four * 4 + kept[i])] = to_float(value);
      }
      metadata[row * k / 16 + four / 4] |= uint16_t((kept[0] | kept[1] << 2) << (four % 4 * 4));
    }
  }
  require(launch("gemm_sparse", gemm_sparse<T, kSelector>, dim3(m / 8, n / 16), kWarp, 0, nullptr,
                 values.send(), metadata.send(), x.send(), y.send(), m, k));
  y.receive();
  int wrong = 0;
  for (int i = 0; i < n * m; ++i) {
    float sum = 0.0f;
    for (int l = 0; l < k; ++l) sum += dense[size_t(i / m * k + l)] * to_float(x[i % m * k + l]);
    wrong += !(y[i] == sum);
  }
  report(name, wrong);
}

void check_sum_rows() {
  const int rows = 5, n = 1000;
  Array<float> x(rows * n), y(rows);
  for (int i = 0; i < x.size(); ++i) x[i] = eighths<float>();
  require(launch("sum_rows", sum_rows, dim3(rows), kSumThreads, 0, nullptr, x.send(), y.send(), n));
  y.receive();
  int wrong = 0;
  for (int row = 0; row < rows; ++row) {
    float sum = 0.0f;
    for (int i = 0; i < n; ++i) sum += x[row * n + i];
    wrong += !(y[row] == sum);
  }
  report("shuffles and a barrier", wrong);
}

void check_count_odd() {
  const int n = 500;
  Array<int> x(n), total(1);
  int odd = 0;
  for (int i = 0; i < n; ++i) odd += (x[i] = below(100)) % 2;
  const dim3 grid(unsigned(div_up(n, kSumThreads)));
  require(launch("count_odd", count_odd, grid, kSumThreads, 0, nullptr, x.send(), total.send(), n));
  total.receive();
  report("votes, an atomic, a warp barrier", total[0] != odd);
}

void check_copy_words() {
  Array<uint32_t> x(kSumThreads), y(kSumThreads);
  for (int i = 0; i < kSumThreads; ++i) x[i] = random_bits();
  require(launch("copy_words", copy_words, dim3(1), kSumThreads, 0, nullptr, x.send(), y.send()));
  y.receive();
  int wrong = 0;
  for (int i = 0; i < kSumThreads; ++i) wrong += y[i] != (i % 3 == 0 ? 0 : x[i]);
  report("cp.async.ca of 4 bytes", wrong);
}

void check_registers() {
  const int n = 4096;
  Array<uint32_t> a(n), b(n), out(kRegisterCases * n);
  Array<float> f(n);
  for (int i = 0; i < n; ++i) {
    // Halves of integers up to 2047, whose differences are exact.
    f16 halves[4];
    for (f16& half : halves) from_float(float(below(2048)), &half);
    a[i] = halves[0].bits | uint32_t(halves[1].bits) << 16;
    b[i] = halves[2].bits | uint32_t(halves[3].bits) << 16;
    f[i] = float(below(1 << 20) - (1 << 19)) / 4.0f;
  }
  require(launch("registers", registers, dim3(1), kWarp, 0, nullptr, a.send(), b.send(), f.send(),
                 out.send(), n));
  out.receive();
  int wrong[kRegisterCases] = {};
  for (int i = 0; i < n; ++i) {
    wrong[0] += out[kRegisterCases * i] != ((a[i] & 0xff) | (b[i] & 0xff) << 8 |
                                            (a[i] >> 8 & 0xff) << 16 | (b[i] >> 8 & 0xff) << 24);
    for (int h = 0; h < 2; ++h) {
      f16 difference;
      from_float(to_float(f16{uint16_t(a[i] >> 16 * h)}) - to_float(f16{uint16_t(b[i] >> 16 * h)}),
                 &difference);
      wrong[1] += uint16_t(out[kRegisterCases * i + 1] >> 16 * h) != difference.bits;
      bf16 rounded;
      from_float(h == 0 ? -f[i] : f[i], &rounded);
      const int shift = 4 * h;
      const int fma = 3 * int(a[i] >> shift & 15) - int(b[i] >> shift & 15);
      wrong[4] += to_float(bf16{uint16_t(out[kRegisterCases * i + 4] >> 16 * h)}) != float(fma);
      wrong[2] += uint16_t(out[kRegisterCases * i + 2] >> 16 * h) != rounded.bits;
      f16 half;
      from_float(h == 0 ? -f[i] : f[i], &half);
      wrong[6] += uint16_t(out[kRegisterCases * i + 6] >> 16 * h) != half.bits;
    }
    wrong[5] += out[kRegisterCases * i + 5] != float_to_bits(to_float(f16{uint16_t(a[i])}));
    // Quarters to the nearest integer, halves to the even one.
    const int floor = int(__builtin_floorf(f[i]));
    const float over = f[i] - float(floor);
    const int nearest = floor + (over > 0.5f || (over == 0.5f && floor % 2 != 0));
    wrong[3] += int(out[kRegisterCases * i + 3]) != nearest;
  }
  report("prmt.b32", wrong[0]);
  report("sub.f16x2", wrong[1]);
  report("cvt.rn.bf16x2.f32", wrong[2]);
  report("cvt.rni.s32.f32", wrong[3]);
  report("fma.rn.bf16x2", wrong[4]);
  report("cvt.f32.f16", wrong[5]);
  report("cvt.rn.f16x2.f32", wrong[6]);
}

int run() {
  // First what is documented by figures only.
  check_gemm_sparse<f16, 0>("mma.sp.m16n8k32 f16, selector 0");
  check_gemm_sparse<f16, 1>("mma.sp.m16n8k32 f16, selector 1");
  check_gemm_sparse<bf16, 0>("mma.sp.m16n8k32 bf16, selector 0");
  check_gemm_sparse<bf16, 1>("mma.sp.m16n8k32 bf16, selector 1");
  check_gemm<f16>("mma.m16n8k16 f16, ldmatrix, cp.async", 128, 192, 128);
  check_gemm<bf16>("mma.m16n8k16 bf16, ragged", 70, 90, 72);
  check_gemm_s8();
  check_sum_rows();
  check_count_odd();
  check_copy_words();
  check_registers();
  return failures;
}

}  // namespace
}  // namespace ow::check

int main(int count, char** arguments) {
#if !defined(__CUDACC__)
  if (count > 1) ow::emulation::set_seed(strtoull(arguments[1], nullptr, 10));
#else
  (void)count;
  (void)arguments;
#endif
  try {
    return ow::check::run() == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    printf("FAIL %s\n", error.what());
    return 2;
  }
}
