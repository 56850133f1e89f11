//! Machines on a wire: network namespaces with addresses of their own, joined by a bridge.
//!
//! A namespace is a file that we hold open and nothing else: it has no name, no mount and no process. When the test
//! ends, however it ends, the kernel takes it back with its interfaces, rules and routes. The bridge is in a namespace
//! too, so that nothing of this is seen on the machine that the test runs on, and tests do not see each other.
//!
//! Making them needs root, or a user namespace in which more than one user exists (`unshare -Urn --map-auto`).

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::marker::PhantomData;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType, recv, socket_with};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::net::{TcpListener, TcpStream};

use super::PATIENCE;
use super::peers::script;

/// A network namespace.
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// A new one, with loopback.
    pub fn new() -> Self {
        let mut child = Command::new("unshare")
            .args(["--net", "--", "sh", "-c", "echo made; exec sleep 60"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("unshare (util-linux) does not start: {error}"));
        let mut said = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut said).unwrap();
        assert_eq!(said, "made\n", "no network namespace can be made here");
        let file = File::open(format!("/proc/{}/ns/net", child.id())).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let namespace = Self(file);
        namespace.run("ip link set lo up");
        namespace
    }

    /// The one that this thread is in.
    fn current() -> Self {
        Self(File::open("/proc/thread-self/ns/net").unwrap())
    }

    /// Where other programs find it, as long as we hold it.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// The same one, for somebody else to hold.
    pub fn share(&self) -> Self {
        Self(self.0.try_clone().unwrap())
    }

    fn move_in(&self) {
        move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    }

    /// Does something inside. Sockets stay where they were made.
    pub fn enter<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            self.move_in();
            act()
        };
        std::thread::scope(|scope| scope.spawn(inside).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// A program inside.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path())).arg("--").arg(program.as_ref());
        command
    }

    /// Runs a line of the shell inside.
    pub fn output(&self, line: &str) -> Output {
        self.command("sh").args(["-c", line]).output().unwrap()
    }

    /// Runs a line of the shell inside, which must succeed, and returns what it printed.
    pub fn run(&self, line: &str) -> String {
        let output = self.output(line);
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// A connection that begins inside, as root's.
    pub fn connect(&self, to: SocketAddr) -> std::io::Result<TcpStream> {
        let stream = self.enter(|| std::net::TcpStream::connect_timeout(&to, PATIENCE))?;
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        TcpStream::from_std(stream)
    }

    /// A listener inside; on an IPv6 address that is not specified, it takes IPv4 too.
    pub fn listen(&self, port: u16) -> TcpListener {
        let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let listener = self.enter(|| std::net::TcpListener::bind(address)).unwrap();
        listener.set_nonblocking(true).unwrap();
        TcpListener::from_std(listener).unwrap()
    }
}

impl Default for Namespace {
    fn default() -> Self {
        Self::new()
    }
}

/// Why no machines can be made here; `None`: they can.
fn missing() -> Option<String> {
    for (tool, package) in
        [("ip", "iproute2"), ("unshare", "util-linux"), ("nsenter", "util-linux"), ("setpriv", "util-linux")]
    {
        if Command::new(tool).arg("--version").output().is_err()
            && Command::new(tool).arg("-V").output().is_err()
        {
            return Some(format!("{tool} is missing: apt-get install {package}"));
        }
    }
    let try_out = ["--net", "--", "setpriv", "--reuid", "2102", "--regid", "2102", "--clear-groups", "true"];
    let tried = Command::new("unshare").args(try_out).output().unwrap();
    (!tried.status.success()).then(|| {
        let said = String::from_utf8_lossy(&tried.stderr);
        format!("it needs root, or `unshare -Urn --map-auto` around it ({})", said.trim())
    })
}

/// Whether machines can be made. A test that must be left out says so and why; in CI none may be.
pub fn possible() -> bool {
    let Some(why) = missing() else { return true };
    assert!(std::env::var_os("CI").is_none(), "network namespaces are needed in CI: {why}");
    eprintln!("left out, no network namespaces here: {why}");
    false
}

/// Machines on one wire. The test's own thread is one of them, at [`Network::HERE`], which is in no mesh.
#[derive(Debug)]
pub struct Network {
    switch: Namespace,
    /// Where the test's thread came from.
    home: Namespace,
    count: u8,
    /// The thread that made it is the one that has moved.
    _here: PhantomData<*const ()>,
}

/// One machine's place on the wire.
#[derive(Debug)]
pub struct Machine {
    /// Where it lives.
    pub namespace: Namespace,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

impl Machine {
    /// A port of it.
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.v4), port)
    }

    /// A port of it, over IPv6.
    pub fn at_v6(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V6(self.v6), port)
    }
}

impl Network {
    /// Where the test itself is.
    pub const HERE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
    /// Where the test itself is, over IPv6.
    pub const HERE_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1);

    /// A wire, with the test at one end; `None` where it cannot be, which is said.
    pub fn new() -> Option<Self> {
        if !possible() {
            return None;
        }
        let (switch, home) = (Namespace::new(), Namespace::current());
        switch.run("ip link add bridge type bridge && ip link set bridge up");
        let mut network = Self { switch, home, count: 0, _here: PhantomData };
        network.machine().namespace.move_in();
        Some(network)
    }

    /// One more machine. Every address that it does not know lies behind the test.
    pub fn machine(&mut self) -> Machine {
        self.count += 1;
        let number = self.count;
        let namespace = Namespace::new();
        let (v4, v6) =
            (Ipv4Addr::new(10, 77, 0, number), Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, number.into()));
        self.switch.run(&format!(
            "ip link add port{number} type veth peer name eth0 netns {} && ip link set port{number} master bridge up",
            namespace.path()
        ));
        // Without duplicate address detection an IPv6 address can be used at once.
        namespace.run(&format!(
            "ip address add {v4}/16 dev eth0 && ip address add {v6}/64 dev eth0 nodad && ip link set eth0 up"
        ));
        if v4 != Self::HERE {
            namespace.run(&format!(
                "ip route add default via {} && ip -6 route add default via {}",
                Self::HERE,
                Self::HERE_V6
            ));
        }
        Machine { namespace, v4, v6 }
    }

    /// Leads what comes from and goes to a machine over a wire that can be made worse.
    pub fn worse(&self, machine: &Machine) -> BadWire {
        let number = machine.v4.octets()[3];
        self.switch.run(&format!(
            "ip link add side{number} type bridge && ip link set side{number} up && ip link set port{number} master side{number}"
        ));
        let mut program = self.switch.command("setpriv");
        program.args(["--pdeathsig", "KILL", "--", "python3", &script("wire.py")]);
        program.args([format!("in{number}"), format!("side{number}"), format!("out{number}")]);
        let mut relay = program
            .arg("bridge")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("nsenter (util-linux) does not start: {error}"));
        let mut wire = BadWire { said: BufReader::new(relay.stdout.take().unwrap()), relay };
        assert_eq!(wire.says(), "made", "no wire can be made here; it needs python3 and /dev/net/tun");
        wire
    }

    /// Sees all that passes the bridge from now on.
    pub fn listen_in(&self) -> Wiretap {
        // `htons(ETH_P_ALL)` of linux/if_ether.h.
        let every = u32::from(3u16.to_be());
        let protocol = std::num::NonZeroU32::new(every).map(Protocol::from_raw);
        let socket = self
            .switch
            .enter(|| socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, protocol))
            .unwrap();
        sockopt::set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_millis(50))).unwrap();
        let enough = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&enough);
        let thread = std::thread::spawn(move || {
            let (mut seen, mut buffer) = (Vec::new(), vec![0; 128 << 10]);
            loop {
                match recv(&socket, buffer.as_mut_slice(), RecvFlags::empty()) {
                    Ok((length, _)) => seen.extend_from_slice(&buffer[..length]),
                    // Quiet for a moment: what was on its way has arrived.
                    Err(_) if stop.load(Ordering::Relaxed) => return seen,
                    Err(_) => {}
                }
            }
        });
        Wiretap { enough, thread }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.home.move_in();
    }
}

/// A wire that loses and delays what passes, as told; a program of its own, since not every kernel has netem.
#[derive(Debug)]
pub struct BadWire {
    relay: Child,
    said: BufReader<ChildStdout>,
}

impl BadWire {
    /// From now on: the share of packets that each direction loses, and how much later it delivers the others. How many it has lost or
    /// delayed until now, since it was told the last time.
    pub fn becomes(&mut self, loss_percent: u8, delay: Duration) -> u64 {
        let told = format!("{loss_percent} {}\n", delay.as_millis());
        self.relay.stdin.as_mut().unwrap().write_all(told.as_bytes()).unwrap();
        self.says().parse().unwrap()
    }

    fn says(&mut self) -> String {
        let mut said = String::new();
        self.said.read_line(&mut said).unwrap();
        said.trim_end().to_owned()
    }
}

impl Drop for BadWire {
    fn drop(&mut self) {
        // It fails only when the program has ended, which is what was wanted.
        let _ = self.relay.kill();
        let _ = self.relay.wait();
    }
}

/// Somebody who reads along.
#[derive(Debug)]
pub struct Wiretap {
    enough: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Vec<u8>>,
}

impl Wiretap {
    /// All that was seen.
    pub fn seen(self) -> Vec<u8> {
        self.enough.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Whether bytes contain these words.
pub fn contains(bytes: &[u8], words: &str) -> bool {
    bytes.windows(words.len()).any(|window| window == words.as_bytes())
}
