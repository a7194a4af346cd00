// Calibrations as files: one per CPU, lines "key value" under a version. A file that is corrupt,
// foreign or stale is ignored as a whole and the reason kept: no product fails for it.
//
//   spfmt-cost 4
//   cpu AMD EPYC, family 25, model 17, stepping 1
//   date 2026-01-31
//   levels avx2 avx512                                 instruction sets that were measured
//   l2_bytes 1048576
//   avx512.lists.spmm.lookup.stream 2.1e-09
//   ...
//   end 173                                            number of coefficients above
#include <cpuid.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>

#include "../core/variant.h"
#include "cost.h"

namespace spfmt {
namespace {

// Raise it whenever kernels change enough that old calibrations mislead.
constexpr const char* kVersion = "4";
constexpr std::streamsize kMostBytes = 1 << 16;

struct CpuId {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit CpuId(unsigned leaf) { __get_cpuid(leaf, &eax, &ebx, &ecx, &edx); }
};

std::string cpu_brand() {
  char name[49] = {};
  for (unsigned i = 0; i < 3; ++i) {
    const CpuId part(0x80000002u + i);
    const unsigned words[4] = {part.eax, part.ebx, part.ecx, part.edx};
    std::memcpy(name + 16 * i, words, 16);
  }
  std::string brand(name);
  const size_t first = brand.find_first_not_of(' '), last = brand.find_last_not_of(' ');
  return first == std::string::npos ? "unknown" : brand.substr(first, last - first + 1);
}

// FNV-1a: the same in every build, unlike std::hash.
std::string short_hash(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const unsigned char c : text) hash = (hash ^ c) * 0x100000001b3u;
  char out[17];
  std::snprintf(out, sizeof(out), "%016llx", static_cast<unsigned long long>(hash));
  return out;
}

const char* environment(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : nullptr;
}

// A finite number of at least 0 that is the whole text. Independent of the locale.
bool parse(const std::string& text, double& value) {
  std::istringstream in(text);
  in.imbue(std::locale::classic());
  return (in >> value) && in.peek() == EOF && std::isfinite(value) && value >= 0;
}

// Fills `out` from the file's lines; returns what is wrong, or nothing.
std::string read_lines(std::istream& in, Calibration& out) {
  auto places = coefficients(out.model);
  std::map<std::string, double*> left(places.begin(), places.end());
  std::string line, found_cpu, ended;
  size_t count = 0;
  if (!std::getline(in, line) || line.rfind("spfmt-cost ", 0) != 0)
    return "no calibration of spfmt";
  if (line != std::string("spfmt-cost ") + kVersion) return "written for other kernels: " + line;
  while (ended.empty() && std::getline(in, line)) {
    const size_t space = line.find(' ');
    if (space == std::string::npos) return "a line without a value: " + line;
    const std::string key = line.substr(0, space), value = line.substr(space + 1);
    if (key == "cpu") {
      found_cpu = value;
    } else if (key == "date") {
      out.date = value;
    } else if (key == "levels") {
      out.levels = value;
    } else if (key == "end") {
      ended = value;
    } else {
      const auto place = left.find(key);
      if (place == left.end()) return "unknown or repeated key " + key;
      if (!parse(value, *place->second)) return "no number of at least 0: " + line;
      left.erase(place);
      ++count;
    }
  }
  if (ended != std::to_string(count)) return "cut short, or changed";
  if (!left.empty()) return "no coefficient " + left.begin()->first;
  return found_cpu == cpu_key() ? "" : "measured on another CPU: " + found_cpu;
}

}  // namespace

std::vector<std::pair<std::string, double*>> coefficients(CostModel& model) {
  std::vector<std::pair<std::string, double*>> out = {
      {"l2_bytes", &model.l2_bytes},
      {"l3_bytes", &model.l3_bytes},
      {"wake_seconds", &model.wake_seconds},
      {"efficiency", &model.efficiency},
      {"dense_efficiency", &model.dense_efficiency},
  };
  const auto add = [&](const std::string& prefix, Terms& terms) {
    for (int i = 0; i < kTerms; ++i) out.emplace_back(prefix + "." + kTermNames[i], &terms[i]);
  };
  add("dense", model.dense);
  for (int isa = 0; isa < kIsas; ++isa) {
    for (size_t i = 0; i < std::size(kVariants); ++i) {
      const Variant& v = *kVariants[i];
      for (const Op op : {Op::spmm, Op::spmm_t, Op::sddmm}) {
        const bool transposed = v.layout == Layout::lists && op == Op::spmm_t;
        if (transposed || !v.takes(op, 1)) continue;
        add(std::string(name_of(static_cast<Isa>(isa))) + "." + name_of(v.layout) + "." +
                name_of(op) + "." + v.name,
            model.kernels[isa][i][static_cast<int>(op)]);
      }
    }
  }
  return out;
}

std::string cpu_key() {
  static const std::string key = [] {
    const CpuId id(1);
    const unsigned base = (id.eax >> 8) & 15, extended = (id.eax >> 20) & 255;
    const unsigned family = base == 15 ? base + extended : base;
    unsigned model = (id.eax >> 4) & 15;
    if (base == 6 || base == 15) model += ((id.eax >> 16) & 15) << 4;
    return cpu_brand() + ", family " + std::to_string(family) + ", model " + std::to_string(model) +
           ", stepping " + std::to_string(id.eax & 15);
  }();
  return key;
}

std::string cost_file() {
  std::string folder;
  if (const char* own = environment("SPFMT_CACHE_DIR")) {
    folder = own;
  } else if (const char* cache = environment("XDG_CACHE_HOME")) {
    folder = std::string(cache) + "/spfmt";
  } else if (const char* home = environment("HOME")) {
    folder = std::string(home) + "/.cache/spfmt";
  } else {
    return "";
  }
  return folder + "/cost-" + short_hash(cpu_key()) + ".txt";
}

Calibration read_calibration(const std::string& path) {
  Calibration defaults{default_cost_model(), "", "", ""};
  if (path.empty()) return defaults;
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    if (errno != ENOENT && errno != ENOTDIR) defaults.ignored = std::strerror(errno);
    return defaults;
  }
  std::string text(kMostBytes, '\0');
  file.read(text.data(), kMostBytes);
  text.resize(static_cast<size_t>(file.gcount()));
  std::istringstream in(text);
  Calibration found = defaults;
  defaults.ignored = read_lines(in, found);
  return defaults.ignored.empty() ? found : defaults;
}

std::string format_calibration(const CostModel& model, const std::string& date,
                               const std::string& levels) {
  CostModel copy = model;
  std::ostringstream out;
  out.imbue(std::locale::classic());
  out.precision(17);
  out << "spfmt-cost " << kVersion << "\ncpu " << cpu_key() << "\ndate " << date << "\nlevels "
      << levels << "\n";
  const auto places = coefficients(copy);
  for (const auto& [key, value] : places) out << key << ' ' << *value << '\n';
  out << "end " << places.size() << '\n';
  return out.str();
}

}  // namespace spfmt
