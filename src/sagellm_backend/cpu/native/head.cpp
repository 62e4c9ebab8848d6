// Logits and the choice of tokens. The vocabulary's matrix decides which token is most likely, so its activations have about 15
// bits, in two planes of int8: the values, and what their rounding left over. On one stream the same weights are read either way;
// the error of the log-probabilities falls by a quarter.
#include <cmath>
#include <limits>

#include "forward.hpp"

namespace sage {

void Forward::prepare_head(float* row, int i) {
  const Activations& to = s_.head.view();
  kernel_.prepare(row, 0, 1, 0, c_.d_model, to, i);
  if (s_.head_parts == 1) return;
  const int rest = in_.n_logits + i;
  convert_rest(row, 0, c_.d_model, to, i, rest, row);
  auto value = [&](int r, int j) { return to.meta[r * to.ld_meta + j / kGroup].scale * static_cast<float>(to.q[r * to.ld + j]); };
  double squares = 0.0;
  for (int j = 0; j < c_.d_model; j++) squares += static_cast<double>(value(rest, j)) * value(rest, j);
  s_.rest_norm[i] = 1.001f * static_cast<float>(std::sqrt(squares));
}

void Forward::head(int thread, size_t loop) {
  const int panels = m_.head_.panels();
  if (in_.n_logits <= kFewRows) {
    const long long threads = m_.pool_.size();
    for (int p = static_cast<int>(panels * thread / threads); p < panels * (thread + 1) / threads; p++) head_panel(p, thread);
  } else {
    share(panels, loop, [&](int panel) { head_panel(panel, thread); });
  }
}

// Add the second plane's product to the first's in `tile`. A row that is asked only for its most likely token does without where
// no column can reach the best so far: |second plane · column| is at most the product of their norms.
void Forward::add_rest(int panel, float* tile, int thread) {
  const Scratch::Thread& t = s_.threads[thread];
  const int n = in_.n_logits;
  const bool raw = c_.logit_scale == 1.0f && c_.final_softcap == 0.0f;  // `best` is of the same kind as `tile`
  const float norm = raw ? kernel_.panel_norm(m_.head_, panel) : std::numeric_limits<float>::infinity();
  auto needed = [&](int i) { return stores_logits(i) || !(kernel_.greatest(tile + i * kPanel, kPanel) + norm * s_.rest_norm[i] < t.best[i]); };
  float* rest = tile + n * kPanel;
  for (int i = 0; i < n; i++) {
    const int first = i;
    while (i < n && needed(i)) i++;
    if (i == first) continue;
    kernel_.gemm(m_.head_, panel, s_.head.view(), n + first, i - first, rest, kPanel, false, 1.0f);
    for (int j = 0; j < (i - first) * kPanel; j++) tile[first * kPanel + j] += rest[j];
  }
}

void Forward::head_panel(int panel, int thread) {
  Scratch::Thread& t = s_.threads[thread];
  float* tile = t.logits.as<float>();
  const int n = in_.n_logits, begin = panel * kPanel, width = std::min(kPanel, c_.vocab - begin);
  const bool whole = s_.head_parts == 2 && n <= 2;  // few rows are as fast as the stream: both planes at once
  kernel_.gemm(m_.head_, panel, s_.head.view(), 0, whole ? 2 * n : n, tile, kPanel, false, 1.0f);
  if (whole)
    for (int j = 0; j < n * kPanel; j++) tile[j] += tile[n * kPanel + j];
  else if (s_.head_parts == 2)
    add_rest(panel, tile, thread);
  if (c_.logit_scale != 1.0f)
    for (int i = 0; i < n * kPanel; i++) tile[i] *= c_.logit_scale;
  if (c_.final_softcap > 0.0f) kernel_.softcap(tile, n * kPanel, c_.final_softcap);
  for (int i = 0; i < n; i++) {
    const float* row = tile + i * kPanel;
    if (stores_logits(i)) std::memcpy(s_.logits.as<float>() + i * s_.ld_logits + begin, row, width * sizeof(float));
    kernel_.argmax(row, width, begin, &t.best[i], &t.index[i]);
  }
}

void Forward::sample(int thread, size_t loop) {
  for (int i = s_.loops->take(loop, 1); i < in_.n_logits; i = s_.loops->take(loop, 1)) sample_row(i, thread);
}

void Forward::sample_row(int i, int thread) {
  const RowParams& row = (*in_.sampling)[i];
  const float* logits = s_.logits.as<float>() + i * s_.ld_logits;
  Sampler& sampler = *s_.threads[thread].sampler;
  if (row.target >= 0) {
    out_.tokens[i] = row.target;
  } else if (row.plain_greedy()) {
    float best = -std::numeric_limits<float>::infinity();
    int index = -1;
    for (const auto& t : s_.threads)
      if (t.index[i] >= 0 && (index < 0 || t.best[i] > best || (t.best[i] == best && t.index[i] < index))) {
        best = t.best[i];
        index = t.index[i];
      }
    out_.tokens[i] = index;
  } else {
    out_.tokens[i] = sampler.draw(logits, row);
  }
  if (row.logprobs >= 0 || row.target >= 0) {
    const int count = std::min(std::max(row.logprobs, 0), in_.top_count);
    out_.logprobs[i] = sampler.report(logits, out_.tokens[i], count, out_.top_ids + static_cast<size_t>(i) * in_.top_count,
                                      out_.top_logprobs + static_cast<size_t>(i) * in_.top_count);
  }
  if (out_.logits) std::memcpy(out_.logits + static_cast<size_t>(i) * c_.vocab, logits, c_.vocab * sizeof(float));
}

}  // namespace sage
