//! Open files, of which a process may have only so many (`RLIMIT_NOFILE`): each connection is one.
//!
//! Were they given to whoever comes first, newcomers could take the last, and a request of somebody who has long been here would find none for
//! the connection that leads on. So some are spared, and newcomers wait in the kernel's queue meanwhile.

use std::os::fd::{AsFd, AsRawFd as _};

use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Files that newcomers may not have: so many, or an eighth where there are few.
pub const SPARED: u64 = 256;

/// Allows this process as many files as its hard limit does; systems set the soft one low for programs that use `select(2)`.
pub fn allow_all() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // Nobody needs a privilege for this. If it is refused nevertheless, there are only fewer.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// Whether a file that was opened just now is one of the spared: a new one has the lowest number that is free.
pub fn is_spared(newest: &impl AsFd) -> bool {
    let Some(limit) = getrlimit(Resource::Nofile).current else { return false };
    let number = u64::try_from(newest.as_fd().as_raw_fd()).unwrap_or(0);
    number >= first_spared(limit)
}

/// Whether the next would be, which is tried with `any`.
pub fn only_spared_are_left(any: &impl AsFd) -> bool {
    fcntl_dupfd_cloexec(any, 0).map_or(true, |next| is_spared(&next))
}

fn first_spared(limit: u64) -> u64 {
    limit - SPARED.min(limit / 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_spared_and_never_all() {
        assert_eq!([0, 7, 8, 1024, 4096, 1 << 20].map(first_spared), [0, 7, 7, 896, 3840, (1 << 20) - 256]);
    }

    #[test]
    fn all_that_may_be_allowed_is() {
        allow_all();
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        assert_eq!(current, maximum);
        assert!(!is_spared(&std::net::TcpListener::bind("127.0.0.1:0").unwrap()));
    }
}
