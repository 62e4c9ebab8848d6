// Byte-pair encoding over a table that lies in a file. Nothing is built when it is opened, and only the pages that texts touch
// become resident: a quarter of a million tokens are ready in a microsecond.
//
// The table is an array of 32-bit words: `Head`, where each token's text begins, a hash table of texts (id + 1, 0 where free), a
// hash table of merges (`Merge`, id kNone where free), the ids of <0x00> to <0xFF>, and the texts.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <queue>
#include <stdexcept>
#include <string_view>
#include <type_traits>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;

namespace sage {
namespace {

constexpr uint32_t kNone = 0xffffffffu;
constexpr uint32_t kMagic = 0x31455042;  // "BPE1"

struct Head {
  uint32_t magic, ids, text_slots, merge_slots, text_bytes;
  uint32_t unknown;  // id, or kNone
  uint32_t byte_fallback, fuse_unknown, ignore_merges;
};

struct Merge {
  uint32_t left, right, rank, id;
};

constexpr size_t kHeadWords = sizeof(Head) / 4;

size_t slot_of(uint64_t hash, uint32_t slots) { return static_cast<size_t>(((hash >> 32) * slots) >> 32); }

uint64_t hash_text(std::string_view text) {
  uint64_t h = 0xcbf29ce484222325u;
  for (unsigned char c : text) h = (h ^ c) * 0x100000001b3u;
  return h * 0x9e3779b97f4a7c15u;
}

uint64_t hash_pair(uint32_t left, uint32_t right) {
  uint64_t h = (static_cast<uint64_t>(left) << 32 | right) * 0x9e3779b97f4a7c15u;
  h ^= h >> 29;
  return h * 0xbf58476d1ce4e5b9u;
}

// The parts of a table of the given sizes, to read or to write.
template <class Word>
auto parts_of(Word* words, const Head& h) {
  using Entry = std::conditional_t<std::is_const_v<Word>, const Merge, Merge>;
  using Text = std::conditional_t<std::is_const_v<Word>, const char, char>;
  struct {
    Word *begins, *slots;
    Entry* merges;
    Word* bytes;
    Text* text;
  } p;
  p.begins = words + kHeadWords;
  p.slots = p.begins + h.ids + 1;
  p.merges = reinterpret_cast<Entry*>(p.slots + h.text_slots);
  p.bytes = p.slots + h.text_slots + size_t{4} * h.merge_slots;
  p.text = reinterpret_cast<Text*>(p.bytes + 256);
  return p;
}

size_t words_of(const Head& h) {
  return kHeadWords + h.ids + 1 + h.text_slots + size_t{4} * h.merge_slots + 256 + (size_t{h.text_bytes} + 3) / 4;
}

// Number of bytes of the UTF-8 character that begins with `first`.
int character(unsigned char first) { return first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4; }

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

class Table {
 public:
  explicit Table(Bytes data) : data_(std::move(data)) {
    if (data_.size() < sizeof(Head) || reinterpret_cast<uintptr_t>(data_.data()) % 4) throw std::invalid_argument("no table of merges");
    std::memcpy(&head_, data_.data(), sizeof head_);
    const bool fits = head_.magic == kMagic && head_.text_slots && head_.merge_slots && words_of(head_) * 4 == data_.size();
    if (!fits) throw std::invalid_argument("no table of merges");
    const auto p = parts_of(reinterpret_cast<const uint32_t*>(data_.data()), head_);
    begins_ = p.begins;
    slots_ = p.slots;
    merges_ = p.merges;
    bytes_ = p.bytes;
    text_ = p.text;
  }

  std::vector<uint32_t> encode(const nb::list& words) const {
    std::vector<std::string_view> views;
    for (nb::handle word : words) {
      Py_ssize_t size = 0;
      const char* text = PyUnicode_AsUTF8AndSize(word.ptr(), &size);
      if (!text) throw nb::python_error();
      views.emplace_back(text, static_cast<size_t>(size));
    }
    std::vector<uint32_t> out;
    nb::gil_scoped_release release;
    for (std::string_view word : views) add(word, out);
    return out;
  }

  nb::object token(uint32_t id) const {
    if (id >= head_.ids || begins_[id] == begins_[id + 1]) return nb::none();
    const std::string_view text = text_of(id);
    return nb::steal(PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace"));
  }

 private:
  struct Symbol {
    uint32_t id;
    int previous, next;
    bool gone = false;
  };
  struct Candidate {
    uint32_t rank;
    int at;
    uint32_t id;
    bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }
  };

  std::string_view text_of(uint32_t id) const { return {text_ + begins_[id], begins_[id + 1] - begins_[id]}; }

  uint32_t find(std::string_view text) const {
    for (size_t s = slot_of(hash_text(text), head_.text_slots);; s = s + 1 < head_.text_slots ? s + 1 : 0) {
      if (slots_[s] == 0) return kNone;
      if (text_of(slots_[s] - 1) == text) return slots_[s] - 1;
    }
  }

  const Merge* merge_of(uint32_t left, uint32_t right) const {
    for (size_t s = slot_of(hash_pair(left, right), head_.merge_slots);; s = s + 1 < head_.merge_slots ? s + 1 : 0) {
      const Merge& m = merges_[s];
      if (m.id == kNone) return nullptr;
      if (m.left == left && m.right == right) return &m;
    }
  }

  // The characters of a word as ids; what the vocabulary lacks as bytes, else as the unknown token, else not at all.
  void characters(std::string_view word, std::vector<Symbol>& out) const {
    bool unknown = false;
    auto push = [&out](uint32_t id) { out.push_back({id, static_cast<int>(out.size()) - 1, static_cast<int>(out.size()) + 1}); };
    for (size_t i = 0, n; i < word.size(); i += n) {
      n = std::min<size_t>(character(static_cast<unsigned char>(word[i])), word.size() - i);
      const uint32_t id = find(word.substr(i, n));
      if (id != kNone) {
        if (unknown) push(head_.unknown);
        unknown = false;
        push(id);
        continue;
      }
      bool spelled = head_.byte_fallback;
      for (size_t j = 0; j < n && spelled; j++) spelled = bytes_[static_cast<unsigned char>(word[i + j])] != kNone;
      if (spelled) {
        for (size_t j = 0; j < n; j++) push(bytes_[static_cast<unsigned char>(word[i + j])]);
      } else if (head_.unknown != kNone) {
        if (unknown && !head_.fuse_unknown) push(head_.unknown);
        unknown = true;
      }
    }
    if (unknown) push(head_.unknown);
    if (!out.empty()) out.back().next = -1;
  }

  void add(std::string_view word, std::vector<uint32_t>& out) const {
    if (head_.ignore_merges)
      if (const uint32_t id = find(word); id != kNone) return out.push_back(id);
    std::vector<Symbol> symbols;
    characters(word, symbols);
    std::priority_queue<Candidate> queue;
    auto consider = [&](int at) {
      const int next = symbols[at].next;
      if (next < 0) return;
      if (const Merge* m = merge_of(symbols[at].id, symbols[next].id)) queue.push({m->rank, at, m->id});
    };
    for (size_t i = 0; i + 1 < symbols.size(); i++) consider(static_cast<int>(i));
    while (!queue.empty()) {
      const Candidate top = queue.top();
      queue.pop();
      Symbol& left = symbols[top.at];
      if (left.gone || left.next < 0) continue;
      Symbol& right = symbols[left.next];
      const Merge* m = merge_of(left.id, right.id);
      if (!m || m->id != top.id) continue;  // one of the two has grown since
      left.id = top.id;
      left.next = right.next;
      right.gone = true;
      if (left.next >= 0) symbols[left.next].previous = top.at;
      if (left.previous >= 0) consider(left.previous);
      consider(top.at);
    }
    for (const Symbol& symbol : symbols)
      if (!symbol.gone) out.push_back(symbol.id);
  }

  Bytes data_;
  Head head_;
  const uint32_t *begins_, *slots_, *bytes_;
  const Merge* merges_;
  const char* text_;
};

// What `build` is given, checked.
struct Source {
  std::vector<std::string> texts;  // by id; empty where there is none
  std::vector<Merge> merges;       // by rank
};

uint32_t id_of(const nb::dict& vocab, const nb::object& text) {
  if (!vocab.contains(text)) throw std::invalid_argument("a merge names a token that is not there");
  return nb::cast<uint32_t>(vocab[text]);
}

Source source_of(const nb::dict& vocab, const nb::list& merges) {
  Source s;
  const size_t most = 4 * vocab.size() + 4096;
  for (auto [text, number] : vocab) {
    const uint32_t id = nb::cast<uint32_t>(number);
    if (id >= most) throw std::invalid_argument("ids lie far apart");
    if (id >= s.texts.size()) s.texts.resize(id + 1);
    if (!s.texts[id].empty()) throw std::invalid_argument("two tokens have one id");
    s.texts[id] = nb::cast<std::string>(text);
    if (s.texts[id].empty()) throw std::invalid_argument("a token is empty");
  }
  for (nb::handle merge : merges) {
    nb::object pair = nb::borrow(merge);
    if (nb::isinstance<nb::str>(pair)) pair = pair.attr("split")(" ");
    if (nb::len(pair) != 2) throw std::invalid_argument("a merge is no pair");
    const nb::object left = pair[0], right = pair[1];
    s.merges.push_back({id_of(vocab, left), id_of(vocab, right), static_cast<uint32_t>(s.merges.size()), id_of(vocab, left + right)});
  }
  return s;
}

// The byte that a token <0x00> to <0xFF> stands for, -1 for any other.
int byte_of(const std::string& text) {
  constexpr std::string_view kDigits = "0123456789ABCDEF";
  if (text.size() != 6 || text.compare(0, 3, "<0x") != 0 || text[5] != '>') return -1;
  const size_t high = kDigits.find(text[3]), low = kDigits.find(text[4]);
  return high == kDigits.npos || low == kDigits.npos ? -1 : static_cast<int>(16 * high + low);
}

nb::bytes build(const nb::dict& vocab, const nb::list& merges, bool byte_fallback, bool fuse_unknown, bool ignore_merges, int64_t unknown) {
  const Source s = source_of(vocab, merges);
  Head h{kMagic, static_cast<uint32_t>(s.texts.size()), 0, 0, 0, unknown < 0 ? kNone : static_cast<uint32_t>(unknown),
         byte_fallback, fuse_unknown, ignore_merges};
  size_t bytes = 0;
  for (const std::string& text : s.texts) bytes += text.size();
  if (bytes > kNone) throw std::invalid_argument("the vocabulary is too large");
  h.text_bytes = static_cast<uint32_t>(bytes);
  h.text_slots = static_cast<uint32_t>(vocab.size() * 3 / 2 + 1);
  h.merge_slots = static_cast<uint32_t>(s.merges.size() * 5 / 4 + 1);

  std::vector<uint32_t> words(words_of(h), 0);
  std::memcpy(words.data(), &h, sizeof h);
  const auto p = parts_of(words.data(), h);
  for (uint32_t i = 0; i < h.merge_slots; i++) p.merges[i].id = kNone;
  for (int i = 0; i < 256; i++) p.bytes[i] = kNone;
  uint32_t at = 0;
  for (uint32_t id = 0; id < h.ids; id++) {
    const std::string& text = s.texts[id];
    p.begins[id] = at;
    if (text.empty()) continue;
    std::memcpy(p.text + at, text.data(), text.size());
    at += static_cast<uint32_t>(text.size());
    size_t slot = slot_of(hash_text(text), h.text_slots);
    while (p.slots[slot] != 0) slot = slot + 1 < h.text_slots ? slot + 1 : 0;
    p.slots[slot] = id + 1;
    if (const int byte = byte_of(text); byte >= 0) p.bytes[byte] = id;
  }
  p.begins[h.ids] = at;
  for (const Merge& m : s.merges) {  // of a pair that stands twice the later counts
    size_t slot = slot_of(hash_pair(m.left, m.right), h.merge_slots);
    while (p.merges[slot].id != kNone && !(p.merges[slot].left == m.left && p.merges[slot].right == m.right))
      slot = slot + 1 < h.merge_slots ? slot + 1 : 0;
    p.merges[slot] = m;
  }
  return nb::bytes(reinterpret_cast<const char*>(words.data()), words.size() * 4);
}

}  // namespace
}  // namespace sage

NB_MODULE(_bpe, m) {
  using namespace sage;
  // A served model's table lives as long as the process, beyond the last collection: that is no leak to tell people of.
  nb::set_leak_warnings(false);
  m.doc() = "Byte-pair encoding over a mapped table; used through sagellm_core.text.mapped.";
  m.def("build", build, "vocab"_a, "merges"_a, "byte_fallback"_a, "fuse_unknown"_a, "ignore_merges"_a, "unknown"_a);
  m.attr("VERSION") = kMagic;
  nb::class_<Table>(m, "Table").def(nb::init<Bytes>()).def("encode", &Table::encode).def("token", &Table::token);
}
