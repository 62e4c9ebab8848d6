#include "lora.hpp"

#include <algorithm>
#include <stdexcept>

#include "forward.hpp"

namespace sage {

std::pair<int, Site> adapted_slot(const std::string& slot, int n_layers) {
  static const char* const names[kSites] = {"q", "k", "v", "o", "gate", "up", "down"};
  const size_t dot = slot.find('.');
  for (int site = 0; dot != std::string::npos && site < kSites; site++)
    if (slot.substr(dot + 1) == names[site]) {
      const int layer = std::stoi(slot.substr(0, dot));
      if (layer >= 0 && layer < n_layers) return {layer, static_cast<Site>(site)};
    }
  throw std::invalid_argument("slot '" + slot + "' cannot be adapted");
}

LowRank low_rank(const float* a, const float* b, int rank, int k, int n) {
  LowRank w{rank, k, n, std::vector<float>(a, a + static_cast<size_t>(rank) * k), {}};
  const size_t ld = static_cast<size_t>(round_up(n, kPanel));
  w.bt.assign(rank * ld, 0.0f);
  for (int i = 0; i < n; i++)
    for (int j = 0; j < rank; j++) w.bt[j * ld + i] = b[static_cast<size_t>(i) * rank + j];
  return w;
}

void low_rank_input(const LowRank& w, const float* x, float* out) {
  constexpr int kLanesOfSum = 16;
  for (int j = 0; j < w.rank; j++) {
    const float* a = w.a.data() + static_cast<size_t>(j) * w.k;
    float sum[kLanesOfSum] = {};
    int i = 0;
    for (; i + kLanesOfSum <= w.k; i += kLanesOfSum)
      for (int lane = 0; lane < kLanesOfSum; lane++) sum[lane] += a[i + lane] * x[i + lane];
    for (; i < w.k; i++) sum[0] += a[i] * x[i];
    for (int half = kLanesOfSum / 2; half; half /= 2)
      for (int lane = 0; lane < half; lane++) sum[lane] += sum[lane + half];
    out[j] = sum[0];
  }
}

void low_rank_output(const LowRank& w, const float* low, int panel, float factor, float* out) {
  const size_t ld = static_cast<size_t>(round_up(w.n, kPanel));
  const float* bt = w.bt.data() + static_cast<size_t>(panel) * kPanel;
  float sum[kPanel] = {};
  for (int j = 0; j < w.rank; j++)
    for (int i = 0; i < kPanel; i++) sum[i] += low[j] * bt[j * ld + i];
  for (int i = 0; i < kPanel; i++) out[i] += factor * sum[i];
}

void Forward::plan_adapters() {
  if (!in_.adapters) return;
  int rank = 0;
  for (const Row& row : rows_) {
    const int number = in_.adapters[row.sequence];
    adapters_.push_back(number < 0 ? nullptr : &m_.adapters_.at(number));
    if (!adapters_.back()) continue;
    for (const auto& layer : adapters_.back()->layers)
      for (const LowRank& w : layer) rank = std::max(rank, w.rank);
  }
  if (rank == 0) adapters_.clear();
  low_ld_ = static_cast<size_t>(rank);
  low_.resize(adapters_.size() * 3 * low_ld_);
}

float* Forward::low(int row, int place) { return low_.data() + (static_cast<size_t>(row) * 3 + place) * low_ld_; }

// What the rows of `thread` put into some projections, through A; for few rows too every row has one thread.
template <class F>
void Forward::low_inputs(int index, std::initializer_list<Site> sites, int thread, F&& input_of) {
  if (adapters_.empty()) return;
  const long long rows = in_.rows, threads = m_.pool_.size();
  for (int r = static_cast<int>(rows * thread / threads); r < static_cast<int>(rows * (thread + 1) / threads); r++) {
    if (!adapters_[r]) continue;
    const float* x = nullptr;
    int place = 0;
    for (Site site : sites) {
      const LowRank& w = adapters_[r]->at(index, site);
      if (w.rank && !x) x = input_of(r);
      if (w.rank) low_rank_input(w, x, low(r, place));
      place++;
    }
  }
  m_.pool_.barrier();
}

void Forward::low_normed(int index, std::initializer_list<Site> sites, const float* weight, int thread) {
  low_inputs(index, sites, thread, [&](int r) {
    const float* x = s_.x.as<float>() + r * s_.ld_x;
    float* row = s_.threads[thread].row.as<float>();
    if (!weight) return x;
    kernel_.rms_norm(x, weight, c_.d_model, c_.norm_eps, row);
    return static_cast<const float*>(row);
  });
}

void Forward::low_attended(int index, int thread) {
  low_inputs(index, {Site::O}, thread, [&](int r) { return s_.attn.as<const float>() + r * s_.ld_attn; });
}

// The hidden layer exists only as the down projection reads it.
void Forward::low_hidden(int index, int thread) {
  std::vector<float> row;
  low_inputs(index, {Site::Down}, thread, [&](int r) {
    const Activations& h = s_.hidden.view();
    row.resize(c_.d_ff);
    for (int i = 0; i < c_.d_ff; i++) {
      const size_t at = r * h.ld + i;
      if (h.f32) {
        row[i] = h.f32[at];
      } else if (h.bf16) {
        row[i] = bf16_to_float(h.bf16[at]);
      } else {
        row[i] = h.meta[r * h.ld_meta + i / kGroup].scale * static_cast<float>(h.q[at]);
      }
    }
    return static_cast<const float*>(row.data());
  });
}

void Forward::add_low(int index, Site site, int place, int panel, int row0, int rows, float* out, size_t ld, float factor) {
  if (adapters_.empty()) return;
  for (int r = 0; r < rows; r++) {
    if (!adapters_[row0 + r]) continue;
    const LowRank& w = adapters_[row0 + r]->at(index, site);
    if (w.rank) low_rank_output(w, low(row0 + r, place), panel, factor, out + r * ld);
  }
}

void Model::set_adapter(int number, const std::string& slot, const float* a, const float* b, int rank, int k, int n) {
  const auto [layer, site] = adapted_slot(slot, config_.n_layers);
  Adapter& adapter = adapters_[number];
  adapter.layers.resize(config_.n_layers);
  adapter.layers[layer][static_cast<int>(site)] = low_rank(a, b, rank, k, n);
}

void Model::drop_adapter(int number) { adapters_.erase(number); }

}  // namespace sage
