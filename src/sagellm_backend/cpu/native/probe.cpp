// Each kernel beside its twin, for tests.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "bindings.hpp"
#include "isa.hpp"
#include "pack.hpp"
#include "twin.hpp"

using namespace nb::literals;

namespace sage {
namespace {

class Probe {
 public:
  explicit Probe(const std::string& isa) : kernel_(kernels_of(isa)), pool_(1) {}

  // (rows, n) by the kernel, and by the twin on the same packed weights and converted activations.
  nb::tuple gemm(const std::string& format, const std::string& source, Bytes data, int n, In<float> x) {
    const int rows = static_cast<int>(x.shape(0)), k = static_cast<int>(x.shape(1));
    const Memory memory = packed_memory(format, n, k);
    const Packed w = pack_into(memory, format, source, data, n, k);
    const ActivationBuffer a(rows, k, {w.format});
    kernel_.prepare(x.data(), k, rows, 0, k, a.view(), 0);
    const size_t ld = static_cast<size_t>(w.panels()) * kPanel;
    std::vector<float> wide(rows * ld);
    for (int p = 0; p < w.panels(); p++) kernel_.gemm(w, p, a.view(), 0, rows, wide.data() + p * kPanel, ld, false, 1.0f);
    float *fast, *slow;
    const nb::object out = new_array<float>({static_cast<size_t>(rows), static_cast<size_t>(n)}, &fast);
    const nb::object twin = new_array<float>({static_cast<size_t>(rows), static_cast<size_t>(n)}, &slow);
    for (int r = 0; r < rows; r++) std::memcpy(fast + static_cast<size_t>(r) * n, wide.data() + r * ld, n * sizeof(float));
    twin::gemm(w, a.view(), rows, slow);
    return nb::make_tuple(out, twin);
  }

  // A bound for each panel of the matrix.
  nb::object panel_norms(const std::string& format, const std::string& source, Bytes data, int n, int k) {
    const Memory memory = packed_memory(format, n, k);
    const Packed w = pack_into(memory, format, source, data, n, k);
    float* bounds;
    const nb::object out = new_array<float>({static_cast<size_t>(w.panels())}, &bounds);
    for (int p = 0; p < w.panels(); p++) bounds[p] = kernel_.panel_norm(w, p);
    return out;
  }

  nb::tuple rms_norm(In<float> x, In<float> weight, float eps) {
    return both(x.size(), [&](float* out) { kernel_.rms_norm(x.data(), weight.data(), static_cast<int>(x.size()), eps, out); },
                [&](float* out) { twin::rms_norm(x.data(), weight.data(), static_cast<int>(x.size()), eps, out); });
  }

  nb::tuple activate(int kind, In<float> gate, In<float> up) {
    const int n = static_cast<int>(gate.size());
    auto start = [&](float* out) { std::memcpy(out, gate.data(), n * sizeof(float)); };
    return both(gate.size(), [&](float* out) { start(out), kernel_.activate(static_cast<Activation>(kind), out, up.data(), n); },
                [&](float* out) { start(out), twin::activate(static_cast<Activation>(kind), out, up.data(), n); });
  }

  nb::tuple softcap(In<float> x, float cap) {
    const int n = static_cast<int>(x.size());
    auto start = [&](float* out) { std::memcpy(out, x.data(), n * sizeof(float)); };
    return both(x.size(), [&](float* out) { start(out), kernel_.softcap(out, n, cap); },
                [&](float* out) { start(out), twin::softcap(out, n, cap); });
  }

  nb::tuple rope(In<float> head, In<float> cos_sin, bool interleaved) {
    const int dim = static_cast<int>(cos_sin.size());
    auto start = [&](float* out) { std::memcpy(out, head.data(), head.size() * sizeof(float)); };
    return both(head.size(), [&](float* out) { start(out), kernel_.rope(out, cos_sin.data(), dim, interleaved); },
                [&](float* out) { start(out), twin::rope(out, cos_sin.data(), dim, interleaved); });
  }

  // factor · B · A · x of an adapter.
  nb::object low_rank(In<float> x, In<float> a, In<float> b, float factor) {
    const int rank = static_cast<int>(a.shape(0)), n = static_cast<int>(b.shape(0));
    const LowRank w = sage::low_rank(a.data(), b.data(), rank, static_cast<int>(x.size()), n);
    std::vector<float> low(rank), out(round_up(n, kPanel), 0.0f);
    low_rank_input(w, x.data(), low.data());
    for (int panel = 0; panel * kPanel < n; panel++) low_rank_output(w, low.data(), panel, factor, out.data() + panel * kPanel);
    float* result;
    const nb::object array = new_array<float>({static_cast<size_t>(n)}, &result);
    std::memcpy(result, out.data(), n * sizeof(float));
    return array;
  }

  // Queries (lanes, head_dim) at `positions` over keys and values (tokens, head_dim) laid into `blocks`.
  nb::tuple attention(const std::string& kv, In<float> q, In<float> k, In<float> v, In<int32_t> positions, In<int32_t> blocks,
                      float scale, float cap, int window) {
    const KvFormat format = kv_format_of(kv);
    if (q.shape(0) > kLanes) throw std::invalid_argument("at most " + std::to_string(kLanes) + " query vectors");
    const int lanes = static_cast<int>(q.shape(0)), dh = static_cast<int>(q.shape(1)), dim = round_up(dh, 16);
    const size_t half = kv_head_bytes(format, dh);
    int most = 0;
    for (size_t i = 0; i < blocks.size(); i++) most = std::max(most, blocks.data()[i]);
    Memory memory(2 * half * (most + 1));
    auto block = [&](int position) { return memory.as<uint8_t>() + blocks.data()[position / kBlock] * 2 * half; };
    for (int i = 0; i < static_cast<int>(k.shape(0)); i++)
      kernel_.write_kv(format, k.data() + i * dh, v.data() + i * dh, dh, i % kBlock, block(i), block(i) + half);
    Memory scratch(attention_scratch(dh) * 4);
    std::vector<float> wide(static_cast<size_t>(kLanes) * dim);
    AttentionTile t{};
    t.lanes = lanes;
    for (int i = 0; i < lanes; i++) {
      t.q[i] = q.data() + i * dh;
      t.out[i] = wide.data() + i * dim;
      t.position[i] = positions.data()[i];
    }
    t.window = window;
    t.blocks = blocks.data();
    t.k = memory.as<uint8_t>();
    t.v = t.k + half;
    t.block_stride = 2 * half;
    t.head_dim = dh;
    t.scale = scale;
    t.softcap = cap;
    t.scratch = scratch.as<float>();
    return both(static_cast<size_t>(lanes) * dh,
                [&](float* out) {
                  kernel_.attention(format, t);
                  for (int i = 0; i < lanes; i++) std::memcpy(out + i * dh, t.out[i], dh * sizeof(float));
                },
                [&](float* out) {
                  for (int i = 0; i < lanes; i++) twin::attention(format, t, i, out + i * dh);
                });
  }

  int sample(In<float> logits, const nb::handle& row) {
    const int vocab = static_cast<int>(logits.size());
    const RowParams p = row_from(row, vocab);
    return Sampler(kernel_, vocab).draw(logits.data(), p);
  }

  // Log-probability of `token`, and the `count` likeliest ids with theirs.
  nb::tuple report(In<float> logits, int token, int count) {
    const int vocab = static_cast<int>(logits.size());
    int32_t* ids;
    float* values;
    const size_t n = static_cast<size_t>(std::min(count, vocab));
    const nb::object top_ids = new_array<int32_t>({n}, &ids), top = new_array<float>({n}, &values);
    const float chosen = Sampler(kernel_, vocab).report(logits.data(), token, count, ids, values);
    return nb::make_tuple(chosen, top_ids, top);
  }

 private:
  static Memory packed_memory(const std::string& format, int n, int k) {
    return Memory(panel_bytes(weight_format_of(format), k) * ((n + kPanel - 1) / kPanel) + 4096);
  }
  Packed pack_into(const Memory& memory, const std::string& format, const std::string& source, Bytes data, int n, int k) {
    const WeightFormat f = weight_format_of(format);
    const Packed w{f, n, k, memory.as<uint8_t>(), panel_bytes(f, k)};
    pack(source_of(source), data.data(), w, memory.as<uint8_t>(), pool_);
    return w;
  }

  template <class Fast, class Slow>
  static nb::tuple both(size_t n, Fast&& fast, Slow&& slow) {
    float *a, *b;
    const nb::object x = new_array<float>({n}, &a), y = new_array<float>({n}, &b);
    fast(a);
    slow(b);
    return nb::make_tuple(x, y);
  }

  const Kernels& kernel_;
  ThreadPool pool_;
};

}  // namespace

void bind_probe(nb::module_& m) {
  nb::class_<Probe>(m, "Probe")
      .def(nb::init<const std::string&>(), "isa"_a)
      .def("gemm", &Probe::gemm)
      .def("panel_norms", &Probe::panel_norms)
      .def("rms_norm", &Probe::rms_norm)
      .def("activate", &Probe::activate)
      .def("softcap", &Probe::softcap)
      .def("rope", &Probe::rope)
      .def("low_rank", &Probe::low_rank)
      .def("attention", &Probe::attention)
      .def("sample", &Probe::sample)
      .def("report", &Probe::report);
}

}  // namespace sage
