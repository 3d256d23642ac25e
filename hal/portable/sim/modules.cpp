/* Kernels compiled for the host by its own C++ compiler, as a library; loaded from memory, its local arrays found by name. */
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <set>

#include "simulator.h"

extern char **environ;

namespace sim::modules {
namespace {
std::set<Module *> loaded;
std::set<Function *> functions;

/* Run a command; its output, of whatever kind, goes to a file. */
bool done(const std::vector<std::string> &command, const std::string &output) {
  std::vector<char *> words;
  for (const std::string &word : command) words.push_back((char *)word.c_str());
  words.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 1, output.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  posix_spawn_file_actions_adddup2(&actions, 1, 2);
  pid_t child;
  int status = posix_spawnp(&child, words[0], &actions, nullptr, words.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (status) return false;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

std::string content(const std::string &path) {
  std::string text;
  if (FILE *file = fopen(path.c_str(), "rb")) {
    char part[1 << 16];
    for (size_t n; (n = fread(part, 1, sizeof part, file)) > 0;) text.append(part, n);
    fclose(file);
  }
  return text;
}

bool keep(const std::string &path, const std::string &text) {
  FILE *file = fopen(path.c_str(), "wb");
  if (!file) return false;
  bool whole = fwrite(text.data(), 1, text.size(), file) == text.size();
  return fclose(file) == 0 && whole;
}

bool of_a_name(char c) { return isalnum((unsigned char)c) || c == '_'; }

/* Name and parameters of every kernel: `HAL_SIM_ENTRY(name, "q\nkv\n"),` for each. */
std::string entries(const std::string &text) {
  std::string found;
  static const std::string MARK = "HAL_SIM_KERNEL";
  for (size_t at = 0; (at = text.find(MARK, at)) != text.npos;) {
    at += MARK.size();
    size_t begin = text.find("void", at);
    if (begin == text.npos) break;
    begin += 4;
    while (begin < text.size() && !of_a_name(text[begin])) begin++;
    size_t end = begin;
    while (end < text.size() && of_a_name(text[end])) end++;
    size_t open = text.find('(', end), close = text.find(')', end);
    if (close == text.npos) break;
    std::string names, last;
    for (size_t i = open + 1; i <= close; i++) {
      if (of_a_name(text[i]))
        last = of_a_name(text[i - 1]) ? last + text[i] : std::string(1, text[i]);
      else if (text[i] == ',' || text[i] == ')')
        names += last + "\\n", last.clear();
    }
    found += "HAL_SIM_ENTRY(" + text.substr(begin, end - begin) + ", \"" + names + "\"),\n";
  }
  return found;
}

std::string compiler() {
  const char *chosen = getenv("CXX");
  return chosen && *chosen ? chosen : "c++";
}

/* Arrays of local memory have names like _ZZ10mla_decodeE6tokens. */
bool named(const char *symbol, Array &array) {
  if (strncmp(symbol, "_ZZ", 3)) return false;
  char *rest;
  size_t length = strtoul(symbol + 3, &rest, 10);
  if (!length || strlen(rest) < length) return false;
  array.kernel.assign(rest, length);
  const char *name = strchr(rest + length, 'E');
  if (!name) return false;
  length = strtoul(name + 1, &rest, 10);
  if (!length || strlen(rest) < length) return false;
  array.name.assign(rest, length);
  return true;
}

bool read_symbols(Module &module, const char *image) {
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff);
  bool anchored = false;
  for (int s = 0; s < header->e_shnum; s++) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const char *names = image + sections[sections[s].sh_link].sh_offset;
    const Elf64_Sym *symbols = (const Elf64_Sym *)(image + sections[s].sh_offset);
    for (size_t i = 0; i < sections[s].sh_size / sizeof *symbols; i++) {
      if (ELF64_ST_TYPE(symbols[i].st_info) != STT_TLS || symbols[i].st_shndx == SHN_UNDEF) continue;
      const char *name = names + symbols[i].st_name;
      size_t offset = symbols[i].st_value, size = symbols[i].st_size;
      module.local_size = std::max(module.local_size, offset + size);
      if (strstr(name, "hal_sim_local")) module.anchor = offset, anchored = true;
      Array array{"", "", offset, size};
      if (named(name, array) && array.name.rfind("hal_sim_gap_", 0)) module.arrays.push_back(array);
    }
  }
  std::sort(module.arrays.begin(), module.arrays.end(), [](auto &a, auto &b) { return a.offset < b.offset; });
  return anchored;
}

int note_range(dl_phdr_info *info, size_t, void *given) {
  Module &module = *(Module *)given;
  if (info->dlpi_addr != module.begin) return 0;
  for (int i = 0; i < info->dlpi_phnum; i++)
    if (info->dlpi_phdr[i].p_type == PT_LOAD)
      module.end = std::max(module.end, module.begin + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
  return 1;
}
}  // namespace

Compiled compile(const std::string &text, const std::string &name, const std::vector<std::string> &options) {
  char folder[] = "/tmp/hal-sim-XXXXXX";
  if (!mkdtemp(folder)) return {false, "", "no folder for temporary files"};
  std::string base = std::string(folder) + "/", input = base + "kernels.cpp", output = base + "kernels.so";
  std::string log = base + "log", scanned = base + "scanned";
  bool looks = checks().accesses();
  std::string before = std::string(looks ? "#define HAL_SIM_CHECKED\n" : "") + "#include \"words.h\"\n#line 1 \"" + name + "\"\n";
  /* -march=native: a library is only ever run by who compiled it. */
  std::vector<std::string> line = {compiler(), "-std=c++17", "-x", "c++", "-I" HAL_SIM_FOLDER, "-fPIC", "-march=native"};
  line.insert(line.end(), {"-fno-strict-aliasing", "-fno-exceptions", "-fno-math-errno", "-ffp-contract=off", "-w"});
  line.push_back("-fstack-clash-protection"); /* no frame reaches over the page that ends a work-item's stack */
  line.insert(line.end(), options.begin(), options.end());
  Compiled made{false, "", ""};
  std::vector<std::string> scan = line;
  scan.insert(scan.end(), {"-DHAL_SIM_SCAN", "-E", "-P", "-o", scanned, input});
  std::string after = "\n#include \"module.h\"\n";
  if (keep(input, before + text) && done(scan, log)) {
    after += "extern \"C\" __attribute__((visibility(\"default\"))) const hal_sim_kernel hal_sim_kernels[];\n";
    after += "const hal_sim_kernel hal_sim_kernels[] = {\n" + entries(content(scanned)) + "{}};\n";
    std::string object = base + "kernels.o";
    std::vector<std::string> build = line;
    bool clang = content(scanned).find("HAL_SIM_BY_CLANG") != std::string::npos;
    if (looks)
      build.insert(build.end(), {"-O1", "-g1", "-fsanitize=thread"});
    else
      build.push_back("-O3");
    /* Clang leaves out what is of no use for races: reads of what is written soon after. Of its newer line tables addr2line
     * takes the names of files wrongly. */
    if (looks && clang) {
      build.insert(build.end(), {"-gdwarf-4", "-mllvm", "-tsan-distinguish-volatile=1"});
      build.insert(build.end(), {"-mllvm", "-tsan-instrument-read-before-write=1"});
    } else if (looks)
      build.insert(build.end(), {"--param", "tsan-distinguish-volatile=1"});
    build.insert(build.end(), {"-c", "-o", object, input});
    /* Linked by itself, without the library that the hooks are usually from. */
    made.done = keep(input, before + text + after) && done(build, log);
    if (made.done) made.done = done({compiler(), "-shared", "-o", output, object, "-lm"}, log);
  }
  if (made.done) made.code = content(output);
  made.log = content(log);
  for (const char *part : {"kernels.cpp", "kernels.so", "kernels.o", "log", "scanned"}) unlink((base + part).c_str());
  rmdir(folder);
  return made;
}

size_t image_size(const void *image) {
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
  if (memcmp(image, ELFMAG, SELFMAG)) return 0;
  return header->e_shoff + (size_t)header->e_shentsize * header->e_shnum;
}

Error load(Module **made, const void *image, size_t size) {
  report("");
  if (!size) return INVALID_IMAGE;
  auto module = std::make_unique<Module>();
  module->file = memfd_create("kernels", MFD_CLOEXEC);
  if (module->file < 0 || write(module->file, image, size) != (ssize_t)size) return OUT_OF_MEMORY;
  std::string path = "/proc/self/fd/" + std::to_string(module->file);
  module->library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  void *engine = module->library ? dlsym(module->library, "hal_sim") : nullptr;
  module->here = engine ? (void *(*)())dlsym(module->library, "hal_sim_anchor") : nullptr;
  if (!module->here || !read_symbols(*module, (const char *)image)) {
    const char *why = module->library ? "it was not made for the simulator" : dlerror();
    report(why ? why : "");
    if (module->library) dlclose(module->library);
    ::close(module->file);
    return INVALID_IMAGE;
  }
  *(const hal_sim_engine **)engine = the_engine();
  module->kernels = (const hal_sim_kernel *)dlsym(module->library, "hal_sim_kernels");
  module->checked = dlsym(module->library, "hal_sim_checked");
  link_map *map;
  dlinfo(module->library, RTLD_DI_LINKMAP, &map);
  module->begin = map->l_addr;
  dl_iterate_phdr(note_range, module.get());
  loaded.insert(*made = module.release());
  return OK;
}

Error unload(Module *module) {
  if (!loaded.erase(module)) return INVALID_HANDLE;
  for (auto at = functions.begin(); at != functions.end();) {
    if ((*at)->module == module) {
      delete *at;
      at = functions.erase(at);
    } else {
      ++at;
    }
  }
  dlclose(module->library);
  ::close(module->file);
  delete module;
  return OK;
}

Error function(Function **made, Module *module, const char *name) {
  if (!loaded.count(module)) return INVALID_HANDLE;
  for (const hal_sim_kernel *kernel = module->kernels; kernel && kernel->name; kernel++) {
    if (strcmp(kernel->name, name)) continue;
    functions.insert(*made = new Function{module, kernel});
    return OK;
  }
  return NOT_FOUND;
}

bool known(Function *function) { return functions.count(function); }

size_t local_bytes(const Function &function) {
  size_t size = 0;
  for (const Array &array : function.module->arrays)
    if (array.kernel == function.kernel->name) size = (size + 15) / 16 * 16 + array.size;
  return size;
}

Place place(int process, int file, size_t offset) {
  char command[128], answer[4096];
  /* Name and line of whatever was inlined into each other there, the kernel last. */
  snprintf(command, sizeof command, "addr2line -fie /proc/%d/fd/%d 0x%zx 2>/dev/null", process, file, offset - 1);
  Place found;
  if (FILE *asked = popen(command, "r")) {
    for (bool name = true; fgets(answer, sizeof answer, asked); name = !name) {
      std::string word(answer, strcspn(answer, " \n"));
      if (word.empty() || word[0] == '?') continue;
      if (name)
        found.kernel = word;
      else if (found.line.empty())
        found.line = word.substr(word.rfind('/') + 1);
    }
    pclose(asked);
  }
  return found;
}

std::string place(const Module &module, const void *address) {
  Place found = place(getpid(), module.file, (uintptr_t)address - module.begin);
  return found.line.empty() ? "an unknown line" : found.line;
}
}  // namespace sim::modules
