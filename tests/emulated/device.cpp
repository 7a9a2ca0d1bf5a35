// An accelerator that is none: torch's PrivateUse1 backend on host memory.
//
// Values are the CPU's, rules are a GPU's: tensors of two devices do not mix, nothing is read on the host without being
// seen, new memory holds no numbers (every byte is 0xFF: NaN), backward runs in a thread of the device. Operators run as
// the CPU's kernels on the same memory: each tensor is shown to them as a CPU tensor of the same bytes, and what they
// return becomes a device tensor again, views included.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <set>
#include <unordered_map>

namespace {

using at::IntArrayRef;
using at::Scalar;
using at::ScalarType;
using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::IValue;
using c10::Storage;

constexpr DeviceType EMULATED = DeviceType::PrivateUse1;
const Device HERE(EMULATED, 0);

// ---- What Python listens to --------------------------------------------------------------------------------------

std::atomic<void (*)(const char*)> listener{nullptr};

void tell(const std::string& what) {
  if (auto heard = listener.load()) {
    heard(what.c_str());
  }
}

// Names of operators, "add.Tensor": those that take single numbers from the CPU, and those for which a GPU waits.
std::set<std::string> iterators, waiting;

// ---- Memory ------------------------------------------------------------------------------------------------------

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) {
      return {nullptr, nullptr, &free, HERE};
    }
    void* data = c10::alloc_cpu(size);
    std::memset(data, 0xFF, size);
    return {data, data, &free, HERE};
  }
  static void free(void* data) {
    c10::free_cpu(data);
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &free;
  }
  void copy_data(void* to, const void* from, size_t count) const override {
    std::memcpy(to, from, count);
  }
};

Memory memory;
REGISTER_ALLOCATOR(EMULATED, &memory);

void grow(const Storage& storage, size_t size) {
  if (storage.nbytes() >= size) {
    return;
  }
  c10::DataPtr larger = memory.allocate(size);
  if (storage.nbytes() > 0) {
    std::memcpy(larger.get(), storage.data(), storage.nbytes());
  }
  auto* impl = storage.unsafeGetStorageImpl();
  impl->set_data_ptr_noswap(std::move(larger));
  impl->set_nbytes(size);
}

// ---- The device: one, with one stream, whose work is done when it is asked for ---------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return EMULATED; }
  Device exchangeDevice(Device) const override { return HERE; }
  Device getDevice() const override { return HERE; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  c10::Stream getDefaultStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  c10::Stream getNewStream(Device, int = 0) const override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { tell("synchronize"); }
  void synchronizeEvent(void*) const override { tell("synchronize"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { tell("synchronize"); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// A generator of the device; its numbers are those of a CPU generator with the same seed.
struct Random final : c10::GeneratorImpl {
  explicit Random(at::Generator own) : GeneratorImpl(HERE, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), own(own) {}
  void set_current_seed(uint64_t seed) override { own.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { own.set_offset(offset); }
  uint64_t get_offset() const override { return own.get_offset(); }
  uint64_t current_seed() const override { return own.current_seed(); }
  uint64_t seed() override { return own.seed(); }
  void set_state(const c10::TensorImpl& state) override { own.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return own.unsafeGetGeneratorImpl()->get_state(); }
  GeneratorImpl* clone_impl() const override { return new Random(own.clone()); }
  at::Generator own;
};

at::Generator new_generator() {
  return at::make_generator<Random>(at::detail::createCPUGenerator());
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  Device getDeviceFromPtr(void*) const override { return HERE; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return new_generator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator generator = new_generator();
    return generator;
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void resizePrivateUse1Bytes(const Storage& storage, size_t size) const override { grow(storage, size); }
};

Hooks hooks;
[[maybe_unused]] const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

// ---- One call of a CPU kernel on device tensors -----------------------------------------------------------------------

bool on_device(const Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == EMULATED;
}

class Call {
 public:
  // The same bytes as a CPU tensor. The storage can be resized, as results given by `out` are.
  Tensor shown(const Tensor& tensor) {
    if (!on_device(tensor)) {
      return tensor;
    }
    const Storage& storage = tensor.storage();
    Storage& twin = twins_[storage.unsafeGetStorageImpl()];
    if (!twin) {
      c10::DataPtr data(const_cast<void*>(storage.data()), Device(DeviceType::CPU));
      twin = Storage(
          c10::make_intrusive<c10::StorageImpl>(
              c10::StorageImpl::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(), true));
      owner_.emplace(twin.unsafeGetStorageImpl(), storage);
    }
    Tensor made = tensor_of(twin, c10::DispatchKey::CPU, tensor);
    shown_.emplace_back(tensor, made);
    return made;
  }

  // A result as a device tensor: an argument itself, a view of one, or new.
  Tensor taken(const Tensor& result) {
    if (!result.defined() || result.device().type() != DeviceType::CPU) {
      return result;
    }
    for (const auto& [original, made] : shown_) {
      if (made.is_same(result)) {
        return original;
      }
    }
    auto owner = owner_.find(result.storage().unsafeGetStorageImpl());
    return tensor_of(owner != owner_.end() ? owner->second : adopted(result), c10::DispatchKey::PrivateUse1, result);
  }

  // Arguments that were resized, or got other strides.
  void settle() {
    for (auto& [original, made] : shown_) {
      const Storage& storage = original.storage();
      if (made.storage().data() != storage.data()) {
        grow(storage, made.storage().nbytes());
        std::memcpy(storage.mutable_data(), made.storage().data(), made.storage().nbytes());
      }
      if (made.sizes() != original.sizes() || made.strides() != original.strides() ||
          made.storage_offset() != original.storage_offset()) {
        auto* impl = original.unsafeGetTensorImpl();
        impl->set_sizes_and_strides(made.sizes(), made.strides(), made.storage_offset());
      }
    }
  }

 private:
  static Tensor tensor_of(const Storage& storage, c10::DispatchKey key, const Tensor& like) {
    auto made = at::detail::make_tensor<c10::TensorImpl>(Storage(storage), c10::DispatchKeySet(key), like.dtype());
    auto* impl = made.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    if (like.unsafeGetTensorImpl()->is_wrapped_number()) {
      impl->set_wrapped_number(true);
    }
    return made;
  }

  // Memory of the CPU becomes memory of the device, without a copy.
  static Storage adopted(const Tensor& result) {
    auto* kept = new Storage(result.storage());
    c10::DataPtr data(
        kept->mutable_data(), kept, [](void* held) { delete static_cast<Storage*>(held); }, HERE);
    return Storage(
        c10::make_intrusive<c10::StorageImpl>(
            c10::StorageImpl::use_byte_size_t(), kept->nbytes(), std::move(data), &memory, true));
  }

  std::unordered_map<c10::StorageImpl*, Storage> twins_;
  std::unordered_map<c10::StorageImpl*, Storage> owner_;
  std::vector<std::pair<Tensor, Tensor>> shown_;
};

// ---- What a GPU refuses, and what it waits for -------------------------------------------------------------------------

struct Rules {
  std::string name; // "add.Tensor"
  bool numbers = false; // takes tensors without dimensions from the CPU
  bool indexes = false; // takes indices from the CPU
  bool multiplies = false; // knows no integers
  bool waits = false;
};

const Rules& rules_of(const c10::OperatorHandle& op) {
  static std::mutex lock;
  static std::unordered_map<c10::OperatorName, Rules> known;
  std::lock_guard<std::mutex> held(lock);
  auto found = known.find(op.operator_name());
  if (found == known.end()) {
    Rules rules;
    const auto& full = op.operator_name();
    std::string base = full.name.substr(full.name.find("::") + 2);
    rules.name = full.overload_name.empty() ? base : base + "." + full.overload_name;
    rules.numbers = iterators.count(rules.name) > 0;
    rules.waits = waiting.count(base) > 0;
    rules.indexes = base == "index" || base == "index_put" || base == "index_put_" || base == "_index_put_impl_" ||
        base == "_unsafe_index" || base == "_unsafe_index_put";
    rules.multiplies = base == "mm" || base == "bmm" || base == "addmm" || base == "addmm_" || base == "baddbmm" ||
        base == "baddbmm_" || base == "addmv" || base == "dot" || base == "_addmm_activation";
    found = known.emplace(full, std::move(rules)).first;
  }
  return found->second;
}

void refuse(const Rules& rules, const Tensor& tensor, bool written) {
  bool number = rules.numbers && tensor.dim() == 0 && !written;
  TORCH_CHECK(
      number, "Expected all tensors to be on the same device, but found at least two devices, emulated:0 and ",
      tensor.device(), " (a tensor of ", tensor.dim(), " dimensions, ", tensor.scalar_type(), ", in aten::", rules.name, ")");
}

void look_at_indices(const Tensor& self, const Tensor& index, bool puts, bool alone) {
  if (!on_device(index)) {
    TORCH_CHECK(on_device(self), "indices should be either on cpu or on the same device as the indexed tensor");
  }
  if (puts) { // reading shows the same steps by itself
    if (!on_device(index)) {
      tell("to device");
    }
    if (!alone && (index.scalar_type() == at::kBool || index.scalar_type() == at::kByte)) {
      tell("nonzero");
    }
  }
}

void check(const c10::OperatorHandle& op, const Rules& rules, const torch::jit::Stack& stack, size_t begin) {
  const auto& arguments = op.schema().arguments();
  bool any = false;
  auto each = [&](auto&& visit) {
    for (size_t i = 0; i < arguments.size(); i++) {
      const IValue& value = stack[begin + i];
      bool written = arguments[i].alias_info() && arguments[i].alias_info()->isWrite();
      if (value.isTensor() && value.toTensor().defined()) {
        visit(value.toTensor(), written);
      } else if (value.isTensorList()) {
        for (const Tensor& tensor : value.toTensorVector()) {
          visit(tensor, written);
        }
      }
    }
  };
  each([&](const Tensor& tensor, bool) { any = any || on_device(tensor); });
  if (rules.indexes) {
    const Tensor& self = stack[begin].toTensor();
    TORCH_CHECK(on_device(self), "indices should be on the device of the indexed tensor (", self.device(), ")");
    bool puts = arguments.size() > 3 && stack[begin + 2].isTensor() && stack[begin + 3].isBool();
    bool single = puts && stack[begin + 2].toTensor().numel() == 1 && !stack[begin + 3].toBool();
    size_t count = 0;
    for (const auto& index : stack[begin + 1].toOptionalTensorVector()) {
      count += index.has_value() && index->defined();
    }
    for (const auto& index : stack[begin + 1].toOptionalTensorVector()) {
      if (index.has_value() && index->defined()) {
        look_at_indices(self, *index, puts, single && count == 1);
      }
    }
  }
  each([&](const Tensor& tensor, bool written) {
    if (any && !on_device(tensor)) {
      refuse(rules, tensor, written);
    }
    TORCH_CHECK(
        !rules.multiplies || !c10::isIntegralType(tensor.scalar_type(), true), "aten::", rules.name,
        ": a GPU does not multiply matrices of ", tensor.scalar_type());
  });
  if (rules.waits) {
    tell(rules.name);
  }
}

// ---- Every operator without a kernel of its own -------------------------------------------------------------------------

IValue shown_value(Call& call, const IValue& value) {
  if (value.isTensor()) {
    return value.toTensor().defined() ? IValue(call.shown(value.toTensor())) : value;
  }
  if (value.isTensorList()) {
    c10::List<Tensor> made;
    for (const Tensor& tensor : value.toTensorVector()) {
      made.push_back(call.shown(tensor));
    }
    return made;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> made;
    for (const auto& tensor : value.toOptionalTensorVector()) {
      made.push_back(tensor.has_value() ? std::optional<Tensor>(call.shown(*tensor)) : std::nullopt);
    }
    return made;
  }
  if (value.isDevice() && value.toDevice().type() == EMULATED) {
    return Device(DeviceType::CPU);
  }
  if (value.isGenerator() && value.toGenerator().device().type() == EMULATED) {
    return value.toGenerator().get<Random>()->own;
  }
  return value;
}

IValue taken_value(Call& call, const IValue& value) {
  if (value.isTensor()) {
    return call.taken(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<Tensor> made;
    for (const Tensor& tensor : value.toTensorVector()) {
      made.push_back(call.taken(tensor));
    }
    return made;
  }
  return value;
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  const size_t begin = stack->size() - op.schema().arguments().size();
  check(op, rules_of(op), *stack, begin);
  Call call;
  for (size_t i = begin; i < stack->size(); i++) {
    (*stack)[i] = shown_value(call, (*stack)[i]);
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.settle();
  for (size_t i = begin; i < stack->size(); i++) {
    (*stack)[i] = taken_value(call, (*stack)[i]);
  }
}

// ---- Operators with kernels of their own ---------------------------------------------------------------------------------

Tensor empty(
    IntArrayRef size, std::optional<ScalarType> dtype, std::optional<at::Layout>, std::optional<Device>,
    std::optional<bool> pinned, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pinned.value_or(false), "only memory of the CPU can be pinned");
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device>, std::optional<bool> pinned) {
  TORCH_CHECK(!pinned.value_or(false), "only memory of the CPU can be pinned");
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView below;
  TORCH_CHECK(on_device(from) || from.is_cpu(), "cannot copy from ", from.device());
  TORCH_CHECK(on_device(to) || to.is_cpu(), "cannot copy to ", to.device());
  if (from.numel() > 0 && on_device(from) != on_device(to)) {
    tell(std::string(on_device(from) ? "to host" : "to device") + (non_blocking ? ", not waited for" : ""));
  }
  Call call;
  call.shown(to).copy_(call.shown(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

Scalar item(const Tensor& tensor) {
  tell("item");
  Call call;
  return call.shown(tensor).item();
}

const Tensor& resize(const Tensor& tensor, IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  grow(tensor.storage(), (tensor.storage_offset() + tensor.numel()) * tensor.itemsize());
  return tensor;
}

Tensor& set_place(Tensor& self, Storage from, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  TORCH_CHECK(from.device() == self.device(), "set_: storage on ", from.device(), ", tensor on ", self.device());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(from));
  impl->set_storage_offset(offset);
  if (stride.data() == nullptr || stride.size() != size.size()) {
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride);
  }
  return self;
}

Tensor& set_storage(Tensor& self, Storage from) {
  int64_t count = static_cast<int64_t>(from.nbytes() / self.itemsize());
  return set_place(self, std::move(from), 0, {count}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& from) {
  return set_place(self, from.storage(), from.storage_offset(), from.sizes(), from.strides());
}

// `x.data = y` may move a tensor between CPU and GPU; it may here.
bool may_take_data_of(const Tensor& tensor, const Tensor& from) {
  auto dense = [](const Tensor& t) { return on_device(t) || (t.is_cpu() && t.layout() == at::kStrided); };
  return dense(tensor) && dense(from);
}

void record_stream(Tensor&, c10::Stream) {}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &item);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_place);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("_has_compatible_shallow_copy_type", &may_take_data_of);
  m.impl("record_stream", &record_stream);
}

// ---- Autocast, with CUDA's lists -------------------------------------------------------------------------------------------

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
#define FULL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_FP32(FULL)
#define FULL_BY_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
  AT_FORALL_FP32_SET_OPT_DTYPE(FULL_BY_DTYPE)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
#define PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_PROMOTE(PROMOTE)
}

// ---- What Python calls ------------------------------------------------------------------------------------------------------

void set_rules(std::vector<std::string> numbers, std::vector<std::string> waits) {
  iterators = {numbers.begin(), numbers.end()};
  waiting = {waits.begin(), waits.end()};
}

TORCH_LIBRARY(emulated_device, m) {
  m.def("set_rules(str[] numbers, str[] waits) -> ()", &set_rules);
}

} // namespace

extern "C" void emulated_device_listen(void (*heard)(const char*)) {
  listener.store(heard);
}
