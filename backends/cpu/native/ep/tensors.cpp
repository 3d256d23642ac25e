#include "tensors.h"

namespace nb = nanobind;

namespace hal_ep {
namespace {

// The stable part of the DLPack interface, version 0: what a capsule named "dltensor" points to.
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } element;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DlManagedTensor {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManagedTensor*);
};

constexpr int32_t kHost = 1;
constexpr int kMostDimensions = 3;

struct Made {
  DlManagedTensor managed;
  int64_t shape[kMostDimensions], strides[kMostDimensions];
  std::shared_ptr<Lease> lease;
  std::shared_ptr<int> use;
};

void let_go(DlManagedTensor* managed) { delete static_cast<Made*>(managed->context); }

// Of a capsule that nobody took: torch renames those it takes.
void drop_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor"))
    let_go(static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor")));
}

void set_element(DlTensor& tensor, Element element) {
  switch (element) {
    case Element::bf16: tensor.element = {4, 16, 1}; break;
    case Element::f16: tensor.element = {2, 16, 1}; break;
    case Element::f32: tensor.element = {2, 32, 1}; break;
    case Element::u8: tensor.element = {1, 8, 1}; break;
    case Element::i32: tensor.element = {0, 32, 1}; break;
    case Element::i64: tensor.element = {0, 64, 1}; break;
  }
}

}  // namespace

nb::object tensor(const std::shared_ptr<Lease>& lease, const std::shared_ptr<int>& use, uint64_t at, Element element,
                  const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  // Never let go: the interpreter's end would have it outlive what it needs.
  static PyObject* const take = nb::object(nb::module_::import_("torch.utils.dlpack").attr("from_dlpack")).release().ptr();
  if (shape.size() > kMostDimensions) throw std::invalid_argument("a tensor of more than three dimensions");
  auto* made = new Made{};
  made->lease = lease, made->use = use;
  made->managed.context = made;
  made->managed.deleter = let_go;
  DlTensor& inner = made->managed.tensor;
  inner.data = lease->data() + at;
  inner.device_type = kHost;
  inner.dimensions = int32_t(shape.size());
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    made->shape[i] = shape[i];
    made->strides[i] = strides.empty() ? step : strides[i];
    step *= shape[i];
  }
  inner.shape = made->shape, inner.strides = made->strides;
  set_element(inner, element);
  nb::object capsule = nb::steal(PyCapsule_New(&made->managed, "dltensor", drop_capsule));
  return nb::handle(take)(capsule);
}

}  // namespace hal_ep
