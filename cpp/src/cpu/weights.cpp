#include "cpu/weights.h"

#include <algorithm>
#include <cstring>

#include "cpu/threads.h"

namespace armt::cpu {
namespace {

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

float widen(float value) {
  return value;
}
float widen(Bf16 value) {
  return from_bits(uint32_t{value.bits} << 16);
}

// Exact; subnormal halves by scaling with 2^-24.
float widen(Half value) {
  const uint32_t sign = uint32_t{value.bits} >> 15 << 31;
  const uint32_t exponent = value.bits >> 10 & 31, fraction = value.bits & 1023u;
  if (exponent == 0) {
    const float size = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -size : size;
  }
  const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return from_bits(sign | wide << 23 | fraction << 13);
}

// To the nearest, ties to even; a NaN keeps its sign and stays a NaN.
uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 64);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void put(float value, float* at) {
  *at = value;
}
void put(float value, uint16_t* at) {
  *at = to_bf16(value);
}

// Calls fn with a null pointer of the matrix's element type.
template <class Fn>
void with_element(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::f32:
      return fn(static_cast<const float*>(nullptr));
    case DType::bf16:
      return fn(static_cast<const Bf16*>(nullptr));
    case DType::f16:
      return fn(static_cast<const Half*>(nullptr));
  }
}

// Rows first .. first+count-1 of W as one panel [k][panel], zero padded.
template <class Element, class Weight>
void pack_panel(const HostMatrix& matrix, int64_t first, int64_t count, int64_t panel, Weight* out) {
  const auto* from = static_cast<const Element*>(matrix.data) + first * matrix.row_stride;
  for (int64_t k = 0; k < matrix.cols; ++k) {
    for (int64_t lane = 0; lane < count; ++lane) {
      put(widen(from[lane * matrix.row_stride + k * matrix.col_stride]), out + k * panel + lane);
    }
    for (int64_t lane = count; lane < panel; ++lane) put(0.0f, out + k * panel + lane);
  }
}

template <class Element, class Weight>
void pack_all(const HostMatrix& from, PackedMatrix& to, ThreadPool& pool) {
  const int64_t per_unit = to.gated ? 2 : 1;
  auto* data = static_cast<Weight*>(to.data.data());
  pool.parallel_for(to.units() * per_unit, [&](int64_t index) {
    const int64_t column = index / per_unit * to.panel;
    const int64_t count = std::min(to.panel, to.out_columns() - column);
    const int64_t first = column + index % per_unit * to.out_columns();
    pack_panel<Element>(from, first, count, to.panel, data + index * to.k * to.panel);
  });
}

}  // namespace

PackedMatrix pack(const HostMatrix& matrix, int64_t panel, bool bf16, bool gated, ThreadPool& pool) {
  PackedMatrix packed;
  packed.n = matrix.rows;
  packed.k = matrix.cols;
  packed.panel = panel;
  packed.bf16 = bf16;
  packed.gated = gated;
  const int64_t elements = packed.units() * (gated ? 2 : 1) * packed.k * panel;
  packed.data = Buffer(elements * (bf16 ? 2 : 4));
  with_element(matrix.dtype, [&]<class Element>(const Element*) {
    if (bf16) {
      pack_all<Element, uint16_t>(matrix, packed, pool);
    } else {
      pack_all<Element, float>(matrix, packed, pool);
    }
  });
  return packed;
}

void unpack_row(const PackedMatrix& matrix, int64_t row, float* out) {
  const int64_t start = row / matrix.panel * matrix.k * matrix.panel + row % matrix.panel;
  if (matrix.bf16) {
    const auto* from = static_cast<const uint16_t*>(matrix.data.data()) + start;
    for (int64_t k = 0; k < matrix.k; ++k) out[k] = widen(Bf16{from[k * matrix.panel]});
  } else {
    const float* from = matrix.data.floats() + start;
    for (int64_t k = 0; k < matrix.k; ++k) out[k] = from[k * matrix.panel];
  }
}

Buffer plain_rows(const HostMatrix& matrix) {
  Buffer rows(matrix.rows * matrix.cols * static_cast<int64_t>(sizeof(float)));
  with_element(matrix.dtype, [&]<class Element>(const Element*) {
    const auto* from = static_cast<const Element*>(matrix.data);
    for (int64_t r = 0; r < matrix.rows; ++r) {
      for (int64_t c = 0; c < matrix.cols; ++c) {
        rows.floats()[r * matrix.cols + c] = widen(from[r * matrix.row_stride + c * matrix.col_stride]);
      }
    }
  });
  return rows;
}

}  // namespace armt::cpu
