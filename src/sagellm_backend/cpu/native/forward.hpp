// One engine step: every layer over all rows in one parallel region.
#pragma once

#include "model.hpp"

namespace sage {

class Forward {
 public:
  Forward(Model& model, const StepInput& in, const StepOutput& out);
  void run();

 private:
  // Up to 8 query vectors of one sequence and KV head: lane i is query row (first + i) / heads_per_kv of the sequence.
  struct Tile {
    int sequence, kv_head, first, lanes;
  };
  struct Row {
    int sequence, position;
  };

  void plan_attention();
  void work(int thread);
  void embed(int thread);
  void layer(int index, int thread, size_t loop);
  void norm_rows(int thread, const float* weight);
  void branch_norm(int thread, const float* weight, const float* bias);
  const Activations& normed(int thread) const;
  void rotate(const Layer& y, int index, int row, int kv_head, int kv_heads, int thread);
  void rotate_heads(float* heads, int n_heads, const float* norm, int index, int row, int thread);
  void attend(int index, const Tile& tile, int thread);
  void gate_up(const Layer& y, int unit, int row0, int rows, int thread);
  void project(const Packed& w, const Activations& x, bool straight, int thread, size_t loop);
  void prepare_head(float* row, int i);
  void head(int thread, size_t loop);
  void head_panel(int panel, int thread);
  void sample(int thread, size_t loop);
  void sample_row(int i, int thread);
  bool stores_logits(int i) const { return out_.logits || !(*in_.sampling)[i].plain_greedy(); }

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
  std::vector<Tile> tiles_;
};

}  // namespace sage
