// Mixture of experts: route the rows, gather them by expert, run each expert's matrices over its rows, add up.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "forward.hpp"

namespace sage {
namespace {

// Dealing out: rows of one expert at a time stay together.
constexpr int kExpertRows = 96;

void copy_row(const Activations& from, int row, const Activations& to, int to_row, int k) {
  const size_t n = static_cast<size_t>(round_up(k, kGroup));
  if (to.q) {
    std::memcpy(to.q + to_row * to.ld, from.q + row * from.ld, n);
    std::memcpy(to.meta + to_row * to.ld_meta, from.meta + row * from.ld_meta, n / kGroup * sizeof(GroupMeta));
  }
  if (to.bf16) std::memcpy(to.bf16 + to_row * to.ld, from.bf16 + row * from.ld, n * sizeof(uint16_t));
  if (to.f32) std::memcpy(to.f32 + to_row * to.ld, from.f32 + row * from.ld, static_cast<size_t>(k) * sizeof(float));
}

}  // namespace

// The top_k experts of a row by router logit, the lower number on a tie, and their shares.
void Forward::route(int row) {
  ExpertScratch& e = s_.experts;
  const int n = c_.n_experts, top = c_.experts_top_k;
  const float* logits = e.router.as<float>() + row * e.ld_router;
  int* order = e.order.data() + static_cast<size_t>(row) * n;
  std::iota(order, order + n, 0);
  std::partial_sort(order, order + top, order + n,
                    [&](int a, int b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); });
  float total = 0.0f;
  for (int i = 0; i < (c_.experts_normalize ? top : n); i++) total += std::exp(logits[order[i]] - logits[order[0]]);
  for (int j = 0; j < top; j++) {
    e.chosen[row * top + j] = order[j];
    e.share[row * top + j] = std::exp(logits[order[j]] - logits[order[0]]) / total;
  }
}

// Sort the (row, choice) entries by expert; work is a list of (expert, first place, places).
void Forward::deal_experts() {
  ExpertScratch& e = s_.experts;
  const int entries = in_.rows * c_.experts_top_k;
  std::vector<int> begin(c_.n_experts + 1, 0);
  for (int i = 0; i < entries; i++) begin[e.chosen[i] + 1]++;
  for (int x = 0; x < c_.n_experts; x++) begin[x + 1] += begin[x];
  e.jobs.clear();
  for (int x = 0; x < c_.n_experts; x++)
    for (int at = begin[x]; at < begin[x + 1]; at += kExpertRows) e.jobs.push_back({x, at, std::min(kExpertRows, begin[x + 1] - at)});
  for (int i = 0; i < entries; i++) {
    const int place = begin[e.chosen[i]]++;
    e.place[i] = place;
    e.entry[place] = i;
  }
}

// The feed-forward of an expert layer; rows are normed. The result is added to the residual stream, or left in `branch`.
void Forward::experts(const Layer& y, bool straight, int thread, size_t loop) {
  ThreadPool& pool = m_.pool_;
  ExpertScratch& e = s_.experts;
  const int entries = in_.rows * c_.experts_top_k, threads = pool.size();
  const auto [begin, end] = rows_of(in_.rows, thread, threads);
  share_panels(y.router.panels(), c_.d_model, thread, loop, [&](int panel, int row0, int rows) {
    kernel_.gemm(y.router, panel, s_.normed.view(), row0, rows, e.router.as<float>() + row0 * e.ld_router + panel * kPanel, e.ld_router,
                 false, 1.0f);
  });
  pool.barrier();
  for (int r = begin; r < end; r++) route(r);
  pool.barrier();
  if (thread == 0) deal_experts();
  pool.barrier();
  for (int i = entries * thread / threads; i < entries * (thread + 1) / threads; i++)
    copy_row(s_.normed.view(), e.entry[i] / c_.experts_top_k, e.gathered.view(), i, c_.d_model);
  pool.barrier();

  const int units = (c_.experts_d_ff + kPanel - 1) / kPanel, panels = static_cast<int>(s_.ld_x) / kPanel;
  share(static_cast<int>(e.jobs.size()) * units, loop + 1, [&](int item) {
    const auto [expert, first, rows] = e.jobs[item / units];
    expert_unit(y.experts[expert], item % units, first, rows, thread);
  });
  pool.barrier();
  share(static_cast<int>(e.jobs.size()) * panels, loop + 2, [&](int item) {
    const auto [expert, first, rows] = e.jobs[item / panels];
    const int panel = item % panels;
    kernel_.gemm(y.experts[expert].down, panel, e.hidden.view(), first, rows, e.parts.as<float>() + first * s_.ld_x + panel * kPanel,
                 s_.ld_x, false, 1.0f);
  });
  pool.barrier();
  for (int r = begin; r < end; r++) combine(r, straight);
}

void Forward::expert_unit(const Expert& x, int unit, int first, int rows, int thread) {
  float* gate = s_.threads[thread].gate.as<float>();
  float* up = s_.threads[thread].up.as<float>();
  kernel_.gemm(x.gate, unit, s_.experts.gathered.view(), first, rows, gate, kPanel, false, 1.0f);
  kernel_.gemm(x.up, unit, s_.experts.gathered.view(), first, rows, up, kPanel, false, 1.0f);
  kernel_.activate(c_.activation, gate, up, rows * kPanel);
  const int begin = unit * kPanel, end = std::min(c_.experts_d_ff, begin + kPanel);
  kernel_.prepare(gate, kPanel, rows, begin, end, s_.experts.hidden.view(), first);
}

void Forward::combine(int row, bool straight) {
  const ExpertScratch& e = s_.experts;
  const int top = c_.experts_top_k;
  float* to = (straight ? s_.x : s_.branch).as<float>() + row * s_.ld_x;
  for (int i = 0; i < c_.d_model; i++) {
    float sum = 0.0f;
    for (int j = 0; j < top; j++) sum += e.parts.as<float>()[e.place[row * top + j] * s_.ld_x + i] * e.share[row * top + j];
    to[i] = straight ? to[i] + sum * c_.residual_scale : sum;
  }
}

}  // namespace sage
