// cp.async, ldmatrix, and the instructions on single registers.
#include <math.h>

#include "core/types.h"
#include "testing/cuda/ptx.h"

namespace ow::ptx {

using emulation::Copy;
using emulation::Thread;

int cvt_rni_s32_f32(float value) { return int(nearbyintf(value)); }

uint32_t prmt_b32(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= uint32_t(bytes >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
  }
  return result;
}

float cvt_f32_f16(uint16_t value) { return to_float(f16{value}); }

uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  uint32_t result = 0;
  for (int i = 0; i < 2; ++i) {
    const float left = to_float(f16{uint16_t(a >> (16 * i))});
    const float right = to_float(f16{uint16_t(b >> (16 * i))});
    f16 difference;
    from_float(left - right, &difference);
    result |= uint32_t(difference.bits) << (16 * i);
  }
  return result;
}

uint32_t fma_rn_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int i = 0; i < 2; ++i) {
    const auto half = [i](uint32_t word) { return to_float(bf16{uint16_t(word >> (16 * i))}); };
    // By way of fp32, which a GPU does not round to: only exact results are the same.
    bf16 sum;
    from_float(float(double(half(a)) * double(half(b)) + double(half(c))), &sum);
    result |= uint32_t(sum.bits) << (16 * i);
  }
  return result;
}

uint32_t cvt_rn_bf16x2_f32(float high, float low) {
  bf16 halves[2];
  from_float(low, &halves[0]);
  from_float(high, &halves[1]);
  return uint32_t(halves[1].bits) << 16 | halves[0].bits;
}

uint32_t cvt_rn_f16x2_f32(float high, float low) {
  f16 halves[2];
  from_float(low, &halves[0]);
  from_float(high, &halves[1]);
  return uint32_t(halves[1].bits) << 16 | halves[0].bits;
}

namespace {

// Byte by byte and checked by TSan: the copy is an access of the thread that asked for it.
void carry_out(const Copy& copy) {
  for (int i = 0; i < copy.bytes; ++i) {
    static_cast<volatile uint8_t*>(copy.to)[i] =
        i < copy.read ? static_cast<const uint8_t*>(copy.from)[i] : uint8_t{0};
  }
}

void copy_async(void* shared, const void* global, int size, int bytes,
                const emulation::Where& where) {
  Thread& self = emulation::current();
  if (uintptr_t(shared) % size != 0 || (bytes != 0 && uintptr_t(global) % size != 0)) {
    emulation::fail("an address of cp.async is not aligned to its size", where);
  }
  if (self.copy_count == Thread::kMaxCopies) {
    emulation::fail("a thread has too many cp.async on their way", where);
  }
  const Copy copy{shared, global, size, bytes, self.copy_group};
#if defined(__SANITIZE_THREAD__)
  // It may write at any time until the wait: touch both ends.
  carry_out(copy);
  self.copies[self.copy_count++] = copy;
#else
  if (emulation::random_bits() % 2 != 0) {
    carry_out(copy);
  } else {
    self.copies[self.copy_count++] = copy;
  }
#endif
}

}  // namespace

void cp_async_cg_16(void* shared, const void* global, int bytes, const emulation::Where& where) {
  copy_async(shared, global, 16, bytes, where);
}
void cp_async_ca_4(void* shared, const void* global, int bytes, const emulation::Where& where) {
  copy_async(shared, global, 4, bytes, where);
}

OW_UNCHECKED void cp_async_commit_group() { ++emulation::current().copy_group; }

void cp_async_wait(int pending) {
  Thread& self = emulation::current();
  int left = 0;
  for (int i = 0; i < self.copy_count; ++i) {
    const Copy copy = self.copies[i];
    if (int(self.copy_group - copy.group) > pending) {
      carry_out(copy);
    } else {
      self.copies[left++] = copy;
    }
  }
  self.copy_count = left;
}

namespace {

struct MatrixRows {
  const void* given;         // the row this lane names
  const uint16_t* taken[4];  // the row of each matrix that it gets two elements of
};

OW_UNCHECKED void finish_ldmatrix(void* const* lanes, unsigned) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const void* row = static_cast<MatrixRows*>(lanes[matrix * 8 + lane / 4])->given;
      static_cast<MatrixRows*>(lanes[lane])->taken[matrix] = static_cast<const uint16_t*>(row);
    }
  }
}

}  // namespace

void ldmatrix_x4(uint32_t (&d)[4], const void* shared_row, const emulation::Where& where) {
  if (uintptr_t(shared_row) % 16 != 0) {
    emulation::fail("a row of ldmatrix is not aligned to 16 bytes", where);
  }
  MatrixRows rows{shared_row, {}};
  emulation::meet(~0u, "ldmatrix", &rows, finish_ldmatrix, false, where);
  const int first = int(emulation::current().lane) % 4 * 2;
  for (int matrix = 0; matrix < 4; ++matrix) {
    d[matrix] = rows.taken[matrix][first] | uint32_t(rows.taken[matrix][first + 1]) << 16;
  }
}

}  // namespace ow::ptx
