// Which element of a matrix each lane holds in each register, for the tensor core instructions of
// cuda/ptx.h (PTX ISA, "Matrix Fragments for mma"). The emulation reads these tables; a test holds
// them against CuTe's.
//
// Elements of a lane are counted through its registers, low bits first: 16-bit element i is in
// register i / 2, 8-bit element i in register i / 4.
#pragma once

#if defined(__CUDACC__)
#define OW_TABLE constexpr __host__ __device__
#else
#define OW_TABLE constexpr
#endif

namespace ow::fragments {

struct Element {
  int row, column;
};

// 16-bit A [16, 16], elements 0-7, and B [16, 8], elements 0-3.
OW_TABLE Element a_m16n8k16(int lane, int i) {
  return {lane / 4 + i / 2 % 2 * 8, lane % 4 * 2 + i % 2 + i / 4 * 8};
}
OW_TABLE Element b_m16n8k16(int lane, int i) {
  return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4};
}

// C and D [16, 8], elements 0-3: one to a register.
OW_TABLE Element d_m16n8(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

// 8-bit A [16, 32], elements 0-15, and B [32, 8], elements 0-7.
OW_TABLE Element a_m16n8k32(int lane, int i) {
  return {lane / 4 + i / 4 % 2 * 8, lane % 4 * 4 + i % 4 + i / 8 * 16};
}
OW_TABLE Element b_m16n8k32(int lane, int i) {
  return {lane % 4 * 4 + i % 4 + i / 4 * 16, lane / 4};
}

// Sparse 16-bit A [16, 32]: elements 2j and 2j + 1 are the two kept of the four columns from
// `column` on.
OW_TABLE Element a_sp_m16n8k32(int lane, int i) {
  return {lane / 4 + i / 2 % 2 * 8, lane % 4 * 4 + i / 4 * 16};
}
// B [32, 8] beside it, elements 0-7.
OW_TABLE Element b_sp_m16n8k32(int lane, int i) {
  return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4};
}

// What half `half` of a lane's metadata register says: which two of every four columns of 16 are
// kept, in four bits each, the lower column first. Lanes of the other selector are not looked at.
// (PTX ISA, "Sparse matrix storage" and the figures of "Matrix Fragments for sparse mma.m16n8k32
// with .f16 and .bf16 types"; nothing but this function knows.)
struct Metadata {
  int row, column, selector;
};
OW_TABLE Metadata metadata_sp_m16n8k32(int lane, int half) {
  return {lane / 4 + half * 8, lane % 2 * 16, lane % 4 / 2};
}

}  // namespace ow::fragments
