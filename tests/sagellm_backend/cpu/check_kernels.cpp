// Every kernel of every instruction set of this machine against its plain twin, on random shapes; exits 1 at the first that
// differs. For machines that only an emulator stands for: test_cpu_neon.py builds and runs it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "formats.hpp"
#include "isa.hpp"
#include "model.hpp"
#include "pack.hpp"
#include "twin.hpp"

using namespace sage;

namespace {

std::mt19937 random_word(1);

int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_word); }

std::vector<float> normal(size_t n) {
  std::normal_distribution<float> draw;
  std::vector<float> out(n);
  for (float& x : out) x = draw(random_word);
  return out;
}

void near(const char* what, const char* isa, const std::vector<float>& got, const std::vector<float>& want, float tolerance) {
  float most = 1.0f;
  for (float x : want) most = std::max(most, std::fabs(x));
  for (size_t i = 0; i < want.size(); i++)
    if (!(std::fabs(got[i] - want[i]) <= tolerance * most)) {
      std::printf("%s on %s: %g at %zu, not %g\n", what, isa, got[i], i, want[i]);
      std::exit(1);
    }
}

// Rows of a file in the format that packs into `format` as it is.
std::vector<uint8_t> file_rows(WeightFormat format, int n, int k, Source* source) {
  if (format == WeightFormat::Q4 || format == WeightFormat::Q8M) {
    const bool q4 = format == WeightFormat::Q4;
    *source = source_of(q4 ? "Q4_0" : "Q5_1");
    const size_t block = q4 ? 18 : 24;
    std::vector<uint8_t> out(block * n * k / kGroup);
    for (uint8_t& b : out) b = static_cast<uint8_t>(between(0, 255));
    for (size_t at = 0; at < out.size(); at += block)
      for (size_t half = 0; half < (q4 ? 1 : 2); half++) {
        const uint16_t value = float_to_half(normal(1)[0] * 0.1f);
        std::memcpy(out.data() + at + 2 * half, &value, 2);
      }
    return out;
  }
  *source = source_of("F32");
  const std::vector<float> values = normal(static_cast<size_t>(n) * k);
  const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
  return {bytes, bytes + values.size() * sizeof(float)};
}

void check_gemm(const Kernels& kernel, ThreadPool& pool) {
  const WeightFormat format = static_cast<WeightFormat>(between(0, 5));
  const int n = between(1, 70), k = 32 * between(1, 6), rows = between(1, 20);
  Source source;
  const std::vector<uint8_t> file = file_rows(format, n, k, &source);
  Packed w{format, n, k, nullptr, panel_bytes(format, k)};
  std::vector<uint8_t> memory(w.panel_stride * w.panels() + 4096);
  w.data = memory.data();
  pack(source, file.data(), w, memory.data(), pool);
  const std::vector<float> x = normal(static_cast<size_t>(rows) * k);
  const ActivationBuffer a(rows, k, {format});
  kernel.prepare(x.data(), k, rows, 0, k, a.view(), 0);
  const size_t ld = static_cast<size_t>(w.panels()) * kPanel;
  std::vector<float> wide(rows * ld), got(static_cast<size_t>(rows) * n), want(got.size());
  for (int p = 0; p < w.panels(); p++) kernel.gemm(w, p, a.view(), 0, rows, wide.data() + p * kPanel, ld, false, 1.0f);
  for (int r = 0; r < rows; r++) std::copy_n(wide.begin() + r * ld, n, got.begin() + static_cast<size_t>(r) * n);
  twin::gemm(w, a.view(), rows, want.data());
  near("gemm", kernel.name, got, want, 2e-5f * static_cast<float>(k) / 32);
}

void check_rows(const Kernels& kernel) {
  const int n = between(1, 300), padded = round_up(n, 16), half = between(1, 70);
  const std::vector<float> x = normal(padded), y = normal(padded);
  std::vector<float> got(n), want(n);
  kernel.rms_norm(x.data(), y.data(), n, 1e-6f, got.data());
  twin::rms_norm(x.data(), y.data(), n, 1e-6f, want.data());
  near("rms_norm", kernel.name, got, want, 3e-5f);
  for (int kind = 0; kind < 3; kind++) {
    got = want = x;
    kernel.activate(static_cast<Activation>(kind), got.data(), y.data(), padded);
    twin::activate(static_cast<Activation>(kind), want.data(), y.data(), padded);
    near("activate", kernel.name, got, want, 1e-5f);
  }
  got = want = x;
  kernel.softcap(got.data(), padded, 1.5f);
  twin::softcap(want.data(), padded, 1.5f);
  near("softcap", kernel.name, got, want, 1e-5f);
  std::vector<float> cos_sin(2 * half);
  for (int i = 0; i < half; i++) {
    const float angle = 10 * normal(1)[0];
    cos_sin[i] = std::cos(angle);
    cos_sin[half + i] = std::sin(angle);
  }
  for (bool interleaved : {false, true}) {
    got = want = normal(2 * half + 3);
    kernel.rope(got.data(), cos_sin.data(), 2 * half, interleaved);
    twin::rope(want.data(), cos_sin.data(), 2 * half, interleaved);
    near("rope", kernel.name, got, want, 1e-5f);
  }
}

void check_attention(const Kernels& kernel) {
  const KvFormat format = static_cast<KvFormat>(between(0, 2));
  const int dims[] = {2, 16, 40, 64, 128}, windows[] = {0, 0, 1, 7, 300};
  const int dh = dims[between(0, 4)], dim = round_up(dh, 16), tokens = between(1, 700), lanes = between(1, kLanes);
  const size_t half = kv_head_bytes(format, dh);
  std::vector<int32_t> blocks((tokens + kBlock - 1) / kBlock);
  for (size_t i = 0; i < blocks.size(); i++) blocks[i] = static_cast<int32_t>(i);
  std::shuffle(blocks.begin(), blocks.end(), random_word);
  std::vector<uint8_t> cache(2 * half * blocks.size() + 64);
  for (int i = 0; i < tokens; i++) {
    uint8_t* block = cache.data() + blocks[i / kBlock] * 2 * half;
    kernel.write_kv(format, normal(dh).data(), normal(dh).data(), dh, i % kBlock, block, block + half);
  }
  const std::vector<float> q = normal(static_cast<size_t>(lanes) * dh);
  std::vector<float> out(static_cast<size_t>(lanes) * dim), scratch(attention_scratch(dh)), want(dh);
  AttentionTile t{};
  t.lanes = lanes;
  std::vector<int> positions(lanes);
  for (int& p : positions) p = between(std::max(0, tokens - 20), tokens - 1);
  std::sort(positions.begin(), positions.end());
  for (int i = 0; i < lanes; i++) {
    t.q[i] = q.data() + static_cast<size_t>(i) * dh;
    t.out[i] = out.data() + static_cast<size_t>(i) * dim;
    t.position[i] = positions[i];
  }
  t.window = windows[between(0, 4)];
  t.blocks = blocks.data();
  t.k = cache.data();
  t.v = cache.data() + half;
  t.block_stride = 2 * half;
  t.head_dim = dh;
  t.scale = 1.0f / std::sqrt(static_cast<float>(dh));
  t.softcap = between(0, 1) ? 4.0f : 0.0f;
  t.scratch = scratch.data();
  kernel.attention(format, t);
  for (int i = 0; i < lanes; i++) {
    twin::attention(format, t, i, want.data());
    near("attention", kernel.name, {t.out[i], t.out[i] + dh}, want, format == KvFormat::F32 ? 2e-5f : 6e-2f);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
  ThreadPool pool(1);
  for (const Kernels* kernel : supported_kernels()) {
    for (int i = 0; i < rounds; i++) {
      check_gemm(*kernel, pool);
      check_rows(*kernel);
      check_attention(*kernel);
    }
    std::printf("%s\n", kernel->name);
  }
}
