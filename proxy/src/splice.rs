//! Bytes from one socket to another without passing through this process, by splice(2).
//!
//! Both sides have to be plain TCP. A direction begins with a buffer like any other, which is cheaper for a few
//! messages and needs no file descriptors; once it has moved `FROM` bytes it is taken for bulk, gets a pipe, and the
//! kernel moves pages. The pipe is emptied before it is filled again, so what is under way is bounded by its size, and a
//! slow reader slows the writer down. An end of one side is passed on as the end of one direction.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use crate::tcp::{BUFFER, Passed};

/// A direction that has moved so much is worth two system calls for its pipe and two file descriptors.
const FROM: u64 = 256 << 10;
/// What a pipe holds if the user may have that much in pipes (the kernel's default limit is 64 MiB for all of them
/// together); otherwise it holds 64 KiB.
const PIPE: usize = 256 << 10;

/// Lets bytes pass both ways until both sides are done.
pub async fn join(client: &TcpStream, server: &TcpStream, up: &Passed, down: &Passed) -> io::Result<()> {
    tokio::try_join!(one_way(client, server, up, down), one_way(server, client, down, up))?;
    Ok(())
}

/// `source` and `sink` are what is known of the two sides: who of them broke off is noted there.
async fn one_way(from: &TcpStream, to: &TcpStream, source: &Passed, sink: &Passed) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    let mut may_splice = true;
    loop {
        if may_splice && source.bytes() >= FROM {
            match Pipe::new() {
                Ok(pipe) => {
                    drop(buffer);
                    return spliced(from, to, &pipe, source, sink).await;
                }
                // No descriptors left, mostly. Without a pipe it works, too.
                Err(error) => {
                    may_splice = false;
                    tracing::debug!(%error, "no pipe; bytes are copied");
                }
            }
        }
        let read = source.note(from.async_io(Interest::READABLE, || from.try_read(&mut buffer)).await)?;
        source.read(read);
        if read == 0 {
            return end(to);
        }
        let mut rest = &buffer[..read];
        while !rest.is_empty() {
            let written = sink.note(to.async_io(Interest::WRITABLE, || to.try_write(rest)).await)?;
            rest = &rest[written..];
        }
    }
}

async fn spliced(
    from: &TcpStream,
    to: &TcpStream,
    pipe: &Pipe,
    source: &Passed,
    sink: &Passed,
) -> io::Result<()> {
    loop {
        // The pipe is empty, so a wait is one for the socket.
        let mut left = source.note(from.async_io(Interest::READABLE, || pipe.fill(from)).await)?;
        source.read(left);
        if left == 0 {
            return end(to);
        }
        while left > 0 {
            left -= sink.note(to.async_io(Interest::WRITABLE, || pipe.empty(to, left)).await)?;
        }
    }
}

/// Tells a side that the other has nothing more to say. Whether it hears it shows in its own direction.
fn end(to: &TcpStream) -> io::Result<()> {
    let _ = SockRef::from(to).shutdown(Shutdown::Write);
    Ok(())
}

/// A pipe between two sockets.
struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (out, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let _ = fcntl_setpipe_size(&into, PIPE);
        Ok(Self { out, into })
    }

    fn fill(&self, from: &TcpStream) -> io::Result<usize> {
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        Ok(splice(from.as_fd(), None, &self.into, None, PIPE, flags)?)
    }

    fn empty(&self, to: &TcpStream, length: usize) -> io::Result<usize> {
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        Ok(splice(&self.out, None, to.as_fd(), None, length, flags)?)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (near.unwrap(), far.unwrap().0)
    }

    #[tokio::test]
    async fn bulk_passes_both_ways_and_an_end_ends_one_direction_only() {
        let ((mut client, inner), (outer, mut server)) = (pair().await, pair().await);
        let joined = async move {
            let (up, down) = (Passed::default(), Passed::default());
            join(&inner, &outer, &up, &down).await.map(|()| (up.bytes(), down.bytes()))
        };
        let sent: Vec<u8> =
            (0..3 << 20).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let expected = sent.clone();
        let (joined, from_server, from_client) = tokio::join!(
            joined,
            async {
                client.write_all(&sent).await.unwrap();
                client.shutdown().await.unwrap();
                let mut all = Vec::new();
                client.read_to_end(&mut all).await.unwrap();
                all
            },
            async {
                let mut all = Vec::new();
                server.read_to_end(&mut all).await.unwrap();
                // The client has ended its side, and is answered all the same.
                server.write_all(&all).await.unwrap();
                server.write_all(b"and more").await.unwrap();
                drop(server);
                all
            }
        );
        assert!(from_client == expected, "{} of {} bytes", from_client.len(), expected.len());
        assert_eq!(&from_server[expected.len()..], b"and more");
        assert!(from_server[..expected.len()] == expected[..]);
        assert_eq!(joined.unwrap(), (3 << 20, (3 << 20) + 8));
    }

    #[tokio::test]
    async fn a_reader_that_stops_stops_the_writer() {
        let ((client, inner), (outer, mut server)) = (pair().await, pair().await);
        let joined = async move {
            let (up, down) = (Passed::default(), Passed::default());
            join(&inner, &outer, &up, &down).await
        };
        let block = vec![7; 1 << 20];
        let talk = async move {
            let mut written = 0;
            // Nobody reads: what the kernel's buffers and one pipe hold, and no more.
            while let Ok(count) = timeout(Duration::from_millis(300), async {
                client.writable().await.unwrap();
                client.try_write(&block)
            })
            .await
            {
                written += count.unwrap_or(0);
                assert!(written < 64 << 20, "{written} bytes are under way");
                tokio::task::yield_now().await;
            }
            drop(client);
            let mut all = Vec::new();
            server.read_to_end(&mut all).await.unwrap();
            assert_eq!(all.len(), written);
            drop(server);
        };
        let (joined, ()) = tokio::join!(joined, talk);
        joined.unwrap();
    }
}
