// The next token of a row: docs/design/0030-sampling-stream.md.
#pragma once

#include <utility>
#include <vector>

#include "kernels.hpp"

namespace sage {

// One row's parameters. Pointers are borrowed for the length of a step.
struct RowParams {
  double temperature = 1.0, top_p = 1.0, min_p = 0.0, typical_p = 1.0;
  int64_t top_k = 0;
  float repetition = 1.0f, frequency = 0.0f, presence = 0.0f;
  uint64_t seed = 0, position = 0;
  const int32_t* history = nullptr;
  int n_history = 0, n_prompt = 0;
  const uint32_t* mask = nullptr;
  std::vector<int32_t> banned, allowed, history_storage;
  bool only_allowed = false;
  std::vector<std::pair<int32_t, float>> bias;
  int logprobs = -1;
  int target = -1;

  bool penalised() const { return n_history > 0 && (repetition != 1.0f || frequency != 0.0f || presence != 0.0f); }
  // Whether the arg max of the raw logits is all that is asked for.
  bool plain_greedy() const {
    return temperature < 1e-5 && target < 0 && logprobs < 0 && !mask && !only_allowed && banned.empty() && bias.empty() &&
           !penalised();
  }
};

class Sampler {
 public:
  Sampler(const Kernels& kernels, int vocab);

  // The drawn id; -1 if no token is left.
  int draw(const float* logits, const RowParams& row);

  // Log-probability of `token` and the `count` likeliest ids, of the raw logits. NaN for token -1.
  float report(const float* logits, int token, int count, int32_t* top_ids, float* top_logprobs);

 private:
  void process(const float* logits, const RowParams& row);
  void penalise(const RowParams& row);
  void filter(const RowParams& row, double top, double scale);
  void keep_prefix(std::vector<int32_t>& ids, double share);
  void typical(double share, double top, double scale);
  bool before(int32_t a, int32_t b) const { return z_[a] > z_[b] || (z_[a] == z_[b] && a < b); }

  const Kernels& kernels_;
  int vocab_;
  std::vector<float> z_;
  std::vector<uint64_t> w_;
  std::vector<int32_t> ids_;
  std::vector<double> distance_;
  std::vector<int32_t> counts_;  // zero between calls
};

// Random number `position` of a seed's stream (Philox4x32-10; Salmon et al., 2011).
uint64_t stream_word(uint64_t seed, uint64_t position);

}  // namespace sage
