//! A client of the resource manager of NVIDIA's kernel driver: objects and controls through ioctls of nvidiactl. This is a private
//! interface, the one that NVIDIA's own libraries use. Numbers and layouts are those of the open kernel modules 535 to 595.
//!
//! ```text
//!  nvidiactl --card info--> cards, of which one has the PCI address
//!            --alloc--> client --get id info--> instance --alloc--> device --alloc--> subdevice --control--> ..
//! ```
//! Everything belongs to the descriptor and ends with it.

use std::ffi::{c_int, c_ulong};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use nvml_wrapper::error::NvmlError;

/// Type of the ioctls.
const TYPE: u8 = b'F';
const ALLOC: u8 = 0x2b;
const CONTROL: u8 = 0x2a;
const CARD_INFO: u8 = 200;
const CLASS_CLIENT: u32 = 0x41;
const CLASS_DEVICE: u32 = 0x80;
const CLASS_SUBDEVICE: u32 = 0x2080;
const GET_ID_INFO: u32 = 0x205;
/// Handles are chosen by the client, outside the range of those that the resource manager chooses.
const HANDLES: u32 = 0x5c00_0000;
const MAX_CARDS: usize = 32;
const MAX_RETRIES: u32 = 100;

#[derive(Debug, thiserror::Error)]
pub enum RmError {
    #[error("{0}: {1}")]
    Open(String, io::Error),
    #[error("the driver has no GPU {0}")]
    NoCard(String),
    #[error("{0}: {1}")]
    Call(&'static str, io::Error),
    /// A status of the resource manager.
    #[error("{0}: status {1:#x}")]
    Status(&'static str, u32),
}

impl From<RmError> for NvmlError {
    fn from(error: RmError) -> Self {
        const GPU_IS_LOST: u32 = 0x0f;
        const RESET_REQUIRED: u32 = 0x62;
        const NOT_SUPPORTED: u32 = 0x56;
        const NO_PERMISSION: u32 = 0x1b;
        match error {
            RmError::Status(_, GPU_IS_LOST) => Self::GpuLost,
            RmError::Status(_, RESET_REQUIRED) => Self::ResetRequired,
            RmError::Status(_, NOT_SUPPORTED) => Self::NotSupported,
            RmError::Status(_, NO_PERMISSION) => Self::NoPermission,
            RmError::Open(..) | RmError::NoCard(_) | RmError::Call(..) | RmError::Status(..) => Self::Unknown,
        }
    }
}

/// NVOS21_PARAMETERS.
#[repr(C)]
struct AllocParams {
    root: u32,
    parent: u32,
    object: u32,
    class: u32,
    params: u64,
    params_size: u32,
    status: u32,
}

/// NVOS54_PARAMETERS.
#[repr(C)]
struct ControlParams {
    client: u32,
    object: u32,
    command: u32,
    flags: u32,
    params: u64,
    params_size: u32,
    status: u32,
}

/// nv_ioctl_card_info_t.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Card {
    valid: u8,
    domain: u32,
    bus: u8,
    slot: u8,
    function: u8,
    vendor: u16,
    device: u16,
    gpu_id: u32,
    interrupt_line: u16,
    reg_address: u64,
    reg_size: u64,
    fb_address: u64,
    fb_size: u64,
    minor: u32,
    name: [u8; 10],
}

/// NV0000_CTRL_GPU_GET_ID_INFO_V2_PARAMS.
#[repr(C)]
#[derive(Default)]
struct IdInfo {
    gpu_id: u32,
    flags: u32,
    device_instance: u32,
    subdevice_instance: u32,
    sli: u32,
    board: u32,
    gpu_instance: u32,
    numa: i32,
}

/// NV0080_ALLOC_PARAMETERS.
#[repr(C)]
#[derive(Default)]
struct DeviceParams {
    device_id: u32,
    share: u32,
    target_client: u32,
    target_device: u32,
    flags: u32,
    va_size: u64,
    va_start: u64,
    va_limit: u64,
    va_mode: u32,
}

const _: () = {
    assert!(size_of::<AllocParams>() == 32 && size_of::<ControlParams>() == 32);
    assert!(size_of::<Card>() == 72 && size_of::<IdInfo>() == 32 && size_of::<DeviceParams>() == 56);
};

/// The client with one GPU.
pub struct RmClient {
    control: File,
    client: u32,
    subdevice: u32,
}

impl RmClient {
    /// `pci_bus_id`: as NVML returns it, `00000000:06:00.0`. The GPU must be open elsewhere, as it is by NVML: the driver initializes a GPU
    /// when its node is opened.
    pub fn open(devfs: &Path, pci_bus_id: &str) -> Result<Self, RmError> {
        let path = devfs.join("nvidiactl");
        let opened = OpenOptions::new().read(true).write(true).open(&path);
        let control = opened.map_err(|error| RmError::Open(path.display().to_string(), error))?;
        let mut cards = [Card::default(); MAX_CARDS];
        ioctl(&control, CARD_INFO, &mut cards).map_err(|error| RmError::Call("card info", error))?;
        let address = parse_address(pci_bus_id);
        let is_it = |card: &&Card| card.valid != 0 && address == Some((card.domain, card.bus, card.slot));
        let gpu_id = cards.iter().find(is_it).ok_or_else(|| RmError::NoCard(pci_bus_id.to_owned()))?.gpu_id;
        let mut this = Self { control, client: 0, subdevice: 0 };
        // The resource manager chooses the handle of a client.
        this.client = this.alloc("alloc client", 0, 0, CLASS_CLIENT, &mut [0u8; 0])?;
        let mut id = IdInfo { gpu_id, ..IdInfo::default() };
        this.control("get id info", this.client, GET_ID_INFO, &mut id)?;
        let mut params = DeviceParams { device_id: id.device_instance, ..DeviceParams::default() };
        let device = this.alloc("alloc device", this.client, HANDLES + 1, CLASS_DEVICE, &mut params)?;
        this.subdevice = this.alloc("alloc subdevice", device, HANDLES + 2, CLASS_SUBDEVICE, &mut id.subdevice_instance)?;
        Ok(this)
    }

    fn alloc<T>(&self, step: &'static str, parent: u32, object: u32, class: u32, params: &mut T) -> Result<u32, RmError> {
        let size = size_of::<T>() as u32;
        let pointer = if size == 0 { 0 } else { std::ptr::from_mut(params) as u64 };
        let mut call = AllocParams { root: self.client, parent, object, class, params: pointer, params_size: size, status: 0 };
        ioctl(&self.control, ALLOC, &mut call).map_err(|error| RmError::Call(step, error))?;
        if call.status == 0 { Ok(call.object) } else { Err(RmError::Status(step, call.status)) }
    }

    fn control<T: ?Sized>(&self, step: &'static str, object: u32, command: u32, params: &mut T) -> Result<(), RmError> {
        let (params_size, pointer) = (size_of_val(params) as u32, std::ptr::from_mut(params).cast::<u8>() as u64);
        let mut call = ControlParams { client: self.client, object, command, flags: 0, params: pointer, params_size, status: 0 };
        ioctl(&self.control, CONTROL, &mut call).map_err(|error| RmError::Call(step, error))?;
        if call.status == 0 { Ok(()) } else { Err(RmError::Status(step, call.status)) }
    }

    /// A control of the GPU. `params` must have the layout and size of the command.
    pub fn control_gpu(&self, step: &'static str, command: u32, params: &mut [u64]) -> Result<(), RmError> {
        self.control(step, self.subdevice, command, params)
    }
}

/// Domain, bus and slot.
fn parse_address(pci_bus_id: &str) -> Option<(u32, u8, u8)> {
    let mut parts = pci_bus_id.split([':', '.']);
    let domain = u32::from_str_radix(parts.next()?, 16).ok()?;
    let mut byte = || u8::from_str_radix(parts.next()?, 16).ok();
    Some((domain, byte()?, byte()?))
}

/// `params` is read and written by the driver, with the size of the type.
fn ioctl<T>(control: &File, number: u8, params: &mut T) -> io::Result<()> {
    const READ_WRITE: c_ulong = 3;
    let request = READ_WRITE << 30 | (size_of::<T>() as c_ulong) << 16 | c_ulong::from(TYPE) << 8 | c_ulong::from(number);
    for _ in 0..MAX_RETRIES {
        // SAFETY: the descriptor is open; the request has the size of `params`, which is valid for reads and writes; nested pointers in it
        // refer to buffers of the size that it states, which outlive the call.
        let result: c_int = unsafe { libc::ioctl(control.as_raw_fd(), request as _, std::ptr::from_mut(params)) };
        if result >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
            return Err(error);
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pci_address_is_parsed_in_both_lengths() {
        assert_eq!(parse_address("00000000:06:00.0"), Some((0, 6, 0)));
        assert_eq!(parse_address("0001:AF:1F.0"), Some((1, 0xaf, 0x1f)));
        for wrong in ["", "0:1", "x:00:00.0", "0000:100:00.0"] {
            assert_eq!(parse_address(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn without_nodes_or_with_other_files_it_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(RmClient::open(folder.path(), "0:0:0.0"), Err(RmError::Open(..))));
        std::fs::write(folder.path().join("nvidiactl"), "").unwrap();
        assert!(matches!(RmClient::open(folder.path(), "0:0:0.0"), Err(RmError::Call("card info", _))));
    }
}
