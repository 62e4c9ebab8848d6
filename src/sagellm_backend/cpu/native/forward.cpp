#include "forward.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "pack.hpp"

namespace sage {

Tail::Tail(const StepInput& whole) : in_(whole) {
  std::vector<int> place(whole.rows, -1);  // of a row that needs logits: itself; then its new number
  for (int i = 0; i < whole.n_logits; i++) place[whole.logit_rows[i]] = 0;
  int first = 0;
  for (int s = 0; s < whole.sequences; first += whole.lengths[s], s++) {
    const int end = first + whole.lengths[s];
    int row = first;
    while (row < end && place[row] < 0) row++;
    if (row == end) continue;
    starts_.push_back(whole.starts[s] + row - first);
    lengths_.push_back(end - row);
    const int32_t* table = whole.tables + static_cast<size_t>(s) * whole.table_width;
    tables_.insert(tables_.end(), table, table + whole.table_width);
    if (whole.adapters) adapters_.push_back(whole.adapters[s]);
    for (; row < end; row++) {
      place[row] = static_cast<int>(rows_.size());
      rows_.push_back(row);
    }
  }
  for (int i = 0; i < whole.n_logits; i++) logit_rows_.push_back(place[whole.logit_rows[i]]);
  in_.rows = static_cast<int>(rows_.size());
  in_.sequences = static_cast<int>(starts_.size());
  in_.starts = starts_.data();
  in_.lengths = lengths_.data();
  in_.tables = tables_.data();
  in_.logit_rows = logit_rows_.data();
  if (whole.adapters) in_.adapters = adapters_.data();
}

Forward::Forward(Model& model, const StepInput& in, const StepOutput& out)
    : m_(model), c_(model.config_), kernel_(model.kernels_), s_(model.scratch_), in_(in), out_(out), group_(c_.n_heads / c_.n_kv_heads) {
  rows_.reserve(in.rows);
  for (int s = 0; s < in.sequences; s++) {
    first_row_.push_back(static_cast<int>(rows_.size()));
    if (in.starts[s] == 0) opening_.push_back(first_row_.back());
    for (int i = 0; i < in.lengths[s]; i++) rows_.push_back({s, in.starts[s] + i});
  }
  // A decode step needs no barrier between a head's new token and its attention: one task does both.
  fused_ = std::all_of(in.lengths, in.lengths + in.sequences, [](int n) { return n == 1; }) && group_ <= kLanes && !c_.qk_norm_full;
  few_ = in.rows <= kFewRows && !c_.post_norm && !c_.o_bias && c_.n_experts == 0;
  plan_attention();
  plan_adapters();
}

// Tiles of one KV head follow each other, so that what they read stays in the cache; long ones first, so that the threads end
// together.
void Forward::plan_attention() {
  long long lanes = 0;
  for (int s = 0; s < in_.sequences; s++) lanes += static_cast<long long>(in_.lengths[s]) * group_ * c_.n_kv_heads;
  const long long share = lanes / (m_.pool_.size() * kTilesPerThread) / kTile * kTile;
  const int width = fused_ ? kLanes : static_cast<int>(std::clamp<long long>(share, kTile, kLanes));
  for (int s = 0; s < in_.sequences; s++) {
    const int lanes = in_.lengths[s] * group_, tiles = (lanes + width - 1) / width;
    for (int head = 0; head < c_.n_kv_heads; head++)
      for (int i = tiles - 1; i >= 0; i--) tiles_.push_back({s, head, i * width, std::min(width, lanes - i * width)});
  }
  auto tokens = [this](const Tile& t) { return in_.starts[t.sequence] + in_.lengths[t.sequence]; };
  std::stable_sort(tiles_.begin(), tiles_.end(), [&](const Tile& a, const Tile& b) { return tokens(a) > tokens(b); });
}

void Forward::run(Forward* tail, const std::vector<int>& rows) {
  s_.loops->reset();
  for (auto& t : s_.threads) {
    std::fill(t.best.begin(), t.best.end(), -std::numeric_limits<float>::infinity());
    std::fill(t.index.begin(), t.index.end(), -1);
  }
  m_.pool_.run([&](int thread) { work(thread, tail, rows); });
}

void Forward::work(int thread, Forward* tail, const std::vector<int>& rows) {
  ThreadPool& pool = m_.pool_;
  size_t loop = 0;
  embed(thread);
  if (few_) pool.barrier();
  const int last = tail ? c_.n_layers - 1 : c_.n_layers;
  for (int i = 0; i < last; i++, loop += kLayerLoops) layer(i, thread, loop, Part::Whole);
  if (!tail) return finish(thread, loop);
  layer(last, thread, loop, Part::Keys);
  if (rows.empty()) return;
  if (thread == 0) tail->take_rows(rows);
  pool.barrier();
  tail->layer(last, thread, loop + kLayerLoops, Part::Rest);
  tail->finish(thread, loop + 2 * kLayerLoops);
}

// Move what a layer starts from to the front. Rows ascend, so none is overwritten before it is taken.
void Forward::take_rows(const std::vector<int>& rows) {
  float *x = s_.x.as<float>(), *rope = s_.rope.as<float>();
  for (size_t i = 0; i < rows.size(); i++) {
    std::memmove(x + i * s_.ld_x, x + rows[i] * s_.ld_x, s_.ld_x * sizeof(float));
    std::memmove(rope + i * s_.rope_row, rope + rows[i] * s_.rope_row, s_.rope_row * sizeof(float));
  }
}

void Forward::finish(int thread, size_t loop) {
  if (in_.n_logits == 0) return;
  ThreadPool& pool = m_.pool_;
  if (c_.post_norm || c_.n_experts > 0) pool.barrier();  // the last branch was added by rows
  const bool hidden_only = in_.sampling->empty();
  const float* x = s_.x.as<float>();
  for (int i = thread; i < in_.n_logits; i += pool.size()) {
    float* row = s_.threads[thread].row.as<float>();
    kernel_.rms_norm(x + in_.logit_rows[i] * s_.ld_x, m_.final_norm_, c_.d_model, c_.norm_eps, row);
    if (out_.hidden) std::memcpy(out_.hidden + static_cast<size_t>(i) * c_.d_model, row, c_.d_model * sizeof(float));
    if (!hidden_only) prepare_head(row, i);
  }
  if (hidden_only) return;
  pool.barrier();
  head(thread, loop);
  if (thread == 0 && in_.masks_ready) in_.masks_ready();
  pool.barrier();
  sample(thread, loop + 1);
}

void Forward::embed(int thread) {
  const auto [begin, end] = rows_of(in_.rows, thread, m_.pool_.size());
  for (int r = begin; r < end; r++) {
    float* x = s_.x.as<float>() + r * s_.ld_x;
    unpack_row(m_.embed_, in_.tokens[r], x);
    if (c_.embed_scale != 1.0f)
      for (int i = 0; i < c_.d_model; i++) x[i] *= c_.embed_scale;
    for (size_t j = 0; j < c_.ropes.size(); j++) {
      const Rope& rope = c_.ropes[j];
      float* cos_sin = s_.rope.as<float>() + r * s_.rope_row + s_.rope_at[j];
      for (int i = 0; i < rope.dim / 2; i++) {
        const double angle = rows_[r].position * rope.frequencies[i];
        cos_sin[i] = static_cast<float>(std::cos(angle)) * rope.magnitude;
        cos_sin[rope.dim / 2 + i] = static_cast<float>(std::sin(angle)) * rope.magnitude;
      }
    }
  }
}

const Activations& Forward::normed(int thread) const { return few_ ? s_.threads[thread].normed.view() : s_.normed.view(); }

// What the rounding of `x` to `row` of `to` left over becomes rest_row. `scratch` may be `x`; it holds what was left afterwards.
void Forward::convert_rest(const float* x, int begin, int end, const Activations& to, int row, int rest_row, float* scratch) {
  const int8_t* q = to.q + row * to.ld;
  const GroupMeta* meta = to.meta + row * to.ld_meta;
  for (int j = begin; j < end; j++) scratch[j - begin] = x[j - begin] - meta[j / kGroup].scale * static_cast<float>(q[j]);
  kernel_.prepare(scratch, 0, 1, begin, end, {to.q, to.meta, nullptr, nullptr, to.ld, to.ld_meta, 0}, rest_row);
}

// The first token of a sequence is one that all later ones attend to, and its few huge activations leave little of int8 to the
// rest of their groups: it keeps two planes, as the head does. One row of a prefill costs nothing.
void Forward::convert(const float* x, size_t ld, int rows, int begin, int end, const Activations& to, int row0, int thread) {
  kernel_.prepare(x, ld, rows, begin, end, to, row0);
  if (!to.q) return;
  for (int row : opening_)
    if (row >= row0 && row < row0 + rows)
      convert_rest(x + (row - row0) * ld, begin, end, to, row, row + to.rest, s_.threads[thread].row.as<float>());
}

void Forward::product(const Packed& w, int panel, const Activations& x, int row0, int rows, float* out, size_t ld, bool add,
                      float factor) {
  kernel_.gemm(w, panel, x, row0, rows, out, ld, add, factor);
  if (!reads_int8(w.format)) return;
  for (int row : opening_)
    if (row >= row0 && row < row0 + rows) kernel_.gemm(w, panel, x, row + x.rest, 1, out + (row - row0) * ld, ld, true, factor);
}

// x -> activations of the next projections, normed if there is a weight. Few rows every thread does for itself, which costs
// less than the barrier behind a shared result.
void Forward::norm_rows(int thread, const float* weight) {
  const auto [begin, end] = few_ ? std::pair{0, in_.rows} : rows_of(in_.rows, thread, m_.pool_.size());
  float* row = s_.threads[thread].row.as<float>();
  for (int r = begin; r < end; r++) {
    const float* x = s_.x.as<float>() + r * s_.ld_x;
    if (weight) kernel_.rms_norm(x, weight, c_.d_model, c_.norm_eps, row);
    convert(weight ? row : x, 0, 1, 0, c_.d_model, normed(thread), r, thread);
  }
  if (!few_) m_.pool_.barrier();
}

// x += factor · norm(branch + bias)
void Forward::branch_norm(int thread, const float* weight, const float* bias) {
  const auto [begin, end] = rows_of(in_.rows, thread, m_.pool_.size());
  float* row = s_.threads[thread].row.as<float>();
  for (int r = begin; r < end; r++) {
    float* x = s_.x.as<float>() + r * s_.ld_x;
    float* b = s_.branch.as<float>() + r * s_.ld_x;
    if (bias)
      for (int i = 0; i < c_.d_model; i++) b[i] += bias[i];
    if (weight) kernel_.rms_norm(b, weight, c_.d_model, c_.norm_eps, row);
    const float* add = weight ? row : b;
    for (int i = 0; i < c_.d_model; i++) x[i] += add[i] * c_.residual_scale;
  }
}

void Forward::rotate_heads(float* heads, int n_heads, const float* norm, int index, int row, int thread) {
  const int dh = c_.head_dim;
  float* copy = s_.threads[thread].row.as<float>();
  if (norm && c_.qk_norm_full) {
    std::memcpy(copy, heads, sizeof(float) * n_heads * dh);
    kernel_.rms_norm(copy, norm, n_heads * dh, c_.norm_eps, heads);
  }
  const int which = c_.layer_rope[index];
  const Rope& rope = c_.ropes[which];
  const float* cos_sin = s_.rope.as<float>() + row * s_.rope_row + s_.rope_at[which];
  for (int h = 0; h < n_heads; h++) {
    float* head = heads + h * dh;
    if (norm && c_.qk_norm_head) {
      std::memcpy(copy, head, sizeof(float) * dh);
      kernel_.rms_norm(copy, norm, dh, c_.norm_eps, head);
    }
    kernel_.rope(head, cos_sin, rope.dim, rope.interleaved);
  }
}

static void add_bias(float* x, const float* bias, int n) {
  for (int i = 0; i < n; i++) x[i] += bias[i];
}

// Bias, norm and rotation of q and k of some KV heads and their query heads; k and v go into the cache.
void Forward::rotate(const Layer& y, int index, int row, int kv_head, int kv_heads, int thread, Part part) {
  if (part != Part::Keys) rotate_queries(y, index, row, kv_head * group_, kv_heads * group_, thread);
  if (part != Part::Rest) rotate_keys(y, index, row, kv_head, kv_heads, thread);
}

void Forward::rotate_queries(const Layer& y, int index, int row, int q_head, int q_heads, int thread) {
  const int at = q_head * c_.head_dim;
  float* q = s_.qkv.as<float>() + row * s_.ld_qkv + s_.q_at + at;
  if (c_.qkv_bias) add_bias(q, y.q_bias + at, q_heads * c_.head_dim);
  rotate_heads(q, q_heads, y.q_norm, index, row, thread);
}

void Forward::rotate_keys(const Layer& y, int index, int row, int kv_head, int kv_heads, int thread) {
  const int dh = c_.head_dim;
  float* qkv = s_.qkv.as<float>() + row * s_.ld_qkv + kv_head * dh;
  float *k = qkv + s_.k_at, *v = qkv + s_.v_at;
  if (c_.qkv_bias) {
    add_bias(k, y.k_bias + kv_head * dh, kv_heads * dh);
    add_bias(v, y.v_bias + kv_head * dh, kv_heads * dh);
  }
  rotate_heads(k, kv_heads, y.k_norm, index, row, thread);
  const auto [sequence, position] = rows_[row];
  const int block = in_.tables[static_cast<size_t>(sequence) * in_.table_width + position / kBlock];
  for (int h = 0; h < kv_heads; h++)
    kernel_.write_kv(m_.kv_.format, k + h * dh, v + h * dh, dh, position % kBlock, m_.kv_.k(block, index, kv_head + h),
                     m_.kv_.v(block, index, kv_head + h));
}

void Forward::attend(int index, const Tile& tile, int thread) {
  const int dh = c_.head_dim, dim = round_up(dh, 16);
  AttentionTile t;
  t.lanes = tile.lanes;
  t.window = c_.windows[index];
  t.blocks = in_.tables + static_cast<size_t>(tile.sequence) * in_.table_width;
  t.k = m_.kv_.k(0, index, tile.kv_head);
  t.v = m_.kv_.v(0, index, tile.kv_head);
  t.block_stride = m_.kv_.block_bytes;
  t.head_dim = dh;
  t.scale = c_.attention_scale;
  t.softcap = c_.attention_softcap;
  t.scratch = s_.threads[thread].attention.as<float>();
  float* lanes = s_.threads[thread].lanes.as<float>();
  auto row_of = [&](int i) { return first_row_[tile.sequence] + (tile.first + i) / group_; };
  auto head_of = [&](int i) { return tile.kv_head * group_ + (tile.first + i) % group_; };
  for (int i = 0; i < tile.lanes; i++) {
    t.q[i] = s_.qkv.as<float>() + row_of(i) * s_.ld_qkv + s_.q_at + head_of(i) * dh;
    t.out[i] = lanes + i * dim;
    t.position[i] = rows_[row_of(i)].position;
  }
  kernel_.attention(m_.kv_.format, t);
  for (int i = 0, heads; i < tile.lanes; i += heads) {  // the heads of a row lie side by side
    const int row = row_of(i), begin = head_of(i) * dh;
    heads = std::min(tile.lanes - i, group_ - (tile.first + i) % group_);
    float* to = s_.attn.as<float>() + row * s_.ld_attn + begin;
    for (int h = 0; h < heads; h++) std::memcpy(to + h * dh, t.out[i + h], dh * sizeof(float));
    if (dh % kGroup == 0) convert(to, 0, 1, begin, begin + heads * dh, s_.attended.view(), row, thread);
  }
}

// 32 hidden channels: gate and up of the rows, activated and converted for the down projection.
void Forward::gate_up(int index, int unit, int row0, int rows, int thread) {
  const Layer& y = m_.layers_[index];
  float* gate = s_.threads[thread].gate.as<float>();
  float* up = s_.threads[thread].up.as<float>();
  product(y.gate, unit, normed(thread), row0, rows, gate, kPanel, false, 1.0f);
  product(y.up, unit, normed(thread), row0, rows, up, kPanel, false, 1.0f);
  add_low(index, Site::Gate, 0, unit, row0, rows, gate, kPanel, 1.0f);
  add_low(index, Site::Up, 1, unit, row0, rows, up, kPanel, 1.0f);
  kernel_.activate(c_.activation, gate, up, rows * kPanel);
  const int begin = unit * kPanel, end = std::min(c_.d_ff, begin + kPanel);
  convert(gate, kPanel, rows, begin, end, s_.hidden.view(), row0, thread);
}

// A projection back to the residual stream: straight into it, or into `branch` if a norm or a bias follows.
void Forward::project(int index, Site site, const Packed& w, const Activations& x, bool straight, int thread, size_t loop) {
  float* to = straight ? s_.x.as<float>() : s_.branch.as<float>();
  share_panels(w.panels(), w.k, thread, loop, [&](int panel, int row0, int rows) {
    float* out = to + row0 * s_.ld_x + panel * kPanel;
    product(w, panel, x, row0, rows, out, s_.ld_x, straight, c_.residual_scale);
    add_low(index, site, 0, panel, row0, rows, out, s_.ld_x, straight ? c_.residual_scale : 1.0f);
  });
}

void Forward::layer(int index, int thread, size_t loop, Part part) {
  ThreadPool& pool = m_.pool_;
  const Layer& y = m_.layers_[index];
  norm_rows(thread, y.attn_norm);
  low_normed(index, {Site::Q, Site::K, Site::V}, y.attn_norm, thread);

  const int nq = part == Part::Keys ? 0 : y.q.panels();
  const int nk = part == Part::Rest ? 0 : y.k.panels(), nv = part == Part::Rest ? 0 : y.v.panels();
  share_panels(nq + nk + nv, c_.d_model, thread, loop, [&](int p, int row0, int rows) {
    const Packed& w = p < nq ? y.q : p < nq + nk ? y.k : y.v;
    const int panel = p < nq ? p : p < nq + nk ? p - nq : p - nq - nk;
    const int at = p < nq ? s_.q_at : p < nq + nk ? s_.k_at : s_.v_at;
    float* out = s_.qkv.as<float>() + row0 * s_.ld_qkv + at + panel * kPanel;
    product(w, panel, normed(thread), row0, rows, out, s_.ld_qkv, false, 1.0f);
    const int place = p < nq ? 0 : p < nq + nk ? 1 : 2;
    add_low(index, static_cast<Site>(place), place, panel, row0, rows, out, s_.ld_qkv, 1.0f);
  });
  pool.barrier();

  const auto [begin, end] = rows_of(in_.rows, thread, pool.size());
  if (!fused_ || part == Part::Keys) {
    for (int r = begin; r < end; r++) rotate(y, index, r, 0, c_.n_kv_heads, thread, part);
    pool.barrier();
  }
  if (part == Part::Keys) return;
  const int tiles = static_cast<int>(tiles_.size());
  for (int i = s_.loops->take(loop + 1, 1); i < tiles; i = s_.loops->take(loop + 1, 1)) {
    if (fused_) rotate(y, index, tiles_[i].sequence, tiles_[i].kv_head, 1, thread, part);
    attend(index, tiles_[i], thread);
  }
  pool.barrier();
  if (c_.head_dim % kGroup != 0) {  // groups of 32 span heads
    convert(s_.attn.as<float>() + begin * s_.ld_attn, s_.ld_attn, end - begin, 0, c_.q_size(), s_.attended.view(), begin, thread);
    pool.barrier();
  }

  low_attended(index, thread);
  const bool straight_o = !y.post_attn_norm && !y.o_bias;
  project(index, Site::O, y.o, s_.attended.view(), straight_o, thread, loop + 2);
  pool.barrier();
  if (!straight_o) branch_norm(thread, y.post_attn_norm, y.o_bias);
  norm_rows(thread, y.ffn_norm);

  feed_forward(index, thread, loop + 3);
  if (y.post_ffn_norm) branch_norm(thread, y.post_ffn_norm, nullptr);
}

void Forward::feed_forward(int index, int thread, size_t loop) {
  const Layer& y = m_.layers_[index];
  ThreadPool& pool = m_.pool_;
  if (!y.experts.empty()) return experts(y, !y.post_ffn_norm, thread, loop);  // ends with each row at its thread
  low_normed(index, {Site::Gate, Site::Up}, y.ffn_norm, thread);
  share_panels(y.gate.panels(), c_.d_model, thread, loop,
               [&](int unit, int row0, int rows) { gate_up(index, unit, row0, rows, thread); });
  pool.barrier();
  low_hidden(index, thread);
  project(index, Site::Down, y.down, s_.hidden.view(), !y.post_ffn_norm, thread, loop + 1);
  pool.barrier();
}

void Model::step(const StepInput& in, const StepOutput& out) {
  check(in, in.sampling->empty() && out.hidden && !out.logits);
  Forward whole(*this, in, out);
  const Tail tail(in);
  if (in.rows - static_cast<int>(tail.rows().size()) < kFewerRows) return whole.run();
  Forward rest(*this, tail.input(), out);
  whole.run(&rest, tail.rows());
}

}  // namespace sage
