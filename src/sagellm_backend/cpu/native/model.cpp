#include "model.hpp"

#include <algorithm>
#include <stdexcept>

#include "pack.hpp"

namespace sage {
namespace {

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

}  // namespace

size_t kv_head_bytes(KvFormat format, int head_dim) {
  const size_t values = kBlock * static_cast<size_t>(round_up(head_dim, 16));
  switch (format) {
    case KvFormat::F32: return values * 4;
    case KvFormat::BF16: return values * 2;
    case KvFormat::INT8: return values + kBlock * sizeof(float);  // and a scale for each token
  }
  return 0;
}

ActivationBuffer::ActivationBuffer(int rows, int k, const std::vector<WeightFormat>& readers, bool rest) {
  const bool q = std::any_of(readers.begin(), readers.end(), reads_int8);
  const bool bf16 = std::count(readers.begin(), readers.end(), WeightFormat::BF16) > 0;
  const bool f32 = std::count(readers.begin(), readers.end(), WeightFormat::F32) > 0;
  const size_t n = static_cast<size_t>(rows), n_int8 = rest ? 2 * n : n;
  view_.rest = rest ? rows : 0;
  view_.ld = static_cast<size_t>(round_up(k, kGroup)) + 64;  // rows of a power of two would share cache sets
  view_.ld_meta = static_cast<size_t>(round_up(k, kGroup)) / kGroup;
  const size_t meta_bytes = q ? n_int8 * view_.ld_meta * sizeof(GroupMeta) : 0;
  const size_t q_bytes = q ? round_up(n_int8 * view_.ld, size_t{64}) : 0;
  const size_t bf16_bytes = bf16 ? round_up(n * view_.ld * 2, size_t{64}) : 0;
  memory_ = Memory(meta_bytes + q_bytes + bf16_bytes + (f32 ? n * view_.ld * 4 : 0) + 192);
  uint8_t* p = memory_.as<uint8_t>();
  if (q) {
    view_.q = reinterpret_cast<int8_t*>(p);
    p += q_bytes;
    view_.meta = reinterpret_cast<GroupMeta*>(p);
    p += round_up(meta_bytes, size_t{64});
  }
  if (bf16) {
    view_.bf16 = reinterpret_cast<uint16_t*>(p);
    p += bf16_bytes;
  }
  if (f32) view_.f32 = reinterpret_cast<float*>(p);
}

Model::Model(Config config, const Kernels& kernels, int threads)
    : config_(std::move(config)), kernels_(kernels), pool_(threads > 0 ? threads : allowed_threads()) {}

void Model::set_vector(const std::string& slot, const float* values, int n) { vectors_[slot].assign(values, values + n); }
void Model::set_matrix(const std::string& slot, const Packed& w) { matrices_[slot] = w; }

const float* Model::vector_slot(const std::string& slot, int n) const {
  const auto it = vectors_.find(slot);
  if (it == vectors_.end()) fail("weight slot '" + slot + "' is missing");
  if (static_cast<int>(it->second.size()) != n)
    fail("weight slot '" + slot + "' has " + std::to_string(it->second.size()) + " values, the spec needs " + std::to_string(n));
  return it->second.data();
}

Packed Model::matrix_slot(const std::string& slot, int n, int k) const {
  const auto it = matrices_.find(slot);
  if (it == matrices_.end()) fail("weight slot '" + slot + "' is missing");
  if (it->second.n != n || it->second.k != k)
    fail("weight slot '" + slot + "' is " + std::to_string(it->second.n) + " x " + std::to_string(it->second.k) +
         ", the spec needs " + std::to_string(n) + " x " + std::to_string(k));
  return it->second;
}

void Model::resolve_layer(int index) {
  const Config& c = config_;
  const std::string at = std::to_string(index) + ".";
  Layer& y = layers_[index];
  if (c.pre_norm) {
    y.attn_norm = vector_slot(at + "attn_norm", c.d_model);
    y.ffn_norm = vector_slot(at + "ffn_norm", c.d_model);
  }
  if (c.post_norm) {
    y.post_attn_norm = vector_slot(at + "post_attn_norm", c.d_model);
    y.post_ffn_norm = vector_slot(at + "post_ffn_norm", c.d_model);
  }
  if (c.qk_norm_head || c.qk_norm_full) {
    y.q_norm = vector_slot(at + "q_norm", c.qk_norm_full ? c.q_size() : c.head_dim);
    y.k_norm = vector_slot(at + "k_norm", c.qk_norm_full ? c.kv_size() : c.head_dim);
  }
  if (c.qkv_bias) {
    y.q_bias = vector_slot(at + "q_bias", c.q_size());
    y.k_bias = vector_slot(at + "k_bias", c.kv_size());
    y.v_bias = vector_slot(at + "v_bias", c.kv_size());
  }
  if (c.o_bias) y.o_bias = vector_slot(at + "o_bias", c.d_model);
  y.q = matrix_slot(at + "q", c.q_size(), c.d_model);
  y.k = matrix_slot(at + "k", c.kv_size(), c.d_model);
  y.v = matrix_slot(at + "v", c.kv_size(), c.d_model);
  y.o = matrix_slot(at + "o", c.d_model, c.q_size());
  if (c.expert_layer[index]) {
    y.router = matrix_slot(at + "router", c.n_experts, c.d_model);
    for (int e = 0; e < c.n_experts; e++) {
      std::string number(1, '.');
      number += std::to_string(e);
      y.experts.push_back({matrix_slot(at + "experts.gate" + number, c.experts_d_ff, c.d_model),
                           matrix_slot(at + "experts.up" + number, c.experts_d_ff, c.d_model),
                           matrix_slot(at + "experts.down" + number, c.d_model, c.experts_d_ff)});
    }
    return;
  }
  y.gate = matrix_slot(at + "gate", c.d_ff, c.d_model);
  y.up = matrix_slot(at + "up", c.d_ff, c.d_model);
  y.down = matrix_slot(at + "down", c.d_model, c.d_ff);
}

void Model::finish(const Limits& limits) {
  if (limits.n_blocks < 1 || limits.max_rows < 1 || limits.max_logit_rows < 1)
    fail("n_blocks, max_rows and max_logit_rows must be at least 1");
  layers_.resize(config_.n_layers);
  for (int i = 0; i < config_.n_layers; i++) resolve_layer(i);
  final_norm_ = vector_slot("final_norm", config_.d_model);
  embed_ = matrix_slot("embed", config_.vocab, config_.d_model);
  head_ = config_.tied_head ? embed_ : matrix_slot("head", config_.vocab, config_.d_model);
  kv_.format = limits.kv_format;
  kv_.n_blocks = limits.n_blocks;
  kv_.head_bytes = kv_head_bytes(limits.kv_format, config_.head_dim);
  kv_.layer_bytes = kv_.head_bytes * 2 * config_.n_kv_heads;
  kv_.block_bytes = kv_.layer_bytes * config_.n_layers;
  kv_.memory = Memory(kv_.block_bytes * limits.n_blocks);
  limits_ = limits;
  take_scratch(limits);
}

void Model::take_scratch(const Limits& limits) {
  const Config& c = config_;
  Scratch& s = scratch_;
  const size_t rows = static_cast<size_t>(limits.max_rows), logit_rows = static_cast<size_t>(limits.max_logit_rows);
  s.ld_x = round_up(c.d_model, kPanel);
  s.q_at = 0;
  s.k_at = round_up(c.q_size(), kPanel);
  s.v_at = s.k_at + round_up(c.kv_size(), kPanel);
  s.ld_qkv = s.v_at + round_up(c.kv_size(), kPanel);
  s.ld_attn = round_up(c.q_size(), kPanel);
  s.ld_logits = round_up(c.vocab, kPanel);
  s.rope_at.clear();
  s.rope_row = 0;
  for (const Rope& rope : c.ropes) {
    s.rope_at.push_back(s.rope_row);
    s.rope_row += rope.dim;
  }
  s.x = Memory(rows * s.ld_x * 4);
  s.branch = Memory(rows * s.ld_x * 4);
  s.qkv = Memory(rows * s.ld_qkv * 4);
  s.attn = Memory(rows * s.ld_attn * 4);
  s.rope = Memory(rows * s.rope_row * 4);
  s.logits = Memory(logit_rows * s.ld_logits * 4);
  std::vector<WeightFormat> block_in, attn_in, ffn_in;
  for (const Layer& y : layers_) {
    for (const Packed* w : {&y.q, &y.k, &y.v}) block_in.push_back(w->format);
    attn_in.push_back(y.o.format);
    if (!y.experts.empty()) {
      block_in.push_back(y.router.format);
      for (const Expert& x : y.experts) block_in.insert(block_in.end(), {x.gate.format, x.up.format});
      continue;
    }
    block_in.insert(block_in.end(), {y.gate.format, y.up.format});
    ffn_in.push_back(y.down.format);
  }
  s.normed = ActivationBuffer(limits.max_rows, c.d_model, block_in, true);
  s.attended = ActivationBuffer(limits.max_rows, c.q_size(), attn_in, true);
  s.hidden = ActivationBuffer(limits.max_rows, c.d_ff, ffn_in, true);
  s.head_parts = reads_int8(head_.format) ? 2 : 1;
  s.head = ActivationBuffer(limits.max_logit_rows * s.head_parts, c.d_model, {head_.format});
  s.rest_norm.resize(logit_rows);
  const size_t dim = static_cast<size_t>(round_up(c.head_dim, 16));
  s.threads.resize(pool_.size());
  for (auto& t : s.threads) {
    t.normed = ActivationBuffer(kFewRows, c.d_model, block_in, true);
    t.row = Memory(static_cast<size_t>(round_up(std::max({c.d_model, c.q_size(), c.d_ff}), 64)) * 4);
    t.gate = Memory(rows * kPanel * 4);
    t.up = Memory(rows * kPanel * 4);
    t.attention = Memory(attention_scratch(c.head_dim) * 4);
    t.lanes = Memory(kLanes * dim * 4);
    t.logits = Memory(logit_rows * s.head_parts * kPanel * 4);
    t.sampler = std::make_unique<Sampler>(kernels_, c.vocab);
    t.best.resize(logit_rows);
    t.index.resize(logit_rows);
  }
  take_expert_scratch(limits);
  s.loops = std::make_unique<Loops>((static_cast<size_t>(c.n_layers) + 1) * kLayerLoops + 4);  // the last layer may come in two parts
}

void Model::take_expert_scratch(const Limits& limits) {
  const Config& c = config_;
  if (c.n_experts == 0) return;
  ExpertScratch& e = scratch_.experts;
  const size_t rows = static_cast<size_t>(limits.max_rows), entries = rows * c.experts_top_k;
  std::vector<WeightFormat> in, out;
  for (const Layer& y : layers_)
    for (const Expert& x : y.experts) {
      in.insert(in.end(), {x.gate.format, x.up.format});
      out.push_back(x.down.format);
    }
  e.ld_router = round_up(c.n_experts, kPanel);
  e.router = Memory(rows * e.ld_router * 4);
  e.parts = Memory(entries * scratch_.ld_x * 4);
  e.gathered = ActivationBuffer(static_cast<int>(entries), c.d_model, in);
  e.hidden = ActivationBuffer(static_cast<int>(entries), c.experts_d_ff, out);
  for (auto* v : {&e.chosen, &e.place, &e.entry}) v->resize(entries);
  e.order.resize(rows * c.n_experts);
  e.share.resize(entries);
}

void Model::check(const StepInput& in, bool hidden_only) const {
  if (in.rows < 1 || in.rows > limits_.max_rows)
    fail("a step of " + std::to_string(in.rows) + " rows: the limit is " + std::to_string(limits_.max_rows));
  if (!hidden_only && in.n_logits > limits_.max_logit_rows)
    fail(std::to_string(in.n_logits) + " logit rows: the limit is " + std::to_string(limits_.max_logit_rows));
  for (int r = 0; r < in.rows; r++)
    if (in.tokens[r] < 0 || in.tokens[r] >= config_.vocab)
      fail("token id " + std::to_string(in.tokens[r]) + " is outside the vocabulary of " + std::to_string(config_.vocab));
  long long rows = 0;
  for (int s = 0; s < in.sequences; s++) {
    if (in.lengths[s] < 1 || in.starts[s] < 0) fail("every sequence needs a start of at least 0 and a length of at least 1");
    if (in.adapters && in.adapters[s] >= 0 && !adapters_.count(in.adapters[s]))
      fail("sequence " + std::to_string(s) + " uses adapter " + std::to_string(in.adapters[s]) + ", which is not loaded");
    rows += in.lengths[s];
    const long long end = static_cast<long long>(in.starts[s]) + in.lengths[s];
    if ((end + kBlock - 1) / kBlock > in.table_width)
      fail("sequence " + std::to_string(s) + " ends at position " + std::to_string(end) + ", its block table is too short");
    for (int b = 0; b < (end + kBlock - 1) / kBlock; b++) {
      const int block = in.tables[static_cast<size_t>(s) * in.table_width + b];
      const bool written = b >= in.starts[s] / kBlock;
      if (block >= kv_.n_blocks || (block < 0 && written))
        fail("sequence " + std::to_string(s) + " names block " + std::to_string(block) + " of " + std::to_string(kv_.n_blocks));
    }
  }
  if (rows != in.rows) fail("lengths sum to " + std::to_string(rows) + ", there are " + std::to_string(in.rows) + " tokens");
  if (!hidden_only && static_cast<int>(in.sampling->size()) != in.n_logits)
    fail(std::to_string(in.sampling->size()) + " sampling entries for " + std::to_string(in.n_logits) + " logit rows");
  for (int i = 0; i < in.n_logits; i++)
    if (in.logit_rows[i] < 0 || in.logit_rows[i] >= in.rows) fail("logit row " + std::to_string(in.logit_rows[i]) + " is no row");
}

void Model::check_block(int block) const {
  if (block < 0 || block >= kv_.n_blocks)
    fail("block " + std::to_string(block) + " is not one of the " + std::to_string(kv_.n_blocks) + " blocks");
}

void Model::copy_blocks(const std::vector<std::pair<int, int>>& pairs) {
  for (const auto& [from, to] : pairs) {
    check_block(from);
    check_block(to);
  }
  for (const auto& [from, to] : pairs)
    if (from != to) std::memcpy(kv_.k(to, 0, 0), kv_.k(from, 0, 0), kv_.block_bytes);
}

void Model::export_blocks(const std::vector<int>& blocks, uint8_t* to) const {
  for (int block : blocks) check_block(block);
  for (size_t i = 0; i < blocks.size(); i++) std::memcpy(to + i * kv_.block_bytes, kv_.k(blocks[i], 0, 0), kv_.block_bytes);
}

void Model::import_blocks(const std::vector<int>& blocks, const uint8_t* from) {
  for (int block : blocks) check_block(block);
  for (size_t i = 0; i < blocks.size(); i++) std::memcpy(kv_.k(blocks[i], 0, 0), from + i * kv_.block_bytes, kv_.block_bytes);
}

}  // namespace sage
