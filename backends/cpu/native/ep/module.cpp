// The Python face of the engine: pointers in, tensors over window memory out.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "engine.h"
#include "tensors.h"

namespace nb = nanobind;
using namespace hal_ep;

namespace {

template <class T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

template <class Call>
void set_arguments(Call& call, const std::vector<uint64_t>& arguments) {
  for (size_t i = 0; i < arguments.size() && i < kArguments; ++i) call.arguments[i] = arguments[i];
}

int64_t element_bytes(Element element) {
  return element == Element::i64 ? 8 : element == Element::u8 ? 1 : int(element) < 2 ? 2 : 4;
}

nb::object integers(const std::vector<int64_t>& values) {
  nb::object made = nb::steal(PyTuple_New(Py_ssize_t(values.size())));
  for (size_t i = 0; i < values.size(); ++i)
    PyTuple_SET_ITEM(made.ptr(), Py_ssize_t(i), PyLong_FromLongLong(values[i]));
  return made;
}

nb::list record_list(const std::vector<Record>& records) {
  nb::list list;
  for (const Record& r : records)
    list.append(nb::make_tuple(r.seq, uint32_t(r.kind), kPhases[r.phase], r.waits_for, r.tokens, r.expert, r.expected,
                               r.received, r.begin_ns, r.end_ns));
  return list;
}

}  // namespace

NB_MODULE(_ep, m) {
  m.doc() = "Expert-parallel communication between the processes of one machine.";
  m.attr("isa") = isa();

  static PyObject* rank_failed = PyErr_NewException("hal_cpu._ep.RankFailed", nullptr, nullptr);
  static PyObject* refused = PyErr_NewException("hal_cpu._ep.Refused", nullptr, nullptr);
  m.attr("RankFailed") = nb::borrow(rank_failed);
  m.attr("Refused") = nb::borrow(refused);
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const RankFailed& e) {
      nb::object args = nb::make_tuple(e.rank, e.phase, e.reason, e.expert, e.expected, e.received);
      PyErr_SetObject(rank_failed, args.ptr());
    } catch (const Refused& e) {
      nb::object args = nb::make_tuple(e.argument, e.got, e.legal, e.field, e.rank, e.against, e.value, e.other);
      PyErr_SetObject(refused, args.ptr());
    } catch (const Interrupted&) {
      // What the signal's handler raised is set.
    } catch (const SystemError& e) {
      PyErr_SetString(PyExc_OSError, e.what());
    }
  });

  nb::class_<Routes>(m, "Routes")
      .def_ro("id", &Routes::id)
      .def_ro("recv_rows", &Routes::recv_rows)
      .def_ro("dropped", &Routes::dropped)
      .def_ro("recv_experts", &Routes::recv_experts)
      // For each received row the block it came in (source * ranks + peer), -1 for none; how many came by block and
      // local expert.
      .def("blocks_of_rows",
           [](const Routes& r, uint64_t out, int64_t rows) {
             auto* block = pointer<int32_t>(out);
             std::fill_n(block, rows, -1);
             for (size_t i = 0; i < r.came_at.size(); ++i)
               std::fill_n(block + r.came_at[i].first, r.came_at[i].second, int32_t(i % r.came.size()));
           })
      .def("sources", [](const Routes& r, uint64_t out) {
        std::memcpy(pointer<Source>(out), r.from.data(), r.from.size() * sizeof(Source));
      })
      .def("counts_of_blocks", [](const Routes& r, uint64_t out) {
        std::memcpy(pointer<uint32_t>(out), r.came_for.data(), r.came_for.size() * 4);
      })
      .def("sent_by_blocks", [](const Routes& r, uint64_t out) {
        std::memcpy(pointer<uint32_t>(out), r.sent.data(), r.sent.size() * 4);
      });

  nb::class_<Lease>(m, "Lease").def_prop_ro("address", [](const Lease& lease) {
    return reinterpret_cast<uint64_t>(lease.data());
  });

  nb::class_<Operation>(m, "Operation")
      .def_ro("seq", &Operation::seq)
      .def_ro("rows", &Operation::rows)
      .def_ro("routes", &Operation::routes)
      .def_prop_ro("finished", [](const Operation& op) { return op.finished.load(); })
      .def_prop_ro("reserved", [](const Operation& op) { return op.slot != nullptr; })
      .def("x", [](const Operation& op, int code, const std::vector<int64_t>& shape) {
        return tensor(op.slot, op.use, op.x_at, Element(code), shape, {});
      })
      .def("scales", [](const Operation& op, int code, const std::vector<int64_t>& shape,
                        const std::vector<int64_t>& strides) {
        return tensor(op.slot, op.use, op.scales_at, Element(code), shape, strides);
      })
      .def("idx", [](const Operation& op, int code, const std::vector<int64_t>& shape) {
        return tensor(op.slot, op.use, op.idx_at, Element(code), shape, {});
      })
      .def("weights", [](const Operation& op, const std::vector<int64_t>& shape) {
        return tensor(op.slot, op.use, op.weights_at, Element::f32, shape);
      });

  nb::class_<Engine>(m, "Engine")
      .def("__init__",
           [](Engine* self, int rank, int ranks, int sources, int experts, int64_t expert_base, int first_rank,
              double timeout, bool mask, int64_t room, int policy, bool crowded, int all_ranks, nb::bytes token) {
             if (token.size() != 32) throw std::invalid_argument("the token must have 32 bytes");
             Config config{rank, ranks, sources, experts,        expert_base, first_rank, timeout,
                           mask, room,  Policy(policy), crowded, all_ranks};
             new (self) Engine(config, static_cast<const uint8_t*>(token.data()));
             // Handlers run on the process's first thread alone. Others have nothing to ask, and must not: whoever waits
             // for their call to end may have the interpreter.
             self->poll_signals = [] {
               if (syscall(SYS_gettid) != getpid()) return;
               nb::gil_scoped_acquire hold;
               if (PyErr_CheckSignals() != 0) throw Interrupted();
             };
           })
      .def("fd", &Engine::fd)
      .def("attach", &Engine::attach)
      .def("set_faults",
           [](Engine& self, const std::vector<std::tuple<int, int, int64_t, int, double>>& faults) {
             std::vector<Fault> list;
             for (const auto& [what, phase, seq, target, seconds] : faults)
               list.push_back({Fault::What(what), phase, seq, target, seconds});
             self.set_faults(list);
           })
      .def("dispatch",
           [](Engine& self, uint64_t x, int64_t tokens, int64_t stride, int64_t row_bytes, uint64_t scales,
              int64_t scales_stride, int64_t scale_bytes, uint64_t idx, int64_t topk, uint64_t weights, bool expand,
              int64_t alignment, int64_t worst, int64_t num_experts, const std::vector<int64_t>& begin,
              uint64_t positions, uint64_t sent, int code, int scales_code, bool now, bool weighted,
              std::shared_ptr<Routes> cached, const std::vector<uint64_t>& arguments) {
             DispatchCall call;
             call.x = pointer<const uint8_t>(x);
             call.tokens = tokens, call.stride = stride, call.row_bytes = row_bytes;
             call.scales = pointer<const uint8_t>(scales);
             call.scales_stride = scales_stride, call.scale_bytes = scale_bytes;
             call.idx = pointer<const int64_t>(idx);
             call.topk = topk;
             call.weights = pointer<const float>(weights);
             call.expand = expand, call.alignment = alignment, call.worst = worst, call.num_experts = num_experts;
             call.begin = begin;
             call.positions = pointer<const int32_t>(positions);
             call.sent = pointer<const uint32_t>(sent);
             call.cached = std::move(cached);
             set_arguments(call, arguments);
             std::shared_ptr<Operation> op;
             {
               nb::gil_scoped_release release;
               op = self.dispatch(call);
               if (now) self.finish(op);
             }
             const Routes& routes = *op->routes;
             const int64_t columns = row_bytes / element_bytes(Element(code));
             std::vector<int64_t> shape{op->rows};
             if (!expand) shape.push_back(topk);
             nb::object counts = worst != 0 ? nb::tuple() : integers(routes.recv_experts);
             nb::object sent_weights = nb::none(), sent_scales = nb::none();
             if (weighted) sent_weights = tensor(op->slot, nullptr, op->weights_at, Element::f32, shape);
             if (scales != 0 || scale_bytes != 0)
               sent_scales = tensor(op->slot, nullptr, op->scales_at, Element(scales_code), {op->rows, scale_bytes / 4});
             return nb::make_tuple(op, op->rows, tensor(op->slot, nullptr, op->x_at, Element(code), {op->rows, columns}),
                                   sent_scales, tensor(op->slot, nullptr, op->idx_at, Element::i64, shape), sent_weights,
                                   counts, routes.dropped);
           },
           nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
           nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
           nb::arg(), nb::arg().none(), nb::arg())
      .def("combine",
           [](Engine& self, uint64_t x, int64_t row_bytes, int64_t columns, int type, int out_type,
              std::shared_ptr<Routes> routes, uint64_t row_weights, uint64_t weights_out, uint64_t bias0,
              int64_t bias0_stride, uint64_t bias1, int64_t bias1_stride, uint64_t out, int64_t out_stride,
              bool gather, bool now, const std::vector<uint64_t>& arguments) {
             CombineCall call;
             call.x = pointer<const uint8_t>(x);
             call.row_bytes = row_bytes, call.columns = columns;
             call.type = Type(type), call.out_type = Type(out_type);
             call.routes = std::move(routes);
             call.row_weights = pointer<const float>(row_weights);
             call.weights_out = pointer<float>(weights_out);
             call.bias0 = pointer<const uint8_t>(bias0), call.bias0_stride = bias0_stride;
             call.bias1 = pointer<const uint8_t>(bias1), call.bias1_stride = bias1_stride;
             call.out = pointer<uint8_t>(out), call.out_stride = out_stride;
             call.gather = gather, call.now = now;
             set_arguments(call, arguments);
             nb::gil_scoped_release release;
             auto op = self.combine(call);
             if (now) self.finish(op);
             return op;
           })
      .def("packed_reserve",
           [](Engine& self, int64_t columns, int type, int cast, int64_t slots) {
             PackedCall call;
             call.columns = columns, call.type = Type(type), call.cast = cast, call.slots = slots;
             nb::gil_scoped_release release;
             return self.packed_reserve(call);
           })
      .def("packed_dispatch",
           [](Engine& self, uint64_t x, int64_t tokens, int64_t stride, int64_t columns, int type, int cast,
              uint64_t idx, int64_t topk, int64_t num_experts, int64_t slots, uint64_t stats, uint64_t waits,
              bool deferred, bool now, uint64_t count, uint64_t ranges, const std::vector<int64_t>& begin,
              uint64_t positions, std::shared_ptr<Operation> reserved, const std::vector<uint64_t>& arguments) {
             PackedCall call;
             call.begin = begin;
             call.positions = pointer<const int32_t>(positions);
             call.reserved = std::move(reserved);
             call.x = pointer<const uint8_t>(x);
             call.tokens = tokens, call.stride = stride, call.columns = columns;
             call.type = Type(type), call.cast = cast;
             call.idx = pointer<const int64_t>(idx);
             call.topk = topk, call.num_experts = num_experts, call.slots = slots;
             call.stats = pointer<int32_t>(stats), call.waits = pointer<int64_t>(waits);
             call.deferred = deferred;
             call.count = pointer<int32_t>(count), call.ranges = pointer<int64_t>(ranges);
             set_arguments(call, arguments);
             nb::gil_scoped_release release;
             auto op = self.packed_dispatch(call);
             if (now) {
               const auto use = op->use;  // for the tensors that are made of the result next
               self.finish(op);
               op->use = use;
             }
             return op;
           },
           nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
           nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg())
      .def("packed_combine",
           [](Engine& self, uint64_t x, int64_t columns, int64_t slots, int type, std::shared_ptr<Routes> routes,
              uint64_t idx, uint64_t weights, uint64_t out, int64_t out_stride, uint64_t waits,
              std::shared_ptr<Lease> lent, uint64_t ranges, bool gather, bool now, const std::vector<uint64_t>& arguments) {
             PackedCombineCall call;
             call.x = pointer<const uint8_t>(x);
             call.columns = columns, call.slots = slots, call.type = Type(type);
             call.routes = std::move(routes);
             call.idx = pointer<const int64_t>(idx), call.weights = pointer<const float>(weights);
             call.out = pointer<uint8_t>(out), call.out_stride = out_stride;
             call.waits = pointer<int64_t>(waits);
             call.lent = std::move(lent);
             call.now = now, call.gather = gather;
             call.ranges = pointer<const int64_t>(ranges);
             set_arguments(call, arguments);
             nb::gil_scoped_release release;
             auto op = self.packed_combine(call);
             if (now) self.finish(op);
             return op;
           },
           nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
           nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg())
      .def("lend", &Engine::lend)
      .def_static("lent_tensor",
                  [](std::shared_ptr<Lease> lease, int code, const std::vector<int64_t>& shape) {
                    return tensor(lease, nullptr, 0, Element(code), shape);
                  })
      .def("finish", &Engine::finish, nb::call_guard<nb::gil_scoped_release>())
      .def("refuse",
           [](Engine& self, const std::string& argument, const std::string& got, const std::string& legal) {
             Text text{};
             std::strncpy(text.argument, argument.c_str(), sizeof text.argument - 1);
             std::strncpy(text.got, got.c_str(), sizeof text.got - 1);
             std::strncpy(text.legal, legal.c_str(), sizeof text.legal - 1);
             nb::gil_scoped_release release;
             self.refuse(text);
           })
      .def("set_mask", &Engine::set_mask, nb::call_guard<nb::gil_scoped_release>())
      .def("masked", [](const Engine& self) {
        nb::list list;
        for (bool one : self.masked()) list.append(one);
        return list;
      })
      .def("records", [](Engine& self, int rank) { return record_list(self.records(rank)); })
      .def("bytes", &Engine::bytes)
      .def("in_use", &Engine::in_use)
      .def("close", &Engine::close, nb::call_guard<nb::gil_scoped_release>());

  m.def("inspect", [](int fd) {
    const Glimpse seen = inspect(fd);
    return nb::make_tuple(seen.group, seen.pid, seen.rank, seen.ranks, seen.first_rank, seen.all_ranks, seen.timeout,
                          seen.states, record_list(seen.records));
  });

  // Single kernels, for tests and measurements.
  m.def("copy_streaming", [](uint64_t to, uint64_t from, size_t bytes) {
    nb::gil_scoped_release release;
    copy_streaming(pointer<void>(to), pointer<const void>(from), bytes);
    fence();
  });
  m.def("cast_fp8", [](uint64_t out, uint64_t scales, uint64_t rows, int64_t count, int64_t columns, int64_t words,
                       int type, int cast) {
    for (int64_t i = 0; i < count; ++i)
      cast_fp8(pointer<uint8_t>(out) + i * columns, pointer<uint32_t>(scales) + i * words,
               pointer<uint8_t>(rows) + i * columns * int64_t(type_bytes(Type(type))), Type(type), size_t(columns),
               cast >= 2, cast == 3);
  });
  m.def("sum_rows", [](uint64_t out, int out_type, const std::vector<uint64_t>& rows, int type, int64_t columns) {
    std::vector<const void*> list;
    for (uint64_t row : rows) list.push_back(pointer<const void>(row));
    reduce(pointer<void>(out), Type(out_type), list.data(), nullptr, int(list.size()), nullptr, nullptr, Type(type),
           size_t(columns));
  });
}
