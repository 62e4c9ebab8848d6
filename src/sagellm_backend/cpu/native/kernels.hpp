// What every instruction set provides: one table of functions, compiled once for each from the same source.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common.hpp"

namespace sage {

// Methods in headers that every instruction set compiles: no copy of them may be shared by the linker.
#define SAGE_INLINE inline __attribute__((always_inline))

// How packed weights are stored. A panel holds 32 outputs; inputs come in groups of 32, padded with zeros:
//   Q4   scale,         value = (q - 8)·scale          Q8   scale,       value = (q - 128)·scale
//   Q4M  scale and min, value = q·scale + min          Q8M  scale, min,  value = q·scale + min, q <= 127
// One group of a panel: 32 half scales, 32 half minimums (M only), then the quants: for each 4 inputs (8 for Q4: low, then
// high nibbles) two vectors of 16 outputs × 4 inputs. BF16: for each 2 inputs 32 outputs × 2. F32: for each input 32 outputs.
enum class WeightFormat : int { Q4, Q4M, Q8, Q8M, BF16, F32 };

struct Packed {
  WeightFormat format = WeightFormat::F32;
  int n = 0, k = 0;
  const uint8_t* data = nullptr;
  size_t panel_stride = 0;  // bytes from one panel to the next

  SAGE_INLINE int panels() const { return (n + kPanel - 1) / kPanel; }
  SAGE_INLINE int groups() const { return (k + kGroup - 1) / kGroup; }
};

// Whether activations meet such weights as int8.
static constexpr bool reads_int8(WeightFormat f) { return f != WeightFormat::BF16 && f != WeightFormat::F32; }

size_t group_bytes(WeightFormat format);
static inline size_t panel_bytes(WeightFormat format, int k) { return group_bytes(format) * ((k + kGroup - 1) / kGroup); }

// Per row and group of 32 int8 activations. `zero4`, `zero8` are what the weights' zero points add to the dot product.
struct GroupMeta {
  float scale;
  float scaled_sum;  // scale · sum(q)
  int32_t zero4;     // -8 · sum(q)
  int32_t zero8;     // -128 · sum(q), or 0 where the instruction set multiplies signed bytes
};

// Rows of activations as the weights' formats want them; a null pointer is a view that no consumer needs.
struct Activations {
  int8_t* q = nullptr;
  GroupMeta* meta = nullptr;
  uint16_t* bf16 = nullptr;
  float* f32 = nullptr;
  size_t ld = 0;       // elements from row to row of q, bf16 and f32
  size_t ld_meta = 0;  // groups from row to row
  int rest = 0;        // row r + rest holds what the rounding of row r to int8 left over, of rows that keep it
};

enum class KvFormat : int { BF16, F32, INT8 };

// Query vectors that share a KV head of one sequence: so many are computed together, and so many read the cache together.
constexpr int kTile = 8;
constexpr int kLanes = 32;
// Tokens whose softmax is computed as one unit. Units start at multiples of it, so no result depends on how rows are tiled.
constexpr int kChunk = 256;

struct AttentionTile {
  int lanes;
  const float* q[kLanes];  // [head_dim]
  float* out[kLanes];      // [head_dim rounded up to 16]
  int position[kLanes];    // of the query; ascending
  int window;              // 0: all before
  const int32_t* blocks;   // block table of the sequence
  const uint8_t* k;        // KV head of block 0
  const uint8_t* v;
  size_t block_stride;  // bytes from block to block
  int head_dim;
  float scale, softcap;
  float* scratch;          // attention_scratch(head_dim) floats
};

static inline size_t attention_scratch(int head_dim) {
  const size_t dim = static_cast<size_t>(round_up(head_dim, 16));
  return kTile * 2 * static_cast<size_t>(kChunk) + kLanes * dim;
}

enum class Activation : int { Silu, GeluTanh, Gelu };

struct Kernels {
  const char* name;

  // out[r][0..31] (+)= rows r of `x` times panel `panel` of `w`, for rows [row0, row0 + rows). With `add`, out += factor·result.
  void (*gemm)(const Packed& w, int panel, const Activations& x, int row0, int rows, float* out, size_t ld_out, bool add,
               float factor);

  // At least the Euclidean norm of each row of the matrix in a panel; for formats of 4 and 8 bits.
  float (*panel_norm)(const Packed& w, int panel);

  // Convert columns [begin, end) of rows, which start at `x` and are `ld` floats apart, to rows of `to` from to_row on; `begin` is
  // a multiple of 32, `end` too unless it is the row's end.
  void (*prepare)(const float* x, size_t ld, int rows, int begin, int end, const Activations& to, int to_row);

  // out = x / rms(x) · weight
  void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* out);

  // gate[i] = act(gate[i]) · up[i]; n is a multiple of 16.
  void (*activate)(Activation kind, float* gate, const float* up, int n);

  // x[i] = cap·tanh(x[i]/cap); n is a multiple of 16.
  void (*softcap)(float* x, int n, float cap);

  // Sum of exp(x[i] - top) over n values, in an order that depends on n alone.
  double (*sum_exp)(const float* x, int n, float top);

  // Raise (*best, *index) to the greatest finite x[i], index base + i; the lowest index of equals.
  void (*argmax)(const float* x, int n, int base, float* best, int* index);

  // The greatest of n values; n is a multiple of 16.
  float (*greatest)(const float* x, int n);

  // Integer weights of docs/design/0030-sampling-stream.md, section 3.
  void (*integer_weights)(const float* z, int n, double top, double scale, uint64_t* w);

  // Rotate pairs of one head; cos_sin holds dim/2 cosines, then dim/2 sines.
  void (*rope)(float* head, const float* cos_sin, int dim, bool interleaved);

  // Store token `slot` of a block; n = head_dim.
  void (*write_kv)(KvFormat format, const float* k, const float* v, int n, int slot, uint8_t* k_block, uint8_t* v_block);

  void (*attention)(KvFormat format, const AttentionTile& tile);

  // Speed limits, see limits.inl.
  uint32_t (*read_stream)(const uint8_t* p, size_t n);
  float (*dot_int8_loop)(int64_t rounds);
  float (*dot_bf16_loop)(int64_t rounds);
};

// Bytes of K (or V) of one head in one block.
size_t kv_head_bytes(KvFormat format, int head_dim);

}  // namespace sage
