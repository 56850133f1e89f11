//! `/endpoints`: the endpoints of each Service, joined by what the clients' proxies see. Pure.

use std::collections::BTreeMap;

use penstock_api::resource::Kind;
use penstock_api::v1;
use penstock_api::view::{EndpointRow, Load, ProxyEndpoint};
use prost::Message;

use crate::snapshot::Snapshot;

/// Rows for everything in the snapshot and everything that a proxy holds: the worst state that anyone sees, the sum
/// of the requests in flight, the newest load report.
pub(super) fn join(snapshot: &Snapshot, seen: Vec<Vec<ProxyEndpoint>>) -> Vec<EndpointRow> {
    let mut rows: BTreeMap<(String, String, String), EndpointRow> = BTreeMap::new();
    for (service, entry) in snapshot.all(Kind::Endpoints) {
        let Ok(v1::Endpoints { endpoints }) = v1::Endpoints::decode(&*entry.any.value) else { continue };
        for endpoint in endpoints {
            let state = if endpoint.draining { "draining" } else { "ready" };
            for address in addresses(&endpoint) {
                let row = row(&mut rows, service, &endpoint.name, &address);
                row.identity.clone_from(&endpoint.identity);
                worsen(row, state);
            }
        }
    }
    for one in seen.into_iter().flatten() {
        let row = row(&mut rows, &one.service, &one.endpoint, &one.address);
        if row.identity.is_empty() {
            row.identity = one.identity;
        }
        worsen(row, &one.state);
        row.in_flight += one.in_flight;
        let age = |load: &Option<Load>| load.as_ref().map_or(f64::INFINITY, |load| load.age_ms);
        if age(&one.load) < age(&row.load) {
            row.load = one.load;
        }
    }
    rows.into_values().collect()
}

/// Where an endpoint is dialled: at its proxy if that has a port of its own, else at each target port.
fn addresses(endpoint: &v1::Endpoint) -> Vec<String> {
    let at = |port: u32| {
        if endpoint.ip.contains(':') {
            format!("[{}]:{port}", endpoint.ip)
        } else {
            format!("{}:{port}", endpoint.ip)
        }
    };
    if endpoint.inbound_port != 0 {
        return vec![at(endpoint.inbound_port)];
    }
    endpoint.ports.iter().map(|port| at(port.port)).collect()
}

fn row<'a>(
    rows: &'a mut BTreeMap<(String, String, String), EndpointRow>,
    service: &str,
    endpoint: &str,
    address: &str,
) -> &'a mut EndpointRow {
    let key = (service.to_owned(), endpoint.to_owned(), address.to_owned());
    rows.entry(key).or_insert_with(|| EndpointRow {
        service: service.to_owned(),
        endpoint: endpoint.to_owned(),
        address: address.to_owned(),
        ..EndpointRow::default()
    })
}

fn worsen(row: &mut EndpointRow, state: &str) {
    let badness = |state: &str| match state {
        "" => 0,
        "ready" => 1,
        "draining" => 2,
        _ => 3,
    };
    if badness(state) > badness(&row.state) {
        row.state = state.to_owned();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Builder;

    #[test]
    fn an_endpoint_shows_its_worst_state_its_whole_load_and_its_newest_report() {
        let endpoint = v1::Endpoint {
            name: "a/p0".into(),
            ip: "127.0.0.11".into(),
            inbound_port: 15006,
            identity: "spiffe://cluster.local/ns/a/sa/b".into(),
            ..v1::Endpoint::default()
        };
        let unseen = v1::Endpoint {
            name: "a/p1".into(),
            ip: "::1".into(),
            ports: vec![v1::PortTarget { service_port: 80, port: 8000 }],
            draining: true,
            ..v1::Endpoint::default()
        };
        let mut builder = Builder::default();
        builder.add(Kind::Endpoints, "a/s", &v1::Endpoints { endpoints: vec![endpoint, unseen] });
        let seen = |state: &str, in_flight, age_ms| ProxyEndpoint {
            service: "a/s".into(),
            port: 80,
            endpoint: "a/p0".into(),
            address: "127.0.0.11:15006".into(),
            state: state.into(),
            in_flight,
            load: Some(Load { age_ms, ..Load::default() }),
            ..ProxyEndpoint::default()
        };
        let answers =
            vec![vec![seen("ready", 2, 50.0)], vec![seen("ejected", 3, 10.0)], vec![seen("ready", 0, 90.0)]];
        let rows = join(&builder.build(Vec::new()), answers);
        let short: Vec<_> = rows
            .iter()
            .map(|row| {
                (
                    &*row.endpoint,
                    &*row.address,
                    &*row.state,
                    row.in_flight,
                    row.load.as_ref().map(|l| l.age_ms),
                )
            })
            .collect();
        assert_eq!(
            short,
            [
                ("a/p0", "127.0.0.11:15006", "ejected", 5, Some(10.0)),
                ("a/p1", "[::1]:8000", "draining", 0, None),
            ]
        );
        assert_eq!(rows[0].identity, "spiffe://cluster.local/ns/a/sa/b");
    }
}
