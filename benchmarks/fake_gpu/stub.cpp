// CUDA devices whose memory is the host's and whose kernels are the CPU's, for a torch without CUDA.
//
// Tensors say cuda:k, mixing devices is the error it is on a GPU, autograd runs on the engine's
// threads for devices, and numbers are the CPU's, up to rounding. Streams and events do nothing: all
// is done at once and in order, so a synchronisation that is missing is not found out.
//
// Registered are what torch asks of a device (guard, hooks), its two allocators, and one kernel for
// every operator that has none for CUDA: it calls the CPU's on the same memory.
//
// Built and loaded by device.py.

#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <map>
#include <mutex>

namespace {

constexpr c10::DeviceType CUDA = c10::DeviceType::CUDA;
constexpr c10::DeviceIndex MOST = 8; // devices; how many a program sees, torch.cuda says

thread_local c10::DeviceIndex current = 0;

// ---------------------------------------------------------------- what torch asks of a device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before = getDevice();
    current = device.index();
    return before;
  }
  c10::Device getDevice() const override { return {CUDA, current}; }
  void setDevice(c10::Device device) const override { current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getStream(device);
  }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return MOST; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

// Page-locked memory: first byte → the byte behind the last.
std::mutex lock;
std::map<uintptr_t, uintptr_t> pinned;

void pin(uintptr_t first, int64_t size) {
  std::lock_guard<std::mutex> guard(lock);
  pinned[first] = first + size;
}

void unpin(uintptr_t first) {
  std::lock_guard<std::mutex> guard(lock);
  pinned.erase(first);
}

bool is_pinned(const void* pointer) {
  std::lock_guard<std::mutex> guard(lock);
  auto behind = pinned.upper_bound(reinterpret_cast<uintptr_t>(pointer));
  return behind != pinned.begin() &&
      reinterpret_cast<uintptr_t>(pointer) < std::prev(behind)->second;
}

void free_pinned(void* pointer) {
  unpin(reinterpret_cast<uintptr_t>(pointer));
  c10::free_cpu(pointer);
}

struct PinnedAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t size) override {
    void* pointer = c10::alloc_cpu(size);
    if (pointer) {
      pin(reinterpret_cast<uintptr_t>(pointer), size);
    }
    return {pointer, pointer, &free_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* into, const void* from, size_t size) const override {
    default_copy_data(into, from, size);
  }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* pointer = c10::alloc_cpu(size);
    return {pointer, pointer, &c10::free_cpu, c10::Device(CUDA, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* into, const void* from, size_t size) const override {
    default_copy_data(into, from, size);
  }
};

PinnedAllocator pinned_allocator;
DeviceAllocator device_allocator;

} // namespace

// The registry knows the hooks by this name.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return MOST; }
  c10::DeviceIndex deviceCount() const override { return MOST; }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current = device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    std::swap(current, device);
    return device;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return exchangeDevice(device);
  }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  c10::Device getDeviceFromPtr(void*) const override { return {CUDA, current}; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

namespace {

// ---------------------------------------------------------------- one memory, seen as two devices

void drop(void* kept) {
  delete static_cast<c10::Storage*>(kept);
}

// Returns the memory of a storage as another device's; it lives as long as either does.
c10::Storage seen_by(const c10::Storage& storage, c10::Device device) {
  c10::Allocator* allocator = &device_allocator;
  if (device.is_cpu()) {
    allocator = c10::GetCPUAllocator();
  }
  c10::DataPtr data(storage.mutable_data(), new c10::Storage(storage), &drop, device);
  return {c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), allocator, true};
}

at::Tensor shaped(at::Tensor made, const at::Tensor& like) {
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) {
    impl->set_wrapped_number(true);
  }
  return made;
}

at::Tensor on(const c10::Storage& storage, const at::Tensor& like, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<at::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  return shaped(made, like);
}

// Returns a view of a tensor. Also in inference mode, it is a view of an ordinary tensor.
at::Tensor view_of(const at::Tensor& whole, const at::Tensor& like) {
  auto made = at::detail::make_tensor<at::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(whole.storage()), whole.key_set(), like.dtype());
  return shaped(made, like);
}

// ---------------------------------------------------------------- the kernel of every operator

// The tensors of a call as the CPU sees them.
struct Call {
  const c10::OperatorHandle& op;
  bool any_device; // whether its tensors may lie on several devices
  c10::Device device{c10::DeviceType::CPU}; // of the first tensor on one; results go there
  std::vector<std::pair<at::Tensor, at::Tensor>> known; // on the device, on the CPU
  std::map<const c10::StorageImpl*, c10::Storage> storages; // the CPU's view → the device's

  void meet(const at::Tensor& tensor) {
    bool scalar = tensor.is_cpu() && tensor.dim() == 0;
    TORCH_CHECK(
        any_device || scalar || tensor.device() == device,
        "Expected all tensors to be on the same device, but found at least two devices, ",
        device, " and ", tensor.device(), "! (", op.schema().name(), ")");
  }

  at::Tensor to_host(const at::Tensor& tensor) {
    meet(tensor);
    if (!tensor.is_cuda()) {
      return tensor;
    }
    for (auto& [there, here] : known) {
      if (there.is_same(tensor)) {
        return here;
      }
    }
    for (auto& [here, there] : storages) {
      if (there.unsafeGetStorageImpl() == tensor.storage().unsafeGetStorageImpl()) {
        c10::Storage same(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(
            const_cast<c10::StorageImpl*>(here)));
        known.emplace_back(tensor, on(same, tensor, c10::DispatchKey::CPU));
        return known.back().second;
      }
    }
    auto storage = seen_by(tensor.storage(), c10::DeviceType::CPU);
    storages.emplace(storage.unsafeGetStorageImpl(), tensor.storage());
    known.emplace_back(tensor, on(storage, tensor, c10::DispatchKey::CPU));
    return known.back().second;
  }

  at::Tensor to_device(const at::Tensor& tensor) {
    if (!tensor.is_cpu() || device.is_cpu()) {
      return tensor;
    }
    for (auto& [there, here] : known) {
      if (here.is_same(tensor)) {
        return there;
      }
    }
    auto* found = tensor.storage().unsafeGetStorageImpl();
    for (auto& [there, here] : known) {
      if (here.storage().unsafeGetStorageImpl() == found) {
        return view_of(there, tensor);
      }
    }
    if (!storages.count(found)) {
      storages.emplace(found, seen_by(tensor.storage(), device));
    }
    return on(storages.at(found), tensor, c10::DispatchKey::CUDA);
  }

  // `out=` tensors may have been given another size.
  void take_sizes() {
    for (auto& [there, here] : known) {
      auto* impl = there.unsafeGetTensorImpl();
      if (there.sizes() == here.sizes() && there.strides() == here.strides()) {
        continue;
      }
      if (there.storage().data() != here.storage().data()) {
        auto storage = seen_by(here.storage(), there.device());
        impl->set_storage_keep_dtype(std::move(storage));
      }
      impl->set_sizes_and_strides(here.sizes(), here.strides(), here.storage_offset());
    }
  }
};

// Returns an argument or result with every tensor in it changed.
template <typename Change>
c10::IValue changed(const c10::IValue& value, Change change) {
  if (value.isTensor() && value.toTensor().defined()) {
    return change(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) {
      list.push_back(change(tensor));
    }
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
      bool some = tensor && tensor->defined();
      list.push_back(some ? std::optional(change(*tensor)) : std::nullopt);
    }
    return list;
  }
  return value;
}

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack, bool any_device) {
  // Find out which device this is for.
  Call call{op, any_device};
  size_t count = op.schema().arguments().size();
  auto arguments = torch::jit::last(*stack, count).vec();
  auto find = [&](const at::Tensor& tensor) {
    if (tensor.is_cuda() && call.device.is_cpu()) {
      call.device = tensor.device();
    }
    return tensor;
  };
  for (auto& argument : arguments) {
    changed(argument, find);
    if (argument.isDevice() && argument.toDevice().is_cuda()) {
      call.device = c10::Device(CUDA, current);
      if (argument.toDevice().has_index()) {
        call.device = argument.toDevice();
      }
      argument = c10::Device(c10::DeviceType::CPU);
    }
  }

  // Compute on the CPU's view of the tensors.
  auto to_host = [&](const at::Tensor& tensor) { return call.to_host(tensor); };
  torch::jit::drop(*stack, count);
  for (auto& argument : arguments) {
    stack->push_back(changed(argument, to_host));
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  // Give the results to the device.
  call.take_sizes();
  auto to_device = [&](const at::Tensor& tensor) { return call.to_device(tensor); };
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); i++) {
    (*stack)[i] = changed((*stack)[i], to_device);
  }
}

void on_one_device(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  run(op, stack, false);
}

void on_any_device(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  run(op, stack, true);
}

// torch.load and pickling put tensors on storages.
at::Tensor& set_storage(
    at::Tensor& tensor, c10::Storage storage, int64_t offset, at::IntArrayRef size,
    at::IntArrayRef stride) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(size, stride, offset);
  return tensor;
}

at::Tensor& set_whole_storage(at::Tensor& tensor, c10::Storage storage) {
  int64_t count = storage.nbytes() / tensor.dtype().itemsize();
  return set_storage(tensor, std::move(storage), 0, {count}, {1});
}

// The CPU's attention would be called by the name of CUDA's; the plain one is the same everywhere.
int64_t plain_attention(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
    double, bool, std::optional<double>, bool) {
  return 0; // SDPBackend::math
}

// Returns the same memory as a tensor of device k; −1: of the CPU.
at::Tensor alias(const at::Tensor& tensor, int64_t device) {
  c10::Device there(c10::DeviceType::CPU);
  c10::DispatchKey key = c10::DispatchKey::CPU;
  if (device >= 0) {
    there = c10::Device(CUDA, device);
    key = c10::DispatchKey::CUDA;
  }
  return on(seen_by(tensor.storage(), there), tensor, key);
}

// Gives a tensor on a device the memory of one on the CPU, which has the same bytes.
void adopt(at::Tensor tensor, const at::Tensor& host) {
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  c10::DataPtr data(
      host.storage().mutable_data(), new c10::Storage(host.storage()), &drop, tensor.device());
  storage->set_data_ptr_noswap(std::move(data));
}

} // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
namespace at {
using ::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
} // namespace at
REGISTER_ALLOCATOR(CUDA, &device_allocator)
namespace at {
REGISTER_HOST_ALLOCATOR(at::kCUDA, &pinned_allocator)
} // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_one_device>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&on_any_device>());
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("_fused_sdp_choice", &plain_attention);
}

TORCH_LIBRARY(fake_gpu, m) {
  m.def("alias(Tensor tensor, int device) -> Tensor", &alias);
  m.def("adopt(Tensor(a!) tensor, Tensor host) -> ()", &adopt);
  m.def("pin(int first, int size) -> ()", [](int64_t first, int64_t size) { pin(first, size); });
  m.def("unpin(int first) -> ()", [](int64_t first) { unpin(first); });
  m.def("is_pinned(int address) -> bool", [](int64_t address) {
    return is_pinned(reinterpret_cast<const void*>(address));
  });
  m.def("use(int device) -> ()", [](int64_t device) { current = device; });
  m.def("current() -> int", []() -> int64_t { return current; });
}
