// Low-rank adapters: W·x + B·(A·x) for the rows of sequences that name one.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "common.hpp"

namespace sage {

enum class Site : int { Q, K, V, O, Gate, Up, Down };
constexpr int kSites = 7;

struct LowRank {
  int rank = 0, k = 0, n = 0;
  std::vector<float> a;   // [rank][k]
  std::vector<float> bt;  // [rank][n rounded up to a panel], the transposed B with zeros behind n
};

struct Adapter {
  std::vector<std::array<LowRank, kSites>> layers;

  const LowRank& at(int layer, Site site) const { return layers[layer][static_cast<int>(site)]; }
};

// Throws std::invalid_argument for a slot that cannot be adapted. `slot` is "<layer>.<name>".
std::pair<int, Site> adapted_slot(const std::string& slot, int n_layers);

LowRank low_rank(const float* a, const float* b, int rank, int k, int n);

// Products of A's rows with x, in an order that depends on k alone.
void low_rank_input(const LowRank& w, const float* x, float* out);

// out[0..31] += factor · columns [panel·32, panel·32 + 32) of B·low
void low_rank_output(const LowRank& w, const float* low, int panel, float factor, float* out);

}  // namespace sage
