// One engine step: every layer over all rows in one parallel region.
#pragma once

#include <algorithm>

#include <initializer_list>

#include "model.hpp"

namespace sage {

constexpr size_t kRowBlockBytes = 256 << 10;  // of activations that stay in a core's cache
constexpr int kTilesPerThread = 16;           // of attention, at least: the threads end together
constexpr int kFewerRows = 16;                // that the last layer must be spared, to be split

inline int row_block(int k) { return std::max(24, static_cast<int>(kRowBlockBytes) / std::max(k, 1) / 24 * 24); }

// Rows that the last layer goes on with once its keys and values are written: of each sequence those from its first logit row on.
// Of a prompt that is one row of hundreds, of a chunk before its end none.
class Tail {
 public:
  explicit Tail(const StepInput& whole);
  const StepInput& input() const { return in_; }
  const std::vector<int>& rows() const { return rows_; }  // of the whole step, ascending

 private:
  StepInput in_;
  std::vector<int> rows_;
  std::vector<int32_t> starts_, lengths_, tables_, logit_rows_, adapters_;
};

class Forward {
 public:
  Forward(Model& model, const StepInput& in, const StepOutput& out);
  void run() { run(nullptr, {}); }
  // The last layer for `tail` alone, whose rows are `rows` of this step.
  void run(Forward* tail, const std::vector<int>& rows);

 private:
  // Query vectors of one sequence and KV head: lane i is query row (first + i) / heads_per_kv of the sequence.
  struct Tile {
    int sequence, kv_head, first, lanes;
  };
  struct Row {
    int sequence, position;
  };
  enum class Part { Whole, Keys, Rest };  // of a layer: Keys writes the cache, Rest is what follows, for rows of the tail

  void plan_attention();
  void work(int thread, Forward* tail, const std::vector<int>& rows);
  void take_rows(const std::vector<int>& rows);
  void finish(int thread, size_t loop);
  void embed(int thread);
  void layer(int index, int thread, size_t loop, Part part);
  // Row-wise conversion, and products of rows, with what the rounding left over where a row keeps it.
  void convert(const float* x, size_t ld, int rows, int begin, int end, const Activations& to, int row0, int thread);
  void convert_rest(const float* x, int begin, int end, const Activations& to, int row, int rest_row, float* scratch);
  void product(const Packed& w, int panel, const Activations& x, int row0, int rows, float* out, size_t ld, bool add, float factor);
  void norm_rows(int thread, const float* weight);
  void branch_norm(int thread, const float* weight, const float* bias);
  const Activations& normed(int thread) const;
  void rotate(const Layer& y, int index, int row, int kv_head, int kv_heads, int thread, Part part);
  void rotate_queries(const Layer& y, int index, int row, int q_head, int q_heads, int thread);
  void rotate_keys(const Layer& y, int index, int row, int kv_head, int kv_heads, int thread);
  void rotate_heads(float* heads, int n_heads, const float* norm, int index, int row, int thread);
  void attend(int index, const Tile& tile, int thread);
  void gate_up(int index, int unit, int row0, int rows, int thread);
  void experts(const Layer& y, bool straight, int thread, size_t loop);
  void route(int row);
  void deal_experts();
  void expert_unit(const Expert& x, int unit, int first, int rows, int thread);
  void combine(int row, bool straight);
  void feed_forward(int index, int thread, size_t loop);
  void project(int index, Site site, const Packed& w, const Activations& x, bool straight, int thread, size_t loop);
  // head.cpp
  void prepare_head(float* row, int i);
  void head(int thread, size_t loop);
  void head_panel(int panel, int thread);
  void add_rest(int panel, float* tile, int thread);
  void sample(int thread, size_t loop);
  void sample_row(int i, int thread);
  // lora.cpp
  void plan_adapters();
  float* low(int row, int place);
  template <class F>
  void low_inputs(int index, std::initializer_list<Site> sites, int thread, F&& input_of);
  void low_normed(int index, std::initializer_list<Site> sites, const float* weight, int thread);
  void low_attended(int index, int thread);
  void low_hidden(int index, int thread);
  void add_low(int index, Site site, int place, int panel, int row0, int rows, float* out, size_t ld, float factor);
  bool stores_logits(int i) const { return out_.logits || !(*in_.sampling)[i].plain_greedy(); }

  // Rows are dealt in equal contiguous shares; row r of all row-wise phases belongs to the same thread.
  static std::pair<int, int> rows_of(int rows, int thread, int threads) {
    return {static_cast<int>(static_cast<long long>(rows) * thread / threads),
            static_cast<int>(static_cast<long long>(rows) * (thread + 1) / threads)};
  }

  // Call f(item) for every item once over all threads; the caller puts a barrier behind it.
  template <class F>
  void share(int items, size_t loop, F&& f);
  // The same over row blocks × panels: f(panel, row0, rows).
  template <class F>
  void share_panels(int panels, int k, int thread, size_t loop, F&& f);

  Model& m_;
  const Config& c_;
  const Kernels& kernel_;
  Scratch& s_;
  const StepInput& in_;
  const StepOutput& out_;
  int group_;  // query heads a KV head
  bool fused_;  // rotation and attention in one task
  bool few_;    // every thread norms all rows
  std::vector<Row> rows_;
  std::vector<int> first_row_;  // of each sequence
  std::vector<int> opening_;    // rows of first tokens
  std::vector<Tile> tiles_;
  std::vector<const Adapter*> adapters_;  // of each row; empty where no row has one
  std::vector<float> low_;                // A·x of each row, for up to three projections at a time
  size_t low_ld_ = 0;
};

// A turn takes a part of what is left: long runs at first, which read memory in order, and short ones at the end, so that all
// threads end together.
template <class F>
void Forward::share(int items, size_t loop, F&& f) {
  int begin = 0, turn = 0;
  for (int mine = s_.loops->take(loop, 1);; mine = s_.loops->take(loop, 1)) {
    int size = 0;
    for (;; turn++, begin += size) {
      size = std::max(1, (items - begin) / (2 * m_.pool_.size()));
      if (begin >= items) return;
      if (turn == mine) break;
    }
    for (int i = begin; i < begin + size; i++) f(i);
  }
}

template <class F>
void Forward::share_panels(int panels, int k, int thread, size_t loop, F&& f) {
  if (in_.rows <= kFewRows) {
    const long long threads = m_.pool_.size();
    for (int p = static_cast<int>(panels * thread / threads); p < panels * (thread + 1) / threads; p++) f(p, 0, in_.rows);
    return;
  }
  const int most = row_block(k), blocks = (in_.rows + most - 1) / most;
  const int size = round_up((in_.rows + blocks - 1) / blocks, 12);  // equal, of whole tiles
  share(panels * blocks, loop, [&](int item) {
    const int row0 = item / panels * size, rows = std::min(size, in_.rows - row0);
    if (rows > 0) f(item % panels, row0, rows);
  });
}

}  // namespace sage
