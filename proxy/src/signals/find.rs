//! Where the model server's metrics page may be. Pure.
//!
//! An operator who knows says so (`vllm:8000/metrics`). Otherwise the pod's own ports are tried, and only those: one
//! that is declared to speak HTTP, or one that nobody declared but where model servers are known to have their page. A
//! GET is all that a stranger behind such a port ever sees, less and less often.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use penstock_inference::page::Kind;

/// Where the page is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Where {
    /// Somewhere on the pod's ports.
    #[default]
    Detect,
    /// Nowhere: it is not looked at.
    Off,
    /// Here.
    Declared {
        /// The kind of server; `None`: its page says so.
        kind: Option<Kind>,
        /// The port, on the pod's own address.
        port: u16,
        /// The path; `None`: the usual ones.
        path: Option<String>,
    },
}

/// A word that says no [`Where`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} does not say where a metrics page is: {why}; write vllm:8000/metrics, 8002, detect or off")]
pub struct NotAPlace {
    text: String,
    why: String,
}

impl FromStr for Where {
    type Err = NotAPlace;

    fn from_str(text: &str) -> Result<Self, NotAPlace> {
        let not = |why: String| NotAPlace { text: text.to_owned(), why };
        match text.trim() {
            "detect" => return Ok(Self::Detect),
            "off" => return Ok(Self::Off),
            _ => {}
        }
        let (place, path) = match text.trim().split_once('/') {
            Some((place, path)) => (place, Some(format!("/{path}"))),
            None => (text.trim(), None),
        };
        let (kind, port) = match place.rsplit_once(':') {
            Some((kind, port)) => {
                (Some(kind.parse::<Kind>().map_err(|unknown| not(unknown.to_string()))?), port)
            }
            None => (None, place),
        };
        let port = match port.parse() {
            Ok(port) if port > 0 => port,
            _ => return Err(not(format!("{port:?} is not a port"))),
        };
        if let Some(path) = &path
            && !path.bytes().all(|byte| byte.is_ascii_graphic())
        {
            return Err(not(format!("{path:?} is not a path")));
        }
        Ok(Self::Declared { kind, port, path })
    }
}

impl fmt::Display for Where {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Detect => f.write_str("detect"),
            Self::Off => f.write_str("off"),
            Self::Declared { kind, port, path } => {
                if let Some(kind) = kind {
                    write!(f, "{kind}:")?;
                }
                write!(f, "{port}{}", path.as_deref().unwrap_or_default())
            }
        }
    }
}

/// A port of our own pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// Where the application listens.
    pub address: SocketAddr,
    /// Whether it is declared to speak HTTP.
    pub declared: bool,
}

/// One place to look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Where to connect.
    pub address: SocketAddr,
    /// What to ask for.
    pub path: String,
    /// What is expected there, if that is known.
    pub kind: Option<Kind>,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.address, self.path)
    }
}

/// Where model servers have their page by default, most telling first: Triton; TorchServe and MLServer; vLLM and
/// trtllm-serve; SGLang; TGI.
const KNOWN_PORTS: [u16; 7] = [8002, 8082, 8000, 30_000, 3000, 8080, 80];

/// The page's usual paths. The second is trtllm-serve's, whose first is JSON.
const KNOWN_PATHS: [&str; 2] = ["/metrics", "/prometheus/metrics"];

/// The most ports that are tried.
const MAX_PORTS: usize = 16;

/// Where to look, in this order.
pub fn targets(page: &Where, ports: &[Port]) -> Vec<Target> {
    let at = |address: SocketAddr, kind: Option<Kind>, path: Option<&String>| {
        let paths = match path {
            Some(path) => vec![path.clone()],
            None => KNOWN_PATHS.map(str::to_owned).to_vec(),
        };
        paths.into_iter().map(move |path| Target { address, path, kind })
    };
    match page {
        Where::Off => Vec::new(),
        Where::Declared { kind, port, path } => {
            // All ports of a pod have its address; a pod without ports is ourselves.
            let ip = ports.first().map_or(std::net::Ipv4Addr::LOCALHOST.into(), |port| port.address.ip());
            at(SocketAddr::new(ip, *port), *kind, path.as_ref()).collect()
        }
        Where::Detect => {
            let rank = |port: &Port| KNOWN_PORTS.iter().position(|known| *known == port.address.port());
            let mut tried: Vec<_> =
                ports.iter().filter(|port| port.declared || rank(port).is_some()).collect();
            tried.sort_by_key(|port| (rank(port).unwrap_or(usize::MAX), port.address.port()));
            tried.truncate(MAX_PORTS);
            tried.into_iter().flat_map(|port| at(port.address, None, None)).collect()
        }
    }
}

/// How a round of looking ended without a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fruitless {
    /// Somebody did not answer: the server may be starting, which takes minutes.
    Silent,
    /// Everybody answered and had something else to say.
    Strange,
}

/// How long to wait before the next round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Patience {
    rounds: u32,
}

impl Patience {
    /// After another round. `random` (0 to 1) spreads the replicas of a rollout.
    pub fn next(&mut self, end: Fruitless, random: f64) -> Duration {
        const FIRST: Duration = Duration::from_millis(250);
        let longest = match end {
            // Found within ten seconds of its start.
            Fruitless::Silent => Duration::from_secs(10),
            // Probably no model server; its log must not fill with us.
            Fruitless::Strange => Duration::from_secs(300),
        };
        let whole = FIRST.saturating_mul(1 << self.rounds.min(16)).min(longest);
        self.rounds = self.rounds.saturating_add(1);
        whole.mul_f64(0.75 + random.clamp(0.0, 1.0) / 4.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(number: u16, declared: bool) -> Port {
        Port { address: SocketAddr::from(([10, 0, 0, 7], number)), declared }
    }

    fn shown(page: &Where, ports: &[Port]) -> Vec<String> {
        targets(page, ports).iter().map(Target::to_string).collect()
    }

    #[test]
    fn a_place_is_read_and_written() {
        for text in ["detect", "off", "8002", "vllm:8000", "triton:8002/metrics", "9000/a/b"] {
            let page: Where = text.parse().unwrap();
            assert_eq!(page.to_string(), text);
        }
        for (text, why) in [
            ("caffe:8000", "no model server that is known"),
            ("vllm:", "\"\" is not a port"),
            ("0", "not a port"),
            ("http://x", "no model server"),
            ("8000/a b", "not a path"),
        ] {
            let error = text.parse::<Where>().unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("vllm:8000/metrics"), "{error}");
        }
    }

    #[test]
    fn only_ports_that_the_pod_declares_are_tried_and_the_known_ones_first() {
        let ports = [port(5432, false), port(9999, true), port(8000, false), port(8002, true)];
        let first: Vec<_> =
            targets(&Where::Detect, &ports).iter().map(|target| target.address.port()).collect();
        assert_eq!(first, [8002, 8002, 8000, 8000, 9999, 9999]);
        assert_eq!(shown(&Where::Detect, &ports)[0], "http://10.0.0.7:8002/metrics");
        assert_eq!(shown(&Where::Detect, &[]), [""; 0]);
        assert_eq!(shown(&Where::Off, &ports), [""; 0]);
    }

    #[test]
    fn a_declared_place_is_the_only_one() {
        let ports = [port(8000, true)];
        let page: Where = "vllm:9100/m".parse().unwrap();
        let [target] = &targets(&page, &ports)[..] else { panic!("one place") };
        assert_eq!((target.to_string().as_str(), target.kind), ("http://10.0.0.7:9100/m", Some(Kind::Vllm)));
        let page: Where = "9100".parse().unwrap();
        assert_eq!(
            shown(&page, &[]),
            ["http://127.0.0.1:9100/metrics", "http://127.0.0.1:9100/prometheus/metrics"]
        );
    }

    #[test]
    fn a_stranger_is_asked_ever_more_seldom_and_a_silent_port_is_not_given_up() {
        for (end, longest) in [(Fruitless::Silent, 10), (Fruitless::Strange, 300)] {
            let mut patience = Patience::default();
            let waits: Vec<_> = (0..20).map(|_| patience.next(end, 1.0)).collect();
            assert_eq!(waits[..3].iter().map(Duration::as_millis).collect::<Vec<_>>(), [250, 500, 1000]);
            assert_eq!(waits[19], Duration::from_secs(longest));
            assert!(Patience::default().next(end, 0.0) < waits[0]);
        }
    }
}
