//! What the sidecars say of executions that requests shared, read off their metrics pages.

use std::net::SocketAddrV4;

use http_body_util::Full;
use hyper::Request;
use hyper::body::Bytes;
use serde::{Deserialize, Serialize};

use crate::connection::{Connection, body};

/// Sums over all sidecars.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sharing {
    /// Requests that went through a batch.
    pub(crate) members: u64,
    /// Batches, and the rows in them.
    pub(crate) batches: u64,
    /// As above.
    pub(crate) rows: u64,
    /// Requests that got the answer to another that was the same.
    pub(crate) coalesced: u64,
    /// Executions at the model servers.
    pub(crate) executions: u64,
    /// Those of them whose tensors were in memory that the server reads too.
    #[serde(default)]
    pub(crate) placed: u64,
}

impl Sharing {
    /// What the sidecars with these admin addresses have counted so far; one that does not answer has counted nothing.
    pub(super) async fn read(admins: &[SocketAddrV4]) -> Self {
        let mut sum = Self::default();
        for admin in admins {
            sum.add(&page(*admin).await.unwrap_or_default());
        }
        sum
    }

    fn add(&mut self, page: &str) {
        let count = |name| value(page, name) as u64;
        self.members += count("penstock_batch_members_total");
        self.batches += count("penstock_batches_total");
        self.rows += count("penstock_batch_rows_total");
        self.coalesced += count("penstock_coalesced_total{result=\"coalesced\"}");
        self.executions += count("penstock_executions_total");
        self.placed += count("penstock_executions_placed_total");
    }

    /// What was counted since.
    pub(super) fn since(self, before: Self) -> Self {
        Self {
            members: self.members.saturating_sub(before.members),
            batches: self.batches.saturating_sub(before.batches),
            rows: self.rows.saturating_sub(before.rows),
            coalesced: self.coalesced.saturating_sub(before.coalesced),
            executions: self.executions.saturating_sub(before.executions),
            placed: self.placed.saturating_sub(before.placed),
        }
    }

    /// Rows of a batch on average.
    pub(crate) fn rows_per_batch(self) -> f64 {
        if self.batches == 0 { 0.0 } else { self.rows as f64 / self.batches as f64 }
    }

    /// Executions that sharing saved.
    pub(crate) fn saved(self) -> u64 {
        (self.members + self.coalesced).saturating_sub(self.executions)
    }
}

/// The sum of a metric's values over its labels.
pub(super) fn value(page: &str, name: &str) -> f64 {
    let values = page.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let is_it = rest.starts_with([' ', '{']);
        rest.rsplit_once(' ')?.1.parse::<f64>().ok().filter(|_| is_it)
    });
    values.sum()
}

/// The metrics page of a sidecar.
pub(super) async fn page(admin: SocketAddrV4) -> Option<String> {
    let request =
        Request::get("/metrics").header("host", admin.to_string()).body(Full::<Bytes>::default()).ok()?;
    let answer = Connection::to(admin.to_string()).send(request).await.ok()?;
    String::from_utf8(body(answer).await.ok()?.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_added_over_labels() {
        let page = "# HELP penstock_batches_total x\npenstock_batches_total{closed=\"idle\"} 3\n\
                    penstock_batches_total{closed=\"full\"} 4\npenstock_batches_totally 9\npenstock_executions_total 5\npenstock_executions_placed_total 2\n\
                    penstock_coalesced_total{result=\"coalesced\"} 2\npenstock_coalesced_total{result=\"miss\"} 7\n";
        let mut sum = Sharing::default();
        sum.add(page);
        sum.add(page);
        assert_eq!((sum.batches, sum.executions, sum.placed, sum.coalesced), (14, 10, 4, 4));
        assert_eq!(sum.since(Sharing { batches: 4, ..Sharing::default() }).batches, 10);
    }
}
