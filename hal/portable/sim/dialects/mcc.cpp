/* Stands for MUSA's compiler: makes of a .mu file what the simulated driver can load. */
#include <stdio.h>
#include <string.h>

#include <fstream>
#include <iterator>

#include "../simulator.h"

static int refused(const std::string &why) {
  fprintf(stderr, "mcc: %s\n", why.c_str());
  return 1;
}

int main(int count, char **words) {
  std::string arch, input, output;
  for (int i = 1; i < count; i++) {
    std::string word = words[i];
    if (word == "--version") return puts("simulated mcc version 1"), 0;
    if (!word.rfind("--offload-arch=", 0))
      arch = word.substr(word.find('=') + 1);
    else if (word == "-o" && i + 1 < count)
      output = words[++i];
    else if (word == "-x" && i + 1 < count && !strcmp(words[i + 1], "musa"))
      i++;
    else if (word.size() > 3 && word.substr(word.size() - 3) == ".mu")
      input = word;
    else if (word != "-std=c++17" && word != "-O2" && word != "--cuda-device-only")
      return refused("what is " + word + "?");
  }
  if (arch != "mp_21" && arch != "mp_22" && arch != "mp_31") return refused("no such architecture: " + arch);
  std::ifstream file(input, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(file), {}};
  sim::modules::Compiled made = sim::modules::compile(text, input, {});
  fputs(made.log.c_str(), stderr);
  if (!made.done) return 1;
  std::ofstream(output, std::ios::binary) << made.code;
}
