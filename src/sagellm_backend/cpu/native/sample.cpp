#include "sample.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace sage {
namespace {

constexpr float kExcluded = -std::numeric_limits<float>::infinity();
constexpr double kLog2E = 1.4426950408889634;

bool finite(float x) { return std::fabs(x) <= std::numeric_limits<float>::max(); }

}  // namespace

uint64_t stream_word(uint64_t seed, uint64_t position) {
  uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    std::copy(next, next + 4, c);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c[0] | (static_cast<uint64_t>(c[1]) << 32);
}

Sampler::Sampler(const Kernels& kernels, int vocab) : kernels_(kernels), vocab_(vocab) {}

void Sampler::penalise(const RowParams& row) {
  counts_.resize(vocab_, 0);
  auto distinct = [&](int begin, auto&& change) {
    for (int i = begin; i < row.n_history; i++) counts_[row.history[i]]++;
    for (int i = begin; i < row.n_history; i++) {
      const int32_t id = row.history[i];
      if (counts_[id]) change(id, counts_[id]);
      counts_[id] = 0;
    }
  };
  if (row.repetition != 1.0f)
    distinct(0, [&](int32_t id, int) { z_[id] = z_[id] > 0 ? z_[id] / row.repetition : z_[id] * row.repetition; });
  if (row.frequency != 0.0f || row.presence != 0.0f)
    distinct(std::min(row.n_prompt, row.n_history), [&](int32_t id, int count) {
      if (row.frequency != 0.0f) z_[id] = z_[id] - row.frequency * static_cast<float>(count);
      if (row.presence != 0.0f) z_[id] = z_[id] - row.presence;
    });
}

void Sampler::process(const float* logits, const RowParams& row) {
  z_.assign(logits, logits + vocab_);
  for (const auto& [id, bias] : row.bias) z_[id] = z_[id] + bias;
  if (row.mask)
    for (int t = 0; t < vocab_; t++)
      if (!((row.mask[t / 32] >> (t % 32)) & 1u)) z_[t] = kExcluded;
  if (row.only_allowed) {
    std::vector<float> kept(row.allowed.size());
    for (size_t i = 0; i < kept.size(); i++) kept[i] = z_[row.allowed[i]];
    std::fill(z_.begin(), z_.end(), kExcluded);
    for (size_t i = 0; i < kept.size(); i++) z_[row.allowed[i]] = kept[i];
  }
  for (int32_t id : row.banned) z_[id] = kExcluded;
  if (row.penalised()) penalise(row);
  for (float& z : z_) z = finite(z) ? z : kExcluded;
}

// Order `ids` by logit as far as needed and cut them behind the shortest prefix that holds `share` of their weight.
void Sampler::keep_prefix(std::vector<int32_t>& ids, double share) {
  uint64_t total = 0;
  for (int32_t id : ids) total += w_[id];
  const double bound = share * static_cast<double>(total);
  uint64_t running = 0;
  size_t done = 0;
  for (size_t sorted = 0; done < ids.size();) {
    if (done == sorted) {
      sorted = std::min(ids.size(), std::max<size_t>(128, 4 * sorted));
      std::partial_sort(ids.begin() + done, ids.begin() + sorted, ids.end(), [this](int32_t a, int32_t b) { return before(a, b); });
    }
    running += w_[ids[done++]];
    if (static_cast<double>(running) >= bound) break;
  }
  ids.resize(done);
}

void Sampler::typical(double share, double top, double scale) {
  std::sort(ids_.begin(), ids_.end());
  uint64_t total = 0;
  double expected = 0.0;
  distance_.resize(vocab_);
  for (int32_t id : ids_) {
    const double x = (static_cast<double>(z_[id]) - top) * scale;
    distance_[id] = x;
    total += w_[id];
    expected += static_cast<double>(w_[id]) * x;
  }
  expected /= static_cast<double>(total);
  for (int32_t id : ids_) distance_[id] = std::fabs(distance_[id] - expected);
  std::sort(ids_.begin(), ids_.end(), [this](int32_t a, int32_t b) {
    return distance_[a] < distance_[b] || (distance_[a] == distance_[b] && a < b);
  });
  const double bound = share * static_cast<double>(total);
  uint64_t running = 0;
  size_t done = 0;
  while (done < ids_.size()) {
    running += w_[ids_[done++]];
    if (static_cast<double>(running) >= bound) break;
  }
  ids_.resize(done);
}

// Leave the surviving candidates in ids_.
void Sampler::filter(const RowParams& row, double top, double scale) {
  ids_.clear();
  for (int t = 0; t < vocab_; t++)
    if (w_[t]) ids_.push_back(t);
  if (row.top_k > 0 && row.top_k < static_cast<int64_t>(ids_.size())) {
    std::nth_element(ids_.begin(), ids_.begin() + row.top_k, ids_.end(), [this](int32_t a, int32_t b) { return before(a, b); });
    ids_.resize(row.top_k);
  }
  if (row.typical_p < 1.0) typical(row.typical_p, top, scale);
  if (row.top_p < 1.0) keep_prefix(ids_, row.top_p);
  if (row.min_p > 0.0) {
    uint64_t most = 0;
    for (int32_t id : ids_) most = std::max(most, w_[id]);
    const double bound = row.min_p * static_cast<double>(most);
    std::erase_if(ids_, [&](int32_t id) { return !(static_cast<double>(w_[id]) >= bound); });
  }
  std::sort(ids_.begin(), ids_.end());
}

int Sampler::draw(const float* logits, const RowParams& row) {
  process(logits, row);
  float best = kExcluded;
  int index = -1;
  kernels_.argmax(z_.data(), vocab_, 0, &best, &index);
  if (index < 0 || row.temperature < 1e-5) return index;
  const double top = best, scale = kLog2E / row.temperature;
  w_.resize(vocab_);
  kernels_.integer_weights(z_.data(), vocab_, top, scale, w_.data());
  const bool filtered = row.top_k > 0 || row.typical_p < 1.0 || row.top_p < 1.0 || row.min_p > 0.0;
  uint64_t total = 0;
  if (filtered) {
    filter(row, top, scale);
    for (int32_t id : ids_) total += w_[id];
  } else {
    for (uint64_t w : w_) total += w;
  }
  const uint64_t target =
      static_cast<uint64_t>((static_cast<unsigned __int128>(stream_word(row.seed, row.position)) * total) >> 64);
  uint64_t running = 0;
  if (filtered) {
    for (int32_t id : ids_)
      if ((running += w_[id]) > target) return id;
  } else {
    for (int t = 0; t < vocab_; t++)
      if ((running += w_[t]) > target) return t;
  }
  return index;
}

float Sampler::report(const float* logits, int token, int count, int32_t* top_ids, float* top_logprobs) {
  z_.assign(logits, logits + vocab_);
  for (float& z : z_) z = finite(z) ? z : kExcluded;
  float best = kExcluded;
  int index = -1;
  kernels_.argmax(z_.data(), vocab_, 0, &best, &index);
  const double log_sum = index < 0 ? 0.0 : std::log(kernels_.sum_exp(z_.data(), vocab_, best));
  auto logprob = [&](int id) {
    if (index < 0 || z_[id] == kExcluded) return kExcluded;
    return static_cast<float>(static_cast<double>(z_[id]) - best - log_sum);
  };
  count = std::min(count, vocab_);
  if (count > 0) {
    ids_.resize(vocab_);
    std::iota(ids_.begin(), ids_.end(), 0);
    std::partial_sort(ids_.begin(), ids_.begin() + count, ids_.end(), [this](int32_t a, int32_t b) { return before(a, b); });
    for (int i = 0; i < count; i++) {
      top_ids[i] = ids_[i];
      top_logprobs[i] = logprob(ids_[i]);
    }
  }
  return token < 0 ? std::numeric_limits<float>::quiet_NaN() : logprob(token);
}

}  // namespace sage
