// Every instruction set against plain double loops, without Python: what a cross-compiled build is executed with (under
// an emulator). Built by tests/test_aarch64.py, not part of the package.

#include <math.h>
#include <stdio.h>
#include <string.h>

#include <random>
#include <vector>

#include "decode.h"

using namespace hal_cpu;

namespace {

constexpr int kPage = 16, kPages = 24;

struct Attention {
  int heads, queries, dim, dim_v, length;
  bool causal;
};

float value(const std::vector<char>& data, int dtype, size_t i) {
  if (dtype == kFloat32) return ((const float*)data.data())[i];
  const uint16_t bits = ((const uint16_t*)data.data())[i];
  if (dtype == kFloat16) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float size = exponent ? ldexpf(1024.0f + mantissa, exponent - 25) : ldexpf((float)mantissa, -24);
    return bits & 0x8000 ? -size : size;
  }
  const uint32_t wide = (uint32_t)bits << 16;
  float x;
  memcpy(&x, &wide, sizeof x);
  return x;
}

// Bit patterns of moderate numbers in any of the dtypes.
std::vector<char> random_data(int dtype, size_t count, std::mt19937& rng) {
  std::vector<char> data(count * 4);
  for (size_t i = 0; i < count; ++i) {
    const float x = (float)(int)(rng() % 2001 - 1000u) / 1024.0f;
    uint32_t wide;
    memcpy(&wide, &x, sizeof x);
    if (dtype == kFloat32) memcpy(&data[4 * i], &wide, 4);
    const uint16_t half = dtype == kBfloat16 ? wide >> 16 : (rng() & 0x8000) | (rng() % 15 << 10) | (rng() & 1023);
    if (dtype != kFloat32) memcpy(&data[2 * i], &half, 2);
  }
  return data;
}

// Operands of one call, and what plain double loops make of them: made once for every instruction set.
struct Known {
  std::vector<char> q, kv;
  std::vector<int32_t> table;
  std::vector<double> out, lse;
};

std::vector<double> values(const std::vector<char>& data, int dtype, size_t count) {
  std::vector<double> found(count);
  for (size_t i = 0; i < count; ++i) found[i] = value(data, dtype, i);
  return found;
}

Known known(const Attention& s, int dtype) {
  std::mt19937 rng(s.heads * 131 + s.dim);
  const size_t rows = (size_t)s.queries * s.heads;
  Known k;
  k.q = random_data(dtype, rows * s.dim, rng);
  k.kv = random_data(dtype, (size_t)kPages * kPage * s.dim, rng);
  for (int i = 0; i < kPages; ++i) k.table.push_back((i * 7 + 3) % kPages);
  const std::vector<double> q = values(k.q, dtype, rows * s.dim), kv = values(k.kv, dtype, (size_t)kPages * kPage * s.dim);
  k.out.assign(rows * s.dim_v, 0);
  k.lse.assign(rows, 0);
  for (int i = 0; i < s.queries; ++i) {
    for (int h = 0; h < s.heads; ++h) {
      const int seen = s.causal ? s.length - s.queries + i + 1 : s.length;
      double total = 0;
      double* sum = &k.out[((size_t)i * s.heads + h) * s.dim_v];
      for (int t = 0; t < seen; ++t) {
        const double* row = &kv[((size_t)k.table[t / kPage] * kPage + t % kPage) * s.dim];
        double score = 0;
        for (int d = 0; d < s.dim; ++d) score += q[((size_t)i * s.heads + h) * s.dim + d] * row[d];
        const double weight = exp(score / sqrt(s.dim));
        total += weight;
        for (int c = 0; c < s.dim_v; ++c) sum[c] += weight * row[c];
      }
      for (int c = 0; c < s.dim_v; ++c) sum[c] /= total;
      k.lse[h * s.queries + i] = log(total);
    }
  }
  return k;
}

double worst_error(const Attention& s, const Known& k, int dtype, int threads) {
  std::vector<char> out(k.q.size());
  std::vector<float> lse(k.lse.size());
  const int32_t lengths[] = {s.length};

  Call call{};
  call.shape = {1, s.queries, s.heads, 1, s.dim, s.dim_v, s.causal, true, false};
  call.lengths = lengths;
  call.total_queries = s.queries;
  call.num_blocks = call.max_blocks = kPages;
  call.threads = threads;
  Problem& p = call.problem;
  p.q = k.q.data(), p.kv = k.kv.data(), p.table = k.table.data(), p.out = out.data(), p.lse = lse.data();
  p.q_token = (ptrdiff_t)s.heads * s.dim, p.q_head = s.dim;
  p.kv_page = (ptrdiff_t)kPage * s.dim, p.kv_token = p.kv_head = s.dim;
  p.out_token = (ptrdiff_t)s.heads * s.dim_v, p.out_head = s.dim_v;
  p.lse_head = s.queries;
  p.dtype = dtype, p.head_dim = s.dim, p.head_dim_v = s.dim_v, p.page_size = kPage, p.group = s.heads;
  p.causal = s.causal;
  p.scale_log2 = (float)(1 / sqrt(s.dim) / log(2.0));
  if (decode(call, nullptr).kind) return INFINITY;

  double worst = 0;
  const double rounding = dtype == kFloat32 ? 2e-6 : dtype == kFloat16 ? 1e-3 : 8e-3;
  for (size_t i = 0; i < k.out.size(); ++i) {
    const double got = value(out, dtype, i);
    if (isnan(got)) return INFINITY;
    worst = fmax(worst, fabs(got - k.out[i]) / (rounding * fabs(k.out[i]) + 2e-6));
  }
  for (size_t i = 0; i < lse.size(); ++i) {
    if (isnan(lse[i])) return INFINITY;
    worst = fmax(worst, fabs(lse[i] - k.lse[i]) / 2e-5);
  }
  return worst;
}

}  // namespace

int main() {
  const Attention shapes[] = {
      {1, 1, 64, 64, 203, false},    {2, 3, 33, 17, 203, true},    {20, 1, 576, 512, 203, false}, {7, 4, 100, 99, 203, true},
      {128, 1, 576, 512, 97, false}, {48, 3, 192, 128, 129, true}, {13, 1, 65, 33, 1, false},     {33, 2, 576, 576, 70, true}};
  const std::vector<std::string> isas = available_isas();
  std::vector<double> worst(isas.size());
  for (const Attention& shape : shapes)
    for (int dtype : {kBfloat16, kFloat16, kFloat32}) {
      const Known k = known(shape, dtype);
      for (size_t i = 0; i < isas.size(); ++i) {
        select_isa(isas[i]);
        for (int threads : {1, 3}) worst[i] = fmax(worst[i], worst_error(shape, k, dtype, threads));
      }
    }
  bool good = true;
  for (size_t i = 0; i < isas.size(); ++i) {
    printf("%s: worst error %.3f of the limit\n", isas[i].c_str(), worst[i]);
    good = good && worst[i] <= 1;
  }
  return good ? 0 : 1;
}
