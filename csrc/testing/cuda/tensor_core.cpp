// mma and mma.sp. Products are summed in fp32 in order of k; a GPU rounds otherwise, so only exact
// data compares bit for bit.
#include "core/types.h"
#include "testing/cuda/ptx.h"

namespace ow::ptx {
namespace {

constexpr int kLanes = 32;

OW_UNCHECKED float half_of(uint32_t word, int i, bool is_bf16) {
  const uint16_t bits = uint16_t(word >> (16 * i));
  return is_bf16 ? to_float(bf16{bits}) : to_float(f16{bits});
}

// What a lane passes to an instruction.
struct Operands {
  void* d;
  const uint32_t* a;
  const uint32_t* b;
  uint32_t metadata;
  int selector;
};

OW_UNCHECKED const Operands& of_lane(void* const* lanes, int lane) {
  return *static_cast<const Operands*>(lanes[lane]);
}

template <class T, int kK>
struct Tiles {
  T a[16][kK];
  T b[kK][8];

  OW_UNCHECKED void multiply(void* const* lanes) {
    T d[16][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const fragments::Element e = fragments::d_m16n8(lane, i);
        d[e.row][e.column] = static_cast<const T*>(of_lane(lanes, lane).d)[i];
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < kK; ++k) {
        for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const fragments::Element e = fragments::d_m16n8(lane, i);
        static_cast<T*>(of_lane(lanes, lane).d)[i] = d[e.row][e.column];
      }
    }
  }
};

template <bool kBf16>
OW_UNCHECKED void finish_m16n8k16(void* const* lanes, unsigned) {
  Tiles<float, 16> tiles;
  for (int lane = 0; lane < kLanes; ++lane) {
    const Operands& x = of_lane(lanes, lane);
    for (int i = 0; i < 8; ++i) {
      const fragments::Element e = fragments::a_m16n8k16(lane, i);
      tiles.a[e.row][e.column] = half_of(x.a[i / 2], i % 2, kBf16);
    }
    for (int i = 0; i < 4; ++i) {
      const fragments::Element e = fragments::b_m16n8k16(lane, i);
      tiles.b[e.row][e.column] = half_of(x.b[i / 2], i % 2, kBf16);
    }
  }
  tiles.multiply(lanes);
}

OW_UNCHECKED void finish_m16n8k32_s8(void* const* lanes, unsigned) {
  Tiles<int, 32> tiles;
  for (int lane = 0; lane < kLanes; ++lane) {
    const Operands& x = of_lane(lanes, lane);
    for (int i = 0; i < 16; ++i) {
      const fragments::Element e = fragments::a_m16n8k32(lane, i);
      tiles.a[e.row][e.column] = int8_t(x.a[i / 4] >> (i % 4 * 8));
    }
    for (int i = 0; i < 8; ++i) {
      const fragments::Element e = fragments::b_m16n8k32(lane, i);
      tiles.b[e.row][e.column] = int8_t(x.b[i / 4] >> (i % 4 * 8));
    }
  }
  tiles.multiply(lanes);
}

template <bool kBf16>
OW_UNCHECKED void finish_sp_m16n8k32(void* const* lanes, unsigned) {
  const int selector = of_lane(lanes, 0).selector;
  uint32_t kept[16][8] = {};  // of each four columns
  for (int lane = 0; lane < kLanes; ++lane) {
    const Operands& x = of_lane(lanes, lane);
    if (x.selector != selector) {
      return emulation::fail("the selector of mma.sp differs between lanes",
                             emulation::Where::current());
    }
    for (int half = 0; half < 2; ++half) {
      const fragments::Metadata at = fragments::metadata_sp_m16n8k32(lane, half);
      if (at.selector != selector) continue;
      for (int i = 0; i < 4; ++i) {
        kept[at.row][at.column / 4 + i] = x.metadata >> (16 * half + 4 * i) & 15;
      }
    }
  }
  Tiles<float, 32> tiles{};
  for (int lane = 0; lane < kLanes; ++lane) {
    const Operands& x = of_lane(lanes, lane);
    for (int i = 0; i < 8; ++i) {
      const fragments::Element e = fragments::a_sp_m16n8k32(lane, i);
      const int first = int(kept[e.row][e.column / 4] & 3);
      const int second = int(kept[e.row][e.column / 4] >> 2);
      if (first >= second) {
        return emulation::fail("the metadata of mma.sp is not in order",
                               emulation::Where::current());
      }
      tiles.a[e.row][e.column + (i % 2 == 0 ? first : second)] = half_of(x.a[i / 2], i % 2, kBf16);
    }
    for (int i = 0; i < 8; ++i) {
      const fragments::Element e = fragments::b_sp_m16n8k32(lane, i);
      tiles.b[e.row][e.column] = half_of(x.b[i / 2], i % 2, kBf16);
    }
  }
  tiles.multiply(lanes);
}

using Finish = void (*)(void* const*, unsigned);

void dense(const char* name, void* d, const uint32_t* a, uint32_t b0, uint32_t b1, Finish finish,
           const emulation::Where& where) {
  const uint32_t b[2] = {b0, b1};
  Operands operands{d, a, b, 0, 0};
  emulation::meet(~0u, name, &operands, finish, false, where);
}

}  // namespace

void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                      const emulation::Where& where) {
  dense("mma.m16n8k16.f16", d, a, b0, b1, finish_m16n8k16<false>, where);
}
void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                       const emulation::Where& where) {
  dense("mma.m16n8k16.bf16", d, a, b0, b1, finish_m16n8k16<true>, where);
}
void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     const emulation::Where& where) {
  dense("mma.m16n8k32.s8", d, a, b0, b1, finish_m16n8k32_s8, where);
}

void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                     uint32_t metadata, int selector, bool is_bf16, const emulation::Where& where) {
  Operands operands{d, a, b, metadata, selector};
  emulation::meet(~0u, is_bf16 ? "mma.sp.m16n8k32.bf16" : "mma.sp.m16n8k32.f16", &operands,
                  is_bf16 ? finish_sp_m16n8k32<true> : finish_sp_m16n8k32<false>, false, where);
}

}  // namespace ow::ptx
