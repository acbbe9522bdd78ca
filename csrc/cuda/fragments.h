// Which element of a matrix each lane holds in each register, for the tensor core instructions of
// cuda/ptx.h (PTX ISA, "Matrix Fragments for mma"). The emulation reads these tables; a test holds
// them against CuTe's.
//
// Elements of a lane are counted through its registers, low bits first: 16-bit element i is in
// register i / 2, 8-bit element i in register i / 4.
#pragma once

namespace ow::fragments {

struct Element {
  int row, column;
};

// 16-bit A [16, 16], elements 0-7, and B [16, 8], elements 0-3.
constexpr Element a_m16n8k16(int lane, int i) {
  return {lane / 4 + i / 2 % 2 * 8, lane % 4 * 2 + i % 2 + i / 4 * 8};
}
constexpr Element b_m16n8k16(int lane, int i) {
  return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4};
}

// C and D [16, 8], elements 0-3: one to a register.
constexpr Element d_m16n8(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

// 8-bit A [16, 32], elements 0-15, and B [32, 8], elements 0-7.
constexpr Element a_m16n8k32(int lane, int i) {
  return {lane / 4 + i / 4 % 2 * 8, lane % 4 * 4 + i % 4 + i / 8 * 16};
}
constexpr Element b_m16n8k32(int lane, int i) {
  return {lane % 4 * 4 + i % 4 + i / 4 * 16, lane / 4};
}

// Sparse 16-bit A [16, 32]: elements 2j and 2j + 1 are the two kept of the four columns from
// `column` on.
constexpr Element a_sp_m16n8k32(int lane, int i) {
  return {lane / 4 + i / 2 % 2 * 8, lane % 4 * 4 + i / 4 * 16};
}
// B [32, 8] beside it, elements 0-7.
constexpr Element b_sp_m16n8k32(int lane, int i) {
  return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4};
}

// Where the metadata of the four columns from `column` on is: four bits, the lower kept column
// first.
struct Metadata {
  int lane, shift;
};
constexpr Metadata metadata_sp_m16n8k32(int row, int column, int selector) {
  return {row % 8 * 4 + 2 * selector + column / 16, row / 8 * 16 + column % 16 / 4 * 4};
}

}  // namespace ow::fragments
