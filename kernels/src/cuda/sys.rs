//! The functions of `libcuda.so.1` that are used, each looked up before anything is called.
//!
//! Those that every driver of the last ten years has are required: where one is missing there is no driver. The others
//! are optional, and who calls one has to say what happens without it.

use std::ffi::{c_char, c_int, c_uint, c_void};

/// What a function says; 0 is success.
pub(super) type Code = c_int;
/// An address of the device.
pub(super) type Address = u64;
/// A context, a stream, an event, a module or a function: the driver's pointer, which is never followed here.
pub(super) type Handle = *mut c_void;

/// What [`cuIpcGetMemHandle`](Api::ipc_export) writes; passed by value.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct RawIpc(pub(super) [u8; 64]);

macro_rules! api {
    (
        required { $($field:ident = $name:literal ( $($arg:ty),* );)* }
        optional { $($may:ident = $may_name:literal ( $($may_arg:ty),* );)* }
    ) => {
        /// All of them.
        pub(super) struct Api {
            $(pub(super) $field: unsafe extern "C" fn($($arg),*) -> Code,)*
            $(pub(super) $may: Option<unsafe extern "C" fn($($may_arg),*) -> Code>,)*
        }

        /// The names, for those who want to know what is asked of a driver.
        #[cfg(test)]
        pub(super) const REQUIRED: &[&str] = &[$($name),*];
        #[cfg(test)]
        pub(super) const OPTIONAL: &[&str] = &[$($may_name),*];

        impl Api {
            /// Looks all of them up. An error is the name of one that is required and missing.
            ///
            /// # Safety
            ///
            /// What `find` gives for a name is the driver's function of this name, and stays where it is.
            pub(super) unsafe fn new(find: &dyn Fn(&str) -> Option<*mut c_void>) -> Result<Self, &'static str> {
                Ok(Self {
                    // SAFETY: of a function of this name this is the type; the caller vouches for the rest.
                    $($field: unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) -> Code>(
                            find($name).ok_or($name)?,
                        )
                    },)*
                    // SAFETY: as above.
                    $($may: find($may_name).map(|found| unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($may_arg),*) -> Code>(found)
                    }),)*
                })
            }
        }
    };
}

api! {
    required {
        init = "cuInit"(c_uint);
        driver_version = "cuDriverGetVersion"(*mut c_int);
        device_count = "cuDeviceGetCount"(*mut c_int);
        device_get = "cuDeviceGet"(*mut c_int, c_int);
        device_name = "cuDeviceGetName"(*mut c_char, c_int, c_int);
        device_attribute = "cuDeviceGetAttribute"(*mut c_int, c_int, c_int);
        device_memory = "cuDeviceTotalMem_v2"(*mut usize, c_int);
        context_retain = "cuDevicePrimaryCtxRetain"(*mut Handle, c_int);
        context_release = "cuDevicePrimaryCtxRelease_v2"(c_int);
        context_set = "cuCtxSetCurrent"(Handle);
        context_synchronise = "cuCtxSynchronize"();
        stream_create = "cuStreamCreate"(*mut Handle, c_uint);
        stream_destroy = "cuStreamDestroy_v2"(Handle);
        stream_wait = "cuStreamWaitEvent"(Handle, Handle, c_uint);
        event_create = "cuEventCreate"(*mut Handle, c_uint);
        event_destroy = "cuEventDestroy_v2"(Handle);
        event_record = "cuEventRecord"(Handle, Handle);
        event_query = "cuEventQuery"(Handle);
        event_synchronise = "cuEventSynchronize"(Handle);
        event_elapsed = "cuEventElapsedTime"(*mut f32, Handle, Handle);
        memory_info = "cuMemGetInfo_v2"(*mut usize, *mut usize);
        memory_alloc = "cuMemAlloc_v2"(*mut Address, usize);
        memory_free = "cuMemFree_v2"(Address);
        host_alloc = "cuMemHostAlloc"(*mut *mut c_void, usize, c_uint);
        host_free = "cuMemFreeHost"(*mut c_void);
        copy_to_device = "cuMemcpyHtoDAsync_v2"(Address, *const c_void, usize, Handle);
        copy_to_host = "cuMemcpyDtoHAsync_v2"(*mut c_void, Address, usize, Handle);
        copy_on_device = "cuMemcpyDtoDAsync_v2"(Address, Address, usize, Handle);
        fill = "cuMemsetD8Async"(Address, u8, usize, Handle);
        module_load = "cuModuleLoadData"(*mut Handle, *const c_void);
        module_unload = "cuModuleUnload"(Handle);
        module_function = "cuModuleGetFunction"(*mut Handle, Handle, *const c_char);
        launch = "cuLaunchKernel"(
            Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void
        );
    }
    optional {
        error_name = "cuGetErrorName"(Code, *mut *const c_char);
        host_register = "cuMemHostRegister_v2"(*mut c_void, usize, c_uint);
        host_unregister = "cuMemHostUnregister"(*mut c_void);
        ipc_export = "cuIpcGetMemHandle"(*mut RawIpc, Address);
        ipc_open = "cuIpcOpenMemHandle_v2"(*mut Address, RawIpc, c_uint);
        ipc_close = "cuIpcCloseMemHandle"(Address);
    }
}
