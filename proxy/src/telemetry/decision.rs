//! How an endpoint was chosen, in the words that a tap shows.

use std::sync::Arc;

use penstock_api::v1::{Candidate, Decision};
use penstock_balance::{Candidate as _, Explained, Look, Members, Policy};

use crate::config::Endpoint;

/// The choice of one of `endpoints`, by `policy`, at a time.
pub fn decision(
    endpoints: &Members<Arc<Endpoint>>,
    policy: Policy,
    explained: &Explained,
) -> Option<Box<Decision>> {
    let (winner, why) = explained.winner?;
    let mut candidates: Vec<_> = explained
        .looks()
        .iter()
        .map(|look| looked_at(&endpoints[look.index], policy, look, winner))
        .collect();
    if !candidates.iter().any(|candidate| candidate.picked) {
        candidates.push(unseen(&endpoints[winner]));
    }
    Some(Box::new(Decision {
        policy: policy.as_str().to_owned(),
        why: why.as_str().to_owned(),
        endpoints: endpoints.len() as u32,
        candidates,
    }))
}

fn looked_at(endpoint: &Endpoint, policy: Policy, look: &Look, winner: usize) -> Candidate {
    let foretold = matches!(policy, Policy::Gpu | Policy::Prefix);
    Candidate {
        endpoint: endpoint.name.to_string(),
        picked: look.index == winner,
        score: Some(look.score),
        predicted_ms: foretold.then_some(look.prediction.ms),
        own_ms: foretold.then_some(look.prediction.this_ms),
        in_flight: look.prediction.in_flight,
        report_age_ms: look.prediction.age_ms,
        matched: look.matched,
        heat: if foretold { look.heat.as_str().to_owned() } else { String::new() },
        affine: look.affine,
    }
}

/// The winner of a policy that takes turns, or goes by the key.
fn unseen(endpoint: &Endpoint) -> Candidate {
    Candidate {
        endpoint: endpoint.name.to_string(),
        picked: true,
        in_flight: endpoint.state().in_flight() as f32,
        ..Candidate::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use penstock_balance::{Ask, Pool, Settings};
    use rand::SeedableRng as _;
    use rand::rngs::SmallRng;

    use crate::config::Speak;

    fn endpoints() -> Members<Arc<Endpoint>> {
        let endpoint = |port: u16| {
            let address = ([127, 0, 0, 1], port).into();
            Arc::new(Endpoint::new(format!("a/pod-{port}").into(), address, port, None, true, Speak::Same))
        };
        Members::new((1..=3).map(endpoint).collect())
    }

    fn decide(policy: Policy) -> Decision {
        let (endpoints, pool) = (endpoints(), Pool::default());
        let mut looks = Explained::default();
        let settings = Settings { policy, ..Settings::default() };
        let mut random = SmallRng::seed_from_u64(7);
        let picked = pool
            .explain(&endpoints, &settings, &Ask::one(Duration::from_secs(1)), &mut random, &mut looks)
            .unwrap();
        let decision = *decision(&endpoints, policy, &looks).unwrap();
        let winners: Vec<_> = decision.candidates.iter().filter(|candidate| candidate.picked).collect();
        assert_eq!(winners.len(), 1, "{decision:?}");
        assert_eq!(winners[0].endpoint, *endpoints[picked.index].name);
        assert_eq!(decision.why, picked.why.as_str());
        decision
    }

    #[test]
    fn what_was_looked_at_is_shown_and_what_was_not_is_not() {
        let gpu = decide(Policy::Gpu);
        assert_eq!((gpu.policy.as_str(), gpu.endpoints, gpu.candidates.len()), ("gpu", 3, 3));
        assert!(gpu.candidates.iter().all(|candidate| candidate.predicted_ms.is_some()), "{gpu:?}");
        let fewest = decide(Policy::LeastRequest);
        assert_eq!((fewest.why.as_str(), fewest.candidates.len()), ("fewest-requests", 2));
        assert!(fewest.candidates.iter().all(|candidate| candidate.predicted_ms.is_none()), "{fewest:?}");
        for policy in [Policy::RoundRobin, Policy::RingHash, Policy::OrcaWrr] {
            let turn = decide(policy);
            assert_eq!((turn.candidates.len(), turn.candidates[0].score), (1, None), "{turn:?}");
        }
    }

    #[test]
    fn no_choice_is_no_decision() {
        assert_eq!(decision(&endpoints(), Policy::Gpu, &Explained::default()), None);
    }
}
