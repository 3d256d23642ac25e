// Python binding: pointers, sizes and strides come as plain integers, so that nothing of torch is needed to build.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "decode.h"

namespace nb = nanobind;
using namespace hal_cpu;

namespace {

using Address = uintptr_t;
using Int = int64_t;

constexpr double kLog2E = 1.44269504088896340736;

enum Flags : int { kCausal = 1, kBase2 = 2, kInvariant = 4 };

int narrow(Int n) { return (int)std::min<Int>(n, INT32_MAX); }

Shape shape_of(Int batch, Int queries, Int heads_q, Int heads_kv, int head_dim, int head_dim_v, int flags,
               bool ragged) {
  const bool causal = flags & kCausal, invariant = flags & kInvariant;
  return {narrow(batch), narrow(queries), narrow(heads_q), narrow(heads_kv), head_dim,
          head_dim_v,    causal,          invariant,       ragged};
}

// None, or (what, row, column, value) for Python to phrase.
nb::object report(const Fault& fault) {
  if (!fault.kind) return nb::none();
  return nb::make_tuple((int)fault.kind, fault.row, fault.column, fault.value);
}

nb::object plan(Address lengths, Address first_query, Int batch, Int queries, Int heads_q, Int heads_kv, int head_dim,
                int head_dim_v, int flags, int threads) {
  const Shape shape = shape_of(batch, queries, heads_q, heads_kv, head_dim, head_dim_v, flags, first_query != 0);
  const auto* seqlens = (const int32_t*)lengths;
  const auto* offsets = (const int32_t*)first_query;
  const Fault fault = check_lengths(shape, seqlens, offsets, -1);
  if (fault.kind) return report(fault);
  Schedule schedule;
  make_schedule(shape, seqlens, offsets, threads, schedule);
  return nb::cast(std::move(schedule));
}

nb::object run(const Schedule* schedule, Address q, Address kv, Address table, Address lengths, Address first_query,
               Address out, Address lse, Int q_batch, Int q_token, Int q_head, Int kv_page, Int kv_token, Int kv_head,
               Int table_row, Int out_batch, Int out_token, Int out_head, Int batch, Int queries, Int total_queries,
               Int heads_q, Int heads_kv, int head_dim, int head_dim_v, Int page_size, Int num_blocks, Int max_blocks,
               int dtype, double scale, int flags, int threads) {
  Call call;
  call.shape = shape_of(batch, queries, heads_q, heads_kv, head_dim, head_dim_v, flags, first_query != 0);
  call.lengths = (const int32_t*)lengths;
  call.first_query = (const int32_t*)first_query;
  call.total_queries = total_queries;
  call.num_blocks = narrow(num_blocks);
  call.max_blocks = narrow(max_blocks);
  call.threads = threads;
  Problem& p = call.problem;
  p.q = (const char*)q;
  p.kv = (const char*)kv;
  p.table = (const int32_t*)table;
  p.out = (char*)out;
  p.lse = (float*)lse;
  p.q_batch = q_batch, p.q_token = q_token, p.q_head = q_head;
  p.kv_page = kv_page, p.kv_token = kv_token, p.kv_head = kv_head;
  p.table_row = table_row;
  p.out_batch = out_batch, p.out_token = out_token, p.out_head = out_head;
  p.lse_head = call.shape.ragged ? total_queries : queries;
  p.lse_batch = heads_q * queries;
  p.dtype = dtype;
  p.head_dim = head_dim;
  p.head_dim_v = head_dim_v;
  p.page_size = narrow(page_size);
  p.group = call.shape.heads_q / call.shape.heads_kv;
  p.causal = call.shape.causal;
  p.base2 = (flags & kBase2) != 0;
  p.scale_log2 = (float)(scale * kLog2E);
  Fault fault;
  {
    nb::gil_scoped_release release;
    fault = decode(call, schedule);
  }
  return report(fault);
}

nb::dict launches() {
  nb::dict counts;
  for (const LaunchCount& count : launch_counts()) counts[count.isa.c_str()] = count.launches;
  return counts;
}

}  // namespace

NB_MODULE(_native, m) {
  // A schedule may outlive the interpreter's last look at this module.
  nb::set_leak_warnings(false);
  nb::class_<Schedule>(m, "Schedule")
      .def_prop_ro("parts", [](const Schedule& s) { return s.parts.size() - 1; })
      .def_prop_ro("items", [](const Schedule& s) { return s.items.size(); })
      .def_prop_ro("slots", [](const Schedule& s) { return s.slots; });
  m.def("plan", &plan);
  m.def("decode", &run, nb::arg("schedule").none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg());
  m.def("isas", &available_isas);
  m.def("isa", &current_isa);
  m.def("set_isa", &select_isa);
  m.def("launches", &launches);
  m.attr("compiler") = HAL_CPU_COMPILER;
}
