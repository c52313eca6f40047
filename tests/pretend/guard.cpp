// A device guard and hooks for CUDA that do nothing. With them, wrapper tensors on "cuda" work, and can be differentiated,
// on a build of PyTorch without CUDA.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

struct Guard final : c10::impl::DeviceGuardImplInterface {
    static constexpr DeviceType static_type = DeviceType::CUDA;
    static Device device() { return Device(DeviceType::CUDA, 0); }
    DeviceType type() const override { return DeviceType::CUDA; }
    Device exchangeDevice(Device) const override { return device(); }
    Device getDevice() const override { return device(); }
    void setDevice(Device) const override {}
    void uncheckedSetDevice(Device) const noexcept override {}
    Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, device()); }
    Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, device()); }
    Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, device()); }
    Stream exchangeStream(Stream stream) const noexcept override { return stream; }
    DeviceIndex deviceCount() const noexcept override { return 1; }
    void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
    void block(void*, const Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
    void destroyEvent(void*, const DeviceIndex) const noexcept override {}
    bool queryStream(const Stream&) const override { return true; }
    void synchronizeStream(const Stream&) const override {}
    void synchronizeEvent(void*) const override {}
};

struct Hooks final : at::CUDAHooksInterface {
    explicit Hooks(at::CUDAHooksArgs) {}
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    DeviceIndex deviceCount() const override { return 1; }
    DeviceIndex current_device() const override { return 0; }
    DeviceIndex getCurrentDevice() const override { return 0; }
    void setCurrentDevice(DeviceIndex) const override {}
    DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
    DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
};
}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

namespace at {
using Creator = c10::Registerer<std::string, std::unique_ptr<CUDAHooksInterface>, CUDAHooksArgs>;
C10_REGISTER_CREATOR(CUDAHooksRegistry, CUDAHooks, Creator::DefaultCreator<Hooks>);
}  // namespace at
