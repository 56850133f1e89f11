//! Every limit of the data path, in one place, with its default and the reason for it.

use std::time::Duration;

/// What is bounded.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections that are open at once, each listener, all workers. Above: the newest is answered 503 and closed.
    pub connections: u32,
    /// Of these, inbound, from one address (of IPv6: one /64); 0 = as many as in all. A sidecar has tens; raise it (`--peer-connections`) where a
    /// gateway or a NAT stands before many clients.
    pub connections_per_peer: u32,
    /// TLS handshakes of one address that go on at once; 0 = any number. Above: the newest connection is closed.
    pub handshakes_per_peer: u32,
    /// The header section of a request, bytes (RFC 9110 names none; common servers allow 8 to 64 KiB).
    pub header_bytes: u32,
    /// Header fields of a request.
    pub header_count: usize,
    /// From the first byte of a connection to the end of a request's header section, and between two requests.
    pub header_time: Duration,
    /// A TLS handshake.
    pub handshake_time: Duration,
    /// Connections that each listener holds until certificate and first configuration are in force. A pod that starts has
    /// tens; a thousand are a client that tries again and again.
    pub early: u32,
    /// How long each of them is held at most.
    pub early_time: Duration,
    /// An HTTP connection of the mesh is asked to go elsewhere (GOAWAY) at this age, give or take a tenth; 0 = never.
    pub connection_age: Duration,
    /// A gRPC stream of the mesh is ended with UNAVAILABLE at this age, give or take a tenth; 0 = never.
    pub stream_age: Duration,
    /// How long the first bytes of an undeclared protocol are waited for.
    pub detect_time: Duration,
    /// Streams of one HTTP/2 connection at once.
    pub streams: u32,
    /// Memory of the whole process, bytes; 0 = none, or, for the program, 85 % of what its container may have. Above: new requests are answered
    /// 503 (`out-of-memory`), and those under way go on. The arena counts, and so must be less.
    pub memory_bytes: u64,
    /// A request's body, bytes; 0 = none. Bodies are streamed, so this protects the application, not the proxy.
    pub body_bytes: u64,
    /// Shared memory for tensors, bytes, taken when a model server first offers to read it; 0 = none, they go as bytes.
    /// Three batches of 32 images of 600 KB and their outputs have room.
    pub arena_bytes: usize,
    /// Inputs that are prepared at once, each by a thread; they take cores that the application has too.
    pub prepare_threads: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 16_384,
            connections_per_peer: 4_096,
            handshakes_per_peer: 1_024,
            header_bytes: 64 << 10,
            header_count: 128,
            header_time: Duration::from_secs(60),
            handshake_time: Duration::from_secs(10),
            early: 1024,
            early_time: Duration::from_secs(30),
            connection_age: Duration::ZERO,
            stream_age: Duration::ZERO,
            detect_time: Duration::from_millis(200),
            streams: 256,
            memory_bytes: 0,
            body_bytes: 0,
            arena_bytes: 128 << 20,
            prepare_threads: 2,
        }
    }
}

/// HTTP/2 flow control: what a stream may have under way (research: with the default of 64 KiB a connection reaches 0.07 to 0.23 GB/s, with
/// megabytes 0.7 to 1.7).
pub const STREAM_WINDOW: u32 = 1 << 20;
/// Streams on one connection of ours before another is opened.
pub const STREAMS: u32 = 64;
/// What a connection may have under way: all of its streams' windows, so that streams whose readers have stopped cannot stop the others.
pub const CONNECTION_WINDOW: u32 = STREAMS * STREAM_WINDOW;
/// What is shared among clients' connections when they come: each gets this over those open, [`CONNECTION_WINDOW`] at most, [`CLIENT_WINDOW`] at
/// least.
pub const CLIENT_WINDOWS: u32 = 256 << 20;
/// What a client's connection may have under way however many there are.
pub const CLIENT_WINDOW: u32 = 8 << 20;

/// What a new connection of a client may have under way when so many are open, this one among them: it is the client's choice to fill it, and
/// nobody's but the application's to empty it.
pub fn client_window(open: u32) -> u32 {
    (CLIENT_WINDOWS / open.max(1)).clamp(CLIENT_WINDOW, CONNECTION_WINDOW)
}

/// What each of its streams may have under way then: as many as we put on a connection cannot fill it.
pub fn stream_window(connection: u32) -> u32 {
    (connection / STREAMS).clamp(64 << 10, STREAM_WINDOW)
}

/// The largest HTTP/2 frame that is asked for: large enough that its nine bytes of head vanish, small enough that
/// other streams' frames get in between.
pub const FRAME: u32 = 256 << 10;
/// What an HTTP/1 connection reads at once at most, bytes, and the largest header section of a response: pieces of a body hold the buffer that they
/// came in, so a stream that nobody reads holds two of these.
pub const READ: usize = 128 << 10;
/// Requests between sidecars whose body is at least so large go over a connection of their own (HTTP/1.1 within mutual TLS), bytes:
/// below, a body fits into four frames of HTTP/2, and what is behind it waits for a millisecond at most.
pub const LANE: u64 = 1 << 20;
/// Connections of that lane to one endpoint, each worker; while all of them are in use, large bodies go over HTTP/2 too.
pub const LANES: u32 = 8;
/// Bodies of tensors that are taken past hyper, straight to where they are to lie, bytes: below, the copy that this saves costs less
/// than asking for the place first.
pub const DIRECT: u64 = 64 << 10;
/// What one HTTP/2 stream may have waiting to be written.
pub const SEND_BUFFER: usize = 256 << 10;
/// Copies of requests (mirrors) on their way at once, each worker: a mirror that hangs holds no more than these. More are dropped.
pub const COPIES: u32 = 256;
/// Bytes that are held for copies, each worker: what their mirrors have not read yet, and answers until they are compared. A copy that
/// finds no room is dropped, an answer is not compared; the request that is copied goes on.
pub const COPY_BYTES: u64 = 32 << 20;
/// Of them for one body, or one answer: a tensor of 6 MiB fits, and four that stall leave room for none.
pub const COPY_BODY: u64 = 8 << 20;
/// How long a copy may take in all; its route's and its Service's own times apply besides. A mirror that trickles frees its place then.
pub const COPY_TIME: Duration = Duration::from_secs(600);
/// Two answers that have no more bytes than this together are compared by the worker itself, which takes a fraction of a millisecond;
/// larger ones by a thread of their own, one pair at a time for each worker.
pub const COMPARE_INLINE: u64 = 32 << 10;
