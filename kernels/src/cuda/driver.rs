//! The driver, and what devices it has.

use std::ffi::{CStr, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::Error;
use super::sys::{Api, Code};

/// What NVIDIA's driver is called, in every version of it.
const LIBRARY: &str = "libcuda.so.1";

/// Why there is no driver that could be used. Each is a sentence for an operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Absent {
    /// No library of that name.
    #[error("no GPU is used: {path:?} cannot be opened ({reason}); preprocessing stays on the CPU")]
    Library {
        /// What was looked for.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// A function is missing.
    #[error(
        "no GPU is used: {path:?} is no driver of NVIDIA's, or one too old: it has no {function}; preprocessing stays on the CPU"
    )]
    Function {
        /// The library.
        path: PathBuf,
        /// The function.
        function: &'static str,
    },
    /// The driver does not start.
    #[error("no GPU is used: {0}; preprocessing stays on the CPU")]
    Start(Error),
    /// It has no device.
    #[error(
        "no GPU is used: the driver works, but this container is given no device; preprocessing stays on the CPU"
    )]
    Device,
}

/// A driver that was started, and has a device. Clones are the same one.
#[derive(Clone)]
pub struct Driver(Arc<Api>);

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Driver")
    }
}

/// A device, as its driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its number, from 0.
    pub number: u32,
    /// Its name.
    pub name: String,
    /// Its compute capability.
    pub capability: (u32, u32),
    /// Bytes of its memory.
    pub memory: u64,
}

/// The machine's driver. It is looked for once; if there is none, `say` gets the one line that says why, the first time
/// only.
pub fn detect(say: impl FnOnce(&Absent)) -> Option<Driver> {
    static FOUND: OnceLock<Option<Driver>> = OnceLock::new();
    FOUND.get_or_init(|| Driver::open(Path::new(LIBRARY)).map_err(|absent| say(&absent)).ok()).clone()
}

impl Driver {
    /// Opens the library of this name, or of this path, and starts it. Never panics, whatever is missing.
    pub fn open(path: &Path) -> Result<Self, Absent> {
        // SAFETY: the library runs code of its own when it is opened, and is what the operator installed as the driver.
        let library = unsafe { libloading::Library::new(path) };
        let library =
            library.map_err(|error| Absent::Library { path: path.into(), reason: reason(&error) })?;
        let find = |name: &str| {
            // SAFETY: the address of a function, taken for no more than an address.
            let symbol = unsafe { library.get::<*mut c_void>(name.as_bytes()) }.ok()?;
            // SAFETY: a symbol is where the function is.
            Some(unsafe { symbol.try_as_raw_ptr()? }).filter(|found| !found.is_null())
        };
        let driver = Self::found(path, &find)?;
        // A driver has threads, and memory that others map: it is never closed.
        std::mem::forget(library);
        Ok(driver)
    }

    /// The same with any way to find a function; what it finds stays.
    fn found(path: &Path, find: &dyn Fn(&str) -> Option<*mut c_void>) -> Result<Self, Absent> {
        // SAFETY: `find` looks into a library that has the driver's functions under their names.
        let api = unsafe { Api::new(find) };
        let api = api.map_err(|function| Absent::Function { path: path.into(), function })?;
        let driver = Self(Arc::new(api));
        // SAFETY: this is how a driver is started; any thread may, and again.
        match unsafe { (driver.0.init)(0) } {
            0 => {}
            100 => return Err(Absent::Device),
            code => return Err(Absent::Start(driver.error("starting the driver", "cuInit", code))),
        }
        match driver.count() {
            Ok(0) => Err(Absent::Device),
            Ok(_) => Ok(driver),
            Err(error) => Err(Absent::Start(error)),
        }
    }

    pub(super) fn api(&self) -> &Api {
        &self.0
    }

    pub(super) fn error(&self, doing: &'static str, call: &'static str, code: Code) -> Error {
        let named = self.0.error_name.and_then(|name_of| {
            let mut name = std::ptr::null();
            // SAFETY: the name that it writes is a constant of the driver's.
            let said = unsafe { name_of(code, &raw mut name) };
            // SAFETY: as above, and it ends.
            (said == 0 && !name.is_null()).then(|| unsafe { CStr::from_ptr(name) })
        });
        let name = named.map_or_else(|| "an error".to_owned(), |name| name.to_string_lossy().into_owned());
        Error { doing, call, name, code }
    }

    pub(super) fn check(&self, doing: &'static str, call: &'static str, code: Code) -> Result<(), Error> {
        if code == 0 { Ok(()) } else { Err(self.error(doing, call, code)) }
    }

    fn count(&self) -> Result<c_int, Error> {
        let mut count = 0;
        // SAFETY: it writes one number.
        let code = unsafe { (self.0.device_count)(&raw mut count) };
        self.check("counting devices", "cuDeviceGetCount", code)?;
        Ok(count)
    }

    /// The CUDA version that the driver was made for: major and minor.
    pub fn version(&self) -> Result<(u32, u32), Error> {
        let mut version = 0;
        // SAFETY: it writes one number.
        let code = unsafe { (self.0.driver_version)(&raw mut version) };
        self.check("asking for the driver's version", "cuDriverGetVersion", code)?;
        let version = version.unsigned_abs();
        Ok((version / 1000, version % 1000 / 10))
    }

    /// What there is.
    pub fn devices(&self) -> Result<Vec<Device>, Error> {
        (0..self.count()?).map(|number| self.device(number)).collect()
    }

    pub(super) fn device(&self, number: c_int) -> Result<Device, Error> {
        const DOING: &str = "describing a device";
        let mut device = 0;
        // SAFETY: it writes one number.
        let code = unsafe { (self.0.device_get)(&raw mut device, number) };
        self.check(DOING, "cuDeviceGet", code)?;
        let mut name = [0u8; 128];
        // SAFETY: it writes no more than it is told.
        let code = unsafe { (self.0.device_name)(name.as_mut_ptr().cast(), name.len() as c_int, device) };
        self.check(DOING, "cuDeviceGetName", code)?;
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: it writes one number.
            let code = unsafe { (self.0.device_attribute)(&raw mut value, attribute, device) };
            self.check(DOING, "cuDeviceGetAttribute", code).map(|()| value.unsigned_abs())
        };
        // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
        let capability = (attribute(75)?, attribute(76)?);
        let mut memory = 0;
        // SAFETY: it writes one number.
        let code = unsafe { (self.0.device_memory)(&raw mut memory, device) };
        self.check(DOING, "cuDeviceTotalMem_v2", code)?;
        let name = CStr::from_bytes_until_nul(&name).unwrap_or_default().to_string_lossy().into_owned();
        Ok(Device { number: number.unsigned_abs(), name, capability, memory: memory as u64 })
    }
}

/// The system's own words, without the library's around them.
pub(super) fn reason(error: &libloading::Error) -> String {
    match error {
        libloading::Error::DlOpen { desc } => format!("{desc:?}").trim_matches(['"', '{', '}']).to_owned(),
        error => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::sys::{OPTIONAL, REQUIRED};
    use super::*;

    fn open(without: Option<&str>) -> Result<Driver, Absent> {
        let path = std::env::current_exe().unwrap().with_file_name("libpenstock_standin_driver.so");
        // SAFETY: the stand-in, which does nothing when it is opened.
        let library = unsafe { libloading::Library::new(&path) }.unwrap();
        let library: &'static libloading::Library = Box::leak(Box::new(library));
        let find = |name: &str| {
            // SAFETY: an address.
            let symbol = unsafe { library.get::<*mut c_void>(name.as_bytes()) }.ok()?;
            // SAFETY: an address.
            Some(unsafe { symbol.try_as_raw_ptr()? }).filter(|_| Some(name) != without)
        };
        Driver::found(&path, &find)
    }

    #[test]
    fn a_machine_without_a_driver_says_so_in_one_line() {
        let absent = Driver::open(Path::new("libcuda-that-is-not-there.so.1")).unwrap_err();
        let told = absent.to_string();
        assert!(matches!(absent, Absent::Library { .. }), "{told}");
        assert!(told.starts_with("no GPU is used: ") && told.ends_with("stays on the CPU"), "{told}");
        assert!(!told.contains('\n'));
    }

    #[test]
    fn a_library_that_is_something_else_is_no_driver() {
        let absent = Driver::open(Path::new("libc.so.6")).unwrap_err();
        assert_eq!(absent, Absent::Function { path: "libc.so.6".into(), function: "cuInit" });
    }

    #[test]
    fn any_function_may_be_missing_and_none_is_a_panic() {
        for name in REQUIRED {
            let absent = open(Some(name)).unwrap_err();
            assert!(matches!(absent, Absent::Function { function, .. } if function == *name), "{absent}");
        }
        for name in OPTIONAL {
            assert!(open(Some(name)).is_ok(), "{name}");
        }
    }

    #[test]
    fn an_error_has_a_name_even_where_the_driver_has_none_for_it() {
        let driver = open(None).unwrap();
        let error = driver.error("trying", "cuMemAlloc_v2", 2).to_string();
        assert!(
            error.starts_with("trying: cuMemAlloc_v2 said CUDA_ERROR_OUT_OF_MEMORY (2); the device"),
            "{error}"
        );
        let old = open(Some("cuGetErrorName")).unwrap();
        assert_eq!(old.error("trying", "cuX", 77).to_string(), "trying: cuX said an error (77)");
    }

    #[test]
    fn what_an_older_driver_does_not_have_is_refused_and_nothing_else() {
        use crate::arena::{Access, Arena, Kind as Memory};
        use crate::cuda::{IpcHandle, Kind};
        let context = |without| open(Some(without)).unwrap().context(0).unwrap();
        let memory = context("cuIpcGetMemHandle").alloc(64).unwrap();
        let error = memory.export().unwrap_err();
        assert_eq!(error.kind(), Kind::Refused);
        assert!(
            error.to_string().contains("cuIpcGetMemHandle said nothing: this driver does not have it"),
            "{error}"
        );
        for without in ["cuIpcOpenMemHandle_v2", "cuIpcCloseMemHandle"] {
            assert_eq!(context(without).open_ipc(&IpcHandle([0; 64]), 64).unwrap_err().kind(), Kind::Refused);
        }
        for without in ["cuMemHostRegister_v2", "cuMemHostUnregister"] {
            let context = context(without);
            let (node, name, access) = ("test-older", without, Access::Group(None));
            let kind = Memory::Registered { context: &context, node, name, access };
            let told = Arena::new(kind, 4096, 4096).unwrap_err().to_string();
            assert!(told.contains("this driver does not have it"), "{told}");
            assert!(Arena::new(Memory::Pinned { context: &context }, 4096, 4096).is_ok());
        }
    }

    /// On a machine with a GPU there is nothing to say.
    #[test]
    fn the_machines_driver_is_looked_for_once_and_its_absence_is_told_once() {
        let mut told = 0;
        let found: Vec<bool> = (0..3).map(|_| detect(|_| told += 1).is_some()).collect();
        assert!(found.iter().all(|there| *there == found[0]));
        assert_eq!(told, u32::from(!found[0]));
    }

    /// Trap 2 of research/gpu-datapath.md: memory of pools cannot be exported, so there is no way to get any.
    #[test]
    fn no_function_of_pools_is_asked_for() {
        assert!(
            REQUIRED
                .iter()
                .chain(OPTIONAL)
                .all(|name| !name.contains("Async") || name.contains("Memcpy") || name.contains("Memset"))
        );
        assert!(REQUIRED.iter().chain(OPTIONAL).all(|name| !name.contains("Pool")));
    }
}
