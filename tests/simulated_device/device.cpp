// A simulated accelerator for torch: memory of its own kind, the CPU's kernels, a refusal of
// whatever mixes it with the CPU, and an account of what moves or waits.
//
// A kernel is borrowed by showing the CPU an alias of each tensor: the same bytes, sizes and
// strides under the CPU's name. So writes land where they should and nothing is copied; what
// the kernel made is given the device's name, and what it returned of its arguments (a view,
// the tensor itself) stays a view of the device's storage.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/native_dropout.h>
#include <ATen/ops/rand_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::Device HERE{KIND, 0};

// ---- what is counted -------------------------------------------------------------------

enum Event { TO_DEVICE, TO_HOST, SCALAR, WAIT };
using Listener = void (*)(int event, int64_t bytes);
std::atomic<Listener> listener{nullptr};

void tell(Event event, int64_t bytes = 0) {
  if (auto heard = listener.load()) heard(event, bytes);
}

// What waits for CUDA: its shape depends on its numbers, or its success is looked at.
const std::set<std::string> WAITING = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::equal", "aten::bincount",
    "aten::repeat_interleave", "aten::_linalg_eigh", "aten::linalg_eig", "aten::_linalg_eigvals",
    "aten::_linalg_svd", "aten::linalg_lstsq"};

// ---- memory ----------------------------------------------------------------------------

std::atomic<int64_t> allocated{0}, capacity{int64_t{8} << 30};

void take(int64_t bytes) {
  const auto before = allocated.fetch_add(bytes);
  if (before + bytes <= capacity) return;
  allocated -= bytes;
  TORCH_CHECK_WITH(OutOfMemoryError, false, "sim out of memory. Tried to allocate ", bytes,
                   " bytes; ", capacity - before, " bytes of ", capacity, " are free.");
}

struct Owned {  // bytes and how to be rid of them
  c10::DataPtr bytes;
  int64_t size;
  ~Owned() { allocated -= size; }
};

c10::DataPtr under_device_name(c10::DataPtr bytes, int64_t size) {
  take(size);
  void* at = bytes.get();
  auto* owned = new Owned{std::move(bytes), size};
  return {at, owned, [](void* it) { delete static_cast<Owned*>(it); }, HERE};
}

struct Memory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t size) override {
    return under_device_name(c10::GetCPUAllocator()->allocate(size), size);
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return {}; }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override {}
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    return {capacity - allocated, capacity};
  }
};
Memory memory;

struct Pinned final : c10::Allocator {  // host memory that knows its own addresses
  static inline std::mutex door;
  static inline std::set<const void*> held;
  c10::DataPtr allocate(size_t size) override {
    void* at = std::malloc(size ? size : 1);
    std::lock_guard<std::mutex> inside(door);
    held.insert(at);
    return {at, at, &release, c10::Device(c10::kCPU)};
  }
  static void release(void* at) {
    {
      std::lock_guard<std::mutex> inside(door);
      held.erase(at);
    }
    std::free(at);
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
};
Pinned pinned;

// ---- generators, streams, hooks --------------------------------------------------------

struct DeviceGenerator final : c10::GeneratorImpl {  // a CPU generator under the device's name
  at::Generator inner;
  explicit DeviceGenerator(at::Generator g)
      : GeneratorImpl(HERE, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), inner(std::move(g)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  GeneratorImpl* clone_impl() const override { return new DeviceGenerator(inner.clone()); }
};

at::Generator new_generator() {
  return at::make_generator<DeviceGenerator>(at::detail::createCPUGenerator());
}
const at::Generator& default_generator() {
  static const at::Generator one = new_generator();
  return one;
}
at::Generator on_cpu(const at::Generator& g) {
  TORCH_CHECK(g.device() == HERE, "Expected a 'sim' device type for generator but found '", g.device(), "'");
  return static_cast<DeviceGenerator*>(g.unsafeGetGeneratorImpl())->inner;
}

thread_local int64_t stream = 0;  // streams keep order: they are known by number only
std::atomic<int64_t> streams{0};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::Stream numbered(int64_t id) const { return c10::Stream(c10::Stream::UNSAFE, HERE, id); }
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return HERE; }
  c10::Device getDevice() const override { return HERE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return numbered(stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return numbered(0); }
  c10::Stream getNewStream(c10::Device, int) const override { return numbered(++streams); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return numbered(++streams); }
  c10::Stream exchangeStream(c10::Stream s) const override { return numbered(std::exchange(stream, s.id())); }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = this->name();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { tell(WAIT); }
  void synchronizeEvent(void*) const override { tell(WAIT); }
  void synchronizeDevice(const c10::DeviceIndex) const override { tell(WAIT); }
  static void* name() {
    static int one;
    return &one;
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Device getDeviceFromPtr(void*) const override { return HERE; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return new_generator(); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  bool isPinnedPtr(const void* at) const override {
    std::lock_guard<std::mutex> inside(Pinned::door);
    return Pinned::held.count(at) > 0;
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto fresh = memory.allocate(size);
    std::memcpy(fresh.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
};

// ---- one tensor under two names --------------------------------------------------------

Tensor shaped(c10::Storage storage, c10::DispatchKey key, const Tensor& like) {
  c10::DispatchKeySet keys(key);
  if (like._is_zerotensor()) keys = keys.add(c10::DispatchKey::ZeroTensor);
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  auto* impl = out.unsafeGetTensorImpl();
  impl->set_storage_offset(like.storage_offset());
  impl->set_sizes_and_strides(like.sizes(), like.strides());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  if (like.is_conj()) out._set_conj(true);
  if (like.is_neg()) out._set_neg(true);
  return out;
}

class Borrowing {  // the storages of one call, in both names
 public:
  Tensor to_cpu(const Tensor& t) {
    if (!t.defined() || t.device().is_cpu() || t.device().is_meta()) return t;
    auto* own = t.storage().unsafeGetStorageImpl();
    auto& alias = cpu_[own];
    if (!alias) {
      alias = c10::Storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(),
                           c10::DataPtr(own->_mutable_data_ptr_no_checks().get(), c10::Device(c10::kCPU)), c10::GetCPUAllocator(), true);
      device_[alias.unsafeGetStorageImpl()] = t.storage();
    }
    return shaped(alias, c10::DispatchKey::CPU, t);
  }
  Tensor to_device(const Tensor& t) {
    if (!t.defined() || !t.device().is_cpu()) return t;
    auto& own = device_[t.storage().unsafeGetStorageImpl()];
    if (!own) {
      auto bytes = std::make_unique<c10::Storage>(t.storage());
      void* at = bytes->mutable_data();
      c10::DataPtr kept(at, bytes.release(), [](void* it) { delete static_cast<c10::Storage*>(it); },
                        c10::Device(c10::kCPU));
      own = c10::Storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(),
                         under_device_name(std::move(kept), t.storage().nbytes()), &memory, true);
    }
    return shaped(own, c10::DispatchKey::PrivateUse1, t);
  }
  void written(const Tensor& t, const Tensor& alias) {  // a kernel may have resized its output
    if (!t.defined() || t.device().is_cpu()) return;
    auto* own = t.storage().unsafeGetStorageImpl();
    const auto& now = alias.storage();
    if (now.data() != own->data()) {
      auto bytes = memory.allocate(now.nbytes());
      std::memcpy(bytes.get(), now.data(), now.nbytes());
      own->set_data_ptr(std::move(bytes));
      own->set_nbytes(now.nbytes());
    }
    if (t.sizes() != alias.sizes() || t.strides() != alias.strides())
      t.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides());
  }

 private:
  std::unordered_map<c10::StorageImpl*, c10::Storage> cpu_;
  std::unordered_map<c10::StorageImpl*, c10::Storage> device_;
};

// ---- the kernel of everything ----------------------------------------------------------

// Of the host's tensors a kernel of an accelerator takes numbers without axes only, and not as
// what it writes to or looks up; indices alone may lie there, and are sent.
const std::set<std::string> LOOKS_UP = {"aten::index_select", "aten::gather",    "aten::scatter",
                                        "aten::scatter_",     "aten::take",      "aten::index_add",
                                        "aten::index_copy",   "aten::embedding", "aten::searchsorted"};

void refuse_mixing(const c10::OperatorHandle& op, const std::vector<c10::IValue>& arguments) {
  const auto& schema = op.schema();
  const bool strict = LOOKS_UP.count(schema.name());
  bool ours = false, cpu = false;
  auto see = [&](const Tensor& t, bool whole) {
    if (!t.defined() || t.device().is_meta()) return;
    if (!t.device().is_cpu()) ours = true;
    else if (t.dim() || whole) cpu = true;
  };
  for (size_t k = 0; k < arguments.size(); ++k) {
    const auto& a = arguments[k];
    const auto* info = schema.arguments()[k].alias_info();
    const bool whole = strict || (info && info->isWrite());
    if (a.isTensor()) see(a.toTensor(), whole);
    else if (a.isTensorList()) for (const Tensor& t : a.toTensorVector()) see(t, whole);
    else if (a.isGenerator()) ours = ours || a.toGenerator().device() == HERE;
    else if (a.isOptionalTensorList())
      for (const OptionalTensor& t : a.toOptionalTensorVector()) {
        if (!t || !t->defined()) continue;
        if (!t->device().is_cpu()) ours = true;
        if (t->scalar_type() == at::kBool || t->scalar_type() == at::kByte) tell(WAIT);
      }
  }
  TORCH_CHECK(!(ours && cpu), "Expected all tensors to be on the same device, but ", schema.name(),
              " found sim:0 and cpu");
}

c10::IValue on_cpu(Borrowing& names, const c10::IValue& a, bool draws) {
  if (a.isTensor()) return names.to_cpu(a.toTensor());
  if (a.isTensorList()) {
    c10::List<Tensor> out;
    for (const Tensor& t : a.toTensorVector()) out.push_back(names.to_cpu(t));
    return out;
  }
  if (a.isOptionalTensorList()) {
    c10::List<OptionalTensor> out;
    for (const OptionalTensor& t : a.toOptionalTensorVector())
      out.push_back(t ? OptionalTensor(names.to_cpu(*t)) : t);
    return out;
  }
  if (a.isDevice()) return c10::Device(c10::kCPU);
  if (a.isGenerator()) return on_cpu(a.toGenerator());
  if (draws && a.isNone()) return on_cpu(default_generator());
  return a;
}

c10::IValue on_device(Borrowing& names, const c10::IValue& out) {
  if (out.isTensor()) return names.to_device(out.toTensor());
  if (!out.isTensorList()) return out;
  c10::List<Tensor> list;
  for (const Tensor& t : out.toTensorVector()) list.push_back(names.to_device(t));
  return list;
}

void borrow(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto count = schema.arguments().size();
  const std::vector<c10::IValue> given(stack->end() - count, stack->end());
  refuse_mixing(op, given);
  if (WAITING.count(schema.name())) tell(WAIT);

  Borrowing names;
  const auto begin = stack->size() - count;
  std::vector<c10::IValue> lent;
  for (size_t k = 0; k < count; ++k) {
    const bool draws = schema.arguments()[k].type()->str().find("Generator") != std::string::npos;
    lent.push_back(on_cpu(names, given[k], draws));
    (*stack)[begin + k] = lent[k];
  }
  {
    c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
    op.callBoxed(stack);
  }
  auto writes = [&](const c10::AliasInfo* info) { return info && info->isWrite(); };
  for (size_t k = 0; k < count; ++k) {
    if (!writes(schema.arguments()[k].alias_info())) continue;
    if (given[k].isTensor()) names.written(given[k].toTensor(), lent[k].toTensor());
    else if (given[k].isTensorList())
      for (size_t i = 0; i < given[k].toTensorList().size(); ++i)
        names.written(given[k].toTensorList().get(i), lent[k].toTensorList().get(i));
  }
  const auto results = schema.returns().size();
  for (size_t r = 0; r < results; ++r) {
    auto& out = (*stack)[stack->size() - results + r];
    const auto* info = schema.returns()[r].alias_info();
    out = on_device(names, out);
    if (!writes(info)) continue;
    for (size_t k = 0; k < count; ++k) {  // an output that was given is returned itself
      const auto* its = schema.arguments()[k].alias_info();
      if (its && its->isWrite() && its->beforeSets() == info->beforeSets()) out = given[k];
    }
  }
}

// ---- what the CPU has no kernel for, or what crosses the border -------------------------

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (from.device() != to.device()) tell(to.device() == HERE ? TO_DEVICE : TO_HOST, from.nbytes());
  Borrowing names;
  if (from.numel()) names.to_cpu(to).copy_(names.to_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const Tensor& t) {
  tell(SCALAR, t.itemsize());
  return Borrowing().to_cpu(t).item();
}

Tensor& set_storage(Tensor& t, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  TORCH_CHECK(source.device() == HERE, "Expected all tensors to be on the same device, but set_ found sim:0 and ",
              source.device());
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  t.unsafeGetTensorImpl()->set_storage_offset(offset);
  if (stride.empty() && size.size()) t.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  else t.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return t;
}
Tensor& set_whole_storage(Tensor& t, at::Storage source) {
  const int64_t length = source.nbytes() / t.itemsize();
  return set_storage(t, std::move(source), 0, {length}, {1});
}
Tensor& set_tensor(Tensor& t, const Tensor& source) {
  return set_storage(t, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}
Tensor& set_nothing(Tensor& t) { return set_tensor(t, at::empty({0}, t.options())); }

Tensor zeros_without_memory(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                            std::optional<c10::Device>, std::optional<bool>) {
  at::native::ZeroTensorAllocator nothing(HERE);
  c10::DispatchKeySet keys({c10::DispatchKey::PrivateUse1, c10::DispatchKey::ZeroTensor});
  auto out = at::detail::empty_generic(size, &nothing, keys, c10::dtype_or_default(dtype), std::nullopt);
  return out;
}

std::tuple<Tensor, Tensor> dropout(const Tensor& x, double p, std::optional<bool> train) {
  if (!train.value_or(true)) return {x.clone(), at::empty({0}, x.options().dtype(at::kBool))};
  auto kept = at::rand_like(x).ge(p);
  return {x * kept * (p == 1 ? 0. : 1. / (1. - p)), kept};
}

Tensor with(const Tensor& a, const Tensor& b, const OptionalTensor& first, const OptionalTensor& second) {
  auto sum = a + b;
  if (first && first->defined()) sum = sum + *first;
  if (second && second->defined()) sum = sum + *second;
  return sum;
}

using Three = std::tuple<Tensor, Tensor, Tensor>;

Three lstm_cell(const Tensor& a, const Tensor& b, const Tensor& before, const OptionalTensor& ba, const OptionalTensor& bb) {
  auto gates = with(a, b, ba, bb).chunk(4, 1);
  auto in = gates[0].sigmoid(), forget = gates[1].sigmoid(), cell = gates[2].tanh(), out = gates[3].sigmoid();
  auto now = forget * before + in * cell;
  return {out * now.tanh(), now, at::cat({in, forget, cell, out}, 1)};
}

Three lstm_cell_backward(const OptionalTensor& dh, const OptionalTensor& dc, const Tensor& before, const Tensor& now,
                         const Tensor& kept, bool biased) {
  auto w = kept.chunk(4, 1);
  auto &in = w[0], &forget = w[1], &cell = w[2], &out = w[3];
  auto h = dh && dh->defined() ? *dh : at::zeros_like(now);
  auto bent = now.tanh();
  auto d = h * out * (1 - bent * bent);
  if (dc && dc->defined()) d = d + *dc;
  auto gates = at::cat({d * cell * in * (1 - in), d * before * forget * (1 - forget), d * in * (1 - cell * cell),
                        h * bent * out * (1 - out)}, 1);
  return {gates, d * forget, biased ? gates.sum(0) : Tensor()};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor& a, const Tensor& b, const Tensor& before, const OptionalTensor& ba,
                                    const OptionalTensor& bb) {
  auto x = (ba && ba->defined() ? a + *ba : a).chunk(3, 1), h = (bb && bb->defined() ? b + *bb : b).chunk(3, 1);
  auto reset = (x[0] + h[0]).sigmoid(), update = (x[1] + h[1]).sigmoid();
  auto fresh = (x[2] + reset * h[2]).tanh();
  return {fresh + update * (before - fresh), at::cat({reset, update, fresh, before, h[2]}, 1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& dh, const Tensor& kept, bool biased) {
  auto w = kept.chunk(5, 1);
  auto &reset = w[0], &update = w[1], &fresh = w[2], &before = w[3], &from_hidden = w[4];
  auto dfresh = dh * (1 - update) * (1 - fresh * fresh);
  auto dupdate = dh * (before - fresh) * update * (1 - update);
  auto dreset = dfresh * from_hidden * reset * (1 - reset);
  auto x = at::cat({dreset, dupdate, dfresh}, 1), h = at::cat({dreset, dupdate, dfresh * reset}, 1);
  return {x, h, dh * update, biased ? x.sum(0) : Tensor(), biased ? h.sum(0) : Tensor()};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_", set_nothing);
  m.impl("_efficientzerotensor", zeros_without_memory);
  m.impl("native_dropout", dropout);
  m.impl("_thnn_fused_lstm_cell", lstm_cell);
  m.impl("_thnn_fused_lstm_cell_backward_impl", lstm_cell_backward);
  m.impl("_thnn_fused_gru_cell", gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", gru_cell_backward);
  for (const char* whole : {"convolution", "convolution_backward"})  // not in parts of a backend
    m.impl(whole, torch::CppFunction::makeFromBoxedFunction<&borrow>());
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&borrow>()); }

TORCH_LIBRARY(simulated_device, m) {
  m.def("generator() -> Generator?", [] { return default_generator(); });
}

struct Register {
  Register() {
    c10::SetAllocator(KIND, &memory);
    at::RegisterPrivateUse1HooksInterface(new Hooks());
    static c10::impl::DeviceGuardImplRegistrar guard(KIND, new Guard());
  }
} registered;

}  // namespace

extern "C" {
void listen(void (*heard)(int, int64_t)) { listener = heard; }
void set_capacity(int64_t bytes) { capacity = bytes; }
}
