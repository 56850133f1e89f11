//! A stand-in of its own for each test.

#![expect(unsafe_code, reason = "the stand-in's own three functions are called here")]

use std::ffi::CString;
use std::path::PathBuf;

use penstock_kernels::cuda::{Absent, Context, Driver};

/// A copy of the library, so that its state is nobody else's.
pub(crate) struct StandIn {
    /// The copy, for other processes.
    pub(crate) path: PathBuf,
    library: libloading::Library,
    _dir: tempfile::TempDir,
}

/// The library, where cargo puts it for these tests.
fn original() -> PathBuf {
    std::env::current_exe().unwrap().with_file_name(penstock_standin_driver::FILE)
}

impl StandIn {
    /// One that was told `script` before it starts.
    pub(crate) fn new(script: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("libcuda-STAND-IN.so.1");
        std::fs::copy(original(), &path).unwrap();
        // SAFETY: the library does nothing when it is opened.
        let library = unsafe { libloading::Library::new(&path) }.unwrap();
        let standin = Self { path, library, _dir: dir };
        standin.script(script);
        standin
    }

    /// The driver.
    pub(crate) fn driver(&self) -> Result<Driver, Absent> {
        Driver::open(&self.path)
    }

    /// Its first device.
    pub(crate) fn context(&self) -> Context {
        self.driver().unwrap().context(0).unwrap()
    }

    /// Tells it more.
    pub(crate) fn script(&self, words: &str) {
        let text = CString::new(words).unwrap();
        type Script = unsafe extern "C" fn(*const std::ffi::c_char) -> i32;
        // SAFETY: the function has this type, and the text ends.
        let said = unsafe { self.library.get::<Script>(b"penstock_standin_script").unwrap()(text.as_ptr()) };
        assert_eq!(said, 0, "{words}");
    }

    /// The calls since the last time.
    pub(crate) fn log(&self) -> Vec<String> {
        let mut text = vec![0; 1 << 20];
        type Log = unsafe extern "C" fn(*mut u8, usize) -> usize;
        // SAFETY: the function has this type, and writes no more than it is told.
        let bytes = unsafe {
            self.library.get::<Log>(b"penstock_standin_log").unwrap()(text.as_mut_ptr(), text.len())
        };
        assert!(bytes <= text.len());
        text.truncate(bytes);
        String::from_utf8(text).unwrap().lines().map(str::to_owned).collect()
    }

    /// What it gave out that did not come back.
    pub(crate) fn left(&self) -> usize {
        type Left = unsafe extern "C" fn() -> usize;
        // SAFETY: the function has this type.
        unsafe { self.library.get::<Left>(b"penstock_standin_left").unwrap()() }
    }
}
