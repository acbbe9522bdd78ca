#include "ops/kv_pages.h"

#include <array>
#include <string>

namespace ow {
namespace {

constexpr int64_t kSideInts = 8;
constexpr int64_t kFormatInts = 3 + 2 * kSideInts;
// As the kernels have them on their stacks.
constexpr int64_t kMaxChannels = 1024;
constexpr int64_t kMaxOutlierChannels = 256;
constexpr int64_t kMaxCodebookBits = 4;
constexpr int64_t kMaxTokens = int64_t{1} << 31;

bool is_group(int64_t size) { return size == 32 || size == 64 || size == 128; }

// Sizes of one side, from the format.
KVSide check_side(const char* op, const char* part, const int64_t* format, int64_t page_size) {
  const auto [d, bits, axis, group, window, step, outliers, codebook] = std::array{
      format[0], format[1], format[2], format[3], format[4], format[5], format[6], format[7]};
  OW_CHECK(d >= 1 && d <= kMaxChannels, op, ": ", part, " must have d in 1 .. ", kMaxChannels,
           ", got ", d);
  const bool quantized = bits == 8 || bits == 4 || bits == 3 || bits == 2;
  OW_CHECK(quantized || bits == 16 || bits == 32, op, ": ", part,
           " must have 32, 16, 8, 4, 3 or 2 bits, got ", bits);
  KVSide side{};
  side.d = d;
  side.bits = int32_t(bits);
  if (!quantized) return side;
  OW_CHECK(axis == 0 || axis == 1, op, ": ", part, " must have axis 0 (channel) or 1 (token), got ",
           axis);
  if (axis == 0) {
    OW_CHECK(is_group(group) && page_size % group == 0, op, ": ", part,
             " must have groups of 32, 64 or 128 tokens that divide page_size = ", page_size,
             ", got ", group);
    OW_CHECK(step >= 1 && step % group == 0, op, ": ", part,
             " must have a step of whole groups of ", group, " tokens, got ", step);
  } else {
    OW_CHECK(is_group(group) || group == d, op, ": ", part,
             " must have groups of 32, 64, 128 or d = ", d, " channels, got ", group);
    OW_CHECK(step >= 1, op, ": ", part, " must have a step of at least 1, got ", step);
  }
  OW_CHECK(window >= 0 && window < kMaxTokens && step < kMaxTokens, op, ": ", part,
           " must have a window of at least 0, and both below 2^31, got window ", window,
           " and step ", step);
  OW_CHECK(outliers >= 0 && outliers <= d && (outliers == 0 || d <= kMaxOutlierChannels), op, ": ",
           part, " must have 0 .. d outliers, and d up to ", kMaxOutlierChannels, " if any, got ",
           outliers, " of d = ", d);
  OW_CHECK(codebook == 0 || bits <= kMaxCodebookBits, op, ": ", part, " must have at most ",
           kMaxCodebookBits, " bits with a codebook, got ", bits);
  side.axis = axis == 0 ? KVAxis::channel : KVAxis::token;
  side.group_size = group;
  side.window = window;
  side.step = step;
  side.outliers = outliers;
  return side;
}

// Takes the tensors of the list in turn.
class Reader {
 public:
  Reader(const char* op, const std::vector<Tensor>& tensors) : op_(op), tensors_(tensors) {}

  const Tensor& peek() const { return tensors_[next_]; }

  template <size_t N>
  const Tensor& take(const std::string& name, ScalarType dtype, const int64_t (&shape)[N]) {
    const Tensor& tensor = tensors_[next_++];
    check_operand(op_, name.c_str(), tensor, dtype, shape);
    return tensor;
  }
  template <class T, size_t N>
  T* data(const std::string& name, ScalarType dtype, const int64_t (&shape)[N]) {
    return static_cast<T*>(take(name, dtype, shape).mutable_data_ptr());
  }

 private:
  const char* op_;
  const std::vector<Tensor>& tensors_;
  size_t next_ = 0;
};

void check_codebook(const char* op, const char* part, const KVSide& side) {
  const float* table = side.table;
  if (table == nullptr) return;
  for (int64_t i = 0; i < int64_t{1} << side.bits; ++i) {
    OW_CHECK(
        (float_to_bits(table[i]) & 0x7fffffff) < 0x7f800000 && (i == 0 || table[i - 1] <= table[i]),
        op, ": ", part, "_table must be finite and rise, got ", table[i], " at element ", i);
  }
}

// Points a side at its tensors; the number of pages and of tail slots come from the first of them.
void read_side(const char* op, const std::string& part, bool codebook, ScalarType dtype,
               Reader* reader, KVPages* p, KVSide* side) {
  const bool keys = part == "key";
  const int64_t d = side->d;
  const Tensor& first = reader->peek();
  if (is_dense(*side)) {
    if (keys) p->pages = first.dim() > 0 ? first.size(0) : 0;
    side->rows = reader->data<void>(part + "_rows", dtype, {p->pages, p->page_size, d});
    side->committed = p->lengths;
    return;
  }
  side->committed =
      reader->data<int32_t>(part + "_committed", ScalarType::Int, {p->b, p->kv_heads});
  const Tensor& codes = reader->peek();
  if (keys) p->pages = codes.dim() > 0 ? codes.size(0) : 0;
  const int64_t block = block_k(side->bits);
  const int64_t lines = block_bytes(side->bits) / 128;
  const int64_t panels = keys ? p->page_size / kKVPanel : div_up(d, kKVPanel);
  const int64_t blocks = keys ? div_up(d, block) : p->page_size / block;
  side->codes = reader->data<uint8_t>(part + "_codes", ScalarType::Byte,
                                      {p->pages, panels, blocks, 2, lines, kKVHalf, 4});
  const bool channel = side->axis == KVAxis::channel;
  const int64_t rows = channel ? p->page_size / side->group_size : div_up(d, side->group_size);
  const int64_t columns = channel ? d : p->page_size;
  side->scales = reader->data<void>(part + "_scales", dtype, {p->pages, rows, columns});
  side->mins = reader->data<void>(part + "_mins", dtype, {p->pages, rows, columns});
  const Tensor& tail = reader->peek();
  if (p->tail_len == 0) p->tail_len = tail.dim() == 4 ? tail.size(2) : 0;
  side->tail = reader->data<void>(part + "_tail", dtype, {p->b, p->kv_heads, p->tail_len, d});
  OW_CHECK(p->tail_len >= side->window + side->step, op, ": ", part,
           "_tail must have room for window + step = ", side->window + side->step, " tokens, got ",
           p->tail_len);
  OW_CHECK(!channel || p->tail_len % side->group_size == 0, op, ": ", part,
           "_tail must have a multiple of ", side->group_size, " (group_size) tokens, got ",
           p->tail_len);
  if (codebook) {
    side->table =
        reader->data<float>(part + "_table", ScalarType::Float, {int64_t{1} << side->bits});
  }
  if (side->outliers > 0) {
    const int64_t shape[] = {p->pages, p->page_size, side->outliers};
    side->outlier_index = reader->data<uint8_t>(part + "_outlier_index", ScalarType::Byte, shape);
    side->outlier_values = reader->data<void>(part + "_outlier_values", dtype, shape);
  }
}

void check_tokens(const char* op, const KVPages& p) {
  const int64_t capacity = p.max_pages * p.page_size;
  for (int64_t row = 0; row < p.b * p.kv_heads; ++row) {
    const int64_t length = p.lengths[row];
    OW_CHECK(length >= 0 && length <= capacity, op, ": lengths must be in 0 .. ", capacity,
             " (max_pages * page_size), got ", length, " in row ", row);
    for (const auto& [part, side] : {std::pair("key", &p.keys), std::pair("value", &p.values)}) {
      if (is_dense(*side)) continue;
      const int64_t committed = side->committed[row];
      OW_CHECK(committed >= 0 && committed <= length && length - committed <= p.tail_len, op, ": ",
               part, "_committed must be at most the length, ", length,
               ", and at most tail_len = ", p.tail_len, " less, got ", committed, " in row ", row);
      OW_CHECK(side->axis == KVAxis::token || committed % side->group_size == 0, op, ": ", part,
               "_committed must be whole groups of ", side->group_size, " tokens, got ", committed,
               " in row ", row);
    }
  }
}

}  // namespace

KVPages check_kv_pages(const char* op, const std::vector<Tensor>& tensors,
                       const std::vector<int64_t>& format) {
  OW_CHECK(int64_t(format.size()) == kFormatInts, op, ": format must hold ", kFormatInts,
           " numbers, got ", format.size());
  KVPages p{};
  p.page_size = format[0];
  OW_CHECK(is_group(p.page_size), op, ": page_size must be 32, 64 or 128, got ", p.page_size);
  const int64_t* key_format = &format[1];
  const int64_t* value_format = &format[1 + kSideInts];
  p.keys = check_side(op, "keys", key_format, p.page_size);
  p.values = check_side(op, "values", value_format, p.page_size);
  const bool bounds = format[kFormatInts - 2] != 0;
  const bool positions = format[kFormatInts - 1] != 0;
  const auto count = [](const KVSide& side, int64_t codebook) {
    return is_dense(side) ? 1 : 5 + (codebook != 0 ? 1 : 0) + (side.outliers > 0 ? 2 : 0);
  };
  const int64_t want = 2 + count(p.keys, key_format[7]) + count(p.values, value_format[7]) +
                       (bounds ? 2 : 0) + (positions ? 1 : 0);
  OW_CHECK(int64_t(tensors.size()) == want, op, ": pages must hold ", want,
           " tensors (of their format), got ", tensors.size());

  Reader reader(op, tensors);
  const Tensor& table = reader.peek();
  OW_CHECK(table.dim() == 3, op, ": block_table must be [b, kv_heads, max_pages], got ",
           shape_text(table));
  OW_CHECK(table.size(2) < kMaxTokens / p.page_size, op,
           ": block_table must have fewer than 2^31 / page_size pages a row, got ", table.size(2));
  p.b = table.size(0);
  p.kv_heads = table.size(1);
  p.max_pages = table.size(2);
  p.block_table =
      reader.data<int32_t>("block_table", ScalarType::Int, {p.b, p.kv_heads, p.max_pages});
  p.lengths = reader.data<int32_t>("lengths", ScalarType::Int, {p.b, p.kv_heads});
  // The tail where keys are quantized: committed, codes, scales and mins come before it.
  const Tensor& floats = tensors[is_dense(p.keys) ? 2 : 6];
  const char* name = is_dense(p.keys) ? "key_rows" : "key_tail";
  check_float(op, name, floats);
  const ScalarType dtype = floats.scalar_type();
  p.type = float_type(dtype);
  for (const auto& [part, side] : {std::pair("keys", &p.keys), std::pair("values", &p.values)}) {
    OW_CHECK(!is_dense(*side) || side->bits == 8 * float_size(p.type), op, ": ", part,
             " must have ", 8 * float_size(p.type), " bits where they are dense ",
             dtype_name(dtype), ", got ", side->bits);
  }
  read_side(op, "key", key_format[7] != 0, dtype, &reader, &p, &p.keys);
  read_side(op, "value", value_format[7] != 0, dtype, &reader, &p, &p.values);
  if (bounds) {
    const int64_t shape[] = {p.pages, p.page_size / kBoundTokens, p.keys.d};
    p.key_min = reader.data<void>("key_min", dtype, shape);
    p.key_max = reader.data<void>("key_max", dtype, shape);
  }
  if (positions) {
    p.positions = reader.data<int32_t>("positions", ScalarType::Int,
                                       {p.b, p.kv_heads, p.max_pages * p.page_size});
  }
  return p;
}

void check_kv_values(const char* op, const KVPages& pages) {
  check_codebook(op, "key", pages.keys);
  check_codebook(op, "value", pages.values);
  check_tokens(op, pages);
}

void check_kv_table(const char* op, const KVPages& p, int64_t row, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int32_t* table = p.block_table + row * p.max_pages;
  for (int64_t i = begin / p.page_size; i < div_up(end, p.page_size); ++i) {
    OW_CHECK(table[i] >= 0 && table[i] < p.pages, op, ": block_table must hold pages in 0 .. ",
             p.pages - 1, ", got ", table[i], " at place ", i, " of row ", row);
  }
}

}  // namespace ow
