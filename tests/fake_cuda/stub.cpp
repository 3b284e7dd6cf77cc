// A "cuda" that does nothing, for a CPU build of PyTorch: what its C++ half asks of a GPU
// before it lets tensors be called CUDA tensors. No CUDA code is here, and none is run: the
// tensors are FakeTensors, with a shape, a dtype and a device, and no numbers.
//
// start.py compiles this, and has the dynamic linker load it first (LD_PRELOAD): two of the
// functions below take the place of PyTorch's own, which answer "there is no accelerator".

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>

namespace c10::impl {

// Which device and stream are current, and what has to wait for what. There is one device
// with one stream, nothing ever runs on it, and so everything is always done.
struct FakeGuard final : DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Device getDevice() const override { return {DeviceType::CUDA, 0}; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}

  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}

  void record(void** event, const Stream&, const DeviceIndex, const EventFlag) const override {
    *event = const_cast<FakeGuard*>(this);  // not null: an event that was recorded
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard);

}  // namespace c10::impl

// Pinned memory: ordinary memory whose addresses are remembered, so that a tensor can be
// asked whether it is pinned. From there only are copies to a GPU made without waiting.
namespace {

std::mutex lock;
std::map<const char*, size_t> pinned;  // where each piece begins, and its bytes

void forget(void* begin) {
  std::lock_guard<std::mutex> held(lock);
  pinned.erase(static_cast<const char*>(begin));
  std::free(begin);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* begin = std::malloc(bytes ? bytes : 1);
    std::lock_guard<std::mutex> held(lock);
    pinned[static_cast<const char*>(begin)] = bytes;
    return {begin, begin, &forget, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &forget; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

bool is_pinned(const void* address) {
  std::lock_guard<std::mutex> held(lock);
  auto place = static_cast<const char*>(address);
  auto next = pinned.upper_bound(place);  // the piece before it may hold the address
  return next != pinned.begin() && place < std::prev(next)->first + std::prev(next)->second;
}

}  // namespace

namespace at {

struct FakeHooks final : CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  bool isPinnedPtr(const void* address) const override { return is_pinned(address); }
  Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator allocator;
    return &allocator;
  }
};

namespace detail {
__attribute__((visibility("default"))) const CUDAHooksInterface& getCUDAHooks() {
  static FakeHooks hooks;
  return hooks;
}
}  // namespace detail

namespace accelerator {
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) {
  return c10::DeviceType::CUDA;
}
}  // namespace accelerator

}  // namespace at
