//! What the driver says when it says no.

/// What an error means for who gets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// No memory is left: of the device, or of the host that could be pinned. Later there may be some.
    OutOfMemory,
    /// The device does not work any more in this process, and nothing but a new process helps.
    DeviceLost,
    /// It may not be done here: permissions, or what the device cannot do at all.
    Refused,
    /// None of the kernels that we have fits the device or its driver.
    NoImage,
    /// It was registered before, or never.
    Registration,
    /// Anything else; a fault of ours, most likely.
    Other,
}

/// A call that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{doing}: {call} said {name} ({code}){}", self.advice())]
pub struct Error {
    /// What was wanted.
    pub doing: &'static str,
    /// The function of the driver.
    pub call: &'static str,
    /// Its word for it.
    pub name: String,
    /// Its number for it.
    pub code: i32,
}

impl Error {
    /// What it means.
    pub fn kind(&self) -> Kind {
        match self.code {
            2 => Kind::OutOfMemory,
            // Unavailable, ECC, NVLink, illegal address, timeout, context destroyed, assertion, stack, instruction,
            // alignment, address space, counter, launch failed, unknown: the context is of no use after any of them.
            46 | 214 | 220 | 700 | 702 | 709 | 710 | 714..=719 | 999 => Kind::DeviceLost,
            1 if self.call.starts_with("cuIpc") => Kind::Refused,
            201 if self.call.starts_with("cuIpc") => Kind::Refused,
            205 | 217 | 304 | 800 | 801 => Kind::Refused,
            200 | 209 | 218 | 222 => Kind::NoImage,
            712 | 713 => Kind::Registration,
            _ => Kind::Other,
        }
    }

    /// Whether the same may work later.
    pub fn may_pass(&self) -> bool {
        self.kind() == Kind::OutOfMemory
    }

    fn advice(&self) -> &'static str {
        match self.kind() {
            Kind::OutOfMemory if self.call.starts_with("cuMemHost") => {
                "; no more host memory can be pinned: ask for a smaller arena, or raise `memlock` and the memory limit"
            }
            Kind::OutOfMemory => {
                "; the device has no memory left: another process may have it, or ask for less"
            }
            Kind::DeviceLost => {
                "; the device is lost to this process, which goes on without it; `dmesg` may have an Xid that says why"
            }
            Kind::Refused if self.call.starts_with("cuIpc") => {
                "; memory is shared by plain `cuMemAlloc` only, between processes that see the same device and each other: in a pod, a DRA claim of both containers and `shareProcessNamespace`"
            }
            Kind::Refused => "; this container or this device does not allow it",
            Kind::NoImage => {
                "; none of the kernels in this binary is for this device and driver: a newer driver may help"
            }
            Kind::Registration | Kind::Other => "",
        }
    }
}
