//! Which port of our own pod a connection leads to, as things are now.
//!
//! In: the port that was asked for, and who asks. Out: the port, what the kubelet may ask it for, or a refusal. It is asked when a
//! connection is opened and again for each of its requests: a proxy may be told of a port after the port is called, pods
//! become strict or permissive, and what was so when a connection was opened must hold nobody up, and let nobody in, for
//! as long as it lives.

use std::sync::Arc;

use penstock_api::Reason;
use penstock_api::access::{Came, Entry};

use super::entry;
use crate::connection::{Connection, To, plaintext_refused};
use crate::failure::Failure;
use crate::worker::Worker;

/// What an arrival leads to, and as what it is served.
pub fn at(worker: &Worker, port: Option<u16>, came: Came, proven: bool) -> (Entry, To) {
    let to = own_port(worker, port);
    let probes = if proven { None } else { probes(worker, port) };
    let entry = entry(worker, &to, probes.is_some(), came, proven);
    let to = match (entry, probes) {
        (Entry::Probes, Some(probes)) => probes,
        (Entry::NotSecured, _) => To::NotYet(port, plaintext_refused(&worker.shared.node)),
        _ => to,
    };
    (entry, to)
}

/// What a request over the connection leads to.
pub fn now(connection: &Connection) -> To {
    let then = &connection.to;
    let (worker, proven) = (&connection.worker, connection.client.is_some());
    let port = match then {
        To::Mesh | To::Static(_) | To::Refusal(_) => return then.clone(),
        To::NotYet(port, _) => *port,
        To::Probes(workload, index) => Some(workload.probes[*index].port.port),
        To::Application(workload, index) => {
            let snapshot = worker.shared.store.snapshot();
            // A workload that control takes back is about to be told anew; that is no word about its ports.
            let Some(now) = &snapshot.workload else { return then.clone() };
            if Arc::ptr_eq(now, workload) && (proven || now.permissive) {
                return then.clone();
            }
            Some(workload.ports[*index].port)
        }
    };
    match (at(worker, port, Came::Http, proven), then) {
        // Whoever came while the port was declared is served to the end, and judged by what is in force.
        ((Entry::NoPort, _), To::Application(..)) => then.clone(),
        ((_, to), _) => to,
    }
}

/// The port of our own pod that a connection is for.
fn own_port(worker: &Worker, port: Option<u16>) -> To {
    let snapshot = worker.shared.store.snapshot();
    let Some(workload) = &snapshot.workload else {
        let story = format!("control has not told {} about its own ports yet", worker.shared.node);
        return To::NotYet(port, Failure::unprocessed(Reason::NoConfig, story));
    };
    // A pod with one port leaves no question, whatever the client says or does not say.
    let asked = port;
    let port = port.or(match workload.ports.as_slice() {
        [only] => Some(only.port),
        _ => None,
    });
    port.and_then(|port| To::application(workload, port)).unwrap_or_else(|| {
        let ports: Vec<_> = workload.ports.iter().map(|port| port.port.to_string()).collect();
        let said = port.map_or_else(|| "no port".to_owned(), |port| format!("port {port}"));
        let story = format!("{} was asked for {said}; it declares {}", workload.name, ports.join(", "));
        To::NotYet(asked, Failure::unprocessed(Reason::UnknownPort, story))
    })
}

/// What the kubelet may ask that port for.
fn probes(worker: &Worker, port: Option<u16>) -> Option<To> {
    let snapshot = worker.shared.store.snapshot();
    let workload = snapshot.workload.as_ref()?;
    // As for everybody else: with one port there is no question.
    let port = port.or(match workload.ports.as_slice() {
        [only] => Some(only.port),
        _ => None,
    });
    To::probes(workload, port?)
}
