#include "kernels/kv_cache/kv_cache.h"

namespace ow {
namespace {

constexpr KernelEntry<const KVCacheKernels*> kTable[] = {
#define OW_ROW(isa, key, max_m, kernels) {#kernels, Isa::isa, key, max_m, &kernels},
    OW_KV_CACHE_KERNELS(OW_ROW)
#undef OW_ROW
};

// One side of a row while it changes.
struct Side {
  const KVPages& p;
  const KVSide& s;
  KVPart part;
  int64_t row;
  const KVCacheKernels& kernels;

  Side(const KVPages& pages, KVPart which, int64_t r, const KVCacheKernels& k)
      : p(pages), s(side_of(pages, which)), part(which), row(r), kernels(k) {}

  int64_t row_bytes() const { return s.d * float_size(p.type); }
  char* tail(int64_t token) const {
    return static_cast<char*>(s.tail) + (row * p.tail_len + token % p.tail_len) * row_bytes();
  }
  // Tokens from `token` on that lie together in the tail.
  int64_t run(int64_t token, int64_t count) const {
    return min_of(count, p.tail_len - token % p.tail_len);
  }

  void clear_page(int64_t page) const {
    const auto clear = [&](void* base, int64_t bytes) {
      if (base != nullptr) memset(static_cast<char*>(base) + page * bytes, 0, size_t(bytes));
    };
    const int64_t size = float_size(p.type);
    if (is_dense(s)) return clear(s.rows, p.page_size * row_bytes());
    clear(s.codes, part == KVPart::keys ? kv_key_page_bytes(s.bits, p.page_size, s.d)
                                        : kv_value_page_bytes(s.bits, p.page_size, s.d));
    clear(s.scales, kv_scales_per_page(s, p.page_size) * size);
    clear(s.mins, kv_scales_per_page(s, p.page_size) * size);
    clear(s.outlier_index, p.page_size * s.outliers);
    clear(s.outlier_values, p.page_size * s.outliers * size);
  }

  // New tokens into pages, which are clear when their first token comes.
  void write(int64_t first, int64_t count, const void* x, int64_t stride) const {
    for (int64_t t = round_up(first, p.page_size); t < first + count; t += p.page_size) {
      clear_page(p.block_table[row * p.max_pages + t / p.page_size]);
    }
    kernels.write(p, part, row, first, count, x, stride);
  }

  // From the tail to pages, as far as the rule says.
  void commit(int64_t length) const {
    const int64_t end = committed_at(s, s.committed[row], length);
    for (int64_t t = s.committed[row]; t < end;) {
      const int64_t count = run(t, end - t);
      write(t, count, tail(t), s.d);
      t += count;
    }
    s.committed[row] = int32_t(end);
  }

  // x of `count` tokens, `stride` elements apart.
  void append(int64_t length, int64_t count, const char* x, int64_t stride, bool commits) const {
    if (is_dense(s)) return write(length, count, x, stride);
    while (count > 0) {
      int64_t room = p.tail_len - (length - s.committed[row]);
      if (room == 0) {
        commit(length);
        room = p.tail_len - (length - s.committed[row]);
      }
      const int64_t taken = min_of(room, count);
      for (int64_t i = 0; i < taken; ++i) {
        memcpy(tail(length + i), x, size_t(row_bytes()));
        x += stride * float_size(p.type);
      }
      length += taken;
      count -= taken;
    }
    if (commits) commit(length);
  }

  // One token as it is read, of the float type or in fp32.
  void read(int64_t token, FloatType type, void* y) const {
    if (token < s.committed[row]) return kernels.read(p, part, row, token, 1, type, y);
    if (type == p.type) {
      memcpy(y, tail(token), size_t(row_bytes()));
    } else {
      for (int64_t c = 0; c < s.d; ++c)
        static_cast<float*>(y)[c] = read_float(tail(token), p.type, c);
    }
  }

  // The last tokens of a group that loses some go back to the tail.
  void rollback(int64_t length) const {
    if (is_dense(s) || length >= s.committed[row]) return;
    const int64_t end = s.axis == KVAxis::channel ? length / s.group_size * s.group_size : length;
    if (end < length) kernels.read(p, part, row, end, length - end, p.type, tail(end));
    s.committed[row] = int32_t(end);
  }
};

// Tokens of the key side in pages, where that side is dense: the length.
int64_t keys_in_pages(const KVPages& p, int64_t row) { return p.keys.committed[row]; }

// Where the tokens that stay come from.
struct Kept {
  int64_t begin, count;
  const int32_t* tokens;

  Kept(const KVPages& p, const KVCompactArgs& a, int64_t row)
      : begin(a.begins == nullptr ? 0 : a.begins[row / p.kv_heads]),
        count(0),
        tokens(a.kept + row * a.n) {
    while (count < a.n && tokens[count] >= 0) ++count;
  }
  int64_t length() const { return begin + count; }
  int64_t source(int64_t token) const { return token < begin ? token : tokens[token - begin]; }
  // Tokens kept of the first `end`.
  int64_t below(int64_t end) const {
    if (end <= begin) return end;
    int64_t low = 0;
    for (int64_t high = count; low < high;) {
      const int64_t middle = (low + high) / 2;
      (tokens[middle] < end ? low : high) = tokens[middle] < end ? middle + 1 : middle;
    }
    return begin + low;
  }
};

int64_t committed_of(const KVSide& s, const Kept& kept, int64_t row) {
  const int64_t held = kept.below(s.committed[row]);
  const bool groups = !is_dense(s) && s.axis == KVAxis::channel;
  return groups ? held / s.group_size * s.group_size : held;
}

void compact_pages(const Side& side, const Kept& kept, int64_t end, char* staging) {
  const KVSide& s = side.s;
  const bool groups = !is_dense(s) && s.axis == KVAxis::channel;
  const int64_t unit = groups ? s.group_size : 1;
  for (int64_t to = kept.begin / unit * unit; to < end; to += unit) {
    const int64_t from = kept.source(to);
    const bool whole = from % unit == 0 && kept.source(to + unit - 1) == from + unit - 1;
    if (whole && from == to) continue;
    if (whole) {
      side.kernels.move(side.p, side.part, side.row, from, to, unit);
      continue;
    }
    for (int64_t i = 0; i < unit; ++i) {
      side.read(kept.source(to + i), side.p.type, staging + i * side.row_bytes());
    }
    side.kernels.write(side.p, side.part, side.row, to, unit, staging, s.d);
  }
}

void compact_side(const Side& side, const Kept& kept, char* staging) {
  const int64_t bytes = side.row_bytes();
  const int64_t end = committed_of(side.s, kept, side.row);
  if (is_dense(side.s)) return compact_pages(side, kept, end, staging);
  // A slot of the tail may be the place of one token and the source of another: all are read first.
  const int64_t waiting = kept.length() - end;
  char* group = staging + side.p.tail_len * bytes;
  for (int64_t i = 0; i < waiting; ++i) {
    side.read(kept.source(end + i), side.p.type, staging + i * bytes);
  }
  compact_pages(side, kept, end, group);
  for (int64_t i = 0; i < waiting; ++i) {
    memcpy(side.tail(end + i), staging + i * bytes, size_t(bytes));
  }
  side.s.committed[side.row] = int32_t(end);
}

void compact_row(const KVPages& p, const KVCompactArgs& a, const KVCacheKernels& kernels,
                 int64_t row, char* staging) {
  const Kept kept(p, a, row);
  const int64_t bounded = keys_in_pages(p, row);
  const int64_t left = committed_of(p.keys, kept, row);
  compact_side(Side(p, KVPart::keys, row, kernels), kept, staging);
  compact_side(Side(p, KVPart::values, row, kernels), kept, staging);
  if (p.positions != nullptr) {
    int32_t* positions = p.positions + row * p.max_pages * p.page_size;
    for (int64_t to = kept.begin; to < kept.length(); ++to) {
      positions[to] = positions[kept.source(to)];
    }
  }
  p.lengths[row] = int32_t(kept.length());
  if (p.key_min != nullptr && kept.begin < bounded && left > 0) {
    kernels.bound(p, row, min_of(kept.begin, left - 1), left);
  }
}

double norm_of(const float* x, int64_t d) {
  double squares = 0.0;
  for (int64_t c = 0; c < d; ++c) squares += double(x[c]) * double(x[c]);
  return __builtin_sqrt(squares);
}

// Of target i to x, which holds the target; `source` has room for one more token.
void merge_token(const Side& side, const KVMergeArgs& a, int64_t i, float* x, float* source) {
  const int64_t d = side.s.d;
  const int32_t* indptr = a.indptr + side.row * (a.m + 1);
  const float own = a.own[side.row * a.m + i];
  const bool norms = a.norms && side.part == KVPart::keys;
  double wanted = norms ? double(own) * norm_of(x, d) : 0.0;
  for (int64_t c = 0; c < d; ++c) x[c] = own * x[c];
  for (int64_t j = indptr[i]; j < indptr[i + 1]; ++j) {
    const float weight = a.weights[side.row * a.n + j];
    side.read(a.sources[side.row * a.n + j], FloatType::f32, source);
    for (int64_t c = 0; c < d; ++c) x[c] += weight * source[c];
    if (norms) wanted += double(weight) * norm_of(source, d);
  }
  const double norm = norms ? norm_of(x, d) : 0.0;
  if (norm > 0.0) {
    const float factor = float(wanted / norm);
    for (int64_t c = 0; c < d; ++c) x[c] *= factor;
  }
}

void merge_side(const Side& side, const KVMergeArgs& a, char* staging) {
  const KVSide& s = side.s;
  const KVPages& p = side.p;
  const int32_t* targets = a.targets + side.row * a.m;
  float* x = reinterpret_cast<float*>(staging);
  float* source = x + s.d;
  char* group = reinterpret_cast<char*>(source + s.d);
  const bool groups = !is_dense(s) && s.axis == KVAxis::channel;
  const int64_t unit = groups ? s.group_size : 1;
  for (int64_t i = 0; i < a.m && targets[i] >= 0;) {
    const bool in_pages = targets[i] < s.committed[side.row];
    const int64_t begin = in_pages ? targets[i] / unit * unit : targets[i];
    const int64_t count = in_pages ? unit : 1;
    for (int64_t t = 0; t < count; ++t) side.read(begin + t, p.type, group + t * side.row_bytes());
    for (; i < a.m && targets[i] >= 0 && targets[i] < begin + count; ++i) {
      side.read(targets[i], FloatType::f32, x);
      merge_token(side, a, i, x, source);
      char* row = group + (targets[i] - begin) * side.row_bytes();
      for (int64_t c = 0; c < s.d; ++c) write_float(row, p.type, c, x[c]);
    }
    if (!in_pages) {
      memcpy(side.tail(begin), group, size_t(side.row_bytes()));
      continue;
    }
    side.kernels.write(p, side.part, side.row, begin, count, group, s.d);
    if (p.key_min != nullptr && side.part == KVPart::keys) {
      const int64_t end = min_of(round_up(begin + count, kBoundTokens), s.committed[side.row]);
      side.kernels.bound(p, side.row, begin, end);
    }
  }
}

void append_row(const KVPages& p, const KVAppendArgs& a, const KVCacheKernels& kernels,
                int64_t row) {
  const int64_t sequence = row / p.kv_heads;
  const int64_t head = row % p.kv_heads;
  const int64_t count = a.counts == nullptr ? a.t : a.counts[sequence];
  const int64_t length = p.lengths[row];
  const int64_t bounded = keys_in_pages(p, row);
  const auto add = [&](KVPart part, const void* x, const KVStrides& strides) {
    const int64_t offset = sequence * strides.b + head * strides.head;
    Side(p, part, row, kernels)
        .append(length, count, static_cast<const char*>(x) + offset * float_size(p.type),
                strides.token, a.commit);
  };
  add(KVPart::keys, a.keys, a.key_strides);
  add(KVPart::values, a.values, a.value_strides);
  if (p.positions != nullptr) {
    memcpy(p.positions + row * p.max_pages * p.page_size + length, a.positions + sequence * a.t,
           size_t(count) * sizeof(int32_t));
  }
  p.lengths[row] = int32_t(length + count);
  if (p.key_min != nullptr && keys_in_pages(p, row) > bounded) {
    kernels.bound(p, row, bounded, keys_in_pages(p, row));
  }
}

}  // namespace

const KVCacheKernels& kv_cache_kernels(Isa isa) { return *pick(kTable, isa, 0, 1).fn; }

void kv_append(const KVPages& p, const KVAppendArgs& args, Isa isa, const Parallel& parallel) {
  const KVCacheKernels& kernels = kv_cache_kernels(isa);
  kv_each_row(p, args.t, parallel,
              [&](int64_t row, int64_t) { append_row(p, args, kernels, row); });
}

int64_t kv_kept_length(const KVPages& p, const KVCompactArgs& args, int64_t row) {
  return Kept(p, args, row).length();
}
int64_t kv_kept_committed(const KVPages& p, KVPart part, const KVCompactArgs& args, int64_t row) {
  return committed_of(side_of(p, part), Kept(p, args, row), row);
}

int64_t kv_staging_bytes(const KVPages& p, int64_t threads) {
  const int64_t d = p.keys.d > p.values.d ? p.keys.d : p.values.d;
  return threads * (p.tail_len + kMaxKVGroup + 2) * d * int64_t(sizeof(float));
}

void kv_compact(const KVPages& p, const KVCompactArgs& args, Isa isa, const Parallel& parallel) {
  const KVCacheKernels& kernels = kv_cache_kernels(isa);
  kv_each_row(p, args.n, parallel, [&](int64_t row, int64_t task) {
    char* staging = static_cast<char*>(args.staging) + task * kv_staging_bytes(p, 1);
    compact_row(p, args, kernels, row, staging);
  });
}

void kv_merge(const KVPages& p, const KVMergeArgs& args, Isa isa, const Parallel& parallel) {
  const KVCacheKernels& kernels = kv_cache_kernels(isa);
  kv_each_row(p, args.m + args.n, parallel, [&](int64_t row, int64_t task) {
    char* staging = static_cast<char*>(args.staging) + task * kv_staging_bytes(p, 1);
    if (args.keys) merge_side(Side(p, KVPart::keys, row, kernels), args, staging);
    if (args.values) merge_side(Side(p, KVPart::values, row, kernels), args, staging);
  });
}

void kv_rollback(const KVPages& p, const int32_t* drop, Isa isa, const Parallel& parallel) {
  const KVCacheKernels& kernels = kv_cache_kernels(isa);
  kv_each_row(p, 1, parallel, [&](int64_t row, int64_t) {
    const int64_t length = p.lengths[row] - drop[row / p.kv_heads];
    const int64_t bounded = keys_in_pages(p, row);
    Side(p, KVPart::keys, row, kernels).rollback(length);
    Side(p, KVPart::values, row, kernels).rollback(length);
    p.lengths[row] = int32_t(length);
    // Only the last tokens' bounds still count some that are gone.
    const int64_t left = keys_in_pages(p, row);
    if (p.key_min != nullptr && left < bounded && left % kBoundTokens != 0) {
      kernels.bound(p, row, left - 1, left);
    }
  });
}

}  // namespace ow
