//! The network of one of two servers: it loses packets, is slow, resets, or takes everything and says nothing.

use std::time::Duration;

use super::world::{FAULT, Outcome, World};

/// What the wire of `web-2` does, for a while.
async fn a_bad_wire(fault: &'static str, loss_percent: u8, delay: Duration) -> Option<Outcome> {
    let world = World::new(|pods| pods).await?;
    let mut wire = world.pods.network.worse(&world.pods.pod("web-2").machine);
    let mut world = world.under_load().await;
    wire.becomes(loss_percent, delay);
    tokio::time::sleep(FAULT).await;
    assert!(wire.becomes(0, Duration::ZERO) > 0, "nothing was lost or late");
    world.recovers().await;
    Some(world.told(fault).await)
}

#[tokio::test]
async fn five_percent_of_packets_lost_fail_no_request() {
    let Some(seen) = a_bad_wire("loss of 5 %", 5, Duration::ZERO).await else { return };
    seen.get.has_no_failure("GET");
    seen.post.has_no_failure("POST");
}

#[tokio::test]
async fn thirty_percent_of_packets_lost_fail_no_request_that_may_be_asked_twice() {
    let Some(seen) = a_bad_wire("loss of 30 %", 30, Duration::ZERO).await else { return };
    seen.get.has_no_failure("GET");
    seen.post.fails_at_most(40, &["request-timeout", "upstream-reset"], "POST");
}

#[tokio::test]
async fn a_delay_of_100_ms_each_way_fails_no_request() {
    let delay = Duration::from_millis(100);
    let Some(seen) = a_bad_wire("delay of 100 ms", 0, delay).await else { return };
    seen.get.has_no_failure("GET");
    seen.post.has_no_failure("POST");
    // Only the first few requests need meet it.
    assert!(seen.longest() > delay, "nobody noticed: {:?}, {:?}", seen.get, seen.post);
}

/// A rule for everything that comes to `web-2`, for a while.
async fn a_rule(fault: &'static str, rule: &str) -> Option<Outcome> {
    let mut world = World::new(|pods| pods).await?.under_load().await;
    let machine = world.pods.pod("web-2").machine.namespace.share();
    machine.run(&format!(
        "nft 'table inet fault {{ chain input {{ type filter hook input priority filter; iifname eth0 {rule}; }}; }}'"
    ));
    tokio::time::sleep(FAULT).await;
    assert!(!world.is_answered_by("web-2", FAULT / 2), "the rule keeps nobody out");
    machine.run("nft delete table inet fault");
    world.recovers().await;
    Some(world.told(fault).await)
}

#[tokio::test]
async fn a_server_whose_connections_are_reset_costs_at_most_what_was_under_way() {
    let Some(seen) = a_rule("reset", "meta l4proto tcp reject with tcp reset").await else { return };
    seen.get.has_no_failure("GET");
    seen.post.fails_at_most(20, &["upstream-reset"], "POST");
    assert!(seen.get.longest < Duration::from_secs(2), "a reset is known at once: {:?}", seen.get);
}

#[tokio::test]
async fn a_server_that_nothing_reaches_costs_at_most_what_was_sent_to_it_before_that_was_known() {
    let Some(seen) = a_rule("blackhole", "drop").await else { return };
    // One try of a second, and the other server.
    seen.get.has_no_failure("GET");
    assert!(seen.get.longest < Duration::from_secs(4), "{:?}", seen.get);
    // Nobody knows of what was sent whether it has arrived.
    seen.post.fails_at_most(40, &["request-timeout", "upstream-reset"], "POST");
}
