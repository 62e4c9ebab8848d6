// The Python module: arrays in, arrays out; the GIL is released wherever something is computed.
#include "bindings.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <bit>
#include <chrono>
#include <exception>
#include <limits>
#include <optional>
#include <stdexcept>

#include "isa.hpp"
#include "model.hpp"
#include "pack.hpp"

using namespace nb::literals;

namespace sage {
namespace {

template <class T>
T get(const nb::dict& d, const char* key) {
  return nb::cast<T>(d[key]);
}

Rope rope_from(const nb::dict& d) {
  return {get<int>(d, "dim"), get<bool>(d, "interleaved"), get<float>(d, "magnitude"), get<std::vector<double>>(d, "frequencies")};
}

Config config_from(const nb::dict& d) {
  Config c;
  for (auto [key, field] : {std::pair{"n_layers", &c.n_layers}, {"d_model", &c.d_model}, {"n_heads", &c.n_heads},
                            {"n_experts", &c.n_experts}, {"experts_top_k", &c.experts_top_k}, {"experts_d_ff", &c.experts_d_ff},
                            {"n_kv_heads", &c.n_kv_heads}, {"head_dim", &c.head_dim}, {"d_ff", &c.d_ff}, {"vocab", &c.vocab}})
    *field = get<int>(d, key);
  for (auto [key, field] : {std::pair{"norm_eps", &c.norm_eps}, {"attention_scale", &c.attention_scale},
                            {"attention_softcap", &c.attention_softcap}, {"final_softcap", &c.final_softcap},
                            {"embed_scale", &c.embed_scale}, {"residual_scale", &c.residual_scale}, {"logit_scale", &c.logit_scale}})
    *field = get<float>(d, key);
  for (auto [key, field] : {std::pair{"pre_norm", &c.pre_norm}, {"post_norm", &c.post_norm}, {"tied_head", &c.tied_head},
                            {"qk_norm_head", &c.qk_norm_head}, {"qk_norm_full", &c.qk_norm_full}, {"qkv_bias", &c.qkv_bias},
                            {"o_bias", &c.o_bias}, {"experts_normalize", &c.experts_normalize}})
    *field = get<bool>(d, key);
  c.activation = static_cast<Activation>(get<int>(d, "activation"));
  c.expert_layer = get<std::vector<bool>>(d, "expert_layer");
  c.windows = get<std::vector<int>>(d, "windows");
  c.layer_rope = get<std::vector<int>>(d, "layer_rope");
  for (nb::handle rope : d["ropes"]) c.ropes.push_back(rope_from(nb::cast<nb::dict>(rope)));
  return c;
}

void check_ids(const std::vector<int32_t>& ids, int vocab, const char* what) {
  for (int32_t id : ids)
    if (id < 0 || id >= vocab)
      throw std::invalid_argument(std::string(what) + " names token " + std::to_string(id) + ", the vocabulary ends at " +
                                  std::to_string(vocab - 1));
}

void read_history(const nb::handle& history, RowParams& p, int vocab) {
  nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> array;
  if (nb::try_cast(history, array, false)) {
    p.history = array.data();
    p.n_history = static_cast<int>(array.size());
  } else {
    p.history_storage = nb::cast<std::vector<int32_t>>(nb::list(history));
    p.history = p.history_storage.data();
    p.n_history = static_cast<int>(p.history_storage.size());
  }
  for (int i = 0; i < p.n_history; i++)
    if (p.history[i] < 0 || p.history[i] >= vocab)
      throw std::invalid_argument("history holds an id outside the vocabulary of " + std::to_string(vocab));
}

}  // namespace

KvFormat kv_format_of(const std::string& name) {
  if (name == "f32") return KvFormat::F32;
  if (name == "bf16") return KvFormat::BF16;
  if (name == "int8") return KvFormat::INT8;
  throw std::invalid_argument("KV precision '" + name + "' is unknown to the cpu backend");
}

RowParams row_from(const nb::handle& row, int vocab) {
  RowParams p;
  const nb::object params = row.attr("params");
  p.temperature = nb::cast<double>(params.attr("temperature"));
  p.top_p = nb::cast<double>(params.attr("top_p"));
  p.min_p = nb::cast<double>(params.attr("min_p"));
  p.typical_p = nb::cast<double>(params.attr("typical_p"));
  p.top_k = nb::cast<int64_t>(params.attr("top_k"));
  p.repetition = static_cast<float>(nb::cast<double>(params.attr("repetition_penalty")));
  p.frequency = static_cast<float>(nb::cast<double>(params.attr("frequency_penalty")));
  p.presence = static_cast<float>(nb::cast<double>(params.attr("presence_penalty")));
  const nb::object bias = params.attr("logit_bias"), allowed = params.attr("allowed_token_ids");
  if (!bias.is_none())
    for (auto [id, value] : nb::cast<nb::dict>(bias)) {
      p.bias.emplace_back(nb::cast<int32_t>(id), static_cast<float>(nb::cast<double>(value)));
      check_ids({p.bias.back().first}, vocab, "logit_bias");
    }
  if (!allowed.is_none()) {
    p.only_allowed = true;
    p.allowed = nb::cast<std::vector<int32_t>>(nb::list(allowed));
    check_ids(p.allowed, vocab, "allowed_token_ids");
  }
  p.banned = nb::cast<std::vector<int32_t>>(nb::list(row.attr("banned")));
  check_ids(p.banned, vocab, "banned");
  nb::int_ seed(row.attr("seed"));
  p.seed = PyLong_AsUnsignedLongLongMask(seed.ptr());
  p.position = static_cast<uint64_t>(nb::cast<int64_t>(row.attr("position")));
  p.logprobs = nb::cast<int>(row.attr("logprobs"));
  p.target = nb::cast<int>(row.attr("target"));
  if (p.target >= vocab)
    throw std::invalid_argument("target names token " + std::to_string(p.target) + ", the vocabulary ends at " + std::to_string(vocab - 1));
  p.n_prompt = nb::cast<int>(row.attr("n_prompt"));
  if (p.repetition != 1.0f || p.frequency != 0.0f || p.presence != 0.0f) read_history(row.attr("history"), p, vocab);
  const nb::object mask = row.attr("mask");
  if (!mask.is_none()) {
    const auto words = nb::cast<nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>>(mask);
    if (static_cast<int>(words.size()) < (vocab + 31) / 32)
      throw std::invalid_argument("the mask has " + std::to_string(words.size()) + " words, a vocabulary of " +
                                  std::to_string(vocab) + " needs " + std::to_string((vocab + 31) / 32));
    p.mask = words.data();
  }
  return p;
}

namespace {

// A checksum of bytes, about as fast as memory: four chains of multiply and rotate over 64-bit words, then the tail.
uint64_t checksum(Bytes data) {
  nb::gil_scoped_release release;
  constexpr uint64_t kPrime = 0x9E3779B185EBCA87u;
  uint64_t s[4] = {data.size(), 1, 2, 3};
  const uint8_t* p = data.data();
  size_t i = 0;
  for (; i + 32 <= data.size(); i += 32)
    for (int j = 0; j < 4; j++) {
      uint64_t word;
      std::memcpy(&word, p + i + 8 * j, 8);
      s[j] = std::rotl(s[j] ^ word, 29) * kPrime;
    }
  for (; i < data.size(); i++) s[0] = std::rotl(s[0] ^ p[i], 29) * kPrime;
  uint64_t out = 0;
  for (uint64_t part : s) out = std::rotl(out ^ part, 29) * kPrime;
  return out ^ (out >> 32);
}

class PyModel {
 public:
  PyModel(const nb::dict& config, const std::string& isa, int threads) : model_(config_from(config), kernels_of(isa), threads) {}

  void set_vector(const std::string& slot, In<float> values) { model_.set_vector(slot, values.data(), static_cast<int>(values.size())); }

  void set_matrix(const std::string& slot, const std::string& format, int n, int k, Bytes arena, size_t offset, size_t stride) {
    model_.set_matrix(slot, packed(format, n, k, arena.data(), arena.size(), offset, stride));
  }

  void pack_matrix(const std::string& format, int n, int k, const std::string& source, Bytes data, Inout<uint8_t> arena, size_t offset,
                   size_t stride) {
    const Packed shape = packed(format, n, k, arena.data(), arena.size(), offset, stride);
    const Source from = source_of(source);
    const SourceBlock block = source_block(from);
    if (data.size() * block.weights != static_cast<size_t>(n) * k * block.bytes)
      throw std::invalid_argument("a matrix of " + std::to_string(n) + " x " + std::to_string(k) + " does not have " +
                                  std::to_string(data.size()) + " bytes");
    nb::gil_scoped_release release;
    pack(from, data.data(), shape, arena.data() + offset, model_.pool());
  }

  void finish(int n_blocks, int max_rows, int max_logit_rows, const std::string& kv) {
    model_.finish({n_blocks, max_rows, max_logit_rows, kv_format_of(kv)});
  }

  nb::tuple step(In<int32_t> tokens, In<int32_t> starts, In<int32_t> lengths, In<int32_t> tables, In<int32_t> logit_rows,
                 const nb::list& sampling, bool want_logits, bool want_hidden, std::optional<In<int32_t>> adapters,
                 const nb::object& masks_ready) {
    const size_t n = logit_rows.size(), vocab = static_cast<size_t>(model_.config().vocab);
    std::vector<RowParams> rows;
    int top = 0;
    for (nb::handle row : sampling) {
      rows.push_back(row_from(row, model_.config().vocab));
      top = std::max(top, rows.back().logprobs);
    }
    const size_t sequences = lengths.size();
    StepInput in{tokens.data(),     static_cast<int>(tokens.size()), starts.data(), lengths.data(), tables.data(),
                 static_cast<int>(sequences), sequences ? static_cast<int>(tables.size() / sequences) : 0, logit_rows.data(),
                 static_cast<int>(n), &rows, top, adapters ? adapters->data() : nullptr};
    if (adapters && adapters->size() != sequences)
      throw std::invalid_argument(std::to_string(adapters->size()) + " adapters for " + std::to_string(sequences) + " sequences");
    StepOutput out{};
    const size_t drawn = rows.size(), columns = static_cast<size_t>(top);
    const nb::object ids = new_array<int32_t>({drawn}, &out.tokens), logprobs = new_array<float>({drawn}, &out.logprobs);
    const nb::object top_ids = new_array<int32_t>({drawn, columns}, &out.top_ids);
    const nb::object top_logprobs = new_array<float>({drawn, columns}, &out.top_logprobs);
    std::fill_n(out.tokens, drawn, -1);
    std::fill_n(out.logprobs, drawn, std::numeric_limits<float>::quiet_NaN());
    std::fill_n(out.top_ids, drawn * columns, -1);
    std::fill_n(out.top_logprobs, drawn * columns, std::numeric_limits<float>::quiet_NaN());
    nb::object logits = nb::none(), hidden = nb::none();
    if (want_logits) logits = new_array<float>({n, vocab}, &out.logits);
    if (want_hidden) hidden = new_array<float>({n, static_cast<size_t>(model_.config().d_model)}, &out.hidden);
    std::exception_ptr failure;  // no exception may leave the parallel region: the other threads wait at its barriers
    if (!masks_ready.is_none())
      in.masks_ready = [&] {
        nb::gil_scoped_acquire acquire;
        try {
          masks_ready();
        } catch (...) {
          failure = std::current_exception();
        }
      };
    {
      nb::gil_scoped_release release;
      model_.step(in, out);
    }
    if (failure) std::rethrow_exception(failure);
    return nb::make_tuple(ids, logprobs, top_ids, top_logprobs, logits, hidden);
  }

  void set_adapter(int number, const std::string& slot, In<float> a, In<float> b) {
    if (a.ndim() != 2 || b.ndim() != 2 || a.shape(0) != b.shape(1)) throw std::invalid_argument("the factors of '" + slot + "' do not multiply");
    model_.set_adapter(number, slot, a.data(), b.data(), static_cast<int>(a.shape(0)), static_cast<int>(a.shape(1)),
                       static_cast<int>(b.shape(0)));
  }

  void drop_adapter(int number) { model_.drop_adapter(number); }

  void copy_blocks(const std::vector<std::pair<int, int>>& pairs) {
    nb::gil_scoped_release release;
    model_.copy_blocks(pairs);
  }

  nb::bytes export_blocks(const std::vector<int>& blocks) {
    nb::object out = nb::steal(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(blocks.size() * model_.kv().block_bytes)));
    if (!out.is_valid()) throw nb::python_error();
    model_.export_blocks(blocks, reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(out.ptr())));
    return nb::borrow<nb::bytes>(out);
  }

  void import_blocks(const std::vector<int>& blocks, Bytes data) {
    if (data.size() != blocks.size() * model_.kv().block_bytes)
      throw std::invalid_argument(std::to_string(data.size()) + " bytes for " + std::to_string(blocks.size()) + " blocks of " +
                                  std::to_string(model_.kv().block_bytes) + " bytes");
    nb::gil_scoped_release release;
    model_.import_blocks(blocks, data.data());
  }

  size_t block_bytes() const { return model_.kv().block_bytes; }
  int n_blocks() const { return model_.kv().n_blocks; }
  int threads() { return model_.pool().size(); }
  std::string isa() const { return model_.kernels().name; }

 private:
  static Packed packed(const std::string& format, int n, int k, const uint8_t* arena, size_t size, size_t offset, size_t stride) {
    Packed w{weight_format_of(format), n, k, arena + offset, stride};
    const size_t panel = panel_bytes(w.format, k);
    if (n < 1 || k < 1 || stride < panel || offset + static_cast<size_t>(w.panels() - 1) * stride + panel > size)
      throw std::invalid_argument("a matrix does not lie inside its memory");
    return w;
  }

  Model model_;
};

// Seconds for every thread to run `work(thread)`, the best of `repeats`.
template <class F>
double best_seconds(ThreadPool& pool, int repeats, F&& work) {
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < repeats; i++) {
    const auto start = std::chrono::steady_clock::now();
    pool.run(work);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

// Bytes a second that `threads` threads read from memory; `bytes` should be far beyond the caches.
double read_bandwidth(const std::string& isa, int threads, size_t bytes, int repeats) {
  nb::gil_scoped_release release;
  const Kernels& kernel = kernels_of(isa);
  ThreadPool pool(threads > 0 ? threads : allowed_threads());
  const size_t share = bytes / pool.size() / 4096 * 4096;
  Memory memory(share * pool.size() + 8192);
  std::memset(memory.as<uint8_t>(), 1, memory.bytes());
  std::atomic<uint32_t> sink{0};
  const double s = best_seconds(pool, repeats, [&](int t) { sink += kernel.read_stream(memory.as<uint8_t>() + t * share, share); });
  return static_cast<double>(share) * pool.size() / s;
}

// Operations (2 a multiply-add) a second of the dot instruction for "int8" or "bf16".
double dot_peak(const std::string& isa, const std::string& kind, int threads, int repeats) {
  nb::gil_scoped_release release;
  const Kernels& kernel = kernels_of(isa);
  ThreadPool pool(threads > 0 ? threads : allowed_threads());
  constexpr int64_t kRounds = 1 << 20;
  std::atomic<float> sink{0};
  const bool bf16 = kind == "bf16";
  const double s = best_seconds(pool, repeats, [&](int) { sink = bf16 ? kernel.dot_bf16_loop(kRounds) : kernel.dot_int8_loop(kRounds); });
  return 2.0 * (bf16 ? 32 : 64) * 12 * kRounds * pool.size() / s;
}

}  // namespace
}  // namespace sage

NB_MODULE(_native, m) {
  using namespace sage;
  m.doc() = "Native kernels of the cpu backend; used through sagellm_backend.cpu.";
  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (const Kernels* k : supported_kernels()) names.push_back(k->name);
    return names;
  });
  m.def("allowed_threads", allowed_threads);
  m.def("natural_format", [](const std::string& source) {
    constexpr const char* names[] = {"Q4", "Q4M", "Q8", "Q8M", "BF16", "F32"};
    return std::string(names[static_cast<int>(natural_format(source_of(source)))]);
  });
  m.def("panel_bytes", [](const std::string& format, int k) { return panel_bytes(weight_format_of(format), k); });
  m.def("kv_head_bytes", [](const std::string& kv, int head_dim) { return kv_head_bytes(kv_format_of(kv), head_dim); });
  m.def("checksum", checksum);
  m.def("stream_word", stream_word);
  m.def("read_bandwidth", read_bandwidth, "isa"_a, "threads"_a, "nbytes"_a, "repeats"_a);
  m.def("dot_peak", dot_peak, "isa"_a, "kind"_a, "threads"_a, "repeats"_a);
  m.attr("PANEL") = kPanel;
  m.attr("INTERFACE") = SAGE_INTERFACE;  // CMake: the hash of ../_native.pyi

  nb::class_<PyModel>(m, "Model")
      .def(nb::init<const nb::dict&, const std::string&, int>(), "config"_a, "isa"_a, "threads"_a)
      .def("set_vector", &PyModel::set_vector)
      .def("set_matrix", &PyModel::set_matrix, nb::keep_alive<1, 6>())
      .def("pack_matrix", &PyModel::pack_matrix)
      .def("finish", &PyModel::finish)
      .def("step", &PyModel::step, "token_ids"_a, "starts"_a, "lengths"_a, "block_tables"_a, "logit_rows"_a, "sampling"_a,
           "want_logits"_a, "want_hidden"_a, "adapters"_a = nb::none(), "masks_ready"_a = nb::none())
      .def("set_adapter", &PyModel::set_adapter)
      .def("drop_adapter", &PyModel::drop_adapter)
      .def("copy_blocks", &PyModel::copy_blocks)
      .def("export_blocks", &PyModel::export_blocks)
      .def("import_blocks", &PyModel::import_blocks)
      .def_prop_ro("block_bytes", &PyModel::block_bytes)
      .def_prop_ro("n_blocks", &PyModel::n_blocks)
      .def_prop_ro("threads", &PyModel::threads)
      .def_prop_ro("isa", &PyModel::isa);

  bind_probe(m);
}
