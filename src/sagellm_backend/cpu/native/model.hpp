// A decoder on this machine: sizes, weights, KV cache and scratch. `forward.cpp` runs it.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernels.hpp"
#include "lora.hpp"
#include "memory.hpp"
#include "sample.hpp"
#include "threads.hpp"

namespace sage {

struct Rope {
  int dim = 0;
  bool interleaved = false;
  float magnitude = 1.0f;
  std::vector<double> frequencies;  // radians a position, dim / 2
};

struct Config {
  int n_layers = 0, d_model = 0, n_heads = 0, n_kv_heads = 0, head_dim = 0, d_ff = 0, vocab = 0;
  float norm_eps = 0.0f, attention_scale = 0.0f, attention_softcap = 0.0f, final_softcap = 0.0f;
  float embed_scale = 1.0f, residual_scale = 1.0f, logit_scale = 1.0f;
  bool pre_norm = true, post_norm = false, tied_head = false;
  bool qk_norm_head = false, qk_norm_full = false, qkv_bias = false, o_bias = false;
  Activation activation = Activation::Silu;
  int n_experts = 0, experts_top_k = 0, experts_d_ff = 0;
  bool experts_normalize = true;
  std::vector<bool> expert_layer;  // per layer
  std::vector<int> windows;     // per layer; 0 is full
  std::vector<int> layer_rope;  // per layer, index into ropes
  std::vector<Rope> ropes;

  int q_size() const { return n_heads * head_dim; }
  int kv_size() const { return n_kv_heads * head_dim; }
};

struct Expert {
  Packed gate, up, down;
};

struct Layer {
  const float *attn_norm = nullptr, *ffn_norm = nullptr, *post_attn_norm = nullptr, *post_ffn_norm = nullptr;
  const float *q_norm = nullptr, *k_norm = nullptr, *q_bias = nullptr, *k_bias = nullptr, *v_bias = nullptr, *o_bias = nullptr;
  Packed q, k, v, o;
  Packed gate, up, down;        // a dense layer
  Packed router;                // a layer of experts
  std::vector<Expert> experts;
};

// Memory behind `Activations` for a number of rows, with the views that the given weights read.
class ActivationBuffer {
 public:
  ActivationBuffer() = default;
  // With `rest`, each row has another for what its rounding to int8 leaves over.
  ActivationBuffer(int rows, int k, const std::vector<WeightFormat>& readers, bool rest = false);
  const Activations& view() const { return view_; }

 private:
  Activations view_;
  Memory memory_;
};

struct KvCache {
  KvFormat format = KvFormat::BF16;
  int n_blocks = 0;
  size_t head_bytes = 0;   // of K, or of V, in one block
  size_t layer_bytes = 0;  // K and V of all heads of a layer in one block
  size_t block_bytes = 0;  // all layers
  Memory memory;

  uint8_t* k(int block, int layer, int head) const {
    return memory.as<uint8_t>() + block * block_bytes + layer * layer_bytes + head * 2 * head_bytes;
  }
  uint8_t* v(int block, int layer, int head) const { return k(block, layer, head) + head_bytes; }
};

struct Limits {
  int n_blocks = 0, max_rows = 0, max_logit_rows = 0;
  KvFormat kv_format = KvFormat::BF16;
};

// Up to here weights are streamed: threads take equal, contiguous shares of them, and norm the rows each for itself.
constexpr int kFewRows = 4;

constexpr size_t kLayerLoops = 6;  // shared loops of a layer

// What one step reads and writes. Arrays are borrowed.
struct StepInput {
  const int32_t* tokens;
  int rows;
  const int32_t *starts, *lengths, *tables;
  int sequences, table_width;
  const int32_t* logit_rows;
  int n_logits;
  const std::vector<RowParams>* sampling;
  int top_count;  // columns of top_ids and top_logprobs
  const int32_t* adapters = nullptr;  // of each sequence, -1 for none; or null
  std::function<void()> masks_ready = nullptr;  // called by the calling thread after the layers; masks are not read before
};

struct StepOutput {
  int32_t* tokens;
  float* logprobs;
  int32_t* top_ids;
  float* top_logprobs;
  float* logits;  // [n_logits][vocab] or null
  float* hidden;  // [n_logits][d_model] or null
};

// Rows of an expert layer, sorted by expert. An entry is (row, choice): row · top_k + choice.
struct ExpertScratch {
  struct Job {
    int expert, first, rows;
  };
  size_t ld_router = 0;
  Memory router, parts;
  ActivationBuffer gathered, hidden;
  std::vector<int> chosen, place, entry, order;  // by entry, entry -> place, place -> entry; room to sort a row's experts
  std::vector<float> share;
  std::vector<Job> jobs;
};

struct Scratch {
  size_t ld_x = 0, ld_qkv = 0, ld_attn = 0, ld_logits = 0;
  int q_at = 0, k_at = 0, v_at = 0;  // columns in the qkv rows
  size_t rope_row = 0;               // floats a row
  std::vector<size_t> rope_at;       // of each rope in it
  Memory x, branch, qkv, attn, rope, logits;
  ActivationBuffer normed, attended, hidden, head;
  int head_parts = 1;  // 2: behind all rows of int8 values lie as many of what their rounding left over
  std::vector<float> rest_norm;  // bound of the Euclidean norm of those
  struct Thread {
    ActivationBuffer normed;  // each thread's own copy for the few rows of a step without prefill
    Memory row, gate, up, attention, lanes, logits;
    std::unique_ptr<Sampler> sampler;
    std::vector<float> best;
    std::vector<int> index;
  };
  std::vector<Thread> threads;
  ExpertScratch experts;
  std::unique_ptr<Loops> loops;
};

class Model {
 public:
  Model(Config config, const Kernels& kernels, int threads);

  void set_vector(const std::string& slot, const float* values, int n);
  // `w.data` must outlive the model.
  void set_matrix(const std::string& slot, const Packed& w);

  // Check that every slot is there and take memory. Throws std::invalid_argument that names a missing slot.
  void finish(const Limits& limits);

  // Throws std::invalid_argument for input outside the limits.
  void step(const StepInput& in, const StepOutput& out);

  // One slot of adapter `number`: A is rank × k, B is n × rank. Not while a step runs.
  void set_adapter(int number, const std::string& slot, const float* a, const float* b, int rank, int k, int n);
  void drop_adapter(int number);

  void copy_blocks(const std::vector<std::pair<int, int>>& pairs);
  void export_blocks(const std::vector<int>& blocks, uint8_t* to) const;
  void import_blocks(const std::vector<int>& blocks, const uint8_t* from);

  const KvCache& kv() const { return kv_; }
  const Config& config() const { return config_; }
  const Kernels& kernels() const { return kernels_; }
  ThreadPool& pool() { return pool_; }

 private:
  friend class Forward;
  const float* vector_slot(const std::string& slot, int n) const;
  Packed matrix_slot(const std::string& slot, int n, int k) const;
  void resolve_layer(int layer);
  void take_expert_scratch(const Limits& limits);
  void take_scratch(const Limits& limits);
  void check(const StepInput& in, bool hidden_only) const;
  void check_block(int block) const;

  Config config_;
  const Kernels& kernels_;
  ThreadPool pool_;
  std::unordered_map<std::string, std::vector<float>> vectors_;
  std::unordered_map<std::string, Packed> matrices_;
  std::vector<Layer> layers_;
  const float* final_norm_ = nullptr;
  Packed embed_, head_;
  std::unordered_map<int, Adapter> adapters_;
  KvCache kv_;
  Limits limits_;
  Scratch scratch_;
};

}  // namespace sage
